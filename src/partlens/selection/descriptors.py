"""How an image becomes a descriptor: the energies of all channels of all layers, normalised.

A *feature* is one channel of one layer's output. The descriptor of an image is made in four steps (Oramas et al. 2019,
in the order of the authors' code):

    e_lk = sum over cells of a_lk²        energy of channel k of layer l: no square root    (``energy``)
    d_lk = e_lk / sum_k' |e_lk'|          every layer sums to 1                             (``layer_normalisation``)
    d    = all layers one after another, in execution order                                 (``FeatureIndex``)
    x    = d / ||d||_2                                                                      (``image_normalisation``)

Source: the paper (arXiv 1712.06302) for the idea; the authors' MATLAB demo for the squared energies, both
normalisations and the layers measured. Where a layer does not answer at all (0/0 in the demo) its features are 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from itertools import accumulate
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from partlens.errors import InputError, LayerError, expected, listed, nearest

Layers = Literal["outputs", "activations", "convolutions"] | tuple[str, ...]
Energy = Literal["squared", "norm"]
_NAMED_LAYERS = ("outputs", "activations", "convolutions")


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


# Energies


def channels_only(values: Tensor) -> Tensor:
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


def energy(values: Tensor) -> Tensor:
    """Sum the squares of each channel, as `channel_energies`: what taps are reduced to."""
    return _squares(_flat(values))


def energy_and_peak(values: Tensor) -> Tensor:
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
    return energy(maps)


def normalised(energies: Tensor, index: FeatureIndex, config: DescriptorConfig) -> tuple[Tensor, Tensor]:
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
            values = energy(values)
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
    return normalised(torch.cat(parts, dim=1), index, config)[0]
