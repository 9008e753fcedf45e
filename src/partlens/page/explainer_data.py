"""What the page says of an explainer, as data: its files are read once into frozen values, and nothing here draws.

An explainer's run holds ``run.json`` (needed) and, as far as they were made, ``history.json``, ``evaluation.json`` and
``gallery/gallery.json``. What is missing stays visible as missing: an absent file gives ``None`` or an empty tuple, an
absent or undefined number gives ``nan``, and the page says "not measured" in its place.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from partlens.errors import RunError, expected
from partlens.page.evaluation_data import Evaluation, read_evaluation
from partlens.page.gallery_data import Gallery, read_gallery
from partlens.page.reading import count, group, groups, named_reasons, number, text, texts
from partlens.records import SCHEMA, read_json


@dataclass(frozen=True)
class Epoch:
    """One epoch of training: its number, its phase and what was logged (``nan`` never, absent instead)."""

    number: int
    phase: str
    logged: Mapping[str, float]


@dataclass(frozen=True)
class ExplainerData:
    """Everything that the page says of an explainer; drawing it needs nothing else.

    Attributes:
        performer: the performer's name as it was given.
        weights_sha256: hash of its weights.
        preprocessing: how a photo becomes the performer's input.
        performer_notes: what the performer's reader remarked.
        tap: the explained layer.
        top_layer: the performer's last convolution, or an empty string where it was not measured.
        structure: the explainer's structure as recorded.
        receptive_field: stride, size and start (rows, cols) in pixels.
        data_name: name of the data set.
        fingerprint: hash of the data set's content.
        category: the category that was explained, or several with commas; may be empty.
        train_photos: photos of the category learned from.
        background_photos: other photos learned from.
        unreadable: name and reason of each photo that could not be read.
        created: when the run was started (ISO 8601).
        command: the command line.
        versions: of partlens and what it stands on.
        preset: name of the configuration's preset.
        config: every field of the configuration.
        status: ``finished`` or what else the run recorded.
        seconds: duration of the fit; ``nan`` where unknown.
        history: epochs in order.
        evaluation: measurements, or ``None`` where ``evaluation.json`` is absent.
        gallery: pictures, or ``None`` where ``gallery/gallery.json`` is absent.
    """

    performer: str
    weights_sha256: str
    preprocessing: Mapping[str, Any]
    performer_notes: tuple[str, ...]
    tap: str
    top_layer: str
    structure: Mapping[str, Any]
    receptive_field: Mapping[str, Any]
    data_name: str
    fingerprint: str
    category: str
    train_photos: int
    background_photos: int
    unreadable: tuple[tuple[str, str], ...]
    created: str
    command: str
    versions: Mapping[str, str]
    preset: str
    config: Mapping[str, Any]
    status: str
    seconds: float
    history: tuple[Epoch, ...]
    evaluation: Evaluation | None
    gallery: Gallery | None


def _history(path: Path) -> tuple[Epoch, ...]:
    if not path.exists():
        return ()
    epochs = []
    for position, row in enumerate(groups(read_json(path).get("epochs")), start=1):
        logged = {str(k): number(v) for k, v in row.items() if k not in {"epoch", "phase"}}
        finite = {k: v for k, v in logged.items() if math.isfinite(v)}
        epochs.append(Epoch(count(row.get("epoch")) or position, text(row.get("phase")), finite))
    return tuple(epochs)


def collect_explainer(run: Path) -> ExplainerData | None:
    """Read what the page says of an explainer.

    Args:
        run: the folder of a run.

    Returns:
        The content, or ``None`` where the folder has no ``run.json``. Files that are optional and absent leave
        ``evaluation`` or ``gallery`` at ``None`` and ``history`` empty; absent and undefined numbers are ``nan``.

    Raises:
        RunError: ``run.json`` is of another kind or version, or a file of the run is damaged.
    """
    manifest_path = run / "run.json"
    if not manifest_path.exists():
        return None
    manifest = read_json(manifest_path)
    for key, wanted, remedy in (
        ("schema", SCHEMA, "Use the partlens version that wrote the run"),
        ("kind", "explainer", "Give the folder that partlens fit-explainer wrote"),
    ):
        if manifest.get(key) != wanted:
            raise RunError(expected(f'{key} "{wanted}" in {manifest_path}', manifest.get(key), remedy))
    performer, data, structure = (group(manifest.get(k)) for k in ("performer", "data", "structure"))
    for rule, value in (("performer's name", performer.get("name")), ("explained layer (tap)", structure.get("tap"))):
        if not isinstance(value, str) or not value:
            raise RunError(expected(f"the {rule} in {manifest_path}", value, "Run partlens fit-explainer again"))
    tap = text(structure.get("tap"))
    evaluation, top_layer = read_evaluation(run / "evaluation.json", tap)
    return ExplainerData(
        performer=text(performer.get("name")),
        weights_sha256=text(performer.get("weights_sha256")),
        preprocessing=group(performer.get("preprocessing")),
        performer_notes=texts(performer.get("notes")),
        tap=tap,
        top_layer=top_layer,
        structure=structure,
        receptive_field=group(manifest.get("receptive_field")),
        data_name=text(data.get("name")),
        fingerprint=text(data.get("fingerprint")),
        category=text(data.get("category")) or ", ".join(texts(data.get("categories"))),
        train_photos=count(data.get("train_photos")),
        background_photos=count(data.get("background_photos")),
        unreadable=named_reasons(data.get("unreadable")),
        created=text(manifest.get("created")),
        command=text(manifest.get("command")),
        versions={text(k): text(v) for k, v in group(manifest.get("versions")).items()},
        preset=text(manifest.get("preset")),
        config=group(manifest.get("config")),
        status=text(manifest.get("status")),
        seconds=number(manifest.get("seconds")),
        history=_history(run / "history.json"),
        evaluation=evaluation,
        gallery=read_gallery(run),
    )
