"""Rendering conversations, judged by decoding: what the row says, and exactly what of it is supervised."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import llavakd
from llavakd.data.chat import TEMPLATES, ChatRenderer, Segment, end_token_id
from llavakd.data.samples import DataError, Sample, Turn

PARTS = Path(llavakd.__file__).parent / "assets" / "shapes" / "parts"
TOKENS = 3
EOS, IM_START, IM_END, IMAGE = 0, 1, 2, 3
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions. "
)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(str(PARTS / "student-lm"))


def sample(*rounds: tuple[int, str, str]) -> Sample:
    """Rounds of (pictures, question, answer)."""
    turns, names = [], []
    for pictures, question, answer in rounds:
        names += [f"{len(names) + i}.png" for i in range(pictures)]
        turns.append(Turn(role="user", text=question, images=pictures))
        turns.append(Turn(role="assistant", text=answer))
    return Sample(id="row-9", images=tuple(names), turns=tuple(turns))


ROUNDS = {
    "single": [(1, "What colour is the box?", "The box is red.")],
    "text only": [(0, "What is 2 + 2?", "4, naïvely.")],
    "multi": [(1, "How many?", "3"), (0, "Sure?", "(yes) it is"), (0, "Why?", "I counted.\nTwice.")],
    "several pictures": [(2, "Compare.", "same"), (1, "And this?", "other")],
    "no question": [(1, "", "a red circle")],
}
CASES = [(template, name) for template in ("vicuna_v1", "chatml") for name in ROUNDS] + [
    ("pretrain", "single"),
    ("pretrain", "no question"),
]


def wanted_pieces(template: str, rounds) -> list[tuple[str, bool]]:
    """The row as (text, supervised), written from methods: TinyLLaVA's qwen2_base and pretrain, and ChatML."""
    pieces = [(SYSTEM, False)] if template == "vicuna_v1" else []
    for pictures, question, answer in rounds:
        if template == "vicuna_v1":
            pieces.append(("USER: " + "<image>\n" * pictures + f"{question} ASSISTANT:", False))
            pieces.append((f" {answer}<|endoftext|>", True))
        elif template == "chatml":
            prompt = "<|im_start|>user\n" + "<image>\n" * pictures + question
            pieces.append((f"{prompt}<|im_end|>\n<|im_start|>assistant\n", False))
            pieces += [(f"{answer}<|im_end|>", True), ("\n", False)]
        else:
            pieces += [("<image>" * pictures, False), (f"{answer}\n", True)]
    return pieces


def renderer(template: str, tokenizer, max_length: int = 500) -> ChatRenderer:
    return ChatRenderer(template, tokenizer, image_token_id=IMAGE, tokens_per_image=TOKENS, max_length=max_length)


def decode(tokenizer, ids: list[int]) -> str:
    """Text of ids, every picture as one tag."""
    text, i = "", 0
    while i < len(ids):
        if ids[i] == IMAGE:
            assert ids[i : i + TOKENS] == [IMAGE] * TOKENS, "a picture of another length"
            text, i = text + "<image>", i + TOKENS
            continue
        stop = next((j for j in range(i, len(ids)) if ids[j] == IMAGE), len(ids))
        text += tokenizer.decode(ids[i:stop], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        i = stop
    return text


def stretches(segments: list[int]) -> list[range]:
    """Runs of supervised positions."""
    found, start = [], None
    for position, segment in enumerate([*segments, Segment.PADDING]):
        if segment == Segment.RESPONSE and start is None:
            start = position
        if segment != Segment.RESPONSE and start is not None:
            found.append(range(start, position))
            start = None
    return found


@pytest.mark.parametrize(("template", "name"), CASES)
def test_the_row_says_what_the_template_says(tokenizer, template, name):
    row = renderer(template, tokenizer).render(sample(*ROUNDS[name]))
    assert decode(tokenizer, row.ids) == "".join(text for text, _ in wanted_pieces(template, ROUNDS[name]))
    assert len(row.ids) == len(row.segments)
    assert not row.truncated


@pytest.mark.parametrize(("template", "name"), CASES)
def test_exactly_the_answers_and_their_ends_are_supervised(tokenizer, template, name):
    row = renderer(template, tokenizer).render(sample(*ROUNDS[name]))
    runs = stretches(row.segments)
    got = [decode(tokenizer, [row.ids[i] for i in run]) for run in runs]
    assert got == [text for text, supervised in wanted_pieces(template, ROUNDS[name]) if supervised]
    newline = tokenizer("\n").input_ids
    end = {"vicuna_v1": EOS, "chatml": IM_END, "pretrain": newline[0]}[template]
    space = " " if template == "vicuna_v1" else ""
    for run, (_, _, answer) in zip(runs, ROUNDS[name], strict=True):
        assert row.ids[run[0]] == tokenizer(space + answer).input_ids[0], "the answer's first token"
        assert row.ids[run[-1]] == end
    assert renderer(template, tokenizer).end_token_id == end == end_token_id(template, tokenizer)


@pytest.mark.parametrize(("template", "name"), CASES)
def test_segments_tell_pictures_prompts_and_responses_apart(tokenizer, template, name):
    row = renderer(template, tokenizer).render(sample(*ROUNDS[name]))
    for token, segment in zip(row.ids, row.segments, strict=True):
        assert (segment == Segment.VISUAL) == (token == IMAGE)
        assert segment in (Segment.VISUAL, Segment.PROMPT, Segment.RESPONSE)
    assert row.segments.count(Segment.VISUAL) == TOKENS * sum(pictures for pictures, _, _ in ROUNDS[name])


@pytest.mark.parametrize(("template", "name"), CASES)
def test_the_prompt_is_the_row_up_to_its_last_answer(tokenizer, template, name):
    chat = renderer(template, tokenizer)
    row = chat.render(sample(*ROUNDS[name]))
    assert chat.render_prompt(sample(*ROUNDS[name])) == row.ids[: stretches(row.segments)[-1][0]]


def test_vicuna_v1_is_tinyllavas_text_to_the_letter(tokenizer):
    rounds = [(1, "What is it?", "A cat."), (0, "Sure?", "Yes.")]
    row = renderer("vicuna_v1", tokenizer).render(sample(*rounds))
    assert decode(tokenizer, row.ids) == (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions. USER: <image>\nWhat is it? ASSISTANT: A cat."
        "<|endoftext|>USER: Sure? ASSISTANT: Yes.<|endoftext|>"
    )
    prompt = renderer("vicuna_v1", tokenizer).render_prompt(sample(*rounds))
    assert decode(tokenizer, prompt).endswith("USER: Sure? ASSISTANT:")


def test_pretrain_is_the_picture_and_the_caption_without_the_question(tokenizer):
    row = renderer("pretrain", tokenizer).render(sample((1, "Describe the picture.", "a red circle")))
    assert decode(tokenizer, row.ids) == "<image>a red circle\n"
    assert row.segments == [Segment.VISUAL] * TOKENS + [Segment.RESPONSE] * (len(row.ids) - TOKENS)


@pytest.mark.parametrize("rounds", [[(0, "q", "a")], [(1, "q", "a"), (0, "q", "b")]], ids=["no picture", "two rounds"])
def test_pretrain_refuses_what_is_no_caption_and_names_the_row(tokenizer, rounds):
    with pytest.raises(DataError, match=r"'row-9'.*a picture and its caption.*vicuna_v1 or chatml"):
        renderer("pretrain", tokenizer).render(sample(*rounds))


@pytest.mark.parametrize("answer", ["<image>", "see <image> there"])
@pytest.mark.parametrize("template", list(TEMPLATES))
def test_a_picture_tag_inside_an_answer_is_refused_by_row(tokenizer, template, answer):
    with pytest.raises(DataError, match=r"'row-9'.*<image> inside an answer"):
        renderer(template, tokenizer).render(sample((1, "q", answer)))


def test_a_cut_through_an_answer_keeps_its_beginning(tokenizer):
    whole = renderer("vicuna_v1", tokenizer).render(sample(*ROUNDS["single"]))
    length = len(whole.ids)
    exact = renderer("vicuna_v1", tokenizer, length).render(sample(*ROUNDS["single"]))
    assert exact == whole
    cut = renderer("vicuna_v1", tokenizer, length - 2).render(sample(*ROUNDS["single"]))
    assert cut.truncated
    assert (cut.ids, cut.segments) == (whole.ids[:-2], whole.segments[:-2])
    assert cut.segments[-1] == Segment.RESPONSE


def test_a_cut_before_the_first_answer_is_refused_by_row(tokenizer):
    whole = renderer("vicuna_v1", tokenizer).render(sample(*ROUNDS["single"]))
    first = stretches(whole.segments)[0][0]
    kept = renderer("vicuna_v1", tokenizer, first + 1).render(sample(*ROUNDS["single"]))
    assert kept.segments[-1] == Segment.RESPONSE
    with pytest.raises(DataError, match=rf"'row-9': no token to learn from within max_length {first}"):
        renderer("vicuna_v1", tokenizer, first).render(sample(*ROUNDS["single"]))


def test_a_cut_through_or_before_a_picture_is_refused_by_row(tokenizer):
    whole = renderer("chatml", tokenizer).render(sample(*ROUNDS["several pictures"]))
    last = max(i for i, segment in enumerate(whole.segments) if segment == Segment.VISUAL)
    kept = renderer("chatml", tokenizer, last + 1).render(sample(*ROUNDS["several pictures"]))
    assert kept.segments.count(Segment.VISUAL) == 3 * TOKENS
    for max_length in (last, last - TOKENS - 1):
        message = rf"'row-9': {len(whole.ids)} tokens, and max_length {max_length} cuts through a picture"
        with pytest.raises(DataError, match=message):
            renderer("chatml", tokenizer, max_length).render(sample(*ROUNDS["several pictures"]))


@pytest.mark.parametrize("template", ["vicuna_v1", "chatml"])
def test_rows_rendered_together_are_the_rows_rendered_alone(tokenizer, template):
    chat = renderer(template, tokenizer)
    samples = [sample(*rounds) for rounds in ROUNDS.values()]
    alone = [chat.render(one) for one in samples]
    assert len({len(row.ids) for row in alone}) > 1
    assert chat.render_each(samples) == alone
    bad = dataclasses.replace(sample((0, "q", "<image>")), id="row-bad")
    found = chat.render_each([*samples, bad, *samples])
    assert [row for row in found if not isinstance(row, DataError)] == alone * 2
    with pytest.raises(DataError, match="'row-bad'"):
        raise found[len(samples)]
    with pytest.raises(DataError, match="'row-bad'"):
        chat.render(bad)


def messages(rounds, *, as_text: bool) -> list[dict]:
    found = []
    for pictures, question, answer in rounds:
        parts = [{"type": "image"}] * pictures + [{"type": "text", "text": question}]
        found.append({"role": "user", "content": question if as_text else parts})
        found.append({"role": "assistant", "content": answer if as_text else [{"type": "text", "text": answer}]})
    return found


@pytest.mark.parametrize(("template", "name"), [case for case in CASES if case[0] != "pretrain"])
def test_the_jinja_template_gives_stock_transformers_the_same_ids(tokenizer, template, name):
    rounds = ROUNDS[name]
    chat = renderer(template, tokenizer)
    forms = (False, True) if name == "text only" else (False,)
    for as_text in forms:
        talk = messages(rounds, as_text=as_text)
        for given, wanted, prompt in (
            (talk[:-1], chat.render_prompt(sample(*rounds)), True),
            (talk, chat.render(sample(*rounds)).ids, False),
        ):
            text = tokenizer.apply_chat_template(
                given, chat_template=TEMPLATES[template].jinja, add_generation_prompt=prompt, tokenize=False
            )
            ids = tokenizer(text, add_special_tokens=False).input_ids
            spread = [token for one in ids for token in ([IMAGE] * TOKENS if one == IMAGE else [one])]
            assert spread == wanted


def test_a_familys_start_token_stands_once_and_is_not_learnt():
    starting = AutoTokenizer.from_pretrained(str(PARTS / "student-lm"))
    starting.bos_token = "<|im_start|>"
    starting.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", IM_START)]
    )
    assert starting("x").input_ids[0] == IM_START
    chat = renderer("vicuna_v1", starting)
    row = chat.render(sample(*ROUNDS["multi"]))
    assert row.ids.count(IM_START) == 1
    assert (row.ids[0], row.segments[0]) == (IM_START, Segment.PROMPT)
    assert chat.render_prompt(sample(*ROUNDS["multi"]))[0] == IM_START


def test_a_tokenizer_without_the_templates_end_is_refused():
    bare = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(BPE()))
    with pytest.raises(DataError, match="vicuna_v1 ends answers with the end-of-sequence token"):
        end_token_id("vicuna_v1", bare)
    with pytest.raises(DataError, match=r"chatml needs '<\|im_end\|>' as one token, the tokenizer makes 0"):
        renderer("chatml", bare)
