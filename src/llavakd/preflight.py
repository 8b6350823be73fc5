"""What can be checked before anything trains: the pair of models, and every row as they would read it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llavakd.config import DataConfig, Recipe, resolve_paths
from llavakd.data.check import Reader, check_source
from llavakd.data.files import DataError
from llavakd.data.samples import Samples, too_many
from llavakd.models.alignment import align
from llavakd.models.student import VisionLanguageModel, outline_folder, outline_student
from llavakd.progress import bar, say

_TRIED = 2000  # rows of a source that are rendered before a run starts


def used_sources(recipe: Recipe) -> list[str]:
    """Names of the data sources that stages and evaluation read."""
    names = [name for stage in recipe.stages for name in stage.sources]
    return list(dict.fromkeys(names + ([recipe.evaluation.data] if recipe.evaluation else [])))


def readers_of(recipe: Recipe) -> list[VisionLanguageModel]:
    """The student and, where it reads otherwise, the teacher, without weights; UserError where they are no pair."""
    student = outline_student(recipe.student)
    if recipe.teacher is None or not any(stage.losses.distils for stage in recipe.stages):
        return [student]
    teacher = outline_folder(recipe.teacher.path)
    words = {model.tokenizer.backend_tokenizer.to_str() for model in (student, teacher)}
    return [student] if align(student, teacher).shared_pixels and len(words) == 1 else [student, teacher]


def check_before_training(recipe: Recipe, samples: Mapping[str, Samples]) -> None:
    """The check that takes seconds: the pair, and whether a spread of every source's rows renders; UserError if not."""
    student, *_ = readers_of(recipe)
    for name in {name: None for stage in recipe.stages for name in stage.sources}:
        for mistake in samples[name].mistakes:
            say(f"left out: {mistake}")
        tried = samples[name][:: max(1, len(samples[name]) // _TRIED)]
        found = student.renderer(recipe.data[name]).render_each(tried)
        wrong = [str(one) for one in found if isinstance(one, DataError)]
        if len(wrong) > recipe.max_bad_rows * len(tried):
            raise too_many(wrong, len(wrong), len(tried), recipe.max_bad_rows)


def check_recipe(recipe: Recipe, out: Path, **options: Any) -> dict[str, dict[str, Any]]:
    """The whole check of every source of a recipe whose run is or will be in `out`; the rest as `check_source`."""
    recipe = resolve_paths(recipe, out)
    models = readers_of(recipe)
    return {name: check_data(name, recipe.data[name], models, **options) for name in used_sources(recipe)}


def check_data(name: str, data: DataConfig, models: list[VisionLanguageModel], **options: Any) -> dict[str, Any]:
    """`check_source` of one source as these models read it, with a bar."""
    readers = [Reader(model.renderer(data), model.image_processor) for model in models]
    with bar(f"check {name}", 100) as advance:
        return check_source(data, readers, **options, progress=lambda done, total: advance(100 * done // total))
