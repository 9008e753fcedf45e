"""One pass over shards: the same bits on one process, on two, and on two of which one is killed."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import logging
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from partlens.data.flowers import generated_flowers
from partlens.errors import ImageError, InputError, RunError
from partlens.explainer.views import view_windows
from partlens.network.performer import Performer
from partlens.network.preprocessing import Preprocessing
from partlens.network.stream import stream_maps
from partlens.network.zoo import load_performer
from partlens.object_parts.reading import Wanted, read_photos
from partlens.selection.measured_layers import feature_index
from partlens.selection.record import DescriptorConfig
from partlens.selection.responses import stream_responses
from partlens.shards import Compute, _result, in_shards

distributed = pytest.importorskip("distributed", reason="needs partlens[cluster]")
TWO = Compute(workers=2)
pytest.importorskip("cloudpickle").register_pickle_by_value(sys.modules[__name__])  # workers do not find the tests


@dataclasses.dataclass(frozen=True, eq=False)
class Squares:
    """Squares of the rows; a process that reads the row ``fatal`` ends, the first time or always."""

    shard: int = 3
    fatal: int = -1
    marker: str = ""

    def __call__(self, rows: Sequence[int]) -> Iterator[tuple[int, list[int]]]:
        for start in range(0, len(rows), self.shard):
            part = rows[start : start + self.shard]
            if self.fatal in part and not (self.marker and Path(self.marker).exists()):
                if self.marker:
                    Path(self.marker).touch()
                os.kill(os.getpid(), signal.SIGKILL)
            yield os.getpid(), [row * row for row in part]

    def on(self, device: str, number: int) -> Squares:
        return self


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def values(found: Sequence[tuple[int, list[int]]]) -> list[int]:
    return [value for _, part in found for value in part]


def test_shards_come_in_order_from_two_processes_and_a_killed_one_loses_its_shard_alone(tmp_path: Path) -> None:
    rows = range(5, 36)
    alone, before = list(in_shards(Squares(), rows, Compute())), dict(os.environ)
    assert {process for process, _ in alone} == {os.getpid()}
    both = list(in_shards(Squares(fatal=20, marker=str(tmp_path / "died")), rows, TWO))
    assert (tmp_path / "died").exists()
    assert dict(os.environ) == before
    assert values(both) == values(alone) == [row * row for row in rows]
    assert os.getpid() not in {process for process, _ in both}
    assert len({process for process, _ in both}) >= 2


def test_a_shard_that_kills_every_worker_is_one_error() -> None:
    lost = concurrent.futures.Future()
    lost.set_exception(distributed.KilledWorker("shard", None, 3))
    with pytest.raises(RunError, match="Could not read photos on workers that died: .* Look at their memory"):
        _result(lost)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Compute]:
    with distributed.LocalCluster(2, threads_per_worker=1, dashboard_address=":0", silence_logs=50) as local:
        yield Compute(cluster=local.scheduler_address)


def test_wrong_addresses_and_numbers_are_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"a dask scheduler with workers at nonsense"):
        list(in_shards(Squares(), range(12), Compute(cluster="nonsense")))
    with pytest.raises(InputError, match="workers"):
        Compute(workers=0)
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(
        InputError, match=r"dask.distributed for several processes, got none. Install partlens\[cluster\]"
    ):
        list(in_shards(Squares(), range(12), TWO))


@pytest.fixture
def network() -> Performer:
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(864, 2)
    )
    return load_performer(module.eval(), Preprocessing(size_px=(16, 16)))


def test_a_pass_is_equal_bit_for_bit_on_one_process_and_on_a_cluster(
    network: Performer, tmp_path: Path, cluster: Compute
) -> None:
    flowers = generated_flowers(150, seed=3, size=32)
    alone, found = (
        stream_responses(network, flowers, top=(7, 120), out=tmp_path / str(n), compute=where)
        for n, where in enumerate((Compute(), cluster))
    )
    for name in ("descriptor", "logits"):
        assert np.array_equal(getattr(found, name), getattr(alone, name))
    for name, array in vars(alone.top).items():
        assert np.array_equal(getattr(found.top, name), array)
    assert found.dead_layers == alone.dead_layers
    maps = [
        stream_maps(network, flowers, ["1"], tmp_path / f"maps {n}", compute=where)["1"]
        for n, where in enumerate((Compute(), cluster))
    ]
    assert np.array_equal(*maps)
    index = feature_index(network)
    wanted, windows = Wanted("3", ("3",), index, DescriptorConfig()), view_windows(40, 2, torch.Generator())
    reads = [
        read_photos(network, flowers, range(5, 45), windows, wanted, tmp_path / f"inspect {n}", where)
        for n, where in enumerate((Compute(), cluster))
    ]
    assert {"descriptor", "tap", "later-0"} < set(reads[0].arrays)
    for name, array in reads[0].arrays.items():
        assert np.array_equal(reads[1].arrays[name], array), name


def test_an_error_of_a_worker_is_the_same_sentence(network: Performer, tmp_path: Path, cluster: Compute) -> None:
    flowers = generated_flowers(130, seed=3, size=32)

    def draw(row: int) -> np.ndarray:
        if row == 100:
            raise OSError("the file is gone")
        return np.zeros((32, 32, 3), np.uint8)

    broken = type(flowers).from_generator(draw, [f"p{row}" for row in range(130)], recipe="gone")
    with pytest.raises(ImageError, match="Could not read the image p100: the file is gone"):
        stream_responses(network, broken, out=tmp_path, compute=cluster)
