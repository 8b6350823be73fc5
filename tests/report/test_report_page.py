"""The written files: the page, what it leaves out, and that writing again changes nothing."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from report_runs import Writer, flags

from llavakd.report import collect, write_report
from llavakd.report.pages import page, pick_cases
from llavakd.report.plots import gram_pictures, loss_curves

SECTIONS = ("Results", "Accuracy by kind of question", "Loss curves", "Test pictures", "Cost", "Recipe", "Environment")
FILES = ("results.json", "report.md", "report.html")


class Links(HTMLParser):
    """Collects ids, tags and whatever a browser would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for key, value in attrs:
            if key == "id":
                self.ids.append(value or "")
            elif key in ("src", "href", "xlink:href", "srcset", "data", "action"):
                self.links.append(value or "")


def three_runs(make_run: Writer) -> list[Path]:
    first = make_run("a", {"teacher": flags(18, 20), "pt-sft": flags(10, 20)}, stages=("pt", "sft"))
    second = make_run("b", {"teacher": flags(18, 20), "dpt-sft-dft": flags(14, 20)})
    return [first, second, make_run("c", {"dpt-sft": flags(12, 20)}, stages=("dpt", "sft"))]


def test_report_is_self_contained(make_run: Writer, tmp_path: Path) -> None:
    write_report(three_runs(make_run), tmp_path / "out")
    text = (tmp_path / "out" / "report.html").read_text()
    found = Links()
    found.feed(text)
    assert found.links
    assert all(link.startswith(("data:image/png;base64,", "#")) for link in found.links)
    assert not {"script", "link", "iframe"} & set(found.tags)
    assert not re.search(r"@import|url\((?!#)", text)
    assert str(tmp_path) not in text
    assert len(found.ids) == len(set(found.ids))
    assert "LLaVA-KD report" in text
    for title in SECTIONS:
        assert f"<h2>{title}</h2>" in text
    assert "Left out" not in text


def test_references_inside_the_plots_hold(make_run: Writer) -> None:
    found = Links()
    text = page(collect(three_runs(make_run)))
    found.feed(text)
    wanted = {link[1:] for link in found.links if link.startswith("#")} | set(re.findall(r"url\(#([^)]+)\)", text))
    assert wanted
    assert wanted <= set(found.ids)


def test_text_is_escaped(make_run: Writer) -> None:
    bad = "<script>alert('x')</script>"
    rows = {"pt-sft": flags(5, 10), "dpt-<b>": flags(6, 10)}
    text = page(collect([make_run("a", rows, prediction=bad, kinds=("a<b>", "$x_$"))]))
    assert "&lt;script&gt;alert(" in text
    assert "<script" not in text
    assert "<b>&lt;b&gt;" not in text
    assert "dpt-<b>" not in text
    assert "a<b>" not in text
    assert "student: &lt;tiny&gt;" in text


@pytest.mark.parametrize(
    ("lacking", "line"),
    [
        ("evaluation", "No question was answered by all models, or no run kept its answers."),
        ("gram", "No run kept Gram matrices of a probe picture."),
        ("metrics", "No run kept its training metrics."),
    ],
)
def test_a_missing_part_is_said_in_one_line(make_run: Writer, lacking: str, line: str) -> None:
    whole = page(collect([make_run("whole", {"pt-sft": flags(5, 10)})]))
    text = page(collect([make_run("part", {"pt-sft": flags(5, 10)}, **{lacking: False})]))
    assert line not in whole
    assert line in text
    assert "<h2>Left out</h2>" in text


def test_text_only_and_lost_pictures(make_run: Writer) -> None:
    text_only = page(collect([make_run("a", {"pt-sft": flags(5, 10)}, pictures=False, gram=False)]))
    assert "What is 1?" in text_only
    assert "picture not found" not in text_only
    lost = make_run("b", {"pt-sft": flags(5, 10)})
    (lost / "picture.png").unlink()
    assert "picture not found" in page(collect([lost]))


def test_bare_results_make_a_report(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text('{"rows": [{"name": "pt-sft", "accuracy": 0.5, "n": 4}]}')
    text = page(collect([tmp_path]))
    assert "No run recorded accuracy by kind of question." in text
    assert "No run recorded its environment." in text


def test_cases_that_split_the_models_come_first_and_kinds_take_turns(make_run: Writer) -> None:
    # Questions 4 to 9 split the models; kinds alternate, so even ids are of one kind and odd ids of the other.
    results = collect([make_run("a", {"pt-sft": flags(4, 20), "dpt-sft-dft": flags(10, 20)})])
    chosen = pick_cases(results)
    assert chosen[:6] == ["q4", "q5", "q6", "q7", "q8", "q9"]
    assert len(chosen) == 12
    uneven = [i < 5 or i == 9 for i in range(20)]  # of the split 0, 1, 2, 3, 4, 9 two are odd late ones
    results = collect([make_run("b", {"pt-sft": flags(0, 20), "dpt-sft-dft": uneven}, kinds=("x", "x", "x", "y"))])
    assert pick_cases(results, 3) == ["q0", "q3", "q1"]


def test_loss_panels_exist_for_logged_parts_only(make_run: Writer) -> None:
    plain = collect([make_run("a", {"pt-sft": flags(5, 10)}, stages=("pt", "sft"))])
    assert list(loss_curves(plain)) == ["loss", "ce"]
    distilled = collect([make_run("b", {"dpt-sft-dft": flags(5, 10)})])
    panels = loss_curves(distilled)
    assert list(panels) == ["loss", "ce", "response_kl", "visual_kl", "relation"]
    assert all(f">{stage}</text>" in panels["loss"] for stage in ("dpt", "sft", "dft"))


def test_gram_pictures_forget_the_scale_of_a_matrix() -> None:
    gram = np.random.default_rng(0).normal(size=(12, 12)).astype(np.float32)
    uris, (low, high), _ = gram_pictures([gram, 40 * gram, gram.T])
    assert uris[0] == uris[1] != uris[2]
    assert -1 <= low < high <= 1


@pytest.mark.parametrize("inside", [False, True])
def test_writing_twice_gives_the_same_bytes(make_run: Writer, tmp_path: Path, inside: bool) -> None:
    runs = three_runs(make_run)
    out = runs[0] if inside else tmp_path / "out"
    write_report(runs, out)
    before = {name: (out / name).read_bytes() for name in FILES}
    write_report(runs, out)
    assert {name: (out / name).read_bytes() for name in FILES} == before
    assert not list(out.glob(".report-*"))


def test_a_report_into_its_only_run_keeps_the_rows(make_run: Writer) -> None:
    run = make_run("a", {"teacher": flags(9, 10), "pt-sft": flags(5, 10)})
    before = json.loads((run / "results.json").read_text())
    write_report([run], run)
    assert json.loads((run / "results.json").read_text()) == before


def test_a_refused_report_writes_nothing(make_run: Writer, tmp_path: Path) -> None:
    runs = [make_run("a", {"pt-sft": flags(5, 10)}), make_run("b", {"pt-sft": flags(6, 10)})]
    with pytest.raises(ValueError, match="different rows"):
        write_report(runs, tmp_path / "out")
    assert not (tmp_path / "out").exists()
