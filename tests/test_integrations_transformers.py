"""Continual methods driven by transformers' Trainer: what training_step would do, logs, refusals."""

from __future__ import annotations

import importlib
import json
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from methods import KeptApart
from sequences import TARGETS, Net
from torch import Tensor, nn
from trainers import BATCH, LR, MODELS, SAMPLES, Classifier, arguments, clora, data, folding, trainer

from clora_kernels.integrations.transformers import ContinualCallback


def by_training_step(method: Any, kind: str, tasks: int, accumulate: int, epochs: int = 1) -> list:
    reports = []
    for task in range(1, tasks + 1):
        method.begin_task()
        optimizer = torch.optim.SGD(method.param_groups(LR), momentum=0.9)
        method.model.train()
        samples = data(kind, task)
        batches = [
            {k: torch.stack([s[k] for s in samples[i : i + BATCH]]) for k in samples[0]}
            for i in range(0, SAMPLES, BATCH)
        ]
        for _ in range(epochs):
            for start in range(0, len(batches), accumulate):
                micro = batches[start : start + accumulate]
                method.training_step(None, lambda micro=micro: loss_of(method.model, kind, micro), optimizer)
        reports.append(method.end_task())
    return reports


def loss_of(model: nn.Module, kind: str, micro: list[dict[str, Tensor]]) -> Tensor:
    """The mean over the tokens of all micro batches, or the mean of their means."""
    if kind == "llama":
        tokens = sum(int((b["labels"][:, 1:] != -100).sum()) for b in micro)
        return torch.stack([model(**b, num_items_in_batch=tokens).loss for b in micro]).sum()
    outputs = [model(**b) for b in micro]
    return torch.stack([y["loss"] if kind == "mapping" else y[0] for y in outputs]).mean()


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("kind", MODELS)
def test_two_tasks_are_those_of_training_step(kind: str, accumulate: int, tmp_path) -> None:
    """Five batches: with accumulation the last step has one micro batch."""
    base = MODELS[kind]().double()
    expected, told = clora(kind, base), []
    expected.listeners.append(lambda *what: told.append(what))
    expected_reports = by_training_step(expected, kind, 2, accumulate)
    method, heard = clora(kind, base), []
    method.listeners.append(lambda *what: heard.append(what))
    callback = ContinualCallback(method)
    for task in (1, 2):
        args = arguments(tmp_path, gradient_accumulation_steps=accumulate)
        trainer(method, callback, data(kind, task), args).train()
        assert (method.task, method.in_task) == (task, False)
        assert not any(layer.routing.any() for layer in method.layers.values())
    assert [e[:2] for e in heard] == [e[:2] for e in told]
    torch.testing.assert_close([e[2] for e in heard], [e[2] for e in told])
    assert any(values.get("orthogonality", 0) > 0 for _, _, values in heard)
    torch.testing.assert_close(method.state_dict(), expected.state_dict())
    torch.testing.assert_close([r.measures for r in callback.reports], [r.measures for r in expected_reports])
    assert [(r.task, r.trainable, r.stored) for r in callback.reports] == [
        (r.task, r.trainable, r.stored) for r in expected_reports
    ]
    assert not method.model._forward_hooks
    plain = clora(kind, base, orthogonality=0.0)
    by_training_step(plain, kind, 2, accumulate)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(method.state_dict(), plain.state_dict())


def test_trainers_logs_hold_the_means_of_the_extra_losses_and_a_listener_writes_json_lines(tmp_path) -> None:
    method = clora("mapping", Classifier())
    path = tmp_path / "log.jsonl"

    def write(event: str, task: int, values: Any) -> None:
        numbers = {k: v.item() if isinstance(v, Tensor) else v for k, v in values.items()}
        with path.open("a") as file:
            file.write(json.dumps({"event": event, "task": task, "values": numbers}) + "\n")

    method.listeners.append(write)
    callback = ContinualCallback(method)
    for task in (1, 2):
        args = arguments(tmp_path, logging_strategy="steps", logging_steps=2, num_train_epochs=2)
        run = trainer(method, callback, data("mapping", task), args)
        run.train()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [x["event"] for x in lines] == 2 * ["begin", *10 * ["step"], "end"]
    assert [x["task"] for x in lines] == 12 * [1] + 12 * [2] and lines[-1]["values"]["drift"] > 0
    steps, logs = [x["values"] for x in lines[13:23]], [x for x in run.state.log_history if "loss" in x]
    assert len(logs) == 5 and "loss_task" not in logs[0]
    for i, log in enumerate(logs):
        pair = steps[2 * i : 2 * i + 2]
        assert log["loss_orthogonality"] == pytest.approx(sum(x["orthogonality"] for x in pair) / 2)
        assert log["loss"] == pytest.approx(sum(x["task"] + x["orthogonality"] for x in pair) / 2)
    assert not any("loss_orthogonality" in x for x in run.state.log_history if "loss" not in x)


def test_gradients_are_adjusted_before_the_step(tmp_path) -> None:
    method = folding("mapping", Classifier())
    method.begin_task()
    args = arguments(tmp_path, gradient_accumulation_steps=2)
    trainer(method, ContinualCallback(method, end_task=False), data("mapping", 1), args).train()
    for layer in method.layers.values():
        assert not layer.lora_B[0].any() and layer.lora_B[1:].all()


def test_a_task_may_go_on_after_training(tmp_path) -> None:
    method = clora("mapping", Classifier())
    callback = ContinualCallback(method, end_task=False)
    for _ in range(2):
        trainer(method, callback, data("mapping", 1), arguments(tmp_path)).train()
        assert (method.task, method.in_task, callback.reports) == (1, True, [])
    assert not method.model._forward_hooks
    assert any(R.any() for R in method.routings())
    method.end_task()


def test_an_optimizer_that_does_not_suit_is_told(tmp_path) -> None:
    method = clora("mapping", Classifier())
    optimizer = torch.optim.AdamW(method.param_groups(1e-3))
    with pytest.warns(UserWarning, match="lora_A and lora_B are trained by AdamW"):
        trainer(method, ContinualCallback(method), data("mapping", 1), arguments(tmp_path), optimizer).train()
    method = folding("mapping", Classifier())
    callback = ContinualCallback(method)
    trainer(method, callback, data("mapping", 1), arguments(tmp_path)).train()
    late = trainer(method, callback, data("mapping", 2), arguments(tmp_path))
    with pytest.raises(RuntimeError, match="optimizer: lacks 2 of the parameters that learn in task 2"):
        late.train()
    assert not method.model._forward_hooks
    trainer(method, callback, data("mapping", 2), arguments(tmp_path)).train()
    assert [r.task for r in callback.reports] == [1, 2]


def test_what_trainer_cannot_do_is_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"method: got KeptApart, which makes steps of its own.*method\.training_step"):
        ContinualCallback(KeptApart(Net(), TARGETS))
    method = clora("mapping", Classifier())
    callback = ContinualCallback(method)
    other = transformers.Trainer(Classifier(), arguments(tmp_path), train_dataset=data("mapping", 1))
    other.add_callback(callback)
    with pytest.raises(ValueError, match="model: got Classifier without the layers of the method"):
        other.train()
    best = arguments(tmp_path, load_best_model_at_end=True, eval_strategy="epoch", save_strategy="epoch")
    run = transformers.Trainer(
        method.model, best, train_dataset=data("mapping", 1), eval_dataset=data("mapping", 1), callbacks=[callback]
    )
    with pytest.raises(ValueError, match="load_best_model_at_end: got True"):
        run.train()
    args = arguments(tmp_path)
    for name in ("world_size", "n_gpu"):
        spread = type("Spread", (), {"world_size": 1, "n_gpu": 0, "load_best_model_at_end": False, name: 2})()
        with pytest.raises(ValueError, match="expected one process and one device"):
            callback.on_train_begin(spread, None, None, model=method.model, optimizer=None)
    assert (method.task, method.model._forward_hooks) == (0, {})
    run = transformers.Trainer(
        method.model, args, train_dataset=data("mapping", 1), callbacks=[callback],
        compute_loss_func=lambda outputs, labels, **_: F.cross_entropy(outputs["logits"], labels),
    )  # fmt: skip
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="model: got dict without a loss from Classifier"):
        run.train()


def test_extra_losses_are_on_the_model_while_it_trains_and_no_longer(tmp_path) -> None:
    method = clora("mapping", Classifier())
    callback = ContinualCallback(method)
    trainer(method, callback, data("mapping", 1), arguments(tmp_path)).train()
    run = trainer(method, callback, data("mapping", 2), arguments(tmp_path))
    batch = {k: torch.stack([s[k] for s in data("mapping", 2)]) for k in ("x", "labels")}
    seen = {}

    class Failing(transformers.TrainerCallback):
        def on_step_end(self, *args, **kwargs) -> None:
            model = method.model
            seen["extra"] = method.extra_losses()["orthogonality"].item()
            seen["train"] = model.train()(**batch)["loss"].item()
            with torch.no_grad():
                seen["no grad"] = model(**batch)["loss"].item()
            seen["eval"] = model.eval()(**batch)["loss"].item()
            raise KeyboardInterrupt

    run.add_callback(Failing())
    with pytest.raises(KeyboardInterrupt):
        run.train()
    assert seen["extra"] > 0 and seen["eval"] == seen["no grad"]
    assert seen["train"] == pytest.approx(seen["eval"] + seen["extra"])
    assert method.model._forward_hooks and method.in_task
    callback.close()
    assert not method.model._forward_hooks
    assert method.model.train()(**batch)["loss"].item() == seen["eval"]


@pytest.mark.parametrize("missing", [["transformers"], ["accelerate"], ["accelerate", "transformers"]])
def test_a_missing_package_is_named_with_the_extra_that_brings_it(monkeypatch, missing) -> None:
    monkeypatch.delitem(sys.modules, "clora_kernels.integrations.transformers")
    for name in [name for name in sys.modules if name.split(".")[0] in missing]:
        monkeypatch.setitem(sys.modules, name, None)
    told = rf"^needs {', '.join(missing)}, not installed here: pip install 'clora_kernels\[transformers\]'$"
    with pytest.raises(ImportError, match=told):
        importlib.import_module("clora_kernels.integrations.transformers")
