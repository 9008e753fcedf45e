"""From the numbers of a selection and of an explanation to words: headlines, verdicts and remarks.

Texts here are plain; the template escapes them.
"""

from __future__ import annotations

import math

from partlens.page.explanation_data import Explained, ExplanationData
from partlens.page.notation import GAP, counted, number, rate, short_name
from partlens.page.reading import Measure
from partlens.page.selection_data import RelevantFeature, SelectionData
from partlens.page.wording import Verdict, compare

GAP_LIMIT = 1e-4
GAP_BAD = 1e-2
FEW_FEATURES = 16
ALIKE_LIMIT = 0.9
LATTICE_LIMIT = 1.0  # ten times the energy around


def filter_name(layer: str, channel: int) -> str:
    """Name a filter.

    Example:
        >>> filter_name("layer3", 41)
        'filter 41 of layer3'
    """
    return f"filter {channel} of {layer}"


def ordinal(rank: int) -> str:
    """Write a rank.

    Example:
        >>> [ordinal(r) for r in (1, 2, 3, 4, 11, 22)]
        ['1st', '2nd', '3rd', '4th', '11th', '22nd']
    """
    ending = "th" if rank % 100 in {11, 12, 13} else {1: "st", 2: "nd", 3: "rd"}.get(rank % 10, "th")
    return f"{rank}{ending}"


def share_of(hits: int, total: int) -> Measure:
    """Return a share with Wilson's 95 % interval, as ``metrics.estimate.proportion``, without loading torch.

    Example:
        >>> m = share_of(3, 4)
        >>> m.value, round(m.low, 3), round(m.high, 3), m.n
        (0.75, 0.301, 0.954, 4)
    """
    if not total:
        return Measure(unit="filters")
    z, share = 1.96, hits / total
    centre = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    return Measure(share, max(0.0, centre - half), min(1.0, centre + half), total, "filters")


def interval(measure: Measure) -> str:
    """Write the interval of a share after its value; nothing where there is none.

    Example:
        >>> interval(Measure(0.961, 0.941, 0.98)), interval(Measure(0.961))
        (' [94.1, 98]', '')
    """
    if not measure.has_interval:
        return ""
    low, high = (rate(end).removesuffix(f"{GAP}%") for end in (measure.low, measure.high))
    return f" [{low}, {high}]"


# --- a selection ------------------------------------------------------------------------------------------------------


def selection_headline(data: SelectionData) -> str:
    """Say from how much each class is read and how right that is, claiming nothing that was not measured."""
    classes = len(data.classes)
    mean = f"{data.nonzeros_mean:.1f}" if math.isfinite(data.nonzeros_mean) else "an unknown number of"
    first = (
        f"{counted(classes, 'classes') if classes > 1 else '1 class'} of {short_name(data.performer)} "
        f"{'are' if classes > 1 else 'is'} read from {mean} filters{' each' if classes > 1 else ''}, "
        f"of {data.features:,} in {counted(len(data.layers), 'layers')}"
    )
    right, verb = data.accuracy, "agrees with it on" if data.of_predictions else "is right on"
    if not right.defined:
        return f"{first}. How well these alone tell the classes apart has not been measured on held-out photos."
    nulls = [
        f"{name} {rate(value)}"
        for name, value in (("shuffled labels:", data.shuffled.value), ("chance", data.chance))
        if math.isfinite(value)
    ]
    beside = f" ({', '.join(nulls)})" if nulls else ""
    where = counted(right.n, "held-out photos") if right.unit == "photos" else counted(right.n, right.unit)
    said = f"{first}; the linear read-out of these alone {verb} {rate(right.value)}{interval(right)} of {where}"
    said += f"{beside}."
    if _above_nulls(data) is False:
        said += " That is no better than chance, so these filters say nothing yet."
    return said


def _above_nulls(data: SelectionData) -> bool | None:
    """Tell whether the read-out beats every null that was measured; ``None`` where there is none."""
    nulls = [null for null in (data.shuffled, Measure(data.chance, data.chance, data.chance)) if null.defined]
    if not nulls or not data.accuracy.defined:
        return None
    return all(compare(data.accuracy, null, lower_is_better=False) == "better" for null in nulls)


def _readout(data: SelectionData) -> Verdict:
    if not data.accuracy.defined:
        return Verdict("readout", "unknown", "Enough to tell the classes?", "Not measured on held-out photos.")
    how = "Agrees with the network on" if data.of_predictions else "Right on"
    words = f"{how} {rate(data.accuracy.value)}{interval(data.accuracy)}"
    above = _above_nulls(data)
    if above is None:
        return Verdict("readout", "unknown", "Better than chance?", f"{words}; no null was measured.")
    words += f"; fitted to shuffled labels {rate(data.shuffled.value)}, by chance {rate(data.chance)}."
    if data.model_accuracy.defined:
        words += f" The network itself is right on {rate(data.model_accuracy.value)}."
    if above:
        return Verdict("readout", "good", "These filters tell the classes", words)
    return Verdict("readout", "warning", "No better than chance", words)


def _few(data: SelectionData) -> Verdict:
    mean = data.nonzeros_mean
    if not math.isfinite(mean):
        return Verdict("few", "unknown", "Few filters?", "Not recorded.")
    words = f"{mean:.1f} of {data.features:,} filters a class on average."
    active, mu = data.constraint_active, data.config.get("mu")
    if active is not None:
        words += f" The bound μ{f' = {mu:g}' if isinstance(mu, (int, float)) else ''} is reached in {active:,} of "
        words += f"{counted(len(data.classes), 'classes') if len(data.classes) > 1 else '1 class'}"
        words += "; it is not the bound that keeps them few." if active == 0 else "."
    if mean > FEW_FEATURES:
        return Verdict("few", "caution", "Many filters", words)
    return Verdict("few", "good", "Few filters", words)


def _solved(data: SelectionData) -> Verdict:
    gap = data.relative_gap
    if not math.isfinite(gap):
        return Verdict("solved", "unknown", "Solved?", "No gap was recorded.")
    words = f"At most {number(gap)} of a class's squared error is left to gain."
    if gap > GAP_BAD:
        return Verdict("solved", "warning", "Not solved", words)
    if gap > GAP_LIMIT:
        return Verdict("solved", "caution", "Solved roughly", words)
    return Verdict("solved", "good", "Solved", words)


def sharper(data: SelectionData) -> tuple[int, int]:
    """Count filters whose average picture is sharper than that of random crops, and those where both are known."""
    known: dict[tuple[str, int], RelevantFeature] = {
        (f.layer, f.channel): f
        for c in data.classes
        for f in c.features
        if f.sharpness and math.isfinite(f.sharpness.value) and math.isfinite(f.sharpness.control)
    }
    return sum(f.sharpness.value > f.sharpness.control for f in known.values() if f.sharpness), len(known)


def _sharp(data: SelectionData) -> Verdict:
    hits, total = sharper(data)
    if not total:
        return Verdict("sharp", "unknown", "Do the filters see something?", "No average pictures were measured.")
    share = share_of(hits, total)
    words = (
        f"The average of the strongest crops is sharper than that of random crops for {hits:,} of "
        f"{counted(total, 'filters')} ({rate(share.value)}{interval(share)})."
    )
    if share.low > 0.5:
        return Verdict("sharp", "good", "Averages show structure", words)
    if share.high < 0.5:
        return Verdict("sharp", "warning", "Averages show no structure", words)
    return Verdict("sharp", "caution", "Averages hardly sharper than chance", words)


def _empty(data: SelectionData) -> tuple[Verdict, ...]:
    without = [c.name for c in data.classes if c.nonzeros == 0]
    if not without:
        return ()
    shown = ", ".join(without[:5]) + (f" and {len(without) - 5:,} more" if len(without) > 5 else "")
    many = "class has" if len(without) == 1 else "classes have"
    return (Verdict("empty", "warning", "Classes read from nothing", f"{len(without):,} {many} no filter: {shown}."),)


def selection_verdicts(data: SelectionData) -> tuple[Verdict, ...]:
    """Judge a selection in plain words; what was not measured has the state ``unknown``."""
    return (_readout(data), _few(data), _sharp(data), _solved(data), *_empty(data))


# --- one prediction ---------------------------------------------------------------------------------------------------


def explanation_headline(data: ExplanationData) -> str:
    """Say what the performer answered and on what features that rests."""
    name = short_name(data.performer)
    if not data.explained:
        of_parts = data.parts[0]
        sure = f" ({rate(of_parts.probability)})" if math.isfinite(of_parts.probability) else ""
        said = f"{name} takes {data.image} for" if of_parts.rank == 1 else f"{data.image} in {name} is read for"
        return f"{said} “{of_parts.name}”{sure}. What its parts add: {of_parts.headline}."
    first = data.explained[0]
    sure = f" ({rate(first.probability)})" if math.isfinite(first.probability) else ""
    if first.rank == 1:
        said = f"{name} takes {data.image} for “{first.name}”{sure}."
    elif first.rank > 1:
        said = f"“{first.name}” is the {ordinal(first.rank)} answer of {name} to {data.image}{sure}."
    else:
        said = f"{data.image} in {name} is read for “{first.name}”{sure}."
    if not first.features:
        return f"{said} No feature that the class is read from answers to it."
    total = sum(f.share for f in first.features if math.isfinite(f.share))
    lead = first.features[0]
    if len(first.features) == 1:
        return f"{said} {filter_name(lead.layer, lead.channel).capitalize()} carries {rate(total)} of the evidence."
    most = f"; {filter_name(lead.layer, lead.channel)} alone {rate(lead.share)}" if math.isfinite(lead.share) else ""
    return f"{said} {len(first.features)} filters carry {rate(min(total, 1.0))} of the evidence for it{most}."


def _fixed(value: float) -> str:
    return f"{value:.2f}".replace("-", "−")


def explained_remarks(one: Explained, first: Explained) -> tuple[str, ...]:
    """Say how far a map depends on the class and whether strides left a lattice in it."""
    said = []
    if one is not first and math.isfinite(one.rank_correlation):
        alike = one.rank_correlation
        said.append(
            f"Rank correlation with the map of “{first.name}”: {number(alike)}."
            + (" The two maps are nearly the same, so they say little about the class." if alike > ALIKE_LIMIT else "")
        )
    if one.lattice:
        before, after = one.lattice
        said.append(
            f"Grid of the strides (lattice index; 1 is ten times its surroundings): {_fixed(after)}"
            + (f", without the stride correction {_fixed(before)}." if not math.isclose(before, after) else ".")
            + (" Stripes in the map may come from the strides." if after > LATTICE_LIMIT else "")
        )
    return tuple(said)
