"""Whether a well-formed recipe makes sense, before anything is loaded."""

from __future__ import annotations

import math
import re
import typing

from llavakd.errors import RecipeError, nearest

if typing.TYPE_CHECKING:
    from llavakd.config import DataConfig, Recipe, StageConfig

PARTS = ("vision_tower", "projector", "language_model")


def check_sense(recipe: Recipe) -> None:
    """Refuse a recipe whose keys and types are right but which cannot make a run; raises RecipeError."""
    if not recipe.stages:
        raise RecipeError("stages: got an empty list, expected at least one stage")
    names = [stage.name for stage in recipe.stages]
    for name in names:
        if names.count(name) > 1:
            raise RecipeError(f"stages: two stages are called {name!r}; every stage writes its own folder, rename one")
        if not name.replace("-", "").replace("_", "").isalnum():
            raise RecipeError(f"stages: {name!r} becomes a folder name; use letters, digits, - and _ only")
    for index, stage in enumerate(recipe.stages):
        _check_stage(recipe, stage, f"stages.{index} ({stage.name})")
    if recipe.evaluation and recipe.evaluation.data not in recipe.data:
        raise RecipeError(
            f"evaluation.data: no source {recipe.evaluation.data!r}{nearest(recipe.evaluation.data, recipe.data)}"
        )
    for name, source in recipe.data.items():
        _check_source(source, f"data.{name}")
    for key, value, least in (
        ("save_every", recipe.save_every, 1),
        ("log_every", recipe.log_every, 1),
        ("workers", recipe.workers, 0),
        ("max_bad_rows", recipe.max_bad_rows, 0),
    ):
        if not least <= value < math.inf:
            raise RecipeError(f"{key}: got {value}, expected at least {least}")


def _check_source(source: DataConfig, place: str) -> None:
    if source.max_length < 1:
        raise RecipeError(f"{place}.max_length: got {source.max_length}, expected at least 1")
    if source.subset is None:
        return
    try:
        re.compile(source.subset.group)
    except re.error as error:
        raise RecipeError(f"{place}.subset.group: {source.subset.group!r} is no regular expression: {error}") from None
    if not 0 <= source.subset.start < source.subset.stop <= 1:
        raise RecipeError(
            f"{place}.subset: got start {source.subset.start} and stop {source.subset.stop}, expected 0 <= start < stop <= 1"
        )


def _check_stage(recipe: Recipe, stage: StageConfig, place: str) -> None:
    for name, weight in stage.sources.items():
        if name not in recipe.data:
            raise RecipeError(f"{place}.data: no source {name!r} under data{nearest(name, recipe.data)}")
        if not 0 < weight < math.inf:
            raise RecipeError(f"{place}.data.{name}: got weight {weight}, expected a finite number above 0")
    if not stage.sources:
        raise RecipeError(f"{place}.data: names no source; give one under data")
    if not stage.train:
        raise RecipeError(f"{place}.train: the stage trains nothing; name at least one of {PARTS}")
    weights = stage.losses.weights
    if not any(weights.values()):
        raise RecipeError(f"{place}.losses: every weight is 0; give at least one of {', '.join(weights)} a weight")
    for part, weight in weights.items():
        if not 0 <= weight < math.inf:
            raise RecipeError(f"{place}.losses.{part}: got {weight}, expected a finite number, 0 or more")
        if weight and part != "ce" and recipe.teacher is None:
            raise RecipeError(
                f"{place}.losses.{part}: distils, but the recipe has no `teacher`; "
                "add teacher: {path: ...} or set the weight to 0"
            )
    _check_numbers(stage, place)


def _check_numbers(stage: StageConfig, place: str) -> None:
    if not 0 <= stage.losses.beta <= 1 or not stage.losses.temperature > 0:
        raise RecipeError(
            f"{place}.losses: beta must lie in [0, 1] and temperature above 0, got "
            f"{stage.losses.beta} and {stage.losses.temperature}"
        )
    for key in ("learning_rate", "epochs", "global_batch_size", "max_grad_norm"):
        if not 0 < getattr(stage, key) < math.inf:
            raise RecipeError(f"{place}.{key}: got {getattr(stage, key)}, expected a finite number above 0")
    if not 0 <= stage.warmup_ratio <= 1:
        raise RecipeError(f"{place}.warmup_ratio: got {stage.warmup_ratio}, expected a share from 0 to 1")
    micro = stage.micro_batch_size
    if micro is not None and (micro < 1 or stage.global_batch_size % micro):
        raise RecipeError(
            f"{place}.micro_batch_size: got {micro}, expected a divisor of global_batch_size {stage.global_batch_size}"
        )
