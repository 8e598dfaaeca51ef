"""Models made of blocks, as transformers are: the blocks that hold a method's layers, what one of them puts out, and
runs of a model that compute some of them once."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


def blocks_with(model: nn.Module, layers: Iterable[str]) -> list[str]:
    """The names of the blocks that hold these layers, in their order: children of the one nn.ModuleList that they all
    are in; where lists lie within lists, the outermost.

    Raises:
        ValueError: a layer that is in no nn.ModuleList, layers in several, or one that stands in several blocks.
    """
    found: dict[tuple[str, int], str] = {}
    block_of: dict[nn.Module, str] = {}
    for layer in layers:
        path = layer.split(".")
        lists = (i for i in range(len(path)) if isinstance(model.get_submodule(".".join(path[:i])), nn.ModuleList))
        depth = next(lists, None)
        if depth is None:
            raise ValueError(f"targets: got {layer}, which is in no nn.ModuleList, expected layers of its children")
        block = found[".".join(path[:depth]), int(path[depth])] = ".".join(path[: depth + 1])
        if block_of.setdefault(module := model.get_submodule(layer), block) != block:
            raise ValueError(
                f"targets: got {layer}, which stands in {block_of[module]} and {block}, expected a layer of one block"
            )
    several = sorted({name for name, _ in found})
    if len(several) > 1:
        raise ValueError(f"targets: got layers of the lists {', '.join(several)}, expected those of one nn.ModuleList")
    return [found[place] for place in sorted(found)]


class _Left(Exception):
    """Ends a model's forward; holds what the block put out."""

    def __init__(self, output: Any) -> None:
        super().__init__("the forward ends here")
        self.output = output


def output_of(block: nn.Module, run: Callable[[], Any]) -> Tensor:
    """The hidden states that ``block`` puts out within ``run()``, which ends there.

    Raises:
        RuntimeError: ``run`` does not call the block.
        TypeError: the block gives neither a tensor nor something whose first entry is one.
    """

    def leave(_: nn.Module, inputs: Any, output: Any) -> None:
        raise _Left(output)

    handle = block.register_forward_hook(leave)
    try:
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
    its parts the first."""
    forwards = {block: _Once(block.forward) for block in blocks}
    patched = {block: block.__dict__["forward"] for block in blocks if "forward" in block.__dict__}

    def rewind(*_: Any) -> None:
        for once in forwards.values():
            once.calls = 0

    handle = model.register_forward_pre_hook(rewind)
    try:
        for block, once in forwards.items():
            block.__dict__["forward"] = once
        yield
    finally:
        handle.remove()
        for block in blocks:
            del block.__dict__["forward"]
            block.__dict__.update({"forward": patched[block]} if block in patched else {})
