"""Averages, intervals and differences to the control."""

import math
from collections.abc import Sequence
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from llavakd.report.results import Results, Row

Z95 = 1.96


class Estimate(NamedTuple):
    """A share, or a difference of two, with the half-width of its 95 % interval."""

    value: float
    half_width: float
    paired: bool = False
    seeds: int = 1
    p: float = math.nan  # over seeds: of a value this far from 0 if the true one were 0


def half_width(accuracy: float, n: int) -> float:
    """Return the half-width of the 95 % Wilson interval, which stays above 0 at accuracies of 0 and 1."""
    return Z95 * math.sqrt(accuracy * (1 - accuracy) / n + Z95**2 / (4 * n**2)) / (1 + Z95**2 / n)


def difference(row: Row, control: Row) -> Estimate:
    """Subtract `control`: a paired interval where both kept their answers to the same questions, else an unpaired one."""
    value, keys = row.accuracy - control.accuracy, row.predictions.keys()
    if row.n > 1 and keys == control.predictions.keys() and _complete(row) and _complete(control):
        changes = [row.predictions[key]["correct"] - control.predictions[key]["correct"] for key in keys]
        return Estimate(value, Z95 * float(np.std(changes, ddof=1)) / math.sqrt(row.n), paired=True)
    return Estimate(value, Z95 * math.sqrt(sum(r.accuracy * (1 - r.accuracy) / r.n for r in (row, control))))


def _complete(row: Row) -> bool:
    """Tell whether the kept answers are those that the row's accuracy was computed from."""
    right = sum(answer["correct"] for answer in row.predictions.values())
    return len(row.predictions) == row.n and abs(right / row.n - row.accuracy) < 5e-4


def over_seeds(values: Sequence[float]) -> Estimate | None:
    """Average one value a seed, by Student's t with n - 1 degrees of freedom; None where they show no spread."""
    if len(values) < 2 or np.std(values) < 1e-12:
        return None
    test = stats.ttest_1samp(values, 0.0)
    low, high = test.confidence_interval()
    return Estimate(fmean(values), float(high - low) / 2, paired=True, seeds=len(values), p=float(test.pvalue))


def distilling(row: Row) -> int:
    """Count the stages of a model that distil."""
    return sum(stage in ("dpt", "dft") for stage in row.stages)


def find_control(results: Results, row: Row) -> Row | None:
    """Return the undistilled row that a row is compared to, of the same seed where there is one."""
    # Those without a distilling stage come first, then the longest trained, the strictest.
    found = [other for other in results.rows if other.stages[:1] == ["pt"]]
    name = min(found, key=lambda other: (distilling(other), -(other.raw.get("steps") or 0))).name if found else ""
    return min(results.models.get(name, ()), key=lambda other: other.seed != row.seed, default=None)


def seed_difference(results: Results, rows: Sequence[Row]) -> Estimate | None:
    """Average the differences of one recipe's rows to the control of the same seed; None for the control itself."""
    pairs = [(row, find_control(results, row)) for row in rows]
    return over_seeds([row.accuracy - other.accuracy for row, other in pairs if other and other.seed == row.seed])


def main_model(results: Results) -> list[Row]:
    """Return the rows of the most distilled model, the paper's three stages before others; none without one."""
    found = [row for row in results.rows if distilling(row)]
    main = max(found, key=lambda row: (row.stages == ["dpt", "sft", "dft"], distilling(row)), default=None)
    return results.models[main.name] if main else []


def keys(results: Results, part: str) -> list[str]:
    """The keys of one of the rows' maps (by kind, benchmark or segment), in the order in which the rows name them."""
    return list(dict.fromkeys(key for row in results.rows for key in row.raw.get(part) or {}))


def mean(rows: Sequence[Row], *path: str) -> float | None:
    """Average a number at a path of keys in the rows' results over the rows that have it, the seeds of one recipe."""
    values: list[Any] = [row.raw for row in rows]
    for key in path:
        values = [value[key] for value in values if value.get(key) is not None]
    return fmean(values) if values else None
