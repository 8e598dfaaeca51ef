"""Prompts and answers from files of JSON lines, as tokens, and batches of them for a causal language model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from continual_options import Refused
from continual_run import generator
from torch import Tensor, nn

IGNORED = -100


class Tokens(Protocol):
    """How texts become tokens; ``pad`` fills up a batch."""

    pad: int

    def prompt(self, text: str) -> list[int]:
        """With what a text begins with."""

    def answer(self, text: str) -> list[int]:
        """With what a text ends with."""

    def save(self, folder: Path) -> None:
        """Into a model's folder, where there is something to save."""


class Bytes:
    """A token a byte of UTF-8, after three of its own."""

    pad, bos, eos, first = 0, 1, 2, 3
    size = 256 + first

    def prompt(self, text: str) -> list[int]:
        return [self.bos, *(byte + self.first for byte in text.encode())]

    def answer(self, text: str) -> list[int]:
        return [*(byte + self.first for byte in text.encode()), self.eos]

    def save(self, folder: Path) -> None:
        """Nothing: this class is all of it."""


class Pretrained:
    """A tokenizer of transformers. The answer is split by itself, so that where it begins does not depend on the
    prompt.

    Raises:
        Refused: it has no token for the end.
    """

    def __init__(self, tokenizer: Any) -> None:
        if tokenizer.eos_token_id is None:
            raise Refused("--model: its tokenizer has no end-of-sequence token, which answers end with")
        self.tokenizer = tokenizer
        self.pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id

    def prompt(self, text: str) -> list[int]:
        ids = list(self.tokenizer(text).input_ids)
        # Some end every text, which a prompt must not.
        return ids[:-1] if ids and ids[-1] == self.tokenizer.eos_token_id else ids

    def answer(self, text: str) -> list[int]:
        return [*self.tokenizer(text, add_special_tokens=False).input_ids, self.tokenizer.eos_token_id]

    def save(self, folder: Path) -> None:
        """As transformers loads it."""
        self.tokenizer.save_pretrained(folder)


class Example(NamedTuple):
    """The tokens of a prompt and of its answer."""

    prompt: list[int]
    answer: list[int]


class Task(NamedTuple):
    """A file: what is learned, and what is held out to test on."""

    name: str
    train: list[Example]
    test: list[Example]


def load_task(file: Path, tokens: Tokens, held_out: float, max_length: int, seed: int) -> Task:
    """A file with a line {"prompt": ..., "answer": ...} for each example; empty lines do not count. Of a prompt that is
    too long, the end is kept, after its first token.

    Raises:
        Refused: a file that is not there, holds too little, or has a line of something else or with too long an answer.
    """
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise Refused(f"--tasks: {file} cannot be read: {error}") from error
    examples = [
        read_line(f"{file}, line {number}", line, tokens, max_length)
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]
    n_test = max(round(held_out * len(examples)), 1)
    if len(examples) <= n_test:
        raise Refused(f"--tasks: {file} holds {len(examples)} examples, too few to learn and to hold out {n_test}")
    order = torch.randperm(len(examples), generator=generator(seed, "split", file.name)).tolist()
    test, train = ([examples[i] for i in sorted(rows)] for rows in (order[:n_test], order[n_test:]))
    return Task(file.stem, train, test)


def read_line(where: str, line: str, tokens: Tokens, max_length: int) -> Example:
    try:
        content = json.loads(line)
    except ValueError as error:
        raise Refused(f"--tasks: {where} is no JSON: {error}") from error
    texts = [content.get(name) if isinstance(content, dict) else None for name in ("prompt", "answer")]
    if not all(isinstance(text, str) for text in texts) or not texts[1]:
        raise Refused(f'--tasks: {where}: expected {{"prompt": a text, "answer": a text that is not empty}}')
    prompt, answer = tokens.prompt(texts[0]), tokens.answer(texts[1])
    room = max_length - len(answer)
    if room < 1:
        raise Refused(f"--tasks: {where}: the answer has {len(answer)} tokens, expected at most {max_length - 1}")
    if not prompt:
        raise Refused(f"--tasks: {where}: the prompt has no tokens, expected one at least")
    return Example(prompt if len(prompt) <= room else prompt[:1] + prompt[len(prompt) - room + 1 :], answer)


class Batch(NamedTuple):
    """Tokens [S, L], the mask of those that are not padding, and ``labels``: the answers' tokens in their places."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor

    @classmethod
    def of(cls, examples: Sequence[Example], pad: int, device: str) -> Batch:
        length = max(len(e.prompt) + len(e.answer) for e in examples)
        rows = torch.full((3, len(examples), length), pad)
        rows[1], rows[2] = 0, IGNORED
        for i, (prompt, answer) in enumerate(examples):
            end = len(prompt) + len(answer)
            rows[0, i, :end] = torch.tensor(prompt + answer)
            rows[1, i, :end] = 1
            rows[2, i, len(prompt) : end] = torch.tensor(answer)
        return cls(*rows.to(device))


class Found(NamedTuple):
    """Of a batch: the answers' cross-entropy summed over tokens, and whether each is what greedy decoding gives [S]."""

    loss: Tensor
    exact: Tensor


def answers(model: nn.Module, batch: Batch) -> Found:
    """Decoding gives an answer, with its end, exactly where each of its tokens is the likeliest after those before it:
    one forward tells."""
    scores = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[:, :-1].float()
    labels = batch.labels[:, 1:]
    loss = F.cross_entropy(scores.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum")
    return Found(loss, ((scores.argmax(-1) == labels) | (labels == IGNORED)).all(1))
