"""Generation, scoring and what the report needs to see of a model."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llavakd.config import DataConfig, EvaluationConfig
from llavakd.data.chat import Segment
from llavakd.data.pictures import load_pixels
from llavakd.data.samples import Sample
from llavakd.evaluate.generate import Answer, generate_answers, make_renderer
from llavakd.evaluate.scoring import is_correct, score
from llavakd.losses import gram
from llavakd.models.student import VisionLanguageModel, final_hidden, vision_features

__all__ = ["Answer", "evaluate_model", "generate_answers", "is_correct", "score"]


def evaluate_model(
    model: VisionLanguageModel,
    samples: Sequence[Sample],
    data: DataConfig,
    evaluation: EvaluationConfig,
    folder: Path,
    *,
    name: str,
) -> dict[str, Any]:
    """Answer, score and write FOLDER/NAME/predictions.jsonl and gram.npy; returns the scores of one results row."""
    sizes: dict[str, Any] = {"batch_size": evaluation.batch_size, "max_new_tokens": evaluation.max_new_tokens}
    answers = generate_answers(model, samples, data, **sizes, label=f"evaluate {name}")
    place = folder / name
    place.mkdir(parents=True, exist_ok=True)
    with (place / "predictions.jsonl").open("w", encoding="utf-8") as file:
        for answer in answers:
            line = {
                "id": answer.sample.id,
                "type": answer.sample.type,
                "images": _paths(answer.sample, data),
                "question": answer.sample.turns[-2].text,
                "truth": answer.truth,
                "prediction": answer.prediction,
                "correct": is_correct(answer.prediction, answer.truth),
            }
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    probe = next((sample for sample in samples if sample.images), None)
    if probe is not None:
        np.save(place / "gram.npy", probe_gram(model, probe, data))
        (folder / "probe.json").write_text(
            json.dumps({"id": probe.id, "images": _paths(probe, data)}), encoding="utf-8"
        )
    return {"name": name, **score(answers), "parameters": sum(weight.numel() for weight in model.model.parameters())}


@torch.no_grad()
def probe_gram(model: VisionLanguageModel, sample: Sample, data: DataConfig) -> np.ndarray:
    """Gram matrix [N, N] of the vocabulary logits at the first picture's positions, as the relation loss sees it."""
    text = make_renderer(model, data).render(sample)
    device = model.model.device
    ids = torch.tensor([text.ids], device=device)
    visual = torch.tensor([text.segments], device=device) == Segment.VISUAL
    pixels = load_pixels(data, sample.images, model.image_processor).to(device, model.model.dtype)
    hidden = final_hidden(model.model, ids, torch.ones_like(ids), visual, vision_features(model.model, pixels))
    return gram(hidden[visual][None, : model.tokens_per_image], model.head)[0].cpu().numpy()


def _paths(sample: Sample, data: DataConfig) -> list[str]:
    return [str(Path(data.images or "").resolve() / name) for name in sample.images]
