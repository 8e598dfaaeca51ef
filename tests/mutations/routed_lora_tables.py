"""Mutants of the tables of tiles, and of what `auto` makes of them."""

from .mutant import mutants_of

_KERNELS = "clora_kernels/kernels/routed_lora"
_TABLES = ("tests/test_routed_lora_tables.py",)
_TUNING = ("tests/test_routed_lora_tables.py", "tests/test_routed_lora_auto.py", "tests/test_routed_lora_tune.py")

_TILES = mutants_of(
    f"{_KERNELS}/tiles.py",
    "tiles",
    (*_TABLES, "tests/test_routed_lora_triton_parts.py"),
    [
        ("rank-unpadded", "a rank is a block of its own", "1 << (r - 1).bit_length()), most)", "r), most)"),
        (
            "table-unread",
            "every call runs with the default",
            "if found is None else found.tile",
            "if True else found.tile",
        ),
        ("bucket-shifted", "a bucket ends one row early", "(M - 1).bit_length() - 4", "M.bit_length() - 4"),
        ("bucket-endless", "no bucket is the last", "- 4, 0), 10) if", "- 4, 0), 99) if"),
        ("bucket-of-other-rows", "a bucket begins a row early", "(8 << bucket) + 1), 16", "8 << bucket), 16"),
        (
            "rank-padded-twice",
            "a power of two is padded to the next",
            "1 << (r - 1).bit_length()",
            "1 << r.bit_length()",
        ),
    ],
)

_CANDIDATES = mutants_of(
    f"{_KERNELS}/candidates.py",
    "candidates",
    ("tests/test_routed_lora_tune.py",),
    [
        ("default-left-out", "the default is no candidate", "dict.fromkeys([first, *others])", "dict.fromkeys(others)"),
        (
            "twice",
            "a tile may be tried twice",
            "return list(dict.fromkeys([first, *others]))",
            "return [first, *others] * 2",
        ),
        (
            "of-another-op",
            "reduce is tried with the tiles of shrink",
            "else _reduce(key, first)",
            "else _shrink(key, first)",
        ),
        ("none-but-the-default", "nothing is tried", "[first, *others]))", "[first]))"),
    ],
)

_RECORDS = mutants_of(
    f"{_KERNELS}/records.py",
    "records",
    _TABLES,
    [
        ("types-unchecked", "a value may be of any type", "if type(value) is not what:", "if value is None:"),
        ("bool-for-int", "1 passes for true", "if type(value) is not what:", "if not isinstance(value, (what, int)):"),
        ("names-unchecked", "a record may hold what it will", "or {*value} != what:", "or not value:"),
        ("lengths-unchecked", "two of three figures pass", "and len(of) != len(entries):", "and not entries:"),
        (
            "entries-unchecked",
            "what a dict holds is not looked at",
            "{k: parsed(get_args(kind)[1], v, f",
            "{k: str(v) or (v, f",
        ),
    ],
)

_OF_TABLES = mutants_of(
    f"{_KERNELS}/tables.py",
    "tables",
    _TUNING,
    [
        (
            "format-unchecked",
            "a table of a later format is read",
            'content["format"] != FORMAT',
            'content["format"] is None',
        ),
        (
            "stamp-unchecked",
            "a table of another GPU is used",
            "problem = file.problem or file",
            "problem = file.problem and file",
        ),
        (
            "unreadable-in-silence",
            "nobody is warned",
            "        if file.problem:\n            message",
            "        if file.problem is None:\n            message",
        ),
        (
            "unreadable-is-a-crash",
            "a broken file stops the call",
            "except (ValueError, OSError) as error:\n                found",
            "except KeyError as error:\n                found",
        ),
        ("tiles-unread", "tiles are not taken from the file", "        table.tiles |= file.table.tiles\n", ""),
        ("calls-unread", "verdicts are not taken from the file", "        table.calls |= file.table.calls\n", ""),
        (
            "shipped-goes-first",
            "what ships goes before what the user measured",
            '(Path(__file__).parent / "shipped", user_folder())',
            '(user_folder(), Path(__file__).parent / "shipped")',
        ),
        (
            "read-every-time",
            "files are read at every call",
            "table = _LOADED[device] = _load(device)",
            "table = _load(device)",
        ),
        (
            "read-on-a-cpu",
            "a CPU without the interpreter reads files",
            'os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")',
            "True",
        ),
        (
            "blocks-of-any-size",
            "a block of 24 or 2048 is taken",
            "<= value <= 1024 and not (power and value & (value - 1))",
            "<= value",
        ),
        ("blocks-of-any-power", "a block of 8 is taken", "(16 if block else 1) <= value", "1 <= value"),
        ("op-unchecked", "an unknown op is taken", "if key.op not in _TILES:", "if not key.op:"),
        (
            "written-in-place",
            "a table is broken where writing it fails",
            "        part.write_text(",
            "        path.write_text('')\n        part.write_text(",
        ),
        (
            "forward-may-lose",
            "triton wins though forward is slower",
            "and ratio.forward[0] <= 1",
            "and ratio.forward[0] <= 9",
        ),
        ("within-the-spread", "triton wins within the spread", "ratio.both[2] < 1", "ratio.both[0] < 1"),
        ("at-one-end", "triton wins if it does at one end of the bucket", "cls(all(", "cls(any("),
        (
            "dropout-forgotten",
            "dropout is no call of its own",
            "dropout |= j.threshold is not None",
            "dropout |= j.base_output is not None",
        ),
        (
            "frozen-forgotten",
            "a frozen routing is no call of its own",
            "frozen |= j.frozen_routing is not None",
            "frozen |= j.seed is not None",
        ),
        (
            "bank-forgotten",
            "a bank is no call of its own",
            "bank |= j.routing_index is not None",
            "bank |= j.seed is not None",
        ),
        (
            "layout-forgotten",
            "a transposed weight is no call of its own",
            "and j.weight.stride(1) != 1",
            "and j.weight.stride(1) < 1",
        ),
        (
            "delta-forgotten",
            "the adapter alone is no call of its own",
            "delta |= j.weight is None",
            "delta |= j.lora_A is None",
        ),
        (
            "first-rank-counts",
            "a group has the rank of its first layer",
            "r = max(r, j.lora_A.shape[0])",
            "r = r or j.lora_A.shape[0]",
        ),
        ("rows-unbucketed", "M is a key", "block_of_rank(r), bucket(M), options", "block_of_rank(r), M, options"),
        ("tf32-forgotten", "what was measured without tf32 counts with it", 'name = "tf32"', 'name = "fp32"'),
        ("verdict-of-dtype", "a dtype that no kernel takes is one", 'NAMES.get(dtype, "")', 'NAMES.get(dtype, "fp32")'),
    ],
)

_DISPATCH = (
    mutants_of(
        "clora_kernels/dispatch/routed_lora.py",
        "auto",
        _TUNING,
        [
            ("never-triton", "auto never takes triton", "        if wins:\n", "        if wins is None:\n"),
            (
                "always-triton",
                "a table that knows the call is one for triton",
                "return verdict.wins and not",
                "return True and not",
            ),
            (
                "triton-that-cannot-run",
                "triton is taken where it cannot run",
                "return verdict.wins and not why_not_triton(x.dtype, x.device.type, x.device.index), ",
                "return verdict.wins, ",
            ),
            (
                "silence-untold",
                "nobody is told why the table is not used",
                "        why = table.silence\n",
                '        why = ""\n',
            ),
            (
                "reason-untold",
                "nobody is told what the table says",
                "x.device.index), verdict.reason",
                "x.device.index), table.silence",
            ),
        ],
    )
    + mutants_of(
        "clora_kernels/autograd/routed_lora/calls.py",
        "auto",
        _TUNING,
        [
            (
                "chosen-before-the-draw",
                "auto does not see dropout",
                "chosen = decide(x, projections)\n",
                "chosen = decide(x, [j._replace(threshold=None) for j in projections])\n",
            ),
        ],
    )
    + mutants_of(
        "clora_kernels/autograd/routed_lora/functions.py",
        "auto",
        _TUNING,
        [
            (
                "explained-without-dropout",
                "an explanation does not see dropout",
                '[draw(j, a, arguments["training"], x) for j, a in zip(projections, replayed, strict=True)]',
                "projections",
            ),
            (
                "explained-as-training",
                "an explanation takes every call for training",
                'draw(j, a, arguments["training"], x)',
                "draw(j, a, True, x)",
            ),
            (
                "explanation-draws",
                "an explanation draws a seed",
                "zip(projections, replayed, strict=True)",
                "zip(projections, adapters, strict=True)",
            ),
        ],
    )
)

TABLES = [*_TILES, *_CANDIDATES, *_RECORDS, *_OF_TABLES, *_DISPATCH]
