"""Gram-Schmidt under gradcheck, torch.func, opcheck, double backward, checkpointing; which gradients cost what."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from orthonormal import TYPES, backends, evaluate, gradients_for
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from clora_kernels import gram_schmidt, gram_schmidt_foreach, orthonormal_basis
from clora_kernels.reference.gram_schmidt_samples import make_inputs, sample_inputs
from clora_kernels.testing import saved_tensors

OPS = torch.ops.clora_kernels
SMALL = {"lead": (2,), "d": 9, "r": 4, "dtype": torch.float64}
# Exactly dependent columns leave their set at the least disturbance; these are dependent by a margin on either side.
DEPENDENT = {"dependent": (1, 3), "noise": 1e-3, "rank_tol": 1e-2}
KINDS = {"full": {}, "dependent": DEPENDENT}


def outputs(result):
    return result.Q, result.R


@pytest.mark.parametrize("backend", [*backends(torch.float64), "reference"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(device, kind, backend):
    inputs = make_inputs(**SMALL, **KINDS[kind], device=device)
    V = inputs.pop("V").requires_grad_()
    assert gram_schmidt(V, **inputs).rank.tolist() == ([4, 4] if kind == "full" else [2, 2])
    assert torch.autograd.gradcheck(lambda V: outputs(gram_schmidt(V, **inputs, backend=backend)), V)


@pytest.mark.parametrize("backend", [*backends(torch.float64), "reference"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck_beside_a_basis(device, kind, backend):
    """Through P = qr(Z).Q, for a gradient of P means something along orthonormal matrices alone."""
    inputs = make_inputs(**SMALL, **KINDS[kind], k=3, device=device)
    V, Z = inputs.pop("V").requires_grad_(), inputs.pop("against").mul(1.5).requires_grad_()

    def run(V, Z):
        return outputs(gram_schmidt(V, torch.linalg.qr(Z).Q, **inputs, backend=backend))

    assert torch.autograd.gradcheck(run, (V, Z))


@pytest.mark.parametrize("backend", backends(torch.float64))
def test_gradcheck_of_a_basis_that_serves_all(device, backend):
    inputs = make_inputs((2, 2), 7, 3, k=2, against_lead=(2, 1), dtype=torch.float64, device=device)
    V, Z = inputs["V"].requires_grad_(), inputs["against"].mul(1.5).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda V, Z: outputs(gram_schmidt(V, torch.linalg.qr(Z).Q, backend=backend)), (V, Z)
    )


@pytest.mark.parametrize("backend", [*backends(torch.float64), "reference"])
def test_gradcheck_of_a_completed_and_of_a_compacted_basis(device, backend):
    inputs = make_inputs(**SMALL, **DEPENDENT, device=device)
    V = inputs.pop("V").requires_grad_()
    completed = partial(gram_schmidt, **inputs, backend=backend, deficient="random")
    kept = gram_schmidt(V, **inputs).R.diagonal(dim1=-2, dim2=-1) > 0

    def of_independent(V):
        result = completed(V)
        return result.Q * kept[..., None, :], result.R

    assert torch.autograd.gradcheck(of_independent, V)
    (dV,) = torch.autograd.grad(completed(V).Q, V, torch.randn_like(V) * ~kept[..., None, :])
    assert not dV.any(), "no gradient flows through what is drawn"
    assert torch.autograd.gradcheck(lambda V: orthonormal_basis(V, **inputs, backend=backend).Q, V)


@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_differentiates_twice(device, kind):
    inputs = make_inputs(
        (), 6, 3, k=2, dtype=torch.float64, device=device, **({} if kind == "full" else DEPENDENT | {"dependent": (1,)})
    )
    V, Z = inputs.pop("V").requires_grad_(), inputs.pop("against").mul(1.5).requires_grad_()
    assert torch.autograd.gradgradcheck(
        lambda V, Z: outputs(gram_schmidt(V, torch.linalg.qr(Z).Q, **inputs, backend="reference")), (V, Z)
    )


@pytest.mark.parametrize("backend", backends())
def test_double_backward_says_what_to_do(device, backend):
    V = make_inputs(device=device)["V"].requires_grad_()
    (dV,) = torch.autograd.grad(gram_schmidt(V, backend=backend).Q.sum(), V, create_graph=True)
    with pytest.raises(RuntimeError, match=r"double backward is not supported .* backend='reference'"):
        torch.autograd.grad(dV.sum(), V)
    Q, R, _ = OPS.gram_schmidt([V], [], [False], None, "zero", backend)
    (dV,) = torch.autograd.grad(Q.sum() + R.sum(), V, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        torch.autograd.grad(dV.sum(), V)


@pytest.mark.parametrize("backend", backends())
def test_func_transforms(device, backend):
    inputs = make_inputs(k=3, device=device)
    dQ, dR = gradients_for(inputs)
    _, expected = evaluate(inputs, dQ, dR, backend=backend)

    def loss(V, against):
        Q, R, _ = gram_schmidt(V, against, backend=backend)
        return (Q * dQ).sum() + (R * dR).sum()

    grads = torch.func.grad(loss, argnums=(0, 1))(*inputs.values())
    assert all(torch.equal(g, e) for g, e in zip(grads, expected.values(), strict=True))
    _, pull = torch.func.vjp(lambda V, P: outputs(gram_schmidt(V, P, backend=backend)), *inputs.values())
    assert all(torch.equal(g, e) for g, e in zip(pull((dQ, dR)), expected.values(), strict=True))
    with pytest.raises(RuntimeError, match=r"gram_schmidt: torch\.func\.vmap"):
        torch.func.vmap(partial(gram_schmidt, backend=backend))(inputs["V"])
    with pytest.raises(RuntimeError, match=r"gram_schmidt: forward mode .*backend='reference'"):
        torch.func.jvp(lambda V: gram_schmidt(V, backend=backend).Q, (inputs["V"],), (inputs["V"],))


@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize("name", ["V", "against"])
@pytest.mark.parametrize("compiled", [False, True])
def test_forward_mode_raises_whatever_carries_the_tangent(device, backend, name, compiled):
    """Where nothing learns, and in a compiled graph, the tangent would be lost without a word."""
    inputs = make_inputs(k=3, device=device)

    def run(t, backend=backend):
        return orthonormal_basis(**{**inputs, name: t}, backend=backend).Q

    torch._dynamo.reset()
    fn = torch.compile(run, backend="aot_eager") if compiled else run
    with forward_ad.dual_level():
        assert fn(inputs[name]).shape == inputs["V"].shape, "a level without a tangent changes nothing"
        dual = forward_ad.make_dual(inputs[name], torch.ones_like(inputs[name]))
        with pytest.raises(RuntimeError, match=r"gram_schmidt: forward mode .*backend='reference'"):
            fn(dual)
        assert forward_ad.unpack_dual(run(dual, "reference")).tangent is not None


def test_the_reference_goes_through_every_transform(device):
    V = make_inputs(device=device, dtype=torch.float64)["V"]
    mapped = torch.func.vmap(lambda V: gram_schmidt(V, backend="reference").Q)(V)
    torch.testing.assert_close(mapped, gram_schmidt(V, backend="reference").Q)


@pytest.mark.parametrize("backend", [*backends(), "reference"])
@pytest.mark.filterwarnings("ignore")
def test_a_trace_fails_and_gives_nothing_wrong(device, backend):
    """As the README says: torch.jit knows neither lists of bools nor a view as another dtype."""
    with pytest.raises(RuntimeError, match=r"list of bool|aten::view"):
        torch.jit.trace(lambda V: gram_schmidt(V, backend=backend).Q, make_inputs(device=device)["V"])


@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize("name", [name for name, _ in sample_inputs()])
def test_opcheck(device, name, backend):
    inputs = dict(sample_inputs(device=device))[name]
    V, against = inputs["V"].requires_grad_(), [t.requires_grad_() for k, t in inputs.items() if k == "against"]
    for deficient in ("zero", "random"):
        arguments = ([V], against, [bool(against)], inputs.get("rank_tol"), deficient, backend)
        if deficient == "zero" or V.shape[-1] + sum(P.shape[-1] for P in against) <= V.shape[-2]:
            torch.library.opcheck(OPS.gram_schmidt, arguments)
    V, against = V.detach(), [P.detach() for P in against]
    Q, R, _ = OPS.gram_schmidt([V], against, [bool(against)], inputs.get("rank_tol"), "zero", backend)
    dQ, dR = gradients_for(inputs)
    for need_V in (True, False):
        needs = [need_V, *[True] * len(against)]
        torch.library.opcheck(
            OPS.gram_schmidt_backward, ([dQ], [dR], [V], against, [bool(against)], [Q], [R], needs, backend)
        )


@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_opcheck_in_16_bit(device, dtype, backend):
    inputs = make_inputs(k=3, dtype=TYPES[dtype], device=device)
    V, P = (t.requires_grad_() for t in inputs.values())
    torch.library.opcheck(OPS.gram_schmidt, ([V], [P], [True], None, "zero", backend))
    Q, R, _ = OPS.gram_schmidt([V.detach()], [P.detach()], [True], None, "zero", backend)
    dQ, dR = gradients_for(inputs)
    arguments = ([dQ], [dR], [V.detach()], [P.detach()], [True], [Q], [R], [True, True], backend)
    torch.library.opcheck(OPS.gram_schmidt_backward, arguments)


@pytest.mark.parametrize("backend", backends())
def test_opcheck_of_a_list(device, backend):
    samples = [make_inputs((2,), 11, 4, k=3, seed=1), make_inputs((), 20, 7, seed=2), make_inputs((1,), 11, 4, k=3)]
    Vs = [s["V"].to(device).requires_grad_() for s in samples]
    bases = [s["against"].to(device).requires_grad_() for s in samples if "against" in s]
    torch.library.opcheck(OPS.gram_schmidt, (Vs, bases, [True, False, True], None, "zero", backend))


@pytest.mark.parametrize("backend", backends())
def test_every_subset_of_needs(device, backend):
    inputs = make_inputs(k=3, device=device, **DEPENDENT)
    dQ, dR = gradients_for(inputs)
    _, expected = evaluate(inputs, dQ, dR, backend=backend)
    for names in (["V"], ["against"]):
        leaves = {k: v.detach().requires_grad_(k in names) if k != "rank_tol" else v for k, v in inputs.items()}
        result = gram_schmidt(**leaves, backend=backend)
        assert not result.rank.requires_grad
        for g, name in zip(
            torch.autograd.grad([result.Q, result.R], [leaves[k] for k in names], [dQ, dR]), names, strict=True
        ):
            assert torch.equal(g, expected[name])
    with saved_tensors() as saved:
        result = gram_schmidt(**inputs, backend=backend)
    assert not saved.tensors and not result.Q.requires_grad


@pytest.mark.parametrize("backend", backends())
def test_one_output_alone(device, backend):
    """What nothing used counts as a zero gradient."""
    inputs = make_inputs(k=3, device=device, **DEPENDENT)
    dQ, dR = gradients_for(inputs)
    for chosen in ((dQ, None), (None, dR)):
        _, grads = evaluate(inputs, *chosen, backend=backend)
        zeros = [torch.zeros_like(t) if g is None else t for t, g in zip((dQ, dR), chosen, strict=True)]
        _, expected = evaluate(inputs, *zeros, backend=backend)
        assert all(torch.equal(grads[k], expected[k]) for k in grads)
    V = inputs["V"].detach().requires_grad_()
    gram_schmidt(V, backend=backend).R.sum().backward()  # a gradient of stride 0
    (expected,) = torch.autograd.grad(gram_schmidt(V, backend=backend).R, V, torch.ones_like(dR))
    assert torch.equal(V.grad, expected)


@pytest.mark.parametrize("backend", backends())
def test_saved_is_the_least_and_unchanged(device, backend):
    """V and the basis, which are inputs, Q and R, which are outputs; used twice, backward gives the same."""
    inputs = {k: v.requires_grad_() for k, v in make_inputs(k=3, device=device).items()}
    with saved_tensors() as saved:
        result = gram_schmidt(**inputs, backend=backend)
    assert sorted(saved.numel) == sorted(t.numel() for t in (*inputs.values(), result.Q, result.R))
    assert all(saved.holds(t) for t in (*inputs.values(), result.Q, result.R))
    dQ, dR = gradients_for(inputs)
    leaves = list(inputs.values())
    first = torch.autograd.grad([result.Q, result.R], leaves, [dQ, dR], retain_graph=True)
    again = torch.autograd.grad([result.Q, result.R], leaves, [dQ, dR])
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("backend", backends())
def test_activation_checkpointing(device, backend):
    V = make_inputs(device=device)["V"].requires_grad_()

    def run(V):
        return gram_schmidt(V * 2, deficient="random", backend=backend).Q.square().sin().sum()

    (expected,) = torch.autograd.grad(run(V), V)
    (got,) = torch.autograd.grad(checkpoint(run, V, use_reentrant=False), V)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("dtype", TYPES)
def test_the_operator_alone_is_differentiable(device, dtype):
    for backend in backends(TYPES[dtype]):
        inputs = make_inputs(k=3, dtype=TYPES[dtype], device=device)
        dQ, dR = gradients_for(inputs)
        _, expected = evaluate(inputs, dQ, dR, backend=backend)
        V, P = (t.detach().requires_grad_() for t in inputs.values())
        Q, R, rank = OPS.gram_schmidt([V], [P], [True], None, "zero", backend)
        grads = torch.autograd.grad([Q, R], [V, P], [dQ, dR])
        assert all(torch.equal(g, e) for g, e in zip(grads, expected.values(), strict=True)) and not rank.requires_grad
        Q, R, _ = OPS.gram_schmidt([V.detach()], [P], [True], None, "zero", backend)
        (of_basis,) = torch.autograd.grad([Q, R], P, [dQ, dR])
        assert torch.equal(of_basis, expected["against"])


@pytest.mark.parametrize("backend", backends())
def test_a_list_differentiates_as_its_matrices(device, backend):
    samples = [make_inputs((2,), 30, 4, k=3, seed=1), make_inputs((), 20, 7, seed=2), make_inputs((1,), 30, 4, k=3)]
    Vs = [s["V"].to(device).requires_grad_() for s in samples]
    bases = [s["against"].to(device).requires_grad_() if "against" in s else None for s in samples]
    results = gram_schmidt_foreach(Vs, bases, backend=backend)
    leaves = [*Vs, *(P for P in bases if P is not None)]
    # the second R and the last Q count nothing
    loss = results[0].Q.square().sin().sum() + results[0].R.sum() + results[1].Q.sin().sum() + results[2].R.sin().sum()
    grads = torch.autograd.grad(loss, leaves)
    single = [gram_schmidt(V, P, backend=backend) for V, P in zip(Vs, bases, strict=True)]
    loss = single[0].Q.square().sin().sum() + single[0].R.sum() + single[1].Q.sin().sum() + single[2].R.sin().sum()
    for g, e in zip(grads, torch.autograd.grad(loss, leaves), strict=True):
        torch.testing.assert_close(g, e, rtol=1e-5, atol=1e-6)
