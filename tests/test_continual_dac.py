"""DAC against its equations, written once more in plain torch: steps, loss, counts, boundary."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F
from sequences import TARGETS, Net, batch, learn, train
from torch import Tensor

from clora_kernels import routed_lora_linear
from clora_kernels.continual import DAC

S, L, R, K, KEEP = 7, 3, 5, 3, 2
LR, SCALING = 1.0, 5.0


def first_of(values: list[float], n: int) -> list[int]:
    """The places of the n largest, of equal ones the first."""
    return sorted(range(len(values)), key=lambda i: (-values[i], i))[:n]


@dataclass
class Plain:
    """One layer of DAC, nothing of the package in it."""

    W: Tensor
    b: Tensor
    s: float
    options: dict[str, str]
    earlier: list[tuple[Tensor, list[int]]] = field(default_factory=list)

    def begin(self, layer) -> None:
        adapter = {name: t.clone() for name, t in layer.adapter_state_dict().items()}
        self.A, self.B = adapter["lora_A"].requires_grad_(), adapter["lora_B"].requires_grad_()
        self.router = (adapter["router.weight"].requires_grad_(), adapter["router.bias"].requires_grad_())
        self.counts = [0] * R

    def forward(self, x: Tensor, drop: Tensor) -> Tensor:
        dropped = x * drop
        probabilities = torch.softmax(dropped[:, 0] @ self.router[0].T + self.router[1], -1)
        own = [first_of(row, K) for row in probabilities.tolist()]
        counts = [sum(i in row for row in own) for i in range(R)]
        self.counts = [a + b for a, b in zip(self.counts, counts, strict=True)]
        self.last = (own, counts)
        rows = own if self.options["selection"] == "sample" else [first_of(counts, K)] * len(own)
        mask = torch.tensor([[float(i in row) for i in range(R)] for row in rows], dtype=x.dtype)
        gate = mask if self.options["weights"] == "unit" else mask * probabilities
        return x @ self.W.T + self.b + self.s * ((dropped @ self.A.T) * gate[:, None]) @ self.B.T

    def kept(self) -> list[int]:
        return first_of(self.counts, KEEP)

    def old(self, remember: str) -> Tensor:
        return torch.cat([B if remember == "all" else B[:, T] for B, T in self.earlier], 1)

    def ago(self, remember: str) -> Tensor:
        return sum((self.B[:, i] @ o).abs() for i in self.kept() for o in self.old(remember).T)

    def parameters(self) -> list[Tensor]:
        return [self.A, self.B, *self.router]

    def end(self) -> None:
        T = self.kept()
        with torch.no_grad():
            self.W = self.W + self.s * self.B[:, T] @ self.A[T]
        self.earlier.append((self.B.detach().clone(), T))


def drops(layers, shape: tuple[int, ...]) -> list[Tensor]:
    """What the next step's dropout multiplies the inputs of these layers with, seen through an adapter that is the
    identity; the generator stays."""
    state = torch.get_rng_state()
    limits = torch.iinfo(torch.int64)
    seeds = [torch.randint(limits.min, limits.max, (), dtype=torch.int64) for _ in layers]
    torch.set_rng_state(state)
    found = []
    for layer, seed in zip(layers, seeds, strict=True):
        one, eye = torch.ones(*shape, layer.in_features).double(), torch.eye(layer.in_features).double()
        found.append(routed_lora_linear(one, 0 * eye, eye, eye, dropout_p=layer.dropout_p, dropout_seed=seed))
    return found


SETTINGS = [
    {"remember": remember, "selection": selection, "weights": weights, "operation": operation}
    for remember, selection, weights, operation in [
        ("all", "batch", "unit", "routed_lora"),
        ("kept", "batch", "unit", "routed_lora"),
        ("all", "sample", "unit", "routed_lora"),
        ("kept", "sample", "probability", "routed_lora"),
        ("all", "batch", "probability", "routed_lora"),
        ("all", "batch", "unit", "rank1_experts"),
        ("kept", "sample", "probability", "rank1_experts"),
    ]
]


@pytest.mark.parametrize("options", SETTINGS, ids=lambda options: "-".join(options.values()))
def test_three_tasks_are_those_of_the_paper(options: dict[str, str]) -> None:
    """Losses, gradients, counts and parameters of every step, and the weights of every boundary, in fp64."""
    base = Net().double()
    method = DAC(copy.deepcopy(base), TARGETS, r=R, k=K, keep=KEEP, scaling=SCALING, **options)
    linears = {name: base.get_submodule(name) for name in TARGETS}
    plain = {name: Plain(m.weight.data, m.bias.data, SCALING, options) for name, m in linears.items()}
    model, told = method.model.train(), set()
    for task in (1, 2, 3):
        method.begin_task()
        optimizer = torch.optim.SGD(method.param_groups(LR))
        for name, layer in method.layers.items():
            plain[name].begin(layer)
        for number in range(4):
            x, labels = torch.randn(S, L, 6).double(), torch.randint(3, (S,))
            masks = drops(method.layers.values(), (S, L))
            losses = method.training_step(x, lambda x=x, y=labels: F.cross_entropy(model(x).sum(1), y), optimizer)

            h = x
            for name, drop in zip(TARGETS, masks, strict=True):
                told |= notable(plain[name], h, drop)
                h = torch.tanh(plain[name].forward(h, drop))
            loss = F.cross_entropy(F.linear(h, base.out.weight, base.out.bias).sum(1), labels)
            torch.testing.assert_close(losses["task"], loss.detach())
            assert ("ago" in losses) == (task > 1)
            if task > 1:
                both = {r: 0.1 * sum(p.ago(r) for p in plain.values()) / len(plain) for r in ("all", "kept")}
                ago = both[options["remember"]]
                torch.testing.assert_close(losses["ago"], ago.detach())
                assert (losses["ago"] > 1e-3) == (both["all"] > 1.1 * both["kept"]) == (number > 0)  # B starts at zero
                loss = loss + ago
            leaves = [t for p in plain.values() for t in p.parameters()]
            gradients = torch.autograd.grad(loss, leaves, allow_unused=options["weights"] == "unit")
            got = [t for layer in method.layers.values() for t in layer_parameters(layer)]
            for leaf, expected, parameter in zip(leaves, gradients, got, strict=True):
                if expected is None:
                    assert parameter.grad is None
                    continue
                torch.testing.assert_close(parameter.grad, expected)
                with torch.no_grad():
                    leaf -= LR * expected
                torch.testing.assert_close(parameter.detach(), leaf.detach())
            for name, layer in method.layers.items():
                assert layer.activation_counts.tolist() == plain[name].counts
                told |= {"not the last batch's"} if plain[name].kept() != first_of(plain[name].last[1], KEEP) else set()
        method.end_task()
        for name, p in plain.items():
            p.end()
            torch.testing.assert_close(model.get_submodule(name).weight.data, p.W)
    # What a mistake would have to hide behind did happen.
    assert told == {"drops count", "the first token counts", "samples differ", "not the last batch's"}


def layer_parameters(layer) -> list[Tensor]:
    return [layer.lora_A, layer.lora_B, layer.router.weight, layer.router.bias]


def notable(plain: Plain, x: Tensor, drop: Tensor) -> set[str]:
    """In which ways the choice of this batch depends on what it should depend on."""

    def own(c: Tensor) -> list[list[int]]:
        return [first_of(row, K) for row in (c @ plain.router[0].T + plain.router[1]).tolist()]

    right, differs = own((x * drop)[:, 0]), set()
    differs |= {"drops count"} if own(x[:, 0]) != right else set()
    differs |= {"the first token counts"} if own((x * drop)[:, 1]) != right else set()
    return differs | ({"samples differ"} if any(set(a) != set(right[0]) for a in right) else set())


def test_no_loss_without_a_weight_or_an_earlier_task() -> None:
    for ago, tasks in ((0.0, 2), (0.1, 1)):
        method = DAC(Net(), TARGETS, r=R, ago=ago, k=K, keep=KEEP)
        learn(method, tasks - 1)
        method.begin_task()
        (losses,) = train(method, torch.optim.SGD(method.param_groups(0.1)), tasks, range(1))
        assert set(losses) == {"task"} and method.extra_losses() == {}


def test_the_loss_keeps_what_is_kept_away_from_earlier_tasks() -> None:
    def overlap(ago: float, seed: int) -> float:
        torch.manual_seed(seed)
        method = DAC(Net(), TARGETS, r=R, k=K, keep=KEEP, ago=ago, scaling=1.0)
        return learn(method, 2)[1].measures["overlap"]

    without, with_it = ([overlap(ago, seed) for seed in range(3)] for ago in (0.0, 1.0))
    assert all(b < 0.5 * a for a, b in zip(without, with_it, strict=True))


def test_reports_are_those_of_the_formulas() -> None:
    method = DAC(Net().double(), TARGETS, r=R, k=K, keep=KEEP, remember="kept")
    old: dict[str, Tensor] = {}
    for task in (1, 2):
        method.begin_task()
        optimizer = torch.optim.SGD(method.param_groups(0.1))
        for _ in range(5):
            x, y = torch.randn(S, 6).double(), torch.randint(3, (S,))
            method.training_step(x, lambda x=x, y=y: F.cross_entropy(method.model(x), y), optimizer)
        on_kept = everything = 0
        overlap = torch.zeros((), dtype=torch.float64)
        for name, layer in method.layers.items():
            counts = layer.activation_counts.tolist()
            T = first_of(counts, KEEP)
            on_kept, everything = on_kept + sum(counts[i] for i in T), everything + sum(counts)
            B = layer.lora_B.detach()[:, T]
            overlap += (B.T @ old[name]).abs().sum() / 2 if name in old else 0
            old[name] = B.clone()
        report = method.end_task()
        assert everything == 2 * 5 * S * K and report.measures["share"] == on_kept / everything
        assert report.measures["overlap"] == (None if task == 1 else pytest.approx(overlap.item(), rel=1e-12))
        assert report.trainable == R * (6 + 9) + R * (9 + 5)
    method.begin_task()
    assert method.end_task().measures == {"overlap": 0.0, "share": None}


def test_what_runs_between_tasks_does_not_count() -> None:
    method = DAC(Net(), TARGETS, r=R, k=K, keep=KEEP)
    method.model.train()(batch(1, 1)[0])
    assert all(layer.activation_counts.any() for layer in method.layers.values())
    method.begin_task()
    assert not any(layer.activation_counts.any() for layer in method.layers.values())


@pytest.mark.parametrize("options", SETTINGS[:4], ids=lambda options: "-".join(options.values()))
def test_within_a_task_inference_has_what_the_task_would_keep(options: dict[str, str]) -> None:
    method = DAC(Net().double(), TARGETS, r=R, k=K, keep=KEEP, **options)
    method.begin_task()
    optimizer = torch.optim.SGD(method.param_groups(0.3))
    for _ in range(3):
        x, y = torch.randn(S, 6).double(), torch.randint(3, (S,))
        method.training_step(x, lambda x=x, y=y: F.cross_entropy(method.model(x), y), optimizer)
    expected = {}
    for name, layer in method.layers.items():
        T = first_of(layer.activation_counts.tolist(), KEEP)
        A, B = layer.lora_A.detach(), layer.lora_B.detach()
        expected[name] = layer.weight + B[:, T] @ A[T] / R
        assert not torch.allclose(expected[name], layer.weight + B @ A / R)
    plain = method.inference_model()
    for name, weight in expected.items():
        torch.testing.assert_close(plain.get_submodule(name).weight, weight.detach())
    merged = method.outputs(x)[0]
    torch.testing.assert_close(plain(x).detach(), merged)
    assert not torch.allclose(method.model.eval()(x), merged)  # live it chooses by input
    method.end_task()
    for name in TARGETS:
        assert torch.equal(method.layers[name].weight, plain.get_submodule(name).weight)
    assert torch.equal(method.model(x), plain(x)) and torch.equal(method.outputs(x)[0], merged)


@pytest.mark.parametrize("within", [False, True])
def test_what_was_kept_goes_to_the_device_where_it_is_used(within: bool) -> None:
    """The device of tensors without values is one that others cannot be mixed with."""
    method = DAC(Net(), TARGETS, r=R, k=K, keep=KEEP)
    learn(method, 2)
    if within:
        method.begin_task()
    method.model.to("meta")
    if not within:
        method.kept = {key: t.to("meta") if key.startswith("folded.2.") else t for key, t in method.kept.items()}
        method.begin_task()
    assert method.extra_losses()["ago"].is_meta
