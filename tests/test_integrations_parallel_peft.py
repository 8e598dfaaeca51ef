"""PEFT models under FSDP2 and DDP: accelerated ones, and those of the package's own method."""

from __future__ import annotations

import pytest
import torch
from parallel_models import assert_trained_alike, batch, local_loss, trained, trained_alone, whole
from peft import LoraConfig, get_peft_model
from processes import run_in
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from clora_kernels.integrations.peft import RoutedLoraConfig, accelerate, next_task
from clora_kernels.integrations.peft.layers import why_not_fused

TARGETS = {"r": 3, "target_modules": ["first", "second"]}


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x):
        return self.second(torch.relu(self.first(x)))


def peft_pair(config=LoraConfig):
    torch.manual_seed(0)
    module = get_peft_model(Pair().double(), config(**TARGETS))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.4 * torch.randn_like(parameter))
    return module


def accelerated(what):
    """The whole model is sharded, or layers before it, or base layers alone, or what an adapter is made of; or DDP."""
    module = peft_pair()
    report = accelerate(module)
    for layer in report.layers.values():
        if what in ("layer", "base_layer", "lora_A"):
            fully_shard({"layer": layer, "base_layer": layer.base_layer, "lora_A": layer.lora_A["default"]}[what])
    result = trained(DistributedDataParallel(module) if what == "ddp" else fully_shard(module), local_loss)
    fused = not any("FSDPLinear" in str(why_not_fused(layer.base_layer)) for layer in report.layers.values())
    return result, {**report.accelerated}, {**report.fell_back}, {**report.left_alone}, fused


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("what", ["ddp", "model", "layer", "base_layer", "lora_A"])
def test_accelerated_layers_are_gathered_before_their_weights_are_read(what, ranks) -> None:
    found = run_in(ranks, accelerated, what)
    assert_trained_alike([result for result, *_ in found], trained_alone(peft_pair(), ranks))
    for _, how, fell_back, left, fused in found:
        if what == "lora_A":
            assert len(left) == 2 and {*fell_back.values()} == {*left.values()}
            assert all("is made of FSDPLinear, not nn.Linear" in why for why in left.values())
            continue
        assert len(how) == 2 and not left and not fell_back
        said = "in one sum with its base layer" if what == "ddp" else "for which its sharded weights are gathered"
        assert all(said in now for now in how.values())
        assert fused == (what != "base_layer")


def base_alone():
    module = peft_pair()
    report = accelerate(module)
    fully_shard(module, ignored_params={p for p in module.parameters() if p.requires_grad})
    before = {**report.accelerated}
    return module(batch(0, 0)[0]).detach(), before, {**report.fell_back}


def test_what_is_sharded_of_a_base_is_told() -> None:
    """Adapters are whole on each rank."""
    for y, how, fell_back in run_in(2, base_alone):
        torch.testing.assert_close(y, peft_pair()(batch(0, 0)[0]))
        assert len(how) == 2 and all("its sharded weights are gathered" in now for now in how.values())
        assert not fell_back


def two_tasks(wrap):
    """The losses of the tasks, what x gives at the end of the first and right after it, and the model at the end."""
    module = peft_pair(RoutedLoraConfig)
    wrapped = wrap(module)
    first = trained(wrapped, local_loss)
    before = wrapped(batch(0, 0)[0]).detach()
    next_task(module)
    after = wrapped(batch(0, 0)[0]).detach()
    second = trained(wrapped, local_loss)
    return first, second, before, after, {name: whole(t) for name, t in module.state_dict().items()}


def by_layer(module):
    for layer in (module.base_model.model.first, module.base_model.model.second):
        fully_shard(layer)
    return fully_shard(module)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("wrap", [DistributedDataParallel, by_layer])
def test_routed_lora_learns_two_tasks(wrap, ranks) -> None:
    module = peft_pair(RoutedLoraConfig)
    of_first = trained_alone(module, ranks)
    next_task(module)
    of_second = trained_alone(module, ranks)
    found = run_in(ranks, two_tasks, wrap)
    for *_, before, after, state in found:
        torch.testing.assert_close(after, before)
        torch.testing.assert_close(state, dict(module.state_dict()))
    assert_trained_alike([first for first, *_ in found], of_first)
    assert_trained_alike([second for _, second, *_ in found], of_second)
