"""The layer that PEFT puts in the place of a linear one: y = base(x) + Σ_i s_i · drop_i(x)·A_i·(R_old + R)_i·B_i."""

from __future__ import annotations

import math
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features, check_adapters_to_merge
from torch import Tensor, nn

from ....autograd.routed_lora import merge_routed_lora
from ....autograd.routed_lora.arguments import DTYPES
from ....modules.adapter import MERGE_ROWS, why_not_adaptable
from ..layers import is_plain, output_with
from .config import RoutedLoraConfig


class _Parameters(nn.ParameterDict):
    """A parameter that takes the place of another learns where that one did; PEFT casts and moves adapters by putting
    tensors in their place, which would all learn, those of inactive adapters too."""

    def __setitem__(self, key: str, value: Any) -> None:
        learns = self[key].requires_grad if key in self else True
        super().__setitem__(key, value)
        self[key].requires_grad_(learns)


def features(module: nn.Module) -> tuple[int, int]:
    """(in_features, out_features) of what maps x ``[..., K]`` to ``[..., N]``; TypeError for anything else."""
    base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    other = (nn.Embedding, nn.MultiheadAttention, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    if not isinstance(base, other) and (
        isinstance(base, nn.Linear)
        or why_not_adaptable(base) is None
        or all(isinstance(getattr(base, name, None), int) for name in ("in_features", "out_features"))
    ):
        K, N = _get_in_out_features(base)
        if K is not None and N is not None:
            return K, N
    raise TypeError(
        f"target_modules: got a {type(base).__name__}, expected nn.Linear, transformers' Conv1D or a module with "
        "in_features and out_features"
    )


class RoutedLinear(nn.Module, BaseTunerLayer):
    """A linear layer of any kind with routed LoRA adapters by name.

    Parameters, of adapter i: lora_A[i] ``[r, K]``, lora_B[i] ``[N, r]``, lora_routing[i] ``[r, r]``; and the buffer
    lora_frozen_routing[i] ``[r, r]``. Base and first adapter are one sum where the base is a plain nn.Linear or Conv1D;
    else the base (quantised, hooked, wrapped) is called and adapters are added onto its output.
    """

    adapter_layer_names = ("lora_A", "lora_B", "lora_routing")
    # Among the names above R_old would be made trainable.
    other_param_names = ("lora_frozen_routing", "lora_dropout", "scaling")

    def __init__(self, base_layer: nn.Module, adapter_name: str, name: str, config: RoutedLoraConfig) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = features(base_layer)
        self.base_layer = base_layer
        self.lora_A, self.lora_B, self.lora_routing = _Parameters(), _Parameters(), _Parameters()
        self.lora_frozen_routing = BufferDict(persistent=True)
        self.lora_dropout: dict[str, float] = {}
        self.scaling: dict[str, float] = {}
        self.merged_adapters: list[str] = []
        self.frozen_peft_weight_names: dict[str, tuple[str, ...]] = {}
        self._disable_adapters = False
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, name, config)

    def update_layer(self, adapter_name: str, name: str, config: RoutedLoraConfig) -> None:
        """Add an adapter, or start it anew; ``name`` is the layer's, for patterns of rank and alpha."""
        r = config.rank_of(name)
        device, dtype = self._get_base_layer_device_and_dtype(self.get_base_layer())
        options = {"device": device, "dtype": dtype if dtype in DTYPES else torch.get_default_dtype()}
        self.lora_A[adapter_name] = nn.Parameter(torch.empty(r, self.in_features, **options))
        self.lora_B[adapter_name] = nn.Parameter(torch.empty(self.out_features, r, **options))
        self.lora_routing[adapter_name] = nn.Parameter(torch.empty(r, r, **options))
        self.lora_frozen_routing[adapter_name] = torch.empty(r, r, **options)
        self.lora_dropout[adapter_name] = float(config.lora_dropout)
        self.scaling[adapter_name] = config.scaling_of(name)
        self._reset(adapter_name, config.routing_init)
        if config.frozen_factors:
            self.freeze_factors(adapter_name)

    @torch.no_grad()
    def _reset(self, adapter_name: str, routing_init: str) -> None:
        A, B, R, R_old = self.adapter_tensors(adapter_name)
        nn.init.kaiming_uniform_(A, a=math.sqrt(5))
        R_old.zero_()
        if routing_init == "c-lora":
            nn.init.normal_(B, std=1 / math.sqrt(A.shape[0]))
            R.zero_()
        else:
            B.zero_()
            nn.init.eye_(R)

    def adapter_tensors(self, adapter_name: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """lora_A ``[r, K]``, lora_B ``[N, r]``, routing and frozen routing ``[r, r]``."""
        dicts = (self.lora_A, self.lora_B, self.lora_routing, self.lora_frozen_routing)
        A, B, R, R_old = (tensors[adapter_name] for tensors in dicts)
        return A, B, R, R_old

    def freeze_factors(self, adapter_name: str) -> None:
        """A and B of an adapter learn no more, whatever PEFT switches."""
        self.frozen_peft_weight_names[adapter_name] = ("lora_A", "lora_B")
        self._freeze_non_trainable_peft_weights(adapter_name)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """y ``[..., N]`` for x ``[..., K]``; further arguments are the base layer's."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        names = [] if self.disable_adapters or self.merged else [n for n in self.active_adapters if n in self.lora_A]
        return output_with([self._arguments(name) for name in names], self.base_layer, x, *args, **kwargs)

    def _arguments(self, adapter_name: str) -> dict[str, Any]:
        A, B, R, R_old = self.adapter_tensors(adapter_name)
        return {
            "lora_A": A,
            "lora_B": B,
            "routing": R,
            "frozen_routing": R_old,
            "scaling": self.scaling[adapter_name],
            "dropout_p": self.lora_dropout[adapter_name],
            "training": self.training,
        }

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put adapters (None: the active ones) into the base weight: sums in fp32, rounded once an adapter.

        Raises:
            ValueError: a base whose weight is not plain floating-point values (quantised, parametrized, sharded), into
                which no adapter goes exactly; with ``safe_merge``, a merged weight that is not finite. Nothing is
                merged then.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.lora_A]
        if not names:
            return
        weight = self.mergeable_weight()
        into = weight.clone() if safe_merge else weight
        for name in names:
            self._add_to(into, name, 1)
        if safe_merge:
            if not torch.isfinite(into).all():
                raise ValueError(f"adapter_names: got {names}, of which the merged weight is not finite")
            weight.copy_(into)
        self.merged_adapters += names

    def unmerge(self) -> None:
        """Take merged adapters out of the base weight again, as PEFT does: to rounding in the weight's dtype."""
        if not self.merged:
            return
        weight = self.mergeable_weight()
        while self.merged_adapters:
            if (name := self.merged_adapters.pop()) in self.lora_A:
                self._add_to(weight, name, -1)

    def mergeable_weight(self) -> Tensor:
        """The base weight into which adapters can go; ValueError where there is none."""
        base = self.get_base_layer()
        if (why := why_not_adaptable(base)) is None and is_plain(base.get_parameter("weight")):
            return base.get_parameter("weight").data
        why = why or f"its weight is a {type(base.get_parameter('weight')).__name__}"
        raise ValueError(f"base_layer: got one into which no adapter can be merged exactly: {why}")

    @torch.no_grad()
    def _add_to(self, weight: Tensor, adapter_name: str, sign: int) -> None:
        A, B, R, R_old = self.adapter_tensors(adapter_name)
        out = weight if isinstance(self.get_base_layer(), nn.Linear) else weight.mT
        for start in range(0, self.out_features, MERGE_ROWS):
            rows = slice(start, start + MERGE_ROWS)
            out[rows] = merge_routed_lora(
                out[rows], A, B[rows], R, frozen_routing=R_old, scaling=sign * self.scaling[adapter_name]
            )

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: Any = None) -> None:
        """PEFT's rounds what was loaded to the base layer's dtype on the way; here it moves alone."""
        device = device or self._get_base_layer_device_and_dtype(self.get_base_layer())[0]
        for tensors in (self.lora_A, self.lora_B, self.lora_routing, self.lora_frozen_routing):
            if adapter_name in tensors and device is not None and not tensors[adapter_name].is_meta:
                tensors[adapter_name] = tensors[adapter_name].to(device)
