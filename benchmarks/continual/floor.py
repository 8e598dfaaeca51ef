"""The steps of an ideal training step: those of every linear layer, adapted or frozen, as in routed_lora/floor.py, and
attention, which reads q, k, v and writes its output.

A method needs no dx where only the frozen embedding would get it: before q, k and v of the first block. CL-LoRA's own
step runs the shared blocks forward for student and teacher, and backward for the student; A learns in none of them.
Left out: norms, activations and residuals, which could be fused into their neighbours; the head, dropout, routings,
DAC's router, the extra losses and the optimizer. Counted although nothing needs it, for every model computes it: what
other tokens than the first do in the last block of a ViT.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from roofline import Floor, Step
from routed_lora.floor import frozen_floor, routed_lora_floor
from routed_lora.points import Point as Layer

from .contestants import targets
from .models import MODELS, Shape
from .points import Point

_FIRST = ("attention.q_proj", "attention.k_proj", "attention.v_proj")
_RANKS = {"dac": 12}  # of the methods that have another than 8 by default


def floor(name: str, point: Point) -> Floor:
    """The steps of a contestant at a point."""
    trains, shape = name != "frozen", MODELS[point.model]
    ranks = dict.fromkeys(targets(point.method, shape), _RANKS.get(point.method, 8)) if trains else {}
    shared = shape.blocks // 2 if trains and point.method == "cl-lora" else 0
    blocks = [
        block_floor(shape, point.batch, point.tokens, point.dtype, ranks, i > 0 or not trains, i >= shared)
        for i in range(shape.blocks)
    ]
    forward = [step for block in blocks for step in block.forward]
    backward = [step for block in reversed(blocks) for step in block.backward]
    for block in blocks[:shared]:
        forward += (*block.forward, *block.forward, *block.backward)
    return Floor(tuple(forward), tuple(backward))


def block_floor(
    shape: Shape,
    batch: int,
    tokens: int,
    dtype: torch.dtype,
    ranks: Mapping[str, int],
    dx_in: bool,
    learns_A: bool = True,
) -> Floor:
    """The steps of a block whose layers named in ``ranks`` are adapted; ``dx_in``: whether anybody needs its dx."""
    rows = batch * tokens
    forward: list[Step] = []
    backward: list[Step] = []
    for name, (K, N) in shape.linears().items():
        layer = Layer(name, rows, K, N, ranks.get(name, 0), dtype)
        if name in ranks:
            own = routed_lora_floor(layer)
            shrink, dx, of_B, of_A, unpack = own.backward
            steps = [shrink, dx, of_B, of_A, unpack] if learns_A else [shrink, dx, of_B, unpack]
        else:
            own = frozen_floor(layer)
            (dx,) = steps = [*own.backward]
        forward += own.forward
        backward += [step for step in steps if step is not dx or dx_in or name not in _FIRST]
    q, kv = (rows * n * dtype.itemsize for n in (shape.width, shape.linears()["attention.k_proj"][1]))
    flops = 4 * rows * tokens * shape.width // (2 if shape.llama else 1)  # causal: half of the pairs
    forward.append(Step("attention", flops, 2 * q + 2 * kv))
    backward.append(Step("attention", 2 * flops, 4 * q + 4 * kv))
    return Floor(tuple(forward), tuple(backward))
