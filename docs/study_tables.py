"""Tables and picture of docs/study.md from the lines of benchmarks/results/study, and of those beside it.

python docs/study_tables.py     # draws docs/study.png; the tables are filled in by make_tables.py
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

from llavakd.report.compare import Estimate, over_seeds

DOCS = Path(__file__).parent
LINES = DOCS.parent / "benchmarks" / "results"
EARLIER, TRIAL = "3,000 scenes: ", "trial: "
FOLDERS = {"study": "", "study_3000": EARLIER, "study_validation": TRIAL}
TEACHER = 1.0  # accuracy of the shipped teacher: benchmarks/results/quickstart.json
CONTROL, MAIN = "recipes/pt-sft-sft", "recipes/dpt-sft-dft"
STORED = "stored/response + visual, 16 ids at a quarter of a picture"
# LLaVA-KD's ablation of stages, mean of ten benchmarks (Qwen1.5-4B -> 0.5B); one run each, no interval.
PAPER = {"pt-sft": 54.7, "dpt-sft": 55.6, "pt-dft": 55.8, "dpt-dft": 55.9}
PAPER |= {"pt-sft-dft": 56.6, "dpt-sft-dft": 57.9, "dpt-dft-dft": 58.0}
# The same, of losses: in DPT, with SFT behind it (54.7 is PT-SFT), and in DFT, behind DPT and SFT.
PAPER_DPT, PAPER_DFT = (54.7, 54.9, 55.1, 55.6), (None, 57.2, 57.7, 57.9)
Line = dict[str, Any]


@cache
def cells() -> dict[str, dict[int, Line]]:
    """PART/CELL -> seed -> line, in the order in which they ran; those that are not the study's under FOLDERS' prefix."""
    found: dict[str, dict[int, Line]] = defaultdict(dict)
    for folder, prefix in FOLDERS.items():
        for file in sorted((LINES / folder).glob("*.jsonl")):
            for line in map(json.loads, file.read_text(encoding="utf-8").splitlines()):
                found[f"{prefix}{line['part']}/{line['cell']}"][line["seed"]] = line
    return found


def table(header: Sequence[str], rows: Iterable[Sequence[str]], text_columns: int = 1) -> str:
    """A Markdown table; all but the first columns are figures, each on one line."""
    rule = ["---"] * text_columns + ["--:"] * (len(header) - text_columns)
    text = "".join(f"| {' | '.join(cells)} |\n" for cells in (header, rule, *rows))
    return text.replace(" ± ", "\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}").replace("< 0", "<\N{NO-BREAK SPACE}0")


def shares(cell: str, value: Callable[[Line], float] = lambda line: line["accuracy"]) -> dict[int, float]:
    """A figure of a cell by seed."""
    return {seed: value(line) for seed, line in cells()[cell].items()}


def mean(values: Iterable[float], form: str = ".1f") -> str:
    """`64.2 ± 5.1`: mean and half of the 95 % interval over seeds, in percent."""
    kept = [100 * value for value in values]
    estimate = over_seeds(kept)
    spread = f" ± {estimate.half_width:.1f}" if estimate else ""
    return f"{fmean(kept):{form}}{spread}"


def difference(cell: str, other: str) -> Estimate | None:
    """Of the seeds that both have, in percent points."""
    one, two = shares(cell), shares(other)
    return over_seeds([100 * (one[seed] - two[seed]) for seed in sorted(one.keys() & two.keys())])


def told(cell: str, other: str) -> tuple[str, str]:
    """A difference with its interval, and its p."""
    return shown(difference(cell, other)) if cell != other else ("", "")


def shown(gap: Estimate | None) -> tuple[str, str]:
    """An estimate and its p in words; nothing without one."""
    if gap is None:
        return "", ""
    return f"{gap.value:+.1f} ± {gap.half_width:.1f}", "< 0.001" if gap.p < 0.001 else f"{gap.p:.3f}"


def closed(one: dict[int, float], two: dict[int, float]) -> str:
    """The share of the distance from `two` to the teacher that `one` has covered, a mean over the seeds of both."""
    found = [(one[seed] - two[seed]) / (TEACHER - two[seed]) for seed in one.keys() & two.keys()]
    return f"{100 * fmean(found):.0f} %" if one != two else ""


def recipes(prefix: str = "") -> str:
    """Every recipe beside the control of as many stages."""
    rows = []
    for cell in ordered(f"{prefix}recipes"):
        name = cell.partition("/")[2]
        control = prefix + (CONTROL if name.count("-") == 2 else "recipes/pt-sft")
        lines = cells()[cell].values()
        steps = f"{fmean(line['steps'] for line in lines):.0f}"
        right, gap = mean(line["accuracy"] for line in lines), closed(shares(cell), shares(control))
        rows.append((f"`{name}`", str(len(lines)), steps, right, *told(cell, control), gap))
    return table(
        ["recipe", "seeds", "steps", "right, %", "to the control of as many steps", "p", "gap to the teacher closed"],
        rows,
    )


def ordered(part: str) -> list[str]:
    """The cells of a part that have at least two seeds; recipes of three stages first, the control at their head."""
    found = [cell for cell, lines in cells().items() if cell.startswith(f"{part}/") and len(lines) > 1]
    return sorted(found, key=lambda cell: (-cell.count("-"), "d" in cell)) if part.endswith("recipes") else found


def kinds() -> str:
    """Accuracy by kind of question."""
    names = [CONTROL, MAIN]
    lines = {name: list(cells()[name].values()) for name in names}
    found = lines[CONTROL][0]["by_type"]
    rows = []
    for kind in found:
        values = {name: [line["by_type"][kind] for line in lines[name]] for name in names}
        gaps = [
            100 * (cells()[MAIN][s]["by_type"][kind] - cells()[CONTROL][s]["by_type"][kind]) for s in common(*names)
        ]
        gap = over_seeds(gaps)
        majority = fmean(line["majority_by_type"][kind] for line in lines[CONTROL])
        rows.append((kind, f"{100 * majority:.0f}", *(mean(values[name]) for name in names), shown(gap)[0]))
    return table(["kind", "most frequent answer, %", "`pt-sft-sft`, %", "`dpt-sft-dft`, %", "difference"], rows)


def past_plateau() -> str:
    """Recipes of three stages on the kinds that the control answers better than the most frequent answer does."""
    control = list(cells()[CONTROL].values())
    left = [
        kind
        for kind in control[0]["by_type"]
        if fmean(line["by_type"][kind] for line in control) > fmean(line["majority_by_type"][kind] for line in control)
    ]

    def score(cell: str) -> dict[int, float]:
        return shares(cell, lambda line: fmean(line["by_type"][kind] for kind in left))

    rows, two = [], score(CONTROL)
    for cell in [cell for cell in ordered("recipes") if cell.count("-") == CONTROL.count("-")]:
        one = score(cell)
        seeds = sorted(one.keys() & two.keys())
        gap = over_seeds([100 * (one[seed] - two[seed]) for seed in seeds])  # none of the control to itself
        rows.append((f"`{cell.partition('/')[2]}`", str(len(one)), mean(one.values()), *shown(gap), closed(one, two)))
    header = [f"without {', '.join(kind for kind in control[0]['by_type'] if kind not in left)}", "seeds"]
    return table([*header, "right, %", "to the control", "p", "gap to the teacher closed"], rows)


def common(*names: str) -> list[int]:
    """Seeds that all of them have."""
    return sorted(set.intersection(*(set(cells()[name]) for name in names)))


def segments() -> str:
    """Distance to the teacher by segment."""
    rows = []
    for cell in [*ordered("recipes"), *ordered("losses")]:
        values = [line["segments"] for line in cells()[cell].values()]
        row = [f"`{cell.partition('/')[2]}`"]
        for segment in ("response", "visual"):
            row.append(f"{fmean(value[segment]['kl'] for value in values):.3f}")
            row.append(f"{100 * fmean(value[segment]['agreement'] for value in values):.1f}")
        rows.append(row)
    header = ["", "answers: KL, nats", "same likeliest token, %", "pictures: KL, nats", "same likeliest token, %"]
    return table(header, rows)


def losses() -> str:
    """`dpt-sft-dft` with other losses, beside the control and the full loss."""
    rows = [("cross-entropy alone (`pt-sft-sft`)", mean(shares(CONTROL).values()), "", "", *told(CONTROL, MAIN))]
    for cell in [*ordered("losses"), MAIN, *ordered("divergences"), *ordered("stored")]:
        name = "full: response + visual + relation" if cell == MAIN else cell.partition("/")[2].replace("_", " ")
        name = f"stored teacher, {name}" if cell in ordered("stored") else name
        rows.append((name, mean(shares(cell).values()), *told(cell, CONTROL), *told(cell, MAIN)))
    return table(["losses of `dpt` and `dft`", "right, %", "to the control", "p", "to the full loss", "p"], rows)


def terms(prefix: str = "") -> str:
    """What each term adds to those before it."""
    steps = {
        "response KL, to cross-entropy": ("losses/response", CONTROL),
        "visual KL, to response KL": ("losses/response + visual", "losses/response"),
        "relation, to response and visual KL": (MAIN, "losses/response + visual"),
        "relation, to cross-entropy alone": ("losses/relation alone", CONTROL),
        "centring the relation, in the full loss": ("losses/full, relation centred", MAIN),
        "relation at 1 instead of 0.5": ("losses/full, weights 1, 1, 1", MAIN),
        "a stored teacher, in the place of one that is there": (STORED, "losses/response + visual"),
        "`dpt` instead of `pt`, before `sft`, `dft`": (MAIN, "recipes/pt-sft-dft"),
        "`dft` instead of `sft`, after `dpt`, `sft`": (MAIN, "recipes/dpt-sft-sft"),
    }
    rows = [(what, *told(*(prefix + cell for cell in pair))) for what, pair in steps.items()]
    return table(["what is added", "difference", "p"], rows)


def beside_the_paper() -> str:
    """Gains over PT-SFT, the paper's and ours."""
    rows = []
    for name, score in PAPER.items():
        cell = f"recipes/{name}"
        rows.append((f"`{name}`", f"{score - PAPER['pt-sft']:+.1f}", *told(cell, "recipes/pt-sft")))
    rows.append(("`pt-sft-sft`", "not run", *told(CONTROL, "recipes/pt-sft")))
    return table(["recipe", "paper: ten benchmarks, points over `pt-sft`", "here: points over `pt-sft`", "p"], rows)


def losses_of_the_paper() -> str:
    """What each loss adds, the paper's points in either stage and ours in both at once."""
    ours = (CONTROL, "losses/response", "losses/response + visual", MAIN)
    rows = []
    for number, what in enumerate(("response KL", "visual KL, beside it", "relation, beside both"), start=1):
        paper = [
            f"{after - before:+.1f}" if before and after else "no control"
            for before, after in (scores[number - 1 : number + 1] for scores in (PAPER_DPT, PAPER_DFT))
        ]
        rows.append((what, *paper, *told(ours[number], ours[number - 1])))
    return table(["added", "paper, in `dpt`", "paper, in `dft`", "here, in both", "p"], rows)


def pairs(part: str, header: str, main: str = "") -> str:
    """Control and distilled side by side, setting by setting; the study's own, called `main`, last."""
    settings = dict.fromkeys(cell.partition("/")[2].rpartition(", ")[0] for cell in ordered(part))
    found = {setting: (f"{part}/{setting}, distilled", f"{part}/{setting}, control") for setting in settings}
    found |= {main: (MAIN, CONTROL)} if main else {}
    rows = [
        (
            setting,
            mean(shares(two).values()),
            mean(shares(one).values()),
            *told(one, two),
            closed(shares(one), shares(two)),
        )
        for setting, (one, two) in found.items()
    ]
    return table([header, "`pt-sft-sft`, %", "`dpt-sft-dft`, %", "difference", "p", "gap closed"], rows)


def trials() -> str:
    """Each seed of the runs by which the amount of data was chosen."""
    rows = []
    for cell in ordered(f"{TRIAL}budget"):
        setting, _, kind = cell.partition("/")[2].rpartition(", ")
        if kind == "distilled":
            control = cell.replace("distilled", "control")
            each = [", ".join(f"{100 * value:.1f}" for value in shares(one).values()) for one in (control, cell)]
            rows.append((setting, *each, closed(shares(cell), shares(control))))
    return table(["scenes", "`pt-sft-sft`, %", "`dpt-sft-dft`, %", "gap closed"], rows)


def teachers() -> str:
    """Students of teachers of other qualities."""
    rows = [
        (
            "the shipped one, larger than the student",
            f"{100 * TEACHER:.1f}",
            mean(shares(MAIN).values()),
            *told(MAIN, CONTROL),
        )
    ]
    for cell in ordered("teachers"):
        known = next(iter(cells()[cell].values()))["teacher"]
        name = f"{cell.partition('/')[2]}, of the student's size"
        rows.append((name, f"{100 * known:.1f}", mean(shares(cell).values()), *told(cell, CONTROL)))
    return table(["teacher", "its own right, %", "`dpt-sft-dft`, %", "to the control", "p"], rows)


def headline() -> str:
    """The README's table."""
    names = {CONTROL: ", the equal-step control", MAIN: "", "recipes/dpt-dft-dft": ""}
    rows = [("teacher", "", f"{100 * TEACHER:.1f}", "", "")]
    for cell, role in names.items():
        name = f"`{cell.partition('/')[2]}`{role}"
        rows.append((name, str(len(cells()[cell])), mean(shares(cell).values()), *told(cell, CONTROL)))
    return table(["", "seeds", "right, %", "difference to the control", "p"], rows)


def setting() -> str:
    """Where, with what, and how many lines."""
    lines = [line for cell, found in cells().items() if ": " not in cell for line in found.values()]
    one = lines[0]
    versions = ", ".join(f"{key} {one[key]}" for key in ("torch", "transformers", "accelerate"))
    commits = ", ".join(sorted({line["commit"] for line in lines}))
    hours = sum(line["seconds"] for line in lines) / 3600
    sittings = json.loads((LINES / "study" / "sittings.json").read_text(encoding="utf-8"))
    took = " and ".join(f"{sitting['seconds'] / 60:.1f}" for sitting in sittings)
    told = f"{len(lines)} runs in {took} minutes, {sittings[0]['jobs']} at a time ({hours:.1f} hours of runs, added up)"
    devices = ", ".join(sorted({line["device"] for line in lines}))
    return f"{told}; {devices}; {versions}; commit {commits}.\n"


TABLES: dict[str, Callable[[], str]] = {
    "study": setting,
    "study recipes": recipes,
    "study kinds": kinds,
    "study past the plateau": past_plateau,
    "study losses": losses,
    "study terms": terms,
    "study segments": segments,
    "study paper": beside_the_paper,
    "study paper losses": losses_of_the_paper,
    "study answers": lambda: pairs("answers", "training answers", "30% wrong"),
    "study data": lambda: pairs("data", "scenes", "6,000 scenes"),
    "study students": lambda: pairs("students", "the student's language model", "4 x 128"),
    "study trials": trials,
    "study earlier": lambda: recipes(EARLIER),
    "study earlier terms": lambda: terms(EARLIER),
    "study earlier answers": lambda: pairs(f"{EARLIER}answers", "training answers"),
    "study earlier data": lambda: pairs(f"{EARLIER}data", "scenes"),
    "study teachers": teachers,
    "headline": headline,
}


def draw() -> None:
    """Every seed as a dot, seeds of one number joined, mean and interval beside them."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    groups = [[cell for cell in ordered("recipes") if cell.count("-") == count] for count in (1, 2)]
    groups.append([CONTROL, *ordered("losses"), MAIN])
    titles = ["two stages", "three stages", "losses of dpt-sft-dft"]
    figure, axes = plt.subplots(1, 3, figsize=(13, 4.6), sharey=True, width_ratios=[max(2, len(g)) for g in groups])
    for axis, title, group in zip(axes, titles, groups, strict=True):
        for seed in common(*group) if group else ():
            axis.plot([100 * shares(cell)[seed] for cell in group], color="0.8", linewidth=0.8, zorder=1)
        for place, cell in enumerate(group):
            values = [100 * value for value in shares(cell).values()]
            axis.scatter([place] * len(values), values, s=14, color="#3b528b", alpha=0.7, zorder=2)
            estimate = over_seeds(values)
            half = estimate.half_width if estimate else 0
            axis.errorbar(
                place + 0.22, fmean(values), yerr=half, fmt="o", color="#c03a2b", capsize=3, markersize=4, zorder=3
            )
        names = [
            "cross-entropy" if title.startswith("losses") and cell == CONTROL else cell.partition("/")[2]
            for cell in group
        ]
        names = [
            "full" if title.startswith("losses") and cell == MAIN else name
            for cell, name in zip(group, names, strict=True)
        ]
        axis.set_xticks(range(len(group)), names, rotation=35, ha="right", fontsize=8)
        axis.set_title(title, fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="0.92")
    axes[0].set_ylabel("right answers, %")
    figure.tight_layout()
    figure.savefig(DOCS / "study.png", dpi=110)


if __name__ == "__main__":
    draw()
