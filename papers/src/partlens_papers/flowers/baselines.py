"""Heat maps by other methods, all of one form, for comparison with ours in every table.

A method takes a performer, a preprocessed batch and the class of each image, and returns one map per image from 0 to 1
at the input's resolution. None sees the regions it is measured on. A map without any positive value is all zeros.

Grad-CAM and Grad-CAM++ come from the package grad-cam (extra ``baselines``), so that nobody has to trust our version of
somebody else's method. The lighter torchcam was tried: its Grad-CAM++ (0.5.0) divides a copy, so that its weights lack
the denominator.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from partlens.attribution.backprop import guided_backprop, heat_map
from partlens.errors import InputError, LayerError, expected
from partlens.network.borrowed import borrowed
from partlens.network.performer import Performer, module_of
from partlens.network.taps import forward_taps

Method = Callable[[Performer, Tensor, Tensor], Tensor]
Cam = Literal["grad-cam", "grad-cam++"]
Feature = tuple[str, int]

BATCH = 64


def _stretched(maps: Tensor) -> Tensor:
    """Stretch each map to 0 … 1; a map of one value becomes zeros."""
    low = maps.amin(dim=(-2, -1), keepdim=True)
    span = maps.amax(dim=(-2, -1), keepdim=True) - low
    return ((maps - low) / span.where(span > 0, 1)).clamp(0, 1)


def _enlarged(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Enlarge maps ``[image, row, col]`` to the input, cell middles on their places, and stretch them to 0 … 1.

    They are stretched before, too: enlarging a map of one value leaves rounding errors that must not become a picture.
    """
    larger = F.interpolate(_stretched(maps)[:, None], size=tuple(size), mode="bilinear", align_corners=False)
    return _stretched(larger[:, 0])


def _in_chunks(work: Callable[[Tensor, Tensor], Tensor], images: Tensor, classes: Tensor, batch_size: int) -> Tensor:
    if batch_size < 1:
        raise InputError(expected("a batch_size of at least 1", batch_size, f"Leave it out for {BATCH}"))
    if tuple(classes.shape) != (len(images),) or not len(images):
        raise InputError(
            expected(
                f"one class for each of {len(images)} images, at least 1",
                f"shape {tuple(classes.shape)}",
                "Give a class per image",
            )
        )
    return torch.cat([work(*part) for part in zip(images.split(batch_size), classes.split(batch_size), strict=True)])


def last_maps(performer: Performer) -> str:
    """Name the layer whose maps the activation methods use: the last with more than one cell that is no pooling.

    Args:
        performer: the network.

    Raises:
        LayerError: no layer has maps of more than one cell.
    """
    spatial = [layer for layer in performer.layers if layer.has_places]
    if not spatial:
        raise LayerError(expected("a layer with maps of more than one cell", "none", "Name a layer of another network"))
    unpooled = [layer.name for layer in spatial if "pool" not in layer.kind.lower()]
    return unpooled[-1] if unpooled else spatial[-1].name


def upsampled_activation(
    performer: Performer,
    images: Float[Tensor, "image channel row col"],
    classes: Int[Tensor, " image"],
    *,
    layer: str | None = None,
    chosen: Mapping[int, Sequence[Feature]] | None = None,
    batch_size: int = BATCH,
) -> Float[Tensor, "image row col"]:
    """Enlarge activation maps to the image, with no backward pass.

    With ``chosen``, the relevant features of each class: each feature's map is enlarged bilinearly and stretched to
    0 … 1, and the highest value at each pixel counts, as where our maps are joined. So it differs from our
    explanation in one thing only, how a feature reaches the image. Without, the mean over all filters of the last
    maps, which knows nothing of the class.

    Args:
        performer: the network; borrowed.
        images: preprocessed.
        classes: the class to explain of each image.
        layer: whose maps to average; :func:`last_maps` when ``None``. Not used with ``chosen``.
        chosen: for each class its features as (layer, filter).
        batch_size: images at a time.

    Returns:
        Maps from 0 to 1.

    Raises:
        LayerError: an unknown layer.
        InputError: a class without an entry in ``chosen``, a filter that does not exist.

    Source:
        Oramas et al., ICLR 2019, name this baseline "upsampled activations"; of which layers or features is not known,
        hence both readings.
    """
    if chosen is None:
        tap = layer or last_maps(performer)

        def work(part: Tensor, _: Tensor) -> Tensor:
            maps = forward_taps(performer, part, [tap])[1][tap]
            return _enlarged(maps.mean(1), part.shape[-2:])

        return _in_chunks(work, images, classes, batch_size)

    missing = sorted(set(classes.tolist()) - {c for c, features in chosen.items() if len(features)})
    if missing:
        raise InputError(expected("features of every class to explain", f"none of class {missing[0]}", "Choose some"))

    def of_features(part: Tensor, of: Tensor) -> Tensor:
        wanted = [chosen[c] for c in of.tolist()]
        taps = forward_taps(performer, part, list(dict.fromkeys(name for each in wanted for name, _ in each)))[1]
        ranks = max(map(len, wanted))
        joined = torch.zeros(len(part), ranks, *part.shape[-2:], device=next(iter(taps.values())).device)
        for name, maps in taps.items():
            spots = [
                (image, rank, k)
                for image, each in enumerate(wanted)
                for rank, (tap, k) in enumerate(each)
                if tap == name
            ]
            if any(not 0 <= k < maps.shape[1] for _, _, k in spots):
                raise InputError(
                    expected(f"filters of {name} from 0 to {maps.shape[1] - 1}", "others", "Name existing filters")
                )
            image, rank, k = (torch.tensor(column) for column in zip(*spots, strict=True))
            picked = maps[image, k] if maps.ndim == 4 else maps[image, k, None, None]
            joined[image, rank] = _enlarged(picked, part.shape[-2:])
        return joined.amax(dim=-3)  # the highest value at each pixel, as the authors combine maps

    return _in_chunks(of_features, images, classes, batch_size)


def guided_map(
    performer: Performer,
    images: Float[Tensor, "image channel row col"],
    classes: Int[Tensor, " image"],
    *,
    fix_strides: bool = False,
    batch_size: int = BATCH,
) -> Float[Tensor, "image row col"]:
    """Send the class score back to the image by guided backpropagation, lattice of the strides and all.

    This is the table's "Deconv+GB": deconvnet's rule and backpropagation's at every ReLU together are guided
    backpropagation. It starts at the score of the class before the softmax.

    Args:
        performer: the network; borrowed.
        images: preprocessed.
        classes: the class to explain of each image.
        fix_strides: resample the signal at strided convolutions, which the baseline does not.
        batch_size: images at a time.

    Returns:
        Maps from 0 to 1 (:func:`partlens.attribution.backprop.heat_map`).

    Source:
        Springenberg et al., arXiv 1412.6806; the baseline of Oramas et al., ICLR 2019 (its start is not known).
    """

    def work(part: Tensor, of: Tensor) -> Tensor:
        signal = guided_backprop(performer, part, of, rule="guided", fix_strides=fix_strides)
        return heat_map(signal).float()

    return _in_chunks(work, images, classes, batch_size)


def cam(
    performer: Performer,
    images: Float[Tensor, "image channel row col"],
    classes: Int[Tensor, " image"],
    *,
    kind: Cam = "grad-cam",
    layer: str | None = None,
    batch_size: int = BATCH,
) -> Float[Tensor, "image row col"]:
    r"""Weight the maps of a layer by the gradient of the class score, by the package grad-cam.

    With maps ``A_k`` and gradients ``G_k`` of the class score (before the softmax), the map is
    ``max(Σ_k w_k A_k, 0)``, enlarged bilinearly and stretched to 0 … 1. Grad-CAM has ``w_k`` the mean of ``G_k`` over
    cells; Grad-CAM++ has ``w_k = Σ max(G_k, 0) · G_k² / (2 G_k² + G_k³ ΣA_k + 1e-6)``. The package's ``1e-6`` makes
    the second depend on the scale of the scores where gradients are below about ``1e-3``.

    Args:
        performer: the network; borrowed.
        images: preprocessed.
        classes: the class to explain of each image.
        kind: ``"grad-cam"`` or ``"grad-cam++"``.
        layer: a module of the network; :func:`last_maps` when ``None``.
        batch_size: images at a time.

    Returns:
        Maps from 0 to 1.

    Raises:
        LayerError: the layer is not a module of the network.

    Source:
        Selvaraju et al., ICCV 2017; Chattopadhyay et al., WACV 2018, equation 19.
    """
    if kind not in ("grad-cam", "grad-cam++"):
        raise InputError(expected("kind grad-cam or grad-cam++", f"{kind!r}", "Choose one of them"))
    extractor = _cam_library(kind)
    name = layer or last_maps(performer)

    def work(part: Tensor, of: Tensor) -> Tensor:
        with borrowed(module_of(performer), copy_weights=False) as network:
            try:
                module = network.get_submodule(name)
            except AttributeError as error:
                raise LayerError(
                    expected("a module of the network", name, "Name one of network.named_modules()")
                ) from error
            for parameter in network.parameters():
                parameter.requires_grad = False  # half the work; borrowed puts it back
            reference = next(network.parameters())
            leaf = part.detach().to(reference).requires_grad_()
            targets = [partial(_score, index=index) for index in of.tolist()]
            with torch.inference_mode(mode=False), torch.enable_grad():
                library = extractor(network, [module])
                try:
                    found = library(leaf, targets)
                finally:
                    library.activations_and_grads.release()
        return _stretched(torch.from_numpy(found).float())

    return _in_chunks(work, images, classes, batch_size)


def _score(output: Tensor, *, index: int) -> Tensor:
    return output[index]


def _cam_library(kind: Cam) -> Any:
    from pytorch_grad_cam import GradCAM, GradCAMPlusPlus

    return GradCAM if kind == "grad-cam" else GradCAMPlusPlus


def guided_cam(
    performer: Performer,
    images: Float[Tensor, "image channel row col"],
    classes: Int[Tensor, " image"],
    *,
    kind: Cam = "grad-cam",
    batch_size: int = BATCH,
) -> Float[Tensor, "image row col"]:
    """Multiply :func:`guided_map` and :func:`cam`, pixel by pixel, and stretch the product to 0 … 1.

    Args:
        performer: the network; borrowed.
        images: preprocessed.
        classes: the class to explain of each image.
        kind: which CAM.
        batch_size: images at a time.

    Returns:
        Maps from 0 to 1.

    Source:
        Selvaraju et al., ICCV 2017, section 3.2 (there the signal on the three colours is multiplied; its heat map is
        the same, since the CAM is one factor per pixel).
    """
    guided = guided_map(performer, images, classes, batch_size=batch_size).cpu()
    factor = cam(performer, images, classes, kind=kind, batch_size=batch_size).cpu()
    return _stretched(guided * factor)


BASELINES: dict[str, Method] = {
    "upsampled activation": upsampled_activation,
    "deconvnet + guided backprop": guided_map,
    "grad-cam": cast("Method", partial(cam, kind="grad-cam")),
    "guided grad-cam": cast("Method", partial(guided_cam, kind="grad-cam")),
    "grad-cam++": cast("Method", partial(cam, kind="grad-cam++")),
    "guided grad-cam++": cast("Method", partial(guided_cam, kind="grad-cam++")),
}
