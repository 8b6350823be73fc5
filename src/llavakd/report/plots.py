"""Plots as inline SVG and pictures as base64 PNG, all of them drawn without pyplot's global state."""

import base64
import io
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter
from numpy.typing import NDArray
from PIL import Image

from llavakd.report.compare import half_width
from llavakd.report.results import TEACHER, Results, Run
from llavakd.report.tables import first_map, kinds

LOSS_PARTS = ("loss", "ce", "response_kl", "visual_kl", "relation")
COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#999999")
NEUTRAL = "#8a8a8a"
MAX_POINTS = 150
MAX_PIXELS = 256

STYLE: Any = {
    "font.size": 8.0,
    "svg.fonttype": "none",
    "svg.hashsalt": "llavakd",  # else the ids, and so the bytes of the report, differ each time
    "text.parse_math": False,
    **{key: NEUTRAL for key in ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")},
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def colour(index: int) -> str:
    """The colour of the model or run at an index; it reads on white and on black."""
    return COLOURS[index % len(COLOURS)]


def run_colour(results: Results, run: Run) -> str:
    """The colour of the run's own model, so that a colour means one thing in the whole report."""
    own = [i for i, row in enumerate(results.rows) if row.folder == run.folder and row.name != TEACHER]
    return colour(own[-1] if own else len(results.rows) + results.runs.index(run))


def loss_curves(results: Results) -> dict[str, str]:
    """SVG text by loss part, for each part that any run logged."""
    logged = {part for run in results.runs for lines in run.stages.values() for line in lines for part in line}
    return {part: _loss_panel(results, part) for part in LOSS_PARTS if part in logged}


@matplotlib.rc_context(STYLE)
def _loss_panel(results: Results, part: str) -> str:
    figure = Figure(figsize=(3.6, 2.3), layout="constrained")
    axes = figure.subplots()
    drawn: list[float] = []
    for run in results.runs:
        for first, lines in zip(_starts(run), run.stages.values(), strict=True):
            points = [(first + line["step"], line[part]) for line in lines if line.get(part) is not None]
            if points:
                bins = np.array_split(np.asarray(points, dtype=float), min(len(points), MAX_POINTS))
                steps, means = np.stack([chunk.mean(axis=0) for chunk in bins], axis=1)
                axes.plot(steps, means, color=run_colour(results, run), linewidth=1.2, alpha=0.85)
                drawn += means[np.isfinite(means)].tolist()
    if drawn and min(drawn) > 0 and max(drawn) > 30 * min(drawn):
        axes.set_yscale("log")
        # The default writes powers as math text, which `text.parse_math` leaves as it stands.
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    _mark_stages(axes, results.runs)
    axes.set_xlabel("step")
    return _svg(figure, f"loss-{part}")


def _starts(run: Run) -> list[int]:
    """The step of the whole run at which each stage starts."""
    return list(accumulate((int(lines[-1]["step"]) for lines in run.stages.values()), initial=0))[:-1]


def _mark_stages(axes: Axes, runs: Sequence[Run]) -> None:
    reach = axes.get_xlim()[1]
    labels: list[tuple[float, list[str]]] = []
    for x, name in sorted(mark for run in runs for mark in zip(_starts(run), run.stages, strict=True)):
        axes.axvline(x, color=NEUTRAL, linewidth=0.5, zorder=0)
        if labels and x - labels[-1][0] < 0.1 * reach:  # too near for a label of its own
            labels[-1][1].append(name)
        else:
            labels.append((x, [name]))
    for place, names in labels:
        text = " / ".join(dict.fromkeys(names))
        axes.annotate(text, (place, 1), xycoords=("data", "axes fraction"), xytext=(2, 1), textcoords="offset points")


@matplotlib.rc_context(STYLE)
def kind_bars(results: Results) -> str | None:
    """SVG text, accuracy by kind of question: one bar a model, a tick where a majority guesser lands; None without."""
    names, count = kinds(results), len(results.rows)
    if not names:
        return None
    counts, guesses = first_map(results, "n_by_type"), first_map(results, "majority_by_type")
    figure = Figure(figsize=(4.4, 0.6 + len(names) * (0.13 * count + 0.17)), layout="constrained")
    axes = figure.subplots()
    thick = 0.8 / count
    for index, row in enumerate(results.rows):
        right = np.array([row.by_kind("by_type").get(name, np.nan) for name in names])
        widths = [half_width(v, int(counts[k])) if counts.get(k) else 0.0 for v, k in zip(right, names, strict=True)]
        places = np.arange(len(names)) - 0.4 + (index + 0.5) * thick
        axes.barh(places, 100 * right, height=0.9 * thick, color=colour(index))
        bars = axes.errorbar(100 * right, places, xerr=100 * np.array(widths), fmt="none", linewidth=0.8)
        bars.lines[2][0].set(color=NEUTRAL, gid=f"strong-{index}")
    for line, name in enumerate(names):
        if name in guesses:
            axes.plot([100 * guesses[name]] * 2, [line - 0.45, line + 0.45], "k", gid=f"strong-majority-{line}")
    axes.set(yticks=range(len(names)), yticklabels=names, xlim=(0, 100), xlabel="accuracy %", axisbelow=True)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color=NEUTRAL, alpha=0.3, linewidth=0.5)
    axes.invert_yaxis()
    return _svg(figure, "kinds")


def gram_pictures(grams: Sequence[NDArray[np.float32]]) -> tuple[list[str], tuple[float, float], str]:
    """Draw square matrices, at least one, on one colour scale, each divided by its Frobenius norm.

    Returns one PNG data URI a matrix, the values at the two ends of the scale, and the scale as a PNG data URI.
    """
    scaled = [gram / max(float(np.linalg.norm(gram)), 1e-12) for gram in grams]
    low, high = np.percentile(np.concatenate([matrix.ravel() for matrix in scaled]), [1, 99])
    shades = [np.clip((matrix - low) / max(high - low, 1e-12), 0, 1) for matrix in scaled]
    uris = []
    for shade in (*shades, np.linspace(0, 1, 128)[None]):
        picture = Image.fromarray(matplotlib.colormaps["viridis"](shade, bytes=True)).convert("RGB")
        picture.thumbnail((MAX_PIXELS, MAX_PIXELS), Image.Resampling.BOX, reducing_gap=None)
        uris.append(_png(picture))
    return uris[:-1], (float(low), float(high)), uris[-1]


def picture_uri(path: str) -> str | None:
    """A picture file as a PNG data URI, shrunk if it is large, or None if it cannot be read."""
    try:
        with Image.open(path) as opened:
            picture = opened.convert("RGB")
    except OSError:
        return None
    picture.thumbnail((MAX_PIXELS, MAX_PIXELS))
    return _png(picture)


def _png(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _svg(figure: Figure, prefix: str) -> str:
    """Return the figure as SVG for pasting into HTML, its ids prefixed so that two figures don't share them."""
    buffer = io.StringIO()
    nothing = {"Creator": None, "Date": None, "Format": None, "Type": None}
    figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = buffer.getvalue()
    for mark in ('id="', "url(#", 'href="#'):
        text = text.replace(mark, f"{mark}{prefix}-")
    return text[text.index("<svg") :]
