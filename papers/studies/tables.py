"""Write the tables of papers/docs from the committed results: ``python papers/studies/tables.py``.

A page holds ``<!-- table: NAME -->`` … ``<!-- end -->``; what is between is replaced. Results come from the commands
that the pages name; this script only formats them.
"""

from __future__ import annotations

import csv
import json
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from partlens.estimate import Estimate
from partlens.evaluation.places import mean_of
from partlens_papers.flowers.benchmark import benchmark_table
from partlens_papers.removal.removal_tables import curve_table, table
from partlens_papers.sanity.sanity_tables import sanity_lines
from partlens_papers.tables.blocks import TableRecord
from partlens_papers.tables.page import shown_columns
from partlens_papers.tables.published import CUB, VOC, published
from partlens_papers.tables.scores import LARGEST

HERE = Path(__file__).parent
PAGES = HERE.parent / "docs"
RESULTS = HERE.parent / "results"
BLOCKS = {"rivals": ("rivals",), "interpretable-cnn": ("icnn",)}
NAMES = {
    "alexnet-instability": "AlexNet, six categories",
    "alexnet-teachers-from-tap-cub-instability": "AlexNet, birds, teachers from the tap",
    "alexnet-paper-preset-instability": "AlexNet, fox, preset paper",
    "resnet18-instability": "ResNet-18, six categories",
    "resnet18-cub-instability": "ResNet-18, birds",
    "resnet18-joint-instability": "ResNet-18, fox and giant panda in one explainer",
    "resnet50-instability": "ResNet-50, three categories",
    "resnet18-rivals": "ResNet-18, rivals on three categories",
    "alexnet-interpretable-cnn": "AlexNet, fox, interpretable CNNs",
}


def load(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / name).read_text())


def explainers() -> list[str]:
    """The main block and what instability cannot see, of every committed table."""
    lines: list[str] = []
    for name, title in NAMES.items():
        record = TableRecord.read(RESULTS / "tables" / name)
        lines += [f"## {title}", "", "```", record.command, "```", ""]
        for block in record.blocks:
            if block.key not in BLOCKS.get(record.table, ("instability", "beside")):
                continue
            columns = shown_columns(block)
            lines += [f"| {block.title} | {' | '.join(label for _, label in columns)} |"]
            lines.append("|---" * (len(columns) + 1) + "|")
            for row in block.rows:
                cells = [row.cells[key] for key, _ in columns]
                shown = [f"{c.value:.3g}" if c.defined else "–" for c in cells]
                if row.strong and cells[0].has_interval:
                    shown[0] += f" [{cells[0].interval[0]:.3g}, {cells[0].interval[1]:.3g}]"
                lines.append(f"| {row.label} | {' | '.join(shown)} |")
            lines.append("")
    return lines[:-1]


def in_short() -> list[str]:
    """The means of every committed explainer of :data:`NAMES`; a range where the categories differ in sign or size."""
    heads = ["explainer", "by largest cells, as in print", "performer, top layer", "centre null", "consistency"]
    heads += ["correlation", "spread, cells", "error increase, points", "p", "agreement", "lost variance"]
    lines = [f"| | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for name, title in NAMES.items():
        jobs = _scores(name, "explainer").values()
        if jobs and name != "resnet18-rivals":  # whose explainers are among those above
            lines.append(f"| {title} | {' | '.join(_short_cells(list(jobs)))} |")
    return lines


def _short_cells(jobs: list[Scores]) -> list[str]:
    def known(subject: str, score: str) -> list[float]:
        rows = [scores.get((subject, score)) for scores in jobs]
        return [float(row["value"]) for row in rows if row is not None and row["value"]]

    def mean(subject: str, score: str = "instability", digits: str = ".3f", *, less: bool = False) -> str:
        values = known(subject, score)
        return f"{1 - fmean(values) if less else fmean(values):{digits}}" if values else "–"

    def span(score: str, digits: str) -> str:
        ends = sorted({f"{end:{digits}}" for end in (min(known("explainer", score)), max(known("explainer", score)))})
        return " to ".join(sorted(ends, key=float))

    cells = [mean(subject) for subject in ("explainer", "explainer_largest", "top", "centre")]
    cells += [mean("explainer", score, ".2f") for score in ("consistency", "filter_correlation")]
    cells += [mean("explainer", "peak_spread_cells", ".1f"), span("error_increase_points", "+.1f"), span("p", ".2f")]
    return [
        *cells,
        mean("explainer", "agreement_top1", ".2f"),
        mean("explainer", "variance_explained", ".2f", less=True),
    ]


def pictures() -> list[str]:
    """What Grad-CAM and covering say of two explainers."""
    heads = ["photo, part filters, %", "tap", "random maps", "reads, px", "tap's", "in theory"]
    lines = [f"| | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for name, title in (("alexnet-sheep", "AlexNet's sheep"), ("vgg16-cat", "VGG-16's cats")):
        file = f"reproduction/pictures-{name}.json"
        found = load(file)
        half, null, reads = (
            found["grad_cam_half_of_the_sum_lies_in"],
            found["random_maps"],
            found["covering"]["reads_px"],
        )
        cells = [_percent(of["interpretable"]) for of in (half, null)]
        cells[1:1] = [_percent(half["tap"])]
        cells += [f"{_interval(reads[of], 0)}, n {reads[of]['n']}" for of in ("explainer", "performer")]
        cells.append("; ".join(str(found["theoretical_px"][of][0]) for of in ("explainer", "performer")))
        lines.append(f"| {title} ([JSON](../results/{file})) | {' | '.join(cells)} |")
    return lines


def regions() -> list[str]:
    """How often discs of the parts' size meet a part: filters, the same on other photos, and nulls."""
    names = {"explainer": "explainer", "other_photo": "… on other photos", "tap": "performer's tap"}
    names |= {"random": "random cells", "centre": "centre"}
    lines = [f"| run, discs of the parts' size | {' | '.join(names.values())} |", "|---" * (len(names) + 1) + "|"]
    for run, of in load("part-interpretability.json")["runs"].items():
        sized = of["part_sized"]
        rows = sized["layers"] | sized | {"other_photo": sized["other_photo"]["explainer"]}
        photos = ", ".join(f"{count} {part.replace('_', ' ')}" for part, count in of["photos"].items())
        lines.append(f"| {run} ({photos}) | {' | '.join(_interval(rows[key], 2) for key in names)} |")
    return lines


def flowers(name: str) -> list[str]:
    result = load(f"{name}.json")
    accuracy = result["network"]["accuracy"]
    n = next(iter(result["methods"].values()))["iou_auc_percent"]["n"]
    best = ("ours (default)", "upsampled relevant activations", "grad-cam++", "deconvnet + guided backprop")
    result["random_weights"] = {key: value for key, value in result["random_weights"].items() if key in best}
    known = f"Network: accuracy {accuracy['value']:.1%} on {accuracy['n']} held-out flowers; {n} of them measured."
    return [known, "", *benchmark_table(result)]


def lasso() -> list[str]:
    heads = ["problem", "solver", "CPU s a class", "times ours", "relative gap", "right", "peak MB"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for problem, content in json.loads((HERE / "mu_lasso.json").read_text()).items():
        size = f"{problem}: {content['features']:,} × {content['images']:,}"
        for name, row in content["contestants"].items():
            gap = "–" if row["relative_gap"] is None else f"{row['relative_gap']:.1e}"
            right = "yes" if row["right"] else "**no**"
            cells = [f"{row['cpu_s_per_class']:.3f}", f"{row['times_ours_per_class']:.1f}", gap, right]
            lines.append(f"| {size} | {name} | " + " | ".join(cells) + f" | {row['peak_mb']:,} |")
    return lines


def removal() -> list[str]:
    found = [load(path.name) for path in sorted(RESULTS.glob("removal-*.json"))]
    resnet = next(each for each in found if "resnet18" in each["performer"]["name"])
    return [*table(found), "", "ResNet-18, accuracy lost by the number of features removed:", "", *curve_table(resnet)]


def guided() -> list[str]:
    tools = ["partlens", "captum", "zennit", "grad-cam"]
    lines = ["| network | " + " | ".join(f"{t}: error, time" for t in tools) + " |", "|---" * 5 + "|"]
    for network, row in json.loads((HERE / "guided_backprop.json").read_text())["correctness"].items():
        cells = []
        for tool in tools:
            each = row.get(tool)
            if each is None:
                cells.append("–")
                continue
            error = f"**{each['error']:.2g}**" if each["error"] > 1e-5 else f"{each['error']:.1g}"
            cells.append(f"{error}, {each['cpu_time_over_plain_gradient']['median']:.2f}×")
        lines.append(f"| {network} | " + " | ".join(cells) + " |")
    return lines


def lattice() -> list[str]:
    result = json.loads((HERE / "stride_lattice.json").read_text())
    names = list(next(iter(result["networks"].values()))["lattice"])
    lines = [f"| stride 4, {result['photos']} photos | " + " | ".join(names) + " | pixels permuted |"]
    lines.append("|---" * (len(names) + 2) + "|")
    for network, row in result["networks"].items():
        indices = [row["lattice"][n]["4"]["index"] for n in names]
        cells = [f"{index['mean']:.2f} ± {index['interval_half']:.2f}" for index in indices]
        control = row["lattice"][names[0]]["4"]["permuted_index"]["mean"]
        lines.append(f"| {network} | " + " | ".join(cells) + f" | {control:.2f} |")
    return lines


def planted() -> list[str]:
    lines = ["| method | F1 of the best five | F1 of its own set | features in it | CPU s |", "|---|---|---|---|---|"]
    for name, row in json.loads((HERE / "relevant_filters.json").read_text())["methods"].items():
        values = [row.get(key) for key in ("f1_at_5", "f1_of_set", "set_size", "cpu_s")]
        cells = ["–" if v is None else f"{v['mean']:.2f} [{v['low']:.2f}, {v['high']:.2f}]" for v in values]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


RECIPES = (
    "constant",
    "plain factors",
    "teachers",
    "fewer at a time",
    "filters alike",
    "and mirror",
    "more variety",
    "sharpened",
    "as many as supported",
    "ceiling: best four candidates",
    "ceiling: all candidates",
    "ceiling: features",
)


def discovery() -> list[str]:
    """Landmark regression, a row a recipe: the mean over seeds, the mean interval over photos, and the seeds' range."""
    lines: list[str] = []
    for network, rows in load("part-discovery.json").items():
        seeds = len({row["seed"] for row in rows})
        lines += [f"{network}, {rows[0]['error']['n']} test photos, {seeds} seed{'s' * (seeds > 1)}:", ""]
        lines += ["| | K = 4 | K = 8 | K = 16 | NMI, ARI |", "|---" * 5 + "|"]
        for name in (name for name in RECIPES if any(row["recipe"] == name for row in rows)):
            own = [row for row in rows if row["recipe"] == name]
            parts = sorted({row["parts"] for row in own})
            if parts == [4, 8, 16]:
                label, cells = name, [_errors([row for row in own if row["parts"] == count]) for count in parts]
            else:
                label, cells = f"{name} ({' or '.join(map(str, parts))})", [_errors(own), "", ""]
            lines.append(f"| {label} | {' | '.join(cells)} | {_agreement(own)} |")
        lines.append("")
    return lines[:-1]


def _errors(rows: list[dict[str, Any]]) -> str:
    values = [row["error"]["value"] for row in rows]
    low, high = (fmean(row["error"]["interval"][end] for row in rows) for end in (0, 1))
    seeds = f"; {min(values):.1f} to {max(values):.1f}" if len(values) > 1 else ""
    return f"{fmean(values):.1f} [{low:.1f}, {high:.1f}]{seeds}"


def _agreement(rows: list[dict[str, Any]]) -> str:
    known = [row for row in rows if "nmi" in row and row["parts"] == rows[0]["parts"]]
    return ", ".join(f"{sum(row[key] for row in known) / len(known):.2f}" for key in ("nmi", "ari") if known)


def _interval(found: dict[str, Any], digits: int = 2) -> str:
    low, high = found["interval"]
    return f"{found['value']:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def rivals() -> list[str]:
    """Our parts beside other ways to divide a layer, a row a method; kept scores with their nulls."""
    heads = ["", "units", "kept", "other photos", "random", "foretells its loss", "other photo's", "from the mean"]
    heads += ["loss of windows, from the mean", "landmark error", "CPU time: find; foretell"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name, row in load("part-rivals.json")["methods"].items():
        kept, own = row.get("kept", {}), row.get("own foretells own", {})
        windows, units = row.get("own foretells windows", {}), own.get("units", [])
        cost = row.get("CPU time over ours", {})
        cells = [", ".join(map(str, sorted(set(units)))) if units else "–"]
        cells += [_interval(kept["parts"]) if kept else "–"]
        cells += [f"{kept[k]['value']:.2f}" if k in kept else "–" for k in ("other_photos", "random")]
        cells += [_interval(own["photos"]) if own else "–"]
        cells += [f"{own['of other photos']['value']:.2f}" if own else "–"]
        cells += [_interval(each["mean"]) if each else "–" for each in (own, windows)]
        cells += [_interval(row["landmark error"], 1) if "landmark error" in row else "–"]
        cells += ["; ".join(f"{cost[step]:.2f}" if step in cost else "–" for step in ("find", "foretell"))]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def animals() -> list[str]:
    """Parts on animals of VOC, the mean, and on birds, a row a kind of parts."""
    scores = {"error": 1, "consistency": 2, "filter_correlation": 2, "instability_all": 3, "on_mask": 2}
    heads = ["", "landmark error", "consistency", "correlation", "instability", "on the mask", "NMI, ARI"]
    lines: list[str] = []
    for network, found in load("part-animals.json").items():
        for names in ([name for name in found if name != "bird"], [name for name in found if name == "bird"]):
            if not names:
                continue
            several = [found[name] for name in names]
            counts = ", ".join(f"{name} {found[name]['first 4']['error']['n']}" for name in names)
            lines += [f"{network}, mean of the test photos of {counts}:", "", f"| {' | '.join(heads)} |"]
            lines.append("|---" * len(heads) + "|")
            for kind in several[0]:
                rows = [each[kind] for each in several]
                counts = sorted({row["parts"] for row in rows})
                label = f"{kind} ({', '.join(map(str, counts))})" if kind == "supported" else kind
                cells = [_joined([row[score] for row in rows if score in row], d) for score, d in scores.items()]
                known = [row for row in rows if "nmi" in row]
                cells.append(", ".join(f"{fmean(row[key] for row in known):.2f}" for key in ("nmi", "ari") if known))
                lines.append(f"| {label} | {' | '.join(cells)} |")
            lines.append("")
    return lines[:-1]


def _joined(found: list[dict[str, Any]], digits: int) -> str:
    """Write the mean of categories with its interval; nothing where it is not defined."""
    known = [Estimate(**(row | {"interval": tuple(row["interval"])})) for row in found if row["value"] is not None]
    if not known:
        return "–"
    return _interval(mean_of(known, [1] * len(known)).to_dict(), digits)


RUNS = {
    "vgg16-voc-paper-preset-instability": "printed (preset `paper`, 4 epochs)",
    "vgg16-voc-instability": "our default",
    "vgg16-voc-seeds-instability": "our default",
    "vgg16-cub-instability": "our default",
    "alexnet-voc-instability": "our default",
    "alexnet-voc-seeds-instability": "our default",
    "vgg16-voc-joint-instability": "our default, five at once",
    "alexnet-cub-instability": "our default",
}
PRINTED_NAMES = {"alexnet": "AlexNet", "vgg16": "VGG-16"}
RIVAL_RUNS = {
    "alexnet-voc-errors": {"explainer-cls": ("explainer", "explainer+cls")},
    "vgg16-voc-errors": {"explainer-cls": ("explainer", "explainer+cls")},
    "alexnet-voc-interpretable-cnn": {
        f"icnn-{loss}": ("interpretable", "interpretable") for loss in ("published", "released")
    },
    "vgg16-voc-interpretable-cnn": {
        f"icnn-{loss}": ("interpretable", "interpretable") for loss in ("published", "released")
    },
    "alexnet-voc-rivals": {"rivals": ("", "")},
    "vgg16-voc-rivals": {"rivals": ("", "")},
}
"""Tables of what print compares explainers with: by kind of job, whose scores they are here and in print."""

Scores = dict[tuple[str, str], dict[str, str]]


def performers() -> list[str]:
    """Held-out errors of the papers' performers beside the printed ones."""
    lines = [
        "| | cat | cow | dog | horse | sheep | mean | printed mean, VOC | birds of CUB | printed |",
        "|---" * 10 + "|",
    ]
    found = load("reproduction/performers.json")
    for network, name in (("alexnet", "AlexNet"), ("vgg16", "VGG-16")):
        cells, errors = [], []
        for category in ("cat", "cow", "dog", "horse", "sheep", "bird"):
            row = found.get(f"{network}-{category}")
            cells.append("not run" if row is None else _percent(row["error"]))
            errors += [row["error"]["value"]] if row is not None and category != "bird" else []
        lines.append(
            f"| {name} | {' | '.join(cells[:5])} | {100 * fmean(errors):.1f} ({len(errors)}) | "
            f"{_printed_error(name, VOC)} | {cells[5]} | {_printed_error(name, CUB)} |"
        )
    joint = {name: row for name, row in found.items() if "+" in name}
    if joint:
        heads = ["five at once", "another category", "always the most frequent", "wrong decisions", "always no"]
        lines += ["", f"| {' | '.join([*heads, 'printed'])} |", "|---" * 6 + "|"]
    for name, row in joint.items():
        network = PRINTED_NAMES[name.partition("-")[0]]
        printed = published("error_percent", network=network, subject="performer", data=VOC, setting="multi")
        cells = [_percent(row[key]) for key in ("error", "baseline_error", "decision_error")]
        cells += [f"{100 * row['baseline_decision_error']:.0f}", str(printed[0].average) if printed else "–"]
        lines.append(f"| {network} | {' | '.join(cells)} |")
    return lines


def _percent(estimate: dict[str, Any]) -> str:
    low, high = estimate["interval"]
    return f"{100 * estimate['value']:.1f} [{100 * low:.1f}, {100 * high:.1f}], n {estimate['n']}"


def _printed_error(network: str, data: str) -> float:
    return published("error_percent", network=network, subject="performer", data=data)[0].average


def places_with_noise() -> list[str]:
    """Instability of peaks that are at a place, off by some cells."""
    found = load("reproduction/nulls.json")
    lines = []
    for title, key in (("VOC, mean of five", "voc mean"), ("birds of CUB", "bird")):
        rows = found[key]
        noises = list(rows["centre"])
        head = f"{title}, n {rows['corner']['0']['n']}: the peak is at …"
        lines += [f"| {head} | {' | '.join(f'{n} cells off' for n in noises)} |", "|---" * (len(noises) + 1) + "|"]
        for place, row in rows.items():
            cells = [_interval(row["0"], 3), *(f"{row[n]['value']:.3f}" if n in row else "" for n in noises[1:])]
            lines.append(f"| {place} | {' | '.join(cells)} |")
        lines.append("")
    return lines[:-1]


def settings() -> list[str]:
    """The last epoch of every setting that was tried, everything at once."""
    found = load("reproduction/settings-alexnet-cat.json")
    keys = (
        "filter_2",
        "p",
        "error_increase_points",
        "lost_variance",
        "instability",
        "correlation",
        "distinct_parts",
        "spread_cells",
    )
    heads = [
        "filter loss, nats",
        "p",
        "error +points",
        "lost variance",
        "instability",
        "correlation",
        "distinct parts",
        "spread, cells",
        "dead",
    ]
    lines = ["| start, filter terms | epochs | " + " | ".join(heads) + " |", "|---" * (len(heads) + 2) + "|"]
    for run in found["runs"]:
        last, setting = run["epochs"][-1], run["setting"]
        planned = setting["epochs"] + setting.get("warmup_epochs", 0)
        done = f"{last['epoch']}" + (f" of {planned}" if last["epoch"] < planned else "")
        cells = ["–" if last[key] is None else f"{last[key] + 0.0:.3g}" for key in (*keys, "dead")]
        lines.append(f"| {setting['name']} | {done} | " + " | ".join(cells) + " |")
    for name, row in found["nulls"].items():
        shown = ["–" if row.get(key) is None else f"{row[key]:.3g}" for key in (*keys, "dead")]
        lines.append(f"| {name if name == 'tap' else f'null: {name}'} | – | " + " | ".join(shown) + " |")
    return lines


def reproduction() -> list[str]:
    """Every finished explainer beside the printed figures, one row a category and seed."""
    heads = "by largest cells, printed, top layer, printed, tap, printed, random, centre, corner, correlation, "
    heads += "distinct parts, spread, consistency, p, printed, error + points"
    names = [head.strip() for head in heads.split(",")]
    lines = ["| | filters | " + " | ".join(names) + " |", "|---" * (len(names) + 2) + "|"]
    done = set()
    for folder, title in RUNS.items():
        for (network, category, seed), mine in _scores(folder, "explainer").items():
            if (title, network, category, seed) in done:
                continue
            done.add((title, network, category, seed))
            label = f"{network}, {category}{_seed(seed)}"
            lines.append(f"| {label} | {title} | " + " | ".join(_job_cells((network, category, seed), mine)) + " |")
    return lines


def _scores(folder: str, kind: str) -> dict[tuple[str, str, str], Scores]:
    """Return the scores of a table's jobs of a kind, by performer, category and seed; none where it is not made."""
    path, found = RESULTS / "tables" / folder / "scores.csv", dict[tuple[str, str, str], Scores]()
    if path.is_file():
        with path.open() as handle:
            for row in csv.DictReader(handle):
                if row["kind"] == kind:
                    job = (row["performer"], row["category"], row["seed"])
                    found.setdefault(job, {})[row["subject"], row["score"]] = row
    return found


def beside() -> list[str]:
    """What print compares explainers with, and rivals on the same maps: a row each, scores on the same photos."""
    heads = ["", "what", "by largest cells", "printed", "random", "correlation", "spread", "consistency"]
    heads += ["error: performer", "error: with it", "more, points", "printed, mean"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for folder, kinds in RIVAL_RUNS.items():
        explained = _scores(folder, "explainer")
        for kind, (subject, in_print) in kinds.items():
            for (network, category, seed), own in _scores(folder, kind).items():
                of_all = explained.get((network, category, seed), {})
                scores = {key: row for key, row in of_all.items() if key[0] in {"random", "performer"}} | own
                units = dict.fromkeys(name for name, _ in own if not name.endswith(LARGEST))
                for name in [subject] if subject else units:
                    title = name if kind == "rivals" else kind.replace("-cls", " + cls").replace("icnn-", "ICNN, ")
                    cells = _beside_cells(PRINTED_NAMES[network], category, name, in_print, scores)
                    lines.append(f"| {network}, {category} | {title} | {' | '.join(cells)} |")
    return lines


def parts() -> list[str]:
    """Instability of the parts that are found without training, of filters that are read alike, and of nulls."""
    names = {
        "parts": "parts, by places",
        "filters, read alike": "filters of the same layer, read alike",
        "parts, largest cells": "parts, by largest cells",
        "random": "random",
        "centre": "centre",
    }
    heads = [*names.values(), "correlation", "spread", "consistency", "of filters, read alike"]
    lines = ["| | parts | " + " | ".join(heads) + " |", "|---" * (len(heads) + 2) + "|"]
    for job, scores in sorted(load("reproduction/parts.json").items()):
        network, _, category = job.rpartition("-")
        own = scores["parts"]["instability"]
        low, high = own["interval"]
        cells = [f"{own['value']:.3f} [{low:.3f}, {high:.3f}], n {own['n']}"]
        cells += [_interval(scores[name]["instability"], 3) for name in list(names)[1:]]
        cells += [f"{scores['parts'][name]['value']:.2f}" for name in ("filter_correlation", "peak_spread_cells")]
        cells += [_interval(scores[name]["consistency"], 2) for name in ("parts", "filters, read alike")]
        lines.append(f"| {network}, {category} | {scores['count']} | " + " | ".join(cells) + " |")
    return lines


def prices() -> list[str]:
    """What each p costs, what part filters alone cost, and the filters by part."""
    head = "| explainer, photos, others | fed back: p and points | part filters alone: points | filters by part |"
    lines = [head, "|---" * 4 + "|"]
    for job, found in sorted(load("reproduction/prices.json").items()):
        network, category, seed = job.split("-")
        mixed, alone = [], []
        for point in found["points"]:
            fed, own = (_interval(point[name]["error_increase_points"], 1) for name in ("mixed", "parts"))
            mixed.append(f"{point['p']:.2f}: {fed}")
            alone.append(own)
        held = found.get("parts", {}).get("filters", {})
        shares = ", ".join(f"{name} {count}" for name, count in held.items()) or "not run"
        photos = f"{found['photos']} and {found['others']}"
        label = f"{network}, {category}{_seed(seed.removeprefix('s'))}, {photos}"
        cells = [label, "; ".join(mixed), "; ".join(alone), shares]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _job_cells(job: tuple[str, str, str], scores: dict[tuple[str, str], dict[str, str]]) -> list[str]:
    network, category = PRINTED_NAMES[job[0]], job[1]
    of, printed = partial(_value, scores), partial(_printed, network, category)
    read = _largest(scores, "explainer")
    first = _value(scores, read, whole=True)
    beside = [of(read, score, ".2f") for score in ("filter_correlation", "distinct_parts", "peak_spread_cells")]
    ordinary = [of("top"), printed("instability", "performer"), of("tap"), printed("instability", "tap")]
    cost = _value(scores, "explainer", "error_increase_points", ".1f", whole=True)
    share = [of("explainer", "p", ".2f"), printed("p", "explainer"), cost]
    nulls = [of(null) for null in ("random", "centre", "corner")]
    consistent = _value(scores, read, "consistency", ".2f", whole=True)
    return [first, printed("instability", "explainer"), *ordinary, *nulls, *beside, consistent, *share]


def _seed(number: str) -> str:
    return "" if number == "0" else f", seed {number}"


def _largest(scores: Scores, subject: str) -> str:
    """Return whose scores are those of a subject by its largest cells, as print reads them."""
    return f"{subject}_largest" if (f"{subject}_largest", "instability") in scores else subject


def _value(
    scores: Scores, subject: str, score: str = "instability", digits: str = ".3f", *, whole: bool = False
) -> str:
    row = scores.get((subject, score))
    if row is None or not row["value"]:
        return "–"
    value, low, high = (f"{float(row[key]):{digits}}" if row[key] else "–" for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}], n {row['n']}" if whole else value


def _printed(network: str, category: str, measure: Any, subject: str) -> str:
    data = CUB if category == "bird" else VOC
    setting = "multi" if "+" in category else "single"
    lines = published(measure, network=network, subject=subject, data=data, setting=setting)
    alone = data == CUB or setting == "multi"
    value = lines[0].values.get(category, lines[0].average if alone else None) if lines else None
    return "–" if value is None else f"{value:.3f}"


def _beside_cells(network: str, category: str, name: str, in_print: str, scores: Scores) -> list[str]:
    read, data = _largest(scores, name), CUB if category == "bird" else VOC
    cells = [_value(scores, read, whole=True), _printed(network, category, "instability", in_print)]
    cells += [_value(scores, "random")]
    cells += [
        _value(scores, read, score, ".2f") for score in ("filter_correlation", "peak_spread_cells", "consistency")
    ]
    cells += [_value(scores, "performer", "error_percent", ".1f")]
    cells += [_value(scores, name, "error_percent", ".1f", whole=True)]
    cells += [_value(scores, name, "error_increase_points", ".1f", whole=True)]
    measure: Any = "accuracy_percent" if in_print == "interpretable" else "error_percent"
    before, after = (published(measure, network=network, subject=whose, data=data) for whose in ("performer", in_print))
    if not before or not after:
        return [*cells, "–"]
    more = after[0].average - before[0].average
    return [*cells, f"{-more if measure == 'accuracy_percent' else more:+.1f}"]


SECTIONS = {
    "part-discovery": discovery,
    "part-rivals": rivals,
    "part-animals": animals,
    "explainers": explainers,
    "performers": performers,
    "places-with-noise": places_with_noise,
    "in-short": in_short,
    "pictures": pictures,
    "regions": regions,
    "settings": settings,
    "reproduction": reproduction,
    "beside": beside,
    "parts": parts,
    "prices": prices,
    "flowers-single-6c": lambda: flowers("flowers-single-6c"),
    "flowers-double-12c": lambda: flowers("flowers-double-12c"),
    "removal": removal,
    "sanity": lambda: sanity_lines(load("sanity-flowers.json")),
    "guided": guided,
    "lattice": lattice,
    "planted": planted,
    "lasso": lasso,
}


def filled(text: str) -> str:
    """Return a page with its tables as the results are."""
    for name, make in SECTIONS.items():
        start, end = f"<!-- table: {name} -->", "<!-- end -->"
        if start in text:
            head, rest = text.split(start, 1)
            text = head + start + "\n\n" + "\n".join(make()) + "\n\n" + end + rest.split(end, 1)[1]
    return text


if __name__ == "__main__":
    for page in PAGES.glob("*.md"):
        page.write_text(filled(page.read_text()))
