"""The example on a vision transformer from a file, with a tiny one: whole, stopped and resumed, and what it refuses."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from image_tasks import CLASSES, arguments, stop_at, told, write_data, write_image, write_model

from clora_kernels.continual import RunDirectory
from clora_kernels.continual.checkpoint import read_states

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


@pytest.fixture(scope="module")
def example():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        import continual_vit

        yield continual_vit


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("vit"))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


RUNS = {
    "c-lora": ["--dtype", "bfloat16"],
    "lora": ["--set", "dropout_p=0.25", "--r", "4"],
    "cl-lora": ["--dtype", "bfloat16", "--set", "reassignment=false"],
    "dac": ["--set", "selection=sample"],
    "slao": ["--set", "dropout_p=0.25", "--lr", "0.01"],
}


@pytest.mark.parametrize("method", RUNS)
def test_a_run_that_is_stopped_and_resumed_is_the_run(example, model, data, tmp_path, capsys, method) -> None:
    more = RUNS[method]
    example.main(arguments(model, data, tmp_path / "whole", *more, method=method))
    whole = capsys.readouterr().out
    layers = 24 if method == "dac" else 8
    assert f"2 tasks of 2 classes, 40 images to learn from, 16 to test on; {method} on {layers} layers" in whole
    assert "task 2: " in whole and "after task 2: " in whole and f"\n| {method}" in whole
    expected = (tmp_path / "whole" / "checkpoint.safetensors").read_bytes()
    # 6 steps a task: in the first of the second task, between two checkpoints of it, before any checkpoint.
    for call in (7, 10, 2):
        out = tmp_path / f"stopped-{call}"
        with pytest.MonkeyPatch.context() as patch:
            stop_at(patch, call)
            with pytest.raises(SystemExit) as stop:
                example.main(arguments(model, data, out, *more, method=method))
        assert stop.value.code == 130 and "with --resume it goes on" in capsys.readouterr().err
        example.main([*arguments(model, data, out, *more, method=method), "--resume"])
        resumed = capsys.readouterr().out
        assert told(out) == told(tmp_path / "whole") and resumed.splitlines()[-1] == whole.splitlines()[-1]
        assert ("resumed: " in resumed) == (call > 2)
        # Method, class means and random generators, bit for bit, and how long the log is, but for its times.
        ends = [read_states(f / "checkpoint.safetensors") for f in (out, tmp_path / "whole")]
        for state in ends:
            state["objects"].pop("run_directory")
        assert ends[0].pop("settings") == ends[1].pop("settings")
        torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=0)
    assert (tmp_path / "whole" / "checkpoint.safetensors").read_bytes() == expected


def test_what_a_run_found_is_in_its_log(example, model, data, tmp_path, capsys) -> None:
    example.main(arguments(model, data, tmp_path))
    run = RunDirectory(tmp_path)
    found = run.accuracies()
    assert found.samples.tolist() == [8, 8] and found.accuracy[0, 0] == found.task_masked[0]
    assert found.accuracy[1, 1] <= found.task_masked[1] and found.task_masked.min() > 0.5
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["names"], config["samples"], config["optimizer"]) == (list(CLASSES), [[20, 8], [20, 8]], "sgd")
    # A run that has ended has nothing left to do.
    example.main([*arguments(model, data, tmp_path), "--resume"])
    assert "resumed: after task 2, step 6\n| method" in capsys.readouterr().out
    steps = [line["values"] for line in run.lines("step")]
    assert {s["of"] for s in steps} <= {1, 2, 3} and sum(s["of"] for s in steps) == 12
    assert len(steps) == 8 and steps[-1]["losses"]["task"] < steps[4]["losses"]["task"]


def test_a_test_that_is_told_the_task_looks_at_its_classes_alone(example, model, data, tmp_path) -> None:
    """Where a class of the second task looks like one of the first, on which it is lost else."""
    first, second = (example.class_order(4, 1993)[i] for i in (0, 2))
    folder = Path(shutil.copytree(data, tmp_path / "data"))
    for part in ("train", "test"):
        shutil.rmtree(folder / part / CLASSES[second])
        shutil.copytree(folder / part / CLASSES[first], folder / part / CLASSES[second])
    example.main(arguments(model, folder, tmp_path / "out", "--set", "train=never", method="lora"))
    found = RunDirectory(tmp_path / "out").accuracies()
    assert found.accuracy[1, 1] <= 0.5 < found.task_masked[1]


def test_every_step_sees_crops_of_its_own(example, model, data, tmp_path) -> None:
    seeds: list[int] = []
    training = example.Pixels.training

    def seen(self: Any, source: Any, random: torch.Generator) -> torch.Tensor:
        seeds.append(random.initial_seed())
        return training(self, source, random)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(example.Pixels, "training", seen)
        example.main(arguments(model, data, tmp_path))
    assert len(seeds) == 2 * 2 * 20 and len(set(seeds)) == 2 * 2 * 3


def test_the_schedule_is_a_cosine_over_the_epochs(example, model, data, tmp_path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, 14)
        with pytest.raises(SystemExit):
            example.main(arguments(model, data, tmp_path, "--save-every", "1", "--lr-end", "0.02", "--epochs", "3"))
    objects = read_states(tmp_path / "checkpoint.safetensors")["objects"]
    # Nine steps of the first task, then four of the second: one of three epochs is over.
    assert objects["run_directory"]["step"] == 4
    assert objects["schedule"]["_last_lr"] == pytest.approx([0.02 + 0.08 * (1 + math.cos(math.pi / 3)) / 2] * 3)


def test_the_command_by_itself(model, data, tmp_path) -> None:
    """As it is typed, from a folder of its own."""
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES.parent), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(EXAMPLES / "continual_vit.py"), *arguments(model, data, tmp_path / "run")]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "| c-lora |" in done.stdout and "task 2/2" in done.stderr


def refused(example, capsys, argv: list[str]) -> str:
    with pytest.raises(SystemExit) as stop:
        example.main(argv)
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_folders_and_models_that_do_not_fit_are_refused(example, model, data, tmp_path, capsys) -> None:
    from transformers import BertConfig, BertModel, ViTConfig, ViTModel

    def told(*more: str, model: Path = model, data: Path = data, method: str = "c-lora") -> str:
        return refused(example, capsys, arguments(model, data, tmp_path / "out", *more, method=method))

    nowhere, empty, other, part = (tmp_path / name for name in ("nowhere", "empty", "bert", "part"))
    assert f"--model: got {nowhere}, expected a folder with a model" in told(model=nowhere)
    assert f"--data: got {nowhere}, expected a folder" in told(data=nowhere)
    for folder in (empty, empty / "ape"):
        folder.mkdir()
        assert f"--data: no images .jpeg, .jpg, .png in the folders of {empty}" in told(data=empty)
    assert f"--model: {empty} cannot be loaded" in told(model=empty)
    BertModel(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=8)
              ).save_pretrained(other)  # fmt: skip
    assert f"--model: {other} is a bert, expected a vit of 3 channels" in told(model=other)
    vit = ViTModel(ViTConfig(image_size=8, patch_size=4, hidden_size=8, num_hidden_layers=1, num_attention_heads=1,
                             intermediate_size=8), add_pooling_layer=False)  # fmt: skip
    state = {k: v for k, v in vit.state_dict().items() if "layers.0.mlp" not in k}
    vit.save_pretrained(part, state_dict=state)
    assert f"--model: {part} lacks the weights layers.0.mlp.fc1.bias" in told(model=part)
    assert "--data: 4 classes make 1 tasks of 4, expected at least 2" in told("--classes", "4")
    assert "--data: 4 classes make 2 tasks of 2, expected 3" in told("--tasks", "3")
    assert "--method c-lora: basis: got 'own', expected one of" in told("--set", "basis=own")
    assert "--set: got basis, expected one of lora's options" in told("--set", "basis=raw", method="lora")
    assert not (tmp_path / "out").exists()
    RunDirectory(tmp_path / "out").start({"lr": 0.5})
    assert "--out: path: " in (error := told()) and "holds a run, expected an empty folder or resume" in error
    assert "; lr (0.1, 0.5); " in (error := told("--resume")) and "; method ('c-lora', absent); " in error
    shutil.rmtree(tmp_path / "out")
    (tmp_path / "out").write_text("a file")
    assert "--out: path: got " in told() and (tmp_path / "out").read_text() == "a file"


def test_images_that_do_not_fit_are_refused(example, model, tmp_path, capsys) -> None:
    def told() -> str:
        return refused(example, capsys, arguments(model, tmp_path / "data", tmp_path / "out", "--classes", "1"))

    for label, name in enumerate(CLASSES[:2]):
        for number in range(3):
            write_image(tmp_path / "data" / "train" / name / f"{number}.png", label, number)
    write_image(tmp_path / "data" / "test" / "ape" / "1.png", 0, 1)
    assert "--data: the classes bee are in one of train and test alone" in told()
    (tmp_path / "data" / "test" / "bee").mkdir()
    assert f"--data: no images in {tmp_path / 'data' / 'test' / 'bee'}" in told()
    broken = tmp_path / "data" / "test" / "bee" / "1.png"
    broken.write_bytes(b"no image")
    assert f"--data: {broken} cannot be read as an image" in told()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--epochs", "0"], "--epochs: got 0, expected at least 1"),
        (["--steps", "5"], "--steps: got 5 and --epochs 2, expected one of them"),
        (["--shots", "0"], "--shots: got 0, expected at least 1"),
        (["--shots", "11"], "--shots: got 11, but of ape there are 10 images to learn from"),
        (["--lr", "0"], "--lr: got 0.0, expected a finite number above 0"),
        (["--weight-decay", "-1"], "--weight-decay: got -1.0, expected a finite number of at least 0"),
        (["--test-share", "1"], "--test-share: got 1.0"),
        (["--tasks", "0"], "--tasks: got 0"),
        (["--device", "nonsense"], "--device: got nonsense"),
        (["--set", "basis=1"], "--set: got basis=1, expected a text"),
        (["--preset", "own"], "--preset: invalid choice"),
    ],
)
def test_bad_arguments_are_refused(example, model, data, tmp_path, capsys, more, message) -> None:
    assert message in refused(example, capsys, arguments(model, data, tmp_path / "out", *more))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("every", ["1", "100"])
def test_a_run_that_diverges_ends_with_the_step_that_did(example, model, data, tmp_path, capsys, every) -> None:
    error = refused(example, capsys, arguments(model, data, tmp_path, "--lr", "1e30", "--save-every", every))
    assert re.search(r": task 1, step [1-6]: .*training has diverged: a smaller --lr may help\n$", error)
    assert not list(RunDirectory(tmp_path).lines("end"))


def test_presets_are_settings_that_options_override(example, tmp_path) -> None:
    given = ["--model", "m", "--data", "d", "--out", str(tmp_path)]
    names = ("method", "classes", "r", "epochs", "lr", "batch", "weight_decay", "optimizer", "lr_end", "seed")
    published = {
        "cl-lora-cifar100": ("cl-lora", 5, 8, 30, 0.03, 64, 1e-4, "sgd", 0.0, 1993),
        "cl-lora-imagenet-r": ("cl-lora", 5, 10, 20, 0.05, 32, 5e-4, "sgd", 0.0, 1993),
        "cl-lora-imagenet-a": ("cl-lora", 20, 10, 25, 0.05, 32, 5e-3, "sgd", 0.0, 1993),
        "cl-lora-vtab": ("cl-lora", 10, 10, 45, 0.03, 32, 1e-4, "sgd", 0.0, 1993),
        "dac": ("dac", 10, 12, None, 2e-3, 32, 1e-2, "adamw", 1e-6, 1993),
    }
    assert published.keys() == example.PRESETS.keys()
    _, args = example.parse([*given, "--preset", "dac"])
    assert (args.steps, args.shots, len(args.parts)) == (500, 5, 6)
    for preset, values in published.items():
        _, args = example.parse([*given, "--preset", preset])
        assert tuple(getattr(args, name) for name in names) == values
        assert args.options == {"r": values[2]}
        if preset != "dac":
            assert args.parts == ("q", "v") and args.head_scale == 1.0 and args.steps is args.shots is None
    _, args = example.parse([*given, "--preset", "cl-lora-vtab", "--method", "dac", "--lr", "0.5"])
    assert (args.method, args.lr, args.optimizer, args.epochs, len(args.parts)) == ("dac", 0.5, "sgd", 45, 6)
    for preset, length, found in (
        ("dac", ["--epochs", "3"], (3, None)),
        ("dac", ["--steps", "3"], (None, 3)),
        ("cl-lora-vtab", ["--steps", "3"], (None, 3)),
    ):
        _, args = example.parse([*given, "--preset", preset, *length])
        assert (args.epochs, args.steps) == found
    _, args = example.parse([*given, "--method", "dac"])
    assert (args.optimizer, args.lr, args.lr_end, args.weight_decay, args.options) == ("adamw", 2e-3, 1e-6, 1e-2, {})
