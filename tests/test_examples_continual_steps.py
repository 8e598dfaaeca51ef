"""What the examples on models from files train with and test on, step by step, against the same by hand."""

from __future__ import annotations

import copy
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sequences import Net
from torch import Tensor, nn

from clora_kernels.continual import CosineHead, RunDirectory, SequentialLoRA

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
LR, DECAY, MOMENTUM = 0.25, 0.1, 0.9


@pytest.fixture(scope="module")
def modules():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        import continual_run
        import continual_text
        import continual_vit

        yield SimpleNamespace(run=continual_run, text=continual_text, vit=continual_vit)


class SGD:
    """By hand: v ← 0.9·v + (g + decay·p), p ← p − lr·v."""

    def __init__(self, parameters: list[Tensor]) -> None:
        self.parameters, self.momenta = parameters, [torch.zeros_like(p) for p in parameters]

    def step(self, loss: Tensor) -> None:
        grads = torch.autograd.grad(loss, self.parameters)
        with torch.no_grad():
            for p, v, grad in zip(self.parameters, self.momenta, grads, strict=True):
                v.copy_(MOMENTUM * v + grad + DECAY * p)
                p -= LR * v


def test_the_first_steps_of_adamw_decay_what_they_train(modules) -> None:
    """Constant gradients of 1: each step is one of lr, beside the decay."""
    p = nn.Parameter(torch.tensor([2.0, -3.0], dtype=torch.float64))
    optimizer = modules.run.make_optimizer("adamw", [{"params": [p], "lr": LR}], DECAY)
    expected = p.detach().clone()
    for _ in range(3):
        p.grad = torch.ones_like(p)
        optimizer.step()
        expected = (1 - LR * DECAY) * expected - LR
    torch.testing.assert_close(p.detach(), expected)


# Images of one colour each: what a crop of them is, is known.


class Colours(nn.Module):
    """Images [S, 3, H, W] to features [S, 5] of their mean colours, in fp64."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(3, 5)
        self.double()

    def forward(self, pixels: Tensor) -> Tensor:
        return self.q(pixels.double().mean((2, 3)))


COLOURS = {0: (200, 10, 30), 1: (10, 220, 60), 2: (40, 20, 250), 3: (90, 160, 90)}


def images_of(vit: Any, colours: dict[int, tuple[int, int, int]], times: int) -> Any:
    sources = [torch.tensor(c, dtype=torch.uint8)[:, None, None].expand(3, 6, 6) for c in colours.values()] * times
    return vit.Images(sources, torch.tensor(list(colours) * times), [str(c) for c in colours])


def features_of(model: nn.Module, colours: list[int]) -> Tensor:
    pixels = torch.tensor([COLOURS[c] for c in colours]).double() / 255
    return model((2 * pixels - 1)[:, :, None, None])


@pytest.fixture
def course(modules):
    """Two tasks of two classes; the test images of a class have the colour of the task's other class."""
    args = Namespace(seed=3, classes=2, tasks=None, batch=3, epochs=2, workers=1, device="cpu", head_scale=2.0,
                     optimizer="sgd", lr=LR, lr_end=0.0, weight_decay=DECAY,
                     lr_routing=None, steps=None)  # fmt: skip
    order = modules.vit.class_order(4, args.seed)
    swapped = dict(zip(order, (COLOURS[order[i]] for i in (1, 0, 3, 2)), strict=True))
    with ThreadPoolExecutor(1) as pool:
        yield modules.vit.Classes(
            args,
            images_of(modules.vit, COLOURS, 4),
            images_of(modules.vit, dict(sorted(swapped.items())), 2),
            modules.vit.Pixels(4),
            5,
            pool,
        )


def test_the_first_steps_on_images_are_sgd_with_momentum_and_decay(course) -> None:
    method = SequentialLoRA(Colours(), ["q"], r=2)
    head = course.head(1).double()
    method.begin_task(head)
    layer = method.layers["q"]
    plain, by_hand = copy.deepcopy(layer), copy.deepcopy(head)
    expected = SGD([plain.lora_A, plain.lora_B, *by_hand.parameters()])
    seen: list[Tensor] = []
    method.model.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    lesson = course.lesson(1, method, head)
    assert lesson.steps == 2 * 3 and isinstance(head, CosineHead) and head.scale == 2.0
    for number in range(2):
        lesson.step(number)
        colours = (seen[-1].mean((2, 3)) + 1) / 2 * 255
        classes = [min(COLOURS, key=lambda c, x=x: (x - torch.tensor(COLOURS[c])).abs().sum().item()) for x in colours]
        x = 2 * torch.tensor([COLOURS[c] for c in classes]).double() / 255 - 1
        weight = plain.weight + plain.scaling * plain.lora_B @ plain.lora_A
        labels = torch.tensor([course.groups[0].index(c) for c in classes])
        expected.step(F.cross_entropy(by_hand(F.linear(x, weight, plain.bias)), labels))
    found = [layer.lora_A, layer.lora_B, *head.parameters()]
    for mine, theirs in zip(found, expected.parameters, strict=True):
        torch.testing.assert_close(mine.float(), theirs.float())  # pixels are fp32


def test_class_means_are_of_the_training_images(course) -> None:
    method = SequentialLoRA(Colours(), ["q"], r=2)
    with torch.no_grad():
        # Colours as they are: classes are apart.
        method.layers["q"].weight.copy_(torch.eye(5, 3))
        method.layers["q"].bias.zero_()
    recorded: list[tuple] = []
    run = SimpleNamespace(record=lambda *what: recorded.append(what))
    for task, group in enumerate(course.groups, 1):
        method.begin_task()
        method.end_task()
        course.test(task, method, run)
        classes, means = course.prototypes.classes[-1], course.prototypes.means[-1]
        assert classes.tolist() == sorted(group)
        torch.testing.assert_close(means.float(), features_of(method.model, sorted(group)).detach().float())
    # By the training images every test image is one of the other class.
    assert recorded == [(1, [0.0], 0.0, [4]), (2, [0.0, 0.0], 0.0, [4, 4])]


# The loop


def test_every_step_is_in_training_mode_and_every_test_sees_the_task_ended(modules, tmp_path) -> None:
    method = SequentialLoRA(Net().eval(), ["first"], r=2)
    modes: list[tuple[int, bool, bool]] = []

    class Course:
        tasks = 2
        kept: dict[str, Any] = {}  # noqa: RUF012

        def head(self, task: int) -> None:
            return None

        def lesson(self, task: int, method: Any, head: None) -> Any:
            return modules.run.Lesson(2, lambda number: modes.append((task, method.model.training, method.in_task)))

        def test(self, task: int, method: Any, run: RunDirectory) -> None:
            method.model.eval()  # as whatever looks at the model may leave it
            modes.append((task, method.model.training, method.in_task))

    run = RunDirectory(tmp_path)
    run.start({})
    modules.run.learn_in_order(Course(), method, run, False, 100)
    assert modes == [(t, *how) for t in (1, 2) for how in ((True, True), (True, True), (False, False))]


# Texts


def test_the_first_steps_on_texts_are_sgd_on_the_loss_of_an_answers_token(modules) -> None:
    text = modules.text
    args = Namespace(seed=3, batch=2, accumulate=2, epochs=1, device="cpu", optimizer="sgd", lr=LR, lr_routing=None,
                     weight_decay=DECAY)  # fmt: skip
    tokens = text.Bytes()
    examples = [text.Example(tokens.prompt("ab" * n), tokens.answer("c" * (7 * n % 5 + 1))) for n in range(1, 7)]
    assert len({len(example.answer) for example in examples}) == 5
    method = SequentialLoRA(text.load_model(None, torch.float32), text.TARGETS, r=2)
    method.begin_task()
    method.model.train()
    by_hand = copy.deepcopy(method.model)
    learning = {name: p for name, p in by_hand.named_parameters() if p.requires_grad}
    expected = SGD(list(learning.values()))
    losses: list[Tensor] = []
    method.listeners.append(lambda event, task, values: losses.append(values["task"]))
    lesson = text.Texts(args, [text.Task("t", examples, examples)], tokens).lesson(1, method, None)
    assert lesson.steps == 2
    for number, size in enumerate((4, 2)):
        lesson.step(number)
        rows = text.rows_of(number, len(examples), 4, args.seed, "order", 1)
        assert len(rows) == size
        of_tokens = []
        for prompt, answer in (examples[i] for i in rows):
            logits = by_hand(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
            of_tokens.append(F.cross_entropy(logits, torch.tensor(answer), reduction="none"))
        loss = torch.cat(of_tokens).mean()
        torch.testing.assert_close(losses[number], loss.detach())
        expected.step(loss)
    found = {name: p for name, p in method.model.named_parameters() if p.requires_grad}
    assert len(found) == 8
    torch.testing.assert_close(found, learning)
