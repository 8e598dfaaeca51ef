"""The example on text with a tiny Llama: whole, stopped and resumed, what its loss is, and what it refuses."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from clora_kernels.continual import ContinualMethod, RunDirectory
from clora_kernels.continual.checkpoint import read_states

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
WORDS = ("ab", "ba", "aa", "bb", "abc", "cab", "bca", "äb", "bba", "abab", "cc", "ac")


@pytest.fixture(scope="module")
def example():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        import continual_text

        small = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "max_position_embeddings": 64}
        patch.setattr(continual_text, "TINY", {**continual_text.TINY, **small})
        yield continual_text


@pytest.fixture(scope="module")
def texts(example):
    import texts

    return texts


def write_task(path: Path, make: Any) -> Path:
    lines = [json.dumps({"prompt": f"{path.stem} {word}: ", "answer": make(word)}) for word in WORDS]
    path.write_text("\n".join(lines) + "\n\n")
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("tasks")
    makers = {"upper": str.upper, "reversed": lambda word: word[::-1]}
    return [str(write_task(folder / f"{name}.jsonl", make)) for name, make in makers.items()]


def arguments(files: list[str], out: Path, *more: str) -> list[str]:
    model = [] if "--model" in more else ["--config", "tiny"]
    given = {"--out": out, "--epochs": 2, "--save-every": 2, "--log-every": 3, "--device": "cpu"}
    return [*model, "--tasks", *files, *(str(x) for pair in given.items() for x in pair), *more]


def end_of(folder: Path) -> tuple[list[Any], dict[str, Any]]:
    """What the log tells but for times and where the run was resumed; the method and generators at its end."""
    lines = [line for line in RunDirectory(folder).lines() if line["event"] != "resume"]
    state = read_states(folder / "checkpoint.safetensors")
    return [(line["event"], line["task"], line["values"]) for line in lines], {k: state[k] for k in ("method", "rng")}


RUNS = {
    name: f"--method {name} --accumulate 2 {more}".split()
    for name, more in {
        "c-lora": "--dtype bfloat16",
        "lora": "--optimizer adamw --lr 0.01 --set dropout_p=0.25",
        "slao": "--preset slao",
    }.items()
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_that_is_stopped_and_resumed_is_the_run(example, files, tmp_path, capsys, name) -> None:
    example.main(arguments(files, tmp_path / "whole", *RUNS[name]))
    whole = capsys.readouterr().out
    assert f"2 tasks, 20 examples to learn from, 4 held out; {name} on 4 layers" in whole
    assert "after task 2: upper: loss " in whole and "after task 2: reversed: loss " in whole and f"| {name}" in whole
    step = ContinualMethod.training_step
    # 6 steps a task: before any checkpoint, between two of the first task, in the first step of the second.
    for call in (2, 4, 7):
        calls: list[int] = []

        def stopped(*args: Any, calls: list[int] = calls, call: int = call) -> Any:
            calls.append(1)
            if len(calls) == call:
                raise KeyboardInterrupt
            return step(*args)

        out = tmp_path / f"stopped-{call}"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ContinualMethod, "training_step", stopped)
            with pytest.raises(SystemExit) as stop:
                example.main(arguments(files, out, *RUNS[name]))
        assert stop.value.code == 130 and "with --resume it goes on" in capsys.readouterr().err
        example.main(arguments(files, out, *RUNS[name], "--resume"))
        resumed = capsys.readouterr().out
        assert resumed.splitlines()[-1] == whole.splitlines()[-1] and ("resumed: " in resumed) == (call > 2)
        logs, ends = zip(*(end_of(folder) for folder in (out, tmp_path / "whole")), strict=True)
        assert logs[0] == logs[1]
        torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=0)


def test_a_run_that_is_killed_goes_on_as_if_it_were_not(example, files, tmp_path) -> None:
    """By a signal that no process handles, whenever it comes."""
    more = [*RUNS["lora"], "--epochs", "30", "--save-every", "1"]
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES.parent), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    script = (
        "import sys; sys.path.insert(0, sys.argv.pop(1)); import continual_text as c; "
        f"c.TINY.update({example.TINY!r}); c.main(sys.argv[1:])"
    )
    out, quiet = tmp_path / "killed", subprocess.DEVNULL
    command = [sys.executable, "-c", script, str(EXAMPLES), *arguments(files, out, *more)]
    process = subprocess.Popen(command, env=environment, stdout=quiet, stderr=quiet)
    try:
        while process.poll() is None and not (out / "checkpoint.safetensors").exists():
            time.sleep(0.01)
    finally:
        process.kill()
    assert process.wait() == -signal.SIGKILL
    example.main(arguments(files, out, *more, "--resume"))
    example.main(arguments(files, tmp_path / "whole", *more))
    (resumed,) = RunDirectory(out).lines("resume")
    assert (resumed["task"], resumed["values"]["step"] < 90) == (1, True)
    logs, ends = zip(*(end_of(folder) for folder in (out, tmp_path / "whole")), strict=True)
    assert logs[0] == logs[1]
    torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=0)


def test_what_a_run_found_is_in_its_log(example, files, tmp_path) -> None:
    """On an example that is held out and learned too, the answer becomes exact."""
    short = tmp_path / "short.jsonl"
    short.write_text(2 * (json.dumps({"prompt": "x", "answer": "y"}) + "\n"))
    more = [
        "--epochs",
        "150",
        "--batch",
        "1",
        "--accumulate",
        "1",
        "--held-out",
        "0.5",
        "--lr",
        "0.05",
        "--set",
        "dropout_p=0",
    ]
    example.main(arguments([str(short)], tmp_path / "run", *RUNS["lora"], *more))
    run = RunDirectory(tmp_path / "run")
    found, (test,) = run.accuracies(), run.lines("test")
    assert found.samples.tolist() == [1] and found.accuracy.tolist() == [[1.0]] == [test["values"]["accuracy"]]
    losses = [line["values"]["losses"]["task"] for line in run.lines("step")]
    assert test["values"]["loss"][0] <= min(losses) < losses[0]
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["options"], config["samples"], config["max_length"]) == ({"dropout_p": 0}, [[1, 1]], 64)


@pytest.fixture(scope="module")
def saved(example, texts, tmp_path_factory) -> Path:
    """A model and a tokenizer of words, as files."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("model")
    words = ["<s>", "</s>", "<unk>", *"abcx:", "upper", "reversed"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
                            ).save_pretrained(folder)  # fmt: skip
    example.load_model(None, torch.float32).save_pretrained(folder)
    return folder


def test_a_model_and_its_tokenizer_from_files(example, texts, files, saved, tmp_path, capsys) -> None:
    example.main(arguments(files, tmp_path / "run", "--model", str(saved), "--method", "c-lora"))
    assert "c-lora on 4 layers" in capsys.readouterr().out
    tokens = example.load_tokens(str(saved))
    # No token to pad with: that of the end. A prompt has no end, an answer one of its own.
    assert tokens.pad == 1 and tokens.prompt("ab") == [3, 4] and tokens.answer("ba") == [4, 3, 1]
    tokens.tokenizer.eos_token = None
    with pytest.raises(texts.Refused, match="no end-of-sequence token"):
        texts.Pretrained(tokens.tokenizer)


def refused(example, capsys, argv: list[str]) -> str:
    with pytest.raises(SystemExit) as stop:
        example.main(argv)
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_a_run_that_diverges_ends_with_the_step_that_did(example, files, tmp_path, capsys) -> None:
    error = refused(example, capsys, arguments(files, tmp_path, "--method", "c-lora", "--lr", "1e30"))
    assert re.search(r": task 1, step [1-6]: .*training has diverged: a smaller --lr may help\n$", error)
    assert not list(RunDirectory(tmp_path).lines("end"))


GOOD = json.dumps({"prompt": "p", "answer": "a"})


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 3 is no JSON: Expecting property name"),
        ("[1, 2]", "line 3: expected {"),
        ('{"prompt": "p"}', "line 3: expected {"),
        ('{"prompt": 1, "answer": "a"}', "line 3: expected {"),
        ('{"prompt": "p", "answer": ""}', "line 3: expected {"),
        (json.dumps({"prompt": "", "answer": 63 * "a"}), "line 3: the answer has 64 tokens, expected at most 63"),
    ],
)
def test_lines_that_are_no_examples_are_named(example, tmp_path, capsys, line, message) -> None:
    file = tmp_path / "task.jsonl"
    file.write_text(f"{GOOD}\n\n{line}\n{GOOD}\n")
    error = refused(example, capsys, arguments([str(file)], tmp_path / "out", "--method", "c-lora"))
    assert f"--tasks: {file}, {message}" in error and not (tmp_path / "out").exists()


def test_files_and_models_that_do_not_fit_are_refused(example, files, saved, tmp_path, capsys) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    told = partial(refused, example, capsys)
    more = ("--method", "c-lora")
    empty, one, binary = (tmp_path / name for name in ("empty.jsonl", "one.jsonl", "binary.jsonl"))
    for file, content in ((empty, b"\n"), (one, GOOD.encode()), (binary, b"\xff\xfe")):
        file.write_bytes(content)
    out = tmp_path / "out"
    assert f"{empty} holds 0 examples, too few" in told(arguments([*files, str(empty)], out, *more))
    assert f"{one} holds 1 examples, too few" in told(arguments([str(one)], out, *more))
    assert f"{binary} cannot be read" in told(arguments([str(binary)], out, *more))
    assert "nowhere.jsonl cannot be read" in told(arguments([str(tmp_path / "nowhere.jsonl")], out, *more))
    assert "--tasks: got two files of one name" in told(arguments([files[0], files[0]], out, *more))
    assert "--max-length: got 65, expected 2 to the model's 64" in told(
        arguments(files, out, "--max-length", "65", *more)
    )
    assert "--accumulate: got 0" in told(arguments(files, out, "--accumulate", "0", *more))
    assert "--held-out: got 1.0" in told(arguments(files, out, "--held-out", "1", *more))
    gpt = tmp_path / "gpt"
    GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=9, n_positions=64, bos_token_id=0,
                               eos_token_id=1)).save_pretrained(gpt)  # fmt: skip
    error = told(arguments(files, out, "--model", str(gpt), *more))
    assert "--method c-lora: targets: " in error and "q_proj" in error
    nowhere = tmp_path / "nowhere"
    assert f"--model: got {nowhere}, expected a folder" in told(arguments(files, out, "--model", str(nowhere), *more))
    bare = tmp_path / "bare"
    example.load_model(None, torch.float32).save_pretrained(bare)
    assert f"--model: no tokenizer can be loaded from {bare}" in told(
        arguments(files, out, "--model", str(bare), *more)
    )
    assert "not allowed with argument" in told([*arguments(files, out, *more), "--model", str(saved)])
    assert not out.exists()


def test_the_preset_is_what_was_published_and_options_override_it(example, files, tmp_path) -> None:
    names = ("method", "r", "lr", "epochs", "batch", "accumulate", "optimizer")
    base = ["--config", "tiny", "--tasks", *files, "--out", str(tmp_path)]
    _, args = example.parse([*base, "--preset", "slao"])
    assert tuple(getattr(args, name) for name in names) == ("slao", 8, 5e-5, 5, 2, 4, "adamw")
    _, args = example.parse([*base, "--preset", "slao", "--method", "c-lora", "--lr", "0.1", "--optimizer", "sgd"])
    assert tuple(getattr(args, name) for name in names) == ("c-lora", 8, 0.1, 5, 2, 4, "sgd")
    _, args = example.parse([*base, "--method", "c-lora"])
    assert (args.optimizer, args.lr, args.r, args.options) == ("sgd", 0.02, None, {})
