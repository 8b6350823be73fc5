"""Small fake run folders."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from llavakd.report import compare, texts
from llavakd.report.results import Results
from llavakd.templates import render

KINDS = ("count", "colour")
Writer = Callable[..., Path]


def write_run(
    folder: Path,
    correct: Mapping[str, Sequence[bool]],
    *,
    stages: Sequence[str] = ("dpt", "sft", "dft"),
    seed: int = 0,
    prediction: str = "blue",
    evaluation: bool = True,
    pictures: bool = True,
    gram: bool = True,
    metrics: bool = True,
    steps: int = 900,
    kinds: Sequence[str] = KINDS,
) -> Path:
    """Write a finished run whose models answer right as `correct` says, one flag a question."""
    folder.mkdir(parents=True)
    picture = folder / "picture.png"
    Image.fromarray(np.full((8, 8, 3), 120, dtype=np.uint8)).save(picture)
    images = [str(picture)] if pictures else []
    rows = []
    for place, (name, flags) in enumerate(correct.items()):
        lines = [
            {
                "id": f"q{i}",
                "type": kinds[i % len(kinds)],
                "images": images,
                "question": f"What is {i}?",
                "truth": "red",
                "prediction": "red" if right else prediction,
                "correct": right,
            }
            for i, right in enumerate(flags)
        ]
        by_type = {kind: [line["correct"] for line in lines if line["type"] == kind] for kind in kinds}
        teacher = name == "teacher"
        rows.append(
            {
                "name": name,
                "seed": seed,
                "accuracy": sum(flags) / len(flags),
                "by_type": {kind: sum(x) / len(x) for kind, x in by_type.items()},
                "n": len(flags),
                "n_by_type": {kind: len(x) for kind, x in by_type.items()},
                "majority_by_type": {kind: 0.3 for kind in kinds},
                "majority": 0.35,
                "steps": None if teacher else steps,
                "train_seconds": None if teacher else 200.5,
                "tokens": None if teacher else 1_234_567,
                "parameters": 7_654_321,
            }
        )
        target = folder / "evaluation" / name
        target.mkdir(parents=True)
        if evaluation:
            (target / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        if gram:
            tokens = np.random.default_rng(place).normal(size=(16, 6)).astype(np.float32)
            np.save(target / "gram.npy", tokens @ tokens.T)
    if gram:
        (folder / "evaluation" / "probe.json").write_text(json.dumps({"id": "p0", "images": [str(picture)]}))
    environment = {"torch": "2.11", "device": "cpu"}
    (folder / "results.json").write_text(json.dumps({"rows": rows, "environment": environment}))
    done = [{"name": stage, "state": "done"} for stage in stages]
    (folder / "pipeline.json").write_text(json.dumps({"name": folder.name, "stages": done}))
    (folder / "recipe.yaml").write_text("student: <tiny>\n")
    for stage in stages if metrics else ():
        write_metrics(folder / stage, stage, steps // len(stages))
    return folder


def edit_row(run: Path, index: int, **changes: object) -> None:
    """Change one row of a run's results."""
    path = run / "results.json"
    data = json.loads(path.read_text())
    data["rows"][index] |= changes
    path.write_text(json.dumps(data))


def write_metrics(folder: Path, stage: str, steps: int) -> None:
    """Write falling loss curves; distilling stages log the parts that plain ones lack."""
    folder.mkdir()
    rng = np.random.default_rng(len(stage) + steps)
    lines = []
    for step in range(1, steps + 1):
        fall = 0.3 + math.exp(-step / (0.2 * steps)) + 0.05 * float(rng.normal())
        line = {"stage": stage, "step": step, "loss": 2 * fall, "ce": fall, "lr": 1e-3, "grad_norm": 1.0}
        if stage in ("dpt", "dft"):
            line |= {"response_kl": 0.6 * fall, "visual_kl": 0.2 * fall, "relation": 0.04 * fall}
        lines.append(json.dumps(line | {"tokens_per_s": 5000.0 + step, "memory_gib": 1.5}) + "\n")
    (folder / "metrics.jsonl").write_text("".join(lines))


def flags(right: int, total: int) -> list[bool]:
    """Return `total` flags of which the first `right` are true."""
    return [i < right for i in range(total)]


def markdown(results: Results) -> str:
    """Return what report.md says."""
    return texts(results)["report.md"]


def page(results: Results) -> str:
    """Return what report.html says."""
    return texts(results)["report.html"]


def headline(results: Results) -> str:
    """Return the sentences that stand first in both."""
    return render("headline.jinja", results=results, compare=compare).strip()


def notes(results: Results) -> list[str]:
    """Return what both say is left out, as lines."""
    return render("notes.jinja", results=results).splitlines()
