"""The compiled primitives of rank-1 experts for rows that share choices: each set of loops, numbers of every size."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
from test_rank1_experts_native import BF16, F16, F32, assert_all_right, drawn
from test_rank1_experts_native import pytestmark as pytestmark

from clora_kernels.kernels.rank1_experts import native


@pytest.mark.parametrize("n", [1, 31, 300, 1027])
@pytest.mark.parametrize("L, k", [(8, 1), (9, 4), (13, 8), (66, 13), (197, 64), (8, 65)])
@pytest.mark.parametrize("dtypes", [(F32, F32), (BF16, BF16), (BF16, F32), (F16, F16)], ids=str)
def test_rows_that_share_their_choices(dtypes, L, k, n):
    """Around the tiles of rows, choices and columns of such rows."""
    big, experts, indices, small = drawn(3, L, k, n, 70, *dtypes)
    for base in (None, torch.randn(3 * L, n).to(big.dtype)):
        assert_all_right(big, experts, indices, small, base)
    m = slice(L, 2 * L)
    alone = (
        native.shrink(big[m], experts, indices[1:2]),
        native.expand(small[m], experts, indices[1:2], None, big.dtype),
    )
    assert torch.equal(alone[0], native.shrink(big, experts, indices)[m])
    assert torch.equal(alone[1], native.expand(small, experts, indices, None, big.dtype)[m])


SCALES = [1.0, 1e-19, 1e-25, 1e-38, 1e18]


@pytest.mark.parametrize("of_small", [1.0, 1e-15, 1e-19, 1e-38])
@pytest.mark.parametrize("of_big, of_experts", list(product(SCALES, SCALES)))
def test_numbers_of_every_size(of_big, of_experts, of_small):
    """The bf16 instructions take subnormal numbers for zeros, operands as well as results."""
    big, experts, indices, small = drawn(2, 9, 5, 45, 11, BF16, BF16)
    assert_all_right((big * of_big).to(BF16), (experts * of_experts).to(BF16), indices, small * of_small)


def test_without_bf16_instructions():
    """What a processor without them runs, in a process of its own: whether to use them is decided once."""
    environment = {**os.environ, "CLORA_CPU_BF16": "0"}
    here = f"{__file__}::test_rows_that_share_their_choices"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", here, "-k", "bfloat16"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout and "skipped" not in done.stdout


def has_bf16_instructions():
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and "avx512_bf16" in cpuinfo.read_text()


@pytest.mark.skipif(not has_bf16_instructions(), reason="the processor has no AVX512-BF16")
def test_bf16_instructions_round_the_small_operand():
    """So it tells which loops ran; tiny numbers, and groups of less than 8 rows, keep it exact."""
    small, experts = torch.full((16, 1), 1 + 2**-8), torch.full((1, 40), 2.0**7, dtype=BF16)
    base = torch.full((16, 40), -(2.0**7), dtype=BF16)
    zeros = torch.zeros(2, 1, dtype=torch.int64)

    def y(small, experts, indices):
        return native.expand(small, experts, indices, base, BF16).unique().tolist()

    assert y(small, experts, zeros) == [0.0]
    assert y(small, experts, zeros.repeat(8, 1)) == [0.5]
    small[3] = 1e-30
    assert y(small, experts, zeros) == [-(2.0**7), 0.5]
