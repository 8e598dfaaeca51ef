"""Mutants of the matmul that chooses between the libraries of a CPU."""

from .mutant import NUMBERS, mutants_of

CPU_MATMUL = mutants_of(
    "clora_kernels/kernels/cpu_matmul.py",
    "cpu-matmul",
    ("tests/test_cpu_matmul.py", *NUMBERS),
    [
        (
            "bias-dropped",
            "small products without the bias",
            "return a @ b if bias is None else torch.addmm(bias, a, b)",
            "return a @ b",
        ),
        (
            "bias-dropped-by-onednn",
            "large products without the bias",
            "return linear(a, b.mT, bias, ",
            "return linear(a, b.mT, None, ",
        ),
        (
            "strided-bias-misread",
            "a bias that is not contiguous is read as if it were",
            "None if bias is None else bias.contiguous())",
            "bias)",
        ),
        (
            "bias-of-every-piece",
            "a long sum gets the bias once for each of its pieces",
            "None if start else bias,",
            "bias,",
        ),
        (
            "last-piece-alone",
            "a long sum is that of its last piece",
            "take = y[block].add_ if start else y[block].copy_",
            "take = y[block].copy_",
        ),
        (
            "other-dtypes-go-to-onednn",
            "fp64 goes to a library that has no fp64",
            "and a.dtype == torch.float32\n        and a.is_cpu",
            "and a.dtype.is_floating_point\n        and a.is_cpu",
        ),
        (
            "narrow-not-transposed",
            "a narrow product is read as if it were laid out the other way",
            "return (b.mT @ a.mT).mT.contiguous()",
            "return (b.mT @ a.mT).reshape(a.shape[0], b.shape[1])",
        ),
        (
            "narrow-not-laid-out",
            "a narrow product comes back with transposed strides",
            "return (b.mT @ a.mT).mT.contiguous()",
            "return (b.mT @ a.mT).mT",
        ),
        (
            "narrow-without-bias",
            "a narrow product is made without the bias",
            "        bias is None\n        and a.is_cpu\n",
            "        a.is_cpu\n",
        ),
    ],
)
