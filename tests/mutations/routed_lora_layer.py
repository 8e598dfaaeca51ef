"""Mutants of the plain layer of routed LoRA on a CPU."""

from .mutant import mutants_of

PLAIN_LAYER = mutants_of(
    "clora_kernels/kernels/routed_lora/layer.py",
    "layer",
    ("tests/test_routed_lora_native*.py", "tests/test_report.py"),
    [
        ("bias-forgotten", "the bias is not added", "        y.add_(j.bias)\n", "        pass\n"),
        ("takes-a-group", "of a group the first is computed", "if len(projections) > 1:", "if len(projections) > 9:"),
        ("takes-a-gate", "a gate is forgotten", '("routing", "gate")', '("routing",)'),
        (
            "takes-any-strides",
            "an adapter with gaps is not left to others",
            "t.dtype == torch.float32 and t.is_contiguous()",
            "t.dtype == torch.float32",
        ),
        (
            "takes-any-scaling",
            "an fp64 scaling is not left to others",
            "j.scaling.dtype != torch.float32 or not j.scaling.is_cpu",
            "not j.scaling.is_cpu",
        ),
        ("work-at-the-limit", "work at the limit is not little", "<= LITTLE_WORK", "< LITTLE_WORK"),
        ("unmasked", "in fp32 nothing drops", "torch.float32 and j.seed is None:", "torch.float32:"),
        ("unscaled", "in fp32 the scaling is forgotten", "y = (q * j.scaling) @", "y = q @"),
        (
            "q-scaled",
            "what backward needs is scaled already",
            "q = flat @ j.lora_A.mT\n",
            "q = flat @ j.lora_A.mT * j.scaling\n",
        ),
        (
            "few-rows-of-any-weight",
            "a transposed weight is packed for few rows",
            ".get(x.dtype, ()) and j.weight.stride(1) == 1:",
            ".get(x.dtype, ()):",
        ),
        ("dscaling-without-B", "the gradient of scaling forgets B", ".mT * j.lora_B).sum()", ".mT).sum()"),
        ("dbias-rounded", "the bias gradient is rounded to x.dtype", "dy.sum(0, dtype=torch.float32)", "dy.sum(0)"),
    ],
)
