"""Mutants of the runs on digits."""

from .mutant import mutants_of

TESTS = ("tests/test_continual_digits_runs.py",)
DIGITS = mutants_of(
    "examples/digits_runs.py",
    "digits-runs",
    TESTS,
    [
        ("means-of-the-first-view", "class means are of the first task's view",
         "prototypes.add_task(method.outputs(samples.images)[-1],",
         "prototypes.add_task(method.outputs(samples.images)[0],"),
        ("task-not-told", "the accuracy by task is of all classes", "views, task=i + 1)", "views, task=None)"),
        ("another-task-told", "the task before is told", "views, task=i + 1)", "views, task=max(i, 1))"),
        ("head-untrained", "the head stays as it was drawn",
         'groups = [*groups, {"params": list(head.parameters()), "lr": settings.lr}]', "groups = list(groups)"),
        ("rate-constant", "the rate does not fall", "        schedule.step()\n", ""),
        ("joint-goes-on", "all tasks jointly go on from the last time",
         "if i == 0 or joint:", "if i == 0:"),
        ("joint-of-one-task", "jointly only the newest task is learned",
         "stream.train[: i + 1] if joint else stream.train[i : i + 1]", "stream.train[i : i + 1]"),
        ("backbone-shared", "training changes the stream's backbone",
         "make_method(copy.deepcopy(stream.backbone)), Prototypes", "make_method(stream.backbone), Prototypes"),
        ("eval-mode", "a task is trained in eval mode", "    method.model.train()\n", ""),
        ("tests-of-all-tasks", "tasks to come are tested too",
         "enumerate(stream.test[: i + 1])", "enumerate(stream.test)"),
        ("labels-by-distance", "labels are numbers from the task's least, not places among its classes",
         "else torch.searchsorted(classes, labels)", "else labels - classes[0]"),
        ("timed-by-the-slowest", "one step that was disturbed is the time of a step",
         "Cost(statistics.median(seconds[name])", "Cost(max(seconds[name])"),
        ("timed-one-after-the-other", "all steps of a method are timed before those of the next",
         "    for _ in range(rounds):\n        for name, steps in todo.items():\n",
         "    for name, steps in todo.items():\n        for _ in range(rounds):\n"),
        ("timed-in-the-first-task", "steps of the first task are timed",
         "if steps := begin(method, second,", "if steps := begin(method, first,"),
    ],
)  # fmt: skip
DIGITS += mutants_of(
    "examples/compare_on_digits.py",
    "digits-costs",
    TESTS,
    [("stored-of-the-first", "what is stored is of the first task", "(reports[0], reports[-1])", "(reports[0],)")],
)
