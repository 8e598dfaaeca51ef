"""Mutants of the refusal of what operators do not do: forward mode, vmap, a second differentiation."""

from .mutant import mutants_of

_ROUTED, _GS = ("tests/test_routed_lora_transforms.py",), ("tests/test_gram_schmidt_transforms.py",)

FORWARD_MODE = [
    *mutants_of(
        "clora_kernels/library.py",
        "forward-mode",
        _ROUTED,
        [
            ("lost", "tangents are lost", " and forward_ad.unpack_dual(t).tangent is not None:", " and t.dim() < 0:"),
            ("no-tangent", "a tensor without a tangent is refused",
             " and forward_ad.unpack_dual(t).tangent is not None:", ":"),
            ("views-excluded", "inside an operator a tangent cannot be looked at",
             ".remove(torch._C.DispatchKey.ADInplaceOrView)", ""),
        ],
    ),
    *mutants_of(
        "clora_kernels/library.py",
        "first-order",
        (*_GS, *_ROUTED),
        [
            ("vmap-silently", "vmap says nothing of its own",
             'raise RuntimeError(cls.UNSUPPORTED.format("torch.func.vmap '
             '(nor jacrev, jacfwd or hessian, which use it)"))', "return None"),
            ("twice-zero", "a second differentiation gives nothing in place of an error",
             'raise RuntimeError(cls.UNSUPPORTED.format("double backward"))',
             "return (None,) * len(ctx.needs_input_grad)"),
        ],
    ),
    *mutants_of(
        "clora_kernels/autograd/routed_lora/calls.py",
        "forward-mode-routed",
        _ROUTED,
        [("of-x-alone", "tangents of others than x are lost",
          'refuse_forward_mode("routed_lora", (x, *tensors))', 'refuse_forward_mode("routed_lora", (x,))')],
    ),
    *mutants_of(
        "clora_kernels/dispatch/routed_lora.py",
        "forward-mode-routed-operator",
        _ROUTED,
        [("lost", "tangents are lost in a compiled graph",
          '    refuse_forward_mode_below_autograd("routed_lora", (x, *tensors))\n', "")],
    ),
    *mutants_of(
        "clora_kernels/autograd/gram_schmidt/functions.py",
        "forward-mode-gs",
        _GS,
        [("of-V-alone", "tangents of a basis are lost",
          'refuse_forward_mode("gram_schmidt", tensors)', 'refuse_forward_mode("gram_schmidt", Vs)')],
    ),
    *mutants_of(
        "clora_kernels/dispatch/gram_schmidt.py",
        "forward-mode-gs-operator",
        _GS,
        [("lost", "tangents are lost in a compiled graph",
          '    refuse_forward_mode_below_autograd("gram_schmidt", (*V, *against))\n', "")],
    ),
]  # fmt: skip
