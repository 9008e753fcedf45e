"""Which data set a folder holds: the layouts that are known, and how a folder is recognised."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from partlens_papers.data import animal_part, animal_pose, cub, pascal_part
from partlens_papers.data.listing import Choice, Listing

LayoutName = Literal["cub", "animal-part", "pascal-part", "animal-pose"]


@dataclass(frozen=True)
class Layout:
    """A data set's layout.

    Attributes:
        name: short name, as in :attr:`~partlens_papers.data.listing.Listing.layout`.
        title: the data set's name in words.
        why_not: gives what keeps a folder from being read so, ``""`` where nothing does.
        read: lists the content of such a folder.
    """

    name: LayoutName
    title: str
    why_not: Callable[[Path], str]
    read: Callable[[Path, Choice], Listing]

    def matches(self, folder: Path) -> bool:
        """Return whether a folder is in this layout."""
        return not self.why_not(folder)


LAYOUTS = (
    Layout("cub", "CUB-200-2011", cub.why_not, cub.read),
    Layout("animal-part", "ILSVRC 2013 DET Animal-Part", animal_part.why_not, animal_part.read),
    Layout("pascal-part", "Pascal-Part (VOC 2010)", pascal_part.why_not, pascal_part.read),
    Layout("animal-pose", "Animal-Pose", animal_pose.why_not, animal_pose.read),
)


def layout_of(folder: Path | str) -> Layout | None:
    """Return the layout in which a folder is, None where it is in none of them.

    Example:
        >>> import tempfile
        >>> layout_of(tempfile.mkdtemp()) is None
        True
    """
    return next((layout for layout in LAYOUTS if layout.matches(Path(folder))), None)
