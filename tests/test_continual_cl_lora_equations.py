"""CL-LoRA's whole training, two steps a batch over three tasks, against its equations on bare matrices."""

from __future__ import annotations

import pytest
import torch
from cl_lora_by_hand import ByHand
from torch import Tensor
from vits import Learner, TinyViT, batch, cl_lora

from clora_kernels.continual import CLLoRA
from clora_kernels.continual.cl_lora import row_weights

LEFT_OUT = (
    "the reassignment",
    "the row of k",
    "the decay of k",
    "the gradient through the teacher",
    "the loss without a factor of T²",
    "the rest of the first step",
    "the shared in the task's step",
)


def of(method: CLLoRA, blocks: range, name: str) -> dict[tuple[int, str], Tensor]:
    return {(i, p): getattr(method.layers[f"blocks.{i}.{p}"], name).detach() for i in blocks for p in "qv"}


def block_weights(method: CLLoRA) -> Tensor:
    """[blocks, 3]: q, k, v."""
    scaling = of(method, range(2, 4), "scaling")
    idle = method.own["idle_weights"].detach()
    return torch.stack([torch.stack([scaling[i, "q"], idle[i - 2, 0], scaling[i, "v"]]) for i in (2, 3)])


def train_both(dtype: torch.dtype, leave_out: str = "", temperature: float = 2.0, **options) -> None:
    """Raises AssertionError at the first step after which a parameter differs by more than rounding."""
    model = TinyViT().to(dtype)
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    method = cl_lora(model, temperature=temperature, **options)
    learner = Learner(method, lr=0.3)
    hand = ByHand(base, of(method, range(2), "lora_A"), leave_out, temperature)
    for task in (1, 2, 3):
        learner.begin()
        hand.begin(
            of(method, range(2, 4), "lora_A"),
            block_weights(method),
            learner.head.weight.detach(),
            learner.head.scale.detach(),
        )
        for number in range(4):
            losses = learner.step(number)
            assert set(losses) == ({"task"} if task == 1 else {"distillation", "task", "block_weights"})
            hand.batch(*batch(task, number, dtype))
            learned = {
                "shared up": (of(method, range(2), "lora_B"), hand.shared),
                "specific down": (of(method, range(2, 4), "lora_A"), hand.specific_A),
                "specific up": (of(method, range(2, 4), "lora_B"), hand.specific_B),
            }
            for what, (got, expected) in learned.items():
                for key, tensor in got.items():
                    torch.testing.assert_close(tensor, expected[key], msg=lambda m, w=what, k=key: f"{w} {k}: {m}")
            torch.testing.assert_close(block_weights(method), hand.mu)
            torch.testing.assert_close(learner.head.weight.detach(), hand.weight)
            torch.testing.assert_close(learner.head.scale.detach(), hand.sigma)
        method.end_task()
        hand.end()
    for key, A in of(method, range(2), "lora_A").items():
        assert torch.equal(A, hand.A[key])
    frozen = {n: t for n, t in model.state_dict().items() if n in base}
    assert len(frozen) == len(base) and all(torch.equal(t, base[n]) for n, t in frozen.items())


@pytest.mark.parametrize(
    ("dtype", "backend"), [(torch.float64, "auto"), (torch.float64, "reference"), (torch.float32, "auto")]
)
def test_training_is_what_the_equations_say(dtype: torch.dtype, backend: str) -> None:
    train_both(dtype, backend=backend)


@pytest.mark.parametrize(
    ("options", "leave_out"),
    [
        ({"reassignment": False}, "the reassignment"),
        ({"distillation": 20.0}, "the loss without a factor of T²"),
        ({"temperature": 0.7}, ""),
    ],
)
def test_options_are_what_they_say(options: dict, leave_out: str) -> None:
    train_both(torch.float64, leave_out, **options)


@pytest.mark.parametrize("leave_out", LEFT_OUT)
def test_the_comparison_tells_what_is_left_out(leave_out: str) -> None:
    with pytest.raises(AssertionError, match=r"not (close|equal)"):
        train_both(torch.float64, leave_out)


def test_rows_are_weighed_by_their_length() -> None:
    old = torch.tensor([[3.0, 4.0], [0.0, 0.0], [0.0, 1.0]])
    torch.testing.assert_close(row_weights(old), torch.tensor([2.5, 0.0, 0.5]))
    assert torch.equal(row_weights(torch.zeros(5, 2)), torch.ones(5))


def test_a_teacher_of_zeros_weighs_every_row_alike() -> None:
    """After a first task that moved nothing."""
    learner = Learner(cl_lora(), lr=0.0)
    learner.learn(1)
    learner.lr = 0.3
    learner.learn(1)
    state = learner.method.state_dict()
    assert all(t.isfinite().all() for t in state.values()) and state["layers.blocks.0.q.lora_B"].any()
