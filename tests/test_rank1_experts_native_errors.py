"""The compiled operators of rank-1 experts as torch sees them: schemas, fakes, and the errors of wrong arguments."""

from __future__ import annotations

import pytest
import torch

from clora_kernels import extension
from clora_kernels.kernels.rank1_experts import native
from clora_kernels.testing import unchanged

pytestmark = pytest.mark.skipif(
    not extension.has_op("rank1_experts_shrink", "cpu"), reason=f"not compiled: {extension.status()[0].detail}"
)

OPS = torch.ops.clora_kernels
F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64
M, K, E = 6, 11, 8
BIG, EXPERTS, INDICES, SMALL = torch.randn(M, K), torch.randn(E, K), torch.randint(E, (M, 3)), torch.randn(M, 3)
ORDER, STARTS = torch.sort(INDICES.flatten(), stable=True).indices.int(), torch.bincount(INDICES.flatten(), minlength=E)
STARTS = torch.cat([STARTS.new_zeros(1), STARTS.cumsum(0)]).int()
ARGUMENTS = {
    "shrink": {"big": BIG, "experts": EXPERTS, "indices": INDICES},
    "expand_": {"y": BIG, "small": SMALL, "experts": EXPERTS, "indices": INDICES, "base": BIG},
    "order": {"indices": INDICES, "experts": E},
    "reduce_": {"out": EXPERTS, "small": SMALL, "big": BIG, "indices": INDICES, "order": ORDER, "starts": STARTS},
}


def changed_at(t, position, value):
    t = t.clone()
    t.view(-1)[position] = value
    return t


VECTOR = torch.randn(4)
OUTSIDE = [
    ({"indices": changed_at(INDICES, 4, 8)}, "within the pool of 8 experts, got 8 at position 4"),
    ({"indices": changed_at(INDICES, 17, -1)}, "within the pool of 8 experts, got -1 at position 17"),
    ({"indices": changed_at(INDICES, 0, 2**40)}, "within the pool of 8 experts, got 1099511627776 at position 0"),
    ({"indices": changed_at(INDICES.int(), 3, -(2**31))}, "got -2147483648 at position 3"),
]
WRONG_INDICES = [
    ({"indices": INDICES.flatten()}, "indices must have 2 dimensions, got 1"),
    ({"indices": INDICES.to(torch.int16)}, "indices must be int32 or int64"),
    ({"indices": INDICES.mT.contiguous().mT}, "indices must be contiguous"),
]
WRONG_GROUPS = [
    ({"indices": INDICES[:4]}, "of {}, which has 6, got 4"),
    ({"indices": INDICES[:0]}, "of {}, which has 6, got 0"),
]
CASES = [
    *(("shrink", *c) for c in [*OUTSIDE, *WRONG_INDICES]),
    *(("expand_", *c) for c in [*OUTSIDE, *WRONG_INDICES]),
    *(("order", *c) for c in [*OUTSIDE, *WRONG_INDICES]),
    *(("reduce_", *c) for c in WRONG_INDICES),
    *(("shrink", changed, message.format("big")) for changed, message in WRONG_GROUPS),
    *(("expand_", changed, message.format("y")) for changed, message in WRONG_GROUPS),
    *(("reduce_", changed, message.format("big")) for changed, message in WRONG_GROUPS),
    ("shrink", {"big": VECTOR}, "big must have 2 dimensions, got 1"),
    ("shrink", {"big": BIG.to(torch.int32)}, "big must be fp32, bf16, fp16 or fp64"),
    ("shrink", {"big": BIG.mT.contiguous().mT}, "big must have contiguous rows"),
    ("shrink", {"experts": VECTOR}, "experts must have 2 dimensions, got 1"),
    ("shrink", {"experts": EXPERTS.double()}, "experts and big must both be fp64, or neither"),
    ("shrink", {"experts": EXPERTS[:, :10]}, "experts must have the columns of big, 11, got 10"),
    ("shrink", {"experts": EXPERTS.mT.contiguous().mT}, "experts must have contiguous rows"),
    ("expand_", {"y": VECTOR}, "y must have 2 dimensions, got 1"),
    ("expand_", {"y": BIG.mT.contiguous().mT}, "y must have contiguous rows"),
    ("expand_", {"y": BIG[:1].expand(M, K)}, "y must have rows that do not overlap"),
    ("expand_", {"y": torch.empty(99).as_strided((M, K), (K - 1, 1))}, "y must have rows that do not overlap"),
    ("expand_", {"y": BIG.double()}, "experts and y must both be fp64, or neither"),
    ("expand_", {"experts": EXPERTS[:, :10]}, "experts must have the columns of y, 11, got 10"),
    ("expand_", {"small": VECTOR}, "small must have 2 dimensions, got 1"),
    ("expand_", {"small": SMALL[:, :2]}, "small must be 6 by 3, got 6 by 2"),
    ("expand_", {"small": SMALL.bfloat16()}, "small must be fp32, as sums for y are"),
    ("expand_", {"small": SMALL.mT.contiguous().mT}, "small must be contiguous"),
    ("expand_", {"base": BIG.bfloat16()}, "base must have the dtype of y"),
    ("expand_", {"base": BIG[:5]}, "base must be 6 by 11, got 5 by 11"),
    ("expand_", {"base": BIG.mT.contiguous().mT}, "base must have contiguous rows"),
    ("order", {"experts": -1}, "experts must be within 0..2147483646, got -1"),
    ("order", {"experts": 2**31 - 1}, "experts must be within 0..2147483646, got 2147483647"),
    ("order", {"experts": 0}, "indices must be within the pool of 0 experts"),
    ("reduce_", {"out": EXPERTS.double()}, "out and big must both be fp64, or neither"),
    ("reduce_", {"out": EXPERTS[:, :10]}, "out must have the columns of big, 11, got 10"),
    ("reduce_", {"out": EXPERTS[:1].expand(E, K)}, "out must have rows that do not overlap"),
    ("reduce_", {"out": EXPERTS[:7]}, "starts must have 8 elements in 1 dimension, got 9 in 1"),
    ("reduce_", {"big": VECTOR}, "big must have 2 dimensions, got 1"),
    ("reduce_", {"small": SMALL.double()}, "small must be fp32, as sums for big are"),
    ("reduce_", {"small": SMALL[:5]}, "small must be 6 by 3, got 5 by 3"),
    ("reduce_", {"order": ORDER[:5]}, "order must have 18 elements in 1 dimension, got 5 in 1"),
    ("reduce_", {"order": ORDER.long()}, "order must be int32"),
    ("reduce_", {"order": torch.stack([ORDER, ORDER], 1)[:, 0]}, "order must be contiguous"),
    ("reduce_", {"order": changed_at(ORDER, 3, 18)}, "order must hold positions of 18 choices, got 18"),
    ("reduce_", {"order": changed_at(ORDER, 3, -1)}, "order must hold positions of 18 choices, got -1"),
    ("reduce_", {"starts": STARTS.float()}, "starts must be int32"),
    ("reduce_", {"starts": changed_at(STARTS, 0, -1)}, "starts must rise from 0 to the number of choices, 18"),
    ("reduce_", {"starts": changed_at(STARTS, 8, 19)}, "starts must rise from 0 to the number of choices, 18"),
    ("reduce_", {"starts": changed_at(STARTS, 4, 19)}, "starts must rise from 0 to the number of choices, 18"),
]  # fmt: skip


@pytest.mark.parametrize(
    "name, changed, message", CASES, ids=[f"{c[0]}-{'+'.join(c[1])}-{i}" for i, c in enumerate(CASES)]
)
def test_wrong_arguments_are_named(name, changed, message):
    """And nothing is written before."""
    arguments = {**ARGUMENTS[name], **changed}
    with unchanged(*(t for t in arguments.values() if isinstance(t, torch.Tensor))):
        with pytest.raises(RuntimeError, match=message.replace("(", r"\(")):
            getattr(OPS, f"rank1_experts_{name}").default(**arguments)


@pytest.mark.parametrize("name", ARGUMENTS)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_opcheck(name, dtype):
    arguments = {k: t.to(dtype) if k in ("big", "y", "base", "out", "experts") and name != "order" else t
                 for k, t in ARGUMENTS[name].items()}  # fmt: skip
    if name == "expand_":
        arguments["base"] = arguments["base"].clone()
    torch.library.opcheck(getattr(OPS, f"rank1_experts_{name}").default, (), arguments)


@pytest.mark.parametrize("x, experts, why", [
    (F32, F64, "not built for x in torch.float32 with experts in torch.float64"),
    (torch.int32, F32, "not built for x in torch.int32"),
    (BF16, F32, ""), (F64, F64, ""),
])  # fmt: skip
def test_why_not(x, experts, why):
    found = native.why_not(x, torch.empty(2, 3, dtype=experts))
    assert why in found and bool(why) == bool(found)
