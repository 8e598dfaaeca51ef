"""Methods by name and options of the examples on models from files; what does not fit is told before any work."""

from __future__ import annotations

import argparse
import inspect
import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import UnionType
from typing import Any, NamedTuple, get_args, get_type_hints

import torch
from torch import nn

from clora_kernels.continual import DAC, SLAO, CLLoRA, CLoRA, ContinualMethod, SequentialLoRA


class Refused(ValueError):
    """What was given cannot be worked with; the message says why, and the command ends with it."""


class Choice(NamedTuple):
    """A method and what it takes where neither a preset nor an option says otherwise."""

    method: type[ContinualMethod]
    parts: tuple[str, ...] = ("q", "v")  # of the blocks of a vision transformer
    optimizer: str = "sgd"
    lr: float = 0.01
    lr_end: float = 0.0
    weight_decay: float = 0.0
    head_scale: float = 10.0


METHODS = {
    "c-lora": Choice(CLoRA, lr=0.02),
    "cl-lora": Choice(CLLoRA, lr=0.03, weight_decay=1e-4, head_scale=1.0),
    "dac": Choice(DAC, ("q", "k", "v", "out", "fc1", "fc2"), "adamw", 2e-3, 1e-6, 1e-2),
    "slao": Choice(SLAO, optimizer="adamw", lr=5e-5),
    "lora": Choice(SequentialLoRA),
}


def attach(name: str, model: nn.Module, targets: Any, options: Mapping[str, Any]) -> ContinualMethod:
    """The method of that name on the targets of the model.

    Raises:
        Refused: what the method refuses.
    """
    try:
        return METHODS[name].method(model, targets, **options)
    except (TypeError, ValueError) as error:
        raise Refused(f"--method {name}: {error}") from error


# What --set can give, by what a method's signature says, and how that is told.
KINDS = {bool: "true or false", int: "an integer", float: "a number", str: "a text", type(None): "null"}


def options_of(method: type[ContinualMethod]) -> dict[str, tuple[type, ...]]:
    """The keyword options of a method that JSON has values for, and of which types each may be; where a class hands the
    others on (``**layer``), with those of the next."""
    found: dict[str, tuple[type, ...]] = {}
    for cls in method.__mro__:
        if "__init__" not in vars(cls):
            continue
        parameters, hints = inspect.signature(cls.__init__).parameters.values(), get_type_hints(cls.__init__)
        for p in parameters:
            if p.kind is p.KEYWORD_ONLY:
                kinds = get_args(hints[p.name]) if isinstance(hints[p.name], UnionType) else (hints[p.name],)
                if all(kind in KINDS for kind in kinds):
                    found.setdefault(p.name, kinds)
        if all(p.kind is not p.VAR_KEYWORD for p in parameters):
            break
    return found


def option(method: str, name: str, text: str) -> Any:
    """The value that --set gives to an option of the method.

    Raises:
        ValueError: the method has no such option, or not with a value of this type.
    """
    known = options_of(METHODS[method].method)
    if name not in known:
        raise ValueError(f"got {name}, expected one of {method}'s options {', '.join(known)}")
    try:
        value = json.loads(text)
    except ValueError:
        value = text
    if type(value) is int and float in known[name] and int not in known[name]:
        value = float(value)
    if type(value) not in known[name]:
        expected = " or ".join(KINDS[kind] for kind in known[name])
        raise ValueError(f"got {name}={text}, expected {expected}")
    return value


def rates_of(method: str) -> list[str]:
    """The learning rates that a method's ``param_groups`` takes."""
    return list(inspect.signature(METHODS[method].method.param_groups).parameters)[1:]


def parser_of(
    doc: str, methods: tuple[str, ...], presets: Mapping[str, Mapping[str, Any]], defaults: Mapping[str, Any]
) -> argparse.ArgumentParser:
    """Options of every example; those that a preset, the method or ``defaults`` may set are None until ``fill``."""

    def default(name: str) -> str:
        return f"(default: {defaults[name]}, or the preset's)"

    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--preset", choices=tuple(presets), help="published settings, which other options override")
    add("--method", choices=methods, help=f"what learns the tasks {default('method')}")
    add(
        "--out",
        type=Path,
        required=True,
        help="folder of the run: config.json, log.jsonl, checkpoint.safetensors and, once it has ended, model/",
    )
    add("--resume", action="store_true", help="go on with the run in --out, where there is one")
    add("--save-every", type=int, default=100, metavar="STEPS", help="steps to a checkpoint (default: %(default)s)")
    add("--log-every", type=int, default=10, metavar="STEPS", help="steps to a line of losses (default: %(default)s)")
    add("--epochs", type=int, help=f"how often each task's samples are seen {default('epochs')}")
    add("--batch", type=int, help=f"samples that are in memory at once {default('batch')}")
    add("--optimizer", choices=("sgd", "adamw"), help="(default: as the method was published, else sgd)")
    add("--lr", type=float, help="learning rate (default: the method's own)")
    add("--lr-routing", type=float, help="that of c-lora's routing matrices (default: as --lr)")
    add("--weight-decay", type=float, help="of all that learns (default: as the method was published, else 0)")
    add("--r", type=int, help="rank (default: the method's own)")
    add(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="further option of the method (a number, true, false, null or a text)",
    )
    add("--seed", type=int, help=f"of splits, orders and starts {default('seed')}")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default: %(default)s)")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="(default: %(default)s)")
    return parser


def fill(args: argparse.Namespace, *defaults: Mapping[str, Any]) -> None:
    """Options that were not given, from the first of ``defaults`` that has them."""
    for values in defaults:
        for name, value in values.items():
            if getattr(args, name) is None:
                setattr(args, name, value)


def check(parser: argparse.ArgumentParser, args: argparse.Namespace, **least: int) -> None:
    """End with a message where a number is out of range, the device cannot compute, or --set is no NAME=VALUE that the
    method takes."""
    for name, lowest in {"epochs": 1, "batch": 1, "save_every": 1, "log_every": 1, **least}.items():
        if (value := getattr(args, name)) is not None and value < lowest:
            parser.error(f"--{name.replace('_', '-')}: got {value}, expected at least {lowest}")
    if not 0 <= args.seed < 2**32:
        parser.error(f"--seed: got {args.seed}, expected 0 to {2**32 - 1}")
    rates = {"lr": True, "lr_routing": True, "weight_decay": False, "lr_end": False, "head_scale": True}
    for name, above in rates.items():
        value = getattr(args, name, None)  # some are not asked for everywhere
        if value is not None and (not (0 < value if above else 0 <= value) or value == math.inf):
            lowest = "above" if above else "of at least"
            parser.error(f"--{name.replace('_', '-')}: got {value}, expected a finite number {lowest} 0")
    if args.lr_routing is not None and "lr_routing" not in rates_of(args.method):
        parser.error(f"--lr-routing: got {args.lr_routing} with --method {args.method}, which has no routing matrices")
    try:
        torch.zeros(1, device=args.device).item()
    except (RuntimeError, AssertionError) as error:
        parser.error(f"--device: got {args.device}: {str(error).splitlines()[0]}")
    args.options = {} if args.r is None else {"r": args.r}
    for text in args.set:
        name, equals, value = text.partition("=")
        if not (name.isidentifier() and equals):
            parser.error(f"--set: got {text}, expected NAME=VALUE")
        try:
            args.options[name] = option(args.method, name, value)
        except ValueError as error:
            parser.error(f"--set: {error}")


def local_or_hub(option: str, name: str) -> None:
    """Refuse what can be no model: a path without a folder, which would be looked for on the hub."""
    path = Path(name)
    looks_local = path.is_absolute() or name.startswith(".") or len(path.parts) > 2
    if not path.is_dir() and (looks_local or path.exists()):
        raise Refused(f"{option}: got {name}, expected a folder with a model or the name of one on the hub")
