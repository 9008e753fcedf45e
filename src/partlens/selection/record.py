"""What a selection is made with and what is written of it, ``selection.json``; nothing here needs a tensor library."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from math import inf
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from partlens.errors import InputError, LayerError, expected, listed, nearest
from partlens.estimate import Estimate, Number
from partlens.records import Settings, Value
from partlens.run import SELECTION, Precision, RunRecord

WEIGHTS = "selection.safetensors"
DEFAULT_MU = 10.0
NAMED_PHOTOS = 8
_NAMED_LAYERS = ("outputs", "activations", "convolutions")


def _layers(value: object) -> object:
    if isinstance(value, str):
        if value not in _NAMED_LAYERS:
            raise ValueError(f"one of {', '.join(_NAMED_LAYERS)}, or a list of layer names")
        return value
    if not isinstance(value, (list, tuple)) or not value or not all(isinstance(name, str) for name in value):
        raise ValueError("a list of at least one layer name")
    return tuple(value)


Layers = Annotated[Literal["outputs", "activations", "convolutions"] | tuple[str, ...], BeforeValidator(_layers)]


def _checked_bound(value: object) -> object:
    if value == "auto" or (isinstance(value, int | float) and 0 < value < inf):
        return value
    raise ValueError("auto or a finite number above 0")


Bound = Annotated[Literal["auto"] | float, BeforeValidator(_checked_bound)]


class DescriptorConfig(Settings):
    """Of what the descriptor of an image is made; how is in :mod:`partlens.selection.descriptors`.

    Attributes:
        layers: which layers are measured: outputs (every layer except the class scores and what follows them),
            activations (rectifiers and other activation functions), convolutions, or a list of layer names.
        precision: of the pass over the photos; auto takes the fastest whose answers agree with float32.

    Raises:
        InputError: a value that is not among these, or no layer.
    """

    layers: Layers = "outputs"
    precision: Precision = "auto"


@dataclass(frozen=True)
class FeatureIndex:
    """Which layer and channel each entry of a descriptor is.

    Raises:
        InputError: lists of different lengths, repeated layers, or a layer without channels.

    Example:
        >>> index = FeatureIndex(("conv1", "relu1"), (3, 3))
        >>> index.size, index.feature("relu1", 2), index.place(5), index.rows("relu1")
        (6, 5, ('relu1', 2), slice(3, 6, None))
    """

    layers: tuple[str, ...]  # names of the layers, in execution order
    channels: tuple[int, ...]  # how many channels each has

    def __post_init__(self) -> None:
        if len(self.layers) != len(self.channels) or not self.layers:
            got = f"{len(self.layers)} layers and {len(self.channels)} numbers"
            rule = "one number of channels for each of at least one layer"
            raise InputError(expected(rule, got, "Give both in the same order"))
        if len(set(self.layers)) != len(self.layers):
            twice = sorted({name for name in self.layers if self.layers.count(name) > 1})
            raise InputError(expected("each layer once", listed(twice), "Name every layer once"))
        if min(self.channels) < 1:
            raise InputError(expected("at least 1 channel in each layer", min(self.channels), "Drop the layer"))

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
            remedy = f"Nearest: {', '.join(nearest(layer, self.layers))}"
            raise LayerError(expected("a layer of the descriptor", layer, remedy))
        return self._number[layer]

    def rows(self, layer: str) -> slice:
        """Return the positions of the features of a layer."""
        number = self._layer(layer)
        return slice(self._starts[number], self._starts[number + 1])

    def feature(self, layer: str, channel: int) -> int:
        """Return the number of a feature."""
        number = self._layer(layer)
        if not 0 <= channel < self.channels[number]:
            rule = f"a channel of {layer} from 0 to {self.channels[number] - 1}"
            raise InputError(expected(rule, channel, "Count from 0"))
        return self._starts[number] + int(channel)

    def place(self, feature: int) -> tuple[str, int]:
        """Return layer and channel of a feature: the inverse of `feature`."""
        if not 0 <= feature < self.size:
            raise InputError(expected(f"a feature from 0 to {self.size - 1}", feature, "Count from 0"))
        number = bisect_right(self._starts, feature) - 1
        return self.layers[number], int(feature) - self._starts[number]


class SelectionConfig(Settings):
    """Everything that a selection depends on, with its network and photos.

    Attributes:
        split: photos to fit on.
        mu: bound on the sum of the absolute weights of a class; ``auto``: chosen by held-out folds.
        labels: whether the classes are the categories of the photos or the predictions of the network.
        nonnegative: whether weights are at least 0.
        descriptor: which layers are measured and how.
        top_photos: photos averaged in the picture of a filter.
        pictures: most filters that get pictures.
        seed: of the shuffled labels and the random crops.
    """

    split: str
    mu: Bound
    labels: Literal["data", "predictions"]
    nonnegative: bool
    descriptor: DescriptorConfig
    top_photos: Annotated[int, Field(ge=1)]
    pictures: Annotated[int, Field(ge=0)]
    seed: int

    @property
    def ranks(self) -> int:
        """How many photos are kept per filter: those of its picture and those that are named."""
        return max(self.top_photos, NAMED_PHOTOS)


class FilterPicture(Value):
    """The pictures of one filter, files in the run directory.

    Attributes:
        receptive_field_px: height and width that one cell sees, ``None`` for the whole image.
        average: mean of the crops around the strongest activations.
        control: mean of as many crops of the same photos at random places.
        crops: the strongest crops side by side.
        sharpness: standard deviation of ``average`` over its pixels; ``nan`` where no crop is valid.
        control_sharpness: that of ``control``.
    """

    receptive_field_px: tuple[int, int] | None
    average: str
    control: str
    crops: str
    sharpness: Number
    control_sharpness: Number


class RelevantFilter(Value):
    """One filter with a weight for a class.

    Attributes:
        layer: its layer.
        channel: its position in the layer.
        weight: its entry in the solution of the class.
        share: its part of the absolute weights of the class, 0 to 1.
        strongest: names of the photos that activate it most, best first.
        picture: ``None`` where none was drawn.
    """

    layer: str
    channel: int
    weight: float
    share: float
    strongest: tuple[str, ...]
    picture: FilterPicture | None = None


class SelectedClass(Value):
    """One class and its relevant filters.

    Attributes:
        name: of the class.
        output: its position among the outputs of the network, ``None`` where it is none of them.
        photos: photos of the class that were fitted.
        norm: sum of the absolute weights.
        objective: the squared error that is left.
        relative_gap: upper bound of what is left to gain, as a share of the objective.
        filters: all with a weight, the largest absolute weight first.
    """

    name: str
    output: int | None
    photos: int
    norm: float
    objective: float
    relative_gap: float
    filters: tuple[RelevantFilter, ...]


class SelectionFound(Value):
    """The result of a selection.

    Attributes:
        index: the measured layers.
        weights_sha256: hash of ``selection.safetensors``.
        dead_layers: pairs of a photo and a layer without any activation.
        iterations: of the solver.
        accuracy: of the linear read-out on held-out photos.
        shuffled: the same, fitted to shuffled labels.
        model_accuracy: of the network itself on the same photos.
        classes: in the order of the weights' columns.
        mu: the bound that held-out folds chose, ``None`` where it was given.
        tried: each bound that was tried, and the accuracy of its read-out on held-out folds.
    """

    index: FeatureIndex
    weights_sha256: str
    dead_layers: int
    iterations: int
    accuracy: Estimate
    shuffled: Estimate
    model_accuracy: Estimate
    classes: Annotated[tuple[SelectedClass, ...], Field(min_length=1)]
    mu: float | None = None
    tried: tuple[tuple[float, Number], ...] = ()

    @model_validator(mode="after")
    def _of_measured_layers(self) -> SelectionFound:
        known = {each.layer for one in self.classes for each in one.filters}
        if stray := sorted(known - set(self.index.layers)):
            raise ValueError(f"of filters of the measured layers, not of {listed(stray)}")
        return self

    @property
    def chance(self) -> float:
        """Accuracy of guessing."""
        return 1 / len(self.classes)

    @property
    def mean_filters(self) -> float:
        """Relevant filters of a class, the mean over the classes."""
        return sum(len(one.filters) for one in self.classes) / len(self.classes)

    @property
    def relative_gap(self) -> float:
        """The largest of all classes."""
        return max(one.relative_gap for one in self.classes)

    @property
    def outputs(self) -> tuple[int | None, ...]:
        """The output of each class."""
        return tuple(one.output for one in self.classes)


class SelectionRecord(RunRecord):
    """The file ``selection.json``.

    Attributes:
        config: what the result depends on.
        photos: how many were fitted.
        found: the result, ``None`` until the run is finished.
    """

    FILE = SELECTION
    SCHEMA = "partlens.selection/2"
    AGAIN = "Run partlens select-features again"
    SETTINGS = ("config",)
    RESULTS = (WEIGHTS, "pictures/*.png", "cache-selection/*")

    config: SelectionConfig
    photos: int
    found: SelectionFound | None = None

    def at_bound(self, found: SelectionFound) -> int:
        """Return the number of classes whose weights reach μ."""
        bound = self.bound(found)
        return sum(one.norm >= bound * (1 - 1e-9) for one in found.classes)

    def bound(self, found: SelectionFound) -> float:
        """Return μ, as it was given or chosen."""
        return found.mu or float(self.config.mu)
