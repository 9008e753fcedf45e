"""The explainer network: two tracks, their share p, and a decoder that starts as a copy of the performer.

    x_interp = norm(pool(mask(relu(conv-interp-2(mask(relu(conv-interp-1(x))))))))
    x_ordin  = norm(pool(relu(conv-ordin(x))))
    x_enc    = p * x_interp + (1 - p) * x_ordin,          p = sigmoid(w_p)
    x_dec    = decoder(gain * x_enc)

Where the tap has values below 0 (residual streams, SiLU, GELU), the ordinary track has no ReLU and its norm layer takes
the mean of |x|; else it could not hand on what the performer's layers need. The interpretable track is non-negative by
itself. Tokens without a place, such as a class token, pass by: the decoder gets them as the performer gave them.

Source: ICLR 2020 submission, Sec. 3.1 and Fig. 2. Both tracks are pooled before the norm layers, since their sum must
have the decoder's size and the norm layers make p the ratio of what is summed (the figure is not available; this is
our reading).

The papers give decoders for heads of fully connected layers. Our general rule covers those and every other network:
the decoder is a copy of the performer's layers between the tap and the targets. Where the first of them is a
convolution with its activation and everything after the pooling is fully connected (AlexNet, VGG), the explainer's
convolutions take that convolution's place, as in the papers, and the decoder starts at the first fully connected layer.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from partlens.errors import InputError, LayerError, expected
from partlens.explainer.config import ExplainerConfig
from partlens.explainer.processes import batch_mean, drawn
from partlens.explainer.record import ExplainerStructure
from partlens.explainer.templates import centroid_cells, mask_around, mask_at_peak, peak_cells, peak_masks
from partlens.network.borrowed import hooked, random_state_kept
from partlens.network.outputs import Outputs
from partlens.network.performer import Performer
from partlens.network.taps import forward_taps

_NORM_MOMENTUM = 0.95
_NORM_FLOOR = 0.1
_FOLLOWS_POOLING = (nn.Linear, nn.ReLU, nn.Dropout, nn.Flatten, nn.Identity, nn.AdaptiveAvgPool2d)

TRACK_REACH_CELLS = 2
"""How many cells of the tap further a filter of the interpretable track reads on every side: two 3x3 convolutions."""


class NormLayer(nn.Module):
    """Divide each channel by its average magnitude: ``x_k / alpha_k``, ``alpha_k = E_x[sum_ij max(x_ijk, 0)]``.

    ``alpha`` is a running average over training batches (the first batch starts it), a constant of the backward pass,
    and frozen in evaluation; of ``signed`` maps it is that of ``|x|``. A channel whose magnitude is below ``floor``
    times the mean of all channels is divided by that floor instead: a dead channel would otherwise be divided by nearly
    nothing and blow up on the first photo that wakes it. Source: ICLR 2020 submission, Sec. 3.1 ("Norm-layer");
    momentum and floor are ours.
    """

    magnitude: Tensor
    started: Tensor

    def __init__(
        self, channels: int, *, momentum: float = _NORM_MOMENTUM, floor: float = _NORM_FLOOR, signed: bool = False
    ) -> None:
        super().__init__()
        self.momentum, self.signed = momentum, signed
        self.floor = floor
        self.register_buffer("magnitude", torch.ones(channels))
        self.register_buffer("started", torch.zeros((), dtype=torch.bool))

    @property
    def divisor(self) -> Float[Tensor, " channel"]:
        """The magnitude each channel is divided by, the floor applied."""
        lowest = (self.magnitude.mean() * self.floor).clamp(min=torch.finfo(torch.float32).tiny)
        return torch.maximum(self.magnitude, lowest)

    @torch.no_grad()
    def update(self, maps: Float[Tensor, "image channel row col"], positives: int | None = None) -> None:
        """Mix the magnitudes of a batch into the running average; only its first ``positives`` images when given."""
        used = maps[:positives].detach().float()
        batch = batch_mean((used.abs() if self.signed else used.clamp(min=0)).sum((2, 3)))
        if bool(self.started):
            self.magnitude.lerp_(batch, 1 - self.momentum)
        else:
            self.magnitude.copy_(batch)
            self.started.fill_(value=True)

    def forward(
        self, maps: Float[Tensor, "image channel row col"], positives: int | None = None
    ) -> Float[Tensor, "image channel row col"]:
        """Normalise; in training mode update the running average first."""
        if self.training:
            self.update(maps, positives)
        return maps / self.divisor.to(maps.dtype)[:, None, None]


class ExplainerOutput(NamedTuple):
    """What one pass through an explainer yields."""

    interp1: Tensor  # maps of conv-interp-1 after the ReLU, before the mask
    interp2: Tensor  # maps of conv-interp-2 after the ReLU, before the mask: the last interpretable layer
    ordin: Tensor  # maps of conv-ordin, before pooling
    p: Tensor  # the share of the interpretable track, a scalar
    reconstructions: tuple[Tensor, ...]  # one tensor per target


class NormedTracks(NamedTuple):
    """Both tracks of a batch before they are mixed: maps, then masked, pooled and normed; and what passes by."""

    interp1: Tensor
    interp2: Tensor
    ordin: Tensor
    interpretable: Tensor
    ordinary: Tensor
    passing: Tensor | None


def _dense_weights(conv: nn.Conv2d) -> Tensor:
    """Return a grouped convolution's kernel as an ordinary one, zero between groups."""
    weight = conv.weight.detach()
    if conv.groups == 1:
        return weight.clone()
    out, width = weight.shape[:2]
    dense = weight.new_zeros(out, width * conv.groups, *weight.shape[2:])
    per_group = out // conv.groups
    for group in range(conv.groups):
        rows = slice(group * per_group, (group + 1) * per_group)
        dense[rows, group * width : (group + 1) * width] = weight[rows]
    return dense


class Explainer(nn.Module):
    """An explainer of one layer of one performer.

    Args:
        structure: from :func:`explainer_structure`.
        config: size, initialisation and rates.
        decoder: takes the encoder's output (times the gain), returns one tensor per target.
        pool: the performer's pooling between encoder and decoder, if any.
        ordinary: kernel and bias the ordinary track starts from (the replaced convolution's); by default the identity.
        generator: draws the initial weights.
    """

    masks: Tensor
    tap_mean: Tensor
    tap_deviation: Tensor

    def __init__(
        self,
        structure: ExplainerStructure,
        config: ExplainerConfig,
        decoder: nn.Module,
        *,
        pool: nn.Module | None = None,
        ordinary: tuple[Tensor, Tensor] | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        width, out = structure.channels_in, structure.channels_out
        hidden = min(width, config.hidden_filters or width)
        self.structure = structure
        self.config = config
        self.draws: torch.Generator | None = None
        """Where training is in its warm-up: draws which channels drop out."""
        self.conv_interp_1 = nn.Conv2d(width, hidden, 3, padding=1)
        self.conv_interp_2 = nn.Conv2d(hidden, out, 3, padding=1)
        # An inserted ordinary track that is held at its start, the identity, needs no products.
        held = ordinary is None and config.learning_rate_ordinary == 0
        self.conv_ordin = nn.Identity() if held else nn.Conv2d(width, out, 3, padding=1)
        self.pool = nn.Identity() if pool is None else pool
        self.norm_interp = NormLayer(out)
        self.norm_ordin = NormLayer(out, signed=structure.signed)
        self.share_logit = nn.Parameter(torch.logit(torch.tensor(config.p_init)))
        self.gain = nn.Parameter(torch.ones(out))
        self.register_buffer("tap_mean", torch.zeros(width))
        self.register_buffer("tap_deviation", torch.ones(width))
        self.decoder = decoder
        self.register_buffer("masks", peak_masks(*structure.side_cells), persistent=False)
        self._initialise(ordinary, generator)

    @torch.no_grad()
    def _initialise(self, ordinary: tuple[Tensor, Tensor] | None, generator: torch.Generator | None) -> None:
        for conv in (self.conv_interp_1, self.conv_interp_2):  # He initialisation (papers silent)
            noise = torch.randn(conv.weight.shape, generator=generator)
            conv.weight.copy_(noise * math.sqrt(2 / conv.weight[0].numel()))
            nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
        if isinstance(self.conv_ordin, nn.Identity):
            return
        if ordinary is None:
            self.conv_ordin.weight.copy_(identity_kernel(self.conv_ordin))
            nn.init.zeros_(self.conv_ordin.bias)  # type: ignore[arg-type]
        else:
            self.conv_ordin.weight.copy_(ordinary[0])
            self.conv_ordin.bias.copy_(ordinary[1])  # type: ignore[union-attr]

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.share_logit.device

    @property
    def p(self) -> Tensor:
        """The share of the interpretable track in the encoder's output, in (0, 1)."""
        return torch.sigmoid(self.share_logit)

    @torch.no_grad()
    def start_scale(self, maps: Float[Tensor, "image filter row col"]) -> None:
        """Measure mean and deviation of the tap's maps on a sample, for ``standardise``."""
        maps = self.placed(maps)
        self.tap_mean.copy_(maps.mean((0, 2, 3)))
        deviation = maps.std((0, 2, 3))
        # A filter that is nearly silent would be blown up to the size of the others.
        self.tap_deviation.copy_(deviation.clamp(min=0.05 * float(deviation.mean()) + torch.finfo(maps.dtype).tiny))

    @torch.no_grad()
    def start_norms(self, maps: Float[Tensor, "image filter row col"]) -> None:
        """Measure the norm layers' magnitudes on a sample and set the gain to the ordinary track's."""
        _, interp2 = self.interpret(maps)
        ordin = self.ordinary(maps)
        for norm, values in ((self.norm_interp, self.masked(interp2)), (self.norm_ordin, ordin)):
            norm.started.fill_(value=False)
            norm.update(self.pool(values))
        # With this gain the decoder receives, for p = 0 and an identity ordinary track, exactly what the performer's
        # own layers received: the explainer starts as a perfect copy of the performer.
        self.gain.copy_(self.norm_ordin.divisor)

    @torch.no_grad()
    def restart_norm(self, maps: Float[Tensor, "image filter row col"]) -> None:
        """Measure the interpretable track's magnitudes again on a sample; the gain, of the ordinary track, stays."""
        # The warm-up changes the filters and passes no norm layer. With the magnitudes of before it, half of the
        # channels of ResNet-18's fox would enter the encoder's output six times too strong, and the decoder would learn
        # from that.
        draws, self.draws = self.draws, None
        masked = self.pool(self.masked(self.interpret(maps)[1]))
        self.draws = draws
        self.norm_interp.started.fill_(value=False)
        self.norm_interp.update(masked)

    def interpret(self, maps: Float[Tensor, "image filter row col"]) -> tuple[Tensor, Tensor]:
        """Return the maps of both interpretable layers, after the ReLU and before the mask."""
        maps = self.placed(maps)
        if maps.shape[1] != self.structure.channels_in or tuple(maps.shape[2:]) != self.structure.side_cells:
            wanted = (self.structure.channels_in, *self.structure.side_cells)
            rule, got = f"maps (filter, row, col) of {wanted} from {self.structure.tap}", str(tuple(maps.shape[1:]))
            raise InputError(expected(rule, got, "Use photos preprocessed as in the fit"))
        if self.config.standardise:
            maps = (maps - self.tap_mean[:, None, None]) / self.tap_deviation[:, None, None]
        interp1 = self.conv_interp_1(self._thinned(maps)).relu()
        return interp1, self.conv_interp_2(self._thinned(mask_at_peak(interp1, self.masks))).relu()

    def placed(self, maps: Tensor) -> Tensor:
        """Return the maps that were read at the tap without the rows of tokens that have no place."""
        return maps[:, :, : self.structure.side_cells[0]] if self.structure.spare_rows else maps

    def ordinary(self, maps: Tensor) -> Float[Tensor, "image filter row col"]:
        """Return the maps of conv-ordin, after the ReLU where the tap's maps come after one, too."""
        values: Tensor = self.conv_ordin(self.placed(maps))
        return values if self.structure.signed else values.relu()

    def _thinned(self, maps: Tensor) -> Tensor:
        """Drop channels in the warm-up and scale the others up; drawn so that a killed run goes on with its bits."""
        drop = self.config.dropout
        if self.draws is None or not drop:
            return maps
        kept = drawn(maps.shape[0], maps.shape[1], self.draws) >= drop
        return maps * (kept.to(maps) / (1 - drop))[..., None, None]

    def places(self, interp2: Float[Tensor, "image filter row col"]) -> Float[Tensor, "image filter 2"]:
        """Return the place (row, col) in cells of each filter's part, from maps of conv-interp-2 before the mask."""
        if self.config.peak == "centroid":
            return centroid_cells(interp2.detach())
        index = peak_cells(interp2.detach())
        return torch.stack([index // interp2.shape[3], index % interp2.shape[3]], -1).float()

    def masked(self, interp2: Float[Tensor, "image filter row col"]) -> Float[Tensor, "image filter row col"]:
        """Return maps of conv-interp-2 masked around their places."""
        if self.config.peak == "centroid":
            return mask_around(interp2, self.places(interp2))
        return mask_at_peak(interp2, self.masks)

    def normed_tracks(self, maps: Tensor, positives: int | None = None) -> NormedTracks:
        """Return both tracks at the encoder's output, pooled and normed, before p mixes them."""
        interp1, interp2 = self.interpret(maps)
        ordin = self.ordinary(maps)
        passing = maps[:, :, self.structure.side_cells[0] :] if self.structure.read != self.structure.tap else None
        return NormedTracks(
            interp1,
            interp2,
            ordin,
            self.norm_interp(self.pool(self.masked(interp2)), positives),
            self.norm_ordin(self.pool(ordin), positives),
            passing,
        )

    def encoded(self, tracks: NormedTracks) -> Tensor:
        """Return x_enc, both tracks mixed by p."""
        p = self.p.to(tracks.interp2.dtype)
        return p * tracks.interpretable + (1 - p) * tracks.ordinary

    def decode(self, encoded: Tensor, passing: Tensor | None = None) -> tuple[Tensor, ...]:
        """Return the reconstruction of every target.

        ``passing`` is what the tracks of the same images have by that name; several encodings of each follow in blocks.
        """
        given = encoded * self.gain.to(encoded.dtype)[:, None, None]
        if passing is not None:
            given = torch.cat([given, passing.to(given).repeat(len(given) // len(passing), 1, 1, 1)], 2)
        result = self.decoder(given)
        return result if isinstance(result, tuple) else (result,)

    def forward(self, maps: Float[Tensor, "image filter row col"], positives: int | None = None) -> ExplainerOutput:
        """Explain a batch of tap maps; only the first ``positives`` images move the norm layers in training."""
        tracks = self.normed_tracks(maps, positives)
        encoded = self.encoded(tracks)
        return ExplainerOutput(*tracks[:3], self.p, self.decode(encoded, tracks.passing))

    def mixed_maps(self, interp2: Tensor, ordin: Tensor) -> Tensor:
        """Return ``p x_f + (1 - p) x_ordin`` at the tap's size, in units of interp2, the ordinary track detached.

        The papers apply conv-interp-2's filter loss to this mixture of normed maps (ICLR 2020, App. I); multiplying
        by the interpretable norm's divisor keeps the scale of ``x_f``.
        """
        scale = (self.norm_interp.divisor / self.norm_ordin.divisor)[:, None, None].to(interp2.dtype)
        p = self.p.to(interp2.dtype)
        return p * interp2 + (1 - p) * ordin.detach() * scale


def identity_kernel(conv: nn.Conv2d) -> Tensor:
    """Return a kernel that copies channel k to channel k."""
    kernel = torch.zeros_like(conv.weight)
    nn.init.dirac_(kernel)
    return kernel


def parameter_groups(explainer: Explainer) -> dict[str, Sequence[nn.Parameter]]:
    """Return the learned parameters by role: interpretable, ordinary, share, decoder."""
    return {
        "interpretable": [*explainer.conv_interp_1.parameters(), *explainer.conv_interp_2.parameters()],
        "ordinary": list(explainer.conv_ordin.parameters()),
        "share": [explainer.share_logit],
        "decoder": [explainer.gain, *explainer.decoder.parameters()],
    }


_SAME_SIZE = {"kernel_size": (3, 3), "stride": (1, 1), "padding": (1, 1), "dilation": (1, 1)}


def _replaced_convolution(
    performer: Performer, tap: str, targets: Sequence[str], side: int
) -> tuple[str, str, str | None] | None:
    """Find ``(convolution, activation, pooling)`` after the tap when everything later is fully connected."""
    modules = dict(performer.module.named_modules())
    names = performer.cut_points()
    if side < 2 or not {tap, targets[-1]} <= set(names):
        return None
    chain = names[names.index(tap) + 1 : names.index(targets[-1]) + 1]
    kinds = [modules.get(name) for name in chain]
    if len(chain) < 3 or not _keeps_size(kinds[0]) or not isinstance(kinds[1], nn.ReLU):
        return None
    if any(kind is not None and hooked(kind) for kind in kinds[:3]):
        return None  # the tracks would compute without what the owner's hooks change
    pooling = chain[2] if isinstance(kinds[2], nn.MaxPool2d) else None
    return (chain[0], chain[1], pooling) if _fully_connected(kinds[3 if pooling else 2 :]) else None


def _keeps_size(kind: nn.Module | None) -> bool:
    return isinstance(kind, nn.Conv2d) and all(getattr(kind, name) == value for name, value in _SAME_SIZE.items())


def _fully_connected(kinds: Sequence[nn.Module | None]) -> bool:
    # A flatten written as a function has no module: it is None here and keeps the head fully connected.
    closed = all(kind is None or isinstance(kind, _FOLLOWS_POOLING) for kind in kinds)
    return closed and any(isinstance(kind, nn.Linear) for kind in kinds)


def _map_size(tap: str, maps: Tensor) -> tuple[int, int, int]:
    """Return filters, rows and columns of maps that can be explained; refuse others."""
    if maps.dim() != 4:
        got = f"a tensor of shape {tuple(maps.shape)}"
        raise LayerError(expected(f"maps at {tap}", got, "Tap a convolutional layer"))
    channels, rows, cols = (int(size) for size in maps.shape[1:])
    if min(rows, cols) < 2:
        remedy = "Tap an earlier layer (see partlens layers)"
        raise LayerError(expected(f"maps larger than 1x1 at {tap}", f"{rows}x{cols}", remedy))
    return channels, rows, cols


def explainer_structure(
    performer: Performer, batch: Tensor, tap: str, targets: Sequence[str] | None = None
) -> ExplainerStructure:
    """Say what an explainer of a layer consists of.

    Args:
        performer: the network under study.
        batch: preprocessed images (image, 3, row, col), at least one; they decide the map size.
        tap: layer to explain; its maps must be larger than 1x1.
        targets: layers to reconstruct; by default the performer's for this tap.

    Raises:
        LayerError: the layer is unknown, its maps are 1x1 or not maps, or a shortcut goes around.
    """
    chosen = performer.targets(tap) if targets is None else tuple(map(performer.whole, targets))
    if not chosen:
        raise LayerError(expected("at least one target", "none", "Name a layer after the tap, or omit targets"))
    maps = forward_taps(performer, batch, [tap])[1][tap]
    channels, rows, cols = _map_size(tap, maps)
    replaced = _replaced_convolution(performer, tap, chosen, min(rows, cols))
    performer.upper(tap, chosen)  # refuses targets that are not after the tap, before anything is written
    if replaced is None:
        signed = float(maps.min()) < 0 or performer.lowest(tap) < 0
        spare = tuple(performer.layout(name).spare_rows for name in (tap, *chosen))
        rest = (signed, spare) if any(spare) else (signed,)
        return ExplainerStructure(tap, chosen, channels, channels, (rows, cols), None, tap, *rest)
    name, activation, pooling = replaced
    conv = performer.module.get_submodule(name)
    assert isinstance(conv, nn.Conv2d)
    return ExplainerStructure(tap, chosen, channels, conv.out_channels, (rows, cols), name, pooling or activation)


def build_explainer(
    performer: Performer,
    structure: ExplainerStructure,
    config: ExplainerConfig,
) -> Explainer:
    """Build an explainer, on the CPU, whose ordinary track and decoder start as the performer's own layers.

    The structure comes from :func:`explainer_structure`; the seed of the configuration draws the interpretable track.
    """
    draws = torch.Generator().manual_seed(config.seed)
    decoder = performer.upper(structure.decoder_from, structure.targets).cpu().float()
    pool: nn.Module | None = None
    ordinary: tuple[Tensor, Tensor] | None = None
    if structure.replaced is not None:
        conv = performer.module.get_submodule(structure.replaced)
        assert isinstance(conv, nn.Conv2d)
        bias = torch.zeros(conv.out_channels) if conv.bias is None else conv.bias.detach().clone()
        ordinary = (_dense_weights(conv).float().cpu(), bias.float().cpu())
        layer = performer.module.get_submodule(structure.decoder_from)
        pool = copy.deepcopy(layer).cpu() if isinstance(layer, nn.MaxPool2d) else None
    with random_state_kept():  # torch's own initialisation draws from the global state before ours replaces it
        return Explainer(structure, config, decoder, pool=pool, ordinary=ordinary, generator=draws)


def performer_head(performer: Performer, structure: ExplainerStructure) -> nn.Module:
    """Return the performer's layers after the last target, frozen, for feeding the reconstruction back.

    They are where the performer is, and end in a tuple with the scores (`partlens.network.outputs`), whatever the
    performer returns.
    """
    layers = performer.upper(structure.targets[-1], ["output"]).float()
    return _Head(layers, performer.outputs).requires_grad_(requires_grad=False)


class _Head(nn.Module):
    def __init__(self, layers: nn.Module, outputs: Outputs) -> None:
        super().__init__()
        self.layers, self.outputs = layers, outputs

    def forward(self, maps: Tensor) -> tuple[Float[Tensor, "image output"]]:
        return (self.outputs.scores(self.layers(maps)[0], len(maps)),)
