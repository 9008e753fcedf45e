"""A few photos of noise in three categories."""

from __future__ import annotations

import numpy as np
import pytest

from partlens.data.images import ImageSet


@pytest.fixture
def images() -> ImageSet:
    pixels = np.random.default_rng(0).integers(0, 256, (11, 20, 24, 3), dtype=np.uint8)
    return ImageSet.from_arrays(pixels, categories=["fox", "cat", "cat", "fox", *["cow"] * 7])
