"""A sweep does each job once, goes on after anything, and loses nothing to a killed process."""

from __future__ import annotations

import json
import os
import runpy
import signal
import threading
from pathlib import Path

import pytest

from partlens.errors import InputError, RunError
from partlens.progress import Progress
from partlens.records import sole_writer
from partlens_papers.tables import jobs as jobs_module
from partlens_papers.tables.jobs import Executor, run_job, run_sweep, worker_environment

BENCH = runpy.run_path(str(Path(__file__).with_name("job_bench.py")))
job = BENCH["job"]


@pytest.fixture(autouse=True)
def _jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "modules"
    folder.mkdir()
    (folder / "bench_jobs.py").write_text(BENCH["JOBS"])
    monkeypatch.syspath_prepend(folder)


def calls(out: Path, key: str) -> int:
    return len((out / "jobs" / key / "calls").read_text().splitlines())


def test_jobs_are_done_once_and_more_of_them_later(tmp_path: Path) -> None:
    first = run_sweep([job(seed=0), job(seed=1)], tmp_path)
    assert [r.status for r in first] == ["finished"] * 2
    assert first[0].facts["drawn"] != first[1].facts["drawn"]
    again = run_sweep([job(seed=0), job(seed=1), job(seed=2)], tmp_path)
    assert [r.status for r in again] == ["finished"] * 3
    assert [calls(tmp_path, f"net-fox-s{k}/counted") for k in range(3)] == [1, 1, 1]
    assert again[0] == first[0]


def test_a_failing_job_is_recorded_in_one_line_and_stops_nobody(tmp_path: Path) -> None:
    jobs = [
        job("fail", "lucky"),
        job("fail", "buggy", bug=True),
        job(seed=1),
        BENCH["Job"]("bench_jobs:count", "later", "net", "fox", 0, after=("net-fox-s0/lucky",)),
        job("no_such_function", "gone"),
    ]
    results = run_sweep(jobs, tmp_path)
    assert [r.status for r in results] == ["failed", "failed", "finished", "failed", "failed"]
    assert results[0].error == "Expected luck, got none. Try again."
    assert results[1].error == "KeyError: 'nothing'"
    assert results[3].error == "net-fox-s0/lucky, which it needs, has no result"
    assert results[4].error.startswith("AttributeError: ")
    record = json.loads((tmp_path / "jobs" / "net-fox-s0/buggy/job.json").read_text())
    assert 'return {}["nothing"]' in record["traceback"]
    # A failed job is tried again, the finished one is not.
    run_sweep(jobs[:3], tmp_path)
    assert calls(tmp_path, "net-fox-s1/counted") == 1


def test_other_settings_in_the_same_folder_are_refused(tmp_path: Path) -> None:
    run_sweep([job(size=1)], tmp_path)
    with pytest.raises(
        RunError, match=r"a result of these settings in .*counted, got one of others \(size: 1 there, 2 here\)"
    ):
        run_sweep([job(size=2)], tmp_path)
    # What only failed under other settings is no obstacle.
    run_sweep([job("fail", "tried", size=1)], tmp_path)
    assert run_sweep([job("count", "tried", size=2)], tmp_path)[0].status == "finished"


def test_places_do_not_change_what_a_job_is() -> None:
    here = BENCH["Job"]("m:f", "k", "net", "fox", 0, {"a": 1}, {"data": "/here"})
    there = BENCH["Job"]("m:f", "k", "net", "fox", 0, {"a": 1}, {"data": "/there"})
    other = BENCH["Job"]("m:f", "k", "net", "fox", 0, {"a": 2}, {"data": "/here"})
    assert here.identity == there.identity != other.identity


def test_a_job_that_another_call_is_doing_is_left_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(Progress, "say", lambda _, message: said.append(message))
    jobs = [job(seed=0), job(seed=1)]
    with sole_writer(jobs[0].folder(tmp_path)):
        for executor in (Executor(), Executor(workers=1)):
            results = run_sweep(jobs, tmp_path, executor=executor, progress=Progress.silent())
            assert [r.status for r in results] == ["missing", "finished"]
            assert said.count("net-fox-s0/counted: another process does it") == 1
            said.clear()
    assert [r.status for r in run_sweep(jobs, tmp_path)] == ["finished"] * 2
    assert calls(tmp_path, "net-fox-s0/counted") == 1


def test_the_order_of_jobs_is_checked(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="every job once, after those it needs"):
        run_sweep([job(), job()], tmp_path)
    late = BENCH["Job"]("bench_jobs:count", "late", "net", "fox", 0, after=("net-fox-s9/counted",))
    with pytest.raises(InputError, match="net-fox-s9/counted"):
        run_sweep([late], tmp_path)
    with pytest.raises(InputError, match="at least 0"):
        Executor(workers=-1)


def test_ctrl_c_keeps_what_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    def interrupted(one: object, out: Path, show: object) -> str:
        if done:
            raise KeyboardInterrupt
        done.append("first")
        return run_job(one, out, show)  # type: ignore[arg-type]

    monkeypatch.setattr(jobs_module, "run_job", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_sweep([job(seed=0), job(seed=1)], tmp_path)
    monkeypatch.undo()
    monkeypatch.syspath_prepend(tmp_path / "modules")
    assert [r.status for r in run_sweep([job(seed=0), job(seed=1)], tmp_path)] == ["finished"] * 2
    assert calls(tmp_path, "net-fox-s0/counted") == 1


def test_workers_share_cores_and_take_gpus_in_turn() -> None:
    cores = len(os.sched_getaffinity(0))
    assert worker_environment(0, 1, [])["OMP_NUM_THREADS"] == str(cores)
    assert worker_environment(0, 999, [])["OMP_NUM_THREADS"] == "1"
    assert "CUDA_VISIBLE_DEVICES" not in worker_environment(0, 1, [])
    assert [worker_environment(k, 4, ["2", "5"])["CUDA_VISIBLE_DEVICES"] for k in range(4)] == ["2", "5", "2", "5"]


def test_processes_give_the_same_and_one_that_dies_is_started_again(tmp_path: Path) -> None:
    alone = run_sweep([job(seed=1)], tmp_path / "alone")
    jobs = [job("die_once", "mortal", seed=0), job(seed=1)]
    results = run_sweep(jobs, tmp_path / "out", executor=Executor(workers=2))
    assert [r.status for r in results] == ["finished"] * 2
    assert results[1].facts["drawn"] == alone[0].facts["drawn"]
    assert results[1].facts["threads"] == str(max(1, len(os.sched_getaffinity(0)) // 2))
    pids = {
        (tmp_path / "out/jobs" / point / "calls").read_text() for point in ("net-fox-s0/mortal", "net-fox-s1/counted")
    }
    assert str(os.getpid()) not in "".join(pids)
    assert len(pids) == 2


def test_a_process_that_always_dies_fails_by_name(tmp_path: Path) -> None:
    (result,) = run_sweep([job("die_once", "mortal")], tmp_path, executor=Executor(workers=1, retries=0))
    assert result.status == "failed"
    assert result.error == "its process ended 1 times with exit code 9"


def test_no_scheduler_is_one_clear_error(tmp_path: Path) -> None:
    pytest.importorskip("distributed")
    with pytest.raises(RunError, match="a dask scheduler at nowhere, got ValueError"):
        run_sweep([job()], tmp_path, executor=Executor(cluster="nowhere"))


@pytest.mark.slow
def test_a_killed_worker_of_a_cluster_loses_nothing(tmp_path: Path) -> None:
    """Two workers on this machine; the one that does the waiting job is killed while it does."""
    distributed = pytest.importorskip("distributed")
    alone = run_sweep([job(seed=k) for k in (1, 2)], tmp_path / "alone")
    out = tmp_path / "out"
    begun = out / "jobs" / "net-fox-s0/waits/begun"
    killed: list[int] = []
    ended = threading.Event()

    def kill() -> None:
        while not ended.wait(0.05):
            if begun.exists() and begun.read_text():
                killed.append(int(begun.read_text()))
                os.kill(killed[0], signal.SIGKILL)
                return

    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None, silence_logs=50
    ) as cluster:
        killer = threading.Thread(target=kill)
        killer.start()
        jobs = [job("wait_once", "waits", seed=0), job(seed=1), job(seed=2)]
        results = run_sweep(jobs, out, executor=Executor(cluster=cluster.scheduler_address))
        ended.set()
        killer.join()
        with sole_writer(job(seed=3).folder(out)):  # as another call that is at it would
            (held,) = run_sweep([job(seed=3)], out, executor=Executor(cluster=cluster.scheduler_address))
    assert held.status == "missing"
    assert [r.status for r in results] == ["finished"] * 3, [r.error for r in results]
    assert killed
    assert [r.facts["drawn"] for r in results[1:]] == [r.facts["drawn"] for r in alone]
    assert str(killed[0]) not in (out / "jobs" / "net-fox-s0/waits/calls").read_text()


def test_what_waits_for_a_job_of_another_call_is_left_to_it_too(tmp_path: Path) -> None:
    first = job(seed=0)
    later = BENCH["Job"]("bench_jobs:count", "later", "net", "fox", 0, after=(first.key,))
    with sole_writer(first.folder(tmp_path)):
        assert [r.status for r in run_sweep([first, later], tmp_path)] == ["missing", "missing"]
    assert not (later.folder(tmp_path) / "job.json").exists()
    assert [r.status for r in run_sweep([first, later], tmp_path)] == ["finished"] * 2


def test_what_a_failed_job_left_does_not_stand_in_the_way_of_other_settings(tmp_path: Path) -> None:
    scratch = tmp_path / "elsewhere"
    failed = BENCH["Job"]("bench_jobs:fail", "tried", "net", "fox", 0, {"size": 1}, {"scratch": [str(scratch)]})
    run_sweep([failed], tmp_path)
    own, other = failed.folder(tmp_path) / "run", failed.folder(tmp_path).parent / "explainer"
    for folder in (own, other, scratch):
        folder.mkdir(parents=True)
        (folder / "run.json").write_text("{}")
    run_sweep([failed], tmp_path)  # the same settings go on with it
    assert own.exists()
    changed = BENCH["Job"]("bench_jobs:count", "tried", "net", "fox", 0, {"size": 2}, {"scratch": [str(scratch)]})
    assert run_sweep([changed], tmp_path)[0].status == "finished"
    assert not own.exists()
    assert not scratch.exists()
    assert (other / "run.json").exists()
