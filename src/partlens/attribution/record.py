"""How a prediction is explained and what is written of it, ``explanation.json``; no tensor library is needed."""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from partlens.estimate import Estimate, Number
from partlens.records import PresetSettings, Record, Settings, Value

Preset = Literal["partlens", "paper"]
Style = Literal["glow", "jet"]


class ExplanationConfig(PresetSettings):
    """How a prediction is explained; the defaults of the fields are those of the authors' code.

    Attributes:
        features: relevant features shown per class, those with the largest contribution (authors: 3).
        rule: of rectifiers in the backward pass, ``guided``, ``deconvnet`` or ``gradient``.
        fix_strides: resample the signal in strided convolutions: true or nearest as the authors do, aligned without
            the shift of half a stride, false not at all.
        pooling: ``route`` (authors), ``overwrite`` or ``resample``; see
            :func:`partlens.attribution.backprop.guided_backprop`.
        smooth_frac: standard deviation of a Gaussian that smooths the maps before they are scaled, as a share of the
            input's shorter side; 0 in the paper.
    """

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        # The changes won the flower benchmark.
        "partlens": {"fix_strides": "aligned", "pooling": "resample", "smooth_frac": 0.05},
        "paper": {},
    }

    features: Annotated[int, Field(ge=1)] = 3
    rule: Literal["guided", "deconvnet", "gradient"] = "guided"
    fix_strides: bool | Literal["nearest", "aligned"] = True
    pooling: Literal["route", "overwrite", "resample"] = "route"
    smooth_frac: Annotated[float, Field(ge=0, le=0.5)] = 0.0


_REFERENCE_SIDE_PX = 224


class OcclusionConfig(Settings):
    """How photos are covered to find what a filter reads; the defaults are those of the released code at 224 px.

    Attributes:
        occluder_px: side of the square that covers a piece.
        stride_px: step between its places. The places lie inside the image: ``ceil((H - occluder_px + 1) /
            stride_px)`` along each axis, 22 x 22 = 484 at 224 px.
        strongest: places used per photo and filter, those that lower the filter's response most.
        images: photos used per filter, those on which it responds most (the code draws them at random among the
            photos whose peak reaches the threshold).
        smoothing_px: side of the Gaussian window, 0 for none.
        smoothing_sigma_px: its standard deviation.
    """

    occluder_px: Annotated[int, Field(ge=1)] = 33
    stride_px: Annotated[int, Field(ge=1)] = 9
    strongest: Annotated[int, Field(ge=1)] = 4
    images: Annotated[int, Field(ge=1)] = 10
    smoothing_px: Annotated[int, Field(ge=0)] = 50
    smoothing_sigma_px: Annotated[float, Field(gt=0)] = 30.0

    def scaled(self, size_px: tuple[int, int]) -> OcclusionConfig:
        """Return the same settings for inputs of another size: the lengths are meant for 224 px.

        Example:
            >>> small = OcclusionConfig().scaled((64, 64))
            >>> small.occluder_px, small.stride_px, small.smoothing_px
            (9, 3, 14)
        """
        factor = min(size_px) / _REFERENCE_SIDE_PX
        lengths = {name: max(1, round(getattr(self, name) * factor)) for name in ("occluder_px", "stride_px")}
        sigma = max(self.smoothing_sigma_px * factor, 0.5)
        return self.changed({**lengths, "smoothing_px": round(self.smoothing_px * factor), "smoothing_sigma_px": sigma})


class Answer(Value):
    """One of the performer's strongest outputs.

    Attributes:
        name: of the class.
        output: its position.
        probability: as the network gives it, or the softmax of its scores; of a single output the logistic function.
    """

    name: str
    output: int
    probability: float


class Contribution(Value):
    """What one relevant filter adds to the score of a class.

    Attributes:
        layer: its layer.
        channel: its position in the layer.
        weight: of the filter for the class.
        response: its entry in the descriptor of the image.
        contribution: weight times response.
        share: its part of all positive contributions to the class, 0 to 1.
        overlay: file that shows where it acts.
        average: file that shows what activates it in the training photos, ``None`` where none was drawn.
    """

    layer: str
    channel: int
    weight: float
    response: float
    contribution: float
    share: float
    overlay: str
    average: str | None


class ExplainedClass(Value):
    """One class that was explained by its relevant filters.

    Attributes:
        name: of the class.
        output: its position among the performer's outputs, ``None`` where it is none of them.
        probability: the performer's; ``nan`` where the class is no output.
        rank: 1 for the predicted class, ``None`` where the class is no output.
        score: ``w . x`` over all its filters.
        combined: file with all filters together, over the image.
        heat: file with the same map alone.
        filters: those with the largest contributions, the largest first.
        rank_correlation: with the map of the first class, Spearman's; ``nan`` for the first one.
        difference: file with the map less that of the first class, where the two are nearly the same; else empty.
    """

    name: str
    output: int | None
    probability: Number
    rank: int | None
    score: float
    combined: str
    heat: str
    filters: tuple[Contribution, ...]
    rank_correlation: Number = math.nan
    difference: str = ""


class PartShare(Value):
    """What one part adds to the score of a class.

    Attributes:
        name: of the part.
        filters: how many it has.
        share: of what all parts add (Shapley); ``nan`` where together they add nothing.
        share_of_score: of the rise of the score; ``nan`` where it does not rise.
        shapley: in units of the score.
        standard_error: of it; 0 where it is exact.
        gradient_activation: what it adds by gradient times activation.
        integrated_share: of what all parts add by integrated gradients.
        null: the same share of as many filters drawn at random.
        removal: fall of the score without the part.
        heat: file that shows where the contribution comes from.
        top_filters: those that add or take most by integrated gradients.
    """

    name: str
    filters: int
    share: Number
    share_of_score: Number
    shapley: float
    standard_error: float
    gradient_activation: float
    integrated_share: Number
    null: Estimate
    removal: float
    heat: str
    top_filters: tuple[int, ...]


class ExplainedByParts(Value):
    """One class whose score is shared among parts.

    Attributes:
        name: of the class.
        output: its position among the performer's outputs.
        probability: the performer's.
        rank: 1 for the predicted class.
        performer_score: the score in the performer.
        fed_back: with the explainer's reconstruction in the layer's place.
        baseline: with both tracks silent.
        same_answer: whether the reconstruction keeps the performer's answer.
        method: how the Shapley values were made.
        interpretable_share: share of the rise that the parts add together; ``nan`` where the score does not rise.
        ordinary: Shapley value of the ordinary track.
        ordinary_share: its share of the rise; ``nan`` likewise.
        parts: in the order of ``parts.json``.
        headline: what each part adds, in words.
    """

    name: str
    output: int
    probability: float
    rank: int
    performer_score: float
    fed_back: float
    baseline: float
    same_answer: bool
    method: str
    interpretable_share: Number
    ordinary: float
    ordinary_share: Number
    parts: tuple[PartShare, ...]
    headline: str


class WindowPart(Value):
    """What the window of one part carries of the performer's own score.

    Attributes:
        name: of the part.
        share: Shapley value, of what there is to keep; ``nan`` where nothing scores as much.
        standard_error: of it; 0 where it is exact.
        loss: of the score when the window alone is taken away, as a share likewise.
    """

    name: str
    share: Number
    standard_error: Number
    loss: Number


class ExplainedByWindows(Value):
    """The predicted class, its score shared among the parts that an inspection found and everything elsewhere.

    Attributes:
        category: of the inspection; empty where all photos are one.
        name: of the class.
        output: its position among the performer's outputs.
        probability: the performer's.
        parts: those that carry most of the category first.
        elsewhere: share of everything outside their windows.
        picture: file with the windows lit.
        verdict: what the network knows the category by.
        headline: the shares in words.
    """

    category: str
    name: str
    output: int
    probability: float
    parts: tuple[WindowPart, ...]
    elsewhere: Number
    picture: str
    verdict: str
    headline: str


class ExplanationRecord(Record):
    """The file ``explanation.json`` of one image.

    Attributes:
        image: its name.
        path: where it was read from.
        content: equal for the same image under another path.
        size_px: its width and height.
        method: how relevant filters were explained, ``None`` for a run without a selection.
        performer: the network's name.
        weights_sha256: hash of its weights.
        selection: identity of the selection, ``None`` for a run without one.
        answers: the network's strongest outputs.
        explained: classes that were explained by filters, the most likely first.
        parts: classes whose score is shared among parts.
        notes: what a reader has to know.
        windows: the predicted class by the parts of an inspection, on the performer itself; empty without one.
        unselected: the predicted class where it has no photos in the selection, else empty.
    """

    FILE = "explanation.json"
    SCHEMA = "partlens.explanation/4"
    AGAIN = "Run partlens explain again"

    image: str
    path: str
    content: str
    size_px: tuple[int, int]
    method: ExplanationConfig | None
    performer: str
    weights_sha256: str
    selection: str | None
    answers: tuple[Answer, ...]
    explained: tuple[ExplainedClass, ...]
    parts: tuple[ExplainedByParts, ...]
    notes: tuple[str, ...]
    windows: tuple[ExplainedByWindows, ...] = ()
    unselected: str = ""
