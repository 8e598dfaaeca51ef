"""Trainer's checkpoints: a task goes on from them bit for bit, folded weights and all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from trainers import LR, MODELS, Classifier, arguments, clora, data, folding, trainer

from clora_kernels.continual import load_run
from clora_kernels.integrations.transformers import FILE, ContinualCallback


def start_second(make: Any, kind: str, base: nn.Module, folder: Path, **changed) -> tuple[Any, Any, list]:
    """A method that has learned one task, ready for the second, and the values its listeners hear from then on."""
    torch.manual_seed(1)
    method, heard = make(kind, base), []
    method.begin_task()
    trainer(method, ContinualCallback(method), data(kind, 1), arguments(folder)).train()
    method.begin_task()
    method.listeners.append(lambda *what: heard.append(what))
    return method, *second(method, kind, folder, heard, **changed)


def second(method: Any, kind: str, folder: Path, heard: list, optimizer: Any = None, **changed) -> tuple[Any, list]:
    args = arguments(
        folder, num_train_epochs=2, gradient_accumulation_steps=2, save_strategy="steps", save_steps=2,
        train_sampling_strategy="random", **changed,
    )  # fmt: skip
    return trainer(method, ContinualCallback(method), data(kind, 2), args, optimizer), heard


@pytest.mark.parametrize(
    ("kind", "make", "loaded_first"),
    [
        ("llama", clora, False),
        ("llama", folding, True),
        ("mapping", clora, False),
        ("mapping", clora, True),
        ("mapping", folding, True),
    ],
)
def test_training_goes_on_from_a_checkpoint_bit_for_bit(kind: str, make: Any, loaded_first: bool, tmp_path) -> None:
    base = MODELS[kind]()
    method, run, heard = start_second(make, kind, base, tmp_path)
    run.train()
    assert sorted(p.parent.name for p in tmp_path.glob(f"*/{FILE}")) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    for step in (2, 4, 6):
        resumed = make(kind, base)
        if loaded_first:
            load_run(tmp_path / f"checkpoint-{step}" / FILE, resumed)
        again: list = []
        resumed.listeners.append(lambda *what, again=again: again.append(what))
        run, _ = second(resumed, kind, tmp_path, again)
        run.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert again == heard[step:] and len(again) == 7 - step
        expected, got = method.state_dict(), resumed.state_dict()
        assert got.keys() == expected.keys() and all(torch.equal(got[k], expected[k]) for k in expected)
        for one, other in zip(method.layers.values(), resumed.layers.values(), strict=True):
            assert torch.equal(one.weight, other.weight)


def test_weights_that_trainer_loads_are_not_folded_into_again(tmp_path) -> None:
    """Without load_run before: the optimizer must be told of all that learns."""
    base = Classifier()
    method, run, heard = start_second(folding, "mapping", base, tmp_path)
    run.train()
    resumed, again = folding("mapping", base), []
    resumed.listeners.append(lambda *what: again.append(what))
    learning = [p for layer in resumed.layers.values() for p in (layer.lora_B, layer.lora_A)]
    run, _ = second(resumed, "mapping", tmp_path, again, torch.optim.SGD(learning, LR, momentum=0.9))
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert again == heard[4:]
    expected, got = method.state_dict(), resumed.state_dict()
    assert got.keys() == expected.keys() and all(torch.equal(got[k], expected[k]) for k in expected)
    assert torch.equal(resumed.model.net.first.weight, method.model.net.first.weight)


def test_a_checkpoint_elsewhere_is_named_and_another_one_refused(tmp_path) -> None:
    base = Classifier()
    _, run, heard = start_second(clora, "mapping", base, tmp_path)
    run.train()
    moved = (tmp_path / "checkpoint-2").rename(tmp_path / "moved")
    for folder, error, message in (
        (tmp_path / "checkpoint-4", ValueError, "whose adapters are not those that the model was loaded with"),
        (None, FileNotFoundError, "checkpoint-2"),
        (moved, None, ""),
    ):
        resumed, again = clora("mapping", base), []
        resumed.listeners.append(lambda *what, again=again: again.append(what))
        run, _ = second(resumed, "mapping", tmp_path, again)
        run.pop_callback(ContinualCallback)
        run.add_callback(ContinualCallback(resumed, checkpoint=folder))
        if error is None:
            run.train(resume_from_checkpoint=str(moved))
            assert again == heard[2:]
            continue
        with pytest.raises(error, match=message):
            run.train(resume_from_checkpoint=str(moved))
        assert (resumed.task, resumed.in_task, resumed.kept) == (0, False, {})


def test_a_checkpoint_of_other_options_is_refused(tmp_path) -> None:
    base = Classifier()
    _, run, _ = start_second(clora, "mapping", base, tmp_path)
    run.train()
    other = clora("mapping", base, orthogonality=1.0)
    run, _ = second(other, "mapping", tmp_path, [])
    with pytest.raises(
        ValueError, match=r"of a method with \{'orthogonality': 5\.0\}, expected \{'orthogonality': 1\.0"
    ):
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert (other.task, other.in_task, other.kept) == (0, False, {})


def test_a_method_goes_back_to_its_own_checkpoint_unless_it_has_folded(tmp_path) -> None:
    method, run, heard = start_second(clora, "mapping", Classifier(), tmp_path / "clora")
    run.train()
    expected = {k: v.clone() for k, v in method.state_dict().items()}
    first = list(heard)
    heard.clear()
    run, _ = second(method, "mapping", tmp_path / "clora", heard)
    run.train(resume_from_checkpoint=str(tmp_path / "clora" / "checkpoint-2"))
    assert heard == first[2:] and all(torch.equal(expected[k], v) for k, v in method.state_dict().items())
    method, run, heard = start_second(folding, "mapping", Classifier(), tmp_path / "folding")
    run.train()
    run, _ = second(method, "mapping", tmp_path / "folding", heard)
    with pytest.raises(RuntimeError, match="hold folded adapters already; attach the method to the model as it was"):
        run.train(resume_from_checkpoint=str(tmp_path / "folding" / "checkpoint-2"))
