"""What must hold before a time is taken: the logits, and the gradient of every adapter's parameter, against PEFT's own
model in fp64.

Each is held to twice the error that PEFT's own has in the point's dtype, and a spacing of the dtype. With dropout all
draw the same: PEFT's layers get a dropout that draws its seeds as accelerated layers do, in the order of the calls.
What is compiled draws otherwise, and is held to PEFT's own without dropout. (transformers computes norms and rotary
embeddings in fp32 whatever the model's dtype: the truth has their roundings too.)

Beside the verdict stands what one forward and backward launches: on a GPU kernels; on a CPU the operators that Python
and autograd call, views among them, which of a compiled graph would be a part and are not told.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from clora_kernels import dropout_mask
from clora_kernels.autograd.routed_lora.arguments import draw_seed

from .contestants import BUILDERS, Generation, Problem, Training, step_of


@dataclass(frozen=True)
class Verdict:
    """The largest relative Frobenius error of logits and gradients, and whose it is; what a step launches."""

    error: float | None = None
    error_of: str | None = None
    launches: int | None = None


class Replayed(nn.Module):
    """nn.Dropout that draws as routed LoRA does: the same seed from the same state of the generator, the same mask."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        return x * dropout_mask(x, self.p, draw_seed(x.device)) / (1 - round(65536 * self.p) / 65536)


def truths(problem: Problem) -> dict[str, Tensor]:
    """Results of PEFT's own model in fp64, and as "error/..." the relative error of each in the point's dtype; where
    the point drops and is compiled, both also without dropout, as "plain/..."."""
    found = _truths(problem, drops=problem.point.dropout_p > 0)
    if problem.point.dropout_p > 0 and problem.point.compiled:
        found |= {f"plain/{name}": t for name, t in _truths(problem, drops=False).items()}
    return found


def _truths(problem: Problem, drops: bool) -> dict[str, Tensor]:
    from peft.tuners.lora.layer import LoraLayer

    own = copy.deepcopy(problem.model)
    for layer in (module for module in own.modules() if isinstance(module, LoraLayer)):
        for name in layer.lora_dropout:
            layer.lora_dropout[name] = Replayed(problem.point.dropout_p).train(drops)
    wide = step_of(problem, copy.deepcopy(own).double())
    truth = _results(wide)
    del wide
    errors = _errors(_results(step_of(problem, own)), truth)
    return truth | {f"error/{name}": torch.tensor(error) for name, error in errors.items()}


def _results(step: Training | Generation) -> dict[str, Tensor]:
    """The logits, of generation those of both steps; of a training step the gradients by their parameters' names."""
    torch.manual_seed(0)
    if isinstance(step, Generation):
        first = step.forward()
        return {"first": first, "second": step.backward(first)}
    logits = step.logits()
    step.loss_of(logits).backward()
    gradients = {name: p.grad for name, p in step.model.named_parameters() if p.grad is not None}
    step.optimizer.zero_grad(set_to_none=True)
    return {"logits": logits.detach(), **gradients}


def _errors(results: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> dict[str, float]:
    """The relative error of each; AssertionError where one is missing, or too many."""
    if strange := set(results) ^ set(truth):
        raise AssertionError(f"results differ from those of the truth in {', '.join(sorted(strange))}")
    return {k: ((t.double() - truth[k]).norm() / truth[k].norm()).item() for k, t in results.items()}


def check(name: str, problem: Problem, truth: Mapping[str, Tensor]) -> Verdict:
    """The verdict on a contestant; ``truth`` as of :func:`truths`. Raises AssertionError if it must not be timed."""
    of_peft = {k.removeprefix("error/"): float(t) for k, t in truth.items() if k.startswith("error/")}
    expected = {k: truth[k] for k in of_peft}
    step, drops = BUILDERS[name](problem), problem.point.dropout_p > 0
    if drops and name == "peft":  # its own draws cannot be replayed: with those that can it is the reference
        errors = of_peft
    elif drops and name.endswith("_compiled"):
        plain = {k.removeprefix("plain/"): t for k, t in truth.items() if k.startswith("plain/")}
        of_peft = {k: float(plain[f"error/{k}"]) for k in of_peft}
        dropouts = [m for m in step.model.modules() if type(m) is nn.Dropout]
        for module in dropouts:
            module.eval()
        errors = _errors(_results(step), {k: plain[k] for k in of_peft})
        for module in dropouts:
            module.train()
    else:
        errors = _errors(_results(step), expected)
    spacing = torch.finfo(problem.point.dtype).eps
    for k, error in errors.items():
        allowed = 2 * of_peft[k] + spacing
        if not error <= allowed:
            raise AssertionError(f"{k} is off by {error:.2g} of its norm, allowed {allowed:.2g}")
    if fallen := [m.fell_back for m in step.model.modules() if getattr(m, "fell_back", None)]:
        raise AssertionError(f"layers went through PEFT's own forward: {fallen[0]}")
    worst = max(errors, key=errors.__getitem__)
    return Verdict(errors[worst], worst, launches(name, step))


def launches(name: str, step: Training | Generation) -> int | None:
    """How many kernels, on a CPU operators, a step takes."""
    device = next(step.model.parameters()).device
    if device.type == "cpu" and name.endswith("_compiled"):
        return None
    step.backward(step.forward())  # the first makes the optimizer's state
    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU], acc_events=True) as profiler:
        step.backward(step.forward())
        if on_gpu:
            torch.cuda.synchronize(device)
    events = profiler.events()
    if on_gpu:
        kernels = [e for e in events if e.device_type == DeviceType.CUDA and not e.is_user_annotation]
        return sum(not e.name.startswith(("Memcpy", "Memset")) for e in kernels)
    return sum(_is_operator(e) and not _is_inside_one(e) for e in events)


def _is_operator(event: torch.autograd.profiler_util.FunctionEvent) -> bool:
    namespace, colons, _ = event.name.partition("::")
    return bool(colons) and namespace != "autograd" and " " not in namespace


def _is_inside_one(event: torch.autograd.profiler_util.FunctionEvent) -> bool:
    while (event := event.cpu_parent) is not None:
        if _is_operator(event):
            return True
    return False
