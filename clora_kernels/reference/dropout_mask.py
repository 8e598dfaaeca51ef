"""The dropout mask every backend draws: a function of the seed and the element's place, and of nothing else.

Philox-4x32-10 (Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011) turns a counter
of four 32-bit words (c0, c1, c2, c3) and a key of two (k0, k1) into four random words in ten rounds of

    (c0, c1, c2, c3) <- (hi(m1*c2) ^ c1 ^ k0, lo(m1*c2), hi(m0*c0) ^ c3 ^ k1, lo(m0*c0))
    (k0, k1)         <- (k0 + w0, k1 + w1)

with hi and lo the 32-bit halves of a 64-bit product, m0 = D2511F53, m1 = CD9E8D57, w0 = 9E3779B9, w1 = BB67AE85 (hex).

For a mask of K columns the eight elements (m, 8g) .. (m, 8g + 7) share one counter i = m*ceil(K/8) + g, as the words
(low, high of i, 0, 0), under the key (low, high word of the seed). The four output words are eight 16-bit lanes, the
low half of each word first; element (m, k) is kept if lane k % 8 is at least the threshold round(65536*p).
"""

import torch

__all__ = ["dropout_mask", "kept_value", "philox_4x32_10"]

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_GROUP = 8

Words = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def _halves_of_product(factor: int, word: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The high and the low 32-bit word of factor*word, by 16-bit halves of the factor: no sum leaves 63 bits."""
    by_low, by_high = word * (factor & 0xFFFF), word * (factor >> 16)
    high = (by_high + (by_low >> 16)) >> 16
    low = (((by_high & 0xFFFF) << 16) + by_low) & _WORD
    return high, low


def philox_4x32_10(counter: Words, key: tuple[torch.Tensor, torch.Tensor]) -> Words:
    """Philox-4x32-10 on int64 tensors that hold 32-bit words (0 <= word < 2**32); all shapes broadcast."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high_0, low_0 = _halves_of_product(_MULTIPLIERS[0], c0)
        high_1, low_1 = _halves_of_product(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high_1 ^ c1 ^ k0, low_1, high_0 ^ c3 ^ k1, low_0
        k0, k1 = (k0 + _KEY_STEPS[0]) & _WORD, (k1 + _KEY_STEPS[1]) & _WORD
    return c0, c1, c2, c3


def dropout_mask(seed: torch.Tensor, threshold: torch.Tensor, first_row: int, rows: int, columns: int) -> torch.Tensor:
    """Rows ``first_row .. first_row + rows`` of the mask of ``columns`` columns, by the module's definition.

    seed, threshold: 0-dim int64 tensors; the mask lies on the seed's device. A threshold of 0 keeps every element,
    65536 none. Returns bool [rows, columns], True where the element is kept. Uses about 15 bytes an element while it
    runs. Raises ValueError or TypeError where an argument has another shape or dtype, or is negative.
    """
    for name, scalar in (("seed", seed), ("threshold", threshold)):
        if scalar.dtype != torch.int64:
            raise TypeError(f"{name} must be an int64 tensor, got {scalar.dtype}")
        if scalar.dim() != 0:
            raise ValueError(f"{name} must be a 0-dim tensor, got shape {tuple(scalar.shape)}")
    for name, number in (("first_row", first_row), ("rows", rows), ("columns", columns)):
        if number < 0:
            raise ValueError(f"{name} must not be negative, got {number}")
    groups = (columns + _GROUP - 1) // _GROUP
    index = first_row * groups + torch.arange(rows * groups, dtype=torch.int64, device=seed.device)
    zero = torch.zeros((), dtype=torch.int64, device=seed.device)
    words = philox_4x32_10((index & _WORD, index >> 32, zero, zero), (seed & _WORD, (seed >> 32) & _WORD))
    lanes = torch.stack([half for word in words for half in (word & 0xFFFF, word >> 16)], dim=-1)
    return (lanes >= threshold).view(rows, groups * _GROUP)[:, :columns].contiguous()


def kept_value(threshold: int) -> float:
    """By what an element is multiplied that a mask of this threshold keeps: 1/(1 - threshold/65536), 0 where it keeps
    none."""
    kept = 65536 - threshold
    return 65536 / kept if kept else 0.0
