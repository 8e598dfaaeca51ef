"""Mutants of the check of indices."""

from .mutant import mutants_of

_FILE = "clora_kernels/dispatch/indices.py"
_TESTS = (
    "tests/test_rank1_experts_errors.py",
    "tests/test_routed_lora_errors.py",
    "tests/test_routed_lora_transforms.py",
    "tests/test_rank1_experts_transforms.py",
)

INDICES = mutants_of(
    _FILE,
    "indices",
    _TESTS,
    [
        ("negative-passes", "a negative index is not refused",
         "if least.item() >= 0 and most.item() < size:",
         "if most.item() < size:"),
        ("one-too-large-passes", "an index of the size of the pool is not refused",
         "most.item() < size:",
         "most.item() <= size:"),
        ("of-the-last", "the last wrong index is told",
         ".nonzero()[0].tolist()",
         ".nonzero()[-1].tolist()"),
        ("of-two-dimensions", "of an index of several dimensions the first alone is told",
         ".nonzero()[0].tolist()",
         ".nonzero()[0].tolist()[:1]"),
        ("too-large-at-no-place", "the place is that of a negative index alone",
         "((index < 0) | (index >= size))",
         "(index < 0)"),
        ("wrapped-asked", "an index under vmap is asked for its values",
         "    while torch._C._functorch.is_functorch_wrapped_tensor(index):  #",
         "    while index is None:  #"),
        ("wrapped-once", "an index under two vmaps is asked for values that it has not",
         "    while torch._C._functorch.is_functorch_wrapped_tensor(index):  #",
         "    if torch._C._functorch.is_functorch_wrapped_tensor(index):  #"),
        ("wrapped-unasked", "an index under vmap is not checked",
         "        index = torch._C._functorch.get_unwrapped(index)\n",
         "        return\n"),
        ("tracers-asked", "an index without values is asked for them",
         "type(index) not in PLAIN_TYPES or ",
         ""),
        ("modes-asked", "an index is asked for its values while it is traced",
         " or torch._C._len_torch_dispatch_stack()",
         ""),
        ("empty-asked", "an empty index is asked for its least",
         " or not index.numel()",
         ""),
    ],
) + mutants_of(
    _FILE,
    "indices-cuda",
    _TESTS,
    [
        ("unbounded", "an index that is not checked reads outside",
         "index.clamp(0, size - 1)",
         "index"),
        ("bounded-below-alone", "an index that is not checked reads beyond the end",
         "index.clamp(0, size - 1)",
         "index.clamp(0)"),
        ("checked-always", "the check waits for the device on every call",
         'os.environ.get("CLORA_CHECK_INDICES") != "1"',
         'os.environ.get("CLORA_CHECK_INDICES") == "0"'),
    ],
    gpu=True,
)  # fmt: skip
