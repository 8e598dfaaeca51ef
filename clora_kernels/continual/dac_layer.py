"""The layer of DAC: a pool of rank-1 experts in one LoRA, some of which a router chooses for a batch or a sample."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..autograd.dropout_mask import dropout_mask
from ..autograd.rank1_experts import rank1_experts
from ..autograd.routed_lora import merge_routed_lora, routed_lora_linear
from ..autograd.routed_lora.arguments import check_dropout, dropout_tensors
from ..library import without_autocast
from ..modules.adapter import AdapterLinear, default_adapter_dtype
from ..modules.rank1_experts.arguments import check_count, check_name, check_rows
from ..modules.rank1_experts.choosing import Chosen, activations, first_tokens, runs_again, top_experts
from ..modules.routed_lora import RoutedLoRALinear
from ..reference.dropout_mask import kept_value
from ..reference.routed_lora import accumulation_dtype

SELECTIONS = ("batch", "sample")
WEIGHTS = ("unit", "probability")
OPERATIONS = ("routed_lora", "rank1_experts")


class DACLinear(RoutedLoRALinear):
    """nn.Linear with DAC's pool of rank-1 experts; see :class:`DAC`.

    Beside the plain LoRA's tensors it owns ``router`` and the buffer ``activation_counts`` ``[r]`` int64, which counts
    in training mode alone, and not again where activation checkpointing runs forward a second time. With
    ``weights="unit"`` the router's parameters get no gradient: their ``.grad`` stays None. In eval mode a layer that is
    not merged chooses by the same rule, without dropout; ``merge``, ``fold`` and what exports an ordinary LoRA take the
    ``keep`` experts of the highest counts, each with weight 1.

    Args:
        in_features, out_features, bias, device, dtype: as nn.Linear.
        **options: r, k, keep, selection, weights, operation, scaling, dropout_p and backend as in :class:`DAC`.

    Raises:
        ValueError, TypeError: an unknown option, a number out of range.
    """

    router: nn.Linear
    activation_counts: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        AdapterLinear.__init__(self, in_features, out_features, bias, device, dtype)
        self._add_pool(**options)

    @classmethod
    def from_linear(cls, linear: nn.Module, **options: Any) -> DACLinear:  # type: ignore[override]
        """As :meth:`RoutedLoRALinear.from_linear`, with the options of this layer."""
        self = cls._around(linear)
        self._add_pool(**options)
        return self

    def _add_pool(
        self,
        r: int = 12,
        k: int = 8,
        keep: int = 4,
        selection: str = "batch",
        weights: str = "unit",
        operation: str = "routed_lora",
        scaling: float | None = None,
        dropout_p: float = 0.2,
        backend: str = "auto",
    ) -> None:
        r = check_count("r", r)
        self.k, self.keep = check_count("k", k, most=r), check_count("keep", keep, most=r)
        check_name("selection", selection, SELECTIONS)
        check_name("weights", weights, WEIGHTS)
        check_name("operation", operation, OPERATIONS)
        self.selection, self.weights, self.operation = selection, weights, operation
        device, dtype = self.weight.device, default_adapter_dtype(self.weight.dtype)
        self.register_buffer("activation_counts", torch.empty(r, dtype=torch.int64, device=device))
        self.router = nn.utils.skip_init(nn.Linear, self.in_features, r, device=device, dtype=dtype)
        scaling = 1 / r if scaling is None else scaling
        self._add_adapter(r, False, False, scaling, dropout_p, None, backend)

    @torch.no_grad()
    def reset_adapter(self) -> None:
        """Start the adapter anew: lora_A Kaiming-uniform, lora_B zero, the router as nn.Linear starts, counts zero."""
        super().reset_adapter()
        self.router.reset_parameters()
        self.activation_counts.zero_()

    def _adapter_tensors(self) -> dict[str, Tensor]:
        router = self._modules.get("router")  # not there yet while nn.Linear is made
        held = {} if router is None else router.state_dict(keep_vars=True)
        return super()._adapter_tensors() | {f"router.{name}": t for name, t in held.items()}

    def forward(
        self,
        x: Tensor,
        *,
        gate: Tensor | None = None,
        routing_index: Tensor | None = None,
        dropout_seed: Tensor | None = None,
    ) -> Tensor:
        """y ``[..., out_features]`` for x ``[S, ..., in_features]``.

        Args:
            gate, routing_index: None: the layer makes its own gate and has no routing.
            dropout_seed: as in :func:`clora_kernels.routed_lora_linear`.

        Raises:
            RuntimeError: merged and in training mode, where the adapter would silently get no gradient.
            ValueError, TypeError: an x that does not fit or has no token to choose by; a gate or a routing_index.
        """
        if self._merged:
            return super().forward(x, gate=gate, routing_index=routing_index)
        seed, mask = self._draw(x, gate, routing_index, dropout_seed)
        chosen, counts = self._choose(x, mask)
        if self.operation == "routed_lora":
            y = routed_lora_linear(**super().call_arguments(x, self._gate(x, chosen), None, seed))
        else:
            y = self._by_rank1_experts(x, mask, chosen)
        if self.training and not runs_again():
            self.activation_counts += counts
        return y

    def call_arguments(
        self,
        x: Tensor,
        gate: Tensor | None = None,
        routing_index: Tensor | None = None,
        dropout_seed: Tensor | None = None,
    ) -> dict[str, Any]:
        """The arguments of :func:`clora_kernels.routed_lora_linear` that give the layer's y, whatever its
        ``operation``; nothing is counted. Where dropout is on and ``dropout_seed`` is None, a seed is drawn."""
        seed, mask = self._draw(x, gate, routing_index, dropout_seed)
        return super().call_arguments(x, self._gate(x, self._choose(x, mask)[0]), None, seed)

    def _draw(
        self, x: Tensor, gate: Tensor | None, routing_index: Tensor | None, dropout_seed: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Seed and mask of this call's dropout, None where nothing drops, once all that can be wrong with it is
        checked."""
        for name, given in (("gate", gate), ("routing_index", routing_index)):
            if given is not None:
                raise ValueError(f"{name}: got a tensor, expected None: the layer makes its own gate")
        check_rows(x, self.in_features, self.weight)
        if x.dim() > 1 and x.shape[0] and 0 in x.shape[1:-1]:
            raise ValueError(f"x: got shape {tuple(x.shape)}, expected a token by which a sample chooses")
        check_dropout(self.dropout_p, dropout_seed, x)
        seed, _ = dropout_tensors(self.dropout_p, dropout_seed, self.training, x)
        return seed, None if seed is None else dropout_mask(x, self.dropout_p, seed)

    def _kept_value(self) -> float:
        return kept_value(round(65536 * self.dropout_p))

    def _choose(self, x: Tensor, mask: Tensor | None) -> tuple[Chosen, Tensor]:
        """The experts used for x, of which dropout keeps ``mask``: ``[S, k]``, or for all samples ``[k]`` where each
        weighs 1; and how often each of the pool was chosen.

        The router needs the mask of the first tokens alone. The operator that draws it knows no strides, and a call
        for each sample would be as many launches on a GPU; so it is taken from the mask of all of x.
        """
        with without_autocast(x):
            c = first_tokens(x).to(self.router.weight.dtype)
            scores = self.router(c if mask is None else c * first_tokens(mask) * self._kept_value())
        own = top_experts(scores, self.k)  # softmax keeps their order
        counts = activations(own, self.r)
        used = own if self.selection == "sample" else top_experts(counts, self.k)
        if self.weights == "unit":
            return Chosen(used, None), counts
        used = used.expand(own.shape)
        return Chosen(used, scores.softmax(-1, dtype=accumulation_dtype(scores.dtype)).gather(-1, used)), counts

    def _gate(self, x: Tensor, chosen: Chosen) -> Tensor:
        """``[S, 1, r]`` (a 1 for each further dimension of x), or for all samples ``[r]``."""
        weights = torch.ones_like(chosen.indices, dtype=self.lora_A.dtype) if chosen.gates is None else chosen.gates
        gate = weights.new_zeros(*weights.shape[:-1], self.r).scatter(-1, chosen.indices, weights)
        return gate if gate.dim() == 1 else gate.reshape(gate.shape[0], *[1] * (x.dim() - 2), self.r)

    def _by_rank1_experts(self, x: Tensor, mask: Tensor | None, chosen: Chosen) -> Tensor:
        return rank1_experts(
            x if mask is None else x * mask,
            self.lora_A,
            self.lora_B.mT,
            chosen.indices.expand(*x.shape[:-1][:1], self.k),
            chosen.gates,
            scaling=self.scaling if mask is None else self.scaling * self._kept_value(),
            base_output=F.linear(x, self.weight.mT if self.fan_in_fan_out else self.weight, self.bias),
            backend=self.backend,
        )

    def kept(self) -> Tensor:
        """The ``keep`` experts of the highest ``activation_counts``, of equal ones the lowest indices: int64."""
        return top_experts(self.activation_counts, self.keep)

    def _kept_mask(self) -> Tensor:
        return self.lora_A.new_zeros(self.r).scatter(0, self.kept(), 1.0)

    def _merged_rows(self, weight: Tensor, rows: slice) -> Tensor:
        return merge_routed_lora(weight, self.lora_A, self.lora_B[rows], gate=self._kept_mask(), scaling=self.scaling)

    def lora_tensors(self) -> tuple[Tensor, Tensor]:
        """lora_A and lora_B of the ordinary LoRA that :meth:`merge` adds: zero columns for what is not kept."""
        lora_A, lora_B = super().lora_tensors()
        return lora_A, lora_B * self._kept_mask()

    def extra_repr(self) -> str:
        return (
            f"{super().extra_repr()}, k={self.k}, keep={self.keep}, selection={self.selection}, "
            f"weights={self.weights}, operation={self.operation}"
        )
