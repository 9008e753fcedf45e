"""One pass over many photos, on this process or on several: a map over shards, its results in their order.

A *shard* is a fixed number of rows of a list, whatever reads it. So batches and sums are the same, and the result is
equal bit for bit, on one process and on many. Several processes are workers of dask.distributed, here or on other hosts
that see the same files: a worker that is killed loses its shard alone, which another one reads again.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Protocol, Self, TypeVar, cast

from pydantic import Field

from partlens.errors import InputError, RunError, expected, failed
from partlens.records import Settings

SHARD = 64
"""Photos of a shard where descriptors are read; maps and views are read fewer at a time."""

_ENVIRONMENT = "distributed.nanny.pre-spawn-environ"
_AHEAD = 2  # shards that each worker has or waits for

_R = TypeVar("_R")
_R_co = TypeVar("_R_co", covariant=True)


class Device(Settings):
    """On which device a verb computes; nothing of it decides which run it is.

    Class attributes:
        FLAT: the command line calls its fields by their own names.

    Attributes:
        device: cpu, cuda, cuda:1, or auto, a GPU where there is one; by default where the network is, the CPU for one
            that is loaded by name. Another device gives the same up to rounding.
    """

    FLAT: ClassVar[bool] = True

    device: str | None = None


class Compute(Device):
    """Where a verb that reads many photos computes; records say on which device.

    Attributes:
        workers: processes that read photos, with the GPUs in turn where there are any (needs partlens[cluster]); equal
            bit for bit. Worth it where one process leaves cores or GPUs idle.
        cluster: tcp://HOST:PORT of a running dask scheduler whose workers read the photos instead; they must find them
            under the same paths.
    """

    workers: Annotated[int, Field(ge=1)] = 1
    cluster: str | None = None


class Reader(Protocol[_R_co]):
    """Reads photos; it is sent to workers, so it holds nothing that cannot be pickled."""

    @property
    def shard(self) -> int:
        """Photos that make one result."""

    def __call__(self, rows: Sequence[int]) -> Iterator[_R_co]:
        """Give one result per shard of the rows, in their order."""

    def on(self, device: str | None, number: int) -> Self:
        """Return a reader for the worker of a number, whose network is on the device."""


def in_shards(read: Reader[_R], rows: Sequence[int], compute: Compute) -> Iterator[_R]:
    """Give the results of all shards of the rows, in their order, as they come.

    Raises:
        InputError: several processes without dask.distributed, or no scheduler at the address.
        RunError: workers died again and again. What was given is the caller's to keep.
    """
    shards = deque(rows[start : start + read.shard] for start in range(0, len(rows), read.shard))
    if compute.cluster is None and min(compute.workers, len(shards)) < 2:
        yield from read(rows)
        return
    with _client(compute, len(shards)) as client:
        # On every worker, so that it outlives one of them.
        sent = client.scatter(read, broadcast=True, hash=False)
        room = _AHEAD * max(1, len(client.scheduler_info()["workers"]))
        waiting: deque[Any] = deque()
        while shards or waiting:
            while shards and len(waiting) < room:
                waiting.append(client.submit(_one, sent, shards.popleft(), compute.device, pure=False))
            yield _result(waiting.popleft())


def _result(future: Any) -> Any:
    from distributed import CancelledError, KilledWorker

    try:
        return future.result()
    except (KilledWorker, CancelledError) as error:
        remedy = "Look at their memory; what was read is kept, run the same command again"
        raise RunError(failed("read photos on workers that died", type(error).__name__, remedy)) from error


def _one(read: Reader[_R], rows: Sequence[int], device: str | None) -> _R:
    """Read one shard; this runs on a worker."""
    from distributed import get_worker

    name = str(get_worker().name)
    placed: Any = _placed
    (found,) = placed(read, device, int(name) if name.isdigit() else 0)(rows)
    return cast("_R", found)


@functools.lru_cache(maxsize=1)  # a worker reads shard after shard of one pass
def _placed(read: Any, device: str | None, number: int) -> Any:
    return read.on(device, number)


@contextlib.contextmanager
def _client(compute: Compute, shards: int) -> Iterator[Any]:
    """Connect to the scheduler, or start workers on this machine that end with the block."""
    try:
        import dask
        from distributed import Client, LocalCluster
    except ImportError as error:
        remedy = "Install partlens[cluster], or leave out --workers and --cluster"
        raise InputError(expected("dask.distributed for several processes", "none", remedy)) from error
    with contextlib.ExitStack() as stack:
        address: Any = compute.cluster
        if address is None:
            count = min(compute.workers, shards)
            stack.callback(_put_back, dict(os.environ))
            stack.enter_context(dask.config.set({_ENVIRONMENT: _threads(count)}))
            # Without a limit of dask's own: it would kill workers whose memory is the network's.
            options = {"threads_per_worker": 1, "dashboard_address": ":0", "memory_limit": 0, "silence_logs": 50}
            address = stack.enter_context(LocalCluster(count, host="127.0.0.1", **options))
        try:
            client = stack.enter_context(Client(address, timeout=20, set_as_default=False))
        except (OSError, ValueError) as error:
            rule = f"a dask scheduler with workers at {address}"
            raise InputError(expected(rule, str(error), "Start one: dask scheduler, then dask worker")) from error
        yield client


def _threads(workers: int) -> dict[str, str]:
    """Share the processor's cores; dask's own environment would have every freed tensor handed back to the system."""
    threads = str(max(1, (os.cpu_count() or 1) // workers))
    return {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}


def _put_back(environment: Mapping[str, str]) -> None:
    """Undo what dask writes into the environment of the process that starts workers."""
    os.environ.clear()
    os.environ.update(environment)
