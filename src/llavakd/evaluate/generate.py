"""Batched greedy answers to a LLaVA-format question file."""

from collections.abc import Sequence
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
    said: dict[int, str] = {}
    training = model.model.training
    model.model.eval()
    with bar(label, len(samples), shown=shown) as advance:
        for start in range(0, len(order), batch_size):
            chunk = order[start : start + batch_size]
            names = [name for index in chunk for name in samples[index].images]
            pixels = load_pixels(data.images or "", names, model.image_processor) if names else None
            ids = [prompts[index] for index in chunk]
            texts = _answer_batch(model, ids, pixels, max_new_tokens=max_new_tokens, eos_token_id=renderer.end_token_id)
            said |= zip(chunk, texts, strict=True)
            advance(len(said))
    model.model.train(training)
    return [Answer(sample=sample, prediction=said[index]) for index, sample in enumerate(samples)]


@torch.no_grad()
def _answer_batch(
    model: VisionLanguageModel, prompts: Sequence[Sequence[int]], pixels: Tensor | None, **options: Any
) -> list[str]:
    device, pad = model.model.device, model.tokenizer.pad_token_id
    length = max(map(len, prompts))
    # Generation appends on the right, so prompts are padded on the left.
    ids = torch.tensor([[pad] * (length - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    if pixels is not None:
        options["pixel_values"] = pixels.to(device, model.model.dtype)
    output = model.model.generate(input_ids=ids, attention_mask=mask, do_sample=False, pad_token_id=pad, **options)
    return [text.strip() for text in model.tokenizer.batch_decode(output[:, length:], skip_special_tokens=True)]
