"""The file ``inspect.json``: the parts of each category, what they carry on the performer itself, and the verdict."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from partlens.errors import InputError, expected
from partlens.records import Settings


class FindingConfig(Settings):
    """How the parts of a category are found.

    Attributes:
        parts_min: fewest parts of a category.
        parts_max: most parts of a category.
        variety: what a part pays for moving like the parts already chosen.
    """

    parts_min: int = Field(2, ge=1)
    parts_max: int = Field(8, ge=1)
    variety: float = Field(0.5, ge=0)

    @model_validator(mode="after")
    def _checked(self) -> Self:
        if self.parts_min > self.parts_max:
            got = f"{self.parts_min} and {self.parts_max}"
            raise InputError(expected("parts_min <= parts_max", got, "Correct them"))
        return self
