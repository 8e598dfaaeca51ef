"""The examples on digits with short trainings and few samples: fixtures of the tests of them."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


@pytest.fixture(scope="module")
def examples():
    """The example's modules, with short trainings."""
    sys.path.insert(0, str(EXAMPLES))
    patch = pytest.MonkeyPatch()
    patch.setenv("TORCH_CPP_LOG_LEVEL", "ERROR")
    patch.setenv("KINETO_LOG_LEVEL", "99")
    try:
        import compare_on_digits
        import digits

        for scenario in digits.SCENARIOS:
            patch.setitem(digits.PRETRAINING_EPOCHS, scenario, 1)
            patch.setitem(digits.EPOCHS, scenario, 1)
        yield compare_on_digits, digits
    finally:
        patch.undo()
        sys.path.remove(str(EXAMPLES))


@pytest.fixture(scope="module")
def streams(examples):
    return {scenario: examples[1].make_stream(0, scenario) for scenario in examples[1].SCENARIOS}


@pytest.fixture(scope="module")
def shorts(examples, streams):
    """The streams with a few of their samples."""

    def cut(stream, step):
        tasks = {
            k: [examples[1].Samples(*(t[::step] for t in s)) for s in getattr(stream, k)] for k in ("train", "test")
        }
        return dataclasses.replace(stream, **tasks)

    return {"classes": cut(streams["classes"], 5), "domains": cut(streams["domains"], 25)}
