"""What verbs share: the photos and the performer of a run; and the verbs layers and report."""

from __future__ import annotations

import contextlib
import functools
import os
import random
import warnings
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from partlens.data.images import ImageSet
from partlens.errors import ImageError, RunError, WeightsError, checked, expected, listed, printable, usual_modes
from partlens.progress import Progress
from partlens.run import DataInfo, PassPrecision, PerformerInfo, Run, RunRecord, Unreadable

if TYPE_CHECKING:
    import torch
    from torch import nn

    from partlens.network.layers import LayerInfo
    from partlens.network.performer import Performer

_P = ParamSpec("_P")
_T = TypeVar("_T")
_R = TypeVar("_R", bound=RunRecord)

_SAFE = ("torchvision:", "timm:", "partlens:")


def verb(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """Make a function a verb: it hands the process back as it found it.

    Some libraries draw from Python's random numbers, set environment variables and add warning filters while they are
    imported. The first call of a verb is when that happens, in the middle of the user's work. Arguments of another kind
    than it takes are refused (`partlens.errors.checked`). It computes in torch's and NumPy's usual modes.
    """
    inner = checked(function)

    @functools.wraps(function)
    def untouched(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        drawn, known, filters = random.getstate(), set(os.environ), list(warnings.filters)
        try:
            with usual_modes():
                return inner(*args, **kwargs)
        finally:
            random.setstate(drawn)
            for name in set(os.environ) - known:
                del os.environ[name]
            if list(warnings.filters) != filters:
                warnings.filters[:] = filters  # type: ignore[index]
                warnings._filters_mutated()  # type: ignore[attr-defined]  # noqa: SLF001

    return untouched


def performer_info(performer: Performer, device: torch.device | None = None) -> PerformerInfo:
    """Return what records say of a performer, and of the device where it computes, if that is another than its own."""
    return PerformerInfo(
        name=performer.name,
        spec=performer.spec,
        weights_sha256=performer.weights_sha256,
        preprocessing=performer.preprocessing.to_dict(),
        notes=(*performer.notes, *performer.outputs.notes),
        device=str(device or performer.device),
    )


def with_precision(
    performer: Performer, record: _R, folder: Path, chosen: Callable[[], PassPrecision], show: Progress
) -> tuple[Performer, _R]:
    """Return the performer in the precision of a run's passes, and the record that names it.

    It is chosen once (`partlens.network.precision.chosen_precision`) and written into the record in ``folder``: a run
    that goes on reads what its record says.
    """
    found = record.performer.precision
    if found is None:
        found = chosen()
        record = record.changed(performer=record.performer.changed(precision=found))
        record.write(folder)
        if found.used != "float32":
            show.say(_precision_said(found))
    return performer.computing(found.used), record


def _precision_said(found: PassPrecision) -> str:
    """Say in which precision photos are read, and how far that is from float32."""
    if not found.photos:
        return f"photos are read in {found.used}, as asked"
    agreed = round(found.agreement * found.photos)
    return (
        f"photos are read in {found.used}, {found.faster:.1f} times as fast as float32: at most {found.error:.1%} off, "
        f"{agreed} of {found.photos} decisions equal"
    )


def data_info(
    images: ImageSet, unreadable: tuple[Unreadable, ...], fingerprint: str, categories: tuple[str, ...] = ("",)
) -> DataInfo:
    """Return what records say of photos."""
    given = str(images.path or "")
    path = given if given and given == printable(given) else None  # bytes that no record can hold; given again later
    return DataInfo(name=images.name, path=path, fingerprint=fingerprint, categories=categories, unreadable=unreadable)


def open_photos(
    data: str | Path | ImageSet | None, run: RunRecord | None = None, show: Progress | None = None
) -> tuple[ImageSet, tuple[Unreadable, ...]]:
    """Open a folder, a table or a set of images, else what a run was made from; drop what cannot be read, by name.

    Raises:
        ImageError: not one photo can be read.
        RunError: no photos are given, and the run was made from photos that no path names.
    """
    where = run.data.path if data is None and run is not None else data
    if where is None:
        rule = "photos for this run, which was made from none that a path in UTF-8 names"
        raise RunError(expected(rule, "none", "Give them again (data=)"))
    images = where if isinstance(where, ImageSet) else ImageSet.open(Path(where))
    readable, dropped = images.readable()
    skipped = [f"{len(dropped)} photos cannot be read: {listed([photo.key for photo in dropped])}"] if dropped else []
    if show is not None and (said := [*skipped, *readable.notes]):
        show.say(f"not used of {readable.name}: {'; '.join(said)}")
    return readable, dropped


def open_performer(run: RunRecord, model: str | nn.Module | Performer | None, device: str | None = None) -> Performer:
    """Load the performer of a run, where it can be by its name, and check that it is the same.

    Raises:
        RunError: the run was made with a network object and none is given, or the weights are others.
    """
    named = run.performer.spec if model is None else model
    if named is None:
        rule = "a model for this run, which was made with a network object"
        raise RunError(expected(rule, "none", "Give the network again (model=)"))
    if model is None and not str(named).startswith(_SAFE):
        # The file may be a stranger's, and a factory is code that would run before its weights are compared.
        rule = f"a model for this run, which names the code {named}"
        raise RunError(expected(rule, "none", f"If you trust it, give --model {named}"))
    try:
        performer, wanted = loaded(named, device), run.performer.weights_sha256
    except WeightsError as error:
        if model is not None:
            raise
        rule = f"the performer of the run, {named}"
        raise RunError(expected(rule, f"none ({error})", "Say where its weights are now (--model)")) from error
    if performer.weights_sha256 != wanted:
        rule, remedy = f"the performer of the run (weights {wanted[:12]})", "Give the model the run was made with"
        raise RunError(expected(rule, performer.weights_sha256[:12], f"{remedy} (--model)"))
    return performer


def chosen_categories(category: str | Sequence[str] | None, known: Collection[str] = ()) -> tuple[str, ...]:
    """Return the categories that are meant, in alphabetical order; ``("",)``, all photos as one, for none.

    Example:
        >>> chosen_categories("fox,cat"), chosen_categories(["fox"]), chosen_categories(None)
        (('cat', 'fox'), ('fox',), ('',))
    """
    return ("",) if category is None else tuple(sorted(category_names(category, known))) or ("",)


def enough_photos(
    images: ImageSet,
    categories: Sequence[str],
    split: str,
    remedy: str = "Add photos, or name another split (--split)",
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the photos of categories in a split and the others there (`ImageSet.rows_of`).

    Raises:
        ImageError: fewer than two photos of the categories, or what is unknown.
    """
    own, others = images.rows_of(categories, split)
    if len(own) < 2:
        named = ", ".join(filter(None, categories))
        rule = f"at least 2 photos{f' of {named}' if named else ''} in the split {split}"
        raise ImageError(expected(rule, len(own), remedy))
    return own, others


def labels_of(images: ImageSet, categories: Sequence[str], rows: Sequence[int]) -> torch.Tensor:
    """Return the category of each row, an index into ``categories``; all 0 where all photos count as one."""
    import torch

    whole = tuple(categories) == ("",)
    return torch.tensor([0 if whole else categories.index(images.categories[i]) for i in rows], dtype=torch.long)


def loaded(model: str | nn.Module | Performer, device: str | None = None) -> Performer:
    """Return the performer that a name, a network or a performer means, on a device (`device_of`)."""
    from partlens.network.performer import device_of
    from partlens.network.zoo import load_performer

    performer = load_performer(model)
    return performer.on(device_of(device, performer.device))


@verb
def layers(model: str | nn.Module | Performer) -> list[LayerInfo]:
    """List every layer of a model that can be tapped, in execution order.

    Args:
        model: ``torchvision:NAME``, ``torchvision:NAME@WEIGHTS`` (a weights name or a file), ``timm:NAME``,
            ``partlens:NAME``, ``package.module:factory``, or a network.

    Returns:
        Name, kind, output shape, stride, receptive field, and whether it is the default tap.
    """
    return list(loaded(model).layers)


def category_names(given: str | Sequence[str], known: Collection[str] = ()) -> tuple[str, ...]:
    """Read names from a text with commas, or from a list of such, each once; ``known`` ones with commas stay whole.

    Example:
        >>> category_names(["cat, tench, Tinca tinca,cat", "fox,cat"], {"cat", "tench, Tinca tinca"})
        ('cat', 'tench, Tinca tinca', 'fox')
    """
    found: list[str] = []
    for text in [given] if isinstance(given, str) else given:
        pieces = text.split(",")
        while pieces:
            ends = range(len(pieces), 0, -1)
            last = next((end for end in ends if ",".join(pieces[:end]).strip() in known), 1)
            found.append(",".join(pieces[:last]).strip())
            pieces = pieces[last:]
    return tuple(dict.fromkeys(filter(None, found)))


def sampled(rows: Sequence[int], count: int, seed: int) -> list[int]:
    """Draw at most ``count`` rows, in their order."""
    import torch

    if len(rows) <= count:
        return list(rows)
    drawn = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:count].sort().values
    return [rows[int(i)] for i in drawn]


@verb
def report(run: str | Path, *, out: str | Path | None = None, progress: Progress | None = None) -> Path:
    """Write the page of a run: one self-contained HTML file.

    Args:
        run: the run directory; evaluated already, for the page to have numbers.
        out: the file; by default ``report.html`` in the run directory.
        progress: how to show progress; silent by default.

    Returns:
        Path of the page.

    Raises:
        RunError: the run directory is missing or damaged.
    """
    from partlens.page.page import write_report

    held = Run(Path(run)).writing() if out is None and Path(run).is_dir() else contextlib.nullcontext()
    with held:
        page = write_report(Path(run), None if out is None else Path(out))
    (progress or Progress.silent()).say(f"wrote {page}")
    return page
