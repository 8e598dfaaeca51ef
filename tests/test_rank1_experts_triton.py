"""The Triton kernels of rank-1 experts: samples, sizes around their blocks, dtypes, bits, what is launched."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from experts import DIFFERENTIABLE, FLOATS, check, dy_for
from strategies import DTYPES, laid_out, tensors_of

from clora_kernels import explain, rank1_experts
from clora_kernels.dispatch import rank1_experts as dispatch
from clora_kernels.dispatch.routed_lora import why_not_triton
from clora_kernels.reference.rank1_experts_samples import make_inputs, sample_inputs
from clora_kernels.testing import (
    dispatched,
    evaluate,
    guarded_outputs,
    launches,
    poisoned_empty,
    saved_tensors,
    unchanged,
)

pytest.importorskip("triton")
_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(bool(why := why_not_triton(torch.float32, _DEVICE, None)), reason=why or "runs")
fused = partial(rank1_experts, backend="triton")
NAMES = [name for name, _ in sample_inputs()]
FEW = ["per_sample", "no_gates_per_sample", "onto_fp32_base", "every_expert"]
TYPES = ["bf16", "bf16+fp32", "fp16", "fp16+fp32", "fp32+bf16"]
# where each token chooses there is a program for each: a few of those, which take the interpreter long
TOKENS = ["int32", "onto_base", "one_number", "one_row", "no_lead", "no_rows", "strided"]
CASES = [(name, "fp32") for name in NAMES if "sample" in name or name in (*TOKENS, "every_expert")]
CASES += [(name, dtypes) for dtypes in TYPES for name in FEW]
LAUNCHED = ["shrink_kernel", "expand_kernel"] * 2 + ["products_kernel", "sums_kernel"] * 2


@pytest.mark.parametrize(("name", "dtypes"), CASES)
def test_samples(device, name, dtypes):
    inputs = dict(sample_inputs(*DTYPES[dtypes], device=device))[name]
    dy = dy_for(inputs)
    with unchanged(dy, *tensors_of(inputs)), poisoned_empty(), saved_tensors(), launches() as launched:
        check(fused, inputs, dy)
    assert launched == (LAUNCHED if inputs["x"].numel() else [])


# Around blocks of 64 rows, 64 and 128 columns, 16 and 64 choices; several samples, and more choices than a program has.
SIZES = [(2, 63, 64, 128, 16), (1, 65, 65, 129, 17), (3, 16, 130, 15, 65), (2, 1, 30, 140, 3)]


@pytest.mark.parametrize("dtypes", ["fp32", "bf16+fp32"])
@pytest.mark.parametrize("S, L, K, N, k", SIZES)
def test_sizes(device, S, L, K, N, k, dtypes):
    dtype, experts_dtype = DTYPES[dtypes]
    options = {"per_sample": True, "dtype": dtype, "experts_dtype": experts_dtype, "base_output": torch.float32}
    check(fused, make_inputs((S, L), K, N, 11, k, **options, device=device))


@pytest.mark.parametrize("layout", ["transposed", "padded", "expanded"])
def test_any_strides(device, layout):
    inputs = make_inputs(per_sample=True, base_output=torch.float32, device=device)
    inputs = {k: laid_out(v, layout) if k in FLOATS else v for k, v in inputs.items()}
    with unchanged(*tensors_of(inputs)):
        check(fused, inputs, dy_for(inputs, layout))


def test_nothing_is_written_beyond_an_output(device):
    with guarded_outputs():
        check(fused, make_inputs(per_sample=True, base_output=torch.float32, device=device))


def test_bitwise_repeatable(device):
    inputs = make_inputs((3, 40), E=4, k=6, per_sample=True, scaling=None, base_output=torch.float32, device=device)
    first, second = (evaluate(fused, inputs, dy_for(inputs), DIFFERENTIABLE) for _ in range(2))
    assert all(torch.equal(first[k], second[k]) for k in first)


def test_samples_that_all_choose_one_expert(device):
    inputs = make_inputs((7, 5), E=9, k=2, per_sample=True, device=device)
    inputs["indices"] = torch.full_like(inputs["indices"], 3)
    check(fused, inputs)
    grads = evaluate(fused, inputs, dy_for(inputs), ["experts_A", "experts_B"])
    assert all(grads[name].abs().amax(1).nonzero().flatten().tolist() == [3] for name in ("experts_A", "experts_B"))


def test_auto_takes_them_on_a_gpu_for_samples_of_some_length(device, monkeypatch):
    long, short = (make_inputs((2, L), E=400, k=2, per_sample=True, device=device) for L in (16, 15))
    tokens = make_inputs((2, 16), E=400, k=2, device=device)
    chosen = [explain(rank1_experts, **inputs).backend == "triton" for inputs in (long, short, tokens)]
    assert chosen == [device.type == "cuda", False, False]
    monkeypatch.setattr(dispatch, "_why_not_samples", lambda dtype, *experts: "they do not")
    assert explain(rank1_experts, **long).backend != "triton"
    with pytest.raises(ValueError, match="backend='triton' cannot run rank1_experts: they do not"):
        fused(**long)


def test_their_primitives_are_those_of_the_operation(device):
    with dispatched() as ran:
        evaluate(fused, inputs := make_inputs(per_sample=True, device=device), dy_for(inputs), ["x", "experts_A"])
    assert ran == [f"rank1_experts.triton.{p}" for p in ("shrink", "expand", "order", "shrink", "expand", "reduce")]
