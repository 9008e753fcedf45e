"""The demo: flowers are drawn, a network is trained on them, its middle layer is explained, the page is written.

It needs no data, no weights and no network. The performer is a small convolutional network of the papers' kind; it
learns which colour the petals have, among flowers whose other parts and surroundings show the same colours, and so has
to find the petals. Nobody tells it where they are, and nobody tells the explainer.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from partlens.progress import Progress
from partlens.vocabulary import InputError, expected

if TYPE_CHECKING:
    from torch import nn

    from partlens.data.images import ImageSet

DEMO_FLOWERS = 1500
CATEGORY = "petal-red"
SIDE_PX = 112
EPOCHS = 14
_BATCH = 32
_RATE = 2e-3
# A smaller explainer than for photos: 64 filters at the tap, few candidates and votes, so that they stay different.
_EXPLAINER = {
    "epochs": 20,
    "warmup_epochs": 16,
    "views": 6,
    "candidates_per_filter": 1,
    "votes": 4,
    "diversity_target": 0.0,
    "diversity_weight": 20.0,
    "patience": 0,
}


def flower_network(outputs: int = 6) -> nn.Module:
    """Return the demo's performer, untrained: six convolutions, 14x14 cells at the tap ``relu4``.

    Args:
        outputs: number of categories.

    Returns:
        A sequential network for 112 px images.
    """
    from collections import OrderedDict

    from torch import nn

    layers: OrderedDict[str, nn.Module] = OrderedDict()
    plan = ((3, 24, 2, False), (24, 32, 1, True), (32, 48, 1, True), (48, 64, 1, False), (64, 64, 1, True))
    for number, (inputs, filters, stride, pooled) in enumerate(plan, start=1):
        layers[f"conv{number}"] = nn.Conv2d(inputs, filters, 3, stride, 1, bias=False)
        layers[f"norm{number}"] = nn.BatchNorm2d(filters)
        layers[f"relu{number}"] = nn.ReLU()
        if pooled:
            layers[f"pool{number}"] = nn.MaxPool2d(2)
    layers["conv6"] = nn.Conv2d(64, 96, 3, 1, 1)
    layers["relu6"] = nn.ReLU()
    layers["pool6"] = nn.AdaptiveAvgPool2d(1)
    layers["flatten"] = nn.Flatten()
    layers["classes"] = nn.Linear(96, outputs)
    return nn.Sequential(layers)


def train_flower_network(
    images: ImageSet, *, seed: int = 0, progress: Progress | None = None
) -> tuple[nn.Module, float]:
    """Train the demo's performer.

    Args:
        images: flowers with categories and splits.
        seed: of the weights and the order.
        progress: how to show progress.

    Returns:
        The network in eval mode and its accuracy on the flowers of the split ``test``.
    """
    import torch
    import torch.nn.functional as F

    from partlens.performer.borrowing import random_state_kept

    show = progress or Progress.silent()
    names = sorted(images.category_counts())
    preprocessing = _preprocessing()

    def load(rows: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        batch = preprocessing([images.read(i) for i in rows])
        return batch, torch.tensor([names.index(images.categories[i]) for i in rows])

    with random_state_kept():
        torch.manual_seed(seed)
        network = flower_network(len(names))
        with show.task("drawing flowers", 2) as advance:
            pictures, labels = load(images.indices(split="train"))
            advance(1)
            held, held_labels = load(images.indices(split="test"))
            advance(2)
        optimiser = torch.optim.AdamW(network.parameters(), lr=_RATE, weight_decay=1e-3)
        steps = EPOCHS * ((len(labels) + _BATCH - 1) // _BATCH)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=_RATE, total_steps=steps)
        with show.task("training the network", EPOCHS) as advance:
            for epoch in range(EPOCHS):
                for rows in torch.randperm(len(labels)).split(_BATCH):
                    batch = pictures[rows]
                    batch = batch.flip(3) if float(torch.rand(())) < 0.5 else batch
                    loss = F.cross_entropy(network(batch), labels[rows])
                    optimiser.zero_grad()
                    loss.backward()
                    optimiser.step()
                    schedule.step()
                advance(epoch + 1, f"loss {float(loss.detach()):.2f}")
        network.eval()
        with torch.no_grad():
            right = torch.cat([network(part).argmax(1) for part in held.split(128)]) == held_labels
    return network, float(right.float().mean())


def _preprocessing() -> Any:
    from partlens.performer.zoo import Preprocessing

    return Preprocessing(
        size_px=(SIDE_PX, SIDE_PX), resize="squash", resize_px=None, mean=(0.45, 0.45, 0.4), std=(0.25, 0.25, 0.25)
    )


def demo(
    out: str | Path = "partlens-demo",
    *,
    flowers: int = DEMO_FLOWERS,
    seed: int = 0,
    progress: Progress | None = None,
) -> Path:
    """Make everything and explain it: flowers, a trained network, its explainer, the numbers and the page.

    Args:
        out: folder for what is made; a demo that was stopped in it goes on.
        flowers: number of generated flowers, a quarter of them held out.
        seed: of everything.
        progress: how to show progress; silent when left out.

    Returns:
        Path of the page.
    """
    from partlens.data.flowers import generated_flowers
    from partlens.performer.zoo import Performer, weights_sha256
    from partlens.pipeline import evaluate, fit_explainer, report
    from partlens.store import read_json, read_tensors, write_json, write_tensors

    if flowers < 120:
        raise InputError(expected("at least 120 flowers", flowers, "Leave --flowers out"))
    started = time.monotonic()
    show = progress or Progress.silent()
    out = Path(out)
    images = generated_flowers(flowers, seed=seed, size=SIDE_PX)
    weights, notes = out / "flower-network.safetensors", out / "flower-network.json"
    recipe = {"flowers": flowers, "seed": seed}
    if weights.exists() and notes.exists() and read_json(notes)["recipe"] == recipe:
        network = flower_network(len(images.category_counts())).eval()
        network.load_state_dict(read_tensors(weights))
        accuracy = float(read_json(notes)["accuracy"])
    else:
        network, accuracy = train_flower_network(images, seed=seed, progress=show)
        write_tensors(weights, network.state_dict())
        write_json(notes, {"recipe": recipe, "accuracy": accuracy})
    categories = len(images.category_counts())
    show.say(f"a network that knows {categories} kinds of flowers: accuracy {accuracy:.1%} on held-out ones")
    names = tuple(sorted(images.category_counts()))
    performer = Performer(network, "flower-network", _preprocessing(), weights_sha256(network), "relu4", names)
    run = out / "run"
    fit_explainer(
        performer, images, out=run, category=CATEGORY, config=dict(_EXPLAINER, seed=seed), seeds=1, progress=show
    )
    scores = evaluate(run, images, model=performer, progress=show)
    page = report(run)
    show.say(_summary(scores))
    show.say(f"{time.monotonic() - started:.0f} s in all; look at {page}")
    return page


def _summary(scores: Mapping[str, Any]) -> str:
    """Say in one sentence what came out; what could not be measured is a dash."""

    def number(estimate: Mapping[str, Any], form: str) -> str:
        return "–" if estimate["value"] is None else format(estimate["value"], form)

    explainer, tap = scores["explainer"], scores["performer"]["tap"]
    null = scores["nulls"]["random"]
    return (
        f"at relu4, p = {number(scores['p'], '.2f')} of the information is carried by part filters; their location "
        f"instability is {number(explainer['instability'], '.3f')} (the layer's own filters: "
        f"{number(tap['instability'], '.3f')}, random: {number(null['instability'], '.3f')}), their consistency "
        f"{number(explainer['consistency'], '.2f')} ({number(tap['consistency'], '.2f')}); fed back, the "
        f"reconstruction keeps {number(scores['reconstruction']['agreement_top1'], '.0%')} of the decisions"
    )
