"""The protocol that every continual-learning method follows: state and rules of the method, no training loop.

A task runs through the calls on the left, in this order; a method overrides the hooks on the right (in parentheses:
what they do by default)::

    method = Method(model, targets=[...])       make_layer(linear)          what takes a target's place (no default)
    method.begin_task()                         on_task_start()             (nothing)
                                                trainable()                 what learns (every adapter parameter)
    optimizer = SGD(method.param_groups(lr))    param_groups(lr)            (all of it at one rate)
                                                check_optimizer(optimizer)  warn of one that does not suit (nothing)
    every batch:
        method.training_step(inputs, task_loss, optimizer)
                                                extra_steps(inputs)         steps on losses of their own first (none)
                                                extra_losses()              added to the task's loss (none)
                                                adjust_gradients(step)      between backward and step (nothing)
    report = method.end_task()                  on_task_end()               measures for the report (none)
    with method.inference(task): ...            inference(task)             (eval mode, adapters merged)
                                                views()                     whose inference to test by (one for all)

A method keeps what it carries from task to task in adapters, which are saved by themselves, and in ``self.kept``, a
flat dict of tensors; both go into ``state_dict``, so that a method in one file need not write saving and loading. A
training loop of one's own calls ``extra_losses`` and ``adjust_gradients`` where ``training_step`` does.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..modules.adapter import AdapterLinear
from ..modules.inject import Targets, freeze_base, inject, merge_all, unmerge_all


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


class ContinualMethod:
    """Base class: swaps the targets' layers, freezes the rest, counts tasks, saves and loads.

    Args:
        model: any nn.Module, changed in place: layers are swapped and every other parameter stops requiring a gradient.
            What else is to learn (a head inside the model) is made to require one again afterwards.
        targets: name suffixes, or one regular expression, as :func:`clora_kernels.inject` takes them.

    Attributes:
        layers: the method's layers by their names in the model.
        task: the number of the task begun last, from 1; 0 before the first.
        in_task: whether that task is still being learned.
        kept: tensors that the method carries along, by name.

    Raises:
        ValueError: no layer of the model matches.
        TypeError: ``make_layer`` made something other than an adapted linear layer.
    """

    def __init__(self, model: nn.Module, targets: Targets) -> None:
        self.model = model
        self.task, self.in_task = 0, False
        self.kept: dict[str, Tensor] = {}
        self.layers = self.attach(targets)

    def attach(self, targets: Targets) -> dict[str, AdapterLinear]:
        """Swap the targets of ``self.model`` and freeze the rest; the method's layers by name, each once."""
        layers: dict[str, AdapterLinear] = {}
        for name in inject(self.model, self.make_layer, targets).swapped:
            layer = self.model.get_submodule(name)
            if not isinstance(layer, AdapterLinear):
                raise TypeError(f"make_layer: got {type(layer).__name__} for {name}, expected an AdapterLinear")
            if layer not in layers.values():
                layers[name] = layer
        freeze_base(self.model)
        return layers

    # The hooks of a method

    def make_layer(self, linear: nn.Module) -> AdapterLinear:
        """The layer that takes the place of ``linear``, for instance a RoutedLoRALinear."""
        raise NotImplementedError(f"{type(self).__name__} does not say which layer takes the place of a target")

    def on_task_start(self) -> None:
        """Prepare adapters and ``kept`` for task ``self.task``."""

    def trainable(self) -> list[nn.Parameter]:
        """The adapter parameters that learn in task ``self.task``: from the options and the task's number alone."""
        return [p for layer in self.layers.values() for p in layer.adapter_parameters()]

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

    @contextmanager
    def inference(self, task: int | None = None) -> Iterator[nn.Module]:
        """The model as it is tested: in eval mode, adapters merged; as it was on leaving, bit for bit.

        ``task`` chooses among the views of a method that has more than one.
        """
        modes = {module: module.training for module in self.model.modules()}
        try:
            self.model.eval()
            merge_all(self.model, backup="device")
            yield self.model
        finally:
            unmerge_all(self.model)
            for module, training in modes.items():
                module.training = training

    # What drives them

    def begin_task(self) -> None:
        """Start the next task.

        Raises:
            RuntimeError: the last one has not ended.
        """
        if self.in_task:
            raise RuntimeError(f"begin_task: task {self.task} is still being learned, expected end_task() first")
        self.task, self.in_task = self.task + 1, True
        self._optimizer_checked = False
        self.on_task_start()
        self._mark_trainable()

    def training_step(
        self, inputs: Any, task_loss: Callable[[], Tensor], optimizer: torch.optim.Optimizer
    ) -> dict[str, Tensor]:
        """One batch: the extra steps, then a step on the task's loss and the extra losses together.

        Args:
            inputs: the batch, handed to ``extra_steps`` as it is.
            task_loss: runs the model and returns the task's 0-dim loss.

        Returns:
            Every loss by name, detached ("task" is the task's own), without a host sync.

        Raises:
            RuntimeError: outside a task.
        """
        if not self.in_task:
            raise RuntimeError("training_step: no task is being learned, expected begin_task() first")
        if not self._optimizer_checked:
            self.check_optimizer(optimizer)
            self._optimizer_checked = True
        losses = {}
        for name, loss in self.extra_steps(inputs):
            self._step(name, loss, optimizer)
            losses[name] = loss.detach()
        loss = task_loss()
        losses |= {"task": loss.detach()}
        for name, extra in self.extra_losses().items():
            losses[name] = extra.detach()
            loss = loss + extra
        self._step("task", loss, optimizer)
        return losses

    def _step(self, name: str, loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
        # None, not zeros: what a step does not reach must not move by momentum or weight decay.
        optimizer.zero_grad(set_to_none=True)
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
        self.in_task = False
        stored = sum(t.numel() for name, t in self.state_dict().items() if name not in ("task", "in_task"))
        return TaskReport(self.task, trained, stored, measures)

    def inference_model(self) -> nn.Module:
        """A copy of the model for use elsewhere: plain layers, adapters merged into their weights."""
        with self.inference():
            model = copy.deepcopy(self.model)
        plain: dict[nn.Module, nn.Module] = {}
        for parent in list(model.modules()):
            for name, child in list(parent._modules.items()):
                if isinstance(child, AdapterLinear):
                    setattr(parent, name, plain.setdefault(child, child.to_linear()))
        return model

    def _mark_trainable(self) -> None:
        learning = {id(p) for p in self.trainable()}
        for layer in self.layers.values():
            for p in layer.adapter_parameters():
                p.requires_grad_(id(p) in learning)
                p.grad = None

    # Saving and loading

    def state_dict(self) -> dict[str, Tensor]:
        """What the method needs to go on, flat: adapters, ``kept``, the task's number; not the frozen weights."""
        state = {"task": torch.tensor(self.task), "in_task": torch.tensor(self.in_task)}
        for name, layer in self.layers.items():
            state |= {f"layers.{name}.{k}": v for k, v in layer.adapter_state_dict().items()}
        return state | {f"kept.{k}": v for k, v in self.kept.items()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from where ``state_dict`` was taken, on a method attached with the same options to the same model.

        Raises:
            ValueError: layers or tensors that are missing, unexpected or of another shape.
        """
        adapters: dict[str, dict[str, Tensor]] = {name: {} for name in self.layers}
        kept, strange = {}, []
        for key, tensor in state.items():
            kind, _, rest = key.partition(".")
            layer, _, name = rest.rpartition(".")
            if kind == "layers" and layer in adapters:
                adapters[layer][name] = tensor
            elif kind == "kept":
                kept[rest] = tensor
            elif key not in ("task", "in_task"):
                strange.append(key)
        missing = [k for k in ("task", "in_task") if k not in state] + [n for n, t in adapters.items() if not t]
        if missing or strange:
            raise ValueError(f"state: missing {missing}, unexpected {strange}, expected the layers {list(self.layers)}")
        for name, tensors in adapters.items():
            self.layers[name].check_adapter_state_dict(tensors)
        for name, tensors in adapters.items():
            self.layers[name].load_adapter_state_dict(tensors)
        device = next((p.device for p in self.trainable()), torch.device("cpu"))
        self.kept = {k: v.to(device, copy=True) for k, v in kept.items()}
        self.task, self.in_task = int(state["task"]), bool(state["in_task"])
        self._optimizer_checked = False
        self._mark_trainable()
