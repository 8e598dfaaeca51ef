"""The protocol that every continual-learning method follows: state and rules of the method, no training loop.

A task runs through the calls on the left, in this order; a method overrides the hooks on the right (in parentheses:
what they do by default)::

    method = Method(model, targets=[...])       make_layer(linear)          what takes a target's place (no default)
    method.begin_task(head)                     on_task_start()             (nothing)
                                                trainable()                 what learns (adapters and ``own``)
    optimizer = SGD(method.param_groups(lr))    param_groups(lr)            (all of it at one rate)
                                                check_optimizer(optimizer)  warn of one that does not suit (nothing)
    every batch:
        method.training_step(inputs, task_loss, optimizer)
                                                extra_steps(inputs)         steps on losses of their own first (none)
                                                extra_losses()              added to the task's loss (none)
                                                adjust_gradients(step)      between backward and step (nothing)
    report = method.end_task()                  on_task_end()               measures for the report (none)
    outputs = method.outputs(inputs)            views()                     whose inference to test by (one for all)
    with method.inference(view): ...            tested_adapters(view)       what a test puts into adapters (nothing)
    method.load_state_dict(state)               kept_shapes(finished, ...)  what ``kept`` holds (taken as it is)
                                                on_load()                   bring ``kept`` where it is used (nothing)

A method keeps what it carries from task to task in adapters, in the parameters ``self.own`` and in ``self.kept``, a
flat dict of tensors; all are in ``state_dict``, so that a method in one file need not write saving and loading. A
training loop of one's own calls ``check_optimizer``, ``extra_steps``, ``extra_losses``, ``adjust_gradients`` and
``tell`` where ``training_step`` does. Loggers are functions in ``self.listeners``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..modules.inject import Targets
from .attached import Adapters, AttachedLayers

Listener = Callable[[str, int, Mapping[str, Any]], object]
TaskLoss = Callable[[], Tensor]


@dataclass(frozen=True)
class TaskReport:
    """What a task did: its number from 1, how many values it trained and left to be stored (those of ``state_dict``),
    and the method's own measures; None is one that is not defined yet."""

    task: int
    trainable: int
    stored: int
    measures: Mapping[str, float | None] = field(default_factory=dict)

    def __str__(self) -> str:
        measures = [f"{k} {'-' if v is None else format(v, '.3g')}" for k, v in self.measures.items()]
        return ", ".join([f"task {self.task}: {self.trainable} trained, {self.stored} stored", *measures])


class ContinualMethod(AttachedLayers):
    """Base class: swaps the targets' layers, freezes the rest, counts tasks, saves and loads.

    Args:
        model: any nn.Module, changed in place: layers are swapped and every other parameter stops requiring a gradient.
            What else is to learn (a head inside the model) is made to require one again afterwards.
        targets: name suffixes, or one regular expression, as :func:`clora_kernels.inject` takes them.

    Attributes:
        layers: the method's layers by their names in the model.
        task: the number of the task begun last, from 1; 0 before the first.
        in_task: whether that task is still being learned.
        head: what ``begin_task`` was given. It is not in ``state_dict``: who resumes within a task sets it again.
        own: parameters of the method beside those of the layers, by name.
        kept: tensors that the method carries along, by name.
        listeners: called with what happened ("begin", "step" or "end"), the task's number and values by name: of a step
            its losses, 0-dim tensors that nobody has waited for yet; of an end those of the report.

    Raises:
        ValueError: no layer of the model matches.
        TypeError: ``make_layer`` made something other than an adapted linear layer.
    """

    def __init__(self, model: nn.Module, targets: Targets) -> None:
        self.task, self.in_task = 0, False
        self.head: nn.Module | None = None
        self.listeners: list[Listener] = []
        super().__init__(model, targets)

    # The hooks of a method, beside make_layer

    def on_task_start(self) -> None:
        """Prepare adapters, ``own`` and ``kept`` for task ``self.task``."""

    def trainable(self) -> list[nn.Parameter]:
        """The parameters that learn in task ``self.task``: from the options and the task's number alone."""
        return list(self.parameters())

    def param_groups(self, lr: float) -> list[dict[str, Any]]:
        """Groups for an optimizer, made anew for each task."""
        return [{"params": self.trainable(), "lr": lr}]

    def check_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Warn where this optimizer breaks a premise of the method; called at the first training step of a task."""

    def extra_steps(self, inputs: Any) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, loss): each is differentiated and stepped by itself before the task's own step of this batch."""
        yield from ()

    def extra_losses(self) -> dict[str, Tensor]:
        """0-dim losses by name, weighted already, to add to the task's; asked for after the task's forward."""
        return {}

    def adjust_gradients(self, step: str) -> None:
        """Change gradients after the backward of ``step``: the name of an extra step, or "task"."""

    def on_task_end(self) -> dict[str, float | None]:
        """Close the task: consolidate adapters and ``kept``; return measures for the report."""
        return {}

    def views(self) -> list[int | None]:
        """The tasks whose ``inference`` gives the test features: [None] where one model serves all classes."""
        return [None]

    def tested_adapters(self, view: int | None) -> Adapters:
        """Parameters of adapters that a test in this view has in the place of those that learn, by layer and name."""
        return {}

    def on_load(self) -> None:
        """Bring a loaded state to where it is used beyond adapters, ``own`` and ``kept``."""

    # What drives them

    @contextmanager
    def inference(self, view: int | None = None) -> Iterator[nn.Module]:
        """The model as it is tested: in eval mode, adapters merged; as it was on leaving, bit for bit.

        Args:
            view: one of ``views()``; None: that of a method with one, else the last.

        Raises:
            ValueError: a view that the method does not have.
        """
        with self.merged_for_test(self.tested_adapters(self._checked(view))) as model:
            yield model

    @torch.no_grad()
    def outputs(self, inputs: Any) -> list[Any]:
        """What the model gives for a batch (a tensor, or a tuple or mapping of its arguments) as it is tested, in each
        of ``views()``."""
        found = []
        for view in self.views():
            with self.inference(view):
                found.append(self.run(inputs))
        return found

    def inference_model(self, view: int | None = None) -> nn.Module:
        """A copy of the model for use elsewhere: plain layers, adapters merged into their weights.

        Raises:
            ValueError: a view that the method does not have.
        """
        with self.inference(view):
            return self.plain_copy()

    def _checked(self, view: int | None) -> int | None:
        views = self.views()
        if view is None and views:
            return views[-1]
        if view not in views:
            raise ValueError(f"view: got {view!r}, expected one of {views}")
        return view

    def begin_task(self, head: nn.Module | None = None) -> None:
        """Start the next task.

        Args:
            head: the task's classifier, for methods whose own steps go through it.

        Raises:
            RuntimeError: the last one has not ended.
        """
        if self.in_task:
            raise RuntimeError(f"begin_task: task {self.task} is still being learned, expected end_task() first")
        self.task, self.in_task, self.head = self.task + 1, True, head
        self._optimizer_checked = False
        try:
            with torch.no_grad():
                self.on_task_start()
        except Exception:
            self.task, self.in_task, self.head = self.task - 1, False, None
            raise
        self._mark_trainable()
        self.tell("begin", {})

    def training_step(
        self, inputs: Any, task_loss: TaskLoss | Sequence[TaskLoss], optimizer: torch.optim.Optimizer
    ) -> dict[str, Tensor]:
        """One batch: the extra steps, then a step on the task's loss and the extra losses together.

        Args:
            inputs: the batch, handed to ``extra_steps`` as it is.
            task_loss: runs the model and returns the task's 0-dim loss. Several, of which it is the sum, each need the
                memory of one: gradients accumulate over them.

        Returns:
            Every loss by name, detached ("task" is the task's own), without a host sync.

        Raises:
            RuntimeError: outside a task; a model in eval mode.
            ValueError: no loss.
        """
        if not task_loss:
            raise ValueError(f"task_loss: got {task_loss!r}, expected a function or several")
        if not self.in_task:
            raise RuntimeError("training_step: no task is being learned, expected begin_task() first")
        if not self.model.training:  # without dropout, and nothing would be counted for DAC to choose by
            raise RuntimeError("model: got one in eval mode, as from_pretrained gives it, expected model.train() first")
        if not self._optimizer_checked:
            self.check_optimizer(optimizer)
            self._optimizer_checked = True
        losses = {}
        for name, loss in self.extra_steps(inputs):
            # None, not zeros: what a step does not reach must not move by momentum or weight decay.
            optimizer.zero_grad(set_to_none=True)
            self._step(name, loss, optimizer)
            losses[name] = loss.detach()
        optimizer.zero_grad(set_to_none=True)
        *parts, last = [task_loss] if callable(task_loss) else task_loss
        done = []
        for part in parts:
            (loss := part()).backward()
            done.append(loss.detach())
        loss = last()
        losses["task"] = sum(done, loss.detach())
        for name, extra in self.extra_losses().items():
            losses[name] = extra.detach()
            loss = loss + extra
        self._step("task", loss, optimizer)
        self.tell("step", losses)
        return losses

    def _step(self, name: str, loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
        loss.backward()
        self.adjust_gradients(name)
        optimizer.step()

    def end_task(self) -> TaskReport:
        """Close the task and report on it.

        Raises:
            RuntimeError: outside a task.
        """
        if not self.in_task:
            raise RuntimeError("end_task: no task is being learned, expected begin_task() first")
        trained = sum(p.numel() for p in self.trainable())
        with torch.no_grad():
            measures = self.on_task_end()
        self.in_task, self.head = False, None
        report = TaskReport(self.task, trained, sum(t.numel() for t in self.layer_state().values()), measures)
        self.tell("end", {"trainable": report.trainable, "stored": report.stored, **measures})
        return report

    def tell(self, event: str, values: Mapping[str, Any]) -> None:
        """Call the listeners; a training loop of one's own tells "step", ``training_step`` tells it itself."""
        for listener in self.listeners:
            listener(event, self.task, values)

    def _mark_trainable(self) -> None:
        learning = {id(p) for p in self.trainable()}
        for p in self.parameters():
            p.requires_grad_(id(p) in learning)
            p.grad = None

    # Saving and loading

    def state_dict(self) -> dict[str, Tensor]:
        """What the method needs to go on, flat: adapters, ``own``, ``kept``, the task's number; not the frozen weights
        (what was folded into them is in ``kept``), of which ``base`` holds a fingerprint."""
        here = {"task": torch.tensor(self.task), "in_task": torch.tensor(self.in_task)}
        return here | {f"base.{name}": number for name, number in self.base.items()} | self.layer_state()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from where ``state_dict`` was taken, on a method attached with the same options to the same model as it
        was before the first task.

        Raises:
            ValueError: layers or tensors that are missing, unexpected or of another shape; a model of other weights.
            RuntimeError: the model's weights hold folded adapters already.
        """
        missing = [key for key in ("task", "in_task") if key not in state]
        if missing:
            raise ValueError(f"state: missing {missing}, expected what state_dict() gives")
        layers = {key: tensor for key, tensor in state.items() if key not in ("task", "in_task")}
        task, in_task = int(state["task"]), bool(state["in_task"])
        self.load_layer_state(layers, task - in_task, in_task)
        self.task, self.in_task, self.head = task, in_task, None
        self._optimizer_checked = False
        self.on_load()
        self._mark_trainable()
