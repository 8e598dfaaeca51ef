"""``nn.Linear`` with a pool of rank-1 experts: same ``weight`` and ``bias`` keys, same call, experts chosen by x."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...autograd.rank1_experts import merge_rank1_experts, rank1_experts
from ...autograd.routed_lora.arguments import DTYPES, scaling_tensor
from ...dispatch.choice import check_backend
from ...dispatch.rank1_experts import choose
from ...library import without_autocast
from ..adapter import AdapterLinear, default_adapter_dtype
from .arguments import check_count, check_name, check_rows
from .choosing import SELECTIONS, WEIGHTS, Chosen, activations, choose_experts, first_tokens, fixed_choice, runs_again
from .product_keys import ProductKeyScores, check_scoring

Scoring = Callable[[Tensor], Tensor | tuple[Tensor, Tensor]]


class Rank1ExpertLinear(AdapterLinear):
    """y = x·weightᵀ + bias + scaling · Σ_i gate_i · (x·a_e) · b_e for the k experts e that x chooses of a pool.

    Starts as the linear layer: rows a_e of experts_A Kaiming-uniform as a LoRA's, rows b_e of experts_B zero.
    ``state_dict`` holds ``weight`` and ``bias`` as nn.Linear's does, unmerged whatever the state of the layer, and the
    pool, the scoring and the counts beside them; a checkpoint of the plain layer loads and leaves these as they are.

    In 16 bit the output of the linear layer is rounded before the experts are added to it, and the sum is once more:
    what is smaller than that rounding is lost.

    While the layer is in training mode, the buffer ``activation_counts`` ``[E]`` counts how many samples (or tokens)
    used each expert; not again where activation checkpointing runs forward a second time.

    Args:
        in_features, out_features, bias, device, dtype: as nn.Linear.
        experts: E, the size of the pool.
        k: how many a sample (or token) uses; all heads of product keys together.
        scoring: which ones. None: the k largest of ``softmax(scoring(c))``, where ``scoring`` is an nn.Linear from
            in_features to E which the layer makes and learns. Else a module or function of x ``[S, ..., K]`` that
            returns either scores ``[S, E]`` or ``[..., E]``, used likewise, or a pair of indices and weights,
            ``[S, k]`` or ``[..., k]``, used as they stand: for large pools :class:`ProductKeyScores`. A module's
            parameters and buffers belong to the adapter; ``reset_parameters`` and ``fold`` leave its values alone. Of
            equal scores the expert of the lowest index goes first.
        selection: what chooses. "sample": each sample x[s], of whose scores by token those of the first token
            ([CLS]) count; "token": each token; "batch": each sample, whereupon all use the k experts that most of them
            chose (of equally many the lowest indices).
        weights: "probability": the gates are the softmax over all E scores, from which the scoring learns; "unit":
            they are ones, and no gradient reaches the scoring.
        scaling: a number, or a 0-dim nn.Parameter to learn it.
        adapter_dtype: dtype of the pool and of the scoring that the layer makes, which computes in it under autocast
            too; fp32 under a 16-bit weight, else the weight's.
        backend: as in :func:`clora_kernels.rank1_experts`.

    DAC (arXiv 2601.22828) computes selection="batch", weights="unit"; the method is ``clora_kernels.continual.DAC``.

    Raises:
        ValueError, TypeError: experts < 1, a k that is not from 1 to E, a scoring that cannot be called or is of
            another pool, a scaling that is no 0-dim number, a dtype or adapter_dtype that is not floating, an unknown
            selection, weights or backend.
    """

    experts_A: nn.Parameter
    experts_B: nn.Parameter
    activation_counts: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        experts: int,
        k: int,
        *,
        bias: bool = True,
        scoring: Scoring | None = None,
        selection: str = "sample",
        weights: str = "probability",
        scaling: float | nn.Parameter = 1.0,
        device: Any = None,
        dtype: torch.dtype | None = None,
        adapter_dtype: torch.dtype | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self._add_experts(experts, k, scoring, selection, weights, scaling, adapter_dtype, backend)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        experts: int,
        k: int,
        *,
        scoring: Scoring | None = None,
        selection: str = "sample",
        weights: str = "probability",
        scaling: float | nn.Parameter = 1.0,
        adapter_dtype: torch.dtype | None = None,
        backend: str = "auto",
    ) -> Rank1ExpertLinear:
        """Around an nn.Linear, or transformers' Conv1D (weight ``[K, N]``), whose parameters it shares, copying
        nothing.

        Raises:
            TypeError: another type, a subclass (its forward may do more than a product), a weight not floating.
        """
        self = cls._around(linear)
        self._add_experts(experts, k, scoring, selection, weights, scaling, adapter_dtype, backend)
        return self

    def _add_experts(
        self,
        experts: int,
        k: int,
        scoring: Scoring | None,
        selection: str,
        weights: str,
        scaling: float | nn.Parameter,
        adapter_dtype: torch.dtype | None,
        backend: str,
    ) -> None:
        self.experts = check_count("experts", experts)
        self.k = check_count("k", k, most=self.experts)
        check_name("selection", selection, SELECTIONS)
        check_name("weights", weights, WEIGHTS)
        scaling_tensor(scaling, self.weight)
        if adapter_dtype is not None and adapter_dtype not in DTYPES:
            raise ValueError(f"adapter_dtype: got {adapter_dtype}, expected one of {', '.join(map(str, DTYPES))}")
        check_backend(backend)
        check_scoring(scoring, self.experts, self.k)
        self.selection, self.weights, self.backend, self.scaling = selection, weights, backend, scaling
        device, dtype = self.weight.device, adapter_dtype or default_adapter_dtype(self.weight.dtype)
        self.experts_A = nn.Parameter(torch.empty(self.experts, self.in_features, dtype=dtype, device=device))
        self.experts_B = nn.Parameter(torch.empty(self.experts, self.out_features, dtype=dtype, device=device))
        self.register_buffer("activation_counts", torch.empty(self.experts, dtype=torch.int64, device=device))
        self._makes_scoring = scoring is None
        if scoring is None:
            scoring = nn.utils.skip_init(nn.Linear, self.in_features, self.experts, device=device, dtype=dtype)
        self.scoring = scoring
        self._fixed: Chosen | None = None
        self.reset_adapter()

    @torch.no_grad()
    def reset_adapter(self) -> None:
        """Start the adapter anew: experts_A Kaiming-uniform (a = √5), experts_B zero, counts zero, and the scoring that
        the layer made as nn.Linear starts; one that was given keeps its values."""
        nn.init.kaiming_uniform_(self.experts_A, a=math.sqrt(5))
        self.experts_B.zero_()
        self.reset_activation_counts()
        if self._makes_scoring:
            self.scoring.reset_parameters()  # type: ignore[union-attr]

    def reset_activation_counts(self) -> None:
        """Count from zero."""
        self.activation_counts.zero_()

    def _adapter_tensors(self) -> dict[str, Tensor]:
        tensors = super()._adapter_tensors()
        if isinstance(self._modules.get("scoring"), nn.Module):
            held = self.scoring.state_dict(keep_vars=True)  # type: ignore[union-attr]
            tensors |= {f"scoring.{name}": t for name, t in held.items() if isinstance(t, Tensor)}
        return tensors

    def scaling_value(self) -> float:
        """``scaling`` as a number; of one that learns, what it is now."""
        return float(self.scaling.item() if isinstance(self.scaling, Tensor) else self.scaling)

    def forward(self, x: Tensor) -> Tensor:
        """y ``[..., out_features]`` for x ``[..., in_features]``; a merged layer computes the experts that were merged,
        whatever x would choose.

        Raises:
            RuntimeError: merged and in training mode, where the adapter would silently get no gradient.
            ValueError, TypeError: an x that does not fit, or whose scoring returns what does not; says how.
        """
        self.check_call(x)
        if self._merged:
            return self._base_output(x)
        arguments = self.call_arguments(x)
        y = rank1_experts(**arguments)
        if self.training and not runs_again():
            with torch.no_grad():
                self.activation_counts += activations(arguments["indices"], self.experts)
        return y

    def _base_output(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.mT if self.fan_in_fan_out else self.weight, self.bias)

    def check_call(self, x: Tensor) -> None:
        """Raise as :meth:`forward` would before it asks the scoring."""
        if self._merged and self.training:
            raise RuntimeError("layer is merged: call eval() to use the merged weight, unmerge() to train")
        check_rows(x, self.in_features, self.weight)
        if self.selection != "token" and x.shape[0] and 0 in x.shape[1:-1]:
            raise ValueError(f"x: got shape {tuple(x.shape)}, expected a token by which a sample chooses")

    def chosen(self, x: Tensor) -> Chosen:
        """Indices and gates (None for ones), ``[..., k]`` or ``[S, k]``, which :meth:`forward` uses for x."""
        by_row = self._makes_scoring or isinstance(self.scoring, ProductKeyScores)
        rows = first_tokens(x) if by_row and self.selection != "token" else x
        if self._makes_scoring:
            with without_autocast(x):
                found = self.scoring(rows.to(self.scoring.weight.dtype))  # type: ignore[union-attr]
        else:
            found = self.scoring(rows)
        return choose_experts(found, x, self.experts, self.k, self.selection, self.weights)

    def call_arguments(self, x: Tensor) -> dict[str, Any]:
        """The arguments with which :meth:`forward` calls :func:`clora_kernels.rank1_experts`."""
        return self._arguments(x, self.chosen(x), self._base_output(x))

    def arguments_without_choice(self, x: Tensor) -> dict[str, Any]:
        """The same but for values: nothing runs."""
        lead = x.shape[:-1] if self.selection == "token" else x.shape[:-1][:1]
        return self._arguments(x, Chosen(self._zero_indices(*lead), None), None)

    def _zero_indices(self, *lead: int) -> Tensor:
        return self.activation_counts.new_zeros(()).expand(*lead, self.k)

    def _arguments(self, x: Tensor, chosen: Chosen, base_output: Tensor | None) -> dict[str, Any]:
        return {
            "x": x,
            "experts_A": self.experts_A,
            "experts_B": self.experts_B,
            "indices": chosen.indices,
            "gates": chosen.gates,
            "scaling": self.scaling,
            "base_output": base_output,
            "backend": self.backend,
        }

    def top_experts(self, n: int | None = None) -> Tensor:
        """The n experts (k by default) of the highest ``activation_counts``, of equal ones the lowest indices: [n].
        Raises ValueError unless n is from 1 to E."""
        return fixed_choice(self.activation_counts, self.k, n).indices

    def merge(
        self,
        backup: str | None = "device",
        *,
        top: int | None = None,
        indices: Tensor | None = None,
        gates: Tensor | None = None,
    ) -> None:
        """Put experts into ``weight``, so that the layer costs what nn.Linear costs. What x chooses has no merged
        weight, so this takes a choice that is fixed: a merged layer computes that one, not what it would unmerged.
        Merging again starts from the original.

        Args:
            backup: as in AdapterLinear's ``merge``.
            top: that many experts, those used most (:meth:`top_experts`), with gates of one; k if nothing is given.
            indices, gates: ``[n]``, a choice of your own; gates of one if None.

        Raises:
            ValueError, TypeError, IndexError: top and indices, gates without indices, values that do not fit, or as
                AdapterLinear's ``merge``; the layer is as it was. RuntimeError: merged before with backup=None.
        """
        before, self._fixed = self._fixed, fixed_choice(self.activation_counts, self.k, top, indices, gates)
        try:
            super().merge(backup)
        except Exception:
            self._fixed = before
            raise

    def fold(self, *, top: int | None = None, indices: Tensor | None = None, gates: Tensor | None = None) -> None:
        """Put experts into ``weight`` for good, arguments as in :meth:`merge`, and start the adapter anew, counts too:
        what ends a task. Of a merged layer, if nothing is given, those that it has merged.

        Raises:
            As :meth:`merge`. RuntimeError: a choice for a layer that was merged with backup=None.
        """
        if not self._merged or not (top is indices is gates is None):
            self.check_restorable()
            self._fixed = fixed_choice(self.activation_counts, self.k, top, indices, gates)
        super().fold()

    def _merged_rows(self, weight: Tensor, rows: slice) -> Tensor:
        assert self._fixed is not None
        fixed = self._fixed.to(weight.device)
        return merge_rank1_experts(weight, self.experts_A, self.experts_B[:, rows], *fixed, scaling=self.scaling)

    def extra_repr(self) -> str:
        path = "merged" if self._merged else self._path()
        scaling = f"{self.scaling_value():g}" if self.weight.device.type != "meta" else "?"
        return (
            f"{super().extra_repr()}, experts={self.experts}, k={self.k}, selection={self.selection}, "
            f"weights={self.weights}, scaling={scaling}, path={path}"
        )

    def _path(self) -> str:
        """The backend of a large batch, unavailable where a call would raise."""
        try:
            indices = self._zero_indices(1 << 30 if self.selection == "token" else 1)
            return choose(1 << 30, self.weight.dtype, self.experts_A, self.experts_B, indices, self.backend).backend
        except ValueError:
            return f"{self.backend} (unavailable)"
