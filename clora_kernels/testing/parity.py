r"""Parity with fp64, by one rule for every output and every gradient.

The truth is the reference on the inputs converted to fp64. The plain reference in the inputs' own dtypes keeps the
rounding contract, so its error, err_ref, is what no kernel can avoid; magnitude is the reference on the absolute values
of the inputs, in fp64, which bounds what the order of a sum can change. With ulp the relative spacing of the output's
dtype (2⁻²³ for fp32, 2⁻⁷ for bf16), a result passes if

    ‖actual − truth‖_F  ≤ 2·‖err_ref‖_F    + ulp·max|truth| + 8·u·max magnitude             in the Frobenius norm,
    |actual − truth|    ≤ 2·max|err_ref|   + ulp·max|truth| + 8·u·magnitude                 in every element,

with u = 2⁻²⁴, the unit roundoff of the fp32 sums. The norm is granted what one element is granted, however many there
are: for a result of one number the two rules are the same, and a chance err_ref of zero fails nothing that is right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ..reference import routed_lora


class Reference(Protocol):
    """What a module of ``clora_kernels.reference`` brings; ``backward`` names each gradient as its argument."""

    @property
    def forward(self) -> Callable[..., Tensor]: ...

    @property
    def backward(self) -> Callable[..., Any]: ...


@dataclass(frozen=True)
class Deviation:
    """How far a result is from the truth and how far it may be; ``maximum`` is the element closest to, or farthest
    beyond, its own bound. ``problem`` tells of a wrong shape, dtype or device, or of a value that is not finite."""

    frobenius: float
    frobenius_bound: float
    maximum: float
    maximum_bound: float
    problem: str = ""

    @property
    def ok(self) -> bool:
        return not self.problem and self.frobenius <= self.frobenius_bound and self.maximum <= self.maximum_bound

    def __str__(self) -> str:
        if self.problem:
            return self.problem
        return (
            f"Frobenius error {self.frobenius:.3e} (bound {self.frobenius_bound:.3e}), "
            f"element error {self.maximum:.3e} (bound {self.maximum_bound:.3e})"
        )


def compare(actual: Any, truth: Tensor, reference: Tensor, magnitude: Tensor, accumulation: torch.dtype) -> Deviation:
    """One result against the rule of this module.

    actual: what is proved; reference: the same from the plain reference, whose shape, dtype and device it must have;
    truth, magnitude: fp64, same shape; accumulation: dtype of the sums, fp32 or fp64. In fp64 nothing wider is at hand
    and err_ref is zero by definition: ‖8·2⁻⁵³·magnitude‖_F, the bound on rounding, then stands in for it.
    """
    problem = _problem(actual, reference)
    if problem:
        return Deviation(float("inf"), 0.0, float("inf"), 0.0, problem)
    if truth.numel() == 0:
        return Deviation(0.0, 0.0, 0.0, 0.0)
    error, err_ref = (actual.double() - truth).abs(), (reference.double() - truth).abs()
    spacing = torch.finfo(reference.dtype).eps * truth.abs().max()
    fp64 = accumulation == torch.float64
    rounding = 8 * (2.0**-53 if fp64 else 2.0**-24) * magnitude
    bound = 2 * err_ref.max() + spacing + rounding
    worst = (error - bound).argmax()
    frobenius_bound = 2 * err_ref.norm() + spacing + (rounding.norm() if fp64 else rounding.max())
    return Deviation(
        error.norm().item(), frobenius_bound.item(), error.flatten()[worst].item(), bound.flatten()[worst].item()
    )


def _problem(actual: Any, reference: Tensor) -> str:
    if not isinstance(actual, Tensor):
        return f"got {type(actual).__name__}, expected a Tensor"
    for what in ("shape", "dtype", "device"):
        got, expected = getattr(actual, what), getattr(reference, what)
        if got != expected:
            return f"got {what} {got}, expected {expected}"
    if not actual.isfinite().all():
        return f"{int((~actual.isfinite()).sum())} of {actual.numel()} elements are not finite"
    return ""


def evaluate(
    fn: Callable[..., Tensor], inputs: Mapping[str, Any], dy: Tensor | None = None, gradients: Iterable[str] = ()
) -> dict[str, Any]:
    """``{"y": fn(**inputs)}`` and, for the output gradient ``dy``, the gradient of each input in ``gradients``.

    The inputs themselves are not marked: ``fn`` gets leaves of the same storage and strides.
    """
    wanted = tuple(gradients) if dy is not None else ()
    leaves = {k: v.detach() if isinstance(v, Tensor) else v for k, v in inputs.items()}
    for name in wanted:
        leaves[name].requires_grad_()
    y = fn(**leaves)
    if dy is None:
        return {"y": y}
    grads = torch.autograd.grad(y, [leaves[name] for name in wanted], dy, allow_unused=True)
    return {"y": y.detach(), **dict(zip(wanted, grads, strict=True))}


def assert_parity(
    actual: Callable[..., Tensor] | Mapping[str, Any],
    inputs: Mapping[str, Any],
    *,
    dy: Tensor | None = None,
    gradients: Iterable[str] | None = None,
    reference: Reference = routed_lora,
) -> dict[str, Deviation]:
    """Prove a function, or results that are already there, against fp64 by the rule of this module.

    Args:
        actual: called as ``actual(**inputs)``; or a mapping of results: ``"y"``, and gradients by their inputs' names.
        inputs: arguments of the reference's forward, on any device; the first is the tensor whose dtype decides that
            of the sums. Dropout needs a ``dropout_seed``, or no two evaluations drop the same.
        dy: gradient of y; None proves the forward alone.
        gradients: names of the inputs whose gradients are proved; by default, with ``dy``, all the reference knows.
        reference: module of ``clora_kernels.reference`` that says what is computed.

    Returns:
        The deviation of each result, all within the rule.

    Raises:
        AssertionError: naming each result that is not.
        ValueError: for dropout without a seed, or a result that is asked for without ``dy``.
    """
    expected = Expected.of(inputs, dy=dy, gradients=gradients, reference=reference)
    got = actual if isinstance(actual, Mapping) else evaluate(actual, inputs, dy, list(expected.truth)[1:])
    return expected.check(got)


@dataclass(frozen=True)
class Expected:
    """What :func:`assert_parity` compares with, by the names of the results, ``"y"`` first: made once, for any number
    of results of the same inputs."""

    truth: dict[str, Tensor]
    same: dict[str, Tensor]
    magnitude: dict[str, Tensor]
    accumulation: torch.dtype

    @classmethod
    def of(
        cls,
        inputs: Mapping[str, Any],
        *,
        dy: Tensor | None = None,
        gradients: Iterable[str] | None = None,
        reference: Reference = routed_lora,
    ) -> Expected:
        """Arguments and ValueError as of :func:`assert_parity`."""
        if inputs.get("dropout_p") and inputs.get("dropout_seed") is None:
            raise ValueError("inputs: got dropout_p without dropout_seed, expected the seed of the draw to replay")
        truth, same, magnitude = _references(reference, inputs, dy)
        if gradients is None:
            gradients = [name for name in same if name != "y" and isinstance(inputs.get(name), Tensor)]
        names = ["y", *gradients]
        for name in names:
            if name not in same:
                raise ValueError(f"gradients: got {name!r}, expected some of {', '.join(k for k in same if k != 'y')}")
        accumulation = routed_lora.accumulation_dtype(next(iter(inputs.values())).dtype)
        truth, same, magnitude = ({k: found[k] for k in names} for found in (truth, same, magnitude))
        return cls(truth, same, magnitude, accumulation)

    def check(self, results: Mapping[str, Any]) -> dict[str, Deviation]:
        """The deviation of each result; AssertionError naming each that is not within the rule."""
        found = {
            k: compare(results.get(k), self.truth[k], self.same[k], self.magnitude[k], self.accumulation)
            for k in self.truth
        }
        failed = [f"  {k}: {deviation}" for k, deviation in found.items() if not deviation.ok]
        if failed:
            raise AssertionError("beyond the error that rounding explains:\n" + "\n".join(failed))
        return found


def _references(reference: Reference, inputs: Mapping[str, Any], dy: Tensor | None) -> tuple[dict[str, Tensor], ...]:
    """Results by name: in fp64, in the inputs' own dtypes, and in fp64 on absolute values."""
    return tuple(
        _evaluate_reference(reference, {k: convert(v) for k, v in inputs.items()}, None if dy is None else convert(dy))
        for convert in (_widened, _detached, _absolute)
    )


@torch.no_grad()
def _evaluate_reference(reference: Reference, inputs: dict[str, Any], dy: Tensor | None) -> dict[str, Tensor]:
    results = {"y": reference.forward(**inputs)}
    if dy is not None:
        results |= {k: g for k, g in reference.backward(dy, **inputs)._asdict().items() if g is not None}
    return results


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def _widened(value: Any) -> Any:
    return value.detach().double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _absolute(value: Any) -> Any:
    if isinstance(value, Tensor):
        return _widened(value).abs() if value.is_floating_point() else value
    return abs(value) if isinstance(value, float) else value
