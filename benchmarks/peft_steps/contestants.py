"""Who is measured: a PEFT model as ``get_peft_model`` leaves it, adapters in fp32, in eager mode and compiled, and the
same after ``clora_kernels.integrations.peft.accelerate``, both too.

All get the same weights, adapters and batch. A training step is the loss, its gradients and a step of AdamW on the
adapters; of generation two steps are measured, a token each, with the keys and values of earlier ones in a static
cache, as a compiled model wants it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from continual.models import CLASSES
from torch import Tensor, nn

from .models import MODELS, WORDS, image_size, make_model
from .points import RANK, Point

_LEARNED = 0.02  # standard deviation of lora_B, which would start at zero
_RATE = 1e-9  # steps that are timed leave the parameters practically where they are: every call does the same
_STEPS = 2


@dataclass(frozen=True, eq=False)
class Problem:
    """``model``: a PeftModel; ``batch``: the arguments of its forward, of generation all tokens [S, tokens + 2];
    ``labels``: [S] or [S, tokens], of generation none. ``compiled``: contestants that took long to make, by name."""

    point: Point
    model: nn.Module
    batch: dict[str, Tensor]
    labels: Tensor | None
    compiled: dict[str, Training | Generation] = field(default_factory=dict)


def make_problem(point: Point, device: torch.device, seed: int = 0) -> Problem:
    """Random weights, adapters, words or images, and labels of a point."""
    from peft import LoraConfig, get_peft_model

    torch._dynamo.reset()  # what was compiled for other problems counts towards the limit of what is kept
    torch.manual_seed(seed)
    shape = MODELS[point.model]
    length = point.tokens + (_STEPS if point.generates else 0)
    base = make_model(shape, length, device).to(point.dtype)
    layers = [name.rpartition(".")[2] for name in shape.linears()]
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, lora_dropout=point.dropout_p, target_modules=layers)
    model = get_peft_model(base, config).train(not point.generates)
    with torch.no_grad(), device:
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=_LEARNED)
        if shape.llama:
            batch, labels = {"input_ids": torch.randint(WORDS, (point.batch, length))}, None
            if not point.generates:
                labels = torch.randint(WORDS, (point.batch, length))
        else:
            side = image_size(length)
            batch = {"pixel_values": torch.randn(point.batch, 3, side, side).to(point.dtype)}
            labels = torch.randint(CLASSES, (point.batch,))
    return Problem(point, model, batch, labels)


class Training:
    """A training step in two parts: ``forward`` gives the loss, ``backward`` differentiates it and steps. ``run`` is
    what calls ``model``: itself, or what was compiled of it."""

    def __init__(self, problem: Problem, model: nn.Module, run: nn.Module) -> None:
        self.model, self.run, self.labels = model, run, problem.labels
        dtype = next(model.parameters()).dtype
        self.batch = {name: t.to(dtype) if t.is_floating_point() else t for name, t in problem.batch.items()}
        if MODELS[problem.point.model].llama:
            self.batch["use_cache"] = False
        learning = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(learning, lr=_RATE)

    def logits(self) -> Tensor:
        return self.run(**self.batch).logits

    def loss_of(self, logits: Tensor) -> Tensor:
        """The cross-entropy, in fp32 at least."""
        wide = logits if logits.dtype == torch.float64 else logits.float()
        return F.cross_entropy(wide.flatten(0, -2), self.labels.flatten())

    def forward(self) -> Tensor:
        return self.loss_of(self.logits())

    def backward(self, loss: Tensor) -> None:
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)  # what a call leaves, another's peak memory would lack


class Generation:
    """Two steps of generation: ``forward`` gives the logits of the first, ``backward`` those of the second, and takes
    both out of the cache again. The tokens are given, so that all contestants have the same."""

    def __init__(self, problem: Problem, model: nn.Module, run: nn.Module) -> None:
        from transformers import StaticCache

        self.model, self.run, self.length = model, run, problem.point.tokens
        prompt, *self.tokens = problem.batch["input_ids"].split([self.length, *[1] * _STEPS], 1)
        self.cache = StaticCache(config=model.config, max_cache_len=self.length + _STEPS)
        with torch.no_grad():
            model(input_ids=prompt, past_key_values=self.cache, use_cache=True)

    @torch.no_grad()
    def _step(self, i: int) -> Tensor:
        return self.run(input_ids=self.tokens[i], past_key_values=self.cache, use_cache=True).logits

    def forward(self) -> Tensor:
        return self._step(0)

    def backward(self, logits: Tensor) -> Tensor:
        found = self._step(1)
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(self.length)
        return found


def step_of(problem: Problem, model: nn.Module, compiles: bool = False) -> Training | Generation:
    """The step of ``model``, which is a copy of the problem's."""
    kind = Generation if problem.point.generates else Training
    return kind(problem, model, torch.compile(model, dynamic=False) if compiles else model)


def peft(problem: Problem) -> Training | Generation:
    """PEFT's own layers."""
    return step_of(problem, copy.deepcopy(problem.model))


def ours(problem: Problem) -> Training | Generation:
    """Accelerated layers, all of them."""
    return step_of(problem, _accelerated(problem))


def peft_compiled(problem: Problem) -> Training | Generation:
    """PEFT's own layers under ``torch.compile``."""
    return _kept(problem, "peft_compiled", lambda: copy.deepcopy(problem.model))


def ours_compiled(problem: Problem) -> Training | Generation:
    """Accelerated layers under ``torch.compile``."""
    return _kept(problem, "ours_compiled", lambda: _accelerated(problem))


def _kept(problem: Problem, name: str, make: Callable[[], nn.Module]) -> Training | Generation:
    """What was checked is what is timed: compiling it again would take as long again."""
    if name not in problem.compiled:
        problem.compiled[name] = step_of(problem, make(), compiles=True)
    return problem.compiled[name]


def _accelerated(problem: Problem) -> nn.Module:
    from clora_kernels.integrations.peft import accelerate

    model = copy.deepcopy(problem.model)
    report = accelerate(model)
    if report.left_alone:
        raise AssertionError(f"layers are left to PEFT:\n{report}")
    return model


def why_not(name: str, point: Point, device: torch.device) -> str | None:
    """Why a contestant cannot take part at a point; None if it can."""
    if name.endswith("_compiled") and not point.compiled:
        return "compiled at a few points only, for that takes longer than all else"
    return None


OURS = {"ours": ours, "ours_compiled": ours_compiled}
BUILDERS: dict[str, Callable[[Problem], Training | Generation]] = {
    "peft": peft, "peft_compiled": peft_compiled, **OURS,
}  # fmt: skip
