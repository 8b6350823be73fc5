"""Stages in order: each starts from the one before, is known by its fingerprint, and is skipped once it is done."""

import hashlib
import json
import os
import platform
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from safetensors.torch import load_file, save_file

from llavakd.config import DataConfig, EvaluationConfig, Recipe, StageConfig, TeacherConfig, resolve_paths
from llavakd.data.collate import RowDataset, Source
from llavakd.data.pictures import load_pixels
from llavakd.data.readers import lost_process
from llavakd.data.samples import Samples, load_samples
from llavakd.errors import UserError
from llavakd.evaluate import compare_segments, evaluate_model
from llavakd.models import student as students
from llavakd.models.alignment import align
from llavakd.models.fast import attend_by_rows, compile_layers, trim_tower
from llavakd.models.quantized import NF4Linear, quantize
from llavakd.models.student import VisionLanguageModel, load_student, load_teacher
from llavakd.preflight import check_before_training, claim_folder, used_sources
from llavakd.progress import bar, say
from llavakd.report import write_report
from llavakd.shapes.world import write_world
from llavakd.train.checkpoint import contents, write_folder, write_text
from llavakd.train.loop import run_stage
from llavakd.train.placement import join, place
from llavakd.train.step import StudentModule, TrainState, park_tower
from llavakd.train.taught import INDEX, TaughtStore, key_of, write_taught


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run folder and what all its stages share; the recipe's paths are resolved, `ledger` is pipeline.json."""

    recipe: Recipe
    out: Path
    accelerator: Accelerator
    samples: dict[str, Samples]
    ledger: dict[str, dict[str, Any]]

    def note(self, stage: StageConfig, **facts: Any) -> None:
        """Write down what is known of a stage."""
        self.ledger[stage.name] = {"name": stage.name, **facts}
        content = {"name": self.recipe.name, "stages": list(self.ledger.values())}
        write_text(self.out / "pipeline.json", json.dumps(content, indent=1))


@lost_process()
def run_pipeline(recipe: Recipe, out: Path, *, cache: dict[str, Any] | None = None) -> dict[str, Any]:
    """Run or go on with every stage in `out`, evaluate and report; returns results.json. Raises UserError, Interrupted.

    `cache`: `top_k` and `visual_share` of a teacher.cache, which is written instead.
    """
    out.mkdir(parents=True, exist_ok=True)
    transformers.utils.logging.disable_progress_bar()  # ours say what takes long
    claim_folder(recipe, out)
    accelerator = _make_accelerator(recipe, out)
    if cache and accelerator.num_processes > 1:
        told = f"a cache is written by one process, got {accelerator.num_processes}"
        raise UserError(f"{told}; start it without torchrun")
    with accelerator.main_process_first():
        draw_world(recipe, out)
    recipe, ledger = resolve_paths(recipe, out), out / "pipeline.json"
    read = partial(load_samples, max_bad_rows=recipe.max_bad_rows, find_pictures=True)
    samples = {name: read(data) for name, data in used_sources(recipe).items()}
    if accelerator.is_main_process:
        check_before_training(recipe, samples, accelerator.num_processes)
    begun = json.loads(ledger.read_text(encoding="utf-8"))["stages"] if ledger.is_file() else []
    entries = {entry["name"]: entry for entry in begun}
    run = Run(recipe=recipe, out=out, accelerator=accelerator, samples=samples, ledger=entries)
    for before, stage in zip((None, *recipe.stages), recipe.stages, strict=False):
        if cache is None:
            _run_stage(run, stage, before)
        elif stage.losses.distils:
            _train(run, stage, None, cache)
    cpu, processes = f"cpu x {torch.get_num_threads()} threads", str(accelerator.num_processes)
    device = torch.cuda.get_device_name() if accelerator.device.type == "cuda" else cpu
    made_with = {package: version(package) for package in ("torch", "transformers", "accelerate")}
    made_with |= {"python": platform.python_version(), "processes": processes, "device": device}
    results: dict[str, Any] = {"rows": [], "environment": made_with}
    if recipe.evaluation and accelerator.is_main_process and cache is None:
        results["rows"] = _rows(run, recipe.evaluation)
        write_text(out / "results.json", json.dumps(results, indent=1))
        write_report([out], out)
    accelerator.end_training()
    return results


def evaluate_folder(
    model: TeacherConfig, data: DataConfig, evaluation: EvaluationConfig, out: Path, *, limit: int | None = None
) -> dict[str, Any]:
    """Answer a question file with any LLaVA folder; writes predictions under OUT and returns the results row."""
    loaded = load_teacher(model, "cuda" if torch.cuda.is_available() else "cpu")
    samples = load_samples(data, find_pictures=True)[:limit]
    return evaluate_model(loaded, samples, data, evaluation, out, name=Path(model.path).name)


def draw_world(recipe: Recipe, out: Path) -> None:
    """Draw the recipe's world, if it has one, into OUT/world, unless it is there."""
    if (world := recipe.world) and not (out / "world").is_dir():
        write_folder(out / "world", lambda partial: write_world(partial, world), flush=False)


def _make_accelerator(recipe: Recipe, out: Path) -> Accelerator:
    ways = {"DEEPSPEED": "zero2 or zero3", "FSDP": "student"}
    if kind := next((name for name in ways if os.environ.get(f"ACCELERATE_USE_{name}") == "true"), None):
        raise UserError(f"accelerate is set up for {kind}; start with torchrun instead and set sharding: {ways[kind]}")
    several, cuda = int(os.environ.get("WORLD_SIZE", 1)) > 1, torch.cuda.is_available()
    # Counts are summed on the CPU, so that no step waits for its device.
    groups = [InitProcessGroupKwargs(backend="cpu:gloo,cuda:nccl")] * (several and cuda)
    how: dict[str, Any] = {"mixed_precision": "bf16" if recipe.precision == "bf16" else "no", "kwargs_handlers": groups}
    how |= {"log_with": list(recipe.trackers) or None, "project_dir": str(out / "trackers")}
    # Without `cpu` each of torchrun's processes would take itself for the only one.
    accelerator = Accelerator(**how, cpu=several and not cuda)
    accelerator.init_trackers(recipe.name)
    return accelerator


def _run_stage(run: Run, stage: StageConfig, before: StageConfig | None) -> None:
    """Bring a stage to its end and pipeline.json up to date; UserError where it was begun under another fingerprint."""
    fingerprint, entry = _fingerprint(run, stage, before), run.ledger.get(stage.name)
    if entry and (changed := [key for key in fingerprint if entry["fingerprint"].get(key) != fingerprint[key]]):
        told = f"stage {stage.name} in {run.out} was begun with another {', '.join(changed)}"
        raise UserError(f"{told}; use a new --out, or put back what was changed")
    if entry and entry["state"] == "done":
        say(f"stage {stage.name}: done, skipped")
        return
    run.note(stage, state="running", fingerprint=fingerprint)
    run.note(stage, state="done", fingerprint=fingerprint, **_train(run, stage, before))
    run.accelerator.free_memory()  # now that nothing names the models any more
    run.accelerator.wait_for_everyone()


def _fingerprint(run: Run, stage: StageConfig, before: StageConfig | None) -> dict[str, str]:
    """What decides a stage's result, each part hashed by itself so that a change can be named."""
    recipe, student, sources = run.recipe, run.recipe.student, [run.recipe.data[name] for name in stage.sources]
    start = student.vision_tower, student.language_model
    parts: dict[str, Any] = {
        "recipe": [asdict(stage), *map(asdict, sources), recipe.seed, recipe.precision],
        "data": [contents(source.path, "**/*") for source in sources],
        "start": run.ledger[before.name]["fingerprint"] if before else [asdict(student), *map(contents, start)],
    }
    if stage.losses.distils and recipe.teacher:
        kept = contents(f"{recipe.teacher.cache}/{stage.name}/{INDEX}") if recipe.teacher.cache else []
        parts["teacher"] = [asdict(recipe.teacher), contents(recipe.teacher.path), *kept]
    return {key: _digest(value) for key, value in parts.items()}


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _train(run: Run, stage: StageConfig, before: StageConfig | None, cache: Any = None) -> dict[str, Any]:
    """Train one stage and write its model, or its part of the teacher's cache; returns what pipeline.json says of it."""
    recipe, accelerator, folder = run.recipe, run.accelerator, run.out / stage.name
    start = str(run.out / before.name / "model") if before else None
    student = load_student(start) if start else students.build_student(recipe.student, seed=recipe.seed)
    student.train_only(stage.learns)
    updates: Any = students.add_updates(student, stage.lora_rank, seed=recipe.seed) if stage.lora_rank else None
    narrow = [layer for layer in updates.modules() if hasattr(layer, "base_layer")] if stage.lora_base == "nf4" else []
    for layer in narrow:
        layer.base_layer = NF4Linear(layer.base_layer, accelerator.device)
    config = recipe.teacher if stage.losses.distils else None
    kept = Path(config.cache) / stage.name if config and config.cache else None
    stored = TaughtStore(kept, config, stage.losses) if config and kept and not cache else None
    teacher = load_teacher(config) if config and not stored else None
    pair = align(student, teacher) if teacher else None
    if pair and accelerator.is_main_process:
        say(pair.note)
    drift = _quantize(run, stage, teacher)
    vocab_size = pair.vocab_size if pair else stored.index["vocab_size"] if stored else None
    whole = StudentModule(student, stage, vocab_size)
    module, optimizer = place(accelerator, whole, teacher.model if teacher else None, stage, recipe.sharding)
    held: dict[str, Any] = {"module": module, "optimizer": optimizer, "student": student, "teacher": teacher}
    state = TrainState(accelerator=accelerator, **held, pair=pair, stage=stage, stored=stored)
    dataset = _dataset(run, state)
    _make_fast(recipe, state)
    if cache and config and kept:
        index = cache | {"vocab_size": vocab_size, "teacher": key_of(config)}
        write = partial(write_taught, state=state, dataset=dataset, index=index, workers=recipe.workers)
        return write_folder(kept, write)
    student.model.train()
    folder.mkdir(exist_ok=True)
    progress = run_stage(state, dataset, recipe, folder)
    for layer in narrow * accelerator.is_main_process:
        layer.base_layer = layer.base_layer.widened()
    join(module, optimizer, keep=accelerator.is_main_process)
    if accelerator.is_main_process:
        student.model.tie_weights()
        if updates:
            updates.merge_and_unload()
        template = recipe.data[next(iter(stage.sources))].template
        write_folder(folder / "model", lambda partial: students.save_model(student, partial, template=template))
    return {"steps": progress.step, "train_seconds": progress.seconds, **progress.counted, **drift}


def _make_fast(recipe: Recipe, state: TrainState) -> None:
    """Set towers, attention, compilation and checkpointing as they are to be."""
    student, teacher = state.student.model, state.teacher
    models = [student, teacher.model] if teacher else [student]
    half = state.accelerator.device.type == "cuda" and recipe.precision == "bf16"
    for model in models:
        trim_tower(model)
        if half and (model is student or model.dtype != torch.float32):  # the teacher is not under autocast
            attend_by_rows(model)
    park_tower(state)
    if recipe.compile:
        compile_layers(*models)
    if recipe.gradient_checkpointing:
        student.gradient_checkpointing_enable()


def _quantize(run: Run, stage: StageConfig, teacher: VisionLanguageModel | None) -> dict[str, Any]:
    """Quantise the teacher, if it is to be; what pipeline.json says of its drift on 32 rows, UserError where it is far."""
    config, accelerator, drift = run.recipe.teacher, run.accelerator, dict[str, float]()
    if not config or not teacher or config.quantize == "none":
        return {}
    teacher.model.to(accelerator.device)
    quantize(teacher, config.quantize)  # before the other one comes: it may refuse, and makes room
    exact = load_teacher(config, accelerator.device)
    distilled = ("response", "visual") if stage.losses.visual_kl or stage.losses.relation else ("response",)
    for name in stage.sources:
        data, samples = run.recipe.data[name], run.samples[name]
        source = Source(samples=samples[:: len(samples) // 32 + 1], renderer=exact.renderer(data), data=data)
        rows = RowDataset([source], image_processor=exact.image_processor)
        usable = [sample for index, sample in enumerate(source.samples) if not rows[index].mistake]
        found = compare_segments(teacher, exact, usable, data)
        drift |= {f"{name}.{segment}": found[segment]["kl"] for segment in distilled if segment in found}
    nats = ", ".join(f"{key} {value:.2g}" for key, value in drift.items())
    told = f"stage {stage.name}: KL of the {config.quantize} teacher to the unquantised one, nats a token: {nats}"
    far = not all(value <= config.max_drift for value in drift.values())
    if accelerator.reduce(torch.tensor(float(far), device=accelerator.device)):  # all processes, or none
        raise UserError(f"{told}; max_drift is {config.max_drift}: raise it, or set teacher.quantize to int8 or none")
    if accelerator.is_main_process:
        say(told)
    return {"teacher_drift": drift}


def _dataset(run: Run, state: TrainState) -> RowDataset:
    recipe, stage, student, pair = run.recipe, state.stage, state.student, state.pair
    pictured = {name for name in stage.sources if recipe.cache_features and (run.samples[name].lengths > 0).any()}
    if pictured and ("vision_tower" in stage.train or (pair and not pair.shared_tower)):
        told = f"cache_features: stage {stage.name} needs pixels, for its vision tower learns or the teacher's differs"
        raise UserError(f"{told}; set cache_features: false")
    sources = []
    for name, weight in stage.sources.items():
        with run.accelerator.main_process_first():
            store = _feature_store(run, name, state) if name in pictured else None
        samples, data = run.samples[name], recipe.data[name]
        sources.append(Source(samples=samples, renderer=student.renderer(data), data=data, store=store, weight=weight))
    own = state.teacher.image_processor if state.teacher and pair and not pair.shared_pixels else None
    return RowDataset(sources, image_processor=student.image_processor, teacher_processor=own, seed=recipe.seed)


@torch.no_grad()
def _feature_store(run: Run, source: str, state: TrainState) -> dict[str, torch.Tensor]:
    """Features of a source's pictures, encoded once; keyed by tower, processor and picture names."""
    data, accelerator, student = run.recipe.data[source], run.accelerator, state.student
    names = sorted({name for sample in run.samples[source] for name in sample.images})
    tower = student.parts()["vision_tower"].state_dict().values()
    weights = [hashlib.sha256(weight.cpu().numpy()).hexdigest() for weight in tower]
    # One store for all sources of one set of pictures.
    key = _digest([data.images or data.path, names, student.image_processor.to_dict(), weights])
    path = run.out / "features" / f"{key[:16]}.safetensors"
    if not path.is_file():
        trim_tower(student.model)
        held: dict[str, torch.Tensor] = {}
        with bar(f"encode pictures of {source}", len(names)) as advance, accelerator.autocast():
            for start in range(0, len(names), 64):
                pixels = load_pixels(data, some := names[start : start + 64], student.image_processor)
                found = students.vision_features(student.model, pixels.to(accelerator.device)).float()
                held |= zip(some, found.cpu().contiguous(), strict=True)
                advance(len(held))
        path.parent.mkdir(exist_ok=True)
        save_file(held, partial := path.with_suffix(f".partial-{os.getpid()}"))
        partial.replace(path)
    return load_file(path)  # memory-mapped


def _rows(run: Run, evaluation: EvaluationConfig) -> list[dict[str, Any]]:
    """The rows of results.json: the teacher's, where there is one, and the student's."""
    recipe, rows = run.recipe, []
    done = [run.ledger[stage.name] for stage in recipe.stages]
    cost: dict[str, Any] = {key: sum(entry[key] for entry in done) for key in ("steps", "train_seconds", "tokens")}
    if recipe.teacher and evaluation.teacher:
        rows.append(_evaluate(run, evaluation, "teacher", recipe.teacher) | dict.fromkeys(cost))
    student = TeacherConfig(path=str(run.out / recipe.stages[-1].name / "model"), dtype="float32")
    compared = [recipe.teacher] if recipe.teacher and any(stage.losses.distils for stage in recipe.stages) else []
    if drift := {entry["name"]: entry["teacher_drift"] for entry in done if "teacher_drift" in entry}:
        cost["teacher_drift"] = drift
    return [*rows, _evaluate(run, evaluation, recipe.name, student, *compared) | cost]


def _evaluate(run: Run, evaluation: EvaluationConfig, name: str, *models: TeacherConfig) -> dict[str, Any]:
    """Scores of the first model, beside the second; read back where the same weights answered the same file before."""
    data, place = run.recipe.data[evaluation.data], run.out / "evaluation"
    weights = [[contents(model.path), model.dtype] for model in models]
    key = _digest([weights, [contents(data.path, "**/*"), asdict(data), asdict(evaluation)]])
    kept = place / name / "scores.json"
    if kept.is_file() and (stored := json.loads(kept.read_text(encoding="utf-8")))["key"] == key:
        return stored["row"]
    model, *others = (load_teacher(config, run.accelerator.device) for config in models)
    teacher, samples = next(iter(others), None), run.samples[evaluation.data]
    scores = evaluate_model(model, samples, data, evaluation, place, name=name, teacher=teacher)
    row = {"seed": run.recipe.seed, **scores}
    write_text(kept, json.dumps({"key": key, "row": row}))
    return row
