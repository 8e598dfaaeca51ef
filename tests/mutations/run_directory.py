"""Mutants of the folder of a run, of a loss in parts, and of the examples that use them."""

from .mutant import mutants_of

RUN_DIRECTORY = mutants_of(
    "clora_kernels/continual/run_directory.py",
    "run",
    ("tests/test_continual_run_directory.py",),
    [
        (
            "log-not-cut",
            "lines beyond the checkpoint stay in the log of a resumed run",
            '        os.truncate(self.log_file, position["log"])\n',
            "",
        ),
        (
            "step-not-restored",
            "a resumed task begins at its first step",
            'self.step = position["step"]',
            "self.step = 0",
        ),
        (
            "short-log-accepted",
            "a log that lost lines is filled up with zeros",
            'if size < position["log"]:',
            'if size < 0 * position["log"]:',
        ),
        (
            "loaded-before-checked",
            "a method is loaded before the log is found to be too short",
            "        states = read_states(self.checkpoint_file)\n",
            '        states = read_states(self.checkpoint_file)\n        method.load_state_dict(states["method"])\n',
        ),
        (
            "losses-lost-at-save",
            "steps that no line tells of yet are lost where a run is stopped after a checkpoint",
            "        self._write_losses(method.task)\n        # The log",
            "        # The log",
        ),
        (
            "losses-lost-at-end",
            "the last steps of a task are not told",
            "        self._write_losses(task)\n        if event",
            "        if event",
        ),
        (
            "last-in-place-of-mean",
            "the last loss in place of the mean",
            "torch.stack(of_one).double().mean()",
            "of_one[-1].double()",
        ),
        (
            "waits-for-every-loss",
            "waits for the device once a loss",
            "means = torch.stack([torch.stack(of_one).double().mean() for of_one in by_name.values()]).tolist()",
            "means = [torch.stack(of_one).double().mean().tolist() for of_one in by_name.values()]",
        ),
        (
            "steps-of-all-tasks",
            "steps are counted over all tasks",
            '        if event == "begin":\n            self.step = 0\n',
            "",
        ),
        ("version-unchecked", "a log of another version is taken", "if version != VERSION:", "if version is None:"),
        (
            "not-replaced",
            "a started run is started over",
            "if there and not resume:",
            "if self.checkpoint_file in there and not resume:",
        ),
        ("nan-as-it-is", "NaN is written as it is, which is no JSON", "not math.isfinite(value)", "math.isinf(value)"),
        ("missing-task", "results that lack a task are made up", "        if missing:\n", "        if False:\n"),
        (
            "samples-of-the-first",
            "the samples of the first test stand for those of all",
            'torch.tensor(tests[T]["samples"])',
            'torch.tensor(tests[1]["samples"])',
        ),
    ],
)

RUN_DIRECTORY += mutants_of(
    "clora_kernels/continual/protocol.py",
    "protocol",
    ("tests/test_continual_protocol.py",),
    [
        (
            "parts-at-once",
            "every part of a loss runs before the first is differentiated",
            "        for part in parts:\n            (loss := part()).backward()",
            "        for loss in [part() for part in parts]:\n            loss.backward()",
        ),
        (
            "parts-not-told",
            "the loss that is told is that of the last part",
            'losses["task"] = sum(done, loss.detach())',
            'losses["task"] = loss.detach()',
        ),
        (
            "gradients-pile-up",
            "the gradients of earlier steps stay",
            "        optimizer.zero_grad(set_to_none=True)\n        *parts",
            "        *parts",
        ),
        ("no-loss", "a step without a loss is not refused", "        if not task_loss:\n", "        if False:\n"),
    ],
)

RUN_DIRECTORY += mutants_of(
    "clora_kernels/continual/heads.py",
    "prototypes",
    ("tests/test_continual_heads.py", "tests/test_continual_run_directory.py"),
    [
        (
            "state-is-alive",
            "what a state holds changes with the prototypes",
            '{"classes": list(self.classes), "means": list(self.means)}',
            '{"classes": self.classes, "means": self.means}',
        ),
        (
            "loaded-is-shared",
            "prototypes and what they were loaded from are one list",
            'list(state["classes"]), list(state["means"])',
            'state["classes"], state["means"]',
        ),
    ],
)

RUN_DIRECTORY += mutants_of(
    "examples/continual_run.py",
    "example-run",
    ("tests/test_examples_continual_run.py", "tests/test_examples_continual_text.py"),
    [
        (
            "generators-not-restored",
            "a run resumed between tasks does not restore what goes from task to task",
            "            saved.restore(**course.kept)\n    for",
            "            saved\n    for",
        ),
        (
            "begins-at-zero",
            "a resumed task makes all its steps again",
            "range(run.step, lesson.steps)",
            "range(lesson.steps)",
        ),
        (
            "same-order",
            "every epoch has the same order",
            "generator=generator(*what, epoch)).tolist()\n    return",
            "generator=generator(*what)).tolist()\n    return",
        ),
        (
            "last-batch-lost",
            "a smaller last batch is left out",
            "divmod(step, -(-samples // batch))",
            "divmod(step, samples // batch)",
        ),
    ],
)

RUN_DIRECTORY += mutants_of(
    "examples/texts.py",
    "example-texts",
    ("tests/test_examples_texts.py", "tests/test_examples_continual_text.py"),
    [
        (
            "any-token-right",
            "an answer is exact where one of its tokens is",
            "((scores.argmax(-1) == labels) | (labels == IGNORED)).all(1)",
            "(scores.argmax(-1) == labels).any(1)",
        ),
        (
            "prompt-learned",
            "the prompt's last token is among those that are learned",
            "rows[2, i, len(prompt) : end] = torch.tensor(answer)",
            "rows[2, i, len(prompt) - 1 : end] = torch.tensor(prompt[-1:] + answer)",
        ),
        (
            "padding-seen",
            "padding is attended to as the text is",
            "rows[1], rows[2] = 0, IGNORED",
            "rows[1], rows[2] = 1, 0",
        ),
        ("no-end", "answers have no end", "for byte in text.encode()), self.eos]", "for byte in text.encode())]"),
        (
            "start-kept",
            "of a prompt that is too long the start is kept",
            "prompt[:1] + prompt[len(prompt) - room + 1 :]",
            "prompt[:room]",
        ),
        (
            "lines-misnumbered",
            "lines are counted from 0",
            "for number, line in enumerate(lines, 1)",
            "for number, line in enumerate(lines)",
        ),
    ],
)

RUN_DIRECTORY += mutants_of(
    "examples/images.py",
    "example-images",
    ("tests/test_examples_images.py",),
    [
        (
            "pickles-run",
            "a pickle may ask for anything",
            '            raise pickle.UnpicklingError(f"it asks for {module}.{name}")\n',
            "            return super().find_class(module, name)\n",
        ),
        ("never-mirrored", "no image is mirrored", "generator=random) < 0.5 else", "generator=random) < 0.0 else"),
        (
            "corner",
            "a corner is tested, not the middle",
            "left, top = (width - side) / 2, (height - side) / 2",
            "left, top = 0.0, 0.0",
        ),
        ("whole-range", "crops have no smallest size", "(SMALLEST_CROP + (1 - SMALLEST_CROP) * area)", "area"),
        (
            "one-split",
            "the split does not depend on the seed",
            'generator(seed, "split", name)',
            'generator("split", name)',
        ),
        (
            "behind",
            "batches are prepared from the first one on",
            "range(max(self.next, i), min(i + self.ahead, self.stop))",
            "range(self.next, min(i + self.ahead, self.stop))",
        ),
    ],
)

RUN_DIRECTORY += mutants_of(
    "examples/continual_vit.py",
    "example-vit",
    ("tests/test_examples_continual_vit.py",),
    [
        (
            "steps-for-epochs",
            "the schedule steps with every batch",
            "if (number + 1) % stage == 0:",
            "if number >= 0:",
        ),
        (
            "end-of-schedule",
            "the schedule ends at 0 whatever is asked for",
            "steps // stage, args.lr_end)",
            "steps // stage, 0.0)",
        ),
        (
            "same-pixels",
            "every step of a task sees the same crops",
            'generator(args.seed, "pixels", task, step)',
            'generator(args.seed, "pixels", task)',
        ),
        (
            "masked-is-all",
            "what is told the task is not",
            "self.prototypes.predict(views, task)",
            "self.prototypes.predict(views)",
        ),
    ],
)
RUN_DIRECTORY += mutants_of(
    "clora_kernels/continual/run_directory.py",
    "run-directory",
    ("tests/test_continual_run_directory.py",),
    [
        ("every-half-step", "a line for half a step is taken", "not isinstance(every, int) or every < 1", "every < 1"),
        ("every-true", "True passes for one step", "if isinstance(every, bool) or not", "if not"),
    ],
)  # fmt: skip
