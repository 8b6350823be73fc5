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
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPImageProcessorPil,
    LlavaConfig,
    LlavaForConditionalGeneration,
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
}


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


def build_student(config: StudentConfig, *, seed: int) -> VisionLanguageModel:
    """Assemble a float32 student with a fresh projector from folders (or hub names).

    Raises:
        ModelError: a part that cannot be loaded, or whose kind does not fit.
    """
    torch.manual_seed(seed)
    vision_tower = _load_vision_tower(config.vision_tower, scratch="vision_tower" in config.from_scratch)
    language_model = _load_language_model(config.language_model, scratch="language_model" in config.from_scratch)
    tokenizer = _load(AutoTokenizer, config.language_model)
    image_token_id = _ensure_image_token(tokenizer, language_model)
    llava = LlavaConfig(
        vision_config=vision_tower.config,
        text_config=language_model.config,
        image_token_index=image_token_id,
        projector_hidden_act="gelu",
        vision_feature_layer=config.vision_feature_layer,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        image_seq_length=_tokens_per_image(vision_tower.config, config.vision_feature_select_strategy),
        tie_word_embeddings=language_model.config.tie_word_embeddings,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(llava)
    model.model.vision_tower = vision_tower
    model.model.multi_modal_projector = LlavaMultiModalProjector(llava)
    model.model.language_model = language_model.get_decoder()
    model.lm_head = language_model.get_output_embeddings()
    model.tie_weights()
    left = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    assert not left, f"parts left without weights: {left[:3]}"
    return VisionLanguageModel(
        model=model, tokenizer=tokenizer, image_processor=load_image_processor(config.vision_tower)
    )


def load_student(folder: str, *, dtype: torch.dtype = torch.float32) -> VisionLanguageModel:
    """Load a whole LLaVA folder written by this project or by transformers; raises ModelError."""
    if _load(AutoConfig, folder).model_type != "llava":
        raise ModelError(
            f"{folder} holds a {_load(AutoConfig, folder).model_type!r} model, expected 'llava'; "
            "give a folder that LlavaForConditionalGeneration wrote"
        )
    model = _load(LlavaForConditionalGeneration, folder, dtype=dtype)
    return VisionLanguageModel(
        model=model, tokenizer=_load(AutoTokenizer, folder), image_processor=load_image_processor(folder)
    )


def save_model(student: VisionLanguageModel, folder: Path, *, template: str | None) -> None:
    """Write a folder that stock LlavaForConditionalGeneration and AutoProcessor load; `template` sets the chat form."""
    config = student.model.config
    config.architectures = ["LlavaForConditionalGeneration"]
    for part in (config.vision_config, config.text_config):
        part._name_or_path = ""  # where the part lay on this machine is nobody's business
    generation = student.model.generation_config
    generation.pad_token_id = student.tokenizer.pad_token_id
    generation.eos_token_id = end_token_id(template, student.tokenizer) if template else student.tokenizer.eos_token_id
    student.model.save_pretrained(folder)
    LlavaProcessor(
        image_processor=student.image_processor,
        tokenizer=student.tokenizer,
        patch_size=config.vision_config.patch_size,
        num_additional_image_tokens=0,
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

            found = cached_file(folder, name, _raise_exceptions_for_missing_entries=False)
            file = Path(found) if found else file
        if file.is_file():
            settings = json.loads(file.read_text(encoding="utf-8"))
            if "image_processor" in settings or "image_processor_type" in settings:
                return settings.get("image_processor", settings)
    raise ModelError(f"{folder} has no preprocessor_config.json; copy the vision tower's own into it")


def _load(kind: Any, source: str, **options: Any) -> Any:
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


def _load_vision_tower(source: str, *, scratch: bool) -> nn.Module:
    config = _load(AutoConfig, source)
    if config.model_type == "llava" and not scratch:
        return _load(LlavaForConditionalGeneration, source, dtype=torch.float32).model.vision_tower
    config = getattr(config, "vision_config", config)
    if hasattr(config, "vision_use_head"):
        config.vision_use_head = False  # the pooling head never reaches the features
    if scratch:
        return AutoModel.from_config(config, dtype=torch.float32)
    return _load(AutoModel, source, config=config, dtype=torch.float32)


def _load_language_model(source: str, *, scratch: bool) -> Any:
    config = _load(AutoConfig, source)
    if scratch:
        return AutoModelForCausalLM.from_config(getattr(config, "text_config", config), dtype=torch.float32)
    if config.model_type != "llava":
        return _load(AutoModelForCausalLM, source, dtype=torch.float32)
    return extract_language_model(_load(LlavaForConditionalGeneration, source, dtype=torch.float32))


def extract_language_model(model: LlavaForConditionalGeneration) -> Any:
    """The causal language model inside a LLaVA model, sharing its weights."""
    with torch.device("meta"):
        causal = AutoModelForCausalLM.from_config(model.config.text_config)
    setattr(causal, causal.base_model_prefix, model.model.language_model)
    causal.set_output_embeddings(model.lm_head)
    causal.tie_weights()
    return causal


def _ensure_image_token(tokenizer: PreTrainedTokenizerBase, language_model: Any) -> int:
    """The id of `<image>`, in a free row of the embedding where there is one: resizing would change V."""
    if IMAGE_TAG not in tokenizer.get_vocab():
        tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TAG]}, replace_extra_special_tokens=False)
    if len(tokenizer) > language_model.get_input_embeddings().num_embeddings:
        language_model.resize_token_embeddings(len(tokenizer))
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer.convert_tokens_to_ids(IMAGE_TAG)


def _tokens_per_image(vision: Any, strategy: str) -> int:
    has_class_token = vision.model_type.startswith("clip") or vision.model_type.startswith("dinov2")
    return (vision.image_size // vision.patch_size) ** 2 + has_class_token - (strategy == "default")
