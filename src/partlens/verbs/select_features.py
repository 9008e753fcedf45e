"""The verb select-features: ``selection.json``, the weights and pictures of the relevant filters in a run directory."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from partlens.errors import ImageError, RunError, expected, listed
from partlens.estimate import Estimate, proportion
from partlens.progress import Progress
from partlens.records import file_sha256, read_tensors, write_tensors
from partlens.run import PassPrecision, Run, command, now, versions
from partlens.selection.record import (
    DEFAULT_MU,
    DescriptorConfig,
    FeatureIndex,
    FilterPicture,
    RelevantFilter,
    SelectedClass,
    SelectionConfig,
    SelectionFound,
    SelectionRecord,
)
from partlens.shards import Compute
from partlens.verbs.runs import data_info, loaded, open_performer, open_photos, performer_info, verb, with_precision

if TYPE_CHECKING:
    from torch import Tensor, nn

    from partlens.data.images import ImageSet
    from partlens.network.classes import Match
    from partlens.network.performer import Performer
    from partlens.selection.inner_products import Rows
    from partlens.selection.relevance import LabelMatrix, Selection
    from partlens.selection.responses import Responses

WEIGHTS = "selection.safetensors"
TOP_PHOTOS = 100
MOST_PICTURES = 400
_CACHE = "cache-selection"
_NAMED_PHOTOS = 8
_DOUBTED = 4096  # photos whose scores are looked at for what the outputs are

Labels = Literal["data", "predictions"]
Chosen = Literal["auto"]
_Pictures = Mapping[tuple[str, int], FilterPicture]


@dataclass(frozen=True)
class SelectedFeatures:
    """A finished selection.

    Attributes:
        path: the run directory.
        record: content of ``selection.json``.
        found: its result.
    """

    path: Path
    record: SelectionRecord
    found: SelectionFound


@dataclass(frozen=True)
class OpenedSelection(SelectedFeatures):
    """A selection with its weights, ``[feature, class]`` float64, and its network."""

    weights: Tensor
    performer: Performer

    @property
    def classes(self) -> tuple[str, ...]:
        """Names, in the order of the weights' columns."""
        return tuple(one.name for one in self.found.classes)


@dataclass(frozen=True)
class SelectionPhotos:
    """The photos of a selection: the first ``fit`` ones are fitted, the others are held out."""

    performer: Performer
    images: ImageSet
    fit: int
    config: SelectionConfig
    matched: Match


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
    how = DescriptorConfig.of(descriptor)
    config = SelectionConfig(
        split=split,
        mu=mu if isinstance(mu, str) else float(mu),
        labels=labels,
        nonnegative=nonnegative,
        descriptor=how,
        top_photos=top_photos,
        pictures=pictures,
        seed=seed,
    )
    where = Compute.of(compute)
    performer = loaded(model, where.device)
    images, unreadable = open_photos(data, show=show)
    rows, held = _split_rows(images, split)
    asked = SelectionRecord(
        created=now(),
        command=command(),
        versions=versions(),
        performer=performer_info(performer),
        data=data_info(images, unreadable, images.fingerprint()),
        config=config,
        photos=len(rows),
    )
    with run.begun(asked) as begun:
        if begun.found is not None:
            show.say(f"{out} holds this selection already; nothing to do")
            return SelectedFeatures(run.folder, begun, begun.found)
        show.say(f"{performer.name} · {len(rows)} photos to fit on, {len(held)} held out")
        chosen = images.take([*rows, *held])
        performer, record = with_precision(
            performer, begun, run.folder, lambda: _precision(performer, chosen, how), show
        )
        photos = SelectionPhotos(
            performer, chosen, len(rows), config, performer.matched(sorted(set(chosen.categories)))
        )
        for line in filter(None, (*performer.outputs.notes, photos.matched.said() if labels == "data" else "")):
            show.say(line)
        found = _found(photos, run.folder, show, where)
        if not keep_cache:
            shutil.rmtree(run.folder / _CACHE)
        finished = run.finish(record, started, found=found)
        show.say(f"wrote {run.folder / record.FILE} in {finished.seconds:.0f} s")
        return SelectedFeatures(run.folder, finished, found)


def _split_rows(images: ImageSet, split: str) -> tuple[list[int], list[int]]:
    """Return the photos to fit on and those to measure the read-out on."""
    rows = list(images.indices(split=split))
    if len(rows) < 2:
        remedy = "Add photos, or name another split (--split)"
        raise ImageError(expected(f"at least 2 photos in the split {split}", len(rows), remedy))
    held = list(images.indices(split="test")) if split != "test" and "test" in images.splits else []
    return rows, held


def _precision(performer: Performer, images: ImageSet, how: DescriptorConfig) -> PassPrecision:
    """Choose the precision of the pass over the photos: energies of all layers must agree."""
    from partlens.network.precision import chosen_precision
    from partlens.selection.descriptors import energy
    from partlens.selection.measured_layers import feature_index

    layers = feature_index(performer, how).layers
    return chosen_precision(performer, images, range(len(images)), layers, reduce=energy, wanted=how.precision)


def _found(photos: SelectionPhotos, out: Path, show: Progress, where: Compute) -> SelectionFound:
    """Stream the photos once, and select from their responses."""
    from partlens.selection.responses import stream_responses

    images = photos.images
    with show.task("reading all layers", len(images)) as advance:
        responses = stream_responses(
            photos.performer,
            images,
            photos.config.descriptor,
            out=out / _CACHE,
            top=(ranks(photos.config), photos.fit),
            compute=where,
            progress=lambda done, _: advance(done),
        )
    return select_from(photos, responses, out, show)


def ranks(config: SelectionConfig) -> int:
    """Return how many photos are kept per filter: those of its picture and those that are named."""
    return max(config.top_photos, _NAMED_PHOTOS)


def select_from(photos: SelectionPhotos, responses: Responses, out: Path, show: Progress) -> SelectionFound:
    """Fit the weights to the responses of the photos, measure the read-outs, draw the relevant filters.

    Writes ``selection.safetensors`` and pictures; the record is the caller's.
    """
    from partlens.selection.inner_products import Rows
    from partlens.selection.relevance import select_relevant

    config, index = photos.config, responses.index
    told = _told(responses)
    labels, names = _labelled(photos, told)
    for line in _doubts(photos, responses, told):
        show.say(line)
    readable = replace(labels, classes=tuple(_readable(photos.performer, labels.classes, labels.outputs)))
    fitted = Rows(responses.descriptor, range(photos.fit))
    mu, tried = _bound(config, fitted, readable, index)
    selection = select_relevant(fitted, readable, index, mu, nonnegative=config.nonnegative)
    of_class = [selection.relevant(column) for column in range(len(names))]
    mean = sum(map(len, of_class)) / len(of_class)
    show.say(f"{index.size} filters in {len(index.layers)} layers; {mean:.1f} relevant per class (mu = {mu:g})")
    pictures = _draw(photos, responses, of_class, out, show)
    accuracy, shuffled, model_accuracy = _readouts(photos, selection, labels, responses, told)
    write_tensors(out / WEIGHTS, {"weights": selection.weights}, {"schema": SelectionRecord.SCHEMA})
    return SelectionFound(
        index=index,
        weights_sha256=file_sha256(out / WEIGHTS),
        dead_layers=responses.dead_layers,
        iterations=selection.solution.iterations,
        accuracy=accuracy,
        shuffled=shuffled,
        model_accuracy=model_accuracy,
        classes=_classes(selection, labels, of_class, _strongest(responses, of_class), pictures),
        mu=mu if tried else None,
        tried=tried,
    )


def _bound(
    config: SelectionConfig, fitted: Rows, labels: LabelMatrix, index: FeatureIndex
) -> tuple[float, tuple[tuple[float, float], ...]]:
    """Return μ, and what was tried where held-out folds choose it."""
    import torch

    from partlens.selection.relevance import choose_mu

    if config.mu != "auto":
        return config.mu, ()
    generator = torch.Generator().manual_seed(config.seed)
    return choose_mu(fitted, labels, index, generator, nonnegative=config.nonnegative)


def _told(responses: Responses) -> list[int]:
    """Return the output that the network decides for, of every photo."""
    import torch

    from partlens.selection.inner_products import Rows, blocks

    logits = Rows(responses.logits, range(len(responses.keys)))
    told = [block.argmax(1) for _, block in blocks(logits, torch.device("cpu"))]
    return [int(output) for output in torch.cat(told)]


def _decided(photos: SelectionPhotos, told: Sequence[int]) -> Sequence[str]:
    """Return the class of every photo: its category, or the output that the network decides for."""
    return photos.images.categories if photos.config.labels == "data" else list(map(str, told))


def _doubts(photos: SelectionPhotos, responses: Responses, told: Sequence[int]) -> list[str]:
    """Say what the network's answers to the photos speak against: what its outputs are, or what categories mean."""
    import torch

    from partlens.network.classes import disagreement

    said = [photos.performer.outputs.doubt(torch.tensor(responses.logits[:_DOUBTED]))]
    if photos.config.labels == "data" and photos.performer.outputs.count > 1:
        said.append(disagreement(photos.images.categories, told, photos.matched.outputs))
    return [line for line in said if line]


def _labelled(photos: SelectionPhotos, told: Sequence[int]) -> tuple[LabelMatrix, tuple[str, ...]]:
    """Return the labels of the photos to fit on, and the names of their classes as the data or the network has them."""
    from partlens.selection.relevance import label_matrix

    by_category = photos.matched.outputs

    def output_of(name: str) -> int | None:
        return by_category[name] if photos.config.labels == "data" else int(name)

    labels = label_matrix(_decided(photos, told)[: photos.fit], output_of)
    if len(labels.classes) < 2:
        got = f"{len(labels.classes)} ({listed(labels.classes)})"
        raise ImageError(expected("at least 2 classes", got, "Add photos of another class, or use --labels data"))
    return labels, labels.classes


def _readouts(
    photos: SelectionPhotos, selection: Selection, labels: LabelMatrix, responses: Responses, told: Sequence[int]
) -> tuple[Estimate, Estimate, Estimate]:
    """Measure on the held-out photos of the fitted classes: the read-out, its null, and the network itself."""
    import torch

    from partlens.selection.inner_products import Rows
    from partlens.selection.relevance import told_right, with_shuffled_labels

    decided = _decided(photos, told)
    rows = [row for row in range(photos.fit, len(decided)) if decided[row] in labels.classes]
    if not rows:
        return Estimate.undefined(), Estimate.undefined(), Estimate.undefined()
    truth = torch.tensor([labels.classes.index(decided[row]) for row in rows])
    generator = torch.Generator().manual_seed(photos.config.seed)
    fitted, held = Rows(responses.descriptor, range(photos.fit)), Rows(responses.descriptor, rows)
    null = with_shuffled_labels(selection, fitted, labels, generator)
    right = proportion(told_right(selection, held, truth).double())
    by_chance = proportion(told_right(null, held, truth).double())
    own = Estimate.undefined()
    if photos.config.labels == "data" and None not in labels.outputs:
        said = torch.tensor([told[row] for row in rows])
        own = proportion((said == torch.tensor(labels.outputs)[truth]).double())
    return right, by_chance, own


def _readable(performer: Performer, names: Sequence[str], outputs: Sequence[int | None]) -> list[str]:
    """Name classes that are numbers as the performer does; outputs that share a name keep their number as well."""
    named = performer.class_names is not None
    labels = [
        output_name(performer, output) if named and output is not None and name.isdigit() else name
        for name, output in zip(names, outputs, strict=True)
    ]
    return [
        f"{label} ({output})" if labels.count(label) > 1 and output is not None else label
        for label, output in zip(labels, outputs, strict=True)
    ]


def output_name(performer: Performer, output: int) -> str:
    """Return how the performer calls one of its outputs, its number where it has no names."""
    names = performer.class_names
    return names[output] if names is not None and output < len(names) else str(output)


_OfClass = Sequence[Sequence[tuple[str, int, float]]]


def _classes(
    selection: Selection,
    labels: LabelMatrix,
    of_class: _OfClass,
    strongest: Mapping[tuple[str, int], tuple[str, ...]],
    pictures: _Pictures,
) -> tuple[SelectedClass, ...]:
    solution, photos = selection.solution, labels.matrix.sum(0).int().tolist()
    return tuple(
        SelectedClass(
            name=name,
            output=labels.outputs[column],
            photos=photos[column],
            norm=(total := float(solution.norm[column])),
            objective=float(solution.objective[column]),
            relative_gap=float(solution.relative_gap[column]),
            filters=tuple(
                RelevantFilter(
                    layer=layer,
                    channel=channel,
                    weight=weight,
                    share=abs(weight) / total,
                    strongest=strongest[layer, channel],
                    picture=pictures.get((layer, channel)),
                )
                for layer, channel, weight in of_class[column]
            ),
        )
        for column, name in enumerate(selection.classes)
    )


def _strongest(responses: Responses, of_class: _OfClass) -> dict[tuple[str, int], tuple[str, ...]]:
    """Name the photos that activate each relevant filter most."""
    filters = list(dict.fromkeys((layer, channel) for found in of_class for layer, channel, _ in found))
    top = responses.top.of([responses.index.feature(*each) for each in filters]).photo[:_NAMED_PHOTOS]
    return {each: tuple(responses.keys[row] for row in rows) for each, rows in zip(filters, top.T, strict=True)}


def _draw(photos: SelectionPhotos, responses: Responses, of_class: _OfClass, out: Path, show: Progress) -> _Pictures:
    """Draw the relevant filters, the weightiest of each class first."""
    from partlens.attribution.average_pictures import PICTURE_PX, average_pictures
    from partlens.attribution.pictures import picture_of, save_png, stretched, strip

    ranked = sorted(
        (rank, -abs(weight), layer, channel)
        for found in of_class
        for rank, (layer, channel, weight) in enumerate(found)
    )
    config, fit = photos.config, photos.fit
    wanted = list(dict.fromkeys((layer, channel) for _, _, layer, channel in ranked))[: config.pictures]
    if not wanted:
        return {}
    with show.task("drawing filters", fit) as advance:
        drawn = average_pictures(
            photos.performer,
            photos.images.take(range(fit)),
            wanted,
            responses.top.of([responses.index.feature(*each) for each in wanted]).first(config.top_photos),
            seed=config.seed,
            advance=lambda done, total: advance(done * fit // total),
        )
    known = {}
    for one in drawn:
        name = f"pictures/{re.sub(r'[^A-Za-z0-9._-]', '_', one.layer)}-{one.channel}"
        save_png(out / f"{name}-average.png", picture_of(stretched(one.average, one.valid_frac)))
        save_png(out / f"{name}-control.png", picture_of(stretched(one.control, one.valid_frac)))
        save_png(out / f"{name}-crops.png", strip(one.crops, PICTURE_PX))
        known[one.layer, one.channel] = FilterPicture(
            receptive_field_px=one.receptive_field_px,
            average=f"{name}-average.png",
            control=f"{name}-control.png",
            crops=f"{name}-crops.png",
            sharpness=one.contrast,
            control_sharpness=one.control_contrast,
        )
    return known


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
    return OpenedSelection(folder, record, found, weights["weights"], performer)
