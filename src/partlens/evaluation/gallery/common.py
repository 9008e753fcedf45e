"""What both kinds of pictures share: how much is drawn, photos as the network sees them, maps of both networks."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

from partlens.attribution.receptive_pictures import OcclusionConfig
from partlens.data.images import ImageSet
from partlens.errors import InputError, check_names, expected
from partlens.explainer.network import Explainer
from partlens.network.taps import forward_taps
from partlens.network.zoo import Performer
from partlens.records import write_atomically

PHOTOS = 6
SIDE_PX = 176
BATCH = 32

GalleryKind = Literal["quick", "full", "none"]
FieldKind = Literal["occlusion", "analytic"]
"""What a filter reads: found by covering pieces of photos, or the round field that it has in theory."""


@dataclass(frozen=True)
class Effort:
    """How much is spent on pictures: settings of the occlusion, photos covered, photos of Grad-CAM."""

    occlusion: OcclusionConfig
    covered: int
    attention: int


EFFORTS: Mapping[str, Effort] = {
    # Twice the released stride and fewer photos: 121 places on 8 photos at 224 px.
    "quick": Effort(OcclusionConfig(stride_px=18, images=4), 8, 24),
    # As released: 484 places, 10 photos a filter, chosen out of 24 for all filters.
    "full": Effort(OcclusionConfig(), 24, 100),
}
"""What ``quick`` and ``full`` mean, for inputs of 224 px; other sizes are scaled."""


def occlusion_settings(
    gallery: GalleryKind, size_px: tuple[int, int], changes: OcclusionConfig | Mapping[str, Any] | None
) -> OcclusionConfig:
    """Return how photos are covered: as the gallery says, scaled to the input, with changes in pixels of the input.

    Raises:
        InputError: a field that does not exist, or a value out of range.
    """
    if isinstance(changes, OcclusionConfig):
        return changes
    config = EFFORTS[gallery].occlusion.scaled(size_px)
    check_names(config, changes or {})
    return replace(config, **(changes or {}))


def check_gallery(
    gallery: GalleryKind,
    fields: FieldKind,
    size_px: tuple[int, int],
    occlusion: OcclusionConfig | Mapping[str, Any] | None,
) -> None:
    """Refuse what no gallery can be made of, before anything is measured.

    Raises:
        InputError: see :func:`write_gallery`.
    """
    if gallery not in ("quick", "full", "none"):
        raise InputError(expected("gallery to be quick, full or none", f"{gallery!r}", "Choose quick"))
    if fields not in ("occlusion", "analytic"):
        raise InputError(expected("fields to be occlusion or analytic", f"{fields!r}", "Choose occlusion"))
    if gallery != "none":
        occlusion_settings(gallery, size_px, occlusion)


def save_photo(path: Path, picture: Image.Image) -> None:
    """Write a JPEG, whole or not at all."""
    content = io.BytesIO()
    picture.save(content, "JPEG", quality=82)
    write_atomically(path, lambda p: p.write_bytes(content.getvalue()))


def small(frame: Image.Image) -> Image.Image:
    """Return a frame as small as the page shows it."""
    small = frame.copy()
    small.thumbnail((SIDE_PX, SIDE_PX), Image.Resampling.LANCZOS)
    return small


class JoinedMaps:
    """The masked maps of conv-interp-2 and the tap's maps of the same forward pass, one behind the other."""

    def __init__(self, performer: Performer, explainer: Explainer) -> None:
        self.performer = performer
        self.explainer = explainer
        self.tap = explainer.structure.tap
        self.first = {"explainer": 0, "performer": explainer.structure.channels_out}

    @torch.no_grad()
    def __call__(self, batch: Tensor) -> Tensor:
        """Return the maps of a preprocessed batch."""
        maps = forward_taps(self.performer, batch.contiguous(memory_format=torch.channels_last), [self.tap])[1]
        tapped = maps[self.tap].cpu()
        interp2 = self.explainer.interpret(tapped)[1]
        return torch.cat([self.explainer.masked(interp2), tapped], dim=1)


@dataclass(frozen=True)
class Frames:
    """The photos as the network sees them."""

    performer: Performer
    images: ImageSet
    rows: Sequence[int]

    def picture(self, index: int) -> Image.Image:
        """Return a photo as it is seen."""
        return self.performer.preprocessing.frame(self.images.read(self.rows[index]))

    def batch(self, indices: Sequence[int]) -> Tensor:
        """Return preprocessed photos."""
        return self.performer.preprocessing([self.images.read(self.rows[i]) for i in indices])
