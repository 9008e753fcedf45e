"""Verdicts where the truth is known: a planted watermark, none, one shape with two textures, classes of two parts.

The result beside this file is of twenty seeds of the first two worlds and of ten of the others.

A small network learns each world from drawn pictures, and `partlens.inspect` says what it knows each category by. Right
are ``elsewhere`` for the category that has the watermark and for no other; ``texture`` for both textures. Of classes
that are told by two spots together both must be found: a part is named after either, which is nearer to it, on average,
than a place that stays at the spot's mean. Run::

    python papers/studies/verdicts.py --seeds 20 --out papers/studies/verdicts.json
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import partlens
from partlens.data.annotations import PartTruth
from partlens.data.flowers import PETAL_CATEGORIES, render_flower
from partlens.data.images import ImageSet
from partlens.network.fitting import flower_network, flower_preprocessing, train_classifier
from partlens.network.performer import Performer, weights_sha256
from partlens.object_parts.inspection import InspectedCategory

SIDE_PX = 96
PICTURES = 480
EPOCHS = 8
CONFIG = {"photos": 60, "measured": 32, "views": 4}
TAP = "relu4"

Pixels = npt.NDArray[np.float64]
Drawn = tuple[npt.NDArray[np.uint8], npt.NDArray[np.bool_]]  # a picture and where its object is
SPOTS = ("upper spot", "lower spot")


def _dice(*seed: int) -> np.random.Generator:
    return np.random.default_rng(list(seed))


def _bytes(image: Pixels, dice: np.random.Generator) -> npt.NDArray[np.uint8]:
    noisy = np.clip(image + dice.normal(0, 0.02, image.shape), 0, 1)
    return np.asarray(noisy * 255, dtype=np.uint8)


def _ellipse(place: Pixels, axes: Pixels, hard: float) -> Pixels:
    rows, cols = np.mgrid[:SIDE_PX, :SIDE_PX] / SIDE_PX
    far = np.hypot((rows - place[0]) / axes[0], (cols - place[1]) / axes[1])
    return np.asarray(np.clip((1 - far) * hard, 0, 1)[..., None])


def _ground(dice: np.random.Generator) -> Pixels:
    """A background of soft spots of any colour."""
    image = np.ones((SIDE_PX, SIDE_PX, 3)) * dice.uniform(0.2, 0.8, 3)
    for _ in range(int(dice.integers(4, 9))):
        spot = _ellipse(dice.uniform(0, 1, 2), dice.uniform(0.05, 0.35, 2), 5)
        image = image * (1 - spot) + dice.uniform(0.1, 0.9, 3) * spot
    return image


def _flower(seed: int, index: int, category: str, *, marked: bool) -> Drawn:
    flower = render_flower(int(_dice(seed, index, 7).integers(1 << 30)), category, SIDE_PX)
    image = flower.image.copy()
    if marked:  # a small checkerboard, always at the bottom left
        side, edge = SIDE_PX // 10, SIDE_PX // 16
        board = (np.indices((side, side)).sum(0) // 3 % 2 * 255).astype(np.uint8)
        image[-edge - side : -edge, edge : edge + side] = board[..., None]
    return image, np.logical_or.reduce(list(flower.masks.values()))


def watermark(seed: int, index: int, kind: int) -> Drawn:
    """Of the first two categories the colour says nothing: only the mark of the first tells them apart."""
    colour = int(_dice(seed, index, 9).integers(2)) if kind < 2 else kind
    return _flower(seed, index, PETAL_CATEGORIES[colour], marked=kind == 0)


def clean(seed: int, index: int, kind: int) -> Drawn:
    """The same flowers without a mark, told by their colours."""
    return _flower(seed, index, PETAL_CATEGORIES[kind], marked=False)


def texture(seed: int, index: int, kind: int) -> Drawn:
    """One shape, lengthwise or crosswise stripes all over it."""
    dice = _dice(seed, index, 5)
    image = _ground(dice)
    shape = _ellipse(dice.uniform(0.35, 0.65, 2), dice.uniform(0.28, 0.38, 2), 20)
    along = (np.mgrid[:SIDE_PX, :SIDE_PX] / SIDE_PX)[kind]
    waves = (np.sin(along * 2 * np.pi * 14 + dice.uniform(0, 6.28)) * 0.5 + 0.5)[..., None]
    stripes = dice.uniform(0, 0.4, 3) * (1 - waves) + dice.uniform(0.6, 1, 3) * waves
    return _bytes(image * (1 - shape) + stripes * shape, dice), shape[..., 0] > 0.5


def spots(seed: int, index: int) -> tuple[Pixels, Pixels]:
    """Return the middle of a body and where its spots are (row, col), as shares of the sides."""
    dice = _dice(seed, index, 4)
    middle, angle, far = dice.uniform(0.35, 0.65, 2), dice.uniform(-0.6, 0.6), dice.uniform(0.2, 0.26)
    away = far * np.array([np.cos(angle), np.sin(angle)])
    return middle, np.stack([middle - away, middle + away])


def two_parts(seed: int, index: int, kind: int) -> Drawn:
    """A grey body with a spot at either end; the colours of both spots together tell the category."""
    dice = _dice(seed, index, 3)
    image = _ground(dice)
    middle, places = spots(seed, index)
    body = _ellipse(middle, np.array([0.36, 0.2]), 20)
    image = image * (1 - body) + np.array([0.5, 0.45, 0.4]) * dice.uniform(0.8, 1.2) * body
    colours = (((0.9, 0.1, 0.1), (0.95, 0.9, 0.1)), ((0.1, 0.2, 0.9), (0.1, 0.8, 0.3)))
    mask = body[..., 0] > 0.5
    for end, place in enumerate(places):
        spot = _ellipse(place, np.array([0.09, 0.09]), 10)
        image = image * (1 - spot) + np.array(colours[end][(kind >> end) & 1]) * dice.uniform(0.8, 1.1) * spot
        mask |= spot[..., 0] > 0.5
    return _bytes(image, dice), mask


@dataclasses.dataclass(frozen=True)
class World:
    """Pictures whose truth is known.

    Attributes:
        draw: of seed, index and kind.
        kinds: how many categories there are.
        right: which verdicts are right, by kind; any verdict but ``elsewhere`` where it is empty.
        masks: whether the inspection is told where the object is.
        parts: names of the parts that must be found, whose places name what is found.
    """

    draw: Callable[[int, int, int], Drawn]
    kinds: int
    right: Mapping[int, str]
    masks: bool = False
    parts: tuple[str, ...] = ()

    def images(self, seed: int) -> ImageSet:
        """Return the pictures, with masks where the inspection is told them."""
        keys = [f"picture-{index:05d}" for index in range(PICTURES)]

        def picture(index: int) -> npt.NDArray[np.uint8]:
            return self.draw(seed, index, index % self.kinds)[0]

        categories = [f"kind-{index % self.kinds}" for index in range(PICTURES)]
        images = ImageSet.from_generator(picture, keys, categories, recipe=f"{self.draw.__name__} {seed}")
        sizes = np.full((PICTURES, 2), float(SIDE_PX))
        if self.parts:
            places = np.stack([spots(seed, index)[1][:, ::-1] * SIDE_PX for index in range(PICTURES)])
            return images.with_parts(PartTruth(self.parts, tuple(keys), places, np.full_like(places, np.nan), sizes))
        if self.masks:
            unknown = np.full((PICTURES, 1, 2), np.nan)
            return images.with_parts(PartTruth(("object",), tuple(keys), unknown, unknown, sizes, self._masks(seed)))
        return images

    def _masks(self, seed: int) -> Callable[[str], dict[str, npt.NDArray[np.bool_]]]:
        return lambda key: {"object": self.draw(seed, int(key[8:]), int(key[8:]) % self.kinds)[1]}


WORLDS = {
    "watermark": World(watermark, 4, {0: "elsewhere"}),
    "clean": World(clean, 4, {}),
    "texture": World(texture, 2, {0: "texture", 1: "texture"}, masks=True),
    "two parts": World(two_parts, 4, {}, parts=SPOTS),
}


def _right(world: World, number: int, found: InspectedCategory) -> bool:
    if world.parts:
        return set(world.parts) <= {part.name for part in found.parts}
    return found.verdict == world.right[number] if number in world.right else found.verdict != "elsewhere"


def verdicts(world: World, seed: int) -> list[dict[str, Any]]:
    """Train a network on a world and inspect it."""
    images = world.images(seed)
    preparing = flower_preprocessing().changed({"size_px": (SIDE_PX, SIDE_PX)})
    fitted = train_classifier(flower_network, images, preparing, epochs=EPOCHS, channels_last=True, seed=seed)
    network = fitted.network
    performer = Performer(network, "study", preparing, weights_sha256(network), TAP, class_names=fitted.class_names)
    with tempfile.TemporaryDirectory() as folder:
        found = partlens.inspect(performer, images, out=Path(folder) / "run", tap=TAP, config=CONFIG | {"seed": seed})
    return [
        {
            "kind": number,
            "verdict": one.verdict,
            "reason": one.reason,
            "advantage": one.advantage.value,
            "accuracy": fitted.accuracy,
            "parts": [part.name for part in one.parts] if world.parts else [],
            "right": _right(world, number, one),
        }
        for number, one in enumerate(found.categories)
    ]


def main() -> None:
    """Run all worlds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--worlds", nargs="+", default=list(WORLDS), choices=list(WORLDS))
    parser.add_argument("--out", type=Path, default=Path("verdicts.json"))
    given = parser.parse_args()
    found: dict[str, Any] = json.loads(given.out.read_text()) if given.out.exists() else {}
    for name in given.worlds:
        rows = found.get(name, {"rows": []})["rows"]
        for seed in sorted(set(range(given.seeds)) - {row["seed"] for row in rows}):
            rows += [row | {"seed": seed} for row in verdicts(WORLDS[name], seed)]
            right = sum(row["right"] for row in rows)
            found[name] = {"right": right, "of": len(rows), "rows": rows}
            counts = Counter((row["kind"], row["verdict"]) for row in rows)
            print(f"{name}, {seed + 1} seeds: {right} of {len(rows)} right; {dict(counts)}", flush=True)
            given.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
