"""Grad-CAM of both networks: where the class score of each photo comes from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from partlens.attribution.grad_cam import concentration_frac, layer_grad_cam, random_grad_cam, track_grad_cam
from partlens.attribution.pictures import overlay
from partlens.estimate import Estimate, bootstrap
from partlens.evaluation.frames import BATCH, PHOTOS, Frames, GalleryPlan, JoinedMaps, save_photo, small
from partlens.evaluation.places import photo_numbers, top_layer
from partlens.evaluation.results import Attention, AttentionPhoto
from partlens.explainer.network import performer_head
from partlens.network.taps import class_scores, forward_taps


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
    head = performer_head(performer, joined.explainer.structure)
    layers = {"interpretable": tap, "tap": tap, "top": top}
    chosen = list(range(min(plan.attention, len(frames.rows))))
    pieces: dict[str, list[Tensor]] = {name: [] for name in layers}
    classes: list[int] = []
    denied: list[bool] = []
    sides: dict[str, tuple[int, int]] = {}
    for start in range(0, len(chosen), BATCH):
        part = chosen[start : start + BATCH]
        batch = frames.batch(part)
        output, taps = forward_taps(performer, batch, list(dict.fromkeys([tap, top])))
        scores = class_scores(output).cpu()
        of = scores.argmax(1)
        classes += of.tolist()
        denied += [scores.shape[1] == 1 and float(score) <= 0 for score in scores[:, 0]]
        sides |= {name: (int(taps[at].shape[2]), int(taps[at].shape[3])) for name, at in layers.items()}
        pieces["interpretable"].append(track_grad_cam(joined.explainer, head, taps[tap].cpu(), of, size_px=size))
        pieces["tap"].append(layer_grad_cam(performer, batch, tap, of))
        pieces["top"].append(pieces["tap"][-1] if top == tap else layer_grad_cam(performer, batch, top, of))
        advance(len(part))
    maps = {name: torch.cat(of) for name, of in pieces.items()}
    names = performer.class_names
    photos = []
    for index in chosen[:PHOTOS]:
        frame = small(frames.picture(index))
        files = {}
        for name, heat in maps.items():
            drawn = overlay(frame, (heat[index] / (float(heat[index].max()) or 1.0)).numpy())
            files[name] = save_photo(folder / f"attention-{name}-{index}.jpg", drawn)
        photos.append(
            AttentionPhoto(
                key=frames.key(index),
                label=names[classes[index]] if names else str(classes[index]),
                denied=denied[index],  # a single output has one class to draw, whatever the answer was
                file=save_photo(folder / f"photo-{index}.jpg", frame),
                maps=files,
            )
        )
    numbers = photo_numbers(frames.images, [frames.rows[i] for i in chosen])
    shares = {name: _share(of, numbers, generator) for name, of in maps.items()}
    every = torch.arange(len(chosen))
    nulls = {
        n: _share(random_grad_cam(len(chosen), side, size, generator), every, generator) for n, side in sides.items()
    }
    return Attention(
        layers={"interpretable": f"conv-interp-2 at {tap}", "tap": tap, "top": top},
        size_px=(size[1], size[0]),
        photos=tuple(photos),
        concentration_frac={name: share for name, (share, _) in shares.items()},
        random_frac={name: share for name, (share, _) in nulls.items()},
        empty={name: empty for name, (_, empty) in shares.items()},
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
