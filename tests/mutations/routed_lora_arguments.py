"""Mutants of the checks of arguments and of the merged weight."""

from .mutant import mutants_of

_ARGUMENTS = mutants_of(
    "clora_kernels/autograd/routed_lora/arguments.py",
    "arguments",
    ("tests/test_routed_lora_errors.py", "tests/test_routed_lora_dropout.py", "tests/test_routed_lora_options.py"),
    [
        (
            "layout-unchecked",
            "a sparse tensor is not refused",
            "    if t.layout is not torch.strided:",
            "    if False:",
        ),
        (
            "layout-at-a-glance",
            "a sparse lora_A passes at a glance",
            "        and lora_A.layout is lora_B.layout is weight.layout is torch.strided\n",
            "        and lora_B.layout is weight.layout is torch.strided\n",
        ),
        (
            "layout-of-the-bias",
            "a sparse bias passes at a glance",
            "                and bias.layout is torch.strided\n",
            "",
        ),
        ("rank-0-passes", "rank 0 is not refused", "if r == 0:", "if r < 0:"),
        (
            "in-features-unchecked",
            "lora_A with another number of columns is not refused",
            "if j.lora_A.dim() != 2 or j.lora_A.shape[1] != K:",
            "if j.lora_A.dim() != 2:",
        ),
        (
            "rank-of-B-unchecked",
            "lora_B of another rank is not refused",
            "if j.lora_B.dim() != 2 or j.lora_B.shape[1] != r or (",
            "if j.lora_B.dim() != 2 or (",
        ),
        (
            "weight-dtype-unchecked",
            "a weight in another dtype is not refused",
            "if weight.dtype != x.dtype:",
            "if weight.dtype is None:",
        ),
        (
            "frozen-with-gradient-passes",
            "a frozen routing that requires a gradient is not refused",
            "if j.frozen_routing.requires_grad:",
            "if j.frozen_routing.is_sparse:",
        ),
        (
            "frozen-without-routing-passes",
            "a frozen routing without a routing is not refused",
            'for name in ("frozen_routing", "routing_index"):',
            'for name in ("routing_index",):',
        ),
        (
            "index-without-bank-passes",
            "an index without a bank is not refused",
            "if (j.routing.dim() == 3) != (j.routing_index is not None):",
            "if j.routing.dim() == 3 and j.routing_index is None:",
        ),
        (
            "index-dtype-unchecked",
            "an index of another dtype is not refused",
            "if j.routing_index.dtype not in (torch.int64, torch.int32):",
            "if j.routing_index.dtype is None:",
        ),
        (
            "gate-unchecked",
            "a gate that does not broadcast is not refused",
            "any(mine not in (1, theirs) for mine, theirs in trailing)",
            "any(mine < 1 for mine, theirs in trailing)",
        ),
        (
            "scaling-shape-unchecked",
            "a scaling with dimensions is not refused",
            "if scaling.dim() != 0 or scaling.dtype not in DTYPES:",
            "if scaling.dtype not in DTYPES:",
        ),
        (
            "probability-unchecked",
            "a dropout_p above 1 is not refused",
            "if not 0 <= dropout_p <= 1:",
            "if not 0 <= dropout_p:",
        ),
        (
            "seed-dtype-unchecked",
            "a seed of another dtype is not refused",
            "if dropout_seed.dtype != torch.int64 or dropout_seed.dim() != 0:",
            "if dropout_seed.dim() != 0:",
        ),
        (
            "one-seed-for-all",
            "every call draws the same mask",
            "return torch.randint(_SEEDS.min, _SEEDS.max, (),",
            "return torch.full((), _SEEDS.min,",
        ),
        ("threshold-cut", "the threshold is cut off, not rounded", "* 65536).round().to(", "* 65536).to("),
        (
            "device-unchecked",
            "tensors on another device are not refused",
            "if device is not None and t.device != device:",
            "if device is not None and t.device is None:",
        ),
    ],
)

_MERGE = mutants_of(
    "clora_kernels/autograd/routed_lora/merge.py",
    "merge",
    ("tests/test_routed_lora_merge.py", "tests/test_routed_lora_errors.py", "tests/test_routed_lora_layer.py"),
    [
        ("R-transposed", "the transposed routing is merged", "small = small @ total.mT", "small = small @ total"),
        (
            "frozen-forgotten",
            "the frozen routing is not merged",
            "else routing.to(acc) + frozen_routing.to(acc)",
            "else routing.to(acc) + 0 * frozen_routing.to(acc)",
        ),
        ("gate-forgotten", "the gate is not merged", "small = small * gate.to(acc)", "small = small * 1"),
        (
            "scale-skipped",
            "the scaling is not merged",
            "(small * s) @ lora_A.to(acc)",
            "small @ lora_A.to(acc)",
        ),
        (
            "rounded-twice",
            "the adapter is rounded before it is merged",
            "(weight.to(acc) + (small * s) @ lora_A.to(acc)).to(weight.dtype)",
            "weight + ((small * s) @ lora_A.to(acc)).to(weight.dtype)",
        ),
        (
            "weight-overwritten",
            "the caller's weight is changed",
            "return (weight.to(acc) + (small * s) @ lora_A.to(acc)).to(weight.dtype)",
            "return weight.data.copy_(weight.to(acc) + (small * s) @ lora_A.to(acc))",
        ),
        (
            "bank-passes",
            "a bank is not refused",
            "if isinstance(routing, Tensor) and routing.dim() == 3:",
            "if isinstance(routing, Tensor) and routing.dim() == 4:",
        ),
        (
            "gate-by-sample-passes",
            "a gate that differs by sample is not refused",
            'check_shape("gate", gate, (lora_A.shape[0],),',
            'check_shape("gate", gate, tuple(gate.shape),',
        ),
        (
            "autocast-inside",
            "under autocast the fp32 sums are cast down",
            "with without_autocast(weight):",
            "if True:",
        ),
    ],
)

ARGUMENTS = [*_ARGUMENTS, *_MERGE]
