"""H3: how much grid strided layers leave in backward pictures of trained networks, and which operation leaves it.

For every network and photo: the signal of the highest score by guided backpropagation, by captum's and by ours with
each treatment of strides and poolings. Figures are `partlens_papers.flowers.lattice.lattice_index` (log10 of peak over
background, here averaged over photos) and the share of energy on the lattice, beside the control: the same pixels
permuted. Where a network has no trained scores (the papers' AlexNet without its fully connected layers), the signal
is that of the filter with the most energy in its last convolution.

"Cause" switches the treatment on for one kind of operation at a time: strided convolutions alone, strided poolings
alone. "Moved" is the distance between the middles of our signals and of the true gradient's, both smoothed, for the
peak of a filter of a deep layer: nearest resampling moves structures, aligned resampling should not.

    uv run python papers/studies/stride_lattice.py PHOTOS alexnet=FILE resnet18=FILE resnet50=FILE vgg11=random:0
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import warnings
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from partlens.attribution.backprop import guided_backprop
from partlens.network.performer import Performer
from partlens.network.taps import forward_taps
from partlens.network.zoo import load_performer
from partlens_papers.flowers.lattice import lattice_energy_frac, lattice_index

SEED, THREADS, PHOTOS, STRIDES = 0, 1, 12, (2, 4, 8)
TREATMENTS: dict[str, dict[str, Any]] = {
    "no fix": {"fix_strides": False, "pooling": "route"},
    "nearest, poolings as they are (the authors)": {"fix_strides": "nearest", "pooling": "route"},
    "nearest, poolings overwrite (the authors' option)": {"fix_strides": "nearest", "pooling": "overwrite"},
    "poolings alone": {"fix_strides": False, "pooling": "resample"},
    "nearest, poolings too": {"fix_strides": "nearest", "pooling": "resample"},
    "aligned, poolings as they are": {"fix_strides": "aligned", "pooling": "route"},
    "aligned, poolings too": {"fix_strides": "aligned", "pooling": "resample"},
}
DEEP = {"alexnet": "conv5", "resnet18": "layer3", "resnet50": "layer3", "vgg11": "features.17"}


def estimate(values: Tensor) -> dict[str, float | int]:
    """Mean, 95 % interval of the mean (normal) and count, leaving out undefined values but counting them."""
    known = values[~values.isnan()]
    half = 1.96 * float(known.std()) / math.sqrt(len(known)) if len(known) > 1 else math.nan
    return {
        "mean": round(float(known.mean()), 4),
        "interval_half": round(half, 4),
        "n": len(known),
        "undefined": len(values) - len(known),
    }


def measured(signal: Tensor, generator: torch.Generator) -> dict[str, Any]:
    """Index and energy share for every stride, and the same for permuted pixels."""
    flat = signal.flatten(2)
    control = flat[:, :, torch.randperm(flat.shape[2], generator=generator)].reshape(signal.shape)
    return {
        str(stride): {
            "index": estimate(lattice_index(signal, stride)),
            "energy_frac": estimate(lattice_energy_frac(signal, stride)),
            "permuted_index": estimate(lattice_index(control, stride)),
        }
        for stride in STRIDES
    }


def load(name: str, weights: str) -> Performer:
    spec = "partlens_papers.performers:alexnet_caffe" if name == "alexnet" else f"torchvision:{name}"
    return load_performer(f"{spec}@{weights}")


def middle(signal: Tensor) -> Tensor:
    """Row and column of the middle of a signal's size, in pixels, per image."""
    size = signal.abs().sum(1)
    size = size / size.sum((1, 2), keepdim=True)
    rows, cols = torch.arange(size.shape[1]) + 0.5, torch.arange(size.shape[2]) + 0.5
    return torch.stack([(size.sum(2) * rows).sum(1), (size.sum(1) * cols).sum(1)], 1)


def displacement(performer: Performer, x: Tensor, layer: str, filters: list[int]) -> dict[str, Any]:
    """How far each treatment moves the signal of a filter's peak, in pixels down and right."""

    def middles(**treatment: Any) -> Tensor:
        signals = guided_backprop(
            performer, x, layer=layer, filters=filters, start="peak", rule="gradient", **treatment
        )
        return torch.stack([middle(signals[:, k]) for k in range(len(filters))], 1)

    true = middles(fix_strides=False)
    found = {}
    for name, treatment in TREATMENTS.items():
        moved = (middles(**treatment) - true).mean((0, 2))  # over photos and both axes
        found[name] = {
            "px_mean": round(float(moved.mean()), 3),
            "standard_error": round(float(moved.std()) / math.sqrt(len(moved)), 3),
        }
    return found


def study(name: str, weights: str, files: list[Path]) -> dict[str, Any]:
    performer = load(name, weights)
    generator = torch.Generator().manual_seed(SEED)
    x = performer.preprocessing([Image.open(f) for f in files])
    if name == "alexnet":
        _, taps = forward_taps(performer, x, ["relu5"])
        chosen = taps["relu5"].square().sum((2, 3)).argmax(1).tolist()
    else:
        chosen = None

    def ours(**treatment: Any) -> Tensor:
        if chosen is None:
            return torch.cat([guided_backprop(performer, part, **treatment) for part in x.split(4)])
        each = [
            guided_backprop(performer, x[i : i + 1], layer="relu5", filters=k, **treatment)
            for i, k in enumerate(chosen)
        ]
        return torch.cat(each)

    found: dict[str, Any] = {}
    for label, treatment in TREATMENTS.items():
        found[label] = measured(ours(**treatment), generator)
        print(name, label, {s: v["index"]["mean"] for s, v in found[label].items()}, flush=True)
    try:
        from captum.attr import GuidedBackprop, NeuronGuidedBackprop
    except ImportError:
        found["captum"] = "not installed"
    else:
        each = []
        for i in range(len(x)):
            one = x[i : i + 1].clone().requires_grad_()
            if chosen is None:
                target = int(performer.module(x[i : i + 1]).argmax())
                each.append(GuidedBackprop(performer.module).attribute(one, target=target))
            else:
                method = NeuronGuidedBackprop(performer.module, performer.module.get_submodule("relu5"))
                # captum starts with ones; its start is made the activation map by squaring and halving.
                each.append(method.attribute(one, lambda out, k=chosen[i]: out[:, k].square().sum((1, 2)) / 2))
        found["captum"] = measured(torch.cat(each).detach(), generator)
        print(name, "captum", {s: v["index"]["mean"] for s, v in found["captum"].items()}, flush=True)
    few = torch.randperm(
        forward_taps(performer, x[:1], [DEEP[name]])[1][DEEP[name]].shape[1], generator=generator
    ).tolist()
    return {
        "size_px": list(x.shape[2:]),
        "notes": list(performer.notes),
        "signal": "the strongest filter of relu5" if chosen is not None else "the highest score",
        "moved": {"layer": DEEP[name], "filters": 6, **displacement(performer, x[:6], DEEP[name], few[:6])},
        "lattice": found,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path, help="folder of photos, searched below")
    parser.add_argument("networks", nargs="+", help="NAME=WEIGHTS with NAME among " + ", ".join(DEEP))
    parser.add_argument("--count", type=int, default=PHOTOS)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    arguments = parser.parse_args()
    torch.set_num_threads(THREADS)
    warnings.simplefilter("ignore")  # captum announces its hooks at every call
    files = sorted(f for f in arguments.photos.rglob("*") if f.suffix.lower() in {".jpg", ".jpeg", ".png"})
    order = torch.randperm(len(files), generator=torch.Generator().manual_seed(SEED))[: arguments.count].tolist()
    result: dict[str, Any] = {
        "seed": SEED,
        "threads": THREADS,
        "torch": torch.__version__,
        "captum": importlib.metadata.version("captum"),
        "photos": len(order),
        "networks": {},
    }
    for entry in arguments.networks:
        name, _, weights = entry.partition("=")
        result["networks"][name] = study(name, weights, [files[i] for i in order])
        arguments.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
