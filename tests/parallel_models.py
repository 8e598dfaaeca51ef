"""Small models for the tests of several processes, their batches, and how they are trained."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from layers import randomize
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import parallelize_module
from torch.utils.checkpoint import checkpoint

from clora_kernels import RoutedLoRALinear, freeze_base
from clora_kernels.integrations.parallel import ColumnParallel, RowParallel

D, H = 8, 12


class Block(nn.Module):
    """x + down(gelu(up(x))), both layers adapted; ``recompute``: backward runs forward again."""

    def __init__(
        self, dtype: torch.dtype, learn_scaling: bool = False, recompute: bool = False, **options: Any
    ) -> None:
        super().__init__()
        self.recompute = recompute
        self.up = RoutedLoRALinear(D, H, 3, dtype=dtype, **{"scaling": 0.7, **options})
        self.down = RoutedLoRALinear(H, D, 3, dtype=dtype, **{"scaling": 1.3, **options})
        for layer in (self.up, self.down) if learn_scaling else ():
            layer.scaling = nn.Parameter(torch.tensor(layer.scaling, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self._sum, x, use_reentrant=False) if self.recompute else self._sum(x)

    def _sum(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(x)))


def model(dtype: torch.dtype = torch.float64, frozen: bool = True, **options: Any) -> nn.Sequential:
    """Two blocks with random adapters, the same on every rank."""
    torch.manual_seed(0)
    blocks = nn.Sequential(*(Block(dtype, **options) for _ in range(2)))
    for seed, block in enumerate(blocks):
        randomize(block.up, 2 * seed)
        randomize(block.down, 2 * seed + 1)
    if frozen:
        freeze_base(blocks)
    return blocks


def batch(rank: int, step: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """x and the wanted y of a rank: sequences of another length on each. What the rank drops is settled too."""
    torch.manual_seed(100 * step + rank)
    return torch.randn(2, 3 + 2 * rank, D, dtype=dtype), torch.randn(2, 3 + 2 * rank, D, dtype=dtype)


def loss_of(module: nn.Module, x: Tensor, wanted: Tensor) -> Tensor:
    return (module(x) - wanted).square().mean()


def local_loss(module: nn.Module, step: int) -> Tensor:
    """What this rank loses on its own batch."""
    return loss_of(module, *batch(dist.get_rank(), step))


def mesh_of_all() -> DeviceMesh:
    return init_device_mesh("cpu", (dist.get_world_size(),))


def by_block(module: nn.Sequential, **options: Any) -> nn.Sequential:
    """Sharded by FSDP2, as transformers are."""
    for block in module:
        fully_shard(block, **options)
    return fully_shard(module, **options)


def tensor_parallel(
    module: nn.Sequential, mesh: DeviceMesh | None = None, up: Any = ColumnParallel, down: Any = RowParallel
) -> nn.Module:
    """Cut by plans of tensor parallel; ``up`` and ``down`` make the styles."""
    plan = {f"{i}.{name}": style() for i in range(len(module)) for name, style in (("up", up), ("down", down))}
    return parallelize_module(module, mesh or mesh_of_all(), plan)


def optimizer_of(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in parameters if p.requires_grad], lr=0.02, weight_decay=0.1)


def whole(t: Tensor | None) -> Tensor | None:
    """All of a tensor that may be sharded."""
    if t is None:
        return None
    return (t.full_tensor() if hasattr(t, "full_tensor") else t).detach().clone()


def trained(module: nn.Module, step_loss: Callable[[nn.Module, int], Tensor], steps: int = 10) -> dict[str, Any]:
    """The losses of ten steps, of which the mean is trained, the gradients of the first and the parameters after the
    last."""
    optimizer = optimizer_of(module.parameters())
    losses, gradients = [], {}
    for step in range(steps):
        optimizer.zero_grad()
        loss = step_loss(module, step)
        loss.mean().backward()
        if step == 0:
            gradients = {name: whole(p.grad) for name, p in module.named_parameters() if p.requires_grad}
        optimizer.step()
        losses.append(loss.detach())
    return {
        "losses": losses,
        "gradients": gradients,
        "parameters": {name: whole(p) for name, p in module.named_parameters()},
    }


def trained_alone(module: nn.Module, ranks: int) -> dict[str, Any]:
    """The same in one process, on what the ranks lose together."""

    def losses(module: nn.Module, step: int) -> Tensor:
        return torch.stack([loss_of(module, *batch(rank, step)) for rank in range(ranks)])

    return trained(module, losses)


def assert_trained_alike(found: list[dict[str, Any]], expected: dict[str, Any]) -> None:
    """Losses of every rank, its gradients and parameters; and there was something to learn."""
    losses = torch.stack(expected["losses"], 1)
    for result, mine in zip(found, losses, strict=True):
        torch.testing.assert_close(torch.stack(result["losses"]), mine)
        for kind in ("gradients", "parameters"):
            tensors = {name.removeprefix("module."): t for name, t in result[kind].items()}  # as DDP calls them
            torch.testing.assert_close(tensors, expected[kind])
    assert losses[:, -1].sum() < 0.9 * losses[:, 0].sum()
