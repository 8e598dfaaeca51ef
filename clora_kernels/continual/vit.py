"""Target names for transformers' vision transformers, whose linear layers were renamed in its version 5."""

from __future__ import annotations

from collections.abc import Iterable

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
