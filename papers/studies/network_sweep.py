"""Every verb on many architectures with random weights: does it work, or is the network refused for a reason?

One process each, with a time limit. For a network of torchvision, timm or Hugging Face (from its configuration, nothing
is downloaded), with batch norms measured on generated flowers:

- ``layers``: how many can be tapped, the default tap and its layout; layers whose filters are another number than the
  module's own width (``wrong_axes``, to be 0);
- ``guided_backprop`` of the highest score and of a filter of the default tap: finite, and not all zero;
- ``select_features`` with pictures, and ``explain`` of one of its photos;
- ``inspect`` of 24 flowers in two categories: parts, what they carry, verdicts, filters, explained photos and the page;
  shares are numbers where there is a score to share;
- ``fit``: the explainer's decoder, fed with the network's own maps and p = 0, gives the network's scores;
- ``same``: weights, buffers, modes, hooks and gradients are afterwards what they were, bit for bit.

    python papers/studies/network_sweep.py run sweep.jsonl       # goes on where it was stopped
    python papers/studies/network_sweep.py one timm:deit_tiny_patch16_224
    python papers/studies/network_sweep.py page sweep.jsonl      # network_sweep.json and the page of the docs
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import importlib.metadata
import itertools
import json
import math
import multiprocessing
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import partlens
from partlens.attribution.backprop import guided_backprop
from partlens.data.flowers import generated_flowers
from partlens.errors import PartlensError
from partlens.explainer.config import ExplainerConfig
from partlens.explainer.network import build_explainer, explainer_structure, performer_head
from partlens.network.outputs import class_scores
from partlens.network.performer import Performer, weights_sha256
from partlens.network.preprocessing import Preprocessing
from partlens.network.taps import forward_taps

HERE = Path(__file__).parent
RESULT, PAGE = HERE / "network_sweep.json", HERE.parent / "docs" / "network-sweep.md"
SEED, CLASSES, LIMIT_S, CLOSE = 0, 4, 600, 1e-3
STEPS = ("layers", "guided_backprop", "select_features", "explain", "inspect", "fit")


def _words(text: str) -> list[str]:
    return text.split()


TORCHVISION = _words("""
alexnet convnext_tiny convnext_small densenet121 densenet169 efficientnet_b0 efficientnet_b1 efficientnet_b2
efficientnet_b3 efficientnet_v2_s googlenet inception_v3 maxvit_t mnasnet0_5 mnasnet0_75 mnasnet1_0 mnasnet1_3
mobilenet_v2 mobilenet_v3_large mobilenet_v3_small regnet_x_1_6gf regnet_x_3_2gf regnet_x_400mf regnet_x_800mf
regnet_y_1_6gf regnet_y_400mf regnet_y_800mf resnet18 resnet34 resnet50 resnet101 resnext50_32x4d shufflenet_v2_x0_5
shufflenet_v2_x1_0 shufflenet_v2_x1_5 shufflenet_v2_x2_0 squeezenet1_0 squeezenet1_1 swin_t swin_s swin_v2_t vgg11
vgg11_bn vgg13 vgg16 vit_b_16 vit_b_32 wide_resnet50_2
""")
TIMM = _words("""
beit_base_patch16_224 botnet26t_256 caformer_s18 cait_xxs24_224 coat_tiny coatnet_nano_rw_224 convformer_s18
convit_tiny convmixer_768_32 convnext_atto convnextv2_atto crossvit_tiny_240 cspdarknet53 cspresnet50 davit_tiny
deit_tiny_patch16_224 deit_tiny_distilled_patch16_224 deit3_small_patch16_224 densenet121 dla34 dpn68 edgenext_xx_small
efficientformer_l1 efficientnet_b0 efficientvit_b0 eva02_tiny_patch14_224 fastvit_t8 fbnetc_100 focalnet_tiny_srf
gcvit_xxtiny gernet_s ghostnet_100 gmlp_s16_224 halonet26t hardcorenas_a hgnetv2_b0 hiera_tiny_224 hrnet_w18_small
inception_next_tiny lcnet_050 levit_128s mambaout_femto maxvit_tiny_tf_224 mixer_s32_224 mixnet_s mobilenetv3_small_100
mobilenetv4_conv_small mobileone_s0 mobilevit_xxs mvitv2_tiny nest_tiny nf_regnet_b0 pit_ti_224 poolformer_s12
poolformerv2_s12 pvt_v2_b0 regnety_002 repvit_m0_9 repvgg_a0 res2net50_26w_4s resmlp_12_224 resnest14d resnet18
resnetv2_50 rexnet_100 seresnet50 skresnet18 swin_tiny_patch4_window7_224 swinv2_cr_tiny_224 tf_efficientnet_b0
tf_mobilenetv3_small_minimal_100 tiny_vit_5m_224 tnt_s_legacy_patch16_224 tresnet_m twins_svt_small visformer_tiny
vit_tiny_patch16_224 vit_small_patch14_reg4_dinov2 volo_d1_224 xcit_nano_12_p16_224
""")
HUGGING_FACE: dict[str, dict[str, Any]] = {
    "ViT": {"layers": True},
    "DeiT": {"layers": True},
    "Beit": {"layers": True},
    "Dinov2": {"layers": True},
    "Dinov2WithRegisters": {"layers": True},
    "Swin": {
        "image_size": 64,
        "patch_size": 4,
        "embed_dim": 16,
        "depths": [2, 2],
        "num_heads": [2, 4],
        "window_size": 4,
    },
    "Swinv2": {"image_size": 64, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4},
    "ConvNext": {"hidden_sizes": [16, 32, 64, 64], "depths": [2, 2, 2, 2], "image_size": 64},
    "ConvNextV2": {"hidden_sizes": [16, 32, 64, 64], "depths": [2, 2, 2, 2], "image_size": 64},
    "ResNet": {"embedding_size": 16, "hidden_sizes": [16, 32, 64, 64], "depths": [2, 2, 2, 2]},
    "RegNet": {"embedding_size": 16, "hidden_sizes": [16, 32, 64, 64], "depths": [2, 2, 2, 2], "groups_width": 8},
    "MobileNetV2": {"image_size": 64},
    "Pvt": {
        "image_size": 64,
        "hidden_sizes": [16, 32, 64, 64],
        "num_attention_heads": [1, 2, 2, 2],
        "depths": [1, 1, 1, 1],
    },
    "PoolFormer": {"hidden_sizes": [16, 32, 64, 64], "depths": [1, 1, 1, 1]},
    "Levit": {"image_size": 224},
}
_TINY_VIT = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 64, "patch_size": 8}

NAMES = [
    *(f"torchvision:{name}" for name in TORCHVISION),
    *(f"timm:{name}" for name in TIMM),
    *(f"transformers:{name}" for name in HUGGING_FACE),
]


def built(name: str) -> tuple[nn.Module, int]:
    """Return a network with random weights and the side of its input, small where it accepts that."""
    source, _, model = name.partition(":")
    torch.manual_seed(SEED)
    if source == "transformers":
        return _of_hugging_face(model)
    if source == "timm":
        return _of_timm(model)
    from torchvision import models

    options: dict[str, Any] = {"num_classes": CLASSES}
    side = {"alexnet": 96, "googlenet": 96, "inception_v3": 112, "maxvit_t": 224}.get(model, 64)
    if model.startswith("vit"):
        options["image_size"] = side
    if model in {"googlenet", "inception_v3"}:
        options |= {"init_weights": False, "aux_logits": False}
    return models.get_model(model, weights=None, **options), side


def _of_hugging_face(model: str) -> tuple[nn.Module, int]:
    import transformers

    settings = dict(HUGGING_FACE[model])
    if settings.pop("layers", False):
        settings |= _TINY_VIT
    config = getattr(transformers, f"{model}Config")(num_labels=CLASSES, **settings)
    return getattr(transformers, f"{model}ForImageClassification")(config), settings.get("image_size", 64)


def _of_timm(model: str) -> tuple[nn.Module, int]:
    import timm

    usual = timm.create_model(model, num_classes=CLASSES)
    config = usual.pretrained_cfg
    if config.get("fixed_input_size") or not isinstance(next(usual.modules(), None), nn.Module):
        return usual, int(config["input_size"][1])
    small = 96
    try:
        with torch.no_grad():
            usual.eval()(torch.zeros(2, 3, small, small))
    except Exception:  # noqa: BLE001 - whatever a network raises, it does not take the size
        small = int(config["input_size"][1])
    return usual, small


def measured(network: nn.Module, images: Tensor) -> nn.Module:
    """Measure batch norms on images, so that values keep a scale through the layers."""
    norms = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]  # noqa: SLF001
    for norm in norms:
        norm.momentum = None
        norm.reset_running_stats()
    if norms:
        network.eval()
        for norm in norms:
            norm.train()
        with torch.no_grad():
            network(images)
    return network.eval()


def state(network: nn.Module) -> str:
    """Hash everything of a network that must come back as it was."""
    digest = hashlib.sha256(weights_sha256(network).encode())
    for path, module in network.named_modules():
        hooks = [list(getattr(module, kind)) for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")]
        digest.update(f"{path} {module.training} {getattr(module, 'inplace', None)} {hooks}".encode())
    for name, weight in network.named_parameters():
        digest.update(f"{name} {weight.requires_grad} {weight.grad is None}".encode())
    return digest.hexdigest()


def widths(module: nn.Module) -> int | None:
    """Return the number of filters that a layer gives by its own account."""
    if isinstance(module, nn.Linear):
        return module.out_features
    if isinstance(module, nn.Conv2d):
        return module.out_channels
    if isinstance(module, nn.modules.batchnorm._BatchNorm):  # noqa: SLF001
        return module.num_features
    return module.normalized_shape[-1] if isinstance(module, nn.LayerNorm) else None


class Sweep:
    """The verbs on one network, one after the other."""

    def __init__(self, name: str, folder: Path) -> None:
        network, side = built(name)
        self.folder, self.side, self.colours = folder, side, ("petal-red", "petal-blue")
        self.flowers = generated_flowers(8, seed=SEED, size=side, categories=self.colours)
        shape = Preprocessing(size_px=(side, side), resize="squash")
        self.batch = shape([self.flowers.read(row) for row in range(4)])
        self.network = measured(network, self.batch)
        self.performer = Performer(self.network, name, shape, weights_sha256(self.network))
        self.performer = dataclasses.replace(self.performer, class_names=(*self.colours, "c", "d")[:CLASSES])

    def layers(self) -> dict[str, Any]:
        found = self.performer.layers
        modules = dict(self.network.named_modules())
        wrong = [
            layer.name
            for layer in found
            if layer.layout != "unknown"
            and layer.name in modules
            and (width := widths(modules[layer.name])) is not None
            and layer.shape[0] != width
        ]
        tap = next((layer for layer in found if layer.is_default), None)
        return {
            "count": len(found),
            "tapped": sum(not layer.reason for layer in found),
            "tap": tap and tap.name,
            "layout": tap and tap.layout,
            "cells": tap and list(tap.shape),
            "wrong_axes": wrong,
        }

    def guided_backprop(self) -> dict[str, Any]:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            score = guided_backprop(self.performer, self.batch[:1])
            tap = self.performer.tap
            filters = guided_backprop(self.performer, self.batch[:1], layer=tap, filters=[0, 1])
        usable = all(bool(torch.isfinite(each).all()) for each in (score, filters))
        return {"finite": usable, "shown": bool(score.any()) and bool(filters.any()), "notes": len(said)}

    def select_features(self) -> dict[str, Any]:
        found = partlens.select_features(self.performer, self.flowers, out=self.folder / "selection", pictures=1)
        return {"path": found.path.name}

    def explain(self) -> dict[str, Any]:
        partlens.explain(self.folder / "selection", self.flowers.take([0]), model=self.performer)
        return {}

    def inspect(self) -> dict[str, Any]:
        photos = generated_flowers(24, seed=SEED, size=self.side, categories=self.colours)
        out = self.folder / "inspection"
        found = partlens.inspect(self.performer, photos, out=out, config={"views": 3, "parts_max": 4})
        shares = [part.share for one in found.categories for part in one.parts if one.shared]
        return {
            "tap": found.tap,
            "finding": list(found.finding),
            "verdicts": [one.verdict for one in found.categories],
            "parts": [len(one.parts) for one in found.categories],
            "finite": all(map(math.isfinite, shares)) and (out / "report.html").exists(),
            "notes": list(found.notes),
        }

    def fit(self) -> dict[str, Any]:
        tap = self.performer.tap
        structure = explainer_structure(self.performer, self.batch, tap)
        config = ExplainerConfig.preset("partlens", standardise=False)
        explainer = build_explainer(self.performer, structure, config)
        output, taps = forward_taps(self.performer, self.batch, [structure.read])
        explainer.start_norms(taps[structure.read])
        with torch.no_grad():
            explainer.share_logit.fill_(-torch.inf)
            (again,) = performer_head(self.performer, structure)(
                explainer.eval()(taps[structure.read]).reconstructions[-1]
            )
        scores = class_scores(output, len(self.batch))
        off = float((again - scores).abs().max() / scores.abs().max().clamp(min=1e-12))
        return {"targets": list(structure.targets), "signed": structure.signed, "off": off, "equal": off < CLOSE}


def one(name: str) -> dict[str, Any]:
    """Try every verb on one network; what partlens refuses is told by its sentence, what crashes by its traceback."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        sweep = Sweep(name, Path(folder))
        before = state(sweep.network)
        found: dict[str, Any] = {"name": name, "px": sweep.performer.preprocessing.size_px[0]}
        for step in STEPS:
            found[step] = _tried(getattr(sweep, step))
        found |= {"same": state(sweep.network) == before, "seconds": round(time.monotonic() - started, 1)}
    return found


def _tried(step: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return {"ok": True, **step()}
    except PartlensError as error:
        return {"ok": False, "refused": str(error)}
    except Exception as error:  # noqa: BLE001 - a crash is what the sweep looks for
        return {"ok": False, "crashed": f"{type(error).__name__}: {error}", "where": traceback.format_exc(limit=-3)}


def run(out: Path, names: list[str]) -> None:
    """Try every network that has no line yet, each in a process of its own, forked so that libraries load once."""
    import timm  # noqa: F401
    import torchvision  # noqa: F401
    import transformers  # noqa: F401

    torch.set_num_threads(1)  # threads do not survive a fork
    done = {json.loads(line)["name"] for line in out.read_text().splitlines()} if out.exists() else set()
    for name in (name for name in names if name not in done):
        with tempfile.TemporaryDirectory() as folder:
            found = _in_process(name, Path(folder) / "found.json")
        with out.open("a") as file:
            file.write(json.dumps(found) + "\n")
        print(name, _summary(found), flush=True)


def _in_process(name: str, answer: Path) -> dict[str, Any]:
    process = multiprocessing.get_context("fork").Process(target=_written, args=(name, answer))
    process.start()
    process.join(LIMIT_S)
    if process.is_alive():
        process.kill()
        process.join()
        return {"name": name, "failed": f"no end within {LIMIT_S} s"}
    found: dict[str, Any] = (
        json.loads(answer.read_text()) if answer.exists() else {"failed": f"exit {process.exitcode}"}
    )
    return {"name": name, **found}


def _written(name: str, answer: Path) -> None:
    try:
        found = one(name)
    except Exception as error:  # noqa: BLE001 - the network itself could not be made
        found = {"failed": f"could not be built: {type(error).__name__}: {error}"}
    answer.write_text(json.dumps(found))


def _summary(found: dict[str, Any]) -> str:
    if "failed" in found:
        return str(found["failed"])
    marks = [_mark(found[step]) for step in STEPS]
    return " ".join([*marks, "same" if found["same"] else "CHANGED", f"{found['seconds']} s"])


def _mark(step: dict[str, Any]) -> str:
    if step["ok"]:
        good = step.get("equal", True) and step.get("finite", True) and not step.get("wrong_axes")
        return "yes" if good else "WRONG"
    return "refused" if "refused" in step else "CRASHED"


def page(out: Path) -> None:
    """Write the committed result and the page of the docs."""
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    versions = {name: importlib.metadata.version(name) for name in ("torch", "torchvision", "timm", "transformers")}
    RESULT.write_text(json.dumps({"versions": versions, "networks": rows}, indent=1) + "\n")
    PAGE.write_text("\n".join(_page(rows, versions)) + "\n")


def _page(rows: list[dict[str, Any]], versions: dict[str, str]) -> list[str]:
    finished = [row for row in rows if "failed" not in row]
    yes = ", ".join(f"{step} {sum(_mark(row[step]) == 'yes' for row in finished)}" for step in STEPS)
    wrong = sum(len(row["layers"].get("wrong_axes", ())) for row in finished)
    crashed = sum(_mark(row[step]) == "CRASHED" for row in finished for step in STEPS)
    same = f"{sum(row['same'] for row in finished)} of {len(finished)}"
    refused: dict[tuple[str, str], list[str]] = {}
    for row, step in itertools.product(finished, STEPS):
        if why := row[step].get("refused"):
            refused.setdefault((row["name"], why), []).append(step)
    said = [f"- `{name}`, {', '.join(steps)}: {why}" for (name, why), steps in refused.items()]
    said += [f"- `{row['name']}`: {row['failed']}" for row in rows if "failed" in row]
    return [
        "# Networks that were tried",
        "",
        "Written by `papers/studies/network_sweep.py` from `network_sweep.json` beside it; random weights, seed 0,",
        f"{', '.join(f'{name} {version}' for name, version in versions.items())}.",
        "",
        f"{len(rows)} architectures; yes: {yes}. Tracebacks: {crashed}. Layers with the wrong axes: {wrong}.",
        f"Handed back bit for bit: {same}. Not finished: {len(rows) - len(finished)}.",
        "",
        "`fit` is yes where the explainer's decoder with p = 0 gives the network's own scores (difference below",
        f"{CLOSE} of the largest score). Layers are those that an explainer can be fitted to, of all.",
        "",
        "| network | px | layers | default tap | layout | guided | select | explain | inspect | fit |",
        "|---|---|---|---|---|---|---|---|---|---|",
        *map(_row, rows),
        "",
        "## What was refused, and why",
        "",
        *(said or ["Nothing."]),
    ]


def _row(row: dict[str, Any]) -> str:
    if "failed" in row:
        return f"| {row['name']} | | | | | not finished | | | | |"
    found = row["layers"]
    layers = f"{found.get('tapped', 0)} of {found.get('count', 0)}"
    marks = [_mark(row[step]) for step in STEPS[1:]]
    cells = [row["name"], row["px"], layers, found.get("tap") or "none", found.get("layout") or "", *marks]
    return f"| {' | '.join(map(str, cells))} |"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "one", "page"))
    parser.add_argument("of", help="the file of lines, or the network's name")
    parser.add_argument("names", nargs="*", help="networks to run; by default all")
    given = parser.parse_args()
    if given.what == "one":
        print(json.dumps(one(given.of)))
    elif given.what == "run":
        run(Path(given.of), given.names or NAMES)
    else:
        page(Path(given.of))
