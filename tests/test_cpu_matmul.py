"""The matmul that chooses between the libraries of a CPU: of whole numbers, so to the last bit, whichever it takes."""

from __future__ import annotations

import pytest
import torch
from strategies import laid_out

from clora_kernels.kernels import cpu_matmul

# m, k, n: one number, no rows, a narrow result of a short and of a long sum, few rows, one call, pieces of a long sum
SHAPES = [
    (1, 1, 1),
    (0, 5, 3),
    (90, 64, 8),
    (90, 300, 8),
    (7, 300, 310),
    (70, 96, 200),
    (530, 1300, 70),
    (40, 2100, 70),
]


def whole_numbers(shape, dtype):
    """On the CPU, whatever else is there. Sums of products of them are exact in ``dtype``, of fp64 in no other."""
    largest = {torch.float64: 1 << 20, torch.float32: 50}.get(dtype, 4)
    return torch.randint(-largest, largest + 1, shape).to(dtype)


@pytest.fixture(params=["as measured", "always"])
def onednn(request, monkeypatch):
    """Runs a test where sizes decide between the libraries, and where all that oneDNN can take goes to it."""
    if request.param == "always":
        monkeypatch.setattr(cpu_matmul, "_least_flops", lambda: 0)
        monkeypatch.setattr(cpu_matmul, "_LEAST_ROWS", 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "stepped", "padded"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape_and_layout(onednn, shape, layout, dtype):
    m, k, n = shape
    a, b, bias = (whole_numbers(size, dtype) for size in ((m, k), (k, n), (n,)))
    exact = a.double() @ b.double()
    a, b, bias = (laid_out(t, layout) for t in (a, b, bias))
    got = cpu_matmul.matmul(a, b)
    assert torch.equal(got, exact.to(dtype)) and got.dtype == dtype and got.is_contiguous()
    if dtype.itemsize > 2:  # else the sum may be rounded before the bias is added
        assert torch.equal(cpu_matmul.matmul(a, b, bias), exact.add(bias.double()).to(dtype))
