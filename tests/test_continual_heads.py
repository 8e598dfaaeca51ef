"""The cosine head and the class-mean classifier."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from clora_kernels.continual import CosineHead, Prototypes


def test_cosine_head_sees_directions_alone() -> None:
    head, x = CosineHead(5, 3, scale=2.0), torch.randn(4, 5)
    logits = head(x)
    torch.testing.assert_close(logits, 2 * torch.stack([F.cosine_similarity(x, w, -1) for w in head.weight], 1))
    torch.testing.assert_close(head(7 * x), logits)
    logits.square().sum().backward()
    assert head.scale.grad is not None and head.weight.grad.any()
    # Moving along itself changes no direction, so the gradient has no part along the weight.
    assert (head.weight.grad * head.weight.detach()).sum(1).abs().max() < 1e-5


def test_prototypes_are_class_means_of_their_task() -> None:
    p = Prototypes()
    x = torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 1.0], [0.0, 5.0]])
    p.add_task(x, torch.tensor([7, 7, 2, 2]))
    assert p.classes[0].tolist() == [2, 7] and p.means[0].tolist() == [[0.0, 3.0], [2.0, 0.0]]
    p.add_task(torch.tensor([[-1.0, 1.0]]), torch.tensor([4]))
    samples = torch.tensor([[9.0, 1.0], [1.0, 9.0], [-9.0, 8.0]])
    assert p.predict(samples).tolist() == [7, 2, 4]
    assert p.predict(samples, task=1).tolist() == [7, 2, 2]
    assert p.predict(samples, task=2).tolist() == [4, 4, 4]


def test_each_task_may_have_a_view_of_its_own() -> None:
    p = Prototypes()
    p.add_task(torch.eye(2), torch.tensor([0, 1]))
    p.add_task(torch.eye(2), torch.tensor([2, 3]))
    first, second = torch.tensor([[1.0, 1.0]]), torch.tensor([[0.0, 1.0]])
    assert p.predict([first, second]).tolist() == [3]
    assert p.predict([second, first]).tolist() == [1]
    with pytest.raises(ValueError, match="features: got 1 views, expected one for each of 2 tasks"):
        p.predict([first])


def test_prototypes_refuse_what_does_not_fit() -> None:
    p = Prototypes()
    with pytest.raises(ValueError, match="task: got None, expected one of the 0"):
        p.predict(torch.zeros(1, 2))
    p.add_task(torch.eye(2), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"labels: got the classes \[1\] of an earlier task"):
        p.add_task(torch.eye(2), torch.tensor([1, 2]))
    for features, labels in ((torch.eye(2), torch.tensor([2])), (torch.zeros(0, 2), torch.zeros(0))):
        with pytest.raises(ValueError, match="labels: got"):
            p.add_task(features, labels)
    for task in (0, 2):
        with pytest.raises(ValueError, match=f"task: got {task}"):
            p.predict(torch.eye(2), task=task)


def test_prototypes_are_saved_and_loaded() -> None:
    p, loaded = Prototypes(), Prototypes()
    for task in range(2):
        p.add_task(torch.randn(6, 4), torch.tensor([0, 1, 2] * 2) + 3 * task)
    state, x = p.state_dict(), torch.randn(20, 4)
    loaded.load_state_dict(state)
    assert torch.equal(loaded.predict(x), p.predict(x)) and torch.equal(loaded.predict(x, 1), p.predict(x, 1))
    # What comes later is in neither the state nor the other.
    p.add_task(torch.randn(1, 4), torch.tensor([9]))
    assert len(state["means"]) == len(state["classes"]) == len(loaded.means) == 2
    with pytest.raises(ValueError, match=r"the classes \[5\] of an earlier task"):
        loaded.add_task(torch.randn(1, 4), torch.tensor([5]))
    loaded.add_task(torch.randn(1, 4), torch.tensor([7]))
    assert len(state["means"]) == len(state["classes"]) == 2
