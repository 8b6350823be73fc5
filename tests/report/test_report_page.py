"""The written files: the page, what it leaves out, and that writing again changes nothing."""

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from report_runs import Writer, flags, page

from llavakd.report import collect, pick_cases, write_report
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


def test_questions_that_the_main_model_misses_come_first_and_kinds_take_turns(make_run: Writer) -> None:
    # Missed are 0 to 7; of those the control has 6 and 7. Right are 8 to 19; of those the control misses 14 to 19.
    # Kinds alternate, so even ids are of one kind and odd ids of the other.
    distilled, control = [i >= 8 for i in range(20)], [6 <= i < 14 for i in range(20)]
    results = collect([make_run("a", {"pt-sft": control, "dpt-sft-dft": distilled})])
    assert pick_cases(results) == [f"q{i}" for i in (6, 7, 0, 1, 2, 3, 4, 5, 14, 15, 16, 17)]
    text = page(results)
    assert "Questions that dpt-sft-dft answers wrong come first" in text
    assert text.index("What is 6?") < text.index("What is 0?") < text.index("What is 14?")
    # Of the missed 1, 2, 3, 5, 6, 7 the kind "y" has 3 and 7, so they come second and fourth.
    results = collect([make_run("b", {"dpt-sft-dft": [i % 4 == 0 for i in range(8)]}, kinds=("x", "x", "x", "y"))])
    assert pick_cases(results, 5) == ["q1", "q3", "q2", "q7", "q5"]


def test_the_seed_that_a_question_escapes_most_counts_and_without_distillation_all_models_do(make_run: Writer) -> None:
    # Question 2 is missed by both seeds, 1 by one, 0 by none.
    runs = [make_run(f"s{seed}", {"dpt-sft-dft": flags(1 + seed, 3)}, seed=seed) for seed in (0, 1)]
    assert pick_cases(collect(runs)) == ["q2", "q1", "q0"]
    plain = collect([make_run("a", {"teacher": flags(2, 3), "pt-sft": flags(1, 3)})])
    assert pick_cases(plain) == ["q2", "q1", "q0"]
    assert "Questions that the fewest models answer right come first" in page(plain)


def test_loss_panels_exist_for_logged_parts_only(make_run: Writer) -> None:
    plain = collect([make_run("a", {"pt-sft": flags(5, 10)}, stages=("pt", "sft"))])
    assert list(loss_curves(plain)) == ["loss", "ce"]
    distilled = collect([make_run("b", {"dpt-sft-dft": flags(5, 10)})])
    panels = loss_curves(distilled)
    assert list(panels) == ["loss", "ce", "response_kl", "visual_kl", "relation"]
    assert all(f">{stage}</text>" in panels["loss"] for stage in ("dpt", "sft", "dft"))


def polylines(svg: str) -> list[list[tuple[float, float]]]:
    found = re.findall(r'<polyline[^>]*points="([^"]*)"', svg)
    return [[tuple(map(float, point.split(","))) for point in points.split()] for points in found]


def write_losses(run: Path, stage: str, values: list[object]) -> None:
    lines = [json.dumps({"step": step, "loss": value}) for step, value in enumerate(values, start=1)]
    (run / stage / "metrics.jsonl").write_text("\n".join(lines))


def test_loss_curves_follow_each_other_on_a_logarithmic_axis_between_round_values(make_run: Writer) -> None:
    run = make_run("a", {"pt-sft": flags(1, 2)}, stages=("pt", "sft"))
    write_losses(run, "pt", [30.0, 10.0, 3.0, 1.0])
    write_losses(run, "sft", [3.0, 1.0])
    svg = loss_curves(collect([run]))["loss"]
    first, second = polylines(svg)
    assert [len(first), len(second)] == [4, 2]
    steps = [x for x, _ in first + second]
    assert np.diff(steps) == pytest.approx(310 / 6, abs=0.2)  # six steps share the width of 310
    heights = [y for _, y in first]
    assert heights[0] - heights[1] == pytest.approx(heights[2] - heights[3], abs=0.2)  # a factor of 3, twice
    assert all(f">{tick}</text>" in svg for tick in ("1", "2", "5", "10", "20", "50"))
    assert 28 <= min(heights) < max(heights) == 184  # 1 is the lowest tick


def test_what_a_logarithmic_axis_has_no_place_for_is_not_drawn(make_run: Writer) -> None:
    run = make_run("a", {"pt-sft": flags(1, 2)}, stages=("pt", "sft"))
    write_losses(run, "pt", [4.0, 0.0, None, float("nan"), float("inf"), 3.0])
    write_losses(run, "sft", [2.0])
    svg = loss_curves(collect([run]))["loss"]
    assert [len(points) for points in polylines(svg)] == [2]
    assert svg.count("<circle") == 1  # one point alone makes no line
    assert re.findall(r'text-anchor="end">([^<]+)<', svg) == ["2", "5"]
    assert not {"nan", "inf"} & set(re.split(r"[^a-z]", svg))


def test_a_long_stage_is_drawn_as_means_of_equal_stretches(make_run: Writer) -> None:
    run = make_run("a", {"pt-sft": flags(1, 2)}, stages=("pt",))
    write_losses(run, "pt", [1.0, 3.0] * 200)  # 400 points in stretches of three: 1, 3, 1 and 3, 1, 3
    (points,) = polylines(loss_curves(collect([run]))["loss"])
    assert len(points) == 134
    low, high = sorted({y for _, y in points[:-1]}, reverse=True)
    # On an axis from 1 to 5, 156 high: log(7 / 3 : 5 / 3) / log 5.
    assert low - high == pytest.approx(156 * math.log(7 / 5) / math.log(5), abs=0.2)


def test_every_gram_matrix_but_the_teachers_has_its_cosine_to_the_teacher(make_run: Writer) -> None:
    run = make_run("a", {"teacher": flags(1, 2), "pt-sft": flags(1, 2)})
    np.save(run / "evaluation" / "teacher" / "gram.npy", np.array([[1, 0], [0, 1]], dtype=np.float32))
    np.save(run / "evaluation" / "pt-sft" / "gram.npy", np.array([[1, 1], [1, 1]], dtype=np.float32))
    assert re.findall(r"cosine to teacher ([-.0-9]+)", page(collect([run]))) == ["0.707"]  # 2 / (sqrt 2 * 2)


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
