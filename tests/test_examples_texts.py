"""Tokens, batches and the loss of the example on text, against the sums by hand and against decoding."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
WORDS = ("ab", "ba", "aa", "bb", "abc", "cab", "bca", "äb", "bba", "abab", "cc", "ac")


@pytest.fixture(scope="module")
def texts():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        import texts

        yield texts


@pytest.fixture(scope="module")
def model(texts):
    """The example's small one."""
    import continual_text

    torch.manual_seed(0)
    return continual_text.load_model(None, torch.float32).eval()


def test_the_loss_is_the_mean_over_the_tokens_of_answers(model, texts) -> None:
    """Of all of a step's, whatever the batches; padding and prompts change nothing."""
    tokens = texts.Bytes()
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


def test_exact_answers_are_those_of_greedy_decoding(model, texts) -> None:
    tokens = texts.Bytes()
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


def test_prompts_that_are_too_long_keep_their_first_token_and_their_end(texts) -> None:
    tokens = texts.Bytes()
    line = json.dumps({"prompt": "abcdefgh", "answer": "xy"})
    whole = texts.read_line("here", line, tokens, 12)
    assert whole.prompt == tokens.prompt("abcdefgh") and whole.answer == tokens.answer("xy")
    for length in range(4, 12):
        cut = texts.read_line("here", line, tokens, length)
        assert cut.answer == whole.answer and len(cut.prompt) + len(cut.answer) == length
        assert cut.prompt == [tokens.bos, *tokens.prompt("abcdefgh")[1:][len(whole.prompt) - len(cut.prompt) :]]
