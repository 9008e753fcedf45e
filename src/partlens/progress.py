"""Progress of long work: bars on a terminal, a line every half minute elsewhere, nothing where nobody watches."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

Advance = Callable[..., None]

_LINE_EVERY_S = 30.0
_EXPECT_AFTER_S = 5.0
_WORTH_SAYING_S = 60.0


def duration(seconds: float) -> str:
    """Return a length of time in words, rounded as a person would.

    Example:
        >>> [duration(s) for s in (0.4, 42, 100, 3600, 8000)]
        ['1 s', '42 s', '2 min', '1 h', '2 h 13 min']
    """
    if seconds < 59.5:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    hours, rest = divmod(minutes, 60)
    if not hours:
        return f"{minutes} min"
    return f"{hours} h {rest} min" if rest else f"{hours} h"


def counting(advance: Advance) -> Callable[[int], None]:
    """Return what takes how many more are done, given what takes how many are done."""
    done = 0

    def more(count: int) -> None:
        nonlocal done
        done += count
        advance(done)

    return more


@dataclass(frozen=True)
class Progress:
    """Where progress and messages go.

    Attributes:
        console: a rich console, or ``None`` for silence.
        clock: returns seconds; only differences count.
    """

    console: Console | None = None
    clock: Callable[[], float] = time.monotonic

    @staticmethod
    def silent() -> Progress:
        """Return progress that shows nothing."""
        return Progress(None)

    @staticmethod
    def terminal() -> Progress:
        """Return progress on standard error, so that standard output stays clean for ``--json``."""
        from rich.console import Console

        return Progress(Console(stderr=True, emoji=False))

    def say(self, message: str) -> None:
        """Print one line; without a terminal it is not broken, however long it is."""
        if self.console is not None:
            self.console.print(message, highlight=False, markup=False, soft_wrap=not self.console.is_terminal)

    def expect(self, name: str, seconds: float, shorter: str = "") -> None:
        """Say before long work about how long it will take; nothing is said of less than a minute.

        Args:
            name: of the work, as of :meth:`task`.
            seconds: how long it will take.
            shorter: what makes it shorter, e.g. ``"fewer --explainer.epochs"``.
        """
        if seconds >= _WORTH_SAYING_S:
            self.say(f"{name} takes about {duration(seconds)}" + (f" ({shorter} would be faster)" if shorter else ""))

    @contextmanager
    def task(self, name: str, total: int, shorter: str = "") -> Iterator[Advance]:
        """Show how far work has come; the yielded function takes how much is done and an optional remark.

        After the first seconds the remaining steps are timed by those done, and :meth:`expect` says once how long the
        work will take. On a terminal a bar follows; elsewhere a line every half minute and one at the end.

        Args:
            name: of the work, e.g. ``"caching maps"``.
            total: number of steps.
            shorter: what makes the work shorter; :meth:`expect` says it.
        """
        if self.console is None:
            yield lambda _done, _remark="": None
            return
        pace = _Pace(self, name, total, shorter)
        if not self.console.is_terminal:
            yield pace.step
            pace.end()
            return
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        remark = TextColumn("{task.fields[remark]}")
        with Bar(*columns, remark, console=self.console) as bar:
            task = bar.add_task(name, total=total, remark="")

            def advance(done: int, text: str = "") -> None:
                pace.foresee(done)
                bar.update(task, completed=done, remark=text)

            yield advance

    @staticmethod
    def summary(record: Mapping[str, Any]) -> str:
        """Return the few numbers of an epoch that tell how it goes."""
        names = {"p": "p", "reconstruction": "rec", "filter_2": "filter", "correlation": "corr"}
        return "  ".join(f"{label} {record[name]:.3g}" for name, label in names.items() if name in record)


class _Pace:
    """How fast one task goes, and what is said of it."""

    def __init__(self, progress: Progress, name: str, total: int, shorter: str) -> None:
        self._progress, self._name, self._total, self._shorter = progress, name, total, shorter
        self._start = self._said = progress.clock()
        self._first: tuple[float, int] | None = None
        self._foreseen = False

    def _left(self, done: int) -> float | None:
        """Return the seconds left; the pace counts from the first report, since a run may go on from half way."""
        now = self._progress.clock()
        if self._first is None:
            self._first = now, done
        since, before = self._first
        return (now - since) * (self._total - done) / (done - before) if done > before else None

    def foresee(self, done: int) -> float | None:
        """Say once how long the whole will take, as soon as that is known; return the seconds left."""
        left = self._left(done)
        spent = self._progress.clock() - self._start
        if not self._foreseen and left is not None and spent >= _EXPECT_AFTER_S:
            self._foreseen = True
            self._progress.expect(self._name, spent + left, self._shorter)
        return left

    def step(self, done: int, remark: str = "") -> None:
        """Print a line if the last one is half a minute old."""
        left = self.foresee(done)
        now = self._progress.clock()
        if now - self._said < _LINE_EVERY_S or done >= self._total:
            return
        self._said = now
        time_left = "" if left is None else f", about {duration(left)} left"
        self._progress.say(f"{self._name}: {done:,} of {self._total:,}{time_left}" + (f"  {remark}" if remark else ""))

    def end(self) -> None:
        """Print what was done and how long it took."""
        self._progress.say(f"{self._name}: {self._total:,} in {duration(self._progress.clock() - self._start)}")
