from __future__ import annotations

import pytest
import torch
import torchvision
from torch import nn

from partlens.explainer.config import ExplainerConfig
from partlens.explainer.network import (
    Explainer,
    NormLayer,
    _dense_weights,
    build_explainer,
    explainer_structure,
    parameter_groups,
    performer_head,
)
from partlens.explainer.record import ExplainerStructure
from partlens.network.performer import Performer, weights_sha256
from partlens.network.preprocessing import Preprocessing
from partlens.network.taps import forward_taps
from partlens_papers.networks.paper_networks import PaperNet
from partlens_papers.networks.settings import paper_setting


def performer_of(module: nn.Module, side: int, tap: str | None = None) -> Performer:
    module.eval()
    preprocessing = Preprocessing(size_px=(side, side), resize="squash")
    return Performer(module, type(module).__name__, preprocessing, weights_sha256(module), tap)


def vgg16(hidden: int) -> nn.Module:
    """VGG-16 with its own convolutions and narrow fully connected layers."""
    with torch.device("meta"):
        module = torchvision.models.vgg16(weights=None)
    module.features = torchvision.models.vgg.make_layers(torchvision.models.vgg.cfgs["D"])
    for layer in module.features:
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight)
    first, second = nn.Linear(512 * 7 * 7, hidden), nn.Linear(hidden, hidden)
    parts = (first, nn.ReLU(), nn.Dropout(), second, nn.ReLU(), nn.Dropout(), nn.Linear(hidden, 5))
    module.classifier = nn.Sequential(*parts)
    return module


def networks() -> list[tuple[str, nn.Module, int, str, bool]]:
    torch.manual_seed(0)
    return [
        ("resnet18", torchvision.models.resnet18(weights=None), 64, "layer3", False),
        ("vgg11", torchvision.models.vgg11(weights=None), 64, "features.17", True),
        ("alexnet", torchvision.models.alexnet(weights=None), 96, "features.9", True),
        ("caffe", PaperNet("alexnet-caffe", num_classes=5, input_px=99, hidden=16), 99, "relu4", True),
        ("vgg-s", PaperNet("vgg-s", num_classes=5, input_px=131, hidden=16), 131, "relu4", True),
        ("vgg-m", PaperNet("vgg-m", num_classes=5, input_px=99, hidden=16), 99, "relu4", True),
        ("vgg16", vgg16(hidden=16), 64, "features.27", True),
        ("resnet34", torchvision.models.resnet34(weights=None), 64, "layer4.0", False),
        ("squeezenet", torchvision.models.squeezenet1_1(weights=None), 64, "features.10", False),
    ]


@pytest.mark.parametrize(
    ("name", "module", "side", "tap", "replaces"), networks(), ids=lambda v: v if isinstance(v, str) else ""
)
def test_perfect_copy_limit(name: str, module: nn.Module, side: int, tap: str, replaces: bool) -> None:
    """p = 0 and the initial ordinary track give zero reconstruction error and identical outputs."""
    performer = performer_of(module, side)
    batch = torch.rand(3, 3, side, side)
    structure = explainer_structure(performer, batch, tap)
    assert (structure.replaced is not None) == replaces
    if (setting := paper_setting(performer)) is not None:
        assert (structure.tap, structure.targets) == (setting.tap, setting.targets)
    output, taps = forward_taps(performer, batch, [tap, *structure.targets])
    # Of inserted tracks, partlens holds the ordinary one as a plain identity.
    for preset in ("paper",) if replaces else ("paper", "partlens"):
        explainer = build_explainer(performer, structure, ExplainerConfig.preset(preset, p_init=1e-9)).eval()
        explainer.start_norms(taps[tap])
        with torch.no_grad():
            explainer.share_logit.fill_(-1e4)
            result = explainer(taps[tap])
            fed = performer_head(performer, structure)(result.reconstructions[-1])[0]
            for target, value in zip(structure.targets, result.reconstructions, strict=True):
                scale = float(taps[target].abs().max())
                assert float((value - taps[target]).abs().max()) < 1e-4 * scale
        assert torch.allclose(fed, output, atol=1e-4 * float(output.abs().max()))
        assert torch.equal(fed.argmax(1), output.argmax(1))


def test_the_performer_is_bit_identical_afterwards(tiny: Performer) -> None:
    before = {k: v.clone() for k, v in tiny.module.state_dict().items()}
    structure = explainer_structure(tiny, torch.rand(2, 3, 32, 32), "relu2")
    explainer = build_explainer(tiny, structure, ExplainerConfig())
    for parameter in explainer.parameters():
        with torch.no_grad():
            parameter.add_(1.0)
    performer_head(tiny, structure)
    for name, value in tiny.module.state_dict().items():
        assert torch.equal(value, before[name])
    assert all(p.requires_grad and p.grad is None for p in tiny.module.parameters())


def test_structure_of_the_papers_alexnet() -> None:
    performer = performer_of(PaperNet("alexnet-caffe", num_classes=2, input_px=99, hidden=8), 99)
    structure = explainer_structure(performer, torch.rand(1, 3, 99, 99), "relu4")
    assert structure.replaced == "conv5"
    assert structure.decoder_from == "pool5"
    assert (structure.channels_in, structure.channels_out) == (384, 256)
    assert structure.targets == ("relu6", "relu7")


def test_grouped_convolution_becomes_dense() -> None:
    conv = nn.Conv2d(8, 6, 3, padding=1, groups=2)
    maps = torch.rand(2, 8, 5, 5)
    dense = nn.functional.conv2d(maps, _dense_weights(conv), conv.bias, padding=1)
    assert torch.allclose(dense, conv(maps), atol=1e-6)


def test_norm_layer_makes_the_mean_sum_one_and_ignores_negatives() -> None:
    norm = NormLayer(3, momentum=0.5).train()
    positives = torch.rand(8, 3, 4, 4) * torch.tensor([1.0, 5.0, 0.5])[:, None, None]
    for _ in range(40):
        out = norm(torch.cat([positives, 100 * torch.rand(4, 3, 4, 4)]), 8)[:8]
    assert torch.allclose(out.sum((2, 3)).mean(0), torch.ones(3), atol=1e-4)
    held = norm.magnitude.clone()
    norm.eval()(torch.rand(5, 3, 4, 4) * 50)
    assert torch.equal(norm.magnitude, held)


def test_a_dead_channel_does_not_blow_up() -> None:
    norm = NormLayer(2, floor=0.1).train()
    maps = torch.rand(6, 2, 4, 4)
    maps[:, 1] = 0
    norm(maps)
    woken = torch.zeros(1, 2, 4, 4)
    woken[0, 1, 0, 0] = 1.0
    expected = 1 / (0.1 * float(norm.magnitude.mean()))
    assert float(norm.eval()(woken).max()) == pytest.approx(expected, rel=1e-5)


def test_p_cannot_be_gamed_by_rescaling_the_track(tiny: Performer) -> None:
    structure = explainer_structure(tiny, torch.rand(2, 3, 32, 32), "relu2")
    explainer = build_explainer(tiny, structure, ExplainerConfig()).eval()
    explainer.norm_interp.floor = explainer.norm_ordin.floor = 0.0
    maps = forward_taps(tiny, torch.rand(16, 3, 32, 32), ["relu2"])[1]["relu2"]
    explainer.start_norms(maps)
    with torch.no_grad():
        before = explainer.encoded(explainer.normed_tracks(maps))
        explainer.conv_interp_2.weight.mul_(7)
        explainer.conv_interp_2.bias.mul_(7)
        gain = explainer.gain.clone()
        explainer.start_norms(maps)
        assert torch.allclose(explainer.encoded(explainer.normed_tracks(maps)), before, atol=1e-5)
        assert torch.equal(explainer.gain, gain)


def test_mixed_maps_keep_the_ordinary_track_out_of_the_gradient(tiny: Performer) -> None:
    structure = explainer_structure(tiny, torch.rand(2, 3, 32, 32), "relu2")
    explainer = build_explainer(tiny, structure, ExplainerConfig())
    interp = torch.rand(2, 12, 8, 8, requires_grad=True)
    ordin = torch.rand(2, 12, 8, 8, requires_grad=True)
    upstream = torch.rand(2, 12, 8, 8)
    mixed = explainer.mixed_maps(interp, ordin)
    grads = torch.autograd.grad((mixed * upstream).sum(), [interp, explainer.share_logit], retain_graph=True)
    p = explainer.p.detach()
    assert torch.allclose(grads[0], p * upstream, atol=1e-6)
    expected = (upstream * (interp - ordin)).sum().detach() * p * (1 - p)
    assert float(grads[1]) == pytest.approx(float(expected), rel=1e-3)
    assert torch.autograd.grad(mixed.sum(), ordin, allow_unused=True)[0] is None


def test_maps_of_another_size_are_refused(tiny: Performer) -> None:
    structure = explainer_structure(tiny, torch.rand(2, 3, 32, 32), "relu2")
    explainer = build_explainer(tiny, structure, ExplainerConfig())
    with pytest.raises(ValueError, match=r"of \(12, 8, 8\) from relu2, got \(12, 4, 4\)"):
        explainer(torch.rand(1, 12, 4, 4))


def test_layers_that_cannot_be_explained_say_why(tiny: Performer) -> None:
    batch = torch.rand(2, 3, 32, 32)
    with pytest.raises(ValueError, match="larger than 1x1 at pool4"):
        explainer_structure(tiny, batch, "pool4", ["classes"])


def test_a_held_inserted_track_costs_nothing_and_is_the_identity(tiny: Performer) -> None:
    structure = explainer_structure(tiny, torch.rand(2, 3, 32, 32), "relu2")
    held = build_explainer(tiny, structure, ExplainerConfig(learning_rate_ordinary=0.0))
    free = build_explainer(tiny, structure, ExplainerConfig())
    assert parameter_groups(held)["ordinary"] == []
    assert len(parameter_groups(free)["ordinary"]) == 2
    maps = torch.rand(2, 12, 8, 8)
    assert torch.equal(held.normed_tracks(maps).ordin, maps)
    assert torch.allclose(free.normed_tracks(maps).ordin, maps, atol=1e-6)


def test_a_standardised_track_is_the_same_function_with_other_weights(tiny: Performer) -> None:
    structure = explainer_structure(tiny, torch.rand(2, 3, 32, 32), "relu2")
    maps = torch.rand(6, 12, 8, 8) * torch.linspace(0.1, 9, 12)[:, None, None]
    standard = build_explainer(tiny, structure, ExplainerConfig(standardise=True))
    standard.start_scale(maps)
    plain = build_explainer(tiny, structure, ExplainerConfig())
    with torch.no_grad():
        kernel = standard.conv_interp_1.weight / standard.tap_deviation[:, None, None]
        plain.conv_interp_1.weight.copy_(kernel)
        plain.conv_interp_1.bias.copy_(standard.conv_interp_1.bias - (kernel.sum((2, 3)) * standard.tap_mean).sum(1))
        inner = (slice(None), slice(None), slice(1, -1), slice(1, -1))
        assert torch.allclose(standard.interpret(maps)[0][inner], plain.interpret(maps)[0][inner], atol=1e-4)
    quiet = maps.clone()
    quiet[:, 0] *= 1e-6
    standard.start_scale(quiet)  # a filter that is nearly silent is blown up no more than to a twentieth of the mean
    assert float(standard.tap_deviation[0]) == pytest.approx(0.05 * float(quiet.std((0, 2, 3)).mean()), rel=1e-4)
    dead = torch.zeros(4, 12, 8, 8)
    standard.start_scale(dead)
    assert bool(standard.interpret(dead)[1].isfinite().all())


def test_channels_drop_out_in_the_warm_up_only_and_by_the_given_draws(tiny: Performer) -> None:
    structure = explainer_structure(tiny, torch.rand(2, 3, 32, 32), "relu2")
    explainer = build_explainer(tiny, structure, ExplainerConfig(dropout=0.5)).train()
    maps = torch.rand(3, 12, 8, 8) + 0.5
    whole = explainer.interpret(maps)[1]
    assert torch.equal(whole, explainer.interpret(maps)[1])
    seen = []
    for seed in (4, 4, 5):
        explainer.draws = torch.Generator().manual_seed(seed)
        seen.append(explainer.interpret(maps)[1])
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], seen[2])
    assert not torch.equal(seen[0], whole)
    explainer.draws = torch.Generator().manual_seed(0)
    thinned = explainer._thinned(torch.ones(200, 50, 2, 2))
    assert sorted(thinned.unique().tolist()) == [0.0, 2.0]
    assert float(thinned.mean()) == pytest.approx(1, abs=0.05)
    assert torch.equal(thinned[..., 0, 0], thinned[..., 1, 1])


def test_parts_are_where_the_configuration_says(tiny: Performer) -> None:
    structure = explainer_structure(tiny, torch.rand(2, 3, 32, 32), "relu2")
    maps = torch.zeros(1, 12, 8, 8)
    maps[0, :, 2, 1], maps[0, :, 2, 6] = 1.0, 0.99
    largest = build_explainer(tiny, structure, ExplainerConfig())
    centroid = build_explainer(tiny, structure, ExplainerConfig(peak="centroid"))
    assert largest.places(maps)[0, 0].tolist() == [2, 1]
    assert centroid.places(maps)[0, 0].tolist() == pytest.approx([2, 3.5], abs=0.1)
    assert centroid.places(1000 * maps)[0, 0].tolist() == pytest.approx(centroid.places(maps)[0, 0].tolist())
    assert centroid.places(torch.zeros(1, 12, 8, 8))[0, 0].tolist() == [0, 0]  # as its largest cell
    # Between two distant peaks nothing is left under the mask; around the largest cell one of them is.
    assert float(centroid.masked(maps).sum()) < 0.1
    assert float(largest.masked(maps).sum()) == pytest.approx(12)


def test_only_the_category_moves_the_norm_layers(tiny: Performer) -> None:
    structure = explainer_structure(tiny, torch.rand(2, 3, 32, 32), "relu2")
    own, others = torch.rand(6, 12, 8, 8), 100 * torch.rand(5, 12, 8, 8)
    seen = {}
    for name, maps, positives in (("own", own, None), ("both", torch.cat([own, others]), 6), ("all", None, None)):
        explainer = build_explainer(tiny, structure, ExplainerConfig()).train()
        explainer(torch.cat([own, others]) if maps is None else maps, positives)
        seen[name] = (explainer.norm_interp.magnitude.clone(), explainer.norm_ordin.magnitude.clone())
    for own_norm, both, everything in zip(seen["own"], seen["both"], seen["all"], strict=True):
        assert torch.allclose(own_norm, both, rtol=1e-5)
        assert bool((everything > 5 * own_norm).any())


def test_the_mixture_is_in_units_of_the_interpretable_track(tiny: Performer) -> None:
    structure = explainer_structure(tiny, torch.rand(2, 3, 32, 32), "relu2")
    explainer = build_explainer(tiny, structure, ExplainerConfig()).eval()
    explainer.norm_interp.floor = explainer.norm_ordin.floor = 0.0
    for norm, size in ((explainer.norm_interp, 8.0), (explainer.norm_ordin, 2.0)):
        norm.magnitude.fill_(size)
        norm.started.fill_(value=True)
    interp, ordin = torch.rand(2, 12, 8, 8), torch.rand(2, 12, 8, 8)
    # p x_interp / 8 + (1 - p) x_ordin / 2 enters the decoder; times 8 it has the size of x_interp.
    with torch.no_grad():
        wanted = 8 * (explainer.p * interp / 8 + (1 - explainer.p) * ordin / 2)
        assert torch.allclose(explainer.mixed_maps(interp, ordin), wanted, atol=1e-6)


def test_the_norm_of_the_track_is_measured_again_and_the_gain_kept(tiny: Performer) -> None:
    structure = explainer_structure(tiny, torch.rand(2, 3, 32, 32), "relu2")
    explainer = build_explainer(tiny, structure, ExplainerConfig(dropout=0.5))
    maps = torch.rand(16, 12, 8, 8)
    explainer.start_norms(maps)
    gain, ordinary = explainer.gain.clone(), explainer.norm_ordin.magnitude.clone()
    with torch.no_grad():
        explainer.conv_interp_2.weight.mul_(5)
    explainer.draws = torch.Generator().manual_seed(0)
    explainer.restart_norm(maps)
    assert explainer.draws is not None
    explainer.draws = None
    actual = explainer.pool(explainer.masked(explainer.interpret(maps)[1])).sum((2, 3)).mean(0)
    assert torch.allclose(explainer.norm_interp.magnitude, actual, rtol=1e-5)
    assert torch.equal(explainer.gain, gain)
    assert torch.equal(explainer.norm_ordin.magnitude, ordinary)


def test_p_cannot_be_had_by_scale_unless_the_norm_layer_stands_still() -> None:
    """With conv-interp-2 ten times as strong and its norm measured again, the track is what it was."""
    structure = ExplainerStructure("tap", ("top",), 4, 6, (8, 8), None, "tap")
    maps = torch.rand(5, 4, 8, 8)
    outcome = []
    for times, measured in ((1.0, True), (10.0, True), (10.0, False)):
        explainer = Explainer(
            structure, ExplainerConfig(seed=1), nn.Identity(), generator=torch.Generator().manual_seed(1)
        )
        explainer.eval().start_norms(maps)
        with torch.no_grad():
            for parameter in explainer.conv_interp_2.parameters():
                parameter.mul_(times)
            if measured:
                explainer.restart_norm(maps)
            outcome.append(explainer.normed_tracks(maps).interpretable)
    assert torch.allclose(outcome[0], outcome[1], rtol=1e-4, atol=1e-6)
    assert torch.allclose(10 * outcome[0], outcome[2], rtol=1e-4, atol=1e-6)
