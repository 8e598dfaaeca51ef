"""Bad input to Gram-Schmidt: every argument, every way. The error names the argument, what came, what was expected."""

from __future__ import annotations

import re

import pytest
import torch
from orthonormal import backends

from clora_kernels import explain, gram_schmidt, gram_schmidt_foreach, orthonormal_basis
from clora_kernels.reference.gram_schmidt_samples import make_inputs
from clora_kernels.testing import unchanged

D, R, K = 30, 6, 4
META = torch.empty(2, D, R, device="meta")


def shaped(*shape, dtype=torch.float32):
    return lambda t: torch.ones(shape, dtype=dtype, device=t.device)


def constant(value):
    return lambda t: value


CASES = [
    # argument, what is wrong with it, error, what the message tells beside the argument's name
    ("V", constant(None), TypeError, "got NoneType, expected a Tensor"),
    ("V", constant([[1.0]]), TypeError, "got list, expected a Tensor"),
    ("V", shaped(2, D, R, dtype=torch.int64), TypeError, "got dtype torch.int64, expected one of torch.float32"),
    ("V", shaped(2, D, R, dtype=torch.complex64), TypeError, "got dtype torch.complex64"),
    ("V", shaped(), ValueError, r"got shape \(\), expected \[\.\.\., d, r\] = at least 2 dimensions"),
    ("V", shaped(D), ValueError, r"got shape \(30,\), expected \[\.\.\., d, r\]"),
    ("against", constant(1.0), TypeError, "got float, expected a Tensor"),
    ("against", shaped(2, D, K, dtype=torch.bool), TypeError, "got dtype torch.bool"),
    ("against", shaped(D), ValueError, r"got shape \(30,\), expected \[\.\.\., 30, k\], the d of V"),
    ("against", shaped(2, D + 1, K), ValueError, r"got shape \(2, 31, 4\), expected \[\.\.\., 30, k\]"),
    ("against", shaped(2, D, D + 1), ValueError, "got 31 columns of length 30, expected at most 30: more are no basis"),
    ("against", shaped(3, D, K), ValueError, r"got leading dimensions \(3,\), expected ones that broadcast to \(2,\)"),
    ("against", shaped(1, 2, D, K), ValueError, r"got leading dimensions \(1, 2\), expected ones that broadcast to"),
    ("against", lambda t: t.to("meta"), ValueError, "got device meta, expected .*, the device of V"),
    ("rank_tol", constant("1e-3"), TypeError, "got str, expected a number or None"),
    ("rank_tol", constant(True), TypeError, "got bool, expected a number or None"),
    ("rank_tol", constant(1j), TypeError, "got complex"),
    ("rank_tol", lambda t: torch.tensor(1e-3), TypeError, "got Tensor"),
    ("rank_tol", constant(0.0), ValueError, "got 0.0, expected 1.19e-07 <= rank_tol < 1"),
    ("rank_tol", constant(-1e-3), ValueError, "got -0.001, expected"),
    ("rank_tol", constant(1), ValueError, "got 1, expected"),
    ("rank_tol", constant(float("nan")), ValueError, "got nan, expected"),
    ("rank_tol", constant(float("inf")), ValueError, "got inf, expected"),
    ("backend", constant("cuda"), ValueError, "got 'cuda', expected one of 'auto', 'reference'"),
    ("backend", constant(None), ValueError, "got None, expected one of"),
    ("backend", constant(["aten"]), ValueError, "got"),
]
OF_DEFICIENT = [
    (constant("drop"), "got 'drop', expected one of 'zero', 'random', 'raise'"),
    (constant(None), "got None, expected one of"),
    (constant(0), "got 0, expected one of"),
]


def good(device):
    return make_inputs((2,), D, R, k=K, device=device) | {"rank_tol": 1e-3, "backend": "auto"}


def raises_and_changes_nothing(call, tensors, error, message):
    with unchanged(*[t for t in tensors if isinstance(t, torch.Tensor) and t.device.type != "meta"]):
        with pytest.raises(error, match=message):
            call()


@pytest.mark.parametrize("function", [gram_schmidt, orthonormal_basis])
@pytest.mark.parametrize(("name", "wrong", "error", "message"), CASES)
def test_bad_arguments(device, function, name, wrong, error, message):
    inputs = good(device)
    inputs[name] = wrong(inputs[name] if isinstance(inputs[name], torch.Tensor) else inputs["V"])
    raises_and_changes_nothing(lambda: function(**inputs), inputs.values(), error, f"{name}(: |=).*{message}|{message}")
    with pytest.raises(error, match=name):
        function(**inputs)


@pytest.mark.parametrize("name", ["V", "against"])
def test_layouts_that_are_not_strided_are_named(device, name):
    inputs = make_inputs((2,), D, R, k=K, device=device)
    wrong = {**inputs, name: inputs[name].to_sparse()}
    for function in (gram_schmidt, orthonormal_basis):
        with pytest.raises(TypeError, match=f"^{name}: got layout torch.sparse_coo, expected torch.strided$"):
            function(**wrong)
    place = "matrices[1]" if name == "V" else "against[1]"
    with pytest.raises(TypeError, match=rf"^{re.escape(place)}: got layout torch.sparse_coo, expected torch.strided$"):
        gram_schmidt_foreach([inputs["V"], wrong["V"]], [None, wrong["against"]])


@pytest.mark.parametrize(("wrong", "message"), OF_DEFICIENT)
def test_bad_deficient(device, wrong, message):
    inputs = good(device) | {"deficient": wrong(None)}
    raises_and_changes_nothing(lambda: gram_schmidt(**inputs), inputs.values(), ValueError, f"deficient: {message}")
    with pytest.raises(ValueError, match=f"deficient: {message}"):
        gram_schmidt_foreach([inputs["V"]], deficient=inputs["deficient"])
    with pytest.raises(ValueError, match=f"deficient: {message}"):
        gram_schmidt_foreach([], deficient=inputs["deficient"])


def test_what_cannot_be_completed(device):
    inputs = make_inputs((2,), 9, 6, k=4, device=device)
    assert gram_schmidt(**inputs).rank.tolist() == [5, 5]
    message = "deficient: got 'random' for 6 columns of length 9 beside the 4 of against, expected at most 5"
    for backend in [*backends(), "reference"]:
        with pytest.raises(ValueError, match=message):
            gram_schmidt(**inputs, deficient="random", backend=backend)
    with pytest.raises(ValueError, match="deficient: got 'random' for 10 columns of length 9, expected at most 9"):
        gram_schmidt(torch.ones(9, 10, device=device), deficient="random")
    assert gram_schmidt(torch.ones(0, 9, 10, device=device), deficient="random").Q.shape == (0, 9, 10)


def test_bad_lists(device):
    V, P = (good(device)[k] for k in ("V", "against"))
    for call, error, message in [
        (lambda: gram_schmidt_foreach(V), TypeError, "matrices: got Tensor, expected a sequence of tensors"),
        (lambda: gram_schmidt_foreach("VV"), TypeError, "matrices: got str"),
        (lambda: gram_schmidt_foreach([V, None]), TypeError, r"matrices\[1\]: got NoneType, expected a Tensor"),
        (lambda: gram_schmidt_foreach([V, V[0, 0]]), ValueError, r"matrices\[1\]: got shape \(6,\)"),
        (lambda: gram_schmidt_foreach([V, V.half()]), TypeError, r"matrices\[1\]: got dtype torch.float16, expected"),
        (lambda: gram_schmidt_foreach([V, META]), ValueError, r"matrices\[1\]: got device meta, expected"),
        (
            lambda: gram_schmidt_foreach([V], P),
            TypeError,
            "against: got Tensor, expected a sequence of tensors",
        ),
        (lambda: gram_schmidt_foreach([V, V], [P]), ValueError, "against: got 1 for 2 matrices, expected one, or None"),
        (
            lambda: gram_schmidt_foreach([V, V], [P, P[:, 1:]]),
            ValueError,
            r"against\[1\]: .* the d of matrices\[1\]",
        ),
        (lambda: gram_schmidt_foreach([V], [1]), TypeError, r"against\[0\]: got int, expected a Tensor"),
        (lambda: gram_schmidt_foreach([V], rank_tol=2), ValueError, "rank_tol: got 2, expected"),
        (lambda: gram_schmidt_foreach([V], backend="gpu"), ValueError, "backend: got 'gpu', expected"),
        (lambda: gram_schmidt_foreach([], backend="gpu"), ValueError, "backend: got 'gpu', expected"),
    ]:
        raises_and_changes_nothing(call, (V, P), error, message)


def test_bad_trim(device):
    V = good(device)["V"]
    with pytest.raises(TypeError, match="trim: got int, expected True or False"):
        orthonormal_basis(V[0], trim=1)
    with pytest.raises(ValueError, match=r"trim: got True for V of shape \(2, 30, 6\), expected one matrix \[d, r\]"):
        orthonormal_basis(V, trim=True)


def test_a_backend_that_cannot_run_says_why(device):
    V = good(device)["V"]
    with pytest.raises(ValueError, match=r"backend='native' cannot run gram_schmidt: .*float64"):
        gram_schmidt(V.double(), backend="native")
    with pytest.raises(ValueError, match=r"backend='native' cannot run gram_schmidt: .*float64"):
        explain(orthonormal_basis, V.double(), backend="native")


def test_explain_checks_and_runs_nothing(device):
    V, P = (good(device)[k] for k in ("V", "against"))
    with pytest.raises(TypeError, match="V: got NoneType"):
        explain(gram_schmidt, None)
    with pytest.raises(ValueError, match="backend: got 'gpu'"):
        explain(gram_schmidt_foreach, [V, V], [P, P], backend="gpu")
    for wrong, name in (
        ({"rank_tol": 5}, "rank_tol"), ({"deficient": "bogus"}, "deficient"), ({"against": V[..., :3, :]}, "against"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"^{name}: got"):
            explain(gram_schmidt, V, **wrong)
    with pytest.raises(TypeError, match="trim: got int"):
        explain(orthonormal_basis, V, trim=1)
    with pytest.raises(ValueError, match="against: got 1 for 2 matrices"):
        explain(gram_schmidt_foreach, [V, V], [P])
    assert explain(gram_schmidt, V, P, backend="reference").backend == "reference"
    assert "named by the caller" in str(explain(orthonormal_basis, V, backend="aten"))
    assert explain(gram_schmidt, V).backend == backends()[-1]
    assert explain(gram_schmidt, V.double()).backend == "aten"
    assert "empty" in explain(gram_schmidt_foreach, []).reason
    with torch.no_grad():
        assert explain(gram_schmidt_foreach, [V], [P]).backend == backends()[-1]
