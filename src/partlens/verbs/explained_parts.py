"""The parts behind one prediction: what the verb explain says and draws of an explainer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor, nn

from partlens.attribution.pictures import overlay, save_picture
from partlens.attribution.record import ExplainedByParts, PartShare, Style
from partlens.errors import RunError, expected
from partlens.estimate import Estimate, percentile_interval
from partlens.explainer.network import Explainer, performer_head
from partlens.metrics.faithfulness import class_outputs
from partlens.network.performer import Performer
from partlens.network.receptive_field import grid_of
from partlens.network.taps import forward_taps
from partlens.object_parts.assignment import upsampled
from partlens.object_parts.record import NamedPart, PartsFile
from partlens.object_parts.shares import PartShares, part_shares
from partlens.verbs.fit_explainer import load_explainer

_TOP_FILTERS = 5


@dataclass(frozen=True)
class OpenedParts:
    """An explainer read back, with the parts of its filters."""

    explainer: Explainer  # in eval mode
    performer: Performer  # the network it explains
    head: nn.Module  # the performer from the last target on
    file: PartsFile  # of the parts


@dataclass(frozen=True)
class ExplainedParts:
    """The parts of some images of a batch."""

    classes: Int[Tensor, "image explained"]  # the explained outputs
    outputs: Float[Tensor, "image class"]  # the performer's outputs
    # shares[i][k] of the k-th explained class of image i; a batch of that image alone
    shares: tuple[tuple[PartShares, ...], ...]
    heat: tuple[Float[Tensor, "explained part row col"], ...]  # heat[i][k, p] of part p, at the input's size


def load_parts(run: Path, model: str | nn.Module | Performer | None = None) -> OpenedParts:
    """Open the explainer of a run and the parts of its filters.

    Raises:
        RunError: the explainer is unfinished, the performer another one, or ``parts.json`` is missing or wrong.
    """
    if not (run / PartsFile.FILE).exists():
        rule, remedy = f"{PartsFile.FILE} in {run}", f"Run partlens parts {run} first, then explain again"
        raise RunError(expected(rule, "nothing there", remedy))
    file = PartsFile.read(run)
    explainer, performer = load_explainer(run, model)
    return OpenedParts(explainer, performer, performer_head(performer, explainer.structure), file)


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
    """Measure what each part adds to the score of the predicted class, or of named ones, on images of a batch."""
    structure = opened.explainer.structure
    _, taps = forward_taps(opened.performer, batch, [structure.read, structure.targets[-1]])
    with torch.no_grad():
        outputs = opened.head(taps[structure.targets[-1]])[0].cpu()
    chosen = list(range(len(outputs)) if rows is None else rows)
    outputs, maps = outputs[chosen], taps[structure.read].cpu()[chosen]
    wanted = outputs.argmax(1)[:, None]
    if classes is not None:
        named = [opened.performer.output(name) for name in classes]
        wanted = torch.tensor([named] * len(outputs))
    parts, seed = opened.file.named, opened.file.config.seed
    shares = tuple(
        tuple(part_shares(opened.explainer, opened.head, maps[i : i + 1], one[None], parts, seed) for one in wanted[i])
        for i in range(len(maps))
    )
    start, stride = grid_of(opened.performer.field(structure.tap))
    size = opened.performer.preprocessing.size_px
    heat = tuple(upsampled(torch.cat([s.heat for s in of_image]), start, stride, size) for of_image in shares)
    return ExplainedParts(wanted, outputs, shares, heat)


def part_records(
    opened: OpenedParts, found: ExplainedParts, i: int, folder: Path, shown: Image.Image, style: Style
) -> tuple[ExplainedByParts, ...]:
    """Write one image's heat maps and return what its record says of parts, a class each."""
    chance = opened.performer.outputs.probabilities(found.outputs)[i]
    ranks, names, records = answer_ranks(chance), opened.file.named, []
    own = class_outputs(found.outputs[i : i + 1]).argmax()
    for k, shares in enumerate(found.shares[i]):
        each, output = shares.shapley, int(found.classes[i, k])
        *parts, ordinary = each.players[0].tolist()
        added, rise = sum(parts), float(shares.rise[0])
        files = [f"part-{k + 1}-{p + 1}.png" for p in range(len(names))]
        for p, file in enumerate(files):
            # A part that speaks against the class is drawn where it does so.
            signed = found.heat[i][k, p] if float(shares.integrated[0, p]) >= 0 else -found.heat[i][k, p]
            top = float(signed.max())
            lit = signed.clamp(min=0) / top if top > 0 else 0 * signed
            save_picture(folder / file, overlay(shown, lit.numpy(), style))
        records.append(
            ExplainedByParts(
                name=opened.performer.output_name(output),
                output=output,
                probability=float(chance[output]),
                rank=ranks[output],
                performer_score=float(found.outputs[i, output]),
                fed_back=float(each.everyone[0]),
                baseline=float(each.nobody[0]),
                same_answer=bool(class_outputs(shares.fed_outputs[:1]).argmax() == own),
                method=shares.method,
                interpretable_share=_share(added, rise),
                ordinary=ordinary,
                ordinary_share=_share(ordinary, rise),
                parts=tuple(_of_part(part, p, shares, files[p]) for p, part in enumerate(names)),
                headline=headline([part.name for part in names], parts),
            )
        )
    return tuple(records)


def _share(value: float, whole: float) -> float:
    """Return a share of a whole; NaN where the whole is not positive, since a share would then mean nothing."""
    return value / whole if whole > 0 else math.nan


def _of_part(part: NamedPart, p: int, shares: PartShares, file: str) -> PartShare:
    own = shares.filters[0, list(part.filters)]
    strongest = own.abs().argsort(descending=True, stable=True)[:_TOP_FILTERS].tolist()
    shapley, integrated = float(shares.shapley.players[0, p]), float(shares.integrated[0, p])
    whole, null = float(shares.integrated[0].sum()), Estimate.undefined("draws")
    if whole > 0 and shares.integrated.shape[1] > 1:
        drawn = shares.random[0, :, p].double() / whole
        null = Estimate(float(drawn.mean()), percentile_interval(drawn.tolist()), len(drawn), "draws")
    return PartShare(
        name=part.name,
        filters=len(part.filters),
        share=_share(shapley, float(shares.shapley.players[0, :-1].sum())),
        share_of_score=_share(shapley, float(shares.rise[0])),
        shapley=shapley,
        standard_error=float(shares.shapley.standard_error[0, p]),
        gradient_activation=float(shares.gradient_activation[0, p]),
        integrated_share=_share(integrated, whole),
        null=null,
        removal=float(shares.shapley.loss[0, p]),
        heat=file,
        top_filters=tuple(part.filters[f] for f in strongest),
    )


def headline(names: Sequence[str], values: Sequence[float]) -> str:
    """Say what each part adds, as the papers' figure does: as a share of what all of them add.

    Where parts pull against each other so far that their sum is less than half of what they add and take, a share of
    the sum would mean nothing; the values themselves are said then.

    Example:
        >>> headline(["head", "neck"], [0.128, 0.872])
        'head: 12.8 %, neck: 87.2 %'
        >>> headline(["head", "neck"], [0.5, -0.4])
        'head: +0.50, neck: −0.40 of the score (some raise and some lower it: shares of their sum would say nothing)'
    """
    total = sum(values)
    if total > 0.5 * sum(map(abs, values)):
        shares = [f"{name}: {100 * value / total + 0.0:.1f} %" for name, value in zip(names, values, strict=True)]
        return ", ".join(shares).replace("-0.0 %", "0.0 %").replace(" -", " −")
    said = ", ".join(f"{name}: {value:+.2f}" for name, value in zip(names, values, strict=True)).replace(" -", " −")
    return f"{said} of the score (some raise and some lower it: shares of their sum would say nothing)"


def part_tensors(found: ExplainedParts, i: int) -> dict[str, Tensor]:
    """Return one image's arrays for ``arrays.safetensors``."""
    return {
        "part_classes": found.classes[i],
        "part_heat": found.heat[i],
        "part_shapley": torch.cat([s.shapley.players[:, :-1] for s in found.shares[i]]),
        "part_filters": torch.cat([s.filters for s in found.shares[i]]),
    }
