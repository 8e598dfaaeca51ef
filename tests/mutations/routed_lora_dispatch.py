"""Mutants of the operators of routed LoRA and of their dispatch."""

from .mutant import mutants_of

_FILE = "clora_kernels/dispatch/routed_lora.py"
_TESTS = tuple(f"tests/test_routed_lora_{what}.py" for what in ("errors", "transforms", "options", "compile"))

DISPATCH = mutants_of(
    _FILE,
    "dispatch",
    _TESTS,
    [
        (
            "fake-dtype-of-y",
            "the fake y has the dtype of x beside a base output of another",
            "dtype=x.dtype if j.base_output is None else j.base_output.dtype",
            "dtype=x.dtype",
        ),
        (
            "fake-dtype-of-p",
            "the fake p has the dtype of x",
            "dtype=acc if keeps_p(j) else x.dtype) for",
            "dtype=x.dtype) for",
        ),
        (
            "fake-shape-of-p",
            "the fake p has the rows of x unflattened",
            "x.new_empty(M, j.lora_A.shape[0],",
            "x.new_empty(*lead, j.lora_A.shape[0],",
        ),
        (
            "fake-gradients-in-another-order",
            "the fake gradients of gate and bias change places",
            "j.routing, j.gate, j.bias, j.scaling]",
            "j.routing, j.bias, j.gate, j.scaling]",
        ),
        (
            "fake-dtype-of-dx",
            "the fake dx has the dtype of dy",
            "projections[0].lora_A.shape[1], dtype=dtype)]",
            "projections[0].lora_A.shape[1], dtype=dy.dtype)]",
        ),
        (
            "autocast-inside",
            "under autocast the fp32 sums are cast down",
            "    with without_autocast(x):\n",
            "    if True:\n",
        ),
        (
            "unknown-backend-passes",
            "any backend is taken for aten",
            '        check_backend(backend, "composite")\n',
            "        why = backend\n",
        ),
        (
            "reference-taken-for-aten",
            "backend='reference' runs aten",
            'backend in ("reference", "triton") else',
            'backend in ("plain", "triton") else',
        ),
        (
            "fake-dtype-of-q",
            "the fake q has the dtype in which it is summed",
            "dtype=acc if keeps_p(j) else x.dtype) for",
            "dtype=acc) for",
        ),
        (
            "backward-under-autocast",
            "under autocast the sums of backward are cast down",
            "    with without_autocast(dys[0]):\n",
            "    with nullcontext():\n",
        ),
        (
            "forward-under-autocast",
            "under autocast the sums of forward are cast down",
            "    with without_autocast(x):\n",
            "    with nullcontext():\n",
        ),
        (
            "kept-lost",
            "what is kept does not come back with the outputs",
            "    return ys + kept\n",
            "    return ys + [t * 0 for t in kept]\n",
        ),
        (
            "gradients-with-gaps",
            "gradients come back with other strides than the fake ones",
            "dys[0].new_empty(0) if g is None else g.contiguous() for g",
            "dys[0].new_empty(0) if g is None else g for g",
        ),
        (
            "index-in-no-place",
            "a wrong index of a group is told without its layer",
            'check_range(f"{prefix}routing_index"',
            'check_range("routing_index"',
        ),
    ],
) + mutants_of(
    _FILE,
    "dispatch-cuda",
    _TESTS,
    [
        (
            "index-out-of-the-bank",
            "an index that is not checked reads outside the bank",
            "return j._replace(routing_index=bounded(j.routing_index, j.routing.shape[0]))",
            "return j",
        ),
    ],
    gpu=True,
)
