"""Intervals, differences to the control and the headline sentence."""

import math
from typing import NamedTuple

import numpy as np

from llavakd.report.results import TEACHER, Results, Row

Z95 = 1.96


class Difference(NamedTuple):
    """Accuracy of one row minus that of another, with the half-width of its 95 % interval."""

    value: float
    half_width: float
    paired: bool


def half_width(accuracy: float, n: int) -> float:
    """Return the half-width of the 95 % Wilson interval, which stays above 0 at accuracies of 0 and 1."""
    spread = math.sqrt(accuracy * (1 - accuracy) / n + Z95**2 / (4 * n**2))
    return Z95 * spread / (1 + Z95**2 / n)


def difference(row: Row, control: Row) -> Difference:
    """Subtract `control`: a paired interval where both kept their answers to the same questions, else an unpaired one."""
    value = row.accuracy - control.accuracy
    if row.n > 1 and row.predictions.keys() == control.predictions.keys() and _complete(row) and _complete(control):
        changes = [row.predictions[key]["correct"] - control.predictions[key]["correct"] for key in row.predictions]
        return Difference(value, Z95 * float(np.std(changes, ddof=1)) / math.sqrt(row.n), paired=True)
    variance = sum(r.accuracy * (1 - r.accuracy) / r.n for r in (row, control))
    return Difference(value, Z95 * math.sqrt(variance), paired=False)


def _complete(row: Row) -> bool:
    """Tell whether the kept answers are those that the row's accuracy was computed from."""
    right = sum(answer["correct"] for answer in row.predictions.values())
    return len(row.predictions) == row.n and abs(right / row.n - row.accuracy) < 5e-4


def find_control(results: Results, row: Row) -> Row | None:
    """Return the undistilled row that a row is compared to, of the same seed where there is one.

    Of rows named "pt-..." those without a distilling stage come first, then the longest trained: the strictest one.
    """
    found = [other for other in results.rows if other.name.startswith("pt-")]
    if not found:
        return None
    name = min(found, key=lambda other: (_distilling(other), -(other.raw.get("steps") or 0))).name
    return min((other for other in found if other.name == name), key=lambda other: other.seed != row.seed)


def _distilling(row: Row) -> int:
    return sum(stage in ("dpt", "dft") for stage in row.name.split("-"))


def headline(results: Results) -> str:
    """Say in plain words whether distillation helped, for each seed of the most distilled model."""
    distilled = [row for row in results.rows if row.name != TEACHER and _distilling(row)]
    if not distilled:
        return "No comparison: there is no distilled row (a name with dpt or dft in it)."
    main = max(distilled, key=lambda row: (row.name == "dpt-sft-dft", _distilling(row))).name
    pairs = [(row, find_control(results, row)) for row in distilled if row.name == main]
    told = [_sentence(results, row, control) for row, control in pairs if control and control.name != main]
    return " ".join(told) or 'No comparison: there is no control row (a name that starts with "pt-").'


def _sentence(results: Results, row: Row, control: Row) -> str:
    value, half, paired = difference(row, control)
    verdict = "No difference seen"
    if abs(value) > half:
        verdict = f"Distillation {'helps' if value > 0 else 'hurts'} here"
    text = (
        f"{verdict}: {results.label(row)} answers {100 * row.accuracy:.1f} % right and the control "
        f"{results.label(control)} {100 * control.accuracy:.1f} %, a difference of {100 * value:+.1f} points "
        f"(95 % interval {100 * (value - half):+.1f} to {100 * (value + half):+.1f}, "
        f"{'paired by question' if paired else 'not paired'})."
    )
    steps = row.raw.get("steps"), control.raw.get("steps")
    if None not in steps and steps[0] != steps[1]:
        text += f" They did not train equally long: {steps[0]:,.0f} and {steps[1]:,.0f} steps."
    return text
