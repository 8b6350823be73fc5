"""Read finished run folders and merge them into one set of results."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

TEACHER = "teacher"
ANSWER_KEYS = ("id", "question", "truth", "prediction", "correct")
STAGE_ORDER = ("pt", "dpt", "sft", "dft")


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """One model's answer to one test question."""

    id: str
    type: str
    images: tuple[str, ...]
    question: str
    truth: str
    prediction: str
    correct: bool


@dataclass(frozen=True, kw_only=True)
class Row:
    """One evaluated model.

    Attributes:
        raw: The row exactly as `results.json` holds it; it is written back unchanged.
        folder: The run folder that holds this model's evaluation.
        predictions: Answers by question id; empty when the run kept none.
        gram: Gram matrix of the visual tokens of the probe picture, if the run kept one.
    """

    raw: Mapping[str, Any]
    folder: Path
    predictions: Mapping[str, Prediction] = field(default_factory=dict, repr=False)
    gram: NDArray[np.float32] | None = field(default=None, repr=False, compare=False)

    @property
    def name(self) -> str:
        """Name of the model, its stages joined by dashes, or `teacher`."""
        return str(self.raw["name"])

    @property
    def seed(self) -> int | None:
        """Seed of the training run."""
        return self.raw.get("seed")

    @property
    def accuracy(self) -> float:
        """Share of the test questions answered right."""
        return float(self.raw["accuracy"])

    @property
    def n(self) -> int:
        """Number of test questions."""
        return int(self.raw["n"])

    def number(self, key: str) -> float | None:
        """Return a number of the row, or None where the run did not record it."""
        value = self.raw.get(key)
        return None if value is None else float(value)

    def by_kind(self, key: str) -> dict[str, float]:
        """Return one of the maps from question kind to number, empty if the run did not record it."""
        return dict(self.raw.get(key) or {})


@dataclass(frozen=True, kw_only=True)
class StageLog:
    """What one stage of a run logged: one mapping a step, in the order of the steps."""

    name: str
    metrics: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run folder: a label unique among the merged runs, its stages and its recipe text."""

    folder: Path
    label: str
    stages: tuple[StageLog, ...]
    recipe: str | None


@dataclass(frozen=True, kw_only=True)
class Results:
    """All rows, runs and environments, merged.

    Attributes:
        probe: Pictures that the Gram matrices were computed on.
        notes: One line for each thing that the run folders lack.
    """

    rows: tuple[Row, ...]
    runs: tuple[Run, ...]
    environment: Mapping[str, Any]
    probe: tuple[str, ...]
    notes: tuple[str, ...]

    def label(self, row: Row) -> str:
        """Return the row's name, with its seed where another row has the same name."""
        shared = sum(other.name == row.name for other in self.rows) > 1
        return f"{row.name} (seed {row.seed})" if shared else row.name


def collect(runs: Sequence[Path]) -> Results:
    """Merge the results of finished run folders.

    Args:
        runs: Run folders, each with a `results.json`.

    Returns:
        The merged results, rows in the order of the folders.

    Raises:
        ValueError: If a folder has no usable `results.json`, or two folders disagree about one row.
    """
    folders = list(dict.fromkeys(Path(run) for run in runs))
    if not folders:
        raise ValueError("got no run folder, expected at least one; name a folder that `llava-kd train` wrote")
    notes: list[str] = []
    environment: dict[str, Any] = {}
    merged: dict[tuple[str, Any], tuple[dict[str, Any], list[Path]]] = {}
    for folder in folders:
        data = _read_results(folder)
        environment = _merge_environment(environment, data.get("environment") or {})
        for raw in data["rows"]:
            _merge_row(merged, raw, folder)
    rows, probe = _load_rows(list(merged.values()), notes)
    names = [folder.resolve().name for folder in folders]
    read = tuple(
        _read_run(folder, name if names.count(name) == 1 else str(folder), notes)
        for folder, name in zip(folders, names, strict=True)
    )
    return Results(rows=rows, runs=read, environment=environment, probe=probe, notes=tuple(notes))


def _read_results(folder: Path) -> dict[str, Any]:
    path = folder / "results.json"
    if not path.is_file():
        raise ValueError(f"{folder} has no results.json; run `llava-kd train` there first")
    data = _read_json(path, "rows")
    for index, raw in enumerate(data["rows"]):
        missing = [key for key in ("name", "accuracy", "n") if not isinstance(raw, dict) or raw.get(key) is None]
        if missing or raw["n"] < 1:
            problem = f"lacks {', '.join(missing)}" if missing else f"has n = {raw['n']}"
            raise ValueError(
                f"{path}: row {index} {problem}, expected a name, an accuracy and n of 1 or more; evaluate it again"
            )
    return data


def _read_json(path: Path, key: str) -> dict[str, Any]:
    """Read a JSON object that holds a list under the key."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); run `llava-kd train` there again") from error
    if not isinstance(data, dict) or not isinstance(data.get(key), list):
        raise ValueError(
            f'{path} has no list "{key}", expected {{"{key}": [...], ...}}; run `llava-kd train` there again'
        )
    return data


def _merge_environment(first: dict[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Keep what agrees; make a list of what differs, so that merging again changes nothing."""
    merged = dict(first)
    for key, value in second.items():
        if key not in merged:
            merged[key] = value
        elif merged[key] != value:
            old, new = (item if isinstance(item, list) else [item] for item in (merged[key], value))
            merged[key] = old + [item for item in new if item not in old]
    return merged


def _merge_row(
    merged: dict[tuple[str, Any], tuple[dict[str, Any], list[Path]]], raw: dict[str, Any], folder: Path
) -> None:
    for other, folders in merged.values():
        same_teacher = raw["name"] == other["name"] == TEACHER and raw["accuracy"] == other["accuracy"]
        if raw == other or same_teacher:
            folders.append(folder)
            return
    key = (raw["name"], raw.get("seed"))
    if key in merged:
        raise ValueError(
            f"{merged[key][1][0]} and {folder} hold different rows for {key[0]!r} with seed {key[1]}, expected one row "
            "for a name and seed; leave one of the two folders out, or train one with another seed"
        )
    merged[key] = (raw, [folder])


def _load_rows(
    merged: Sequence[tuple[dict[str, Any], list[Path]]], notes: list[str]
) -> tuple[tuple[Row, ...], tuple[str, ...]]:
    rows: list[Row] = []
    probe: dict[str, Any] | None = None
    for raw, folders in merged:
        name = str(raw["name"])
        folder = next((f for f in folders if (f / "evaluation" / name).is_dir()), folders[0])
        answers = folder / "evaluation" / name / "predictions.jsonl"
        if not answers.is_file():
            notes.append(f"{name}: no predictions, so it is not among the test pictures.")
        matrix, picture = answers.with_name("gram.npy"), folder / "evaluation" / "probe.json"
        gram = np.load(matrix) if matrix.is_file() else None
        shown = _read_json(picture, "images") if picture.is_file() else None
        if gram is None:
            notes.append(f"{name}: no Gram matrix of the probe picture.")
        elif probe is None:
            probe = shown
        elif shown is not None and shown.get("id") != probe.get("id"):
            notes.append(f"{name}: its Gram matrix is of another probe picture, so it is left out.")
            gram = None
        predictions = (
            {p.id: p for p in map(_prediction, _read_lines(answers, ANSWER_KEYS))} if answers.is_file() else {}
        )
        rows.append(Row(raw=raw, folder=folder, predictions=predictions, gram=gram))
    return tuple(rows), tuple(probe["images"]) if probe else ()


def _prediction(line: Mapping[str, Any]) -> Prediction:
    return Prediction(
        id=str(line["id"]),
        type=str(line.get("type", "")),
        images=tuple(line.get("images") or ()),
        question=str(line["question"]),
        truth=str(line["truth"]),
        prediction=str(line["prediction"]),
        correct=bool(line["correct"]),
    )


def _read_lines(path: Path, required: Sequence[str]) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    for number, text in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            line = None
        if not isinstance(line, dict) or any(key not in line for key in required):
            raise ValueError(
                f"{path}, line {number} holds {text[:60]!r}, expected a JSON object with {', '.join(required)}; "
                "delete the broken line or make the file again"
            )
        lines.append(line)
    return lines


def _read_run(folder: Path, label: str, notes: list[str]) -> Run:
    pipeline, recipe = folder / "pipeline.json", folder / "recipe.yaml"
    if pipeline.is_file():
        stages = _read_json(pipeline, "stages")["stages"]
        names = [str(stage["name"]) for stage in stages]
        for stage in stages:
            if stage.get("state") != "done":
                notes.append(f"{label}: stage {stage['name']} is {stage.get('state')}, not done.")
    else:
        found = sorted(path.parent.name for path in folder.glob("*/metrics.jsonl"))
        names = sorted(found, key=lambda name: STAGE_ORDER.index(name) if name in STAGE_ORDER else len(STAGE_ORDER))
    logs: list[StageLog] = []
    for name in names:
        path = folder / name / "metrics.jsonl"
        if path.is_file():
            # A resumed stage logs some steps twice; the later line is the one that led to the final weights.
            steps = {int(line["step"]): line for line in _read_lines(path, ("step",))}
            logs.append(StageLog(name=name, metrics=tuple(steps[step] for step in sorted(steps))))
    lost = [name for name in names if not any(log.name == name for log in logs)]
    if lost or not names:
        notes.append(f"{label}: no metrics of {', '.join(lost) or 'any stage'}.")
    text = recipe.read_text(encoding="utf-8") if recipe.is_file() else None
    if text is None:
        notes.append(f"{label}: no recipe.yaml.")
    return Run(folder=folder, label=label, stages=tuple(logs), recipe=text)
