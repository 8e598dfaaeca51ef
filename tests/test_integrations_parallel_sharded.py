"""What can be done with a model that FSDP2 has sharded, and in which dtypes it computes."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from parallel_models import Block, D, H, batch, by_block, local_loss, loss_of, model, whole
from peft import LoraConfig, get_peft_model
from processes import run_in
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from clora_kernels import extract, merge_all, to_lora, unmerge_all
from clora_kernels.integrations.peft import accelerate

MIXED = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
MODELS = {
    "fp32": lambda: model(torch.float32),
    "bf16 base": lambda: model(torch.bfloat16),
    "accelerated": lambda: accelerated(),
}


def accelerated():
    """Two linear layers with LoRA adapters of PEFT."""
    torch.manual_seed(0)
    pair = nn.Sequential(nn.Linear(D, H), nn.Linear(H, D))
    module = get_peft_model(pair, LoraConfig(r=3, target_modules=["0", "1"], init_lora_weights=False))
    accelerate(module)
    return module


def mixed_gradients(name):
    module = MODELS[name]()
    blocks = module.base_model.model if name == "accelerated" else module
    by_block(blocks, mp_policy=MIXED)
    loss = loss_of(module, *batch(dist.get_rank(), 0, torch.bfloat16))
    loss.backward()
    return loss.detach(), {name: whole(p.grad) for name, p in module.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("name", MODELS)
def test_mixed_precision_is_one_process_with_16_bit_parameters(name, ranks) -> None:
    """All parameters count as bf16, gradients are bf16 and averaged in fp32: bit for bit."""
    module, of_ranks = MODELS[name](), []
    for rank, (loss, _) in enumerate(found := run_in(ranks, mixed_gradients, name)):
        half = copy.deepcopy(module).bfloat16()
        expected = loss_of(half, *batch(rank, 0, torch.bfloat16))
        expected.backward()
        assert torch.equal(loss, expected.detach())
        of_ranks.append({name: p.grad.double() for name, p in half.named_parameters() if p.requires_grad})
    for _, gradients in found:
        assert gradients.keys() == of_ranks[0].keys()
        for name, gradient in gradients.items():
            assert gradient.dtype == torch.float32
            assert torch.equal(gradient, (sum(grads[name] for grads in of_ranks) / ranks).float()), name


def refusals():
    module = by_block(model(torch.bfloat16, frozen=False))
    with pytest.raises(AssertionError, match="uniform original parameter dtype"):
        local_loss(module, 0)
    with pytest.raises(ValueError, match="doesn't support scalar parameters"):
        by_block(model(learn_scaling=True))


def test_torch_refuses_learning_parameters_of_two_dtypes_in_a_group_and_scalars() -> None:
    run_in(2, refusals)


def states():
    module, names = model(frozen_routing=True), ("lora_A", "lora_B", "routing", "frozen_routing")
    expected = {name: t.clone() for name, t in module[0].up.adapter_state_dict().items()}
    others = {name: t.clone() for name, t in module[1].up.adapter_state_dict().items()}
    by_block(module)
    up, before = module[0].up, module[0].up.weight
    assert [p.shape for p in up.adapter_parameters()] == [expected[name].shape for name in names[:3]]
    assert all(torch.equal(whole(t), expected[name]) for name, t in up.adapter_state_dict().items())
    assert "path=aten" in repr(up), repr(up)
    for refused in (
        up.merge,
        lambda: up.merge("cpu"),
        lambda: up.merge(None),
        up.fold,
        up.fold_routing,
        up.lora_tensors,
    ):
        with pytest.raises(ValueError, match="weight: got one that is sharded over ranks, expected a whole one"):
            refused()
    for refused in (merge_all, to_lora):
        with pytest.raises(ValueError, match="weight: got one that is sharded over ranks"):
            refused(module)
    with pytest.raises(ValueError, match=r"state_dict\['lora_B'\]: got shape"):
        up.load_adapter_state_dict({**others, "lora_B": others["lora_B"].mT})
    assert up.weight is before and not up.merged
    assert all(torch.equal(whole(t), expected[name]) for name, t in up.adapter_state_dict().items())
    up.load_adapter_state_dict(others)
    assert all(torch.equal(whole(t), others[name]) for name, t in up.adapter_state_dict().items())
    module[1].up.load_adapter_state_dict({name: t + 1 for name, t in up.adapter_state_dict().items()})
    moved = module[1].up.adapter_state_dict()
    assert all(torch.equal(whole(t), others[name] + 1) for name, t in moved.items())
    full = copy.deepcopy(get_model_state_dict(module, options=StateDictOptions(full_state_dict=True)))
    up.reset_adapter()
    x, _ = batch(dist.get_rank(), 0)
    start = {name: whole(t) for name, t in up.adapter_state_dict().items()}
    return full, start, module(x)


@pytest.mark.parametrize("ranks", [2, 4])
def test_adapters_of_a_sharded_model(ranks) -> None:
    """They are looked at, loaded and started anew as whole ones; what cannot be done says so and changes nothing."""
    found = run_in(ranks, states)
    plain = model(frozen_routing=True)
    others = plain[1].up.adapter_state_dict()
    assert found[0][0].keys() == plain.state_dict().keys()
    plain[0].up.load_adapter_state_dict(others)
    plain[1].up.load_adapter_state_dict({name: t + 1 for name, t in others.items()})
    assert all(torch.equal(t, found[0][0][name]) for name, t in plain.state_dict().items())
    for rank, (_, start, y) in enumerate(found):
        assert torch.equal(start["routing"], torch.eye(3).double()) and not start["frozen_routing"].any()
        assert not start["lora_B"].any() and start["lora_A"].std() > 0
        plain[0].up.load_adapter_state_dict(start)
        torch.testing.assert_close(y, plain(batch(rank, 0)[0]))


def from_meta():
    with torch.device("meta"):
        block = Block(torch.float64, frozen_routing=True)
    fully_shard(block)
    block.to_empty(device="cpu")
    for layer in (block.up, block.down):
        layer.reset_parameters()
    x, _ = batch(dist.get_rank(), 0)
    return block(x), {name: whole(t) for name, t in block.state_dict().items()}


def test_sharded_before_it_has_memory() -> None:
    for rank, (y, state) in enumerate(run_in(2, from_meta)):
        block = Block(torch.float64, frozen_routing=True)
        block.load_state_dict(state)
        torch.testing.assert_close(y, block(batch(rank, 0)[0]))
        assert torch.equal(block.up.routing, torch.eye(3).double()) and not block.up.lora_B.any()


def merged_before():
    module = model(frozen_routing=True).eval()
    x, original = batch(0, 0)[0], module[0].up.weight.detach().clone()
    expected = module(x)
    merge_all(module)
    by_block(module)
    for refused in (module[0].up.unmerge, lambda: unmerge_all(module), lambda: extract(module), module[0].up.merge):
        with pytest.raises(ValueError, match="weight: got one that is sharded over ranks, expected a whole one"):
            refused()
    return module(x), expected, module[0].up.merged, module.state_dict()["0.up.weight"], original


def test_merged_before_it_is_sharded() -> None:
    """It computes on; the original weight, which state dicts hold, does not come back into a part of a weight."""
    for y, expected, merged, saved, original in run_in(2, merged_before):
        torch.testing.assert_close(y, expected)
        assert merged and torch.equal(saved, original)
