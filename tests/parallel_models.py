"""Small models for the tests of several processes, their batches, and how they are trained."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from layers import randomize
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from clora_kernels import RoutedLoRALinear, freeze_base

D, H = 8, 12


class Block(nn.Module):
    """x + down(gelu(up(x))), both layers adapted."""

    def __init__(self, dtype: torch.dtype, learn_scaling: bool = False, **options: Any) -> None:
        super().__init__()
        self.up = RoutedLoRALinear(D, H, 3, dtype=dtype, **{"scaling": 0.7, **options})
        self.down = RoutedLoRALinear(H, D, 3, dtype=dtype, **{"scaling": 1.3, **options})
        for layer in (self.up, self.down) if learn_scaling else ():
            layer.scaling = nn.Parameter(torch.tensor(layer.scaling, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
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


def batch(rank: int, step: int, dtype: torch.dtype = torch.float64, ragged: bool = True) -> tuple[Tensor, Tensor]:
    """x and the wanted y of a rank: sequences of another length on each."""
    generator = torch.Generator().manual_seed(100 * step + rank)
    shape = (2, 3 + 2 * rank if ragged else 3, D)
    return tuple(torch.randn(shape, generator=generator, dtype=dtype) for _ in range(2))  # type: ignore[return-value]


def loss_of(module: nn.Module, x: Tensor, wanted: Tensor) -> Tensor:
    return (module(x) - wanted).square().mean()


def local_loss(module: nn.Module, step: int) -> Tensor:
    """What this rank loses on its own batch."""
    return loss_of(module, *batch(dist.get_rank(), step))


def by_block(module: nn.Sequential, **options: Any) -> nn.Sequential:
    """Sharded by FSDP2, as transformers are."""
    for block in module:
        fully_shard(block, **options)
    return fully_shard(module, **options)


def optimizer_of(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in parameters if p.requires_grad], lr=0.02, weight_decay=0.1)


def whole(t: Tensor | None) -> Tensor | None:
    """All of a tensor that may be sharded."""
    if t is None:
        return None
    return (t.full_tensor() if hasattr(t, "full_tensor") else t).detach().clone()


def trained(module: nn.Module, step_loss: Callable[[nn.Module, int], Tensor], steps: int = 10) -> dict[str, Any]:
    """The losses of ten steps, the gradients of the first and the parameters after the last."""
    optimizer = optimizer_of(module.parameters())
    losses, gradients = [], {}
    for step in range(steps):
        optimizer.zero_grad()
        loss = step_loss(module, step)
        loss.backward()
        if step == 0:
            gradients = {name: whole(p.grad) for name, p in module.named_parameters() if p.requires_grad}
        optimizer.step()
        losses.append(loss.detach())
    return {
        "losses": losses,
        "gradients": gradients,
        "parameters": {name: whole(p) for name, p in module.named_parameters()},
    }


def trained_alone(module: nn.Module, ranks: int, dtype: torch.dtype = torch.float64, ragged: bool = True) -> dict:
    """The same in one process: the mean of what the ranks lose."""

    def step_loss(module: nn.Module, step: int) -> Tensor:
        return torch.stack([loss_of(module, *batch(r, step, dtype, ragged)) for r in range(ranks)]).mean()

    return trained(module, step_loss)
