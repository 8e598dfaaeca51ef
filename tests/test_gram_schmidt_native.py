"""The compiled operators of Gram-Schmidt: sizes around their blocks, threads, lists, errors, what runs without them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from orthonormal import TYPES, assert_gradients, evaluate, gradients_for
from strategies import LAYOUTS, laid_out

from clora_kernels import explain, extension, gram_schmidt, gram_schmidt_foreach, info
from clora_kernels.reference.gram_schmidt import tolerance
from clora_kernels.reference.gram_schmidt_samples import make_inputs
from clora_kernels.testing import assert_orthonormal, guarded, hard_matrices, poisoned_empty, unchanged

pytestmark = pytest.mark.skipif(
    not extension.has_op("gram_schmidt_sweeps", "cpu"), reason=f"not compiled: {extension.status()[0].detail}"
)

OPS = torch.ops.clora_kernels
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
# Around what blocks are made of: 8 rows of a vector, 64 to 512 rows of a panel, 1024 and 2048 of a sum.
ROWS = [1, 2, 7, 8, 9, 16, 17, 63, 65, 127, 128, 129, 255, 257, 513, 1025, 2047, 2049, 4097]
# Around panels by columns (up to 16) and by rows, and around tiles of 4, 8 and 16 columns.
RANKS = [1, 2, 3, 4, 5, 7, 8, 9, 12, 15, 16, 17, 20, 24, 25, 32, 33, 40]


@st.composite
def problems(draw: st.DrawFn):
    d = draw(st.sampled_from(ROWS))
    r = draw(st.sampled_from([r for r in RANKS if r <= max(d // 2, 1)]))
    k = draw(st.sampled_from([k for k in (0, 0, 1, 4, 9, 16, 17, 36) if k + r < d] or [0]))
    dtype, layout = draw(st.sampled_from(FLOATS)), draw(st.sampled_from([*LAYOUTS[:-1], "mT"]))
    dependent = draw(st.sampled_from([(), (), (r // 2,), (0, r - 1)])) if r > 1 and (k or r > 2) else ()
    inputs = make_inputs(
        (draw(st.integers(1, 3)),), d, r, k=k, dtype=dtype, dependent=dependent, seed=draw(st.integers(0, 2**20)),
        noise=1e-3, rank_tol=3e-2,
    )  # fmt: skip
    for name in ("V", "against"):
        if name in inputs:
            t = inputs[name]
            inputs[name] = t.mT.contiguous().mT if layout == "mT" else laid_out(t, layout)
    return inputs, draw(st.sampled_from([*LAYOUTS]))


@settings(max_examples=80)
@given(problems())
def test_every_size(problem):
    inputs, layout = problem
    V, P = inputs["V"], inputs.get("against")
    dQ, dR = gradients_for(inputs, layout)
    with unchanged(*(t for t in (V, P, dQ, dR) if t is not None)), poisoned_empty():
        result, grads = evaluate(inputs, dQ, dR, backend="native")
    assert_orthonormal(result, V, P, rank_tol=3e-2)
    plain = gram_schmidt(**inputs, backend="aten")
    assert torch.equal(result.rank, plain.rank)
    kept = plain.R.diagonal(dim1=-2, dim2=-1)
    if (kept > 0.1 * kept.amax(-1, keepdim=True))[plain.R.diagonal(dim1=-2, dim2=-1) > 0].all():
        assert_gradients(grads, inputs, dQ.contiguous(), dR.contiguous())


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("shape", [(1, 8, 5), (1, 5000, 12), (1, 4500, 33), (7, 200, 5), (3, 2100, 40)])
def test_bits_do_not_depend_on_threads(all_threads, shape, dtype):
    B, d, r = shape
    inputs = make_inputs((B,), d, r, k=3, dtype=TYPES[dtype], dependent=(1,), noise=1e-3, rank_tol=1e-1)
    dQ, dR = gradients_for(inputs)
    found = []
    for threads in (1, max(all_threads, 2), 3):
        torch.set_num_threads(threads)
        result, grads = evaluate(inputs, dQ, dR, backend="native")
        found.append([*result, *grads.values()])
    torch.set_num_threads(all_threads)
    for others in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], others, strict=True))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_list_has_the_bits_of_its_matrices(dtype):
    """Hard and easy matrices of many shapes in one call, some beside a basis."""
    samples = [make_inputs((B,), d, r, k=k, dtype=TYPES[dtype], seed=d) for B, d, r, k in
               [(2, 300, 7, 0), (1, 41, 20, 5), (5, 64, 4, 3), (0, 9, 3, 0), (1, 3000, 16, 2)]]  # fmt: skip
    Vs = [s["V"] for s in samples] + [m.V for m in hard_matrices(67, 12, dtype=TYPES[dtype])]
    bases = [s.get("against") for s in samples] + [None] * (len(Vs) - len(samples))
    for V, P, result in zip(Vs, bases, gram_schmidt_foreach(Vs, bases, backend="native"), strict=True):
        alone = gram_schmidt(V, P, backend="native")
        assert all(torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) for a, b in zip(result, alone, strict=True))


def test_two_sweeps_are_as_good_as_one():
    """Matrices of condition 100 and more take a second sweep or deflation; at every size it is orthonormal."""
    for d, r in [(64, 8), (300, 24), (4097, 16), (2050, 65), (768, 256)]:
        for power in (1, 2, 3, 5):
            Q, R = (torch.linalg.qr(torch.randn(n, r, dtype=torch.float64)).Q for n in (d, r))
            V = (Q * 10 ** (-power * torch.linspace(0, 1, r)) @ R).float()
            assert_orthonormal(gram_schmidt(V, backend="native"), V)


@pytest.mark.parametrize("offset", [0, 1, 3])
@pytest.mark.parametrize(("r", "k"), [(11, 5), (16, 8), (24, 8)])
def test_nothing_is_written_outside(offset, r, k):
    """In panels, and where matrices of a multiple of 8 columns lie."""
    inputs = make_inputs((2,), 77, r, k=k, dependent=(3,), noise=1e-3, rank_tol=1e-1)
    dQ, dR = gradients_for(inputs)
    expected, expected_grads = evaluate(inputs, dQ, dR, backend="native")
    with guarded(inputs["V"], offset) as V, guarded(inputs["against"], offset) as P, guarded(dQ, offset) as odd:
        result, grads = evaluate({"V": V, "against": P, "rank_tol": 1e-1}, odd, dR, backend="native")
    assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))
    assert all(torch.equal(grads[k], expected_grads[k]) for k in grads)


def test_operators_have_fakes():
    inputs = make_inputs((2,), 33, 6, k=4)
    V, P = inputs.values()
    torch.library.opcheck(OPS.gram_schmidt_sweeps, ([V, V[:, :9]], [P, V[:, :9, :0]], 1e-5))
    Q, R = OPS.gram_schmidt_sweeps([V], [P], 1e-5)[:2]
    for needs in ((True, True), (False, True), (True, False)):
        torch.library.opcheck(OPS.gram_schmidt_gradients, ([Q], [R], [V], [P], [Q], [R], *needs))


V, P, R = torch.randn(2, 9, 4), torch.randn(2, 9, 3), torch.randn(2, 4, 4)
BAD_SWEEPS = [
    (([V[0]], [P], 1e-5), "V must have 3 dimensions, got 2"),
    (([V], [P[0]], 1e-5), "P must have 3 dimensions, got 2"),
    (([V], [P, P], 1e-5), "P must be an empty list or one of 1, got 2"),
    (([V], [P[:1]], 1e-5), "P must be 2 matrices of 9 rows, as V, got 1 of 9"),
    (([V], [P[:, :5]], 1e-5), "P must be 2 matrices of 9 rows, as V, got 2 of 5"),
    (([V.double()], [P], 1e-5), "V must be fp32, bf16 or fp16"),
    (([V], [P.int()], 1e-5), "P must be fp32, bf16 or fp16"),
]
BAD_GRADIENTS = [
    ({"dQ": []}, "dQ must be a list of 1, got 0"),
    ({"dQ": [V[0]]}, "dQ must have 3 dimensions and be on the CPU"),
    ({"dQ": [V[:1]]}, "dQ must have the batch of V, 2, got 1"),
    ({"dQ": [V[:, :, :3]]}, "dQ must have the size of V, 9 by 4, got 9 by 3"),
    ({"Q": [V[:, :8]]}, "Q must have the size of V, 9 by 4, got 8 by 4"),
    ({"P": [P, P]}, "P must be a list of 1, got 2"),
    ({"P": [P[:, :8]]}, "P must have the size of V, 9 by 4, got 8 by 3"),
    ({"dR": [R[:, :3]]}, "dR must be 4 square, got 3 by 4"),
    ({"R": [R.bfloat16()]}, "R must be fp32 and contiguous"),
    ({"R": [R.mT]}, "R must be fp32 and contiguous"),
    ({"V": [V.double()]}, "V must be fp32, bf16 or fp16"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_SWEEPS)
def test_bad_arguments_of_sweeps(arguments, message):
    with pytest.raises(RuntimeError, match=message):
        OPS.gram_schmidt_sweeps(*arguments)


@pytest.mark.parametrize(("wrong", "message"), BAD_GRADIENTS)
def test_bad_arguments_of_gradients(wrong, message):
    right = {"dQ": [V], "dR": [R], "V": [V], "P": [P], "Q": [V], "R": [R]}
    with pytest.raises(RuntimeError, match=message):
        OPS.gram_schmidt_gradients(*(right | wrong).values(), True, True)


def test_info_and_explain_tell(monkeypatch):
    def native():
        return next(b for b in info().backends["gram_schmidt"] if b.name == "native")

    x = torch.randn(9, 4)
    assert native().available and explain(gram_schmidt, x).backend == "native"
    assert "float64" in extension_reason(x.double()) and explain(gram_schmidt, x.double()).backend == "aten"
    monkeypatch.setattr(extension, "has_op", lambda name, device_type: False)
    assert not native().available and explain(gram_schmidt, x).backend == "aten"
    assert "compiled part" in extension_reason(x)
    assert_orthonormal(gram_schmidt(x), x, ranks=[4])


def extension_reason(x):
    with pytest.raises(ValueError, match="backend='native' cannot run gram_schmidt") as caught:
        explain(gram_schmidt, x, backend="native")
    return str(caught.value)


def test_the_tolerance_reaches_the_operators():
    x = torch.tensor([[1.0, 1.0], [0.0, 1e-4]])
    assert gram_schmidt(x).rank == 2 and gram_schmidt(x, rank_tol=1e-3).rank == 1
    for none in ([], [x[None, :, :0]]):
        assert OPS.gram_schmidt_sweeps([x[None]], none, tolerance(None, torch.float32))[2].tolist() == [2]
