"""The verdict on curves whose truth is known."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from partlens.object_parts.inspection import Comparison
from partlens.object_parts.regions import AREAS
from partlens.object_parts.verdict import Verdict, best_place, compared, judged, sentence
from partlens.object_parts.verdict import told as decisions_tell

PHOTOS = 30
RISING = torch.tensor(AREAS)
APART = torch.tensor([[[0.2, 0.5], [0.8, 0.5]]]).expand(PHOTOS, 2, 2)


def draws(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noisy(level: float, seed: int, photos: int = PHOTOS, spread: float = 0.1) -> Tensor:
    """Curves that rise with the area around a level."""
    noise = spread * torch.randn(photos, 1, generator=draws(seed))
    return (level + RISING + noise).double()


def measured(parts: float, others: float = 0.2, photos: int = PHOTOS, spread: float = 0.1) -> dict[str, Tensor]:
    kinds = {"parts": parts, "other_photos": others, "random": others - 0.05, "centre": others, "rest": 0.1}
    return {kind: noisy(level, seed, photos, spread) for seed, (kind, level) in enumerate(kinds.items())}


def grid(
    level: float, best: float = 0.0, where: int | None = None, photos: int = PHOTOS, spread: float = 0.1
) -> Tensor:
    """Sixteen windows of one level; ``best`` more at one place, of every photo or of each its own."""
    found = noisy(level, 9, photos, spread)[..., None].repeat(1, 1, 16)
    for photo in range(photos):
        found[photo, :, photo % 16 if where is None else where] += best
    return found


def told(kept: dict[str, Tensor], windows: Tensor, places: Tensor = APART) -> Verdict:
    """Judge where the best window of the first ten photos keeps on the others what it keeps there."""
    fixed = windows[:, :, best_place(windows[:10])].clone()
    fixed[:10] = torch.nan
    return judged(kept, windows[:10], fixed, places, draws())


def test_windows_at_the_parts_that_keep_more_than_all_others_are_parts() -> None:
    verdict = told(measured(0.5), grid(0.2, 0.3))
    assert verdict.kind == "parts"
    assert verdict.advantage.low > 0
    assert verdict.advantage.n == PHOTOS


def test_the_sentence_speaks_of_the_area_at_which_the_parts_are_furthest_above() -> None:
    kept = measured(0.3)
    kept["parts"][:, 1] += 0.2
    verdict = told(kept, grid(0.2, 0.3))
    assert "20% of the image around 3 parts" in sentence("fox", verdict, kept, (1, 3, 2, 2))


def test_parts_that_all_stand_in_one_place_may_be_the_whole_object_where_that_is_not_known() -> None:
    together = 0.5 + 0.05 * torch.rand(PHOTOS, 3, 2, generator=draws())
    verdict = told(measured(0.5), grid(0.2, 0.3), together)
    assert (verdict.kind, verdict.reason) == ("texture", "one_place")
    known = measured(0.5)
    known.update(object=noisy(0.2, 20), off_object=noisy(0.1, 21))
    assert told(known, grid(0.2, 0.3), together).kind == "parts"


def test_windows_anywhere_that_keep_as_much_are_texture() -> None:
    assert told(measured(0.2), grid(0.2, 0.3)).kind == "texture"


def test_the_sentence_of_texture_names_a_comparison_that_fails_and_not_the_nearest_that_does_not() -> None:
    kept = measured(0.5)
    against = {  # the centre is nearest, random windows are furthest below their chance level
        "other_photos": Comparison(advantage=0.30, threshold=0.10),
        "random": Comparison(advantage=0.35, threshold=0.40),
        "centre": Comparison(advantage=0.20, threshold=0.10),
    }
    verdict = replace(told(measured(0.2), grid(0.2, 0.3)), best_null="centre", against=against)
    assert (verdict.kind, verdict.reason) == ("texture", "")
    words = sentence("fox", verdict, kept, (1, 1, 1, 1))
    random = f"{kept['random'][:, 2].nanmedian():.0%}"
    assert f"but random windows keep {random}, a difference that may be chance (n" in words
    kept["random"] = kept["parts"] - 1e-6
    equal = f"{kept['parts'][:, 2].nanmedian():.0%}"
    assert f"keeps {equal} of the score, but random windows keep {equal} (n" in sentence("fox", verdict, kept, (1,) * 4)


def test_parts_that_keep_less_than_everything_else_are_texture_or_the_whole() -> None:
    kept = measured(0.5)
    kept["rest"] = noisy(0.6, 30)
    verdict = told(kept, grid(0.2, 0.3))
    assert (verdict.kind, verdict.reason) == ("texture", "rest")
    mine, other, rest = (f"{kept[kind][:, 2].nanmedian():.0%}" for kind in ("parts", verdict.best_null, "rest"))
    words = sentence("elephant", verdict, kept, (2, 2, 2, 2))
    assert f"30% of the image around 2 parts keeps {mine} of the score (" in words
    assert f" {other}), but everything outside keeps {rest} (n = {PHOTOS})." in words


def test_a_place_that_is_the_same_in_all_photos_is_something_beside_the_object() -> None:
    verdict = told(measured(0.2), grid(0.1, 0.6, where=12))
    assert (verdict.kind, verdict.reason) == ("elsewhere", "fixed")
    assert verdict.fixed == (0.875, 0.125)
    words = sentence("fox", verdict, measured(0.2), (1, 1, 1, 1))
    assert "always at the bottom left" in words
    assert f"n = {PHOTOS}" in words


def test_windows_beside_the_object_that_keep_more_than_those_on_it_are_elsewhere() -> None:
    kept = measured(0.2)
    kept.update(object=noisy(0.2, 20), off_object=noisy(0.6, 21))
    verdict = told(kept, grid(0.2, 0.1))
    assert (verdict.kind, verdict.reason) == ("elsewhere", "off_object")


def test_parts_that_keep_no_more_than_any_window_on_the_object_are_texture() -> None:
    kept = measured(0.5)
    kept.update(object=noisy(0.5, 20), off_object=noisy(0.1, 21))
    verdict = told(kept, grid(0.2, 0.6))
    assert (verdict.kind, verdict.best_null) == ("texture", "object")


def test_too_few_photos_are_undecided() -> None:
    verdict = told(measured(0.5, photos=7), grid(0.2, 0.3, photos=7))
    assert (verdict.kind, verdict.reason) == ("undecided", "few")
    assert "8 are needed" in sentence("fox", verdict, measured(0.5, photos=7), (1, 1, 1, 1))


def test_photos_that_could_not_tell_even_the_best_window_from_chance_are_undecided() -> None:
    verdict = told(measured(0.2, photos=9, spread=2.0), grid(0.0, 0.01, photos=9, spread=2.0))
    assert (verdict.kind, verdict.reason) == ("undecided", "unsure")


@pytest.mark.parametrize("seed", range(5))
def test_equal_windows_are_seldom_taken_for_parts(seed: int) -> None:
    found = [compared(noisy(0.2, 100 * seed + k), noisy(0.2, 999 + 100 * seed + k), draws(k)) for k in range(20)]
    assert sum(one.counts for one in found) <= 4


def test_a_window_that_keeps_most_on_the_photos_it_was_chosen_on_alone_is_nothing_beside_the_object() -> None:
    windows = grid(0.1, 0.6, where=12)
    windows[10:, :, 12] -= 0.6
    assert told(measured(0.2), windows).kind == "texture"


def test_photos_without_a_figure_are_left_out() -> None:
    kept = measured(0.5)
    for values in kept.values():
        values[:3] = torch.nan
    assert told(kept, grid(0.2, 0.3)).photos == PHOTOS - 3


def test_decisions_that_tell_nothing_of_the_category_decide_nothing() -> None:
    """A network without an idea of the category is not said to know it by anything."""
    own, kept = torch.arange(200) < 60, measured(0.5)
    by_chance = torch.randint(3, (200,), generator=draws(5))
    always = torch.zeros(200, dtype=torch.long)
    parts = told(kept, grid(0.2, 0.3))
    for decisions in (by_chance, always):
        verdict = parts.knowing(decisions_tell(decisions, own, draws()))
        assert (verdict.kind, verdict.reason) == ("undecided", "untold")
        assert "decides on fox as on the other photos" in sentence("fox", verdict, kept, (1, 1, 2, 2))
    knows = torch.where(torch.arange(200) % 10 < 3, by_chance, own.long())
    assert parts.knowing(decisions_tell(knows, own, draws())).kind == "parts"
    assert parts.knowing(None).kind == "parts"


def test_what_decisions_tell_is_mutual_information() -> None:
    score = pytest.importorskip("sklearn.metrics").mutual_info_score
    own = torch.rand(300, generator=draws(1)) < 0.3
    decisions = torch.randint(7, (300,), generator=draws(2)) + 2 * own
    found = decisions_tell(decisions, own, draws())
    assert found is not None
    assert found.advantage == pytest.approx(score(own.numpy(), decisions.numpy()) / torch.log(torch.tensor(2.0)).item())
    chance = [
        score(own[torch.randperm(300, generator=draws(seed))].numpy(), decisions.numpy()) / 0.693147
        for seed in range(300)
    ]
    assert found.threshold == pytest.approx(sorted(chance)[285], rel=0.2)
    assert found.counts
