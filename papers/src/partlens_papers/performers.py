"""The papers' networks as performers: ``partlens_papers.performers:alexnet_caffe@FILE`` and so on."""

from __future__ import annotations

from pathlib import Path

from partlens.network.performer import Performer, weights_sha256
from partlens.network.preprocessing import Preprocessing
from partlens.network.weights import load_into, read_weights, seed_of, seeded
from partlens.network.zoo import class_names_of, own_weights
from partlens_papers.flowers.network import flower_net
from partlens_papers.networks.paper_networks import PLANS, PaperNet

__all__ = ["alexnet_caffe", "flower_net", "paper_performer", "vgg16", "vgg_f", "vgg_m", "vgg_s"]

_CAFFE_MEAN_BGR = (104.0, 117.0, 123.0)
_HEAD = ("fc6", "fc7", "fc8")


def paper_performer(name: str, weights: str | None) -> Performer:
    """Load one of :data:`~partlens_papers.networks.paper_networks.PLANS` with Caffe's preprocessing.

    Args:
        name: of the network.
        weights: a file, which may lack the fully connected layers, or ``random:SEED``.

    Raises:
        WeightsError: no weights, or weights that do not fit.
    """
    size = PLANS[name].input_px
    preprocessing = Preprocessing(
        size_px=(size, size),
        resize="squash",
        channel_order="BGR",
        scale=1.0,
        mean=_CAFFE_MEAN_BGR,
        std=(1.0, 1.0, 1.0),
    )
    spec = f"{__name__}:{name.replace('-', '_')}"
    weights = own_weights(spec, weights)
    names: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()
    untrained: tuple[str, ...] = ()
    if weights.startswith("random:"):
        seed = seed_of(weights, spec)
        module, notes = seeded(lambda: PaperNet(name), seed), (f"random weights, seed {seed}",)
    else:
        state, metadata = read_weights(Path(weights))
        preprocessing = Preprocessing.from_metadata(metadata) or preprocessing
        outputs = int(state["fc8.bias"].shape[0]) if "fc8.bias" in state else 1000
        hidden = int(state["fc6.bias"].shape[0]) if "fc6.bias" in state else 4096
        side = preprocessing.size_px[0]
        module = seeded(lambda: PaperNet(name, num_classes=outputs, input_px=side, hidden=hidden), 0)
        may_lack = tuple(f"{layer}." for layer in _HEAD) if not any(n.startswith("fc") for n in state) else ()
        if load_into(module, state, Path(weights).name, may_lack):
            untrained = _HEAD
            remedy = "train them (partlens-papers train-performer)"
            notes = (f"fc6, fc7 and fc8 are absent from the file and have random weights; {remedy}",)
        else:
            names = class_names_of(metadata, outputs, Path(weights).name)
    module.eval()
    sha = weights_sha256(module)
    return Performer(module, name, preprocessing, sha, class_names=names, notes=notes, untrained_layers=untrained)


def alexnet_caffe(weights: str | None = None) -> Performer:
    """Return BVLC's AlexNet; see :func:`paper_performer`."""
    return paper_performer("alexnet-caffe", weights)


def vgg_f(weights: str | None = None) -> Performer:
    """Return VGG-F; see :func:`paper_performer`."""
    return paper_performer("vgg-f", weights)


def vgg_m(weights: str | None = None) -> Performer:
    """Return VGG-M; see :func:`paper_performer`."""
    return paper_performer("vgg-m", weights)


def vgg_s(weights: str | None = None) -> Performer:
    """Return VGG-S; see :func:`paper_performer`."""
    return paper_performer("vgg-s", weights)


def vgg16(weights: str) -> Performer:
    """Return VGG-16 with torchvision's names, whose file may lack the fully connected layers.

    Raises:
        WeightsError: weights that do not fit.
    """
    from torchvision.models import vgg16 as build

    state, metadata = read_weights(Path(weights))
    outputs = int(state["classifier.6.bias"].shape[0]) if "classifier.6.bias" in state else 1000
    module = seeded(lambda: build(weights=None, num_classes=outputs, init_weights=False), 0)
    may_lack = () if any(name.startswith("classifier.") for name in state) else ("classifier.",)
    absent = load_into(module, state, Path(weights).name, may_lack)
    untrained = ("classifier.0", "classifier.3", "classifier.6") if absent else ()
    module.eval()
    usual = Preprocessing(resize="squash")
    return Performer(
        module,
        "vgg16",
        usual if absent else Preprocessing.from_metadata(metadata) or usual,  # the papers' convolutions know one input
        weights_sha256(module),
        class_names=None if absent else class_names_of(metadata, outputs, Path(weights).name),
        untrained_layers=untrained,
    )
