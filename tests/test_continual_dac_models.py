"""DAC loaded, in 16 bit, under autocast, in transformers' models; options that are refused."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from layers import randomize
from sequences import TARGETS, Net
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, ViTConfig, ViTModel

from clora_kernels.continual import DAC, DACLinear, vit_targets
from clora_kernels.testing import assert_parity

S, R, K, KEEP = 7, 5, 3, 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("remember", ["all", "kept"])
def test_loading_folds_bit_for_bit(dtype: torch.dtype, remember: str) -> None:
    base = Net().to(dtype)
    before = {name: base.get_submodule(name).weight.clone() for name in TARGETS}

    def attached() -> DAC:
        return DAC(copy.deepcopy(base), TARGETS, r=R, k=K, keep=KEEP, remember=remember)

    method, x = attached(), torch.randn(S, 6).to(dtype)
    for task in (1, 2, 3):
        method.begin_task()
        optimizer = torch.optim.SGD(method.param_groups(2.0))
        for _ in range(2):
            method.training_step(x, lambda: method.model(x).float().square().sum(), optimizer)
        if task < 3:
            method.end_task()
    state = {k: v.clone() for k, v in method.state_dict().items()}
    other = attached()
    other.load_state_dict(state)
    for name in TARGETS:
        mine, theirs = method.layers[name], other.layers[name]
        assert torch.equal(mine.weight, theirs.weight) and not torch.equal(mine.weight, before[name])
        assert torch.equal(method._old[name], other._old[name])
        assert torch.equal(mine.router.weight, theirs.router.weight)
    assert other.extra_losses()["ago"] > 0
    assert all(torch.equal(v, other.state_dict()[k]) for k, v in state.items())
    assert {p.requires_grad for p in other.layers["first"].router.parameters()} == {False}
    method.end_task()
    other.end_task()
    assert torch.equal(method.outputs(x)[0], other.outputs(x)[0])
    with pytest.raises(RuntimeError, match="hold folded adapters already"):
        other.load_state_dict(state)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"r": 0}, ValueError, "r: got 0, expected an int of at least 1"),
        ({"k": 13}, ValueError, "k: got 13, expected an int from 1 to 12"),
        ({"keep": 0}, ValueError, "keep: got 0, expected an int from 1 to 12"),
        ({"ago": -0.1}, ValueError, "ago: got -0.1, expected a finite weight"),
        ({"ago": math.nan}, ValueError, "ago: got nan"),
        ({"ago": math.inf}, ValueError, "ago: got inf"),
        ({"ago": "0.1"}, TypeError, "ago: got str, expected a number"),
        ({"ago": True}, TypeError, "ago: got bool, expected a number"),
        ({"remember": "some"}, ValueError, "remember: got 'some', expected one of 'all', 'kept'"),
        ({"selection": "token"}, ValueError, "selection: got 'token', expected one of 'batch', 'sample'"),
        ({"weights": "one"}, ValueError, "weights: got 'one', expected one of 'unit', 'probability'"),
        ({"operation": "lora"}, ValueError, "operation: got 'lora', expected one of 'routed_lora', 'rank1_experts'"),
        ({"dropout_p": 1.5}, ValueError, "dropout_p: got 1.5"),
        ({"scaling": "1"}, TypeError, "scaling: got str"),
        ({"backend": "fast"}, ValueError, "backend"),
    ],
)
def test_bad_options_are_named(options: dict, error: type, message: str) -> None:
    model = Net()
    with pytest.raises(error, match=message):
        DAC(model, TARGETS, **options)
    assert all(p.requires_grad for p in model.parameters()) and type(model.first) is torch.nn.Linear


@pytest.mark.parametrize(("selection", "weights"), [("batch", "unit"), ("sample", "probability")])
@pytest.mark.parametrize("how", ["autocast", "16-bit weights"])
def test_in_16_bit_the_router_chooses_in_fp32(how: str, selection: str, weights: str) -> None:
    options = {"r": 6, "k": 3, "keep": 2, "scaling": 0.7, "selection": selection, "weights": weights}
    dtype = torch.float32 if how == "autocast" else torch.bfloat16
    layer = randomize(DACLinear(11, 7, dtype=dtype, **options))
    assert layer.lora_A.dtype == layer.router.weight.dtype == torch.float32
    layer.activation_counts.zero_()
    x, dy, seed = torch.randn(5, 3, 11).to(dtype), torch.randn(5, 3, 7).bfloat16(), torch.tensor(5)
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        call = layer.call_arguments(x, dropout_seed=seed)
        y = layer(x, dropout_seed=seed)
    y.backward(dy)
    twin = copy.deepcopy(layer).float()
    assert torch.equal(call["gate"], twin.call_arguments(x.float(), dropout_seed=seed)["gate"])
    inputs = {
        k: v.detach() if isinstance(v, Tensor) else v for k, v in call.items() if k not in ("training", "backend")
    }
    inputs = inputs | {name: inputs[name].bfloat16() for name in ("x", "weight")}
    found = {"y": y.detach(), "lora_A": layer.lora_A.grad, "lora_B": layer.lora_B.grad}
    assert_parity(found, inputs, dy=dy, gradients=("lora_A", "lora_B"))
    if weights == "probability":
        assert layer.router.weight.grad.dtype == torch.float32 and layer.router.weight.grad.any()


@pytest.mark.parametrize("operation", ["routed_lora", "rank1_experts"])
def test_a_task_in_16_bit_learns_keeps_and_goes_on(operation: str) -> None:
    method = DAC(Net().bfloat16(), TARGETS, r=R, k=K, keep=KEEP, operation=operation)
    x = torch.randn(S, 6).bfloat16()
    for task in (1, 2):
        method.begin_task()
        optimizer = torch.optim.AdamW(method.param_groups(0.05))
        losses = [method.training_step(x, lambda: (method.model(x) - 1).square().mean(), optimizer) for _ in range(20)]
        assert losses[-1]["task"] < losses[0]["task"] and ("ago" in losses[0]) == (task > 1)
        tested = method.outputs(x)[0]
        method.end_task()
        assert torch.equal(method.inference_model()(x), tested)


def vit() -> tuple[nn.Module, Any, str]:
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    model = ViTModel(ViTConfig(**small, image_size=8, patch_size=2), add_pooling_layer=False)
    return model, {"pixel_values": torch.randn(6, 3, 8, 8)}, vit_targets(["q", "k", "v", "out", "fc1", "fc2"])


def clip() -> tuple[nn.Module, Any, str]:
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    text = {**small, "vocab_size": 30, "max_position_embeddings": 9, "bos_token_id": 0, "eos_token_id": 1}
    vision = {**small, "image_size": 8, "patch_size": 2}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
    inputs = {"pixel_values": torch.randn(6, 3, 8, 8), "input_ids": torch.randint(30, (6, 9))}
    return model, inputs, r".*encoder\.layers\..*(q_proj|k_proj|v_proj|out_proj|fc1|fc2)"


@pytest.mark.parametrize("options", [{}, {"selection": "sample", "weights": "probability"}], ids=["batch", "sample"])
@pytest.mark.parametrize("make", [vit, clip])
def test_transformers_models_learn_tasks(make: Any, options: dict[str, str]) -> None:
    """Every block's six linear layers, of CLIP in both towers; checkpointing counts once."""
    model, inputs, targets = make()
    towers = 2 if make is clip else 1
    output = (lambda found: found.logits_per_image) if make is clip else (lambda found: found.last_hidden_state[:, 0])
    method = DAC(model, targets, **options)
    assert len(method.layers) == towers * 2 * 6
    # the name since version 5, or the one before
    getattr(model, "activation_checkpointing_enable", getattr(model, "gradient_checkpointing_enable", None))()
    model.train()
    for task in (1, 2):
        method.begin_task()
        optimizer = torch.optim.AdamW(method.param_groups(2e-3), weight_decay=1e-2)
        for step in (1, 2):
            losses = method.training_step(
                inputs, lambda: F.cross_entropy(output(method.run(inputs)), torch.arange(6)), optimizer
            )
            assert ("ago" in losses) == (task > 1)
            assert {int(layer.activation_counts.sum()) for layer in method.layers.values()} == {step * 6 * 8}
        assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
        tested = output(method.outputs(inputs)[0])
        method.end_task()
    plain = method.inference_model()
    assert not any(isinstance(m, DACLinear) for m in plain.modules())
    with torch.no_grad():
        assert torch.equal(output(plain(**inputs)), tested)


@pytest.mark.gpu
def test_a_step_does_not_wait_for_the_gpu(no_syncs: Any) -> None:
    for operation in ("routed_lora", "rank1_experts"):
        method = DAC(Net().cuda(), TARGETS, r=R, k=K, keep=KEEP, operation=operation, weights="probability")
        x, labels = torch.randn(S, 6, device="cuda"), torch.zeros(S, dtype=torch.long, device="cuda")
        for task in (1, 2):
            method.begin_task()
            optimizer = torch.optim.SGD(method.param_groups(0.1))

            def step(method=method, optimizer=optimizer, x=x, labels=labels) -> dict[str, Tensor]:
                return method.training_step(x, lambda: F.cross_entropy(method.model(x), labels), optimizer)

            step()
            with no_syncs():
                losses = step()
            assert ("ago" in losses) == (task > 1)
            method.end_task()
