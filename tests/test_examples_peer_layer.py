"""The example of a product-key pool: it learns, the same each time, and every backend gives its gradients."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from clora_kernels import rank1_experts
from clora_kernels.reference import rank1_experts as reference
from clora_kernels.testing import assert_parity

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


@pytest.fixture(scope="module")
def example():
    """The example's module, with a small model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        import peer_layer

        for name, value in (("WIDTH", 16), ("CONTEXT", 12), ("BATCH", 4), ("KEY_FEATURES", 4), ("LR", 1e-2)):
            patch.setattr(peer_layer, name, value)
        yield peer_layer


@pytest.fixture(scope="module")
def text(example):
    return example.load_text()


def options_of(example, **changed):
    return example.Options(steps=30, experts=64, k=3, heads=2)._replace(**changed)


def test_the_text_is_the_standard_librarys(text):
    assert len(text.training) > 500_000 and len(text.held_out) > 20_000 and text.vocabulary == 128
    assert text.training.max() < 128 and "def wrap(text" in "".join(map(chr, text.held_out.tolist()))
    assert "class ArgumentParser" in "".join(map(chr, text.training[:300_000].tolist()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_models_learn_and_the_same_each_time(example, text, dtype):
    options = options_of(example, dtype=dtype)
    first, second = (
        {
            name: example.train(model, text.training, options)
            for name, model in example.make_models(128, options).items()
        }
        for _ in range(2)
    )
    assert first == second and first["experts"] != first["dense"]
    for losses in first.values():
        assert len(losses) == 30 and sum(losses[-5:]) < 0.85 * sum(losses[:5])


def test_models_are_the_same_but_for_the_mlp_that_is_compared(example):
    models = example.make_models(128, options_of(example))
    states = {name: model.state_dict() for name, model in models.items()}
    both = states["experts"].keys() & states["dense"].keys()
    assert all(torch.equal(states["experts"][name], states["dense"][name]) for name in both)
    only = {name for state in states.values() for name in state.keys() - both}
    assert only and all(name.startswith("blocks.1.mlp.") for name in only) and len(both) > 20
    pool, dense = (model.blocks[1].mlp for model in models.values())
    assert pool.multiplications() == 16 * 2 * 2 * 4 + 2 * 2 * 8 * 4 + 2 * 3 * 2 * 16
    assert dense[0].out_features == pool.multiplications() // 32


def step(example, text, backend):
    """The pool of a model, what it was called with, dy, and the gradients that a training step leaves."""
    model = example.make_models(128, options_of(example, backend=backend))["experts"]
    mlp, seen = model.blocks[-1].mlp, {}

    def keep(module, inputs, y):
        seen["x"] = inputs[0].detach()
        y.register_hook(lambda dy: seen.update(dy=dy))

    mlp.register_forward_hook(keep)
    windows = next(example.batches(text.training, 1, torch.Generator().manual_seed(0), torch.device("cpu")))
    example.loss_of(model, windows, options_of(example)).backward()
    inputs = {k: v.detach() for k, v in mlp.arguments(seen["x"]).items()}
    return mlp, inputs, seen["dy"]


@pytest.mark.parametrize("backend", ["auto", "aten", "reference"])
def test_a_training_step_has_the_gradients_of_the_equations(example, text, backend):
    """Of either form, within what rounding explains."""
    mlp, inputs, dy = step(example, text, backend)
    names = ("x", "experts_A", "experts_B", "gates")
    assert_parity(
        lambda **kw: rank1_experts(**kw, backend=backend), inputs, dy=dy, gradients=names, reference=reference
    )
    left = {"y": rank1_experts(**inputs, backend=backend), "experts_A": mlp.experts_A.grad}
    left |= {"experts_B": mlp.experts_B.grad}
    assert_parity(left, inputs, dy=dy, gradients=("experts_A", "experts_B"), reference=reference)
    assert all(p.grad.any() for p in mlp.parameters())


def test_bits_and_guesses_are_of_every_character_once(example, text):
    options = options_of(example)
    model = example.make_models(128, options)["experts"]
    held_out = text.held_out[:100]
    bits, guessed = example.evaluate(model, held_out, options)
    losses, right = [], 0
    for start in range(0, 96, 12):
        scores = model.eval()(held_out[None, start : start + 12])[0]
        following = held_out[start + 1 : start + 13]
        losses += torch.nn.functional.cross_entropy(scores, following, reduction="none").tolist()
        right += int((scores.argmax(-1) == following).sum())
    assert len(losses) == 96 and guessed == right / 96
    assert bits == pytest.approx(sum(losses) / 96 / torch.tensor(2.0).log().item(), rel=1e-5)


def test_counts_are_of_the_choices_of_the_pool(example, text):
    options = options_of(example)
    model = example.make_models(128, options)["experts"]
    counts = example.count_experts(model, text.held_out[:26].view(2, 13), options)
    assert counts.shape == (64,) and counts.sum() == 2 * 12 * 2 * 3 and not model.blocks[1].mlp.scores._forward_hooks


def test_the_command_prints_what_it_says(example, text, monkeypatch, capsys):
    monkeypatch.setattr(example, "load_text", lambda: text._replace(held_out=text.held_out[:500]))
    turns = example.take_turns
    monkeypatch.setattr(example, "take_turns", lambda *args, **kw: turns(*args[:2], 0.1, least=2))
    example.main(["--steps", "8", "--experts", "64", "--k", "3", "--heads", "2", "--seed", "5", "--backend", "aten"])
    out = capsys.readouterr().out
    assert out.count("bits a character") == 2 and "of 64 experts are used by 48 characters" in out
    assert [line.split("  ")[0] for line in out.splitlines() if line.endswith("MiB")] == [
        "experts, aten", "experts, reference", "dense",
    ]  # fmt: skip
    assert "     1 to 1 " in out and "     8 to 8 " in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "--steps: got 0, expected at least 1"),
        (["--experts", "50"], "--experts: got 50, expected a perfect square"),
        (["--experts", "0"], "--experts: got 0"),
        (["--experts", "4", "--k", "5"], "--k: got 5, expected an int from 1 to 4"),
        (["--heads", "0"], "--heads: got 0"),
        (["--device", "nonsense"], "--device: got nonsense"),
        (["--backend", "quick"], "--backend: got 'quick'"),
        (["--backend", "native"], "--backend='native' cannot run rank1_experts"),
        (["--dtype", "float64"], "--dtype: invalid choice"),
    ],
)
def test_bad_arguments_are_refused(example, arguments, message, capsys, monkeypatch):
    monkeypatch.setattr("clora_kernels.kernels.rank1_experts.native.is_compiled", lambda device_type: False)
    with pytest.raises(SystemExit) as stop:
        example.main(arguments)
    assert stop.value.code == 2 and message in capsys.readouterr().err
