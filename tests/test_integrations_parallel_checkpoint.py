"""Checkpoints of torch.distributed.checkpoint: saved by two ranks, loaded by one and by four, and trained on."""

from __future__ import annotations

import pytest
import torch
import torch.distributed.checkpoint as dcp
from parallel_models import D, by_block, loss_of, model, optimizer_of, tensor_parallel, whole
from processes import run_in
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from clora_kernels import RoutedLoRALinear

OPTIONS = {"frozen_routing": True}


def alone(module):
    return module


def train(module, optimizer, steps):
    """On the same batch on every rank, so that the number of ranks changes nothing."""
    for step in steps:
        x, wanted = torch.randn(2, 3, 5, D, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        optimizer.zero_grad()
        loss_of(module, x, wanted).backward()
        optimizer.step()


def adapters(module):
    layers = {name: layer for name, layer in module.named_modules() if isinstance(layer, RoutedLoRALinear)}
    return {f"{name}.{k}": t for name, layer in layers.items() for k, t in layer.adapter_state_dict().items()}


def saved(folder, shard):
    module = shard(model(**OPTIONS))
    optimizer = optimizer_of(module.parameters())
    train(module, optimizer, range(3))
    state = {"model": get_model_state_dict(module), "optimizer": get_optimizer_state_dict(module, optimizer)}
    dcp.save(state, checkpoint_id=f"{folder}/all")
    dcp.save(adapters(module), checkpoint_id=f"{folder}/adapters")


def loaded(folder, shard):
    """Two models that start from other values: into one the adapters are loaded, into the other all of it, and it goes
    on for three steps."""
    adapted = model(**OPTIONS)
    with torch.no_grad():
        for t in adapters(adapted).values():
            t.add_(1)
    shard(adapted)
    dcp.load(adapters(adapted), checkpoint_id=f"{folder}/adapters")
    module = model(**OPTIONS)
    with torch.no_grad():
        for t in (*module.parameters(), *module.buffers()):
            t.add_(1)
    shard(module)
    optimizer = optimizer_of(module.parameters())
    state = {"model": get_model_state_dict(module), "optimizer": get_optimizer_state_dict(module, optimizer)}
    dcp.load(state, checkpoint_id=f"{folder}/all")
    set_model_state_dict(module, state["model"])
    set_optimizer_state_dict(module, optimizer, state["optimizer"])
    train(module, optimizer, range(3, 6))
    return tuple({name: whole(t) for name, t in made.state_dict().items()} for made in (adapted, module))


@pytest.mark.parametrize("shard", [by_block, tensor_parallel])
def test_saved_by_two_ranks_and_loaded_by_one_and_four(shard, tmp_path) -> None:
    run_in(2, saved, str(tmp_path), shard)
    expected = model(**OPTIONS)
    optimizer = optimizer_of(expected.parameters())
    train(expected, optimizer, range(3))
    of_adapters = {name: t.clone() for name, t in expected.state_dict().items()}
    train(expected, optimizer, range(3, 6))
    for ranks, way in ((1, alone), (1, shard), (4, shard)):
        for with_adapters, with_all in run_in(ranks, loaded, str(tmp_path), way):
            torch.testing.assert_close(with_adapters, of_adapters)
            torch.testing.assert_close(with_all, dict(expected.state_dict()))
    assert not torch.equal(of_adapters["0.up.lora_A"], expected.state_dict()["0.up.lora_A"])
