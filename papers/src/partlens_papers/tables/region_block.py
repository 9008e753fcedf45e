"""The block of part interpretability (CVPR 2018, Tables 1 and 2), in the tables whose photos have regions of parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from partlens.errors import REGION_READINGS
from partlens_papers.tables.published import Subject, published
from partlens_papers.tables.study import Content, Getter, Study
from partlens_papers.tables.table_blocks import column, defined, present, row
from partlens_papers.tables.table_sums import Cell, printed

OTHER_PHOTO = "other photo"
_NULLS = {"random": "null: random cells", "centre": "null: centre"}


def _of(subject: str, reading: str, main: str) -> Getter:
    def get(content: Content) -> Cell | None:
        found: Mapping[str, Any] = content.get("evaluation", {}).get("part_interpretability", {}).get(reading, {})
        if subject in _NULLS:
            null: Cell | None = found.get(subject)
            return null
        layers = found.get("other_photo" if subject == OTHER_PHOTO else "layers", {})
        layer: Cell | None = layers.get(main if subject == OTHER_PHOTO else subject)
        return layer

    return get


def _of_rival(name: str, reading: str) -> Getter:
    def get(content: Content) -> Cell | None:
        found: Cell | None = content["rivals"].get(name, {}).get("part_interpretability", {}).get(reading)
        return found

    return get


def region_block(
    study: Study,
    kind: str,
    subjects: Mapping[str, str],
    *,
    rivals: tuple[str, Sequence[str]] | None = None,
    printed_of: Mapping[Subject, str] | None = None,
) -> dict[str, Any]:
    """Return part interpretability of layers, their regions on other photos, nulls and rivals; no rows where unknown.

    Args:
        study: what the jobs gave.
        kind: of the jobs.
        subjects: layers, the first the one whose regions are also laid on other photos.
        rivals: kind of the rivals' jobs, and their names.
        printed_of: whose printed figures stand beside, and how to call them.
    """
    main = next(iter(subjects))
    rows = []
    for label in present(study, kind):
        named = {
            main: subjects[main],
            OTHER_PHOTO: f"… {subjects[main]}: its regions on other photos",
            **{key: name for key, name in subjects.items() if key != main},
            **_NULLS,
        }
        own = [
            row(
                name,
                {reading: study.mean(label, kind, _of(subject, reading, main)) for reading in REGION_READINGS},
                strong=subject == main,
                group=label,
            )
            for subject, name in named.items()
        ]
        if rivals is not None:
            own += [
                row(name, {r: study.mean(label, rivals[0], _of_rival(name, r)) for r in REGION_READINGS}, group=label)
                for name in rivals[1]
            ]
        own = [line for line in own if any(defined(cell) for cell in line["cells"].values())]
        network = study.networks[label]
        if own and network is not None:
            own += [
                row(f"{name}, {line.setting}, {line.data}", {"round": printed(line.average, line.source)}, group=label)
                for subject, name in (printed_of or {}).items()
                for line in published("part_interpretability", network=network, subject=subject, setting=None)
            ]
        rows += own
    lead = "Share of photos on which a filter's region overlaps a part by more than 0.2 of their union, for the part "
    lead += "that it meets most often; mean over filters. Higher is better, if what knows nothing has less: a region "
    lead += "that never leaves the centre, or the same filters' regions laid on other photos. Print has masks of parts."
    columns = [column(key, name, "", "higher") for key, name in REGION_READINGS.items()]
    return {"key": f"regions-{kind}", "title": "Part interpretability", "lead": lead, "columns": columns, "rows": rows}
