"""Batched greedy answers to a LLaVA-format question file."""

from collections.abc import Sequence
from typing import NamedTuple

from llavakd.config import DataConfig
from llavakd.data.pictures import load_pixels
from llavakd.data.samples import Sample
from llavakd.models.student import VisionLanguageModel
from llavakd.progress import bar


class Answer(NamedTuple):
    """One question, its truth and what the model said."""

    sample: Sample
    prediction: str

    @property
    def truth(self) -> str:
        """The answer in the file."""
        return self.sample.turns[-1].text


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
    renderer = model.renderer(data)
    prompts = [renderer.render_prompt(sample) for sample in samples]
    order = sorted(range(len(samples)), key=lambda index: -len(prompts[index]))
    said: dict[int, str] = {}
    training, device, tokenizer = model.model.training, model.model.device, model.tokenizer
    ends = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": renderer.end_token_id}
    model.model.eval()
    with bar(label, len(samples), shown=shown) as advance:
        for start in range(0, len(order), batch_size):
            chunk = order[start : start + batch_size]
            # Generation appends on the right, so prompts are padded on the left.
            ids = {"input_ids": [prompts[index] for index in chunk]}
            inputs = tokenizer.pad(ids, padding_side="left", return_attention_mask=True, return_tensors="pt").to(device)
            if names := [name for index in chunk for name in samples[index].images]:
                pixels = load_pixels(data, names, model.image_processor)
                inputs["pixel_values"] = pixels.to(device, model.model.dtype)
            output = model.model.generate(**inputs, **ends, do_sample=False, max_new_tokens=max_new_tokens)
            texts = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            said |= zip(chunk, (text.strip() for text in texts), strict=True)
            advance(len(said))
    model.model.train(training)
    return [Answer(sample=sample, prediction=said[index]) for index, sample in enumerate(samples)]
