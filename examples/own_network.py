"""Explain a network of your own: hand over the module and say how photos become its input.

uv run python examples/own_network.py
"""

from __future__ import annotations

from pathlib import Path

import partlens
from partlens.network.flower_network import flower_network
from partlens.verbs.demo import train_flower_network


def main(out: Path = Path("runs/own-network"), flowers: int = 240, **config: int) -> dict[str, float]:
    photos = partlens.generated_flowers(flowers, size=112, categories=("petal-red", "petal-blue"))
    network, accuracy = train_flower_network(photos)
    assert type(network) is type(flower_network())
    preprocessing = partlens.Preprocessing(
        size_px=(112, 112), resize="squash", mean=(0.45, 0.45, 0.4), std=(0.25, 0.25, 0.25)
    )
    performer = partlens.load_performer(network, preprocessing)
    partlens.fit_explainer(performer, photos, tap="relu4", out=out, seeds=1, config=config)
    scores = partlens.evaluate(out, photos, model=performer)
    page = partlens.report(out)
    print(f"accuracy {accuracy:.2f}; explainer at {page}")
    return {name: scores["explainer"][name]["value"] for name in ("instability", "consistency")}


if __name__ == "__main__":
    print(main())
