"""Tables of the results as plain strings, for a terminal, Markdown and HTML alike."""

from __future__ import annotations

from statistics import median

from llavakd.report.compare import difference, find_control, half_width, headline
from llavakd.report.results import Results, Row

Table = tuple[list[str], list[list[str]]]

INTERVAL_NOTE = "± is half of a 95 % interval. It covers the choice of test questions, not the luck of a training seed."


def console_rows(results: Results) -> Table:
    """Return the main table: its header and one list of strings a model."""
    header = ["model", "accuracy %", "questions", "steps", "seconds", "parameters", "difference to control"]
    rows = [
        [
            results.label(row),
            f"{100 * row.accuracy:.1f} ± {100 * half_width(row.accuracy, row.n):.1f}",
            f"{row.n:,}",
            *(_count(row.number(key)) for key in ("steps", "train_seconds", "parameters")),
            _difference(results, row),
        ]
        for row in results.rows
    ]
    return header, rows


def kind_rows(results: Results) -> Table:
    """Return accuracy by kind of question: its header and one list of strings a kind, `all` last."""
    header = ["kind", "questions", "majority %", *(f"{results.label(row)} %" for row in results.rows)]
    counts, guesses = first_map(results, "n_by_type"), first_map(results, "majority_by_type")
    rows = [
        [
            kind,
            _count(counts.get(kind)),
            _percent(guesses.get(kind)),
            *(_percent(row.by_kind("by_type").get(kind)) for row in results.rows),
        ]
        for kind in kinds(results)
    ]
    if rows:
        overall = next((row.number("majority") for row in results.rows if row.number("majority") is not None), None)
        rows.append(
            ["all", _count(results.rows[0].n), _percent(overall), *(_percent(row.accuracy) for row in results.rows)]
        )
    return header, rows


def cost_rows(results: Results) -> Table:
    """Return what the models cost to train: its header and one list of strings a model."""
    header = ["model", "parameters", "steps", "tokens", "seconds", "tokens a second"]
    rows = []
    for row in results.rows:
        tokens, seconds = row.number("tokens"), row.number("train_seconds")
        speed = tokens / seconds if tokens and seconds else None
        counts = (row.number("parameters"), row.number("steps"), tokens, seconds, speed)
        rows.append([results.label(row), *map(_count, counts)])
    return header, rows


def stage_rows(results: Results) -> Table:
    """Return what each logged stage cost: its header and one list of strings a stage."""
    header = ["run", "stage", "steps", "last loss", "tokens a second (median)", "memory GiB (peak)"]
    rows = []
    for run in results.runs:
        for stage in (stage for stage in run.stages if stage.metrics):
            last = stage.metrics[-1]
            speeds = [float(line["tokens_per_s"]) for line in stage.metrics if line.get("tokens_per_s") is not None]
            memory = [float(line["memory_gib"]) for line in stage.metrics if line.get("memory_gib") is not None]
            loss = "-" if last.get("loss") is None else f"{last['loss']:.3f}"
            peak = f"{max(memory):.2f}" if memory else "-"
            speed = _count(median(speeds) if speeds else None)
            rows.append([run.label, stage.name, _count(last["step"]), loss, speed, peak])
    return header, rows


def kinds(results: Results) -> list[str]:
    """Return the kinds of question, in the order in which the rows first name them."""
    return list(dict.fromkeys(kind for row in results.rows for kind in row.by_kind("by_type")))


def first_map(results: Results, key: str) -> dict[str, float]:
    """Return a map by kind that is a property of the test set, from the first row that has it."""
    return next((row.by_kind(key) for row in results.rows if row.by_kind(key)), {})


def markdown(results: Results) -> str:
    """Return the report as Markdown: the headline, the main table and accuracy by kind of question."""
    parts = ["# LLaVA-KD report", headline(results), _markdown_table(console_rows(results)), INTERVAL_NOTE]
    by_kind = kind_rows(results)
    if by_kind[1]:
        parts += ["## Accuracy by kind of question", _markdown_table(by_kind)]
    if results.notes:
        parts += ["## Left out", "\n".join(f"- {note}" for note in results.notes)]
    return "\n\n".join(parts) + "\n"


def _markdown_table(table: Table) -> str:
    header, rows = table
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _count(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def _difference(results: Results, row: Row) -> str:
    control = find_control(results, row)
    if control is None:
        return "-"
    return "control" if control is row else str(difference(row, control))
