"""In which precision passes over photos compute: the fastest one whose answers are those of float32.

Passes that only read need no gradients and no exact sums. Many processors compute convolutions several times as fast in
bfloat16, or with the filters of a cell side by side in memory (channels last). Which is fastest depends on the network
and the machine, and so does how far the answers move; both are measured on a few of the photos, never assumed.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from partlens.data.images import ImageSet
from partlens.errors import InputError, expected, first_line
from partlens.network.performer import Performer
from partlens.network.stream import decoded
from partlens.network.taps import Reduces, forward_taps
from partlens.run import PassPrecision, Precision

TOLERANCE = 0.03
"""How far a pass may be from float32: the norm of the difference over the norm, of scores and of each layer read."""

_PHOTOS = 16
_WORTH_SECONDS = 10.0
"""Photos that float32 reads in less time are read in float32: the probe would cost what it saves."""
_WORTH_TIMES = 1.1
_ENOUGH_TIMES = 1.5  # more than channels last alone gives
_ODD_DECISIONS = 0.005


def has_bfloat16_units(device: torch.device) -> bool:
    """Whether a device multiplies bfloat16 in hardware; emulated, a convolution takes ten times as long as float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())  # noqa: SLF001


def chosen_precision(
    performer: Performer,
    images: ImageSet,
    rows: Sequence[int],
    taps: Sequence[str] = (),
    *,
    passes: int | None = None,
    reduce: Reduces | None = None,
    wanted: Precision = "auto",
) -> PassPrecision:
    """Choose the precision of passes over photos.

    ``auto`` reads up to 16 of the photos in the precisions that the device has units for. Half of them warm it up,
    half are timed; where bfloat16 is 1.5 times as fast, no other is tried. Of those whose scores and layers are within
    `TOLERANCE` of float32, and that decide for the same class on 99.5 % of the photos (so on all of 16), the fastest is
    taken, where it is at least 1.1 times as fast.

    Args:
        performer: the network, on the device of the passes.
        images: the photos.
        rows: those that will be read.
        taps: layers whose maps, or what ``reduce`` keeps of them, must agree.
        passes: images that will go through the network; by default one per row.
        reduce: see `partlens.network.taps.read_taps`.
        wanted: another than ``auto`` is taken without a probe.

    Raises:
        InputError: bfloat16 for a network whose weights are of another type than float32.
    """
    own = _weights(performer)
    if wanted == "bfloat16" and own != "float32":
        raise InputError(expected("float32 weights for passes in bfloat16", own, "Use precision float32"))
    if wanted != "auto":
        return PassPrecision(used=wanted)
    count = passes or len(rows)
    if own != "float32" or min(len(rows), count / _PHOTOS) < 2:
        return PassPrecision(used="float32")
    some = list(dict.fromkeys(rows[k * len(rows) // _PHOTOS] for k in range(_PHOTOS)))
    probe = _Probe(performer, torch.cat([decoded(performer, images, row) for row in some]), taps, reduce)
    return probe.fastest() if probe.seconds * count >= _WORTH_SECONDS else PassPrecision(used="float32")


def _weights(performer: Performer) -> str:
    """Name the number types of a network's weights."""
    kinds = {str(weight.dtype).removeprefix("torch.") for weight in performer.module.parameters()}
    return ", ".join(sorted(kinds)) or "none"


class _Probe:
    """Reads the same photos in float32, then in other precisions."""

    def __init__(self, performer: Performer, photos: Tensor, taps: Sequence[str], reduce: Reduces | None) -> None:
        self.performer, self.photos, self.taps, self.reduce = performer, photos, taps, reduce
        self.reference, self.seconds = self._read("float32")

    def _read(self, precision: Precision) -> tuple[list[Tensor], float]:
        """Return scores and layers of all photos, and the seconds of one photo."""
        performer, seconds = self.performer.computing(precision), 0.0
        found: list[list[Tensor]] = []
        for half in self.photos.chunk(2):
            with _timed(performer.device) as clock:
                output, maps = forward_taps(performer, half, self.taps, self.reduce)
            seconds = clock[0] / len(half)
            found.append([performer.outputs.scores(output, len(half)), *maps.values()])
        return [torch.cat(halves) for halves in zip(*found, strict=True)], seconds

    def fastest(self) -> PassPrecision:
        """Try the precisions that the device has units for."""
        best, notes = PassPrecision(used="float32", photos=len(self.photos)), []
        units = has_bfloat16_units(self.performer.device)
        others: tuple[Precision, ...] = ("bfloat16", "float32-channels-last") if units else ("float32-channels-last",)
        for precision in others:
            if best.faster >= _ENOUGH_TIMES:
                break
            try:
                tried = self._tried(precision)
            except (RuntimeError, InputError) as error:  # layers that need another memory order, or overflow
                notes.append(f"{precision} is refused: {first_line(error)}")
                continue
            if tried.error > TOLERANCE or tried.agreement < 1 - _ODD_DECISIONS:
                notes.append(f"{precision} is {tried.error:.2g} off, with {tried.agreement:.1%} of decisions equal")
            elif tried.faster > max(best.faster, _WORTH_TIMES):
                best = tried
        return best.changed(notes=tuple(notes))

    def _tried(self, precision: Precision) -> PassPrecision:
        values, seconds = self._read(precision)
        errors = [_distance(one, other) for one, other in zip(values, self.reference, strict=True)]
        decided, wanted = (self.performer.outputs.decisions(each[0]).argmax(1) for each in (values, self.reference))
        return PassPrecision(
            used=precision,
            photos=len(self.photos),
            error=max(errors),
            agreement=float((decided == wanted).double().mean()),
            faster=self.seconds / seconds,
        )


def _distance(one: Tensor, other: Tensor) -> float:
    norm = other.norm()
    return float((one - other).norm() / norm) if bool(norm > 0) else float(one.norm())


@contextlib.contextmanager
def _timed(device: torch.device) -> Iterator[list[float]]:
    """Measure seconds; a GPU is waited for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    clock = [time.perf_counter()]
    yield clock
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    clock[0] = time.perf_counter() - clock[0]
