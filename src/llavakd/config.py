"""The recipe: one YAML file that describes a whole run, read strictly; docs/config_notes.yaml says what each key means."""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic_core import to_json

from llavakd.errors import RecipeError, nearest
from llavakd.templates import render

Part = Literal["vision_tower", "projector", "language_model"]
TemplateName = Literal["pretrain", "vicuna_v1", "chatml"]
MetricName = Literal["exact_match", "vqa_accuracy", "option_letter", "yes_no"]
Section = TypeVar("Section")
Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


@dataclass(frozen=True, kw_only=True)
class StudentConfig:
    """Where the student's parts come from; each folder may also be a whole LLaVA folder, whose part is then taken."""

    vision_tower: str
    language_model: str
    projector: Literal["mlp2x_gelu", "linear", "pixel_shuffle"] = "mlp2x_gelu"
    vision_feature_layer: int = -2
    vision_feature_select_strategy: Literal["default", "full"] = "default"
    image_mode: Literal["square", "pad"] = "square"
    from_scratch: tuple[Literal["vision_tower", "language_model"], ...] = ()


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """A LLaVA folder in transformers form, frozen."""

    path: str
    cache: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    quantize: Literal["none", "fp8", "int8"] = "none"
    max_drift: Weight = 0.05


@dataclass(frozen=True, kw_only=True)
class SubsetConfig:
    """Keep the rows whose group hashes into [start, stop) of [0, 1): near-copies of one row never fall on two sides."""

    group: str
    start: Share = 0.0
    stop: Share = 1.0


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """One data file with its picture folder and the text form it is rendered in.

    A JSON list or JSON lines in LLaVA's format, or parquet or a saved `datasets` folder with `images` and `messages`.
    """

    path: str
    images: str | None = None
    subset: SubsetConfig | None = None
    template: TemplateName = "vicuna_v1"
    max_length: Count = 2048


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Weights of the loss parts (LLaVA-KD eq. 1: ce + a response_kl + b visual_kl + c relation)."""

    ce: Weight = 0.0
    response_kl: Weight = 0.0
    visual_kl: Weight = 0.0
    relation: Weight = 0.0
    divergence: Literal["forward_kl", "reverse_kl", "jsd", "skewed_kl", "total_variation"] = "forward_kl"
    beta: Share = 0.5
    temperature: Positive = 1.0
    relation_center: bool = False
    relation_row_normalize: bool = False

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

    name: Annotated[str, Field(pattern=r"^[\w-]+$")]  # a folder's
    data: str | Annotated[dict[str, Positive], Field(min_length=1)]
    train: Annotated[tuple[Part, ...], Field(min_length=1)]
    losses: LossConfig
    learning_rate: Positive
    global_batch_size: Count
    micro_batch_size: Count | None = None
    max_tokens_per_batch: Count | None = None
    epochs: Positive = 1.0
    lora_rank: Count | None = None
    lora_base: Literal["float32", "nf4"] = "float32"
    reduction: Literal["sample", "token"] = "sample"
    grouping: Literal["none", "length", "modality_length"] = "modality_length"
    warmup_ratio: Share = 0.03
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    max_grad_norm: Positive = 1.0

    @property
    def learns(self) -> tuple[Part, ...]:
        """The parts of `train` whose own weights change before the stage's end."""
        return tuple(part for part in self.train if part != "language_model" or not self.lora_rank)

    @property
    def sources(self) -> dict[str, float]:
        """The weight of every source by name."""
        return {self.data: 1.0} if isinstance(self.data, str) else self.data


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Generation and scoring after the last stage."""

    data: str
    metric: MetricName = "exact_match"
    batch_size: Count = 64
    max_new_tokens: Count = 32
    teacher: bool = True


@dataclass(frozen=True, kw_only=True)
class WorldConfig:
    """Draw a Shapes world into RUN/world before the run; data paths reach it as `world:instruct.json`."""

    scenes: Count
    seed: Annotated[int, Field(ge=0)] = 0
    test_questions: Annotated[int, Field(ge=2)] = 1000
    noise: Annotated[float, Field(ge=0, lt=1)] = 0.0


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A whole run."""

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)  # of its parts, too
    name: str
    student: StudentConfig
    data: dict[str, DataConfig]
    stages: Annotated[tuple[StageConfig, ...], Field(min_length=1)]
    seed: int = 1234
    teacher: TeacherConfig | None = None
    evaluation: EvaluationConfig | None = None
    world: WorldConfig | None = None
    precision: Literal["fp32", "bf16"] = "bf16"
    compile: bool = False
    sharding: Literal["none", "student", "both", "zero2", "zero3"] = "none"
    gradient_checkpointing: bool = False
    cache_features: bool = False
    max_bad_rows: Share = 0.001
    save_every: Count = 500
    log_every: Count = 10
    workers: Annotated[int, Field(ge=0)] = 2
    trackers: tuple[str, ...] = ("tensorboard",)


class _RecipeLoader(yaml.SafeLoader):
    """Safe YAML that refuses repeated keys and reads 1e-3 as a number."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: list[Any] = []
        for key_node, _ in node.value:
            if (key := self.construct_object(key_node)) in seen:
                raise RecipeError(f"key {key!r} stands twice (line {key_node.start_mark.line + 1}); remove one")
            seen.append(key)
        return super().construct_mapping(node, deep)


_RecipeLoader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), None)


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read, override (`a.b=c`; a stage by name or number) and check a recipe file; RecipeError where any of it fails."""
    try:
        tree = checked(dict[str, Any], yaml.load(path.read_text(encoding="utf-8"), Loader=_RecipeLoader))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecipeError) as error:
        raise RecipeError(f"cannot read the recipe {path}: {getattr(error, 'strerror', error)}") from error
    for override in overrides:
        try:
            _apply_override(tree, override)
        except (RecipeError, yaml.YAMLError) as error:
            raise RecipeError(f"override {override!r}: {error}") from error
    return parse_recipe(tree)


def parse_recipe(tree: dict[str, Any]) -> Recipe:
    """Turn a plain tree of dicts and lists into a checked Recipe; raises RecipeError."""
    recipe = checked(Recipe, tree)
    problems = render("recipe_problems.jinja", recipe=recipe, nearest=nearest).splitlines()
    for name, source in recipe.data.items():
        group = source.subset.group if source.subset else ""
        try:
            re.compile(group)
        except re.error as error:
            problems.append(f"data.{name}.subset.group: {group!r} is no regular expression: {error}")
    if problems:
        raise RecipeError("\n".join(problems))
    return recipe


def checked(kind: type[Section], tree: Any) -> Section:
    """A part of a recipe, or the whole, whose keys and values are right one by one; raises RecipeError."""
    try:
        # JSON mode: strict on types, yet lists may become tuples.
        return TypeAdapter(kind).validate_json(to_json(tree, bytes_mode="base64"))
    except ValidationError as error:
        raise RecipeError("\n".join(map(_explain, error.errors()))) from None


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML, every default written out; `load_recipe` reads it back to an equal Recipe."""
    return yaml.safe_dump(asdict(recipe), sort_keys=False, allow_unicode=True)


def resolve_paths(recipe: Recipe, out: Path) -> Recipe:
    """Replace the prefixes `world:` (RUN/world) and `package:` (files shipped with llavakd) in every path."""
    folders = {"world": out / "world", "package": Path(__file__).parent / "assets"}

    def place(part: dict[str, Any]) -> dict[str, Any]:
        for key in ("vision_tower", "language_model", "path", "images"):
            prefix, colon, rest = str(part.get(key)).partition(":")
            if colon and prefix in folders:
                part[key] = str(folders[prefix] / rest)
        return part

    return parse_recipe(json.loads(to_json(recipe), object_hook=place))


def differing_keys(old: Any, new: Any, place: str = "") -> list[str]:
    """Dotted names of the leaves in which two recipe trees differ, with both values."""
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        old, new = dict(enumerate(old)), dict(enumerate(new))
    if isinstance(old, dict) and isinstance(new, dict):
        pairs = {key: (old.get(key), new.get(key)) for key in [*old, *new]}
        return [line for key, pair in pairs.items() for line in differing_keys(*pair, f"{place}.{key}")]
    return [f"{place.removeprefix('.')}: {old!r} -> {new!r}"] if old != new else []


def control_twin(recipe: Recipe) -> Recipe:
    """The equal-step control: the same stages on the same data from the same start, cross-entropy only."""
    plain = {"dpt": "pt", "sft": "sft", "dft": "sft2"}
    names = {stage.name: plain.get(stage.name, f"{stage.name}-plain") for stage in recipe.stages}
    stages = tuple(replace(stage, name=names[stage.name], losses=LossConfig(ce=1.0)) for stage in recipe.stages)
    name = "-".join(plain.get(stage.name, stage.name).rstrip("2") for stage in recipe.stages)
    return replace(recipe, name=name, stages=stages, teacher=None)


def _apply_override(tree: dict[str, Any], override: str) -> None:
    path, equals, value = override.partition("=")
    if not equals or not path:
        raise RecipeError("it is not of the form key.key=value")
    *parents, last = path.split(".")
    node: Any = tree
    for depth, key in enumerate(parents, start=1):
        if isinstance(node, list):
            numbered = {str(index): entry for index, entry in enumerate(node) if isinstance(entry, dict)}
            node = numbered | {str(entry.get("name")): entry for entry in numbered.values()}
        elif node.get(key) is None and key in ("teacher", "evaluation", "world", "subset"):
            node[key] = {}
        sections = {name: value for name, value in node.items() if isinstance(value, dict | list)}
        if key not in sections:
            raise RecipeError(f"{'.'.join(parents[:depth])} is not a mapping{nearest(key, sections)}")
        node = sections[key]
    if isinstance(node, list):
        raise RecipeError(f"{'.'.join(parents)} is a list; name one of its entries and a key")
    node[last] = yaml.load(value, Loader=_RecipeLoader)


def _explain(problem: Any) -> str:
    place, got = ".".join(map(str, problem["loc"])) or "the recipe", problem["input"]
    if problem["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        *above, last = problem["loc"]
        return f"unknown key {place!r}{nearest(last, [field.name for field in fields(_owner(above))])}"
    if problem["type"] in ("missing", "missing_argument"):
        return f"key {place!r} is missing; add it"
    if problem["type"] == "literal_error":
        hint = nearest(str(got), re.findall(r"'(.*?)'", problem["ctx"]["expected"]))
        return f"{place}: got {got!r}, expected {problem['ctx']['expected']}{hint}"
    return f"{place}: got {got!r}; {problem['msg'][0].lower()}{problem['msg'][1:]}"


def _owner(place: list[Any], kind: Any = Recipe) -> Any:
    """The dataclass at `place` below `kind`, found through the annotations."""
    if not place:
        return kind
    hint = get_type_hints(kind)[place[0]]
    inner = next(part for part in (hint, *get_args(hint)) if is_dataclass(part))
    return _owner(place[2 if get_origin(hint) in (dict, tuple) else 1 :], inner)
