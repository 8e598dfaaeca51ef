"""Models, data and methods for the tests of what transformers' Trainer drives."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from sequences import TARGETS, Net
from torch import Tensor, nn

from clora_kernels import RoutedLoRALinear
from clora_kernels.continual import CLoRA, RoutedLoRAMethod

SAMPLES, BATCH, LR = 10, 2, 0.2


class Classifier(nn.Module):
    """A model of a user's own, whose mean loss Trainer divides among micro batches; with a tuple, loss first, if asked
    for."""

    def __init__(self, as_tuple: bool = False) -> None:
        super().__init__()
        self.net, self.as_tuple = Net(), as_tuple

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.net(x.to(self.net.out.weight.dtype))
        if labels is None:
            return (logits,) if self.as_tuple else {"logits": logits}
        loss = F.cross_entropy(logits, labels)
        return (loss, logits) if self.as_tuple else {"loss": loss, "logits": logits}


def llama() -> nn.Module:
    """Its loss is divided by num_items_in_batch, which Trainer passes."""
    config = transformers.LlamaConfig(
        vocab_size=11, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=16, attention_dropout=0.0,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


MODELS = {"llama": llama, "mapping": Classifier, "tuple": lambda: Classifier(as_tuple=True)}
TARGETS_OF = {"llama": ["q_proj", "v_proj"], "mapping": TARGETS, "tuple": TARGETS}


def data(kind: str, task: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(task)
    if kind == "llama":
        tokens = [torch.randint(11, (6,), generator=generator) for _ in range(SAMPLES)]
        # Of different lengths, so that a mean of means is not the mean over the tokens.
        return [
            {"input_ids": t, "labels": torch.where(torch.arange(6) < 2 + i % 5, t, -100)} for i, t in enumerate(tokens)
        ]
    return [
        {"x": torch.randn(6, generator=generator), "labels": torch.randint(3, (), generator=generator)}
        for _ in range(SAMPLES)
    ]


def clora(kind: str, base: nn.Module, **options) -> CLoRA:
    method = CLoRA(copy.deepcopy(base), TARGETS_OF[kind], **{"r": 2, "orthogonality": 5.0, **options})
    # Trainer must not find anything that it has to draw: what is compared starts alike.
    for i, p in enumerate(method.parameters()):
        with torch.no_grad():
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i)) * (p.abs().sum() > 0))
    return method


def arguments(folder: Path, **changed) -> Any:
    options = {
        "output_dir": str(folder), "use_cpu": True, "report_to": "none", "disable_tqdm": True, "num_train_epochs": 1,
        "per_device_train_batch_size": BATCH, "max_grad_norm": 0.0, "lr_scheduler_type": "constant",
        "train_sampling_strategy": "sequential", "save_strategy": "no", "logging_strategy": "no",
        "dataloader_pin_memory": False,
    }  # fmt: skip
    return transformers.TrainingArguments(**{**options, **changed})


def trainer(method: Any, callback: Any, dataset: list, args: Any, optimizer: Any = None) -> Any:
    optimizer = optimizer or torch.optim.SGD(method.param_groups(LR), momentum=0.9)
    return transformers.Trainer(
        method.model, args, train_dataset=dataset, callbacks=[callback], optimizers=(optimizer, None)
    )


class Folding(RoutedLoRAMethod):
    """Folds its pairs into the weights, carries a tensor along, changes gradients, and learns more after a first
    task."""

    def make_layer(self, linear: nn.Module) -> RoutedLoRALinear:
        return RoutedLoRALinear.from_linear(linear, **self.options)

    def trainable(self) -> list[nn.Parameter]:
        return [p for layer in self.layers.values() for p in (layer.lora_B, *([layer.lora_A] if self.task > 1 else []))]

    def adjust_gradients(self, step: str) -> None:
        assert step == "task"
        for p in self.trainable():
            p.grad[0] = 0

    def on_task_start(self) -> None:
        self.kept["start"] = torch.rand(3)

    def on_task_end(self) -> dict[str, float | None]:
        self.fold_layers(self.task, ("lora_A", "lora_B", "routing"))
        return {}


def folding(kind: str, base: nn.Module) -> Folding:
    return Folding(copy.deepcopy(base), TARGETS_OF[kind], r=2, dropout_p=0.25)
