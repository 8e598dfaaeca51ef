"""Mutants of the command that makes tables of tiles."""

from .mutant import mutants_of

_TESTS = ("tests/test_routed_lora_tune.py", "tests/test_routed_lora_auto.py")

TUNE = (
    mutants_of(
        "clora_kernels/tune/search.py",
        "tune",
        _TESTS,
        [
            (
                "candidates-unproved",
                "a wrong candidate is timed",
                '        except AssertionError as error:\n            return f"REFUSED',
                '        except KeyError as error:\n            return f"REFUSED',
            ),
            (
                "proof-after-the-tile",
                "the default is proved in the place of the candidate",
                "            self.table.tiles[key] = Tuned(tile, 0.0, 0.0)\n            if why",
                "            self.table.tiles.pop(key, None)\n            if why",
            ),
            ("triton-unproved", "a wrong triton is timed", 'if not self._is_right(problem, "triton") or not', "if not"),
            ("aten-unproved", "a wrong ATen is timed", ' or not self._is_right(problem, "aten"):', ":"),
            ("wrong-and-all-is-well", "a wrong backend is no failure", "            self.refused += 1\n", ""),
            (
                "spills-unseen",
                "a candidate that spills is timed",
                "if spilled > MOST_SPILLED else",
                "if spilled > 999 else",
            ),
            (
                "spills-of-before",
                "a candidate is charged with what others spill",
                "if kernel not in before)",
                "if kernel)",
            ),
            ("slowest-kept", "the slowest tile is kept", "fastest = min(right,", "fastest = max(right,"),
            (
                "within-the-spread",
                "the default gives way within the spread",
                '["forward"].p80 >= 1:',
                '["forward"].median >= 1:',
            ),
            (
                "trial-kept",
                "an interrupted trial stays in the table",
                "            keep = found or before\n",
                "            keep = self.table.tiles.get(key)\n",
            ),
            (
                "tiles-unsaved",
                "tiles are not saved as they are found",
                "        if found:\n            self.table.save(self.folder)\n",
                "",
            ),
            (
                "verdict-unsaved",
                "verdicts are not saved",
                "        self.table.calls[call] = verdict\n        self.table.save(self.folder)",
                "        self.table.calls[call] = verdict",
            ),
            (
                "one-end",
                "one end of the bucket is timed",
                "for rows in rows_of(call.bucket):",
                "for rows in rows_of(call.bucket)[1:]:",
            ),
            (
                "measured-twice",
                "what is done is measured again",
                "set() if again else {*table.tiles, *table.calls}",
                "set()",
            ),
            ("again-ignored", "--again measures nothing", "set() if again else {", "{"),
            (
                "endless",
                "the time limit is not kept",
                "if time.monotonic() > self.deadline:",
                "if time.monotonic() < 0:",
            ),
            (
                "launches-of-all",
                "a key is charged with every launch before it",
                "            noting.keys_asked.clear()\n",
                "",
            ),
            (
                "recording-stays",
                "the table goes on noting what it is asked",
                "        table.tiles = tiles\n",
                "        pass\n",
            ),
        ],
    )
    + mutants_of(
        "clora_kernels/tune/problem.py",
        "tune-problem",
        _TESTS,
        [
            (
                "unpoisoned",
                "memory that was never written is not filled with NaN",
                "        with poisoned_empty():\n            forward",
                "        with torch.enable_grad():\n            forward",
            ),
            ("parity-unchecked", "parity is not asked", "        self._expected.check(results)\n", ""),
            (
                "fidelity-unchecked",
                "fidelity is not asked",
                "            assert_fidelity(y, x, None, base_output=base, **adapter)",
                "            adapter.clear()",
            ),
            (
                "fidelity-of-the-large",
                "fidelity is asked of an adapter that nothing loses",
                '"scaling": SCALING * self._small(layer, rows)',
                '"scaling": SCALING',
            ),
            (
                "rows-that-divide",
                "the proof takes rows that blocks divide",
                "        rows = self.M - 1\n        with",
                "        rows = self.M\n        with",
            ),
            (
                "dx-of-one-layer",
                "the reference of dx is that of the last layer",
                "            dx += gradients.x\n",
                "            dx = gradients.x\n",
            ),
        ],
    )
    + mutants_of(
        "clora_kernels/tune/command.py",
        "tune-command",
        _TESTS,
        [
            (
                "spoiled-is-overwritten",
                "a file that is no table is overwritten",
                "read(path) if path.exists() else Table(stamp)",
                "Table(stamp)",
            ),
            (
                "no-rank-is-too-large",
                "a rank above 256 is taken",
                "(r := positive(text)) > MOST_RANKS",
                "(r := positive(text)) > 999",
            ),
            (
                "nothing-is-a-size",
                "a size of 0 is taken",
                "if (number := int(text)) < 1:",
                "if (number := int(text)) < 0:",
            ),
            (
                "interruption-is-success",
                "an interrupted run ends with status 0",
                "        return INTERRUPTED\n",
                "        return 0\n",
            ),
            (
                "failure-is-success",
                "a refused backend ends with status 0",
                "    return int(search.refused > 0)\n",
                "    return 0\n",
            ),
            (
                "planned-twice",
                "calls that are padded alike are measured twice",
                "                            seen.add(call)\n",
                "",
            ),
            (
                "small-first",
                "the least valuable call comes first",
                "rows = options.rows or (ROWS[3:4] if on_cpu else ROWS)",
                "rows = options.rows or (ROWS[3:4] if on_cpu else ROWS[::-1])",
            ),
        ],
    )
)
