"""Saving in the middle of a task and going on bit for bit; files that do not fit."""

from __future__ import annotations

import copy
import itertools
import re
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from methods import METHODS
from sequences import TARGETS, Net, batch, learn
from torch import Tensor, nn

from clora_kernels.continual import DAC, CLoRA, ContinualMethod, SequentialLoRA, load_run, save_run
from clora_kernels.continual.fingerprint import fingerprints


class Session:
    """A method in training with dropout, a head and a schedule."""

    def __init__(self, make: Any, base: Net) -> None:
        self.method = make(copy.deepcopy(base), dropout_p=0.25)
        self.head = nn.Linear(3, 3)

    def begin(self) -> None:
        self.method.begin_task()
        self.prepare()

    def prepare(self) -> None:
        self.optimizer = torch.optim.SGD(
            [*self.method.param_groups(0.1), {"params": list(self.head.parameters())}], lr=0.05, momentum=0.9
        )
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, 10)

    def train(self, numbers: range) -> None:
        for number in numbers:
            x, labels = batch(self.method.task, number)
            self.method.training_step(
                x, lambda x=x, y=labels: F.cross_entropy(self.head(self.method.model(x)), y), self.optimizer
            )
            self.schedule.step()

    def finish(self) -> dict[str, Tensor]:
        self.train(range(6, 10))
        self.method.end_task()
        self.begin()
        self.train(range(5))
        return {k: v.clone() for k, v in [*self.method.state_dict().items(), *self.head.state_dict().items()]}

    def objects(self) -> dict[str, Any]:
        return {"head": self.head, "optimizer": self.optimizer, "schedule": self.schedule}


OPTIONS = {
    "full basis": partial(CLoRA, targets=TARGETS, r=4, basis="full"),
    "raw basis": partial(CLoRA, targets=TARGETS, r=4, basis="raw"),
    "half the energy, no loss": partial(CLoRA, targets=TARGETS, r=4, energy=0.5, orthogonality=0.0),
    **{
        f"dac, {selection}, {weights}, {operation}, {remember}": partial(
            DAC, targets=TARGETS, r=4, k=3, keep=2, remember=remember, selection=selection, weights=weights,
            operation=operation,
        )
        for selection, weights, operation, remember in itertools.product(
            ("batch", "sample"), ("unit", "probability"), ("routed_lora", "rank1_experts"), ("all", "kept")
        )
    },
}  # fmt: skip


@pytest.mark.parametrize("name", [*METHODS, *OPTIONS])
def test_a_run_goes_on_bit_for_bit_from_the_middle_of_a_task(name: str, tmp_path) -> None:
    base, make = Net(), (METHODS | OPTIONS)[name]
    session = Session(make, base)
    session.begin()
    session.train(range(10))
    session.method.end_task()
    session.begin()
    session.train(range(6))
    path = save_run(tmp_path / "run.safetensors", session.method, **session.objects())
    expected = session.finish()

    resumed = Session(make, base)
    run = load_run(path, resumed.method)
    resumed.prepare()
    run.restore(**resumed.objects())
    assert (resumed.method.task, resumed.method.in_task) == (2, True)
    got = resumed.finish()
    assert got.keys() == expected.keys() and all(torch.equal(got[k], expected[k]) for k in expected)


def test_a_file_that_does_not_fit_is_refused(tmp_path) -> None:
    base = Net()
    method = METHODS["c-lora"](copy.deepcopy(base))
    learn(method, 1)
    path = save_run(tmp_path / "run.safetensors", method)
    with pytest.raises(ValueError, match=r"objects: got \['head'\], expected those of the file, \[\]"):
        load_run(path, method).restore(head=nn.Linear(1, 1))
    told = r"of a method with \{'method': 'CLoRA'\}, expected \{'method': 'SequentialLoRA'\}"
    with pytest.raises(ValueError, match=told):
        load_run(path, METHODS["lora"](Net()))
    with pytest.raises(ValueError, match=r"missing \[\], unexpected \['base.second', 'layers.second"):
        load_run(path, CLoRA(Net(), ["first"], r=4))
    with pytest.raises(ValueError, match=r"of a method with \{'r': 4\}, expected \{'r': 2\}"):
        load_run(path, CLoRA(Net(), TARGETS, r=2))
    load_run(path, CLoRA(base, TARGETS, r=4, backend="aten"))
    with pytest.raises(FileNotFoundError, match=r"path: got '.*nowhere', expected a file that save_run"):
        load_run(tmp_path / "nowhere", method)
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="without a run in it"):
        load_run(tmp_path / "other.safetensors", method)

    class Odd:
        def state_dict(self) -> dict[str, Any]:
            return {"a": [1, {"b": object()}]}

    with pytest.raises(TypeError, match="objects/odd/a/1/b: got object"):
        save_run(path, method, odd=Odd())
    load_run(path, method)


def test_a_state_that_does_not_fit_changes_nothing() -> None:
    method, other = METHODS["c-lora"](Net()), METHODS["c-lora"](Net())
    learn(method, 1)
    state = {k: v.clone() for k, v in method.state_dict().items()}
    last = [k for k in state if k.endswith("lora_B")][-1]
    state[last] = state[last][:1]
    before = {k: v.clone() for k, v in other.state_dict().items()}
    with pytest.raises(ValueError, match=r"state_dict\['lora_B'\]: got shape"):
        other.load_state_dict(state)
    after = other.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[k], before[k]) for k in before)


@pytest.mark.parametrize("content", [b"", b"garbage", b"\x10" + 40 * b"\0"], ids=["empty", "text", "cut"])
def test_a_file_of_garbage_is_told(content: bytes, tmp_path) -> None:
    path = tmp_path / "run.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"path: got '.*run\.safetensors', which cannot be read"):
        load_run(path, METHODS["c-lora"](Net()))


def refused(method: ContinualMethod, state: dict[str, Tensor], told: str) -> None:
    """The state is, and nothing changes."""
    before = {k: v.clone() for k, v in {**method.state_dict(), **method.model.state_dict()}.items()}
    with pytest.raises(ValueError, match=told):
        method.load_state_dict(state)
    after = {**method.state_dict(), **method.model.state_dict()}
    assert after.keys() == before.keys() and all(torch.equal(after[k], v) for k, v in before.items())


KEPT = {"slao": "merged.second.lora_B", "dac": "folded.2.second.activation_counts", "c-lora": "start.second.lora_B"}


@pytest.mark.parametrize(("name", "key"), [*KEPT.items(), ("c-lora", "basis"), ("slao", "merged.first.lora_A")])
def test_a_state_that_holds_not_what_the_method_keeps_changes_nothing(name: str, key: str) -> None:
    base = Net()
    method, other = METHODS[name](copy.deepcopy(base)), METHODS[name](base)
    learn(method, 2)
    method.begin_task()
    state, key = method.state_dict(), f"kept.{key}"
    what = rf"expected what {type(method).__name__} keeps after 2 finished tasks and within the next"
    refused(
        other, {k: v for k, v in state.items() if k != key}, rf"state: missing \['{key}'\], unexpected \[\], {what}"
    )
    refused(other, {**state, "kept.odd": torch.ones(1)}, rf"state: missing \[\], unexpected \['kept.odd'\], {what}")
    shape = tuple(state[key].shape)
    refused(
        other, {**state, key: torch.ones(3, 3, 3)}, rf"{key}: got shape \(3, 3, 3\), expected {re.escape(str(shape))}"
    )
    other.load_state_dict(state)
    method.end_task()
    ended = method.state_dict()
    refused(
        METHODS[name](other.inference_model()), {**ended, "kept.basis": torch.ones(2, 4, 4)}, "after 3 finished tasks$"
    )


@pytest.mark.parametrize("name", METHODS)
def test_a_model_of_other_weights_is_refused(name: str, tmp_path) -> None:
    base, others = Net(), Net()
    with torch.no_grad():
        others.first.weight.copy_(base.first.weight)
    method = METHODS[name](copy.deepcopy(base))
    learn(method, 1)
    other = METHODS[name](others)
    refused(
        other, method.state_dict(), "model: got another weight in second than the state was made with, expected the"
    )
    path = save_run(tmp_path / "run", method)
    with pytest.raises(ValueError, match="model: got another weight in second"):
        load_run(path, other)
    x, _ = batch(9, 9)
    for dtype in (torch.float32, torch.float64):  # which holds the same values
        same = METHODS[name](copy.deepcopy(base).to(dtype))
        load_run(path, same)
        torch.testing.assert_close(same.outputs(x.to(dtype))[0], method.outputs(x)[0], check_dtype=False)


def test_the_fingerprint_of_a_weight() -> None:
    """Of what values it has where, not of their dtype; of a thousand of them at most; none where there are none."""
    layer = nn.Linear(70, 100).bfloat16()
    (number,) = fingerprints({"a": layer}).values()
    assert number.dtype == torch.int64 and number.shape == ()
    for same in (copy.deepcopy(layer), copy.deepcopy(layer).double()):
        assert torch.equal(fingerprints({"a": same})["a"], number)
    assert fingerprints({"a": layer.float().half()})["a"] == number  # half holds these values of bf16
    for place in ((0, 0), (0, 69), (96, 0)):
        changed = copy.deepcopy(layer)
        with torch.no_grad():
            changed.weight[place] += 1
        assert fingerprints({"a": changed})["a"] != number
    turned = nn.Linear(100, 70)
    turned.weight = nn.Parameter(layer.weight.detach().mT)
    assert fingerprints({"a": turned})["a"] != number
    quantised, empty = nn.Module(), nn.Module()
    quantised.weight = nn.Parameter(torch.ones(3, 3, dtype=torch.uint8), requires_grad=False)
    empty.weight = nn.Parameter(torch.ones(0, 3))
    assert fingerprints({"a": nn.Linear(3, 3, device="meta"), "b": quantised, "c": nn.Identity()}) == {}
    assert fingerprints({"a": empty}).keys() == {"a"}


def test_the_settings_are_the_options_with_their_defaults() -> None:
    assert METHODS["lora of the first task"](Net()).settings == {
        "method": "SequentialLoRA", "train": "first_task", "r": 4, "scaling": 1.0, "dropout_p": 0.0,
    }  # fmt: skip
    copied = copy.deepcopy(METHODS["slao"](Net()))
    assert copied.settings == METHODS["slao"](Net()).settings


class ByPlace(SequentialLoRA):
    """A method with an option that may be given by its place."""

    def __init__(self, model: nn.Module, targets: Any, strength: float = 1.0, **layer: Any) -> None:
        super().__init__(model, targets, **layer)
        self.strength = strength


def test_an_option_given_by_its_place_is_among_the_settings(tmp_path) -> None:
    base = Net()
    by_place, by_name = (
        ByPlace(copy.deepcopy(base), "first|second", 5.0, r=2),
        ByPlace(base, TARGETS, strength=5.0, r=2),
    )
    assert by_place.settings == by_name.settings == {
        "method": "ByPlace", "strength": 5.0, "train": "always", "r": 2, "scaling": 1.0, "dropout_p": 0.0,
    }  # fmt: skip
    assert ByPlace(Net(), TARGETS).settings["strength"] == 1.0
    path = save_run(tmp_path / "run", by_place)
    with pytest.raises(ValueError, match=r"of a method with \{'strength': 5.0\}, expected \{'strength': 7.0\}"):
        load_run(path, ByPlace(Net(), TARGETS, 7.0, r=2))
    assert copy.deepcopy(by_place).settings == by_place.settings
