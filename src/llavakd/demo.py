"""One picture and one question, answered by up to three models side by side in the browser."""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from llavakd.chat import answer, read_picture
from llavakd.errors import UserError, optional
from llavakd.export import open_model
from llavakd.progress import say
from llavakd.shapes.world import examples

gr = optional("gradio", "the demo", "demo")


def run_demo(models: Sequence[str], *, host: str, port: int, max_upload: int) -> None:
    """Serve up to three `models` (see `open_model`), one after another, until stopped; a picture of `max_upload` MiB."""
    if len(models) > 3:
        raise UserError(f"got {len(models)} models, expected at most 3")
    chats = [open_model(model) for model in models]

    def ask(file: str | None, question: str) -> Iterator[list[Any]]:
        shown = [gr.Textbox(value="", info=" ") for _ in models]
        try:
            if file is None or not question.strip():
                raise UserError("choose a picture and ask a question")
            for number, chat in enumerate(chats):
                times = [time.perf_counter()]
                for text in answer(chat, read_picture(file), [question]):
                    times.append(time.perf_counter())  # of each token and, once more, of the end
                    speed = f"{times[1] - times[0]:.2f} s to first token, {len(times) - 2} tokens"
                    if len(times) > 3:
                        speed += f", {(len(times) - 3) / (times[-2] - times[1]):.0f}/s"
                    shown[number] = gr.Textbox(value=text, info=speed)
                    yield shown
        except UserError as error:
            raise gr.Error(str(error), duration=None, print_exception=False) from error

    with gr.Blocks(title="LLaVA-KD demo", analytics_enabled=False) as page:
        gr.Markdown("# LLaVA-KD demo")
        with gr.Row():
            with gr.Column(min_width=280):
                looks: dict[str, Any] = {"sources": ["upload", "clipboard"], "height": 280, "elem_id": "picture"}
                picture = gr.Image(label="Picture", type="filepath", **looks)
                # Gradio would open the file, whatever its size.
                setattr(picture, "preprocess", lambda upload: upload and upload.path)  # noqa: B010 - mypy
                words = gr.Textbox(label="Question", placeholder="What is in the picture?", submit_btn="Ask")
            answers = [gr.Textbox(label=model, lines=6, info=" ", min_width=220) for model in models]
        gr.Examples([[image, asked.text] for image, asked in examples(4)], [picture, words])
        words.submit(ask, [picture, words], answers, api_name="ask")
    style, limit = Path(__file__).parent / "assets" / "demo.css", max_upload * 2**20
    where: dict[str, Any] = {"server_name": host, "server_port": port, "share": False, "quiet": True}
    try:
        page.launch(**where, max_file_size=limit, css_paths=style, footer_links=[], prevent_thread_lock=True)
    except OSError as error:
        raise UserError(f"cannot serve on {host}:{port}: {error}; give another --host or --port") from error
    say(f"The page is at {page.local_url}; Ctrl-C ends it.")
    page.block_thread()
