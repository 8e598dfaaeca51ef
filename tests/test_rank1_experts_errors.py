"""Bad input to rank-1 experts: every argument, every way. The error names the argument, what came, what is right."""

from __future__ import annotations

import re

import pytest
import torch
from experts import paths, run

from clora_kernels import explain, extension, gather_rank1_experts, merge_rank1_experts, rank1_experts
from clora_kernels.reference.rank1_experts_samples import make_inputs
from clora_kernels.testing import dispatched, unchanged

META = torch.empty(1, device="meta")


def constant(value):
    return lambda t: value


def shaped(*shape, dtype=torch.float32):
    return lambda t: torch.ones(shape, dtype=dtype, device=t.device)


POOL = [
    ("experts_A", constant([[1.0]]), TypeError, "got list, expected a Tensor"),
    ("experts_A", shaped(17, 41, dtype=torch.int64), TypeError, "got dtype torch.int64, expected one of torch.float32"),
    ("experts_A", shaped(41), ValueError, "got shape (41,), expected (E, "),
    ("experts_A", shaped(0, 41), ValueError, "got a pool of 0 experts, expected at least 1"),
    ("experts_B", constant(None), TypeError, "got NoneType, expected a Tensor"),
    ("experts_B", shaped(17, 29, dtype=torch.bool), TypeError, "got dtype torch.bool"),
    ("experts_B", shaped(17, 29, 1), ValueError, "got shape (17, 29, 1), expected (E, "),
    ("experts_B", shaped(16, 29), ValueError, "got 16 experts, expected 17, those of experts_A"),
    ("experts_B", lambda t: t.to("meta"), ValueError, "got device meta, expected"),
    ("indices", constant(3), TypeError, "got int, expected a Tensor"),
    ("indices", shaped(3, 7, 5), TypeError, "got dtype torch.float32, expected int64 or int32"),
    ("indices", shaped(3, 7, 5, dtype=torch.int16), TypeError, "got dtype torch.int16, expected int64 or int32"),
    ("indices", shaped(3, 7, 0, dtype=torch.int64), ValueError, "got shape (3, 7, 0), expected [..., k] with k of at"),
    ("indices", shaped(dtype=torch.int64), ValueError, "got shape (), expected [..., k] with k of at least 1"),
    ("indices", lambda t: t.to("meta"), ValueError, "got device meta, expected"),
    ("gates", constant(1.0), TypeError, "got float, expected a Tensor"),
    ("gates", lambda t: t.long(), TypeError, "got dtype torch.int64"),
    ("gates", lambda t: t[..., :1], ValueError, "expected "),
    ("gates", lambda t: t.to("meta"), ValueError, "got device meta, expected"),
]
CASES = [
    *POOL,
    ("x", constant(None), TypeError, "got NoneType, expected a Tensor"),
    ("x", shaped(3, 7, 41, dtype=torch.int32), TypeError, "got dtype torch.int32"),
    ("x", shaped(), ValueError, "got a 0-dim tensor, expected [..., in_features]"),
    ("experts_A", shaped(17, 40), ValueError, "got shape (17, 40), expected (E, 41) = (experts, in_features)"),
    ("experts_A", lambda t: t.to("meta"), ValueError, "got device meta, expected"),
    (
        "indices",
        shaped(3, 6, 5, dtype=torch.int64),
        ValueError,
        "got shape (3, 6, 5), expected (3, 7, 5) = x.shape[:-1] + (k,), or (3, 5) = (x.shape[0], k) where all tokens",
    ),
    ("indices", shaped(2, 5, dtype=torch.int64), ValueError, "got shape (2, 5), expected (3, 7, 5)"),
    ("indices", shaped(5, dtype=torch.int64), ValueError, "got shape (5,), expected (3, 7, 5)"),
    ("gates", shaped(3, 5), ValueError, "got shape (3, 5), expected (3, 7, 5) = the shape of indices"),
    ("scaling", constant("1"), TypeError, "got str, expected a number or a 0-dim float tensor"),
    ("scaling", constant(True), TypeError, "got bool"),
    ("scaling", shaped(1), ValueError, "got torch.float32 of shape (1,), expected a number or a 0-dim"),
    ("base_output", constant(0.0), TypeError, "got float, expected a Tensor"),
    ("base_output", shaped(3, 7, 28), ValueError, "got shape (3, 7, 28), expected (3, 7, 29) = x.shape[:-1] + (out_"),
    ("base_output", shaped(21, 29), ValueError, "got shape (21, 29), expected (3, 7, 29)"),
    ("base_output", lambda t: t.int(), TypeError, "got dtype torch.int32"),
    ("backend", constant("cuda"), ValueError, "got 'cuda', expected one of 'auto', 'reference'"),
    ("backend", constant(None), ValueError, "got None, expected one of"),
]


def good(device):
    return make_inputs(base_output=torch.float32, device=device) | {"backend": "auto"}


def refuses(call, tensors, error, message):
    with unchanged(*[t for t in tensors if isinstance(t, torch.Tensor) and t.device.type != "meta"]):
        with dispatched() as ran, pytest.raises(error, match=re.escape(message)):
            call()
    assert not ran


@pytest.mark.parametrize(("name", "wrong", "error", "message"), CASES)
def test_bad_arguments(device, name, wrong, error, message):
    inputs = good(device)
    inputs[name] = wrong(inputs[name] if isinstance(inputs[name], torch.Tensor) else inputs["x"])
    refuses(lambda: rank1_experts(**inputs), inputs.values(), error, message)
    for call in (lambda: rank1_experts(**inputs), lambda: explain(rank1_experts, **inputs)):
        with pytest.raises(error, match=f"^{name}[:=]"):
            call()


@pytest.mark.parametrize(("name", "wrong", "error", "message"), POOL)
def test_bad_arguments_of_a_gather(device, name, wrong, error, message):
    inputs = {k: v for k, v in good(device).items() if k in ("experts_A", "experts_B", "indices", "gates")}
    inputs[name] = wrong(inputs[name])
    refuses(lambda: gather_rank1_experts(**inputs), inputs.values(), error, message)
    with pytest.raises(error, match=f"^{name}:"):
        gather_rank1_experts(**inputs)


def mergeable(device):
    inputs = {k: v for k, v in good(device).items() if k in ("experts_A", "experts_B", "indices", "gates")}
    inputs["indices"], inputs["gates"] = inputs["indices"][0, 0], inputs["gates"][0, 0]
    return inputs | {"weight": torch.ones(29, 41, device=device), "scaling": 1.0}


MERGE = [
    ("weight", constant(None), TypeError, "got NoneType, expected a Tensor"),
    ("weight", shaped(29), ValueError, "got shape (29,), expected (N, K)"),
    ("experts_A", shaped(17, 40), ValueError, "got shape (17, 40), expected (E, 41)"),
    ("experts_B", shaped(17, 28), ValueError, "got shape (17, 28), expected (E, 29)"),
    ("indices", shaped(1, 5, dtype=torch.int64), ValueError, "got shape (1, 5), expected (k,): one choice for every"),
    ("gates", shaped(4), ValueError, "got shape (4,), expected (5,) = the shape of indices"),
    ("scaling", constant(None), TypeError, "got NoneType, expected a number"),
]


@pytest.mark.parametrize(("name", "wrong", "error", "message"), MERGE)
def test_bad_arguments_of_a_merge(device, name, wrong, error, message):
    inputs = mergeable(device)
    inputs[name] = wrong(inputs[name] if isinstance(inputs[name], torch.Tensor) else inputs["weight"])
    refuses(lambda: merge_rank1_experts(**inputs), inputs.values(), error, message)
    with pytest.raises(error, match=f"^{name}:"):
        merge_rank1_experts(**inputs)


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU indices are checked in checked mode alone")
@pytest.mark.parametrize("path", [*paths(), "reference", "auto"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("value", [-1, 17, 2**31 - 1, -(2**31)])
def test_an_index_outside_the_pool(device, monkeypatch, path, dtype, value):
    """Position and value, before anything is computed."""
    inputs = make_inputs(index_dtype=dtype, device=device)
    inputs["indices"][2, 4, 1] = value
    inputs["indices"][2, 6, 0] = -7
    fn = rank1_experts if path == "auto" else run(path, monkeypatch) if path != "reference" else _reference
    message = f"indices[2, 4, 1]: got {value}, expected 0 <= index < 17"
    refuses(lambda: fn(**inputs), inputs.values(), IndexError, message)
    pool = (inputs["experts_A"], inputs["experts_B"], inputs["indices"])
    with pytest.raises(IndexError, match=re.escape(message)):
        gather_rank1_experts(*pool)
    with pytest.raises(IndexError, match=re.escape(f"indices[1]: got {value}")):
        merge_rank1_experts(torch.ones(29, 41), *pool[:2], inputs["indices"][2, 4])
    with pytest.raises(IndexError, match=re.escape(message)):
        explain(rank1_experts, **inputs)


def _reference(**inputs):
    return rank1_experts(**inputs, backend="reference")


@pytest.mark.gpu
def test_checked_mode_raises_on_a_gpu_and_the_other_stays_inside(device, monkeypatch):
    inputs = make_inputs(device=device)
    inputs["indices"][2, 4, 1], inputs["indices"][0, 0, 0] = 17, -1
    bounded = rank1_experts(**{**inputs, "indices": inputs["indices"].clamp(0, 16)})
    assert torch.equal(rank1_experts(**inputs), bounded)
    monkeypatch.setenv("CLORA_CHECK_INDICES", "1")
    with pytest.raises(IndexError, match=re.escape("indices[0, 0, 0]: got -1, expected 0 <= index < 17")):
        rank1_experts(**inputs)


def test_a_backend_that_cannot_run_says_why(device, monkeypatch):
    inputs = make_inputs(device=device)
    doubles = make_inputs(experts_dtype=torch.float64, device=device)
    with pytest.raises(ValueError, match=r"backend='triton' cannot run rank1_experts: .*fp64.*use 'auto'"):
        rank1_experts(**doubles, backend="triton")
    monkeypatch.setattr(extension, "_kernels", frozenset())
    with pytest.raises(ValueError, match="backend='native' cannot run rank1_experts: the compiled part"):
        rank1_experts(**inputs, backend="native")


@pytest.mark.skipif("native" not in paths(), reason="nothing is compiled for this device")
def test_compiled_operators_say_which_dtypes_they_lack(device):
    inputs = make_inputs(dtype=torch.float64, experts_dtype=torch.float32, device=device)
    with pytest.raises(ValueError, match=r"not built for x in torch.float64 with experts in torch.float32"):
        rank1_experts(**inputs, backend="native")


@pytest.mark.parametrize("compiled", [True, False])
def test_explain_says_what_then_runs(device, monkeypatch, compiled):
    """By the whole pool where it is small beside what is chosen, there are rows enough and nothing faster is there."""
    if not compiled:
        monkeypatch.setattr(extension, "_kernels", frozenset())
    native = "native" in paths()  # as it is with what is compiled, or is not
    for options in ({"E": 400}, {"E": 5, "lead": (300,)}, {"E": 5, "lead": (63,)}, {"E": 400, "per_sample": True}):
        inputs = make_inputs(**options, device=device)
        chosen = {}
        for backend in ("auto", "aten", "reference"):
            choice = explain(rank1_experts, **inputs, backend=backend)
            assert choice.backend in str(choice) and choice.strategy in str(choice) and choice.reason
            with dispatched() as ran:
                rank1_experts(**inputs, backend=backend)
            used = {name.split(".")[1] for name in ran}
            dense = choice.strategy.startswith("matmuls over the whole pool")
            assert used == ({"dense"} if dense else set() if choice.backend == "reference" else {choice.backend})
            chosen[backend] = "dense" if dense else choice.backend
        small = options["E"] == 5 and options["lead"] == (300,)
        assert chosen["aten"] == ("dense" if small else "aten")
        by_itself = small and (device.type == "cuda" or not native)
        assert chosen["auto"] == ("dense" if by_itself else "native" if native else "aten")
