"""The parts behind one prediction on the performer itself: what explain says and draws of an inspection."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from partlens.attribution.record import ExplainedByWindows, WindowPart
from partlens.errors import RunError, expected
from partlens.network.performer import Performer
from partlens.network.taps import forward_taps
from partlens.object_parts.finding import PartFinder
from partlens.object_parts.inspection import TENSORS, InspectedCategory, InspectRecord
from partlens.object_parts.regions import TapMaps, Upper, part_cells, shapley_shares, upper_of, whole_photos
from partlens.object_parts.shapley import Shapley
from partlens.object_parts.verdict import SAID_AREA
from partlens.records import read_tensors
from partlens.run import Run
from partlens.verbs.inspected_category import TAUGHT
from partlens.verbs.inspected_pictures import draw_parts
from partlens.verbs.runs import open_performer

_PAIRS = 32


@dataclass(frozen=True)
class OpenedInspection:
    """A finished inspection with its network, what nothing is at the tap, and what locates each category's parts.

    ``searched`` locates all parts that were chosen, which teach an explainer, also those that are not accounted for.
    """

    record: InspectRecord
    performer: Performer
    upper: Upper
    nothing: Tensor
    finders: Mapping[str, PartFinder]
    searched: Mapping[str, PartFinder]

    def category_of(self, output: int) -> InspectedCategory | None:
        """Return the category on whose photos the network decides most often for an output.

        Photos without categories are one, which any output belongs to.
        """
        known = self.record.categories
        if [one.name for one in known] == [""]:
            return known[0]
        deciding = {each.share: one for one in known[::-1] for each in one.decided if each.output == output}
        return deciding[max(deciding)] if deciding else None


def load_inspection(run: Path, model: str | nn.Module | Performer | None = None) -> OpenedInspection:
    """Open a finished inspection.

    Raises:
        RunError: it is missing, unfinished or damaged, or the performer's weights are not those of the run.
    """
    record = Run(run).read(InspectRecord)
    performer = open_performer(record, model)
    again = f"Restore the file, or delete it and {record.FILE}, then inspect again"
    tensors = read_tensors(run / TENSORS, sha256=record.tensors_sha256, remedy=again)
    finder = [f"{number}.{head}scale" for number in range(len(record.categories)) for head in ("", TAUGHT)]
    if missing := {"nothing", *finder} - {*tensors}:
        raise RunError(expected(f"the tensor {min(missing)} in {run / TENSORS}", f"{len(tensors)} others", again))
    finders, searched = {}, {}
    for number, one in enumerate(record.categories):
        # What was chosen and what was kept have finders of their own: dictionaries are numbered anew in each.
        own = _below(tensors, f"{number}.")
        searched[one.name] = PartFinder.of(_below(own, TAUGHT))
        finders[one.name] = PartFinder.of({n: each for n, each in own.items() if not n.startswith(TAUGHT)})
    return OpenedInspection(record, performer, upper_of(performer, record.tap), tensors["nothing"], finders, searched)


def _below(tensors: Mapping[str, Tensor], head: str) -> dict[str, Tensor]:
    return {name.removeprefix(head): each for name, each in tensors.items() if name.startswith(head)}


@dataclass(frozen=True)
class ExplainedWindows:
    """What was found on one photo: its category, the places of the parts, their shares; ``None`` of no category."""

    outputs: Tensor
    category: InspectedCategory | None = None
    places: Tensor | None = None
    shares: Shapley | None = None


def explain_windows(opened: OpenedInspection, batch: Tensor) -> list[ExplainedWindows]:
    """Share the score of each photo's predicted class among the parts of its category and elsewhere."""
    record = opened.record
    read = opened.performer.whole(record.tap)
    output, taps = forward_taps(opened.performer, batch, list(dict.fromkeys((read, *record.finding))))
    outputs = opened.performer.outputs.scores(output, len(batch)).cpu()
    found = []
    for photo, row in enumerate(outputs):
        category = opened.category_of(int(opened.performer.outputs.decisions(row[None]).argmax()))
        if category is None:
            found.append(ExplainedWindows(row))
            continue
        maps = TapMaps(opened.upper, taps[read][photo : photo + 1].cpu(), opened.nothing)
        places = opened.finders[category.name](*(taps[layer][photo : photo + 1].cpu() for layer in record.finding))
        cells = part_cells(places, maps.grid, SAID_AREA)
        generator = torch.Generator().manual_seed(record.config.seed)
        shares = shapley_shares(maps, whole_photos(maps), cells, pairs=_PAIRS, generator=generator)
        found.append(ExplainedWindows(row, category, places[0], shares))
    return found


def window_records(
    opened: OpenedInspection, found: ExplainedWindows, folder: Path, frame: Image.Image
) -> tuple[ExplainedByWindows, ...]:
    """Draw the parts of one photo and return their record; nothing where the photo is of no inspected category."""
    category = found.category
    if category is None or found.shares is None or found.places is None:
        return ()
    players, error, loss = found.shares.players[0], found.shares.standard_error[0], found.shares.loss[0]
    draw_parts(folder / "parts.jpg", frame, found.places, opened.nothing.shape[1:])
    outputs = opened.performer.outputs
    scores = outputs.decisions(found.outputs[None])
    output, chance = int(scores.argmax()), outputs.probabilities(scores)[0]
    parts = tuple(
        WindowPart(name=part.name, share=float(players[k]), standard_error=float(error[k]), loss=float(loss[k]))
        for k, part in enumerate(category.parts)
    )
    return (
        ExplainedByWindows(
            category=category.name,
            name=opened.performer.output_name(output),
            output=output,
            probability=float(chance[output]),
            parts=parts,
            elsewhere=float(players[-1]),
            picture="parts.jpg",
            verdict=category.sentence,
            headline=_headline([(part.name, part.share) for part in parts], float(players[-1])),
        ),
    )


def _headline(shares: Sequence[tuple[str, float]], elsewhere: float) -> str:
    """Say what each part carries, the largest first."""
    if not all(math.isfinite(share) for _, share in shares):
        return "with no cell at all the score is as high, so there is nothing to share"
    told = [f"{name}: {share:z.0%}" for name, share in sorted(shares, key=lambda each: -each[1])]
    return f"{', '.join(told)}; everything elsewhere: {elsewhere:z.0%}"
