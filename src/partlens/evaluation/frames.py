"""What both kinds of pictures share: how much is drawn, photos as the network sees them, maps of both networks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from partlens.attribution.record import OcclusionConfig
from partlens.data.images import ImageSet
from partlens.evaluation.results import FieldKind, GalleryKind
from partlens.explainer.network import Explainer
from partlens.network.performer import Performer
from partlens.network.taps import forward_taps

PHOTOS = 6
SIDE_PX = 176
BATCH = 32


@dataclass(frozen=True)
class GalleryPlan:
    """How much is spent on pictures."""

    # ``quick``: Grad-CAM is joined of 24 photos, and where photos are covered, 8 are, at 121 places each (224 px, about
    # 1,000 forward passes); ``full``, as the released code does: 100 and 24 photos, at 484 places; ``none``: no gallery
    kind: GalleryKind
    # ``mask`` outlines the cells that the mask keeps; ``occlusion`` what a filter reads, found by covering
    fields: FieldKind
    occlusion: OcclusionConfig  # how photos are covered, in pixels of the input
    covered: int  # photos that are covered
    attention: int  # photos of Grad-CAM
    seed: int = 0  # of the intervals and of the null

    @classmethod
    def of(
        cls,
        kind: GalleryKind,
        fields: FieldKind,
        size_px: tuple[int, int],
        occlusion: OcclusionConfig | Mapping[str, Any] | None = None,
        seed: int = 0,
    ) -> GalleryPlan:
        """Return a plan for inputs of a size; ``occlusion`` may be fields to change in what belongs to the kind.

        Raises:
            InputError: a field that does not exist, or a value out of range.
        """
        # Quick: twice the released stride and fewer photos. Full: as released, photos chosen out of 24 for all filters.
        quick = kind != "full"
        config = (OcclusionConfig(stride_px=18, images=4) if quick else OcclusionConfig()).scaled(size_px)
        config = occlusion if isinstance(occlusion, OcclusionConfig) else config.changed(occlusion or {})
        return cls(kind, fields, config, 8 if quick else 24, 24 if quick else 100, seed)


def small(frame: Image.Image) -> Image.Image:
    """Return a frame as small as the page shows it."""
    small = frame.copy()
    small.thumbnail((SIDE_PX, SIDE_PX), Image.Resampling.LANCZOS)
    return small


class JoinedMaps:
    """The masked maps of conv-interp-2 and the tap's maps of the same forward pass, one behind the other."""

    def __init__(self, performer: Performer, explainer: Explainer) -> None:
        self.performer = performer
        self.explainer = explainer.eval()
        self.tap = explainer.structure.tap
        self.first = {"explainer": 0, "performer": explainer.structure.channels_out}

    @torch.no_grad()
    def __call__(self, batch: Tensor) -> Tensor:
        """Return the maps of a preprocessed batch."""
        maps = forward_taps(self.performer, batch.contiguous(memory_format=torch.channels_last), [self.tap])[1]
        tapped = maps[self.tap]
        interp2 = self.explainer.interpret(tapped)[1]
        return torch.cat([self.explainer.masked(interp2), tapped], dim=1)


@dataclass(frozen=True)
class Frames:
    """The photos as the network sees them."""

    performer: Performer
    images: ImageSet
    rows: Sequence[int]

    def key(self, index: int) -> str:
        """Return a photo's name in the data set."""
        return self.images.keys[self.rows[index]]

    def picture(self, index: int) -> Image.Image:
        """Return a photo as it is seen."""
        return self.performer.preprocessing.frame(self._read(index))

    def _read(self, index: int) -> Image.Image:
        return self.images.read(self.rows[index], self.performer.preprocessing.scaled_size)

    def batch(self, indices: Sequence[int]) -> Tensor:
        """Return preprocessed photos."""
        return self.performer.preprocessing([self._read(i) for i in indices])
