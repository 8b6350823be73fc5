"""Tiny random parts of every kind, written as the folders that their own libraries write."""

from pathlib import Path

import transformers as tf
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers import models as tokenizer_models

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
IDS = {"vocab_size": 16, "eos_token_id": 0, "bos_token_id": 1, "pad_token_id": 0}
TEXT = SIZES | IDS | {"num_key_value_heads": 2, "initializer_range": 0.3}
VISION = SIZES | {"image_size": 16, "patch_size": 4, "initializer_range": 0.3}
DINO = {key: value for key, value in VISION.items() if key != "intermediate_size"} | {"mlp_ratio": 2, "image_size": 28}
CROP = {"size": {"shortest_edge": 20}, "crop_size": {"height": 16, "width": 16}}

LANGUAGE_MODELS = {
    "qwen2": tf.Qwen2Config(**TEXT),
    "qwen2-tied": tf.Qwen2Config(**TEXT, tie_word_embeddings=True),
    "qwen3": tf.Qwen3Config(**TEXT, head_dim=8),
    "llama": tf.LlamaConfig(**TEXT),
    "mistral": tf.MistralConfig(**TEXT),
    "gemma": tf.GemmaConfig(**TEXT, head_dim=8),
    "gemma3": tf.Gemma3TextConfig(**TEXT, head_dim=8),
    "phi3": tf.Phi3Config(**TEXT),
    "phi": tf.PhiConfig(**TEXT),
    "gemma2": tf.Gemma2Config(**TEXT, head_dim=8),
    "granite": tf.GraniteConfig(**TEXT, logits_scaling=4.0),
    "gpt2": tf.GPT2Config(vocab_size=16, n_embd=16, n_layer=2, n_head=2),
    "opt": tf.OPTConfig(**SIZES, vocab_size=16, ffn_dim=32, word_embed_proj_dim=16),
}
TOWERS = {
    "siglip": tf.SiglipVisionConfig(**VISION),
    "siglip-whole": tf.SiglipConfig(vision_config=VISION, text_config=SIZES),
    "clip": tf.CLIPVisionConfig(**VISION),
    "clip-whole": tf.CLIPConfig(vision_config=VISION, text_config=SIZES, projection_dim=8),
    "dinov2": tf.Dinov2Config(**DINO),
    "dinov2-registers": tf.Dinov2WithRegistersConfig(**DINO),
    "siglip2-naflex": tf.Siglip2VisionConfig(**SIZES, num_patches=16, patch_size=4),
}
PROCESSORS = {
    "siglip": tf.SiglipImageProcessorPil(size={"height": 16, "width": 16}),
    "siglip2": tf.SiglipImageProcessorPil(size={"height": 16, "width": 16}),
    "clip": tf.CLIPImageProcessorPil(**CROP),
    "dinov2": tf.BitImageProcessorPil(**CROP),
}


def write_tokenizer(folder: Path, *, words: str = "abcdefghij") -> Path:
    """Ids 0 and 1 end and begin a text, one more per letter; no picture mark."""
    ids = {word: index for index, word in enumerate(["<|endoftext|>", "<s>", *words])}
    core = Tokenizer(tokenizer_models.WordLevel(ids, unk_token="<|endoftext|>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = tf.PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|endoftext|>", bos_token="<s>")
    tokenizer.save_pretrained(folder)
    return folder


def write_language_model(folder: Path, name: str) -> Path:
    """A random causal language model of LANGUAGE_MODELS with its tokenizer."""
    tf.AutoModelForCausalLM.from_config(LANGUAGE_MODELS[name]).save_pretrained(folder)
    return write_tokenizer(folder)


def write_tower(folder: Path, name: str) -> Path:
    """A random vision tower of TOWERS with its image processor, for pictures of 16 x 16 pixels."""
    tf.AutoModel.from_config(TOWERS[name]).save_pretrained(folder)
    PROCESSORS[name.split("-")[0]].save_pretrained(folder)
    return folder
