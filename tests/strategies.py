"""Calls of routed LoRA drawn by hypothesis: shapes, dtypes, options, and tensors with strides nobody expects."""

from __future__ import annotations

import math
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from clora_kernels import routed_lora_delta, routed_lora_linear
from clora_kernels.reference.routed_lora_samples import make_inputs

LAYOUTS = ("contiguous", "transposed", "stepped", "padded", "offset", "expanded")
DTYPES = {
    "fp32": (torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "bf16+fp32": (torch.bfloat16, torch.float32),
    "fp16": (torch.float16, torch.float16),
    "fp16+fp32": (torch.float16, torch.float32),
    "fp32+bf16": (torch.float32, torch.bfloat16),
    "fp64": (torch.float64, torch.float64),
}
DIFFERENTIABLE = ("x", "weight", "lora_A", "lora_B", "routing", "bias", "gate", "scaling", "base_output")


def call(x: Tensor, weight: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
    """The public function for these arguments: the layer, or without a weight the adapter alone."""
    if weight is None:
        return routed_lora_delta(x, *args, **kwargs)
    return routed_lora_linear(x, weight, *args, **kwargs)


def fused(*args: Any, **kwargs: Any) -> Tensor:
    """The same by the Triton kernels."""
    return call(*args, **kwargs, backend="triton")


def made(*sizes: Any, dtypes: str = "fp32", **options: Any) -> dict[str, Any]:
    """``make_inputs`` in dtypes by the names of ``DTYPES``."""
    dtype, adapter_dtype = DTYPES[dtypes]
    return make_inputs(*sizes, dtype=dtype, adapter_dtype=adapter_dtype, **options)


def dy_for(inputs: dict[str, Any], layout: str = "contiguous", seed: int = 7) -> Tensor:
    """A random gradient for the output of a call."""
    x, base = inputs["x"], inputs.get("base_output")
    shape = (*x.shape[:-1], inputs["lora_B"].shape[0])
    dy = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return laid_out(dy.to(x.dtype if base is None else base.dtype).to(x.device), layout)


def tensors_of(inputs: dict[str, Any]) -> list[Tensor]:
    return [value for value in inputs.values() if isinstance(value, Tensor)]


def laid_out(t: Tensor, layout: str) -> Tensor:
    """``t`` in other strides; "expanded" repeats its first slice with stride 0, the others keep every value."""
    if t.dim() == 0 or layout == "contiguous":
        return t
    if layout == "expanded":
        return t[:1].expand_as(t)
    if layout == "transposed":
        return t.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "stepped":
        return torch.stack([t, torch.full_like(t, float("nan"))], -1).flatten(-2)[..., ::2]
    if layout == "padded":
        return torch.cat([t, torch.full_like(t, float("nan"))], -1)[..., : t.shape[-1]]
    if layout == "offset":
        return torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)
    raise ValueError(f"layout: got {layout!r}, expected one of {', '.join(LAYOUTS)}")


@st.composite
def tensors(draw: st.DrawFn, max_dim: int = 4, max_size: int = 9) -> Tensor:
    """Random fp32 tensors of 1 to ``max_dim`` dimensions in a drawn layout."""
    shape = draw(st.lists(st.integers(1, max_size), min_size=1, max_size=max_dim))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    return laid_out(torch.randn(shape, generator=generator), draw(st.sampled_from(LAYOUTS)))


@st.composite
def calls(draw: st.DrawFn) -> tuple[dict[str, Any], Tensor]:
    """Arguments of a call and a gradient for its output, on the CPU."""
    lead = draw(st.lists(st.integers(0, 6), min_size=1, max_size=3))
    r = draw(st.sampled_from([1, 2, 3, 8, 17, 40]))
    dtype, adapter_dtype = draw(st.sampled_from(list(DTYPES.values())))
    K, N = draw(st.integers(1, 70)), draw(st.integers(1, 70))
    alone = draw(st.integers(0, 4)) == 0
    # In 16 bit the bias is added to a sum that is rounded already. Where few numbers, or copies of one, come out it can
    # cancel them all, and what is left is the first rounding.
    many = dtype.itemsize > 2 or math.prod(lead) * N >= 32
    bias = many and not alone and draw(st.booleans())
    layouts = LAYOUTS if dtype.itemsize > 2 or not bias else LAYOUTS[:-1]
    gates = [None, (), (1,), (r,), (*lead, r), (*lead[:-1], 1, r), (lead[0], *([1] * len(lead)))]
    inputs = make_inputs(
        lead,
        K,
        N,
        r,
        dtype=dtype,
        adapter_dtype=adapter_dtype,
        weight=not alone,
        routing=draw(st.booleans()),
        bank=draw(st.sampled_from([0, 0, 1, 3])),
        frozen=draw(st.booleans()),
        bias=bias,
        gate=draw(st.sampled_from(gates)),
        scaling=draw(st.sampled_from([None, -0.7, 2.5])),
        dropout_p=draw(st.sampled_from([0.0, 0.0, 0.25, 1.0])),
        base_output=draw(st.sampled_from([None, dtype, torch.float32])) if alone else None,
        strength=draw(st.sampled_from([0.01, 1.0])),
        seed=draw(st.integers(0, 2**20)),
    )
    for name, value in inputs.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            inputs[name] = laid_out(value, draw(st.sampled_from(layouts)))
    return inputs, dy_for(inputs, draw(st.sampled_from(LAYOUTS)), draw(st.integers(0, 2**20)))
