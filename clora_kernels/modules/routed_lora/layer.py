"""``nn.Linear`` with a routed LoRA: same ``weight`` and ``bias`` keys, same call, one fused sum."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...autograd.routed_lora import merge_routed_lora, routed_lora_linear
from ...autograd.routed_lora.arguments import DTYPES, check_dropout, scaling_tensor
from ...dispatch.choice import check_backend
from ...dispatch.routed_lora import choose
from ...kernels.routed_lora.algebra import Projection
from ...reference.routed_lora import accumulation_dtype
from ..adapter import AdapterLinear, default_adapter_dtype
from ..sharded import write


class RoutedLoRALinear(AdapterLinear):
    """y = x·weightᵀ + bias + scaling · ((drop(x)·lora_Aᵀ) ⊙ gate) · (frozen_routing + routing) · lora_Bᵀ.

    Starts as LoRA does: lora_A Kaiming-uniform, lora_B zero, routing the identity, so y is the linear layer's
    (in 16 bit on ATen matmuls a bias is added last, which rounds y once more: the last bit may differ).
    ``state_dict`` holds ``weight`` and ``bias`` as nn.Linear's does, unmerged whatever the state of the layer, and the
    adapter beside them; a checkpoint of the plain layer loads and leaves the adapter as it is.

    Args:
        in_features, out_features, bias, device, dtype: as nn.Linear.
        r: rank.
        routing: True for one ``[r, r]``, False for none (plain LoRA), an int T for a bank ``[T, r, r]``.
        frozen_routing: whether to keep a buffer of the shape of ``routing`` for what earlier tasks learned (zeros).
        scaling: a number, or a 0-dim nn.Parameter to learn it.
        dropout_p: dropout on the adapter's input while training.
        adapter_dtype: dtype of the adapter; fp32 under a 16-bit weight, else the weight's.
        backend: as in :func:`clora_kernels.routed_lora_linear`.

    Raises:
        ValueError, TypeError: r < 1, dropout_p outside [0, 1], a scaling that is no 0-dim number, a dtype or
            adapter_dtype that is not floating, an empty bank, frozen_routing without routing.
    """

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    routing: nn.Parameter | None
    frozen_routing: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int,
        *,
        bias: bool = True,
        routing: bool | int = True,
        frozen_routing: bool = False,
        scaling: float | nn.Parameter = 1.0,
        dropout_p: float = 0.0,
        device: Any = None,
        dtype: torch.dtype | None = None,
        adapter_dtype: torch.dtype | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self._add_adapter(r, routing, frozen_routing, scaling, dropout_p, adapter_dtype, backend)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        r: int,
        *,
        routing: bool | int = True,
        frozen_routing: bool = False,
        scaling: float | nn.Parameter = 1.0,
        dropout_p: float = 0.0,
        adapter_dtype: torch.dtype | None = None,
        backend: str = "auto",
    ) -> RoutedLoRALinear:
        """Around an nn.Linear, or transformers' Conv1D (weight ``[K, N]``), whose parameters it shares, copying
        nothing.

        Raises:
            TypeError: another type, a subclass (its forward may do more than a product), a layer with hooks or a
                patched forward, which this one would lose, or a weight that is no Parameter or not floating.
        """
        self = cls._around(linear)
        self._add_adapter(r, routing, frozen_routing, scaling, dropout_p, adapter_dtype, backend)
        return self

    def _add_adapter(
        self,
        r: int,
        routing: bool | int = True,
        frozen_routing: bool = False,
        scaling: float | nn.Parameter = 1.0,
        dropout_p: float = 0.0,
        adapter_dtype: torch.dtype | None = None,
        backend: str = "auto",
    ) -> None:
        if isinstance(r, bool) or not hasattr(r, "__index__") or r < 1:
            raise ValueError(f"r: got {r!r}, expected a rank of at least 1, an int")
        check_dropout(dropout_p, None, self.weight)
        scaling_tensor(scaling, self.weight)
        if isinstance(scaling, Tensor) and scaling.requires_grad and not isinstance(scaling, nn.Parameter):
            raise ValueError("scaling: got a tensor that learns, expected an nn.Parameter, which the layer registers")
        if adapter_dtype is not None and adapter_dtype not in DTYPES:
            raise ValueError(f"adapter_dtype: got {adapter_dtype}, expected one of {', '.join(map(str, DTYPES))}")
        if not isinstance(routing, bool) and (not isinstance(routing, int) or routing < 1):
            raise ValueError(f"routing: got {routing!r}, expected True, False or the number of routings of a bank")
        if frozen_routing and routing is False:
            raise ValueError("frozen_routing: got True with routing=False, expected a routing beside it")
        check_backend(backend, "composite")
        self.r, self.dropout_p, self.backend = operator.index(r), dropout_p, backend
        self.scaling = scaling
        dtype = adapter_dtype or default_adapter_dtype(self.weight.dtype)
        shapes = self._adapter_shapes(routing)
        empty = {k: torch.empty(v, dtype=dtype, device=self.weight.device) for k, v in shapes.items()}
        self.lora_A, self.lora_B = nn.Parameter(empty["lora_A"]), nn.Parameter(empty["lora_B"])
        self.register_parameter("routing", nn.Parameter(empty["routing"]) if "routing" in empty else None)
        self.register_buffer("frozen_routing", torch.empty_like(empty["routing"]) if frozen_routing else None)
        self.reset_adapter()

    def _adapter_shapes(self, routing: bool | int) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {
            "lora_A": (self.r, self.in_features),
            "lora_B": (self.out_features, self.r),
        }
        if routing is not False:
            shapes["routing"] = (self.r, self.r) if routing is True else (routing, self.r, self.r)
        return shapes

    @torch.no_grad()
    def reset_adapter(self) -> None:
        """Start the adapter anew: lora_A Kaiming-uniform (a = √5), lora_B zero, routing the identity, frozen_routing
        zero.

        Raises:
            RuntimeError: the layer is merged.
        """
        if self._merged:
            raise RuntimeError("layer is merged: call unmerge() before its adapter starts anew")
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.lora_B.zero_()
        if self.routing is not None:
            one = torch.eye(self.r, dtype=self.routing.dtype, device=self.routing.device)
            write(self.routing, one.expand(self.routing.shape))
        if self.frozen_routing is not None:
            self.frozen_routing.zero_()

    def adapter_tensors(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """lora_A ``[r, K]``, lora_B ``[N, r]``, routing and frozen_routing as the functions take them."""
        return self.lora_A, self.lora_B, self.routing, self.frozen_routing

    def scaling_value(self) -> float:
        """``scaling`` as a number; of one that learns, what it is now."""
        return float(self.scaling.item() if isinstance(self.scaling, Tensor) else self.scaling)

    def forward(
        self,
        x: Tensor,
        *,
        gate: Tensor | None = None,
        routing_index: Tensor | None = None,
        dropout_seed: Tensor | None = None,
    ) -> Tensor:
        """y ``[..., out_features]`` for x ``[..., in_features]``; arguments as in
        :func:`clora_kernels.routed_lora_linear`.

        Raises:
            RuntimeError: merged and in training mode, where the adapter would silently get no gradient.
            ValueError: merged and called with ``gate`` or ``routing_index``, which the merged weight knows nothing of.
        """
        if self._merged:
            self.check_merged_call(gate, routing_index)
            return F.linear(x, self.weight.mT if self.fan_in_fan_out else self.weight, self.bias)
        return routed_lora_linear(**self.call_arguments(x, gate, routing_index, dropout_seed))

    def check_merged_call(self, gate: Tensor | None, routing_index: Tensor | None) -> None:
        """Raise as :meth:`forward` of a merged layer would."""
        if self.training:
            raise RuntimeError("layer is merged: call eval() to use the merged weight, unmerge() to train")
        if gate is not None or routing_index is not None:
            name = "gate" if gate is not None else "routing_index"
            raise ValueError(f"{name}: got a tensor for a merged layer, expected None; call unmerge() first")

    def call_arguments(
        self,
        x: Tensor,
        gate: Tensor | None = None,
        routing_index: Tensor | None = None,
        dropout_seed: Tensor | None = None,
    ) -> dict[str, Any]:
        """The arguments with which :meth:`forward` calls :func:`clora_kernels.routed_lora_linear`."""
        lora_A, lora_B, routing, frozen_routing = self.adapter_tensors()
        return {
            "x": x,
            "weight": self.weight.mT if self.fan_in_fan_out else self.weight,
            "lora_A": lora_A,
            "lora_B": lora_B,
            "routing": routing,
            "bias": self.bias,
            "frozen_routing": frozen_routing,
            "routing_index": routing_index,
            "gate": gate,
            "scaling": self.scaling,
            "dropout_p": self.dropout_p,
            "dropout_seed": dropout_seed,
            "training": self.training,
            "backend": self.backend,
        }

    def _merged_rows(self, weight: Tensor, rows: slice) -> Tensor:
        lora_A, lora_B, routing, frozen_routing = self.adapter_tensors()
        return merge_routed_lora(
            weight, lora_A, lora_B[rows], routing, frozen_routing=frozen_routing, scaling=self.scaling
        )

    @torch.no_grad()
    def fold_routing(self) -> None:
        """Make this an ordinary LoRA of the same rank: lora_B ← lora_B·(frozen_routing + routing)ᵀ, rounded once,
        and no routing.

        Raises:
            ValueError: a bank of routings.
        """
        self.check_mergeable()
        if self.routing is None:
            return
        self.unmerge()
        self.lora_B.copy_(self._folded_B())
        self.routing = None
        self.frozen_routing = None

    @torch.no_grad()
    def lora_tensors(self) -> tuple[Tensor, Tensor]:
        """lora_A and lora_B of the ordinary LoRA that :meth:`fold_routing` would make of this; the layer stays."""
        self.check_mergeable()
        return self.lora_A.detach(), self._folded_B().detach()

    def _folded_B(self) -> Tensor:
        if self.routing is None:
            return self.lora_B
        acc = accumulation_dtype(self.lora_B.dtype)
        total = self.routing.to(acc) if self.frozen_routing is None else self.routing.to(acc) + self.frozen_routing
        return self._routed_B(total).to(self.lora_B.dtype)

    def _routed_B(self, total: Tensor) -> Tensor:
        return self.lora_B.to(total.dtype) @ total.mT

    def check_mergeable(self) -> None:
        super().check_mergeable()
        if self.routing is not None and self.routing.dim() == 3:
            raise ValueError(
                f"routing: got a bank of {self.routing.shape[0]}, expected a single routing: samples that take "
                "different routings have no common weight"
            )

    def extra_repr(self) -> str:
        path = "merged" if self._merged else self._path()
        scaling = f"{self.scaling_value():g}" if self.weight.device.type != "meta" else "?"
        routing = "None" if self.routing is None else str(tuple(self.routing.shape))
        frozen = "" if self.frozen_routing is None else ", frozen_routing"
        return (
            f"{super().extra_repr()}, r={self.r}, routing={routing}{frozen}, scaling={scaling}, "
            f"dropout_p={self.dropout_p:g}, path={path}"
        )

    def _path(self) -> str:
        """The backend of a call of any number of rows, by size where there are several; unavailable where a call would
        raise."""
        lora_A, lora_B, routing, frozen_routing = self.adapter_tensors()
        scaling = scaling_tensor(self.scaling, self.weight)
        tensors = (self.weight, lora_A, lora_B, routing, frozen_routing)
        drops = torch.zeros((), dtype=torch.int64) if self.training and self.dropout_p else None
        projection = Projection(*tensors, None, None, self.bias, None, scaling, drops, drops)
        row = self.weight.new_empty(1, 1)
        try:
            chosen = [choose(row.expand(1 << i, 1), [projection], self.backend).backend for i in range(31)]
        except ValueError:
            return f"{self.backend} (unavailable)"
        several = list(dict.fromkeys(chosen))
        return " or ".join(several) + (", by size" if len(several) > 1 else "")
