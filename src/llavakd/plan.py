"""What a run would cost, from configs alone: parameters, tokens, FLOPs, memory per GPU and hours of every stage.

FLOPs are counted from the shapes of the layers. Activations are what autograd keeps when the real forward runs on
tensors without data (FakeTensorMode), with one decoder layer and with two; the whole stack follows from the difference.
"""

import copy
import functools
import itertools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from weakref import ref

import numpy as np
import torch
import yaml
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoConfig, AutoTokenizer

from llavakd.config import Recipe, StageConfig, resolve_paths
from llavakd.data.chat import ChatRenderer, Segment
from llavakd.data.samples import IMAGE_TAG, load_samples
from llavakd.errors import UserError, nearest
from llavakd.losses.rows import GRADIENT_CHUNKS, rows_at_once
from llavakd.models.parts import load
from llavakd.models.quantized import QuantizedLinear, quantize
from llavakd.models.student import VisionLanguageModel, final_hidden, outline, student_config, vision_features
from llavakd.templates import render
from llavakd.train.loop import micro_batch_size, total_steps

_KNOWN = yaml.safe_load((Path(__file__).parent / "assets" / "plan.yaml").read_text(encoding="utf-8"))
GPUS = _KNOWN["gpus"]  # name -> (TFLOP/s, GiB)
_USABLE = 0.92  # of a GPU's memory; the rest goes to the driver, to fragments and to work space
_COMPILED = {True: 0.40, False: 0.67}  # of what layers keep, if they learn or not; benchmarks/results/plan_step.json


class Tokens(NamedTuple):
    """Of a source or a stage: its rows, the mean tokens of a row, and the most that a row holds."""

    rows: int
    visual: float
    text: float
    response: float
    longest: int
    most_pictures: int = 1


def plan_run(
    recipe: Recipe, *, gpu: str = "A100-80", gpus: int = 1, efficiency: float = 0.4, **given: int | None
) -> dict[str, Any]:
    """Plan every stage: plain values, FLOPs of the whole stage and bytes per GPU by part.

    Hours are FLOPs over the GPUs' bf16 rate times `efficiency`; loading, saving and evaluation are not in them. `given`:
    `rows` and `text_tokens` (of a mean row) stand in for data files that are not there. Raises UserError for an unknown
    GPU, a config that cannot be read (its key is named), and data of unknown size.
    """
    if gpu not in GPUS:
        raise UserError(f"--gpu: {gpu!r} is not known{nearest(gpu, GPUS)}; known are {', '.join(GPUS)}")
    if gpus < 1 or not 0 < efficiency <= 1:
        raise UserError(f"got --gpus {gpus} and --efficiency {efficiency}; expected at least 1, and a share up to 1")
    recipe = resolve_paths(recipe, Path("runs") / recipe.name)
    models = {"student": outline(student_config(recipe.student))}
    if recipe.teacher and not recipe.teacher.cache and any(stage.losses.distils for stage in recipe.stages):
        models["teacher"] = outline(load(AutoConfig, recipe.teacher.path, key="teacher.path"))
        if recipe.teacher.quantize != "none":
            quantize(models["teacher"], recipe.teacher.quantize)
    names = dict.fromkeys(name for stage in recipe.stages for name in stage.sources)
    sources = {name: _tokens(recipe, name, models["student"].tokens_per_image, **given) for name in names}
    guessed = {name: sources[name] for name in names if not Path(recipe.data[name].path).is_file()}
    known = {"guessed": guessed, "compiled": _COMPILED, "one_tower": _one_tower(*models.values())}
    stages = []
    for stage in recipe.stages:
        teacher = models.get("teacher") if stage.losses.distils else None
        weights = [round(weight * sources[name].rows) for name, weight in stage.sources.items()]
        columns = list(zip(*(sources[name] for name in stage.sources), strict=True))
        means = np.average(columns[1:4], axis=1, weights=weights).tolist()
        tokens = Tokens(sum(weights), *means, *map(max, columns[4:]))
        stages.append(StageCost(recipe, stage, models["student"], teacher, tokens, gpus).plan(gpu, efficiency))
    answer: dict[str, Any] = {"name": recipe.name, "gpu": gpu, "gpus": gpus, "efficiency": efficiency}
    answer |= {"parameters": {name: _sizes(model) for name, model in models.items()}, "stages": stages}
    return answer | {"assumptions": render("plan_assumed.jinja", recipe=recipe, **known).splitlines()}


@dataclass(frozen=True, eq=False)
class StageCost:
    """One stage; `student` and `teacher` (None where nothing is distilled) are models on the meta device."""

    recipe: Recipe
    stage: StageConfig
    student: VisionLanguageModel
    teacher: VisionLanguageModel | None
    tokens: Tokens
    gpus: int

    def plan(self, gpu: str, efficiency: float) -> dict[str, Any]:
        """Everything about the stage on GPUs of a kind of GPUS."""
        recipe, stage, tokens, (rate, gib) = self.recipe, self.stage, self.tokens, GPUS[gpu]
        self.student.train_only(stage.learns)
        micro, most = micro_batch_size(stage, processes=self.gpus), stage.max_tokens_per_batch
        size = min(most, micro * tokens.longest) if most else micro
        rows = self._held(size)[0]
        steps = total_steps(tokens.rows, stage)
        seen = steps * stage.global_batch_size
        flops = {part: seen * value for part, value in self.row_flops(size).items()}
        if recipe.cache_features:  # each picture once, for the first stage that reads its folder
            folders = [{recipe.data[name].images for name in other.sources} for other in recipe.stages]
            place = recipe.stages.index(stage)
            flops["vision_tower"] *= (folders.index(folders[place]) == place) * tokens.rows / seen
        now = (size, recipe.compile, recipe.gradient_checkpointing, getattr(recipe.teacher, "dtype", "bfloat16"))
        trainable = sum(p.numel() for p in self.student.model.parameters() if p.requires_grad)
        accumulation = math.ceil(stage.global_batch_size / (rows * self.gpus))
        hours = sum(flops.values()) / (self.gpus * rate * 1e12 * efficiency) / 3600
        told = {"name": stage.name, "trainable": trainable, "tokens": tokens._asdict(), "steps": steps}
        told |= {"micro_batch_size": round(rows), "accumulation": accumulation, "flops": flops, "hours": hours}
        return told | {"memory": self.memory(*now), "advice": self._advice(now, gib * 2**30 * _USABLE)}

    def _held(self, size: int) -> tuple[float, int, int, int]:
        """Of a micro-batch of so many of the longest rows, or a pack of so many tokens: rows, lines, length, pictures."""
        tokens = self.tokens
        if not self.stage.max_tokens_per_batch:
            return size, size, tokens.longest, size * tokens.most_pictures
        rows = min(size / (tokens.visual + tokens.text), self.stage.global_batch_size / self.gpus)
        return rows, 1, size, math.ceil(rows * tokens.visual / self.student.tokens_per_image)

    def row_flops(self, size: int) -> dict[str, float]:
        """FLOPs of one mean row by part; a multiplication and its addition are two, attention is counted unmasked."""
        losses, again, tokens = self.stage.losses, self.recipe.gradient_checkpointing, self.tokens
        tower_learns, projector_learns, text_learns = (part in self.stage.learns for part in self.student.parts())
        count, pictures = self.student.tokens_per_image, tokens.visual / self.student.tokens_per_image
        rows, lines, *_ = self._held(size)
        row = tokens.visual, tokens.text, rows / lines * (tokens.visual + tokens.text)
        tower, linear, attention, projector = _forward_flops(self.student, *row)
        # A frozen layer passes the gradient on: one product; a learning one makes its own, too. Attention: five for two.
        backward = linear * (1 + text_learns) + attention * 2.5 + 2 * projector * projector_learns
        # A layer is made again up to its last matrix, which is not needed.
        config = self.student.model.config.text_config
        last = 2 * config.hidden_size * config.intermediate_size * config.num_hidden_layers
        backward += again * (linear + attention - last * (tokens.visual + tokens.text))
        vocabulary = min(len(model.head) for model in (self.student, self.teacher) if model)
        ds, live = self.student.head.shape[1], self._live(tokens.visual, tokens.response)
        flops = {
            "vision_tower": tower,
            "student_forward": linear + attention + projector,
            "student_backward": backward + tower * (2 + again) * tower_learns,
            "heads": 2 * live * vocabulary * ds * (2 + text_learns),
        }
        if self.teacher:
            dt, (theirs, *others) = self.teacher.head.shape[1], _forward_flops(self.teacher, *row)
            flops["teacher"] = sum(others) + theirs * (tower_learns or not _one_tower(self.student, self.teacher))
            flops["heads"] += 2 * live * vocabulary * dt
            squares = 4 * vocabulary * ds * ds * text_learns / rows  # a frozen head's is made once
            grams = 2 * count * (ds * ds * (2 + text_learns) + dt * dt) + 2 * count**2 * (3 * ds + dt)
            flops["relation"] = (squares + pictures * grams) * bool(losses.relation and pictures)
        return flops

    def memory(self, size: int, compiled: bool, checkpointing: bool, teacher_dtype: str) -> dict[str, float]:
        """Bytes on one GPU by part, with a micro-batch (see `_held`), and `peak`; of two equal towers the teacher's is held."""
        model, head, tokens, train = self.student.model, self.student.head, self.tokens, self.stage.learns
        vocabulary = min(len(model.head) for model in (self.student, self.teacher) if model)
        learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
        gradients = sum(parameter.nbytes for parameter in learning)
        bf16 = self.recipe.precision == "bf16"
        rows, lines, length, pictures = self._held(size)
        visual = pictures * self.student.tokens_per_image
        live = self._live(visual, (lines * length - visual) * tokens.response / tokens.text)
        # Logits of a chunk, gradients kept of some, the head in two bytes, its gradient, and the gradient to the rows.
        narrow, width = 2 if bf16 else 4, head.shape[1]
        at_once = rows_at_once(vocabulary, narrow, "cuda")
        loss = 4 * vocabulary * min(live, at_once) * (2 if self.teacher else 1)
        loss += narrow * vocabulary * min(live, GRADIENT_CHUNKS * at_once) + 2 * vocabulary * width * bf16
        loss += head.nbytes * head.requires_grad + 8 * live * width
        # Two bytes per weight: the copies that autocast holds until the loss is made; without checkpointing they are kept.
        loss += (checkpointing and bf16) * sum(_linear_flops(self.student.parts()[part]) for part in train)
        kept = functools.partial(self._kept, size, checkpointing)
        decoder, seen = model.config.text_config.num_hidden_layers, model.config.vision_feature_layer
        tower = range(model.config.vision_config.num_hidden_layers + 1)[seen]  # later layers keep nothing
        share = _COMPILED["language_model" in train] if compiled and not checkpointing else 1
        activations = kept(1, 1) + (share * decoder - 1) * (kept(2, 1) - kept(1, 1))
        activations += (tower - 1) * (kept(1, 2) - kept(1, 1))
        layer = self._kept(size, False, 2, 1) - self._kept(size, False, 1, 1) if checkpointing else 0
        taught = self.teacher.model.parameters() if self.teacher else ()
        sole = bf16 and teacher_dtype == "bfloat16" and _one_tower(self.student, self.teacher)  # see park_tower
        parked = {*self.student.parts()["vision_tower"].parameters()} if sole and "vision_tower" not in train else set()
        standing = {
            "weights": sum(one.nbytes for one in (*model.parameters(), *model.buffers()) if one not in parked),
            "teacher": sum(p.numel() * min(p.itemsize, getattr(torch, teacher_dtype).itemsize) for p in taught),
            "optimizer": 2 * gradients + 4 * len(learning),
        }
        passing = activations + max(loss, layer)
        # Without accumulation gradients come while activations go, all but the layer that is made again.
        accumulates = self.stage.global_batch_size > rows * self.gpus
        moving = gradients + passing if accumulates else max(gradients + layer, passing)
        moving += gradients * (self.gpus > 1)  # DDP's buckets
        parts = {"gradients": gradients, "activations": activations, "recomputed layer": layer, "loss": loss}
        return standing | parts | {"peak": sum(standing.values()) + moving}

    def _advice(self, now: tuple[int, bool, bool, str], usable: float) -> str:
        """The settings with which the stage fits, written as overrides; empty where it fits as it is."""
        kind, smaller = "micro_batch_size", [rows for rows in range(now[0], 0, -1) if now[0] % rows == 0]
        if self.stage.max_tokens_per_batch:
            least = max(self.recipe.data[name].max_length for name in self.stage.sources)
            kind, smaller = "max_tokens_per_batch", [now[0] // packs for packs in range(1, max(2, now[0] // least + 1))]
        other: Any = [now[3], "bfloat16"], [now[2], True], [now[1], self.recipe.sharding != "zero3"]  # refused
        for new in itertools.product(*map(dict.fromkeys, other), smaller):
            if self.memory(*new[::-1])["peak"] <= usable:
                keys = (f"stages.{self.stage.name}.{kind}", "compile", "gradient_checkpointing", "teacher.dtype")
                pairs = zip(keys, new[::-1], now, strict=True)
                return " ".join(f"{key}={value}".lower() for key, value, old in pairs if value != old)
        return "a GPU with more memory: no setting of the recipe is enough"

    def _live(self, visual: float, response: float) -> float:
        """Positions, of so many, that reach the heads."""
        losses = self.stage.losses
        return response * bool(losses.ce or losses.response_kl) + visual * bool(losses.visual_kl)

    @functools.cache  # noqa: B019 - lives as long as the plan is made
    def _kept(self, size: int, checkpointing: bool, text_layers: int, vision_layers: int) -> int:
        """Bytes that autograd keeps of the real forward over a micro-batch, of a student cut to so many layers."""
        thin, train = copy.deepcopy(self.student.model.config), self.stage.learns
        thin.text_config.num_hidden_layers, thin.vision_config.num_hidden_layers = text_layers, vision_layers
        thin.vision_feature_layer = -1
        student, vision, saved = outline(thin), thin.vision_config, list[ref[Tensor]]()
        student.train_only(train)
        model = student.model.train()

        def note(tensor: Tensor) -> Tensor:
            saved.append(ref(held := tensor.detach()))  # itself, an output would keep its own graph alive
            return held

        with FakeTensorMode():
            model._apply(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype)).tie_weights()
            if checkpointing:  # named so from transformers 5.23
                getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
            (_, lines, length, pictures), bf16 = self._held(size), self.recipe.precision == "bf16"
            visual = torch.empty(lines, length, dtype=torch.bool)
            ids = visual.long()
            features = torch.empty(pictures, student.features_per_image, vision.hidden_size) if pictures else None
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16), saved_tensors_hooks(note, lambda tensor: tensor):
                if pictures and "vision_tower" in train:
                    features = vision_features(model, torch.empty(pictures, 3, vision.image_size, vision.image_size))
                hidden = final_hidden(model, ids, ids, visual, features)  # noqa: F841 - its graph
        own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        kept = [tensor.untyped_storage() for one in saved if (tensor := one()) is not None]  # none of unused layers
        return sum({storage._cdata: storage.nbytes() for storage in kept if storage._cdata not in own}.values())


def _sizes(model: VisionLanguageModel) -> dict[str, int]:
    """Parameters by part, an untied head with its language model."""
    sizes = {name: sum(p.numel() for p in part.parameters()) for name, part in model.parts().items()}
    return sizes | {"language_model": model.model.num_parameters() - sizes["vision_tower"] - sizes["projector"]}


def _tokens(recipe: Recipe, name: str, picture: int, rows: int | None = None, text_tokens: int | None = None) -> Tokens:
    """Counts of a source from a sample of its rows, or assumed where its file is not there; `picture`: tokens of one."""
    data = recipe.data[name]
    if Path(data.path).is_file():
        samples = load_samples(data)
        chosen = samples[:: max(1, len(samples) // 512)]
        tokenizer = load(AutoTokenizer, recipe.student.language_model, key="student.language_model")
        mark = tokenizer.get_vocab().get(IMAGE_TAG, len(tokenizer))
        lengths = {"tokens_per_image": picture, "max_length": data.max_length}
        rendered = [*map(ChatRenderer(data.template, tokenizer, image_token_id=mark, **lengths).render, chosen)]
        segments = np.bincount(np.concatenate([row.segments for row in rendered]), minlength=len(Segment))
        _, visual, prompt, response = (segments / len(rendered)).tolist()
        most = max(len(row.ids) for row in rendered), max(len(sample.images) for sample in chosen)
        return Tokens(len(samples), visual, prompt + response, response, *most)
    known = _KNOWN["published"].get(Path(data.path).name, (None, 200))
    rows, text = rows or known[0], text_tokens or known[1]
    if rows is None:
        raise UserError(f"data.{name}.path: there is no file {data.path!r}; give --rows N to plan without it")
    response = text if data.template == "pretrain" else text / 2
    return Tokens(rows, picture, text, response, min(data.max_length, picture + 8 * text))


def _one_tower(*models: VisionLanguageModel | None) -> bool:
    """Whether there are two models, whose towers are of equal size and so taken to be equal."""
    towers = [_forward_flops(model, model.tokens_per_image, 0, 0)[0] for model in models if model]
    return towers[1:] == towers[:1]


def _linear_flops(module: nn.Module) -> int:
    """Of one position."""
    return 2 * sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear | nn.Conv2d | QuantizedLinear))


def _forward_flops(model: VisionLanguageModel, visual: float, text: float, seen: float) -> tuple[float, ...]:
    """Of a row of so many tokens, each beside `seen`: the tower, the decoder's matrices, its attention, the projector."""
    config, length, pictures = model.model.config, visual + text, visual / model.tokens_per_image

    def attention(config: Any, length: float, seen: float) -> float:
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return 4 * length * seen * width * config.num_attention_heads * config.num_hidden_layers

    patches = model.features_per_image + (config.vision_feature_select_strategy == "default")
    tower, projector, decoder = (_linear_flops(part) for part in model.parts().values())
    tower = patches * tower + attention(config.vision_config, patches, patches)
    return pictures * tower, length * decoder, attention(config.text_config, length, seen), visual * projector
