"""Does distillation help, and which part of it: runs of recipes/shapes/study.yaml over seeds, one line of JSON each.

    python benchmarks/study.py --work runs/study --out benchmarks/results/study                 # goes on with what is there
    python benchmarks/study.py --work runs/study --out benchmarks/results/study --parts recipes losses --minutes 8
    python benchmarks/study.py --work runs/again --out runs/again --cell losses/response --seeds 31      # one line anew

A seed decides the student's start, the order of the rows, and the scenes that are drawn. Runs of one seed share the stages
that they have in common: of runs that lack the same one, one at a time is begun. docs/make_tables.py puts the tables into
docs/study.md.
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
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from side_by_side import Task, run

ROOT = Path(__file__).parents[1]
SEEDS = (31, 32, 33, 34, 35)
MORE_SEEDS = {"recipes/pt-sft-sft": (36, 37), "recipes/dpt-sft-dft": (36, 37)}
FULL = {"ce": 1.0, "response_kl": 1.0, "visual_kl": 1.0, "relation": 0.5}
WORLD_OF_TEACHERS, WORLD_OF_TEXT = 901, 902  # seeds that no run has
# What differs from the study's recipe: stages, the losses of those that distil, keys of `world`, teacher, student; of a
# stored teacher what is kept.
Cell = dict[str, Any]
TWO = ("pt-sft", "dpt-sft", "pt-dft", "dpt-dft")
THREE = ("pt-sft-sft", "dpt-sft-dft", "pt-sft-dft", "dpt-sft-sft", "dpt-dft-dft")


def _with(**losses: Any) -> Cell:
    return {"losses": {"ce": 1.0, **losses}}


def _pairs(**changes: Cell) -> dict[str, Cell]:
    """The control and the paper's recipe, each with what differs from the study's recipe, by what that is called."""
    kinds = {"control": "pt-sft-sft", "distilled": "dpt-sft-dft"}
    return {
        f"{named}, {kind}": {"stages": stages} | cell
        for named, cell in changes.items()
        for kind, stages in kinds.items()
    }


PARTS: dict[str, dict[str, Cell]] = {
    "recipes": {name: {"stages": name} for name in (*TWO, *THREE)},
    "losses": {
        "response": _with(response_kl=1.0),
        "response + visual": _with(response_kl=1.0, visual_kl=1.0),
        "relation alone": _with(relation=0.5),
        "full, relation centred": _with(response_kl=1.0, visual_kl=1.0, relation=0.5, relation_center=True),
        "full, weights 1, 1, 1": _with(response_kl=1.0, visual_kl=1.0, relation=1.0),
    },
    "teachers": {name: {"teacher": name} for name in ("middling", "weak")},
    "divergences": {kind: {"losses": FULL | {"divergence": kind}} for kind in ("reverse_kl", "jsd")},
    "data": _pairs(**{"3,000 scenes": {"world": {"scenes": 3000}}}),
    "students": _pairs(**{size: {"student": size} for size in ("5 x 160", "4 x 96")}),
    "answers": _pairs(**{"0% wrong": {"world": {"noise": 0.0}}}),
    "stored": {
        "response + visual, 16 ids at a quarter of a picture": _with(response_kl=1.0, visual_kl=1.0)
        | {"stored": {"top_k": 16, "visual_share": 0.25}}
    },
}
# Beside the study and with other seeds, to choose by: data, and the weight of the cross-entropy.
TRIALS = {
    "budget": _pairs(**{f"{scenes:,} scenes": {"world": {"scenes": scenes}} for scenes in (3000, 6000, 9000)}),
    "weights": {"full, cross-entropy at 0.1": {"losses": FULL | {"ce": 0.1}}},
}
CELLS = PARTS | TRIALS
# Language models of other sizes that are there: layers x width.
SHIPPED = {"5 x 160": "package:shapes/teacher-lm"}
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


def base_of(cell: Cell, seed: int, work: Path) -> tuple[Any, Path]:
    """The study's recipe with a cell's world, and the folder of that world."""
    from llavakd.config import load_recipe

    recipe = load_recipe(ROOT / "recipes" / "shapes" / "study.yaml", [f"seed={seed}", f"world.seed={seed}"])
    world = dataclasses.replace(recipe.world, **cell.get("world", {}))
    return dataclasses.replace(recipe, world=world), work / f"seed-{seed}" / f"{world.scenes}-{world.noise}"


def draw(cell: Cell, seed: int, work: Path) -> None:
    """Draw a cell's world."""
    from llavakd.pipeline import draw_world

    draw_world(*base_of(cell, seed, work))


def recipe_of(cell: Cell, seed: int, work: Path, *, epochs: float | None = None) -> tuple[Any, Path]:
    """The whole recipe of a cell, and the folder of its world."""
    from llavakd.config import resolve_paths

    recipe, place = base_of(cell, seed, work)
    recipe = dataclasses.replace(recipe, stages=stages_of(recipe, cell), name=cell.get("stages", recipe.name))
    if epochs:
        recipe = dataclasses.replace(recipe, stages=tuple(dataclasses.replace(s, epochs=epochs) for s in recipe.stages))
    if name := cell.get("teacher"):
        recipe = dataclasses.replace(
            recipe, teacher=dataclasses.replace(recipe.teacher, path=str(work / "teachers" / name))
        )
    if size := cell.get("student"):
        model = SHIPPED.get(size) or str(made_student(size, work))
        recipe = dataclasses.replace(recipe, student=dataclasses.replace(recipe.student, language_model=model))
    if cell.get("stored"):
        teacher = dataclasses.replace(recipe.teacher, cache=str(place / "taught"))
        recipe = dataclasses.replace(recipe, teacher=teacher, cache_features=False)
    return dataclasses.replace(resolve_paths(recipe, place), world=None), place


def kept_of(recipe: Any, place: Path) -> list[Path]:
    """Where the stages of a recipe are kept for other runs of its world."""
    return [place / "stages" / _key(recipe, number) for number in range(1, len(recipe.stages) + 1)]


def run_cell(cell: Cell, seed: int, work: Path, out: Path, *, epochs: float | None = None) -> dict[str, Any]:
    """Train and score a cell in a new folder `out`, with the stages that are known already; its row of results.json."""
    from llavakd.pipeline import run_pipeline

    recipe, place = recipe_of(cell, seed, work, epochs=epochs)
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    (place / "features").mkdir(exist_ok=True)
    (out / "features").symlink_to((place / "features").resolve())
    kept = kept_of(recipe, place)
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
    device = "cuda" if torch.cuda.is_available() else "cpu"
    models = [load_teacher(config, device) for config in (student, recipe.teacher)]
    data = recipe.data[recipe.evaluation.data]
    return compare_segments(*models, load_samples(data), data)


def make_teacher(name: str, work: Path) -> None:
    """A plain student as teacher; what it scores stands beside it, once it is whole."""
    scenes, noise, epochs = TEACHERS[name]
    cell = {"stages": "pt-sft-sft", "world": {"scenes": scenes, "noise": noise}}
    run, target = work / "making" / name, work / "teachers" / name
    draw(cell, WORLD_OF_TEACHERS, work)
    row = run_cell(cell, WORLD_OF_TEACHERS, work, run, epochs=epochs)
    shutil.copytree(run / "sft2" / "model", target, dirs_exist_ok=True)
    (target / "made.json").write_text(json.dumps({"accuracy": row["accuracy"], "cell": cell}), encoding="utf-8")


def make_student(size: str, work: Path) -> None:
    """A language model of another size, taught on scenes told in words as the shipped one was."""
    from llavakd.config import load_recipe
    from llavakd.pipeline import run_pipeline
    from llavakd.shapes.world import write_world
    from llavakd.train.checkpoint import write_folder

    layers, width = map(int, size.split(" x "))
    parts = work / "making" / size.replace(" ", "")
    shutil.copytree(ROOT / "src/llavakd/assets/shapes/parts/student-lm", parts, dirs_exist_ok=True)
    config = json.loads((parts / "config.json").read_text(encoding="utf-8"))
    config |= {"hidden_size": width, "num_hidden_layers": layers, "intermediate_size": round(width * 341 / 128)}
    config |= {"layer_types": config.get("layer_types", [None])[:1] * layers, "max_window_layers": layers}
    (parts / "config.json").write_text(json.dumps(config), encoding="utf-8")
    changes = [f"student.language_model={parts}", f"world.seed={WORLD_OF_TEXT}", "trackers=[]", "save_every=100000"]
    recipe, out = load_recipe(ROOT / "recipes/shapes/text-student.yaml", changes), made_student(size, work).parents[1]
    if recipe.world and not (out / "world").is_dir():
        write_folder(out / "world", partial(write_world, world=recipe.world, workers=4), flush=False)
    run_pipeline(recipe, out)


def made_teacher(name: str, work: Path) -> Path:
    """The file that says what a teacher scores."""
    return work / "teachers" / name / "made.json"


def made_student(size: str, work: Path) -> Path:
    """The folder of a language model of another size."""
    return work / "students" / size.replace(" ", "") / "text" / "model"


def line_of(part: str, name: str, seed: int, work: Path, told: dict[str, Any]) -> dict[str, Any]:
    """Run one cell with one seed: the line that is kept of it."""
    cell, start = CELLS[part][name], time.perf_counter()
    row = run_cell(cell, seed, work, work / f"seed-{seed}" / "runs" / f"{part}-{name}".replace(" ", "_"))
    keys = ("accuracy", "n", "majority", "by_type", "majority_by_type", "segments", "steps", "tokens", "parameters")
    line = {"part": part, "cell": name, "seed": seed, **{key: row[key] for key in keys}}
    if teacher := cell.get("teacher"):
        line["teacher"] = json.loads(made_teacher(teacher, work).read_text(encoding="utf-8"))["accuracy"]
    if (size := cell.get("student")) and size not in SHIPPED:
        text = made_student(size, work).with_name("metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1]
        line["text_loss"] = json.loads(text)["loss"]
    return line | {"train_seconds": row["train_seconds"], "seconds": time.perf_counter() - start, **told}


def quiet(threads: int) -> None:
    """Of a worker: so many threads, the same result each time on a GPU too, and no report of how it goes."""
    import torch

    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
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


def tasks_of(jobs: list[tuple[str, str, int]], work: Path, told: dict[str, Any]) -> list[Task]:
    """Cells with their seeds, behind the worlds, teachers and language models that they need."""
    needed: dict[Path, Task] = {}
    cells = []
    for part, name, seed in jobs:
        cell = CELLS[part][name]
        recipe, place = recipe_of(cell, seed, work)
        needs = {place / "world": (draw, cell, seed)}
        if teacher := cell.get("teacher"):
            needs[made_teacher(teacher, work)] = (make_teacher, teacher)
        if (size := cell.get("student")) and size not in SHIPPED:
            needs[made_student(size, work)] = (make_student, size)
        for path, (call, *what) in needs.items():
            made = Task(name=str(path.relative_to(work)), call=call, arguments=(*what, work), makes=(path,))
            needed |= {} if path.exists() else {path: made}
        which = {"name": f"{part}/{name} {seed}", "arguments": (part, name, seed, work, told)}
        cells.append(Task(**which, call=line_of, needs=tuple(needs), makes=tuple(kept_of(recipe, place))))
    first = sorted(needed.values(), key=lambda task: task.call is draw)  # what takes long
    return [*first, *cells]


def main() -> None:
    """Run what is missing, some at a time; a line is written as soon as it is known. Exit code 1 where one is not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="worlds, stages and runs")
    parser.add_argument("--out", type=Path, required=True, help="folder of PART.jsonl")
    parser.add_argument("--parts", nargs="+", choices=CELLS, default=list(PARTS))
    parser.add_argument("--cell", help="PART/CELL: this one only, whether it is known or not")
    parser.add_argument("--seeds", type=int, nargs="+", help="instead of the study's")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="after these no run is begun")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    done = set() if options.cell else known_lines(options.out)
    places = [(part, name) for part in options.parts for name in CELLS[part]]
    if options.cell:
        places = [tuple(options.cell.partition("/")[::2])]
        if places[0][1] not in CELLS.get(places[0][0], ()):
            parser.error(
                f"--cell: no {options.cell!r}; there are {', '.join(f'{p}/{c}' for p in CELLS for c in CELLS[p])}"
            )
    wanted = {place: options.seeds or (*SEEDS, *MORE_SEEDS.get("/".join(place), ())) for place in places}
    jobs = [(*place, seed) for place, seeds in wanted.items() for seed in seeds if (*place, seed) not in done]

    kept: list[str] = []

    def keep(line: dict[str, Any] | None) -> None:
        if not line:  # of what a run needs
            return
        kept.append(line["cell"])
        with (options.out / f"{line['part']}.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        said = f"{line['part']}/{line['cell']} {line['seed']}: {line['accuracy']:.1%}, {line['seconds']:.0f} s"
        print(said, flush=True)

    begun, told = time.perf_counter(), environment(options.jobs)
    tasks = tasks_of(jobs, options.work, told)
    threads = max(1, (os.cpu_count() or 1) // options.jobs)
    with ProcessPoolExecutor(options.jobs, get_context("spawn"), quiet, (threads,)) as pool:
        failed = run(tasks, pool, slots=options.jobs, keep=keep, minutes=options.minutes)
    sittings = options.out / "sittings.json"
    known = json.loads(sittings.read_text(encoding="utf-8")) if sittings.is_file() else []
    told |= {"jobs": options.jobs, "runs": len(kept), "seconds": time.perf_counter() - begun}
    known.append(told)
    sittings.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
    if failed:
        raise SystemExit("\n".join([f"{len(failed)} not run:", *failed]))


if __name__ == "__main__":
    main()
