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
    """One run folder and what all its stages share."""

    recipe: Recipe
    """With paths resolved."""
    out: Path
    accelerator: Accelerator

    def model_folder(self, stage: StageConfig) -> Path:
        """Where a finished stage's model lies."""
        return self.out / stage.name / "model"


def run_pipeline(recipe: Recipe, out: Path) -> dict[str, Any]:
    """Run or go on with every stage in `out`, then evaluate and report; returns results.json as a dict.

    Raises:
        UserError: the recipe, the data, a model or the run folder is wrong.
        Interrupted: stopped by the person; the same call goes on.
    """
    out.mkdir(parents=True, exist_ok=True)
    transformers.utils.logging.disable_progress_bar()  # ours say what takes long
    _claim(recipe, out)
    accelerator = _make_accelerator(recipe, out)
    run = Run(recipe=resolve_paths(recipe, out), out=out, accelerator=accelerator)
    with accelerator.main_process_first():
        draw_world(recipe, out)
    allowed = run.recipe.max_bad_rows
    samples = {
        name: load_samples(run.recipe.data[name], allowed, find_pictures=True) for name in used_sources(run.recipe)
    }
    _check_batches(run, samples)
    if accelerator.is_main_process:
        check_before_training(run.recipe, samples)
    ledger = _Ledger(out / "pipeline.json", recipe.name)
    for index, stage in enumerate(run.recipe.stages):
        fingerprint = _fingerprint(run, index, ledger)
        if ledger.is_done(stage.name, fingerprint):
            say(f"stage {stage.name}: done, skipped")
            continue
        ledger.note(stage.name, state="running", fingerprint=fingerprint)
        summary = _run_one(run, index, samples)
        ledger.note(stage.name, state="done", fingerprint=fingerprint, **summary)
        accelerator.wait_for_everyone()
    results = _results(run, ledger, samples) if accelerator.is_main_process else {"rows": []}
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
    out.mkdir(parents=True, exist_ok=True)
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
    with bar("draw the world", world.scenes) as advance:
        write_world(
            partial,
            **dataclasses.asdict(world),
            progress=lambda done, total: advance(done * world.scenes // total),
        )
    partial.rename(out / "world")


def _check_batches(run: Run, samples: dict[str, Samples]) -> None:
    """Refuse before the first model is loaded what could only fail later."""
    for stage in run.recipe.stages:
        total_steps(sum(round(weight * len(samples[name])) for name, weight in stage.sources.items()), stage)
        shard_of(run.recipe, stage.name, rank=0, world_size=run.accelerator.num_processes)


def _fingerprint(run: Run, index: int, ledger: _Ledger) -> dict[str, str]:
    """What decides a stage's result, each part hashed by itself so that a change can be named."""
    stage = run.recipe.stages[index]
    sources = [run.recipe.data[name] for name in stage.sources]
    settings = [dataclasses.asdict(source) for source in sources]
    parts: dict[str, Any] = {
        "recipe": [dataclasses.asdict(stage), settings, run.recipe.seed, run.recipe.precision],
        "data": [_data_digest(Path(source.path)) for source in sources],
        "start": ledger.stages[run.recipe.stages[index - 1].name]["fingerprint"]
        if index
        else [
            dataclasses.asdict(run.recipe.student),
            _weights_digest(run.recipe.student.vision_tower),
            _weights_digest(run.recipe.student.language_model),
        ],
    }
    if stage.losses.distils and run.recipe.teacher:
        parts["teacher"] = [dataclasses.asdict(run.recipe.teacher), _weights_digest(run.recipe.teacher.path)]
    return {key: hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest() for key, value in parts.items()}


def _data_digest(path: Path) -> list[str]:
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    return [file_digest(file) for file in files]


def _weights_digest(source: str) -> list[str]:
    """Digests of a local folder's config and weights; a hub name stands for itself."""
    files = sorted(path for form in ("config.json", "*.safetensors", "*.bin") for path in Path(source).glob(form))
    return [file_digest(path) for path in files] or [source]


def _run_one(run: Run, index: int, samples: dict[str, Samples]) -> dict[str, Any]:
    """Train one stage and write its model; returns what pipeline.json says of it."""
    stage = run.recipe.stages[index]
    student = (
        load_student(str(run.model_folder(run.recipe.stages[index - 1])))
        if index
        else build_student(run.recipe.student, seed=run.recipe.seed)
    )
    student.train_only(stage.train)
    teacher = load_teacher(run.recipe.teacher) if stage.losses.distils and run.recipe.teacher else None
    pair = align(student, teacher) if teacher else None
    if pair and run.accelerator.is_main_process:
        say(pair.note)
    dataset = _dataset(run, stage, student, samples, pair, teacher)
    if run.recipe.gradient_checkpointing:
        student.model.gradient_checkpointing_enable()
    module = StudentModule(student, stage, pair.vocab_size if pair else None)
    module, optimizer = run.accelerator.prepare(module, build_optimizer(module, stage))
    if teacher:
        teacher.model.to(run.accelerator.device)
    student.model.train()
    folder = run.out / stage.name
    folder.mkdir(exist_ok=True)
    state = TrainState(
        accelerator=run.accelerator,
        module=module,
        optimizer=optimizer,
        student=student,
        teacher=teacher,
        pair=pair,
        stage=stage,
    )
    progress = run_stage(state, dataset, run.recipe, folder)
    if run.accelerator.is_main_process:
        template = run.recipe.data[next(iter(stage.sources))].template
        write_folder(run.model_folder(stage), lambda partial: save_model(student, partial, template=template))
    run.accelerator.free_memory()
    return {"steps": progress.step, "train_seconds": progress.seconds, **progress.counted}


def _dataset(
    run: Run,
    stage: StageConfig,
    student: VisionLanguageModel,
    samples: dict[str, Samples],
    pair: Pair | None,
    teacher: VisionLanguageModel | None,
) -> RowDataset:
    cached = run.recipe.cache_features and any((samples[name].lengths > 0).any() for name in stage.sources)
    if cached and ("vision_tower" in stage.train or (pair and not pair.shared_tower)):
        raise UserError(
            f"cache_features: stage {stage.name} needs pixels, for its vision tower learns or the teacher's differs; "
            "set cache_features: false"
        )
    sources = []
    for name, weight in stage.sources.items():
        store = None
        if cached and (samples[name].lengths > 0).any():
            with run.accelerator.main_process_first():
                store = _feature_store(run, name, student, samples[name])
        data = run.recipe.data[name]
        renderer = student.renderer(data)
        sources.append(Source(samples=samples[name], renderer=renderer, data=data, store=store, weight=weight))
    return RowDataset(
        sources,
        image_processor=student.image_processor,
        teacher_processor=teacher.image_processor if teacher and pair and not pair.shared_pixels else None,
        seed=run.recipe.seed,
    )


@torch.no_grad()
def _feature_store(run: Run, source: str, student: VisionLanguageModel, samples: Samples) -> FeatureStore:
    """Features of a source's pictures, encoded once; keyed by tower, processor and picture names."""
    data = run.recipe.data[source]
    names = sorted({name for sample in samples for name in sample.images})  # one store for all sources of one set
    tower = student.parts()["vision_tower"]
    digest = hashlib.sha256(
        json.dumps([data.images or data.path, names, student.image_processor.to_dict()], default=str).encode()
    )
    for name, weight in tower.state_dict().items():
        digest.update(name.encode() + weight.cpu().numpy().tobytes())
    path = run.out / "features" / f"{digest.hexdigest()[:16]}.safetensors"
    if not path.is_file():
        tower.to(run.accelerator.device)
        parts = []
        with bar(f"encode pictures of {source}", len(names)) as advance:
            for start in range(0, len(names), 64):
                pixels = load_pixels(data, names[start : start + 64], student.image_processor)
                with run.accelerator.autocast():
                    parts.append(vision_features(student.model, pixels.to(run.accelerator.device)).float().cpu())
                advance(min(start + 64, len(names)))
        save_features(path, names, torch.cat(parts))
    return FeatureStore(path)


def _results(run: Run, ledger: _Ledger, samples: dict[str, Samples]) -> dict[str, Any]:
    """What results.json holds: the student's row, and the teacher's where there is one."""
    evaluation = run.recipe.evaluation
    rows: list[dict[str, Any]] = []
    if evaluation is not None:
        done = [ledger.stages[stage.name] for stage in run.recipe.stages]
        cost = {key: sum(entry[key] for entry in done) for key in ("steps", "train_seconds", "tokens")}
        if run.recipe.teacher and evaluation.teacher:
            free = dict.fromkeys(cost)
            rows.append({**_evaluate(run, run.recipe.teacher, evaluation, samples, "teacher"), **free})
        student = TeacherConfig(path=str(run.model_folder(run.recipe.stages[-1])), dtype="float32")
        teacher = run.recipe.teacher if any(stage.losses.distils for stage in run.recipe.stages) else None
        rows.append({**_evaluate(run, student, evaluation, samples, run.recipe.name, teacher), **cost})
    return {"rows": rows, "environment": environment(run.accelerator)}


def _evaluate(
    run: Run,
    source: TeacherConfig,
    evaluation: EvaluationConfig,
    samples: dict[str, Samples],
    name: str,
    compared: TeacherConfig | None = None,
) -> dict[str, Any]:
    """Scores of one model, beside `compared`; read back where the same weights answered the same file before."""
    data = run.recipe.data[evaluation.data]
    key = hashlib.sha256(
        json.dumps(
            [
                _weights_digest(source.path),
                source.dtype,
                _data_digest(Path(data.path)),
                dataclasses.asdict(data),
                dataclasses.asdict(evaluation),
                compared and [_weights_digest(compared.path), compared.dtype],
            ]
        ).encode()
    ).hexdigest()
    kept = run.out / "evaluation" / name / "scores.json"
    if kept.is_file() and (stored := json.loads(kept.read_text(encoding="utf-8")))["key"] == key:
        return stored["row"]
    models = [load_teacher(config) for config in (source, compared) if config]
    for model in models:
        model.model.to(run.accelerator.device)
    rows, place = samples[evaluation.data], run.out / "evaluation"
    scores = evaluate_model(
        models[0], rows, data, evaluation, place, name=name, teacher=models[1] if compared else None
    )
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
