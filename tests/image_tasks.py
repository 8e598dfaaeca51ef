"""A tiny vision transformer and a tiny folder of images, as files, and runs of the example on them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from clora_kernels.continual import ContinualMethod, RunDirectory

CLASSES = ("ape", "bee", "cat", "dog")


def write_model(folder: Path) -> Path:
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    config = ViTConfig(image_size=8, patch_size=4, hidden_size=16, num_hidden_layers=4, num_attention_heads=2,
                       intermediate_size=32)  # fmt: skip
    ViTModel(config, add_pooling_layer=False).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.4] * 3, "image_std": [0.2] * 3}))
    return folder


def write_image(path: Path, label: int, number: int, size: tuple[int, int] = (12, 10)) -> None:
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    random = torch.Generator().manual_seed(1000 * label + number)
    pixels = torch.randint(0, 60, (size[1], size[0], 3), generator=random) + 45 * torch.tensor(
        [label, (label * 3) % 4, 3 - label]
    )
    Image.frombytes("RGB", size, bytes(pixels.flatten().tolist())).save(path)


def write_data(folder: Path) -> Path:
    """Ten images of each class to learn from, four to test on."""
    for label, name in enumerate(CLASSES):
        for number in range(10):
            write_image(folder / "train" / name / f"{number}.png", label, number)
        for number in range(4):
            write_image(folder / "test" / name / "more" / f"{number}.JPG", label, 100 + number)
    return folder


def arguments(model: Path, data: Path, out: Path, *more: str, method: str = "c-lora") -> list[str]:
    given = {"--model": model, "--data": data, "--out": out, "--method": method, "--classes": 2, "--epochs": 2}
    given |= {"--batch": 8, "--save-every": 2, "--log-every": 3, "--lr": 0.1, "--device": "cpu", "--workers": 2}
    return [str(x) for pair in given.items() for x in pair] + list(more)


def told(out: Path) -> list[Any]:
    return [(li["event"], li["task"], li["values"]) for li in RunDirectory(out).lines() if li["event"] != "resume"]


def stop_at(patch: pytest.MonkeyPatch, call: int) -> None:
    """The step of that number ends as by a key."""
    step, calls = ContinualMethod.training_step, []

    def counted(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt
        return step(*args)

    patch.setattr(ContinualMethod, "training_step", counted)
