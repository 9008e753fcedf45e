"""The parts behind one prediction: what the verb explain says and draws of an explainer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from partlens.attribution.pictures import overlay, save_png
from partlens.attribution.record import ExplainedByParts, PartShare, StrongFilter
from partlens.errors import InputError, expected, nearest
from partlens.estimate import Estimate
from partlens.evaluation.fidelity import class_outputs
from partlens.explainer.assembly import performer_head
from partlens.explainer.network import Explainer
from partlens.network.receptive_field import grid_of
from partlens.network.taps import forward_taps
from partlens.network.zoo import Performer
from partlens.object_parts.assignment import PartsConfig, upsampled
from partlens.verbs.fit_explainer import load_explainer
from partlens.verbs.part_shares import PartShares, part_labels, part_shares
from partlens.verbs.parts_file import PARTS, NamedPart, named_parts, read_parts
from partlens.verbs.select_features import output_name

if TYPE_CHECKING:
    from PIL import Image

TOP_FILTERS = 5
_WHOLE_TRACK = "all filters"


@dataclass(frozen=True)
class OpenedParts:
    """An explainer read back, with the parts of its filters.

    Attributes:
        path: the run directory.
        explainer: in eval mode.
        performer: the network it explains.
        head: the performer from the last target on.
        parts: what counts as one part; all filters together where the run has no ``parts.json``.
        config: how contributions are measured.
        notes: what a reader has to know.
    """

    path: Path
    explainer: Explainer
    performer: Performer
    head: nn.Module
    parts: tuple[NamedPart, ...]
    config: PartsConfig
    notes: tuple[str, ...]


@dataclass(frozen=True)
class ExplainedParts:
    """The parts of some images of a batch.

    Attributes:
        classes: the explained outputs (image, explained class).
        outputs: the performer's outputs (image, class).
        shares: ``shares[i][k]`` of the k-th explained class of image i; a batch of that image alone.
        heat: ``heat[i][k, p]`` of part p, at the input's size.
    """

    classes: Tensor
    outputs: Tensor
    shares: tuple[tuple[PartShares, ...], ...]
    heat: tuple[Tensor, ...]


def load_parts(run: str | Path, model: str | nn.Module | Performer | None = None) -> OpenedParts:
    """Open the explainer of a run and the parts of its filters.

    Raises:
        RunError: the explainer is unfinished, the performer another one, or ``parts.json`` was edited wrongly.
    """
    run = Path(run)
    explainer, performer = load_explainer(run, model)
    count = explainer.structure.channels_out
    config, notes = PartsConfig(), []
    if (run / PARTS).exists():
        content = read_parts(run / PARTS)
        parts = named_parts(content)
        stored = content.get("config")
        if isinstance(stored, Mapping):  # one prediction is measured as all were
            config = PartsConfig(**{k: v for k, v in stored.items() if k in PartsConfig.__dataclass_fields__})
    else:
        parts = (NamedPart(_WHOLE_TRACK, (), tuple(range(count))),)
        notes.append(f"the filters have no parts yet: partlens parts {run.name} finds them, then explain again")
    head = performer_head(performer, explainer.structure)
    return OpenedParts(run, explainer, performer, head, parts, config, tuple(notes))


def output_called(performer: Performer, outputs: int, name: str) -> int:
    """Return the performer's output with a name or number.

    Raises:
        InputError: it has none of that name.
    """
    names = [output_name(performer, k) for k in range(outputs)]
    if name in names:
        return names.index(name)
    if name.isdigit() and int(name) < outputs:
        return int(name)
    rule = f"a class of {performer.name}"
    raise InputError(expected(rule, name, f"Nearest: {', '.join(nearest(name, names))}"))


def output_count(opened: OpenedParts) -> int:
    """Return how many outputs the performer has."""
    structure = opened.explainer.structure
    blank = torch.zeros(1, structure.channels_in, *structure.side_cells)
    with torch.no_grad():
        return int(opened.head(opened.explainer(blank).reconstructions[-1])[0].shape[1])


def probabilities(outputs: Tensor) -> Tensor:
    """Return probabilities of outputs (image, class): softmax, or the logistic function for a single output."""
    values = outputs.double()
    return values.sigmoid() if values.shape[1] == 1 else values.softmax(1)


def answer_ranks(chance: Float[Tensor, " output"]) -> dict[int, int]:
    """Return the rank of each output of one image, 1 for the most probable.

    A single output is one of two answers: below a half the other one, "something else", comes first.

    Example:
        >>> answer_ranks(torch.tensor([0.2, 0.8])), answer_ranks(torch.tensor([0.2]))
        ({1: 1, 0: 2}, {0: 2})
    """
    behind = int(len(chance) == 1 and float(chance[0]) < 0.5)
    order = chance.argsort(descending=True, stable=True).tolist()
    return {output: place + behind for place, output in enumerate(order, 1)}


def explain_parts(
    opened: OpenedParts, batch: Tensor, classes: Sequence[str] | None, rows: Sequence[int] | None = None
) -> ExplainedParts:
    """Measure what each part adds to the score of the predicted class, or of named ones, on images of a batch.

    Args:
        opened: the explainer and its parts.
        batch: images.
        classes: names; by default the predicted class.
        rows: positions in the batch of the images to measure, by default all.
    """
    structure = opened.explainer.structure
    _, taps = forward_taps(opened.performer, batch, [structure.tap, structure.targets[-1]])
    with torch.no_grad():
        outputs = opened.head(taps[structure.targets[-1]].cpu())[0]
    if classes is None:
        wanted = outputs.argmax(1)[:, None]
    else:
        named = [output_called(opened.performer, outputs.shape[1], name) for name in classes]
        wanted = torch.tensor([named] * len(outputs))
    part_of = part_labels(opened.parts, structure.channels_out)
    chosen = list(range(len(outputs)) if rows is None else rows)
    outputs, wanted, maps = outputs[chosen], wanted[chosen], taps[structure.tap].cpu()[chosen]
    # Image by image: the integral stops where its remainder is small, which must not depend on the other images.
    shares = tuple(
        tuple(
            part_shares(
                opened.explainer,
                opened.head,
                maps[i : i + 1],
                wanted[i, k : k + 1],
                part_of,
                len(opened.parts),
                opened.config,
            )
            for k in range(wanted.shape[1])
        )
        for i in range(len(maps))
    )
    start, stride = grid_of(opened.performer.field(structure.tap))
    size = opened.performer.preprocessing.size_px
    heat = tuple(upsampled(torch.cat([s.heat for s in of_image]), start, stride, size) for of_image in shares)
    return ExplainedParts(wanted, outputs, shares, heat)


def _percentages(values: Tensor, whole: float) -> list[float]:
    """Return shares of a whole; NaN where the whole is not positive, since a share would then mean nothing."""
    return [float(v) / whole if whole > 0 else math.nan for v in values]


def part_records(
    opened: OpenedParts, found: ExplainedParts, i: int, folder: Path, shown: Image.Image, style: Literal["glow", "jet"]
) -> tuple[ExplainedByParts, ...]:
    """Write one image's heat maps and return what its record says of parts, a class each."""
    chance = probabilities(found.outputs)[i]
    ranks = answer_ranks(chance)
    records = []
    for k, shares in enumerate(found.shares[i]):
        output, rise = int(found.classes[i, k]), float(shares.score[0] - shares.baseline[0])
        ordinary, added = float(shares.ordinary[0]), float(shares.shapley[0].sum())
        kept = class_outputs(shares.fed_outputs[:1]).argmax() == class_outputs(found.outputs[i : i + 1]).argmax()
        records.append(
            ExplainedByParts(
                name=output_name(opened.performer, output),
                output=output,
                probability=float(chance[output]),
                rank=ranks[output],
                performer_score=float(found.outputs[i, output]),
                fed_back=float(shares.score[0]),
                baseline=float(shares.baseline[0]),
                same_answer=bool(kept),
                method=shares.method,
                interpretable_share=added / rise if rise > 0 else math.nan,
                ordinary=ordinary,
                ordinary_standard_error=float(shares.ordinary_standard_error[0]),
                ordinary_share=ordinary / rise if rise > 0 else math.nan,
                ordinary_integrated=float(shares.integrated_ordinary[0]),
                remainder=rise - added - ordinary,
                integrated_remainder=float(shares.remainder[0]),
                parts=_part_shares(opened, shares, found.heat[i][k], f"part-{k + 1}", folder, shown, style),
                headline=headline([part.name for part in opened.parts], shares.shapley[0].tolist()),
            )
        )
    return tuple(records)


def _part_shares(
    opened: OpenedParts,
    shares: PartShares,
    heat: Tensor,
    name: str,
    folder: Path,
    shown: Image.Image,
    style: Literal["glow", "jet"],
) -> tuple[PartShare, ...]:
    """Draw the parts of one class of one image and return what each adds."""
    rise, integrated = float(shares.score[0] - shares.baseline[0]), float(shares.integrated[0].sum())
    of_parts = _percentages(shares.shapley[0], float(shares.shapley[0].sum()))
    of_score, of_integrated = _percentages(shares.shapley[0], rise), _percentages(shares.integrated[0], integrated)
    null = shares.random[:, 0].double() / integrated
    ends = torch.quantile(null, torch.tensor([0.025, 0.975], dtype=torch.float64), dim=0)
    known = integrated > 0 and len(opened.parts) > 1
    rows = []
    for p, part in enumerate(opened.parts):
        # A part that speaks against the class is drawn where it does so.
        signed = heat[p] if float(shares.integrated[0, p]) >= 0 else -heat[p]
        top, file = float(signed.max()), f"{name}-{p + 1}.png"
        save_png(folder / file, overlay(shown, (signed.clamp(min=0) / top if top > 0 else 0 * signed).numpy(), style))
        own = shares.filters[0, list(part.filters)]
        strongest = own.abs().argsort(descending=True, stable=True)[:TOP_FILTERS].tolist()
        drawn = Estimate(float(null[:, p].mean()), (float(ends[0, p]), float(ends[1, p])), len(null), "draws")
        rows.append(
            PartShare(
                name=part.name,
                filters=len(part.filters),
                share=of_parts[p],
                share_of_score=of_score[p],
                shapley=float(shares.shapley[0, p]),
                standard_error=float(shares.standard_error[0, p]),
                integrated_gradients=float(shares.integrated[0, p]),
                integrated_share=of_integrated[p],
                null=drawn if known else Estimate.undefined("draws"),
                gradient_activation=float(shares.gradient_activation[0, p]),
                removal=float(shares.removal[0, p]),
                heat=file,
                top_filters=tuple(
                    StrongFilter(filter=part.filters[f], integrated_gradients=float(own[f])) for f in strongest
                ),
            )
        )
    return tuple(rows)


def headline(names: Sequence[str], values: Sequence[float]) -> str:
    """Say what each part adds, as the papers' figure does: as a share of what all of them add.

    Where parts pull against each other so far that their sum is less than half of what they add and take, a share of
    the sum would mean nothing; the values themselves are said then.

    Args:
        names: of the parts.
        values: Shapley values, in units of the score.

    Example:
        >>> headline(["head", "neck"], [0.128, 0.872])
        'head 12.8 %, neck 87.2 %'
        >>> headline(["head", "neck"], [0.5, -0.4])
        'head +0.50, neck −0.40 of the score (they pull against each other, so shares would mean nothing)'
    """
    total = sum(values)
    if total > 0.5 * sum(map(abs, values)):
        shares = [f"{name} {100 * value / total + 0.0:.1f} %" for name, value in zip(names, values, strict=True)]
        return ", ".join(shares).replace("-0.0 %", "0.0 %").replace(" -", " −")
    said = ", ".join(f"{name} {value:+.2f}" for name, value in zip(names, values, strict=True)).replace(" -", " −")
    return f"{said} of the score (they pull against each other, so shares would mean nothing)"


def part_tensors(found: ExplainedParts, i: int) -> dict[str, Tensor]:
    """Return one image's arrays for ``arrays.safetensors``."""
    return {
        "part_classes": found.classes[i],
        "part_heat": found.heat[i],
        "part_shapley": torch.cat([s.shapley for s in found.shares[i]]),
        "part_integrated": torch.cat([s.integrated for s in found.shares[i]]),
        "part_filters": torch.cat([s.filters for s in found.shares[i]]),
    }
