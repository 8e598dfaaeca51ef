"""What the tests of Gram-Schmidt share: backends, gradients for Q and R, the rule for gradients."""

from __future__ import annotations

from typing import Any

import torch
from strategies import laid_out
from torch import Tensor

from clora_kernels import gram_schmidt
from clora_kernels.dispatch.routed_lora import why_not_triton
from clora_kernels.kernels.gram_schmidt import layer
from clora_kernels.reference import gram_schmidt as reference
from clora_kernels.reference.routed_lora import accumulation_dtype
from clora_kernels.testing import Deviation, compare

TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}


def backends(dtype: torch.dtype = torch.float32) -> list[str]:
    """The backends that can run a matrix of this dtype on the device at hand; Triton's interpreter, which is slow, has
    tests of its own."""
    if torch.cuda.is_available():
        return ["aten"] + ([] if why_not_triton(dtype, "cuda", None) else ["triton"])
    return ["aten"] + ([] if layer.why_not(torch.empty(0, dtype=dtype)) else ["native"])


CASES = [(name, backend) for name, dtype in TYPES.items() for backend in backends(dtype)]


def gradients_for(inputs: dict[str, Any], layout: str = "contiguous", seed: int = 5) -> tuple[Tensor, Tensor]:
    """Random dQ and dR for a call, dR with a lower triangle that must count nothing."""
    V, generator = inputs["V"], torch.Generator().manual_seed(seed)
    r = V.shape[-1]
    dQ = torch.randn(V.shape, generator=generator, dtype=torch.float64).to(V.dtype)
    dR = torch.randn(*V.shape[:-2], r, r, generator=generator, dtype=torch.float64).to(accumulation_dtype(V.dtype))
    return laid_out(dQ.to(V.device), layout), laid_out(dR.to(V.device), layout)


def evaluate(inputs: dict[str, Any], dQ: Tensor | None, dR: Tensor | None, run: Any = gram_schmidt, **options: Any):
    """The result of a call and the gradients of its tensors by name."""
    leaves = {k: v.detach().requires_grad_() if isinstance(v, Tensor) else v for k, v in inputs.items()}
    result = run(**leaves, **options)
    names = [k for k, v in leaves.items() if isinstance(v, Tensor)]
    pairs = [(y, dy) for y, dy in ((result.Q, dQ), (result.R, dR)) if dy is not None]
    ys, dys = zip(*pairs, strict=True)
    grads = torch.autograd.grad(ys, [leaves[k] for k in names], dys, materialize_grads=True)
    return result, dict(zip(names, grads, strict=True))


def widened(t: Any) -> Any:
    return t.double() if isinstance(t, Tensor) and t.is_floating_point() else t


def magnitudes(dQ: Tensor, dR: Tensor, V: Tensor, P: Tensor | None, Q: Tensor, R: Tensor) -> dict[str, Tensor]:
    """The formula of backward on the absolute values of what enters it, in fp64: what bounds its rounding."""
    kept = R.diagonal(dim1=-2, dim2=-1) != 0
    inverse = torch.linalg.inv(R * kept[..., None, :] * kept[..., :, None] + torch.diag_embed((~kept).double())).abs()
    dQ, dR, V, Q, R = (t.double().abs() for t in (dQ, dR, V, Q, R))
    dR = dR.triu()
    left = V if P is None else V + P.abs() @ (P.abs().mT @ V)
    dQ = dQ + (left * ~kept[..., None, :]) @ (dR * ~kept[..., None, :]).mT
    M = R @ dR.mT + dQ.mT @ Q
    D0 = (dQ + Q @ (M.tril() + M.tril(-1).mT)) @ inverse.mT + Q @ dR
    if P is None:
        return {"V": D0}
    P = P.abs().expand(*V.shape[:-2], *P.shape[-2:])
    return {"V": D0 + P @ (P.mT @ D0), "against": D0 @ (P.mT @ V).mT + V @ (P.mT @ D0).mT}


def assert_gradients(got: dict[str, Tensor], inputs: dict[str, Any], dQ: Tensor, dR: Tensor) -> dict[str, Deviation]:
    """Gradients against fp64 autograd of the reference, within twice the error of the formula in the same dtype."""
    wide = {k: widened(v) for k, v in inputs.items()} | _tolerance(inputs)
    _, truth = evaluate(wide, dQ.double(), dR.double(), reference.forward)
    with torch.no_grad():
        V, P = inputs["V"], inputs.get("against")
        same = reference.forward(**inputs)
        plain = reference.backward(dQ, dR, V, P, same.Q, same.R)._asdict()
        whole = reference.forward(**wide)
        bounds = magnitudes(dQ, dR, V.double(), widened(P), whole.Q, whole.R)
    found = {}
    for name, g in got.items():
        bound = bounds[name].sum_to_size(g.shape)
        found[name] = compare(g, truth[name], plain[name], bound, accumulation_dtype(V.dtype))
        assert found[name].ok, f"{name}: {found[name]}"
    return found


def _tolerance(inputs: dict[str, Any]) -> dict[str, float]:
    """The tolerance of the call, which conversion to fp64 must not change."""
    return {"rank_tol": reference.tolerance(inputs.get("rank_tol"), inputs["V"].dtype)}
