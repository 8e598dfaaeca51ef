"""What the examples on models from files share: orders that are known without drawing what came before, a loop that
notices when training has diverged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from sequences import Net

from clora_kernels.continual import RunDirectory, SequentialLoRA

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


@pytest.fixture(scope="module")
def shared():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        import continual_run

        yield continual_run


@pytest.mark.parametrize(("samples", "batch"), [(10, 4), (8, 4), (3, 5), (1, 1)])
def test_every_epoch_has_every_sample_once_in_an_order_of_its_own(shared, samples, batch) -> None:
    steps = -(-samples // batch)
    epochs = [
        [shared.rows_of(epoch * steps + i, samples, batch, 5, "order", 1) for i in range(steps)] for epoch in range(4)
    ]
    for epoch in epochs:
        assert [len(rows) for rows in epoch[:-1]] == [batch] * (steps - 1) and epoch[-1]
        assert sorted(row for rows in epoch for row in rows) == list(range(samples))
    if samples > 4:
        others = [shared.rows_of(i, samples, batch, *what) for what in ((6, "order", 1), (5, "order", 2)) for i in (0,)]
        assert epochs[0] != epochs[1] != epochs[2] and all(other != epochs[0][0] for other in others)
    assert shared.rows_of(0, samples, batch, 5, "order", 1) == epochs[0][0]


def test_random_numbers_are_of_what_they_are_for(shared) -> None:
    before = torch.get_rng_state()
    draws = [
        torch.rand(3, generator=shared.generator(*what)).tolist() for what in ((1, "a"), (1, "a"), (1, "b"), (2, "a"))
    ]
    assert draws[0] == draws[1] and len({tuple(draw) for draw in draws}) == 3
    assert torch.equal(before, torch.get_rng_state())


class Course:
    """One step after the other tells losses; ``act(method, head, number)`` does what else a step does."""

    tasks = 2

    def __init__(self, shared: Any, losses: dict[tuple[int, int], float], act: Any = None) -> None:
        self.shared, self.losses, self.act, self.kept, self.tested = shared, losses, act, {}, []

    def head(self, task: int) -> torch.nn.Module:
        return torch.nn.Linear(3, 2)

    def lesson(self, task: int, method: Any, head: Any) -> Any:
        def step(number: int) -> None:
            if self.act is not None:
                self.act(method, head, number)
            loss = self.losses.get((task, number + 1), 1.0)
            method.tell("step", {"task": torch.tensor(2.0), "extra": torch.tensor(loss)})

        return self.shared.Lesson(6, step, {"head": head})

    def test(self, task: int, method: Any, run: Any) -> None:
        self.tested.append(task)


def learn(course: Course, folder: Path, save_every: int = 4) -> tuple[Any, Any]:
    torch.manual_seed(0)  # a run goes on with the model that it began with
    method, run = SequentialLoRA(Net(), ["first"], r=2), RunDirectory(folder)
    course.shared.learn_in_order(course, method, run, run.start({}, resume=True), save_every)
    return method, run


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), -float("inf")])
def test_the_first_step_whose_losses_are_not_finite_is_named_and_nothing_made_of_it(shared, tmp_path, loss) -> None:
    for number, saved in ((1, False), (4, False), (5, True), (6, True)):
        course, folder = Course(shared, {(1, number): loss, (1, 6): loss}), tmp_path / str(number)
        told = rf"^task 1, step {number}: got the losses task 2.0, extra {loss}, expected finite ones; training has div"
        with pytest.raises(shared.Refused, match=told):
            learn(course, folder)
        assert not course.tested and (folder / "checkpoint.safetensors").exists() == saved
        assert not list(RunDirectory(folder).lines("end"))
    # What was saved before is what a run goes on from.
    course = Course(shared, {})
    method, run = learn(course, tmp_path / "5")
    assert (method.task, course.tested) == (2, [1, 2]) and [line["task"] for line in run.lines("resume")] == [1]


def test_a_later_task_and_one_without_checkpoints_in_between_are_looked_at_when_they_end(shared, tmp_path) -> None:
    course = Course(shared, {(2, 3): float("nan")})
    with pytest.raises(shared.Refused, match=r"^task 2, step 3: got the losses"):
        learn(course, tmp_path, save_every=1000)
    assert course.tested == [1]


@pytest.mark.parametrize("what", ["adapter", "head"])
def test_parameters_that_are_not_finite_after_finite_losses_are_refused(shared, tmp_path, what) -> None:
    def spoil(method: Any, head: torch.nn.Module, number: int) -> None:
        if number == 5:
            broken = head.bias if what == "head" else method.layers["first"].lora_B
            with torch.no_grad():
                broken[1] = float("inf")

    course = Course(shared, {}, spoil)
    with pytest.raises(shared.Refused, match=r"^task 1, step 6: what was trained is not finite after it; training has"):
        learn(course, tmp_path)
    assert not course.tested
