"""Accelerated models of transformers: trained by Trainer as PEFT's own, compiled, checkpointed, exported."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

from clora_kernels.integrations.peft import accelerate

# PEFT asks transformers what transformers renames.
pytestmark = pytest.mark.filterwarnings("ignore:.(is_)?gradient_checkpointing:FutureWarning")

TARGETS = ["q_proj", "v_proj", "down_proj"]


def llama(**options) -> PeftModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
    )
    model = get_peft_model(LlamaForCausalLM(config), LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, **options))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.1)
    return model


def vit() -> PeftModel:
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=8,
        patch_size=4,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_labels=3,
    )
    targets = r".*(q_proj|query|v_proj|value|fc1|intermediate\.dense)"
    return get_peft_model(
        ViTForImageClassification(config), LoraConfig(r=4, target_modules=targets, modules_to_save=["classifier"])
    )


class Texts(torch.utils.data.Dataset):
    def __init__(self) -> None:
        ids = torch.randint(61, (24, 10), generator=torch.Generator().manual_seed(1))
        self.rows = [{"input_ids": row, "labels": row} for row in ids]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return self.rows[i]


class Pictures(Texts):
    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        images, labels = torch.randn(24, 3, 8, 8, generator=generator), torch.randint(3, (24,), generator=generator)
        self.rows = [{"pixel_values": x, "labels": y} for x, y in zip(images, labels, strict=True)]


def trained(model: nn.Module, data: Texts, folder: Path, resume: str | None = None) -> list[float]:
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        num_train_epochs=2,
        learning_rate=0.02,
        logging_steps=1,
        save_steps=3,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=5,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=data)
    trainer.train(resume_from_checkpoint=resume)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("kind", ["llama", "vit"])
def test_trainer_trains_as_with_peft(kind: str, tmp_path: Path) -> None:
    make, data = (llama, Texts()) if kind == "llama" else (vit, Pictures())
    model, other = make(), make()
    report = accelerate(other)
    assert not report.left_alone
    theirs, ours = (trained(m, data, tmp_path / name) for m, name in ((model, "theirs"), (other, "ours")))
    assert len(ours) == 6 and ours[-1] < ours[0] and not report.fell_back
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs))
    torch.testing.assert_close(dict(other.named_parameters()), dict(model.named_parameters()), rtol=1e-4, atol=1e-5)
    resumed = make()
    accelerate(resumed)
    after = trained(resumed, data, tmp_path / "again", str(tmp_path / "ours" / "checkpoint-3"))
    assert after[-3:] == ours[-3:]
    for name, p in resumed.named_parameters():
        assert torch.equal(p, other.get_parameter(name)), name


def step(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **gradients}


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_replays_dropout(reentrant: bool) -> None:
    model, ids = llama(lora_dropout=0.3).train(), torch.randint(61, (3, 9))
    report = accelerate(model)
    torch.manual_seed(7)
    expected = step(model, ids)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    torch.manual_seed(7)
    found = step(model, ids)
    assert found.keys() == expected.keys() and all(torch.equal(found[k], expected[k]) for k in expected)
    torch.manual_seed(8)
    assert step(model, ids)["loss"] != expected["loss"] and not report.fell_back


def test_one_graph_serves_batches_lengths_scalings_and_dropout() -> None:
    model = llama(lora_dropout=0.1).train()
    accelerate(model)
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(model.base_model.model.model.layers[0].mlp, fullgraph=True, backend=backend)
    layer = model.base_model.model.model.layers[0].mlp.down_proj
    for lead in [(2, 5), (3, 7), (4, 9), (6, 2)]:
        compiled(torch.randn(*lead, 32)).sum().backward()
    assert len(graphs) == 2  # the sizes of the first call, and all others
    for scaling, p in [(0.5, 0.2), (0.7, 0.3), (1.5, 0.4)]:
        layer.scaling["default"], layer.lora_dropout["default"].p = scaling, p
        compiled(torch.randn(3, 8, 32)).sum().backward()
    assert len(graphs) == 3  # the first numbers, and all others


def test_a_whole_compiled_model_computes_the_same() -> None:
    model, ids = llama(), torch.randint(61, (2, 6))
    accelerate(model)
    expected = step(model, ids)
    torch._dynamo.reset()
    compiled = torch.compile(model.base_model.model.model, fullgraph=True, backend="aot_eager")
    model.zero_grad()
    logits = model.base_model.model.lm_head(compiled(input_ids=ids, use_cache=False).last_hidden_state)
    loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    torch.testing.assert_close(loss.detach(), expected["loss"])
    for name, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(p.grad, expected[name], msg=name)


def test_autocast_with_a_gradient_scaler() -> None:
    model, ids = llama(), torch.randint(61, (4, 8))
    other = copy.deepcopy(model)
    accelerate(other)
    moved = []
    for m in (model, other):
        optimizer = torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        before = {n: p.detach().clone() for n, p in m.named_parameters() if p.requires_grad}
        with torch.autocast("cpu", torch.bfloat16):
            loss = m(input_ids=ids, labels=ids).loss
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        moved.append({n: p.detach() - before[n] for n, p in m.named_parameters() if p.requires_grad})
    for name, theirs in moved[0].items():
        assert moved[1][name].norm() > 0
        assert (moved[1][name] - theirs).norm() <= 2**-5 * theirs.norm(), name


def test_the_inference_model_can_be_exported() -> None:
    model = vit().eval()
    accelerate(model)
    images = torch.randn(2, 3, 8, 8)
    layer = model.base_model.model
    with torch.no_grad():
        program = torch.export.export(layer, (images,))
        torch.testing.assert_close(program.module()(images).logits, layer(images).logits)
