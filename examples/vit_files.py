"""A vision transformer from files, and into files what of it was learned."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from continual_options import Refused, local_or_hub
from continual_run import save_model
from images import Pixels
from torch import Tensor, nn

from clora_kernels.continual import ContinualMethod, Prototypes


class Backbone(nn.Module):
    """Images [S, 3, H, W] to the features [S, d] of the class token, in fp32."""

    def __init__(self, vit: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.vit, self.dtype = vit, dtype

    def forward(self, images: Tensor) -> Tensor:
        with torch.autocast(images.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return self.vit(pixel_values=images).last_hidden_state[:, 0].float()


def load_model(name: str) -> tuple[nn.Module, Pixels]:
    """A ViT of three channels and how it wants its images.

    Raises:
        Refused: it cannot be loaded, is no ViT, or lacks weights.
    """
    from transformers import AutoConfig, ViTModel
    from transformers.image_processing_base import ImageProcessingMixin

    local_or_hub("--model", name)
    try:
        config = AutoConfig.from_pretrained(name)
        if config.model_type != "vit" or config.num_channels != 3:
            raise Refused(f"--model: {name} is a {config.model_type}, expected a vit of 3 channels")
        vit, loaded = ViTModel.from_pretrained(name, add_pooling_layer=False, output_loading_info=True)
    except Refused:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        raise Refused(f"--model: {name} cannot be loaded: {error}") from error
    if loaded["missing_keys"]:
        raise Refused(f"--model: {name} lacks the weights {', '.join(sorted(loaded['missing_keys'])[:3])}, ...")
    try:
        wants, _ = ImageProcessingMixin.get_image_processor_dict(name)
    except OSError:  # a model without a word on its images was trained on [-1, 1], as ViTs are
        wants = {}
    pixels = Pixels(config.image_size)
    if wants.get("do_normalize", True):
        mean, std = (tuple(wants.get(f"image_{k}") or getattr(pixels, k)) for k in ("mean", "std"))
    else:
        mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    return vit, Pixels(config.image_size, mean, std)


def save(folder: Path, method: ContinualMethod, pixels: Pixels, prototypes: Prototypes, names: list[str]) -> None:
    """The model of a method on a Backbone, how it wants its images, and the class means."""
    from safetensors.torch import save_file

    save_model(folder, method, lambda backbone: backbone.vit)
    size = {"height": pixels.size, "width": pixels.size}
    wants = {"image_processor_type": "ViTImageProcessor", "size": size, "resample": 3}
    wants |= {"image_mean": pixels.mean, "image_std": pixels.std}
    (folder / "preprocessor_config.json").write_text(json.dumps(wants, indent=1) + "\n")
    tasks = [torch.full_like(classes, task) for task, classes in enumerate(prototypes.classes, 1)]
    found = {"means": prototypes.means, "classes": prototypes.classes, "tasks": tasks}
    content = {name: torch.cat(parts) for name, parts in found.items()}
    save_file(content, folder / "class_means.safetensors", {"names": json.dumps(names)})
