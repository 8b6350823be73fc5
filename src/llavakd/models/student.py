"""Vision tower + projector + language model -> one transformers LLaVA model, and its forward in two halves.

The halves, `vision_features` and `final_hidden`, exist so that one frozen tower can serve student and teacher.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitImageProcessorPil,
    CLIPImageProcessorPil,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaImageProcessorPil,
    LlavaProcessor,
    PreTrainedTokenizerBase,
    SiglipImageProcessorPil,
)
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from llavakd.config import Part, StudentConfig
from llavakd.data.chat import TEMPLATES, end_token_id
from llavakd.data.samples import IMAGE_TAG
from llavakd.errors import UserError

# PIL processors give the same pixels with and without torchvision; the automatic class does not.
IMAGE_PROCESSORS: dict[str, type] = {
    "SiglipImageProcessor": SiglipImageProcessorPil,
    "CLIPImageProcessor": CLIPImageProcessorPil,
    "BitImageProcessor": BitImageProcessorPil,
    "LlavaImageProcessor": LlavaImageProcessorPil,
}
# Towers that stock Llava runs on pixels alone, and their tokens in front of the patches (registers come on top).
TOWERS = {"siglip_vision_model": 0, "clip_vision_model": 1, "dinov2": 1, "dinov2_with_registers": 1}
# The activation of stock Llava's two-layer projector; `linear` keeps its second layer at the identity.
PROJECTORS = {"mlp2x_gelu": "gelu", "linear": "linear"}


class ModelError(UserError):
    """A model folder is missing, incomplete or of an unexpected kind; the message names it."""


@dataclass(frozen=True, kw_only=True)
class VisionLanguageModel:
    """A LLaVA model with what it takes to feed it."""

    model: LlavaForConditionalGeneration
    tokenizer: PreTrainedTokenizerBase
    image_processor: Any

    @property
    def image_token_id(self) -> int:
        """The id that marks a picture's positions."""
        return self.model.config.image_token_id

    @property
    def tokens_per_image(self) -> int:
        """Visual tokens of one picture."""
        return self.model.config.image_seq_length

    @property
    def head(self) -> Tensor:
        """The language-model head, [V, D]."""
        return self.model.lm_head.weight

    def parts(self) -> dict[Part, nn.Module]:
        """The three parts by name; a tied head belongs to the language model's embedding."""
        inner = self.model.model
        return {
            "vision_tower": inner.vision_tower,
            "projector": inner.multi_modal_projector,
            "language_model": inner.language_model,
        }

    def train_only(self, parts: Sequence[Part]) -> None:
        """Let exactly these parts learn; the head goes with the language model."""
        self.model.requires_grad_(False)
        for part in parts:
            self.parts()[part].requires_grad_(True)
        self.model.lm_head.requires_grad_("language_model" in parts)
        if self.model.config.projector_hidden_act == PROJECTORS["linear"]:
            self.parts()["projector"].linear_2.requires_grad_(False)


def build_student(config: StudentConfig, *, seed: int) -> VisionLanguageModel:
    """Assemble a float32 student with a fresh projector from folders (or hub names).

    Raises:
        ModelError: a part that cannot be loaded, or whose kind does not fit.
    """
    torch.manual_seed(seed)
    vision_tower = load_vision_tower(config.vision_tower, scratch="vision_tower" in config.from_scratch)
    language_model = _load_language_model(config.language_model, scratch="language_model" in config.from_scratch)
    check_language_model(language_model, config.language_model)
    tokenizer = load(AutoTokenizer, config.language_model)
    image_processor = load_image_processor(config.vision_tower)
    image_token_id = ensure_image_token(tokenizer, language_model)
    llava = student_config(
        config,
        vision_tower.config,
        language_model.config,
        image_processor,
        image_token_index=image_token_id,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(llava)
    model.model.vision_tower = vision_tower
    model.model.multi_modal_projector = projector = LlavaMultiModalProjector(llava)
    if config.projector == "linear":
        nn.init.eye_(projector.linear_2.weight)
        nn.init.zeros_(projector.linear_2.bias)
    model.model.language_model = language_model.get_decoder()
    model.lm_head = language_model.get_output_embeddings()
    model.tie_weights()
    left = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    assert not left, f"parts left without weights: {left[:3]}"
    return VisionLanguageModel(model=model, tokenizer=tokenizer, image_processor=image_processor)


def student_config(
    config: StudentConfig, vision: Any = None, text: Any = None, image_processor: Any = None, **token_ids: int
) -> LlavaConfig:
    """The student's configuration; a part that is not given is read from its config.json, weights are not needed."""
    vision = vision or load_for("student.vision_tower", AutoConfig, config.vision_tower)
    text = text or load_for("student.language_model", AutoConfig, config.language_model)
    vision, text = tower_config(vision, config.vision_tower), getattr(text, "text_config", text)
    strategy = config.vision_feature_select_strategy
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        projector_hidden_act=PROJECTORS[config.projector],
        vision_feature_layer=config.vision_feature_layer,
        vision_feature_select_strategy=strategy,
        image_seq_length=count_image_tokens(vision, strategy, image_processor)
        if image_processor
        else _tokens_per_image(vision, strategy),
        tie_word_embeddings=text.tie_word_embeddings,
        **token_ids,
    )


def load_for(key: str, kind: Any, source: str) -> Any:
    """`kind.from_pretrained(source)`; raises ModelError naming the recipe's key."""
    try:
        return load(kind, source)
    except ModelError as error:
        raise ModelError(f"{key}: {error}") from error


def load_student(folder: str, *, dtype: torch.dtype | str = torch.float32) -> VisionLanguageModel:
    """Load a whole LLaVA folder written by this project or by transformers; raises ModelError."""
    if load(AutoConfig, folder).model_type != "llava":
        raise ModelError(
            f"{folder} holds a {load(AutoConfig, folder).model_type!r} model, expected 'llava'; "
            "give a folder that LlavaForConditionalGeneration wrote"
        )
    model = load(LlavaForConditionalGeneration, folder, dtype=dtype)
    return VisionLanguageModel(
        model=model, tokenizer=load(AutoTokenizer, folder), image_processor=load_image_processor(folder)
    )


def save_model(student: VisionLanguageModel, folder: Path, *, template: str | None) -> None:
    """Write a folder that stock LlavaForConditionalGeneration and AutoProcessor load; `template` None keeps the chat form."""
    config = student.model.config
    config.architectures = ["LlavaForConditionalGeneration"]
    for part in (config.vision_config, config.text_config):
        part._name_or_path = ""  # where the part lay on this machine is nobody's business
    generation = student.model.generation_config
    generation.pad_token_id = student.tokenizer.pad_token_id
    if template:
        generation.eos_token_id = end_token_id(template, student.tokenizer)
    student.model.save_pretrained(folder)
    LlavaProcessor(
        image_processor=student.image_processor,
        tokenizer=student.tokenizer,
        patch_size=config.vision_config.patch_size,
        num_additional_image_tokens=_leading_tokens(config.vision_config),
        image_token=IMAGE_TAG,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        chat_template=TEMPLATES[template].jinja if template else None,
    ).save_pretrained(folder)


def vision_features(model: LlavaForConditionalGeneration, pixel_values: Tensor) -> Tensor:
    """Selected tower features: [P, 3, H, W] -> [P, N, D_v]."""
    hidden = model.model.vision_tower(pixel_values, output_hidden_states=True).hidden_states
    selected = hidden[model.config.vision_feature_layer]
    return selected[:, 1:] if model.config.vision_feature_select_strategy == "default" else selected


def final_hidden(
    model: LlavaForConditionalGeneration,
    input_ids: Tensor,
    attention_mask: Tensor,
    visual: Tensor,
    features: Tensor | None,
) -> Tensor:
    """Final hidden states [B, T, D], after the last norm: what `lm_head` turns into logits.

    Args:
        model: the LLaVA model.
        input_ids: int64 [B, T].
        attention_mask: int64 [B, T].
        visual: bool [B, T], True at the P * N picture positions, pictures in row-major order.
        features: [P, N, D_v] from `vision_features`, or None without pictures.
    """
    # The id at a picture position is only a mark; it may lie outside this model's vocabulary.
    embedded = model.get_input_embeddings()(input_ids.masked_fill(visual, 0))
    if features is not None:
        projected = model.model.multi_modal_projector(features).to(embedded.dtype)
        embedded = embedded.masked_scatter(visual.unsqueeze(-1), projected)
    return model.model(inputs_embeds=embedded, attention_mask=attention_mask, use_cache=False).last_hidden_state


def load_image_processor(folder: str) -> Any:
    """The tower's own processor in its PIL form; raises ModelError."""
    settings = _processor_settings(folder)
    kind = str(settings.get("image_processor_type", "")).removesuffix("Fast").removesuffix("Pil")
    if kind not in IMAGE_PROCESSORS:
        raise ModelError(f"{folder}: image processor {kind!r} is not known; known: {', '.join(IMAGE_PROCESSORS)}")
    return IMAGE_PROCESSORS[kind](**{key: value for key, value in settings.items() if key != "image_processor_type"})


def _processor_settings(folder: str) -> dict[str, Any]:
    for name in ("processor_config.json", "preprocessor_config.json"):
        file = Path(folder) / name
        if not Path(folder).is_dir():
            from transformers.utils.hub import cached_file

            found = cached_file(
                folder, name, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False
            )
            file = Path(found) if found else file
        if file.is_file():
            settings = json.loads(file.read_text(encoding="utf-8"))
            if "image_processor" in settings or "image_processor_type" in settings:
                return settings.get("image_processor", settings)
    raise ModelError(f"{folder} has no preprocessor_config.json; copy the vision tower's own into it")


def load(kind: Any, source: str, **options: Any) -> Any:
    """`kind.from_pretrained`, its failures as ModelError."""
    # A hub name is "owner/name"; asking a hub for anything else would only wait for its answer.
    if not Path(source).is_dir() and (source.startswith((".", "/", "~")) or source.count("/") > 1):
        raise ModelError(f"there is no folder {source!r}; give a local folder or a hub name")
    try:
        return kind.from_pretrained(source, **options)
    except (OSError, ValueError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(
            f"cannot load {source!r} as {kind.__name__}: {reason}; give a local folder or a hub name"
        ) from error


def load_vision_tower(source: str, *, scratch: bool) -> nn.Module:
    """A float32 tower, alone or out of a whole model; raises ModelError."""
    config = load(AutoConfig, source)
    if config.model_type == "llava" and not scratch:
        return load(LlavaForConditionalGeneration, source, dtype=torch.float32).model.vision_tower
    config = tower_config(config, source)
    if scratch:
        return AutoModel.from_config(config, dtype=torch.float32)
    return load(AutoModel, source, config=config, dtype=torch.float32)


def _load_language_model(source: str, *, scratch: bool) -> Any:
    config = load(AutoConfig, source)
    if scratch:
        return AutoModelForCausalLM.from_config(getattr(config, "text_config", config), dtype=torch.float32)
    if config.model_type != "llava":
        return load(AutoModelForCausalLM, source, dtype=torch.float32)
    return extract_language_model(load(LlavaForConditionalGeneration, source, dtype=torch.float32))


def extract_language_model(model: LlavaForConditionalGeneration) -> Any:
    """The causal language model inside a LLaVA model, sharing its weights."""
    with torch.device("meta"):
        causal = AutoModelForCausalLM.from_config(model.config.text_config)
    setattr(causal, causal.base_model_prefix, model.model.language_model)
    causal.set_output_embeddings(model.lm_head)
    causal.tie_weights()
    return causal


def tower_config(config: Any, source: str) -> Any:
    """The tower's own config out of a whole model's; raises ModelError for one that needs more than pixels."""
    config = getattr(config, "vision_config", config)
    if config.model_type not in TOWERS:
        raise ModelError(f"{source}: vision tower {config.model_type!r} is not known; known: {', '.join(TOWERS)}")
    if hasattr(config, "vision_use_head"):
        config.vision_use_head = False  # the pooling head never reaches the features
    return config


def check_language_model(language_model: Any, source: str) -> None:
    """Refuse what stock Llava cannot hold: it has a decoder with `embed_tokens` and a head that is one matrix."""
    reason = ""
    if hasattr(language_model.config, "text_config"):
        reason = "it is more than a causal language model"
    elif not hasattr(language_model.base_model, "embed_tokens"):
        reason = "its embedding is not called embed_tokens"
    elif language_model.get_output_embeddings().bias is not None:
        reason = "its head has a bias"
    else:
        with torch.no_grad():
            output = language_model(torch.arange(4).unsqueeze(0), output_hidden_states=True)
            bare = language_model.get_output_embeddings()(output.hidden_states[-1])
        if not torch.equal(bare, output.logits):
            reason = "it scales, caps or otherwise changes the logits after its head"
    if reason:
        raise ModelError(
            f"{source}: stock Llava cannot hold a {language_model.config.model_type!r} language model like this: "
            f"{reason}; choose another, for example Qwen, Llama, Gemma, Gemma 3 or Phi-3"
        )


def ensure_image_token(tokenizer: PreTrainedTokenizerBase, model: Any) -> int:
    """The id of `<image>`, in a free row of the embedding where there is one: resizing would change V."""
    if IMAGE_TAG not in tokenizer.get_vocab():
        tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TAG]}, replace_extra_special_tokens=False)
    rows = max(tokenizer.get_vocab().values()) + 1  # not len(tokenizer): a vocabulary may have holes
    if rows > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(rows)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer.convert_tokens_to_ids(IMAGE_TAG)


def count_image_tokens(vision: Any, strategy: str, image_processor: Any) -> int:
    """Visual tokens of one picture as this processor makes it; raises ModelError where the tower cannot take it."""
    height, width = image_processor(images=[Image.new("RGB", (60, 40))], return_tensors="pt").pixel_values.shape[-2:]
    fits = height == width and (vision.model_type.startswith("dinov2") or height == vision.image_size)
    if not fits:  # DINOv2 interpolates its positions, the others do not
        raise ModelError(
            f"the image processor makes pictures of {height} x {width} pixels, the vision tower "
            f"{vision.model_type!r} takes {vision.image_size} x {vision.image_size}; use the tower's own preprocessor_config.json"
        )
    return _tokens_per_image(vision, strategy, height)


def _tokens_per_image(vision: Any, strategy: str, side: int | None = None) -> int:
    return ((side or vision.image_size) // vision.patch_size) ** 2 + _leading_tokens(vision) - (strategy == "default")


def _leading_tokens(vision: Any) -> int:
    return TOWERS[vision.model_type] + getattr(vision, "num_register_tokens", 0)
