"""Mutants of the package's layers in other libraries."""

from .mutant import mutants_of

INTEGRATIONS = mutants_of(
    "clora_kernels/integrations/peft.py",
    "peft",
    ("tests/test_integrations_peft.py",),
    [
        (
            "config-before-the-fold",
            "the config is asked for with the routings still there",
            "    state = to_lora(model)\n    config = lora_config(model, base_model_name_or_path)\n",
            "    config = lora_config(model, base_model_name_or_path)\n    state = to_lora(model)\n",
        ),
        (
            "safetensors-asked-for-late",
            "without safetensors the model is folded all the same",
            "    from safetensors.torch import save_file\n\n    state = to_lora(model)\n",
            "    state = to_lora(model)\n    from safetensors.torch import save_file\n\n",
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
            "a layer that still has its routing passes for a LoRA",
            "        if layer.routing is not None:\n",
            "        if layer.routing is not None and layer.routing.dim() == 2:\n",
        ),
        (
            "laid-out-another-way",
            "of Conv1D the config says that it is nn.Linear",
            "all(layer.fan_in_fan_out for layer in layers.values())",
            "False",
        ),
    ],
)
