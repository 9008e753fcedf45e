"""Pictures for the page: the photos on which a filter peaks highest with what it reads there, and Grad-CAM.

What a filter reads is found by covering pieces of photos (`partlens.attribution.receptive_pictures`); where a class
score
comes from, by Grad-CAM of both networks (`partlens.attribution.grad_cam`).
"""

from __future__ import annotations

from partlens.evaluation.gallery.common import FieldKind, GalleryKind, check_gallery, occlusion_settings
from partlens.evaluation.gallery.filters import chosen_filters, region_px, theoretical_px
from partlens.evaluation.gallery.writing import write_gallery

__all__ = [
    "FieldKind",
    "GalleryKind",
    "check_gallery",
    "chosen_filters",
    "occlusion_settings",
    "region_px",
    "theoretical_px",
    "write_gallery",
]
