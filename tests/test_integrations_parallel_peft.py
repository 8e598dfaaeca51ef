"""Accelerated PEFT models under FSDP2."""

from __future__ import annotations

import pytest
import torch
from parallel_models import local_loss, trained, trained_alone
from peft import LoraConfig, get_peft_model
from processes import run_in
from torch import nn
from torch.distributed.fsdp import fully_shard

from clora_kernels.integrations.peft import accelerate
from clora_kernels.integrations.peft.layers import why_not_fused


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x):
        return self.second(torch.relu(self.first(x)))


def peft_pair():
    torch.manual_seed(0)
    module = get_peft_model(Pair().double(), LoraConfig(r=3, target_modules=["first", "second"]))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.4 * torch.randn_like(parameter))
    return module


def peft_under_fsdp():
    """Whole layers are sharded, then base layers alone, then what an adapter is made of."""
    said = {}
    for what in ("block", "layer", "base_layer", "lora_A"):
        module = peft_pair()
        report = accelerate(module)
        for layer in report.layers.values():
            if what == "layer":
                fully_shard(layer)
            elif what == "base_layer":
                fully_shard(layer.base_layer)
            elif what == "lora_A":
                fully_shard(layer.lora_A["default"])
        fully_shard(module)
        result = trained(module, local_loss)
        fused = not any("FSDPLinear" in str(why_not_fused(layer.base_layer)) for layer in report.layers.values())
        said[what] = result, {**report.accelerated}, {**report.fell_back}, {**report.left_alone}, fused
    return said


@pytest.mark.parametrize("ranks", [2, 4])
def test_accelerated_peft_layers_are_gathered_before_their_weights_are_read(ranks) -> None:
    expected = trained_alone(peft_pair(), ranks)
    for said in run_in(ranks, peft_under_fsdp):
        for what, (result, accelerated, fell_back, left, fused) in said.items():
            torch.testing.assert_close(result["gradients"], expected["gradients"])
            torch.testing.assert_close(result["parameters"], expected["parameters"])
            if what == "lora_A":
                assert len(left) == 2 and {*fell_back.values()} == {*left.values()}
                assert all("is made of FSDPLinear, not nn.Linear" in why for why in left.values())
                continue
            assert len(accelerated) == 2 and not left and not fell_back
            assert all("in calls for which its sharded weights are gathered" in how for how in accelerated.values())
            assert fused == (what != "base_layer")
