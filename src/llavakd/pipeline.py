"""Stages in order: each starts from the one before, is known by its fingerprint, and is skipped once it is done."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import accelerate
import torch
import transformers
import yaml
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs

from llavakd.config import (
    DataConfig,
    EvaluationConfig,
    Recipe,
    StageConfig,
    TeacherConfig,
    differing_keys,
    dump_recipe,
    resolve_paths,
    to_tree,
)
from llavakd.data.collate import RowDataset, Source
from llavakd.data.features import FeatureStore, save_features
from llavakd.data.pictures import load_pixels
from llavakd.data.samples import Samples, load_samples
from llavakd.errors import UserError
from llavakd.evaluate import evaluate_model
from llavakd.models.alignment import Pair, align
from llavakd.models.student import VisionLanguageModel, build_student, load_student, save_model, vision_features
from llavakd.models.teacher import load_teacher
from llavakd.preflight import check_before_training, used_sources
from llavakd.progress import bar, say
from llavakd.report import write_report
from llavakd.shapes import write_world
from llavakd.train.checkpoint import file_digest, write_folder, write_text
from llavakd.train.loop import run_stage, shard_of, total_steps
from llavakd.train.optim import build_optimizer
from llavakd.train.step import StudentModule, TrainState


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run folder and what all its stages share; the recipe's paths are resolved."""

    recipe: Recipe
    out: Path
    accelerator: Accelerator
    samples: dict[str, Samples]

    def model_folder(self, stage: StageConfig) -> Path:
        """Where a finished stage's model lies."""
        return self.out / stage.name / "model"


def run_pipeline(recipe: Recipe, out: Path) -> dict[str, Any]:
    """Run or go on with every stage in `out`, then evaluate and report; returns results.json as a dict.

    Raises UserError for a wrong recipe, data file, model or run folder, and Interrupted where a person stopped it.
    """
    out.mkdir(parents=True, exist_ok=True)
    transformers.utils.logging.disable_progress_bar()  # ours say what takes long
    _claim(recipe, out)
    accelerator = _make_accelerator(recipe, out)
    with accelerator.main_process_first():
        draw_world(recipe, out)
    placed = resolve_paths(recipe, out)
    sources = {name: placed.data[name] for name in used_sources(placed)}
    samples = {name: load_samples(data, recipe.max_bad_rows, find_pictures=True) for name, data in sources.items()}
    run = Run(recipe=placed, out=out, accelerator=accelerator, samples=samples)
    _check_batches(run)
    if accelerator.is_main_process:
        check_before_training(placed, samples)
    ledger = _Ledger(out / "pipeline.json", recipe.name)
    for index, stage in enumerate(placed.stages):
        fingerprint = _fingerprint(run, index, ledger)
        if ledger.is_done(stage.name, fingerprint):
            say(f"stage {stage.name}: done, skipped")
            continue
        ledger.note(stage.name, state="running", fingerprint=fingerprint)
        ledger.note(stage.name, state="done", fingerprint=fingerprint, **_run_one(run, index))
        accelerator.wait_for_everyone()
    results = _results(run, ledger) if accelerator.is_main_process else {"rows": []}
    if results["rows"]:
        write_text(out / "results.json", json.dumps(results, indent=1))
        write_report([out], out)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return results


def evaluate_folder(
    model: TeacherConfig, data: DataConfig, evaluation: EvaluationConfig, out: Path, *, limit: int | None = None
) -> dict[str, Any]:
    """Answer a question file with any LLaVA folder; writes predictions under OUT and returns the results row."""
    loaded = load_teacher(model)
    loaded.model.to("cuda" if torch.cuda.is_available() else "cpu")
    samples = load_samples(data, find_pictures=True)[:limit]
    return evaluate_model(loaded, samples, data, evaluation, out, name=Path(model.path).name)


class _Ledger:
    """pipeline.json: what is known of every stage, rewritten whole at each change."""

    def __init__(self, path: Path, name: str) -> None:
        self.path = path
        self.name = name
        self.stages: dict[str, dict[str, Any]] = {}
        if path.is_file():
            self.stages = {entry["name"]: entry for entry in json.loads(path.read_text(encoding="utf-8"))["stages"]}

    def is_done(self, stage: str, fingerprint: dict[str, str]) -> bool:
        """Whether the stage is finished; raises UserError where it was begun under another fingerprint."""
        entry = self.stages.get(stage)
        if entry is None:
            return False
        changed = [key for key in fingerprint if entry["fingerprint"].get(key) != fingerprint[key]]
        if changed:
            raise UserError(
                f"stage {stage} in {self.path.parent} was begun with another {', '.join(changed)}; use a new --out, or "
                f"put back what was changed"
            )
        return entry["state"] == "done"

    def note(self, stage: str, **facts: Any) -> None:
        """Record facts of a stage."""
        self.stages[stage] = {"name": stage, **facts}
        write_text(self.path, json.dumps({"name": self.name, "stages": list(self.stages.values())}, indent=1))


def _claim(recipe: Recipe, out: Path) -> None:
    """Write recipe.yaml, or refuse a folder that belongs to another recipe."""
    path = out / "recipe.yaml"
    if not path.is_file():
        write_text(path, dump_recipe(recipe))
        return
    differing = differing_keys(yaml.safe_load(path.read_text(encoding="utf-8")), to_tree(recipe))
    if differing:
        raise UserError(
            f"{out} holds a run of another recipe; these keys differ: "
            + "; ".join(differing[:8])
            + ". Use a new --out or the old values"
        )


def _make_accelerator(recipe: Recipe, out: Path) -> Accelerator:
    learns = any("vision_tower" in stage.train for stage in recipe.stages)
    # The tower's layers past the selected one never get a gradient.
    handlers = [DistributedDataParallelKwargs(find_unused_parameters=True)] if learns else None
    accelerator = Accelerator(
        mixed_precision="bf16" if recipe.precision == "bf16" else "no",
        log_with=list(recipe.trackers) or None,
        project_dir=str(out / "trackers"),
        kwargs_handlers=handlers,
    )
    accelerator.init_trackers(recipe.name)
    return accelerator


def draw_world(recipe: Recipe, out: Path) -> None:
    """Draw the recipe's world, if it has one, into OUT/world, unless it is there."""
    if recipe.world is None or (out / "world").is_dir():
        return
    world = recipe.world
    partial = out / ".partial-world"
    shutil.rmtree(partial, ignore_errors=True)
    settings, scenes = dataclasses.asdict(world), world.scenes
    with bar("draw the world", scenes) as advance:
        write_world(partial, **settings, progress=lambda done, total: advance(done * scenes // total))
    partial.rename(out / "world")


def _check_batches(run: Run) -> None:
    """Refuse before the first model is loaded what could only fail later."""
    for stage in run.recipe.stages:
        total_steps(sum(round(weight * len(run.samples[name])) for name, weight in stage.sources.items()), stage)
        shard_of(run.recipe, stage.name, rank=0, world_size=run.accelerator.num_processes)


def _fingerprint(run: Run, index: int, ledger: _Ledger) -> dict[str, str]:
    """What decides a stage's result, each part hashed by itself so that a change can be named."""
    recipe, stage = run.recipe, run.recipe.stages[index]
    sources, student = [recipe.data[name] for name in stage.sources], recipe.student
    parts: dict[str, Any] = {
        "recipe": [dataclasses.asdict(stage), *map(dataclasses.asdict, sources), recipe.seed, recipe.precision],
        "data": [_contents(source.path, "**/*") for source in sources],
        "start": [dataclasses.asdict(student), *map(_weights, (student.vision_tower, student.language_model))],
    }
    if index:
        parts["start"] = ledger.stages[recipe.stages[index - 1].name]["fingerprint"]
    if stage.losses.distils and recipe.teacher:
        parts["teacher"] = [dataclasses.asdict(recipe.teacher), _weights(recipe.teacher.path)]
    return {key: _digest(value) for key, value in parts.items()}


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _contents(source: str, *forms: str) -> list[str]:
    """Digests of a file, or of those in a folder; a hub name stands for itself."""
    path = Path(source)
    files = [path] if path.is_file() else sorted(file for form in forms for file in path.glob(form) if file.is_file())
    return [file_digest(file) for file in files] or [source]


def _weights(source: str) -> list[str]:
    return _contents(source, "config.json", "*.safetensors", "*.bin")


def _run_one(run: Run, index: int) -> dict[str, Any]:
    """Train one stage and write its model; returns what pipeline.json says of it."""
    recipe, stage, accelerator = run.recipe, run.recipe.stages[index], run.accelerator
    if index:
        student = load_student(str(run.model_folder(recipe.stages[index - 1])))
    else:
        student = build_student(recipe.student, seed=recipe.seed)
    student.train_only(stage.train)
    teacher = load_teacher(recipe.teacher) if stage.losses.distils and recipe.teacher else None
    pair = align(student, teacher) if teacher else None
    if pair and accelerator.is_main_process:
        say(pair.note)
    dataset = _dataset(run, stage, student, pair, teacher)
    if recipe.gradient_checkpointing:
        student.model.gradient_checkpointing_enable()
    module = StudentModule(student, stage, pair.vocab_size if pair else None)
    module, optimizer = accelerator.prepare(module, build_optimizer(module, stage))
    if teacher:
        teacher.model.to(accelerator.device)
    student.model.train()
    parts: dict[str, Any] = {"module": module, "optimizer": optimizer, "student": student, "teacher": teacher}
    state = TrainState(accelerator=accelerator, pair=pair, stage=stage, **parts)
    (run.out / stage.name).mkdir(exist_ok=True)
    progress = run_stage(state, dataset, recipe, run.out / stage.name)
    if accelerator.is_main_process:
        template = recipe.data[next(iter(stage.sources))].template
        write_folder(run.model_folder(stage), lambda partial: save_model(student, partial, template=template))
    accelerator.free_memory()
    return {"steps": progress.step, "train_seconds": progress.seconds, **progress.counted}


def _dataset(
    run: Run, stage: StageConfig, student: VisionLanguageModel, pair: Pair | None, teacher: VisionLanguageModel | None
) -> RowDataset:
    pictured = {name for name in stage.sources if run.recipe.cache_features and (run.samples[name].lengths > 0).any()}
    if pictured and ("vision_tower" in stage.train or (pair and not pair.shared_tower)):
        raise UserError(
            f"cache_features: stage {stage.name} needs pixels, for its vision tower learns or the teacher's differs; "
            "set cache_features: false"
        )
    sources = []
    for name, weight in stage.sources.items():
        samples, data = run.samples[name], run.recipe.data[name]
        with run.accelerator.main_process_first():
            store = _feature_store(run, name, student) if name in pictured else None
        renderer = student.renderer(data)
        sources.append(Source(samples=samples, renderer=renderer, data=data, store=store, weight=weight))
    own = teacher.image_processor if teacher and pair and not pair.shared_pixels else None
    pixels = {"image_processor": student.image_processor, "teacher_processor": own}
    return RowDataset(sources, **pixels, seed=run.recipe.seed)


@torch.no_grad()
def _feature_store(run: Run, source: str, student: VisionLanguageModel) -> FeatureStore:
    """Features of a source's pictures, encoded once; keyed by tower, processor and picture names."""
    data, accelerator = run.recipe.data[source], run.accelerator
    names = sorted({name for sample in run.samples[source] for name in sample.images})
    tower, processor = student.parts()["vision_tower"], student.image_processor
    weights = [hashlib.sha256(weight.cpu().numpy()).hexdigest() for weight in tower.state_dict().values()]
    key = _digest([data.images or data.path, names, processor.to_dict(), weights])  # one store for all of one set
    path = run.out / "features" / f"{key[:16]}.safetensors"
    if not path.is_file():
        tower.to(accelerator.device)
        parts = []
        with bar(f"encode pictures of {source}", len(names)) as advance:
            for start in range(0, len(names), 64):
                pixels = load_pixels(data, names[start : start + 64], processor).to(accelerator.device)
                with accelerator.autocast():
                    parts.append(vision_features(student.model, pixels).float().cpu())
                advance(min(start + 64, len(names)))
        save_features(path, names, torch.cat(parts))
    return FeatureStore(path)


def _results(run: Run, ledger: _Ledger) -> dict[str, Any]:
    """What results.json holds: the student's row, and the teacher's where there is one."""
    recipe, evaluation = run.recipe, run.recipe.evaluation
    rows: list[dict[str, Any]] = []
    if evaluation is not None:
        done = [ledger.stages[stage.name] for stage in recipe.stages]
        cost = {key: sum(entry[key] for entry in done) for key in ("steps", "train_seconds", "tokens")}
        if recipe.teacher and evaluation.teacher:
            rows.append(_evaluate(run, evaluation, recipe.teacher, "teacher") | dict.fromkeys(cost))
        student = TeacherConfig(path=str(run.model_folder(recipe.stages[-1])), dtype="float32")
        compared = recipe.teacher if any(stage.losses.distils for stage in recipe.stages) else None
        rows.append(_evaluate(run, evaluation, student, recipe.name, compared) | cost)
    return {"rows": rows, "environment": environment(run.accelerator)}


def _evaluate(
    run: Run, evaluation: EvaluationConfig, source: TeacherConfig, name: str, compared: TeacherConfig | None = None
) -> dict[str, Any]:
    """Scores of one model, beside `compared`; read back where the same weights answered the same file before."""
    data, place = run.recipe.data[evaluation.data], run.out / "evaluation"
    configs = [config for config in (source, compared) if config]
    weights = [[_weights(config.path), config.dtype] for config in configs]
    asked = [_contents(data.path, "**/*"), dataclasses.asdict(data), dataclasses.asdict(evaluation)]
    key, kept = _digest([weights, asked]), place / name / "scores.json"
    if kept.is_file() and (stored := json.loads(kept.read_text(encoding="utf-8")))["key"] == key:
        return stored["row"]
    model, *teacher = [load_teacher(config) for config in configs]
    for loaded in (model, *teacher):
        loaded.model.to(run.accelerator.device)
    followed = teacher[0] if teacher else None
    scores = evaluate_model(model, run.samples[evaluation.data], data, evaluation, place, name=name, teacher=followed)
    row = {"seed": run.recipe.seed, **scores}
    write_text(kept, json.dumps({"key": key, "row": row}))
    return row


def environment(accelerator: Accelerator) -> dict[str, str]:
    """Versions and device, for results.json."""
    cuda = accelerator.device.type == "cuda"
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "accelerate": accelerate.__version__,
        "processes": str(accelerator.num_processes),
        "device": torch.cuda.get_device_name() if cuda else f"cpu x {torch.get_num_threads()} threads",
    }
