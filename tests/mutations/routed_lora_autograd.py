"""Mutants of the autograd functions of routed LoRA."""

from .mutant import mutants_of

_FUNCTION = mutants_of(
    "clora_kernels/autograd/routed_lora/function.py",
    "function",
    tuple(f"tests/test_routed_lora_{what}.py" for what in ("eager", "needs", "group", "options", "transforms")),
    [
        (
            "p-always-saved",
            "p or q is saved where nothing reads it",
            "[t if need.of_forward else t.new_empty(0) for t, need in",
            "[t for t, need in",
        ),
        (
            "x-always-saved",
            "x is saved where neither lora_A nor the weight learns",
            "any(n.weight or n.lora_A for n in needs)",
            "True",
        ),
        (
            "x-not-saved-for-dA",
            "x is not saved where lora_A alone reads it",
            "any(n.weight or n.lora_A for n in needs)",
            "any(n.weight for n in needs)",
        ),
        (
            "x-not-saved-for-dW",
            "x is not saved where the weight alone reads it",
            "any(n.weight or n.lora_A for n in needs)",
            "any(n.lora_A for n in needs)",
        ),
        (
            "needs-ignored",
            "every gradient is computed, wanted or not",
            "output, needed[:1] + needed[3:])",
            "output, needed[:1] + tuple(t.is_floating_point() for t in tensors))",
        ),
        (
            "need-of-x-ignored",
            "dx is computed, wanted or not",
            "output, needed[:1] + needed[3:])",
            "output, (True,) + needed[3:])",
        ),
        (
            "unused-outputs",
            "outputs of a group that were not used are taken for ones",
            "like.new_zeros(shapes[i][0], dtype=shapes[i][1])",
            "like.new_ones(shapes[i][0], dtype=shapes[i][1])",
        ),
        (
            "unused-outputs-in-another-shape",
            "outputs of a group that were not used are taken to have the shape of one that was",
            "like.new_zeros(shapes[i][0], dtype=shapes[i][1])",
            "like.new_zeros(like.shape, dtype=shapes[i][1])",
        ),
        (
            "gradients-of-another-layer",
            "in a group gradients go to another layer",
            "1 + j * len(Needs._fields) + place",
            "1 + (len(rows) - 1 - j) * len(Needs._fields) + place",
        ),
        (
            "base-output-without-gradient",
            "the base output gets no gradient",
            "sources.append(-1 - j if w[name] else None)",
            "sources.append(None)",
        ),
        (
            "double-backward-silent",
            "a second differentiation finds no graph in place of an error",
            "    if torch.is_grad_enabled():\n        out = Routed",
            "    if False:\n        out = Routed",
        ),
        (
            "operator-without-dx",
            "the operator called directly gives no gradient of x",
            "needed = tuple(t.requires_grad for t in (x, *tensors))",
            "needed = (False, *(t.requires_grad for t in tensors))",
        ),
        (
            "dtype-of-backward",
            "backward runs in the dtype of p",
            "ctx.dtype, ctx.direct = plan, given, backend, x.dtype, direct",
            "ctx.dtype, ctx.direct = plan, given, backend, output[n].dtype, direct",
        ),
        (
            "p-differentiable",
            "p passes for an output that can be differentiated",
            "    ctx.mark_non_differentiable(*output[n:])\n",
            "",
        ),
        (
            "kept-of-another-layer",
            "in a group backward reads what another layer kept",
            "t, need in zip(output[n:], plan.needs",
            "t, need in zip(output[n:][::-1], plan.needs",
        ),
        (
            "base-output-saved",
            "a base output is saved, which nothing reads",
            "t.new_empty(0) if i in plan.base_outputs else t for i",
            "t for i",
        ),
        (
            "saves-y",
            "y is saved in place of what is kept",
            "t, need in zip(output[n:], plan.needs",
            "t, need in zip(output[:n], plan.needs",
        ),
    ],
)

_FUNCTIONS = mutants_of(
    "clora_kernels/autograd/routed_lora/functions.py",
    "functions",
    tuple(f"tests/test_routed_lora_{what}.py" for what in ("glance", "options", "errors", "dropout", "merge")),
    [
        ("group-names-no-layer", "errors of a group do not tell which layer", "adapters[{}].", "adapters."),
        (
            "empty-group-passes",
            "a group of no layers is not refused",
            "    if not adapters:\n",
            "    if adapters is None:\n",
        ),
        (
            "options-at-a-glance",
            "a routing is forgotten where the rest is plain",
            'backend == "auto" and routing is frozen_routing is',
            'backend == "auto" and frozen_routing is',
        ),
        (
            "named-at-a-glance",
            "a backend that was named is not taken for a small call",
            'if backend == "auto" and routing is',
            "if routing is",
        ),
        (
            "seed-at-a-glance",
            "a draw is not replayed in a small call",
            "routing_index is gate is dropout_seed is None:",
            "routing_index is gate is None:",
        ),
    ],
)

_CALLS = mutants_of(
    "clora_kernels/autograd/routed_lora/calls.py",
    "calls",
    tuple(f"tests/test_routed_lora_{what}.py" for what in ("options", "errors", "dropout", "merge")),
    [
        (
            "autocast-weight-not-cast",
            "under autocast the weight keeps its dtype",
            "weight = _autocast(a.weight) if",
            "weight = a.weight if",
        ),
        (
            "autocast-ignored",
            "autocast does not reach the layer",
            "x = _autocast(x) if autocast else x",
            "x = x if autocast else x",
        ),
        (
            "autocast-casts-fp64",
            "autocast casts fp64 down",
            "return t if t.dtype == torch.float64 else t.to(",
            "return t.to(",
        ),
        (
            "training-ignored",
            "dropout drops outside training",
            "dropout_tensors(adapter.dropout_p, adapter.dropout_seed, training, x)",
            "dropout_tensors(adapter.dropout_p, adapter.dropout_seed, True, x)",
        ),
        (
            "reference-without-gate",
            "backend='reference' forgets the gate",
            "            gate=j.gate,\n            scaling=j.scaling,\n            dropout_p",
            "            gate=None,\n            scaling=j.scaling,\n            dropout_p",
        ),
        (
            "reference-without-seed",
            "backend='reference' does not drop",
            "dropout_seed=j.seed,",
            "dropout_seed=None,",
        ),
        (
            "reference-index-unchecked",
            "backend='reference' does not check routing_index",
            "            check_index(j, place)\n",
            "            place.strip()\n",
        ),
        (
            "checks-skipped",
            "the arguments are not checked",
            "        check_projection(x, j, place)\n",
            "",
        ),
    ],
)

_GLANCE = mutants_of(
    "clora_kernels/autograd/routed_lora/calls.py",
    "glance",
    ("tests/test_routed_lora_glance.py", "tests/test_routed_lora_composite.py", "tests/test_routed_lora_errors.py"),
    [
        ("of-any-dropout", "dropout_p above 1 passes at a glance", " and 0 <= dropout_p <= 1)", ")"),
        ("of-any-scaling", "a number that fp32 cannot hold passes at a glance", " and abs(scaling) < _LARGE", ""),
        ("of-any-training", "training may be anything at a glance", "        or type(training) is not bool\n", ""),
        ("of-any-layout", "a sparse x passes at a glance", "        or x.layout is not torch.strided\n", ""),
        ("under-autocast", "autocast does not reach a small layer", "        or autocast_is_on(x)\n", ""),
        (
            "drops-while-not-training",
            "a small layer drops outside training",
            "dropout_tensors(dropout_p, None, training, x)",
            "dropout_tensors(dropout_p, None, True, x)",
        ),
        ("integers", "integers pass at a glance", "        or x.dtype not in DTYPES\n", ""),
        (
            "under-transforms",
            "a compiled layer passes transforms by",
            "forward_mode_is_on() or not is_plain(x, tensors)):",
            "forward_mode_is_on()):",
        ),
        (
            "loses-tangents",
            "a compiled layer loses tangents",
            "(not chosen or forward_mode_is_on() or not is_plain",
            "(not chosen or not is_plain",
        ),
        (
            "biasless",
            "a compiled layer forgets its bias",
            "None, None, None, None, bias, None, scaling, seed",
            "None, None, None, None, None, None, scaling, seed",
        ),
        (
            "undropped",
            "a compiled layer does not drop",
            "bias, None, scaling, seed, threshold)\n    if learning",
            "bias, None, scaling, None, None)\n    if learning",
        ),
        (
            "learns-nothing",
            "a compiled layer that learns gets no gradient",
            "    if learning:\n        return Plain",
            "    if False:\n        return Plain",
        ),
        (
            "kept-unscaled",
            "what a small layer keeps counts once",
            "scaling = scaling * _kept_value(seed, dropout_p)",
            "scaling = scaling * 1.0",
        ),
        (
            "composite-kept-unscaled",
            "what a plain layer keeps counts once",
            "scaling = scaling * _kept_value(j.seed, adapter.dropout_p)",
            "scaling = scaling * 1.0",
        ),
        (
            "composite-kept-unscaled-in-a-graph",
            "what a plain layer keeps counts once in a graph",
            "scaling = scaling * Dropout(j.seed, j.threshold).kept_value(x.dtype)",
            "scaling = scaling * 1.0",
        ),
        (
            "scaling-does-not-learn",
            "the scaling of a plain layer gets no gradient",
            "if not isinstance(adapter.scaling, Tensor):",
            "if True:",
        ),
        (
            "scaling-in-the-graph",
            "a number for scaling is a constant of the graph",
            "    if not compiling:\n        if not isinstance(adapter.scaling, Tensor):",
            "    if True:\n        if not isinstance(adapter.scaling, Tensor):",
        ),
    ],
)

AUTOGRAD = [*_FUNCTION, *_FUNCTIONS, *_CALLS, *_GLANCE]
