"""Many independent jobs, each in a folder of its own: in this process, in several, or on a cluster.

A job is done when its record is there, whole, with the hash of everything it depends on. So a sweep that was stopped,
by Ctrl-C, a power cut or a killed worker, goes on with what is missing, and a larger sweep in the same folder uses what
a smaller one has done. A job that fails is recorded with its error and tried again by the next call; the others go on.

What runs a job never decides what comes out: every draw of a job comes from its seed.
"""

from __future__ import annotations

import importlib
import os
import shutil
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any, ClassVar, Literal

from distributed import Client, as_completed
from pydantic import Field

from partlens import __version__
from partlens.errors import AtWorkError, InputError, PartlensError, RunError, expected
from partlens.progress import Progress
from partlens.records import Record, content_hash, sole_writer
from partlens_papers.tables.scores import Score

Status = Literal["finished", "failed", "missing", "at work"]
RETRIES = 2
"""How often a job is begun again whose process or worker died; a job that raises is not."""


class JobRecord(Record):
    """The result of a job, ``job.json`` in its folder.

    Attributes:
        identity: hash of everything it depends on.
        partlens: the version that did it.
        settings: what it depends on besides its name, for people.
        status: ``missing`` is never written; it says that there is none.
        error: one line; empty unless failed.
        traceback: of an error.
        seconds: duration.
        scores: what it measured.
        facts: what else it says.
    """

    FILE: ClassVar[str] = "job.json"
    SCHEMA: ClassVar[str] = "partlens-papers.job/1"
    AGAIN: ClassVar[str] = "Delete the job's folder and run the same command again"

    identity: str
    partlens: str = __version__
    settings: dict[str, Any] = Field(default_factory=dict)
    status: Literal["finished", "failed", "missing"]
    error: str = ""
    traceback: str = ""
    seconds: float = 0.0
    scores: tuple[Score, ...] = ()
    facts: dict[str, Any] = Field(default_factory=dict)


Made = tuple[Sequence[Score], Mapping[str, Any]]
"""What a job gives: its scores and further facts as plain values."""


@dataclass(frozen=True)
class Job:
    """One piece of a sweep.

    Attributes:
        work: the function that does it, ``package.module:name``; called with the job, its folder and where to show
            progress, it returns :data:`Made`. Named, not held, so that any process can run it.
        kind: what it makes; names its folder.
        performer: label of the network.
        category: what is explained.
        seed: of every draw.
        settings: everything else that the result depends on, as plain values.
        places: paths and the like, which the work needs and the result does not depend on. ``scratch`` names folders
            that are the job's own outside its folder.
        after: keys of jobs whose results it needs.
    """

    work: str
    kind: str
    performer: str
    category: str
    seed: int
    settings: Mapping[str, Any] = field(default_factory=dict)
    places: Mapping[str, Any] = field(default_factory=dict)
    after: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """Unique name: performer, category and seed, then the kind."""
        return f"{self.performer}-{self.category}-s{self.seed}/{self.kind}"

    @property
    def identity(self) -> str:
        """Hash of everything the result depends on."""
        depends = ("work", "kind", "performer", "category", "seed", "settings")
        return content_hash({name: getattr(self, name) for name in depends})

    def folder(self, out: Path) -> Path:
        """Return the job's folder in a sweep's; jobs of other kinds on the same point are next to it."""
        return out / "jobs" / self.key

    def record(self, status: Literal["finished", "failed", "missing"], **found: Any) -> JobRecord:
        """Return a record of this job."""
        return JobRecord(identity=self.identity, settings=dict(self.settings), status=status, **found)


@dataclass(frozen=True)
class Executor:
    """Where jobs run.

    Attributes:
        workers: processes on this machine; 0 runs jobs in this process, one after the other.
        cluster: address of a dask scheduler, such as ``tcp://host:8786``, whose workers see the same files; ``workers``
            is then unused.
        retries: see :data:`RETRIES`.
    """

    workers: int = 0
    cluster: str | None = None
    retries: int = RETRIES

    def __post_init__(self) -> None:
        """Check every field once."""
        if self.workers < 0 or self.retries < 0:
            raise InputError(expected("workers and retries of at least 0", (self.workers, self.retries), "Correct it"))


def read_result(job: Job, out: Path) -> JobRecord:
    """Return the record in a job's folder.

    Raises:
        RunError: a result of other settings is there, or one that cannot be read.
    """
    found = JobRecord.read_if_there(job.folder(out))
    if found is None:
        return job.record("missing")
    if found.identity == job.identity:
        return found
    if found.status != "finished":
        return job.record("missing")  # what failed under other settings is tried under these
    rule = f"a result of these settings in {job.folder(out)}"
    remedy = "Choose another --out folder, or delete the job's folder"
    raise RunError(expected(rule, f"one of others{_differing(found.settings, job.settings)}", remedy))


def _flat(values: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Return nested values under joined names."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= _flat(value, f"{before}{name}.") if isinstance(value, Mapping) else {f"{before}{name}": value}
    return found


def _differing(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """Name the first settings that differ, so that a person sees what changed."""
    theirs, ours = _flat(there), _flat(here)
    names = [name for name in sorted(theirs.keys() | ours.keys()) if theirs.get(name) != ours.get(name)]
    parts = [f"{name}: {theirs.get(name, 'unset')!r} there, {ours.get(name, 'unset')!r} here" for name in names[:3]]
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f" ({'; '.join(parts)}{more})" if parts else ""


def run_job(job: Job, out: str | Path, progress: Progress | None = None) -> Status:
    """Do one job and write its record, also when it fails; return its status.

    A job that is done is left alone. Everything but Ctrl-C and the like is recorded: a sweep of days must not end with
    the first job that goes wrong.
    """
    out = Path(out)
    if read_result(job, out).status == "finished":
        return "finished"
    try:
        with sole_writer(job.folder(out)):
            return _do(job, out, progress or Progress.silent())
    except AtWorkError:
        return "at work"  # another call on this folder does it; what it makes is the same


def _do(job: Job, out: Path, progress: Progress) -> Status:
    """Do a job that is not done and write its record."""
    started = time.monotonic()
    try:
        _clear(job, out)
        module, _, name = job.work.partition(":")
        work: Callable[[Job, Path, Progress], Made] = getattr(importlib.import_module(module), name)
        scores, facts = work(job, job.folder(out), progress)
        record = job.record("finished", scores=tuple(scores), facts=dict(facts))
    except Exception as error:  # noqa: BLE001 -- recorded with its traceback, shown in the table, exit code 1
        words = " ".join(str(error).split())
        words = words if isinstance(error, PartlensError) else f"{type(error).__name__}: {words}"
        record = job.record("failed", error=words, traceback=traceback.format_exc())
    record = record.model_copy(update={"seconds": round(time.monotonic() - started, 1)})
    record.write(job.folder(out))
    return record.status


def _clear(job: Job, out: Path) -> None:
    """Remove what this job left where it failed under other settings, which would refuse these."""
    folder = job.folder(out)
    found = JobRecord.read_if_there(folder)
    if found is None or found.identity == job.identity:
        return
    for left in (*folder.iterdir(), *map(Path, job.places.get("scratch", ()))):
        if left.is_dir():
            shutil.rmtree(left)
        elif not left.name.startswith("."):  # the lock stays
            left.unlink(missing_ok=True)


def _record_failure(job: Job, out: Path, error: str) -> None:
    """Write that a job failed which could not write it itself; what other settings left is cleared as it would."""
    _clear(job, out)
    job.record("failed", error=error).write(job.folder(out))


def run_sweep(
    jobs: Sequence[Job], out: str | Path, *, executor: Executor | None = None, progress: Progress | None = None
) -> tuple[JobRecord, ...]:
    """Do all jobs that are not done yet.

    Args:
        jobs: in the order in which they are begun; a job starts when all in its ``after`` are done.
        out: folder of the sweep; results go to ``out/jobs``.
        executor: where; by default this process.
        progress: how to show progress; silent by default.

    Returns:
        What became of each job, in the order given.

    Raises:
        InputError: a job is there twice, or waits for one that is not in the list before it.
        RunError: a result of other settings is in the folder; no cluster at the address.
    """
    out, show, where = Path(out).resolve(), progress or Progress.silent(), executor or Executor()
    known: set[str] = set()
    for job in jobs:
        strange = [key for key in job.after if key not in known]
        if job.key in known or strange:
            rule = "every job once, after those it needs"
            raise InputError(expected(rule, f"{job.key} after {strange}", "Correct the order of the jobs"))
        known.add(job.key)
    waiting = [job for job in jobs if read_result(job, out).status != "finished"]
    if len(waiting) < len(jobs):
        show.say(f"{len(jobs) - len(waiting)} of {len(jobs)} jobs are done already")
    while waiting:
        ahead = {job.key for job in waiting}
        ready = [job for job in waiting if not ahead & set(job.after)]
        waiting = [job for job in waiting if ahead & set(job.after)]
        for job, status in _run_ready(_possible(ready, jobs, out), out, where, show):
            words = {"at work": ": another process does it", "failed": f" failed: {read_result(job, out).error}"}
            show.say(f"{job.key}{words.get(status, ' finished')}")
    return tuple(read_result(job, out) for job in jobs)


def _possible(ready: Sequence[Job], jobs: Sequence[Job], out: Path) -> list[Job]:
    """Return jobs that can start; record those whose predecessor failed, drop those whose is another call's."""
    by_key = {job.key: job for job in jobs}
    possible = []
    for job in ready:
        found = {key: read_result(by_key[key], out).status for key in job.after}
        failed = [key for key, status in found.items() if status == "failed"]
        if failed:
            _record_failure(job, out, f"{failed[0]}, which it needs, has no result")
        elif all(status == "finished" for status in found.values()):
            possible.append(job)
    return possible


def _run_ready(jobs: Sequence[Job], out: Path, executor: Executor, show: Progress) -> Iterator[tuple[Job, Status]]:
    if not jobs:
        return
    if executor.cluster is not None:
        yield from _on_cluster(jobs, out, executor.cluster, executor.retries)
    elif executor.workers:
        yield from _in_processes(jobs, out, executor.workers, executor.retries)
    else:
        for job in jobs:
            show.say(f"{job.key} begins")
            yield job, run_job(job, out, show)


# Processes on this machine


def visible_devices() -> list[str]:
    """Return the GPUs that this process may use, as ``CUDA_VISIBLE_DEVICES`` names them; empty without any."""
    import torch

    count = torch.cuda.device_count()
    named = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return named[:count] if named else [str(number) for number in range(count)]


def worker_environment(slot: int, workers: int, devices: Sequence[str]) -> dict[str, str]:
    """Return the environment of a worker: its share of the processor cores, and its GPU in turn.

    Example:
        >>> worker_environment(3, 4, ["0", "1"])["CUDA_VISIBLE_DEVICES"]
        '1'
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = str(max(1, cores // workers))
    found = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    return found | ({"CUDA_VISIBLE_DEVICES": devices[slot % len(devices)]} if devices else {})


def _child(job: Job, out: str, environment: Mapping[str, str]) -> None:
    """Run one job in a process of its own."""
    os.environ.update(environment)  # before the job imports torch, which reads it once
    with suppress(KeyboardInterrupt):  # Ctrl-C reaches the whole group; the parent says so
        run_job(job, out)


def _in_processes(jobs: Sequence[Job], out: Path, workers: int, retries: int) -> Iterator[tuple[Job, Status]]:
    """Give every job a fresh process, so that one that is killed takes nothing with it."""
    context = get_context("spawn")
    devices = visible_devices()
    queue = [(job, 0) for job in jobs]
    running: dict[int, tuple[SpawnProcess, Job, int]] = {}
    try:
        while queue or running:
            for slot in range(workers):
                if slot not in running and queue:
                    job, tries = queue.pop(0)
                    environment = worker_environment(slot, workers, devices)
                    process = context.Process(target=_child, args=(job, str(out), environment))
                    process.start()
                    running[slot] = (process, job, tries)
            wait([process.sentinel for process, _, _ in running.values()])
            for slot in [slot for slot, (process, _, _) in running.items() if not process.is_alive()]:
                process, job, tries = running.pop(slot)
                process.join()
                code = process.exitcode
                process.close()
                if code == 0:
                    status = read_result(job, out).status
                    yield job, "at work" if status == "missing" else status
                elif tries < retries:
                    queue.append((job, tries + 1))
                else:
                    _record_failure(job, out, f"its process ended {tries + 1} times with exit code {code}")
                    yield job, "failed"
    finally:
        for process, _, _ in running.values():
            process.terminate()
            process.join()


# A cluster


_ONE_AT_A_TIME = threading.Lock()


def _run_alone(job: Job, out: str) -> Status:
    """Run a job while no other thread of this worker does: jobs set torch's random state and put it back."""
    with _ONE_AT_A_TIME:
        return run_job(job, out)


def _on_cluster(jobs: Sequence[Job], out: Path, address: str, retries: int) -> Iterator[tuple[Job, Status]]:
    """Hand the jobs to a dask scheduler; a job whose worker dies is given to another one."""
    try:
        client = Client(address, timeout="20s", set_as_default=False)
    except (OSError, ValueError) as error:
        raise RunError(
            expected(f"a dask scheduler at {address}", f"{type(error).__name__}: {error}", "Start 'dask scheduler'")
        ) from error
    with client:
        futures = {}
        for job in jobs:
            key = f"{job.key}-{job.identity}"
            future = client.submit(_run_alone, job, str(out), key=key, retries=retries, pure=False)
            futures[future.key] = (future, job)
        for future in as_completed([future for future, _ in futures.values()], loop=client.loop):
            job = futures[future.key][1]
            if future.status == "error":
                # The job itself records what it raises: what arrives here is a worker that died, or a lost file system.
                lost = future.exception()
                words = " ".join(str(lost).split())
                _record_failure(job, out, f"{type(lost).__name__}: {words}")
            elif future.result() == "at work":
                yield job, "at work"
                continue
            elif not (job.folder(out) / JobRecord.FILE).exists():
                rule = f"the workers' result in {job.folder(out)}"
                remedy = "Choose an --out folder that this machine and all workers share"
                raise RunError(expected(rule, "nothing there", remedy))
            yield job, read_result(job, out).status
