"""Train a performer for categories of photos: a copy with new last layers, learned as the explainer papers did.

What stays fixed is computed once: with ``train_from`` the maps of each photo and its mirror lie on disk, and an epoch
reads batches. Everything drawn in an epoch comes from (seed, epoch), and a checkpoint holds weights and momentum, so
that a run which was killed ends, on the same machine and with the same number of threads, with the same bits as one
that was not.
"""

from __future__ import annotations

import copy
import math
import shutil
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from PIL import Image, ImageOps
from torch import Tensor, nn

from partlens.data.images import ImageSet
from partlens.performer.activations import RowFile, batches, open_maps, stream_maps
from partlens.performer.borrowing import borrowed, random_state_kept
from partlens.performer.finetune_config import FinetuneConfig
from partlens.performer.surgery import cut
from partlens.performer.taps import place_of
from partlens.performer.tracing import trace
from partlens.performer.zoo import PaperNet, Performer, Preprocessing, first_line, module_of, with_outputs
from partlens.progress import Progress
from partlens.store import SCHEMA, content_hash, read_checkpoint, read_json, write_json, write_tensors
from partlens.vocabulary import InputError, LayerError, StorageError, WeightsError, expected, listed

CHECKPOINT = "checkpoint.json"
OTHER = -1
"""Label of a photo that shows none of the categories."""

_FRAMES = "frames"
_DEVIATION = 0.01
_AHEAD = 2  # batches prepared in advance
_READ_AT_ONCE = 128
_HELD_BATCH = 64
_DROPOUT = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
_WATCHING = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_hooks",
    "_backward_pre_hooks",
)

EpochReport = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, eq=False)
class Prepared:
    """A copy of a performer that is ready to be trained.

    Attributes:
        module: the copy with its new layers, in eval mode, float32 on the CPU.
        output_layer: the last layer, by name.
        new_layers: layers that were drawn anew, in execution order.
        source: the tap whose output is computed once; ``None`` where all layers are trained.
    """

    module: nn.Module
    output_layer: str
    new_layers: tuple[str, ...]
    source: str | None


@dataclass(frozen=True, eq=False)
class Finetuned:
    """A trained network.

    Attributes:
        module: in eval mode, on the CPU.
        history: one mapping per epoch: number, phase, mean loss, share of wrong answers in training, rate, seconds.
    """

    module: nn.Module
    history: tuple[dict[str, Any], ...]


# The network


def _copied(performer: Performer) -> nn.Module:
    """Copy a network without the hooks that watch it and without gradients; float32, CPU, eval."""
    module = module_of(performer)
    memo: dict[int, Any] = {}
    for each in module.modules():
        memo.update({id(each.__dict__[n]): OrderedDict() for n in _WATCHING if n in each.__dict__})
    try:
        copied = copy.deepcopy(module, memo)
    except RuntimeError as error:
        raise LayerError(
            expected(
                f"a network that can be copied, to train {type(module).__name__}",
                first_line(error),
                "Remove weight normalisation first (torch.nn.utils.remove_weight_norm)",
            )
        ) from error
    for parameter in copied.parameters():
        parameter.grad = None
    return copied.cpu().float().eval()


def _run_blank(module: nn.Module, size_px: tuple[int, int]) -> Any:
    with torch.no_grad():
        return module(torch.zeros(1, 3, *size_px))


def _layers_in_order(module: nn.Module, size_px: tuple[int, int]) -> list[str]:
    """Names of the linear layers and convolutions, in the order in which a pass calls them last."""
    called: dict[str, None] = {}
    handles = []
    for name, layer in module.named_modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)):

            def note(_layer: nn.Module, _inputs: Any, _output: Any, name: str = name) -> None:
                called.pop(name, None)
                called[name] = None

            handles.append(layer.register_forward_hook(note))
    try:
        _run_blank(module, size_px)
    except Exception as error:
        raise LayerError(
            expected(
                f"an input size that {type(module).__name__} accepts",
                f"{size_px[0]}x{size_px[1]} px ({first_line(error)})",
                "Give the preprocessing the network was made for",
            )
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    return list(called)


def _closing_layers(module: nn.Module, order: Sequence[str]) -> list[str]:
    """Return the fully connected layers at the end that stand side by side (fc6, fc7, fc8), in order."""
    found: list[str] = []
    for name in reversed(order):
        beside = not found or name.rpartition(".")[0] == found[0].rpartition(".")[0]
        if not beside or not isinstance(module.get_submodule(name), nn.Linear):
            break
        found.insert(0, name)
    return found


def fixed_before(module: nn.Module, layer: str) -> str:
    """Find the last tap before a layer through which everything passes.

    Args:
        module: the network; left as it was.
        layer: by name; a block stands for its first operation.

    Returns:
        The name of the tap.

    Raises:
        LayerError: an unknown layer; one before which there is no such tap; a network that cannot be traced.

    Example:
        >>> fixed_before(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2)), "3")
        '2'
    """
    traced = trace(module)
    traced.find(layer)  # refuses an unknown name with the nearest ones
    inside = [traced.index(node) for node, own in traced.names.items() if own == layer or own.startswith(f"{layer}.")]
    if inside:
        for node in reversed(traced.cut_nodes()):
            if traced.index(node) < min(inside):
                try:
                    place_of(module, traced.label(node))
                except LayerError:  # an operation without a module, such as flatten
                    continue
                return traced.label(node)
    raise LayerError(
        expected(
            "a layer with others before it that everything passes",
            layer,
            "Leave train_from out to train all layers, or name a later one",
        )
    )


def prepare_network(performer: Performer, outputs: int, config: FinetuneConfig) -> Prepared:
    """Copy a network and give it new last layers.

    Args:
        performer: the network with the given weights; it is not changed.
        outputs: number of outputs of the copy, at least 1.
        config: which layers are new, and which are trained.

    Returns:
        The copy. New weights are drawn from N(0, 0.01²), biases are 0.

    Raises:
        InputError: no outputs, or no fully connected layers where they are asked for.
        LayerError: ``train_from`` is unknown or comes after a new layer; a network whose last layer does not decide
            the number of outputs.
        WeightsError: a layer without trained weights would not be drawn anew.

    Source:
        CVPR 2018, Sec. 5 (fully connected layers re-initialised); N(0, 0.01²) as in the released code.
    """
    if outputs < 1:
        raise InputError(expected("at least 1 output", outputs, "Name a category"))
    module = _copied(performer)
    size_px = performer.preprocessing.size_px
    order = _layers_in_order(module, size_px)
    if not order:
        raise LayerError(
            expected("a network with a linear layer or a convolution", type(module).__name__, "Use another network")
        )
    closing = _closing_layers(module, order)
    if config.new_layers == "fully-connected" and len(closing) < 2:
        raise InputError(
            expected(
                f"several fully connected layers side by side at the end of {performer.name}",
                listed(closing) or "none",
                "Choose new_layers last",
            )
        )
    many = config.new_layers == "fully-connected" or (config.new_layers == "auto" and len(closing) >= 3)
    new = tuple(closing) if many else (order[-1],)
    if left := [name for name in performer.untrained_layers if name not in new]:
        raise WeightsError(
            expected(f"trained weights of {listed(left)}", "none in the file", "Choose new_layers fully-connected")
        )
    with random_state_kept():
        with_outputs(module, order[-1], outputs)
    if isinstance(module, PaperNet):
        module.num_classes = outputs
    generator = torch.Generator().manual_seed(config.seed)
    with torch.no_grad():
        for name in new:
            layer = module.get_submodule(name)
            assert isinstance(layer, (nn.Linear, nn.Conv2d))
            layer.weight.normal_(0, _DEVIATION, generator=generator)
            if layer.bias is not None:
                layer.bias.zero_()
    given = _run_blank(module, size_px)
    if not isinstance(given, Tensor) or tuple(given.shape) != (1, outputs):
        shape = tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__
        raise LayerError(
            expected(
                f"a network whose last layer gives its outputs, (image, {outputs})",
                f"{shape} with {order[-1]} replaced",
                "Wrap the network so that it returns the scores alone",
            )
        )
    source = None if config.train_from is None else fixed_before(module, config.train_from)
    if source is not None:
        trained = {name.rpartition(".")[0] for name, _ in _upper(module, source).named_parameters()}
        if early := [name for name in new if name not in trained]:
            raise LayerError(
                expected(f"train_from at or before {early[0]}, which is drawn anew", config.train_from, "Start there")
            )
    return Prepared(module, order[-1], new, source)


def _upper(module: nn.Module, source: str | None) -> nn.Module:
    """Return what is trained: the network itself, or a copy of its layers after a tap."""
    return module if source is None else cut(module, source, ["output"])


def _scores(trained: nn.Module, batch: Tensor) -> Tensor:
    result = trained(batch)
    scores: Tensor = result[0] if isinstance(result, tuple) else result
    return scores


# The photos


def epoch_photos(
    labels: Int[Tensor, " photo"], outputs: int, config: FinetuneConfig, epoch: int
) -> tuple[Int[Tensor, " draw"], Bool[Tensor, " draw"]]:
    """Draw the order of an epoch: every photo at least once, those of rare categories several times.

    Args:
        labels: number of each photo's category, :data:`OTHER` for none.
        outputs: of the network; with 1, categories are balanced by ``positive_share``, else equally.
        config: seed, shares and mirrors.
        epoch: its number.

    Returns:
        Positions in ``labels``, and whether each is shown mirrored.

    Example:
        >>> photos, _ = epoch_photos(torch.tensor([0, -1, -1, -1]), 1, FinetuneConfig(), 1)
        >>> sorted(photos.tolist())
        [0, 0, 0, 1, 2, 3]
    """
    generator = _generator(config.seed, epoch)
    groups = [torch.nonzero(labels == value).flatten() for value in labels.unique()]
    sizes = [len(group) for group in groups]
    if outputs == 1 and len(groups) == 2:
        share = config.positive_share  # groups stand in the order others, category
        positive = max(sizes[1], math.ceil(sizes[0] * share / (1 - share)))
        sizes = [max(sizes[0], round(positive * (1 - share) / share)), positive]
    else:
        sizes = [max(sizes)] * len(groups)
    drawn = []
    for group, size in zip(groups, sizes, strict=True):
        rounds = [torch.randperm(len(group), generator=generator) for _ in range(math.ceil(size / len(group)))]
        drawn.append(group[torch.cat(rounds)[:size]])
    photos = torch.cat(drawn)
    photos = photos[torch.randperm(len(photos), generator=generator)]
    mirrored = torch.randint(2, (len(photos),), generator=generator).bool()
    return photos, mirrored if config.mirror else torch.zeros_like(mirrored)


def _generator(seed: int, epoch: int) -> torch.Generator:
    return torch.Generator().manual_seed((seed * 1_000_003 + epoch * 7_919 + 29) % (2**63))


@dataclass(frozen=True)
class _View:
    """Makes view 0, what the network sees of a photo, and view 1, its mirror."""

    preprocessing: Preprocessing

    def __call__(self, image: Image.Image, view: int) -> Image.Image:
        frame = self.preprocessing.frame(image)
        return ImageOps.mirror(frame) if view else frame


def _maps(
    performer: Performer,
    source: str,
    images: ImageSet,
    config: FinetuneConfig,
    folder: Path,
    device: torch.device,
    progress: Progress,
) -> np.ndarray:
    """Compute the fixed layers' output for each photo and its mirror once; row ``photo * views + view``."""
    module = performer.module if device.type == "cpu" else _copied(performer).to(device)
    as_framed = replace(performer.preprocessing, resize="squash", resize_px=None)  # views are frames already
    framed = replace(performer, module=module, preprocessing=as_framed)
    views = 2 if config.mirror else 1
    with progress.task(f"computing {source} once", len(images) * views) as advance:
        stream_maps(
            framed,
            images,
            [source],
            folder,
            dtype=config.cache_precision,
            augment=_View(performer.preprocessing),
            views=views,
            progress=lambda done, _: advance(done),
        )
    return open_maps(folder)[source]


def _frames(images: ImageSet, preprocessing: Preprocessing, folder: Path, progress: Progress) -> np.ndarray:
    """Decode each photo once and keep what the network sees of it as bytes on disk."""
    rows, cols = preprocessing.size_px
    path, state = folder / f"{_FRAMES}.npy", folder / f"{_FRAMES}.json"
    wanted = {"schema": SCHEMA, "images": images.fingerprint(), "preprocessing": preprocessing.to_dict()}
    if not state.exists() or read_json(state) != wanted:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _check_space(folder, len(images) * rows * cols * 3)
            path.unlink(missing_ok=True)
            kept = RowFile(path, (len(images), rows, cols, 3), "uint8")
            with (
                ThreadPoolExecutor(4, thread_name_prefix="partlens-decode") as pool,
                progress.task("reading photos", len(images)) as advance,
            ):
                for start in range(0, len(images), _READ_AT_ONCE):
                    part = range(start, min(start + _READ_AT_ONCE, len(images)))
                    kept.write(start, np.stack(list(pool.map(lambda i: _frame(images, i, preprocessing), part))))
                    advance(part.stop)
            kept.settle()
            kept.close()
        except StorageError:
            raise
        except OSError as error:
            raise StorageError(
                expected(f"to write frames in {folder}", error.strerror or str(error), "Free space")
            ) from error
        write_json(state, wanted)
    frames: np.ndarray = np.load(path, mmap_mode="r")
    return frames


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise StorageError(
            expected(f"{needed / 1e9:.1f} GB free for frames in {folder}", f"{free / 1e9:.1f} GB", "Free space")
        )


def _frame(images: ImageSet, index: int, preprocessing: Preprocessing) -> np.ndarray:
    return np.asarray(preprocessing.frame(images.read(index)))


_Read = Callable[[Tensor, Tensor], Tensor]


def _reader_of_maps(maps: np.ndarray, views: int) -> _Read:
    def read(photos: Tensor, mirrored: Tensor) -> Tensor:
        return _gathered(maps, (photos * views + mirrored.long()).numpy()).float()

    return read


def _reader_of_frames(frames: np.ndarray, preprocessing: Preprocessing) -> _Read:
    def read(photos: Tensor, mirrored: Tensor) -> Tensor:
        shown = _gathered(frames, photos.numpy())
        shown[mirrored] = shown[mirrored].flip(2)
        return preprocessing.of_bytes(shown)

    return read


def _gathered(array: np.ndarray, rows: np.ndarray) -> Tensor:
    """Read rows in the file's order, which a memory map serves best, and put them back in the order asked."""
    order = np.argsort(rows, kind="stable")
    read = torch.from_numpy(np.asarray(array[rows[order]]))
    return read[torch.from_numpy(np.argsort(order, kind="stable"))]


def _prepared_batches(
    read: _Read, photos: Tensor, mirrored: Tensor, batch_size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the photos of each batch and its input, read a little ahead of the network."""
    parts = deque(zip(photos.split(batch_size), mirrored.split(batch_size), strict=True))
    waiting: deque[tuple[Tensor, Future[Tensor]]] = deque()
    with ThreadPoolExecutor(1, thread_name_prefix="partlens-batch") as pool:
        while parts or waiting:
            while parts and len(waiting) < _AHEAD:
                part, flags = parts.popleft()
                waiting.append((part, pool.submit(read, part, flags)))
            part, future = waiting.popleft()
            yield part, future.result()


# Training


def category_loss(scores: Float[Tensor, "image output"], labels: Int[Tensor, " image"], loss: str) -> Float[Tensor, ""]:
    """Return the mean loss of a batch.

    Logistic: ``sum_c log(1 + exp(-y_c s_c))`` with ``y_c`` = 1 where the photo shows category c, else -1; softmax:
    cross-entropy in nats.

    Args:
        scores: the network's outputs.
        labels: number of each photo's category, :data:`OTHER` for none (logistic only).
        loss: ``logistic`` or ``softmax``.

    Returns:
        Mean over the images, at least 0.

    Source:
        CVPR 2018, Sec. 5; MatConvNet's ``logistic`` and ``softmaxlog``.

    Example:
        >>> round(float(category_loss(torch.tensor([[0.0], [0.0]]), torch.tensor([0, -1]), "logistic")), 4)
        0.6931
    """
    if loss == "softmax":
        return F.cross_entropy(scores, labels)
    signs = 2.0 * (labels[:, None] == torch.arange(scores.shape[1], device=labels.device)).to(scores.dtype) - 1
    return F.softplus(-signs * scores).sum(1).mean()


def wrong_answers(scores: Float[Tensor, "image output"], labels: Int[Tensor, " image"]) -> Bool[Tensor, " image"]:
    """Say for each image whether the answer is wrong.

    With one output the answer is its sign (0 counts as "no"), with several the largest one.

    Example:
        >>> wrong_answers(torch.tensor([[2.0], [2.0]]), torch.tensor([0, -1])).tolist()
        [False, True]
    """
    if scores.shape[1] == 1:
        return (scores[:, 0] > 0) != (labels == 0)
    return scores.argmax(1) != labels


def _groups(trained: nn.Module, new_layers: Sequence[str], config: FinetuneConfig) -> list[dict[str, Any]]:
    """Sort parameters by rate and decay; what has no rate needs no gradient."""
    new = tuple(f"{name}." for name in new_layers)
    chosen: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in trained.named_parameters():
        fresh = name.startswith(new)
        share = 1.0 if fresh else config.rate_kept
        parameter.requires_grad_(share > 0)
        if share > 0:
            decay = 0.0 if fresh and parameter.ndim == 1 else config.weight_decay
            chosen.setdefault((share, decay), []).append(parameter)
    return [{"params": p, "share": share, "weight_decay": decay} for (share, decay), p in chosen.items()]


def _learning(trained: nn.Module) -> None:
    """Switch dropout layers on and nothing else: running statistics of norm layers stay those of the given weights."""
    trained.eval()
    for each in trained.modules():
        if isinstance(each, _DROPOUT):
            each.train()


class _Run:
    """One training with its state on disk."""

    def __init__(
        self,
        performer: Performer,
        prepared: Prepared,
        images: ImageSet,
        labels: Tensor,
        outputs: int,
        config: FinetuneConfig,
        folder: Path,
        cache: Path | None,
        device: torch.device,
        progress: Progress,
    ) -> None:
        self.cache = folder / "maps" if cache is None else cache
        self.performer, self.prepared, self.images, self.labels = performer, prepared, images, labels
        self.outputs, self.config, self.folder, self.device, self.progress = outputs, config, folder, device, progress
        self.history: list[dict[str, Any]] = []
        self.fingerprint = content_hash(
            {
                "performer": performer.weights_sha256,
                "preprocessing": performer.preprocessing.to_dict(),
                "images": images.fingerprint(),
                "labels": labels.tolist(),
                "outputs": outputs,
                "config": config.to_dict(),
            }
        )
        self.late = False
        self.begin(late=False)

    def begin(self, *, late: bool) -> None:
        """Start a phase: only the layers from ``train_from`` on, or all."""
        if late and not self.late:
            self.close()
        self.late = late
        source = None if late else self.prepared.source
        self.trained = _upper(self.prepared.module, source).to(self.device)
        self.optimiser = torch.optim.SGD(
            _groups(self.trained, self.prepared.new_layers, self.config),
            lr=self.config.learning_rate,
            momentum=self.config.momentum,
            fused=True,
        )

    def close(self) -> None:
        """Bring what was learned back into the network, on the CPU."""
        learned = {name: value.cpu() for name, value in self.trained.state_dict().items()}
        self.prepared.module.cpu().load_state_dict(learned, strict=False)

    def phase(self, *, late: bool) -> _Read:
        """Enter a phase, if it is not the present one, and open its cache, filling it first."""
        if late and not self.late:
            self.begin(late=True)
        source = None if self.late else self.prepared.source
        preprocessing = self.performer.preprocessing
        if source is None:
            return _reader_of_frames(_frames(self.images, preprocessing, self.folder, self.progress), preprocessing)
        maps = _maps(self.performer, source, self.images, self.config, self.cache, self.device, self.progress)
        return _reader_of_maps(maps, 2 if self.config.mirror else 1)

    def restore(self) -> None:
        """Continue from a checkpoint if there is one.

        Raises:
            RunError: the checkpoint belongs to another configuration.
        """
        remedy = "Choose another --out file, or delete this folder"
        found = read_checkpoint(self.folder / CHECKPOINT, self.fingerprint, remedy)
        if found is None:
            return
        state, tensors = found
        self.history = list(state["history"])
        if len(self.history) > self.config.epochs:
            self.begin(late=True)
        network = {n.removeprefix("network."): v for n, v in tensors.items() if n.startswith("network.")}
        self.trained.load_state_dict(network)
        for name, parameter in self.trained.named_parameters():
            if (momentum := tensors.get(f"momentum.{name}")) is not None:
                self.optimiser.state[parameter]["momentum_buffer"] = momentum.to(self.device)

    def save(self) -> None:
        """Write a checkpoint: tensors under a new name first, then the state that points to them."""
        tensors = {f"network.{name}": value for name, value in self.trained.state_dict().items()}
        for name, parameter in self.trained.named_parameters():
            if isinstance(momentum := self.optimiser.state.get(parameter, {}).get("momentum_buffer"), Tensor):
                tensors[f"momentum.{name}"] = momentum
        name = f"checkpoint-{len(self.history) % 2}.safetensors"
        write_tensors(self.folder / name, tensors)
        content = {"schema": SCHEMA, "fingerprint": self.fingerprint, "tensors": name, "history": self.history}
        write_json(self.folder / CHECKPOINT, content)

    def epoch(self, number: int, read: _Read) -> dict[str, Any]:
        """Run one epoch and return its record."""
        photos, mirrored = epoch_photos(self.labels, self.outputs, self.config, number)
        rate = self.config.rate_of_epoch(number)
        for group in self.optimiser.param_groups:
            group["lr"] = rate * group["share"]
        started = time.monotonic()
        total, wrong = 0.0, 0
        _learning(self.trained)
        with random_state_kept():
            torch.manual_seed(self.config.seed * 7_919 + number)  # dropout draws from the global state
            for part, batch in _prepared_batches(read, photos, mirrored, self.config.batch_size):
                loss, missed = self._step(batch.to(self.device), self.labels[part].to(self.device))
                total += loss * len(part)
                wrong += missed
        return {
            "epoch": number,
            "phase": "all" if self.late or self.prepared.source is None else "upper",
            "loss": total / len(photos),
            "wrong_frac": wrong / len(photos),
            "draws": len(photos),
            "learning_rate": rate,
            "seconds": round(time.monotonic() - started, 3),
        }

    def _step(self, batch: Tensor, labels: Tensor) -> tuple[float, int]:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bfloat16"):
            scores = _scores(self.trained, batch)
        scores = scores.float()
        loss = category_loss(scores, labels, self.config.loss)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise InputError(
                expected("a finite loss", f"{value} in epoch {len(self.history) + 1}", "Lower the learning rate")
            )
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        self.optimiser.step()
        return value, int(wrong_answers(scores.detach(), labels).sum())


def finetune(
    performer: Performer,
    prepared: Prepared,
    images: ImageSet,
    labels: Int[Tensor, " photo"],
    config: FinetuneConfig,
    folder: Path,
    *,
    cache: Path | None = None,
    device: str | torch.device = "cpu",
    report: EpochReport | None = None,
    progress: Progress | None = None,
) -> Finetuned:
    """Train a prepared network; continue where a killed run stopped.

    SGD with momentum. Dropout layers are on; norm layers keep the running statistics of the given weights, of which
    small batches would make a worse estimate, and only their scale and shift are learned.

    Args:
        performer: the network that was copied; it computes the maps that stay fixed and is left as it was.
        prepared: from :func:`prepare_network`; its ``module`` is trained in place.
        images: training photos. They are decoded once, to bytes on disk, and read batch by batch.
        labels: number of each photo's category, :data:`OTHER` for none.
        config: the training.
        folder: for caches and checkpoints.
        cache: folder for the maps of fixed layers, which others on the same photos may share; in ``folder`` when left
            out.
        device: where it is trained: ``cpu``, ``cuda``, ``cuda:1``.
        report: gets each epoch's record; an exception from it ends training with the last checkpoint intact.
        progress: how to show progress; silent when left out.

    Returns:
        The network and its history.

    Raises:
        ImageError: a photo that cannot be read.
        InputError: labels that do not fit, or a loss that is not finite.
        RunError: ``folder`` holds a checkpoint of another configuration.
        StorageError: the disk is full; the last checkpoint stays.
    """
    outputs = int(_run_blank(prepared.module, performer.preprocessing.size_px).shape[1])
    lowest = 0 if config.loss == "softmax" else OTHER
    if len(labels) != len(images) or not len(labels):
        raise InputError(expected(f"{len(images)} labels, one per photo", len(labels), "Give one label per photo"))
    if int(labels.min()) < lowest or int(labels.max()) >= outputs or len(labels.unique()) < 2:
        raise InputError(
            expected(
                f"labels of at least two kinds from {lowest} to {outputs - 1}",
                listed([str(int(v)) for v in labels.unique()]),
                "Add photos of another category",
            )
        )
    show = progress or Progress.silent()
    run = _Run(performer, prepared, images, labels, outputs, config, folder, cache, torch.device(device), show)
    run.restore()
    for late, first, last in ((False, 1, config.epochs), (True, config.epochs + 1, config.total_epochs)):
        numbers = range(max(first, len(run.history) + 1), last + 1)
        if not numbers:
            continue
        read = run.phase(late=late)
        with show.task("training all layers" if late else "training", last) as advance:
            for number in numbers:
                record = run.epoch(number, read)
                run.history.append(record)
                run.save()
                remark = f"loss {record['loss']:.3f}  wrong {record['wrong_frac']:.1%}  {record['seconds']:.1f} s"
                advance(number, remark)
                if report is not None:
                    report(record)
    run.close()
    module = prepared.module.eval()
    for parameter in module.parameters():
        parameter.requires_grad = True
        parameter.grad = None
    return Finetuned(module, tuple(run.history))


@torch.no_grad()
def category_scores(
    performer: Performer, images: ImageSet, *, device: str | torch.device = "cpu", progress: Progress | None = None
) -> Float[Tensor, "image output"]:
    """Return a network's outputs for photos, read in a stream.

    Args:
        performer: the network; left as it was.
        images: the photos.
        device: where it runs.
        progress: how to show progress; silent when left out.

    Returns:
        The outputs on the CPU, photos in their order.

    Raises:
        ImageError: a photo that cannot be read.
    """
    show = progress or Progress.silent()
    found: list[Tensor] = []
    with (
        borrowed(module_of(performer), copy_weights=False) as network,
        show.task("scoring held-out photos", len(images)) as advance,
    ):
        network.to(device)
        for start, batch in batches(performer, images, range(len(images)), _HELD_BATCH):
            found.append(network(batch.to(device)).float().cpu())
            advance(start + len(batch))
    return torch.cat(found)
