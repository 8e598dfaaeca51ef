"""Methods on models as their users have them: compiled, and with blocks that call each other."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from vits import TARGETS, Learner, TinyViT, batch

from clora_kernels.continual import DAC, SLAO, CLLoRA, CLoRA, ContinualMethod, TaskReport

METHODS: dict[str, Callable[[nn.Module], ContinualMethod]] = {
    "c-lora": lambda model: CLoRA(model, TARGETS, r=2),
    "cl-lora": lambda model: CLLoRA(model, TARGETS, r=2),
    "dac": lambda model: DAC(model, TARGETS, r=3, k=2, keep=1, dropout_p=0.0),
    "slao": lambda model: SLAO(model, TARGETS, r=2),
}


@pytest.fixture
def dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def history(method: ContinualMethod, tasks: int = 2, steps: int = 2) -> list[Any]:
    """The losses of every step, each task's report, and what the model gives in each view at the end; the first block
    is computed once for all views."""
    calls: list[int] = []
    method.model.blocks[0].norm2.register_forward_hook(lambda *_: calls.append(1))
    torch.manual_seed(1)
    found: list[Any] = []
    learner = Learner(method)
    for _ in range(tasks):
        learner.begin()
        found += [learner.step(number) for number in range(steps)]
        found.append(method.end_task())
    for view in method.views():
        with method.inference(view), torch.no_grad():
            found.append(method.run(batch(9, 9)[0]))
    calls.clear()
    found.append(method.outputs(batch(9, 9)[0]))
    assert len(calls) == 1
    return found


def assert_same(got: list[Any], expected: list[Any]) -> None:
    """Bit for bit."""
    for mine, theirs in zip(got, expected, strict=True):
        if isinstance(mine, TaskReport):
            assert mine == theirs
        else:
            torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


@pytest.mark.parametrize(("name", "wrapped"), [*((name, False) for name in METHODS), ("cl-lora", True)])
def test_a_compiled_model_learns_as_one_that_is_not(name: str, wrapped: bool, dynamo: None) -> None:
    base, traced = TinyViT(depth=2), []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        traced.append(graph)
        return graph.forward

    model = copy.deepcopy(base)
    if wrapped:
        model = torch.compile(model, backend=backend)
    else:
        model.compile(backend=backend)
    ends = []
    for of in (base, model):
        torch.manual_seed(0)
        method = METHODS[name](of)
        for layer in method.layers.values():
            layer.backend = "aten"  # "auto" may compute small layers otherwise where nothing is compiled
        ends.append(history(method))
    expected, got = ends
    if isinstance(method, CLLoRA):
        # Nothing is traced anew for each test, which would use up what may be compiled of the model.
        count = len(traced)
        method.outputs(batch(9, 9)[0])
        assert len(traced) == count
    assert traced and len(got[-1]) == (2 if name == "cl-lora" else 1)
    assert_same(got, expected)


class InSequence(TinyViT):
    """Its blocks as timm's vision transformers have them: an nn.Sequential, called as a whole; a norm, a head."""

    def __init__(self, depth: int) -> None:
        super().__init__(depth)
        self.blocks = nn.Sequential(*self.blocks)
        self.head = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.cat([self.cls.expand(len(x), -1, -1), self.embed(x)], 1)
        return self.head(self.norm(self.blocks(hidden))[:, 0])


@pytest.mark.parametrize("name", METHODS)
def test_blocks_in_an_nn_sequential_learn_as_those_in_an_nn_modulelist(name: str) -> None:
    listed = TinyViT(4)
    model = InSequence(4)
    model.load_state_dict(listed.state_dict())
    ends = []
    for of in (listed, model):
        torch.manual_seed(0)
        ends.append(history(method := METHODS[name](of)))
    if isinstance(method, CLLoRA):
        assert method.shared_blocks == ["blocks.0", "blocks.1"] and len(method.views()) == 2
    expected, got = ends
    assert_same(got, expected)
