"""The verb parts: which part each filter of the explainer holds, what each part adds, and pictures to name it by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from partlens.object_parts.inspection import InspectRecord
from partlens.object_parts.record import PartsConfig, PartsFile, renamed
from partlens.progress import Progress
from partlens.run import Run
from partlens.shards import Device
from partlens.verbs.runs import verb

if TYPE_CHECKING:
    from torch import nn

    from partlens.data.images import ImageSet
    from partlens.network.performer import Performer

_NOT_INSPECTED = "not in this run; partlens inspect MODEL DATA --out RUN measures what parts carry of its own score"


@verb
def parts(
    run: str | Path,
    data: str | Path | ImageSet | None = None,
    *,
    model: str | nn.Module | Performer | None = None,
    rename: Sequence[str] = (),
    split: str = "test",
    config: PartsConfig | Mapping[str, Any] | None = None,
    compute: Device | Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> PartsFile:
    """Find the part of every filter of an explainer, and measure what each part adds to the performer's answers.

    Writes ``parts.json`` and pictures in ``parts/`` of the run directory. The ``name`` of a part is a person's to
    edit there: two parts of one name count as one from then on, and finding the parts again keeps the names. With
    ``rename`` alone, names are changed in the file and nothing is measured.

    Args:
        run: the run directory of a finished explainer.
        data: the data set; optional, by default the one of the fit.
        model: the performer; optional, by default the one of the fit.
        rename: new names of parts, as ``OLD=NEW``.
        split: which photos to use.
        config: how filters get their parts, or fields to change in the default.
        compute: on which device the network computes.
        progress: how to show progress; optional.

    Returns:
        The content of ``parts.json``.

    Raises:
        AtWorkError: another process writes to the run.
        ImageError: fewer than two photos in the split.
        InputError: the rule ``landmarks`` without landmarks, or a wrong name.
        RunError: the run is missing or unfinished, ``parts.json`` was edited wrongly, or model or data are not found.
    """
    run, show = Path(run), progress or Progress.silent()
    earlier = PartsFile.read_if_there(run)
    if earlier is not None and rename and data is None and not config:
        found = renamed(earlier, rename)
        with Run(run).writing():
            found.write(run)
        if found.measured() is None:
            show.say("parts were joined: run partlens parts again to measure what they add together")
        return found

    from partlens.verbs.measured_parts import measured_parts, opened_explainer

    opened = opened_explainer(run, data, model, Device.of(compute), split, PartsConfig.of(config), show)
    with Run(run).writing():
        found = measured_parts(opened, earlier, rename, show)
        found.write(run)
    for line in _on_the_performer(run, found.categories):
        show.say(f"on the performer itself: {line}")
    show.say(f"wrote {run / PartsFile.FILE} ({found.photos} photos of the split {split})")
    return found


def _on_the_performer(run: Path, categories: Sequence[str]) -> list[str]:
    """Return what the run's own inspection says of categories."""
    inspected = InspectRecord.read_if_there(run)
    own = [one.sentence for one in inspected.categories if one.name in categories] if inspected else []
    return own or [_NOT_INSPECTED]
