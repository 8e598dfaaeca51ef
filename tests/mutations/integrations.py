"""Mutants of the package's layers in other libraries."""

from .mutant import mutants_of

INTEGRATIONS = mutants_of(
    "clora_kernels/integrations/peft/files.py",
    "peft",
    ("tests/test_integrations_peft.py",),
    [
        (
            "model-folded",
            "saving folds the routings of the model itself",
            "    state = lora_state_dict(model)\n",
            "    state = lora_state_dict(model)\n"
            "    [m.fold_routing() for m in model.modules() if isinstance(m, RoutedLoRALinear)]\n",
        ),
        (
            "safetensors-asked-for-late",
            "without safetensors an empty folder is left",
            "    from safetensors.torch import save_file\n",
            "    Path(directory).mkdir(parents=True, exist_ok=True)\n    from safetensors.torch import save_file\n",
        ),
        (
            "alpha-without-the-rank",
            "lora_alpha is the scaling itself, which PEFT divides by the rank",
            "layer.scaling_value() * ranks[name] for",
            "layer.scaling_value() for",
        ),
        (
            "rank-of-a-slice",
            "a fused layer has the rank of one of its slices",
            "layer.adapter_tensors()[0].shape[0] for",
            "layer.r for",
        ),
        (
            "ranks-unsaid",
            "layers of another rank are not named",
            '"rank_pattern": {_exactly(name): rank for name, rank in ranks.items() if rank != r}',
            '"rank_pattern": {}',
        ),
        (
            "alphas-unsaid",
            "layers of another scaling are not named",
            '"alpha_pattern": {_exactly(name): its for name, its in alphas.items() if its != alpha}',
            '"alpha_pattern": {}',
        ),
        (
            "pattern-anywhere",
            "the rank of one layer reaches another whose path ends like its",
            'return f"^{re.escape(name)}"',
            "return re.escape(name)",
        ),
        (
            "pattern-unescaped",
            "a dot in a name stands for any letter",
            'return f"^{re.escape(name)}"',
            'return f"^{name}"',
        ),
        (
            "targets-too-many",
            "targets name layers that have no adapter",
            "in ends} == names:",
            "in ends} >= names:",
        ),
        (
            "rarest",
            "the rarest rank passes for the common one",
            "most_common(1)[0][0]",
            "most_common()[-1][0]",
        ),
        (
            "bank-passes",
            "a bank of routings passes for a LoRA",
            "        layer.check_mergeable()\n",
            "        layer.check_restorable()\n",
        ),
        (
            "laid-out-another-way",
            "of Conv1D the config says that it is nn.Linear",
            "all(layer.fan_in_fan_out for layer in layers.values())",
            "False",
        ),
    ],
)
