"""Write the world's small model parts as transformers folders without weights: tower, two language models, tokenizer.

    python recipes/shapes/make_parts.py OUT

The tokenizer follows the wording of captions and questions; the parts in the package keep the one that the assets were
trained with.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Config, SiglipImageProcessorPil, SiglipVisionConfig

from llavakd.data.chat import TEMPLATES
from llavakd.data.samples import IMAGE_TAG
from llavakd.shapes.questions import ask_several
from llavakd.shapes.scenes import caption, scene_in

VOCAB_SIZE = 640
_END = "<|endoftext|>"
_SPECIAL = [_END, "<|im_start|>", "<|im_end|>", IMAGE_TAG]
# A little plain English, so that words from outside the world do not fall apart into single letters.
_ENGLISH = (
    "there is are a an the one two three four five of in on at with and or not no yes this that it its has have all each every "
    "only exactly least most more less than box boxes item items object objects touching edge wall base side picture image "
    "question answer true false statement describe what where which who how many much color colour shape line top bottom left "
    "right above below between near other same different another any some contains containing black white red green blue yellow"
)


def write_parts(folder: Path, *, seed: int = 0) -> None:
    """Write FOLDER/{tower,teacher-lm,student-lm}: configs, image processor and tokenizer, no weights."""
    SiglipVisionConfig(
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=48,
        patch_size=16,
        vision_use_head=False,
    ).save_pretrained(folder / "tower")
    SiglipImageProcessorPil(size={"height": 48, "width": 48}).save_pretrained(folder / "tower")
    tokenizer = train_tokenizer(seed)
    for name, width, layers in (("teacher-lm", 160, 5), ("student-lm", 128, 4)):
        Qwen2Config(
            vocab_size=VOCAB_SIZE,
            hidden_size=width,
            intermediate_size=width * 8 // 3,
            num_hidden_layers=layers,
            num_attention_heads=width // 32,
            num_key_value_heads=width // 32,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=0,
            pad_token_id=0,
        ).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def train_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 640 ids in which every word of the world is one token."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=_SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(_texts(seed), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=_END,
        pad_token=_END,
        additional_special_tokens=_SPECIAL[1:],
        model_max_length=1024,
    )


def _texts(seed: int) -> Iterator[str]:
    rng = np.random.default_rng(seed)
    for _ in range(4_000):
        scene = scene_in("text", rng)
        yield caption(scene)
        for question in ask_several(scene, 4, rng):
            yield from (question.text, question.answer)  # answers and questions start their line, without a space
    lines = [TEMPLATES["vicuna_v1"].system, f" {_ENGLISH}", "user\n", "assistant\n", "scene:", "describe the picture."]
    yield from lines * 100


def main() -> None:
    """Parse and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    write_parts(parser.parse_args().out)


if __name__ == "__main__":
    main()
