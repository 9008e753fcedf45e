"""Descriptors of all layers, the streaming pass, labels and the selection."""

from __future__ import annotations

import dataclasses
import json
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from partlens.data.images import ImageSet
from partlens.performer.taps import forward_taps
from partlens.performer.zoo import PaperNet, Performer, Preprocessing, load_performer, weights_sha256
from partlens.selection import relevance
from partlens.selection.relevance import (
    RESPONSES,
    DescriptorConfig,
    FeatureIndex,
    channel_energies,
    class_of_category,
    descriptor,
    descriptor_layers,
    feature_index,
    image_descriptors,
    label_matrix,
    readout,
    select_relevant,
    stream_responses,
)
from partlens.vocabulary import ImageError, InputError, LayerError, RunError

PLAIN = DescriptorConfig(image_normalisation="none")


def matconvnet_lenet() -> nn.Sequential:
    """MatConvNet's MNIST network: 28 px, no rectifier but the last."""
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(1, 20, 5),
            pool1=nn.MaxPool2d(2),
            conv2=nn.Conv2d(20, 50, 5),
            pool2=nn.MaxPool2d(2),
            conv3=nn.Conv2d(50, 500, 4),
            relu=nn.ReLU(),
            conv4=nn.Conv2d(500, 10, 1),
            softmax=nn.Softmax(dim=1),
        )
    ).eval()


def as_performer(module: nn.Module, size: int = 16, names: tuple[str, ...] | None = None) -> Performer:
    return Performer(
        module,
        "net",
        Preprocessing(size_px=(size, size), resize="squash"),
        weights_sha256(module),
        None,
        names,
    )


@pytest.fixture
def images() -> ImageSet:
    pixels = np.random.default_rng(0).integers(0, 256, (11, 20, 24, 3), dtype=np.uint8)
    return ImageSet.from_arrays(pixels, categories=["fox", "cat", "cat", "fox", *["cow"] * 7])


def by_hand(values: dict[str, np.ndarray]) -> np.ndarray:
    """The paper's descriptor of one image, in float64 loops."""
    blocks = []
    for maps in values.values():
        energies = []
        for channel in np.atleast_2d(maps):
            total = 0.0
            for value in np.asarray(channel, dtype=np.float64).ravel():
                total += value * value
            energies.append(total)
        whole = sum(energies)
        blocks += [e / whole if whole > 0 else 0.0 for e in energies]
    length = sum(b * b for b in blocks) ** 0.5
    return np.array([b / length if length > 0 else 0.0 for b in blocks])


def test_T1_layers_sum_to_one_and_the_whole_has_length_one() -> None:
    torch.manual_seed(1)
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3, bias=False), nn.Flatten(), nn.LazyLinear(2))
    net(torch.zeros(1, 3, 16, 16))
    performer, batch = as_performer(net.eval()), torch.randn(5, 3, 16, 16)
    index = feature_index(performer)
    blocks, _ = image_descriptors(performer, batch, index, PLAIN)
    for layer in index.layers:
        assert torch.allclose(blocks[:, index.rows(layer)].sum(1), torch.ones(5), atol=1e-6)
    x, _ = image_descriptors(performer, batch, index)
    assert torch.allclose(x.norm(dim=1), torch.ones(5), atol=1e-6)
    with torch.no_grad():  # every output from here on doubles; nothing relative changes
        net[0].weight.mul_(2)
        net[0].bias.mul_(2)
    assert torch.allclose(image_descriptors(performer, batch, index)[0], x, atol=1e-6)


def test_T2_numbers_worked_by_hand() -> None:
    """Energies 25, 1 and 4, 0: layers 25/26, 1/26 and 1, 0; divided by the length of all four."""
    index = FeatureIndex(("a", "b"), (2, 2))
    maps = {"a": torch.tensor([[[[3.0, -4.0]], [[1.0, 0.0]]]]), "b": torch.tensor([[[[0.0], [2.0]], [[0.0], [0.0]]]])}
    found = descriptor(maps, index)[0]
    length = ((25 / 26) ** 2 + (1 / 26) ** 2 + 1) ** 0.5
    assert found.tolist() == pytest.approx([25 / 26 / length, 1 / 26 / length, 1 / length, 0.0], rel=1e-6)
    energies = {"a": torch.tensor([[25.0, 1.0]]), "b": torch.tensor([[4.0, 0.0]])}
    assert torch.equal(descriptor(energies, index)[0], found)
    rooted = descriptor(energies, index, DescriptorConfig(energy="norm", image_normalisation="none"))[0]
    assert rooted.tolist() == pytest.approx([5 / 6, 1 / 6, 1.0, 0.0])
    raw = descriptor(energies, index, DescriptorConfig.port_g())[0]
    assert raw.tolist() == pytest.approx([5.0, 1.0, 2.0, 0.0])
    assert channel_energies(maps["a"]).tolist() == [[25.0, 1.0]]


def test_T3_the_papers_networks_have_the_papers_descriptors() -> None:
    vgg = as_performer(PaperNet("vgg-f", num_classes=3).eval(), 224)
    index = feature_index(vgg)
    assert index.size == 19456
    early = [f"{kind}{number}" for number in (1, 2) for kind in ("conv", "relu", "norm", "pool")]
    late = ["conv3", "relu3", "conv4", "relu4", "conv5", "relu5", "pool5", "fc6", "relu6", "fc7", "relu7"]
    assert index.layers == (*early, *late)
    lenet = as_performer(matconvnet_lenet(), 28)
    small = feature_index(lenet)
    assert small.layers == ("conv1", "pool1", "conv2", "pool2", "conv3", "relu")
    assert small.channels == (20, 20, 50, 50, 500, 500)
    for each in (small, index):
        places = [each.place(feature) for feature in range(each.size)]
        assert [each.feature(*place) for place in places] == list(range(each.size))
        assert [layer for layer in each.layers for _ in range(each.rows(layer).start, each.rows(layer).stop)] == [
            layer for layer, _ in places
        ]
        assert FeatureIndex.from_dict(json.loads(json.dumps(each.to_dict()))) == each
    assert descriptor_layers(lenet, DescriptorConfig(layers="convolutions")) == ("conv1", "conv2", "conv3")
    assert descriptor_layers(lenet, DescriptorConfig.port_f()) == ("relu",)
    assert descriptor_layers(lenet, DescriptorConfig.port_h()) == ("conv1", "conv2", "conv3")


def test_T4_each_layer_but_one_costs_a_rank() -> None:
    index = feature_index(as_performer(matconvnet_lenet(), 28))
    rng = np.random.default_rng(0)
    energies = {
        layer: torch.from_numpy(rng.gamma(0.5, 1.0, (1200, channels)))
        for layer, channels in zip(index.layers, index.channels, strict=True)
    }
    for config in (DescriptorConfig(), PLAIN):
        x = descriptor(energies, index, config).double().numpy()
        # float32 rounding leaves the five null directions at 1e-7 of the rest
        assert int((np.linalg.svd(x, compute_uv=False) > 1e-5 * np.linalg.norm(x, 2)).sum()) == 1135


def test_descriptors_equal_the_slow_formula_and_in_place_rectifiers_do_not_disturb_them() -> None:
    torch.manual_seed(2)
    layers = [nn.Conv2d(3, 5, 3), nn.ReLU(inplace=True), nn.Conv2d(5, 4, 3), nn.ReLU(inplace=True), nn.Flatten()]
    inplace = nn.Sequential(*layers, nn.Linear(576, 3)).eval()
    plain = nn.Sequential(*[nn.ReLU() if isinstance(layer, nn.ReLU) else layer for layer in inplace]).eval()
    batch = torch.randn(4, 3, 16, 16)
    _, taps = forward_taps(plain, batch, ["0", "1", "2", "3"])
    wanted = np.stack([by_hand({name: taps[name][i].numpy() for name in taps}) for i in range(4)])
    performer = as_performer(inplace)
    index = feature_index(performer)
    assert index.layers == ("0", "1", "2", "3")
    x, logits = image_descriptors(performer, batch, index)
    assert np.allclose(x, wanted, atol=1e-6)
    assert torch.allclose(logits, plain(batch), atol=1e-5)
    assert not np.allclose(x[:, index.rows("0")], x[:, index.rows("1")])
    assert np.allclose(descriptor(taps, index), wanted, atol=1e-6)


def test_a_dead_layer_gives_zeros_and_is_counted(images, tmp_path) -> None:
    net = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Conv2d(5, 2, 3), nn.Flatten(), nn.Linear(288, 2)).eval()
    with torch.no_grad():
        net[0].weight.zero_()
        net[0].bias.fill_(-1.0)
    for path_peaks in (True, False):
        found = stream_responses(as_performer(net), images, peaks=path_peaks, batch_size=4)
        rows = found.index.rows("1")
        assert found.dead_layers == 11
        assert np.isfinite(found.descriptor).all()
        assert not found.descriptor[:, rows].any()
        assert np.allclose(np.linalg.norm(found.descriptor, axis=1), 1, atol=1e-6)

    def kill(done: int, _rows: int) -> None:
        if done == 8:
            raise Killed

    with pytest.raises(Killed):
        stream_responses(as_performer(net), images, out=tmp_path, batch_size=4, progress=kill)
    assert stream_responses(as_performer(net), images, out=tmp_path, batch_size=4).dead_layers == 11
    silent = descriptor({"a": torch.zeros(2, 3)}, FeatureIndex(("a",), (3,)))
    assert silent.tolist() == [[0.0] * 3] * 2


class Block(nn.Module):
    """A residual block whose last rectifier is a function, and whose sum no module returns."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.relu(self.conv(self.relu(x))))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.block = Block()
        self.drop = nn.Dropout()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.aside = nn.Conv2d(4, 9, 1)
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(self.stem(x))
        self.aside(x)
        return self.fc(torch.flatten(self.pool(self.drop(x)), 1)).softmax(1)


class Branching(nn.Module):
    """Cannot be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.relu, self.fc = nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.conv(x))
        if float(x.sum()) > -1:
            x = F.relu(x)
        return self.fc(x.mean((2, 3)))


def test_blocks_stand_for_operations_and_repeated_modules_count_every_call() -> None:
    performer = as_performer(Residual().eval())
    index = feature_index(performer)
    assert index.layers == ("stem", "block.relu", "block.conv", "block.relu_1", "block", "pool")
    assert descriptor_layers(performer, DescriptorConfig(layers="activations")) == (
        "block.relu",
        "block.relu_1",
        "block",
    )
    x, logits = image_descriptors(performer, torch.randn(2, 3, 16, 16), index)
    assert x.shape == (2, 24)
    assert logits.shape == (2, 3)


class Tokens(nn.Module):
    """Has an output that is neither maps nor a vector."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.mix, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.mix(self.conv(x).flatten(2).transpose(1, 2)).mean(1))


def test_other_shapes_and_the_result_itself_are_left_out() -> None:
    assert descriptor_layers(as_performer(Tokens().eval())) == ("conv",)
    assert descriptor_layers(as_performer(nn.Sequential(nn.ReLU(), nn.AvgPool2d(2)))) == ("0",)
    shrinking = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(14), nn.AdaptiveAvgPool2d(2), nn.Conv2d(4, 2, 2))
    assert descriptor_layers(as_performer(shrinking)) == ("0", "2")  # 16 px give 14x14 cells: the first pooling is idle


def test_a_network_without_a_graph_is_read_by_its_modules() -> None:
    performer = as_performer(Branching().eval())
    index = feature_index(performer)
    assert index == FeatureIndex(("conv", "relu"), (4, 4))
    assert descriptor_layers(performer, DescriptorConfig(layers="activations")) == ("relu",)
    assert image_descriptors(performer, torch.randn(2, 3, 16, 16), index)[0].shape == (2, 8)


def test_layers_by_name_and_unknown_ones() -> None:
    performer = as_performer(Residual().eval())
    assert feature_index(performer, DescriptorConfig(layers=("block", "stem"))) == FeatureIndex(
        ("block", "stem"), (4, 4)
    )
    with pytest.raises(LayerError, match=r"Nearest: .*stem"):
        feature_index(performer, DescriptorConfig(layers=("stam",)))
    linear = as_performer(nn.Sequential(nn.Flatten(), nn.Linear(768, 2)))
    for layers in ("outputs", "activations", "convolutions"):
        with pytest.raises(LayerError, match=f"{layers} with modules"):
            feature_index(linear, DescriptorConfig(layers=layers))
    with pytest.raises(LayerError, match="class scores"):
        image_descriptors(
            as_performer(nn.Sequential(nn.Conv2d(3, 2, 3))), torch.zeros(1, 3, 9, 9), FeatureIndex(("0",), (2,))
        )
    with pytest.raises(LayerError, match="5 channels in stem, got 4"):
        image_descriptors(performer, torch.zeros(1, 3, 9, 9), FeatureIndex(("stem",), (5,)))


def test_configurations_are_checked_and_survive_json() -> None:
    for config in (DescriptorConfig(), DescriptorConfig.port_g(("a", "b")), DescriptorConfig.port_f()):
        assert DescriptorConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(InputError, match="descriptor fields"):
        DescriptorConfig.from_dict({"layer": "outputs"})
    with pytest.raises(InputError, match="at least one layer name"):
        DescriptorConfig(layers=())
    for make in (
        lambda: FeatureIndex(("a",), (1, 2)),
        lambda: FeatureIndex((), ()),
        lambda: FeatureIndex(("a", "a"), (1, 2)),
        lambda: FeatureIndex(("a",), (0,)),
        lambda: FeatureIndex.from_dict({"layers": ["a"]}),
        lambda: FeatureIndex(("a",), (2,)).feature("a", 2),
        lambda: FeatureIndex(("a",), (2,)).place(-1),
    ):
        with pytest.raises(InputError):
            make()
    with pytest.raises(LayerError, match="Nearest: conv1"):
        FeatureIndex(("conv1",), (2,)).rows("conv")
    index = FeatureIndex(("a",), (2,))
    with pytest.raises(LayerError, match="energies of a"):
        descriptor({"b": torch.ones(1, 2)}, index)
    with pytest.raises(InputError, match=r"\(image, 2\)"):
        descriptor({"a": torch.ones(1, 3)}, index)
    with pytest.raises(InputError, match="at least 0"):
        descriptor({"a": -torch.ones(1, 2)}, index)


def test_one_pass_gives_descriptors_peaks_and_scores(tiny, images, tmp_path) -> None:
    seen = []
    found = stream_responses(tiny, images, out=tmp_path, batch_size=4, progress=lambda *a: seen.append(a))
    assert seen == [(4, 11), (8, 11), (11, 11)]
    batch = tiny.preprocessing([images.read(i) for i in range(11)])
    output, taps = forward_taps(tiny, batch, found.index.layers)
    assert found.keys == tuple(images.keys)
    assert found.index.layers == (
        "conv1",
        "relu1",
        "conv2",
        "relu2",
        "conv3",
        "relu3",
        "pool3",
        "conv4",
        "relu4",
        "pool4",
    )
    assert np.allclose(found.descriptor, descriptor(taps, found.index), atol=1e-6)
    assert np.allclose(found.logits, output, atol=1e-5)
    assert isinstance(found.descriptor, np.memmap)
    assert found.peak is not None
    assert found.peak_cell is not None
    for layer in found.index.layers:
        rows, flat = found.index.rows(layer), taps[layer].flatten(2)
        assert np.allclose(found.peak[:, rows], flat.amax(2), atol=1e-5)
        cells = found.peak_cell[:, rows].astype(int)
        width = taps[layer].shape[3]
        at = torch.from_numpy(cells[..., 0] * width + cells[..., 1])
        assert torch.allclose(flat.gather(2, at[:, :, None])[:, :, 0], flat.amax(2), atol=1e-5)
    light = stream_responses(tiny, images, peaks=False)
    assert light.peak is None
    assert light.peak_cell is None
    assert np.allclose(light.descriptor, found.descriptor, atol=1e-6)


class Killed(Exception):
    pass


def test_a_killed_pass_goes_on_with_the_next_batch(tiny, images, tmp_path) -> None:
    def kill(done: int, _rows: int) -> None:
        if done == 8:
            raise Killed

    with pytest.raises(Killed):
        stream_responses(tiny, images, out=tmp_path / "a", batch_size=4, progress=kill)
    assert json.loads((tmp_path / "a" / RESPONSES).read_text())["rows_done"] == 8
    whole = stream_responses(tiny, images, out=tmp_path / "b", batch_size=4)
    seen: list[int] = []
    resumed = stream_responses(tiny, images, out=tmp_path / "a", batch_size=4, progress=lambda n, _: seen.append(n))
    assert seen == [11]
    for part in ("descriptor", "peak", "peak_cell", "logits"):
        assert np.array_equal(getattr(resumed, part), getattr(whole, part))
    assert resumed.dead_layers == whole.dead_layers
    seen.clear()
    stream_responses(tiny, images, out=tmp_path / "a", progress=lambda n, _: seen.append(n))
    assert not seen


def test_responses_of_another_configuration_are_refused(tiny, images, tmp_path) -> None:
    stream_responses(tiny, images, out=tmp_path)
    before = (tmp_path / RESPONSES).read_text()
    for change in (
        {"config": PLAIN},
        {"images": images.take([0, 1])},
        {"peaks": False},
        {"performer": dataclasses.replace(tiny, weights_sha256="0" * 64)},
    ):
        with pytest.raises(RunError, match="resume=False"):
            stream_responses(**{"performer": tiny, "images": images, "out": tmp_path, **change})
    assert (tmp_path / RESPONSES).read_text() == before
    fresh = stream_responses(tiny, images.take([0, 1]), PLAIN, out=tmp_path, resume=False, peaks=False)
    assert fresh.descriptor.shape[0] == 2
    assert not (tmp_path / "peak.npy").exists()


def test_a_corrupt_image_is_named_and_finished_batches_stay(tiny, tmp_path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    for index in range(6):
        Image.new("RGB", (20, 20), (index, 0, 0)).save(folder / f"{index}.png")
    (folder / "4.png").write_bytes(b"no image")
    with pytest.raises(ImageError, match=r"4\.png"):
        stream_responses(tiny, ImageSet.from_folder(folder), out=tmp_path / "out", batch_size=2)
    assert json.loads((tmp_path / "out" / RESPONSES).read_text())["rows_done"] == 4


def test_the_performer_is_left_as_it_was(images, tmp_path) -> None:
    net = Residual()
    net.train()
    net.drop.eval()
    net.fc.weight.requires_grad = False
    net.stem.weight.grad = torch.ones_like(net.stem.weight)
    net.stem.register_forward_hook(lambda *_: None)
    performer = as_performer(net)

    def state() -> tuple:
        return (
            weights_sha256(net),
            [m.training for m in net.modules()],
            [getattr(m, "inplace", None) for m in net.modules()],
            [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules()],
            [(p.requires_grad, id(p.grad), p.data_ptr()) for p in net.parameters()],
            torch.get_rng_state().tolist(),
            float(net.stem.weight.grad.sum()),
        )

    before = state()
    found = stream_responses(performer, images, batch_size=4)
    image_descriptors(performer, torch.randn(1, 3, 16, 16, generator=torch.Generator()), found.index)
    assert state() == before
    with pytest.raises(InputError, match="finite"):
        image_descriptors(performer, torch.full((1, 3, 16, 16), torch.nan), found.index)
    with pytest.raises(Killed):
        stream_responses(performer, images, out=tmp_path, progress=lambda *_: (_ for _ in ()).throw(Killed))
    assert state() == before


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
def test_memory_does_not_grow_with_the_number_of_images(tmp_path) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4000, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4000, 2)).eval()
    images = ImageSet.from_arrays(np.zeros((800, 4, 4, 3), dtype=np.uint8))
    seen: list[int] = []

    def watch(*_: int) -> None:
        seen.append(int(Path("/proc/self/statm").read_text().split()[1]) * 4096)

    found = stream_responses(as_performer(net, 4), images, out=tmp_path, batch_size=16, progress=watch)
    assert found.peak_cell is not None
    assert found.descriptor.nbytes + found.peak_cell.nbytes > 50e6
    third = len(seen) // 3
    assert max(seen[-third:]) - max(seen[:third]) < 20e6


def test_labels_from_the_data_and_from_the_network(images) -> None:
    net = load_performer(nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    net = dataclasses.replace(net, class_names=("red fox", "Cat", "cow", "emu"))
    found = label_matrix(images, performer=net, classes=("cow", "cat", "emu"))
    assert found.classes == ("cow", "cat")
    assert found.outputs == (2, 1)
    assert found.absent == ("emu",)
    assert found.matrix.sum(0).tolist() == [7, 2]
    assert found.matrix[0].tolist() == [0, 0]
    assert label_matrix(images).classes == ("cat", "cow", "fox")
    logits = np.array([[0, 9, 0, 0], [0, 0, 1, 0], [0, 2, 1, 0]], dtype=np.float32)
    decided = label_matrix(source="predictions", logits=logits, performer=net)
    assert decided.classes == ("Cat", "cow")
    assert decided.outputs == (1, 2)
    assert decided.matrix.tolist() == [[1, 0], [0, 1], [1, 0]]
    assert label_matrix(source="predictions", logits=torch.from_numpy(logits)).classes == ("1", "2")
    with pytest.raises(InputError, match="logits="):
        label_matrix(source="predictions")
    with pytest.raises(InputError, match="images="):
        label_matrix()
    with pytest.raises(ImageError, match="an image of emu"):
        label_matrix(images, classes=("emu",))
    bare = ImageSet.from_arrays(np.zeros((2, 4, 4, 3), dtype=np.uint8))
    with pytest.raises(ImageError, match="a category for every image"):
        label_matrix(bare)


def test_categories_are_found_among_the_outputs() -> None:
    named = as_performer(nn.Conv2d(3, 3, 1), names=("tabby cat", "red_fox", "crane", "crane"))
    assert class_of_category(named, "Red fox") == 1
    assert class_of_category(named, "TABBY_CAT") == 0
    assert class_of_category(named, "2") == 2
    assert class_of_category(named, "4") is None
    assert class_of_category(named, "dog") is None
    assert class_of_category(named, "crane") is None
    assert class_of_category(as_performer(nn.Conv2d(3, 3, 1)), "12") == 12
    assert class_of_category(as_performer(nn.Conv2d(3, 3, 1)), "cat") is None


def planted(images: int, seed: int) -> tuple[Tensor, Tensor, FeatureIndex]:
    """Three classes, two features planted for each, in descriptors of 3 layers."""
    rng = np.random.default_rng(seed)
    index = FeatureIndex(("a", "b", "c"), (20, 20, 30))
    kind = rng.integers(0, 3, images)
    energy = rng.gamma(0.5, 1.0, (images, index.size))
    for j in range(3):
        for feature in (index.feature("a", j), index.feature("c", 5 + j)):
            energy[kind == j, feature] += rng.gamma(9.0, 2.0, int((kind == j).sum()))
    parts = {layer: torch.from_numpy(energy[:, index.rows(layer)]) for layer in index.layers}
    return descriptor(parts, index), torch.from_numpy(np.eye(3)[kind]), index


def test_the_selection_names_the_planted_features() -> None:
    x, labels, index = planted(400, 0)
    found = select_relevant(x, labels, 10.0, index=index, classes=("fox", "cat", "cow"))
    for j, name in enumerate(found.classes):
        relevant = found.relevant(name)
        assert {place[:2] for place in relevant[:2]} == {("a", j), ("c", 5 + j)}
        assert [w for *_, w in relevant] == sorted((w for *_, w in relevant), reverse=True)
        assert len(relevant) == int(found.solution.nonzeros[j])
        assert found.relevant(j) == relevant
        r = found.contribution(x, name)
        assert torch.allclose(r.sum(1).double(), x.double() @ found.weights[:, j], atol=1e-5)
    assert torch.equal(found.weights, found.solution.weights)
    with pytest.raises(InputError, match="Nearest: fox"):
        found.relevant("fix")
    with pytest.raises(InputError, match="from 0 to 2"):
        found.relevant(3)
    with pytest.raises(InputError, match="index="):
        select_relevant(x, labels, 10.0)
    with pytest.raises(InputError, match="70 features"):
        select_relevant(x[:, 1:], labels, 10.0, index=index)
    with pytest.raises(InputError, match="labels of 2 classes"):
        select_relevant(x, labels, 10.0, index=index, classes=("a", "b"))


def test_T8_shuffled_labels_fall_to_chance() -> None:
    x, labels, index = planted(600, 0)
    held, truth, _ = planted(600, 1)
    found = select_relevant(x, labels, 10.0, index=index)
    told = readout(found, held, truth, fitted=(x, labels), generator=torch.Generator().manual_seed(0))
    assert told.accuracy > 0.95
    assert told.chance == pytest.approx(1 / 3)
    assert told.interval[0] < told.accuracy <= told.interval[1]
    assert told.shuffled is not None
    assert len(told.correct) == len(told.shuffled) == 600
    assert abs(float(told.shuffled.double().mean()) - told.chance) < 0.08
    assert told.majority == pytest.approx(float(truth.mean(0).max()))
    truth[5] = 0
    assert len(readout(found, held, truth).correct) == 599
    with pytest.raises(InputError, match="generator"):
        readout(found, held, truth, fitted=(x, labels))
    with pytest.raises(InputError, match="image of a class"):
        readout(found, held, truth * 0)


def test_from_images_to_relevant_features(tiny, few_flowers, tmp_path) -> None:
    responses = stream_responses(tiny, few_flowers, out=tmp_path)
    labels = label_matrix(few_flowers)
    found = select_relevant(responses, labels, 10.0)
    assert found.classes == labels.classes == ("petal-blue", "petal-red")
    assert found.index == responses.index
    assert found.solution.converged.all()
    told = readout(found, responses, labels)
    assert told.accuracy > 0.8


def test_arguments_are_checked(tiny, images) -> None:
    with pytest.raises(InputError, match="batch_size"):
        stream_responses(tiny, images, batch_size=0)
    assert relevance._key(" Red_  fox ") == "red fox"
