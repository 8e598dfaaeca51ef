"""The code in the guide to several processes runs as it stands."""

from __future__ import annotations

import pytest
import torch
from layers import same_bits
from parallel_models import whole
from processes import run_in
from test_docs import snippets
from torch import nn

from clora_kernels import RoutedLoRALinear, freeze_base, gram_schmidt, inject


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def learned(model, frozen):
    """The state of the model after three steps."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.linspace(-1, 1, 4 * 32).reshape(4, 32)).square().mean().backward()
        optimizer.step()
    assert any(not p.requires_grad for p in model.parameters()) == frozen
    return state_of(model)


def state_of(model):
    return {name: whole(t) for name, t in model.state_dict().items()}


def guide(folder):
    """What its parts leave: a model that is sharded, saved and loaded again, one that is cut, and a factor of that."""
    sharded, parallel, checkpoint, factors = snippets("docs/parallel.md")
    names = {"torch": torch, "model": Model(), "folder": folder}
    exec(sharded, names)
    after = learned(names["model"], frozen=True)
    saving, loading = checkpoint.split("...")
    exec(saving, names)
    with torch.no_grad():
        for parameter in names["model"].parameters():
            parameter.zero_()
    exec("..." + loading, names)
    other = {"model": Model()}
    exec(parallel, other)
    exec(factors, other)
    return after, state_of(names["model"]), learned(other["model"], frozen=False), other["Q"]


def alone():
    model = Model()
    inject(model, lambda linear: RoutedLoRALinear.from_linear(linear, r=16), ["up", "down"])
    return model


@pytest.mark.parametrize("ranks", [2, 4])
def test_the_guide_to_several_processes(ranks, tmp_path) -> None:
    found = run_in(ranks, guide, str(tmp_path))
    sharded, cut, factor = alone(), alone(), alone().blocks[0].down.lora_A
    freeze_base(sharded)
    expected = learned(sharded, frozen=True), learned(cut, frozen=False)
    for after, loaded, parallel, _ in found:
        torch.testing.assert_close(after, expected[0])
        assert same_bits(loaded, after)
        torch.testing.assert_close(parallel, expected[1])
    torch.testing.assert_close(torch.cat([Q for *_, Q in found]), gram_schmidt(factor.mT).Q)
