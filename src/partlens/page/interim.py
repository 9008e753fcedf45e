"""The records of a run until the fit writes them itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Self

from partlens.explainer.network import ExplainerStructure
from partlens.records import Record, Value, read_json
from partlens.run import RunRecord


class Grid(Value):
    """See the fit."""

    stride_px: tuple[float, float]
    size_px: tuple[float, float]
    start_px: tuple[float, float]


class ExplainerRun(RunRecord):
    """See the fit."""

    FILE = "run.json"
    SCHEMA = "partlens/1"
    AGAIN = "Run fit-explainer again"

    train_photos: int
    background: int
    structure: ExplainerStructure
    preset: str
    config: Any
    seeds: int
    grid: Grid
    p_by_seed: tuple[float, ...] = ()

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read either form."""
        content = read_json(folder / cls.FILE)
        if "receptive_field" not in content:
            return super().read(folder)
        data = content["data"]
        content = {k: v for k, v in content.items() if k not in {"schema", "kind", "identity", "preset_note"}}
        content["grid"] = content.pop("receptive_field")
        content["train_photos"], content["background"] = data["train_photos"], data["background_photos"]
        content["data"] = {k: data[k] for k in ("name", "path", "fingerprint", "unreadable")}
        content["data"]["categories"] = data.get("categories") or [data.get("category") or ""]
        return cls.model_validate_json(json.dumps(content))


class History(Record):
    """See the fit."""

    FILE = "history.json"
    SCHEMA = "partlens/1"
    AGAIN = "Run fit-explainer again"

    epochs: tuple[dict[str, Any], ...] = ()
