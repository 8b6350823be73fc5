"""Answers do not depend on who is in the batch, and what is written is what was said."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from llavakd.config import DataConfig, EvaluationConfig, TeacherConfig
from llavakd.data.pictures import load_pixels
from llavakd.data.samples import load_samples
from llavakd.errors import UserError
from llavakd.evaluate import evaluate_model, generate_answers
from llavakd.models.student import load_teacher


@pytest.fixture(scope="module")
def model(tiny):
    return load_teacher(TeacherConfig(path=str(tiny.teacher), dtype="float32"))


@pytest.fixture(scope="module")
def data(tiny):
    return DataConfig(path=str(tiny.mixed), images=str(tiny.world / "images"), template="chatml", max_length=400)


def asking(batch_size: int, max_new_tokens: int) -> EvaluationConfig:
    return EvaluationConfig(data="", batch_size=batch_size, max_new_tokens=max_new_tokens)


def say_alone(model, data, sample) -> str:
    """Greedy decoding by hand: one row, no padding, no cache, one forward a token."""
    ids = model.renderer(data).render_prompt(sample)
    pixels = load_pixels(data, sample.images, model.image_processor) if sample.images else None
    said: list[int] = []
    end = model.tokenizer.convert_tokens_to_ids("<|im_end|>")
    for _ in range(6):
        with torch.no_grad():
            logits = model.model(input_ids=torch.tensor([ids + said]), pixel_values=pixels, use_cache=False).logits
        said.append(int(logits[0, -1].argmax()))
        if said[-1] == end:
            break
    return model.tokenizer.decode(said, skip_special_tokens=True).strip()


@pytest.mark.parametrize("batch_size", [1, 5, 32])
def test_batched_answers_equal_greedy_decoding_of_each_row_alone(model, data, batch_size):
    samples = [s for count in (0, 1, 2) for s in load_samples(data) if len(s.images) == count]
    samples = samples[::3]
    lengths = {len(model.renderer(data).render_prompt(sample)) for sample in samples}
    assert len(lengths) > 4  # padding there is
    answers = generate_answers(model, samples, data, asking(batch_size, 6), "")
    assert [answer.sample for answer in answers] == samples
    assert [answer.prediction for answer in answers] == [say_alone(model, data, sample) for sample in samples]
    assert len({answer.prediction for answer in answers}) > 3


def test_an_answer_ends_at_the_end_token_of_the_template(model, data):
    """Make the end token the likeliest everywhere: every answer is then empty."""
    end = model.tokenizer.convert_tokens_to_ids("<|im_end|>")
    hook = model.model.lm_head.register_forward_hook(
        lambda module, inputs, output: output.index_fill(-1, torch.tensor([end]), 1e4)
    )
    answers = generate_answers(model, load_samples(data)[:3], data, asking(3, 6), "")
    hook.remove()
    assert [answer.prediction for answer in answers] == ["", "", ""]


def test_generation_leaves_the_training_mode_as_it_was(model, data):
    for mode in (True, False):
        model.model.train(mode)
        generate_answers(model, load_samples(data)[:1], data, asking(1, 1), "")
        assert model.model.training == mode


def test_evaluation_writes_every_answer_and_scores_what_it_wrote(model, tiny, tmp_path):
    images = str(tiny.world / "images")
    data = DataConfig(path=str(tiny.world / "test.json"), images=images, template="chatml", max_length=400)
    samples = load_samples(data)
    row = evaluate_model(
        model, samples, data, EvaluationConfig(data="test", batch_size=5, max_new_tokens=3), tmp_path, name="it"
    )
    lines = [json.loads(line) for line in (tmp_path / "it" / "predictions.jsonl").read_text().splitlines()]
    truth = json.loads((tiny.world / "test.json").read_text())
    assert len(lines) == len(truth) == 12
    for line, source in zip(lines, truth, strict=True):
        assert (line["id"], line["type"]) == (source["id"], source["type"])
        assert line["images"] == [str((tiny.world / "images" / source["image"]).resolve())]
        assert line["question"] == source["conversations"][0]["value"].removeprefix("<image>\n")
        assert line["truth"] == source["conversations"][1]["value"]
        assert line["correct"] == (line["prediction"].casefold() == line["truth"].casefold())
    answers = generate_answers(model, samples, data, asking(12, 3), "")
    assert [line["prediction"] for line in lines] == [answer.prediction for answer in answers]
    assert row["name"] == "it"
    assert row["n"] == 12
    assert row["accuracy"] == sum(line["correct"] for line in lines) / 12
    assert set(row["by_type"]) == {source["type"] for source in truth}
    assert row["parameters"] == sum(p.numel() for p in model.model.parameters())
    gram = np.load(tmp_path / "it" / "gram.npy")
    assert gram.shape == (16, 16)
    pixels = load_pixels(data, samples[0].images, model.image_processor)
    ids = torch.tensor([model.renderer(data).render_prompt(samples[0])])
    with torch.no_grad():
        logits = model.model(input_ids=ids, pixel_values=pixels).logits[ids == model.image_token_id].double()
    np.testing.assert_allclose(gram, logits @ logits.T, rtol=1e-4, atol=1e-3)
    assert json.loads((tmp_path / "probe.json").read_text())["id"] == truth[0]["id"]


def test_a_soft_score_is_written_for_every_answer(model, tiny, tmp_path):
    images = str(tiny.world / "images")
    data = DataConfig(path=str(tiny.world / "test.json"), images=images, template="chatml", max_length=400)
    samples = load_samples(data)[:4]
    said = generate_answers(model, samples, data, asking(4, 3), "")
    word = said[0].prediction
    others = tuple(f"other{number}" for number in range(10))
    samples = [
        dataclasses.replace(sample, answers=(word,) * count + others[count:])
        for sample, count in zip(samples[:1] * 4, (0, 1, 2, 4), strict=True)
    ]
    evaluation = EvaluationConfig(data="test", metric="vqa_accuracy", batch_size=1, max_new_tokens=3)
    row = evaluate_model(model, samples, data, evaluation, tmp_path, name="it")
    lines = [json.loads(line) for line in (tmp_path / "it" / "predictions.jsonl").read_text().splitlines()]
    assert [line["score"] for line in lines] == pytest.approx([0, 0.3, 0.6, 1])
    assert [line["correct"] for line in lines] == [False, False, True, True]
    assert row["accuracy"] == pytest.approx(1.9 / 4)
    assert row["metric"] == "vqa_accuracy"
    assert "segments" not in row


def test_a_truth_that_the_metric_cannot_read_is_refused_before_anything_is_answered(model, tiny, tmp_path, monkeypatch):
    data = DataConfig(path=str(tiny.world / "test.json"), images=str(tiny.world / "images"), template="chatml")
    monkeypatch.setattr("llavakd.evaluate.generate_answers", None)
    evaluation = EvaluationConfig(data="test", metric="option_letter")
    with pytest.raises(UserError, match=r"row .* the metric takes"):
        evaluate_model(model, load_samples(data), data, evaluation, tmp_path, name="it")
