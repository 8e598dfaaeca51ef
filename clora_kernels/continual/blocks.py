"""Models made of blocks, as transformers are: the blocks that hold a method's layers, what one of them puts out, and
runs of a model that compute some of them once."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

# What runs its children one after the other, or is there for a forward that does.
SEQUENCES = (nn.ModuleList, nn.Sequential)


def blocks_with(model: nn.Module, layers: Iterable[str]) -> list[str]:
    """The names of the blocks that hold these layers, in their order: children of the nn.ModuleList or nn.Sequential
    that is the innermost module with all of the layers in it.

    Raises:
        ValueError: layers whose innermost common module is no such list; one that stands in several blocks.
    """
    layers = list(layers)
    paths = [layer.split(".") for layer in layers]
    depth = next((i for i, parts in enumerate(zip(*paths, strict=False)) if len(set(parts)) > 1), len(paths[0]) - 1)
    parent = ".".join(paths[0][:depth])
    sequence = model.get_submodule(parent)
    if not isinstance(sequence, SEQUENCES):
        raise ValueError(
            f"targets: got layers whose innermost common module is {parent or 'the model'}, {type(sequence).__name__}, "
            "expected layers in the children of one nn.ModuleList or nn.Sequential"
        )
    block_of: dict[nn.Module, str] = {}
    for layer, path in zip(layers, paths, strict=True):
        block = ".".join(path[: depth + 1])
        if block_of.setdefault(module := model.get_submodule(layer), block) != block:
            raise ValueError(
                f"targets: got {layer}, which stands in {block_of[module]} and {block}, expected a layer of one block"
            )
    held = {path[depth] for path in paths}
    return [".".join([*paths[0][:depth], child]) for child in sequence._modules if child in held]


class _Left(Exception):
    """Ends a model's forward; holds what the block put out."""

    def __init__(self, output: Any) -> None:
        super().__init__("the forward ends here")
        self.output = output


def output_of(block: nn.Module, run: Callable[[], Any]) -> Tensor:
    """The hidden states that ``block`` puts out within ``run()``, which ends there; what is compiled runs as it is
    written.

    Raises:
        RuntimeError: ``run`` does not call the block.
        TypeError: the block gives neither a tensor nor something whose first entry is one.
    """

    def leave(_: nn.Module, inputs: Any, output: Any) -> None:
        raise _Left(output)

    handle = block.register_forward_hook(leave)
    try:
        # A compiled forward does not look at hooks that came after it was traced.
        with torch.compiler.set_stance("force_eager"):
            run()
    except _Left as left:
        hidden = left.output if isinstance(left.output, Tensor) else left.output[0]
    else:
        raise RuntimeError(f"{type(block).__name__}: got a forward that does not call it, expected one that does")
    finally:
        handle.remove()
    if not isinstance(hidden, Tensor):
        raise TypeError(f"{type(block).__name__}: got {type(hidden).__name__} from it, expected hidden states first")
    return hidden


class _Once:
    """In the place of a block's forward: of the n-th call of a run, what the n-th call of the first run gave."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        self.forward, self.calls = forward, 0
        self.given: list[Any] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.calls == len(self.given):
            self.given.append(self.forward(*args, **kwargs))
        self.calls += 1
        # A copy: the model may change in place what a block gave it.
        return copy.deepcopy(self.given[self.calls - 1])


@contextmanager
def computed_once(model: nn.Module, blocks: Sequence[nn.Module]) -> Iterator[None]:
    """Within, without gradients, ``model`` computes these blocks in its first run and takes their outputs from there in
    every later one: for runs that differ in what comes after the blocks alone. Hooks of a block see every run, those of
    its parts the first. What is compiled runs as it is written."""
    forwards = {block: _Once(block.forward) for block in blocks}
    patched = {block: block.__dict__["forward"] for block in blocks if "forward" in block.__dict__}

    def rewind(*_: Any) -> None:
        for once in forwards.values():
            once.calls = 0

    handle = model.register_forward_pre_hook(rewind)
    try:
        for block, once in forwards.items():
            block.__dict__["forward"] = once
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        handle.remove()
        for block in blocks:
            del block.__dict__["forward"]
            block.__dict__.update({"forward": patched[block]} if block in patched else {})
