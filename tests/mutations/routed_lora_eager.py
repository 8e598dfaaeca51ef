"""Mutants of the way that plain calls of routed LoRA take, past the dispatcher."""

from .mutant import mutants_of

_FILE = "clora_kernels/autograd/routed_lora/function.py"
_TESTS = tuple(f"tests/test_routed_lora_{what}.py" for what in ("eager", "needs", "group", "options", "transforms"))

EAGER = []
EAGER += mutants_of(
    _FILE,
    "eager",
    _TESTS,
    [
        (
            "dx-lost",
            "x gets no gradient",
            "return dx, None, None, None, *dtensors",
            "return None, None, None, None, *dtensors",
        ),
        (
            "gradients-reversed",
            "gradients go to other tensors",
            "return dx, None, None, None, *dtensors",
            "return dx, None, None, None, *dtensors[::-1]",
        ),
        (
            "gradients-shifted",
            "each tensor gets the gradient of the next",
            "return dx, None, None, None, *dtensors",
            "return dx, None, None, None, *dtensors[1:], None",
        ),
        (
            "needs-ignored",
            "every gradient is computed, wanted or not",
            "output, needed[:1] + needed[4:], direct=True)",
            "output, needed[:1] + tuple(t.is_floating_point() for t in tensors), direct=True)",
        ),
        (
            "need-of-x-ignored",
            "dx is computed, wanted or not",
            "output, needed[:1] + needed[4:], direct=True)",
            "output, (True,) + needed[4:], direct=True)",
        ),
        (
            "needs-shifted",
            "each tensor is taken to need what the one before it needs",
            "output, needed[:1] + needed[4:], direct=True)",
            "output, needed[:1] + needed[3:-1], direct=True)",
        ),
        (
            "saves-other-outputs",
            "the outputs are saved in another order",
            "_save(ctx, x, tensors, given, backend, output, needed[:1] + needed[4:]",
            "_save(ctx, x, tensors, given, backend, output[::-1], needed[:1] + needed[4:]",
        ),
        (
            "backward-dispatched",
            "backward goes through the dispatcher",
            "    elif ctx.direct and not torch.compiler.is_compiling():\n",
            "    elif False:\n",
        ),
        (
            "dx-always",
            "backward computes dx, wanted or not",
            "run_backward(dys, x, kept, ctx.dtype, plan.need_x, plan.needs,",
            "run_backward(dys, x, kept, ctx.dtype, True, plan.needs,",
        ),
        (
            "dtype-of-dy",
            "backward runs in the dtype of dy",
            "run_backward(dys, x, kept, ctx.dtype,",
            "run_backward(dys, x, kept, dys[0].dtype,",
        ),
    ],
)
EAGER += mutants_of(
    _FILE,
    "plain",
    _TESTS,
    [
        (
            "always",
            "every call passes for plain",
            "    return (\n        not torch._C._are_functorch_transforms_active()\n",
            "    return True or (\n        not torch._C._are_functorch_transforms_active()\n",
        ),
        (
            "never",
            "no call passes for plain",
            "    return (\n        not torch._C._are_functorch_transforms_active()\n",
            "    return False and (\n        not torch._C._are_functorch_transforms_active()\n",
        ),
        (
            "under-transforms",
            "transforms do not see the operator",
            "not torch._C._are_functorch_transforms_active()\n",
            "True\n",
        ),
        (
            "under-modes",
            "dispatch modes do not see the operator",
            "and torch._C._len_torch_dispatch_stack() == 0\n",
            "and True\n",
        ),
        (
            "under-tracers",
            "torch.jit.trace does not see the operator",
            "and not torch._C._get_tracing_state()\n",
            "and True\n",
        ),
        (
            "x-of-a-subclass",
            "a tensor subclass in place of x does not see the operator",
            "and type(x) in PLAIN_TYPES\n",
            "and True\n",
        ),
        (
            "tensors-of-a-subclass",
            "a tensor subclass beside x does not see the operator",
            "and PLAIN_TYPES.issuperset(map(type, tensors))\n",
            "and True\n",
        ),
    ],
)
EAGER += mutants_of(
    "clora_kernels/autograd/routed_lora/function.py",
    "plain-layer",
    ("tests/test_routed_lora_glance.py", "tests/test_routed_lora_native_choice.py"),
    [
        ("x-always-saved", "x is saved for lora_B",
         "(x if W or A else None, q if B else None)", "(x, q if B else None)"),
        ("x-never-saved", "x is not saved for a weight that learns", "(x if W or A else None,", "(x if A else None,"),
        ("unused-raises", "an output that nothing used has no backward",
         "        if dy is None:\n            return (None,) * 6\n", ""),
        ("twice-silent", "a second differentiation finds no graph in place of an error",
         "        if torch.is_grad_enabled():\n            tensors, given",
         "        if False:\n            tensors, given"),
        ("bias-that-is-not", "a bias that is not there gets a gradient",
         "dB, None if bias is None else dbias", "dB, dbias"),
        ("dtype-of-dy", "gradients are computed in the dtype of dy",
         "False, b, False), x.dtype", "False, b, False), torch.float32"),
    ],
)  # fmt: skip
