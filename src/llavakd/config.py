"""The recipe: one YAML file that describes a whole run, read strictly.

Run lines: `load_recipe(Path("recipes/shapes/smoke.yaml"), ["stages.dpt.learning_rate=1e-3"])`.
"""

from __future__ import annotations

import dataclasses
import json
import re
import typing
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError

from llavakd.errors import RecipeError, nearest
from llavakd.recipe_checks import check_sense

Part = Literal["vision_tower", "projector", "language_model"]
_STRICT = ConfigDict(extra="forbid", strict=True)


@dataclass(frozen=True, kw_only=True)
class StudentConfig:
    """Where the student's parts come from; each folder may also be a whole LLaVA folder, whose part is then taken."""

    __pydantic_config__ = _STRICT
    vision_tower: str
    language_model: str
    projector: Literal["mlp2x_gelu", "linear"] = "mlp2x_gelu"
    vision_feature_layer: int = -2
    vision_feature_select_strategy: Literal["default", "full"] = "default"
    from_scratch: tuple[Literal["vision_tower", "language_model"], ...] = ()
    """Parts drawn at random from their folder's config.json instead of loaded."""


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """A LLaVA folder in transformers form, frozen."""

    __pydantic_config__ = _STRICT
    path: str
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    quantization: Literal["none"] = "none"


@dataclass(frozen=True, kw_only=True)
class SubsetConfig:
    """Keep the rows whose group hashes into [start, stop) of [0, 1): near-copies of one row never fall on two sides."""

    __pydantic_config__ = _STRICT
    group: str
    """Regular expression; the text that it matches in a row's id names the row's group."""
    start: float = 0.0
    stop: float = 1.0


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """One LLaVA-format JSON file with its picture folder and the text form it is rendered in."""

    __pydantic_config__ = _STRICT
    path: str
    images: str | None = None
    """Folder or zip archive that the rows' picture names are relative to."""
    subset: SubsetConfig | None = None
    template: Literal["pretrain", "vicuna_v1", "chatml"] = "vicuna_v1"
    max_length: int = 2048
    """Longest row in tokens, picture tokens included; a longer one is cut on the right and counted as `truncated`."""


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Weights of the loss parts (LLaVA-KD eq. 1: ce + a response_kl + b visual_kl + c relation)."""

    __pydantic_config__ = _STRICT
    ce: float = 0.0
    response_kl: float = 0.0
    visual_kl: float = 0.0
    relation: float = 0.0
    divergence: Literal["forward_kl", "reverse_kl", "jsd", "skewed_kl", "total_variation"] = "forward_kl"
    beta: float = 0.5
    """Mixture of `jsd` (0 is forward KL, 1 reverse KL), or skew of `skewed_kl`."""
    temperature: float = 1.0
    relation_center: bool = False
    """Subtract the mean visual token before the Gram matrix."""
    relation_row_normalize: bool = False
    """Scale every visual token to length one before the Gram matrix."""

    @property
    def weights(self) -> dict[str, float]:
        """The weight of every part by name."""
        return {"ce": self.ce, "response_kl": self.response_kl, "visual_kl": self.visual_kl, "relation": self.relation}

    @property
    def distils(self) -> bool:
        """Whether any part needs a teacher."""
        return any(weight for part, weight in self.weights.items() if part != "ce")


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """One stage: what is trained, on what, towards what."""

    __pydantic_config__ = _STRICT
    name: str
    data: str
    train: tuple[Part, ...]
    losses: LossConfig
    learning_rate: float
    global_batch_size: int
    micro_batch_size: int | None = None
    """Rows a device holds at once; absent: global_batch_size / number of processes. Accumulation is derived."""
    epochs: float = 1.0
    reduction: Literal["sample", "token"] = "sample"
    """sample: mean over rows of each row's mean; token: mean over the global batch's tokens (or pictures)."""
    grouping: Literal["none", "length", "modality_length"] = "modality_length"
    warmup_ratio: float = 0.03
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    max_grad_norm: float = 1.0


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Generation and scoring after the last stage."""

    __pydantic_config__ = _STRICT
    data: str
    metric: Literal["exact_match", "vqa_accuracy", "option_letter", "yes_no"] = "exact_match"
    """Rule by which answers are scored: METRICS in evaluate/scoring.py."""
    batch_size: int = 64
    max_new_tokens: int = 32
    teacher: bool = True
    """Score the teacher too (once; its row is named `teacher`)."""


@dataclass(frozen=True, kw_only=True)
class WorldConfig:
    """Draw a Shapes world into RUN/world before the run; data paths reach it as `world:instruct.json`."""

    __pydantic_config__ = _STRICT
    scenes: int
    seed: int = 0
    test_questions: int = 1000
    noise: float = 0.0
    """Share of the training questions that are answered wrongly."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A whole run."""

    __pydantic_config__ = _STRICT
    name: str
    student: StudentConfig
    data: dict[str, DataConfig]
    stages: tuple[StageConfig, ...]
    seed: int = 1234
    teacher: TeacherConfig | None = None
    evaluation: EvaluationConfig | None = None
    world: WorldConfig | None = None
    precision: Literal["fp32", "bf16"] = "bf16"
    gradient_checkpointing: bool = False
    cache_features: bool = False
    """Run the frozen vision tower once per picture and keep its features under RUN/features."""
    save_every: int = 500
    """Optimiser steps between checkpoints."""
    log_every: int = 10
    workers: int = 2
    """Processes that read pictures ahead; 0 reads in the main process."""
    trackers: tuple[str, ...] = ("tensorboard",)
    """Names of experiment trackers known to accelerate."""

    def stage(self, name: str) -> StageConfig:
        """The stage called `name`."""
        return next(stage for stage in self.stages if stage.name == name)


class _RecipeLoader(yaml.SafeLoader):
    """Safe YAML that refuses repeated keys and reads 1e-3 as a number."""


def _mapping_without_repeats(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[str] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node)
        if key in seen:
            raise RecipeError(f"key {key!r} stands twice (line {key_node.start_mark.line + 1}); remove one")
        seen.add(key)
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


_RecipeLoader.add_constructor("tag:yaml.org,2002:map", _mapping_without_repeats)
_RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read, override (`a.b=c`; a stage by name or number) and check a recipe file.

    Raises:
        RecipeError: unreadable file, unknown or repeated key, wrong type, or a run that cannot make sense.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise RecipeError(f"cannot read the recipe {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} is not UTF-8 text: {error}") from error
    try:
        tree = yaml.load(text, Loader=_RecipeLoader)
    except yaml.YAMLError as error:
        raise RecipeError(f"{path} is not YAML: {error}") from error
    if not isinstance(tree, dict):
        raise RecipeError(
            f"{path} holds a {type(tree).__name__}, expected a mapping with keys name, student, data, ..."
        )
    for override in overrides:
        _apply_override(tree, override)
    return parse_recipe(tree)


def parse_recipe(tree: dict[str, Any]) -> Recipe:
    """Turn a plain tree of dicts and lists into a checked Recipe; raises RecipeError."""
    try:
        # JSON mode: strict on types, yet lists may become tuples.
        recipe = TypeAdapter(Recipe).validate_json(json.dumps(tree))
    except ValidationError as error:
        raise RecipeError("\n".join(_explain(problem) for problem in error.errors())) from None
    except TypeError as error:
        raise RecipeError(f"the recipe holds a value that is neither text, number, list nor mapping: {error}") from None
    check_sense(recipe)
    return recipe


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML, every default written out; `load_recipe` reads it back to an equal Recipe."""
    return yaml.safe_dump(to_tree(recipe), sort_keys=False, allow_unicode=True)


def to_tree(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain dicts and lists."""
    return json.loads(json.dumps(dataclasses.asdict(recipe)))


def resolve_paths(recipe: Recipe, out: Path) -> Recipe:
    """Replace the prefixes `world:` (RUN/world) and `package:` (files shipped with llavakd) in every path."""
    prefixes = {"world:": out / "world", "package:": Path(__file__).parent / "assets"}

    def place(path: str) -> str:
        for prefix, folder in prefixes.items():
            if path.startswith(prefix):
                return str(folder / path.removeprefix(prefix))
        return path

    student = dataclasses.replace(
        recipe.student,
        vision_tower=place(recipe.student.vision_tower),
        language_model=place(recipe.student.language_model),
    )
    data = {
        name: dataclasses.replace(source, path=place(source.path), images=source.images and place(source.images))
        for name, source in recipe.data.items()
    }
    teacher = recipe.teacher and dataclasses.replace(recipe.teacher, path=place(recipe.teacher.path))
    return dataclasses.replace(recipe, student=student, data=data, teacher=teacher)


def differing_keys(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Dotted names of the leaves in which two recipe trees differ, with both values."""
    found: list[str] = []
    for key in dict.fromkeys([*old, *new]):
        left, right = old.get(key), new.get(key)
        if isinstance(left, list) and isinstance(right, list) and len(left) == len(right):
            left, right = dict(enumerate(left)), dict(enumerate(right))
        if isinstance(left, dict) and isinstance(right, dict):
            found += differing_keys(left, right, f"{prefix}{key}.")
        elif left != right:
            found.append(f"{prefix}{key}: {left!r} -> {right!r}")
    return found


def control_twin(recipe: Recipe) -> Recipe:
    """The equal-step control: the same stages on the same data from the same start, cross-entropy only."""
    stages = tuple(
        dataclasses.replace(stage, name=_PLAIN_NAMES.get(stage.name, f"{stage.name}-plain"), losses=LossConfig(ce=1.0))
        for stage in recipe.stages
    )
    name = "-".join(_PLAIN_NAMES.get(stage.name, stage.name).rstrip("2") for stage in recipe.stages)
    return dataclasses.replace(recipe, name=name, stages=stages, teacher=None)


_PLAIN_NAMES = {"dpt": "pt", "sft": "sft", "dft": "sft2"}


def _apply_override(tree: dict[str, Any], override: str) -> None:
    path, equals, value = override.partition("=")
    if not equals or not path:
        raise RecipeError(f"override {override!r} is not of the form key.key=value")
    *parents, last = path.split(".")
    node: Any = tree
    for depth, key in enumerate(parents):
        node = _child(node, key, ".".join(parents[: depth + 1]), override)
    if isinstance(node, list):
        raise RecipeError(f"override {override!r}: {'.'.join(parents)} is a list; name one of its entries and a key")
    try:
        node[last] = yaml.load(value, Loader=_RecipeLoader)
    except yaml.YAMLError as error:
        raise RecipeError(f"override {override!r}: {value!r} is not YAML: {error}") from error


def _child(node: Any, key: str, path: str, override: str) -> Any:
    if isinstance(node, list):
        names = [str(entry.get("name", "")) if isinstance(entry, dict) else "" for entry in node]
        if key in names:
            return node[names.index(key)]
        if key.isdigit() and int(key) < len(node):
            return node[int(key)]
        raise RecipeError(f"override {override!r}: no entry {key!r} at {path}{nearest(key, names)}")
    if not isinstance(node.get(key), dict | list):
        if node.get(key) is None and key in ("teacher", "evaluation", "world", "subset"):
            node[key] = {}
            return node[key]
        raise RecipeError(f"override {override!r}: {path} is not a mapping{nearest(key, node)}")
    return node[key]


def _explain(problem: Any) -> str:
    place = ".".join(str(part) for part in problem["loc"])
    if problem["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        owner = _owner_of(problem["loc"][:-1])
        known = [f.name for f in dataclasses.fields(owner)] if owner else []
        return f"unknown key {place!r}{nearest(str(problem['loc'][-1]), known)}"
    if problem["type"] in ("missing", "missing_argument"):
        return f"key {place!r} is missing; add it"
    if problem["type"] == "literal_error":
        expected = problem["ctx"]["expected"]
        choices = [part.strip("' ") for part in expected.replace(" or ", ",").split(",")]
        return f"{place}: got {problem['input']!r}, expected {expected}{nearest(str(problem['input']), choices)}"
    return f"{place}: got {problem['input']!r}; {problem['msg'][0].lower()}{problem['msg'][1:]}"


def _owner_of(place: Iterable[Any]) -> Any:
    """The dataclass that the keys at `place` belong to, walked through the annotations."""
    kind: Any = Recipe
    for key in place:
        if dataclasses.is_dataclass(kind):
            kind = typing.get_type_hints(kind).get(str(key))
        else:  # dict[str, X], tuple[X, ...]
            kind = typing.get_args(kind)[1 if typing.get_origin(kind) is dict else 0]
        members = [member for member in typing.get_args(kind) if dataclasses.is_dataclass(member)]
        if members and typing.get_origin(kind) not in (dict, tuple):
            kind = members[0]
    return kind if dataclasses.is_dataclass(kind) else None
