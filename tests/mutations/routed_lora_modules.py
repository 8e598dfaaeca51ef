"""Mutants of the layer with a routed LoRA, of its merging and of its state."""

from .mutant import mutants_of

_TESTS = ("tests/test_routed_lora_layer.py", "tests/test_routed_lora_fused.py", "tests/test_inject.py")

_LAYER = mutants_of(
    "clora_kernels/modules/routed_lora/layer.py",
    "layer",
    _TESTS,
    [
        ("B-not-zero", "lora_B does not start at zero", "self.lora_B.zero_()", "self.lora_B.fill_(0.01)"),
        (
            "R-not-identity",
            "routing does not start at the identity",
            "self.routing.copy_(torch.eye(self.r,",
            "self.routing.copy_(torch.ones(self.r, self.r,",
        ),
        (
            "frozen-not-zero",
            "frozen_routing keeps what it held",
            "self.frozen_routing.zero_()",
            "self.frozen_routing.abs_()",
        ),
        (
            "A-constant",
            "lora_A starts at one value",
            "nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))",
            "nn.init.constant_(self.lora_A, 0.01)",
        ),
        (
            "merged-in-training",
            "a merged layer trains without its adapter",
            "        if self.training:\n",
            "        if self.training and gate is not None:\n",
        ),
        (
            "merged-drops-the-gate",
            "a merged layer ignores a gate",
            "        if gate is not None or routing_index is not None:\n",
            "        if routing_index is not None:\n",
        ),
        (
            "gate-not-passed",
            "the gate does not reach the function",
            '            "gate": gate,\n',
            '            "gate": None,\n',
        ),
        (
            "index-not-passed",
            "the index does not reach the function",
            '            "routing_index": routing_index,\n',
            '            "routing_index": None if routing_index is None else routing_index * 0,\n',
        ),
        (
            "seed-not-passed",
            "the seed does not reach the function",
            '            "dropout_seed": dropout_seed,\n',
            '            "dropout_seed": None,\n',
        ),
        (
            "training-not-passed",
            "the layer drops in evaluation",
            '            "training": self.training,\n',
            '            "training": True,\n',
        ),
        (
            "bias-not-passed",
            "the layer forgets its bias",
            '            "bias": self.bias,\n',
            '            "bias": None,\n',
        ),
        (
            "merged-rows-of-B",
            "every block of a merged weight takes the first rows of lora_B",
            "lora_B[rows], routing,",
            "lora_B[: rows.stop - rows.start][: weight.shape[0]], routing,",
        ),
        (
            "merged-without-frozen",
            "the frozen routing is not merged",
            "routing, frozen_routing=frozen_routing, scaling=self.scaling",
            "routing, frozen_routing=None, scaling=self.scaling",
        ),
        (
            "merged-without-scaling",
            "the scaling is not merged",
            "frozen_routing=frozen_routing, scaling=self.scaling",
            "frozen_routing=frozen_routing, scaling=1.0",
        ),
        (
            "to-lora-transposed",
            "the transposed routing goes into lora_B",
            "return self.lora_B.to(total.dtype) @ total.mT",
            "return self.lora_B.to(total.dtype) @ total",
        ),
        (
            "to-lora-without-frozen",
            "the frozen routing does not go into lora_B",
            "else self.routing.to(acc) + self.frozen_routing",
            "else self.routing.to(acc) + 0 * self.frozen_routing",
        ),
        (
            "to-lora-keeps-routing",
            "the routing stays beside the lora_B it went into",
            "        self.lora_B.copy_(self._folded_B())\n        self.routing = None\n",
            "        self.lora_B.copy_(self._folded_B())\n",
        ),
        (
            "to-lora-rounds-the-sum",
            "a 16-bit adapter's routings are rounded before they go into lora_B",
            "acc = accumulation_dtype(self.lora_B.dtype)",
            "acc = self.lora_B.dtype",
        ),
        (
            "repr-of-a-scaling-that-learns",
            "the repr of a layer warns of a scaling that learns",
            "float(self.scaling.item() if isinstance(self.scaling, Tensor) else self.scaling)",
            "float(self.scaling)",
        ),
    ],
)

_ADAPTER = mutants_of(
    "clora_kernels/modules/adapter.py",
    "adapter",
    _TESTS,
    [
        (
            "merge-of-a-merge",
            "merging again starts from the merged weight",
            "        if self._merged:\n            self.unmerge()\n        original = self.weight\n",
            "        original = self.weight\n",
        ),
        (
            "backup-aliases",
            "the backup on the CPU is the weight itself",
            'original.detach().to("cpu", copy=True) if',
            'original.detach().to("cpu") if',
        ),
        (
            "tied-weight-overwritten",
            "merging with a backup on the device overwrites tensors tied to the weight",
            "self.weight = nn.Parameter(torch.empty_like(original), original.requires_grad)",
            "original, self.weight = nn.Parameter(original.clone(), original.requires_grad), original",
        ),
        (
            "unmerge-forgets",
            "an unmerged layer takes itself for merged",
            "        self._keep(None)\n        self._merged = False\n\n    @torch.no_grad()\n    def fold",
            "        self._keep(None)\n\n    @torch.no_grad()\n    def fold",
        ),
        (
            "fold-keeps-the-adapter",
            "fold leaves the adapter beside the weight it went into",
            "        self._write_merged(self.weight, into=self.weight)\n        self.reset_adapter()\n",
            "        self._write_merged(self.weight, into=self.weight)\n",
        ),
        (
            "conv1d-merged-transposed",
            "the weight of Conv1D is merged the wrong way round",
            "(into.mT, original.mT) if self.fan_in_fan_out else",
            "(into.mT, original.mT) if not self.fan_in_fan_out else",
        ),
        (
            "merge-first-rows",
            "only the first block of rows is merged",
            "for start in range(0, self.out_features, _MERGE_ROWS):",
            "for start in range(0, min(self.out_features, _MERGE_ROWS), _MERGE_ROWS):",
        ),
        (
            "state-dict-merged",
            "state_dict of a merged layer holds the merged weight",
            'destination[prefix + "weight"] = original if keep_vars else original.detach()',
            "pass",
        ),
        (
            "load-over-merged",
            "a checkpoint loads over the merged weight",
            "            error_msgs.append(f\"{prefix[:-1] or 'layer'} is merged: call unmerge() before loading\")\n"
            "            return\n",
            "            pass\n",
        ),
        (
            "plain-checkpoint-refused",
            "a checkpoint of the plain layer is missing the adapter",
            "        if not adapter & state_dict.keys() and not",
            "        if not adapter and not",
        ),
        (
            "half-an-adapter-loads",
            "a checkpoint with a part of the adapter loads",
            "        if not adapter & state_dict.keys() and not",
            "        if not",
        ),
        (
            "adapter-loads-in-part",
            "missing names of an adapter are not told",
            "        if missing or unexpected:\n            raise",
            "        if unexpected:\n            raise",
        ),
        (
            "backup-stays-behind",
            "the backup does not move with the layer",
            "self._unmerged.data = fn(self._unmerged.data)",
            "self._unmerged.data = self._unmerged.data",
        ),
        (
            "backup-a-parameter",
            "the backup shows up among the parameters",
            'object.__setattr__(self, "_unmerged", original)',
            "self._unmerged = original",
        ),
        (
            "adapter-in-16-bit",
            "the adapter of a 16-bit weight is 16-bit",
            "return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype",
            "return dtype",
        ),
    ],
)

_MERGEABLE, _RESTORABLE = "        layer.check_mergeable()\n", "        layer.check_restorable()\n"
_EACH = "    for layer in layers.values():\n"

_INJECT = mutants_of(
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

MODULES = [*_LAYER, *_ADAPTER, *_INJECT]
