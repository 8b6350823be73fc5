"""Generation, scoring and what the report needs to see of a model."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from llavakd.config import DataConfig, EvaluationConfig
from llavakd.data.chat import Rendered, Segment
from llavakd.data.pictures import load_pixels
from llavakd.data.samples import Sample
from llavakd.evaluate.scoring import METRICS, Answer, score
from llavakd.losses import gram
from llavakd.losses.rows import rows_at_once
from llavakd.models.alignment import align
from llavakd.models.student import VisionLanguageModel, final_hidden, vision_features
from llavakd.progress import bar

_COMPARED_ROWS = 256  # at most, spread evenly over the file


@torch.no_grad()
def evaluate_model(
    model: VisionLanguageModel,
    samples: Sequence[Sample],
    data: DataConfig,
    evaluation: EvaluationConfig,
    folder: Path,
    *,
    name: str,
    teacher: VisionLanguageModel | None = None,
) -> dict[str, Any]:
    """Answer, score, write FOLDER/NAME/predictions.jsonl and gram.npy; returns a results row, of a pair with `segments`."""
    metric, images = METRICS[evaluation.metric], Path(data.images or "").resolve()
    for sample in samples:  # refuses a truth that the metric cannot read before anything is answered
        metric(Answer(sample=sample, prediction=""))
    answers = generate_answers(model, samples, data, evaluation, f"evaluate {name}")
    (place := folder / name).mkdir(parents=True, exist_ok=True)
    with (place / "predictions.jsonl").open("w", encoding="utf-8") as file:
        for answer in answers:
            value, sample = metric(answer), answer.sample
            line = {"id": sample.id, "type": sample.type, "images": [str(images / name) for name in sample.images]}
            texts = {"question": sample.turns[-2].text, "truth": answer.truth, "prediction": answer.prediction}
            marks = {"correct": value >= 0.5}  # of a soft score: at least two of ten people say the same
            soft = {"score": value} if evaluation.metric == "vqa_accuracy" else {}
            file.write(json.dumps({**line, **texts, **marks, **soft}, ensure_ascii=False) + "\n")
    if probe := next((sample for sample in samples if sample.images), None):
        text = model.renderer(data).render(probe)
        hidden = _hidden(model, text, probe, data)[torch.tensor(text.segments) == Segment.VISUAL]
        # [N, N], of the vocabulary logits at the first picture's positions, as the relation loss sees it.
        np.save(place / "gram.npy", gram(hidden[None, : model.tokens_per_image], model.head)[0].cpu().numpy())
        shown = json.dumps({"id": probe.id, "images": [str(images / name) for name in probe.images]})
        (folder / "probe.json").write_text(shown, encoding="utf-8")
    scores = {"name": name, "metric": evaluation.metric, **score(answers, evaluation.metric)}
    if teacher:
        scores["segments"] = compare_segments(model, teacher, samples, data)
    return scores | {"parameters": model.model.num_parameters()}


def generate_answers(
    model: VisionLanguageModel, samples: Sequence[Sample], data: DataConfig, evaluation: EvaluationConfig, label: str
) -> list[Answer]:
    """Answer the last question of each sample, greedily, in the samples' order; without a label no bar is shown."""
    renderer = model.renderer(data)
    prompts = [renderer.render_prompt(sample) for sample in samples]
    order = sorted(range(len(samples)), key=lambda index: -len(prompts[index]))
    said: dict[int, str] = {}
    training, device, tokenizer = model.model.training, model.model.device, model.tokenizer
    ends = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": renderer.end_token_id}
    model.model.eval()
    with bar(label, len(samples), shown=bool(label)) as advance:
        for start in range(0, len(order), evaluation.batch_size):
            chunk = order[start : start + evaluation.batch_size]
            # Generation appends on the right, so prompts are padded on the left.
            ids = {"input_ids": [prompts[index] for index in chunk]}
            inputs = tokenizer.pad(ids, padding_side="left", return_attention_mask=True, return_tensors="pt").to(device)
            if names := [name for index in chunk for name in samples[index].images]:
                inputs["pixel_values"] = load_pixels(data, names, model.image_processor).to(device, model.model.dtype)
            output = model.model.generate(**inputs, **ends, do_sample=False, max_new_tokens=evaluation.max_new_tokens)
            texts = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            said |= zip(chunk, (text.strip() for text in texts), strict=True)
            advance(len(said))
    model.model.train(training)
    return [Answer(sample=sample, prediction=said[index]) for index, sample in enumerate(samples)]


@torch.no_grad()
def compare_segments(
    student: VisionLanguageModel, teacher: VisionLanguageModel, samples: Sequence[Sample], data: DataConfig
) -> dict[str, dict[str, float]]:
    """Student against teacher on up to 256 whole rows, answers included, as training renders them.

    By segment, `response` (at the positions that predict it) and `visual`, where there are such: `kl`, mean KL(teacher ||
    student) in nats; `agreement`, share of equal likeliest ids; `teacher_entropy`, mean in nats; `positions`, how many.
    """
    shared, renderer = align(student, teacher).vocab_size, student.renderer(data)
    heads = [model.head[:shared].float() for model in (student, teacher)]
    chunk = rows_at_once(shared, 4, heads[0].device.type)
    found: dict[str, list[Tensor]] = {"response": [], "visual": []}
    for index in range(count := min(_COMPARED_ROWS, len(samples))):
        sample = samples[index * len(samples) // count]
        text = renderer.render(sample)
        segments = torch.tensor(text.segments)
        hidden = (_hidden(model, text, sample, data).split(chunk) for model in (student, teacher))
        rows: list[Tensor] = []
        for states in zip(*hidden, strict=True):
            logq, logp = (F.log_softmax(x.float() @ head.T, dim=-1) for x, head in zip(states, heads, strict=True))
            p, same = logp.exp(), logq.argmax(-1) == logp.argmax(-1)
            rows.append(torch.stack([(p * (logp - logq)).sum(-1), same, -(p * logp).sum(-1)], dim=1).double().cpu())
        table = torch.cat(rows)  # [T, 3]
        found["response"].append(table[:-1][segments[1:] == Segment.RESPONSE])
        found["visual"].append(table[segments == Segment.VISUAL])
    names = ("kl", "agreement", "teacher_entropy", "positions")
    tables = {segment: torch.cat(parts) for segment, parts in found.items() if any(map(len, parts))}
    return {key: dict(zip(names, [*rows.mean(0).tolist(), len(rows)], strict=True)) for key, rows in tables.items()}


def _hidden(model: VisionLanguageModel, text: Rendered, sample: Sample, data: DataConfig) -> Tensor:
    """Final hidden states [T, D] of one row, its pictures through the model's own processor and tower."""
    row, segments = torch.tensor([[text.ids], [text.segments]], device=model.model.device)
    features = None
    if sample.images:
        pixels = load_pixels(data, sample.images, model.image_processor)
        features = vision_features(model.model, pixels.to(row.device, model.model.dtype))
    return final_hidden(model.model, row, torch.ones_like(row), segments == Segment.VISUAL, features)[0]
