"""transformers' Trainer as the training loop of a continual method::

    method = CLoRA(model, targets=["q_proj", "v_proj"])
    callback = ContinualCallback(method)
    for dataset in tasks:
        method.begin_task()                      # before the optimizer: what learns may depend on the task
        optimizer = torch.optim.SGD(method.param_groups(0.02), momentum=0.9)
        Trainer(model, args, train_dataset=dataset, callbacks=[callback], optimizers=(optimizer, None)).train()

Trainer computes the task's loss, clips and steps; the callback adds what ``ContinualMethod.training_step`` would: the
extra losses to the loss that the model returns, ``adjust_gradients("task")`` before the optimizer's step (Trainer has
clipped by then), the boundary when training is over. Within a step of several micro batches the extra losses count
once, however Trainer scales the task's: where it passes ``num_items_in_batch`` to the model, the model's losses add up
to the step's and the extra ones are asked for after the last micro batch; else Trainer divides each micro batch's loss
by their number, and the extra ones are added to each.

A checkpoint of Trainer holds the model's weights, adapters included; the method's state is saved beside them as
``continual.safetensors``. ``train(resume_from_checkpoint=...)`` on a model that the method was attached to anew goes on
from there, folded weights too. Trainer makes and loads the optimizer before a callback is asked: where what learns
depends on the task, call ``load_run(folder / "continual.safetensors", method)`` before the Trainer is made.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..continual.checkpoint import SavedRun, check_settings, read_states, save_run
from ..continual.extras import require
from ..continual.protocol import ContinualMethod, TaskReport

try:
    from accelerate.state import GradientState
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ImportError:
    require("accelerate", "transformers", extra="transformers")
    raise

FILE = "continual.safetensors"


class ContinualCallback(TrainerCallback):
    """Drives a method through the tasks that Trainer trains, one for each ``train()``; see the module's docstring.

    Args:
        method: attached to the model that Trainer gets, or to a part of it. A task that has begun goes on, else
            ``train()`` begins one.
        end_task: whether the end of training ends the task.
        checkpoint: the folder that ``train(resume_from_checkpoint=...)`` is given, where it is not
            ``<output_dir>/checkpoint-<step>``.

    Attributes:
        reports: those of the tasks that ended.

    The means of the extra losses since the last log are in Trainer's logs and log history as ``loss_<name>``; the
    method's listeners are told the losses of every step. What ``evaluate`` sees is the model as it is being trained:
    test in ``method.inference()``. Training that fails leaves the extra losses on the model's training loss until
    ``close()`` or the next ``train()``.

    Raises:
        ValueError: a method with steps of its own, for which Trainer has no place. When training begins: a model
            without the method's layers, more than one process or GPU, ``load_best_model_at_end`` (it would put the
            adapters of one step beside the method's state of another), a checkpoint that the model was not loaded from.
            At the first step: a model that returns no loss.
        RuntimeError: when training begins, an optimizer that lacks what learns in this task.
        FileNotFoundError: when training goes on from a checkpoint without the method's state.
    """

    def __init__(self, method: ContinualMethod, *, end_task: bool = True, checkpoint: str | Path | None = None) -> None:
        if type(method).extra_steps is not ContinualMethod.extra_steps:
            raise ValueError(
                f"method: got {type(method).__name__}, which makes steps of its own before the task's; Trainer makes "
                "one a batch: train it with method.training_step"
            )
        self.method, self.end_task, self.checkpoint = method, end_task, checkpoint
        self.reports: list[TaskReport] = []
        self._hook: torch.utils.hooks.RemovableHandle | None = None
        self._micro: list[dict[str, Tensor]] = []
        self._scaled = False
        self._sums: dict[str, Tensor] = {}
        self._steps = 0

    def close(self) -> None:
        """Take the extra losses off the model again."""
        if self._hook is not None:
            self._hook.remove()
        self._hook = None
        self._micro, self._sums, self._steps = [], {}, 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin the task, or go on with it."""
        model, optimizer = kwargs["model"], kwargs["optimizer"]
        self.close()
        self._check(args, model)
        if state.global_step > 0:
            folder = Path(self.checkpoint) if self.checkpoint else _folder(args, state)
            self._resume(folder, over=state.global_step >= state.max_steps)
        if not self.method.in_task:
            self.method.begin_task()
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        lacking = sum(id(p) not in held for p in self.method.trainable())
        if lacking:
            raise RuntimeError(
                f"optimizer: lacks {lacking} of the parameters that learn in task {self.method.task}, expected all of "
                "them: call method.begin_task() before Trainer makes its optimizer; now that it has begun, train() of "
                "another Trainer goes on with it"
            )
        self.method.check_optimizer(getattr(optimizer, "optimizer", optimizer))
        self._hook = model.register_forward_hook(self._add_extra_losses, with_kwargs=True)

    def _check(self, args: TrainingArguments, model: nn.Module) -> None:
        modules = set(model.modules())
        if not modules.issuperset(self.method.layers.values()):
            raise ValueError(
                f"model: got {type(model).__name__} without the layers of the method, expected the model that it was "
                "attached to"
            )
        if args.world_size > 1 or args.n_gpu > 1:
            raise ValueError(
                f"args: got {args.world_size} processes of {args.n_gpu} GPUs, expected one process and one device"
            )
        if args.load_best_model_at_end:
            raise ValueError("load_best_model_at_end: got True, expected False: a task ends with its last step")

    @torch.no_grad()
    def _resume(self, folder: Path, over: bool) -> None:
        """Trainer has loaded the model, adapters included."""
        states, layers = read_states(folder / FILE), self.method.layers
        check_settings(folder / FILE, states, self.method)
        state = states["method"]
        here = self.method.state_dict()
        of_adapters = [key for key in here if key.startswith("layers.")]
        if not all(key in state and torch.equal(here[key], state[key].to(here[key])) for key in of_adapters):
            raise ValueError(
                f"checkpoint: got {str(folder)!r}, whose adapters are not those that the model was loaded with, "
                "expected the folder that Trainer resumes from"
            )
        if here.keys() != state.keys() or not all(torch.equal(here[key], state[key].to(here[key])) for key in here):
            # The weights that Trainer loaded hold what was folded into them; the method folds it once more.
            folded = any(key.startswith("kept.folded.") for key in state)
            weights = {name: layer.weight.clone() for name, layer in layers.items()} if folded else {}
            self.method.load_state_dict(state)
            for name, weight in weights.items():
                layers[name].weight.copy_(weight)
        if over:  # else Trainer sets the generators before the first batch
            SavedRun(states["objects"], states["rng"]).restore()

    def _add_extra_losses(self, model: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        if not (model.training and torch.is_grad_enabled()):
            return None
        loss = output.get("loss") if isinstance(output, dict) else output[0] if isinstance(output, tuple) else None
        if not isinstance(loss, Tensor) or loss.dim() != 0:
            raise ValueError(
                f"model: got {type(output).__name__} without a loss from {type(model).__name__}, expected a 0-dim loss "
                "that the model computes: what Trainer computes from its output (compute_loss_func, label smoothing) "
                "has no place for the extra losses"
            )
        losses = {"task": loss.detach()}
        self._scaled = kwargs.get("num_items_in_batch") is not None
        if not self._scaled or GradientState().sync_gradients:
            for name, extra in self.method.extra_losses().items():
                losses[name] = extra.detach()
                loss = loss + extra
        self._micro.append(losses)
        if isinstance(output, dict):
            output["loss"] = loss
            return output
        return (loss, *output[1:])

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Where ``training_step`` adjusts gradients."""
        self.method.adjust_gradients("task")

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Tell the method's listeners the losses of the step, as they went into it."""
        asked = {name: [values[name] for values in self._micro if name in values] for name in self._micro[-1]}
        losses = {name: torch.stack(values).mean(0) for name, values in asked.items()}
        if self._scaled:
            losses["task"] = losses["task"] * len(self._micro)
        self._micro = []
        self._sums = {name: self._sums.get(name, 0) + loss for name, loss in losses.items()}
        self._steps += 1
        self.method.tell("step", losses)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the means of the extra losses to what Trainer logs of training."""
        if not logs or "loss" not in logs or not self._steps:
            return
        means = {f"loss_{name}": (total / self._steps).item() for name, total in self._sums.items() if name != "task"}
        self._sums, self._steps = {}, 0
        logs.update(means)
        state.log_history[-1].update(means)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Save the method's state beside Trainer's checkpoint."""
        save_run(_folder(args, state) / FILE, self.method)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """End the task."""
        self.close()
        if self.end_task:
            self.reports.append(self.method.end_task())


def _folder(args: TrainingArguments, state: TrainerState) -> Path:
    """Where Trainer saves at this step."""
    return Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
