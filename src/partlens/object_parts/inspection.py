"""The file ``inspect.json``: the parts of each category, what they carry on the performer itself, and the verdict."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from partlens.errors import InputError, expected
from partlens.estimate import Estimate, Number
from partlens.records import Record, Settings, Value
from partlens.run import INSPECTION, Precision, RunRecord
from partlens.selection.record import Bound

TENSORS = "inspect.safetensors"

Fill = Literal["auto", "zero", "mean"]
VerdictName = Literal["parts", "texture", "elsewhere", "undecided"]
Numbers = tuple[Number, ...]


class FindingConfig(Settings):
    """How the parts of a category are found.

    Attributes:
        parts_min: fewest parts of a category.
        parts_max: most parts of a category.
        variety: what a part pays for moving like the parts already chosen.
    """

    LEAST_PHOTOS: ClassVar[int] = 4  # of a category

    parts_min: int = Field(default=2, ge=1)
    parts_max: int = Field(default=8, ge=1)
    variety: float = Field(default=0.7, ge=0)

    @model_validator(mode="after")
    def _checked(self) -> Self:
        if self.parts_min > self.parts_max:
            got = f"{self.parts_min} and {self.parts_max}"
            raise InputError(expected("parts_min <= parts_max", got, "Correct them"))
        return self


class InspectConfig(FindingConfig):
    """How a network is inspected.

    Attributes:
        views: views of each photo that parts are found on: the photo, its mirror, then crops.
        photos: most photos of a category that its parts are found on.
        measured: most held-out photos of a category on which regions are measured.
        background: most photos of other categories, where only some are inspected.
        fill: what cells outside windows are set to: ``zero``, the ``mean`` map of the photos, or ``auto``: zero where
            the tap has no negative values, else the mean.
        seed: of every draw.
        precision: of passes over photos; ``auto`` takes the fastest whose answers agree with float32.
    """

    views: int = Field(3, ge=2)
    photos: int = Field(200, ge=FindingConfig.LEAST_PHOTOS)
    measured: int = Field(48, ge=1)
    background: int = Field(400, ge=0)
    fill: Fill = "auto"
    seed: int = 0
    precision: Precision = "auto"

    @property
    def finding(self) -> FindingConfig:
        """How parts are found."""
        return FindingConfig(**{name: getattr(self, name) for name in FindingConfig.model_fields})


class InspectedPart(Value):
    """One part of a category.

    Attributes:
        id: ``part-1`` and so on, those that carry most first.
        name: a landmark's where annotations say so, else the id, until a person gives another.
        share: of the score: its Shapley value over what there is to keep, the mean over photos.
        share_interval: of the mean, 95 %.
        loss: of the score when its window alone is taken away, the mean over photos.
        alone: median kept score of a window of a tenth of the image at it alone, over the first 24 of the photos.
        movement: error of moving with crops and mirrors over the variance of its place; lower is better.
        stability: likeness, 0 to 1, to the part found in half of the photos.
        place: its mean place (row, col), as shares of the sides.
        spread: standard deviation of its place over photos, in shares of the sides.
        on_object: share of its places on the object, where masks or boxes say where that is.
        gallery: pictures of some photos around it, a file in the run directory.
    """

    id: str
    name: str
    share: Number
    share_interval: tuple[Number, Number]
    loss: Number
    alone: Number
    movement: Number
    stability: Number
    place: tuple[Number, Number]
    spread: Number
    on_object: Number
    gallery: str


class Comparison(Value):
    """A measure of what is more than chance, such as the advantage of some windows over others, and its chance level.

    Attributes:
        advantage: of windows the mean over areas.
        threshold: the 95 % quantile when the two curves of each photo are exchanged at random, or photos shuffled.
    """

    advantage: Number
    threshold: Number

    @property
    def counts(self) -> bool:
        """Whether it is more than chance gives."""
        return self.advantage > self.threshold


class InspectedPhoto(Value):
    """One measured photo.

    Attributes:
        image: its name.
        predicted: the class that the network decides for.
        probability: of it.
        shares: Shapley value of each part, then of elsewhere, as shares of what there is to keep.
        standard_error: of them; 0 where they are exact.
        losses: what is lost when each part, then elsewhere, is taken away.
        kept: by the windows at the parts, at a third of the image or so.
        kept_other: by the same windows of other photos.
        places: of the parts (row, col), as shares of the sides.
        picture: the photo with its parts, a file in the run directory; empty where none was drawn.
    """

    image: str
    predicted: str
    probability: Number
    shares: Numbers
    standard_error: Numbers
    losses: Numbers
    kept: Number
    kept_other: Number
    places: tuple[tuple[Number, Number], ...]
    picture: str = ""


class DecidedClass(Value):
    """A class that the network decides for on photos of a category.

    Attributes:
        name: of the output.
        output: its number; 1 is the no of a single output.
        share: of the photos.
    """

    name: str
    output: int
    share: float


class InspectedCategory(Value):
    """One category.

    Attributes:
        name: of the category, empty where all photos are one.
        verdict: what the network knows it by.
        sentence: the verdict with its numbers and n.
        reason: what of the rule made the verdict; empty for plain parts or texture.
        advantage: of the parts over the best kind for comparison, the mean over areas from 0.1 to 0.4.
        best_null: that kind.
        against: each kind for comparison with its threshold.
        kept: what windows of each kind keep of the score at each ``area``, a share of the image; the median over
            photos. Kinds: ``parts``, windows at the parts; ``other_photos``, the same laid on other photos;
            ``random`` places; one in the ``centre``; ``rest``, everything outside those at the parts; ``ceiling``, the
            best single one of each photo, among nine; where annotations say so, at ``annotated`` parts, ``object``,
            at the best of nine places on it, and ``off_object``, at random beside it.
        decisions: kept decisions, the same curves.
        windows: at how many parts the windows of each area stand.
        parts: those that the photos support or windows stand at, one at a place; those that carry most first.
        elsewhere: Shapley share of everything outside the parts' windows, with its interval.
        correlation: of the places of two parts that the photos support, the mean; lower is more variety.
        photos: that parts were found on.
        measured: photos that regions were measured on.
        shared: photos whose score was shared among the parts.
        undefined: measured photos on which nothing scores as much as the whole photo; they are not counted.
        held_out: whether the measured photos are other ones than those that parts were found on.
        decided: the classes that the network decides for most often on its photos.
        told: bits that the network's decision says about being of the category, on all photos that were read, and the
            95 % quantile when these are shuffled; null where no others were read.
        shown: some of the measured photos.
        notes: what could not be done.
    """

    name: str
    verdict: VerdictName
    sentence: str
    reason: str
    advantage: Estimate
    best_null: str
    against: dict[str, Comparison]
    kept: dict[str, Numbers]
    decisions: dict[str, Numbers]
    windows: tuple[int, ...]
    parts: tuple[InspectedPart, ...]
    elsewhere: Estimate
    correlation: Number
    photos: int
    measured: int
    shared: int
    undefined: int
    held_out: bool
    decided: tuple[DecidedClass, ...]
    shown: tuple[InspectedPhoto, ...]
    told: Comparison | None = None
    notes: tuple[str, ...] = ()


class InspectRecord(RunRecord):
    """The file ``inspect.json``.

    Attributes:
        config: what the result depends on.
        split: photos that parts are found on.
        mu: bound of the relevant filters.
        tap: the layer whose cells are set to nothing.
        finding: the layer that parts are found on and, where that one is coarse, the layer that sharpens their places.
        fill: what nothing is at the tap.
        tensors_sha256: hash of ``inspect.safetensors``, which says where parts are in further photos.
        categories: in the order of their names; empty until the run is finished.
        notes: what could not be done.
    """

    FILE = INSPECTION
    SCHEMA = "partlens.inspect/1"
    AGAIN = "Run partlens inspect again"
    SETTINGS = ("config", "split", "mu", "tap", "finding")
    RESULTS = (
        "inspect.safetensors",
        "inspect/*/*",
        "cache-inspect/*/*.np?",
        "cache-inspect/*/rows.json",
        "cache-inspect/*/*/*",
    )

    config: InspectConfig
    split: str
    mu: Bound = "auto"
    tap: str
    finding: tuple[str, ...]
    fill: Literal["", "zero", "mean"] = ""
    tensors_sha256: str = ""
    categories: tuple[InspectedCategory, ...] = ()
    notes: tuple[str, ...] = ()


class CategoryFile(Record):
    """What is kept of a finished category while others are not.

    Attributes:
        found: the category.
    """

    FILE = "category.json"
    SCHEMA = "partlens.inspected-category/1"
    AGAIN = "Delete its folder and run partlens inspect again"

    found: InspectedCategory
