"""Settings and files refuse what they cannot use, whatever it is: one sentence each, never a traceback."""

from __future__ import annotations

import json
import math
import random
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from partlens.attribution.record import ExplanationConfig, ExplanationRecord, OcclusionConfig
from partlens.errors import PartlensError, RunError
from partlens.evaluation.results import Evaluation, Gallery
from partlens.explainer.config import ExplainerConfig
from partlens.explainer.record import ExplainerRun, History
from partlens.object_parts.inspection import FindingConfig
from partlens.object_parts.record import PartsConfig
from partlens.records import Record, Settings
from partlens.selection.record import DescriptorConfig, SelectionConfig, SelectionRecord
from partlens_papers.networks.finetune_config import FinetuneConfig
from partlens_papers.rivals.interpretable_config import InterpretableConfig

PAGE = Path(__file__).parent / "page"
NESTED: list[Any] = []
for _ in range(5000):
    NESTED = [NESTED]

WRONG = [None, math.nan, math.inf, -math.inf, 10**400, -(10**5000), "abc", "", b"x", [], (1, 2), {}, {"a": 1}]
WRONG += [True, -1, 0, 1e-320, 1e308, NESTED, object(), complex(1), "\ud800"]
CONFIGS = [ExplainerConfig, DescriptorConfig, SelectionConfig, ExplanationConfig, OcclusionConfig, PartsConfig]
CONFIGS += [FindingConfig, FinetuneConfig, InterpretableConfig]


@pytest.mark.parametrize("kind", CONFIGS, ids=lambda kind: kind.__name__)
def test_a_setting_of_any_kind_is_taken_or_refused_by_name(kind: type[Settings]) -> None:
    for name in (*kind.model_fields, "nonsense"):
        for wrong in WRONG:
            try:
                made = kind(**{name: wrong})
            except PartlensError as error:
                assert len(str(error)) < 1000  # noqa: PT017 - most are refused, and some values are right
            else:
                assert not isinstance(wrong, (int, float)) or (math.isfinite(wrong) and abs(wrong) < 2**1024), made


@pytest.mark.parametrize("name", [*WRONG, "papers"], ids=lambda name: type(name).__name__)
def test_a_preset_of_any_kind_is_refused_with_the_two_there_are(name: Any) -> None:
    for kind in (ExplainerConfig, ExplanationConfig):
        with pytest.raises(PartlensError, match="Expected preset partlens or paper, got"):
            kind.preset(name)


def steps_of(content: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Give the way to every value of a file."""
    if above:
        yield above
    inside = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for step, value in inside:
        yield from steps_of(value, (*above, step))


def damaged(text: str, draw: random.Random) -> str:
    """Change, delete or mistype one value of a file, or cut it."""
    if draw.random() < 0.1:
        return text[: draw.randrange(len(text))]
    content = json.loads(text)
    way = draw.choice([way for way in steps_of(content) if way != ("schema",)])
    place = content
    for step in way[:-1]:
        place = place[step]
    if draw.random() < 0.3:
        del place[way[-1]]
    else:
        place[way[-1]] = draw.choice(
            [None, {}, [], "abc", -1, 10**25, 1e308, math.nan, True, [None], {"a": 1}, "9" * 50]
        )
    return json.dumps(content)


@pytest.mark.parametrize(
    ("kind", "file"),
    [
        (ExplainerRun, "run.json"),
        (History, "history.json"),
        (Evaluation, "evaluation.json"),
        (Gallery, "gallery/gallery.json"),
        (SelectionRecord, "selection.json"),
        (ExplanationRecord, "explanations/tulip/explanation.json"),
    ],
)
def test_a_file_with_one_wrong_value_is_read_or_refused_by_its_name(
    kind: type[Record], file: str, tmp_path: Path
) -> None:
    run = runpy.run_path(str(PAGE / "made_explainer.py"))["write_run"](tmp_path / "run")
    made = runpy.run_path(str(PAGE / "made_runs.py"))
    made["write_selection"](run, classes=2, features=2)
    made["write_explanation"](run, "tulip.jpg")
    path, draw = run / file, random.Random(0)
    whole = path.read_text()
    refused = 0
    for _ in range(60):
        path.write_text(damaged(whole, draw))
        try:
            kind.read(path.parent)
        except RunError as error:
            assert str(path) in str(error)  # noqa: PT017 - a value may be right by chance
            refused += 1
    assert refused > 20
