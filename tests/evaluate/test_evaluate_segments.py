"""Distance to the teacher against a float64 oracle written from the formulas, on stock logits of whole rows."""

import numpy as np
import pytest
import torch

import llavakd.evaluate
from llavakd.config import DataConfig, StudentConfig, TeacherConfig
from llavakd.data.chat import Segment
from llavakd.data.pictures import load_pixels
from llavakd.data.samples import load_samples
from llavakd.evaluate import compare_segments
from llavakd.models.alignment import align
from llavakd.models.student import build_student, load_teacher


@pytest.fixture(scope="module")
def teacher(tiny):
    return load_teacher(TeacherConfig(path=str(tiny.teacher), dtype="float32"))


@pytest.fixture(scope="module")
def student(tiny):
    student = build_student(StudentConfig(**tiny.tree()["student"]), seed=5)
    student.model.requires_grad_(False).eval()
    return student


@pytest.fixture(scope="module")
def data(tiny):
    return DataConfig(path=str(tiny.mixed), images=str(tiny.world / "images"), template="chatml", max_length=400)


def log_probabilities(model, ids, pixels, shared) -> np.ndarray:
    with torch.no_grad():
        logits = model.model(input_ids=ids, pixel_values=pixels).logits[0, :, :shared].double().numpy()
    return logits - np.log(np.exp(logits).sum(1, keepdims=True))


def by_hand(student, teacher, samples, data) -> dict[str, list[tuple[float, float, float]]]:
    """(KL, equal likeliest id, teacher entropy) of every position: pictures as they are, answers one to the left."""
    shared = align(student, teacher).vocab_size
    found = {"response": [], "visual": []}
    for sample in samples:
        text = student.renderer(data).render(sample)
        pixels = load_pixels(data, sample.images, student.image_processor) if sample.images else None
        ids = torch.tensor([text.ids])
        mine = log_probabilities(student, ids, pixels, shared)
        ids = ids.masked_fill(ids == student.image_token_id, teacher.image_token_id)
        theirs = log_probabilities(teacher, ids, pixels, shared)
        for place, (q, p) in enumerate(zip(mine, theirs, strict=True)):
            kl, entropy = (np.exp(p) * (p - q)).sum(), -(np.exp(p) * p).sum()
            values = (kl, float(np.argmax(q) == np.argmax(p)), entropy)
            if text.segments[place + 1 : place + 2] == [Segment.RESPONSE]:
                found["response"].append(values)
            if text.ids[place] == student.image_token_id:
                found["visual"].append(values)
    return found


def test_kl_agreement_and_entropy_by_segment_are_those_of_full_float64_logits(student, teacher, data):
    samples = [sample for count in (0, 1, 2) for sample in load_samples(data) if len(sample.images) == count][::6]
    assert {len(sample.images) for sample in samples} == {0, 1, 2}
    found = compare_segments(student, teacher, samples, data)
    expected = by_hand(student, teacher, samples, data)
    assert set(found) == {"response", "visual"}
    for segment, rows in expected.items():
        means = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
        assert found[segment]["positions"] == len(rows) > 10
        assert found[segment]["kl"] == pytest.approx(means[0], rel=1e-5)
        assert found[segment]["agreement"] == pytest.approx(means[1], abs=1e-12)
        assert found[segment]["teacher_entropy"] == pytest.approx(means[2], rel=1e-5)
    assert found["visual"]["positions"] == 16 * sum(len(sample.images) for sample in samples)
    assert found["response"]["kl"] > 0.01


def test_chunks_change_nothing_and_no_logits_of_a_whole_row_are_made(student, teacher, data, monkeypatch):
    samples = load_samples(data)[:4]
    whole = compare_segments(student, teacher, samples, data)
    rows, plain = [], torch.nn.functional.log_softmax

    def watched(logits, dim):
        rows.append(len(logits))
        return plain(logits, dim=dim)

    monkeypatch.setattr(torch.nn.functional, "log_softmax", watched)
    monkeypatch.setattr(llavakd.evaluate, "rows_at_once", lambda vocab_size, gradient_bytes, device: 7)
    chunked = compare_segments(student, teacher, samples, data)
    assert max(rows) == 7
    for segment, values in whole.items():
        assert chunked[segment] == pytest.approx(values, rel=1e-6)


def test_a_model_agrees_with_itself(teacher, data):
    found = compare_segments(teacher, teacher, load_samples(data)[:3], data)
    for segment in ("response", "visual"):
        assert found[segment]["kl"] == pytest.approx(0, abs=1e-9)
        assert found[segment]["agreement"] == 1
        assert found[segment]["teacher_entropy"] > 0


def test_rows_without_pictures_have_no_visual_segment(student, teacher, data):
    samples = [sample for sample in load_samples(data) if not sample.images]
    assert set(compare_segments(student, teacher, samples, data)) == {"response"}


def test_a_long_file_is_sampled_evenly(student, teacher, data, monkeypatch):
    samples = load_samples(data)
    monkeypatch.setattr(llavakd.evaluate, "_COMPARED_ROWS", 5)
    found = compare_segments(student, teacher, samples, data)
    assert len(samples) == 32
    monkeypatch.undo()
    assert found == compare_segments(student, teacher, [samples[index] for index in (0, 6, 12, 19, 25)], data)
