"""The settings of a routed LoRA in PEFT, and the versions of PEFT that they are made for."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any

import peft
from packaging.version import Version
from peft.config import PeftConfig

if TYPE_CHECKING:
    from typing_extensions import Self

ROUTING_INITS = ("identity", "c-lora")
TRAIN_FACTORS = ("always", "first_task")
BIASES = ("none", "all", "lora_only")


def check_version(version: str) -> None:
    """Raise ImportError for a PEFT whose tuner interface this method was not built on."""
    if Version(version).release[:2] != (0, 21):
        raise ImportError(
            f"peft: got version {version}, expected peft>=0.21,<0.22: routed LoRA as a method of PEFT builds on parts "
            "of it that change between versions"
        )


check_version(peft.__version__)


class RoutedLoraType(str, Enum):
    """What PEFT's own PeftType is for its methods; it equals and hashes as the string that stands in the files."""

    ROUTED_LORA = "ROUTED_LORA"


@dataclass
class RoutedLoraConfig(PeftConfig):
    """Routed LoRA for :func:`peft.get_peft_model`::

        model = get_peft_model(model, RoutedLoraConfig(r=16, target_modules=["q_proj", "v_proj"]))

    gives every target y = base(x) + scaling · drop(x)·A·(R_old + R)·B with A, B and the routing R ``[r, r]`` trainable.
    R_old, the routings of earlier tasks, is saved and has no gradient; A and B learn through R alone. At the end of a
    task :func:`next_task` puts R into it. nn.Linear and transformers' Conv1D are known by their class, so there is no
    ``fan_in_fan_out``.

    Args:
        r: rank.
        target_modules: names of layers, a regular expression, "all-linear"; None: those of PEFT's LoRA for this model.
        exclude_modules: names or a regular expression of layers that stay as they are.
        lora_alpha: scaling is ``lora_alpha / r``.
        use_rslora: scaling is ``lora_alpha / √r`` instead.
        lora_dropout: dropout on the adapter's input while training.
        routing_init: "identity": A Kaiming, B = 0, R = 1, R_old = 0, plain LoRA's start. "c-lora": A Kaiming, B normal
            with standard deviation 1/√r, both routings 0 (the paper, arXiv 2502.17920, leaves its start open).
        train_factors: "always"; "first_task": A and B stay as the first task leaves them, later tasks train R alone.
            Optimizers that normalise their steps, as Adam does, make full steps of the small gradients of A and B,
            and the earlier tasks ride on these.
        task: the task at hand, from 1 on; :func:`next_task` counts.
        bias: biases that learn too: "none", "all", "lora_only" (those of the targets).
        modules_to_save: names of further modules that learn and are saved.
        layers_to_transform, layers_pattern: numbers of the layers that are adapted, name of their list.
        rank_pattern, alpha_pattern: layers by name or regular expression with an ``r`` or ``lora_alpha`` of their own.

    Raises:
        ValueError: a field out of its range.
        TypeError: a field that is not known, as of a later version.
        ImportError: peft is not there, or none of the versions that this is made for (>= 0.21, < 0.22).
    """

    r: int = 8
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    lora_alpha: float = 8
    use_rslora: bool = False
    lora_dropout: float = 0.0
    routing_init: str = "identity"
    train_factors: str = "always"
    task: int = 1
    bias: str = "none"
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)

    def __new__(cls, *args: Any, **fields: Any) -> Self:
        # PEFT drops fields that a class does not know, with a warning. Here each says what is computed.
        known = {f.name for f in dataclasses.fields(cls)} if dataclasses.is_dataclass(cls) else set()
        if unknown := sorted(fields.keys() - known):
            raise TypeError(
                f"{', '.join(unknown)}: no field of {cls.__name__}, expected some of {', '.join(sorted(known))}; a "
                "file that holds others comes from a later version of clora_kernels"
            )
        return super().__new__(cls)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = RoutedLoraType.ROUTED_LORA
        for name in ("target_modules", "exclude_modules"):
            if isinstance(value := getattr(self, name), list):
                setattr(self, name, set(value))
        ranks = {f"rank_pattern[{k!r}]": v for k, v in self.rank_pattern.items()} | {"r": self.r}
        alphas = {f"alpha_pattern[{k!r}]": v for k, v in self.alpha_pattern.items()} | {"lora_alpha": self.lora_alpha}
        for name, rank in ranks.items():
            if type(rank) is not int or rank < 1:
                raise ValueError(f"{name}: got {rank!r}, expected a rank of at least 1, an int")
        for name, alpha in alphas.items():
            if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
                raise ValueError(f"{name}: got {alpha!r}, expected a finite number")
        p = self.lora_dropout
        if isinstance(p, bool) or not isinstance(p, (int, float)) or not 0 <= p <= 1:
            raise ValueError(f"lora_dropout: got {p!r}, expected a probability in [0, 1]")
        if type(self.task) is not int or self.task < 1:
            raise ValueError(f"task: got {self.task!r}, expected an int of at least 1")
        for name, known in (("routing_init", ROUTING_INITS), ("train_factors", TRAIN_FACTORS), ("bias", BIASES)):
            if (value := getattr(self, name)) not in known:
                raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(known)}")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError(f"layers_pattern: got {self.layers_pattern!r} without layers_to_transform, expected both")

    @property
    def frozen_factors(self) -> bool:
        """Whether A and B learn no more."""
        return self.train_factors == "first_task" and self.task > 1

    def rank_of(self, name: str) -> int:
        """The rank at the layer of this name."""
        from peft.utils.other import get_pattern_key

        return self.rank_pattern.get(get_pattern_key(list(self.rank_pattern), name), self.r)

    def scaling_of(self, name: str) -> float:
        """The scaling at the layer of this name."""
        from peft.utils.other import get_pattern_key

        alpha = self.alpha_pattern.get(get_pattern_key(list(self.alpha_pattern), name), self.lora_alpha)
        rank = self.rank_of(name)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)
