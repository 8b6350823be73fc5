"""A trained model answers rightly, on a terminal, in a pipe and from code; what is wrong is said in one line."""

import itertools
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

import llavakd
from hostile_pictures import HOSTILE
from llavakd.chat import MAX_PIXELS, answer, read_picture
from llavakd.errors import UserError
from llavakd.export import open_model
from llavakd.shapes.world import examples

TRAINED = Path(llavakd.__file__).parent / "assets" / "shapes" / "teacher"
CHAT = [sys.executable, "-m", "llavakd", "chat"]
DESCRIBE = "describe the picture."


@pytest.fixture(scope="module")
def opened():
    """The trained miniature teacher."""
    torch.set_num_threads(1)
    return open_model(str(TRAINED))


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """(picture file, question, true answer) of drawn scenes that no training saw."""
    folder = tmp_path_factory.mktemp("scenes")
    rows = []
    for number, (picture, question) in enumerate(examples(40)):
        picture.save(folder / f"{number}.png")
        rows.append((folder / f"{number}.png", question.text, question.answer))
    return rows


def said(opened, picture, *texts, **options):
    *_, text = answer(opened, read_picture(picture), texts, **options)
    return text


def test_the_trained_teacher_answers_rightly(opened, scenes):
    right = [said(opened, picture, question) == truth for picture, question, truth in scenes]
    assert sum(right) >= 39
    assert len({truth for *_, truth in scenes}) > 10


def test_an_answer_grows_with_each_token_and_is_the_one_of_stock_generate(opened, scenes):
    model, processor = opened[0].model, opened[1]
    picture = read_picture(scenes[0][0])
    texts = list(answer(opened, picture, [DESCRIBE]))
    turns = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": DESCRIBE}]}]
    prompt = processor.apply_chat_template(turns, add_generation_prompt=True)
    inputs = processor(text=prompt, images=picture, return_tensors="pt")
    ids = model.generate(**inputs, do_sample=False, max_new_tokens=100)[0, inputs["input_ids"].shape[1] :]
    assert texts[-1] == processor.decode(ids, skip_special_tokens=True).strip()
    assert len(texts) == len(ids) + 1
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(texts))
    assert len(set(texts)) > len(ids) / 2


def test_a_later_question_is_asked_with_all_that_was_said(opened, scenes, monkeypatch):
    asked = []
    generate = opened[0].model.generate
    monkeypatch.setattr(opened[0].model, "generate", lambda **inputs: (asked.append(inputs), generate(**inputs))[1])
    said(opened, scenes[0][0], "first?", "one", "second?")
    ids = asked[0]["input_ids"][0]
    text = opened[1].decode(ids[ids != opened[0].image_token_id])
    assert text == (
        "<|im_start|>user\n\nfirst?<|im_end|>\n<|im_start|>assistant\none<|im_end|>\n"
        "<|im_start|>user\nsecond?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert (ids == opened[0].image_token_id).sum() == opened[0].tokens_per_image


def test_the_space_in_front_of_an_answer_is_not_shown(opened, scenes, monkeypatch):
    def generate(streamer, **_):
        streamer.put(torch.tensor([[0]]))  # the prompt
        for token in opened[1].tokenizer(" red  circle").input_ids:
            streamer.put(torch.tensor([token]))
        streamer.end()

    monkeypatch.setattr(opened[0].model, "generate", generate)
    assert said(opened, scenes[0][0], DESCRIBE) == "red  circle"


def test_a_reader_who_leaves_stops_the_model(opened, scenes, monkeypatch):
    steps = []
    hook = opened[0].model.register_forward_hook(lambda *_: (steps.append(1), time.sleep(0.02))[0])
    monkeypatch.setattr(opened[0].model.generation_config, "eos_token_id", None)
    texts = answer(opened, read_picture(scenes[0][0]), [DESCRIBE], max_new_tokens=400)
    next(texts)
    texts.close()
    hook.remove()
    assert 1 <= len(steps) < 40


def test_what_fails_in_the_model_is_raised_to_the_reader(opened, scenes, monkeypatch):
    def generate(**_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(opened[0].model, "generate", generate)
    with pytest.raises(RuntimeError, match="out of memory"):
        said(opened, scenes[0][0], DESCRIBE)


def test_a_conversation_beyond_the_models_positions_is_refused_and_one_below_is_cut_there(opened, scenes, monkeypatch):
    with pytest.raises(UserError, match=r"has \d+ tokens and the model takes 1024; begin a new one"):
        said(opened, scenes[0][0], "red " * 2000)
    monkeypatch.setattr(opened[0].model.config.text_config, "max_position_embeddings", 30)
    texts = list(answer(opened, read_picture(scenes[0][0]), [DESCRIBE]))
    prompt = len(opened[1].tokenizer(f"<|im_start|>user\n\n{DESCRIBE}<|im_end|>\n<|im_start|>assistant\n").input_ids)
    assert len(texts) == 30 - prompt - opened[0].tokens_per_image + 1


def test_a_folder_without_a_chat_template_is_refused(opened, scenes, monkeypatch):
    monkeypatch.setattr(opened[1], "chat_template", None)
    with pytest.raises(UserError, match="no chat template; take a later stage"):
        said(opened, scenes[0][0], DESCRIBE)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_refused_in_no_time(tmp_path, name):
    make, message = HOSTILE[name]
    (tmp_path / name).write_bytes(make())
    start = time.perf_counter()
    with pytest.raises(UserError) as refused:
        read_picture(tmp_path / name)
    assert time.perf_counter() - start < 2
    assert message in str(refused.value)
    assert f"cannot read picture {name!r}" in str(refused.value)
    assert str(tmp_path) not in str(refused.value)


def test_pictures_of_all_modes_come_as_rgb_and_upright(tmp_path):
    for mode, name in (("L", "gray.png"), ("RGBA", "clear.png"), ("P", "colours.gif"), ("CMYK", "print.jpg")):
        Image.new(mode, (6, 4)).save(tmp_path / name)
        assert (read_picture(tmp_path / name).mode, read_picture(tmp_path / name).size) == ("RGB", (6, 4))
    turned = Image.new("RGB", (6, 4))
    turned.putpixel((0, 0), (255, 255, 255))
    exif = turned.getexif()
    exif[274] = 6  # the camera was held upright: turn by 90 degrees to the right
    turned.save(tmp_path / "turned.png", exif=exif)
    upright = read_picture(tmp_path / "turned.png")
    assert upright.size == (4, 6)
    assert upright.getpixel((3, 0)) == (255, 255, 255)


def test_the_largest_picture_that_is_taken_is_taken(tmp_path):
    Image.new("L", (MAX_PIXELS // 5000, 5000)).save(tmp_path / "large.png")
    assert read_picture(tmp_path / "large.png").size == (10_000, 5000)


def test_one_question_has_its_answer_and_nothing_else_on_standard_output(command, scenes):
    picture, question, truth = scenes[0]
    done = command("chat", TRAINED, picture, question)
    assert (done.code, done.out, done.err) == (0, truth + "\n", "")
    short = command("chat", TRAINED, picture, DESCRIBE, "--max-new-tokens", 2)
    assert len(short.out.split()) == 2


def test_a_run_or_a_stage_may_be_named_instead_of_its_model(command, scenes, tmp_path):
    (tmp_path / "run" / "dft").mkdir(parents=True)
    (tmp_path / "run" / "dft" / "model").symlink_to(TRAINED)
    (tmp_path / "run" / "pipeline.json").write_text('{"name": "x", "stages": [{"name": "dft", "state": "done"}]}')
    picture, question, truth = scenes[1]
    for given in ("run", "run/dft"):
        assert command("chat", tmp_path / given, picture, question).out == truth + "\n"


def test_what_is_wrong_is_said_in_one_line(command, scenes, tmp_path):
    picture, question, _ = scenes[0]
    (tmp_path / "text.png").write_text("no picture")
    for argv, words in {
        (TRAINED, tmp_path / "nowhere.png", question): "cannot read picture 'nowhere.png': No such file or directory",
        (TRAINED, tmp_path, question): "Is a directory",
        (TRAINED, tmp_path / "text.png", question): "cannot read picture 'text.png': it is no whole picture",
        (tmp_path / "nowhere", picture, question): "there is no folder",
        (TRAINED, picture, "what is <image>?"): "the question holds the tag that stands for the picture",
    }.items():
        refused = command("chat", *argv)
        assert refused.code == 1
        assert refused.err.startswith("error: ")
        assert words in refused.err
        assert refused.err.count("\n") == 1
        assert refused.out == ""
    assert command("chat", TRAINED).code == 2
    assert command("chat", TRAINED, picture, question, "--max-new-tokens", 0).code == 2


def test_lines_of_a_pipe_are_answered_line_by_line_until_an_empty_one(opened, scenes):
    asked_twice = ((row, said(opened, row[0], row[1], row[2], row[1])) for row in scenes)
    # Where what was said before counts, so that forgetting it would show.
    (picture, question, truth), second = next((row, again) for row, again in asked_twice if again != row[2])
    lines = f"{question}\n{question}\n\n{question}\n"
    done = subprocess.run([*CHAT, TRAINED, picture], input=lines, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{truth}\n{second}\n", "")


class Terminal:
    """A program on a pseudo-terminal of its own."""

    def __init__(self, argv):
        self.pid, self.screen = pty.fork()
        if self.pid == 0:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # which a shell in the background had turned off
            os.execv(argv[0], [str(word) for word in argv])
        self.shown = ""

    def wait_for(self, text, seconds=120):
        """All that was shown up to `text`, since the last call."""
        end = time.monotonic() + seconds
        while text not in self.shown:
            assert select.select([self.screen], [], [], max(0, end - time.monotonic()))[0], self.shown
            self.shown += os.read(self.screen, 4096).decode()
        before, _, self.shown = self.shown.partition(text)
        return before + text

    def type(self, text):
        os.write(self.screen, text.encode())

    def interrupt(self):
        """Press Ctrl-C until the program ends: pressed just before it reads, it counts at the next key only."""
        for tick in itertools.count():
            if os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                return
            if tick % 50 == 0:
                self.type("\x03")
            time.sleep(0.1)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.pid:  # left behind by a test that failed
            os.kill(self.pid, signal.SIGKILL)
            self.close()

    def close(self):
        """The exit code, and what was shown last."""
        try:
            while part := os.read(self.screen, 4096).decode():
                self.shown += part
        except OSError:  # how Linux says that the other end is closed
            pass
        os.close(self.screen)
        pid, self.pid = self.pid, 0
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), self.shown


def test_on_a_terminal_there_is_a_prompt_and_quit_ends(opened, scenes):
    picture, question, truth = scenes[0]
    with Terminal([*CHAT, TRAINED, picture]) as terminal:
        assert "an empty line or /quit ends" in terminal.wait_for("> ")
        for words in (truth, said(opened, picture, question, truth, question)):
            terminal.type(question + "\n")
            assert terminal.wait_for("\r\n").strip() == question  # the terminal's echo
            assert terminal.wait_for("> ") == f"{words}\r\n> "
        terminal.type("/quit\n")
        assert terminal.close() == (0, "/quit\r\n")


def test_control_c_ends_with_130_and_without_a_traceback(scenes):
    with Terminal([*CHAT, TRAINED, scenes[0][0]]) as terminal:
        terminal.wait_for("> ")
        terminal.interrupt()
        code, shown = terminal.close()
    assert code == 130
    assert "Traceback" not in shown
    assert "checkpoint" not in shown
