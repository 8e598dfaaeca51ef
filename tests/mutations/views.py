"""Mutants of the conversions that cost nothing where there is nothing to convert."""

from .mutant import NUMBERS, mutants_of

VIEWS = mutants_of(
    "clora_kernels/kernels/views.py",
    "views",
    NUMBERS,
    [
        ("cast-never", "nothing is cast", "return t if t.dtype == dtype else t.to(dtype)", "return t"),
        ("cast-to-fp32", "everything is cast to fp32", "else t.to(dtype)", "else t.float()"),
        ("flatten-never", "leading dims stay as they are", "return t if t.dim() == 2 else", "return t if t.dim() else"),
        (
            "flatten-transposed",
            "rows and columns change places",
            "t.reshape(t.shape[:-1].numel(), t.shape[-1])",
            "t.reshape(t.shape[-1], t.shape[:-1].numel()).mT",
        ),
    ],
)
