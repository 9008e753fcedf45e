"""The verb explain: one folder per image with numbers, arrays, pictures and a page."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from partlens.attribution.record import ExplanationConfig, ExplanationRecord, Preset, Style
from partlens.data.images import ImageSet
from partlens.errors import ImageError, InputError, InputTypeError, RunError, expected, listed
from partlens.progress import Progress
from partlens.records import read_json, remove_leftovers, sole_writer
from partlens.run import Run
from partlens.shards import Device
from partlens.verbs.runs import verb

if TYPE_CHECKING:
    import numpy as np
    from torch import nn

    from partlens.network.performer import Performer


@verb
def explain(
    run: str | Path,
    images: str | Path | Image.Image | np.ndarray | Sequence[str | Path | Image.Image | np.ndarray] | ImageSet,
    *,
    model: str | nn.Module | Performer | None = None,
    classes: Sequence[str] | None = None,
    count: int = 2,
    preset: Preset = "partlens",
    config: ExplanationConfig | Mapping[str, Any] | None = None,
    style: Style = "glow",
    out: str | Path | None = None,
    compute: Device | Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> list[Path]:
    """Explain predictions: what each part adds, which relevant filters contributed most, and where each acted.

    A run with an inspection tells what each part carries of the network's own score (see :func:`partlens.inspect`), one
    with a selection the relevant filters, one with an explainer what its parts add (see :func:`partlens.parts`); a run
    with several of them tells all.

    Args:
        run: a run directory with an inspection, a selection, an explainer or several of them.
        images: files, folders of files, or an :class:`~partlens.data.images.ImageSet`; in Python also images of Pillow
            or arrays.
        model: the performer; optional where the run can load it by its name.
        classes: names of the classes to explain; by default the most likely ones (of parts: the predicted one, where
            the explainer knows its parts).
        count: how many of the most likely classes of the selection.
        preset: how relevant filters are explained: ``partlens``, or ``paper`` as printed.
        config: a whole configuration, or fields to change in the preset.
        style: colours of the overlays; ``jet`` as in the authors' figures.
        out: folder for the explanations; by default ``explanations`` in the run directory.
        compute: on which device the network computes.
        progress: how to show progress; optional.

    Returns:
        One folder per image: ``explanation.json``, ``arrays.safetensors``, PNGs and a page.

    Raises:
        AtWorkError: another process writes there.
        ImageError: no image, or one that cannot be read.
        InputError: an unknown class.
        RunError: neither a finished selection nor an explainer, another performer, or a wrong ``parts.json``.
    """
    from partlens.verbs.explained_images import Stage

    show = progress or Progress.silent()
    if count < 1:
        raise InputError(expected("at least 1 class to explain", count, "Set --count to 1 or more"))
    where = Device.of(compute)
    how = config if isinstance(config, ExplanationConfig) else ExplanationConfig.preset(preset, **dict(config or {}))
    stage = Stage.opened(Path(run), model, where, classes, count, how, style)
    found = _image_files(images, show)
    target = Path(out or Path(run) / "explanations")
    with Run(Path(run)).writing() if out is None else sole_writer(target):
        folders = [target / name for name in _folder_names(found.keys, found.digests(), target)]
        for folder in folders:
            remove_leftovers(folder)
        stage.write(found, folders, show)
    show.say(f"wrote {len(folders)} explanation{'s' if len(folders) != 1 else ''} to {target}")
    return folders


def _one_by_one(images: Any) -> list[Any]:
    """Return what is to be explained as a list: one file, picture or array, or several of them."""
    if isinstance(images, (str, os.PathLike, Image.Image)) or getattr(images, "ndim", 4) < 4:
        return [images]
    if not isinstance(images, Iterable):
        raise InputTypeError(expected("images to explain", type(images).__name__, "Give files, a folder or arrays"))
    return list(images)


def _folder_files(folder: Path, show: Progress) -> tuple[Path, ...]:
    readable, dropped = ImageSet.from_folder(folder).readable()
    for text in (*(f"skipped {folder / each.key}: {each.reason}" for each in dropped), *readable.notes):
        show.say(text)
    return readable.files


def _image_files(images: Any, show: Progress) -> ImageSet:
    """Return the images to explain; of folders the files that can be read, the others are told."""
    if isinstance(images, ImageSet):
        return images
    given = _one_by_one(images)
    named = [isinstance(each, (str, os.PathLike)) for each in given]
    if given and not any(named):
        return ImageSet.from_arrays(given)
    if not all(named):
        kinds = listed(sorted({type(each).__name__ for each in given}))
        raise InputTypeError(expected("files alone or pictures alone to explain", kinds, "Explain them in two calls"))
    files: list[Path] = []
    for path in map(Path, given):
        files += _folder_files(path, show) if path.is_dir() else [path]  # one that was named has to be there
    if not files:
        raise ImageError(expected("at least 1 image to explain", 0, "Name image files or a folder"))
    return ImageSet.from_files(files)


def _explains(folder: Path, name: str, content: str) -> bool:
    """Whether a folder is free for an image: none is there, or it holds an explanation of the same path or content."""
    try:
        held = read_json(folder / ExplanationRecord.FILE)  # one of an older schema is made anew, too
    except RunError:
        return True  # none, or a damaged one, which no page shows
    return held.get("path") == name or held.get("content") == content


def _folder_names(names: Sequence[str], contents: Sequence[str], target: Path) -> list[str]:
    """Return a folder name for each image, the same names told apart by a number.

    A folder that holds the explanation of another image, from an earlier call, is kept.
    """
    plain = [re.sub(r"[^\w.-]", "_", Path(name).stem) or "image" for name in names]
    own = {name.casefold() for name in plain}  # some file systems take A and a for one name
    result: list[str] = []
    for name, whole, content in zip(plain, names, contents, strict=True):
        taken = {each.casefold() for each in result}
        free, number = name, 1
        # A number that neither another image's own name has nor one given before.
        while free.casefold() in (taken if number == 1 else taken | own) or not _explains(
            target / free, whole, content
        ):
            number += 1
            free = f"{name}-{number}"
        result.append(free)
    return result
