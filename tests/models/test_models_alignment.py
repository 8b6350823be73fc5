"""What two models must share to be compared position by position, and what is refused."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    CLIPImageProcessorPil,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2Config,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
)

from llavakd.config import LossConfig, StudentConfig, TeacherConfig
from llavakd.errors import UserError
from llavakd.losses.objective import Counts, objective
from llavakd.models.alignment import align, shared_vocabulary
from llavakd.models.student import (
    VisionLanguageModel,
    build_student,
    final_hidden,
    load_student,
    load_teacher,
    save_model,
)


def student_of(tiny, **changes):
    """With the teacher's own tower, unless told otherwise."""
    parts = {"vision_tower": str(tiny.teacher), "language_model": str(tiny.language_model)}
    form = {"from_scratch": ("language_model",), "vision_feature_select_strategy": "full"}
    return build_student(StudentConfig(**(parts | form | changes)), seed=0)


@pytest.fixture(scope="module")
def teacher(tiny):
    return load_teacher(TeacherConfig(path=str(tiny.teacher), dtype="float32"))


def copy_with(tiny, tmp_path: Path, file: str, change) -> str:
    """A copy of the tiny language model's folder with one JSON file changed in place."""
    folder = tmp_path / "changed"
    shutil.copytree(tiny.language_model, folder)
    tree = json.loads((folder / file).read_text(encoding="utf-8"))
    change(tree)
    (folder / file).write_text(json.dumps(tree), encoding="utf-8")
    return str(folder)


def test_a_teacher_is_frozen_and_in_eval_mode(teacher):
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())
    assert not teacher.model.training


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_tower_from_a_copy_of_the_folder_elsewhere_is_shared(tiny, tmp_path, dtype):
    shutil.copytree(tiny.teacher, tmp_path / "elsewhere")
    teacher = load_teacher(TeacherConfig(path=str(tiny.teacher), dtype=dtype))
    pair = align(student_of(tiny, vision_tower=str(tmp_path / "elsewhere")), teacher)
    assert pair.shared_tower
    assert "run once" in pair.note


def test_a_tower_with_one_changed_weight_is_not_shared(tiny, teacher, tmp_path):
    other = load_student(str(tiny.teacher))
    with torch.no_grad():
        other.parts()["vision_tower"].encoder.layers[1].mlp.fc2.weight[3, 5] += 1e-3
    save_model(other, tmp_path / "other", template="chatml")
    pair = align(student_of(tiny, vision_tower=str(tmp_path / "other")), teacher)
    assert not pair.shared_tower
    assert "each model runs its own" in pair.note


def test_one_tower_read_at_two_layers_is_not_shared(tiny, teacher):
    assert not align(student_of(tiny, vision_feature_layer=-1), teacher).shared_tower


def test_unequal_numbers_of_visual_tokens_are_refused_with_both_numbers(tiny, teacher):
    with pytest.raises(UserError, match=r"student 15, teacher 16"):
        align(student_of(tiny, vision_feature_select_strategy="default"), teacher)


def test_different_tokenizers_are_refused_with_the_first_id_that_differs(tiny, teacher, tmp_path):
    names = {}

    def swap(tree):
        vocabulary = tree["model"]["vocab"]
        by_id = {index: token for token, index in vocabulary.items()}
        names.update({index: by_id[index] for index in (40, 41)})
        vocabulary[by_id[40]], vocabulary[by_id[41]] = 41, 40

    folder = copy_with(tiny, tmp_path, "tokenizer.json", swap)
    with pytest.raises(UserError) as refusal:
        align(student_of(tiny, language_model=folder), teacher)
    assert f"id 40 is {names[41]!r} for the student and {names[40]!r} for the teacher" in str(refusal.value)


@pytest.mark.parametrize("wider", ["student", "teacher"])
def test_padded_heads_of_unequal_width_share_the_ids_of_the_tokenizer(tiny, teacher, tmp_path, wider):
    ids = len(teacher.tokenizer)
    assert ids + 9 < len(teacher.head)
    rows = len(teacher.head) + 64 if wider == "student" else ids + 9
    folder = copy_with(tiny, tmp_path, "config.json", lambda tree: tree.update(vocab_size=rows))
    student = student_of(tiny, language_model=folder)
    assert len(student.head) == rows
    assert align(student, teacher).vocab_size == ids == len(student.tokenizer)


def test_the_picture_mark_may_have_another_id_or_none(tiny, teacher, tmp_path):
    """A student whose tokenizer has no picture mark gets one after all others; the ids before it are shared."""

    def rename(tree):
        for token in tree["added_tokens"]:
            if token["content"] == "<image>":
                token["content"] = "<|spare|>"
        tree["model"]["vocab"]["<|spare|>"] = tree["model"]["vocab"].pop("<image>")

    folder = copy_with(tiny, tmp_path, "tokenizer.json", rename)
    settings = Path(folder) / "tokenizer_config.json"
    settings.write_text(settings.read_text().replace("<image>", "<|spare|>"))
    student = student_of(tiny, language_model=folder)
    assert student.image_token_id != teacher.image_token_id
    assert align(student, teacher).vocab_size == len(teacher.tokenizer)


@pytest.mark.parametrize(
    ("key", "value"), [("image_mean", [0.4, 0.5, 0.5]), ("resample", 2), ("do_normalize", False), ("rescale_factor", 1)]
)
def test_with_unequal_image_processors_no_tower_is_shared_and_each_model_gets_its_own_pixels(
    tiny, teacher, tmp_path, key, value
):
    shutil.copytree(tiny.teacher, tmp_path / "tower")
    file = tmp_path / "tower" / "processor_config.json"
    tree = json.loads(file.read_text())
    assert tree["image_processor"].get(key) != value
    tree["image_processor"][key] = value
    file.write_text(json.dumps(tree))
    pair = align(student_of(tiny, vision_tower=str(tmp_path / "tower")), teacher)
    assert not pair.shared_pixels
    assert not pair.shared_tower
    assert f"each model gets its own pixels (image processors differ in {key})" in pair.note


def test_a_crop_makes_other_pixels():
    square = CLIPImageProcessorPil(size={"height": 8, "width": 8}, do_center_crop=False)
    cropped = CLIPImageProcessorPil(
        size={"height": 8, "width": 8}, do_center_crop=True, crop_size={"height": 4, "width": 4}
    )
    student, teacher = (stub(processor, ["a", "<image>"], rows=4, width=8) for processor in (square, cropped))
    assert not align(student, teacher).shared_pixels
    assert align(student, student).shared_pixels


def test_a_run_whose_models_see_unequal_pixels_says_so(tiny, command, tmp_path):
    shutil.copytree(tiny.teacher, tmp_path / "tower")
    file = tmp_path / "tower" / "processor_config.json"
    file.write_text(file.read_text().replace('"resample": 3', '"resample": 2'))
    tree = tiny.tree()
    tree["stages"] = tree["stages"][:1]
    changes = [f"student.vision_tower={tmp_path / 'tower'}", "stages.dpt.epochs=0.1"]
    done = command("train", tiny.recipe(tmp_path / "r.yaml", tree), *changes, "--out", tmp_path / "run")
    assert done.code == 0, done.err
    assert "image processors differ in resample" in done.err


# The widths of the true pair: Qwen2.5-0.5B has 151,936 head rows, the larger Qwen2.5 models have 152,064.
WORDS, STUDENT_ROWS, TEACHER_ROWS = 151_665, 151_936, 152_064


def stub(processor, words: list[str], *, rows: int, width: int) -> VisionLanguageModel:
    """A whole model of one layer, its tokenizer a list of words."""
    text = Qwen2Config(
        vocab_size=rows,
        hidden_size=width,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=False,
        initializer_range=0.5,
    )
    vision = SiglipVisionConfig(
        hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    torch.manual_seed(rows)
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=len(words) - 1,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
        image_seq_length=4,
        tie_word_embeddings=False,
    )
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(vocabulary, unk_token=words[0])))
    model = LlavaForConditionalGeneration(config)
    return VisionLanguageModel(model=model, tokenizer=tokenizer, image_processor=processor)


def vocabulary_of(words: list[str]) -> SimpleNamespace:
    """What the check asks of a tokenizer."""
    return SimpleNamespace(get_vocab=lambda: {word: index for index, word in enumerate(words)})


@pytest.fixture(scope="module")
def words():
    return [f"w{index}" for index in range(WORDS)] + ["<image>"]


@pytest.fixture(scope="module")
def true_pair(words):
    processor = SiglipImageProcessorPil(size={"height": 8, "width": 8})
    return tuple(
        stub(processor, words, rows=rows, width=width) for rows, width in ((STUDENT_ROWS, 8), (TEACHER_ROWS, 12))
    )


def test_a_pair_of_the_true_widths_distils_over_the_shared_ids_only(true_pair):
    student, teacher = true_pair
    pair = align(student, teacher)
    shared = WORDS + 1
    assert pair.vocab_size == shared
    assert f"{STUDENT_ROWS - shared} of the student's {STUDENT_ROWS}" in pair.note
    assert f"{TEACHER_ROWS - shared} of the teacher's {TEACHER_ROWS}" in pair.note
    ids = torch.tensor([[5, *[WORDS] * 4, 151_600, 77, 151_664], [9, *[WORDS] * 4, 3, 151_000, 12]])
    visual = ids == WORDS
    labels = ids.where(torch.arange(8) > 5, -100)
    features = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(1))
    hidden = final_hidden(student.model, ids, torch.ones_like(ids), visual, features)
    taught = final_hidden(teacher.model, ids, torch.ones_like(ids), visual, features)
    weights = LossConfig(ce=1.0, response_kl=1.0, visual_kl=1.0, relation=0.5)

    def run():
        hidden.retain_grad()
        student.model.zero_grad()
        hidden.grad = None
        counts = Counts(samples=2, response_tokens=4, visual_tokens=8, images=2)
        rows = {"labels": labels, "visual": visual, "image_rows": torch.tensor([0, 1]), "counts": counts}
        result = objective(
            hidden, student.head, taught, teacher.head, **rows, losses=weights, reduction="sample", vocab_size=shared
        )
        result.total.backward(retain_graph=True)
        return result, hidden.grad.clone(), student.head.grad.clone()

    result, to_hidden, to_head = run()
    leaf, head = hidden.detach().double().requires_grad_(), student.head.detach().double().requires_grad_()
    ours = leaf @ head[:shared].T
    theirs = taught.double() @ teacher.head[:shared].double().T
    kl = (theirs.softmax(-1) * (theirs.log_softmax(-1) - ours.log_softmax(-1))).sum(-1)
    expected = dict.fromkeys(weights.weights, 0.0)
    for row in range(2):
        for place in (5, 6):
            expected["ce"] -= ours[row, place].log_softmax(-1)[labels[row, place + 1]] / 4
            expected["response_kl"] += kl[row, place] / 4
        expected["visual_kl"] += kl[row, 1:5].mean() / 2
        a, b = (z[row, 1:5] @ z[row, 1:5].T for z in (ours, theirs))
        expected["relation"] += (1 - (a * b).sum() / (a.norm() * b.norm())) / 2
    sum(weights.weights[name] * value for name, value in expected.items()).backward()
    for name, value in expected.items():
        assert float(result.parts[name]) == pytest.approx(value.item(), rel=1e-3), name
    for got, wanted in ((to_hidden, leaf.grad), (to_head, head.grad)):
        assert (got.double() - wanted).norm() < 1e-3 * wanted.norm()
    assert not to_head[shared:].any()
    with torch.no_grad():
        for model in true_pair:
            model.head[shared:] = 1e4
    again, *gradients = run()
    assert torch.equal(again.total, result.total)
    assert torch.equal(gradients[0], to_hidden)


def test_tokenizers_of_the_true_width_that_part_at_the_last_word_are_refused_with_its_id(words):
    other = vocabulary_of([*words[:-2], "other", "<image>"])
    with pytest.raises(UserError, match=r"id 151664 is 'w151664' for the student and 'other' for the teacher"):
        shared_vocabulary(vocabulary_of(words), other, min(STUDENT_ROWS, TEACHER_ROWS))


def test_a_last_id_that_is_the_picture_mark_to_one_and_a_word_to_the_other_is_not_shared(words):
    longer = vocabulary_of([*words[:-1], "tool", "<image>"])
    assert shared_vocabulary(vocabulary_of(words), longer, min(STUDENT_ROWS, TEACHER_ROWS)) == WORDS
