"""The steps of an ideal routed LoRA:

    forward    pack (A, C = s·R·B)    shrink x → p      linear x, W, p, C → y
    backward   shrink dy → h          linear dy, W, h, A → dx     reduce dy → U     reduce x → dA     unpack U → dB, dR

so the floor is the frozen matmul forward and for dx, plus one more read each of x, dy, x and dy. The frozen layer is
the two linear steps alone.
"""

from __future__ import annotations

from roofline import Floor, Step

from .points import Point


def floor(name: str, point: Point) -> Floor:
    """The steps of a contestant at a point."""
    return frozen_floor(point) if name == "frozen" else routed_lora_floor(point)


def routed_lora_floor(point: Point, adapter_bytes: int = 4) -> Floor:
    """The steps of routed LoRA at a point, for adapter parameters of ``adapter_bytes`` bytes an element."""
    M, K, N, r, e = point.M, point.K, point.N, point.r, point.dtype.itemsize
    pack = Step("pack", 2 * r * r * N, (adapter_bytes + e) * r * (K + N))
    unpack = Step("unpack", 4 * r * r * N, (4 + adapter_bytes) * r * N)
    return Floor(
        forward=(pack, _skinny("shrink", M, K, r, e, 4 * M * r), _linear(M, K, N, r, e)),
        backward=(
            _skinny("shrink", M, N, r, e, e * M * r),
            _linear(M, N, K, r, e),
            _skinny("reduce", M, N, r, e, 4 * r * N),
            _skinny("reduce", M, K, r, e, adapter_bytes * r * K),
            unpack,
        ),
    )


def frozen_floor(point: Point) -> Floor:
    """The steps of the frozen linear layer: y and dx."""
    M, K, N, e = point.M, point.K, point.N, point.dtype.itemsize
    return Floor(forward=(_linear(M, K, N, 0, e),), backward=(_linear(M, N, K, 0, e),))


def _linear(M: int, inner: int, outer: int, r: int, e: int) -> Step:
    operands = M * inner + inner * outer + r * (M + outer)
    return Step("linear", 2 * M * outer * (inner + r), e * (operands + M * outer))


def _skinny(name: str, M: int, columns: int, r: int, e: int, result_bytes: int) -> Step:
    """A big operand [M, columns] against a small one of rank r, as shrink and reduce do."""
    small = M * r if name == "reduce" else r * columns
    return Step(name, 2 * M * columns * r, e * (M * columns + small) + result_bytes)
