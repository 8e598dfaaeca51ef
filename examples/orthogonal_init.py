"""A LoRA that starts orthogonal to those of earlier tasks: python examples/orthogonal_init.py [--rank N] [--seed N]

A small vision transformer, pretrained on four of scikit-learn's digits, learns two tasks of two digits each with a LoRA
that is folded into the weights when its task is over. The LoRA of the third task starts as LoRA does, lora_A
Kaiming-uniform; or with every lora_A orthonormal, up to its scale, and orthogonal to those of the earlier tasks, which
is one call for all layers. Prints how much the new lora_A overlaps with the old ones in every layer,
‖A_oldᵀ·A_new‖/(‖A_old‖·‖A_new‖) in the Frobenius norm, and how the new task is learned from either start.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from typing import NamedTuple

import torch
from digits import HIDDEN, Samples, Settings, Stream, batches, classify, make_optimizer, make_stream
from torch import Tensor, nn

from clora_kernels import RoutedLoRALinear, freeze_base, gram_schmidt_foreach, inject, orthonormal_basis
from clora_kernels.continual import CosineHead, vit_targets
from clora_kernels.continual.extras import require

SETTINGS, EPOCHS = Settings("adamw", 1e-3, 5.0), 8
MOST = HIDDEN // 3  # ranks of three tasks have room beside one another

Layers = dict[str, RoutedLoRALinear]


def adapt(backbone: nn.Module, rank: int) -> tuple[nn.Module, Layers]:
    """A copy of the backbone with a fresh LoRA in every block, and its layers by name."""
    model = copy.deepcopy(backbone)
    report = inject(model, lambda linear: RoutedLoRALinear.from_linear(linear, r=rank, routing=False), vit_targets())
    freeze_base(model)
    return model, {name: model.get_submodule(name) for name in report.swapped}


def fold(layers: Layers) -> dict[str, Tensor]:
    """End a task: its LoRA goes into the weight for good and starts anew; returns its lora_A [r, K] by layer."""
    old = {name: layer.lora_A.detach().clone() for name, layer in layers.items()}
    for layer in layers.values():
        layer.fold()
    return old


@torch.no_grad()
def start_orthogonally(layers: Layers, old: dict[str, Tensor]) -> None:
    """Make the rows of every lora_A orthogonal to one another and to the rows of ``old`` [r_old, K], each as long as it
    was. Rows that have nothing of their own are drawn anew."""
    bases = [orthonormal_basis(old[name].mT).Q for name in layers]
    results = gram_schmidt_foreach([layer.lora_A.mT for layer in layers.values()], bases, deficient="random")
    for layer, result in zip(layers.values(), results, strict=True):
        layer.lora_A.copy_(result.Q.mT * layer.lora_A.norm(dim=1, keepdim=True))


@torch.no_grad()
def overlaps(layers: Layers, old: dict[str, Tensor]) -> dict[str, float]:
    """‖A_oldᵀ·A_new‖/(‖A_old‖·‖A_new‖) by layer and, of the sums of squares over all of them, in total."""
    inside = {name: float((old[name] @ layer.lora_A.mT).square().sum()) for name, layer in layers.items()}
    whole = {n: float(old[n].square().sum() * layer.lora_A.square().sum()) for n, layer in layers.items()}
    by_layer = {name: (inside[name] / whole[name]) ** 0.5 for name in layers}
    return {**by_layer, "in total": (sum(inside.values()) / sum(whole.values())) ** 0.5}


def learn(model: nn.Module, samples: Samples) -> list[float]:
    """Train the adapters and a new head on a task; the mean loss of every epoch."""
    classes = samples.labels.unique()
    head = CosineHead(HIDDEN, len(classes), SETTINGS.head_scale)
    trained = [p for p in (*model.parameters(), *head.parameters()) if p.requires_grad]
    optimizer = make_optimizer(SETTINGS, [{"params": trained, "lr": SETTINGS.lr}])
    means = []
    for _ in range(EPOCHS):
        losses = []
        for images, labels in batches(samples, 1):
            loss = classify(model, head, images, torch.searchsorted(classes, labels))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        means.append(sum(losses) / len(losses))
    return means


class Result(NamedTuple):
    """Overlaps by layer of the Kaiming start, of the orthogonal one, and of that when the task is learned; the losses
    by epoch from both starts."""

    before: dict[str, float]
    after: dict[str, float]
    learned: dict[str, float]
    kaiming_losses: list[float]
    orthogonal_losses: list[float]


def run(stream: Stream, rank: int) -> Result:
    """Two tasks with a LoRA each, then the third from either start."""
    model, layers = adapt(stream.backbone, rank)
    *earlier, new = stream.train
    olds = []
    for samples in earlier:
        learn(model, samples)
        olds.append(fold(layers))
    old = {name: torch.cat([of_task[name] for of_task in olds]) for name in layers}
    before = overlaps(layers, old)
    as_usual = copy.deepcopy(model)
    start_orthogonally(layers, old)
    after = overlaps(layers, old)
    losses = []
    for start in (as_usual, model):
        torch.manual_seed(stream.seed)  # the same head and order of batches
        losses.append(learn(start, new))
    return Result(before, after, overlaps(layers, old), *losses)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rank", type=int, default=8, help=f"of each task's LoRA, 1 to {MOST} (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of data, classes and training (default: %(default)s)")
    arguments = parser.parse_args(argv)
    if not 1 <= arguments.rank <= MOST:
        parser.error(f"--rank: got {arguments.rank}, expected 1 to {MOST}: three of them must fit into {HIDDEN}")
    try:
        require("transformers", "sklearn")
    except ImportError as error:
        sys.exit(f"this example {error}")
    torch.set_num_threads(1)  # the matrices are small
    begun = time.perf_counter()
    result = run(make_stream(arguments.seed), arguments.rank)
    print(f"{'overlap with the old lora_A':<34}{'Kaiming':>10}{'orthogonal':>12}{'learned':>10}")
    for name in result.before:
        print(f"{name:<34}{result.before[name]:>10.4f}{result.after[name]:>12.1e}{result.learned[name]:>10.4f}")
    for start, losses in (("Kaiming", result.kaiming_losses), ("orthogonal", result.orthogonal_losses)):
        print(f"loss of the new task by epoch, {start} start: {', '.join(f'{loss:.3f}' for loss in losses)}")
    print(f"{time.perf_counter() - begun:.0f} s")


if __name__ == "__main__":
    main()
