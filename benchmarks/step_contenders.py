"""The models, rows and ways to compute a step that step.py measures: the released trainer's, and ours."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from plan_llava_kd import RECIPES, local, write_configs
from plan_measured import BEFORE, batch_of, prepared, stage_of, whole
from torch import Tensor, nn
from torch._inductor import choices, virtualized
from torch._inductor import config as inductor
from transformers import AutoConfig

from llavakd.config import LossConfig, Recipe, StageConfig, load_recipe
from llavakd.data.chat import Segment
from llavakd.data.collate import Batch
from llavakd.losses.objective import Counts, count, objective
from llavakd.losses.rows import IGNORE_INDEX
from llavakd.models.fast import _KEPT, attend_by_rows, compile_layers, trim_tower
from llavakd.models.quantized import quantize
from llavakd.models.student import VisionLanguageModel, final_hidden, student_config, vision_features
from llavakd.train import step as trainer
from llavakd.train.step import set_learning_rate
from losses import released_parts

RECIPE = "qwen2.5-0.5b"
Clock = Callable[[str], AbstractContextManager[Any]]
Step = Callable[..., Any]  # takes a Clock


@dataclass(frozen=True, kw_only=True)
class Size:
    """Of the rows, of the models (`small`: a few layers), and of what is measured."""

    rows: tuple[int, ...] = (16, 8)
    visual: int = 729
    text: int = 200
    response: int = 100
    image: int = 384
    vocabulary: int = 151_936
    matrix: int = 8192
    repeats: int = 5
    backend: str = "inductor"
    small: bool = False


TINY = Size(
    rows=(3, 2),
    visual=16,
    text=32,
    response=8,
    image=56,
    vocabulary=512,
    matrix=64,
    repeats=1,
    backend="aot_eager",
    small=True,
)


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One way to compute a step; `compiled` names models, `optimizer` is the trainer's whole `train_step`.

    budget: share of the activations that a compiled layer may keep, the rest it makes again, cheapest first; None: as the trainer.
    own_tower: float32 under autocast, where the trainer takes the teacher's.
    own_choices: inductor's own of padding and reductions, where the trainer has others.
    narrow_between: what stands between the student's layers is bfloat16, where the trainer has float32.
    quantize: what a copy of the teacher is quantised to, None where the teacher itself is run.
    """

    name: str
    released: bool = False
    float_logits: bool = False
    autocast: bool = False
    compiled: tuple[str, ...] = ()
    checkpointing: bool = False
    optimizer: bool = False
    budget: float | None = None
    quantize: str | None = None
    own_tower: bool = False
    narrow_between: bool = False
    own_choices: bool = False


BOTH = ("teacher", "student")
REFERENCE = Contender(name="reference", released=True)
FAST = Contender(name="ours, both compiled", compiled=BOTH)
QUANTIZED = Contender(name="ours, both compiled, fp8 teacher", compiled=BOTH, quantize="fp8")
OURS = Contender(name="ours")
USUAL = Contender(name="ours, both compiled, as inductor would", compiled=BOTH, own_choices=True)
NARROW = Contender(name="ours, both compiled, bfloat16 between layers", compiled=BOTH, narrow_between=True)
CONTENDERS = (
    REFERENCE,
    Contender(name="reference, float32 logits", released=True, float_logits=True),  # as its transformers makes them
    Contender(name="reference, float32 weights under autocast", released=True, autocast=True),
    OURS,
    Contender(name="ours, teacher compiled", compiled=("teacher",)),
    FAST,
    QUANTIZED,
    USUAL,
    Contender(name="ours, both compiled, the student's tower", compiled=BOTH, own_tower=True),
    NARROW,
    Contender(name="ours, both compiled, train_step", compiled=BOTH, optimizer=True),
    Contender(name="ours, checkpointing", checkpointing=True),
    Contender(name="ours, both compiled, checkpointing", compiled=BOTH, checkpointing=True),
    Contender(name="ours, both compiled, all activations kept", compiled=BOTH, budget=1.0),
    Contender(name="ours, both compiled, half of them kept", compiled=BOTH, budget=0.5),
)


@dataclass(frozen=True, kw_only=True)
class Models:
    """Student in float32, the same numbers in bfloat16 (`narrow`), teacher in bfloat16; the towers are equal.

    towers: for each model its tower as our trainer has it; what stands in the models is whole.
    compiled: for each model, what a call of each of its compiled modules goes to; `prepare` makes both of another one.
    """

    student: VisionLanguageModel
    narrow: VisionLanguageModel
    teacher: VisionLanguageModel
    towers: dict[str, nn.Module]
    compiled: dict[str, dict[nn.Module, Any]]
    prepare: Callable[[VisionLanguageModel], tuple[nn.Module, dict[nn.Module, Any]]]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A stage with the rows of one step, as they come from the loader (`host`) and on the device."""

    stage: StageConfig
    models: Models
    host: Batch
    batch: Batch
    counts: Counts

    @property
    def teacher(self) -> VisionLanguageModel | None:
        """None where nothing is distilled."""
        return self.models.teacher if self.stage.losses.distils else None


def read_recipe(folder: Path) -> Recipe:
    """The paper's recipe, its models as config files in `folder`."""
    write_configs(folder)
    changes = ["student.vision_feature_select_strategy=full", "gradient_checkpointing=false"]
    return load_recipe(RECIPES / f"{RECIPE}.yaml", [*local(folder, RECIPE), *changes])


def make_models(recipe: Recipe, size: Size, device: str) -> Models:
    """Random models of the recipe's shapes."""
    assert recipe.teacher, "the recipe has no teacher"
    configs = {"student": student_config(recipe.student), "teacher": AutoConfig.from_pretrained(recipe.teacher.path)}
    made = {}
    for number, (name, config) in enumerate(configs.items(), start=1):
        fit(config, size, number)
        torch.manual_seed(number)
        made[name] = whole(config, torch.float32, device)
    student, teacher = made["student"], made["teacher"]
    cast(teacher, torch.bfloat16)
    teacher.model.requires_grad_(False).eval()
    student.parts()["vision_tower"].load_state_dict(teacher.parts()["vision_tower"].state_dict())
    cast(student, torch.bfloat16)
    narrow = copy.deepcopy(student)
    cast(student, torch.float32)
    prepare = partial(prepare_modules, backend=size.backend)
    ready = {name: prepare(model) for name, model in made.items()}
    towers, compiled = ({name: pair[place] for name, pair in ready.items()} for place in (0, 1))
    return Models(student=student, narrow=narrow, teacher=teacher, towers=towers, compiled=compiled, prepare=prepare)


def fit(config: Any, size: Size, number: int) -> None:
    """Make a model's configuration one for these rows; of a small size the width tells its number."""
    config.vision_feature_select_strategy, config.image_seq_length = "full", size.visual
    config.image_token_id = size.vocabulary - 1
    config.vision_config.vision_use_head = False  # transformers 5.17 does not know it until it is set
    if size.small:
        shrink(config, size, 32 * number)


def shrink(config: Any, size: Size, width: int) -> None:
    """Make a model's configuration one of a few layers."""
    small = {"num_hidden_layers": 2, "num_attention_heads": 2}
    text = small | {"hidden_size": width, "intermediate_size": 2 * width, "num_key_value_heads": 2}
    vision = small | {"hidden_size": 32, "intermediate_size": 64, "image_size": size.image, "num_hidden_layers": 3}
    for part, values in ((config.text_config, text | {"vocab_size": size.vocabulary}), (config.vision_config, vision)):
        for key, value in values.items():
            setattr(part, key, value)


def cast(model: VisionLanguageModel, dtype: torch.dtype) -> None:
    """Only the weights: `to` would round the rotary frequencies, too."""
    for parameter in model.model.parameters():
        parameter.data = parameter.data.to(dtype)


def prepare_modules(model: VisionLanguageModel, backend: str) -> tuple[nn.Module, dict[nn.Module, Any]]:
    """The tower as our trainer has it, and the compiled call of each layer; nothing is switched on yet."""
    with other_tower(model, copy.deepcopy(model.parts()["vision_tower"])):
        trim_tower(model.model)
        compile_layers(model.model, backend=backend, dynamic=False)
        found = {module: call for module in model.model.modules() if (call := module._compiled_call_impl)}
        for module in found:
            module._compiled_call_impl = None
        return model.parts()["vision_tower"], found


@contextmanager
def other_tower(model: VisionLanguageModel, tower: nn.Module) -> Iterator[None]:
    """Meanwhile the model has this one."""
    whole = model.parts()["vision_tower"]
    model.model.model.vision_tower = tower
    try:
        yield
    finally:
        model.model.model.vision_tower = whole


@contextmanager
def usual_choices() -> Iterator[None]:
    """Inductor as it is where nobody has set it up."""
    ours = virtualized.V.choices
    virtualized.V.set_choices_handler(choices.InductorChoices())
    torch.compiler.reset()
    try:
        with inductor.patch(comprehensive_padding=True):
            yield
    finally:
        virtualized.V.set_choices_handler(ours)
        torch.compiler.reset()


@contextmanager
def switched(case: Case, contender: Contender) -> Iterator[None]:
    """The case's models as this contender wants them, and back."""
    models, learns = case.models, "language_model" in case.stage.train
    student = models.student.model
    for model in (models.student.model, models.teacher.model):
        model.model.language_model.set_attn_implementation("sdpa")
        if student.device.type == "cuda" and not contender.released:
            attend_by_rows(model)
    budget = contender.budget or (_KEPT if learns else 1.0)
    if budget != torch._functorch.config.activation_memory_budget:
        torch._functorch.config.activation_memory_budget = budget
        torch.compiler.reset()
    with ExitStack() as back:
        for name, tower in models.towers.items() if not contender.released else ():
            back.enter_context(other_tower(getattr(models, name), tower))
        if contender.checkpointing:
            student.gradient_checkpointing_enable()
            back.callback(student.gradient_checkpointing_disable)
        if contender.own_choices:
            back.enter_context(usual_choices())
        if contender.narrow_between:
            back.callback(student.model.register_forward_pre_hook(narrowed, with_kwargs=True).remove)
        for name in contender.compiled:
            for module, call in models.compiled[name].items():
                module._compiled_call_impl = call
        back.callback(put_back, models)
        yield


def put_back(models: Models) -> None:
    """No gradients, nothing compiled, and the student's tower, which a contender may have parked, beside its head."""
    for module in (module for calls in models.compiled.values() for module in calls):
        module._compiled_call_impl = None
    for model in (models.student, models.narrow):
        model.model.zero_grad()
    for weight in models.student.parts()["vision_tower"].parameters():
        weight.data = weight.to(models.student.head.device)


def narrowed(module: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A hook: the decoder's input in bfloat16, which all that is added to it then is."""
    return args, options | {"inputs_embeds": options["inputs_embeds"].bfloat16()}


def make_case(recipe: Recipe, stage: str, models: Models, size: Size, rows: int, device: str) -> Case:
    """Full rows, one picture each."""
    torch.manual_seed(0)
    sizes = {"visual": size.visual, "text": size.text, "image": size.image}
    host = batch_of(rows, size.response, **sizes, vocabulary=size.vocabulary - 1, padding=0)
    visual = host.segments == Segment.VISUAL
    host = dataclasses.replace(host, input_ids=host.input_ids.masked_fill(visual, size.vocabulary - 1))
    counts = count(host.labels, visual, host.image_rows)
    host = host.pin_memory() if device == "cuda" else host  # as the loader hands it out
    on_device = {name: value.to(device) for name, value in vars(host).items() if isinstance(value, Tensor)}
    batch = dataclasses.replace(host, **on_device)
    return Case(stage=stage_of(recipe, stage), models=models, host=host, batch=batch, counts=counts)


@torch.no_grad()
def quantized(case: Case, kind: str) -> tuple[Case, dict[str, float]]:
    """The case with a quantised copy of its teacher, and how far that is from it on the batch: mean KL, nats a token."""
    exact, teacher, batch = case.models.teacher, copy.deepcopy(case.models.teacher), case.batch
    quantize(teacher, kind)
    assert batch.pixel_values is not None, "a case has pictures"
    visual, features = batch.segments == Segment.VISUAL, vision_features(exact.model, batch.pixel_values.bfloat16())
    given = batch.input_ids, batch.attention_mask, visual, features
    sides = [side for one in (teacher, exact) for side in (final_hidden(one.model, *given), one.head)]
    where = {"labels": batch.labels, "visual": visual, "image_rows": batch.image_rows, "counts": case.counts}
    found = objective(*sides, **where, losses=LossConfig(response_kl=1.0, visual_kl=1.0), reduction="token")
    tower, calls = case.models.prepare(teacher)
    both = {"towers": case.models.towers | {"teacher": tower}, "compiled": case.models.compiled | {"teacher": calls}}
    models = dataclasses.replace(case.models, teacher=teacher, **both)
    drift = {name: float(value) for name, value in found.parts.items()}
    return dataclasses.replace(case, models=models), drift


def untimed(name: str) -> AbstractContextManager[None]:
    """No clock."""
    return nullcontext()


def released(
    case: Case,
    batch: Batch,
    student: VisionLanguageModel,
    teacher: VisionLanguageModel | None,
    clock: Clock = untimed,
    *,
    float_logits: bool = False,
    autocast: bool = False,
) -> dict[str, Tensor]:
    """The released trainer's losses by name: both models whole, with towers and all logits."""
    inputs = {name: getattr(batch, name) for name in ("input_ids", "attention_mask", "pixel_values")}
    with clock("student with its tower"), torch.autocast(batch.labels.device.type, torch.bfloat16, enabled=autocast):
        logits = [student.model(**inputs, use_cache=False).logits]
    if teacher:
        with clock("teacher with its tower"), torch.no_grad():
            logits.append(teacher.model(**inputs, use_cache=False).logits)
    with clock("loss"):
        logits = [side.float() for side in logits] if float_logits else logits
        predicts = batch.labels[:, 1:] != IGNORE_INDEX
        labels, response = batch.labels[:, 1:][predicts], [side[:, :-1][predicts] for side in logits]
        if not teacher:
            return {"ce": F.cross_entropy(response[0], labels)}
        seen = slice(BEFORE, BEFORE + student.tokens_per_image)
        student_side, teacher_side = (side[:, seen] for side in logits)
        return released_parts((response[0], response[1]), (student_side, teacher_side), labels)


def weigh(parts: dict[str, Tensor], stage: StageConfig) -> Tensor:
    """The stage's loss."""
    return torch.stack([stage.losses.weights[name] * value.float() for name, value in parts.items()]).sum()


def make_step(case: Case, contender: Contender) -> tuple[Step, Callable[[], int]]:
    """A contender's step, and what tells the bytes that stand between two of them."""
    return (released_step if contender.released else our_step)(case, contender)


def released_step(case: Case, contender: Contender) -> tuple[Step, Callable[[], int]]:
    """The released trainer's."""
    student = case.models.student if contender.autocast else case.models.narrow
    student.train_only(case.stage.train)
    student.model.train()
    how = {"float_logits": contender.float_logits, "autocast": contender.autocast}

    def step(clock: Clock = untimed) -> None:
        total = weigh(released(case, case.batch, student, case.teacher, clock, **how), case.stage)
        with clock("backward"):
            total.backward()
        student.model.zero_grad()

    return step, lambda: standing(student, case.teacher)


def our_step(case: Case, contender: Contender) -> tuple[Step, Callable[[], int]]:
    """Our trainer's own."""
    student, teacher = case.models.student, case.teacher
    state = prepared(case.stage, student, teacher, vocab_size=len(student.head))
    set_learning_rate(state.optimizer, 0.0)  # the contenders after this one get the same weights
    towers = patch.object(trainer, "_tower", lambda state: state.student.model)
    if not contender.own_tower:
        trainer.park_tower(state)

    def step(clock: Clock = untimed) -> None:
        if contender.optimizer:
            trainer.train_step(state, [case.host], step=0)
            return
        with timed_calls(clock), towers if contender.own_tower else nullcontext():
            total = state.module(case.host, *trainer.look(state, case.host), case.counts).total
        with clock("backward"):
            state.accelerator.backward(total)
        student.model.zero_grad()

    def stands() -> int:
        moments = sum(tensor.nbytes for held in state.optimizer.state.values() for tensor in held.values())
        return standing(student, teacher) + moments

    return step, stands


@contextmanager
def timed_calls(clock: Clock) -> Iterator[None]:
    """Put the clock around what the trainer's step calls."""

    def timed(function: Callable[..., Any], name: str, alone: str) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            with clock(name if torch.is_grad_enabled() else alone):
                return function(*args, **options)

        return call

    names = {
        "vision_features": ("tower", "tower"),
        "final_hidden": ("student forward", "teacher forward"),
        "objective": ("loss", "loss"),
    }
    clocked: dict[str, Any] = {key: timed(getattr(trainer, key), *both) for key, both in names.items()}
    with patch.multiple(trainer, **clocked):
        yield


def standing(*models: VisionLanguageModel | None) -> int:
    """Bytes of the weights that lie where the head does."""
    found = [(parameter, model.head.device) for model in models if model for parameter in model.model.parameters()]
    return sum(parameter.nbytes for parameter, device in found if parameter.device == device)
