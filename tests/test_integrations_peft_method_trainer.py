"""Routed LoRA as a method of PEFT in transformers' Trainer: two tasks, and a run that goes on from its checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft_method import layers
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from clora_kernels.integrations.peft import RoutedLoraConfig, next_task

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
]
STEPS = 8


def model_with(**options) -> PeftModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=64, num_key_value_heads=2, **sizes))
    return get_peft_model(llama, RoutedLoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "up_proj"], **options))


def task(seed: int) -> list[dict[str, torch.Tensor]]:
    """Sequences that repeat four tokens of the task."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(64, (4,), generator=generator).repeat(4)
    return [{"input_ids": row, "labels": row} for row in (tokens.roll(i) for i in range(16))]


def trainer(model: PeftModel, data: list[dict[str, torch.Tensor]], folder: Path) -> Trainer:
    return Trainer(
        model,
        TrainingArguments(
            output_dir=str(folder),
            max_steps=STEPS,
            per_device_train_batch_size=4,
            learning_rate=0.1,
            logging_steps=1,
            save_steps=STEPS // 2,
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            seed=3,
        ),
        train_dataset=data,
    )


def losses(run: Trainer) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


@pytest.mark.parametrize("init", ["identity", "c-lora"])
def test_two_tasks_and_on_from_a_checkpoint(init, tmp_path) -> None:
    options = {"routing_init": init, "train_factors": "first_task", "lora_dropout": 0.1}
    model = model_with(**options)
    start = {n: p.clone() for n, p in model.named_parameters()}
    run = trainer(model, task(0), tmp_path / "first")
    run.train()
    first = losses(run)
    assert len(first) == STEPS and first[-1] < 0.95 * first[0]
    moved = {name.rpartition(".")[0].rpartition(".")[2] for name, p in model.named_parameters()
             if not torch.equal(p, start[name])}  # fmt: skip
    assert moved == {"lora_A", "lora_B", "lora_routing"}
    assert not any(layer.lora_frozen_routing["default"].any() for layer in layers(model).values())

    next_task(model)
    kept = {n: t.clone() for n, t in model.state_dict().items() if "lora_routing" not in n}
    old = model.eval()(torch.arange(16)[None]).logits
    run = trainer(model, task(1), tmp_path / "second")
    run.train()
    second = losses(run)
    assert second[-1] < second[0] and not torch.equal(model.eval()(torch.arange(16)[None]).logits, old)
    after = model.state_dict()
    assert all(torch.equal(after[n], t) for n, t in kept.items())
    assert all(layer.lora_frozen_routing["default"].any() for layer in layers(model).values())

    # On from the middle, in a model whose adapter has other values.
    checkpoint = tmp_path / "second" / f"checkpoint-{STEPS // 2}"
    again = model_with(task=2, **options)
    run = trainer(again, task(1), tmp_path / "second")
    run.train(resume_from_checkpoint=str(checkpoint))
    assert losses(run) == second
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, after[name]), name
