"""What the examples on models from files share: the methods by name, options, and a loop over tasks that can be stopped
at any moment and resumed."""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from clora_kernels.continual import DAC, SLAO, CLLoRA, CLoRA, ContinualMethod, RunDirectory, SequentialLoRA, table
from clora_kernels.continual.extras import require


class Refused(ValueError):
    """What was given cannot be worked with; the message says why, and the command ends with it."""


class Choice(NamedTuple):
    """A method and what it takes where neither a preset nor an option says otherwise."""

    method: type[ContinualMethod]
    parts: tuple[str, ...] = ("q", "v")  # of the blocks of a vision transformer
    optimizer: str = "sgd"
    lr: float = 0.01
    lr_end: float = 0.0
    weight_decay: float = 0.0
    head_scale: float = 10.0


METHODS = {
    "c-lora": Choice(CLoRA, lr=0.02),
    "cl-lora": Choice(CLLoRA, lr=0.03, weight_decay=1e-4, head_scale=1.0),
    "dac": Choice(DAC, ("q", "k", "v", "out", "fc1", "fc2"), "adamw", 2e-3, 1e-6, 1e-2),
    "slao": Choice(SLAO, optimizer="adamw", lr=5e-5),
    "lora": Choice(SequentialLoRA),
}


def attach(name: str, model: nn.Module, targets: Any, options: Mapping[str, Any]) -> ContinualMethod:
    """The method of that name on the targets of the model.

    Raises:
        Refused: what the method refuses.
    """
    try:
        return METHODS[name].method(model, targets, **options)
    except (TypeError, ValueError) as error:
        raise Refused(f"--method {name}: {error}") from error


def make_optimizer(kind: str, groups: list[dict[str, Any]], weight_decay: float) -> torch.optim.Optimizer:
    """SGD with momentum 0.9, or AdamW."""
    if kind == "sgd":
        return torch.optim.SGD(groups, momentum=0.9, weight_decay=weight_decay)
    return torch.optim.AdamW(groups, weight_decay=weight_decay)


def generator(*what: object) -> torch.Generator:
    """The random numbers of one thing, a batch say: the same whenever they are asked for, so that a run that is resumed
    in the middle need not draw what came before."""
    digest = hashlib.sha256(repr(what).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def rows_of(step: int, samples: int, batch: int, *what: object) -> list[int]:
    """The samples of a training step: a new order each epoch, whose last batch may be smaller."""
    epoch, number = divmod(step, -(-samples // batch))
    order = torch.randperm(samples, generator=generator(*what, epoch)).tolist()
    return order[number * batch : (number + 1) * batch]


# The loop


@dataclass
class Lesson:
    """One task as it is learned: ``step(i)`` for i from 0 to ``steps`` - 1, and what beside the method a run that goes
    on from the middle of it needs (head, optimizer, schedule)."""

    steps: int
    step: Callable[[int], object]
    objects: dict[str, Any] = field(default_factory=dict)


class Course(Protocol):
    """The tasks of an example, numbered from 1; ``kept`` are objects with a state that go from task to task."""

    tasks: int
    kept: dict[str, Any]

    def head(self, task: int) -> nn.Module | None:
        """The task's classifier, where it has one."""

    def lesson(self, task: int, method: ContinualMethod, head: nn.Module | None) -> Lesson:
        """Optimizer and steps, made once the method has begun the task."""

    def test(self, task: int, method: ContinualMethod, run: RunDirectory) -> None:
        """Record in ``run`` what the method can do after the task."""


def learn_in_order(course: Course, method: ContinualMethod, run: RunDirectory, resumes: bool, save_every: int) -> None:
    """Learn and test one task after the other, from where ``run`` stands; a checkpoint after so many steps and after
    each test."""
    from tqdm import tqdm

    method.listeners.append(run.listener)
    saved = None
    if resumes:
        try:
            saved = run.load(method)
        except (ValueError, RuntimeError, OSError) as error:
            raise Refused(f"--resume: {error}") from error
        print(f"resumed: {'in' if method.in_task else 'after'} task {method.task}, step {run.step}")
        if not method.in_task:
            saved.restore(**course.kept)
    for task in range(method.task + (not method.in_task), course.tasks + 1):
        head, begun = course.head(task), method.in_task
        if begun:
            method.head = head
        else:
            method.begin_task(head)
        lesson = course.lesson(task, method, head)
        if begun:
            saved.restore(**lesson.objects, **course.kept)
        method.model.train()
        for step in tqdm(
            range(run.step, lesson.steps), f"task {task}/{course.tasks}", lesson.steps, initial=run.step, unit="step"
        ):
            lesson.step(step)
            if run.step % save_every == 0:
                run.save(method, **lesson.objects, **course.kept)
        print(method.end_task())
        course.test(task, method, run)
        run.save(method, **course.kept)


# The command


def parser_of(doc: str, methods: tuple[str, ...], presets: Mapping[str, Mapping[str, Any]]) -> argparse.ArgumentParser:
    """Options of every example; those that a preset or the method may set are None until ``fill``."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    add = parser.add_argument
    add("--preset", choices=tuple(presets), help="published settings, which other options override")
    add("--method", choices=methods)
    add("--out", type=Path, required=True, help="folder of the run: log.jsonl, config.json, checkpoint.safetensors")
    add("--resume", action="store_true", help="go on with the run in --out, where there is one")
    add("--save-every", type=int, default=100, metavar="STEPS", help="checkpoint (default: %(default)s)")
    add("--log-every", type=int, default=10, metavar="STEPS", help="line of losses (default: %(default)s)")
    add("--epochs", type=int, help="of each task")
    add("--batch", type=int)
    add("--optimizer", choices=("sgd", "adamw"), help="(default: as the method was published, else sgd)")
    add("--lr", type=float)
    add("--weight-decay", type=float)
    add("--r", type=int, help="rank (default: the method's own)")
    add(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="further option of the method (JSON, or a text)",
    )
    add("--seed", type=int)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default: %(default)s)")
    add("--dtype", choices=("float32", "bfloat16"), default="float32")
    return parser


def fill(args: argparse.Namespace, *defaults: Mapping[str, Any]) -> None:
    """Options that were not given, from the first of ``defaults`` that has them."""
    for values in defaults:
        for name, value in values.items():
            if getattr(args, name) is None:
                setattr(args, name, value)


def check(parser: argparse.ArgumentParser, args: argparse.Namespace, **least: int) -> None:
    """End with a message where a number is too small, the device is not there, or --set is no NAME=VALUE."""
    for name, lowest in {"epochs": 1, "batch": 1, "save_every": 1, "log_every": 1, **least}.items():
        if getattr(args, name) < lowest:
            parser.error(f"--{name.replace('_', '-')}: got {getattr(args, name)}, expected at least {lowest}")
    for name, above in {"lr": True, "weight_decay": False}.items():
        value = getattr(args, name)
        if not (0 < value if above else 0 <= value) or value == math.inf:
            lowest = "above" if above else "of at least"
            parser.error(f"--{name.replace('_', '-')}: got {value}, expected a finite number {lowest} 0")
    try:
        torch.zeros(1, device=args.device)
    except (RuntimeError, AssertionError) as error:
        parser.error(f"--device: got {args.device}: {str(error).splitlines()[0]}")
    args.options = {} if args.r is None else {"r": args.r}
    for text in args.set:
        name, equals, value = text.partition("=")
        if not (name.isidentifier() and equals):
            parser.error(f"--set: got {text}, expected NAME=VALUE")
        try:
            args.options[name] = json.loads(value)
        except ValueError:
            args.options[name] = value


# What may differ when a run is resumed.
FREE = ("out", "resume", "device", "save_every", "log_every", "workers", "set", "r")


def start(args: argparse.Namespace, **more: Any) -> tuple[RunDirectory, bool]:
    """The run's folder, and whether there is something to resume.

    Raises:
        Refused: a folder that cannot be written or holds another run.
    """
    config = {name: value for name, value in vars(args).items() if name not in FREE}
    try:
        run = RunDirectory(args.out, every=args.log_every)
        return run, run.start({k: str(v) if isinstance(v, Path) else v for k, v in config.items()} | more, args.resume)
    except (OSError, ValueError) as error:
        raise Refused(f"--out: {error}") from error


def local_or_hub(option: str, name: str) -> None:
    """Refuse what can be no model: a path without a folder, which would be looked for on the hub."""
    path = Path(name)
    looks_local = path.is_absolute() or name.startswith(".") or len(path.parts) > 2
    if not path.is_dir() and (looks_local or path.exists()):
        raise Refused(f"{option}: got {name}, expected a folder with a model or the name of one on the hub")


def command(parser: argparse.ArgumentParser, packages: tuple[str, ...], run: Callable[[], None]) -> None:
    """``run()``, with what it refuses, and being stopped, told in a line."""
    try:
        require(*packages)
        run()
    except ImportError as error:
        sys.exit(f"this example {error}")
    except Refused as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, "stopped; with --resume it goes on from its last checkpoint\n")


def report(run: RunDirectory, name: str) -> str:
    """The table of metrics of a run that has ended."""
    return table({name: [run.accuracies()]})
