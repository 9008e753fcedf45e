"""Speed: what each verb costs over its bound, and over other tools, in one run.

Every figure is a ratio of CPU time (all threads of the process, one thread for the arithmetic), of which both sides
were measured in turn; medians over rounds with the smallest and the largest. Seconds are never told.

- ``passes``: `stream` with the tap's maps, `stream_maps` to disk, and the responses of all layers, over decoding the
  same photos and one plain forward pass in the same precision; float32 over bfloat16 with channels last.
- ``inspect``: the verb over one plain forward pass over the photos and views used; over a plain float32 pass over the
  category's photos and eight non-negative factors of the same layer, which is what NMF alone costs.
- ``chain``: every verb of a user's way, at its defaults, on the photos of a category and 400 others, over one plain
  float32 pass over all of these; each once, since together they take minutes. ``fit-explainer`` also over its bound:
  all products that it multiplies (maps, epochs, curve of p), counted in short fits, at the measured peak of bfloat16.
- ``explain``: the verb on photos of that run, over forward pass and K backward passes, K its relevant filters.
- ``maps``: maps of 16 filters over one forward and 16 backward passes, with and without the repair of strides; captum.
- ``guided``: guided backpropagation over the plain gradient, eight networks; captum, zennit, grad-cam.
- ``cams``: Grad-CAM over forward and backward pass; grad-cam, torch-cam.
- ``lasso``: spgl1 over the μ-lasso on one random problem, and how much larger the loss that it ends at is.
- ``memory``: peak of resident memory with 20,000 generated images over that with 500.

    uv run python papers/studies/bench.py CASE… --photos FOLDER [--model SPEC] [--rounds 3]

Peers that are not installed are named as absent: captum grad-cam spgl1 zennit torchcam. A case that is run again takes
its own place in ``papers/results/bench.json``.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import partlens
from partlens.__main__ import keep_freed_memory
from partlens.attribution.backprop import guided_backprop
from partlens.attribution.grad_cam import layer_grad_cam
from partlens.data.images import ImageSet
from partlens.explainer.config import ExplainerConfig
from partlens.network.performer import Performer
from partlens.network.stream import batches, stream, stream_maps
from partlens.network.taps import in_precision
from partlens.network.zoo import load_performer
from partlens.object_parts.finding import finding_layers
from partlens.selection.responses import stream_responses
from partlens_papers.rivals.factors import fit_nmf

OUT = Path(__file__).parents[1] / "results" / "bench.json"
BATCH, FILTERS, SEED = 32, 16, 0
_SPEC = importlib.util.spec_from_file_location("guided_study", Path(__file__).with_name("guided_backprop.py"))
assert _SPEC is not None
assert _SPEC.loader is not None
guided_study = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(guided_study)


def cpu_seconds(function: Callable[[], object]) -> float:
    started = time.process_time()
    function()
    return time.process_time() - started


def ratios(bound: Callable[[], object], others: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, Any]:
    """Measure in turn, after one round that warms up; the bound before and after each of the others."""
    found: dict[str, list[float]] = {name: [] for name in others}
    for number in range(rounds + 1):
        before = cpu_seconds(bound)
        for name, function in others.items():
            took = cpu_seconds(function)
            after = cpu_seconds(bound)
            if number:  # not the round that warms up
                found[name].append(2 * took / (before + after))
            before = after
    return {name: summary(each) for name, each in found.items()}


def summary(values: list[float]) -> dict[str, float]:
    return {
        "median": round(statistics.median(values), 3),
        "min": round(min(values), 3),
        "max": round(max(values), 3),
        "rounds": len(values),
    }


def installed(*packages: str) -> bool:
    return all(importlib.util.find_spec(package) is not None for package in packages)


class Bench:
    """What the cases share."""

    def __init__(self, model: str, photos: Path, category: str, rounds: int, scratch: Path) -> None:
        self.performer, self.rounds, self.scratch = load_performer(model), rounds, scratch
        self.images, self.category, self.model = ImageSet.open(photos), category, model

    def some(self, count: int) -> ImageSet:
        """Photos as the network sees them, in memory, so that decoding is the same small part of both sides."""
        prepare = self.performer.preprocessing
        rows = [k * len(self.images) // count for k in range(count)]
        frames = [np.asarray(prepare.frame(self.images.read(row, prepare.scaled_size))) for row in rows]
        return ImageSet.from_arrays(np.stack(frames))

    def passes(self) -> dict[str, Any]:
        images, found = self.some(2 * BATCH), {}
        for precision in ("float32", "bfloat16"):
            performer = self.performer.computing(precision)
            with tempfile.TemporaryDirectory(dir=self.scratch) as folder:
                readers = self._readers(performer, images, Path(folder))
                found[precision] = ratios(partial(plain_pass, performer, images), readers, self.rounds)
        fast = self.performer.computing("bfloat16")
        slow = {"float32 over bfloat16": lambda: plain_pass(self.performer, images)}
        return found | ratios(lambda: plain_pass(fast, images), slow, self.rounds)

    def _readers(self, performer: Performer, images: ImageSet, folder: Path) -> dict[str, Callable[[], object]]:
        tap, count = performer.tap, iter(range(1000))
        return {
            "stream of maps": lambda: [batch.rows for batch in stream(performer, images, range(len(images)), [tap])],
            "maps to disk": lambda: stream_maps(performer, images, [tap], folder / str(next(count))),
            "responses of all layers": lambda: stream_responses(performer, images, out=folder / str(next(count))),
        }

    def inspect(self) -> dict[str, Any]:
        out = self.scratch / f"inspect-{self.performer.name.partition(' ')[0]}"
        images = self.some(BATCH)
        before = [cpu_seconds(lambda: plain_pass(self.performer, images)) for _ in range(2)][1]
        started = time.process_time()
        record = partlens.inspect(self.performer, self.images, out=out, category=self.category)
        took = time.process_time() - started
        used = self.performer.computing(record.performer.passes)
        plain = [cpu_seconds(lambda: plain_pass(used, images)) for _ in range(3)]
        one = statistics.median(plain) / BATCH
        chosen = record.categories[0]
        passes = chosen.photos * record.config.views + chosen.measured * chosen.held_out + record.config.background
        own = self.images.take(self.images.indices(self.category, split="train")[: chosen.photos])
        factors = cpu_seconds(lambda: factorised(self.performer, own))
        precision = record.performer.precision
        return {
            "over a plain pass in its precision": round(took / (one * passes), 2),
            "over a plain pass in float32": round(took / (before / BATCH * passes), 2),
            "over NMF of the layer": round(took / factors, 2),
            "photos and views": passes,
            "parts": len(chosen.parts),
            "precision": None if precision is None else precision.model_dump(),
        }

    def chain(self) -> dict[str, Any]:
        own = list(self.images.indices(self.category))
        rest = sorted({*range(len(self.images))} - {*own})
        images = self.images.take([*own, *rest[:: max(1, len(rest) // 400)][:400]])
        run, performer = self.scratch / f"chain-{self.performer.name.partition(' ')[0]}", self.performer
        photos = [self.scratch / f"chain-{k}.png" for k in range(20)]
        for file, row in zip(photos, self.images.indices(self.category, split="test"), strict=False):
            self.images.read(row).save(file)
        verbs: dict[str, Callable[[], object]] = {
            "fit-explainer": lambda: partlens.fit_explainer(performer, images, out=run, category=self.category),
            "evaluate": lambda: partlens.evaluate(run, images, model=performer),
            "parts": lambda: partlens.parts(run, images, model=performer),
            "select-features": lambda: partlens.select_features(performer, images, out=run),
            "explain, 1 photo": lambda: partlens.explain(run, photos[0], model=performer, out=self.scratch / "e1"),
            "explain, 20 photos": lambda: partlens.explain(run, photos, model=performer, out=self.scratch / "e20"),
        }
        took = {name: cpu_seconds(verb) for name, verb in verbs.items()}
        one = cpu_seconds(lambda: plain_pass(performer, images))
        bound = self._fit_flops(images) / peak_flops_per_second()
        return {
            "over a plain pass in float32": {name: round(seconds / one, 2) for name, seconds in took.items()},
            "fit-explainer over its bound": round(took["fit-explainer"] / bound, 2),
            "CPU seconds without the 20 photos": round(sum(took.values()) - took["explain, 20 photos"]),
            "photos": len(images),
        }

    def _fit_flops(self, images: ImageSet) -> float:
        """Return what a fit multiplies and adds; an epoch more takes as much as any other."""
        counted = []
        for epochs in (2, 3):
            few = {"epochs": epochs, "warmup_epochs": epochs}
            with FlopCounterMode(display=False) as counter, tempfile.TemporaryDirectory(dir=self.scratch) as folder:
                partlens.fit_explainer(self.performer, images, out=folder, category=self.category, config=few)
            counted.append(counter.get_total_flops())
        return counted[0] + (ExplainerConfig.preset("partlens").epochs - 2) * (counted[1] - counted[0])

    def explain(self) -> dict[str, Any]:
        run = self.scratch / f"inspect-{self.performer.name.partition(' ')[0]}"
        rows = self.images.indices(self.category, split="test")[:2]
        selection = json.loads((run / "selection.json").read_text())
        filters = max(len(one["filters"]) for one in selection["found"]["classes"])
        prepare = self.performer.preprocessing
        photos = [self.images.read(row) for row in rows]
        batch = prepare(photos[:1])

        def bound() -> None:
            leaf = batch.clone().requires_grad_()
            answer = self.performer.module(leaf)[0].max()
            for k in range(filters):
                torch.autograd.grad(answer, leaf, retain_graph=k + 1 < filters)

        files = [self.scratch / f"photo-{k}.png" for k in range(len(photos))]
        for file, photo in zip(files, photos, strict=True):
            photo.save(file)
        verb = {
            "verb, one photo": lambda: partlens.explain(run, files[0], model=self.performer, out=self.scratch / "e")
        }
        return {"backward passes": filters} | ratios(bound, verb, self.rounds)

    def maps(self) -> dict[str, Any]:
        module, layer = self.performer.module, self.performer.tap
        x = self.performer.preprocessing([self.images.read(row) for row in range(2)])
        wanted = list(range(FILTERS))

        def bound() -> None:
            held: list[Tensor] = []
            hook = module.get_submodule(layer).register_forward_hook(lambda _m, _i, o: held.append(o))
            leaf = x.clone().requires_grad_()
            module(leaf)
            hook.remove()
            for k in wanted:
                torch.autograd.grad(held[0][:, k].sum(), leaf, retain_graph=k + 1 < FILTERS)

        def ours(**settings: Any) -> Callable[[], object]:
            return lambda: guided_backprop(module, x, layer=layer, filters=wanted, start="ones", **settings)

        others: dict[str, Callable[[], object]] = {
            "no repair": ours(fix_strides=False),
            "nearest": ours(fix_strides="nearest"),
            "aligned, poolings too": ours(fix_strides="aligned", pooling="resample"),
        }
        if installed("captum"):
            from captum.attr import NeuronGuidedBackprop

            method = NeuronGuidedBackprop(module, module.get_submodule(layer))
            others["captum, no repair"] = lambda: [
                method.attribute(x.clone().requires_grad_(), lambda out, k=k: out[:, k].sum((1, 2))) for k in wanted
            ]
        return {"layer": layer, "filters": FILTERS} | ratios(bound, others, self.rounds)

    def guided(self) -> dict[str, Any]:
        tools = {name: function for name, (package, function) in guided_study.TOOLS.items() if _there(package)}
        found = {}
        for name in guided_study.NETWORKS:
            module = guided_study.build(name)
            x = torch.randn(4, 3, 96, 96, generator=torch.Generator().manual_seed(SEED))
            own = {tool: guided_study.build(name) for tool in tools}  # grad-cam alters the network for good
            others = {tool: partial(function, own[tool], x) for tool, function in tools.items()}
            found[name] = ratios(partial(guided_study.plain, module, x), others, self.rounds)
        return found

    def cams(self) -> dict[str, Any]:
        module, layer = self.performer.module, self.performer.tap
        x = self.performer.preprocessing([self.images.read(row) for row in range(8)])
        classes = module(x).argmax(1).detach()

        def bound() -> None:
            leaf = x.clone().requires_grad_()
            torch.autograd.grad(module(leaf).gather(1, classes[:, None]).sum(), leaf)

        others: dict[str, Callable[[], object]] = {
            "partlens": lambda: layer_grad_cam(self.performer, x, layer, classes)
        }
        if installed("pytorch_grad_cam"):
            from pytorch_grad_cam import GradCAM
            from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

            targets = [ClassifierOutputTarget(int(one)) for one in classes]
            method = GradCAM(module, [module.get_submodule(layer)])
            others["grad-cam"] = lambda: method(x, targets)
        if installed("torchcam"):
            from torchcam.methods import GradCAM as TorchCam

            def torchcam() -> None:
                with TorchCam(module, layer) as extractor:
                    extractor(classes.tolist(), module(x.clone().requires_grad_()))

            others["torch-cam"] = torchcam
        return ratios(bound, others, self.rounds)

    def lasso(self) -> dict[str, Any]:
        from partlens.selection.lasso import mu_lasso

        generator = torch.Generator().manual_seed(SEED)
        photos, features, classes, mu = 300, 3000, 4, 5.0
        x = torch.rand(photos, features, generator=generator, dtype=torch.float64) / features**0.5
        labels = torch.nn.functional.one_hot(torch.arange(photos) % classes).double()
        found = mu_lasso(x.float(), labels, mu, nonnegative=False)

        def loss(weights: Tensor) -> float:
            return float((x.float().double() @ weights - labels).square().sum())

        result: dict[str, Any] = {"photos": photos, "features": features, "classes": classes}
        if installed("spgl1"):
            from spgl1 import spg_lasso

            a, solved = x.float().double().numpy(), []

            def theirs() -> None:
                solved[:] = [spg_lasso(a, labels[:, k].numpy(), mu)[0] for k in range(classes)]

            theirs()
            worse = loss(torch.from_numpy(np.stack(solved, 1))) / loss(found.weights) - 1
            result |= ratios(lambda: mu_lasso(x.float(), labels, mu, nonnegative=False), {"spgl1": theirs}, self.rounds)
            result["loss of spgl1 over ours, less 1"] = float(f"{worse:.2g}")
        return result

    def memory(self) -> dict[str, Any]:
        found = {}
        for verb in ("responses", "maps"):
            peaks = {count: _peak(verb, count, self.scratch) for count in (500, 20_000)}
            found[verb] = {"peak MB": peaks, "growth": round(peaks[20_000] / peaks[500] - 1, 3)}
            print(verb, json.dumps(found[verb]), flush=True)
        return found


def plain_pass(performer: Performer, images: ImageSet) -> None:
    """Decode and run photos as anybody would, in the performer's precision."""
    with torch.no_grad():
        for _, inputs in batches(performer, images, range(len(images)), BATCH):
            ready, computing = in_precision(performer.precision, inputs)
            with computing:
                performer.module(ready)


def factorised(performer: Performer, images: ImageSet) -> None:
    """Read photos in float32 and factorise the layer that parts are found on, as one without partlens would."""
    layer = finding_layers(performer)[0]
    maps = torch.cat([batch.maps[layer] for batch in stream(performer, images, range(len(images)), [layer])])
    fit_nmf(maps.float().clamp(min=0), 8, cells=maps[:, 0].numel())


def peak_flops_per_second() -> float:
    """Return the most that a convolution in bfloat16 with channels last reaches here."""
    x, weights = torch.randn(64, 256, 14, 14), torch.randn(256, 256, 3, 3)
    x, weights = (each.bfloat16().contiguous(memory_format=torch.channels_last) for each in (x, weights))
    took = [cpu_seconds(lambda: torch.nn.functional.conv2d(x, weights, padding=1)) for _ in range(20)]
    return 2 * x.numel() * weights[0].numel() / min(took)


def _there(package: str | None) -> bool:
    try:
        return package is None or bool(importlib.metadata.version(package))
    except importlib.metadata.PackageNotFoundError:
        return False


def _peak(verb: str, count: int, scratch: Path) -> float:
    """Run a verb on generated images in a process of its own; return the most memory it held, without mapped files."""
    command = [sys.executable, __file__, "--child", verb, str(count), str(scratch)]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return float(said.split()[-1])


def _child(verb: str, count: int, scratch: Path) -> None:
    """Read many small images by one verb and print the peak of what is resident and no file, in MB."""
    import threading

    torch.set_num_threads(1)
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 16, 3, 2, 1), torch.nn.ReLU(), torch.nn.Conv2d(16, 32, 3, 2, 1), torch.nn.ReLU(),
        torch.nn.Conv2d(32, 32, 3, 1, 1), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(2048, 4),
    )  # fmt: skip
    performer = load_performer(network.eval(), partlens.Preprocessing(size_px=(32, 32), resize="squash"))
    noise = np.random.default_rng(0).integers(0, 256, (64, 32, 32, 3), dtype=np.uint8)
    keys = [f"{row}.png" for row in range(count)]
    images = ImageSet.from_generator(lambda row: noise[row % 64], keys, recipe="noise")
    peak, done = [0.0], threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            status = Path("/proc/self/status").read_text().splitlines()
            held = {line.split(":")[0]: int(line.split()[1]) for line in status if line.endswith("kB")}
            peak[0] = max(peak[0], held.get("RssAnon", held["VmRSS"]) / 1000)

    watcher = threading.Thread(target=watch)
    watcher.start()
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        if verb == "responses":
            stream_responses(performer, images, out=Path(folder))
        else:
            stream_maps(performer, images, [performer.tap], Path(folder))
    done.set()
    watcher.join()
    print(round(peak[0], 1))


CASES = ("passes", "inspect", "chain", "explain", "maps", "guided", "cams", "lasso", "memory")


def main() -> None:
    keep_freed_memory()  # as the program does; the other sides gain by it as well
    if sys.argv[1:2] == ["--child"]:
        return _child(sys.argv[2], int(sys.argv[3]), Path(sys.argv[4]))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="+", choices=CASES)
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--category", default="fox")
    parser.add_argument("--model", default="torchvision:resnet18")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()))
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # captum announces its hooks at every call
    bench = Bench(given.model, given.photos, given.category, given.rounds, given.scratch)
    peers = ("captum", "grad-cam", "spgl1", "zennit", "torchcam")
    for case in given.cases:
        found = getattr(bench, case)()
        made = {
            "machine": f"{platform.machine()}, {os.cpu_count()} threads, load {os.getloadavg()[0]:.0f}",
            "versions": {name: importlib.metadata.version(name) for name in ("partlens", "torch", "torchvision")},
            "peers": {name: importlib.metadata.version(name) for name in peers if _there(name)},
            "absent": [name for name in peers if not _there(name)],
            "found": found,
        }
        of_network = {} if case in {"guided", "lasso", "memory"} else {"model": bench.performer.name}
        network = bench.performer.name.rpartition(":")[2].partition("@")[0]
        key = f"{case} {network}" if of_network else case
        held = json.loads(given.out.read_text()) if given.out.exists() else {}
        given.out.write_text(json.dumps(held | {key: of_network | made}, indent=1) + "\n")
        print(key, json.dumps(found), flush=True)
    return None


if __name__ == "__main__":
    main()
