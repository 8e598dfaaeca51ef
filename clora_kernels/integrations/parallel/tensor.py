r"""Tensor parallel: one RoutedLoRALinear over the ranks of a mesh, by DTensor plans.

With the columns of W and B, or the rows of W and A, in n parts (W = weightᵀ; C = s·(R_frozen + R)·B),

    column:  y_i = x·W_i + b_i + ((drop(x)·A) ⊙ gate)·C_i        y = [y_1 … y_n]
    row:     y = Σ_i x_i·W_i + b (i = 1) + ((drop(x_i)·A_i) ⊙ gate)·C

each y_i is one call of :func:`clora_kernels.routed_lora_linear` on the rank's own parts, one sum that is rounded once:
in 16 bit before parts of several ranks are added, as those of torch's plain layers are.
Whatever every rank has whole (column: x, A; row: B; both: R, gate, s) gets a part of its gradient on each and the sum
of them in backward; the bias of a row-parallel layer counts on the first rank alone. All communication is DTensor's:
forward of a row-parallel layer sums y, backward of a column-parallel one dx, as of plain layers, and each adapter
tensor that is whole everywhere is summed once in backward.
"""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle

from ...autograd.routed_lora import routed_lora_linear
from ...autograd.routed_lora.arguments import check_x, draw_seed
from ...modules.routed_lora import RoutedLoRALinear

# Far apart for ranks whose generators are in step; odd, so that none of 2⁶⁴ of them coincide.
_SEED_STEP = 0x9E3779B97F4A7C15


class ParallelLayer(RoutedLoRALinear):
    """A RoutedLoRALinear whose parameters are DTensors, computed on each rank's own parts.

    ``in_features`` and ``out_features`` stay those of the whole layer. Everything but ``forward`` is as of any sharded
    layer: adapters are looked at and loaded, merging is refused.
    """

    SHARDED: dict[str, int]
    """The dimension along which a tensor is cut, by its name; the others are whole on each rank."""
    INSIDE: tuple[Placement, Placement]
    """Of x and of y where the layer computes."""

    layouts: tuple[Placement, Placement]
    use_local_output: bool

    def forward(
        self,
        x: Tensor,
        *,
        gate: Tensor | None = None,
        routing_index: Tensor | None = None,
        dropout_seed: Tensor | None = None,
    ) -> Tensor:
        """y for x, both laid out as the plan says; ``gate`` for all tokens of x, ``routing_index`` and ``dropout_seed``
        the same on each rank, all of them as in :class:`clora_kernels.RoutedLoRALinear`."""
        y = routed_lora_linear(**self.call_arguments(x, gate, routing_index, dropout_seed))
        whole = DTensor.from_local(y, self.mesh, [self.INSIDE[1]], run_check=False)
        whole = whole.redistribute(placements=[self.layouts[1]])
        return whole.to_local() if self.use_local_output else whole

    def call_arguments(
        self,
        x: Tensor,
        gate: Tensor | None = None,
        routing_index: Tensor | None = None,
        dropout_seed: Tensor | None = None,
    ) -> dict[str, Any]:
        """The arguments of this rank's part of the call."""
        if self.training and self.dropout_p:
            dropout_seed = self._seed(x, dropout_seed)
        arguments = super().call_arguments(self._entering(x), None, routing_index, dropout_seed)
        arguments["gate"] = self._whole(gate)
        for name in ("weight", "bias", "lora_A", "lora_B"):
            if arguments[name] is not None:
                arguments[name] = arguments[name].to_local() if name in self.SHARDED else self._whole(arguments[name])
        for name in ("routing", "frozen_routing", "scaling"):
            if isinstance(arguments[name], Tensor):
                arguments[name] = self._whole(arguments[name])
        return arguments

    @property
    def mesh(self) -> DeviceMesh:
        """The ranks that share the layer; in forward, under FSDP2 too, that dimension of the mesh alone."""
        return cast(DTensor, self.weight).device_mesh

    def _entering(self, x: Tensor) -> Tensor:
        """The rank's own part of x, or all of it, with the gradient that belongs to that."""
        check_x(x)
        if not isinstance(x, DTensor):
            x = DTensor.from_local(x, self.mesh, [self.layouts[0]], run_check=False)
        x = x.redistribute(placements=[self.INSIDE[0]])
        x = x.to_local(grad_placements=[Partial()] if self.INSIDE[0].is_replicate() else None)
        expected = self.in_features if self.INSIDE[0].is_replicate() else self.in_features // self.mesh.size()
        if x.shape[-1] != expected:
            came = f"{x.shape[-1]} features on this rank for input_layouts={self.layouts[0]}"
            raise ValueError(f"x: got {came}, expected {expected} of {self.in_features}")
        return x

    def _whole(self, t: Tensor | None) -> Tensor | None:
        """All of a tensor, of whose gradient each rank finds a part."""
        if t is None:
            return None
        if not isinstance(t, DTensor):
            t = DTensor.from_local(t, self.mesh, [Replicate()], run_check=False)
        # From whole to whole: nothing is sent in forward, and in backward the parts are summed.
        return t.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])

    def _seed(self, x: Tensor, given: Tensor | None) -> Tensor:
        raise NotImplementedError


class ColumnParallelLayer(ParallelLayer):
    """Each rank has a part of out_features."""

    SHARDED = {"weight": 0, "bias": 0, "lora_B": 0}  # noqa: RUF012
    INSIDE = (Replicate(), Shard(-1))

    def _seed(self, x: Tensor, given: Tensor | None) -> Tensor:
        """The same on all ranks, who drop elements of the same x: what one of them drew."""
        if given is not None:
            return given
        drawn = DTensor.from_local(draw_seed(x.device), self.mesh, [Partial("max")], run_check=False)
        return drawn.full_tensor()


class RowParallelLayer(ParallelLayer):
    """Each rank has a part of in_features."""

    SHARDED = {"weight": 1, "lora_A": 1}  # noqa: RUF012
    INSIDE = (Shard(-1), Partial())

    def call_arguments(
        self,
        x: Tensor,
        gate: Tensor | None = None,
        routing_index: Tensor | None = None,
        dropout_seed: Tensor | None = None,
    ) -> dict[str, Any]:
        arguments = super().call_arguments(x, gate, routing_index, dropout_seed)
        if arguments["bias"] is not None and self.mesh.get_local_rank():
            # Not None: each rank has to take part when its gradient is summed.
            arguments["bias"] = arguments["bias"] * 0.0
        return arguments

    def _seed(self, x: Tensor, given: Tensor | None) -> Tensor:
        """Another one on each rank, whose elements are others."""
        step = self.mesh.get_local_rank() * _SEED_STEP % 2**64
        return (draw_seed(x.device) if given is None else given) + (step - 2**64 if step >= 2**63 else step)


class _Style(ParallelStyle):
    LAYER: type[ParallelLayer]
    FEATURES: str
    LAYOUTS: tuple[Placement, Placement]

    def __init__(
        self,
        *,
        input_layouts: Placement | None = None,
        output_layouts: Placement | None = None,
        use_local_output: bool = True,
    ) -> None:
        super().__init__()
        self.layouts = (input_layouts or self.LAYOUTS[0], output_layouts or self.LAYOUTS[1])
        self.use_local_output = use_local_output

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if type(module) is not RoutedLoRALinear:
            raise TypeError(f"{type(self).__name__}: got {type(module).__name__}, expected exactly RoutedLoRALinear")
        if "weight" not in module._parameters:
            raise ValueError("weight: got a parametrized one, expected a plain Parameter")
        if module.merged:
            raise RuntimeError("layer is merged: call unmerge() before it is made parallel")
        if device_mesh.ndim != 1:
            raise ValueError(f"device_mesh: got {device_mesh.ndim} dimensions, expected 1; take one by its name")
        features, ranks = getattr(module, self.FEATURES), device_mesh.size()
        if features % ranks:
            raise ValueError(f"{self.FEATURES}: got {features} for {ranks} ranks, expected a multiple of {ranks}")
        tensors = {**module._parameters, **module._buffers}
        for name, t in tensors.items():
            if t is None:
                continue
            dim = self.LAYER.SHARDED.get(name)
            if name == "weight" and dim is not None and module.fan_in_fan_out:
                dim = 1 - dim
            placement = Replicate() if dim is None else Shard(dim)
            part = distribute_tensor(t.detach(), device_mesh, [placement], src_data_rank=self.src_data_rank)
            if name in module._parameters:
                module.register_parameter(name, nn.Parameter(part, t.requires_grad))
            else:
                module.register_buffer(name, part)
        module.__class__ = self.LAYER
        layer = cast(ParallelLayer, module)
        layer.layouts, layer.use_local_output = self.layouts, self.use_local_output
        return layer


class ColumnParallel(_Style):
    """A RoutedLoRALinear cut along out_features: weight, bias and lora_B in parts, lora_A and routing whole::

        parallelize_module(model, mesh["tp"], {"up": ColumnParallel(), "down": RowParallel()})

    Dropout: each rank drops the same elements of x, the ones of a single process whose generator is as theirs. The draw
    is agreed upon in forward, eight bytes; a ``dropout_seed`` that is given is the same on each rank.

    Args:
        input_layouts: how x comes, ``Replicate()`` if None; ``Shard(1)`` for x in equal parts along the sequence.
        output_layouts: how y is to be, ``Shard(-1)`` if None.
        use_local_output: y as the rank's own tensor, not as a DTensor.

    Raises:
        TypeError: on a module that is not exactly a RoutedLoRALinear.
        ValueError: out_features that the ranks do not divide, a mesh of several dimensions, a parametrized weight.
        RuntimeError: a merged layer. The layer is as it was each time.
    """

    LAYER, FEATURES, LAYOUTS = ColumnParallelLayer, "out_features", (Replicate(), Shard(-1))


class RowParallel(_Style):
    """A RoutedLoRALinear cut along in_features: weight and lora_A in parts, bias, lora_B and routing whole.

    Dropout: each rank drops elements of its own part of x, by a draw of its own, or by its own continuation of the
    ``dropout_seed`` that is given; with the probability of a single process, not the elements.

    Args:
        input_layouts: how x comes, ``Shard(-1)`` if None.
        output_layouts: how y is to be, ``Replicate()`` if None; ``Shard(1)`` for y in parts along the sequence.
        use_local_output: y as the rank's own tensor, not as a DTensor.

    Raises:
        As :class:`ColumnParallel`, of in_features.
    """

    LAYER, FEATURES, LAYOUTS = RowParallelLayer, "in_features", (Shard(-1), Replicate())
