"""Batched greedy answers to a LLaVA-format question file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llavakd.config import DataConfig
from llavakd.data.chat import ChatRenderer
from llavakd.data.collate import load_pixels
from llavakd.data.samples import Sample
from llavakd.models.student import VisionLanguageModel
from llavakd.progress import bar


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One question, its truth and what the model said."""

    sample: Sample
    prediction: str

    @property
    def question(self) -> str:
        """The last human turn."""
        return self.sample.turns[-2].text

    @property
    def truth(self) -> str:
        """The answer in the file."""
        return self.sample.turns[-1].text


def make_renderer(model: VisionLanguageModel, data: DataConfig) -> ChatRenderer:
    """The chat renderer of a data source for a model."""
    return ChatRenderer(
        data.template,
        model.tokenizer,
        image_token_id=model.image_token_id,
        tokens_per_image=model.tokens_per_image,
        max_length=data.max_length,
    )


def generate_answers(
    model: VisionLanguageModel,
    samples: Sequence[Sample],
    data: DataConfig,
    *,
    batch_size: int,
    max_new_tokens: int,
    label: str,
    shown: bool = True,
) -> list[Answer]:
    """Answer the last question of each sample, greedily, in the samples' order."""
    renderer = make_renderer(model, data)
    prompts = [renderer.render_prompt(sample) for sample in samples]
    order = sorted(range(len(samples)), key=lambda index: -len(prompts[index]))
    answers: dict[int, Answer] = {}
    training = model.model.training
    model.model.eval()
    with bar(label, len(samples), shown=shown) as advance:
        for chunk in _chunks(order, batch_size):
            texts = _answer_batch(
                model,
                [prompts[i] for i in chunk],
                [samples[i] for i in chunk],
                data,
                max_new_tokens,
                renderer.end_token_id,
            )
            answers |= {i: Answer(sample=samples[i], prediction=text) for i, text in zip(chunk, texts, strict=True)}
            advance(len(answers))
    model.model.train(training)
    return [answers[index] for index in range(len(samples))]


@torch.no_grad()
def _answer_batch(
    model: VisionLanguageModel,
    prompts: Sequence[Sequence[int]],
    samples: Sequence[Sample],
    data: DataConfig,
    max_new_tokens: int,
    end_token_id: int,
) -> list[str]:
    device = model.model.device
    length = max(map(len, prompts))
    pad = model.tokenizer.pad_token_id
    # Generation appends on the right, so prompts are padded on the left.
    ids = torch.tensor([[pad] * (length - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    options: dict[str, Any] = {}
    pixels = _pixels(model, samples, data)
    if pixels is not None:
        options["pixel_values"] = pixels.to(device, model.model.dtype)
    output = model.model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=end_token_id,
        pad_token_id=pad,
        **options,
    )
    return [text.strip() for text in model.tokenizer.batch_decode(output[:, length:], skip_special_tokens=True)]


def _pixels(model: VisionLanguageModel, samples: Sequence[Sample], data: DataConfig) -> Tensor | None:
    parts = [
        load_pixels(data.images or "", sample.images, model.image_processor) for sample in samples if sample.images
    ]
    return torch.cat(parts) if parts else None


def _chunks(order: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    for start in range(0, len(order), size):
        yield order[start : start + size]
