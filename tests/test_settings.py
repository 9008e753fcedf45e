"""Settings and files refuse what they cannot use, whatever it is: one sentence each, never a traceback."""

from __future__ import annotations

import contextlib
import inspect
import json
import math
import random
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jaxtyping import TypeCheckError
from torch import nn

import partlens
from partlens.attribution.record import ExplanationConfig, ExplanationRecord, OcclusionConfig
from partlens.errors import InputTypeError, PartlensError, RunError
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


RUN = {"run": "nowhere", "model": None, "data": "nowhere", "out": "nowhere"}
DOORS: dict[str, dict[str, Any]] = {
    "mu_lasso": {"responses": np.eye(3), "labels": np.eye(3)},
    "guided_backprop": {"model": nn.Conv2d(3, 2, 3), "images": torch.rand(1, 3, 5, 5), "layer": "x", "filters": 0},
    "filter_loss": {"maps": torch.rand(2, 3, 5, 5), "templates": torch.rand(26, 5, 5)},
    "check_data": {"path": "nowhere"},
    "load_performer": {"model": nn.Conv2d(3, 2, 3)},
    "generated_flowers": {"count": 2, "size": 32},
    "render_flower": {"seed": 0, "size": 32},
    "fit_explainer": {**RUN, "model": "nowhere"},
    "select_features": {**RUN, "model": "nowhere"},
    "inspect": {**RUN, "model": "nowhere"},
    "evaluate": RUN,
    "parts": RUN,
    "explain": {**RUN, "images": "nowhere"},
    "report": RUN,
    "load_explainer": RUN,
    "load_selection": RUN,
    "layers": {"model": "nowhere"},
    "demo": {"out": "nowhere", "flowers": 1},
}
FLAGS = [("mu_lasso", "nonnegative"), ("select_features", "nonnegative"), ("select_features", "keep_cache")]
FLAGS += [("fit_explainer", "keep_cache"), ("inspect", "keep_cache")]


@pytest.mark.parametrize("name", DOORS)
def test_an_argument_of_any_kind_is_taken_or_refused(name: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)  # texts may be taken for the names of folders
    refusals = (PartlensError, TypeCheckError)  # the tests' own check of tensors comes before the function's
    function, parameters = getattr(partlens, name), inspect.signature(getattr(partlens, name)).parameters
    given = {key: value for key, value in DOORS[name].items() if key in parameters}
    for parameter in parameters:
        for wrong in (*WRONG, np.array([1, 2]), torch.tensor(1.0), "1", 1.5, [1, "a"]):
            with contextlib.suppress(*refusals):
                function(**{**given, parameter: wrong})


@pytest.mark.parametrize(("name", "flag"), FLAGS)
@pytest.mark.parametrize("wrong", ["yes", "False", 1, 0, None, np.array([True])])
def test_a_text_or_a_number_is_no_truth_value(name: str, flag: str, wrong: Any) -> None:
    function = getattr(partlens, name)
    given = {key: value for key, value in DOORS[name].items() if key in inspect.signature(function).parameters}
    with pytest.raises(InputTypeError, match=f"Expected {flag} as True or False, got .*Give that, or leave {flag} out"):
        function(**given, **{flag: wrong})


@pytest.mark.parametrize(
    ("number", "wrong"),
    [("mu", "1"), ("mu", True), ("tolerance", "1e-6"), pytest.param("mu", 10**400, id="mu-huge")],
)
def test_a_text_or_a_truth_value_is_no_number(number: str, wrong: Any) -> None:
    with pytest.raises(InputTypeError, match=f"Expected {number} as a number"):
        partlens.mu_lasso(np.eye(3), np.eye(3), **{number: wrong})


def test_numbers_of_numpy_are_numbers() -> None:
    assert partlens.mu_lasso(np.eye(3), np.eye(3), np.float64(1)).mu == 1
    assert len(partlens.generated_flowers(np.int64(2), size=np.int32(32))) == 2


@pytest.mark.parametrize(
    ("field", "wrong"),
    [
        ("channels", True),
        ("resize_px", ()),
        pytest.param("resize_px", 10**30, id="huge side"),
        pytest.param("scale", 10**400, id="huge scale"),
        ("resize", [1]),
    ],
)
def test_a_preprocessing_has_numbers_where_numbers_belong(field: str, wrong: Any) -> None:
    with pytest.raises(PartlensError, match=f"Expected {field} "):
        partlens.Preprocessing(**{field: wrong})
