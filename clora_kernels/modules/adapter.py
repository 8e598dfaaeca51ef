"""What every drop-in adapted nn.Linear shares: its base layer, merging that can be undone, and its state dict."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..autograd.routed_lora.arguments import DTYPES
from .sharded import is_sharded, write

if TYPE_CHECKING:
    from typing_extensions import Self

# Rows of the weight that are merged at a time: bounds the fp32 copy.
MERGE_ROWS = 1024


def default_adapter_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp32 under a 16-bit weight, as PEFT keeps adapters; else the weight's own."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def why_not_adaptable(module: nn.Module) -> str | None:
    """Why ``module`` cannot be adapted, or None. Exact types: a subclass's forward may do more than a product."""
    is_conv1d = type(module).__name__ == "Conv1D" and hasattr(module, "nf")
    if type(module) is not nn.Linear and not is_conv1d:
        return f"{type(module).__name__} is neither nn.Linear nor Conv1D"
    weight = module._parameters.get("weight")
    if weight is None:
        return "its weight is no Parameter of its own"
    if weight.dtype not in DTYPES:
        return f"its weight is {weight.dtype}, not one of {', '.join(map(str, DTYPES))}"
    return None


def why_not_replaceable(module: nn.Module) -> str | None:
    """Why ``module`` cannot be replaced by an adapted one that computes all that it does, or None."""
    if (why := why_not_adaptable(module)) is not None:
        return why
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return "it carries hooks, which its replacement would lose"
    if "forward" in vars(module):
        return "its forward is patched, which its replacement would not be"
    return None


class AdapterLinear(nn.Linear):
    """nn.Linear with an adapter beside ``weight`` and ``bias``. A subclass registers the adapter's tensors and says how
    they are merged (``_merged_rows``) and started anew (``reset_adapter``)."""

    fan_in_fan_out: bool
    _unmerged: Tensor | None

    def __init__(self, in_features: int, out_features: int, bias: bool, device: Any, dtype: torch.dtype | None) -> None:
        if dtype is not None and dtype not in DTYPES:
            raise ValueError(f"dtype: got {dtype}, expected one of {', '.join(map(str, DTYPES))}")
        super().__init__(in_features, out_features, bias, device, dtype)
        self._set_base(nn.Linear, {"in_features": in_features, "out_features": out_features})

    @classmethod
    def _around(cls, linear: nn.Module) -> Self:
        why_not = why_not_replaceable(linear)
        if why_not:
            raise TypeError(f"linear: got {type(linear).__name__}, expected a plain nn.Linear or Conv1D; {why_not}")
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        self._set_base(type(linear), {k: v for k, v in vars(linear).items() if k[0] != "_" and k != "training"})
        self.weight, bias = linear.get_parameter("weight"), linear.bias
        self.register_parameter("bias", bias if isinstance(bias, nn.Parameter) else None)
        self.out_features, self.in_features = self.weight.shape[:: -1 if self.fan_in_fan_out else 1]
        self.training = linear.training
        return self

    def _set_base(self, base_type: type[nn.Module], attributes: dict[str, Any]) -> None:
        self.fan_in_fan_out = not issubclass(base_type, nn.Linear)
        self._base = (base_type, attributes)
        self._merged = False
        self._keep(None)

    def to_linear(self) -> nn.Module:
        """The layer this one was made around, sharing ``weight`` and ``bias``; the adapter is left out."""
        base_type, attributes = self._base
        linear = base_type.__new__(base_type)
        nn.Module.__init__(linear)
        vars(linear).update(attributes)
        linear.weight, linear.bias = self.weight, self.bias
        linear.training = self.training
        return linear

    def reset_parameters(self) -> None:
        """Draw weight and bias as nn.Linear does and start the adapter anew: what is called after ``to_empty``."""
        super().reset_parameters()
        if self._adapter_tensors():  # nn.Linear's constructor comes here before there is one
            self.reset_adapter()

    def reset_adapter(self) -> None:
        """Start the adapter anew, so that the layer is its base layer."""
        raise NotImplementedError

    def _merged_rows(self, weight: Tensor, rows: slice) -> Tensor:
        """``weight`` ``[n, K]``, the given rows of the base weight, with the adapter's part of those rows added."""
        raise NotImplementedError

    def check_mergeable(self) -> None:
        """Raise ValueError where there is no single merged weight to write."""
        if "weight" not in self._parameters:
            raise ValueError("weight: got a parametrized one, expected a plain Parameter, which a merge can overwrite")
        self._check_whole({"weight": self.weight, **self._adapter_tensors()})

    def _check_whole(self, tensors: Mapping[str, Tensor]) -> None:
        for name, t in tensors.items():
            if is_sharded(t):
                raise ValueError(
                    f"{name}: got one that is sharded over ranks, expected a whole one; do it before sharding, or in a "
                    "model that loads the full state dict"
                )

    @property
    def merged(self) -> bool:
        """Whether ``weight`` holds the adapter too."""
        return self._merged

    @torch.no_grad()
    def merge(self, backup: str | None = "device") -> None:
        """Put the adapter into ``weight``, so that the layer costs what nn.Linear costs. Merging again starts from the
        original.

        Args:
            backup: where the original weight waits for :meth:`unmerge`, N·K more memory there: "device" (``weight``
                becomes a new Parameter, so tensors tied to the original keep their values), "cpu", or None (it cannot
                be had back; these two overwrite the weight's memory, also for whatever is tied to it).

        Raises:
            ValueError: an unknown backup; an adapter that has no single merged weight; a weight that is parametrized or
                sharded over ranks.
            RuntimeError: merged before with backup=None.
        """
        if backup not in ("device", "cpu", None):
            raise ValueError(f"backup: got {backup!r}, expected 'device', 'cpu' or None")
        self.check_mergeable()
        if self._merged:
            self.unmerge()
        original = self.weight
        if backup == "device":
            with torch.inference_mode(False):  # else it could not be used later where gradients are needed
                self.weight = nn.Parameter(torch.empty_like(original), original.requires_grad)
            self._write_merged(original, into=self.weight)
            self._keep(original)
        else:
            self._keep(original.detach().to("cpu", copy=True) if backup == "cpu" else None)
            self._write_merged(original, into=original)
        self._merged = True

    @torch.no_grad()
    def unmerge(self) -> None:
        """Restore the original weight bit for bit; nothing happens to a layer that is not merged.

        Raises:
            RuntimeError: merged with backup=None.
            ValueError: sharded over ranks since it was merged.
        """
        if not self._merged:
            return
        self.check_restorable()
        original = self._original()
        if isinstance(original, nn.Parameter):
            self.weight = original.requires_grad_(self.weight.requires_grad)
        else:
            self.weight.copy_(original)
        self._keep(None)
        self._merged = False

    @torch.no_grad()
    def fold(self) -> None:
        """Put the adapter into ``weight`` for good, also for whatever is tied to it, and start it anew; ``state_dict``
        then holds the new weight. A layer that was merged with backup=None keeps the weight it has."""
        self.check_mergeable()
        if self._merged and self._unmerged is None:
            self._merged = False
        else:
            self.unmerge()
            self._write_merged(self.weight, into=self.weight)
        self.reset_adapter()

    def _write_merged(self, original: Tensor, into: Tensor) -> None:
        out, weight = (into.mT, original.mT) if self.fan_in_fan_out else (into, original)
        for start in range(0, self.out_features, MERGE_ROWS):
            rows = slice(start, start + MERGE_ROWS)
            out[rows] = self._merged_rows(weight[rows], rows)

    def _keep(self, original: Tensor | None) -> None:
        # A plain attribute: registered, the backup would show up in parameters() and be trained, saved and counted.
        object.__setattr__(self, "_unmerged", original)

    def check_restorable(self) -> None:
        """Raise where the original weight cannot be put back into a merged layer: RuntimeError after backup=None, so
        that it is gone; ValueError where the layer was sharded over ranks since then."""
        if self._merged:
            self._original()
            self._check_whole({"weight": self.weight})

    def _original(self) -> Tensor:
        if self._unmerged is None:
            raise RuntimeError(
                "layer was merged with backup=None: the original weight is gone; fold() makes that permanent, "
                "merge(backup='cpu') would have kept it"
            )
        return self._unmerged

    def adapter_parameters(self) -> Iterator[nn.Parameter]:
        """The adapter's parameters: what an optimiser of this layer should get."""
        return (t for t in self._adapter_tensors().values() if isinstance(t, nn.Parameter))

    def adapter_state_dict(self) -> dict[str, Tensor]:
        """The adapter's tensors by name, detached, sharing memory."""
        return {k: t.detach() for k, t in self._adapter_tensors().items()}

    def _adapter_tensors(self) -> dict[str, Tensor]:
        """Parameters and buffers by their names in ``state_dict``. A subclass adds those of modules that it owns."""
        own = {**self._parameters, **self._buffers}
        return {k: t for k, t in own.items() if k not in ("weight", "bias") and t is not None}

    def check_adapter_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Raise as :meth:`load_adapter_state_dict` would; change nothing."""
        if self._merged:
            raise RuntimeError("layer is merged: call unmerge() before loading an adapter")
        if not isinstance(state_dict, Mapping):
            raise TypeError(f"state_dict: got {type(state_dict).__name__}, expected a mapping of names to tensors")
        own = self.adapter_state_dict()
        missing, unexpected = sorted(own.keys() - state_dict.keys()), sorted(state_dict.keys() - own.keys())
        if missing or unexpected:
            raise ValueError(f"state_dict: missing {missing}, unexpected {unexpected}, expected exactly {sorted(own)}")
        for name, tensor in own.items():
            value, place = state_dict[name], f"state_dict[{name!r}]"
            if not isinstance(value, Tensor):
                raise TypeError(f"{place}: got {type(value).__name__}, expected a Tensor")
            if value.is_floating_point() != tensor.is_floating_point() or value.is_complex():
                raise TypeError(f"{place}: got dtype {value.dtype}, expected {tensor.dtype} or one like it")
            if value.is_meta and not tensor.is_meta:
                raise ValueError(f"{place}: got a tensor on meta, which holds no values, expected one that does")
            if value.shape != tensor.shape:
                raise ValueError(f"{place}: got shape {tuple(value.shape)}, expected {tuple(tensor.shape)}")

    @torch.no_grad()
    def load_adapter_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Copy an adapter in, strictly; nothing is written unless everything fits. Where the layer is sharded over
        ranks each of them brings the whole adapter, or a DTensor of the layer's mesh.

        Raises:
            ValueError: missing or unexpected names, a shape that differs, a tensor on meta; says which.
            TypeError: what is no tensor, or no floating-point one where the adapter's is.
            RuntimeError: the layer is merged.
        """
        self.check_adapter_state_dict(state_dict)
        for name, tensor in self.adapter_state_dict().items():
            write(tensor, state_dict[name])

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._merged:
            original = self._original()
            destination[prefix + "weight"] = original if keep_vars else original.detach()

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        tensors = {prefix + k: t for k, t in self._adapter_tensors().items()}
        if self._merged:
            state_dict.update(tensors)
            error_msgs.append(f"{prefix[:-1] or 'layer'} is merged: call unmerge() before loading")
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        adapter = tensors.keys()
        if not adapter & state_dict.keys() and not any(t.is_meta for t in self.adapter_state_dict().values()):
            missing_keys[:] = [k for k in missing_keys if k not in adapter]
            state_dict.update(tensors)  # modules of the adapter look for theirs next

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        if isinstance(self._unmerged, nn.Parameter):
            moved = fn(self._unmerged.data)
            if torch._has_compatible_shallow_copy_type(self._unmerged.data, moved):
                self._unmerged.data = moved
            else:  # as nn.Module does: to meta, and from there
                self._keep(nn.Parameter(moved, self._unmerged.requires_grad))
        elif self._unmerged is not None:  # on the CPU, where it stays
            self._keep(self._unmerged.to(self.weight.dtype))
        return self
