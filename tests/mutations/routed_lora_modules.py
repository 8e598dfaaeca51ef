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
            "one = torch.eye(self.r,",
            "one = torch.ones(self.r, self.r,",
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
            "for start in range(0, self.out_features, MERGE_ROWS):",
            "for start in range(0, min(self.out_features, MERGE_ROWS), MERGE_ROWS):",
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
            "moved = fn(self._unmerged.data)",
            "moved = self._unmerged.data",
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

_STATE_TESTS = ("tests/test_routed_lora_layer_state.py", *_TESTS)

_STATE = [
    *mutants_of(
        "clora_kernels/modules/adapter.py",
        "adapter",
        ("tests/test_inject_places.py", *_STATE_TESTS),
        [
            ("8-bit", "a weight of 8 bits passes for one that can be adapted",
             "    if weight.dtype not in DTYPES:\n", "    if not weight.is_floating_point():\n"),
            ("dtype-unchecked", "a layer is made in any dtype",
             "if dtype is not None and dtype not in DTYPES:", "if dtype is not None and not dtype:"),
            ("meta-not-reset", "reset_parameters leaves the adapter as it is",
             "if self._adapter_tensors():  #", "if self._adapter_tensors() and False:  #"),
            ("parametrized-merged", "a parametrized weight passes for one that can be merged",
             'if "weight" not in self._parameters:', 'if "weight" not in dir(self):'),
            ("merged-in-inference-mode", "a weight merged in inference mode serves no training later",
             "with torch.inference_mode(False):", "with torch.no_grad():"),
            ("merged-frozen", "a weight that learns is frozen by a merge",
             "nn.Parameter(torch.empty_like(original), original.requires_grad)",
             "nn.Parameter(torch.empty_like(original), False)"),
            ("flag-forgotten", "a flag set on a merged weight is forgotten",
             "self.weight = original.requires_grad_(self.weight.requires_grad)", "self.weight = original"),
            ("meta-hidden", "a checkpoint of the plain layer hides an adapter without values",
             " and not any(t.is_meta for t in self.adapter_state_dict().values())", ""),
            ("backup-keeps-its-dtype", "a backup on the CPU keeps the dtype that the layer left",
             "self._keep(self._unmerged.to(self.weight.dtype))", "self._keep(self._unmerged)"),
            ("any-state", "what is no mapping is taken for a state",
             "if not isinstance(state_dict, Mapping):", "if state_dict is None:"),
            ("folds-a-bank", "fold asks nothing of the adapter",
             "        self.check_mergeable()\n        if self._merged and self._unmerged is None:\n",
             "        if self._merged and self._unmerged is None:\n"),
        ],
    ),
    *mutants_of(
        "clora_kernels/modules/routed_lora/layer.py",
        "layer",
        _STATE_TESTS,
        [
            ("path-of-many-rows", "the repr knows large batches alone", "for i in range(31)]", "for i in (30,)]"),
            ("path-of-training", "the repr asks for calls that drop in eval mode",
             "if self.training and self.dropout_p else None", "if self.dropout_p else None"),
            ("rank-as-it-came", "the rank keeps the type that it came in",
             "operator.index(r), dropout_p", "r, dropout_p"),
            ("rank-of-a-float", "a rank that is a float is not told",
             'or not hasattr(r, "__index__") or r < 1:', "or r < 1:"),
            ("rank-of-true", "True is a rank of 1", "if isinstance(r, bool) or not", "if not"),
            ("repr-says-available", "the repr names a backend that cannot run",
             'return f"{self.backend} (unavailable)"', "return self.backend"),
            ("mergeable-if-parametrized", "the layer asks only for a bank before a merge",
             "        super().check_mergeable()\n", ""),
        ],
    ),
    *mutants_of(
        "clora_kernels/modules/routed_lora/fused.py",
        "fused",
        _STATE_TESTS,
        [
            ("mergeable-if-parametrized", "a fused layer asks nothing before a merge",
             "        AdapterLinear.check_mergeable(self)\n", ""),
            ("edges-as-they-came", "edges of slices need not be ints",
             "(operator.index(start), operator.index(stop))", "(start, stop)"),
            ("edges-untold", "what is no pair is not told", "except (TypeError, ValueError):", "except KeyError:"),
            ("empty-slices", "a slice may be empty", " or any(a == b for a, b in pairs)", ""),
            ("overlap", "slices may overlap", "any(a > b for a, b in itertools.pairwise(edges))", "False"),
            ("beyond", "a slice may end beyond the layer", " and edges[-1] <= out_features", ""),
        ],
    ),
]  # fmt: skip

MODULES = [*_LAYER, *_ADAPTER, *_STATE]
