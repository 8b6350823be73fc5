"""What can be checked before anything trains: the pair of models, and every row as they would read it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from llavakd.config import DataConfig, Recipe, differing_keys, dump_recipe, resolve_paths
from llavakd.data.check import check_source
from llavakd.data.files import DataError
from llavakd.data.samples import Samples, too_many
from llavakd.errors import UserError, optional
from llavakd.models.alignment import align
from llavakd.models.student import VisionLanguageModel, outline_folder, outline_student
from llavakd.progress import say
from llavakd.train.checkpoint import write_text
from llavakd.train.loop import micro_batch_size, total_steps


def used_sources(recipe: Recipe) -> dict[str, DataConfig]:
    """The data sources that stages and evaluation read, by name."""
    names = [name for stage in recipe.stages for name in stage.sources]
    return {name: recipe.data[name] for name in names + ([recipe.evaluation.data] if recipe.evaluation else [])}


def readers_of(recipe: Recipe) -> list[VisionLanguageModel]:
    """The student and, where it reads otherwise, the teacher, without weights; UserError where they are no pair."""
    student = outline_student(recipe.student)
    if recipe.teacher is None or not any(stage.losses.distils for stage in recipe.stages):
        return [student]
    teacher = outline_folder(recipe.teacher.path)
    words = {model.tokenizer.backend_tokenizer.to_str() for model in (student, teacher)}
    return [student] if align(student, teacher).shared_pixels and len(words) == 1 else [student, teacher]


def claim_folder(recipe: Recipe, out: Path) -> None:
    """Write OUT/recipe.yaml, or refuse with UserError a folder that belongs to another recipe."""
    path, text = out / "recipe.yaml", dump_recipe(recipe)
    changed = {"sharding": recipe.sharding}  # may be: checkpoints do not depend on it
    if not path.is_file():
        write_text(path, text)
    elif differing := differing_keys(yaml.safe_load(path.read_text("utf-8")) | changed, yaml.safe_load(text)):
        told = f"{out} holds a run of another recipe; these keys differ: {'; '.join(differing[:8])}"
        raise UserError(f"{told}. Use a new --out or the old values")


def check_before_training(recipe: Recipe, samples: Mapping[str, Samples], processes: int) -> None:
    """What takes seconds: batches, extras, the pair, whether a spread of every source's rows renders; UserError."""
    for stage in recipe.stages:
        total_steps(sum(round(weight * len(samples[name])) for name, weight in stage.sources.items()), stage)
        micro_batch_size(stage, processes=processes)
        if stage.lora_rank:
            optional("peft", "lora_rank", "lora")
        if stage.lora_base == "nf4":
            optional("bitsandbytes", "lora_base: nf4", "qlora")
    student, *_ = readers_of(recipe)
    for name in dict.fromkeys(name for stage in recipe.stages for name in stage.sources):
        for mistake in samples[name].mistakes:
            say(f"left out: {mistake}")
        tried = samples[name][:: max(1, len(samples[name]) // 2000)]
        found = student.renderer(recipe.data[name]).render_each(tried)
        wrong = [str(one) for one in found if isinstance(one, DataError)]
        if len(wrong) > recipe.max_bad_rows * len(tried):
            raise too_many(wrong, len(wrong), len(tried), recipe.max_bad_rows)


def check_recipe(recipe: Recipe, out: Path, **options: Any) -> dict[str, dict[str, Any]]:
    """The whole check of every source of a recipe whose run is or will be in `out`; the rest as `check_source`."""
    recipe = resolve_paths(recipe, out)
    found, models = dict[str, dict[str, Any]](), readers_of(recipe)
    for name, data in used_sources(recipe).items():
        found[name] = check_source(data, [(model.renderer(data), model.image_processor) for model in models], **options)
    return found
