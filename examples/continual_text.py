"""A language model learns one text task after another.

    python examples/continual_text.py --model M --preset slao --tasks a.jsonl b.jsonl --out DIR

M is a folder with a model of transformers that has q_proj and v_proj layers (Llama and its kin) and its tokenizer, or
its name on the hub; --config tiny takes a small one with random weights, on bytes. A task is a file of JSON lines, one
for each example:

    {"prompt": "a text", "answer": "what is to follow it, not empty"}

The loss is on answers alone. After each task come loss and exact answers on what was held out of every task so far; the
last table has the mean loss over tasks, a token, after the last of them.

The run can be stopped at any moment: the same command with --resume goes on. So does a run that has ended, with further
files after those of --tasks. DIR/model is then what was learned, its adapters merged, for transformers'
AutoModelForCausalLM.from_pretrained, with the tokenizer.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import torch
from continual_options import METHODS, Refused, attach, check, fill, local_or_hub, parser_of
from continual_run import Lesson, command, groups_of, learn_in_order, make_optimizer, report, rows_of, save_model, start
from texts import Batch, Bytes, Example, Pretrained, Task, Tokens, answers, load_task
from torch import Tensor, nn

from clora_kernels.continual import ContinualMethod, RunDirectory

TARGETS = ["q_proj", "v_proj"]
# What SLAO's paper reports; the optimizer it leaves open, here AdamW.
PRESETS = {
    "slao": {"method": "slao", "r": 8, "lr": 5e-5, "epochs": 5, "batch": 2, "accumulate": 4, "optimizer": "adamw"}
}
DEFAULTS = {"method": "slao", "epochs": 5, "batch": 2, "accumulate": 4, "seed": 0}
TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 512}  # fmt: skip


def load_model(name: str | None, dtype: torch.dtype) -> nn.Module:
    """A causal language model whose weights are of ``dtype``; None: the small one.

    Raises:
        Refused: it cannot be loaded, or lacks weights.
    """
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    if name is None:
        config = LlamaConfig(
            vocab_size=Bytes.size, pad_token_id=Bytes.pad, bos_token_id=Bytes.bos, eos_token_id=Bytes.eos, **TINY
        )
        return LlamaForCausalLM(config).to(dtype)
    local_or_hub("--model", name)
    try:
        model, loaded = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, output_loading_info=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise Refused(f"--model: {name} cannot be loaded: {error}") from error
    if loaded["missing_keys"]:
        raise Refused(f"--model: {name} lacks the weights {', '.join(sorted(loaded['missing_keys'])[:3])}, ...")
    return model


def load_tokens(name: str | None) -> Tokens:
    """The model's tokenizer; None: bytes.

    Raises:
        Refused: there is none.
    """
    from transformers import AutoTokenizer

    if name is None:
        return Bytes()
    try:
        return Pretrained(AutoTokenizer.from_pretrained(name))
    except Refused:
        raise
    except (OSError, ValueError, KeyError) as error:
        raise Refused(f"--model: no tokenizer can be loaded from {name}: {error}") from error


class Texts:
    """The course: a task is a file."""

    def __init__(self, args: argparse.Namespace, tasks: list[Task], tokens: Tokens) -> None:
        self.args, self.texts, self.tokens, self.tasks = args, tasks, tokens, len(tasks)
        self.kept: dict[str, Any] = {}

    def head(self, task: int) -> None:
        """None: the model's own stays frozen."""

    def batches(self, examples: list[Example], size: int) -> list[Batch]:
        parts = [examples[i : i + size] for i in range(0, len(examples), size)]
        return [Batch.of(part, self.tokens.pad, self.args.device) for part in parts]

    def lesson(self, task: int, method: ContinualMethod, head: nn.Module | None) -> Lesson:
        args, examples = self.args, self.texts[task - 1].train
        optimizer = make_optimizer(args.optimizer, groups_of(method, args), args.weight_decay)
        size = args.batch * args.accumulate

        def step(number: int) -> None:
            rows = rows_of(number, len(examples), size, args.seed, "order", task)
            batches = self.batches([examples[i] for i in rows], args.batch)
            total = sum(len(examples[i].answer) for i in rows)

            def mean_loss(batch: Batch) -> Tensor:
                return answers(method.model, batch).loss / total

            method.training_step(batches, [lambda b=batch: mean_loss(b) for batch in batches], optimizer)

        return Lesson(args.epochs * -(-len(examples) // size), step, {"optimizer": optimizer})

    def test(self, task: int, method: ContinualMethod, run: RunDirectory) -> None:
        from tqdm import tqdm

        losses, exact = [], []
        with method.inference() as model, torch.no_grad():
            for name, _, examples in self.texts[:task]:
                size = 4 * self.args.batch
                batches = tqdm(self.batches(examples, size), f"test of {name}", leave=False, unit="batch")
                found = [answers(model, batch) for batch in batches]
                losses.append(float(sum(f.loss.double() for f in found)) / sum(len(e.answer) for e in examples))
                exact.append(sum(int(f.exact.sum()) for f in found) / len(examples))
        run.record(task, exact, exact[-1], [len(t.test) for t in self.texts[:task]], loss=losses)
        for text, loss, share in zip(self.texts, losses, exact, strict=False):
            print(f"after task {task}: {text.name}: loss {loss:.4f} a token, {share:.1%} of the answers exact")


def parse(argv: list[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = parser_of(__doc__, ("c-lora", "slao", "lora"), PRESETS, DEFAULTS)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--model", help="folder of a model of transformers with its tokenizer, or its name on the hub")
    which.add_argument("--config", choices=("tiny",), help="a small Llama on bytes, its weights random")
    parser.add_argument("--tasks", nargs="+", type=Path, required=True, help="files of JSON lines, in order; see above")
    parser.add_argument(
        "--held-out", type=float, default=0.2, help="share of each file to test on (default: %(default)s)"
    )
    parser.add_argument("--max-length", type=int, help="tokens of an example (default: 512, or the model's fewer)")
    parser.add_argument("--accumulate", type=int, help="batches that make a step together (default: 4)")
    args = parser.parse_args(argv)
    own = METHODS[args.method or PRESETS.get(args.preset, DEFAULTS)["method"]]
    published = {name: getattr(own, name) for name in ("optimizer", "lr", "weight_decay")}
    fill(args, PRESETS.get(args.preset, {}), DEFAULTS, published)
    check(parser, args, accumulate=1)
    if not 0 < args.held_out < 1:
        parser.error(f"--held-out: got {args.held_out}, expected a share between 0 and 1")
    if len({task.name for task in args.tasks}) < len(args.tasks):
        parser.error("--tasks: got two files of one name, expected each once")
    return parser, args


def learn(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    model = load_model(args.model, getattr(torch, args.dtype)).to(args.device)
    longest = getattr(model.config, "max_position_embeddings", None) or math.inf
    fill(args, {"max_length": min(512, longest)})
    if not 2 <= args.max_length <= longest:
        raise Refused(f"--max-length: got {args.max_length}, expected 2 to the model's {longest}")
    method = attach(args.method, model, TARGETS, args.options)
    tokens = load_tokens(args.model)
    tasks = [load_task(file, tokens, args.held_out, args.max_length, args.seed) for file in args.tasks]
    run, resumes = start(args, [str(file) for file in args.tasks], [[len(t.train), len(t.test)] for t in tasks])
    print(f"{len(tasks)} tasks, {sum(len(t.train) for t in tasks)} examples to learn from, "
          f"{sum(len(t.test) for t in tasks)} held out; {args.method} on {len(method.layers)} layers")  # fmt: skip
    learn_in_order(Texts(args, tasks, tokens), method, run, resumes, args.save_every)
    *_, last = run.lines("test")
    losses = last["values"]["loss"]
    print(report(run, args.method, loss=f"{sum(losses) / len(losses):.4f}"))
    save_model(args.out / "model", method, lambda model: model)
    tokens.save(args.out / "model")


def main(argv: list[str] | None = None) -> None:
    parser, args = parse(argv)
    command(parser, ("transformers", "tqdm", "safetensors"), lambda: learn(args))


if __name__ == "__main__":
    main()
