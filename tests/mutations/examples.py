"""Mutants of the examples on models from files: what they train with and test on."""

from .mutant import mutants_of

STEPS = ("tests/test_examples_continual_steps.py",)
EXAMPLES = mutants_of(
    "examples/continual_vit.py",
    "example-vit",
    STEPS,
    [
        ("means-of-the-test", "class means are of test images",
         "self.in_batches(self.train[task - 1], ", "self.in_batches(self.test_sets[task - 1], "),
        ("no-decay", "weight decay is not asked for",
         "make_optimizer(args.optimizer, groups, args.weight_decay)", "make_optimizer(args.optimizer, groups, 0.0)"),
        ("labels-in-order", "labels are not places in the task's group",
         "(images.labels[rows][:, None] == group)", "(images.labels[rows][:, None] == group.sort()[0])"),
    ],
)  # fmt: skip
EXAMPLES += mutants_of(
    "examples/continual_run.py",
    "example-run",
    STEPS,
    [
        ("eval-mode", "the model is trained in the mode it happens to be in", "        method.model.train()\n", ""),
        ("sgd-no-decay", "SGD decays nothing", "momentum=0.9, weight_decay=weight_decay", "momentum=0.9"),
        ("sgd-no-momentum", "SGD has no momentum", "momentum=0.9, weight_decay", "weight_decay"),
        ("adamw-no-decay", "AdamW decays as it likes",
         "torch.optim.AdamW(groups, weight_decay=weight_decay)", "torch.optim.AdamW(groups)"),
    ],
)  # fmt: skip
EXAMPLES += mutants_of(
    "examples/continual_text.py",
    "example-text",
    STEPS,
    [
        ("loss-of-an-example", "the loss is of an example, not of an answer's token",
         ".loss / total", ".loss / len(rows)"),
        ("loss-of-a-batch", "each batch is a mean of its own",
         ".loss / total", ".loss / (batch.labels >= 0).sum()"),
        ("no-decay", "weight decay is not asked for", ", args.weight_decay)", ", 0.0)"),
    ],
)  # fmt: skip
OPTIONS = ("tests/test_examples_continual_options.py",)
EXAMPLES += mutants_of(
    "examples/continual_options.py",
    "example-options",
    OPTIONS,
    [
        ("any-type", "an option is set to whatever is given", "if type(value) not in known[name]:",
         "if value is known:"),
        ("bool-is-int", "true passes for an integer", "if type(value) not in known[name]:",
         "if not isinstance(value, known[name]):"),
        ("no-whole-floats", "a whole number is no number", "value = float(value)", "value = str(value)"),
        ("null-never", "what may be null may not", "type(None): \"null\"}", "}"),
        ("own-options-alone", "options of the layers are not known",
         "if all(p.kind is not p.VAR_KEYWORD for p in parameters):", "if parameters:"),
        ("seed-negative", "a negative seed is taken", "if not 0 <= args.seed < 2**32:", "if args.seed >= 2**32:"),
        ("seed-large", "a seed that NumPy does not take", "if not 0 <= args.seed < 2**32:", "if args.seed < 0:"),
        ("meta", "a device that holds no numbers is taken",
         "torch.zeros(1, device=args.device).item()", "torch.zeros(1, device=args.device)"),
        ("end-of-rates", "any rate may be the last", ', "lr_end": False', ""),
        ("scale-of-heads", "any scale of heads is taken", ', "head_scale": True}', "}"),
        ("scale-zero", "a scale of 0 is taken", '"head_scale": True}', '"head_scale": False}'),
    ],
)  # fmt: skip
EXAMPLES += mutants_of(
    "examples/continual_run.py",
    "example-watch",
    ("tests/test_examples_continual_run.py",),
    [
        ("one-loss", "the task's loss alone is looked at",
         "[loss.isfinite() for loss in of_step.values()]", '[of_step["task"].isfinite()]'),
        ("infinite-losses", "infinite losses are taken", "[loss.isfinite() for", "[~loss.isnan() for"),
        ("step-before", "the step before is named", "{first + wrong[0] + 1}", "{first + wrong[0]}"),
        ("last-step", "the last step that was wrong is named", "{first + wrong[0] + 1}", "{first + wrong[-1] + 1}"),
        ("head-unwatched", "heads are not looked at", "if isinstance(part, nn.Module)]", "if part is method]"),
        ("adapters-unwatched", "adapters are not looked at", "[*method.trainable(), *(p for", "[*(p for"),
        ("saved-all-the-same", "a checkpoint is made of what has diverged",
         "                watch.check(task, run.step, lesson, method)\n                run.save(",
         "                run.save("),
        ("ended-all-the-same", "a task ends with what has diverged",
         "        watch.check(task, run.step, lesson, method)\n        print(", "        print("),
    ],
)  # fmt: skip
EXAMPLES += mutants_of(
    "examples/images.py",
    "example-images",
    ("tests/test_examples_images.py",),
    [
        ("one-part", "train without test is a class", "if (folder / part).exists()]:", "if not folder]:"),
        ("mixed-parts", "a folder and a file are classes",
         "if (folder / part).exists()]:", "if (folder / part).is_file()]:"),
    ],
)  # fmt: skip
FURTHER = ("tests/test_examples_continual_further.py",)
EXAMPLES += mutants_of(
    "examples/continual_run.py",
    "example-further",
    FURTHER,
    [
        ("nothing-grows", "a run takes no further tasks", 'GROWING = ("tasks", "samples")', "GROWING = ()"),
        ("other-samples", "tasks may change", '"tasks": tasks, "samples": samples}', '"tasks": tasks}'),
        ("first-view", "the first task's model is saved for the last's",
         "*others, last = method.views()", "last, *others = method.views()"),
        ("views-whole", "a view's file holds the whole model again",
         " if not torch.equal(t, weights[name])}", "}"),
        ("one-rate", "routing has no rate of its own", '{"lr_routing": args.lr_routing}', "{}"),
        ("epochs-cut", "a full batch ends with an epoch",
         "(start + batch - 1) // samples + 1", "start // samples + 1"),
        ("epoch-from-its-start", "an epoch that a batch began in goes on from its start",
         "max(start - epoch * samples, 0) :", "0 :"),
        ("same-order-again", "every epoch of full batches has the same order",
         "generator=generator(*what, epoch)).tolist()\n        rows",
         "generator=generator(*what)).tolist()\n        rows"),
    ],
)  # fmt: skip
EXAMPLES += mutants_of(
    "examples/continual_vit.py",
    "example-further",
    FURTHER,
    [
        ("schedule-by-epochs", "steps are scheduled by epochs",
         "full_rows_of, args.steps, 1", "full_rows_of, args.steps, 2"),
        ("short-batches", "the last batch of an epoch is smaller", "= full_rows_of, args", "= rows_of, args"),
        ("all-shots", "all images are learned from",
         "train = train.few(args.shots, args.seed)", "train.few(args.shots, args.seed)"),
        ("names-change", "classes may change", ", names=train.names)", ")"),
    ],
)  # fmt: skip
EXAMPLES += mutants_of(
    "examples/vit_files.py",
    "example-vit-files",
    ("tests/test_examples_continual_further.py", "tests/test_examples_continual_vit.py"),
    [
        ("missing-weights", "a model that lacks weights is taken",
         '    if loaded["missing_keys"]:\n', "    if False:\n"),
        ("pixels-lost", "the saved model does not tell how it wants its images",
         'wants |= {"image_mean": pixels.mean, "image_std": pixels.std}', "wants |= {}"),
        ("one-task", "all classes are the first task's",
         "torch.full_like(classes, task)", "torch.full_like(classes, 1)"),
    ],
)  # fmt: skip
EXAMPLES += mutants_of(
    "examples/continual_text.py",
    "example-further",
    FURTHER,
    [
        ("first-loss", "the table has the loss of the first test",
         '*_, last = run.lines("test")', 'last, *_ = run.lines("test")'),
        ("summed-loss", "losses are summed over tasks", "sum(losses) / len(losses)", "sum(losses)"),
    ],
)  # fmt: skip
EXAMPLES += mutants_of(
    "examples/continual_options.py",
    "example-further",
    FURTHER,
    [
        ("one-line", "--help tells the first line", "description=doc,", "description=doc.splitlines()[0],"),
        ("routing-anywhere", "a rate of routing is taken where there is none",
         'if args.lr_routing is not None and "lr_routing" not in', 'if args.lr_routing is not None and "lr" not in'),
    ],
)  # fmt: skip
