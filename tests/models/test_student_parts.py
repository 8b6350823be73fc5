"""Which towers and language models stock Llava can hold, and that a student of them is what stock classes load."""

import json
import shutil

import pytest
import torch
from model_parts import write_language_model, write_tokenizer, write_tower
from PIL import Image
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

from llavakd.config import StudentConfig
from llavakd.models.parts import ModelError
from llavakd.models.student import (
    build_student,
    final_hidden,
    load_student,
    outline_student,
    save_model,
    vision_features,
)

# Of a picture of 16 x 16 pixels in patches of 4, with class token and registers.
TOKENS = {"siglip": 16, "siglip-whole": 16, "clip": 17, "clip-whole": 17, "dinov2": 17, "dinov2-registers": 21}
HELD = ("qwen2", "qwen2-tied", "qwen3", "llama", "mistral", "gemma", "gemma3", "phi3")
PAIRS = [
    *(("siglip", text, "default") for text in HELD),
    *((tower, "qwen2", strategy) for tower in TOKENS for strategy in ("default", "full")),
    ("clip", "llama", "default"),
    ("dinov2", "gemma3", "full"),
    ("dinov2-registers", "phi3", "default"),
]
POOLED = [("siglip", "qwen2", "full"), ("clip", "llama", "default"), ("dinov2", "gemma3", "default")]


@pytest.fixture(scope="module")
def part(tmp_path_factory):
    """Folders of parts, written once."""
    root, write = tmp_path_factory.mktemp("parts"), {"tower": write_tower, "text": write_language_model}

    def folder(kind, name):
        torch.manual_seed(len(name))
        return str(root / name if (root / name).is_dir() else write[kind](root / name, name))

    return folder


def build(part, tower="siglip", text="qwen2", **options):
    config = StudentConfig(vision_tower=part("tower", tower), language_model=part("text", text), **options)
    return build_student(config, seed=0)


@pytest.mark.parametrize(
    ("tower", "text", "strategy", "projector"),
    [(*pair, "mlp2x_gelu") for pair in PAIRS] + [(*pair, "pixel_shuffle") for pair in POOLED],
)
def test_training_computes_what_stock_classes_compute_from_the_saved_folder(
    part, tmp_path, tower, text, strategy, projector
):
    student = build(part, tower, text, vision_feature_select_strategy=strategy, projector=projector)
    save_model(student, tmp_path, template="vicuna_v1")
    stock = AutoModelForImageTextToText.from_pretrained(tmp_path)
    names = {"mlp2x_gelu": "LlavaForConditionalGeneration", "pixel_shuffle": "AyaVisionForConditionalGeneration"}
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [type(stock).__name__]
    assert type(stock).__name__ == names[projector]
    pictures = [Image.effect_noise((40, 30), 90).convert("RGB"), Image.new("RGB", (8, 24), "red")]
    inputs = AutoProcessor.from_pretrained(tmp_path)(
        text="a <image> b c <image> d", images=pictures, return_tensors="pt"
    )
    visual = inputs["input_ids"] == student.image_token_id
    joined = 4 if projector == "pixel_shuffle" else 1
    assert visual.sum() == 2 * student.tokens_per_image == 2 * (TOKENS[tower] - (strategy == "default")) // joined
    pixels = student.image_processor(images=pictures, return_tensors="pt").pixel_values
    assert torch.equal(inputs["pixel_values"], pixels)
    with torch.no_grad():
        features = vision_features(student.model.eval(), pixels)
        ours = final_hidden(student.model, inputs["input_ids"], inputs["attention_mask"], visual, features)
        expected = stock(**inputs).logits
    assert torch.equal(ours @ student.head.T, expected)
    assert expected.std() > 0.01
    ids = torch.tensor([[1, 2, 3, 4]])
    alone = AutoModelForCausalLM.from_pretrained(part("text", text))
    assert torch.equal(stock(input_ids=ids).logits, alone(ids).logits)


def test_a_picture_reaches_the_answer(part):
    student = build(part, "dinov2", "gemma")
    ids = torch.tensor([[2] + [student.image_token_id] * student.tokens_per_image + [3]])
    with torch.no_grad():
        one, other = (
            final_hidden(student.model, ids, torch.ones_like(ids), ids == student.image_token_id, features)[0, -1]
            for features in vision_features(student.model, torch.randn(2, 3, 16, 16)).unsqueeze(1)
        )
    assert not torch.allclose(one, other)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("phi", "its head has a bias"),
        ("gemma2", "changes the logits after its head"),
        ("granite", "changes the logits after its head"),
        ("gpt2", "not called embed_tokens"),
        ("opt", "not called embed_tokens"),
    ],
)
def test_a_language_model_that_stock_llava_cannot_hold_is_refused(part, text, reason):
    with pytest.raises(ModelError, match=f"{text}.*{reason}"):
        build(part, text=text)


def test_a_tower_that_needs_more_than_pixels_is_refused(part):
    with pytest.raises(ModelError, match="'siglip2_vision_model' is not known; known: siglip_vision_model"):
        build(part, tower="siglip2-naflex")


def test_a_processor_that_makes_another_size_than_the_tower_takes_is_refused(part, tmp_path):
    folder = write_tower(tmp_path / "tower", "clip")
    file = folder / "preprocessor_config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps(settings | {"crop_size": {"height": 20, "width": 20}}))
    with pytest.raises(ModelError, match=r"20 x 20 pixels.*takes 16 x 16"):
        build_student(StudentConfig(vision_tower=str(folder), language_model=part("text", "qwen2")), seed=0)


def test_a_processor_written_before_processors_had_their_name_is_known(part, tmp_path):
    """As openai/clip-vit-large-patch14-336 has it: another key, the old name, and sizes that are numbers."""
    folder, mean = write_tower(tmp_path / "tower", "clip"), [0.48145466, 0.4578275, 0.40821073]
    flags = dict.fromkeys(("do_center_crop", "do_normalize", "do_resize"), True)
    old = {"feature_extractor_type": "CLIPFeatureExtractor", "crop_size": 16, "size": 20, "resample": 3}
    file = folder / "preprocessor_config.json"
    new = json.loads(file.read_text())
    file.write_text(json.dumps(flags | old | {"image_mean": mean, "image_std": new["image_std"]}))
    student = build_student(StudentConfig(vision_tower=str(folder), language_model=part("text", "qwen2")), seed=0)
    picture = Image.effect_noise((40, 30), 90).convert("RGB")
    pixels, wanted = (
        one.image_processor(images=[picture], return_tensors="pt").pixel_values
        for one in (student, build(part, tower="clip"))
    )
    assert torch.equal(pixels, wanted)


def test_a_linear_projector_is_one_matrix_and_stays_one(part, tmp_path):
    student = build(part, projector="linear")
    save_model(student, tmp_path, template=None)
    student = load_student(str(tmp_path))
    projector, features = student.parts()["projector"], torch.randn(2, 5, 16)
    student.train_only(["projector"])
    optimizer = torch.optim.AdamW([p for p in student.model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        expected = features @ projector.linear_1.weight.T + projector.linear_1.bias
        torch.testing.assert_close(projector(features), expected)
        assert torch.equal(projector(features), projector.linear_1(features))
        projector(features).square().sum().backward()
        optimizer.step()
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 2
    assert torch.equal(projector.linear_2.weight, torch.eye(16))
    bent = build(part).parts()["projector"]
    assert not torch.allclose(bent(2 * features) - bent(features), bent(features) - bent(0 * features))


def test_a_pooling_projector_joins_the_four_patches_of_a_square(part):
    """Change one patch of the 4 x 4: of the 2 x 2 tokens just the one it lies in changes."""
    projector = build(part, vision_feature_select_strategy="full", projector="pixel_shuffle").parts()["projector"]
    features = torch.randn(1, 16, 16)
    changed = set()
    for patch in range(16):
        other = features.clone()
        other[0, patch] += 1.0
        (moved,) = (projector(other) - projector(features)).abs().sum(-1).flatten().nonzero().flatten().tolist()
        changed.add((patch // 8, patch % 4 // 2, moved))
    assert len(changed) == 4, "each square of patches has a token of its own"


@pytest.mark.parametrize(("tower", "strategy", "count"), [("siglip", "default", 15), ("clip", "full", 17)])
def test_a_pooling_projector_needs_an_even_square_of_patches(part, tower, strategy, count):
    with pytest.raises(ModelError, match=rf"pixel_shuffle .* {count} tokens"):
        build(part, tower, vision_feature_select_strategy=strategy, projector="pixel_shuffle")


def test_a_pooled_student_trains_its_projector_and_comes_back(part, tmp_path):
    student = build(part, vision_feature_select_strategy="full", projector="pixel_shuffle")
    student.train_only(["projector"])
    names = {name for name, weight in student.model.named_parameters() if weight.requires_grad}
    assert names
    assert all(name.startswith("model.multi_modal_projector.") for name in names)
    save_model(student, tmp_path, template=None)
    again = load_student(str(tmp_path))
    assert again.tokens_per_image == student.tokens_per_image == 4
    assert all(torch.equal(a, b) for a, b in zip(student.model.parameters(), again.model.parameters(), strict=True))


@pytest.mark.parametrize("size", [(9, 3), (4, 13), (6, 6)])
def test_pad_centres_a_picture_on_a_square_of_the_mean_colour(part, tmp_path, size):
    """LLaVA-1.5: a canvas of the longer side in int(255 mean), then the tower's own resize; kept by the saved folder."""
    student = build(part, image_mode="pad")
    picture = Image.effect_noise(size, 90).convert("RGB")
    side = max(size)
    canvas = Image.new("RGB", (side, side), tuple(int(255 * mean) for mean in student.image_processor.image_mean))
    canvas.paste(picture, ((side - size[0]) // 2, (side - size[1]) // 2))
    wanted = build(part).image_processor(images=[canvas], return_tensors="pt").pixel_values
    save_model(student, tmp_path, template=None)
    stock = AutoProcessor.from_pretrained(tmp_path).image_processor
    for processor in (student.image_processor, load_student(str(tmp_path)).image_processor, stock):
        got = processor(images=[picture], return_tensors="pt").pixel_values
        torch.testing.assert_close(got, wanted, atol=0.02, rtol=0)


@pytest.mark.parametrize("full", [False, True], ids=["free rows", "no free row"])
def test_an_outline_is_the_student_without_its_weights(part, tmp_path, full):
    text = part("text", "qwen2-tied")
    if full:
        text = str(write_tokenizer(shutil.copytree(text, tmp_path / "full"), words="abcdefghijklmn"))
    config = StudentConfig(vision_tower=part("tower", "clip"), language_model=text)
    outline, student = outline_student(config), build_student(config, seed=0)
    assert all(weight.is_meta for weight in outline.model.parameters())
    shapes = [
        {name: tuple(weight.shape) for name, weight in one.model.named_parameters()} for one in (outline, student)
    ]
    assert shapes[0] == shapes[1]
    for name in ("image_token_id", "tokens_per_image"):
        assert getattr(outline, name) == getattr(student, name)
    assert outline.tokenizer.get_vocab() == student.tokenizer.get_vocab()
