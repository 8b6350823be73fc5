"""A student is put together from parts, computes what stock transformers computes, and is saved in its form."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers import models as tokenizer_models
from transformers import (
    AutoProcessor,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipVisionModel,
)

from llavakd.config import DataConfig, EvaluationConfig, StudentConfig
from llavakd.data.chat import Segment
from llavakd.data.collate import Batch, RowDataset, Source, collate
from llavakd.data.samples import load_samples
from llavakd.evaluate import generate_answers
from llavakd.models.parts import ModelError
from llavakd.models.student import build_student, final_hidden, load_student, save_model, template_of, vision_features

STRATEGIES = {"default": 15, "full": 16}


def config(tiny, **changes):
    """From the tiny parts, both at random, unless told otherwise."""
    parts = {"vision_tower": str(tiny.tower), "language_model": str(tiny.language_model)}
    return StudentConfig(**(parts | {"from_scratch": ("vision_tower", "language_model")} | changes))


def mixed_data(tiny) -> DataConfig:
    return DataConfig(path=str(tiny.mixed), images=str(tiny.world / "images"), template="chatml", max_length=400)


def batch_of(model, tiny, kind: str) -> Batch:
    samples = load_samples(mixed_data(tiny))
    pictures = {"text": {0}, "one": {1}, "two": {2}, "all": {0, 1, 2}}[kind]
    chosen = [sample for sample in samples if len(sample.images) in pictures][::2][:4]
    if kind == "all":
        chosen = [next(s for s in samples if len(s.images) == count) for count in (1, 0, 2, 1)]
    data = mixed_data(tiny)
    source = Source(samples=chosen, renderer=model.renderer(data), data=data)
    rows = RowDataset([source], image_processor=model.image_processor)
    return collate([rows[index] for index in range(len(rows))], pad_token_id=model.tokenizer.pad_token_id)


@pytest.fixture(scope="module", params=STRATEGIES)
def saved(request, tiny, tmp_path_factory):
    """A student and the folder it was saved to."""
    student = build_student(config(tiny, vision_feature_select_strategy=request.param), seed=0)
    folder = tmp_path_factory.mktemp("saved") / request.param
    save_model(student, folder, template="chatml")
    return student, folder


@pytest.mark.parametrize("kind", ["text", "one", "two", "all"])
def test_stock_transformers_computes_the_same_logits_from_the_saved_folder(saved, tiny, kind):
    student, folder = saved
    batch = batch_of(student, tiny, kind)
    assert (batch.pixel_values is None) == (kind == "text")
    stock = LlavaForConditionalGeneration.from_pretrained(folder)
    with torch.no_grad():
        expected = stock(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, pixel_values=batch.pixel_values
        ).logits
        features = None if kind == "text" else vision_features(student.model, batch.pixel_values)
        hidden = final_hidden(
            student.model, batch.input_ids, batch.attention_mask, batch.segments == Segment.VISUAL, features
        )
        ours = hidden @ student.head.T
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6)
    assert expected.std() > 0.01  # not all alike, so that equality says something


def test_stock_processor_makes_the_ids_and_pixels_that_training_saw(saved, tiny):
    student, folder = saved
    sample = next(s for s in load_samples(mixed_data(tiny)) if len(s.images) == 2)
    content = [{"type": "image"}] * 2 + [{"type": "text", "text": sample.turns[0].text}]
    pictures = [Image.open(tiny.world / "images" / name) for name in sample.images]
    processor = AutoProcessor.from_pretrained(folder)
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    stock = processor(text=text, images=pictures, return_tensors="pt")
    first_round = dataclasses.replace(sample, turns=sample.turns[:2])
    assert stock["input_ids"][0].tolist() == student.renderer(mixed_data(tiny)).render_prompt(first_round)
    ours = student.image_processor(images=[p.convert("RGB") for p in pictures], return_tensors="pt").pixel_values
    assert torch.equal(stock["pixel_values"], ours)
    assert (stock["input_ids"] == student.image_token_id).sum() == 2 * student.tokens_per_image


def test_stock_generate_with_the_saved_chat_template_says_what_our_evaluation_says(saved, tiny):
    student, folder = saved
    data = dataclasses.replace(mixed_data(tiny), path=str(tiny.world / "test.json"))
    samples = load_samples(data)[:4]
    ours = generate_answers(student, samples, data, EvaluationConfig(data="", max_new_tokens=6), "")
    stock, processor = LlavaForConditionalGeneration.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    for sample, answer in zip(samples, ours, strict=True):
        content = [
            {"type": "image", "path": str(tiny.world / "images" / sample.images[0])},
            {"type": "text", "text": sample.turns[0].text},
        ]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        output = stock.generate(**inputs, max_new_tokens=6, do_sample=False)
        said = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert said.strip() == answer.prediction
    assert len({answer.prediction for answer in ours}) > 1


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_default_drops_the_first_token_of_the_tower_and_full_keeps_it(tiny, strategy):
    student = build_student(config(tiny, vision_feature_select_strategy=strategy), seed=0)
    pixels = torch.randn(3, 3, 32, 32)
    tower = SiglipVisionModel(student.model.config.vision_config).eval()
    tower.load_state_dict(student.parts()["vision_tower"].state_dict())
    with torch.no_grad():
        whole = tower(pixels, output_hidden_states=True).hidden_states[-2]
        selected = vision_features(student.model, pixels)
    assert whole.shape[1] == 16
    assert not whole.is_contiguous()
    assert selected.stride(-1) == 1
    assert torch.equal(selected, whole[:, 1:] if strategy == "default" else whole)
    assert selected.shape[1] == student.tokens_per_image == STRATEGIES[strategy]


def test_the_feature_layer_of_the_recipe_is_the_one_taken(tiny):
    pixels = torch.randn(1, 3, 32, 32)
    first, last = (
        vision_features(build_student(config(tiny, vision_feature_layer=layer), seed=0).model, pixels)
        for layer in (-2, -1)
    )
    assert not torch.allclose(first, last)


@pytest.mark.parametrize("layer", [-4, 3])
def test_a_feature_layer_that_the_tower_has_not_is_refused(tiny, layer):
    told = f"student: vision_feature_layer is {layer}, expected a number from -3 to 2"
    with pytest.raises(ModelError, match=re.escape(told)):
        build_student(config(tiny, vision_feature_layer=layer), seed=0)


def test_a_teacher_that_joins_several_layers_is_refused(tiny, tmp_path):
    folder = shutil.copytree(tiny.teacher, tmp_path / "several")
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(settings | {"vision_feature_layer": [-2, -1]}), encoding="utf-8")
    with pytest.raises(ModelError, match=r"several: vision_feature_layer is \[-2, -1\], expected a number from"):
        load_student(str(folder))


def test_parts_taken_out_of_a_llava_folder_equal_its_weights_and_the_projector_is_fresh(tiny):
    whole = load_student(str(tiny.teacher))
    student = build_student(
        config(tiny, vision_tower=str(tiny.teacher), language_model=str(tiny.teacher), from_scratch=()), seed=1
    )
    theirs = whole.model.state_dict()
    for name, tensor in student.model.state_dict().items():
        same = torch.equal(tensor, theirs[name])
        is_fresh = "multi_modal_projector" in name
        assert same != is_fresh, name
    assert student.head is student.model.get_input_embeddings().weight


def test_a_part_with_weights_is_loaded_and_one_from_scratch_depends_on_the_seed(tiny, tmp_path):
    source = load_student(str(tiny.teacher))
    source.parts()["vision_tower"].save_pretrained(tmp_path / "tower")
    source.image_processor.save_pretrained(tmp_path / "tower")
    loaded = build_student(config(tiny, vision_tower=str(tmp_path / "tower"), from_scratch=("language_model",)), seed=0)
    for name, tensor in source.parts()["vision_tower"].state_dict().items():
        assert torch.equal(loaded.parts()["vision_tower"].state_dict()[name], tensor), name
    again, other = (build_student(config(tiny), seed=seed).head for seed in (5, 6))
    assert torch.equal(again, build_student(config(tiny), seed=5).head)
    assert not torch.equal(again, other)


def test_saving_and_loading_keeps_every_tensor(saved):
    student, folder = saved
    loaded = load_student(str(folder)).model.state_dict()
    assert loaded.keys() == student.model.state_dict().keys()
    for name, tensor in student.model.state_dict().items():
        assert torch.equal(tensor, loaded[name]), name
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation["eos_token_id"] == student.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["LlavaForConditionalGeneration"]


def write_language_model(folder: Path, *, rows: int, tie: bool = True) -> Path:
    """A language model whose tokenizer has 12 ids, none of them for pictures, and two of them special."""
    words = {word: index for index, word in enumerate(["<|endoftext|>", "<|mark|>", *"abcdefghij"])}
    core = Tokenizer(tokenizer_models.WordLevel(words, unk_token="<|endoftext|>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|endoftext|>", additional_special_tokens=["<|mark|>"]
    )
    tokenizer.save_pretrained(folder)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    Qwen2ForCausalLM(
        Qwen2Config(vocab_size=rows, **sizes, **heads, tie_word_embeddings=tie, eos_token_id=0)
    ).save_pretrained(folder)
    return folder


def test_the_image_token_takes_a_free_row_without_resizing(tiny, tmp_path):
    folder = write_language_model(tmp_path / "lm", rows=16)
    student = build_student(config(tiny, language_model=str(folder), from_scratch=("vision_tower",)), seed=0)
    assert student.image_token_id == 12 == student.tokenizer.convert_tokens_to_ids("<image>")
    assert torch.equal(student.head, Qwen2ForCausalLM.from_pretrained(folder).lm_head.weight)
    assert student.tokenizer("a <image> b").input_ids == [2, 12, 3]


@pytest.mark.parametrize("tie", [True, False])
def test_the_table_grows_by_one_row_where_none_is_free_and_the_folder_still_loads(tiny, tmp_path, tie):
    folder = write_language_model(tmp_path / "lm", rows=12, tie=tie)
    student = build_student(config(tiny, language_model=str(folder), from_scratch=("vision_tower",)), seed=0)
    assert len(student.head) == len(student.model.get_input_embeddings().weight) == 13
    assert torch.equal(student.head[:12], Qwen2ForCausalLM.from_pretrained(folder).lm_head.weight)
    save_model(student, tmp_path / "saved", template=None)
    assert torch.equal(load_student(str(tmp_path / "saved")).head, student.head)


def test_special_tokens_of_the_family_stay_special_when_the_image_token_is_added(tiny, tmp_path):
    folder = write_language_model(tmp_path / "lm", rows=16)
    student = build_student(config(tiny, language_model=str(folder), from_scratch=("vision_tower",)), seed=0)
    save_model(student, tmp_path / "saved", template=None)
    for tokenizer in (student.tokenizer, AutoProcessor.from_pretrained(tmp_path / "saved").tokenizer):
        assert {"<|endoftext|>", "<|mark|>", "<image>"} <= set(tokenizer.all_special_tokens)
        assert tokenizer.decode([2, 1, 3, 12, 0], skip_special_tokens=True).replace(" ", "") == "ab"


PARTS = ("vision_tower", "projector", "language_model")


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("chosen", [(), ("projector",), ("language_model",), ("projector", "language_model"), PARTS])
def test_train_only_lets_exactly_the_named_parts_learn(tiny, tmp_path, tie, chosen):
    folder = write_language_model(tmp_path / "lm", rows=16, tie=tie)
    student = build_student(config(tiny, language_model=str(folder), from_scratch=("vision_tower",)), seed=0)
    student.train_only(PARTS)
    student.train_only(chosen)
    prefixes = {
        "vision_tower": ("model.vision_tower.",),
        "projector": ("model.multi_modal_projector.",),
        "language_model": ("model.language_model.", "lm_head."),
    }
    wanted = tuple(prefix for part in chosen for prefix in prefixes[part])
    for name, parameter in student.model.named_parameters(remove_duplicate=False):
        assert parameter.requires_grad == name.startswith(wanted), name
    if chosen == ("projector",):
        assert sum(p.requires_grad for p in student.model.parameters()) == 4
    assert (student.head is student.model.get_input_embeddings().weight) == tie


def test_a_folder_that_is_not_there_is_named(tiny, tmp_path):
    for load in (
        lambda: load_student(str(tmp_path / "nowhere")),
        lambda: build_student(config(tiny, vision_tower=str(tmp_path / "nowhere")), seed=0),
        lambda: build_student(config(tiny, language_model=str(tmp_path / "nowhere")), seed=0),
    ):
        with pytest.raises(ModelError, match="nowhere"):
            load()


def test_a_folder_of_another_kind_is_refused_as_a_llava_model(tiny):
    with pytest.raises(ModelError, match=r"'qwen2'.*expected one of llava"):
        load_student(str(tiny.language_model))


def test_a_folder_without_weights_is_refused_where_they_are_needed(tiny):
    with pytest.raises(ModelError, match="tiny-student-lm"):
        build_student(config(tiny, from_scratch=("vision_tower",)), seed=0)


@pytest.mark.parametrize(
    ("processor", "message"),
    [
        (None, "a directory containing a preprocessor_config.json"),
        ("ViTImageProcessor", "'ViTImageProcessor' is not known; known: SiglipImageProcessor"),
        ("VitImageProcessor", "Unrecognized image processor"),
    ],
)
def test_a_tower_without_a_known_image_processor_is_refused(tiny, tmp_path, processor, message):
    tower = tmp_path / "tower"
    shutil.copytree(tiny.tower, tower)
    file = tower / "preprocessor_config.json"
    if processor:
        file.write_text(json.dumps({"image_processor_type": processor}))
    else:
        file.unlink()
    with pytest.raises(ModelError, match=message):
        build_student(config(tiny, vision_tower=str(tower)), seed=0)


def test_a_torn_weight_file_is_a_model_error(tiny, tmp_path):
    folder = tmp_path / "torn"
    shutil.copytree(tiny.teacher, folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ModelError, match="torn"):
        load_student(str(folder))


@pytest.mark.parametrize("template", ["vicuna_v1", "chatml"])
def test_a_folder_tells_its_template(tiny, tmp_path, template):
    save_model(build_student(config(tiny), seed=0), tmp_path, template=template)
    assert template_of(str(tmp_path)) == template


@pytest.mark.parametrize("jinja", [None, "{{ messages }}"])
def test_a_folder_of_another_layout_does_not(tiny, tmp_path, jinja):
    save_model(build_student(config(tiny), seed=0), tmp_path, template="pretrain")  # which has no layout of turns
    if jinja:
        (tmp_path / "chat_template.jinja").write_text(jinja)
    with pytest.raises(ModelError, match=r"none of pretrain, vicuna_v1, chatml; .* --template"):
        template_of(str(tmp_path))
