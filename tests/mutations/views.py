"""Mutants of the conversions that cost nothing where there is nothing to convert."""

from .mutant import NUMBERS, mutants_of

VIEWS = mutants_of(
    "clora_kernels/kernels/views.py",
    "views",
    NUMBERS,
    [
        ("cast-never", "nothing is cast", "return t if t.dtype == dtype else t.to(dtype)", "return t"),
        ("cast-to-fp32", "everything is cast to fp32", "else t.to(dtype)", "else t.float()"),
        (
            "flatten-never",
            "leading dims stay as they are",
            "return t if t.dim() == 2 else t[None]",
            "return t if t.dim() else t[None]",
        ),
        (
            "flatten-transposed",
            "rows and columns change places",
            "else t.flatten(0, -2)",
            "else t.flatten(0, -2).reshape(t.shape[-1], -1).mT",
        ),
    ],
)

VIEWS += mutants_of(
    "clora_kernels/kernels/views.py",
    "views",
    ("tests/test_routed_lora_eager.py", *NUMBERS),
    [
        ("unflatten-as-a-view", "y is a view, which cannot be changed in place",
         "torch.ops.aten._unsafe_view.default(t, (*lead, t.shape[1]))", "t.view(*lead, t.shape[1])"),
        ("unflatten-never", "y has one leading dimension",
         "return t if len(lead) == 1 else torch.ops", "return t if len(lead) else torch.ops"),
        ("unflatten-backwards", "the leading dimensions of y change places",
         "(*lead, t.shape[1])", "(*lead[::-1], t.shape[1])"),
        ("unflatten-one-row", "a y of no leading dimensions keeps its one row",
         "return t if len(lead) == 1 else torch.ops", "return t if len(lead) <= 1 else torch.ops"),
    ],
)  # fmt: skip
