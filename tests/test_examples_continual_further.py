"""The examples on models from files beyond one run: further tasks for a run that has ended, the model it leaves, tasks
of so many steps, and what --help tells."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from image_tasks import CLASSES, arguments, stop_at, told, write_data, write_image, write_model
from sequences import TARGETS, Net

from clora_kernels.continual import CLoRA, RunDirectory, vit_targets
from clora_kernels.continual.checkpoint import read_states

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


@pytest.fixture(scope="module")
def examples():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        import continual_options
        import continual_run
        import continual_text
        import continual_vit

        small = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "max_position_embeddings": 64}
        patch.setattr(continual_text, "TINY", {**continual_text.TINY, **small})
        yield SimpleNamespace(options=continual_options, run=continual_run, text=continual_text, vit=continual_vit)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("vit"))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


def refused(example: Any, capsys: Any, argv: list[str]) -> str:
    with pytest.raises(SystemExit) as stop:
        example.main(argv)
    assert stop.value.code == 2
    return capsys.readouterr().err


def assert_one_run(out: Path, whole: Path) -> None:
    """Log, config and checkpoint, but for times."""
    assert told(out) == told(whole)
    configs = [json.loads((folder / "config.json").read_text()) for folder in (out, whole)]
    assert configs[0] == configs[1]
    states = [read_states(folder / "checkpoint.safetensors") for folder in (out, whole)]
    for state in states:
        state["objects"].pop("run_directory")
    assert states[0].pop("settings") == states[1].pop("settings")
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=0)


# Further tasks


def test_a_run_on_images_that_has_ended_takes_further_classes(examples, model, data, tmp_path, capsys) -> None:
    def argv(out: str, *more: str, data: Path = data) -> list[str]:
        return arguments(model, data, tmp_path / out, "--classes", "1", *more, method="cl-lora")

    examples.vit.main(argv("whole"))
    examples.vit.main(argv("grown", "--tasks", "2"))
    assert len(RunDirectory(tmp_path / "grown").accuracies()) == 2
    for more in (["--tasks", "3"], []):
        examples.vit.main(argv("grown", *more, "--resume"))
    assert_one_run(tmp_path / "grown", tmp_path / "whole")
    assert "; samples, tasks may be longer" in (error := refused(examples.vit, capsys, argv("grown", "--tasks", "3",
                                                                                             "--resume")))  # fmt: skip
    assert "(got, expected) samples (" in error
    error = refused(examples.vit, capsys, argv("grown", "--classes", "2", "--resume"))
    assert "(got, expected) classes (2, 1); samples (" in error and "; tasks ([[" in error
    other = Path(shutil.copytree(data, tmp_path / "data"))
    for part in ("train", "test"):
        write_image(other / part / "eel" / "1.png", 3, 7)
    error = refused(examples.vit, capsys, argv("grown", "--resume", data=other))
    assert "; names (" in error and "'eel'" in error


def write_task(path: Path) -> str:
    lines = [json.dumps({"prompt": f"{path.stem} {word}: ", "answer": word[::-1]}) for word in ("ab", "ba", "aab", "b")]
    path.write_text("\n".join(lines))
    return str(path)


def text_arguments(files: list[str], out: Path, *more: str) -> list[str]:
    given = {"--config": "tiny", "--out": out, "--epochs": 1, "--device": "cpu", "--method": "c-lora"}
    return ["--tasks", *files, *(str(x) for pair in given.items() for x in pair), *more]


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    return [write_task(tmp_path / f"{name}.jsonl") for name in ("one", "two", "three")]


def test_a_run_on_texts_that_has_ended_takes_further_files(examples, files, tmp_path, capsys) -> None:
    examples.text.main(text_arguments(files, tmp_path / "whole"))
    whole = capsys.readouterr().out
    examples.text.main(text_arguments(files[:1], tmp_path / "grown"))
    examples.text.main(text_arguments(files, tmp_path / "grown", "--resume"))
    assert capsys.readouterr().out.splitlines()[-1] == whole.splitlines()[-1]
    assert_one_run(tmp_path / "grown", tmp_path / "whole")
    for other in (files[1:], files[:2], files[::-1]):
        error = refused(examples.text, capsys, text_arguments(other, tmp_path / "grown", "--resume"))
        assert "(got, expected) " in error and "tasks ([" in error
    Path(files[0]).write_text(Path(files[1]).read_text() + "\n" + Path(files[1]).read_text())
    error = refused(examples.text, capsys, text_arguments(files, tmp_path / "grown", "--resume"))
    assert "(got, expected) samples ([[6, 2], [3, 1], [3, 1]], " in error and " tasks (" not in error
    # The table tells the mean loss of the last test.
    *_, last = RunDirectory(tmp_path / "whole").lines("test")
    heading, _, row = (line.split("|") for line in whole.splitlines()[-3:])
    assert heading[-2].strip() == "loss" and float(row[-2]) == pytest.approx(sum(last["values"]["loss"]) / 3, abs=1e-4)


# What a run leaves


@pytest.mark.parametrize("method", ["c-lora", "cl-lora"])
def test_the_model_of_a_run_on_images_is_the_one_that_was_tested(examples, model, data, tmp_path, method) -> None:
    from safetensors import safe_open
    from safetensors.torch import load_file
    from transformers import ViTModel

    examples.vit.main(arguments(model, data, tmp_path, method=method))
    vit, pixels = examples.vit.load_model(str(model))
    learned = examples.options.METHODS[method].method(
        examples.vit.Backbone(vit, torch.float32), vit_targets(("q", "v")), r=8
    )
    saved = RunDirectory(tmp_path).load(learned)
    x, folder = torch.rand(3, 3, 8, 8), tmp_path / "model"
    views = learned.outputs(x)
    assert len(views) == (2 if method == "cl-lora" else 1)
    again, same_pixels = examples.vit.load_model(str(folder))
    assert same_pixels == pixels and type(again) is ViTModel
    with torch.no_grad():
        assert torch.equal(examples.vit.Backbone(again.eval(), torch.float32)(x), views[-1])
        others = sorted(folder.glob("view-*"))
        assert [file.name for file in others] == ["view-1.safetensors"] * (len(views) - 1)
        for file in others:
            own = load_file(file)
            # A and B of q and v in the second half of four blocks.
            assert len(own) == 4 and not again.load_state_dict(own, strict=False).unexpected_keys
            assert torch.equal(examples.vit.Backbone(again, torch.float32)(x), views[0])
    means, prototypes = load_file(folder / "class_means.safetensors"), saved.objects["prototypes"]
    assert torch.equal(means["means"], torch.cat(prototypes["means"])) and means["tasks"].tolist() == [1, 1, 2, 2]
    assert torch.equal(means["classes"], torch.cat(prototypes["classes"]))
    with safe_open(folder / "class_means.safetensors", "pt") as file:
        assert json.loads(file.metadata()["names"]) == list(CLASSES)


def test_the_model_of_a_run_on_texts_is_the_one_that_was_tested(examples, files, tmp_path, capsys) -> None:
    from transformers import AutoModelForCausalLM

    examples.text.main(text_arguments(files[:2], tmp_path / "run", "--lr", "0.5"))
    torch.manual_seed(0)
    base = examples.text.load_model(None, torch.float32)
    learned = CLoRA(base, examples.text.TARGETS)
    RunDirectory(tmp_path / "run").load(learned)
    x = {"input_ids": torch.randint(99, (2, 7))}
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    (expected,) = learned.outputs(x)
    with torch.no_grad():
        assert torch.equal(plain(**x).logits, expected.logits)
    (tmp_path / "file").write_text("")
    with pytest.raises(examples.options.Refused, match=r"--out: .*file/model cannot be written"):
        examples.run.save_model(tmp_path / "file" / "model", learned, lambda model: model)


# Tasks of so many steps


def test_tasks_of_so_many_steps_are_resumed_bit_for_bit(examples, model, data, tmp_path, monkeypatch) -> None:
    sources: list[Any] = []
    training = examples.vit.Pixels.training
    monkeypatch.setattr(
        examples.vit.Pixels,
        "training",
        lambda self, source, random: (sources.append(source), training(self, source, random))[1],
    )
    steps = ["--preset", "dac", "--steps", "5", "--shots", "3", "--r", "4", "--set", "k=2", "--set", "keep=1"]

    def argv(out: str) -> list[str]:
        given = arguments(model, data, tmp_path / out, *steps, "--batch", "8", "--save-every", "1", method="dac")
        at = given.index("--epochs")
        return [*given[:at], *given[at + 2 :]]

    examples.vit.main(argv("whole"))
    # Every batch is full, of three images of each class.
    assert len(sources) == 2 * 5 * 8 and len(set(sources)) == 4 * 3
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, 8)
        with pytest.raises(SystemExit):
            examples.vit.main(argv("stopped"))
    objects = read_states(tmp_path / "stopped" / "checkpoint.safetensors")["objects"]
    # Two of five steps of the second task are done: the rate of the third.
    lr = 1e-6 + (0.1 - 1e-6) * (1 + math.cos(2 * math.pi / 5)) / 2
    assert objects["run_directory"]["step"] == 2
    assert objects["schedule"]["_last_lr"] == pytest.approx([lr] * len(objects["schedule"]["_last_lr"]), rel=1e-12)
    examples.vit.main([*argv("stopped"), "--resume"])
    assert_one_run(tmp_path / "stopped", tmp_path / "whole")


@pytest.mark.parametrize(("samples", "batch"), [(10, 4), (3, 5), (8, 8), (2, 7)])
def test_full_batches_go_through_epoch_after_epoch(examples, samples: int, batch: int) -> None:
    steps = 3 * samples
    rows = [examples.run.full_rows_of(step, samples, batch, 5, "order") for step in range(steps)]
    assert {len(of_step) for of_step in rows} == {batch}
    seen = [row for of_step in rows for row in of_step]
    epochs = [seen[i : i + samples] for i in range(0, len(seen), samples)]
    assert all(sorted(epoch) == list(range(samples)) for epoch in epochs)
    assert samples < 8 or epochs[0] != epochs[1]


# Options


def test_routing_has_a_rate_of_its_own_where_there_is_routing(examples, model, data, tmp_path, capsys) -> None:
    given = ["--model", "m", "--data", "d", "--out", str(tmp_path), "--lr", "0.25"]
    method = CLoRA(Net(), TARGETS)
    for more, expected in (([], 0.25), (["--lr-routing", "0.5"], 0.5)):
        _, args = examples.vit.parse([*given, *more])
        factors, routings = examples.run.groups_of(method, args)
        assert (factors["lr"], routings["lr"]) == (0.25, expected) and routings["params"] == method.routings()
    error = refused(examples.vit, capsys, [*given, "--lr-routing", "0.5", "--method", "lora"])
    assert "--lr-routing: got 0.5 with --method lora, which has no routing matrices" in error
    error = refused(examples.vit, capsys, [*given, "--lr-routing", "0"])
    assert "--lr-routing: got 0.0, expected a finite number above 0" in error


def test_help_tells_the_command_the_files_and_every_option(examples, tmp_path) -> None:
    for example, given, what in (
        (examples.vit, ["--model", "m", "--data", "d"], ("--data D --preset cl-lora-cifar100 --out DIR\n",
                                                         "    D/train/CLASS/*.jpg and D/test/CLASS/*.jpg  ")),
        (examples.text, ["--model", "m", "--tasks", "a"], ("--preset slao --tasks a.jsonl b.jsonl --out DIR\n",
                                                           '    {"prompt": "a text", "answer": "what is to follow')),
    ):  # fmt: skip
        parser, _ = example.parse([*given, "--out", str(tmp_path)])
        told = parser.format_help()
        assert all(text in told for text in what) and "DIR/model" in told
        assert all(action.help for action in parser._actions) and len(parser._actions) > 20
