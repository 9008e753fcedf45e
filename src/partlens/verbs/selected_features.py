"""What select-features does: one pass over the photos, then the fit, its read-outs and pictures."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from partlens.attribution.average_pictures import PICTURE_PX, average_pictures
from partlens.attribution.pictures import picture_of, save_picture, stretched, strip
from partlens.data.images import ImageSet
from partlens.errors import ImageError, expected, listed
from partlens.estimate import Estimate, proportion
from partlens.network.classes import Match, disagreement
from partlens.network.performer import Performer
from partlens.network.precision import chosen_precision
from partlens.progress import Progress
from partlens.records import file_sha256, write_tensors
from partlens.run import PassPrecision
from partlens.selection.descriptors import energy
from partlens.selection.inner_products import Rows, blocks
from partlens.selection.measured_layers import feature_index
from partlens.selection.record import (
    NAMED_PHOTOS,
    WEIGHTS,
    FeatureIndex,
    FilterPicture,
    RelevantFilter,
    SelectedClass,
    SelectionConfig,
    SelectionFound,
    SelectionRecord,
)
from partlens.selection.relevance import (
    LabelMatrix,
    Selection,
    choose_mu,
    label_matrix,
    select_relevant,
    told_right,
    with_shuffled_labels,
)
from partlens.selection.responses import Responses, stream_responses
from partlens.shards import Compute
from partlens.verbs.runs import with_precision

CACHE = "cache-selection"
_DOUBTED = 4096  # photos whose scores are looked at for what the outputs are

_Pictures = Mapping[tuple[str, int], FilterPicture]


@dataclass(frozen=True)
class SelectionPhotos:
    """The photos of a selection: the first ``fit`` ones are fitted, the others are held out."""

    performer: Performer
    images: ImageSet
    fit: int
    config: SelectionConfig
    matched: Match


def selected(
    performer: Performer, record: SelectionRecord, images: ImageSet, out: Path, show: Progress, where: Compute
) -> tuple[SelectionRecord, SelectionFound]:
    """Stream the photos once, and select from their responses; return the record with its precision, and what is found.

    The first ``record.photos`` images are fitted.
    """
    config = record.config
    how = config.descriptor

    def precision() -> PassPrecision:
        """Energies of all layers must agree."""
        layers = feature_index(performer, how).layers
        return chosen_precision(performer, images, range(len(images)), layers, reduce=energy, wanted=how.precision)

    performer, record = with_precision(performer, record, out, precision, show)
    photos = SelectionPhotos(
        performer, images, record.photos, config, performer.matched(sorted(set(images.categories)))
    )
    for line in filter(None, (*performer.outputs.notes, photos.matched.said() if config.labels == "data" else "")):
        show.say(line)
    with show.task("reading all layers", len(images)) as advance:
        responses = stream_responses(
            performer,
            images,
            how,
            out=out / CACHE,
            top=(config.ranks, photos.fit),
            compute=where,
            progress=advance,
        )
    return record, select_from(photos, responses, out, show)


def select_from(photos: SelectionPhotos, responses: Responses, out: Path, show: Progress) -> SelectionFound:
    """Fit the weights to the responses of the photos, measure the read-outs, draw the relevant filters.

    Writes ``selection.safetensors`` and pictures; the record is the caller's.
    """
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
    if config.mu != "auto":
        return config.mu, ()
    generator = torch.Generator().manual_seed(config.seed)
    return choose_mu(fitted, labels, index, generator, nonnegative=config.nonnegative)


def _told(responses: Responses) -> list[int]:
    """Return the output that the network decides for, of every photo."""
    logits = Rows(responses.logits, range(len(responses.keys)))
    told = [block.argmax(1) for _, block in blocks(logits, torch.device("cpu"))]
    return [int(output) for output in torch.cat(told)]


def _decided(photos: SelectionPhotos, told: Sequence[int]) -> Sequence[str]:
    """Return the class of every photo: its category, or the output that the network decides for."""
    return photos.images.categories if photos.config.labels == "data" else list(map(str, told))


def _doubts(photos: SelectionPhotos, responses: Responses, told: Sequence[int]) -> list[str]:
    """Say what the network's answers to the photos speak against: what its outputs are, or what categories mean."""
    said = [photos.performer.outputs.doubt(torch.tensor(responses.logits[:_DOUBTED]))]
    if photos.config.labels == "data" and photos.performer.outputs.count > 1:
        said.append(disagreement(photos.images.categories, told, photos.matched.outputs))
    return [line for line in said if line]


def _labelled(photos: SelectionPhotos, told: Sequence[int]) -> tuple[LabelMatrix, tuple[str, ...]]:
    """Return the labels of the photos to fit on, and the names of their classes as the data or the network has them."""
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
        performer.output_name(output) if named and output is not None and name.isdigit() else name
        for name, output in zip(names, outputs, strict=True)
    ]
    return [
        f"{label} ({output})" if labels.count(label) > 1 and output is not None else label
        for label, output in zip(labels, outputs, strict=True)
    ]


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
    top = responses.top.of([responses.index.feature(*each) for each in filters]).photo[:NAMED_PHOTOS]
    return {each: tuple(responses.keys[row] for row in rows) for each, rows in zip(filters, top.T, strict=True)}


def _draw(photos: SelectionPhotos, responses: Responses, of_class: _OfClass, out: Path, show: Progress) -> _Pictures:
    """Draw the relevant filters, the weightiest of each class first."""
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
        save_picture(out / f"{name}-average.png", picture_of(stretched(one.average, one.valid_frac)))
        save_picture(out / f"{name}-control.png", picture_of(stretched(one.control, one.valid_frac)))
        save_picture(out / f"{name}-crops.png", strip(one.crops, PICTURE_PX))
        known[one.layer, one.channel] = FilterPicture(
            receptive_field_px=one.receptive_field_px,
            average=f"{name}-average.png",
            control=f"{name}-control.png",
            crops=f"{name}-crops.png",
            sharpness=one.contrast,
            control_sharpness=one.control_contrast,
        )
    return known
