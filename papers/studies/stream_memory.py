"""Resident memory of the streaming pass with maps cached on disk: 1,000 against 10,000 images.

Each size runs in a process of its own; the figure is the largest resident set after the pass has warmed up (its first
200 images), so that imports and the network are not counted as growth.

    uv run python benchmarks/stream_memory.py
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SIZES = (1_000, 10_000)


def resident_kb() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1])
    raise RuntimeError("no VmRSS")


def one(count: int) -> None:
    import torch
    from partlens.performer.activations import stream_maps
    from partlens.performer.flower_network import flower_network
    from partlens.performer.preprocessing import Preprocessing
    from partlens.performer.zoo import Performer, weights_sha256

    from partlens.data.flowers import generated_flowers

    torch.set_num_threads(1)
    torch.manual_seed(0)
    network = flower_network().eval()
    performer = Performer(
        network, "flowers", Preprocessing(size_px=(56, 56), resize="squash"), weights_sha256(network), "relu4"
    )
    images = generated_flowers(count, size=56)
    folder = Path(tempfile.mkdtemp())
    largest = 0

    def watch(done: int, _total: int) -> None:
        nonlocal largest
        if done >= 200:
            largest = max(largest, resident_kb())

    stream_maps(performer, images, ["relu4"], folder, progress=watch)
    shutil.rmtree(folder)
    print(largest)


def main() -> None:
    if len(sys.argv) > 1:
        one(int(sys.argv[1]))
        return
    found = {
        count: int(
            subprocess.run([sys.executable, __file__, str(count)], capture_output=True, text=True, check=True).stdout
        )
        for count in SIZES
    }
    growth = found[SIZES[1]] / found[SIZES[0]] - 1
    result = {"resident_kb": found, "growth_frac": round(growth, 4)}
    Path(__file__).with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
