"""Several processes that learn one explainer, started by torchrun: each computes its images of every batch.

What the images of a batch have to do with each other are sums over them: the norms and sums of the filter loss, means
that run over batches, the mean of the objective. Each is small, and is made from the parts of all processes
(:func:`from_all`); maps stay where they are computed. A sum's gradient is that of the own part, and the gradients of
the weights are summed at the end. So all processes have the same weights, those of a single process up to rounding.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn

from partlens.errors import RunError, failed

_PATIENCE = timedelta(days=30)  # one process alone caches maps and finds parts; that others ended is seen at once


@dataclass(frozen=True)
class Processes:
    """Which of several processes this is; the first one, number 0, alone reads photos and writes the run."""

    number: int = 0  # of this process, from 0
    count: int = 1  # of processes
    images: int = 0  # explained images in the whole batch of a step, 0 outside of one

    def own(self, values: Any) -> Any:
        """Return what this process computes of something with one entry per image."""
        return values[self.number :: self.count]

    @property
    def of_machine(self) -> int:
        """Number among the processes of the same machine."""
        return int(os.environ.get("LOCAL_RANK", "0")) if self.count > 1 else 0

    @contextlib.contextmanager
    def step(self, images: int) -> Iterator[None]:
        """Make sums over images those of all processes, which are in the same step, too."""
        token = _STEP.set(replace(self, images=images))
        try:
            yield
        finally:
            _STEP.reset(token)

    def shared(self, value: Any = None) -> Any:
        """Return the value that the first process gives, once all processes ask for it."""
        if self.count == 1:
            return value
        given = [value]
        with _reached():
            dist.broadcast_object_list(given)
        return given[0]

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace the gradients by their sums over all processes."""
        if self.count > 1:
            with _reached():
                for each in [p.grad for p in parameters if p.grad is not None]:
                    dist.all_reduce(each)


ALONE = Processes()
_STEP: ContextVar[Processes] = ContextVar("processes in the same step", default=ALONE)


class _FromAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, number: int, count: int) -> Tensor:
        ctx.number = number
        parts = part.new_empty(count, *part.shape)
        with _reached():
            dist.all_gather(list(parts), part.contiguous())
        return parts

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> Any:
        return upstream[0][ctx.number], None, None


def from_all(part: Tensor) -> Float[Tensor, "process ..."]:
    """Return the parts of all processes that are in the same step; a single one where there is no other."""
    step = _STEP.get()
    if step.count == 1:
        return part[None]
    parts: Tensor = _FromAll.apply(part, step.number, step.count)
    return parts


def batch_mean(values: Float[Tensor, "image ..."]) -> Tensor:
    """Return the mean over the images of a batch, of all processes."""
    if _STEP.get().count == 1:
        return values.mean(0)
    count = values.new_full((1,), len(values))
    total = from_all(torch.cat([values.sum(0).flatten(), count])).sum(0)
    return (total[:-1] / total[-1]).reshape(values.shape[1:])


def drawn(images: int, width: int, generator: torch.Generator) -> Float[Tensor, "image width"]:
    """Draw numbers from 0 to 1 for the images of this process: those that a single process would draw for them."""
    step = _STEP.get()
    values: Tensor = step.own(torch.rand(step.images or images, width, generator=generator))
    return values


@contextlib.contextmanager
def started() -> Iterator[Processes]:
    """Meet the other processes that torchrun started with this one, where there are any.

    Raises:
        RunError: they cannot be reached.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count < 2:
        yield ALONE
        return
    with _reached():
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=_PATIENCE)
    try:
        with _told_to_end():
            yield Processes(dist.get_rank(), count)
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def _told_to_end() -> Iterator[None]:
    """Say that another process has ended where torchrun's signal says so first, and not be ended by it unheard."""
    if threading.current_thread() is not threading.main_thread():  # which alone may hear signals
        yield
        return
    heard = signal.signal(signal.SIGTERM, lambda *_: _raise_ended("torchrun ends all"))
    try:
        yield
    except RunError:
        time.sleep(1)  # in which the signal comes, if it does: later it would end this process before the error is read
        raise
    finally:
        signal.signal(signal.SIGTERM, heard)


@contextlib.contextmanager
def _reached() -> Iterator[None]:
    """Say that another process has ended, which is seen when nothing comes from it."""
    try:
        yield
    except RuntimeError as error:
        _raise_ended(re.sub(r"^\[\S*\] ", "", str(error)).partition(". ")[0], error)  # without torch's place


def _raise_ended(said: str, error: Exception | None = None) -> NoReturn:
    why = f"another one has ended, or cannot be reached ({said})"
    remedy = "Run the same command again, with as many processes as you like; it goes on after the last epoch"
    raise RunError(failed("learn with several processes", why, remedy)) from error
