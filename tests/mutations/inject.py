"""Mutants of what acts on all adapted layers of a model."""

from .mutant import mutants_of

_MERGEABLE, _RESTORABLE = "        layer.check_mergeable()\n", "        layer.check_restorable()\n"
_EACH = "    for layer in layers.values():\n"

_ALL = mutants_of(
    "clora_kernels/modules/inject.py",
    "inject",
    ("tests/test_inject.py", "tests/test_integrations_peft.py"),
    [
        (
            "merge-all-in-part",
            "layers are merged before one that cannot be",
            _MERGEABLE + _RESTORABLE + '    if backup != "device":',
            _RESTORABLE + '    if backup != "device":',
        ),
        (
            "merge-all-beside-one-that-is-gone",
            "layers are merged before one whose weight is gone",
            _MERGEABLE + _RESTORABLE + '    if backup != "device":',
            _MERGEABLE + '    if backup != "device":',
        ),
        (
            "merge-all-over-tied-weights",
            "a weight that another module shares gets the adapter there too",
            '    if backup != "device":\n        _check_untied(model, layers, backup)\n',
            "",
        ),
        (
            "unmerge-all-in-part",
            "layers are unmerged before one whose weight is gone",
            _RESTORABLE + _EACH + "        layer.unmerge()\n    return list(layers)",
            _MERGEABLE + _EACH + "        layer.unmerge()\n    return list(layers)",
        ),
        (
            "merge-all-forgets-the-backup",
            "merge_all keeps every backup on the device",
            "layer.merge(backup=backup)",
            "layer.merge()",
        ),
        (
            "to-lora-in-part",
            "routings are folded before a bank is met",
            _MERGEABLE + _RESTORABLE + _EACH + "        layer.fold_routing()",
            _RESTORABLE + _EACH + "        layer.fold_routing()",
        ),
        (
            "to-lora-exchanges-the-factors",
            "lora_A goes by the name of lora_B",
            'lora_B.weight"] = lora_B\n',
            'lora_B.weight"] = lora_A\n',
        ),
    ],
)

_PLACES = mutants_of(
    "clora_kernels/modules/inject.py",
    "inject",
    ("tests/test_inject_places.py", "tests/test_inject.py"),
    [
        ("named-places-only", "a shared layer is replaced only where a target names it",
         "    matches |= {place[0]: place for place in children if place[1] in modules}\n", ""),
        ("one-path-to-a-block", "of several paths to a block only the first names its layers",
         "model.named_modules(remove_duplicate=False)", "model.named_modules()"),
        ("left-in-one-place", "a layer that must stay in one place is replaced in the others",
         "for _, module, parent in matches if (why", "for _, module, parent in matches[:1] if (why"),
        ("made-for-each-place", "a shared layer is made anew for each place",
         "if module not in reasons and module not in made:", "if module not in reasons:"),
        ("model-unchecked", "inject takes what is no model",
         "    _check_model(model)\n    children =", "    children ="),
        ("model-unchecked-later", "what acts on adapters takes what is no model",
         "    _check_model(model)\n    layers =", "    layers ="),
        ("factory-unchecked", "a factory that cannot be called is not told",
         "    if not callable(factory):\n", "    if factory is None:\n"),
        ("expression-unchecked", "a wrong regular expression is not told",
         "except re.error as error:", "except KeyError as error:"),
        ("names-unchecked", "a target that is no name is not told",
         "            if not isinstance(t, str):\n", "            if t is None:\n"),
        ("targets-read-once", "targets that can be read once alone name nothing",
         "        targets = list(targets)\n", ""),
        ("model-a-layer", "a model that is itself a linear layer is told that it has none",
         "if why_not_adaptable(model) is None:", "if model is None:"),
        ("places-forgotten-in-the-report", "the report names one place of a shared layer",
         "swapped = [name for name, module, _ in matches if module in made]",
         "swapped = list({m: name for name, m, _ in reversed(matches) if m in made}.values())[::-1]"),
        ("tied-to-the-plain", "a weight that a layer without adapter shares gets the adapter there too",
         "    for name, module in model.named_modules():\n        for own, parameter",
         "    for name, module in layers.items():\n        for own, parameter"),
        ("lora-state-of-frozen-parts", "the tensors for PEFT still ask for gradients",
         "lora_A, lora_B = layer.lora_tensors()",
         "lora_A, lora_B = layer.adapter_tensors()[0], layer.lora_tensors()[1]"),
    ],
)  # fmt: skip

_HOOKS = mutants_of(
    "clora_kernels/modules/adapter.py",
    "adapter",
    ("tests/test_inject.py",),
    [
        ("hooks-lost", "a layer loses the hooks that it had",
         "why_not = why_not_replaceable(linear)", "why_not = why_not_adaptable(linear)"),
        ("hooks-of-one-kind-lost", "a layer loses what was to run before its backward",
         " or module._backward_pre_hooks:", ":"),
    ],
)  # fmt: skip

INJECT = [*_ALL, *_PLACES, *_HOOKS]
