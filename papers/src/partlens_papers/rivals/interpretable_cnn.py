"""The interpretable CNN: the published way to part filters that trains the network itself.

    tap ─▶ top convolution ─▶ ReLU ─▶ mask ─▶ inserted 3x3 convolution ─▶ ReLU ─▶ mask ─▶ pool ─▶ fully connected
                                └── filter loss                             └── filter loss       logistic loss ──┘

A baseline for the explainer, which leaves its performer alone: this one changes the network, so it works on copies of
the performer's layers. The layers below the tap stay as they are, so that their maps can be computed once; the
published networks were trained whole. The layers after it are the performer's own copies, or new ones.

Where the tap is followed by one convolution and then by fully connected layers only (AlexNet, VGG), that convolution is
the top one and is trained, too. Otherwise (residual networks) the convolution is inserted at the tap: the block's maps,
which are fixed here, replace the top convolution's, unmasked, because nothing could teach their filters to be parts.

Source: Zhang, Wu & Zhu, CVPR 2018; the authors' released MATLAB code, which differs
(:mod:`partlens_papers.rivals.masks`);
ICLR 2020 submission, App. A, for residual networks.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from partlens.errors import InputError, LayerError, expected
from partlens.explainer.network import identity_kernel
from partlens.explainer.record import ExplainerStructure
from partlens.network.borrowed import random_state_kept
from partlens.network.performer import Performer
from partlens.network.upper import Upper
from partlens_papers.rivals.interpretable_config import InterpretableConfig
from partlens_papers.rivals.masks import FilterCategories, PublishedMask, ReleasedMask

_AT_ONCE = 128
_MANY_CATEGORIES = 10


@dataclass(frozen=True)
class TrainingPass:
    """What one pass over a training batch yields.

    Attributes:
        outputs: one logit per category.
        penalty: what is added to the loss; 0 for the released method, whose terms enter the backward pass.
        terms: for the log: ``kept_LAYER``, the share of activation that the mask leaves, and ``filter_LAYER``, the
            penalty of the published method.
        watched: the maps that each layer's categories are followed by.
    """

    outputs: Tensor
    penalty: Tensor
    terms: dict[str, Tensor]
    watched: dict[str, Tensor]


class InterpretableCNN(nn.Module):
    """The layers of an interpretable CNN from the tap on; see the module.

    Args:
        side_cells: rows and columns of the tap's maps.
        config: the method and the new layers.
        categories: number of outputs: 1 for one category against the rest, else one per category.
        channels: filters of the inserted convolution, and of the maps it takes.
        head: takes the pooled maps, returns a tuple with the outputs.
        top: the top convolution; ``None`` where the tap's maps replace its.
        pool: the performer's pooling before the head.
        generator: draws the inserted convolution's weights.
    """

    def __init__(
        self,
        side_cells: tuple[int, int],
        config: InterpretableConfig,
        categories: int,
        channels: int,
        head: nn.Module,
        *,
        top: nn.Conv2d | None = None,
        pool: nn.Module | None = None,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.config = config
        self.top = top
        self.inserted = nn.Conv2d(channels, channels, 3, padding=1)
        self.pool = nn.Identity() if pool is None else pool
        self.head = head
        _draw(self.inserted, config, generator)
        if config.inserted == "identity":
            with torch.no_grad():
                self.inserted.weight.add_(identity_kernel(self.inserted))
        pooled = self.pool(torch.zeros(1, channels, *side_cells)).shape[2:]
        sides = {} if top is None else {"top": side_cells}
        sides["inserted"] = (int(pooled[0]), int(pooled[1])) if self._mask_after_pool else side_cells
        self.masks = nn.ModuleDict({name: self._mask(channels, side) for name, side in sides.items()})
        self.categories = nn.ModuleDict({name: FilterCategories(channels, categories, config.method) for name in sides})

    @property
    def _mask_after_pool(self) -> bool:
        return self.config.method == "released"

    def _mask(self, channels: int, side: tuple[int, int]) -> nn.Module:
        return PublishedMask(side) if self.config.method == "published" else ReleasedMask(channels, side)

    def _through(
        self, tap_maps: Tensor, masked: Callable[[str, Tensor], Tensor]
    ) -> tuple[Float[Tensor, "image filter row col"], Float[Tensor, "image category"]]:
        """Return the inserted layer's maps before the mask, and the outputs."""
        below = tap_maps if self.top is None else masked("top", self.top(tap_maps).relu())
        maps = self.inserted(below).relu()
        pooled = masked("inserted", self.pool(maps)) if self._mask_after_pool else self.pool(masked("inserted", maps))
        return maps, self.head(pooled)[0]

    def forward(self, tap_maps: Float[Tensor, "image filter row col"]) -> Float[Tensor, "image category"]:
        """Return one logit per category."""
        return self._through(tap_maps, lambda name, maps: self.masks[name](maps))[1]

    @torch.no_grad()
    def maps(self, tap_maps: Float[Tensor, "image filter row col"]) -> Float[Tensor, "image unit row col"]:
        """Return the maps of the inserted convolution after its ReLU, before the mask and the pooling.

        These are the maps whose peaks location instability is measured on (the released code takes them before the
        ReLU; the peaks of maps that are above 0 anywhere are the same).
        """
        parts = [self._through(part, lambda name, maps: self.masks[name](maps))[0] for part in tap_maps.split(_AT_ONCE)]
        return torch.cat(parts)

    @torch.no_grad()
    def outputs(self, tap_maps: Float[Tensor, "image filter row col"]) -> Float[Tensor, "image category"]:
        """Return the logits, some images at a time and without gradients; above 0 means the category."""
        return torch.cat([self(part) for part in tap_maps.split(_AT_ONCE)])

    def training_pass(
        self,
        tap_maps: Float[Tensor, "image filter row col"],
        labels: Bool[Tensor, "image category"],
        epoch: int,
        density: Float[Tensor, " category"],
    ) -> TrainingPass:
        """Run a batch with the filter loss attached.

        Args:
            tap_maps: a batch.
            labels: which images show which category.
            epoch: from 1; the filter loss weakens with it.
            density: share of the training images that show each category; the released code weighs by it.
        """
        terms: dict[str, Tensor] = {}
        watched: dict[str, Tensor] = {}
        penalty = tap_maps.new_zeros(())

        def masked(name: str, maps: Tensor) -> Tensor:
            nonlocal penalty
            mask, categories = self.masks[name], self.categories[name]
            assert isinstance(categories, FilterCategories)
            watched[name] = maps.detach()
            positive = categories.positives(labels)
            if isinstance(mask, PublishedMask):
                found: Tensor = mask(maps)
                if self.config.strength:
                    loss = self.config.strength * mask.penalty(maps, positive, epoch).sum()
                    terms[f"filter_{name}"] = loss.detach()
                    penalty = penalty + loss
            else:
                assert isinstance(mask, ReleasedMask)
                weight = released_weights(categories, density)
                found = mask.penalised(
                    maps, positive, epoch, weight=weight, strength=self.config.strength, share=1 / len(maps)
                )
            total = maps.detach().sum()
            terms[f"kept_{name}"] = found.detach().sum() / total.clamp(min=torch.finfo(total.dtype).tiny)
            return found

        _, outputs = self._through(tap_maps, masked)
        return TrainingPass(outputs, penalty, terms, watched)

    def follow(self, watched: dict[str, Tensor], labels: Bool[Tensor, "image category"]) -> None:
        """Let the filters' categories follow a batch, after its step."""
        for name, maps in watched.items():
            categories = self.categories[name]
            assert isinstance(categories, FilterCategories)
            categories.update(maps, labels)


def released_weights(
    categories: FilterCategories, density: Float[Tensor, " category"]
) -> tuple[Float[Tensor, " filter"], Float[Tensor, " filter"]]:
    """Return the released code's ``w_pos`` and ``w_neg`` of every filter.

    1 and 1 for one category and before the filters have categories; then ``0.5 / density`` and ``0.5 / (1 - density)``
    of the filter's category, with a density of one over the number of categories where there are more than ten.
    """
    count = categories.magnitude.shape[1]
    if categories.single:
        ones = torch.ones_like(categories.magnitude[:, 0])
        return ones, ones
    share = torch.full_like(density, 1 / count) if count > _MANY_CATEGORIES else density
    share = share.to(categories.magnitude)[categories.chosen()]
    return 0.5 / share, 0.5 / (1 - share)


def _draw(layer: nn.Conv2d | nn.Linear, config: InterpretableConfig, generator: torch.Generator) -> None:
    """Draw new weights; the bias becomes 0."""
    fan_in = layer.weight[0].numel()
    std = config.weight_std or math.sqrt(2 / fan_in)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator) * std)
        if layer.bias is not None:
            layer.bias.zero_()


def _head(
    performer: Performer, source: str, config: InterpretableConfig, categories: int, generator: torch.Generator
) -> nn.Module:
    """Copy the layers after a layer, with as many outputs as categories."""
    head = performer.upper(source).cpu().float()
    assert isinstance(head, Upper)
    last = [found for found in performer.found if found.place.result]
    name = next((found.name for found in last if isinstance(found.module, nn.Linear)), "")
    layer = head.network.get_submodule(name) if name else None
    if not isinstance(layer, nn.Linear):
        raise LayerError(
            expected(
                f"a network that ends in a fully connected layer after {source}",
                type(last[-1].module).__name__ if last else "an operation without weights",
                "Choose AlexNet, a VGG or a ResNet, or return the logits of the last layer",
            )
        )
    if layer.out_features != categories:
        made = nn.Linear(layer.in_features, categories)
        _draw(made, config, generator)
        parent, _, leaf = name.rpartition(".")
        setattr(head.network.get_submodule(parent), leaf, made)
    if config.head == "new":
        for each in head.modules():
            if isinstance(each, nn.Linear) and isinstance(each.weight, nn.Parameter):  # others are idle
                _draw(each, config, generator)
    if config.dropout is not None:
        for each in head.modules():
            if isinstance(each, nn.Dropout):
                each.p = config.dropout
    return head


def build_interpretable_cnn(
    performer: Performer, structure: ExplainerStructure, config: InterpretableConfig, categories: int
) -> InterpretableCNN:
    """Build an interpretable CNN from copies of a performer's layers.

    Args:
        performer: the network; it stays as it is.
        structure: from :func:`partlens.explainer.network.explainer_structure`, which finds the top convolution and the
            pooling after a tap.
        config: the method and the new layers.
        categories: number of outputs, 1 for one category against the rest.

    Returns:
        The network from the tap on, on the CPU in float32, in eval mode; it takes the tap's maps.

    Raises:
        InputError: no category.
        LayerError: a network that does not end in a fully connected layer.
    """
    if categories < 1:
        raise InputError(expected("at least 1 category", categories, "Name what the outputs mean"))
    generator = torch.Generator().manual_seed(config.seed)
    top: nn.Conv2d | None = None
    pool: nn.Module | None = None
    if structure.replaced is not None:
        convolution = performer.module.get_submodule(structure.replaced)
        assert isinstance(convolution, nn.Conv2d)
        top = copy.deepcopy(convolution).cpu().float().requires_grad_(requires_grad=True)
        after = performer.module.get_submodule(structure.decoder_from)
        pool = copy.deepcopy(after).cpu() if isinstance(after, nn.MaxPool2d) else None
    with random_state_kept():  # torch's own initialisation draws from the global state before ours replaces it
        head = _head(performer, structure.decoder_from, config, categories, generator)
        made = InterpretableCNN(
            structure.side_cells,
            config,
            categories,
            structure.channels_out,
            head,
            top=top,
            pool=pool,
            generator=generator,
        )
    return made.eval()
