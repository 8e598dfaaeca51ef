"""The steps of ideal rank-1 experts: every row that is read at all is read once a step.

forward    x, the chosen rows of both sides → y
backward   dy, the chosen rows of both sides → dx, dgates;   x, dy → dA, dB, whole
"""

from __future__ import annotations

from roofline import Floor, Step

from .points import Point


def floor(name: str, point: Point) -> Floor:
    """The steps of a contestant at a point."""
    M, d, E, k, e = point.M, point.d, point.E, point.k, point.dtype.itemsize
    rows, pool = M * d * e, E * d * e
    if name == "outputs":
        return Floor((Step("y", 0, rows),), (Step("gradients", 0, rows + 2 * pool),))
    chosen = (1 - (1 - 1 / E) ** (M // point.L * k)) * pool  # of E drawn so often, those that come at all
    flops = 2 * M * k * d
    return Floor(
        forward=(Step("tokens", 2 * flops, int(2 * rows + 2 * chosen)),),
        backward=(
            Step("tokens", 2 * flops, int(2 * rows + 2 * chosen)),
            Step("experts", 2 * flops, 2 * rows + 2 * pool),
        ),
    )
