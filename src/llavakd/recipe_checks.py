"""Whether a well-formed recipe makes sense, before anything is loaded."""

from __future__ import annotations

import math
import re
import typing
from collections.abc import Iterator

from llavakd.errors import nearest

if typing.TYPE_CHECKING:
    from llavakd.config import DataConfig, Recipe, StageConfig


def find_problems(recipe: Recipe) -> Iterator[str]:
    """Why a recipe whose keys and values are right one by one cannot make a run."""
    names = [stage.name for stage in recipe.stages]
    if not names:
        yield "stages: got an empty list, expected at least one stage"
    for name in dict.fromkeys(names):
        if names.count(name) > 1:
            yield f"stages: two stages are called {name!r}; every stage writes its own folder, rename one"
        if not name.replace("-", "").replace("_", "").isalnum():
            yield f"stages: {name!r} becomes a folder name; use letters, digits, - and _ only"
    stages = {f"stages.{index} ({stage.name})": stage for index, stage in enumerate(recipe.stages)}
    for place, stage in stages.items():
        yield from _stage_problems(stage, place, teacher=recipe.teacher is not None)
    read = [(place, name) for place, stage in stages.items() for name in stage.sources]
    for place, name in read + ([("evaluation", recipe.evaluation.data)] if recipe.evaluation else []):
        if name not in recipe.data:
            yield f"{place}.data: no source {name!r} under data{nearest(name, recipe.data)}"
    for name, source in recipe.data.items():
        yield from _source_problems(source, f"data.{name}.subset")


def _source_problems(source: DataConfig, place: str) -> Iterator[str]:
    if (subset := source.subset) is None:
        return
    try:
        re.compile(subset.group)
    except re.error as error:
        yield f"{place}.group: {subset.group!r} is no regular expression: {error}"
    if not 0 <= subset.start < subset.stop <= 1:
        yield f"{place}: got start {subset.start} and stop {subset.stop}, expected 0 <= start < stop <= 1"


def _stage_problems(stage: StageConfig, place: str, *, teacher: bool) -> Iterator[str]:
    losses, weights, micro = stage.losses, stage.losses.weights, stage.micro_batch_size
    if not stage.train:
        yield f"{place}.train: the stage trains nothing; name vision_tower, projector or language_model"
    if not any(weights.values()):
        yield f"{place}.losses: every weight is 0; give at least one of {', '.join(weights)} a weight"
    if losses.distils and not teacher:
        part = next(part for part, weight in weights.items() if weight and part != "ce")
        remedy = "add teacher: {path: ...} or set the weight to 0"
        yield f"{place}.losses.{part}: distils, but the recipe has no `teacher`; {remedy}"
    if not 0 <= losses.beta <= 1 or not losses.temperature > 0:
        wrong = f"{losses.beta} and {losses.temperature}"
        yield f"{place}.losses: beta must lie in [0, 1] and temperature above 0, got {wrong}"
    for key in ("learning_rate", "epochs", "global_batch_size", "max_grad_norm"):
        if not 0 < getattr(stage, key) < math.inf:
            yield f"{place}.{key}: got {getattr(stage, key)}, expected a finite number above 0"
    if micro and stage.global_batch_size % micro:
        wanted = f"a divisor of global_batch_size {stage.global_batch_size}"
        yield f"{place}.micro_batch_size: got {micro}, expected {wanted}"
