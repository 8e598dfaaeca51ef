"""Save and load a run in the middle of a sequence of tasks, in one safetensors file, so that it goes on bit for bit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .extras import require
from .protocol import ContinualMethod


def save_run(path: str | Path, method: ContinualMethod, **objects: Any) -> Path:
    """Write the method, torch's random generators, and the ``state_dict()`` of every further object (head=...,
    optimizer=..., scheduler=...). The frozen weights of the model are not written.

    Raises:
        ImportError: without safetensors.
        TypeError: a state that holds something other than tensors, numbers, strings, None, and lists, tuples, dicts of
            them.
    """
    require("safetensors")
    from safetensors.torch import save_file

    states = {
        "settings": method.settings,
        "method": method.state_dict(),
        "rng": _random_state(),
        "objects": {k: v.state_dict() for k, v in objects.items()},
    }
    tensors: dict[str, Tensor] = {}
    structure = {name: _encode(state, name, tensors) for name, state in states.items()}
    partial = Path(path).with_name(Path(path).name + ".partial")
    save_file(tensors, partial, metadata={"structure": json.dumps(structure)})
    # A run that is stopped while saving keeps its last complete file.
    return partial.replace(path)


@dataclass(frozen=True)
class SavedRun:
    """What remains of a file once the method is loaded: the states of the further objects by name, and of torch's
    random generators."""

    objects: Mapping[str, Any]
    rng: Mapping[str, Tensor]

    def restore(self, **objects: Any) -> None:
        """Load the further objects, made as they had been for the task that was running, then the random generators.

        Raises:
            ValueError: other names than the file's; a state that does not fit its object.
        """
        if self.objects.keys() != objects.keys():
            raise ValueError(f"objects: got {sorted(objects)}, expected those of the file, {sorted(self.objects)}")
        for name, obj in objects.items():
            obj.load_state_dict(self.objects[name])
        _set_random_state(self.rng)


def load_run(path: str | Path, method: ContinualMethod) -> SavedRun:
    """Load what :func:`save_run` wrote into a method attached with the same options to the same model.

    In two steps, because which parameters an optimizer gets depends on the task: once the method is loaded, make head,
    optimizer and scheduler, then hand them to ``restore`` of what comes back.

    Raises:
        ImportError: without safetensors.
        FileNotFoundError: no such file.
        ValueError: a file of something else, of another method, of other options of it, or of another model.
    """
    states = read_states(path)
    check_settings(path, states, method)
    method.load_state_dict(states["method"])
    return SavedRun(states["objects"], states["rng"])


def check_settings(path: str | Path, states: Mapping[str, Any], method: ContinualMethod) -> None:
    """ValueError unless ``states``, which :func:`read_states` found at ``path``, are of this method and its options."""
    saved = states["settings"]
    names = [name for name in (saved | method.settings) if saved.get(name) != method.settings.get(name)]
    if names:
        names = ["method"] if "method" in names else names
        got, expected = ({name: of.get(name) for name in names} for of in (saved, method.settings))
        raise ValueError(f"path: got {str(path)!r} of a method with {got}, expected {expected}")


def read_states(path: str | Path) -> dict[str, Any]:
    """What :func:`save_run` wrote: "settings" of the method, "method", its ``state_dict()``, "objects" and "rng".

    Raises:
        As :func:`load_run`, of the file.
    """
    require("safetensors")
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise FileNotFoundError(f"path: got {str(path)!r}, expected a file that save_run wrote")
    try:
        with safe_open(path, framework="pt") as file:
            structure = json.loads((file.metadata() or {}).get("structure", "{}"))
            tensors = {key: file.get_tensor(key) for key in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"path: got {str(path)!r}, which cannot be read: {error}") from None
    if structure.keys() != {"settings", "method", "rng", "objects"}:
        raise ValueError(f"path: got {str(path)!r} without a run in it, expected a file that save_run wrote")
    return {name: _decode(code, tensors) for name, code in structure.items()}


def _random_state() -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state |= {f"cuda:{i}": s for i, s in enumerate(torch.cuda.get_rng_state_all())}
    return state


def _set_random_state(state: Mapping[str, Tensor]) -> None:
    for device, tensor in state.items():
        if device == "cpu":
            torch.set_rng_state(tensor)
        else:
            torch.cuda.set_rng_state(tensor, device)


def _encode(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """``value`` as JSON, its tensors put aside under their path; pairs, for a dict may have integer keys."""
    if isinstance(value, Tensor):
        # A copy: safetensors refuses tensors that share memory.
        tensors[name] = value.detach().cpu().contiguous().clone()
        return {"tensor": name}
    if isinstance(value, Mapping):
        return {"dict": [[k, _encode(v, f"{name}/{k}", tensors)] for k, v in value.items()]}
    if isinstance(value, (list, tuple)):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return {kind: [_encode(v, f"{name}/{i}", tensors) for i, v in enumerate(value)]}
    if value is None or isinstance(value, (bool, int, float, str)):
        return {"value": value}
    raise TypeError(f"{name}: got {type(value).__name__}, expected a tensor, number, string, None, list, tuple or dict")


def _decode(code: Any, tensors: Mapping[str, Tensor]) -> Any:
    ((kind, content),) = code.items()
    if kind == "dict":
        return {k: _decode(v, tensors) for k, v in content}
    if kind in ("list", "tuple"):
        return (tuple if kind == "tuple" else list)(_decode(v, tensors) for v in content)
    return tensors[content] if kind == "tensor" else content
