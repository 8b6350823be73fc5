"""Vision tower + projector + language model -> one transformers LLaVA model, and its forward in two halves.

The halves, `vision_features` and `final_hidden`, exist so that one frozen tower can serve student and teacher.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
    AyaVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerBase,
)

from llavakd.config import Part, StudentConfig
from llavakd.data.chat import TEMPLATES, end_token_id
from llavakd.data.samples import IMAGE_TAG
from llavakd.models.parts import (
    FAMILIES,
    PROJECTORS,
    ModelError,
    check_language_model,
    count_image_tokens,
    ensure_image_token,
    leading_tokens,
    load,
    load_for,
    load_image_processor,
    load_language_model,
    load_vision_tower,
    pooled_tokens,
    tokens_per_image,
    tower_config,
)


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
    def features_per_image(self) -> int:
        """Tower features of one picture, before a projector joins any."""
        return self.tokens_per_image * getattr(self.model.config, "downsample_factor", 1) ** 2

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
        if getattr(self.model.config, "projector_hidden_act", None) == PROJECTORS["linear"]:
            self.parts()["projector"].linear_2.requires_grad_(False)


def build_student(config: StudentConfig, *, seed: int) -> VisionLanguageModel:
    """Assemble a float32 student with a fresh projector from folders (or hub names).

    Raises:
        ModelError: a part that cannot be loaded, or whose kind does not fit.
    """
    torch.manual_seed(seed)
    vision_tower = load_vision_tower(config.vision_tower, scratch="vision_tower" in config.from_scratch)
    language_model = load_language_model(config.language_model, scratch="language_model" in config.from_scratch)
    check_language_model(language_model, config.language_model)
    tokenizer = load(AutoTokenizer, config.language_model)
    image_processor = load_image_processor(config.vision_tower, mode=config.image_mode)
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
    model = outline(llava).model
    model.model.vision_tower = vision_tower
    model.model.multi_modal_projector = projector = type(model.model.multi_modal_projector)(llava)
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
) -> LlavaConfig | AyaVisionConfig:
    """The student's configuration; a part that is not given is read from its config.json, weights are not needed."""
    vision = vision or load_for("student.vision_tower", AutoConfig, config.vision_tower)
    text = text or load_for("student.language_model", AutoConfig, config.language_model)
    vision, text = tower_config(vision, config.vision_tower), getattr(text, "text_config", text)
    strategy = config.vision_feature_select_strategy
    count = tokens_per_image(vision, strategy)
    if image_processor:
        count = count_image_tokens(vision, strategy, image_processor)
    shared = token_ids | {
        "vision_config": vision,
        "text_config": text,
        "vision_feature_layer": config.vision_feature_layer,
        "vision_feature_select_strategy": strategy,
        "tie_word_embeddings": text.tie_word_embeddings,
    }
    if config.projector == "pixel_shuffle":
        return AyaVisionConfig(**shared, image_seq_length=pooled_tokens(count))
    return LlavaConfig(**shared, projector_hidden_act=PROJECTORS[config.projector], image_seq_length=count)


def outline(config: Any, tokenizer: Any = None, image_processor: Any = None) -> VisionLanguageModel:
    """A model on the meta device: all but the weights, float32."""
    with torch.device("meta"):
        model = FAMILIES[config.model_type](config).float()  # parts take the dtype that their config names
    return VisionLanguageModel(model=model, tokenizer=tokenizer, image_processor=image_processor)


def outline_student(config: StudentConfig) -> VisionLanguageModel:
    """What `build_student` would build, without weights; raises ModelError."""
    tokenizer = load_for("student.language_model", AutoTokenizer, config.language_model)
    image_processor = load_image_processor(config.vision_tower, mode=config.image_mode)
    student = outline(student_config(config, image_processor=image_processor), tokenizer, image_processor)
    student.model.config.image_token_id = ensure_image_token(tokenizer, student.model)
    return student


def load_student(folder: str, *, dtype: torch.dtype | str = torch.float32) -> VisionLanguageModel:
    """Load a whole LLaVA folder written by this project or by transformers; raises ModelError."""
    whole = outline_folder(folder)
    model = load(type(whole.model), folder, dtype=dtype)
    return VisionLanguageModel(model=model, tokenizer=whole.tokenizer, image_processor=whole.image_processor)


def outline_folder(folder: str) -> VisionLanguageModel:
    """What `load_student` would load, without weights; raises ModelError."""
    config = load(AutoConfig, folder)
    if config.model_type not in FAMILIES or not hasattr(config, "image_seq_length"):
        raise ModelError(
            f"{folder} holds a {config.model_type!r} model, expected one of {', '.join(FAMILIES)}; "
            "give a folder that LlavaForConditionalGeneration wrote"
        )
    return outline(config, load(AutoTokenizer, folder), load_image_processor(folder))


def save_model(student: VisionLanguageModel, folder: Path, *, template: str | None) -> None:
    """Write a folder that stock LlavaForConditionalGeneration and AutoProcessor load; `template` None keeps the chat form."""
    config = student.model.config
    config.architectures = [type(student.model).__name__]
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
        patch_size=config.vision_config.patch_size * getattr(config, "downsample_factor", 1),
        num_additional_image_tokens=leading_tokens(config.vision_config),
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
