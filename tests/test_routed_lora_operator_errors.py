"""The compiled operators of routed LoRA as torch sees them: schemas, fakes, and the errors of wrong arguments."""

from __future__ import annotations

import pytest
import torch

from clora_kernels import extension
from clora_kernels.kernels.routed_lora import compiled

pytestmark = pytest.mark.skipif(
    not extension.has_op("routed_lora_shrink", "cpu"), reason=f"not compiled: {extension.status()[0].detail}"
)

OPS = torch.ops.clora_kernels
SEED, HALF, ONE = torch.tensor(3), torch.tensor(32768), torch.tensor(1.0)
M, K, N, r = 5, 11, 7, 3
X, DY, Q, Y, W = torch.randn(M, K), torch.randn(M, N), torch.randn(M, r), torch.randn(M, N), torch.randn(N, K)
A, B, C = torch.randn(r, K), torch.randn(N, r), torch.randn(r, N)
ARGUMENTS = {
    "fold": {"small": B, "scale": ONE, "like": X},
    "shrink": {"big": X, "small": A, "seed": SEED, "threshold": HALF},
    "reduce": {"small": Q, "big": X, "seed": SEED, "threshold": HALF},
    "expand_": {"y": Y, "small": Q, "C": C, "seed": SEED, "threshold": HALF, "first_row": 0, "accumulate": True},
    "few_rows": {"dy": DY, "weight": W, "dx": X},
    "lay_down": {"x": X, "lora_A": A, "lora_B": B, "scale": ONE, "seed": SEED, "threshold": HALF},
    "lay_down_backward": {
        "dy": DY, "x": X, "q": Q, "lora_A": A, "lora_B": B, "scale": ONE, "seed": SEED, "threshold": HALF,
        "need_x": True, "need_A": True, "need_B": True,
    },
}  # fmt: skip


def call(name, **changed):
    return getattr(OPS, f"routed_lora_{name}").default(**{**ARGUMENTS[name], **changed})


@pytest.mark.parametrize("name", ARGUMENTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("drops", [False, True])
def test_opcheck(name, dtype, drops):
    arguments = dict(ARGUMENTS[name])
    for large in ("big", "y", "x", "dy", "dx", "q", "weight", "like"):
        if large in arguments:
            arguments[large] = arguments[large].to(dtype)
    if not drops and "seed" in arguments:
        arguments |= {"seed": None, "threshold": None}
    torch.library.opcheck(getattr(OPS, f"routed_lora_{name}").default, (), arguments)


@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False), (False, False, True), (False,) * 3])
def test_opcheck_of_some_gradients(wanted):
    arguments = ARGUMENTS["lay_down_backward"] | dict(zip(("need_x", "need_A", "need_B"), wanted, strict=True))
    torch.library.opcheck(OPS.routed_lora_lay_down_backward.default, (), arguments)


VECTOR, DOUBLE = torch.randn(4), torch.randn(M, K).double()
CASES = [
    ("fold", {"small": VECTOR}, "small must have 2 dimensions, got 1"),
    ("fold", {"small": C.mT}, "small must have contiguous rows"),
    ("fold", {"small": B.bfloat16()}, "small must be fp32"),
    ("fold", {"scale": ONE.double()}, "scale must be a 0-dim fp32"),
    ("fold", {"scale": VECTOR}, "scale must be a 0-dim fp32"),
    ("fold", {"like": SEED}, "like must be fp32, bf16 or fp16"),
    ("shrink", {"big": VECTOR}, "big must have 2 dimensions, got 1"),
    ("shrink", {"big": DOUBLE}, "big must be fp32, bf16 or fp16"),
    ("shrink", {"small": DOUBLE}, "small must be fp32, bf16 or fp16"),
    ("shrink", {"small": VECTOR}, "small must have 2 dimensions"),
    ("shrink", {"small": B}, "small must have the columns of big, 11, got 3"),
    ("shrink", {"seed": None}, "seed and threshold must be given together"),
    ("shrink", {"seed": ONE}, "seed must be an int64"),
    ("shrink", {"threshold": torch.tensor(65537)}, "threshold must be within 0..65536, got 65537"),
    ("reduce", {"small": B}, "small must have the rows of big, 5, got 7"),
    ("reduce", {"small": Q.double()}, "small must be fp32, bf16 or fp16"),
    ("reduce", {"big": DOUBLE}, "big must be fp32, bf16 or fp16"),
    ("reduce", {"threshold": torch.tensor(-1)}, "threshold must be within 0..65536, got -1"),
    ("expand_", {"y": Y.double()}, "y must be fp32, bf16 or fp16"),
    ("expand_", {"y": torch.empty(N, M).mT}, "y must have contiguous rows"),
    ("expand_", {"y": torch.empty(1, N).expand(M, N)}, "y must have rows that do not overlap"),
    ("expand_", {"y": torch.empty(40).as_strided((M, N), (N - 1, 1))}, "y must have rows that do not overlap"),
    ("expand_", {"small": B}, "small must have the rows of y, 5, got 7"),
    ("expand_", {"C": A}, "C must be 3 by 7, got 3 by 11"),
    ("expand_", {"C": VECTOR}, "C must have 2 dimensions"),
    ("expand_", {"first_row": -1}, "first_row must not be negative"),
    ("expand_", {"first_row": 2**63 - 1}, "counters beyond 63 bits"),
    ("few_rows", {"dy": torch.empty(9, N)}, "dy must have 1 to 8 rows, got 9"),
    ("few_rows", {"dy": torch.empty(0, N)}, "dy must have 1 to 8 rows, got 0"),
    ("few_rows", {"dy": VECTOR}, "dy must have 2 dimensions"),
    ("few_rows", {"weight": W[1:]}, "weight must be 7 by 11, got 6 by 11"),
    ("few_rows", {"weight": torch.empty(K, N).mT}, "weight must have contiguous rows"),
    ("few_rows", {"weight": W.double()}, "weight must be fp32, bf16 or fp16"),
    ("few_rows", {"dx": X[1:]}, "dx must be 5 by 11, got 4 by 11"),
    ("lay_down", {"x": VECTOR}, "x must have 2 dimensions"),
    ("lay_down", {"x": DY}, "x must be 5 by 11, got 5 by 7"),
    ("lay_down", {"x": DOUBLE}, "must be fp32, bf16 or fp16"),
    ("lay_down", {"lora_A": VECTOR}, "lora_A must have 2 dimensions"),
    ("lay_down", {"lora_A": A.bfloat16()}, "lora_A must be fp32 and contiguous"),
    ("lay_down", {"lora_A": torch.empty(K, r).mT}, "lora_A must be fp32 and contiguous"),
    ("lay_down", {"lora_B": C}, "lora_B must be 3 by 3, got 3 by 7"),
    ("lay_down", {"lora_B": torch.empty(r, N).mT}, "lora_B must be fp32 and contiguous"),
    ("lay_down", {"lora_B": ONE}, "lora_B must have 2 dimensions, got 0"),
    ("lay_down", {"scale": VECTOR}, "scale must be a 0-dim fp32"),
    ("lay_down", {"threshold": None}, "seed and threshold must be given together"),
    ("lay_down_backward", {"dy": VECTOR}, "dy must have 2 dimensions"),
    ("lay_down_backward", {"dy": X}, "dy must be 5 by 7, got 5 by 11"),
    ("lay_down_backward", {"x": X[1:]}, "x must be 5 by 11, got 4 by 11"),
    ("lay_down_backward", {"q": Q[1:]}, "q must be 5 by 3, got 4 by 3"),
    ("lay_down_backward", {"q": torch.empty(0)}, "q must have 2 dimensions, got 1"),
    ("lay_down_backward", {"lora_A": A.double()}, "lora_A must be fp32 and contiguous"),
    ("lay_down_backward", {"scale": ONE.double(), "need_B": False}, "scale must be a 0-dim fp32"),
    ("lay_down_backward", {"scale": VECTOR[:0], "need_B": False}, "scale must be a 0-dim fp32"),
    ("lay_down_backward", {"threshold": torch.empty(0, dtype=torch.int64)}, "threshold must be a 0-dim"),
    ("lay_down_backward", {"threshold": torch.tensor(65537), "need_A": False}, "threshold must be within 0..65536"),
]  # fmt: skip


@pytest.mark.parametrize(
    "name, changed, message", CASES, ids=[f"{c[0]}-{'+'.join(c[1])}-{i}" for i, c in enumerate(CASES)]
)
def test_wrong_arguments_are_named(name, changed, message):
    before = Y.clone()
    with pytest.raises(RuntimeError, match=message):
        call(name, **changed)
    assert torch.equal(Y, before), "an error leaves y as it was"


def test_the_wrappers_pass_everything_on():
    from clora_kernels.kernels.routed_lora.algebra import Dropout

    drop = Dropout(SEED, HALF)
    assert torch.equal(compiled.shrink(X, A, drop), call("shrink"))
    assert torch.equal(compiled.reduce(Q, X, drop), call("reduce"))
    assert torch.equal(compiled.shrink(X, A, None), call("shrink", seed=None, threshold=None))
    for first_row, accumulate in ((0, False), (4, True)):
        ys = Y.clone(), Y.clone()
        assert compiled.expand(ys[0], Q, C, drop, first_row, accumulate) is ys[0]
        call("expand_", y=ys[1], first_row=first_row, accumulate=accumulate)
        assert torch.equal(*ys) and not torch.equal(ys[0], Y)
    assert torch.equal(compiled.fold(B, ONE * 3, X), call("fold", scale=ONE * 3))


@pytest.mark.parametrize(
    "small, scale, folds",
    [
        (B, ONE, True),
        (C.mT, ONE, False),
        (B.bfloat16(), ONE, False),
        (B, ONE.double(), False),
        (B.to("meta"), ONE, False),
        (B, ONE.to("meta"), False),
    ],
)
def test_what_fold_takes(small, scale, folds):
    assert compiled.folds(small, scale) == folds
