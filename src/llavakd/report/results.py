"""Read finished run folders and merge them into one set of results."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llavakd.errors import UserError

TEACHER = "teacher"
ANSWER_KEYS = ("id", "question", "truth", "prediction", "correct")
STAGE_ORDER = ("pt", "dpt", "sft", "dft")

Json = dict[str, Any]


@dataclass(frozen=True, kw_only=True, eq=False)
class Row:
    """One evaluated model."""

    name: str
    seed: int | None
    accuracy: float  # share of the n test questions answered right
    n: int
    raw: Json  # the row exactly as results.json holds it; it is written back unchanged
    folder: Path  # the run folder that holds this model's evaluation
    predictions: dict[str, Json]  # lines of predictions.jsonl by question id; empty when the run kept none
    gram: NDArray[np.float32] | None  # [N, N] of the visual tokens of the probe picture, if the run kept one

    def by_kind(self, key: str) -> dict[str, float]:
        """One of the row's maps from question kind to number, empty where the run did not record it."""
        return self.raw.get(key) or {}


@dataclass(frozen=True, kw_only=True, eq=False)
class Run:
    """One run folder: a label unique among the merged runs, logged steps in order by stage, and its recipe's text."""

    folder: Path
    label: str
    stages: dict[str, list[Json]]
    recipe: str | None


@dataclass(frozen=True, kw_only=True, eq=False)
class Results:
    """All merged: `probe` are the pictures of the Gram matrices, `notes` a line for each thing that the runs lack."""

    rows: list[Row]
    runs: list[Run]
    environment: Json
    probe: list[str]
    notes: list[str]

    def label(self, row: Row) -> str:
        """The row's name, with its seed where another row has the same name."""
        shared = sum(other.name == row.name for other in self.rows) > 1
        return f"{row.name} (seed {row.seed})" if shared else row.name


def collect(runs: Sequence[Path]) -> Results:
    """Merge the results of finished run folders, rows in the order of the folders.

    Raises:
        UserError: a folder has no usable `results.json`, or two folders disagree about one row.
    """
    folders = list(dict.fromkeys(map(Path, runs)))
    if not folders:
        raise UserError("got no run folder, expected at least one; name a folder that `llava-kd train` wrote")
    environment: Json = {}
    merged: dict[tuple[str, Any], tuple[Json, list[Path]]] = {}
    for folder in folders:
        data = _read_results(folder)
        for key, value in (data.get("environment") or {}).items():
            if environment.setdefault(key, value) != value:  # listed, so that merging again changes nothing
                old, new = (item if isinstance(item, list) else [item] for item in (environment[key], value))
                environment[key] = old + [item for item in new if item not in old]
        for raw in data["rows"]:
            _merge_row(merged, raw, folder)
    notes: list[str] = []
    rows, probe = _load_rows(merged.values(), notes)
    names = [folder.resolve().name for folder in folders]
    labels = [name if names.count(name) == 1 else str(folder) for folder, name in zip(folders, names, strict=True)]
    read = [_read_run(folder, label, notes) for folder, label in zip(folders, labels, strict=True)]
    return Results(rows=rows, runs=read, environment=environment, probe=probe, notes=notes)


def _read_results(folder: Path) -> Json:
    path = folder / "results.json"
    data = _read_json(path, "rows")
    if data is None:
        raise UserError(f"{folder} has no results.json; run `llava-kd train` there first")
    for index, raw in enumerate(data["rows"]):
        missing = [key for key in ("name", "accuracy", "n") if not isinstance(raw, dict) or raw.get(key) is None]
        if missing or raw["n"] < 1:
            problem = f"lacks {', '.join(missing)}" if missing else f"has n = {raw['n']}"
            needed = "expected a name, an accuracy and n of 1 or more; evaluate it again"
            raise UserError(f"{path}: row {index} {problem}, {needed}")
    return data


def _read_json(path: Path, key: str) -> Json | None:
    """Read a JSON object that holds a list under the key; None where there is no file."""
    if not path.is_file():
        return None
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not valid JSON ({error}); run `llava-kd train` there again") from error
    if not isinstance(data, dict) or not isinstance(data.get(key), list):
        raise UserError(f'{path} has no list "{key}", as it should; run `llava-kd train` there again')
    return data


def _read_lines(path: Path, required: Sequence[str]) -> list[Json]:
    """Read a JSON object a line, each with the required keys; nothing where there is no file."""
    lines: list[Json] = []
    for number, text in enumerate(path.read_text(encoding="utf-8").split("\n") if path.is_file() else [], start=1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            line = None
        if not isinstance(line, dict) or any(key not in line for key in required):
            raise UserError(
                f"{path}, line {number} holds {text[:60]!r}, expected a JSON object with {', '.join(required)}; "
                "delete the broken line or make the file again"
            )
        lines.append(line)
    return lines


def _merge_row(merged: dict[tuple[str, Any], tuple[Json, list[Path]]], raw: Json, folder: Path) -> None:
    for other, folders in merged.values():
        if raw == other or (raw["name"] == other["name"] == TEACHER and raw["accuracy"] == other["accuracy"]):
            folders.append(folder)
            return
    key = (raw["name"], raw.get("seed"))
    if key in merged:
        raise UserError(
            f"{merged[key][1][0]} and {folder} hold different rows for {key[0]!r} with seed {key[1]}, expected one row "
            "for a name and seed; leave one of the two folders out, or train one with another seed"
        )
    merged[key] = (raw, [folder])


def _load_rows(merged: Iterable[tuple[Json, list[Path]]], notes: list[str]) -> tuple[list[Row], list[str]]:
    """Read what each model's evaluation kept; returns the rows and the probe pictures."""
    rows: list[Row] = []
    probe: Json | None = None
    for raw, folders in merged:
        name = str(raw["name"])
        folder = next((f for f in folders if (f / "evaluation" / name).is_dir()), folders[0])
        kept = folder / "evaluation" / name
        answers = _read_lines(kept / "predictions.jsonl", ANSWER_KEYS)
        if not answers:
            notes.append(f"{name}: no predictions, so it is not among the test pictures.")
        gram = np.load(kept / "gram.npy") if (kept / "gram.npy").is_file() else None
        shown = _read_json(kept.parent / "probe.json", "images")
        if gram is None:
            notes.append(f"{name}: no Gram matrix of the probe picture.")
        elif probe is None:
            probe = shown
        elif shown is not None and shown.get("id") != probe.get("id"):
            notes.append(f"{name}: its Gram matrix is of another probe picture, so it is left out.")
            gram = None
        predictions = {str(line["id"]): line for line in answers}
        scores: Json = {"seed": raw.get("seed"), "accuracy": float(raw["accuracy"]), "n": int(raw["n"])}
        rows.append(Row(name=name, **scores, raw=raw, folder=folder, predictions=predictions, gram=gram))
    return rows, probe["images"] if probe else []


def _read_run(folder: Path, label: str, notes: list[str]) -> Run:
    pipeline = _read_json(folder / "pipeline.json", "stages")
    if pipeline is not None:
        states = {str(stage["name"]): stage.get("state") for stage in pipeline["stages"]}
        notes += [f"{label}: stage {name} is {state}, not done." for name, state in states.items() if state != "done"]
        names = list(states)
    else:
        found = sorted(path.parent.name for path in folder.glob("*/metrics.jsonl"))
        names = sorted(found, key=lambda name: STAGE_ORDER.index(name) if name in STAGE_ORDER else len(STAGE_ORDER))
    stages: dict[str, list[Json]] = {}
    for name in names:
        # A resumed stage logs some steps twice; the later line is the one that led to the final weights.
        steps = {int(line["step"]): line for line in _read_lines(folder / name / "metrics.jsonl", ("step",))}
        if steps:
            stages[name] = [steps[step] for step in sorted(steps)]
    lost = [name for name in names if name not in stages]
    if lost or not names:
        notes.append(f"{label}: no metrics of {', '.join(lost) or 'any stage'}.")
    path = folder / "recipe.yaml"
    recipe = path.read_text(encoding="utf-8") if path.is_file() else None
    if recipe is None:
        notes.append(f"{label}: no recipe.yaml.")
    return Run(folder=folder, label=label, stages=stages, recipe=recipe)
