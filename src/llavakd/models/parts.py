"""The parts of a vision-language model, loaded from folders or hub names, and what stock transformers can hold."""

import math
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForCausalLM

from llavakd.data.samples import IMAGE_TAG
from llavakd.errors import UserError

IMAGE_PROCESSORS = ("SiglipImageProcessor", "CLIPImageProcessor", "BitImageProcessor", "LlavaImageProcessor")
# Towers that stock Llava runs on pixels alone, and their tokens in front of the patches (registers come on top).
TOWERS = {"siglip_vision_model": 0, "clip_vision_model": 1, "dinov2": 1, "dinov2_with_registers": 1}
# Stock models of one build by model_type: Llava, and Aya Vision, whose projector makes one token of 2 x 2 patches.
FAMILIES: dict[str, type[Any]] = {
    "llava": transformers.LlavaForConditionalGeneration,
    "aya_vision": transformers.AyaVisionForConditionalGeneration,
}
# The activation of stock Llava's two-layer projector; `linear` keeps its second layer at the identity.
PROJECTORS = {"mlp2x_gelu": "gelu", "linear": "linear"}


class ModelError(UserError):
    """A model folder is missing, incomplete or of an unexpected kind; the message names it."""


def load(kind: Any, source: str, *, key: str = "", **options: Any) -> Any:
    """`kind.from_pretrained`, its failures as ModelError that names the recipe's `key`, if one is given."""
    where = f"{key}: " if key else ""
    if not Path(source).is_dir() and (source.startswith((".", "/", "~")) or source.count("/") > 1):
        # Neither a folder nor "owner/name", and a hub would only answer that this is no name.
        raise ModelError(f"{where}there is no folder {source!r}; give a local folder or a hub name")
    try:
        return kind.from_pretrained(source, **options)
    except (OSError, ValueError, SafetensorError) as error:
        reason = f"cannot load {source!r} as {kind.__name__}: {str(error).strip().splitlines()[0]}"
        raise ModelError(f"{where}{reason}; give a local folder or a hub name") from error


def load_image_processor(source: str, *, mode: str = "square") -> Any:
    """The tower's own processor in its PIL form, in mode "pad" with LLaVA-1.5's square margin; raises ModelError."""
    processor = load(AutoImageProcessor, source, backend="pil")  # the same pixels with and without torchvision
    if (kind := type(processor).__name__.removesuffix("Pil")) not in IMAGE_PROCESSORS:
        raise ModelError(f"{source}: image processor {kind!r} is not known; known: {', '.join(IMAGE_PROCESSORS)}")
    if mode == "square":
        return processor
    crops = bool(getattr(processor, "do_center_crop", False))  # where it does not say, LLaVA's own would
    return transformers.LlavaImageProcessorPil(**processor.to_dict() | {"do_pad": True, "do_center_crop": crops})


def load_vision_tower(source: str, *, scratch: bool) -> nn.Module:
    """A float32 tower, alone or out of a whole model; raises ModelError."""
    config = load(AutoConfig, source)
    if config.model_type in FAMILIES and not scratch:
        return load(FAMILIES[config.model_type], source, dtype=torch.float32).model.vision_tower
    options = {"config": tower_config(config, source), "dtype": torch.float32}
    return AutoModel.from_config(**options) if scratch else load(AutoModel, source, **options)


def load_language_model(source: str, *, scratch: bool) -> Any:
    """A float32 causal language model, alone or out of a whole model; raises ModelError."""
    config = load(AutoConfig, source)
    if scratch:
        return AutoModelForCausalLM.from_config(getattr(config, "text_config", config), dtype=torch.float32)
    if config.model_type not in FAMILIES:
        return load(AutoModelForCausalLM, source, dtype=torch.float32)
    return extract_language_model(load(FAMILIES[config.model_type], source, dtype=torch.float32))


def extract_language_model(model: Any) -> Any:
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
    head, reason = language_model.get_output_embeddings(), ""
    if hasattr(language_model.config, "text_config"):
        reason = "it is more than a causal language model"
    elif not hasattr(language_model.base_model, "embed_tokens"):
        reason = "its embedding is not called embed_tokens"
    elif head.bias is not None:
        reason = "its head has a bias"
    else:
        with torch.no_grad():
            output = language_model(torch.arange(4)[None], output_hidden_states=True)
            if not torch.equal(head(output.hidden_states[-1]), output.logits):
                reason = "it scales, caps or otherwise changes the logits after its head"
    if reason:
        told = f"{source}: stock Llava cannot hold a {language_model.config.model_type!r} language model like this: {reason}"
        raise ModelError(f"{told}; choose another, for example Qwen, Llama, Gemma, Gemma 3 or Phi-3")


def add_image_token(tokenizer: Any, config: Any) -> None:
    """Give a tokenizer `<image>` and padding, and a whole model's configuration their ids and rows for all ids."""
    if IMAGE_TAG not in tokenizer.get_vocab():
        tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TAG]}, replace_extra_special_tokens=False)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    # Not len(tokenizer), a vocabulary may have holes; `<image>` takes a free row, for more of them would change V.
    rows = max(tokenizer.get_vocab().values()) + 1
    config.text_config.vocab_size = max(rows, config.text_config.vocab_size)
    config.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TAG)
    config.pad_token_id, config.eos_token_id = tokenizer.pad_token_id, tokenizer.eos_token_id


def count_image_tokens(vision: Any, strategy: str, image_processor: Any = None) -> int:
    """Tokens of one picture of the tower's own size or as the processor makes it; raises ModelError for a wrong size."""
    height = width = vision.image_size
    if image_processor:
        pixels = image_processor(images=[Image.new("RGB", (60, 40))], return_tensors="pt").pixel_values
        height, width = pixels.shape[-2:]
    # DINOv2 interpolates its positions, the others do not.
    if height != width or (height != vision.image_size and not vision.model_type.startswith("dinov2")):
        takes = f"the vision tower {vision.model_type!r} takes {vision.image_size} x {vision.image_size}"
        told = f"the image processor makes pictures of {height} x {width} pixels, {takes}"
        raise ModelError(f"{told}; use the tower's own preprocessor_config.json")
    return (height // vision.patch_size) ** 2 + leading_tokens(vision) - (strategy == "default")


def pooled_tokens(tokens: int) -> int:
    """Tokens that the pooling projector leaves; raises ModelError where the patches do not pair up."""
    side = math.isqrt(tokens)
    if side * side != tokens or side % 2:
        why = f"projector pixel_shuffle joins 2 x 2 patches, but the tower's {tokens} tokens are no square of even side"
        how = "vision_feature_select_strategy `full` where it has no class token, else `default`"
        raise ModelError(f"{why}; use one of an even grid, and {how}")
    return tokens // 4


def leading_tokens(vision: Any) -> int:
    """Tokens in front of the patches."""
    return TOWERS[vision.model_type] + getattr(vision, "num_register_tokens", 0)
