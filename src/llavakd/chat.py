"""Questions about a picture, answered by any LLaVA folder token by token."""

import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import accumulate
from pathlib import Path
from threading import Event

import torch
from PIL import Image
from transformers import StoppingCriteriaList, TextIteratorStreamer

from llavakd.data.pictures import upright_rgb
from llavakd.data.samples import IMAGE_TAG
from llavakd.errors import UserError
from llavakd.export import Opened, open_model
from llavakd.progress import Interrupted, say

MAX_PIXELS = 50_000_000
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")  # none whose reader starts a program, as that of EPS does


def read_picture(path: str | Path) -> Image.Image:
    """A picture of at most MAX_PIXELS, upright and RGB; raises UserError, whatever a hostile file holds."""
    try:
        with Image.open(path, formats=_FORMATS) as picture:
            if (pixels := picture.width * picture.height) > MAX_PIXELS:
                raise Image.DecompressionBombError(f"it has {pixels:,} pixels, more than {MAX_PIXELS:,}")
            return upright_rgb(picture)
    except Exception as error:  # a damaged picture makes PIL raise a dozen unrelated types
        known = f"it is no whole picture of a known kind ({', '.join(_FORMATS)})"
        reason = error if isinstance(error, Image.DecompressionBombError) else getattr(error, "strerror", None) or known
        raise UserError(f"cannot read picture {Path(path).name!r}: {reason}; give another") from error


def answer(opened: Opened, picture: Image.Image, texts: Sequence[str], *, max_new_tokens: int = 512) -> Iterator[str]:
    """Answer the last of `texts` (question, answer, ...): so far, at each token and at the end; closing stops the model."""
    model, processor = opened[0].model, opened[1]
    if processor.chat_template is None:
        raise UserError("the model's folder has no chat template; take a later stage, or add a chat_template.jinja")
    if any(IMAGE_TAG in text for text in texts):
        raise UserError("the question holds the tag that stands for the picture; leave it out")
    contents: list[list[dict[str, str]]] = [[{"type": "text", "text": text}] for text in texts]
    contents[0].insert(0, {"type": "image"})
    turns = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    prompt = processor.apply_chat_template(turns, add_generation_prompt=True)
    inputs = processor(text=prompt, images=picture, return_tensors="pt").to(model.device, model.dtype)
    length, limit = inputs["input_ids"].shape[1], model.config.text_config.max_position_embeddings
    if length >= limit:
        raise UserError(f"the conversation has {length} tokens and the model takes {limit}; begin a new one")
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    closed = Event()
    stop = StoppingCriteriaList([lambda ids, _: torch.full((len(ids),), closed.is_set(), device=ids.device)])
    options = {"do_sample": False, "max_new_tokens": min(max_new_tokens, limit - length), "stopping_criteria": stop}
    with ThreadPoolExecutor(1) as thread:
        running = thread.submit(model.generate, **inputs, **options, streamer=streamer)
        running.add_done_callback(lambda _: streamer.end())  # also where it failed
        try:
            yield from map(str.lstrip, accumulate(streamer))
        finally:
            closed.set()
        running.result()


def ask_about(given: str, image: Path, question: str | None, *, max_new_tokens: int) -> None:
    """Print the answer to `question`, or to every line of standard input until it ends, is empty or is `/quit`."""
    picture, opened = read_picture(image), open_model(given)
    texts: list[str] = []
    try:
        for asked in _lines() if question is None else [question]:
            texts += [asked, ""]
            for text in answer(opened, picture, texts[:-1], max_new_tokens=max_new_tokens):
                print(text[len(texts[-1]) :], end="", flush=True)  # noqa: T201
                texts[-1] = text
            print()  # noqa: T201
    except KeyboardInterrupt:
        raise Interrupted("") from None


def _lines() -> Iterator[str]:
    typed = sys.stdin.isatty() and sys.stdout.isatty()
    if typed:
        say("Ask about the picture; an empty line or /quit ends.")
    with suppress(EOFError):
        while (line := input("> " if typed else "").strip()) not in ("", "/quit"):
            yield line
