"""The folder of one run, which can be stopped at any moment and resumed: what it was started with, what happened, where
it stands.

    config.json             what the run was started with, and the versions of the packages that it was started by; it
                            is resumed with the same or not at all, but that lists which may grow (of tasks, say) are
                            longer; other versions are warned of
    log.jsonl               a JSON object a line: time (seconds since 1970), event, task, values
    checkpoint.safetensors  method, further objects, random generators, and how far log and task were

The checkpoint is the one truth: it is replaced in one piece and holds the length that the log had. What the log says
beyond it (a run was killed between two checkpoints, or within a line) is cut off on loading, and those steps are done
again: log and results of a resumed run are those of one that was never stopped, but for the times and for a line
"resume". One process at a time writes into a folder.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .checkpoint import SavedRun, check_settings, read_states, save_run
from .metrics import TaskAccuracies
from .protocol import ContinualMethod
from .run_config import VERSIONS, check_config, read_config, versions, warn_of_versions

VERSION = 1


class RunDirectory:
    """A folder for one run over a sequence of tasks; see the module's docstring for what is in it::

        run = RunDirectory(path)
        resumes = run.start({"lr": 0.1}, resume=True)
        method.listeners.append(run.listener)
        saved = run.load(method) if resumes else None       # then saved.restore(...), as of load_run
        ...
        run.save(method, head=head, optimizer=optimizer)
        run.record(task, accuracy=[0.9, 0.8], task_masked=0.9, samples=[100, 100])

    Args:
        path: the folder; it is made if it is not there.
        every: a line for so many training steps, of the means of their losses.

    Attributes:
        step: training steps done in the task that was begun last.

    Raises:
        OSError: the folder cannot be made (NotADirectoryError: a file is there).
        ValueError: ``every`` that is no int of at least 1.
    """

    def __init__(self, path: str | Path, *, every: int = 10) -> None:
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"every: got {every!r}, expected at least 1 step a line, an int")
        self.path, self.every, self.step = Path(path), every, 0
        self.config_file, self.log_file, self.checkpoint_file = (
            self.path / name for name in ("config.json", "log.jsonl", "checkpoint.safetensors")
        )
        self._losses: list[dict[str, Tensor]] = []
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise NotADirectoryError(f"path: got {str(path)!r}, where a file is, expected a folder") from None
        except OSError as error:
            raise type(error)(f"path: got {str(path)!r}, which cannot be made: {error.strerror}") from None

    def start(self, config: Mapping[str, Any], resume: bool = False, *, growing: Collection[str] = ()) -> bool:
        """Begin a run, or resume the one that is there; whether there is a checkpoint to ``load``.

        Args:
            config: what decides the results, as JSON has it: numbers, strings, lists and dicts of them.
            resume: go on with the run that is there; where none is, a new one starts.
            growing: names of lists in ``config`` that may be longer than those of the run that is there, where they
                begin as those do: what a run learned is the same whatever tasks come later.

        Raises:
            FileExistsError: a run is there, and ``resume`` is False.
            FileNotFoundError: some of the files of a run are there, others that must be are not.
            OSError: the folder cannot be written.
            TypeError: a ``config`` that JSON does not have.
            ValueError: the run was started with another ``config``, or written by another version; a ``config`` that
                tells of "versions" itself.
        """
        mine = json.loads(json.dumps(dict(config)))
        if VERSIONS in mine:
            raise ValueError(f"config: got {VERSIONS!r}, expected a config without, which the run adds")
        theirs: dict[str, Any] = {}
        there = [file for file in (self.config_file, self.log_file, self.checkpoint_file) if file.exists()]
        if there and not resume:
            raise FileExistsError(f"path: {str(self.path)!r} holds a run, expected an empty folder or resume")
        for needed, by in ((self.config_file, self.log_file), (self.log_file, self.checkpoint_file)):
            if by in there and needed not in there:
                raise FileNotFoundError(f"path: {str(self.path)!r} holds {by.name} but no {needed.name}")
        try:
            if there:
                theirs = read_config(self.config_file)
                check_config(mine, theirs, str(self.path), growing)
            if self.log_file in there:
                self._check_version()
            going_on = self.checkpoint_file in there
            if going_on:
                warn_of_versions(theirs, str(self.path))
            new = {**theirs, **mine} if going_on else {**mine, VERSIONS: versions()}
            if new != theirs:
                # Before the log: one without its config is refused.
                _replace(self.config_file, json.dumps(new, indent=1) + "\n")
            if going_on:
                return True
            _replace(self.log_file, _line("run", 0, {"version": VERSION}))
        except OSError as error:
            raise type(error)(f"path: {str(self.path)!r} cannot be written: {error}") from None
        return False

    def _check_version(self) -> None:
        try:
            with self.log_file.open() as file:
                version = json.loads(file.readline())["values"]["version"]
        except (ValueError, TypeError, KeyError):
            version = None
        if version != VERSION:
            raise ValueError(
                f"{self.log_file.name}: got version {version!r}, expected {VERSION}; another program wrote it"
            )

    # The log

    def write(self, event: str, task: int, values: Mapping[str, Any]) -> None:
        """Append a line. Tensors are written as numbers and lists; what is not finite as "nan", "inf" or "-inf", which
        JSON has no numbers for."""
        with self.log_file.open("a") as file:
            file.write(_line(event, task, values))

    def listener(self, event: str, task: int, values: Mapping[str, Any]) -> None:
        """For ``method.listeners``: counts and writes what the method tells; waits for the device once a line."""
        if event == "step":
            self.step += 1
            self._losses.append(dict(values))
            if self.step % self.every == 0:
                self._write_losses(task)
            return
        self._write_losses(task)
        if event == "begin":
            self.step = 0
        self.write(event, task, values)

    def _write_losses(self, task: int) -> None:
        """A line for the steps that none tells of yet: each loss, its mean over the steps that had it."""
        by_name: dict[str, list[Tensor]] = {}
        for losses in self._losses:
            for name, loss in losses.items():
                by_name.setdefault(name, []).append(loss)
        if by_name:
            means = torch.stack([torch.stack(of_one).double().mean() for of_one in by_name.values()]).tolist()
            losses_of = dict(zip(by_name, means, strict=True))
            self.write("step", task, {"step": self.step, "of": len(self._losses), "losses": losses_of})
        self._losses.clear()

    def lines(self, event: str | None = None) -> Iterator[dict[str, Any]]:
        """What the log holds, all of it or the lines of one event."""
        with self.log_file.open() as file:
            for text in file:
                line = json.loads(text)
                if event in (None, line["event"]):
                    yield line

    # Results

    def record(
        self, task: int, accuracy: Sequence[float], task_masked: float, samples: Sequence[int], **more: Any
    ) -> None:
        """Write what a test after task ``task`` found, as :class:`TaskAccuracies` names it.

        Args:
            accuracy: on the test samples of tasks 1 to ``task``.
            task_masked: on those of task ``task``, told that it is this one.
            samples: how many those of tasks 1 to ``task`` are.
            more: whatever else goes into the line.

        Raises:
            ValueError: another number of accuracies or samples than tasks.
        """
        for name, values in (("accuracy", accuracy), ("samples", samples)):
            if len(values) != task:
                raise ValueError(f"{name}: got {len(values)}, expected one for each of {task} tasks")
        self.write(
            "test", task, {"accuracy": list(accuracy), "task_masked": task_masked, "samples": list(samples), **more}
        )

    def accuracies(self) -> TaskAccuracies | None:
        """What was recorded so far; None before the first task's end.

        Raises:
            ValueError: no record of one of the tasks.
        """
        tests = {line["task"]: line["values"] for line in self.lines("test")}
        if not tests:
            return None
        T = max(tests)
        missing = [task for task in range(1, T + 1) if task not in tests]
        if missing:
            raise ValueError(f"{self.log_file.name}: no results of the tasks {missing}, expected those of 1 to {T}")
        accuracy = torch.full((T, T), torch.nan, dtype=torch.float64)
        for task, values in tests.items():
            accuracy[task - 1, :task] = torch.tensor(values["accuracy"], dtype=torch.float64)
        masked = torch.tensor([tests[task]["task_masked"] for task in range(1, T + 1)], dtype=torch.float64)
        return TaskAccuracies(accuracy, masked, torch.tensor(tests[T]["samples"]))

    # The checkpoint

    def save(self, method: ContinualMethod, **objects: Any) -> None:
        """Write the checkpoint: the method, the ``state_dict()`` of every object, generators, log and step.

        Raises:
            ImportError, TypeError: as :func:`save_run`.
        """
        self._write_losses(method.task)
        # The log first: one that is longer than its checkpoint knows is cut, one that is shorter could not be mended.
        position = _Position({"step": self.step, "log": self.log_file.stat().st_size})
        save_run(self.checkpoint_file, method, run_directory=position, **objects)

    def load(self, method: ContinualMethod) -> SavedRun:
        """Load the checkpoint into a method attached as the run's was, and cut the log back to it. The further objects
        are restored as :func:`load_run` tells.

        Raises:
            ImportError, FileNotFoundError, ValueError, RuntimeError: as :func:`load_run`.
            ValueError: a log that is shorter than the checkpoint says.
        """
        states = read_states(self.checkpoint_file)
        objects = dict(states["objects"])
        position = objects.pop("run_directory", None)
        if position is None:
            raise ValueError(f"path: got {str(self.checkpoint_file)!r}, expected a file that RunDirectory.save wrote")
        size = self.log_file.stat().st_size
        if size < position["log"]:
            raise ValueError(f"{self.log_file.name}: got {size} bytes, expected the checkpoint's {position['log']}")
        check_settings(self.checkpoint_file, states, method)
        method.load_state_dict(states["method"])
        os.truncate(self.log_file, position["log"])
        self.step = position["step"]
        self._losses.clear()
        self.write("resume", method.task, {"step": self.step})
        return SavedRun(objects, states["rng"])


class _Position:
    """What save_run takes: an object with a state."""

    def __init__(self, state: dict[str, int]) -> None:
        self.state = state

    def state_dict(self) -> dict[str, int]:
        return self.state


def _line(event: str, task: int, values: Mapping[str, Any]) -> str:
    line = {"time": round(time.time(), 3), "event": event, "task": task, "values": _plain(values)}
    return json.dumps(line, allow_nan=False) + "\n"


def _replace(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    partial.replace(path)


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {key: _plain(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
