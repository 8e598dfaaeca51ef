"""What the tests of layers share: options, random adapters, snapshots."""

import copy

import torch

from clora_kernels import Rank1ExpertLinear

OPTIONS = [
    {"routing": False},
    {"routing": True},
    {"routing": True, "frozen_routing": True, "scaling": 0.5},
]


def randomize(layer, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for t in layer.adapter_state_dict().values():
            t.copy_(torch.randn(t.shape, generator=generator) * 0.3)
    return layer


def same_bits(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def snapshot(module):
    return copy.deepcopy(module.state_dict())


def function_inputs(layer, x):
    """The tensors and the scaling with which an unmerged layer calls its function, for the parity rule."""
    arguments = {k: v for k, v in layer.call_arguments(x).items() if isinstance(v, torch.Tensor) or k == "scaling"}
    return {k: v.detach().clone() if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}


def expert_layer(selection="sample", weights="probability", dtype=torch.float32, **options):
    """Rank1ExpertLinear(37, 29) with 23 random experts of which 5 are chosen."""
    torch.manual_seed(0)
    options = {"experts": 23, "k": 5, "scaling": 0.7, **options}
    layer = randomize(Rank1ExpertLinear(37, 29, selection=selection, weights=weights, dtype=dtype, **options))
    layer.reset_activation_counts()
    return layer


def best(values, k):
    """Positions of the largest of a list, those of equal values in their order."""
    return sorted(range(len(values)), key=lambda i: (-values[i], i))[:k]
