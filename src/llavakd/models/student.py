"""Vision tower + projector + language model -> a transformers LLaVA; its forward in halves, so that one tower serves two."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, LlavaForConditionalGeneration, PreTrainedTokenizerBase

from llavakd.config import DataConfig, Part, StudentConfig, TeacherConfig
from llavakd.data.chat import TEMPLATES, ChatRenderer, end_token_id
from llavakd.data.samples import IMAGE_TAG
from llavakd.errors import optional
from llavakd.models import parts
from llavakd.models.parts import FAMILIES, PROJECTORS, ModelError
from llavakd.transfer import sent


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
        tower, projector, decoder = inner.vision_tower, inner.multi_modal_projector, inner.language_model
        return {"vision_tower": tower, "projector": projector, "language_model": decoder}

    def renderer(self, data: DataConfig) -> ChatRenderer:
        """What makes rows of a data source into this model's ids."""
        sizes = {"tokens_per_image": self.tokens_per_image, "max_length": data.max_length}
        return ChatRenderer(data.template, self.tokenizer, image_token_id=self.image_token_id, **sizes)

    def train_only(self, chosen: Sequence[Part]) -> None:
        """Let exactly these parts learn; the head goes with the language model."""
        for name, part in self.parts().items():
            part.requires_grad_(name in chosen)
        self.model.lm_head.requires_grad_("language_model" in chosen)
        if getattr(self.model.config, "projector_hidden_act", None) == PROJECTORS["linear"]:
            self.parts()["projector"].linear_2.requires_grad_(False)


def add_updates(student: VisionLanguageModel, rank: int, *, seed: int) -> Any:
    """Let W + 2 B A (LoRA), B zero, stand for each matrix of the decoder's layers until `merge_and_unload` is called."""
    peft = optional("peft", "lora_rank", "lora")
    torch.manual_seed(seed)
    settings = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    return peft.LoraModel(student.parts()["language_model"], settings, "default")


def build_student(config: StudentConfig, *, seed: int) -> VisionLanguageModel:
    """A float32 student with a fresh projector, from folders or hub names; ModelError: a part is missing or unfit."""
    torch.manual_seed(seed)
    vision_tower = parts.load_vision_tower(config.vision_tower, scratch="vision_tower" in config.from_scratch)
    language_model = parts.load_language_model(config.language_model, scratch="language_model" in config.from_scratch)
    parts.check_language_model(language_model, config.language_model)
    student = outline_student(config)
    whole, settings = student.model, student.model.config
    language_model.resize_token_embeddings(settings.text_config.vocab_size)
    settings.vision_config, settings.text_config = vision_tower.config, language_model.config
    whole.model.vision_tower = vision_tower
    whole.model.multi_modal_projector = projector = type(whole.model.multi_modal_projector)(settings)
    if config.projector == "linear":
        nn.init.eye_(projector.linear_2.weight)
        nn.init.zeros_(projector.linear_2.bias)
    whole.model.language_model = language_model.get_decoder()
    whole.lm_head = language_model.get_output_embeddings()
    whole.tie_weights()
    left = [name for name, parameter in whole.named_parameters() if parameter.is_meta]
    assert not left, f"parts left without weights: {left[:3]}"
    return student


def outline_student(config: StudentConfig) -> VisionLanguageModel:
    """What `build_student` would build, without weights; raises ModelError."""
    tokenizer = parts.load(AutoTokenizer, config.language_model, key="student.language_model")
    image_processor = parts.load_image_processor(config.vision_tower, mode=config.image_mode)
    whole = student_config(config, image_processor)
    parts.add_image_token(tokenizer, whole)
    return outline(whole, tokenizer, image_processor)


def student_config(config: StudentConfig, image_processor: Any = None, *, vision: Any = None, text: Any = None) -> Any:
    """The student's, of parts given or loaded, for pictures as this processor or the tower makes them; raises ModelError."""
    vision = vision or parts.load(AutoConfig, config.vision_tower, key="student.vision_tower")
    text = text or parts.load(AutoConfig, config.language_model, key="student.language_model")
    vision, text = parts.tower_config(vision, config.vision_tower), getattr(text, "text_config", text)
    count = parts.count_image_tokens(vision, config.vision_feature_select_strategy, image_processor)
    settings = {"vision_config": vision, "text_config": text, "tie_word_embeddings": text.tie_word_embeddings}
    settings |= {key: getattr(config, key) for key in ("vision_feature_layer", "vision_feature_select_strategy")}
    if config.projector == "pixel_shuffle":
        return transformers.AyaVisionConfig(**settings, image_seq_length=parts.pooled_tokens(count))
    activation = PROJECTORS[config.projector]
    return transformers.LlavaConfig(**settings, projector_hidden_act=activation, image_seq_length=count)


def outline(config: Any, tokenizer: Any = None, image_processor: Any = None) -> VisionLanguageModel:
    """A model on the meta device: all but the weights, float32; raises ModelError for a kind that is not of FAMILIES."""
    if config.model_type not in FAMILIES or not hasattr(config, "image_seq_length"):
        told = f"{config.name_or_path} holds a {config.model_type!r} model, expected one of {', '.join(FAMILIES)}"
        raise ModelError(f"{told}; give a folder that LlavaForConditionalGeneration wrote")
    if (layer := config.vision_feature_layer) not in range(~(last := config.vision_config.num_hidden_layers), last + 1):
        whose = config.name_or_path or "student"
        raise ModelError(f"{whose}: vision_feature_layer is {layer}, expected a number from {~last} to {last}")
    with torch.device("meta"):
        model = FAMILIES[config.model_type](config).float()  # parts take the dtype that their config names
    return VisionLanguageModel(model=model, tokenizer=tokenizer, image_processor=image_processor)


def load_student(folder: str, *, dtype: torch.dtype | str = torch.float32) -> VisionLanguageModel:
    """Load a whole LLaVA folder written by this project or by transformers; raises ModelError."""
    whole = outline_folder(folder)
    return dataclasses.replace(whole, model=parts.load(type(whole.model), folder, dtype=dtype))


def load_teacher(config: TeacherConfig, device: torch.device | str = "cpu") -> VisionLanguageModel:
    """Load a LLaVA folder frozen and in eval mode, never to be trained or saved; raises ModelError."""
    teacher = load_student(config.path, dtype=config.dtype)
    teacher.model.requires_grad_(False).eval().to(device)
    return teacher


def outline_folder(folder: str) -> VisionLanguageModel:
    """What `load_student` would load, without weights; raises ModelError."""
    whole = outline(parts.load(AutoConfig, folder))
    readers = {"tokenizer": parts.load(AutoTokenizer, folder), "image_processor": parts.load_image_processor(folder)}
    return dataclasses.replace(whole, **readers)


def template_of(folder: str) -> Any:
    """The name of the template that a LLaVA folder's chat template lays out; raises ModelError where it is none."""
    known = {template.jinja: name for name, template in TEMPLATES.items() if template.jinja}
    if (held := parts.load(transformers.AutoProcessor, folder).chat_template) not in known:
        raise ModelError(f"{folder}: its chat template is none of {', '.join(TEMPLATES)}; say which to use: --template")
    return known[held]


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
    vision, joins = config.vision_config, getattr(config, "downsample_factor", 1)
    readers = {"image_processor": student.image_processor, "tokenizer": student.tokenizer, "image_token": IMAGE_TAG}
    sizes = {"patch_size": vision.patch_size * joins, "num_additional_image_tokens": parts.leading_tokens(vision)}
    sizes |= {"vision_feature_select_strategy": config.vision_feature_select_strategy}
    form = TEMPLATES[template].jinja if template else None
    transformers.LlavaProcessor(**readers, **sizes, chat_template=form).save_pretrained(folder)


def vision_features(model: LlavaForConditionalGeneration, pixel_values: Tensor) -> Tensor:
    """Selected tower features: [P, 3, H, W] -> [P, N, D_v]."""
    # In rows of channels, as every layer behind the convolution then has them, too; in rows of patches they are slow.
    pixel_values = pixel_values.contiguous(memory_format=torch.channels_last)
    hidden = model.model.vision_tower(pixel_values, output_hidden_states=True).hidden_states
    selected = hidden[model.config.vision_feature_layer]
    return selected[:, 1:] if model.config.vision_feature_select_strategy == "default" else selected


def final_hidden(
    model: LlavaForConditionalGeneration,
    input_ids: Tensor,
    attention_mask: Tensor,
    visual: Tensor,
    features: Tensor | None,
    position_ids: Tensor | None = None,
) -> Tensor:
    """Final hidden states [B, T, D], after the last norm: what `lm_head` turns into logits.

    On a GPU nothing waits for the device where all but `features` are given on the CPU.

    input_ids, attention_mask: int64 [B, T].
    visual: bool [B, T], True at the P * N picture positions, pictures in row-major order.
    features: [P, N, D_v] from `vision_features`, or None without pictures.
    position_ids: int64 [1, T] of a pack, from 0 in each of its rows, which then do not see one another.
    """
    device = model.lm_head.weight.device
    # Without a mask stock models make one from the positions: of blocks, one a row.
    seen: dict[str, Any] = {"attention_mask": sent(attention_mask, device)}
    if position_ids is not None:
        ends = F.pad((position_ids[0] == 0).nonzero().squeeze(1), (0, 1), value=position_ids.shape[1]).int()
        seen = {"cu_seq_lens_q": sent(ends, device), "max_length_q": int(ends.diff().max())}
        seen |= {"position_ids": sent(position_ids, device)}
    # The id at a picture position is only a mark; it may lie outside this model's vocabulary.
    embedded = model.get_input_embeddings()(sent(input_ids.masked_fill(visual, 0), device))
    if features is not None:
        projected = model.model.multi_modal_projector(features.to(embedded.dtype)).to(embedded.dtype).flatten(0, -2)
        visual = sent(visual, device)
        number = (visual.flatten().cumsum(0) - 1).clamp_min(0)  # of the visual token at or before each position
        embedded = projected.index_select(0, number).view_as(embedded).where(visual.unsqueeze(-1), embedded)
    return model.model(inputs_embeds=embedded, **seen, use_cache=False).last_hidden_state
