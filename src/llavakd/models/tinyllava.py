"""TinyLLaVA, LLaVA-KD and original LLaVA-1.5 checkpoints -> the stock transformers Llava that computes the same.

Layouts: TinyLLaVA_Factory (training_recipe/base.py, lora_recipe.py, load_model.py) and haotian-liu/LLaVA v1.5.
"""

import functools
import json
import math
import pickle
import re
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, LlavaConfig, LlavaForConditionalGeneration
from transformers.modeling_utils import load_state_dict

from llavakd.config import StudentConfig
from llavakd.models import parts
from llavakd.models.parts import ModelError
from llavakd.models.student import VisionLanguageModel, outline, save_model, student_config
from llavakd.templates import render

_SPELLED = yaml.safe_load((Path(__file__).parents[1] / "assets" / "checkpoints.yaml").read_text(encoding="utf-8"))
# Buffers that old versions saved, and SigLIP's pooling head, which no feature passes.
_UNUSED = re.compile(r"rotary_emb\.inv_freq$|embeddings\.position_ids$|vision_tower\.(vision_model\.)?head\.")


def convert(source: Path, target: Path, *, tokenizer: str | None = None, vision_tower: str | None = None) -> str:
    """Write checkpoint `source` as a transformers folder `target`, its dtype kept; returns what was done in one line.

    `source` is TinyLLaVA or LLaVA-KD in merged, component or LoRA form, or a whole LLaVA-1.5; `target` is a new folder.
    `tokenizer` and `vision_tower` say where that is which `source` lacks and config.json names in vain.

    Raises ModelError: what cannot be converted exactly, naming the key.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ModelError(f"{target} is not empty; give a new folder")
    config = _read_config(source)
    named = config.get("tokenizer_name_or_path") or config.get("llm_model_name_or_path")
    words_from = _place("--tokenizer", tokenizer, source / "tokenizer_config.json", named)
    tower = vision_tower or config.get("vision_model_name_or_path")
    pixels_from = _place("--vision-tower", vision_tower, source / "preprocessor_config.json", tower)
    form = StudentConfig(vision_tower=str(tower), language_model=str(source), **config["form"])
    pixels = parts.load_image_processor(pixels_from, mode=form.image_mode)
    original = "mm_vision_tower" in config
    vision = parts.load(AutoConfig, str(tower)) if original else _part_config(config, "vision_config")
    llava = student_config(form, pixels, vision=vision, text=_part_config(config, "text_config"))
    words = parts.load(AutoTokenizer, words_from, config=llava.text_config)
    found = {key: tensor for key, tensor in _read_weights(source).items() if not _UNUSED.search(key)}
    dtype = functools.reduce(torch.promote_types, (tensor.dtype for tensor in found.values()))
    state = _match(found, llava, form, "original" if original else "tiny")
    model = LlavaForConditionalGeneration.from_pretrained(None, config=llava, state_dict=state, dtype=dtype)
    parts.check_language_model(parts.extract_language_model(model), str(source))
    if max(words.get_vocab().values()) >= (rows := len(model.lm_head.weight)):
        raise ModelError(f"{words_from} has ids beyond the checkpoint's {rows} rows; give its own with --tokenizer")
    parts.add_image_token(words, model.config)
    model.resize_token_embeddings(model.config.text_config.vocab_size)
    whole = VisionLanguageModel(model=model, tokenizer=words, image_processor=pixels)
    save_model(whole, target, template="vicuna_v1")
    return render("converted.jinja", target=target, whole=whole, form=form, places=(words_from, pixels_from))


def _read_config(source: Path) -> dict[str, Any]:
    """config.json of a kind that stock Llava can hold; its `form` is what it says in StudentConfig's words."""
    config = _read_json(source / "config.json")
    original = "mm_vision_tower" in config
    if not ("connector_type" in config or (original and config.get("model_type") in ("llava", "llava_llama"))):
        told = f"{source}: config.json, model_type {config.get('model_type')!r}, has no connector_type (TinyLLaVA, LLaVA-KD)"
        raise ModelError(f"{told} and is not a Llama with mm_vision_tower (LLaVA-1.5); only these are converted")
    if original:  # a LLaVA-1.5 config is a Llama's with more keys
        fields = {*AutoConfig.for_model("llama").to_dict(), "rope_theta", "rope_scaling"}
        text = {key: value for key, value in config.items() if key in fields}
        config["text_config"] = text | {"architectures": None, "model_type": "llama"}
        config["vision_model_name_or_path"] = config["mm_vision_tower"]
    form = {}
    for field, (tiny, theirs, default, known) in _SPELLED["settings"].items():
        said = theirs if original else tiny
        value = default if config.get(said) is None else config[said]
        if value not in ([*known] or range(-99, 100)):
            raise ModelError(f"{source}: config.json has {said} {value!r}; convertible: {[*known] or 'a layer'}")
        form[field] = known.get(value, value)
    form.pop("marks")  # around a picture: there are none
    return config | {"form": form}


def _place(option: str, given: str | None, own: Path, named: str | None) -> str:
    """Where a file is taken from: what the user says, the checkpoint itself, or what its config.json names."""
    place = given or (str(own.parent) if own.is_file() else named)
    if not place or (place.startswith((".", "/", "~")) and not Path(place).is_dir()):
        raise ModelError(f"{own} is missing and its config.json names {place!r}, which is not there; give {option}")
    return place


def _part_config(config: dict[str, Any], part: str) -> Any:
    settings = {key: value for key, value in (config.get(part) or {}).items() if "name_or_path" not in key}
    try:
        return AutoConfig.for_model(**settings)
    except (TypeError, ValueError) as error:
        raise ModelError(f"config.json: {part} has model_type {settings.get('model_type')!r}, unknown here") from error


def _match(left: dict[str, Tensor], llava: LlavaConfig, form: StudentConfig, spelling: str) -> dict[str, Tensor]:
    """The tensors under transformers' names: each wanted one once and of its shape, none left over."""
    wanted = outline(llava).model.state_dict()
    spelled = dict(_SPELLED["parts"][spelling])
    head, text, vision, projector = spelled
    if spelling == "original" and not any(key.startswith(spelled[vision]) for key in left):
        weights = parts.load_vision_tower(form.vision_tower, scratch=False).state_dict()
        left |= {spelled[vision] + key: tensor for key, tensor in weights.items()}
    if any(key.startswith(f"{spelled[vision]}vision_model.") for key in left):
        spelled[vision] += "vision_model."
    theirs, layers = spelled.pop(projector), _SPELLED["connectors"][form.projector]
    spelled |= {projector + layer: theirs + number for layer, number in layers.items()}
    names = {name: spelled[p] + name.removeprefix(p) for p in spelled for name in wanted if name.startswith(p)}
    if llava.tie_word_embeddings:
        pair = (names[f"{text}embed_tokens.weight"], names[f"{head}weight"])
        held = [left[key] for key in pair if key in left]
        if len(held) == 2 and not torch.equal(*held):
            raise ModelError(f"{pair[1]} differs from {pair[0]}, but config.json ties them (tie_word_embeddings)")
        left |= {key: held[0] for key in pair if held}
    for name, key in names.items():
        got, shape = tuple(getattr(left.get(key), "shape", ())), tuple(wanted[name].shape)
        if got != shape:
            raise ModelError(f"{key}: the checkpoint has {got or 'no such tensor'}, config.json asks for shape {shape}")
    state = {name: left.pop(key) for name, key in names.items()}
    if left:
        raise ModelError(f"the checkpoint has {min(left)}, which has no place in stock Llava ({len(left)} such)")
    if "linear_2." not in layers:  # the identity, see PROJECTORS
        width = len(state[f"{projector}linear_1.bias"])
        state |= {f"{projector}linear_2.weight": torch.eye(width), f"{projector}linear_2.bias": torch.zeros(width)}
    return state


def _read_weights(folder: Path) -> dict[str, Tensor]:
    if not (folder / "language_model").is_dir():
        return _read_files(folder)
    if list(folder.glob("model*.safetensors")) + list(folder.glob("pytorch_model*.bin")):
        raise ModelError(f"{folder} holds both a whole model and language_model/; move away which is not meant")
    weights = {}
    for part, inner in (("language_model", ""), ("vision_tower", "_vision_tower."), ("connector", "")):
        for key, tensor in _read_files(folder / part).items():
            key = key.removeprefix(f"{part}.").removeprefix(inner).replace(".base_layer", "")
            weights[f"{part}.{inner}{key}"] = tensor
    return _merge_lora(folder, weights) if (folder / "adapter_config.json").is_file() else weights


def _merge_lora(folder: Path, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """W + (alpha / r) B A for each adapted matrix (Hu et al. 2021, eq. 3; alpha / sqrt(r) where rank-stabilised)."""
    settings, adapter = _read_json(folder / "adapter_config.json"), _read_files(folder, "adapter_model", "")
    for key in ("use_dora", "fan_in_fan_out", "rank_pattern", "alpha_pattern"):
        if settings.get(key):
            raise ModelError(f"{folder}: adapter_config.json has {key} {settings[key]!r}, which cannot be merged here")
    scale = settings["lora_alpha"] / (math.sqrt(settings["r"]) if settings.get("use_rslora") else settings["r"])
    for key in [key for key in adapter if key.endswith(".lora_A.weight")]:
        name = key.removeprefix("base_model.model.").replace(".lora_A.", ".")
        partner = key.replace(".lora_A.", ".lora_B.")
        if name not in weights or partner not in adapter:
            raise ModelError(f"{folder}: {key} has no {partner if name in weights else name} to go with")
        weights[name] = weights[name] + (scale * (adapter.pop(partner) @ adapter.pop(key))).to(weights[name].dtype)
    if adapter:
        raise ModelError(f"{folder}: the adapter has {min(adapter)}, which is no low-rank update")
    return weights


def _read_files(folder: Path, stem: str = "model", prefix: str = "pytorch_") -> dict[str, Tensor]:
    """All tensors of STEM.safetensors or else PREFIX+STEM.bin, whole or in shards."""
    whole = [folder / f"{stem}.safetensors", folder / f"{prefix}{stem}.bin"]
    indices = [index for file in whole if (index := Path(f"{file}.index.json")).is_file()]
    files = [file for file in whole if file.is_file()][:1] or whole[:1]
    if indices:
        files = sorted({folder / name for name in _read_json(indices[0])["weight_map"].values()})
    tensors: dict[str, Tensor] = {}
    for file in files:
        try:
            tensors |= load_state_dict(file)
        except (OSError, EOFError, RuntimeError, TypeError, SafetensorError, pickle.UnpicklingError) as error:
            raise ModelError(f"cannot read the weights {file}: {str(error).splitlines()[0]}") from error
    if not tensors or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise ModelError(f"{files[0]} does not hold named tensors; give a checkpoint's weights")
    return tensors


def _read_json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot read {file}: {error}") from error
