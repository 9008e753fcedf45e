"""Grad-CAM of both networks: where the class score of each photo comes from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from partlens.attribution.grad_cam import concentration_frac, layer_grad_cam, random_grad_cam, track_grad_cam
from partlens.attribution.pictures import overlay, save_picture
from partlens.estimate import Estimate, bootstrap
from partlens.evaluation.frames import BATCH, PHOTOS, Frames, GalleryPlan, JoinedMaps, small
from partlens.evaluation.places import photo_numbers, top_layer
from partlens.evaluation.results import Attention, AttentionPhoto
from partlens.explainer.network import performer_head
from partlens.network.stream import stream


def attention(
    folder: Path,
    joined: JoinedMaps,
    frames: Frames,
    plan: GalleryPlan,
    generator: torch.Generator,
    advance: Callable[[int], None],
) -> Attention:
    """Draw Grad-CAM of both networks for the class that the performer gives each photo, and count how concentrated."""
    performer, tap, top = frames.performer, joined.tap, top_layer(frames.performer)
    size = performer.preprocessing.size_px
    layers = {"interpretable": tap, "tap": tap, "top": top}
    rows = frames.rows[: plan.attention]
    outputs, maps, sides = _streamed(joined, frames, rows, layers, advance)
    numbers, every = photo_numbers(frames.images, rows), torch.arange(len(rows))
    # One generator serves all: the maps' bootstraps come first, then random maps and theirs.
    shares = {name: _share(of, numbers, generator) for name, of in maps.items()}
    drawn = ((name, random_grad_cam(len(rows), side, size, generator)) for name, side in sides.items())
    nulls = {name: _share(of, every, generator) for name, of in drawn}
    return Attention(
        layers={"interpretable": f"conv-interp-2 at {tap}", "tap": tap, "top": top},
        size_px=(size[1], size[0]),
        photos=tuple(_photo(folder, frames, i, outputs[i], maps) for i in range(min(PHOTOS, len(rows)))),
        concentration_frac={name: share for name, (share, _) in shares.items()},
        random_frac={name: share for name, (share, _) in nulls.items()},
        empty={name: empty for name, (_, empty) in shares.items()},
    )


def _streamed(
    joined: JoinedMaps,
    frames: Frames,
    rows: Sequence[int],
    layers: Mapping[str, str],
    advance: Callable[[int], None],
) -> tuple[Tensor, dict[str, Tensor], dict[str, tuple[int, int]]]:
    """Return class scores of photos, and Grad-CAM and the side in cells of each layer."""
    performer, tap, top = frames.performer, layers["tap"], layers["top"]
    size, head = performer.preprocessing.size_px, performer_head(performer, joined.explainer.structure)
    pieces: dict[str, list[Tensor]] = {name: [] for name in layers}
    sides: dict[str, tuple[int, int]] = {}
    outputs = []
    read = joined.explainer.structure.read
    names = list(dict.fromkeys([read, *layers.values()]))
    for batch in stream(performer, frames.images, rows, names, batch_size=BATCH):
        outputs.append(performer.outputs.scores(batch.outputs, len(batch.rows)).cpu())
        of = outputs[-1].argmax(1)
        sides |= {name: (int(batch.maps[at].shape[2]), int(batch.maps[at].shape[3])) for name, at in layers.items()}
        heat = track_grad_cam(joined.explainer, head, batch.maps[read], of, size_px=size)
        pieces["interpretable"].append(heat)
        pieces["tap"].append(layer_grad_cam(performer, batch.inputs, tap, of))
        pieces["top"].append(pieces["tap"][-1] if top == tap else layer_grad_cam(performer, batch.inputs, top, of))
        advance(len(batch.rows))
    return torch.cat(outputs), {name: torch.cat(of) for name, of in pieces.items()}, sides


def _photo(folder: Path, frames: Frames, index: int, scores: Tensor, maps: Mapping[str, Tensor]) -> AttentionPhoto:
    frame, files = small(frames.picture(index)), {}
    for name, heat in maps.items():
        drawn = overlay(frame, (heat[index] / (float(heat[index].max()) or 1.0)).numpy())
        files[name] = save_picture(folder / f"attention-{name}-{index}.jpg", drawn)
    # There is one class to draw, whatever the answer was.
    denied = " (answer: no)" if len(scores) == 1 and float(scores[0]) <= 0 else ""
    return AttentionPhoto(
        key=frames.key(index),
        label=f"{frames.performer.output_name(int(scores.argmax()))}{denied}",
        file=save_picture(folder / f"photo-{index}.jpg", frame),
        maps=files,
    )


def _share(maps: Tensor, photos: Tensor, generator: torch.Generator) -> tuple[Estimate, int]:
    """Return how concentrated maps are, mean over photos, and how many are all zeros, which are counted apart."""
    values = concentration_frac(maps).double()
    known = ~values.isnan()
    defined, empty = values[known], int((~known).sum())
    if not len(defined):
        return Estimate.undefined(), empty
    found = bootstrap(
        lambda i: float(defined[i].mean()), len(defined), generator=generator, rounds=300, groups=photos[known]
    )
    return found, empty
