"""CL-LoRA: start, what learns, boundary, options, what is refused. Its training: test_continual_cl_lora_equations."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from vits import CLASSES, TARGETS, WIDTH, Learner, TinyViT, batch, cl_lora

from clora_kernels.continual import CLLoRA, CosineHead, assert_model_parity


@pytest.mark.parametrize(("depth", "shared"), [(2, 1), (4, 2), (5, 2)])
def test_the_first_half_of_the_blocks_is_shared(depth: int, shared: int) -> None:
    method = cl_lora(TinyViT(depth))
    assert method.shared_blocks == [f"blocks.{i}" for i in range(shared)]
    assert method.specific_blocks == [f"blocks.{i}" for i in range(shared, depth)]
    assert list(method.shared) == [f"blocks.{i}.{p}" for p in TARGETS for i in range(shared)]
    assert list(method.specific) == [f"blocks.{i}.{p}" for p in TARGETS for i in range(shared, depth)]
    assert all(layer.scaling == 1.0 and type(layer.scaling) is float for layer in method.shared.values())
    assert all(type(layer.scaling) is nn.Parameter for layer in method.specific.values())


def test_blocks_without_a_target_do_not_count() -> None:
    method = CLLoRA(TinyViT(4), [f"{i}.v" for i in (3, 1, 2)], r=2)
    assert (method.shared_blocks, method.specific_blocks) == (["blocks.1"], ["blocks.2", "blocks.3"])
    assert method.own["idle_weights"].shape == (2, 1)


def test_blocks_may_be_the_targets_themselves() -> None:
    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.steps = nn.ModuleList(nn.Linear(3, 3) for _ in range(3))

        def forward(self, x):
            for step in self.steps:
                x = torch.tanh(step(x))
            return x

    with pytest.raises(ValueError, match=r"targets: got layers of steps\.1 alone, expected those of at least 2 blocks"):
        CLLoRA(Chain(), ["1"], r=2)
    method = CLLoRA(Chain(), ["0", "1", "2"], r=2, exit=lambda model, hidden: 2 * hidden)
    assert list(method.shared) == ["steps.0"] and list(method.specific) == ["steps.1", "steps.2"]
    x, names = torch.randn(5, 3), []
    torch.testing.assert_close(method.shared_features(x), 2 * method.model.steps[0](x))
    for _ in range(2):
        head = nn.Linear(3, 2)
        method.begin_task(head)
        optimizer = torch.optim.SGD([*method.param_groups(0.1), {"params": head.parameters()}], lr=0.1)
        names = list(method.training_step(x, lambda h=head: h(method.model(x)).square().mean(), optimizer))
        method.end_task()
    assert names == ["distillation", "task", "block_weights"]
    first, second = method.outputs(x)
    with method.inference(1) as model:
        assert torch.equal(model(x), first) and not torch.equal(first, second)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_starts_orthonormal_and_without_changing_the_model(dtype: torch.dtype) -> None:
    model, x = TinyViT().to(dtype), batch(1, 1, dtype)[0]
    before = model(x)
    method = cl_lora(model)
    method.begin_task()
    assert torch.equal(model(x), before)
    for layer in method.layers.values():
        A = layer.lora_A.detach()
        torch.testing.assert_close(A @ A.mT, torch.eye(2, dtype=dtype))
        # Of a matrix of U[0, 1): the first column has no negative entry, the second, at right angles, has.
        assert (A[0] >= 0).all() and (A[1] < 0).any() and not layer.lora_B.any()
    weights = method.block_weights().detach()
    assert len(set(weights.tolist())) == 6 and ((weights >= 0.5) & (weights < 1.5)).all() and weights.dtype == dtype


def test_block_weights_are_drawn_from_one_half_to_three_halves() -> None:
    method = cl_lora(idle_weights=500)
    method.begin_task()
    weights = method.block_weights().detach()
    assert len(weights) == 4 + 2 * 500 and 0.5 <= weights.min() < 0.51 and 1.49 < weights.max() < 1.5
    torch.testing.assert_close(weights[4:], method.own["idle_weights"].detach().flatten())


def test_what_a_task_starts_with_and_what_it_keeps() -> None:
    method = cl_lora()
    learner = Learner(method)
    learner.learn(1)
    shared = {n: {k: t.clone() for k, t in m.adapter_state_dict().items()} for n, m in method.shared.items()}
    specific = {n: {k: t.clone() for k, t in m.adapter_state_dict().items()} for n, m in method.specific.items()}
    weights = method.block_weights().detach().clone()
    learner.begin()
    for name, layer in method.shared.items():
        assert shared[name]["lora_B"].any()
        assert all(torch.equal(t, shared[name][k]) for k, t in layer.adapter_state_dict().items())
        assert torch.equal(method.kept[f"teacher.{name}.lora_B"], shared[name]["lora_B"])
    for i, (name, layer) in enumerate(method.specific.items()):
        assert not layer.lora_B.any() and specific[name]["lora_B"].any()
        assert not torch.isclose(layer.lora_A, specific[name]["lora_A"]).all()
        kept = method.tested_adapters(1)[name]
        assert kept.keys() == specific[name].keys() == {"lora_A", "lora_B", "scaling"}
        assert all(torch.equal(kept[k], t) for k, t in specific[name].items())
        assert torch.equal(weights[i], specific[name]["scaling"])
    assert not torch.isclose(method.block_weights(), weights).any()
    assert torch.equal(method.kept["task.1.block_weights"], weights)


def test_what_learns_and_what_is_stored() -> None:
    method = cl_lora()
    learner = Learner(method)
    B, A = WIDTH * 2, 2 * WIDTH
    trained, specific = 4 * B + 4 * (A + B + 1) + 2, 4 * (A + B) + 6
    for task in (1, 2, 3):
        learner.begin()
        learning = {n for n, p in method.model.named_parameters() if p.requires_grad}
        expected = {f"{n}.lora_B" for n in method.shared}
        expected |= {f"{n}.{t}" for n in method.specific for t in ("lora_A", "lora_B", "scaling")}
        assert learning == expected and method.own["idle_weights"].requires_grad
        learner.train(range(2))
        report = method.end_task()
        stored = 4 * (A + B) + 4 * (A + B + 1) + 2 + 4 * B + task * specific
        assert (report.trainable, report.stored) == (trained, stored)


def test_the_first_step_reaches_the_shared_up_projections_and_the_head_alone(monkeypatch) -> None:
    method = cl_lora()
    learner = Learner(method)
    learner.learn(1)
    learner.begin()
    reached = {}

    def see(step: str) -> None:
        parameters = {**dict(method.model.named_parameters()), **dict(learner.head.named_parameters()), **method.own}
        reached[step] = {n for n, p in parameters.items() if p.grad is not None}

    adjust = method.adjust_gradients
    monkeypatch.setattr(method, "adjust_gradients", lambda step: (adjust(step), see(step)))
    learner.step(0)
    first = {f"{n}.lora_B" for n in method.shared} | {"weight", "scale"}
    assert reached["distillation"] == first
    specific = {f"{n}.{t}" for n in method.specific for t in ("lora_A", "lora_B", "scaling")}
    assert reached["task"] == first | specific | {"idle_weights"}


def test_distillation_needs_the_head_before_anything_moves() -> None:
    method = cl_lora()
    learner = Learner(method)
    learner.learn(1)
    learner.begin()
    method.head = None
    before = {k: t.clone() for k, t in method.state_dict().items()}
    with pytest.raises(RuntimeError, match=r"head: got None in task 2, expected begin_task\(head\)"):
        learner.step(0)
    assert all(torch.equal(t, before[k]) for k, t in method.state_dict().items())
    method.head = learner.head
    learner.step(0)
    without = cl_lora(distillation=0.0)
    without.begin_task()
    without.end_task()
    without.begin_task()
    assert list(without.extra_steps(batch(1, 1)[0])) == []


def test_losses_without_a_weight_are_left_out() -> None:
    for options, names in (
        ({"distillation": 0.0}, {"task", "block_weights"}),
        ({"weight_penalty": 0.0}, {"task", "distillation"}),
    ):
        learner = Learner(cl_lora(**options))
        learner.learn(1)
        learner.begin()
        assert set(learner.step(0)) == names


@pytest.mark.parametrize("idle_weights", [0, 1, 3])
def test_the_penalty_is_the_mean_cosine_with_earlier_tasks(idle_weights: int) -> None:
    method = cl_lora(idle_weights=idle_weights, weight_penalty=0.5)
    learner = Learner(method)
    old = []
    for _ in range(2):
        learner.learn(1)
        mu = [layer.scaling.item() for layer in method.specific.values()]
        old.append(mu + (method.own["idle_weights"].flatten().tolist() if idle_weights else []))
    learner.begin()
    assert [len(mu) for mu in old] == [4 + 2 * idle_weights] * 2 and ("idle_weights" in method.own) == (
        idle_weights > 0
    )
    now = method.block_weights().tolist()
    cosines = [sum(a * b for a, b in zip(now, mu, strict=True)) / (math.hypot(*now) * math.hypot(*mu)) for mu in old]
    (loss,) = method.extra_losses().values()
    assert loss.item() == pytest.approx(0.5 * sum(cosines) / 2, rel=1e-6)


def test_every_layer_is_proved_with_its_block_weight() -> None:
    learner = Learner(cl_lora())
    learner.learn(1)
    model, (x, labels) = learner.method.model, batch(1, 9)
    proved = assert_model_parity(model, lambda: nn.functional.cross_entropy(learner.head(model(x)), labels))
    assert proved.keys() == learner.method.layers.keys()
    assert all(d.ok for results in proved.values() for d in results.values())
    assert "scaling" in proved["blocks.2.q"]


def test_a_model_in_16_bit_keeps_its_adapters_in_32() -> None:
    learner = Learner(cl_lora(TinyViT().bfloat16()))
    learner.learn(2)
    state = learner.method.state_dict()
    for key, tensor in state.items():
        assert tensor.dtype == torch.float32 or key in ("task", "in_task") or key.startswith("base."), key
        assert tensor.isfinite().all()
    assert {t.dtype for t in learner.method.outputs(batch(1, 1, torch.bfloat16)[0])} == {torch.bfloat16}


def test_a_model_may_change_its_dtype_between_tasks() -> None:
    learner = Learner(cl_lora())
    learner.learn(2)
    learner.method.model.double()
    learner.dtype = torch.float64
    learner.learn(1)
    assert {layer.lora_B.dtype for layer in learner.method.layers.values()} == {torch.float64}
    assert [t.dtype for t in learner.method.outputs(batch(1, 1, torch.float64)[0])] == [torch.float64] * 3


def test_what_was_kept_goes_to_the_device_where_it_is_used() -> None:
    """The device of tensors without values is one that others cannot be mixed with."""
    method = cl_lora()
    learner = Learner(method)
    learner.learn(1)
    learner.begin()
    method.model.to("meta")
    (loss,) = method.extra_losses().values()
    assert loss.is_meta
    method.task = 3
    method.kept["task.2.block_weights"] = method.kept["task.1.block_weights"].to("meta")
    (loss,) = method.extra_losses().values()
    assert loss.is_meta


def test_targets_that_do_not_fit_leave_the_model_alone() -> None:
    model = TinyViT()
    for targets, message in (
        (["blocks.1.q", "blocks.1.v"], r"targets: got layers whose innermost common module is blocks\.1, Block, expec"),
        (["blocks.1.q"], r"targets: got layers whose innermost common module is blocks\.1, Block, expected"),
        (
            ["q", "embed"],
            r"targets: got layers whose innermost common module is the model, TinyViT, expected layers in",
        ),
        (["nothing"], r"targets: got \['nothing'\], which swaps nothing"),
    ):
        with pytest.raises(ValueError, match=message):
            CLLoRA(model, targets, r=2)
    assert all(type(m) is nn.Linear for n, m in model.named_modules() if n.endswith((".q", ".v")))
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"distillation": -1.0}, ValueError, r"distillation: got -1\.0, expected a finite weight of at least 0"),
        ({"distillation": math.inf}, ValueError, "distillation: got inf"),
        ({"temperature": 0.0}, ValueError, r"temperature: got 0\.0, expected a finite number above 0"),
        ({"temperature": math.nan}, ValueError, "temperature: got nan"),
        ({"weight_penalty": -1e-4}, ValueError, "weight_penalty: got -0.0001"),
        ({"weight_penalty": "1"}, TypeError, "weight_penalty: got str, expected a number"),
        ({"temperature": True}, TypeError, "temperature: got bool, expected a number"),
        ({"reassignment": "no"}, TypeError, "reassignment: got 'no', expected True or False"),
        ({"reassignment": 1}, TypeError, "reassignment: got 1, expected True or False"),
        ({"exit": "last"}, TypeError, "exit: got 'last', expected a function of the model and its hidden states"),
        ({"idle_weights": -1}, ValueError, "idle_weights: got -1"),
        ({"idle_weights": True}, ValueError, "idle_weights: got True"),
        ({"idle_weights": 1.5}, ValueError, r"idle_weights: got 1\.5"),
        ({"r": 0}, ValueError, "r: got 0"),
        ({"r": WIDTH + 1}, ValueError, "r: got 9, expected at most the in_features of every target, 8"),
        ({"backend": "fast"}, ValueError, "backend"),
    ],
)
def test_bad_options_are_named(options: dict, error: type, message: str) -> None:
    model = TinyViT()
    with pytest.raises(error, match=message):
        CLLoRA(model, TARGETS, **options)
    assert type(model.blocks[0].q) is nn.Linear and model.embed.weight.requires_grad


def test_an_exit_of_ones_own_is_what_the_head_gets() -> None:
    seen = []

    def last_token(model: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        seen.append(hidden.requires_grad)
        return hidden[:, -1]

    method = cl_lora(exit=last_token)
    learner = Learner(method)
    learner.learn(2, steps=2)
    assert seen == [True, False] * 2
    method.begin_task(CosineHead(WIDTH, CLASSES))
    ((name, loss),) = method.extra_steps(batch(3, 0)[0])
    assert name == "distillation" and loss.requires_grad
