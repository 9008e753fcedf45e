"""Progress without a terminal: a line every half minute, one at the end, an estimate beforehand."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from partlens.progress import Progress


class _Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> _Clock:
    return _Clock()


def _progress(clock: _Clock, *, terminal: bool = False) -> tuple[Progress, io.StringIO]:
    out = io.StringIO()
    return Progress(Console(file=out, force_terminal=terminal, width=80), clock), out


def test_a_line_every_half_minute_and_one_at_the_end(clock: _Clock) -> None:
    progress, out = _progress(clock)
    with progress.task("caching maps", 2000) as advance:
        for step in range(1, 101):
            clock.now += 1
            advance(20 * step, "p 0.9")
    assert out.getvalue().splitlines() == [
        "caching maps takes about 2 min",
        "caching maps: 600 of 2,000, about 1 min left  p 0.9",
        "caching maps: 1,200 of 2,000, about 40 s left  p 0.9",
        "caching maps: 1,800 of 2,000, about 10 s left  p 0.9",
        "caching maps: 2,000 in 2 min",
    ]


def test_a_run_that_goes_on_half_way_is_timed_by_its_own_steps(clock: _Clock) -> None:
    progress, out = _progress(clock)
    with progress.task("learning", 1000) as advance:
        advance(900)
        clock.now += 30
        advance(910)
    assert out.getvalue().splitlines()[0] == "learning takes about 5 min"
    assert "learning: 910 of 1,000, about 4 min left" in out.getvalue()


def test_short_work_prints_its_end_only_and_failed_work_none(clock: _Clock) -> None:
    progress, out = _progress(clock)
    with progress.task("reading photos", 3) as advance:
        clock.now += 4
        advance(3)
    assert out.getvalue() == "reading photos: 3 in 4 s\n"
    with pytest.raises(KeyError), progress.task("reading photos", 3):
        raise KeyError
    assert out.getvalue() == "reading photos: 3 in 4 s\n"


def test_what_makes_it_shorter_is_said_beforehand_on_a_terminal_too(clock: _Clock) -> None:
    for terminal in (False, True):
        progress, out = _progress(clock, terminal=terminal)
        with progress.task("learning", 100, shorter="fewer --explainer.epochs") as advance:
            for epoch in (1, 2, 3):
                clock.now += 6
                advance(epoch)
        assert out.getvalue().count("learning takes about 10 min (fewer --explainer.epochs would be faster)") == 1


def test_expect_is_silent_about_less_than_a_minute(clock: _Clock) -> None:
    progress, out = _progress(clock)
    progress.expect("fitting", 59)
    assert out.getvalue() == ""
    progress.expect("fitting", 60)
    assert out.getvalue() == "fitting takes about 1 min\n"


def test_long_sentences_are_broken_on_a_terminal_only(clock: _Clock) -> None:
    sentence = "one two three four five " * 10
    progress, out = _progress(clock)
    progress.say(sentence)
    assert out.getvalue() == sentence + "\n"
    progress, out = _progress(clock, terminal=True)
    progress.say(sentence)
    assert max(map(len, out.getvalue().splitlines())) <= 80


def test_silence_takes_the_same_calls() -> None:
    progress = Progress.silent()
    progress.say("nothing")
    progress.expect("fitting", 100)
    with progress.task("x", 2) as advance:
        advance(1)
        advance(2, "remark")
