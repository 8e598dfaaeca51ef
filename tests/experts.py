"""What the tests of rank-1 experts share: the backends at hand, gradients for y, calls by hypothesis."""

from __future__ import annotations

from functools import partial
from typing import Any

import hypothesis.strategies as st
import torch
from strategies import DTYPES, LAYOUTS, laid_out
from torch import Tensor

from clora_kernels import rank1_experts
from clora_kernels.dispatch import rank1_experts as dispatch
from clora_kernels.kernels.rank1_experts import native
from clora_kernels.reference import rank1_experts as reference
from clora_kernels.reference.rank1_experts_samples import make_inputs, sample_inputs
from clora_kernels.testing import Deviation, assert_parity

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FLOATS = ("x", "experts_A", "experts_B", "gates", "base_output")
DIFFERENTIABLE = (*FLOATS, "scaling")
SAMPLES = [name for name, _ in sample_inputs()]


def paths(dtypes: str = "fp32") -> list[str]:
    """The modules of primitives that can run these dtypes here."""
    dtype, experts_dtype = DTYPES[dtypes]
    compiled = not native.why_not(dtype, torch.empty(0, dtype=experts_dtype, device=DEVICE))
    return ["aten", "dense"] + ["native"] * compiled


PATHS = [(dtypes, path) for dtypes in DTYPES for path in paths(dtypes)]


def run(path: str, monkeypatch: Any) -> Any:
    """The public function, made to take one path whatever the sizes."""
    if path == "native":
        return partial(rank1_experts, backend="native")
    monkeypatch.setattr(dispatch, "_DENSE_ROWS", 0 if path == "dense" else 1 << 60)
    monkeypatch.setattr(dispatch, "_DENSE_POOL", dict.fromkeys(("cpu", "cuda"), 1 << 60))
    return partial(rank1_experts, backend="aten")


def sample(name: str, dtypes: str, device: torch.device) -> dict[str, Any]:
    return dict(sample_inputs(*DTYPES[dtypes], device=device))[name]


def dy_for(inputs: dict[str, Any], layout: str = "contiguous", seed: int = 7) -> Tensor:
    """A random gradient for the output of a call."""
    x, base = inputs["x"], inputs.get("base_output")
    shape = (*x.shape[:-1], inputs["experts_B"].shape[1])
    dy = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return laid_out(dy.to(x.dtype if base is None else base.dtype).to(x.device), layout)


def check(fn: Any, inputs: dict[str, Any], dy: Tensor | None = None, **options: Any) -> dict[str, Deviation]:
    """Parity of y and every gradient."""
    return assert_parity(fn, inputs, dy=dy_for(inputs) if dy is None else dy, reference=reference, **options)


@st.composite
def calls(draw: st.DrawFn) -> tuple[dict[str, Any], Tensor]:
    """Arguments of a call and a gradient for its output, on the CPU; sums of enough terms that chance cancels no error
    of the formula that stands beside them."""
    lead = draw(st.lists(st.integers(0, 6), min_size=1, max_size=3))
    dtype, experts_dtype = draw(st.sampled_from(list(DTYPES.values())))
    E = draw(st.integers(1, 40))
    wide = st.integers(1 if dtype.itemsize > 2 and experts_dtype.itemsize > 2 else 32, 70)
    inputs = make_inputs(
        lead,
        draw(wide),
        draw(wide),
        E,
        draw(st.integers(1, 12)),
        per_sample=draw(st.booleans()),
        dtype=dtype,
        experts_dtype=experts_dtype,
        index_dtype=draw(st.sampled_from([torch.int32, torch.int64])),
        gates=draw(st.booleans()),
        scaling=draw(st.sampled_from([None, -0.7, 2.5])),
        base_output=draw(st.sampled_from([None, dtype, torch.float32])),
        seed=draw(st.integers(0, 2**20)),
    )
    for name, value in inputs.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            inputs[name] = laid_out(value, draw(st.sampled_from(LAYOUTS)))
    return inputs, dy_for(inputs, draw(st.sampled_from(LAYOUTS)), draw(st.integers(0, 2**20)))
