"""Adapted layers in a model's place of its linear ones, the tensors a method carries along, and the state of both."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..modules.adapter import AdapterLinear
from ..modules.inject import Targets, freeze_base, inject, merge_all, unmerge_all
from .fingerprint import fingerprints

if TYPE_CHECKING:
    from typing_extensions import Self

# layer → tensor of its adapter → what stands in its place
Adapters = Mapping[str, Mapping[str, Tensor]]


class AttachedLayers:
    """A model whose targets are adapted layers.

    Attributes:
        model: changed in place.
        layers: the adapted layers by their names in the model.
        own: parameters of the method that belong to no layer, by name.
        kept: tensors that the method carries from task to task, by name.
        base: by layer, the fingerprint of its weight when it was attached; none of a layer without values.
        settings: the name of the class and its options (numbers, strings, None), defaults too, without ``backend``:
            every parameter of ``__init__`` but ``model`` and ``targets``.
    """

    settings: dict[str, Any]

    def __new__(cls, *args: Any, **options: Any) -> Self:
        self = super().__new__(cls)
        self.settings = _settings(cls, args, options)
        return self

    def __init__(self, model: nn.Module, targets: Targets) -> None:
        self.model = model
        self.own = nn.ParameterDict()
        self.kept: dict[str, Tensor] = {}
        self.layers = self.attach(targets)
        self.base = fingerprints(self.layers)

    def attach(self, targets: Targets) -> dict[str, AdapterLinear]:
        """Swap the targets of ``self.model`` and freeze the rest; the method's layers by name, each once. Warns of each
        target without a layer and of each layer that is left alone."""
        layers: dict[str, AdapterLinear] = {}
        report = inject(self.model, self.make_layer, targets)
        for name in report.swapped:
            layer = self.model.get_submodule(name)
            if not isinstance(layer, AdapterLinear):
                raise TypeError(f"make_layer: got {type(layer).__name__} for {name}, expected an AdapterLinear")
            if layer not in layers.values():
                layers[name] = layer
        for target in report.unmatched:
            warnings.warn(f"targets: {target!r} matched no layer", stacklevel=4)
        for name, why in report.left:
            warnings.warn(f"targets: {name} was left alone: {why}", stacklevel=4)
        freeze_base(self.model)
        return layers

    def make_layer(self, linear: nn.Module) -> AdapterLinear:
        """The layer that takes the place of ``linear``, for instance a RoutedLoRALinear."""
        raise NotImplementedError(f"{type(self).__name__} does not say which layer takes the place of a target")

    def parameters(self) -> Iterator[nn.Parameter]:
        """Those of every adapter, then the method's own."""
        for layer in self.layers.values():
            yield from layer.adapter_parameters()
        yield from self.own.values()

    def run(self, inputs: Any) -> Any:
        """The model's output for a batch: a tensor, or a tuple or a mapping of its arguments."""
        if isinstance(inputs, Mapping):
            return self.model(**inputs)
        return self.model(*inputs) if isinstance(inputs, (tuple, list)) else self.model(inputs)

    # What a test needs

    @contextmanager
    def with_adapters(self, adapters: Adapters) -> Iterator[None]:
        """Other tensors in the place of some of the adapters' parameters; the parameters come back untouched."""
        before: list[tuple[nn.Module, str, nn.Parameter]] = []
        try:
            for layer, tensors in adapters.items():
                for name, tensor in tensors.items():
                    path, _, leaf = name.rpartition(".")
                    owner = self.layers[layer].get_submodule(path)
                    parameter = owner.get_parameter(leaf)
                    if tensor.shape != parameter.shape:
                        got, expected = tuple(tensor.shape), tuple(parameter.shape)
                        raise ValueError(f"adapters[{layer!r}][{name!r}]: got shape {got}, expected {expected}")
                    before.append((owner, leaf, parameter))
                    owner._parameters[leaf] = nn.Parameter(tensor.detach().to(parameter), requires_grad=False)
            yield
        finally:
            for owner, leaf, parameter in reversed(before):
                owner._parameters[leaf] = parameter

    @contextmanager
    def merged_for_test(self, adapters: Adapters) -> Iterator[nn.Module]:
        """The model in eval mode with these adapters merged; as it was on leaving, bit for bit.

        Raises:
            RuntimeError: adapters are merged already, by the user or in another test.
        """
        if any(isinstance(module, AdapterLinear) and module.merged for module in self.model.modules()):
            raise RuntimeError(
                "model: got merged adapters, expected unmerged ones: end the test before, or unmerge them"
            )
        modes = {module: module.training for module in self.model.modules()}
        try:
            self.model.eval()
            with self.with_adapters(adapters):
                merge_all(self.model, backup="device")
            yield self.model
        finally:
            unmerge_all(self.model)
            for module, training in modes.items():
                module.training = training

    def plain_copy(self) -> nn.Module:
        """A copy of the model with nn.Linear (or what it was) in the place of adapted layers, weights as they are."""
        model = copy.deepcopy(self.model)
        plain: dict[nn.Module, nn.Module] = {}
        for parent in list(model.modules()):
            for name, child in list(parent._modules.items()):
                if isinstance(child, AdapterLinear):
                    setattr(parent, name, plain.setdefault(child, child.to_linear()))
        return model

    # Adapters that go into the weights for good

    def fold_layers(self, task: int, tensors: Sequence[str] = ("lora_A", "lora_B")) -> None:
        """Fold every adapter into its weight and start it anew.

        What a fold depends on, the named ``tensors`` of each adapter, is kept as ``folded.<task>.<layer>.<tensor>``:
        the frozen weights are not saved, so loading folds again, into the weights the model had when attached.
        """
        for name, layer in self.layers.items():
            adapter = layer.adapter_state_dict()
            self.kept |= {f"folded.{task}.{name}.{tensor}": adapter[tensor].clone() for tensor in tensors}
            layer.fold()

    def folded(self, task: int, kept: Mapping[str, Tensor] | None = None) -> dict[str, dict[str, Tensor]]:
        """layer → tensor → value of what ``fold_layers`` kept of a task; empty for a task that was not folded."""
        found: dict[str, dict[str, Tensor]] = {}
        prefix = f"folded.{task}."
        for key, tensor in (self.kept if kept is None else kept).items():
            if key.startswith(prefix) and (place := self._place(key.removeprefix(prefix))):
                found.setdefault(place[0], {})[place[1]] = tensor
        return found

    def _place(self, key: str) -> tuple[str, str] | None:
        """Layer and tensor of ``<layer>.<tensor>``; None for no layer of the method."""
        layer = next((name for name in self.layers if key.startswith(f"{name}.")), None)
        return None if layer is None else (layer, key.removeprefix(f"{layer}."))

    @property
    def has_folded(self) -> bool:
        """Whether adapters went into the model's weights."""
        return any(key.startswith("folded.") for key in self.kept)

    # State

    def layer_state(self) -> dict[str, Tensor]:
        """Adapters, own parameters and ``kept``, flat; not the frozen weights."""
        state = {
            f"layers.{name}.{key}": tensor
            for name, layer in self.layers.items()
            for key, tensor in layer.adapter_state_dict().items()
        }
        state |= {f"own.{name}": p.detach() for name, p in self.own.items()}
        return state | {f"kept.{name}": tensor for name, tensor in self.kept.items()}

    def kept_shapes(self, finished: int, in_task: bool) -> Mapping[str, Sequence[int]] | None:
        """The shapes by name of all that ``kept`` holds after so many finished tasks, within the next one or not; None:
        a loaded ``kept`` is taken as it is. A hook of a method."""
        return None

    def adapter_shapes(
        self,
        *prefixes: str,
        tensors: Sequence[str] = ("lora_A", "lora_B"),
        layers: Mapping[str, AdapterLinear] | None = None,
    ) -> dict[str, torch.Size]:
        """``<prefix>.<layer>.<tensor>`` → the shape of that tensor of the layer's adapter, for ``kept_shapes``; of all
        layers, or of those given."""
        chosen = self.layers if layers is None else layers
        held = {name: layer.adapter_state_dict() for name, layer in chosen.items()}
        return {f"{p}.{name}.{t}": own[t].shape for p in prefixes for name, own in held.items() for t in tensors}

    @torch.no_grad()
    def load_layer_state(self, state: Mapping[str, Tensor], finished: int, in_task: bool) -> None:
        """Load what ``layer_state`` gave, and check ``base``; nothing changes unless everything fits.

        Raises:
            ValueError: layers or tensors that are missing, unexpected or of another shape; a model of other weights.
            RuntimeError: the model's weights hold folded adapters already, which cannot be taken out again.
        """
        adapters, own, kept, base = self._sorted(state)
        _check_shapes("own", own, {name: p.shape for name, p in self.own.items()}, "the method's own parameters")
        for name, tensors in adapters.items():
            self.layers[name].check_adapter_state_dict(tensors)
        shapes = self.kept_shapes(finished, in_task)
        if shapes is not None:
            when = f"after {finished} finished tasks{' and within the next' if in_task else ''}"
            _check_shapes("kept", kept, shapes, f"what {type(self).__name__} keeps {when}")
        folds = [fold for task in range(1, finished + 1) for fold in self.folded(task, kept).items()]
        for name, tensors in folds:
            self.layers[name].check_mergeable()
            self.layers[name].check_adapter_state_dict({**self.layers[name].adapter_state_dict(), **tensors})
        if self.has_folded:
            raise RuntimeError(
                "state: this model's weights hold folded adapters already; attach the method to the model as it was "
                "before the first task"
            )
        for name, number in base.items():
            if name in self.base and not torch.equal(number.cpu(), self.base[name]):
                raise ValueError(
                    f"model: got another weight in {name} than the state was made with, expected the model as it was "
                    "before the first task"
                )
        for name, tensors in folds:
            self.layers[name].load_adapter_state_dict({**self.layers[name].adapter_state_dict(), **tensors})
            self.layers[name].fold()
        for name, tensors in adapters.items():
            self.layers[name].load_adapter_state_dict(tensors)
        for name, p in self.own.items():
            p.copy_(own[name])
        device = next(self.parameters()).device
        self.kept = {k: v.to(device, copy=True) for k, v in kept.items()}

    def _sorted(
        self, state: Mapping[str, Tensor]
    ) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
        """Adapters by layer, own parameters, what was kept and the fingerprints, of a state."""
        adapters: dict[str, dict[str, Tensor]] = {name: {} for name in self.layers}
        others: dict[str, dict[str, Tensor]] = {"own": {}, "kept": {}, "base": {}}
        strange = []
        for key, tensor in state.items():
            kind, _, rest = key.partition(".")
            if kind == "layers" and (place := self._place(rest)):
                adapters[place[0]][place[1]] = tensor
            elif kind in others and (kind != "base" or rest in self.layers):
                others[kind][rest] = tensor
            else:
                strange.append(key)
        missing = [name for name, tensors in adapters.items() if not tensors]
        if missing or strange:
            raise ValueError(f"state: missing {missing}, unexpected {strange}, expected the layers {list(self.layers)}")
        return adapters, others["own"], others["kept"], others["base"]


def _check_shapes(kind: str, tensors: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]], what: str) -> None:
    """ValueError unless these are the tensors of a state: all of those names, no others, of those shapes."""
    missing = [f"{kind}.{name}" for name in shapes if name not in tensors]
    strange = [f"{kind}.{name}" for name in tensors if name not in shapes]
    if missing or strange:
        raise ValueError(f"state: missing {missing}, unexpected {strange}, expected {what}")
    for name, shape in shapes.items():
        if tensors[name].shape != torch.Size(shape):
            raise ValueError(f"{kind}.{name}: got shape {tuple(tensors[name].shape)}, expected {tuple(shape)}")


def _settings(cls: type, args: Sequence[Any], options: Mapping[str, Any]) -> dict[str, Any]:
    settings: dict[str, Any] = {"method": cls.__name__}
    places: list[str] = []
    for ancestor in reversed(cls.__mro__):
        if "__init__" in vars(ancestor):
            parameters = list(inspect.signature(vars(ancestor)["__init__"]).parameters.values())[1:]
            settings |= {p.name: p.default for p in parameters}
            places = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    settings |= {**dict(zip(places, args, strict=False)), **options}
    plain, other = (bool, int, float, str, type(None)), ("model", "targets", "backend")
    return {name: value for name, value in settings.items() if isinstance(value, plain) and name not in other}
