"""Models made of blocks: which blocks hold layers, leaving a forward early, computing blocks once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from vits import TinyViT

from clora_kernels.continual import class_token_exit
from clora_kernels.continual.blocks import blocks_with, computed_once, output_of


def test_blocks_come_in_their_order_whatever_that_of_the_layers() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ModuleList(nn.Sequential(nn.Linear(2, 2)) for _ in range(12)))
    assert blocks_with(model, ["1.11.0", "1.2.0", "1.10.0"]) == ["1.2", "1.10", "1.11"]
    assert blocks_with(nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)]), ["1", "0"]) == ["0", "1"]


@pytest.mark.parametrize("sequence", [lambda *of: nn.ModuleList(of), nn.Sequential])
def test_the_list_with_all_of_the_layers_is_that_of_the_blocks(sequence) -> None:
    stages = sequence(*(sequence(nn.Linear(2, 2), nn.Linear(2, 2)) for _ in range(3)))
    model = nn.ModuleDict({"stages": stages})
    assert blocks_with(model, ["stages.2.1", "stages.0.0", "stages.2.0"]) == ["stages.0", "stages.2"]
    assert blocks_with(model, ["stages.1.1", "stages.1.0"]) == ["stages.1.0", "stages.1.1"]
    assert blocks_with(model, ["stages.1.1"]) == ["stages.1.1"]


def test_blocks_of_a_sequence_with_names_come_in_its_order() -> None:
    model = nn.Sequential()
    for name in ("stem", "late", "early"):
        model.add_module(name, nn.Sequential(nn.Linear(2, 2)))
    assert blocks_with(nn.Sequential(model), ["0.early.0", "0.late.0"]) == ["0.late", "0.early"]


def test_layers_outside_of_one_list_are_refused() -> None:
    shared = nn.Linear(2, 2)
    parts = {
        "stem": nn.Linear(2, 2),
        "text": nn.ModuleList([shared, nn.Linear(2, 2)]),
        "image": nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)]),
        "tied": nn.ModuleList([shared, shared]),
    }
    model = nn.ModuleDict(parts)
    for layers in (["text.0", "stem"], ["text.0", "text.1", "image.1"], ["stem"]):
        with pytest.raises(
            ValueError,
            match=r"targets: got layers whose innermost common module is the model, ModuleDict, expected layers in the "
            r"children of one nn\.ModuleList or nn\.Sequential",
        ):
            blocks_with(model, layers)
    with pytest.raises(ValueError, match=r"targets: got tied\.1, which stands in tied\.0 and tied\.1"):
        blocks_with(model, ["tied.0", "tied.1"])


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_forward_ends_after_the_block(wrapped: bool) -> None:
    model, x, later = TinyViT(wrapped=wrapped), torch.randn(2, 3, 5), []
    model.blocks[2].register_forward_pre_hook(lambda *_: later.append(1))
    hidden = output_of(model.blocks[1], lambda: model(x))
    assert not later and hidden.shape == (2, 4, 8) and hidden.requires_grad
    assert not model.blocks[1]._forward_hooks
    seen = []
    with model.blocks[1].register_forward_hook(lambda m, i, y: seen.append(y[0] if wrapped else y)):
        model(x)
    assert torch.equal(seen[0], hidden) and later == [1]


def test_what_a_block_cannot_give_is_told_and_leaves_no_hook() -> None:
    model, block = TinyViT(), nn.Linear(2, 2)
    with pytest.raises(RuntimeError, match="Linear: got a forward that does not call it"):
        output_of(block, lambda: model(torch.randn(2, 3, 5)))
    with pytest.raises(KeyError):
        output_of(block, lambda: {}["nothing"])

    class Odd(nn.Module):
        def forward(self) -> tuple[str]:
            return ("text",)

    with pytest.raises(TypeError, match="Odd: got str from it, expected hidden states first"):
        output_of(odd := Odd(), odd)
    assert not block._forward_hooks and not odd._forward_hooks


class Twice(nn.Module):
    """Calls its block two times, and changes in place what it got."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.after = nn.Sequential(nn.Linear(4, 4)), nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.block(x)
        y += self.after
        return self.block(y).mul_(self.after)


def test_blocks_are_computed_once_call_by_call() -> None:
    model, x, counted = Twice(), torch.randn(3, 4), []
    model.block[0].register_forward_hook(lambda *_: counted.append(1))
    with torch.no_grad():
        expected = model(x)
        counted.clear()
        with computed_once(model, [model.block]):
            assert [torch.equal(model(x), expected) for _ in range(3)] == [True] * 3
            assert len(counted) == 2
            model.after *= 2
            first = model.block[0](x) + model.after / 2
            torch.testing.assert_close(model(x), model.block[0](first) * model.after)
        counted.clear()
        assert not torch.equal(model(x), expected) and len(counted) == 2


def test_blocks_are_as_they_were_afterwards() -> None:
    model, x = Twice(), torch.randn(3, 4)
    with pytest.raises(KeyError), torch.no_grad(), computed_once(model, [model.block]):
        model(x)
        raise KeyError
    assert "forward" not in vars(model.block) and not model._forward_pre_hooks
    model.block.forward = patched = lambda x: 2 * x
    with torch.no_grad(), computed_once(model, [model.block]):
        got = model(x)
    assert model.block.forward is patched
    torch.testing.assert_close(got, model(x).detach())


def test_the_exit_is_the_first_token_through_the_last_norm_outside_of_the_blocks() -> None:
    model, hidden = TinyViT(), torch.randn(2, 4, 8)
    torch.testing.assert_close(class_token_exit(model, hidden), model.norm(hidden)[:, 0])
    model.last = nn.ModuleDict({"norm": nn.LayerNorm(8)})
    nn.init.normal_(model.last["norm"].weight)
    torch.testing.assert_close(class_token_exit(model, hidden), model.last["norm"](hidden)[:, 0])
    model.blocks = nn.Sequential(*model.blocks)
    assert torch.equal(class_token_exit(model, hidden), model.last["norm"](hidden)[:, 0])
    model.last = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 2))
    nn.init.normal_(model.last[0].weight)
    assert torch.equal(class_token_exit(model, hidden), model.last[0](hidden)[:, 0])
    del model.last, model.norm
    with pytest.raises(ValueError, match=r"model: got TinyViT without an nn\.LayerNorm outside of its blocks"):
        class_token_exit(model, hidden)
