"""Checkpoints of other projects, written here as their specification says, convert to what that specification computes."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from model_parts import CROP, LANGUAGE_MODELS, TOWERS, write_tokenizer, write_tower
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoProcessor,
    CLIPImageProcessorPil,
    LlavaForConditionalGeneration,
)

from llavakd.models.parts import ModelError
from llavakd.models.tinyllava import convert

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)


class Parts:
    """A tower, an MLP and a language model, and the splice computation over them."""

    def __init__(self, text="qwen2", tower="siglip", linear=False):
        torch.manual_seed(3)
        self.text = AutoModelForCausalLM.from_config(LANGUAGE_MODELS[text]).eval()
        self.tower = AutoModel.from_config(TOWERS[tower]).eval()
        self.connector = nn.Linear(16, 16) if linear else nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 16))

    @torch.no_grad()
    def logits(self, pieces, pixels):
        """Of the text `pieces` with one picture of `pixels` between each two of them."""
        embed = self.text.get_input_embeddings()
        spliced = [embed(torch.tensor(pieces[0]))]
        for piece, picture in zip(pieces[1:], pixels, strict=True):
            hidden = self.tower(picture[None], output_hidden_states=True).hidden_states[-2][:, 1:]
            spliced += [self.connector(hidden)[0], embed(torch.tensor(piece))]
        return self.text(inputs_embeds=torch.cat(spliced)[None]).logits[0]

    def weights(self):
        """The three state dicts; a tied head is one tensor with the embedding and is not written twice."""
        text = dict(self.text.named_parameters())
        tower = {"vision_model." + key: value for key, value in self.tower.named_parameters()}
        return {
            "language_model": text,
            "vision_tower": tower,
            "connector": {"_connector." + k: v for k, v in self.connector.named_parameters()},
        }


def plain(tensors):
    return {key: tensor.detach().clone() for key, tensor in tensors.items()}


def write_folder(folder: Path, parts: Parts, **changes) -> Path:
    """config.json and tokenizer of a TinyLLaVA checkpoint; the image processor lies with the tower it names."""
    config = {
        "architectures": ["AnyName"],
        "model_type": "tinyllava",
        "llm_model_name_or_path": "./pretrained/qwen",
        "tokenizer_name_or_path": "./pretrained/qwen",
        "vision_model_name_or_path": str(write_tower(folder.parent / "tower", "siglip")),
        "connector_type": "mlp2x_gelu",
        "image_token_index": -200,
        "text_config": parts.text.config.to_diff_dict() | {"model_type": parts.text.config.model_type},
        "vision_config": parts.tower.config.to_diff_dict() | {"model_name_or_path": "/secret/siglip"},
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "patch",
        "image_aspect_ratio": "square",
        "pad_token": None,
    }
    write_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


def merged(parts: Parts) -> dict[str, torch.Tensor]:
    weights = parts.weights()
    inner = {"language_model": "", "vision_tower": "_vision_tower.", "connector": ""}
    return plain({f"{part}.{inner[part]}{k}": v for part in weights for k, v in weights[part].items()})


def write_merged(folder: Path, parts: Parts, **changes) -> Path:
    save_file(merged(parts), write_folder(folder, parts, **changes) / "model.safetensors")
    return folder


def write_sharded(folder: Path, parts: Parts) -> Path:
    tensors, shards = merged(parts), {}
    for number, key in enumerate(sorted(tensors)):
        shards.setdefault(f"model-0000{number % 2 + 1}-of-00002.safetensors", {})[key] = tensors[key]
    write_folder(folder, parts)
    for name, shard in shards.items():
        save_file(shard, folder / name)
    index = {"weight_map": {key: name for name, shard in shards.items() for key in shard}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def write_bin(folder: Path, parts: Parts) -> Path:
    torch.save(merged(parts), write_folder(folder, parts) / "pytorch_model.bin")
    return folder


def write_components(folder: Path, parts: Parts, *, prefix: str = "", **changes) -> Path:
    write_folder(folder, parts, **changes)
    for part, tensors in parts.weights().items():
        (folder / part).mkdir()
        named = {(prefix + key if part == "connector" else key): value for key, value in plain(tensors).items()}
        torch.save(named, folder / part / "pytorch_model.bin")
    return folder


def write_converted_components(folder: Path, parts: Parts) -> Path:
    return write_components(folder, parts, prefix="connector.")


def write_linear(folder: Path, parts: Parts) -> Path:
    return write_merged(folder, parts, connector_type="linear")


def write_lora(folder: Path, parts: Parts, **settings) -> Path:
    """`parts` become the merged model: base weights are what is left after alpha / r B A is taken away again."""
    name, (rank, alpha) = "model.layers.1.self_attn.q_proj.weight", (2, 3)
    down, up = torch.randn(rank, 16), torch.randn(16, rank)
    base = dict(parts.text.named_parameters())[name].detach().clone()
    write_components(folder, parts)
    file = folder / "language_model" / "pytorch_model.bin"
    tensors = torch.load(file)
    tensors[name.replace(".weight", ".base_layer.weight")] = tensors.pop(name)
    torch.save(tensors, file)
    scale = alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)
    dict(parts.text.named_parameters())[name].data = base + scale * (up @ down)
    key = f"base_model.model.language_model.{name.removesuffix('.weight')}"
    save_file({f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up}, folder / "adapter_model.safetensors")
    adapter = {"r": rank, "lora_alpha": alpha, "bias": "none", "use_dora": False, "rank_pattern": {}} | settings
    (folder / "adapter_config.json").write_text(json.dumps(adapter))
    return folder


def write_rslora(folder: Path, parts: Parts) -> Path:
    return write_lora(folder, parts, use_rslora=True)


def write_llava(folder: Path, parts: Parts, *, with_tower: bool = True, **changes) -> Path:
    """The original LLaVA-1.5 layout: a Llama checkpoint with mm_ keys, its tokenizer as large as its table."""
    tower = write_tower(folder.parent / "tower", "clip")
    parts.tower.save_pretrained(tower)
    weights = dict(parts.text.named_parameters())
    weights |= {f"model.mm_projector.{k}": v for k, v in parts.connector.named_parameters()}
    if with_tower:
        inner = "model.vision_tower.vision_tower.vision_model."
        weights |= {inner + key: value for key, value in parts.tower.named_parameters()}
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)  # old transformers saved it
    config = parts.text.config.to_diff_dict() | {
        "model_type": "llava",
        "architectures": ["LlavaLlamaForCausalLM"],
        "mm_vision_tower": str(tower),
        "mm_projector_type": "mlp2x_gelu",
        "mm_hidden_size": 16,
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_use_im_start_end": False,
        "image_aspect_ratio": "pad",
    }
    write_tokenizer(folder, words="abcdefghijklmn")
    (folder / "config.json").write_text(json.dumps(config | changes))
    torch.save(plain(weights), folder / "pytorch_model.bin")
    return folder


def write_llava_without_tower(folder: Path, parts: Parts) -> Path:
    return write_llava(folder, parts, with_tower=False)


CLIP = {"text": "llama", "tower": "clip"}
FORMS = [
    (write_merged, {}),
    (write_merged, {"text": "qwen2-tied"}),
    (write_sharded, {"text": "qwen2-tied"}),
    (write_bin, {}),
    (write_components, {"text": "qwen2-tied"}),
    (write_converted_components, {}),
    (write_linear, {"linear": True}),
    (write_lora, {}),
    (write_rslora, {}),
    (write_merged, {"text": "gemma"}),
    (write_llava, CLIP),
    (write_llava_without_tower, CLIP),
]


@pytest.mark.parametrize(("write", "kinds"), FORMS)
def test_the_converted_folder_gives_the_splice_computations_logits_bit_for_bit(tmp_path, write, kinds):
    parts = Parts(**kinds)
    note = convert(write(tmp_path / "source", parts), tmp_path / "target")
    stock, processor = (
        LlavaForConditionalGeneration.from_pretrained(tmp_path / "target"),
        AutoProcessor.from_pretrained(tmp_path / "target"),
    )
    pictures = [Image.effect_noise((40, 30), 90).convert("RGB"), Image.new("RGB", (8, 24), "red")]
    inputs = processor(text="a b <image> c <image> d", images=pictures, return_tensors="pt")
    expected = parts.logits([[2, 3], [4], [5]], inputs["pixel_values"])
    with torch.no_grad():
        logits = stock(**inputs).logits[0]
        alone = stock(input_ids=torch.tensor([[2, 3, 4]])).logits[0]
    vocabulary = expected.shape[-1]
    assert logits.shape[-1] == vocabulary + (kinds == CLIP)  # its table has no free row, so the picture mark gets one
    assert torch.equal(logits[:, :vocabulary], expected)
    assert torch.equal(alone[:, :vocabulary], parts.logits([[2, 3, 4]], []))
    assert expected.std() > 0.01
    assert "vicuna_v1" in note
    assert "secret" not in (tmp_path / "target" / "config.json").read_text()


def test_the_folder_asks_and_ends_as_the_checkpoint_was_taught(tmp_path):
    convert(write_merged(tmp_path / "source", Parts()), tmp_path / "target")
    processor = AutoProcessor.from_pretrained(tmp_path / "target")
    talk = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a b"}]},
        {"role": "assistant", "content": "c"},
        {"role": "user", "content": "d"},
    ]
    text = processor.apply_chat_template(talk, add_generation_prompt=True)
    assert text == SYSTEM + "USER: <image>\na b ASSISTANT: c<|endoftext|>USER: d ASSISTANT:"
    generation = json.loads((tmp_path / "target" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == generation["pad_token_id"] == 0
    config = json.loads((tmp_path / "target" / "config.json").read_text())
    chosen = (config["image_token_index"], config["image_seq_length"], config["vision_feature_select_strategy"])
    assert chosen == (12, 15, "default")


def test_pad_is_part_of_the_converted_processor(tmp_path):
    convert(write_llava(tmp_path / "source", Parts(**CLIP)), tmp_path / "target")
    picture = Image.effect_noise((40, 20), 90).convert("RGB")
    mean = [0.48145466, 0.4578275, 0.40821073]  # CLIP's; the canvas has its colour
    square = Image.new("RGB", (40, 40), tuple(int(255 * channel) for channel in mean))
    square.paste(picture, (0, 10))
    expected = CLIPImageProcessorPil(**CROP)(images=[square], return_tensors="pt").pixel_values
    processor = AutoProcessor.from_pretrained(tmp_path / "target")
    assert torch.equal(processor(text="<image>", images=[picture], return_tensors="pt")["pixel_values"], expected)


def test_half_precision_is_kept_and_the_users_options_win(tmp_path):
    source = write_llava(tmp_path / "source", Parts(**CLIP), with_tower=False, mm_vision_tower="gone/for/good")
    file = source / "pytorch_model.bin"
    torch.save({k: t if "inv_freq" in k else t.bfloat16() for k, t in torch.load(file).items()}, file)
    (source / "tokenizer_config.json").unlink()
    words = write_tokenizer(tmp_path / "words")
    with pytest.raises(ModelError, match="give --tokenizer"):
        convert(source, tmp_path / "target")
    convert(source, tmp_path / "target", tokenizer=str(words), vision_tower=str(tmp_path / "tower"))
    stock = LlavaForConditionalGeneration.from_pretrained(tmp_path / "target")
    assert {parameter.dtype for parameter in stock.parameters()} == {torch.bfloat16}


def edit(change):
    """A change of the merged weights."""

    def apply(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return apply


def configure(**changes):
    """A change of config.json; a dict changes the part of that name."""

    def apply(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        for key, value in changes.items():
            config[key] = config[key] | value if isinstance(value, dict) else value
        (folder / "config.json").write_text(json.dumps(config))

    return apply


def both_forms(folder: Path) -> None:
    (folder / "language_model").mkdir()


NORM = "language_model.model.norm.weight"
REFUSED = [
    (edit(lambda t: t.pop(NORM)), NORM),
    (
        edit(lambda t: t.pop("vision_tower._vision_tower.vision_model.post_layernorm.bias")),
        "vision_model.post_layernorm.bias",
    ),
    (edit(lambda t: t.pop("connector._connector.2.bias")), "connector._connector.2.bias"),
    (edit(lambda t: t.pop("language_model.lm_head.weight")), "language_model.lm_head.weight"),
    (edit(lambda t: t.update({NORM: torch.ones(17)})), rf"{NORM}.*\(17,\).*\(16,\)"),
    (
        edit(lambda t: t.update({"language_model.lm_head.bias": torch.ones(16)})),
        "language_model.lm_head.bias.*no place",
    ),
    (edit(lambda t: t.update({"connector._connector.4.bias": torch.ones(16)})), "connector._connector.4.bias"),
    (configure(text_config={"tie_word_embeddings": True}), "language_model.lm_head.weight differs"),
    (configure(connector_type="resampler"), "connector_type 'resampler'"),
    (configure(connector_type="linear"), "connector._connector.weight"),
    (configure(vision_feature_select_strategy="cls"), "vision_feature_select_strategy 'cls'"),
    (configure(image_aspect_ratio="anyres"), "image_aspect_ratio 'anyres'"),
    (configure(text_config={"model_type": "openelm"}), "text_config has model_type 'openelm'"),
    (configure(vision_config={"model_type": "vit"}), "vision tower 'vit'"),
    (configure(vision_config={"image_size": 32}), "16 x 16 pixels.*takes 32 x 32"),
    (configure(vision_model_name_or_path="./gone"), "'./gone'.*give --vision-tower"),
    (configure(text_config={"vocab_size": 8}), "embed_tokens.weight|lm_head.weight"),
    (lambda folder: (folder / "config.json").write_text("{"), "config.json"),
    (lambda folder: (folder / "config.json").write_text('{"model_type": "llava"}'), "only these are converted"),
    (lambda folder: (folder / "tokenizer_config.json").unlink(), "'./pretrained/qwen'.*give --tokenizer"),
    (lambda folder: write_tokenizer(folder, words="abcdefghijklmnopq"), "beyond the checkpoint's 16 rows"),
    (lambda folder: (folder / "model.safetensors").write_bytes(b"torn"), "model.safetensors"),
    (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors"),
    (lambda folder: shutil.move(folder / "model.safetensors", folder / "pytorch_model.bin"), "pytorch_model.bin"),
    (both_forms, "both a whole model and language_model"),
]


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return write_merged(tmp_path_factory.mktemp("sound") / "source", Parts())


@pytest.mark.parametrize(("spoil", "message"), REFUSED)
def test_what_cannot_be_converted_is_refused_by_its_key(sound, tmp_path, spoil, message):
    shutil.copytree(sound, tmp_path / "source")
    spoil(tmp_path / "source")
    with pytest.raises(ModelError, match=message):
        convert(tmp_path / "source", tmp_path / "target")
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [("gemma2", "changes the logits after its head"), ("phi", "language_model.lm_head.bias.*no place")],
)
def test_a_checkpoint_whose_language_model_stock_llava_cannot_hold_is_refused(tmp_path, text, message):
    with pytest.raises(ModelError, match=message):
        convert(write_merged(tmp_path / "source", Parts(text)), tmp_path / "target")


@pytest.mark.parametrize(
    ("settings", "rename", "message"),
    [
        ({"use_dora": True}, ("", ""), "use_dora"),
        ({}, ("lora_B", "lora_C"), "lora_A.weight has no .*lora_B"),
        ({}, ("q_proj", "x_proj"), "x_proj.lora_A.weight has no .*x_proj.weight"),
        ({}, ("lora_A", "lora_M"), "lora_.*is no low-rank update"),
    ],
)
def test_an_adapter_that_cannot_be_merged_is_refused(tmp_path, settings, rename, message):
    source = write_lora(tmp_path / "source", Parts(), **settings)
    file = source / "adapter_model.safetensors"
    save_file({key.replace(*rename): tensor for key, tensor in load_file(file).items()}, file)
    with pytest.raises(ModelError, match=message):
        convert(source, tmp_path / "target")


def test_the_command_converts_or_names_the_key(command, sound, tmp_path):
    done = command("convert", sound, tmp_path / "target")
    assert (done.code, str(tmp_path / "target") in done.out) == (0, True)
    again = command("convert", sound, tmp_path / "target")
    assert (again.code, "not empty" in again.err) == (1, True)
    shutil.copytree(sound, tmp_path / "partial")
    edit(lambda tensors: tensors.pop(NORM))(tmp_path / "partial")
    failed = command("convert", tmp_path / "partial", tmp_path / "other")
    assert failed.code == 1
    assert NORM in failed.err
    assert "Traceback" not in failed.err
