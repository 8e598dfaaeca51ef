"""What the examples on models from files share beside their options: a loop over tasks that can be stopped at any
moment and resumed."""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from continual_options import Refused
from torch import Tensor, nn

from clora_kernels.continual import ContinualMethod, RunDirectory, table
from clora_kernels.continual.extras import require


def make_optimizer(kind: str, groups: list[dict[str, Any]], weight_decay: float) -> torch.optim.Optimizer:
    """SGD with momentum 0.9, or AdamW."""
    if kind == "sgd":
        return torch.optim.SGD(groups, momentum=0.9, weight_decay=weight_decay)
    return torch.optim.AdamW(groups, weight_decay=weight_decay)


def groups_of(method: ContinualMethod, args: argparse.Namespace) -> list[dict[str, Any]]:
    """What of the method learns, at the rates that were asked for."""
    return method.param_groups(args.lr, **({} if args.lr_routing is None else {"lr_routing": args.lr_routing}))


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


def full_rows_of(step: int, samples: int, batch: int, *what: object) -> list[int]:
    """The samples of a training step, ``batch`` in each: where the order of an epoch ends, the next begins."""
    start, rows = step * batch, []
    for epoch in range(start // samples, (start + batch - 1) // samples + 1):
        order = torch.randperm(samples, generator=generator(*what, epoch)).tolist()
        rows += order[max(start - epoch * samples, 0) : start + batch - epoch * samples]
    return rows


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


class Watch:
    """A listener that looks whether training is still finite when it is asked to; until then it waits for no device."""

    def __init__(self) -> None:
        self.losses: list[Mapping[str, Tensor]] = []

    def __call__(self, event: str, task: int, values: Mapping[str, Any]) -> None:
        if event == "step":
            self.losses.append(dict(values))

    def check(self, task: int, step: int, lesson: Lesson, method: ContinualMethod) -> None:
        """Of the steps since the last check, ``step`` the number of the last in the task.

        Raises:
            Refused: one whose losses are not finite, or parameters that are not after it.
        """
        first, losses = step - len(self.losses), self.losses
        self.losses = []
        finite = [torch.stack([loss.isfinite() for loss in of_step.values()]).all() for of_step in losses]
        wrong = [i for i, fine in enumerate(torch.stack(finite).tolist() if finite else []) if not fine]
        if wrong:
            told = ", ".join(f"{name} {float(loss)}" for name, loss in losses[wrong[0]].items())
            raise Refused(
                f"task {task}, step {first + wrong[0] + 1}: got the losses {told}, expected finite ones; {HINT}"
            )
        modules = [part for part in lesson.objects.values() if isinstance(part, nn.Module)]
        learned = [*method.trainable(), *(p for module in modules for p in module.parameters())]
        if not all(bool(p.isfinite().all()) for p in learned):
            raise Refused(f"task {task}, step {step}: what was trained is not finite after it; {HINT}")


HINT = "training has diverged: a smaller --lr may help"


def learn_in_order(course: Course, method: ContinualMethod, run: RunDirectory, resumes: bool, save_every: int) -> None:
    """Learn and test one task after the other, from where ``run`` stands; a checkpoint after so many steps and after
    each test.

    Raises:
        Refused: nothing that fits to resume; training that has diverged, which no checkpoint is made of.
    """
    from tqdm import tqdm

    watch = Watch()
    method.listeners += [run.listener, watch]
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
                watch.check(task, run.step, lesson, method)
                run.save(method, **lesson.objects, **course.kept)
        watch.check(task, run.step, lesson, method)
        print(method.end_task())
        course.test(task, method, run)
        run.save(method, **course.kept)


# The command


# What may differ when a run is resumed.
FREE = ("out", "resume", "device", "save_every", "log_every", "workers", "set", "r")
# What may be longer: further tasks.
GROWING = ("tasks", "samples")


def start(
    args: argparse.Namespace, tasks: list[Any], samples: list[list[int]], **more: Any
) -> tuple[RunDirectory, bool]:
    """The run's folder, and whether there is something to resume.

    Args:
        tasks: of each task what makes it this one.
        samples: of each task how many there are to learn from and to test on.
        more: what decides the results beside tasks and options.

    Raises:
        Refused: a folder that cannot be written or holds another run, other than one of fewer tasks.
    """
    config = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if k not in FREE}
    config |= {**more, "tasks": tasks, "samples": samples}
    try:
        run = RunDirectory(args.out, every=args.log_every)
        return run, run.start(config, args.resume, growing=GROWING)
    except (OSError, ValueError) as error:
        raise Refused(f"--out: {error}") from error


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


def report(run: RunDirectory, name: str, **columns: str) -> str:
    """The table of metrics of a run that has ended, and what else is told of it."""
    return table({name: [run.accuracies()]}, {heading: {name: cell} for heading, cell in columns.items()})


def save_model(folder: Path, method: ContinualMethod, inner: Callable[[nn.Module], Any]) -> None:
    """Write what is tested, its adapters merged into plain layers, as transformers loads it. Where each task is tested
    by a view of its own, that of the last, and of every other the weights that differ, in ``view-<task>.safetensors``.

    Args:
        inner: the model of transformers in a copy of the method's.

    Raises:
        Refused: the folder cannot be written.
    """
    from safetensors.torch import save_file

    *others, last = method.views()
    try:
        model = inner(method.inference_model(last))
        model.save_pretrained(folder)
        weights = model.state_dict()
        for view in others:
            state = inner(method.inference_model(view)).state_dict()
            own = {name: t.contiguous() for name, t in state.items() if not torch.equal(t, weights[name])}
            save_file(own, folder / f"view-{view}.safetensors", {"format": "pt"})
    except OSError as error:
        raise Refused(f"--out: {folder} cannot be written: {error}") from error
