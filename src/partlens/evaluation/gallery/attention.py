"""Grad-CAM of both networks: where the class score of each photo comes from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from partlens.attribution.backprop import class_scores
from partlens.attribution.grad_cam import concentration_frac, layer_grad_cam, random_grad_cam, track_grad_cam
from partlens.attribution.pictures import overlay
from partlens.estimate import Estimate, bootstrap
from partlens.evaluation.gallery.common import BATCH, PHOTOS, Effort, Frames, JoinedMaps, save_photo, small
from partlens.network.taps import forward_taps


def attention(
    folder: Path,
    joined: JoinedMaps,
    head: nn.Module,
    frames: Frames,
    photos_of: Int[Tensor, " image"],
    top: str,
    effort: Effort,
    generator: torch.Generator,
    advance: Callable[[int], None],
) -> dict[str, Any]:
    """Draw Grad-CAM of both networks for the class that the performer gives each photo, and count how concentrated."""
    performer, tap = frames.performer, joined.tap
    size = performer.preprocessing.size_px
    layers = {"interpretable": tap, "tap": tap, "top": top}
    chosen = list(range(min(effort.attention, len(frames.rows))))
    maps: dict[str, list[Tensor]] = {name: [] for name in layers}
    classes: list[Tensor] = []
    denied: list[bool] = []
    sides: dict[str, tuple[int, int]] = {}
    for start in range(0, len(chosen), BATCH):
        part = chosen[start : start + BATCH]
        batch = frames.batch(part)
        output, taps = forward_taps(performer, batch, list(dict.fromkeys([tap, top])))
        scores = class_scores(output).cpu()
        of = scores.argmax(1)
        classes.append(of)
        denied += [scores.shape[1] == 1 and float(score) <= 0 for score in scores[:, 0]]
        sides |= {name: (int(taps[at].shape[2]), int(taps[at].shape[3])) for name, at in layers.items()}
        maps["interpretable"].append(track_grad_cam(joined.explainer, head, taps[tap].cpu(), of, size_px=size))
        maps["tap"].append(layer_grad_cam(performer, batch, tap, of))
        maps["top"].append(maps["tap"][-1] if top == tap else layer_grad_cam(performer, batch, top, of))
        advance(len(part))
    joined_maps = {name: torch.cat(pieces) for name, pieces in maps.items()}
    names = performer.class_names
    photos = []
    for position, index in enumerate(chosen[:PHOTOS]):
        frame = small(frames.picture(index))
        files = {}
        for name, heat in joined_maps.items():
            path = f"gallery/attention-{name}-{index}.jpg"
            peak = float(heat[position].max())
            save_photo(folder.parent / path, overlay(frame, (heat[position] / (peak or 1.0)).numpy()))
            files[name] = path
        number = int(torch.cat(classes)[position])
        photos.append(
            {
                "key": frames.images.keys[frames.rows[index]],
                "class": names[number] if names else str(number),
                # A single output has one class to draw, whatever the answer was.
                "denied": denied[position],
                "file": f"gallery/photo-{index}.jpg",
                "maps": files,
            }
        )
        save_photo(folder / f"photo-{index}.jpg", frame)

    def shares(of: Tensor, photos: Tensor) -> dict[str, Any]:
        """Mean over photos of how concentrated the maps are; photos whose map is all zeros are counted apart."""
        values = concentration_frac(of).double()
        defined = values[~values.isnan()]
        if not len(defined):
            return {**Estimate.undefined().to_dict(), "empty": len(values)}
        found = bootstrap(
            lambda i: float(defined[i].mean()),
            len(defined),
            generator=generator,
            rounds=300,
            groups=photos[~values.isnan()],
        )
        return {**found.to_dict(), "empty": len(values) - len(defined)}

    return {
        "layers": {"interpretable": f"conv-interp-2 at {tap}", "tap": tap, "top": top},
        "size_px": [size[1], size[0]],
        "photos": photos,
        "concentration_frac": {name: shares(of, photos_of[: len(chosen)]) for name, of in joined_maps.items()},
        "random_frac": {
            name: shares(random_grad_cam(len(chosen), side, size, generator), torch.arange(len(chosen)))
            for name, side in sides.items()
        },
    }
