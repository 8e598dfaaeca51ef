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
