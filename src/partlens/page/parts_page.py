"""What the page draws of parts: ``parts.json`` with its pictures, and figures. The words are the template's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from partlens.estimate import Estimate
from partlens.object_parts.inspection import InspectedCategory, InspectRecord
from partlens.object_parts.record import Evidence, FoundPart, NamedPart, PartContribution, PartsFile
from partlens.page import figures
from partlens.page.explanation_page import ExplanationData
from partlens.page.views import Chapter, Embedded, Figure, Pictures

_MEASURES = {
    "shapley": "Shapley value",
    "integrated_gradients": "integrated gradients",
    "gradient_activation": "gradient × activation (the papers)",
    "part_size": "baseline: by the number of filters alone",
}


@dataclass(frozen=True)
class _PartRow:
    """What counts as one part."""

    part: NamedPart  # name and filters
    # the parts of the file that have this name, each with its picture
    found: tuple[tuple[FoundPart, Embedded | None], ...]
    adds: PartContribution | None  # what it adds; None where that was measured on other parts


@dataclass(frozen=True)
class PartsData:
    """Everything that the page says of parts."""

    file: PartsFile  # as it was written
    inspected: tuple[InspectedCategory, ...]  # what the same run's inspection found on the performer
    rows: tuple[_PartRow, ...]  # of parts with filters

    @property
    def measured(self) -> bool:
        """Whether contributions were measured on the parts as they are now."""
        return self.file.contributions is not None and all(row.adds is not None for row in self.rows)

    @property
    def empty(self) -> tuple[str, ...]:
        """Names of parts without a filter."""
        named = {row.part.name for row in self.rows}
        return tuple(dict.fromkeys(n for p in self.file.parts if (n := p.name.strip()) not in named))

    @property
    def like_random(self) -> tuple[str, ...]:
        """Names of parts that add by integrated gradients what as many random filters add."""
        rows = [(row.part.name, row.adds) for row in self.rows if row.adds is not None]
        shares = ((name, one.integrated_share, one.integrated_null) for name, one in rows)
        return tuple(name for name, own, null in shares if null.low <= own.value <= null.high)

    def over_categories(self, name: str) -> float:
        """Return the mean over categories of something that random peaks reach; NaN where the rule does not use it."""
        found = [v for one in self.file.evidence if math.isfinite(v := _known(one, name))]
        return sum(found) / len(found) if found else math.nan

    @classmethod
    def read(cls, run: Path, pictures: Pictures) -> Self | None:
        """Read what the page says of parts; ``None`` where the run has no ``parts.json``.

        Raises:
            RunError: the file is damaged or of another version, or a strip is missing.
        """
        file = PartsFile.read_if_there(run)
        if file is None:
            return None
        adds, rows = file.measured() or {}, []
        for part in file.named:
            found = tuple((p, pictures.read(run, p.strip)) for p in file.parts if p.id in part.ids)
            rows.append(_PartRow(part, found, adds.get(part.filters)))
        inspected = InspectRecord.read_if_there(run)
        known = () if inspected is None else inspected.categories
        return cls(file, tuple(one for one in known if one.name in file.categories), tuple(rows))

    def view(self, images: Sequence[ExplanationData]) -> dict[str, Any]:
        """Return what the template shows.

        ``figures`` are by name, only those with something to show; ``checks`` say how well each measure predicts what
        is lost; ``explained`` are (image, anchor, what its parts add) of explained photos.
        """
        contributions = self.file.contributions
        checks = contributions.removal_check if self.measured and contributions else {}
        return {
            "data": self,
            "figures": {name: Figure(caption, svg) for name, caption, svg in _drawn(self) if svg},
            "checks": [(words, checks[name]) for name, words in _MEASURES.items() if name in checks],
            "explained": [
                (image.record.image, image.anchor, f"{one.name}: {one.headline}")
                for image in images
                for one in image.record.parts
            ],
        }

    def chapter(self, *, explained: bool) -> Chapter:
        """Describe the chapter for the contents; what parts add counts filters as well, and is no headline."""
        named = ", ".join(f"{row.part.name} {len(row.part.filters)}" for row in self.rows)
        sections = [("which-parts", "Which parts"), ("part-contributions", "What they add"), ("removal", "Taken away")]
        return Chapter(
            kind="parts",
            anchor="named-parts",
            title="Parts of the explainer's filters",
            headline=f"The explainer's filters by the part where they peak: {named}.",
            sections=(*sections, *([("part-photos", "In photos")] if explained else [])),
        )


def _known(evidence: Evidence, name: str) -> float:
    value = getattr(evidence, name)
    return value.value if isinstance(value, Estimate) else float(value)


def _row(name: str, share: Estimate, null: Estimate | None = None) -> figures.ScoreRow:
    percent, band = share.scaled(100), (math.nan, math.nan) if null is None else null.scaled(100).interval
    text = f"{percent.value:.1f} %".replace("-", "−")
    return figures.ScoreRow(name, "explainer", percent.value, *percent.interval, text, band)


def _drawn(data: PartsData) -> list[tuple[str, str, str | None]]:
    """Return name, caption and drawing of each figure; no drawing where there is nothing to show."""
    adds = [(row.part.name, row.adds) for row in data.rows if row.adds is not None]
    total = sum(len(row.part.filters) for row in data.rows)
    sizes = {row.part.name: len(row.part.filters) / total for row in data.rows}
    shares = [_row(name, one.share) for name, one in adds]
    nulls = [_row(name, one.integrated_share, one.integrated_null) for name, one in adds]
    marks = [(name, one.predicted, one.measured) for name, one in adds]
    return [
        (
            "sizes",
            "Share of the filters by part",
            figures.parts_chart("Share of filters by part", [("filters", "explainer", sizes)]),
        ),
        (
            "shares",
            "Share of what all parts add to the score (Shapley), mean over photos",
            figures.scores_chart("Share of what the parts add", "", shares, " %"),
        ),
        (
            "nulls",
            "The same by integrated gradients; grey: as many random filters",
            figures.scores_chart("Share by integrated gradients", "", nulls, " %"),
        ),
        (
            "removal",
            "Loss of the score without a part (up) against what was predicted (right)",
            figures.removal_chart("Predicted and measured loss", marks),
        ),
    ]
