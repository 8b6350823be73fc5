"""Does distillation help, and which part of it: runs of recipes/shapes/study.yaml over seeds, one line of JSON each.

    python benchmarks/study.py --work runs/study --out benchmarks/results/study                 # goes on with what is there
    python benchmarks/study.py --work runs/study --out benchmarks/results/study --parts recipes losses
    python benchmarks/study.py --work runs/again --out runs/again --cell losses/response --seeds 11      # one line anew

A seed decides the student's start, the order of the rows, and the scenes that are drawn. Runs of one seed share the stages
that they have in common. docs/make_tables.py puts the tables into docs/study.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import time
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SEEDS = (11, 12, 13, 14, 15)
FULL = {"ce": 1.0, "response_kl": 1.0, "visual_kl": 1.0, "relation": 0.5}
WORLD_OF_TEACHERS, WORLD_OF_TEXT = 901, 902  # seeds that no run has
# What differs from the study's recipe: stages, the losses of those that distil, keys of `world`, teacher, student; of a
# stored teacher what is kept.
Cell = dict[str, Any]
THREE = ("pt-sft-sft", "dpt-sft-dft", "pt-sft-dft", "dpt-sft-sft", "dpt-dft-dft")


def _with(**losses: Any) -> Cell:
    return {"losses": {"ce": 1.0, **losses}}


PARTS: dict[str, dict[str, Cell]] = {
    "recipes": {name: {"stages": name} for name in (*THREE, "pt-sft", "dpt-sft", "pt-dft", "dpt-dft")},
    "losses": {
        "response": _with(response_kl=1.0),
        "response + visual": _with(response_kl=1.0, visual_kl=1.0),
        "relation alone": _with(relation=0.5),
        "full, relation centred": _with(response_kl=1.0, visual_kl=1.0, relation=0.5, relation_center=True),
        "full, weights 1, 1, 1": _with(response_kl=1.0, visual_kl=1.0, relation=1.0),
    },
    "stored": {
        "response + visual, 16 ids at a quarter of a picture": _with(response_kl=1.0, visual_kl=1.0)
        | {"stored": {"top_k": 16, "visual_share": 0.25}}
    },
    "answers": {
        f"{noise:.0%} wrong, {name}": {"stages": stages, "world": {"noise": noise}}
        for noise in (0.0, 0.15)
        for name, stages in (("control", "pt-sft-sft"), ("distilled", "dpt-sft-dft"))
    },
    "teachers": {name: {"teacher": name} for name in ("middling", "weak")},
    "divergences": {kind: {"losses": FULL | {"divergence": kind}} for kind in ("reverse_kl", "jsd")},
    "weights": {"full, cross-entropy at 0.1": {"losses": FULL | {"ce": 0.1}}},
    "data": {
        f"1,500 scenes, {name}": {"stages": stages, "world": {"scenes": 1500}}
        for name, stages in (("control", "pt-sft-sft"), ("distilled", "dpt-sft-dft"))
    },
    "students": {
        f"{size}, {name}": {"stages": stages, "student": size}
        for size in ("2 x 64", "6 x 192")
        for name, stages in (("control", "pt-sft-sft"), ("distilled", "dpt-sft-dft"))
    },
}
# Teachers besides the shipped one: a plain student on so many scenes with so many wrong answers, for so many epochs a stage.
TEACHERS = {"middling": (3000, 0.0, 2), "weak": (2000, 0.3, 2)}


def stages_of(recipe: Any, cell: Cell) -> tuple[Any, ...]:
    """`dpt-sft-dft` as stages: the first is made like the recipe's first, the others like its second."""
    from llavakd.config import LossConfig

    found: list[Any] = []
    for kind in cell.get("stages", "dpt-sft-dft").split("-"):
        again = sum(stage.name.rstrip("2") == kind for stage in found)
        losses = cell.get("losses", FULL) if kind in ("dpt", "dft") else {"ce": 1.0}
        model = recipe.stages[min(len(found), 1)]
        found.append(dataclasses.replace(model, name=kind + "2" * again, losses=LossConfig(**losses)))
    return tuple(found)


def recipe_of(cell: Cell, seed: int, work: Path, *, epochs: float | None = None) -> tuple[Any, Path]:
    """The whole recipe of a cell, its world drawn, and the folder of that world."""
    from llavakd.config import load_recipe, resolve_paths
    from llavakd.pipeline import draw_world

    recipe = load_recipe(ROOT / "recipes" / "shapes" / "study.yaml", [f"seed={seed}", f"world.seed={seed}"])
    world = dataclasses.replace(recipe.world, **cell.get("world", {}))
    recipe = dataclasses.replace(
        recipe, world=world, stages=stages_of(recipe, cell), name=cell.get("stages", recipe.name)
    )
    if epochs:
        recipe = dataclasses.replace(recipe, stages=tuple(dataclasses.replace(s, epochs=epochs) for s in recipe.stages))
    if name := cell.get("teacher"):
        recipe = dataclasses.replace(
            recipe, teacher=dataclasses.replace(recipe.teacher, path=str(work / "teachers" / name))
        )
    if size := cell.get("student"):
        model = str(work / "students" / size.replace(" ", "") / "text" / "model")
        recipe = dataclasses.replace(recipe, student=dataclasses.replace(recipe.student, language_model=model))
    place = work / f"seed-{seed}" / f"{world.scenes}-{world.noise}"
    draw_world(recipe, place)
    if cell.get("stored"):
        teacher = dataclasses.replace(recipe.teacher, cache=str(place / "taught"))
        recipe = dataclasses.replace(recipe, teacher=teacher, cache_features=False)
    return dataclasses.replace(resolve_paths(recipe, place), world=None), place


def run_cell(cell: Cell, seed: int, work: Path, out: Path, *, epochs: float | None = None) -> dict[str, Any]:
    """Train and score a cell in a new folder `out`, with the stages that are known already; its row of results.json."""
    from llavakd.pipeline import run_pipeline

    recipe, place = recipe_of(cell, seed, work, epochs=epochs)
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    (place / "features").mkdir(exist_ok=True)
    (out / "features").symlink_to((place / "features").resolve())
    kept = [place / "stages" / _key(recipe, number) for number in range(1, len(recipe.stages) + 1)]
    known = max((number for number, folder in enumerate(kept, start=1) if folder.is_dir()), default=0)
    entries = []
    for stage, folder in zip(recipe.stages[:known], kept, strict=False):
        shutil.copytree(folder / stage.name, out / stage.name)
        entries.append(json.loads((folder / "entry.json").read_text(encoding="utf-8")))
    (out / "pipeline.json").write_text(json.dumps({"name": recipe.name, "stages": entries}), encoding="utf-8")
    if cell.get("stored") and not Path(recipe.teacher.cache).is_dir():
        run_pipeline(recipe, out, cache=cell["stored"])
    row = run_pipeline(recipe, out)["rows"][-1]
    ledger = json.loads((out / "pipeline.json").read_text(encoding="utf-8"))["stages"]
    for stage, folder, entry in list(zip(recipe.stages, kept, ledger, strict=True))[known:]:
        draft = folder.with_name(f"{folder.name}.{os.getpid()}")
        shutil.copytree(out / stage.name, draft / stage.name, ignore=shutil.ignore_patterns("checkpoints"))
        (draft / "entry.json").write_text(json.dumps(entry), encoding="utf-8")
        shutil.rmtree(draft) if folder.exists() else draft.rename(folder)
    return row | {"segments": row.get("segments") or _segments(recipe, out)}


def _key(recipe: Any, number: int) -> str:
    """What the first `number` stages of a run depend on."""
    stages, student = (
        [dataclasses.asdict(stage) for stage in recipe.stages[:number]],
        dataclasses.asdict(recipe.student),
    )
    distils = any(stage.losses.distils for stage in recipe.stages[:number])
    parts = [stages, student, recipe.seed, dataclasses.asdict(recipe.teacher) if distils else None]
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()[:16]


def _segments(recipe: Any, out: Path) -> dict[str, Any]:
    """How far a run that was not distilled is from the teacher that it could have had."""
    import torch

    from llavakd.config import TeacherConfig
    from llavakd.data.samples import load_samples
    from llavakd.evaluate import compare_segments
    from llavakd.models.student import load_teacher

    student = TeacherConfig(path=str(out / recipe.stages[-1].name / "model"), dtype="float32")
    models = [load_teacher(config) for config in (student, recipe.teacher)]
    for model in models:
        model.model.to("cuda" if torch.cuda.is_available() else "cpu")
    data = recipe.data[recipe.evaluation.data]
    return compare_segments(*models, load_samples(data), data)


def make_teacher(name: str, work: Path) -> None:
    """A plain student as teacher; what it scores stands beside it."""
    scenes, noise, epochs = TEACHERS[name]
    cell = {"stages": "pt-sft-sft", "world": {"scenes": scenes, "noise": noise}}
    run, target = work / "making" / name, work / "teachers" / name
    row = run_cell(cell, WORLD_OF_TEACHERS, work, run, epochs=epochs)
    shutil.copytree(run / "sft2" / "model", target)
    (target / "made.json").write_text(json.dumps({"accuracy": row["accuracy"], "cell": cell}), encoding="utf-8")


def make_student(size: str, work: Path) -> None:
    """A language model of another size, taught on scenes told in words as the shipped one was."""
    from llavakd.config import load_recipe
    from llavakd.pipeline import run_pipeline

    layers, width = map(int, size.split(" x "))
    parts = work / "making" / size.replace(" ", "")
    shutil.copytree(ROOT / "src/llavakd/assets/shapes/parts/student-lm", parts, dirs_exist_ok=True)
    config = json.loads((parts / "config.json").read_text(encoding="utf-8"))
    config |= {"hidden_size": width, "num_hidden_layers": layers, "intermediate_size": round(width * 341 / 128)}
    config |= {"layer_types": config.get("layer_types", [None])[:1] * layers, "max_window_layers": layers}
    (parts / "config.json").write_text(json.dumps(config), encoding="utf-8")
    changes = [f"student.language_model={parts}", f"world.seed={WORLD_OF_TEXT}", "trackers=[]", "save_every=100000"]
    run_pipeline(
        load_recipe(ROOT / "recipes/shapes/text-student.yaml", changes), work / "students" / size.replace(" ", "")
    )


def make(teacher: str | None, student: str | None, work: Path) -> None:
    """What a cell needs beside its world, unless it is there."""
    if teacher and not (work / "teachers" / teacher / "made.json").is_file():
        make_teacher(teacher, work)
    if student and not (work / "students" / student.replace(" ", "") / "text" / "model").is_dir():
        make_student(student, work)


def line_of(part: str, name: str, seed: int, work: Path, told: dict[str, Any]) -> dict[str, Any]:
    """Run one cell with one seed: the line that is kept of it."""
    cell, start = PARTS[part][name], time.perf_counter()
    row = run_cell(cell, seed, work, work / f"seed-{seed}" / "runs" / f"{part}-{name}".replace(" ", "_"))
    keys = ("accuracy", "n", "majority", "by_type", "majority_by_type", "segments", "steps", "tokens", "parameters")
    line = {"part": part, "cell": name, "seed": seed, **{key: row[key] for key in keys}}
    if teacher := cell.get("teacher"):
        line["teacher"] = json.loads((work / "teachers" / teacher / "made.json").read_text(encoding="utf-8"))[
            "accuracy"
        ]
    return line | {"train_seconds": row["train_seconds"], "seconds": time.perf_counter() - start, **told}


def quiet(threads: int) -> None:
    """Of a worker: so many threads and no report of how it goes."""
    import torch

    torch.set_num_threads(threads)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def environment(jobs: int) -> dict[str, Any]:
    """Where and with what."""
    from importlib.metadata import version

    import torch

    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    device = (
        torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {jobs} runs on {os.cpu_count()} cores"
    )
    versions = {name: version(name) for name in ("torch", "transformers", "accelerate")}
    return {"device": device, "commit": subprocess.run(git, capture_output=True, text=True).stdout.strip(), **versions}


def known_lines(folder: Path) -> set[tuple[str, str, int]]:
    """(part, cell, seed) of the lines that are there."""
    lines = [json.loads(line) for file in folder.glob("*.jsonl") for line in file.read_text().splitlines()]
    return {(line["part"], line["cell"], line["seed"]) for line in lines}


def main() -> None:
    """Run what is missing, some at a time; a line is written as soon as it is known."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="worlds, stages and runs")
    parser.add_argument("--out", type=Path, required=True, help="folder of PART.jsonl")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--cell", help="PART/CELL: this one only, whether it is known or not")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    done = set() if options.cell else known_lines(options.out)
    places = [(part, name) for part in options.parts for name in PARTS[part]]
    places = [tuple(options.cell.split("/"))] if options.cell else places
    jobs = [(part, name, seed) for part, name in places for seed in options.seeds if (part, name, seed) not in done]
    told = environment(options.jobs)
    threads = max(1, (os.cpu_count() or 1) // options.jobs)
    with ProcessPoolExecutor(options.jobs, get_context("spawn"), quiet, (threads,)) as pool:
        work, cells = options.work, [PARTS[part][name] for part, name, _ in jobs]
        needed = dict.fromkeys((cell.get("teacher"), cell.get("student")) for cell in cells)
        for future in [pool.submit(make, *need, work) for need in needed]:
            future.result()

        def keep(future: Future[dict[str, Any]]) -> None:
            line = future.result()
            with (options.out / f"{line['part']}.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            print(
                f"{line['part']}/{line['cell']} {line['seed']}: {line['accuracy']:.1%}, {line['seconds']:.0f} s",
                flush=True,
            )

        waiting = [pool.submit(line_of, *job, work, told) for job in jobs]
        for future in waiting:
            future.add_done_callback(keep)
        for future in waiting:
            future.result()


if __name__ == "__main__":
    main()
