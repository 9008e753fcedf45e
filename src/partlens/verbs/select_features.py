"""The verb select-features: ``selection.json``, the weights and pictures of the relevant filters in a run directory."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from partlens.errors import ImageError, InputError, RunError, expected, listed, nearest
from partlens.progress import Progress
from partlens.records import read_tensors
from partlens.run import Run
from partlens.selection.record import DEFAULT_MU, WEIGHTS, DescriptorConfig, SelectionConfig, SelectionRecord
from partlens.shards import Compute
from partlens.verbs.runs import data_info, enough_photos, loaded, open_performer, open_photos, performer_info, verb

if TYPE_CHECKING:
    from torch import Tensor, nn

    from partlens.data.images import ImageSet
    from partlens.network.performer import Performer
    from partlens.selection.record import SelectionFound

TOP_PHOTOS = 100
MOST_PICTURES = 400

Labels = Literal["data", "predictions"]
Chosen = Literal["auto"]


@dataclass(frozen=True)
class SelectedFeatures:
    """A finished selection.

    Attributes:
        path: the run directory.
        record: content of ``selection.json``.
    """

    path: Path
    record: SelectionRecord

    @property
    def found(self) -> SelectionFound:
        """Its result."""
        assert self.record.found is not None  # it is finished
        return self.record.found


@dataclass(frozen=True)
class OpenedSelection(SelectedFeatures):
    """A selection with its weights, ``[feature, class]`` float64, and its network."""

    weights: Tensor
    performer: Performer

    @property
    def classes(self) -> tuple[str, ...]:
        """Names, in the order of the weights' columns."""
        return tuple(one.name for one in self.found.classes)

    def column(self, name: str) -> int:
        """Return the column of a class, which may also be named as the performer does, or by its output's number."""
        if name in self.classes:
            return self.classes.index(name)
        for column, output in enumerate(self.found.outputs):
            if output is not None and name in {str(output), self.performer.output_name(output)}:
                return column
        remedy = f"Nearest: {', '.join(nearest(name, self.classes))}"
        raise InputError(expected(f"a class of the selection in {self.path}", name, remedy))


@verb
def select_features(
    model: str | nn.Module | Performer,
    data: str | Path | ImageSet,
    *,
    out: str | Path,
    mu: float | Chosen = DEFAULT_MU,
    labels: Labels = "data",
    nonnegative: bool = True,
    descriptor: DescriptorConfig | Mapping[str, Any] | None = None,
    split: str = "train",
    top_photos: int = TOP_PHOTOS,
    pictures: int = MOST_PICTURES,
    seed: int = 0,
    keep_cache: bool = False,
    compute: Compute | Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> SelectedFeatures:
    """Find the few internal filters that indicate each class, and what activates them; write a run directory.

    The energies of all filters of all layers, gathered in one pass over the photos, are fitted to the classes by the
    μ-lasso (Oramas et al. 2019). Run again with the same arguments, it goes on where it was stopped.

    Args:
        model: the performer; see :func:`layers`. It is not changed.
        data: a folder, a table or an :class:`~partlens.data.images.ImageSet`.
        out: the run directory; that of an explainer of the same data may be given.
        mu: bound on the sum of a class's absolute weights (authors: 10, for their generated flowers 5); ``auto`` lets
            held-out folds choose.
        labels: ``data``: the categories of the photos; ``predictions``: the performer's own decisions.
        nonnegative: weights are at least 0.
        descriptor: which layers are measured and how, or fields to change; by default those of the authors.
        split: photos to fit on; those of the split ``test`` measure the linear read-out.
        top_photos: photos averaged in the picture of a filter.
        pictures: most filters that get pictures, those with the largest weights first.
        seed: seed of the shuffled labels and the random crops.
        keep_cache: keep the descriptors of all photos.
        compute: on which device and on how many processes.
        progress: how to show progress; optional.

    Returns:
        The finished selection.

    Raises:
        InputError: a value out of its range.
        ImageError: no photos, too few, or a single class.
        RunError: ``out`` holds another run; the text names the setting that differs.
        StorageError: the disk is full; what was finished stays.
    """
    started = time.monotonic()
    show, run = progress or Progress.silent(), Run(Path(out))
    config = SelectionConfig(
        split=split,
        mu=mu if isinstance(mu, str) else float(mu),
        labels=labels,
        nonnegative=nonnegative,
        descriptor=DescriptorConfig.of(descriptor),
        top_photos=top_photos,
        pictures=pictures,
        seed=seed,
    )
    where = Compute.of(compute)
    performer = loaded(model, where.device)
    images, unreadable = open_photos(data, show=show)
    rows, held = _split_rows(images, split, show)
    if labels == "data" and len(classes := {images.categories[row] for row in rows} - {""}) < 2:
        remedy = "Add photos of another category, or use --labels predictions"
        raise ImageError(expected("photos of at least 2 categories to fit on", [*classes], remedy))
    data_of_run = data_info(images, unreadable, images.fingerprint())
    asked = SelectionRecord.asked(performer_info(performer), data_of_run, config=config, photos=len(rows))
    with run.begun(asked) as begun:
        if begun.found is not None:
            show.say(f"{out} holds this selection already; nothing to do")
            return SelectedFeatures(run.folder, begun)
        from partlens.verbs.selected_features import CACHE, selected

        show.say(f"{performer.name} · {len(rows)} photos to fit on, {len(held)} held out")
        chosen = images.take([*rows, *held])
        record, found = selected(performer, begun, chosen, run.folder, show, where)
        if not keep_cache:
            shutil.rmtree(run.folder / CACHE)
        finished = run.finish(record, started, found=found)
        show.say(f"wrote {run.folder / record.FILE} in {finished.seconds:.0f} s")
        return SelectedFeatures(run.folder, finished)


def _split_rows(images: ImageSet, split: str, show: Progress) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the photos to fit on and those to measure the read-out on, which are no copies of these."""
    rows, content = enough_photos(images, ("",), split)[0], images.digests()
    held = images.indices(split="test") if split != "test" and "test" in images.splits else ()
    known = {content[row] for row in rows}
    fresh = tuple(row for row in held if content[row] not in known)
    if copies := len(held) - len(fresh):
        show.say(f"{copies} held-out photos are copies of photos to fit on and are not used: see data check")
    return rows, fresh


@verb
def load_selection(run: str | Path, model: str | nn.Module | Performer | None = None) -> OpenedSelection:
    """Open a finished selection.

    Args:
        run: the run directory.
        model: the performer; optional where it can be loaded by its name.

    Raises:
        RunError: the selection is missing, unfinished or damaged, or the performer's weights are not those of the run.
    """
    import torch

    folder = Path(run)
    record = Run(folder).read(SelectionRecord)
    if (found := record.found) is None:
        rule = f"a result in {folder / record.FILE}"
        raise RunError(expected(rule, "a run that is called finished and has none", SelectionRecord.AGAIN))
    performer = open_performer(record, model)
    if wrong := [one.name for one in found.classes if (one.output or 0) >= performer.outputs.count]:
        rule = f"classes of the selection in {folder} among {performer.outputs.count} outputs"
        raise RunError(expected(rule, listed(wrong), SelectionRecord.AGAIN))
    shape = torch.empty(found.index.size, len(found.classes), dtype=torch.float64, device="meta")
    path, again = folder / WEIGHTS, f"Restore the file, or delete it and {record.FILE}, then select again"
    weights = read_tensors(path, {"weights": shape}, sha256=found.weights_sha256, remedy=again)
    return OpenedSelection(folder, record, weights["weights"], performer)
