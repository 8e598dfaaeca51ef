"""What the examples on models from files share: orders that are known without drawing what came before, and options."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch
from sequences import TARGETS, Net

from clora_kernels.continual import CLoRA

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


@pytest.fixture(scope="module")
def shared():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        import continual_run

        yield continual_run


@pytest.mark.parametrize(("samples", "batch"), [(10, 4), (8, 4), (3, 5), (1, 1)])
def test_every_epoch_has_every_sample_once_in_an_order_of_its_own(shared, samples, batch) -> None:
    steps = -(-samples // batch)
    epochs = [
        [shared.rows_of(epoch * steps + i, samples, batch, 5, "order", 1) for i in range(steps)] for epoch in range(4)
    ]
    for epoch in epochs:
        assert [len(rows) for rows in epoch[:-1]] == [batch] * (steps - 1) and epoch[-1]
        assert sorted(row for rows in epoch for row in rows) == list(range(samples))
    if samples > 4:
        others = [shared.rows_of(i, samples, batch, *what) for what in ((6, "order", 1), (5, "order", 2)) for i in (0,)]
        assert epochs[0] != epochs[1] != epochs[2] and all(other != epochs[0][0] for other in others)
    assert shared.rows_of(0, samples, batch, 5, "order", 1) == epochs[0][0]


def test_random_numbers_are_of_what_they_are_for(shared) -> None:
    before = torch.get_rng_state()
    draws = [
        torch.rand(3, generator=shared.generator(*what)).tolist() for what in ((1, "a"), (1, "a"), (1, "b"), (2, "a"))
    ]
    assert draws[0] == draws[1] and len({tuple(draw) for draw in draws}) == 3
    assert torch.equal(before, torch.get_rng_state())


def test_options_that_were_given_stay_and_others_come_from_the_first_that_has_them(shared) -> None:
    args = argparse.Namespace(lr=0.0, epochs=None, r=None, seed=None)
    shared.fill(args, {"lr": 1.0, "epochs": 3}, {"epochs": 4, "r": 5})
    assert vars(args) == {"lr": 0.0, "epochs": 3, "r": 5, "seed": None}


def test_further_options_reach_the_method_with_their_types(shared, tmp_path, capsys) -> None:
    parser = shared.parser_of("Doc.", ("c-lora",), {})
    given = ["--out", str(tmp_path), "--epochs", "1", "--batch", "1", "--lr", "1", "--weight-decay", "0"]
    args = parser.parse_args([*given, "--r", "3", "--set", "orthogonality=0.5", "--set", "basis=full"])
    shared.check(parser, args)
    assert args.options == {"r": 3, "orthogonality": 0.5, "basis": "full"}
    method = shared.attach("c-lora", Net(), TARGETS, args.options)
    assert type(method) is CLoRA and (method.orthogonality, method.basis, method.layers["first"].r) == (0.5, "full", 3)
    with pytest.raises(shared.Refused, match=r"--method c-lora: .*unexpected keyword argument 'width'"):
        shared.attach("c-lora", Net(), TARGETS, {"width": 3})


def test_paths_without_a_model_are_no_names_of_the_hub(shared, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    for name in ("vit", "google/vit", "folder", str(tmp_path / "folder"), "./folder"):
        shared.local_or_hub("--model", name)
    for name in ("file", "./vit", "../vit", "a/b/c", str(tmp_path / "vit")):
        with pytest.raises(shared.Refused, match=r"--model: got .*, expected a folder with a model or the name"):
            shared.local_or_hub("--model", name)
