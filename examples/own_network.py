"""Explain a network of your own: hand over the module and say how photos become its input.

uv run python examples/own_network.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import partlens
from partlens.network.fitting import flower_network, train_classifier


def main(
    out: Path = Path("runs/own-network"), *, flowers: int = 240, side_px: int = 112, passes: int = 14, **config: Any
) -> dict[str, float]:
    photos = partlens.generated_flowers(flowers, size=side_px, categories=("petal-red", "petal-blue"))
    preprocessing = partlens.Preprocessing(
        size_px=(side_px, side_px), resize="squash", mean=(0.45, 0.45, 0.4), std=(0.25, 0.25, 0.25)
    )
    trained = train_classifier(flower_network, photos, preprocessing, epochs=passes)  # any torch.nn.Module will do
    performer = partlens.load_performer(trained.network, preprocessing)
    partlens.fit_explainer(performer, photos, tap="relu4", out=out, seeds=1, config=config)
    scores = partlens.evaluate(out, photos, model=performer)
    page = partlens.report(out)
    print(f"accuracy {trained.accuracy:.2f}; explainer at {page}")
    return {"instability": scores.explainer.instability.value, "consistency": scores.explainer.consistency.value}


if __name__ == "__main__":
    print(main())
