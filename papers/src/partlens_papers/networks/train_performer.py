"""The verb train-performer: a network for categories of photos, as the explainer papers made theirs.

Torch is imported when the verb runs, not when this module is read, so that help is shown at once.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from partlens.errors import BACKGROUND, ImageError, InputError, RunError, expected, listed
from partlens.progress import Progress
from partlens.records import SCHEMA, content_hash, plain, read_json, sole_writer, write_json, write_tensors
from partlens.run import command, versions
from partlens.verbs.runs import category_names, loaded, open_photos, performer_info
from partlens_papers.given import settings_of
from partlens_papers.networks.finetune_config import FinetuneConfig

if TYPE_CHECKING:
    from torch import Tensor, nn

    from partlens.data.images import ImageSet
    from partlens.network.performer import Performer

ALL = "all"
_ENTRY = "training"
_OWNER = "training.json"  # in the folder of caches and checkpoints: whose it is


@dataclass(frozen=True)
class _Task:
    """Which photos teach what: rows of the image set and their labels, for training and held out."""

    names: tuple[str, ...]
    train: tuple[int, ...]
    held: tuple[int, ...]
    train_labels: tuple[int, ...]
    held_labels: tuple[int, ...]
    against: tuple[str, ...] | None = None


def _single(images: ImageSet, category: str, against: tuple[str, ...] | None) -> _Task:
    """One category against all other photos, or against those of some categories."""
    rows: list[tuple[int, ...]] = []
    labels: list[tuple[int, ...]] = []
    wanted = None if against is None else set(against)
    for name in against or ():
        images.rows_of((name,), "train")  # refuses an unknown name with the nearest one
    if wanted is not None and category in wanted:
        raise InputError(expected("other categories than the one to learn (against)", category, "Leave it out"))
    for split in ("train", "test"):
        photos, others = images.rows_of((category,), split)
        others = tuple(i for i in others if wanted is None or images.categories[i] in wanted)
        for what, found in ((f"photos of {category}", photos), ("photos of other categories", others)):
            if not found:
                raise ImageError(
                    expected(f"{what} in the split {split}", "none", "Add such photos, or rows with that split")
                )
        own = set(photos)
        # In the set's order, so that the tasks of several categories read the same rows and can share their cache.
        rows.append(tuple(sorted((*photos, *others))))
        labels.append(tuple(0 if row in own else -1 for row in rows[-1]))
    return _Task((category,), rows[0], rows[1], labels[0], labels[1], against)


def _multi(images: ImageSet, categories: str | Sequence[str]) -> _Task:
    """Several categories, told apart on their own photos only."""
    names = category_names(categories, images.category_counts())
    if names == (ALL,):
        names = tuple(name for name in images.category_counts() if name not in {"", BACKGROUND})
    if len(names) < 2:
        raise InputError(
            expected(
                "at least two categories to tell apart",
                listed(names) or "none",
                "Give category= (--category) to learn one against all other photos",
            )
        )
    number = {name: index for index, name in enumerate(names)}
    found: dict[str, tuple[int, ...]] = {}
    for split in ("train", "test"):
        rows: list[int] = []
        for name in names:
            photos = images.rows_of((name,), split)[0]
            if not photos:
                raise ImageError(
                    expected(f"photos of {name} in the split {split}", "none", "Add such photos, or omit it")
                )
            rows += photos
        found[split] = tuple(sorted(rows))
    labels = {split: tuple(number[images.categories[i]] for i in rows) for split, rows in found.items()}
    return _Task(names, found["train"], found["test"], labels["train"], labels["test"])


def held_out_scores(
    scores: Tensor, labels: Tensor, names: Sequence[str], loss: str, seed: int, photos: Tensor
) -> dict[str, Any]:
    """Measure a trained network on photos it has not learned from.

    Args:
        scores: outputs, (image, output).
        labels: number of each photo's category, -1 for none.
        names: of the categories.
        loss: ``logistic`` or ``softmax``; with several logistic outputs the single decisions are measured, too.
        seed: of the bootstrap.
        photos: an integer per row, equal for crops of one photo.

    Returns:
        Each value ``{value, interval, n, unit}`` with an interval of 95 %, shares in 0 to 1:

        - ``error``: wrong answers (Wilson): the sign with one output, the largest output with several;
          ``baseline_error``: of always answering the more frequent class of these photos;
        - ``missed``: by category, its photos that got another answer;
        - one output: ``false_alarms``: other photos taken for the category; ``balanced_error``: mean of both shares,
          0.5 for any constant answer (bootstrap over photos);
        - several logistic outputs: ``decision_error``: single yes-no answers that are wrong (bootstrap over photos);
          ``baseline_decision_error``: of always answering no.
    """
    import torch

    from partlens.estimate import bootstrap, proportion
    from partlens_papers.networks.finetune import wrong_answers

    wrong = wrong_answers(scores, labels).float()
    counts = torch.stack([(labels == value).sum() for value in labels.unique()])
    frequent = labels.unique()[counts.argmax()]
    found: dict[str, Any] = {
        "error": proportion(wrong, groups=photos).to_dict(),
        "baseline_error": proportion((labels != frequent).float(), groups=photos).to_dict(),
        "missed": {
            name: proportion(wrong[labels == i], groups=photos[labels == i]).to_dict() for i, name in enumerate(names)
        },
    }
    generator = torch.Generator().manual_seed(seed)
    if len(names) == 1:

        def balanced(rows: Tensor) -> float:
            chosen, own = wrong[rows], labels[rows] == 0
            return float((chosen[own].mean() + chosen[~own].mean()) / 2)

        found["false_alarms"] = proportion(wrong[labels != 0], groups=photos[labels != 0]).to_dict()
        found["balanced_error"] = bootstrap(
            balanced, len(labels), generator=generator, rounds=1000, groups=photos
        ).to_dict()
    elif loss == "logistic":
        truth = labels[:, None] == torch.arange(len(names))
        decisions = ((scores > 0) != truth).float().mean(1)
        found["decision_error"] = bootstrap(
            lambda rows: float(decisions[rows].mean()), len(labels), generator=generator, rounds=1000, groups=photos
        ).to_dict()
        found["baseline_decision_error"] = 1 / len(names)
    return found


def read_training(path: str | Path) -> dict[str, Any]:
    """Read the header of a file that :func:`train_performer` wrote.

    Args:
        path: the file.

    Returns:
        Class names, loss, settings, base weights, data, history and held-out scores.

    Raises:
        RunError: the file is missing, or was not written by ``train_performer``.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), "pt") as handle:
            text = dict(handle.metadata() or {}).get(_ENTRY)
        content = None if text is None else json.loads(text)
    except FileNotFoundError as error:
        raise RunError(expected(f"a file {path}", "nothing there", "Check the path")) from error
    except (SafetensorError, json.JSONDecodeError, OSError) as error:
        raise RunError(expected(f"a trained performer in {path}", str(error), "Train it again")) from error
    if not isinstance(content, dict):
        raise RunError(expected(f"a file of train-performer at {path}", "another file", "Choose another path"))
    return content


def _finished(out: Path, identity: str) -> bool:
    """Whether the file is there already; refuses one of another configuration."""
    if not out.exists():
        return False
    if read_training(out).get("identity") != identity:
        raise RunError(
            expected(
                f"a performer of this network, data and configuration in {out}",
                "one of another",
                "Choose another --out file, or delete this one",
            )
        )
    return True


def _claim(work: Path, identity: str) -> None:
    """Take a folder for one training; refuse one that holds anything else, which would be deleted with it."""
    owner = work / _OWNER
    if owner.is_file():
        if read_json(owner).get("identity") != identity:
            rule = f"a run of this model, data and configuration in {work}"
            remedy = "Choose another --out file, or delete this folder"
            raise RunError(expected(rule, "one of another configuration", remedy))
    elif any(not path.name.startswith(".") for path in work.iterdir()):  # locks and unfinished files are nobody's
        raise RunError(expected(f"a new folder {work}", "a folder with other files", "Choose another --out file"))
    else:
        write_json(owner, {"identity": identity})


def _task(
    images: ImageSet, category: str | None, categories: str | Sequence[str] | None, against: str | Sequence[str] | None
) -> _Task:
    """Return which photos teach what; says so where it was asked for wrongly."""
    if (category is None) == (categories is None):
        got = "neither" if category is None else "both"
        raise InputError(expected("either a category or several categories", got, "Give --category or --categories"))
    others = None if against is None else category_names(against, images.category_counts())
    if category is not None:
        return _single(images, category, others)
    if others is not None:
        raise InputError(expected("against with a single category only", listed(others), "Leave it out"))
    return _multi(images, categories or ())


def train_performer(
    model: str | nn.Module | Performer,
    data: str | Path | ImageSet,
    *,
    out: str | Path,
    category: str | None = None,
    categories: str | Sequence[str] | None = None,
    against: str | Sequence[str] | None = None,
    config: FinetuneConfig | Mapping[str, Any] | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
) -> Path:
    """Train a copy of a network for one category or several, and write one file that loads as a performer.

    Fully connected layers of AlexNet and VGG are drawn anew, of other networks the last layer; a file that holds the
    convolutions only (``partlens_papers.performers:alexnet_caffe@convs.safetensors``) is completed in this way.
    Training reads the split ``train``, the scores are of the split ``test``; all crops of one photo are on the same
    side. Run again with the same arguments, it goes on where it was stopped; a finished file is left as it is.

    Args:
        model: the network with the given weights; see :func:`partlens.layers`. It is not changed.
        data: a folder, a table or an :class:`~partlens.data.images.ImageSet`.
        out: the file, ``NAME.safetensors``; ``NAME.work`` next to it holds caches and checkpoints while it runs.
        category: one category against other photos: one output, logistic loss.
        categories: several, told apart on their own photos: a list, a text with commas, or ``all`` (every category but
            ``background``): one output each.
        against: categories whose photos count as others of ``category``, as a list or a text with commas; all when left
            out. The papers' negatives are ``background``.
        config: a whole configuration, or fields of :class:`~partlens_papers.networks.finetune_config.FinetuneConfig`.
        device: ``cpu`` or ``cuda``.
        progress: how to show progress; silent by default.

    Returns:
        The file. Load it as ``NETWORK@FILE`` (``torchvision:resnet18@FILE``), or with
        ``load_performer(module, weights=FILE)``; :func:`read_training` gives what its header says.

    Raises:
        ImageError: an unknown category, or no photos of it or of others in a split.
        InputError: neither or both of ``category`` and ``categories``, fewer than two categories, a loss that is not
            finite, or a setting out of range.
        LayerError: ``train_from`` is unknown or comes after a new layer.
        RunError: ``out`` or its folder belongs to another configuration.
        StorageError: the disk is full; the last checkpoint stays.

    Source:
        CVPR 2018 (arXiv 1710.00935), Sec. 5: convolutions from given weights, fully connected layers re-initialised,
        logistic loss; the explainer papers studied these networks. Where the released code differs, and where we do,
        is in :class:`~partlens_papers.networks.finetune_config.FinetuneConfig`. The authors' split leaks (several
        crops of one photo); ours is by photo.
    """
    import torch

    from partlens.evaluation.places import photo_numbers
    from partlens.network.performer import device_of, weights_sha256
    from partlens.network.weights import OUTPUT_LAYER
    from partlens_papers.networks.finetune import category_scores, finetune
    from partlens_papers.networks.finetune_network import prepare_network

    show, out = progress or Progress.silent(), Path(out)
    if out.suffix != ".safetensors":
        raise InputError(expected("a file NAME.safetensors", str(out), "Add the suffix"))
    settings = settings_of(FinetuneConfig, config)
    if category is not None and settings.loss == "softmax":
        raise InputError(expected("the logistic loss for a single category", "softmax", "Choose loss logistic"))
    where, performer = device_of(device), loaded(model)
    header = performer.preprocessing.to_metadata()  # refused before the work, where the header has no words for it
    images, dropped = open_photos(data)
    task = _task(images, category, categories, against)
    identity = content_hash(
        {
            "performer": performer.weights_sha256,
            "preprocessing": performer.preprocessing.to_dict(),
            "data": images.fingerprint(),
            "names": task.names,
            "labels": content_hash({"train": task.train, "labels": task.train_labels}),
            "config": dict(settings),
        }
    )
    if _finished(out, identity):
        show.say(f"{out} is finished already; nothing to do")
        return out
    prepared = prepare_network(performer, len(task.names), settings)
    show.say(
        f"{performer.name}: {listed(prepared.new_layers)} drawn anew; {settings.train_from or 'all layers'} "
        f"trained on {len(task.train)} photos for {listed(task.names)}"
    )
    work = out.with_suffix(".work")
    with sole_writer(work, "run"):
        _claim(work, identity)
        seen, labels = images.take(task.train), torch.tensor(task.train_labels)
        trained = finetune(performer, prepared, seen, labels, settings, work, device=where, progress=show)
        learned = dataclasses.replace(performer, module=trained.module, weights_sha256=weights_sha256(trained.module))
        outputs = category_scores(learned, images.take(task.held), device=where, progress=show)
        truth, crops = torch.tensor(task.held_labels), photo_numbers(images, task.held)
        content = {
            "schema": SCHEMA,
            "kind": "performer",
            "identity": identity,
            "command": command(),
            "versions": versions(),
            "base": plain(performer_info(performer)),
            "data": {
                "name": images.name,
                "fingerprint": images.fingerprint(),
                "categories": list(task.names),
                "against": None if task.against is None else list(task.against),
                "train_photos": _counts(task.names, task.train_labels),
                "held_photos": _counts(task.names, task.held_labels),
                "unreadable": plain(dropped),
            },
            "config": dict(settings),
            "new_layers": list(prepared.new_layers),
            "weights_sha256": learned.weights_sha256,
            "device": str(where),
            "seconds": round(sum(epoch["seconds"] for epoch in trained.history), 1),  # of all starts
            "history": list(trained.history),
            "held_out": held_out_scores(outputs, truth, task.names, settings.loss, settings.seed, crops),
        }
        header |= {
            "class_names": json.dumps(list(task.names)),
            "architecture": performer.name.partition("@")[0],
            OUTPUT_LAYER: prepared.output_layer,
            _ENTRY: json.dumps(content, allow_nan=False),
        }
        write_tensors(out, trained.module.state_dict(), header)
    shutil.rmtree(work)  # not while its lock is held, whose file some systems do not remove
    show.say(f"wrote {out}: {summary(content)}")
    return out


def _counts(names: Sequence[str], labels: Sequence[int]) -> dict[str, int]:
    """Count photos by category; others have an empty name."""
    counts = {name: labels.count(i) for i, name in enumerate(names)}
    return counts | ({"": others} if (others := labels.count(-1)) else {})


def print_performer(path: Path) -> None:
    """Print where a trained network is, and how it does on held-out photos."""
    sys.stdout.write(f"{path}\n{summary(read_training(path))}\n")


def summary(content: Mapping[str, Any]) -> str:
    """Say in one line how a trained network does on held-out photos.

    Args:
        content: from :func:`read_training`.
    """

    def shown(name: str) -> str:
        estimate = content["held_out"][name]
        low, high = estimate["interval"]
        return f"{100 * estimate['value']:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"

    held = content["held_out"]
    text = f"held-out error {shown('error')}, n = {held['error']['n']}; always the more frequent class: "
    text += f"{100 * held['baseline_error']['value']:.1f} %"
    if "balanced_error" in held:
        text += f"; balanced {shown('balanced_error')} (50 %)"
    if "decision_error" in held:
        text += f"; single decisions {shown('decision_error')} ({100 * held['baseline_decision_error']:.1f} %)"
    return text
