"""Grad-CAM of the explainer's part filters and, for comparison, of the performer's own, for the same class.

For maps ``A_k`` and the class score ``s`` (before the softmax), Grad-CAM is ``max(Σ_k w_k A_k, 0)`` with ``w_k`` the
mean of ``∂s/∂A_k`` over cells, enlarged bilinearly to the input. For the performer, ``A`` are the maps of a layer. For
the explainer, ``A`` are the masked maps of conv-interp-2, and the score is what the performer's last layers say of the
reconstruction; the ordinary track runs along as it is.

Source: Selvaraju et al., ICCV 2017, equations 1 and 2; of both networks: ICLR 2020 submission, Fig. 5 and App. D.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from partlens.attribution.receptive_pictures import pixels_of_half
from partlens.errors import InputError, LayerError, expected
from partlens.explainer.network import Explainer
from partlens.network.borrowed import borrowed, like_weights
from partlens.network.layout import Layout
from partlens.network.outputs import class_scores
from partlens.network.performer import Performer, module_of
from partlens.network.taps import read_taps, tap_layouts

_BATCH = 32  # images at a time


def grad_cam(
    maps: Float[Tensor, "image filter row col"],
    gradients: Float[Tensor, "image filter row col"],
    size_px: tuple[int, int],
) -> Float[Tensor, "image height width"]:
    """Join maps by the means of their gradients: ``max(Σ_k mean(G_k) A_k, 0)``, enlarged bilinearly.

    Cell middles stay on their places; borders are repeated. The unit is that of the score.

    Example:
        >>> maps = torch.tensor([[[[1.0, 0.0], [0.0, 0.0]]]])
        >>> grad_cam(maps, torch.full_like(maps, 2.0), (2, 2))[0].tolist()
        [[2.0, 0.0], [0.0, 0.0]]
    """
    weights = gradients.mean((2, 3), keepdim=True)
    joined = (weights * maps).sum(1, keepdim=True).clamp(min=0)
    return F.interpolate(joined, size=size_px, mode="bilinear", align_corners=False)[:, 0]


def _picked(scores: Tensor, classes: Tensor) -> Tensor:
    """Return the sum of each image's class score; images do not mix, so its gradient is that of each image's own."""
    if int(classes.min()) < 0 or int(classes.max()) >= scores.shape[1]:
        rule = f"classes from 0 to {scores.shape[1] - 1}"
        raise InputError(expected(rule, f"{classes.tolist()}", "Name existing classes"))
    return scores.gather(1, classes.to(scores.device)[:, None]).sum()


def _check(images: int, classes: Tensor) -> None:
    if not images or len(classes) != images:
        raise InputError(
            expected("one class for each of at least 1 image", f"{images} images, {len(classes)} classes", "Give both")
        )


def track_grad_cam(
    explainer: Explainer,
    head: nn.Module,
    tap_maps: Float[Tensor, "image filter row col"],
    classes: Int[Tensor, " image"],
    *,
    size_px: tuple[int, int],
) -> Float[Tensor, "image height width"]:
    """Return Grad-CAM of the interpretable track; zeros where no part filter raises the class score.

    ``head`` are the performer's layers after the last target, ``classes`` the output to explain of each image. The
    explainer and the head are borrowed: modes, weights and gradients stay as they are.
    """
    _check(len(tap_maps), classes)
    pieces = []
    with torch.inference_mode(mode=False), borrowed(explainer, copy_weights=False), borrowed(head, copy_weights=False):
        for part, of in zip(tap_maps.split(_BATCH), classes.split(_BATCH), strict=True):
            with torch.no_grad():
                tracks = explainer.normed_tracks(part)
                masked = explainer.masked(tracks.interp2)
                ordinary = (1 - explainer.p) * tracks.ordinary
            with torch.enable_grad():
                leaf = masked.detach().clone().requires_grad_()
                encoded = explainer.p.detach() * explainer.norm_interp(explainer.pool(leaf)) + ordinary
                output = head(explainer.decode(encoded, tracks.passing)[-1])
                score = _picked(class_scores(output, len(part)), of)
                (gradient,) = torch.autograd.grad(score, leaf)
            pieces.append(grad_cam(masked.detach().cpu(), gradient.cpu(), size_px))
    return torch.cat(pieces)


def layer_grad_cam(
    performer: Performer | nn.Module,
    batch: Float[Tensor, "image channel row col"],
    layer: str,
    classes: Int[Tensor, " image"],
) -> Float[Tensor, "image height width"]:
    """Return Grad-CAM of any layer (a tap) of the performer, which is borrowed.

    Raises:
        LayerError: an unknown layer, one without maps or without influence on the scores, or one whose maps a later
            operation overwrites.
        InputError: a class that does not exist, no image.
    """
    _check(len(batch), classes)
    module = module_of(performer)
    size_px = (int(batch.shape[2]), int(batch.shape[3]))
    layouts = tap_layouts(performer, like_weights(module, batch), [layer])
    pieces, at_once = [], 1 if layouts[layer].loop else _BATCH
    with torch.inference_mode(mode=False), borrowed(module, copy_weights=False) as network:
        for child in network.modules():
            if getattr(child, "inplace", False):
                child.inplace = False  # type: ignore[assignment]  # borrowed puts it back
        for part, of in zip(batch.split(at_once), classes.split(at_once), strict=True):
            images = like_weights(network, part.detach().clone())
            maps, gradient = _maps_and_gradient(network, images, layer, of, layouts)
            pieces.append(grad_cam(maps.detach().float().cpu(), gradient.float().cpu(), size_px))
    return torch.cat(pieces)


def _maps_and_gradient(
    network: nn.Module, images: Tensor, layer: str, classes: Tensor, layouts: Mapping[str, Layout]
) -> tuple[Tensor, Tensor]:
    """Return a layer's maps and the gradient of the class scores with regard to them."""
    written: list[int] = []

    def keep(value: Tensor) -> Tensor:
        """Keep the tensor itself, which the gradient is asked for, and count how often it was written to."""
        written.append(value._version)  # noqa: SLF001
        return value

    with torch.enable_grad(), read_taps(network, [layer], reduce=keep) as taps:
        # An input that wants a gradient has everything recorded, also where all weights are frozen; a copy of it,
        # because a network may write into its input.
        output = network(images.requires_grad_().clone())
        maps = taps[layer]
        layout = layouts.get(layer, Layout("maps"))
        if layout.to_maps(maps).ndim != 4:
            shape = f"shape {tuple(maps.shape)}"
            raise LayerError(expected(f"maps at {layer}", shape, "Choose a layer that has maps"))
        if maps._version != written[-1]:  # noqa: SLF001
            rule, got = f"maps at {layer} that stay as they were", "a network that overwrites them"
            remedy = "Choose the layer after, or replace x += y by x = x + y in the network's forward"
            raise LayerError(expected(rule, got, remedy))
        score = _picked(class_scores(output, len(images)), classes)
        connected = maps.requires_grad and score.requires_grad
        gradient = torch.autograd.grad(score, [maps], allow_unused=True)[0] if connected else None
    if gradient is None:
        rule = f"scores that depend on {layer}"
        raise LayerError(expected(rule, "a layer with no way to them", "Choose another layer"))
    return layout.to_maps(maps), layout.to_maps(gradient)


def concentration_frac(maps: Float[Tensor, "image row col"]) -> Float[Tensor, " image"]:
    """Return the smallest share of a map's pixels that holds half of its sum; lower is more concentrated.

    From ``1 / (row · col)`` (one pixel holds it) to a half (a flat map); ``nan`` for a map of zeros.

    Example:
        >>> maps = torch.zeros(3, 2, 2)
        >>> maps[0, 0, 0], maps[1] = 1.0, 1.0
        >>> concentration_frac(maps).tolist()
        [0.25, 0.5, nan]
    """
    if maps.numel() and float(maps.min()) < 0:
        raise InputError(expected("maps without negative values", float(maps.min()), "Clamp them at 0 first"))
    return (pixels_of_half(maps) / maps[0].numel()).float()


def random_grad_cam(
    images: int, side_cells: Sequence[int], size_px: tuple[int, int], generator: torch.Generator
) -> Float[Tensor, "image height width"]:
    """Return the null: cells drawn evenly from 0 … 1, enlarged as `grad_cam` enlarges.

    The grid is the layer's, since a coarse one is less concentrated by itself.
    """
    drawn = torch.rand(images, 1, *side_cells, generator=generator)
    return F.interpolate(drawn, size=size_px, mode="bilinear", align_corners=False)[:, 0]
