"""Class-incremental learning with a vision transformer from a file.

    python examples/continual_vit.py --model M --data D --preset cl-lora-cifar100 --out DIR

M is a folder with a transformers ViT, or its name on the hub. D is a folder of images (.jpeg, .jpg, .png), one of

    D/train/CLASS/*.jpg and D/test/CLASS/*.jpg      the same classes in both
    D/CLASS/*.jpg                                   of each class --test-share is tested on
    D/train, D/test                                 files, those of CIFAR-100 for Python (cifar-100-python)

Each task brings --classes classes, in an order by the seed, and a cosine head for them; a test sample goes to the
nearest of the class means that were taken at the end of each task.

The run can be stopped at any moment: the same command with --resume goes on. So does a run that has ended after --tasks
tasks, with more of them. DIR/model is then what was learned, its adapters merged, for transformers'
ViTModel.from_pretrained, with class_means.safetensors: means [classes, width], the class and the task of each, and the
names of classes in the metadata. Of cl-lora, which tests each task by weights of its own, it is the last task's;
view-<task>.safetensors has those of an earlier one that differ, for load_state_dict(..., strict=False).

The presets of cl-lora are its released settings. That of dac has DAC's optimizer, schedule, steps, batch, shots and
rank; the rest is a reconstruction: a cosine head and cross-entropy on a ViT in place of CLIP's two encoders and their
contrastive loss, and tasks of 10 classes in place of whole data sets.
"""

from __future__ import annotations

import argparse
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from continual_options import METHODS, Refused, attach, check, fill, parser_of
from continual_run import (
    Lesson,
    command,
    full_rows_of,
    generator,
    groups_of,
    learn_in_order,
    make_optimizer,
    report,
    rows_of,
    start,
)
from images import Batches, Images, Pixels, load
from torch import Tensor, nn
from vit_files import Backbone, load_model, save

from clora_kernels.continual import ContinualMethod, CosineHead, Prototypes, RunDirectory, vit_targets

# CL-LoRA's, of its released code: SGD with momentum 0.9, cosine to 0 by epochs.
CL_LORA = {"method": "cl-lora", "optimizer": "sgd", "lr_end": 0.0, "head_scale": 1.0, "seed": 1993}


def cl_lora(classes: int, r: int, epochs: int, lr: float, batch: int, weight_decay: float) -> dict[str, Any]:
    own = {"classes": classes, "r": r, "epochs": epochs, "lr": lr, "batch": batch, "weight_decay": weight_decay}
    return {**CL_LORA, **own}


PRESETS = {
    "cl-lora-cifar100": cl_lora(5, 8, 30, 0.03, 64, 1e-4),
    "cl-lora-imagenet-r": cl_lora(5, 10, 20, 0.05, 32, 5e-4),
    "cl-lora-imagenet-a": cl_lora(20, 10, 25, 0.05, 32, 5e-3),
    "cl-lora-vtab": cl_lora(10, 10, 45, 0.03, 32, 1e-4),
    # AdamW, cosine to 1e-6 by steps; see above for what of it is a reconstruction.
    "dac": {
        "method": "dac",
        "optimizer": "adamw",
        "lr": 2e-3,
        "lr_end": 1e-6,
        "weight_decay": 1e-2,
        "steps": 500,
        "batch": 32,
        "shots": 5,
        "r": 12,
    },
}
DEFAULTS = {"method": "c-lora", "classes": 10, "epochs": 10, "batch": 32, "seed": 1993}


def class_order(classes: int, seed: int) -> list[int]:
    """NumPy's permutation, which the orders of published tables are."""
    import numpy

    return numpy.random.RandomState(seed).permutation(classes).tolist()


class Classes:
    """The course: a task is a number of classes with a head of their own."""

    def __init__(
        self,
        args: argparse.Namespace,
        train: Images,
        test: Images,
        pixels: Pixels,
        width: int,
        pool: ThreadPoolExecutor,
    ) -> None:
        self.args, self.pixels, self.width, self.pool = args, pixels, width, pool
        order = class_order(len(train.names), args.seed)
        groups = [order[i : i + args.classes] for i in range(0, len(order), args.classes)][: args.tasks]
        if len(groups) < (args.tasks or 2):
            raise Refused(
                f"--data: {len(order)} classes make {len(groups)} tasks of {args.classes}, "
                f"expected {args.tasks or 'at least 2'}"
            )
        self.groups, self.tasks = groups, len(groups)
        self.train, self.test_sets = ([part.of(group) for group in groups] for part in (train, test))
        for part, sets in (("train", self.train), ("test", self.test_sets)):
            for group, images in zip(groups, sets, strict=True):
                absent = set(group) - set(images.labels.tolist())
                if absent:
                    names = ", ".join(train.names[c] for c in sorted(absent))
                    raise Refused(f"--data: no images of the classes {names} to {part}")
        self.prototypes = Prototypes()
        self.kept: dict[str, Any] = {"prototypes": self.prototypes}

    def samples(self) -> list[list[int]]:
        """Of each task: how many to learn from, and to test on."""
        return [[len(a.sources), len(b.sources)] for a, b in zip(self.train, self.test_sets, strict=True)]

    def head(self, task: int) -> nn.Module:
        return CosineHead(self.width, len(self.groups[task - 1]), self.args.head_scale).to(self.args.device)

    def lesson(self, task: int, method: ContinualMethod, head: nn.Module | None) -> Lesson:
        args, images = self.args, self.train[task - 1]
        groups = [*groups_of(method, args), {"params": list(head.parameters()), "lr": args.lr}]
        optimizer = make_optimizer(args.optimizer, groups, args.weight_decay)
        if args.steps is None:
            choose, stage = rows_of, -(-len(images.sources) // args.batch)
            steps = args.epochs * stage
        else:
            choose, steps, stage = full_rows_of, args.steps, 1
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps // stage, args.lr_end)
        group = torch.tensor(self.groups[task - 1])

        def make(step: int) -> tuple[Tensor, Tensor]:
            rows = choose(step, len(images.sources), args.batch, args.seed, "order", task)
            random = generator(args.seed, "pixels", task, step)
            pixels = torch.stack([self.pixels.training(images.sources[i], random) for i in rows])
            return pixels, (images.labels[rows][:, None] == group).int().argmax(1)

        batches = self.batches(make, steps)

        def step(number: int) -> None:
            pixels, labels = (t.to(args.device) for t in batches[number])
            method.training_step(pixels, lambda: F.cross_entropy(head(method.model(pixels)), labels), optimizer)
            if (number + 1) % stage == 0:
                schedule.step()

        return Lesson(steps, step, {"head": head, "optimizer": optimizer, "schedule": schedule})

    def batches(self, make: Any, stop: int) -> Batches:
        return Batches(make, stop, self.pool, 2 * self.args.workers)

    def in_batches(self, images: Images, what: str) -> Any:
        """(pixels, labels), under the transform of tests."""
        from tqdm import tqdm

        rows = torch.arange(len(images.sources)).split(4 * self.args.batch)

        def make(i: int) -> tuple[Tensor, Tensor]:
            pixels = torch.stack([self.pixels.test(images.sources[row]) for row in rows[i].tolist()])
            return pixels, images.labels[rows[i]]

        batches = self.batches(make, len(rows))
        for i in tqdm(range(len(rows)), what, leave=False, unit="batch"):
            pixels, labels = batches[i]
            yield pixels.to(self.args.device), labels

    def test(self, task: int, method: ContinualMethod, run: RunDirectory) -> None:
        found, labels = [], []
        with method.inference() as model, torch.no_grad():
            for pixels, of_batch in self.in_batches(self.train[task - 1], f"class means of task {task}"):
                found.append(model(pixels))
                labels.append(of_batch)
        features = torch.cat(found)
        self.prototypes.add_task(features, torch.cat(labels).to(features.device))
        accuracy, masked = [], 0.0
        for j, images in enumerate(self.test_sets[:task], 1):
            right, right_masked = 0, 0
            for pixels, of_batch in self.in_batches(images, f"test of task {j}"):
                views = method.outputs(pixels)
                views = views[0] if len(views) == 1 else views
                right += int((self.prototypes.predict(views).cpu() == of_batch).sum())
                if j == task:
                    right_masked += int((self.prototypes.predict(views, task).cpu() == of_batch).sum())
            accuracy.append(right / len(images.sources))
            masked = right_masked / len(images.sources)
        run.record(task, accuracy, masked, [len(images.sources) for images in self.test_sets[:task]])
        print(f"after task {task}: " + ", ".join(f"{a:.1%} on task {j}" for j, a in enumerate(accuracy, 1)))


def parse(argv: list[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = parser_of(__doc__, tuple(METHODS), PRESETS, DEFAULTS)
    parser.add_argument("--model", required=True, help="folder of a transformers ViT, or its name on the hub")
    parser.add_argument("--data", type=Path, required=True, help="folder of images; see above")
    parser.add_argument("--test-share", type=float, default=0.2, help="of D/CLASS/ folders (default: %(default)s)")
    parser.add_argument("--shots", type=int, help="learn from so many images of each class (default: all of them)")
    parser.add_argument("--steps", type=int, help="of each task, in place of --epochs: full batches, cosine by steps")
    parser.add_argument("--classes", type=int, help="of each task (default: 10, or the preset's)")
    parser.add_argument("--tasks", type=int, help="learn so many (default: as many as the classes make)")
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=("q", "k", "v", "out", "fc1", "fc2"),
        help="of each block (default: the method's own)",
    )
    parser.add_argument(
        "--head-scale", type=float, help="where that of the cosine heads starts (default: the method's own)"
    )
    parser.add_argument("--lr-end", type=float, help="where the cosine schedule ends (default: the method's own)")
    parser.add_argument("--workers", type=int, default=4, help="threads that read images (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.epochs is not None and args.steps is not None:
        parser.error(f"--steps: got {args.steps} and --epochs {args.epochs}, expected one of them")
    settings = PRESETS.get(args.preset, {})
    if args.epochs is not None or args.steps is not None:  # either overrides both of a preset
        settings = {k: v for k, v in settings.items() if k not in ("epochs", "steps")}
    fill(args, settings)
    fill(args, DEFAULTS if args.steps is None else DEFAULTS | {"epochs": None})
    fill(args, {k: v for k, v in METHODS[args.method]._asdict().items() if k != "method"})
    check(parser, args, classes=1, workers=1, shots=1, steps=1, tasks=1)
    if not 0 < args.test_share < 1:
        parser.error(f"--test-share: got {args.test_share}, expected a share between 0 and 1")
    return parser, args


def learn(args: argparse.Namespace) -> None:
    train, test = load(args.data, args.test_share, args.seed)
    if args.shots is not None:
        train = train.few(args.shots, args.seed)
    vit, pixels = load_model(args.model)
    torch.manual_seed(args.seed)
    model = Backbone(vit, getattr(torch, args.dtype)).to(args.device)
    with ThreadPoolExecutor(args.workers) as pool:
        course = Classes(args, train, test, pixels, vit.config.hidden_size, pool)
        method = attach(args.method, model, vit_targets(args.parts), args.options)
        run, resumes = start(args, course.groups, course.samples(), names=train.names)
        print(f"{course.tasks} tasks of {args.classes} classes, {len(train.sources)} images to learn from, "
              f"{len(test.sources)} to test on; {args.method} on {len(method.layers)} layers")  # fmt: skip
        learn_in_order(course, method, run, resumes, args.save_every)
    print(report(run, args.method))
    save(args.out / "model", method, pixels, course.prototypes, train.names)


def main(argv: list[str] | None = None) -> None:
    parser, args = parse(argv)
    command(parser, ("transformers", "PIL", "tqdm", "safetensors"), lambda: learn(args))


if __name__ == "__main__":
    main()
