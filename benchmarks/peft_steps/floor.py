"""The steps of an ideal step of a model: those of its blocks with routed LoRA on every linear layer, as in
continual/floor.py. Of a generated token attention reads its sample's keys and values from the cache.

Left out: embeddings, the head and the optimizer. All contestants compute the same.
"""

from __future__ import annotations

from continual.floor import block_floor
from roofline import Floor, Step
from routed_lora.floor import routed_lora_floor
from routed_lora.points import Point as Layer

from .models import MODELS
from .points import RANK, Point


def floor(name: str, point: Point) -> Floor:
    """The steps of a contestant at a point."""
    return _of_generation(point) if point.generates else _of_training(point)


def _of_training(point: Point) -> Floor:
    shape = MODELS[point.model]
    ranks = dict.fromkeys(shape.linears(), RANK)
    blocks = [block_floor(shape, point.batch, point.tokens, point.dtype, ranks, i > 0) for i in range(shape.blocks)]
    forward = [step for block in blocks for step in block.forward]
    backward = [step for block in reversed(blocks) for step in block.backward]
    return Floor(tuple(forward), tuple(backward))


def _of_generation(point: Point) -> Floor:
    shape, e = MODELS[point.model], point.dtype.itemsize
    block: list[Step] = []
    for name, (K, N) in shape.linears().items():
        block += routed_lora_floor(Layer(name, point.batch, K, N, RANK, point.dtype)).forward
    kv = shape.linears()["attention.k_proj"][1]
    cached = 2 * point.tokens * kv  # of a sample; what the step adds is written once and read once
    block.append(
        Step(
            "attention",
            4 * point.batch * (point.tokens + 1) * shape.width,
            e * point.batch * (cached + 4 * kv + 2 * shape.width),
        )
    )
    return Floor(tuple(block) * shape.blocks, tuple(block) * shape.blocks)
