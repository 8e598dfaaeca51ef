"""Options of the examples on models from files: where they come from, what methods take, what is refused."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
from sequences import TARGETS, Net

from clora_kernels.continual import CLoRA

DEFAULTS = {"method": "c-lora", "epochs": 1, "batch": 1, "seed": 0}
EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


@pytest.fixture(scope="module")
def options():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        import continual_options

        yield continual_options


def required(out: Path, method: str = "c-lora") -> list[str]:
    given = {"--method": method, "--out": out, "--epochs": 1, "--batch": 1, "--lr": 1, "--weight-decay": 0, "--seed": 0}
    return [str(x) for pair in given.items() for x in pair]


def test_options_that_were_given_stay_and_others_come_from_the_first_that_has_them(options) -> None:
    args = argparse.Namespace(lr=0.0, epochs=None, r=None, seed=None)
    options.fill(args, {"lr": 1.0, "epochs": 3}, {"epochs": 4, "r": 5})
    assert vars(args) == {"lr": 0.0, "epochs": 3, "r": 5, "seed": None}


def test_further_options_reach_the_method_with_their_types(options, tmp_path, capsys) -> None:
    parser = options.parser_of("Doc.", ("c-lora",), {}, DEFAULTS)
    given = required(tmp_path)
    args = parser.parse_args([*given, "--r", "3", "--set", "orthogonality=0.5", "--set", "basis=full"])
    options.check(parser, args)
    assert args.options == {"r": 3, "orthogonality": 0.5, "basis": "full"}
    method = options.attach("c-lora", Net(), TARGETS, args.options)
    assert type(method) is CLoRA and (method.orthogonality, method.basis, method.layers["first"].r) == (0.5, "full", 3)
    with pytest.raises(options.Refused, match=r"--method c-lora: .*unexpected keyword argument 'width'"):
        options.attach("c-lora", Net(), TARGETS, {"width": 3})


def test_paths_without_a_model_are_no_names_of_the_hub(options, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    for name in ("vit", "google/vit", "folder", str(tmp_path / "folder"), "./folder"):
        options.local_or_hub("--model", name)
    for name in ("file", "./vit", "../vit", "a/b/c", str(tmp_path / "vit")):
        with pytest.raises(options.Refused, match=r"--model: got .*, expected a folder with a model or the name"):
            options.local_or_hub("--model", name)


def test_every_method_has_its_options_with_the_types_of_its_signature(options) -> None:
    found = {name: options.options_of(choice.method) for name, choice in options.METHODS.items()}
    layer = {"r": (int,), "scaling": (float,), "dropout_p": (float,), "backend": (str,)}
    assert found["slao"] == layer and found["lora"] == {"train": (str,), **layer}
    own = {"orthogonality": (float,), "basis": (str,), "energy": (float,), "train_factors": (str,)}
    assert found["c-lora"] == {**own, **layer}
    assert found["dac"]["scaling"] == (float, type(None)) and found["dac"]["keep"] == (int,)
    assert found["cl-lora"]["reassignment"] == (bool,) and "exit" not in found["cl-lora"]
    assert not {"model", "targets", "layer", "self"} & {name for of in found.values() for name in of}


@pytest.mark.parametrize(
    ("method", "text", "value"),
    [
        ("cl-lora", "reassignment=false", False),
        ("cl-lora", "temperature=3", 3.0),
        ("cl-lora", "idle_weights=3", 3),
        ("dac", "scaling=null", None),
        ("dac", "selection=sample", "sample"),
        ("dac", 'weights="unit"', "unit"),
    ],
)
def test_further_options_have_the_types_of_the_signature(options, tmp_path, method, text, value) -> None:
    parser = options.parser_of("Doc.", tuple(options.METHODS), {}, DEFAULTS)
    args = parser.parse_args([*required(tmp_path, method), "--set", text])
    options.check(parser, args)
    assert list(args.options.values()) == [value] and type(args.options[text.partition("=")[0]]) is type(value)


@pytest.mark.parametrize(
    ("method", "text", "message"),
    [
        ("cl-lora", "reassignment=no", "got reassignment=no, expected true or false"),
        ("cl-lora", "reassignment=1", "got reassignment=1, expected true or false"),
        ("cl-lora", "idle_weights=1.5", "got idle_weights=1.5, expected an integer"),
        ("cl-lora", "idle_weights=true", "got idle_weights=true, expected an integer"),
        ("cl-lora", "temperature=true", "got temperature=true, expected a number"),
        ("cl-lora", "temperature=warm", "got temperature=warm, expected a number"),
        ("cl-lora", "exit=last", "got exit, expected one of cl-lora's options r, distillation, temperature, "),
        ("cl-lora", "targets=q", "got targets, expected one of cl-lora's options"),
        ("c-lora", "width=3", "got width, expected one of c-lora's options orthogonality, basis, energy, "),
        ("c-lora", "basis=3", "got basis=3, expected a text"),
        ("c-lora", "scaling=null", "got scaling=null, expected a number"),
        ("dac", "scaling=[1]", "got scaling=[1], expected a number or null"),
        ("dac", "basis", "got basis, expected NAME=VALUE"),
    ],
)
def test_further_options_that_the_method_does_not_take_are_refused(
    options, tmp_path, capsys, method, text, message
) -> None:
    parser = options.parser_of("Doc.", tuple(options.METHODS), {}, DEFAULTS)
    with pytest.raises(SystemExit) as stop:
        options.check(parser, parser.parse_args([*required(tmp_path, method), "--set", text]))
    assert stop.value.code == 2 and f"--set: {message}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--seed -1", "--seed: got -1, expected 0 to 4294967295"),
        ("--seed 4294967296", "--seed: got 4294967296, expected 0 to 4294967295"),
        ("--lr nan", "--lr: got nan, expected a finite number above 0"),
        ("--weight-decay inf", "--weight-decay: got inf, expected a finite number of at least 0"),
        ("--head-scale nan", "--head-scale: got nan, expected a finite number above 0"),
        ("--head-scale -3", "--head-scale: got -3.0, expected a finite number above 0"),
        ("--head-scale 0", "--head-scale: got 0.0, expected a finite number above 0"),
        ("--lr-end nan", "--lr-end: got nan, expected a finite number of at least 0"),
        ("--lr-end -1", "--lr-end: got -1.0, expected a finite number of at least 0"),
        ("--device meta", "--device: got meta: "),
        ("--save-every 0", "--save-every: got 0, expected at least 1"),
    ],
)
def test_numbers_and_devices_that_nothing_can_be_computed_with_are_refused(
    options, tmp_path, monkeypatch, capsys, option, message
) -> None:
    """As they come from the command line, before models and data are looked at: there are none."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import continual_vit

    given = ["--model", str(tmp_path / "none"), "--data", str(tmp_path / "none"), "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as stop:
        continual_vit.main([*given, *option.split()])
    assert stop.value.code == 2 and message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_the_ends_of_what_is_allowed_are(options, tmp_path, monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import continual_vit

    for seed in (0, 2**32 - 1):
        given = ["--model", "m", "--data", "d", "--out", str(tmp_path), "--seed", str(seed), "--lr-end", "0"]
        _, args = continual_vit.parse([*given, "--head-scale", "0.5"])
        assert (args.seed, args.lr_end, args.head_scale) == (seed, 0.0, 0.5)
        assert sorted(continual_vit.class_order(4, seed)) == [0, 1, 2, 3]
