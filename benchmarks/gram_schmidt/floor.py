"""The steps of an ideal Gram-Schmidt, two passes each way:

    forward    gram V → VᵀV              apply V → Q
    backward   inner Q, dQ → dQᵀQ        combine Q, dQ → dV

A basis P is read in each. The r×r work between the passes is left out.
"""

from __future__ import annotations

from roofline import Floor, Step

from .points import Point


def floor(name: str, point: Point) -> Floor:
    """The steps of a contestant at a point."""
    B, d, r, k, e = point.B, point.d, point.r, point.k, point.dtype.itemsize
    tall, basis = B * d * r * e, 4 * B * d * k
    if name == "copy":
        return Floor((Step("copy", 0, 2 * tall),), (Step("copy", 0, 2 * tall),))
    flops = B * d * r * (r + 2 * k)
    return Floor(
        forward=(Step("gram", flops, tall + basis), Step("apply", flops, 2 * tall + basis)),
        backward=(
            Step("inner", flops, 2 * tall + basis),
            Step("combine", B * d * r * (3 * r + 2 * k), 3 * tall + basis),
        ),
    )
