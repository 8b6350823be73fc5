"""Read finished run folders and merge them into one set of results."""

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from llavakd.errors import UserError

TEACHER = "teacher"
STAGES = ("pt", "dpt", "sft", "dft")  # in the order of training
AGAIN = "mend or delete it, or run `llava-kd train` there again"
ANSWER: dict[str, type] = {"id": str, "question": str, "truth": str, "prediction": str, "correct": bool}

Json = dict[str, Any]


class Run(NamedTuple):
    """What one run folder holds; the label is unique among the merged runs."""

    folder: Path
    label: str
    results: Json  # results.json
    ledger: dict[str, Json]  # what pipeline.json says of each stage, in order
    stages: dict[str, list[Json]]  # the logged steps of each stage that kept any, in order
    recipe: str | None
    probe: Json | None  # the picture that the Gram matrices are of


class Row(NamedTuple):
    """One evaluated model."""

    name: str
    seed: int | None
    accuracy: float  # share of the n test questions answered right
    n: int
    raw: Json  # the row exactly as results.json holds it; it is written back unchanged
    run: Run  # the run that holds this model's evaluation
    predictions: dict[str, Json]  # lines of predictions.jsonl by question id; empty when the run kept none
    gram: NDArray[np.float32] | None  # [N, N] of the visual tokens, if the run kept one of the report's probe picture

    @property
    def stages(self) -> list[str]:
        """The stages that made the model: those that its name tells, else those of its run; none for a teacher."""
        words = self.name.split("-")
        return [] if TEACHER in words else [word for word in words if word in STAGES] or list(self.run.ledger)


class Results(NamedTuple):
    """All merged: values of the environment that differ are lists, and all Gram matrices are of the probe picture."""

    rows: list[Row]
    runs: list[Run]
    environment: Json
    probe: Json

    @property
    def models(self) -> dict[str, list[Row]]:
        """The rows by name: the seeds of each recipe."""
        return {row.name: [other for other in self.rows if other.name == row.name] for row in self.rows}

    def label(self, row: Row) -> str:
        """The row's name, with its seed where another row has the same name."""
        return f"{row.name} (seed {row.seed})" if len(self.models[row.name]) > 1 else row.name


def collect(runs: Sequence[Path]) -> Results:
    """Merge finished run folders, rows in the folders' order; UserError where one is unusable or two disagree."""
    folders = list(dict.fromkeys(Path(run).resolve() for run in runs))
    if not folders:
        raise UserError("got no run folder, expected at least one; name a folder that `llava-kd train` wrote")
    root = os.path.commonpath([folder.parent for folder in folders])
    found = [_read_run(folder, str(folder.relative_to(root))) for folder in folders]
    probe: Json = next((run.probe for run in found if run.probe), {"images": []})
    environment: dict[str, list[Any]] = {}
    for key, value in (item for run in found for item in (run.results.get("environment") or {}).items()):
        known = environment.setdefault(key, [])
        known += [item for item in (value if isinstance(value, list) else [value]) if item not in known]
    rows = []
    for raw, holders in _merge_rows(found):
        # What the model's evaluation kept is in the first of the runs that has any of it.
        run = next((run for run in holders if (run.folder / "evaluation" / raw["name"]).is_dir()), holders[0])
        kept = run.folder / "evaluation" / raw["name"]
        predictions = {line["id"]: line for line in _read(kept / "predictions.jsonl", **ANSWER)}
        same_picture = run.probe is None or run.probe.get("id") == probe.get("id")
        gram = np.load(kept / "gram.npy") if same_picture and (kept / "gram.npy").is_file() else None
        rows.append(Row(raw["name"], raw.get("seed"), raw["accuracy"], raw["n"], raw, run, predictions, gram))
    return Results(rows, found, {key: known if known[1:] else known[0] for key, known in environment.items()}, probe)


def _merge_rows(runs: Sequence[Run]) -> list[tuple[Json, list[Run]]]:
    """Each row once, with the runs that hold it; a teacher measured in several runs is one row."""
    merged: list[tuple[Json, list[Run]]] = []
    for run, raw in ((source, raw) for source in runs for raw in source.results["rows"]):
        for other, holders in merged:
            if raw == other or (raw["name"] == other["name"] == TEACHER and raw["accuracy"] == other["accuracy"]):
                holders.append(run)
                break
            if (raw["name"], raw.get("seed")) == (other["name"], other.get("seed")):
                told = f"hold different rows for {raw['name']!r} with seed {raw.get('seed')}, expected one"
                hint = "leave one of the folders out, or train with another seed"
                raise UserError(f"{holders[0].folder} and {run.folder} {told}; {hint}")
        else:
            merged.append((raw, [run]))
    return merged


def _read_run(folder: Path, label: str) -> Run:
    results = next(_read(folder / "results.json", rows=list), None)
    if results is None:
        raise UserError(f"{folder} has no results.json; run `llava-kd train` there first")
    for index, raw in enumerate(results["rows"]):
        where = f"{folder / 'results.json'}: row {index}"
        if _check(raw, where, name=str, accuracy=float, n=int)["n"] < 1:
            raise UserError(f"{where} has n = {raw['n']}, expected 1 or more questions; evaluate it again")
    usual = [{"name": name, "state": "done"} for name in STAGES if (folder / name / "metrics.jsonl").is_file()]
    pipeline = next(_read(folder / "pipeline.json", stages=list), {"stages": usual})
    ledger = {stage["name"]: stage for stage in pipeline["stages"]}
    stages = {name: lines for name in ledger if (lines := [*_read(folder / name / "metrics.jsonl", step=int)])}
    recipe = path.read_text(encoding="utf-8") if (path := folder / "recipe.yaml").is_file() else None
    probe = next(_read(folder / "evaluation" / "probe.json", images=list), None)
    return Run(folder, label, results, ledger, stages, recipe, probe)


def _read(path: Path, **needed: type) -> Iterator[Json]:
    """The JSON object of a file, or one a line of .jsonl, each with the needed keys; nothing without the file."""
    text, lines = path.read_text(encoding="utf-8") if path.is_file() else "", path.suffix == ".jsonl"
    # Not splitlines, which also splits at characters that JSON may hold.
    for number, part in enumerate(text.split("\n") if lines else [text], start=1):
        where = f"{path}, line {number}" if lines else f"{path}"
        try:
            if part.strip():
                yield _check(json.loads(part), where, **needed)
        except json.JSONDecodeError as error:
            raise UserError(f"{where} is not valid JSON ({error}); {AGAIN}") from error


def _check(data: Any, where: str, **needed: type) -> Json:
    """Return a JSON object if it has the needed keys."""
    for key, kind in needed.items():
        if not isinstance(data, dict) or not isinstance(data.get(key), (int, float) if kind is float else kind):
            raise UserError(f'{where} lacks {key}: no {kind.__name__} "{key}" in {str(data)[:60]}; {AGAIN}')
    return data
