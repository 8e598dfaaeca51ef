"""PEFT's LoRA layers with the forward of routed LoRA: the same parameters, state dict and methods, another class.

A layer whose adapters are plain LoRA computes, for the active adapters i,

    y = base(x) + Σ_i scaling_i · drop_i(x)·A_i·B_i

in one sum where its base is nn.Linear or transformers' Conv1D, and on the output of the base where that is anything
else (quantised, hooked). Whatever is not plain LoRA goes through PEFT's own forward, call by call.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from peft.import_utils import is_bnb_4bit_available, is_bnb_available
from peft.tuners.lora.layer import Linear
from peft.tuners.lora.torchao import TorchaoLoraLinear
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ...autograd.routed_lora import routed_lora_delta, routed_lora_linear
from ...autograd.routed_lora.arguments import DTYPES
from ...library import PLAIN_TYPES
from ...modules.adapter import why_not_replaceable
from ...modules.sharded import is_sharded

_Base: Any = Linear if TYPE_CHECKING else object

Parts = tuple[nn.Linear, nn.Linear, nn.Module]  # lora_A, lora_B and the dropout of an adapter

_told: set[str] = set()

MOST_RANKS = 256
"""Of a batch whose samples name their adapters: ranks of all of them together, up to which one call computes them."""


class Accelerated(_Base):
    """Stands before a class of PEFT's LoRA layers and takes its calls.

    Attributes:
        fell_back: why the last call that PEFT's own forward took was left to it; None while there was none.
    """

    fell_back: str | None = None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """y ``[..., N]`` for x ``[..., K]``, as of the PEFT layer."""
        if not (args or kwargs) and (glance := self._at_a_glance(x)) is not None:
            return routed_lora_linear(x, **glance)
        adapter_names = kwargs.get("adapter_names")
        parts = self.parts(self.active_adapters if adapter_names is None else sorted({*adapter_names}))
        if self.disable_adapters or self.merged_adapters or not parts:
            return super().forward(x, *args, **kwargs)  # the base layer's output, or the error that is due
        why = self.why_left(parts) or self._why_left_call(x, parts, args, kwargs)
        if why is not None:
            self.fell_back = why
            if why not in _told and not torch.compiler.is_compiling():
                _told.add(why)
                warnings.warn(f"an accelerated LoRA layer goes through PEFT's own forward: {why}", stacklevel=2)
            return super().forward(x, *args, **kwargs)
        if adapter_names is not None:
            self._check_forward_args(x, adapter_names=adapter_names)
            return output_with([_joined(parts, self._gate_of_samples(x, parts, adapter_names))], self.base_layer, x)
        adapters = [self._adapter(name, weight_of(A), weight_of(B), drop) for name, (A, B, drop) in parts.items()]
        if len(parts) > 1 and not any(adapter["dropout_p"] for adapter in adapters):
            gates = [x.new_full((a["lora_A"].shape[0],), a["scaling"], dtype=torch.float32) for a in adapters]
            adapters = [_joined(parts, torch.cat(gates))]
        return output_with(adapters, self.base_layer, x)

    def _at_a_glance(self, x: Tensor) -> dict[str, Any] | None:
        """The arguments of :func:`clora_kernels.routed_lora_linear` where one adapter is active and all is plain, in a
        third of the time that it takes to find out by :meth:`why_left` and the rest; None where those must look."""
        names, own = self.active_adapters, self._modules
        if len(names) != 1 or self.disable_adapters or self.merged_adapters or names[0] in self.lora_variant:
            return None
        (name,) = names
        A, B, drop = (own[part]._modules.get(name) for part in ("lora_A", "lora_B", "lora_dropout"))
        base = own["base_layer"]
        if not (type(A) is type(B) is type(base) is nn.Linear) or _are_watched(A, B, drop, base):
            return None
        of_A, of_B, of_base = A._parameters, B._parameters, base._parameters
        lora_A, lora_B, weight = of_A.get("weight"), of_B.get("weight"), of_base.get("weight")
        if (
            type(x) in PLAIN_TYPES
            and type(lora_A) is type(lora_B) is type(weight) is nn.Parameter
            and of_A["bias"] is of_B["bias"] is None
            and type(drop) in (nn.Dropout, nn.Identity)
            and lora_A.dtype in DTYPES
            and lora_B.dtype in DTYPES
            and weight.dtype in DTYPES
            and x.device == lora_A.device == lora_B.device
            and not _all_are_watched()
        ):
            return {"weight": weight, "bias": of_base["bias"], **self._adapter(name, lora_A, lora_B, drop)}
        return None

    def _adapter(self, name: str, lora_A: Tensor, lora_B: Tensor, drop: nn.Module) -> dict[str, Any]:
        return {"lora_A": lora_A, "lora_B": lora_B, "scaling": self.scaling[name], "dropout_p": _dropout_p(drop)}

    def parts(self, names: Sequence[str]) -> dict[str, Parts]:
        """Those of the named adapters that this layer has: lora_A, lora_B and the dropout of each."""
        # Past nn.Module's look-up, which takes longer than what is computed for few tokens.
        own = self._modules
        A, B, drop = own["lora_A"]._modules, own["lora_B"]._modules, own["lora_dropout"]._modules
        return {name: (A[name], B[name], drop[name]) for name in names if name in A}

    def why_left(self, parts: Mapping[str, Parts], gathered: bool = False) -> str | None:
        """Why calls with these adapters are PEFT's, or None; ``gathered``: once what is sharded now is whole."""
        variants = self.lora_variant
        for name, (A, B, drop) in parts.items():
            if name in variants:
                return f"adapter {name!r} is a {type(variants[name]).__name__}, not plain LoRA"
            for linear in (A, B):
                if type(linear) is not nn.Linear:
                    return f"adapter {name!r} is made of {type(linear).__name__}, not nn.Linear"
                own = linear._parameters
                if own["bias"] is not None:
                    return f"adapter {name!r} has a bias"
                weight = own.get("weight")
                plain = weight is not None and (is_plain(weight) or (gathered and is_sharded(weight)))
                if weight is None or not plain or weight.dtype not in DTYPES:
                    return f"adapter {name!r} holds no plain weight in one of {', '.join(map(str, DTYPES))}"
            if type(drop) not in (nn.Dropout, nn.Identity):
                return f"adapter {name!r} drops by {type(drop).__name__}, not nn.Dropout"
            if _are_watched(A, B, drop):
                return f"a part of adapter {name!r} carries hooks or a patched forward"
        if _all_are_watched():
            return "hooks of all modules are registered"
        return None

    def _why_left_call(self, x: Tensor, parts: Mapping[str, Parts], args: Any, kwargs: Mapping[str, Any]) -> str | None:
        if args or (kwargs and [k for k, value in kwargs.items() if value is not None and k != "adapter_names"]):
            return "the layer is called with further arguments"
        if not is_plain(x):
            return f"x is a {type(x).__name__}"
        device = x.device
        for A, B, _ in parts.values():
            if weight_of(A).device != device or weight_of(B).device != device:
                return "an adapter is on another device than x"
        if kwargs and kwargs.get("adapter_names") is not None:
            if any(_dropout_p(drop) for _, _, drop in parts.values()):
                return "the samples of a batch name their adapters, and these drop"
            if sum(A.weight.shape[0] for A, _, _ in parts.values()) > MOST_RANKS:
                return f"the samples of a batch name adapters of more than {MOST_RANKS} ranks together"
        return None

    def _gate_of_samples(self, x: Tensor, parts: Mapping[str, Parts], adapter_names: Sequence[str]) -> Tensor:
        """[S, 1, ..., Σr]: the scaling of the adapter that a sample names over its ranks, 0 over those of others."""
        rows = [[self.scaling[name] if name == wanted else 0.0 for name in parts] for wanted in adapter_names]
        ranks = torch.tensor([A.weight.shape[0] for A, _, _ in parts.values()])
        gate = torch.tensor(rows).repeat_interleave(ranks, 1).to(x.device)
        return gate.reshape(len(rows), *(1,) * (x.dim() - 2), -1)


def _joined(parts: Mapping[str, Parts], gate: Tensor) -> dict[str, Any]:
    """Several adapters as one whose gate holds their scalings."""
    A, B, _ = zip(*parts.values(), strict=True)
    return {"lora_A": torch.cat([a.weight for a in A]), "lora_B": torch.cat([b.weight for b in B], 1), "gate": gate}


def _dropout_p(drop: nn.Module) -> float:
    return drop.p if isinstance(drop, nn.Dropout) and drop.training else 0.0


def is_plain(t: Tensor) -> bool:
    """Whether a tensor holds values, rather than other tensors that mean something together (DTensor, quantised)."""
    return type(t) in PLAIN_TYPES or not is_traceable_wrapper_subclass(t)


def weight_of(linear: nn.Module) -> Any:
    """The weight of a layer that was found to be plain, past nn.Module's look-ups."""
    return linear._parameters["weight"]


def output_with(adapters: list[dict[str, Any]], base: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The output of ``base`` for x and further arguments with the adapters, given as arguments of
    :func:`clora_kernels.routed_lora_delta`, on top: the first of them in one sum with the base where that can be."""
    if adapters and not args and not kwargs and why_not_fused(base) is None:
        first, *adapters = adapters
        weight, bias = weight_of(base), base._parameters["bias"]
        y = routed_lora_linear(x, weight if isinstance(base, nn.Linear) else weight.mT, bias=bias, **first)
    else:
        y = base(x, *args, **kwargs)
    for adapter in adapters:
        y = routed_lora_delta(x, **adapter, base_output=y)
    return y


def why_not_fused(base: nn.Module) -> str | None:
    """Why ``base`` has to be called for its output, or None where its weight is read instead."""
    if (why := why_not_replaceable(base)) is not None:
        return why
    if not is_plain(weight := weight_of(base)):
        return f"its weight is a {type(weight).__name__}"
    return None


def _all_are_watched() -> bool:
    of_all = torch_module
    forward = of_all._global_forward_hooks or of_all._global_forward_pre_hooks
    return bool(forward or of_all._global_backward_hooks or of_all._global_backward_pre_hooks)


def _are_watched(*modules: nn.Module) -> bool:
    for module in modules:
        own = vars(module)
        if own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]:
            return True
        if "forward" in own:
            return True
    return False


class AcceleratedLinear(Accelerated, Linear):
    """PEFT's LoRA of a linear layer."""


class AcceleratedTorchaoLoraLinear(Accelerated, TorchaoLoraLinear):
    """PEFT's LoRA of a linear layer whose weight torchao quantised."""


TYPES: dict[type, type] = {Linear: AcceleratedLinear, TorchaoLoraLinear: AcceleratedTorchaoLoraLinear}

if is_bnb_available():
    from peft.tuners.lora.bnb import Linear8bitLt

    class AcceleratedLinear8bitLt(Accelerated, Linear8bitLt):
        """PEFT's LoRA of a linear layer that bitsandbytes quantised to 8 bit."""

    TYPES[Linear8bitLt] = AcceleratedLinear8bitLt

if is_bnb_4bit_available():
    from peft.tuners.lora.bnb import Linear4bit

    class AcceleratedLinear4bit(Accelerated, Linear4bit):
        """PEFT's LoRA of a linear layer that bitsandbytes quantised to 4 bit."""

    TYPES[Linear4bit] = AcceleratedLinear4bit
