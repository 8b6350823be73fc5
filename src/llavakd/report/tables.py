"""Tables of the results as plain strings, (header, rows), for a terminal, Markdown and HTML alike."""

from statistics import median

from llavakd.report.compare import difference, find_control, half_width
from llavakd.report.results import Results, Row

Table = tuple[list[str], list[list[str]]]

INTERVAL_NOTE = "± is half of a 95 % interval. It covers the choice of test questions, not the luck of a training seed."


def console_rows(results: Results) -> Table:
    """The main table: what each model answers right and how that differs from the control."""
    rows = []
    for row in results.rows:
        accuracy = f"{100 * row.accuracy:.1f} ± {100 * half_width(row.accuracy, row.n):.1f}"
        costs = [_number(row.raw.get(key)) for key in ("steps", "train_seconds", "parameters")]
        rows.append([results.label(row), accuracy, _number(row.n), *costs, _difference(results, row)])
    return ["model", "accuracy %", "questions", "steps", "seconds", "parameters", "difference to control"], rows


def kind_rows(results: Results) -> Table:
    """Accuracy by kind of question, `all` last; no rows where no run recorded it."""
    counts, guesses = first_map(results, "n_by_type"), first_map(results, "majority_by_type")
    rows = []
    for kind in kinds(results):
        right = [_percent(row.by_kind("by_type").get(kind)) for row in results.rows]
        rows.append([kind, _number(counts.get(kind)), _percent(guesses.get(kind)), *right])
    if rows:
        majority = next((row.raw["majority"] for row in results.rows if row.raw.get("majority") is not None), None)
        means = [_percent(row.accuracy) for row in results.rows]
        rows.append(["all", _number(results.rows[0].n), _percent(majority), *means])
    return ["kind", "questions", "majority %", *(f"{results.label(row)} %" for row in results.rows)], rows


def cost_rows(results: Results) -> Table:
    """What each model cost to train."""
    rows = []
    for row in results.rows:
        parameters, steps, tokens, seconds = map(row.raw.get, ("parameters", "steps", "tokens", "train_seconds"))
        speed = tokens / seconds if tokens and seconds else None
        rows.append([results.label(row), *map(_number, (parameters, steps, tokens, seconds, speed))])
    return ["model", "parameters", "steps", "tokens", "seconds", "tokens a second"], rows


def stage_rows(results: Results) -> Table:
    """What each logged stage of each run cost."""
    rows = []
    for run in results.runs:
        for stage, lines in run.stages.items():
            speeds = [line["tokens_per_s"] for line in lines if line.get("tokens_per_s") is not None]
            peak = max((line["memory_gib"] for line in lines if line.get("memory_gib") is not None), default=None)
            last = [_number(lines[-1]["step"]), _number(lines[-1].get("loss"), 3)]
            rows.append([run.label, stage, *last, _number(median(speeds) if speeds else None), _number(peak, 2)])
    return ["run", "stage", "steps", "last loss", "tokens a second (median)", "memory GiB (peak)"], rows


def environment_rows(results: Results) -> Table:
    """Versions and devices; where runs differ, all of them."""
    values = {key: value if isinstance(value, list) else [value] for key, value in results.environment.items()}
    return ["what", "value"], [[key, ", ".join(map(str, value))] for key, value in values.items()]


def kinds(results: Results) -> list[str]:
    """The kinds of question, in the order in which the rows first name them."""
    return list(dict.fromkeys(kind for row in results.rows for kind in row.by_kind("by_type")))


def first_map(results: Results, key: str) -> dict[str, float]:
    """A map by kind that is a property of the test set, from the first row that has it."""
    return next((row.by_kind(key) for row in results.rows if row.by_kind(key)), {})


def _number(value: float | None, decimals: int = 0) -> str:
    return "-" if value is None else f"{value:,.{decimals}f}"


def _percent(value: float | None) -> str:
    return _number(None if value is None else 100 * value, 1)


def _difference(results: Results, row: Row) -> str:
    control = find_control(results, row)
    if control is None or control is row:
        return "-" if control is None else "control"
    gap = difference(row, control)
    return f"{100 * gap.value:+.1f} ± {100 * gap.half_width:.1f}"
