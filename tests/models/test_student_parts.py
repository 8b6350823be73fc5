"""Which towers and language models stock Llava can hold, and that a student of them is what stock classes load."""

import json

import pytest
import torch
from model_parts import write_language_model, write_tower
from PIL import Image
from transformers import AutoModelForCausalLM, AutoProcessor, LlavaForConditionalGeneration

from llavakd.config import StudentConfig
from llavakd.models.student import ModelError, build_student, final_hidden, load_student, save_model, vision_features

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


@pytest.mark.parametrize(("tower", "text", "strategy"), PAIRS)
def test_training_computes_what_stock_classes_compute_from_the_saved_folder(part, tmp_path, tower, text, strategy):
    student = build(part, tower, text, vision_feature_select_strategy=strategy)
    save_model(student, tmp_path, template="vicuna_v1")
    stock = LlavaForConditionalGeneration.from_pretrained(tmp_path)
    pictures = [Image.effect_noise((40, 30), 90).convert("RGB"), Image.new("RGB", (8, 24), "red")]
    inputs = AutoProcessor.from_pretrained(tmp_path)(
        text="a <image> b c <image> d", images=pictures, return_tensors="pt"
    )
    visual = inputs["input_ids"] == student.image_token_id
    assert visual.sum() == 2 * student.tokens_per_image == 2 * (TOKENS[tower] - (strategy == "default"))
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
