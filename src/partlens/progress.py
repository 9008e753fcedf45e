"""Progress of long work on the terminal; silent where nobody watches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

Advance = Callable[..., None]


@dataclass(frozen=True)
class Progress:
    """Where progress and messages go.

    Attributes:
        console: a rich console, or ``None`` for silence.
    """

    console: Console | None = None

    @staticmethod
    def silent() -> Progress:
        """Return progress that shows nothing."""
        return Progress(None)

    @staticmethod
    def terminal() -> Progress:
        """Return progress on standard error, so that standard output stays clean for ``--json``."""
        from rich.console import Console

        return Progress(Console(stderr=True))

    def say(self, message: str) -> None:
        """Print one line."""
        if self.console is not None:
            self.console.print(message, highlight=False, markup=False)

    @contextmanager
    def task(self, name: str, total: int) -> Iterator[Advance]:
        """Show a bar; the yielded function takes how much is done and an optional remark."""
        if self.console is None:
            yield lambda _done, _remark="": None
            return
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        remark = TextColumn("{task.fields[remark]}")
        with Bar(*columns, remark, console=self.console) as bar:
            task = bar.add_task(name, total=total, remark="")
            yield lambda done, text="": bar.update(task, completed=done, remark=text)

    @staticmethod
    def summary(record: Mapping[str, Any]) -> str:
        """Return the few numbers of an epoch that tell how it goes."""
        names = {"p": "p", "reconstruction": "rec", "filter_2": "filter", "correlation": "corr"}
        return "  ".join(f"{label} {record[name]:.3g}" for name, label in names.items() if name in record)
