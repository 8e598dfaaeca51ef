"""The models whose training steps are measured: blocks of a ViT and of a Llama in plain torch, at their widths.

What is not in the blocks is left out: patches or words are embedded outside, and there are no rotary positions. The
head is a classifier of the first token, or of every token of a Llama.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

CLASSES = 10


@dataclass(frozen=True)
class Shape:
    """``llama``: RMS norms, a gated MLP, causal attention, no biases; otherwise as in a ViT."""

    blocks: int
    width: int
    heads: int
    kv_heads: int
    ffn: int
    llama: bool = False

    def linears(self) -> dict[str, tuple[int, int]]:
        """(in_features, out_features) of the linear layers of a block by their names in it."""
        d, kv = self.width, self.width // self.heads * self.kv_heads
        attention = {"q_proj": (d, d), "k_proj": (d, kv), "v_proj": (d, kv), "o_proj": (d, d)}
        inner, outer = (d, self.ffn), (self.ffn, d)
        if self.llama:
            mlp = {"gate_proj": inner, "up_proj": inner, "down_proj": outer}
        else:
            mlp = {"fc1": inner, "fc2": outer}
        return {f"attention.{n}": s for n, s in attention.items()} | {f"mlp.{n}": s for n, s in mlp.items()}


_VIT, _L8B = (768, 12, 12, 3072), (4096, 32, 8, 14336)
MODELS = {
    "vit2": Shape(2, *_VIT), "vit12": Shape(12, *_VIT),
    "l1b": Shape(1, 2048, 32, 8, 8192, llama=True), "l8b": Shape(2, *_L8B, llama=True),
}  # fmt: skip


class Block(nn.Module):
    """Attention and MLP, each on what its norm gives and added to the hidden states ``[S, tokens, width]``."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        norm = nn.RMSNorm if shape.llama else nn.LayerNorm
        self.shape = shape
        self.attention_norm, self.mlp_norm = norm(shape.width), norm(shape.width)
        self.attention, self.mlp = nn.Module(), nn.Module()
        for name, (inner, outer) in shape.linears().items():
            owner, _, leaf = name.partition(".")
            self.get_submodule(owner).add_module(leaf, nn.Linear(inner, outer, bias=not shape.llama))

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden + self._attend(self.attention_norm(hidden))
        return hidden + self._mlp(self.mlp_norm(hidden))

    def _attend(self, x: Tensor) -> Tensor:
        shape, a = self.shape, self.attention
        head_width = shape.width // shape.heads
        q, k, v = (p(x).unflatten(-1, (-1, head_width)).transpose(1, 2) for p in (a.q_proj, a.k_proj, a.v_proj))
        grouped = shape.kv_heads < shape.heads
        y = F.scaled_dot_product_attention(q, k, v, is_causal=shape.llama, enable_gqa=grouped)
        return a.o_proj(y.transpose(1, 2).flatten(2))

    def _mlp(self, x: Tensor) -> Tensor:
        if self.shape.llama:
            return self.mlp.down_proj(F.silu(self.mlp.gate_proj(x)) * self.mlp.up_proj(x))
        return self.mlp.fc2(F.gelu(self.mlp.fc1(x)))


class Model(nn.Module):
    """Features of hidden states ``[S, tokens, width]``: those of the first token ``[S, width]``, or of all."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.blocks))
        self.norm = (nn.RMSNorm if shape.llama else nn.LayerNorm)(shape.width)

    def forward(self, hidden: Tensor) -> Tensor:
        for block in self.blocks:
            hidden = block(hidden)
        return self.norm(hidden if self.shape.llama else hidden[:, 0])


class Head(nn.Linear):
    """The task's classifier; it learns, so fp32 also on a model of 16 bits."""

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape.width, CLASSES)

    def forward(self, features: Tensor) -> Tensor:
        return super().forward(features.to(self.weight.dtype))
