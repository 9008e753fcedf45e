"""The demo: flowers are drawn, a network learns them, and a page says what it knows each kind by.

It needs no data, no weights and no network. The performer is a small convolutional network of the papers' kind; it
learns which colour the petals have, among flowers whose other parts and surroundings show the same colours, and so has
to find the petals. The first chapter asks the network itself: which parts carry the score of each kind. The second is
an explainer network of one layer.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from partlens.data.flowers import generated_flowers
from partlens.errors import InputError, expected
from partlens.progress import Progress
from partlens.records import read_json, write_json
from partlens.verbs.evaluate import evaluate
from partlens.verbs.fit_explainer import fit_explainer
from partlens.verbs.inspection import inspect
from partlens.verbs.parts import parts
from partlens.verbs.runs import report, verb

if TYPE_CHECKING:
    from partlens.data.images import ImageSet
    from partlens.estimate import Estimate
    from partlens.evaluation.results import Evaluation

# Few, for a short demo: with 1,000 flowers and 10 epochs the network was right on 96.6 % of the held-out ones.
_FLOWERS = 800
_CATEGORY = "petal-red"
_TAP = "relu4"
_EPOCHS = 12
_BATCH = 32
_RATE = 2e-3
_ROUNDS = 100  # of the bootstrap
_HALVINGS = 20  # of the photos, which say how stable the parts are
_INSPECT = {"photos": 40, "measured": 20, "views": 3, "parts_max": 4}
_MU = 5.0  # the authors' bound for their generated flowers
_EXPLAINER = {"epochs": 5, "warmup_epochs": 10, "patience": 0}


def _trained(images: ImageSet, weights: Path, seed: int, progress: Progress) -> float:
    """Train the demo's performer and write its weights; return its accuracy on held-out flowers."""
    from partlens.network.fitting import flower_network, flower_preprocessing, save_classifier, train_classifier

    fitted = train_classifier(
        flower_network,
        images,
        flower_preprocessing(),
        epochs=_EPOCHS,
        batch_size=_BATCH,
        learning_rate=_RATE,
        channels_last=True,
        seed=seed,
        progress=progress,
    )
    save_classifier(weights, fitted.network, flower_preprocessing(), fitted.class_names)
    return fitted.accuracy


@verb
def demo(
    *,
    out: str | Path = "partlens-demo",
    flowers: int = _FLOWERS,
    seed: int = 0,
    progress: Progress | None = None,
) -> Path:
    """Make everything and explain it: flowers, a trained network, what it knows them by, its explainer, and the page.

    Args:
        out: folder for what is made; a demo that was stopped in it goes on.
        flowers: number of generated flowers, a quarter of them held out.
        seed: of every random draw.
        progress: how to show progress; silent by default.

    Returns:
        Path of the page.
    """
    from partlens.network.fitting import SIDE_PX

    if flowers < 120:
        raise InputError(expected("at least 120 flowers", flowers, "Set --flowers to 120 or more"))
    started = time.monotonic()
    show = progress or Progress.silent()
    out = Path(out)
    images = generated_flowers(flowers, seed=seed, size=SIDE_PX)
    weights, notes = out / "flower-network.safetensors", out / "flower-network.json"
    recipe = {"flowers": flowers, "seed": seed}
    if weights.exists() and notes.exists() and read_json(notes)["recipe"] == recipe:
        accuracy = float(read_json(notes)["accuracy"])
    else:
        accuracy = _trained(images, weights, seed, show)
        write_json(notes, {"recipe": recipe, "accuracy": accuracy})
    kinds = len(images.category_counts())
    show.say(f"a network that knows {kinds} kinds of flowers: accuracy {accuracy:.1%} on held-out ones")
    model = f"partlens:flower-demo@{weights}"
    run = out / "run"
    inspect(model, images, out=run, tap=_TAP, mu=_MU, config=dict(_INSPECT, seed=seed), progress=show)
    config = dict(_EXPLAINER, seed=seed)
    fit_explainer(model, images, out=run, category=_CATEGORY, tap=_TAP, config=config, seeds=1, progress=show)
    scores = evaluate(run, images, rounds=_ROUNDS, progress=show)
    parts(run, images, config={"rounds": _HALVINGS}, progress=show)
    page = report(run)
    show.say(_summary(scores))
    show.say(f"{time.monotonic() - started:.0f} s in all; look at {page}")
    return page


def _summary(scores: Evaluation) -> str:
    """Say in one sentence what came out; what could not be measured is a dash."""

    def number(estimate: Estimate, form: str) -> str:
        return format(estimate.value, form) if estimate.defined else "–"

    explainer, tap, null, alone = scores.explainer, scores.performer.tap, scores.nulls["random"], scores.parts_alone
    return (
        f"at relu4, part filters have a weight of p = {number(scores.p, '.2f')}, a price: alone they keep "
        f"{number(alone.parts.agreement_top1, '.0%')} of the decisions (those of another photo "
        f"{number(alone.other_photo.agreement_top1, '.0%')}); their location instability is "
        f"{number(explainer.instability, '.3f')} (the layer's own filters: "
        f"{number(tap.instability, '.3f')}, random: {number(null.instability, '.3f')}), their consistency "
        f"{number(explainer.consistency, '.2f')} ({number(tap.consistency, '.2f')}); fed back, both "
        f"tracks keep {number(scores.reconstruction.agreement_top1, '.0%')} of the decisions"
    )
