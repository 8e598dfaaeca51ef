"""Vision transformers: target names of transformers' own, whose linear layers were renamed in its version 5, and the
features after some of the blocks."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

# part: (name since version 5, name before)
_NAMES = {
    "q": (r"attention\.q_proj", r"attention\.attention\.query"),
    "k": (r"attention\.k_proj", r"attention\.attention\.key"),
    "v": (r"attention\.v_proj", r"attention\.attention\.value"),
    "out": (r"attention\.o_proj", r"attention\.output\.dense"),
    "fc1": (r"mlp\.fc1", r"intermediate\.dense"),
    "fc2": (r"mlp\.fc2", r"(?<!attention\.)output\.dense"),
}


def vit_targets(parts: Iterable[str] = ("q", "v", "fc1", "fc2")) -> str:
    """A regular expression for ``inject``: these parts of every block, under either set of names.

    Args:
        parts: any of q, k, v, out (attention), fc1, fc2 (MLP).

    Raises:
        ValueError: an unknown part, or none.
    """
    parts = list(parts)
    unknown = [p for p in parts if p not in _NAMES]
    if unknown or not parts:
        raise ValueError(f"parts: got {parts}, expected some of {', '.join(_NAMES)}")
    return rf"(?:.*\.)?(?:{'|'.join(name for part in parts for name in _NAMES[part])})"


def class_token_exit(model: nn.Module, hidden: Tensor) -> Tensor:
    """[S, d]: the first token of ``hidden [S, tokens, d]`` through the last nn.LayerNorm of the model that is outside
    of its blocks: in no nn.ModuleList, and in no child of an nn.Sequential of which several have norms within.

    Raises:
        ValueError: the model has no such norm.
    """
    blocks = tuple(f"{name}." for name, module in model.named_modules() if _has_blocks(module))
    norms = [m for n, m in model.named_modules() if isinstance(m, nn.LayerNorm) and not n.startswith(blocks)]
    if not norms:
        raise ValueError(
            f"model: got {type(model).__name__} without an nn.LayerNorm outside of its blocks, expected one; give "
            "another exit"
        )
    features: Tensor = norms[-1](hidden[:, 0])
    return features


def _has_blocks(module: nn.Module) -> bool:
    if not isinstance(module, nn.Sequential):
        return isinstance(module, nn.ModuleList)
    return sum(any(isinstance(part, nn.LayerNorm) for part in child.modules()) for child in module) > 1
