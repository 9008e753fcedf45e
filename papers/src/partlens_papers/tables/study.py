"""What the jobs of a table gave: their numbers by performer, category and seed, beside the printed ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from partlens_papers.tables.published import Measure, PublishedRow, Subject, published
from partlens_papers.tables.sweep import JobResult
from partlens_papers.tables.table_sums import Cell, mean_cell, printed, seeds_cell, undefined

Content = Mapping[str, Any]
Getter = Callable[[Content], Cell | None]

SAME_PEAK = {"explainer_largest": ("largest", "explainer"), "tap_centroid": ("centroid", "tap")}
"""Where an evaluation keeps what is read otherwise than by default, so that like stands beside like."""


def localisation(subject: str, score: str) -> Getter:
    """Return how to find a localisation score of a subject in an evaluation."""

    def get(content: Content) -> Cell | None:
        found = content["evaluation"]
        if subject in SAME_PEAK:
            reading, layer = SAME_PEAK[subject]
            scores = found.get("same_peak", {}).get(reading, {}).get(layer, {})
            otherwise: Cell | None = scores.get(score)
            return otherwise
        if subject in {"tap", "top"}:
            found = found["performer"]
        elif subject in {"random", "centre", "corner"}:
            found = found["nulls"]
        value: Cell | None = found[subject].get(score) if subject in found else None
        return value

    return get


def fidelity(*path: str) -> Getter:
    """Return how to find a number of the reconstruction in an evaluation; one that was not measured is ``None``."""

    def get(content: Content) -> Cell | None:
        found: Any = content["evaluation"]
        for name in path:
            if name == "last" and isinstance(found, Mapping):
                found = list(found.values())[-1] if found else None
            else:
                found = found.get(name) if isinstance(found, Mapping) else None
        cell: Cell | None = found
        return cell

    return get


def as_printed(content: Content) -> Cell | None:
    """Read the explainer's instability as print and performers are read, by largest cells, where both were measured.

    An explainer that is read by centroids must not win by how it is read.
    """
    largest = localisation("explainer_largest", "instability")(content)
    return localisation("explainer", "instability")(content) if largest is None else largest


@dataclass(frozen=True)
class Study:
    """What the jobs of a table gave.

    Attributes:
        table: which.
        scores: by (performer, category, seed, kind).
        networks: by performer, its name in the papers; ``None`` where they did not study it.
        categories: in their order.
        data: the papers' name of the data set.
        seed: of the intervals.
        setting: the papers': ``single``, ``multi`` or ``multi softmax``; of several categories together the label is
            the only category.
    """

    table: str
    scores: Mapping[tuple[str, str, int, str], Content]
    networks: Mapping[str, str | None]
    categories: tuple[str, ...]
    data: str
    seed: int
    setting: str = "single"

    @staticmethod
    def of(
        table: str,
        results: Sequence[JobResult],
        networks: Mapping[str, str | None],
        categories: tuple[str, ...],
        data: str,
        seed: int,
        setting: str = "single",
    ) -> Study:
        """Take in what finished."""
        scores = {
            (r.job.performer, r.job.category, r.job.seed, r.job.kind): r.content
            for r in results
            if r.status == "finished"
        }
        return Study(table, scores, networks, categories, data, seed, setting)

    def found(self, performer: str, category: str, kind: str) -> list[Content]:
        """Return the results of all seeds."""
        return [c for (p, g, _, k), c in sorted(self.scores.items()) if (p, g, k) == (performer, category, kind)]

    def cells(self, performer: str, category: str, kind: str, get: Getter) -> list[Cell]:
        """Return a number of every seed, undefined ones left out."""
        found = (get(content) for content in self.found(performer, category, kind))
        return [cell for cell in found if cell is not None and cell["value"] is not None]

    def groups(self, performer: str, kind: str, *getters: Getter) -> list[list[list[float]]]:
        """Return ``[quantity][category][seed]`` of the seeds where all quantities are defined; no empty category."""
        groups: list[list[list[float]]] = [[] for _ in getters]
        for category in self.categories:
            rows = [[get(content) for get in getters] for content in self.found(performer, category, kind)]
            whole = [row for row in rows if all(cell is not None and cell["value"] is not None for cell in row)]
            if whole:
                for group, column in zip(groups, zip(*whole, strict=True), strict=True):
                    group.append([float(cell["value"]) for cell in column if cell is not None])
        return groups

    def mean(self, performer: str, kind: str, get: Getter) -> Cell:
        """Return the mean over categories and seeds; of a single result that result with its interval over photos."""
        (group,) = self.groups(performer, kind, get)
        if len(group) == 1 and len(group[0]) == 1:
            return next(cell for category in self.categories for cell in self.cells(performer, category, kind, get))
        return mean_cell(group, seed=self.seed)

    def number(self, performer: str, kind: str, get: Getter) -> float | None:
        """Return the mean alone."""
        value = self.mean(performer, kind, get)["value"]
        return None if value is None else float(value)

    def one(self, performer: str, category: str, kind: str, get: Getter) -> Cell:
        """Return a category's number over its seeds."""
        return seeds_cell(self.cells(performer, category, kind, get))

    def rows(
        self, measure: Measure, network: str | None, subject: Subject | None, data: str
    ) -> tuple[PublishedRow, ...]:
        """Return the printed rows of a network in this study's setting; none for a network the papers did not study."""
        if network is None:
            return ()
        return published(measure, network=network, subject=subject, data=data, setting=self.setting)

    def printed(self, performer: str, measure: Measure, subject: Subject, category: str | None = None) -> Cell:
        """Return the papers' figure for the same network and data: of a category, or of the mean over ours."""
        network = self.networks.get(performer)
        rows = self.rows(measure, network, subject, self.data)
        for row in rows:
            if category is not None:
                if category in row.values:
                    return printed(row.values[category], row.source)
                continue
            mean = row.mean_over(self.categories) if row.values else row.average
            if mean is not None:
                return printed(mean, row.source)
        return undefined("published")
