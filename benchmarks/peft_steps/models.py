"""The models whose steps are measured: transformers' Llama and ViT of a shape, with random weights.

What is not in the blocks is small: a vocabulary of 512 words (the head over Llama 3's 128256 words takes as long as two
of its blocks), a classifier of ten.
"""

from __future__ import annotations

from math import isqrt

import torch
from continual.models import CLASSES, Shape
from torch import nn

WORDS, PATCH = 512, 16
_VIT = (768, 12, 12, 3072)
MODELS = {
    "llama-64": Shape(2, 64, 4, 1, 176, llama=True), "llama-256": Shape(2, 256, 8, 2, 704, llama=True),
    "llama-768": Shape(2, 768, 12, 3, 2048, llama=True), "llama-1b": Shape(4, 2048, 32, 8, 8192, llama=True),
    "llama-8b": Shape(1, 4096, 32, 8, 14336, llama=True), "vit-2": Shape(2, *_VIT), "vit-b": Shape(12, *_VIT),
}  # fmt: skip


def image_size(tokens: int) -> int:
    """Of square images that become so many tokens, one of them the class token."""
    return PATCH * isqrt(tokens - 1)


def make_model(shape: Shape, tokens: int, device: torch.device) -> nn.Module:
    """LlamaForCausalLM for up to ``tokens`` tokens or ViTForImageClassification for images of so many, in fp32."""
    from transformers import LlamaConfig, LlamaForCausalLM, ViTConfig, ViTForImageClassification

    of_both = {
        "hidden_size": shape.width,
        "intermediate_size": shape.ffn,
        "num_hidden_layers": shape.blocks,
        "num_attention_heads": shape.heads,
    }
    with device:
        if shape.llama:
            cached = {"num_key_value_heads": shape.kv_heads, "max_position_embeddings": tokens}
            return LlamaForCausalLM(LlamaConfig(vocab_size=WORDS, **cached, **of_both))
        images = {"image_size": image_size(tokens), "patch_size": PATCH, "num_labels": CLASSES}
        return ViTForImageClassification(ViTConfig(**images, **of_both))
