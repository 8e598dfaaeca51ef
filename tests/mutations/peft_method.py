"""Mutants of routed LoRA as a method of PEFT."""

from .mutant import mutants_of

FOLDER = "clora_kernels/integrations/peft/routed_lora/"
NUMBERS, STATES, FILES, LORA, CONFIG = (
    f"tests/test_integrations_peft_method{part}.py" for part in ("", "_states", "_files", "_lora", "_config")
)

PEFT_METHOD = [
    *mutants_of(
        FOLDER + "config.py",
        "peft-method",
        (CONFIG, STATES),
        [
            (
                "later-fields-dropped",
                "fields of a later version are dropped as PEFT does",
                "if unknown := sorted(fields.keys() - known):",
                "if (unknown := sorted(fields.keys() - known)) and not known:",
            ),
            (
                "later-peft",
                "a later PEFT passes",
                "Version(version).release[:2] != (0, 21)",
                "Version(version) < Version('0.21')",
            ),
            (
                "rank-stabilised-unsaid",
                "rsLoRA scales as LoRA does",
                "(math.sqrt(rank) if self.use_rslora else rank)",
                "rank",
            ),
            (
                "factors-frozen-late",
                "A and B learn in the second task too",
                "and self.task > 1",
                "and self.task > 2",
            ),
        ],
    ),
    *mutants_of(
        FOLDER + "layer.py",
        "peft-method",
        (NUMBERS, STATES, FILES),
        [
            (
                "old-routing-unsaved",
                "R_old is in no file",
                "BufferDict(persistent=True)",
                "BufferDict(persistent=False)",
            ),
            (
                "old-routing-learns",
                "R_old stands among what learns",
                'adapter_layer_names = ("lora_A", "lora_B", "lora_routing")',
                'adapter_layer_names = ("lora_A", "lora_B", "lora_routing", "lora_frozen_routing")',
            ),
            (
                "old-routing-unused",
                "the earlier tasks count no more",
                '"frozen_routing": R_old,',
                '"frozen_routing": torch.zeros_like(R_old),',
            ),
            (
                "cast-makes-learn",
                "an inactive adapter that PEFT casts learns",
                "self[key].requires_grad_(learns)",
                "self[key].requires_grad_(True)",
            ),
            (
                "loaded-is-rounded",
                "what is loaded without a copy is rounded to the base layer's dtype",
                "tensors[adapter_name].to(device)",
                "tensors[adapter_name].to(device, self.weight.dtype)",
            ),
            (
                "always-drops",
                "dropout goes on in evaluation",
                '"training": self.training',
                '"training": True',
            ),
            (
                "starts-full",
                "C-LoRA starts with the routing of LoRA",
                "            R.zero_()\n",
                "            nn.init.eye_(R)\n",
            ),
            (
                "starts-wide",
                "C-LoRA's B does not get narrower with the rank",
                "std=1 / math.sqrt(A.shape[0])",
                "std=1.0",
            ),
            (
                "B-learns-on",
                "after the first task B learns on",
                '[adapter_name] = ("lora_A", "lora_B")',
                '[adapter_name] = ("lora_A",)',
            ),
            (
                "frozen-everywhere",
                "what one layer freezes all layers of the process freeze",
                "        self.frozen_peft_weight_names: dict[str, tuple[str, ...]] = {}\n",
                "",
            ),
            (
                "merged-twice",
                "unmerging merges again",
                "scaling=sign * self.scaling[adapter_name]",
                "scaling=self.scaling[adapter_name]",
            ),
            (
                "unsafe",
                "what is not finite is found when it is merged already",
                "into = weight.clone() if safe_merge else weight",
                "into = weight",
            ),
            (
                "disabled-but-merged",
                "a disabled layer leaves merged adapters in the weight",
                "if self.disable_adapters and self.merged:",
                "if self.disable_adapters and not self.merged:",
            ),
        ],
    ),
    *mutants_of(
        "clora_kernels/integrations/peft/layers.py",
        "peft-method",
        (NUMBERS, STATES, FILES),
        [
            (
                "conv-laid-out-as-linear",
                "Conv1D is read as nn.Linear",
                "weight if isinstance(base, nn.Linear) else weight.mT",
                "weight",
            ),
            (
                "arguments-dropped",
                "further arguments of a call are dropped",
                "if adapters and not args and not kwargs and why",
                "if adapters and why",
            ),
        ],
    ),
    *mutants_of(
        FOLDER + "model.py",
        "peft-method",
        (STATES, FILES, CONFIG, NUMBERS),
        [
            (
                "earlier-tasks-forgotten",
                "R_old is R, not what it was and R",
                "R_old += gathered(R)",
                "R_old.copy_(gathered(R))",
            ),
            (
                "routing-goes-on",
                "R does not start anew",
                "                R.zero_()\n",
                "",
            ),
            (
                "all-adapters",
                "the hand-over of one adapter is that of the active ones",
                "if adapter_name is None else [adapter_name]",
                "",
            ),
            (
                "tasks-uncounted",
                "the config does not know the task",
                "config.task += 1",
                "config.task += 0",
            ),
            (
                "half-adapters-load",
                "an adapter of which tensors are missing loads",
                "if missing := sorted(own.keys() - state.keys()):",
                "if missing := sorted(own.keys() - own.keys()):",
            ),
            (
                "half-written",
                "tensors are written until one does not fit",
                "if state[name].shape != tensor.shape:",
                "if state[name].dim() != tensor.dim():",
            ),
            (
                "strangers-load",
                "tensors of layers without this adapter are dropped",
                "if unexpected := sorted(",
                "if not state and sorted(",
            ),
            (
                "targets-found-late",
                "targets that cannot be adapted are found between those that can",
                "                    features(module)\n",
                "                    model.modules()\n",
            ),
            (
                "half-merged",
                "layers are merged until one cannot be",
                "                layer.mergeable_weight()\n",
                "                layer.get_base_layer()\n",
            ),
            (
                "names-of-samples-dropped",
                "the adapters that samples name are dropped without a word",
                'if (names := kwargs.get("adapter_names")) is not None:',
                'if (names := kwargs.get("adapter_name")) is not None:',
            ),
        ],
    ),
    *mutants_of(
        FOLDER + "stock.py",
        "peft-method",
        (LORA,),
        [
            (
                "fold-without-the-old",
                "the fold leaves R_old out",
                "(R.to(acc) + R_old.to(acc)).mT",
                "R.to(acc).mT",
            ),
            (
                "fold-transposed",
                "the fold takes the routing the other way round",
                "R_old.to(acc)).mT)",
                "R_old.to(acc)))",
            ),
            (
                "fold-in-16-bit",
                "the fold is rounded more than once",
                "acc = accumulation_dtype(B.dtype)",
                "acc = B.dtype",
            ),
            (
                "scaling-unsaid",
                "the LoRA is not rank-stabilised as the adapter is",
                '"lora_alpha", "use_rslora",',
                '"lora_alpha",',
            ),
            (
                "layout-unsaid",
                "of Conv1D the config says that it is nn.Linear",
                "fan_in_fan_out=all(transposed)",
                "fan_in_fan_out=False",
            ),
            (
                "one-of-several",
                "of several active adapters the first passes for all",
                "if len(names) > 1:",
                "if not names:",
            ),
        ],
    ),
]
