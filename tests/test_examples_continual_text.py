"""The example on text with a tiny Llama: whole, stopped and resumed, what its loss is, and what it refuses."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

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


RUNS = {
    "c-lora": ["--method", "c-lora", "--accumulate", "2", "--dtype", "bfloat16"],
    "lora": [
        "--method",
        "lora",
        "--optimizer",
        "adamw",
        "--lr",
        "0.01",
        "--set",
        "dropout_p=0.25",
        "--accumulate",
        "2",
    ],
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
        logs, ends = [], []
        for folder in (out, tmp_path / "whole"):
            lines = [line for line in RunDirectory(folder).lines() if line["event"] != "resume"]
            logs.append([(line["event"], line["task"], line["values"]) for line in lines])
            ends.append(read_states(folder / "checkpoint.safetensors"))
            ends[-1]["objects"].clear()
        assert logs[0] == logs[1]
        torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=0)


def test_what_a_run_found_is_in_its_log(example, files, tmp_path) -> None:
    """On an example that is held out and learned too, the answer becomes exact."""
    short = tmp_path / "short.jsonl"
    short.write_text(2 * (json.dumps({"prompt": "x", "answer": "y"}) + "\n"))
    more = ["--epochs", "150", "--batch", "1", "--accumulate", "1", "--held-out", "0.5", "--r", "8"]
    example.main(arguments([str(short)], tmp_path / "run", *RUNS["lora"][:6], *more, "--lr", "0.05"))
    run = RunDirectory(tmp_path / "run")
    found, (test,) = run.accuracies(), run.lines("test")
    assert found.samples.tolist() == [1] and found.accuracy.tolist() == [[1.0]] == [test["values"]["accuracy"]]
    losses = [line["values"]["losses"]["task"] for line in run.lines("step")]
    assert test["values"]["loss"][0] <= min(losses) < losses[0]
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["options"], config["samples"], config["max_length"]) == ({"r": 8}, [[1, 1]], 64)


def test_the_loss_is_the_mean_over_the_tokens_of_answers(example, texts) -> None:
    """Of all of a step's, whatever the batches; padding and prompts change nothing."""
    model, tokens = example.load_model(None, torch.float64).eval(), texts.Bytes()
    examples = [texts.Example(tokens.prompt(w), tokens.answer(w[::-1])) for w in WORDS[4:]]
    expected = []
    for prompt, answer in examples:
        scores = model(input_ids=torch.tensor([prompt + answer])).logits[0].double()
        expected.append(F.cross_entropy(scores[len(prompt) - 1 : -1], torch.tensor(answer), reduction="none"))
    for size in (1, 3, 8):
        batches = [texts.Batch.of(examples[i : i + size], tokens.pad, "cpu") for i in range(0, len(examples), size)]
        loss = sum(texts.answers(model, batch).loss for batch in batches)
        torch.testing.assert_close(loss.float(), torch.cat(expected).sum().float())
    assert examples[0].prompt[0] == tokens.bos and examples[0].answer[-1] == tokens.eos
    assert bytes(t - tokens.first for t in tokens.prompt("äb")[1:]).decode() == "äb"


def test_exact_answers_are_those_of_greedy_decoding(example, texts) -> None:
    model, tokens = example.load_model(None, torch.float32).eval(), texts.Bytes()
    examples = []
    for number, word in enumerate(WORDS):
        prompt = tokens.prompt(word)
        start = torch.tensor([prompt])
        end = model.generate(start, attention_mask=torch.ones_like(start), do_sample=False, max_new_tokens=4,
                             pad_token_id=tokens.pad)[0, len(prompt) :].tolist()  # fmt: skip
        if number % 2:
            # Wrong in one token: each of the four in turn.
            end[number // 2 % 4] = (end[number // 2 % 4] + 1) % tokens.size
        examples.append(texts.Example(prompt, end))
    exact = texts.answers(model, texts.Batch.of(examples, tokens.pad, "cpu")).exact
    assert exact.tolist() == [True, False] * 6


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


def test_prompts_that_are_too_long_keep_their_first_token_and_their_end(texts) -> None:
    tokens = texts.Bytes()
    line = json.dumps({"prompt": "abcdefgh", "answer": "xy"})
    whole = texts.read_line("here", line, tokens, 12)
    assert whole.prompt == tokens.prompt("abcdefgh") and whole.answer == tokens.answer("xy")
    for length in range(4, 12):
        cut = texts.read_line("here", line, tokens, length)
        assert cut.answer == whole.answer and len(cut.prompt) + len(cut.answer) == length
        assert cut.prompt == [tokens.bos, *tokens.prompt("abcdefgh")[1:][len(whole.prompt) - len(cut.prompt) :]]
