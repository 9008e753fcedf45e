"""Which features of a network indicate each class: descriptors of all layers, and the μ-lasso over them.

A *feature* is one channel of one layer's output. The descriptor of an image is made in four steps (Oramas et al. 2019,
in the order of the authors' code):

    e_lk = sum over cells of a_lk²        energy of channel k of layer l: no square root    (``energy``)
    d_lk = e_lk / sum_k' |e_lk'|          every layer sums to 1                             (``layer_normalisation``)
    d    = all layers one after another, in execution order                                 (``FeatureIndex``)
    x    = d / ||d||_2                                                                      (``image_normalisation``)

The weights ``w_j`` of class ``j`` come from the μ-lasso (:mod:`partlens.selection.lasso`); the relevant features of a
class are those whose weight is not 0, and the contribution of each to one image's class is ``w_j · x``, elementwise.

Source: the paper (arXiv 1712.06302) for the idea; the authors' MATLAB demo for the squared energies, both
normalisations and the layers measured. Where a layer does not answer at all (0/0 in the demo) its features are 0.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from partlens.data.images import ImageSet
from partlens.performer.activations import RowFile, batches
from partlens.performer.borrowing import borrowed
from partlens.performer.surgery import ACTIVATIONS, is_activation
from partlens.performer.taps import forward_taps
from partlens.performer.tracing import Traced, trace
from partlens.performer.zoo import Performer, first_line, module_of
from partlens.selection.lasso import LassoSolution, OnFailure, mu_lasso
from partlens.store import SCHEMA, read_json, write_json
from partlens.vocabulary import (
    ImageError,
    InputError,
    LayerError,
    RunError,
    StorageError,
    expected,
    listed,
    nearest,
)

RESPONSES = "responses.json"

Layers = Literal["outputs", "activations", "convolutions"] | tuple[str, ...]
Energy = Literal["squared", "norm"]
LabelSource = Literal["data", "predictions"]
Progress = Callable[[int, int], None]

_NAMED_LAYERS = ("outputs", "activations", "convolutions")
# Modules that hand on what they got: at test time, or in another shape. Their channels would be counted twice.
_SAME_VALUES = (
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.AlphaDropout,
    nn.FeatureAlphaDropout,
    nn.Identity,
    nn.Flatten,
    nn.Unflatten,
)
_WEIGHTED = (nn.Linear, nn.Conv2d)


@dataclass(frozen=True)
class DescriptorConfig:
    """How an image's descriptor is made. The defaults are those of the authors' demo.

    Args:
        layers: which layers are measured (`descriptor_layers`): ``"outputs"``, every layer's output except the class
            scores and what follows them (authors); ``"activations"``, only those of rectifiers and other activation
            functions; ``"convolutions"``, only those of convolutions; or layers by name.
        energy: ``"squared"``, the sum of squares over the cells (authors); ``"norm"``, its square root.
        layer_normalisation: ``"l1"`` divides each layer by the sum of its energies (authors); ``"none"``.
        image_normalisation: ``"l2"`` divides the whole descriptor by its Euclidean norm (authors); ``"none"``.

    Raises:
        InputError: a value that is not among these, or no layer.
    """

    layers: Layers = "outputs"
    energy: Energy = "squared"
    layer_normalisation: Literal["l1", "none"] = "l1"
    image_normalisation: Literal["l2", "none"] = "l2"

    def __post_init__(self) -> None:
        for name, options in (
            ("energy", ("squared", "norm")),
            ("layer_normalisation", ("l1", "none")),
            ("image_normalisation", ("l2", "none")),
        ):
            if getattr(self, name) not in options:
                raise InputError(
                    expected(f"{name} to be {' or '.join(options)}", getattr(self, name), f"Choose {options[0]}")
                )
        if isinstance(self.layers, str):
            if self.layers not in _NAMED_LAYERS:
                raise InputError(
                    expected(
                        f"layers to be {', '.join(_NAMED_LAYERS)} or names in a tuple",
                        self.layers,
                        f"Write ({self.layers!r},) to measure one layer",
                    )
                )
        elif not self.layers or not all(isinstance(name, str) for name in self.layers):
            raise InputError(expected("at least one layer name", self.layers, "Name layers, or choose outputs"))

    @classmethod
    def port_f(cls) -> DescriptorConfig:
        """Return the settings of the authors' group's later port to PyTorch (WACV 2023): activations, no image norm."""
        return cls(layers="activations", image_normalisation="none")

    @classmethod
    def port_g(cls, layers: Layers = "convolutions") -> DescriptorConfig:
        """Return the settings of the group's ICIP 2023 code: plain norms without normalisation; layers were listed."""
        return cls(layers=layers, energy="norm", layer_normalisation="none", image_normalisation="none")

    @classmethod
    def port_h(cls) -> DescriptorConfig:
        """Return the settings of the code for spiking networks (SVEBI, 2025): convolutions, no image norm."""
        return cls(layers="convolutions", image_normalisation="none")

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for a manifest; `from_dict` reads them back."""
        plain = asdict(self)
        return {**plain, "layers": self.layers if isinstance(self.layers, str) else list(self.layers)}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> DescriptorConfig:
        """Build from plain values.

        Raises:
            InputError: an unknown field, or a value that is not allowed.

        Example:
            >>> DescriptorConfig.from_dict(DescriptorConfig().to_dict()) == DescriptorConfig()
            True
        """
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(content) - known):
            raise InputError(
                expected(f"descriptor fields among {', '.join(sorted(known))}", listed(unknown), "Remove the others")
            )
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in content.items()
        }
        return cls(**values)


@dataclass(frozen=True)
class FeatureIndex:
    """Which layer and channel each entry of a descriptor is.

    Args:
        layers: names of the layers, in execution order.
        channels: how many channels each has.

    Raises:
        InputError: lists of different lengths, repeated layers, or a layer without channels.

    Example:
        >>> index = FeatureIndex(("conv1", "relu1"), (3, 3))
        >>> index.size, index.feature("relu1", 2), index.place(5), index.rows("relu1")
        (6, 5, ('relu1', 2), slice(3, 6, None))
    """

    layers: tuple[str, ...]
    channels: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.layers) != len(self.channels) or not self.layers:
            raise InputError(
                expected(
                    "one number of channels for each of at least one layer",
                    f"{len(self.layers)} layers and {len(self.channels)} numbers",
                    "Give both in the same order",
                )
            )
        if len(set(self.layers)) != len(self.layers):
            twice = sorted({name for name in self.layers if self.layers.count(name) > 1})
            raise InputError(expected("each layer once", listed(twice), "Name every layer once"))
        if min(self.channels) < 1:
            raise InputError(expected("at least 1 channel in each layer", min(self.channels), "Leave the layer out"))

    @cached_property
    def _starts(self) -> tuple[int, ...]:
        return (0, *accumulate(self.channels))

    @cached_property
    def _number(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self.layers)}

    @property
    def size(self) -> int:
        """``m``, the length of a descriptor."""
        return self._starts[-1]

    def _layer(self, layer: str) -> int:
        if layer not in self._number:
            raise LayerError(
                expected("a layer of the descriptor", layer, f"Nearest: {', '.join(nearest(layer, self.layers))}")
            )
        return self._number[layer]

    def rows(self, layer: str) -> slice:
        """Return where a layer's features stand.

        Raises:
            LayerError: a layer that is not measured.
        """
        number = self._layer(layer)
        return slice(self._starts[number], self._starts[number + 1])

    def feature(self, layer: str, channel: int) -> int:
        """Return the number of a feature.

        Raises:
            LayerError: a layer that is not measured.
            InputError: a channel that it does not have.
        """
        number = self._layer(layer)
        if not 0 <= channel < self.channels[number]:
            raise InputError(
                expected(f"a channel of {layer} from 0 to {self.channels[number] - 1}", channel, "Count from 0")
            )
        return self._starts[number] + int(channel)

    def place(self, feature: int) -> tuple[str, int]:
        """Return layer and channel of a feature: the inverse of `feature`.

        Raises:
            InputError: a number outside the descriptor.
        """
        if not 0 <= feature < self.size:
            raise InputError(expected(f"a feature from 0 to {self.size - 1}", feature, "Count from 0"))
        number = int(np.searchsorted(self._starts, feature, side="right")) - 1
        return self.layers[number], int(feature) - self._starts[number]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for a manifest; `from_dict` reads them back."""
        return {"layers": list(self.layers), "channels": list(self.channels)}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> FeatureIndex:
        """Build from plain values.

        Raises:
            InputError: a field that is missing or that does not fit.
        """
        if set(content) != {"layers", "channels"}:
            raise InputError(expected("the fields layers and channels", listed(sorted(content)), "Fit again"))
        return cls(tuple(str(v) for v in content["layers"]), tuple(int(v) for v in content["channels"]))


# Which layers


@dataclass(frozen=True)
class _Output:
    """A layer whose output can be read: its tap name, what it is, and the shape of its output."""

    name: str
    kind: Literal["activation", "convolution", "weights", "same", "other"]
    shape: tuple[int, ...]


def _kind_of(
    module: nn.Module | None, *, activation: bool
) -> Literal["activation", "convolution", "weights", "same", "other"]:
    if activation:
        return "activation"
    if isinstance(module, nn.Conv2d):
        return "convolution"
    if isinstance(module, nn.Linear):
        return "weights"
    return "same" if isinstance(module, _SAME_VALUES) else "other"


def _unchanged(module: nn.Module, before: Any, after: Any) -> bool:
    """Whether an adaptive pooling has nothing to do at this input size."""
    return isinstance(module, (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)) and before == after


def _traced_outputs(traced: Traced, size: tuple[int, int]) -> list[_Output]:
    """List outputs before the class scores, from the network's graph."""
    shapes = traced.shapes(size)
    last = traced.result if traced.result is not None else next(n for n in traced.graph.nodes if n.op == "output")
    live = traced.ancestors([last])
    weighted = [
        n for n in traced.graph.nodes if n in live and n.op == "call_module" and isinstance(traced.leaf(n), _WEIGHTED)
    ]
    after = traced.descendants(weighted[-1]) if weighted else set()
    after |= {last}
    containers: dict[Any, str] = {}
    for name, node in traced.containers.items():  # the innermost module stands for the operation that it returns
        if node not in containers or len(name) > len(containers[node]):
            containers[node] = name
    found = []
    for node in traced.graph.nodes:
        if node not in live or node in after or node is traced.input:
            continue
        shape = shapes.get(node)
        if not isinstance(shape, torch.Size) or len(shape) not in {2, 4}:
            continue
        if node.op == "call_module":
            name, module = traced.names[node], traced.leaf(node)
            if _unchanged(module, shapes.get(node.all_input_nodes[0]) if node.all_input_nodes else None, shape):
                continue
        elif node in containers:
            name, module = containers[node], None
        else:
            continue
        found.append(_Output(name, _kind_of(module, activation=is_activation(traced, node)), tuple(shape)))
    return found


def _hooked_outputs(module: nn.Module, size: tuple[int, int]) -> list[_Output]:
    """List the outputs of modules without submodules, by running a blank image; for networks without a graph."""
    noted: list[_Output] = []
    calls: dict[str, int] = {}
    first = next((m for m in module.modules() if isinstance(m, nn.Conv2d)), None)
    weight = next((p for p in module.parameters() if p.is_floating_point()), torch.zeros(()))
    blank = torch.zeros(
        1, first.in_channels if first is not None else 3, *size, dtype=weight.dtype, device=weight.device
    )
    with borrowed(module, copy_weights=False) as network, torch.no_grad():
        handles = []
        for path, child in network.named_modules():
            if not path or next(child.children(), None) is not None:
                continue

            def hook(owner: nn.Module, inputs: Any, output: Any, path: str = path) -> None:
                call = calls.get(path, 0)
                calls[path] = call + 1
                if isinstance(output, Tensor) and output.ndim in {2, 4}:
                    if _unchanged(owner, getattr(inputs[0], "shape", None) if inputs else None, output.shape):
                        return
                    kind = _kind_of(owner, activation=isinstance(owner, ACTIVATIONS))
                    noted.append(_Output(path if call == 0 else f"{path}_{call}", kind, tuple(output.shape)))

            handles.append(child.register_forward_hook(hook))
        try:
            network(blank)
        except Exception as error:
            raise LayerError(
                expected(
                    f"an input size that {type(network).__name__} accepts",
                    f"{size[0]}x{size[1]} px ({first_line(error)})",
                    "Give the preprocessing of the network",
                )
            ) from error
        finally:
            for handle in handles:
                handle.remove()
    weighted = [i for i, output in enumerate(noted) if output.kind in {"convolution", "weights"}]
    return noted[: weighted[-1]] if weighted else noted


def _outputs(performer: Performer) -> list[_Output]:
    module = module_of(performer)
    try:
        traced = trace(module)
    except LayerError:
        return _hooked_outputs(module, performer.preprocessing.size_px)
    return _traced_outputs(traced, performer.preprocessing.size_px)


def feature_index(performer: Performer, config: DescriptorConfig | None = None) -> FeatureIndex:
    """Choose the layers to measure and count their channels, as `descriptor_layers` says.

    Args:
        performer: the network; left as it was.
        config: which layers.

    Returns:
        The index of the descriptor.

    Raises:
        LayerError: as `descriptor_layers`.
    """
    config = config or DescriptorConfig()
    if isinstance(config.layers, tuple):
        names = tuple(dict.fromkeys(config.layers))
        rows, cols = performer.preprocessing.size_px
        first = next((m for m in module_of(performer).modules() if isinstance(m, nn.Conv2d)), None)
        blank = torch.zeros(1, first.in_channels if first is not None else 3, rows, cols)
        _, values = forward_taps(performer, blank, names, _channels_only)
        shapes = {name: (1, values[name].shape[1]) for name in names}
        chosen = [(name, shapes[name][1]) for name in names]
    else:
        wanted = {
            "outputs": {"activation", "convolution", "weights", "other"},
            "activations": {"activation"},
            "convolutions": {"convolution"},
        }[config.layers]
        chosen = [(output.name, output.shape[1]) for output in _outputs(performer) if output.kind in wanted]
        if not chosen:
            raise LayerError(
                expected(
                    f"{config.layers} with modules of their own before the class scores of {performer.name}",
                    "none",
                    "Choose outputs, or name layers in a tuple",
                )
            )
    return FeatureIndex(tuple(name for name, _ in chosen), tuple(channels for _, channels in chosen))


def descriptor_layers(performer: Performer, config: DescriptorConfig | None = None) -> tuple[str, ...]:
    """Name the layers that a descriptor measures, in execution order.

    ``"outputs"`` means: the output of every module without submodules (convolution, rectifier, normalisation, pooling,
    fully connected layer), each call of it; and where an operation is written in ``forward``, what the innermost module
    around it returns, if that is the operation's result (the sum of a residual block, the concatenation of an Inception
    block, the ``F.relu`` at the end of a block). So a convolution, its rectifier, its normalisation and its pooling are
    separate layers. Left out are the last layer with weights (the class scores) and all that follows it; what does not
    reach the output; dropout, identity, flattening and adaptive pooling to the size that is there, which hand on the
    same values; outputs other than maps ``(image, filter, row, col)`` and vectors ``(image, filter)``; and operations
    inside a ``forward`` that no module returns. VGG-F has 19 such layers with 19,456 channels, MatConvNet's LeNet six
    with 1,140.

    Of a network that torch.fx cannot trace, the modules without submodules are seen, no operation of a ``forward``.

    Args:
        performer: the network; left as it was. Shapes are those at its preprocessing's input size.
        config: which layers; names given by the user stay in the user's order.

    Returns:
        Tap names.

    Raises:
        LayerError: an unknown layer (with the nearest names), or no such layer.
    """
    return feature_index(performer, config).layers


# Energies


def _channels_only(values: Tensor) -> Tensor:
    """Keep one zero per channel, so that shapes can be read; refuse what has no channels."""
    return _flat(values).new_zeros(values.shape[:2])


def _flat(values: Tensor) -> Tensor:
    """Bring maps or vectors to ``[image, channel, cell]`` in float32."""
    if values.ndim not in {2, 4}:
        raise LayerError(
            expected(
                "layers that give maps (image, filter, row, col) or vectors (image, filter)",
                f"one of shape {tuple(values.shape)}",
                "Leave that layer out",
            )
        )
    return values.detach().float().flatten(2) if values.ndim == 4 else values.detach().float()[:, :, None]


def _squares(flat: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(flat, dim=2)  # makes no squared copy of the maps
    return norm.square()


def _energy(values: Tensor) -> Tensor:
    return _squares(_flat(values))


def _energy_and_peak(values: Tensor) -> Tensor:
    """Energy, largest value and its row and column, ``[image, channel, 4]`` float32 (cells stay exact below 2^24)."""
    flat = _flat(values)
    peak, place = flat.max(dim=2)
    cols = values.shape[3] if values.ndim == 4 else 1
    return torch.stack([_squares(flat), peak, place // cols, place % cols], dim=2)


def channel_energies(
    maps: Float[Tensor, "image filter row col"] | Float[Tensor, "image filter"],
) -> Float[Tensor, "image filter"]:
    """Sum the squares of each channel over its cells: ``e_k = sum a_k²``, no root.

    Args:
        maps: one layer's output; vectors count as maps of one cell. Negative values count, because of the square.

    Returns:
        Energies, at least 0, float32.

    Example:
        >>> channel_energies(torch.tensor([[[[3.0, -4.0]], [[1.0, 0.0]]]])).tolist()
        [[25.0, 1.0]]
    """
    return _energy(maps)


def _normalised(energies: Tensor, index: FeatureIndex, config: DescriptorConfig) -> tuple[Tensor, Tensor]:
    """Steps 2 to 4 on all layers side by side; also the number of dead layers of each image."""
    values = energies.double()
    if config.energy == "norm":
        values = values.sqrt()
    dead = torch.zeros(len(values), dtype=torch.int64, device=values.device)
    for layer in index.layers:
        rows = index.rows(layer)
        total = values[:, rows].sum(1, keepdim=True)
        dead += total[:, 0] == 0
        if config.layer_normalisation == "l1":
            values[:, rows] /= torch.where(total > 0, total, torch.ones_like(total))
    if config.image_normalisation == "l2":
        norm = torch.linalg.vector_norm(values, dim=1, keepdim=True)
        values = values / torch.where(norm > 0, norm, torch.ones_like(norm))
    return values.float(), dead


def descriptor(
    energies: Mapping[str, Tensor], index: FeatureIndex, config: DescriptorConfig | None = None
) -> Float[Tensor, "image feature"]:
    """Make descriptors from the energies of all layers.

    Args:
        energies: by layer, ``[image, channel]`` squared energies (`channel_energies`), or the layer's maps
            ``[image, channel, row, col]``, from which they are computed.
        index: the layers and their order.
        config: energies and normalisations.

    Returns:
        ``x``, float32, at least 0. Features of a layer that does not answer at all are 0; an image on which no layer
        answers has a descriptor of zeros.

    Raises:
        LayerError: a layer of the index is missing.
        InputError: another number of channels than in the index, or negative energies.

    Example:
        >>> index = FeatureIndex(("a", "b"), (2, 1))
        >>> descriptor({"a": torch.tensor([[3.0, 1.0]]), "b": torch.tensor([[5.0]])}, index,
        ...            DescriptorConfig(image_normalisation="none")).tolist()
        [[0.75, 0.25, 1.0]]
    """
    config = config or DescriptorConfig()
    parts = []
    for layer, channels in zip(index.layers, index.channels, strict=True):
        if layer not in energies:
            raise LayerError(expected(f"energies of {layer}", f"only {listed(list(energies))}", "Give every layer"))
        values = energies[layer]
        if values.ndim == 4:
            values = _energy(values)
        if values.ndim != 2 or values.shape[1] != channels:
            raise InputError(
                expected(
                    f"energies of {layer} of shape (image, {channels})", str(tuple(values.shape)), "Use its own index"
                )
            )
        if values.numel() and float(values.min()) < 0:
            raise InputError(
                expected(f"energies of {layer} of at least 0", float(values.min()), "Give sums of squares, or the maps")
            )
        parts.append(values.double())
    return _normalised(torch.cat(parts, dim=1), index, config)[0]


def _scores(output: Any) -> Tensor:
    """Find the class scores ``[image, class]`` in a network's output."""
    values = list(output.values()) if isinstance(output, Mapping) else output
    options = [output] if isinstance(output, Tensor) else values if isinstance(values, (list, tuple)) else []
    for value in options:
        if isinstance(value, Tensor) and value.is_floating_point():
            if value.ndim == 2:
                return value
            if value.ndim == 4 and value.shape[2:] == (1, 1):
                return value[:, :, 0, 0]
    shown = str(tuple(output.shape)) if isinstance(output, Tensor) else type(output).__name__
    raise LayerError(
        expected("a network that returns class scores (image, class)", shown, "Wrap it so that it returns them")
    )


def _check_index(values: Mapping[str, Tensor], index: FeatureIndex) -> None:
    for layer, channels in zip(index.layers, index.channels, strict=True):
        if values[layer].shape[1] != channels:
            raise LayerError(
                expected(
                    f"{channels} channels in {layer}", values[layer].shape[1], "Use the index of this network and input"
                )
            )


def image_descriptors(
    performer: Performer,
    batch: Float[Tensor, "image channel row col"],
    index: FeatureIndex,
    config: DescriptorConfig | None = None,
) -> tuple[Float[Tensor, "image feature"], Float[Tensor, "image output"]]:
    """Run a batch and return its descriptors and class scores.

    Args:
        performer: the network; left as it was.
        batch: its input.
        index: the layers (`feature_index`).
        config: how descriptors are made.

    Returns:
        Descriptors and scores, float32 on the CPU.

    Raises:
        LayerError: a layer of the index is not there or has another number of channels, or the network does not return
            class scores.
        InputError: values that are not finite.
    """
    output, values = forward_taps(performer, batch, index.layers, _energy)
    _check_index(values, index)
    x, _ = _normalised(torch.cat([values[layer] for layer in index.layers], dim=1), index, config or DescriptorConfig())
    return x.cpu(), _scores(output).cpu()


# One pass over a data set


@dataclass(frozen=True)
class Responses:
    """Descriptors of a data set; a row per image. Arrays are read-only memory maps when a folder was given.

    Args:
        keys: names of the images.
        index: layer and channel of every feature.
        config: how the descriptors were made.
        descriptor: ``[image, feature]`` float32.
        peak: ``[image, feature]`` float32: the largest value of each channel; ``None`` where not asked for.
        peak_cell: ``[image, feature, 2]`` int16: where it stands (row, col), the first of equal ones; likewise.
        logits: ``[image, class]`` float32: the network's class scores.
        dead_layers: pairs of an image and a layer that did not answer at all; their features are 0.
        path: the folder; ``None`` when in memory.
    """

    keys: tuple[str, ...]
    index: FeatureIndex
    config: DescriptorConfig
    descriptor: np.ndarray
    peak: np.ndarray | None
    peak_cell: np.ndarray | None
    logits: np.ndarray
    dead_layers: int
    path: Path | None


_FILES = {"descriptor": "float32", "logits": "float32", "peak": "float32", "peak_cell": "int16"}


def _same_manifest(path: Path, wanted: Mapping[str, Any]) -> dict[str, Any]:
    found = read_json(path)
    different = [name for name, value in wanted.items() if found.get(name) != value]
    if different:
        raise RunError(
            expected(
                f"responses of this configuration in {path.parent}",
                f"another {', '.join(different)}",
                "Choose another folder, or give resume=False to start again",
            )
        )
    return found


def _open_rows(out: Path | None, images: int, features: int, classes: int, *, peaks: bool) -> dict[str, RowFile]:
    shapes: dict[str, tuple[int, ...]] = {"descriptor": (images, features), "logits": (images, classes)}
    if peaks:
        shapes |= {"peak": (images, features), "peak_cell": (images, features, 2)}
    return {
        name: RowFile(out / f"{name}.npy" if out is not None else None, shape, _FILES[name])
        for name, shape in shapes.items()
    }


def stream_responses(
    performer: Performer,
    images: ImageSet,
    config: DescriptorConfig | None = None,
    *,
    out: Path | None = None,
    batch_size: int = 32,
    resume: bool = True,
    peaks: bool = True,
    progress: Progress | None = None,
) -> Responses:
    """Run every image through the performer once and keep its descriptor, peaks and scores.

    Each layer is reduced to a few numbers per channel while the pass is there; the maps of all layers are never in
    memory together. With a folder, rows are written as they come, and a killed run goes on with the next batch.

    Args:
        performer: the network; left as it was.
        images: the photos.
        config: which layers, and how descriptors are made.
        out: folder for ``descriptor.npy``, ``logits.npy``, ``peak.npy``, ``peak_cell.npy`` and the manifest
            ``responses.json``, made when missing; ``None`` keeps all in memory.
        batch_size: images per forward pass; also the granularity at which a killed run resumes.
        resume: go on with what is found in ``out``; ``False`` starts again.
        peaks: keep where and how strongly each channel answers most.
        progress: called as ``progress(images_done, images)`` after each batch.

    Returns:
        The responses.

    Raises:
        ImageError: no images, or one that cannot be read (with its name); finished batches stay on disk.
        LayerError: no such layers, or a network without class scores.
        InputError: values that are not finite, or ``batch_size`` below 1.
        RunError: ``out`` holds responses of another configuration.
        StorageError: not enough space, or no permission.
    """
    config = config or DescriptorConfig()
    if batch_size < 1:
        raise InputError(expected("batch_size of at least 1", batch_size, "Correct the value"))
    if len(images) == 0:
        raise ImageError(expected("at least 1 image", 0, "Choose a folder with photos"))
    index = feature_index(performer, config)
    wanted: dict[str, Any] = {
        "schema": SCHEMA,
        "performer": performer.weights_sha256,
        "images": images.fingerprint(),
        "preprocessing": performer.preprocessing.to_dict(),
        "descriptor": config.to_dict(),
        "index": index.to_dict(),
        "rows": len(images),
        "peaks": peaks,
    }
    try:
        return _stream(performer, images, index, config, out, batch_size, resume, progress, wanted)
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(
            expected(
                f"to write responses in {out}", error.strerror or str(error), "Free space or choose another folder"
            )
        ) from error


def _stream(
    performer: Performer,
    images: ImageSet,
    index: FeatureIndex,
    config: DescriptorConfig,
    out: Path | None,
    batch_size: int,
    resume: bool,
    progress: Progress | None,
    wanted: dict[str, Any],
) -> Responses:
    rows, peaks = len(images), bool(wanted["peaks"])
    manifest = out / RESPONSES if out is not None else None
    done, dead = 0, 0
    files: dict[str, RowFile] = {}
    if out is not None and manifest is not None:
        out.mkdir(parents=True, exist_ok=True)
        if manifest.exists() and resume:
            found = _same_manifest(manifest, wanted)
            done, dead = int(found["rows_done"]), int(found["dead_layers"])
            files = _open_rows(out, rows, index.size, int(found["classes"]), peaks=peaks)
        else:
            manifest.unlink(missing_ok=True)
            for name in _FILES:
                (out / f"{name}.npy").unlink(missing_ok=True)
    try:
        for start, batch in batches(performer, images, range(done, rows), batch_size):
            output, values = forward_taps(performer, batch, index.layers, _energy_and_peak if peaks else _energy)
            _check_index(values, index)
            scores = _scores(output).cpu().numpy()
            kept = torch.cat([values[layer] for layer in index.layers], dim=1)
            x, lost = _normalised(kept[:, :, 0] if peaks else kept, index, config)
            files = files or _open_rows(out, rows, index.size, scores.shape[1], peaks=peaks)
            files["descriptor"].write(start, x.cpu().numpy())
            files["logits"].write(start, scores)
            if peaks:
                files["peak"].write(start, kept[:, :, 1].cpu().numpy())
                files["peak_cell"].write(start, kept[:, :, 2:].to(torch.int16).cpu().numpy())
            done, dead = start + len(batch), dead + int(lost.sum())
            if manifest is not None:
                for each in files.values():
                    each.settle()
                write_json(
                    manifest,
                    {
                        **wanted,
                        "performer_name": performer.name,
                        "classes": scores.shape[1],
                        "dead_layers": dead,
                        "rows_done": done,
                    },
                )
            if progress is not None:
                progress(done, rows)
        return Responses(
            keys=tuple(images.keys),
            index=index,
            config=config,
            descriptor=files["descriptor"].read(),
            peak=files["peak"].read() if peaks else None,
            peak_cell=files["peak_cell"].read() if peaks else None,
            logits=files["logits"].read(),
            dead_layers=dead,
            path=out,
        )
    finally:
        for each in files.values():
            each.close()


# Labels


@dataclass(frozen=True)
class LabelMatrix:
    """One-hot labels of images.

    Args:
        matrix: ``L`` transposed: 1 where an image is of a class, float64.
        classes: name of each column.
        outputs: the performer's output of each column where it is known, else ``None``.
        absent: classes without an image, which have no column.
    """

    matrix: Float[Tensor, "image class"]
    classes: tuple[str, ...]
    outputs: tuple[int | None, ...]
    absent: tuple[str, ...]


def _key(name: str) -> str:
    """Fold case, underscores and runs of spaces."""
    return re.sub(r"[\s_]+", " ", name).strip().casefold()


def class_of_category(performer: Performer, category: str) -> int | None:
    """Find the performer's output that a category of the data means.

    Args:
        performer: its ``class_names`` are asked.
        category: a whole number such as ``"281"``, which is that output; or a class name, where case, underscores and
            spaces do not matter.

    Returns:
        The output, ``None`` where the category is neither (or its name stands for several outputs).
    """
    names = performer.class_names
    if re.fullmatch(r"\d+", category.strip()):
        output = int(category)
        return output if names is None or output < len(names) else None
    places = [place for place, name in enumerate(names or ()) if _key(name) == _key(category)]
    return places[0] if len(places) == 1 else None


def label_matrix(
    images: ImageSet | None = None,
    *,
    source: LabelSource = "data",
    logits: npt.NDArray[Any] | Tensor | None = None,
    performer: Performer | None = None,
    classes: Sequence[str] | None = None,
) -> LabelMatrix:
    """Make one-hot labels from the data's categories or from the network's own decisions.

    Args:
        images: the photos; needed for ``"data"``.
        source: ``"data"``, the true categories (the paper's, as a survey of it says); ``"predictions"``, the output
            with the largest score (the group's later ports).
        logits: ``[image, class]`` scores; needed for ``"predictions"``.
        performer: names the outputs.
        classes: the classes to make columns for, in this order; all that occur, sorted, when ``None``. An image of none
            of them has a row of zeros.

    Returns:
        Labels; classes without an image are left out and named in ``absent``.

    Raises:
        InputError: what ``source`` needs is missing.
        ImageError: an image without a category, or no class with an image.
    """
    if source == "data":
        if images is None:
            raise InputError(expected("images, to read their categories", "none", "Give images="))
        empty = [key for key, category in zip(images.keys, images.categories, strict=True) if not category]
        if empty:
            raise ImageError(
                expected("a category for every image", f"none for {listed(empty)}", "Sort the images into sub-folders")
            )
        found = list(images.categories)
    elif source == "predictions":
        if logits is None:
            raise InputError(expected("logits, to see what the network decides", "none", "Give logits="))
        scores = logits.detach().cpu().numpy() if isinstance(logits, Tensor) else np.asarray(logits)
        known = performer.class_names if performer is not None else None
        found = [known[o] if known is not None and o < len(known) else str(o) for o in scores.argmax(1).tolist()]
        decided = dict(zip(found, scores.argmax(1).tolist(), strict=True))
    else:
        raise InputError(expected("source data or predictions", source, "Choose data"))
    wanted = list(dict.fromkeys(classes)) if classes is not None else sorted(set(found))
    present = [name for name in wanted if name in set(found)]
    if not present:
        raise ImageError(expected(f"an image of {listed(wanted)}", "none", "Check the names of the classes"))
    if source == "predictions":
        outputs = tuple(cast("int | None", decided[name]) for name in present)
    else:
        outputs = tuple(class_of_category(performer, name) if performer is not None else None for name in present)
    column = {name: place for place, name in enumerate(present)}
    matrix = torch.zeros(len(found), len(present), dtype=torch.float64)
    for row, name in enumerate(found):
        if name in column:
            matrix[row, column[name]] = 1.0
    return LabelMatrix(matrix, tuple(present), outputs, tuple(name for name in wanted if name not in column))


# Relevant features


@dataclass(frozen=True)
class Selection:
    """The relevant features of each class.

    Args:
        weights: ``W``; exactly 0 where a feature is not relevant.
        index: layer and channel of every feature.
        classes: name of each column.
        solution: the solver's certificate.
    """

    weights: Float[Tensor, "feature class"]
    index: FeatureIndex
    classes: tuple[str, ...]
    solution: LassoSolution

    def column(self, name: int | str) -> int:
        """Return the column of a class, given by name or number.

        Raises:
            InputError: no such class, with the nearest names.
        """
        if isinstance(name, str):
            if name not in self.classes:
                raise InputError(
                    expected("a class of the selection", name, f"Nearest: {', '.join(nearest(name, self.classes))}")
                )
            return self.classes.index(name)
        if not 0 <= name < len(self.classes):
            raise InputError(expected(f"a class from 0 to {len(self.classes) - 1}", name, "Count from 0"))
        return int(name)

    def relevant(self, name: int | str) -> list[tuple[str, int, float]]:
        """Return layer, channel and weight of all features of a class whose weight is not 0, the largest first.

        Equal weights stand in the order of the descriptor. No other threshold is applied, as in the authors' code.
        """
        weights = self.weights[:, self.column(name)]
        chosen = weights.nonzero()[:, 0]
        order = weights[chosen].abs().argsort(descending=True, stable=True)
        return [(*self.index.place(int(feature)), float(weights[feature])) for feature in chosen[order]]

    def contribution(self, x: Float[Tensor, "image feature"], name: int | str) -> Float[Tensor, "image feature"]:
        """Return ``r = w_j · x``, elementwise: how much each feature of each image speaks for a class."""
        return self.weights[:, self.column(name)].to(x.dtype) * x


def _rows_of(responses: Responses | Tensor | npt.NDArray[Any]) -> Tensor | npt.NDArray[Any]:
    return responses.descriptor if isinstance(responses, Responses) else responses


def select_relevant(
    responses: Responses | Tensor | npt.NDArray[Any],
    labels: LabelMatrix | Tensor | npt.NDArray[Any],
    mu: float | int = 10.0,  # noqa: PYI041 - the shape checks of the tests do not take an int for a float
    *,
    nonnegative: bool = True,
    index: FeatureIndex | None = None,
    classes: Sequence[str] | None = None,
    tolerance: float = 1e-6,
    on_failure: OnFailure = "raise",
) -> Selection:
    """Find the few features that indicate each class.

    Args:
        responses: descriptors ``[image, feature]``, or what `stream_responses` gave.
        labels: one-hot ``[image, class]``, or what `label_matrix` gave.
        mu: bound on the sum of a class's absolute weights; the authors' demo has 10 for all data sets, 5 for an8Flower.
        nonnegative: whether weights must be at least 0; see :mod:`partlens.selection.lasso`.
        index: layer and channel of every feature; taken from ``responses`` where it has one.
        classes: names of the columns; taken from ``labels`` where it has them, else numbers.
        tolerance: as in `mu_lasso`.
        on_failure: as in `mu_lasso`.

    Returns:
        The selection.

    Raises:
        InputError: no index, or one that does not fit; as `mu_lasso`.
        NotConvergedError: as `mu_lasso`.
    """
    rows = _rows_of(responses)
    index = index or (responses.index if isinstance(responses, Responses) else None)
    matrix = labels.matrix if isinstance(labels, LabelMatrix) else labels
    if classes is None:
        classes = labels.classes if isinstance(labels, LabelMatrix) else [str(j) for j in range(matrix.shape[-1])]
    if index is None:
        raise InputError(expected("index=, to name the features", "none", "Give a FeatureIndex"))
    if rows.ndim != 2 or rows.shape[1] != index.size:
        raise InputError(
            expected(
                f"responses of {index.size} features, as in the index", str(tuple(rows.shape)), "Use its own index"
            )
        )
    if matrix.ndim != 2 or matrix.shape[1] != len(classes):
        raise InputError(
            expected(f"labels of {len(classes)} classes", str(tuple(matrix.shape)), "Give one name per column")
        )
    solution = mu_lasso(rows, matrix, mu, nonnegative, tolerance=tolerance, on_failure=on_failure)
    return Selection(solution.weights, index, tuple(classes), solution)


@dataclass(frozen=True)
class Readout:
    """How well the weights alone tell the classes: the class with the largest ``w_j · x`` (sum over features).

    Args:
        correct: per image, whether that is its class.
        shuffled: the same with weights fitted to shuffled labels: the null. ``None`` when it was not asked for.
        chance: one over the number of classes.
        majority: share of the most frequent class among these images.
    """

    correct: Bool[Tensor, " image"]
    shuffled: Bool[Tensor, " image"] | None
    chance: float
    majority: float

    @property
    def accuracy(self) -> float:
        """Share of images that are told right."""
        return float(self.correct.double().mean())

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of the accuracy; ``n`` is the number of images."""
        n, z = len(self.correct), 1.96
        share = self.accuracy
        centre = (share + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
        return max(0.0, centre - half), min(1.0, centre + half)


def _told(weights: Tensor, rows: Tensor | npt.NDArray[Any], block: int = 4096) -> Int[Tensor, " image"]:
    parts = []
    for start in range(0, rows.shape[0], block):
        here = rows[start : start + block]
        values = here.detach().cpu() if isinstance(here, Tensor) else torch.from_numpy(np.array(here))
        parts.append((values.double() @ weights).argmax(1))
    return torch.cat(parts)


def readout(
    selection: Selection,
    responses: Responses | Tensor | npt.NDArray[Any],
    labels: LabelMatrix | Tensor | npt.NDArray[Any],
    *,
    fitted: tuple[Responses | Tensor | npt.NDArray[Any], LabelMatrix | Tensor | npt.NDArray[Any]] | None = None,
    generator: torch.Generator | None = None,
) -> Readout:
    """Measure how far the selected features alone tell the classes, beside the same after shuffling the labels.

    Args:
        selection: the fitted weights.
        responses: descriptors of images that were not fitted on.
        labels: their one-hot labels; images without a class (a row of zeros) are left out.
        fitted: descriptors and labels that the selection was fitted on; with them the null is measured.
        generator: draws the shuffled order; needed with ``fitted``.

    Returns:
        The read-out.

    Raises:
        InputError: ``fitted`` without a generator, or no image with a class.
    """
    matrix = labels.matrix if isinstance(labels, LabelMatrix) else torch.as_tensor(np.asarray(labels))
    known = matrix.sum(1) > 0
    if not bool(known.any()):
        raise InputError(expected("at least 1 image of a class", 0, "Give labelled images"))
    truth = matrix.argmax(1)
    rows = _rows_of(responses)
    correct = (_told(selection.weights, rows) == truth)[known]
    shuffled: Tensor | None = None
    if fitted is not None:
        if generator is None:
            raise InputError(expected("a generator, to shuffle labels", "none", "Give generator="))
        target = fitted[1].matrix if isinstance(fitted[1], LabelMatrix) else torch.as_tensor(np.asarray(fitted[1]))
        order = torch.randperm(len(target), generator=generator)
        null = select_relevant(
            fitted[0],
            target[order],
            selection.solution.mu,
            nonnegative=selection.solution.nonnegative,
            index=selection.index,
            classes=selection.classes,
            on_failure="return",
        )
        shuffled = (_told(null.weights, rows) == truth)[known]
    counts = matrix[known].sum(0)
    return Readout(correct, shuffled, 1 / matrix.shape[1], float(counts.max() / counts.sum()))
