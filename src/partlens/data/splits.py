"""On which side an image falls, training or test, where nothing says so."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from partlens.errors import ImageError, expected, listed

_TEST_SHARE = 0.25


def split_of(photo: str) -> str:
    """Return the side on which a photo falls where no split was given.

    The first eight bytes of the SHA-256 of the name, read as a fraction of their range, decide: below 0.25
    the photo is for testing. So the side depends on the name alone, never on the order or number of the
    images, and all crops of one photo are on the same side.

    Example:
        >>> [split_of(name) for name in ("cat.jpg", "dog.jpg", "fox.jpg")]
        ['test', 'train', 'train']
    """
    digest = hashlib.sha256(photo.encode("utf-8", "surrogatepass")).digest()
    return "test" if int.from_bytes(digest[:8], "big") < _TEST_SHARE * 2**64 else "train"


def filled_splits(splits: Sequence[str], photos: Sequence[str]) -> tuple[str, ...]:
    """Give every image without a split that of its photo group, by name where no crop of it has one."""
    given: dict[str, str] = {}
    crossing: list[str] = []
    for split, photo in zip(splits, photos, strict=True):
        if split and given.setdefault(photo, split) != split:
            crossing.append(photo)
    if crossing:
        got = f"crops in several splits of {listed(list(dict.fromkeys(crossing)))}"
        remedy = "Give every crop of a photo the same split, or omit the photo groups"
        raise ImageError(expected("all crops of a photo in one split", got, remedy))
    return tuple(split or given.get(photo) or split_of(photo) for split, photo in zip(splits, photos, strict=True))
