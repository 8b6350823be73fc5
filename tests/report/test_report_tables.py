"""Benchmarks, distance to the teacher and cost, in Markdown and on the page."""

import json
import re

from report_runs import Writer, edit_row, flags, headline, markdown, page

from llavakd.report import collect
from llavakd.report.compare import find_control
from llavakd.report.results import Results

SEGMENTS = {
    "response": {"kl": 0.1234, "agreement": 0.911, "teacher_entropy": 0.3, "positions": 1234},
    "visual": {"kl": 1.5, "agreement": 0.4, "teacher_entropy": 2.25, "positions": 98765},
}


def two_models(make_run: Writer, **row: object) -> Results:
    """A teacher without the row's further facts and a student with them."""
    run = make_run("a", {"teacher": flags(9, 10), "dpt-sft-dft": flags(6, 10)})
    edit_row(run, 1, **row)
    return collect([run])


def widths(text: str, caption: str) -> list[str]:
    figure = text.split(f"<figcaption>{caption}</figcaption>")[1].split("</figure>")[0]
    return re.findall(r"style=\"width:([.0-9]+)%", figure)


def test_benchmarks_have_a_column_each_and_the_averages_stand_apart_at_the_end(make_run: Writer) -> None:
    run = make_run("a", {"teacher": flags(9, 10), "pt-sft": flags(5, 10), "dpt-sft-dft": flags(6, 10)})
    edit_row(run, 1, benchmarks={"avg10": 51.25, "gqa": 58.349, "pope": 85})
    edit_row(run, 2, benchmarks={"gqa": 60.0, "mme": None, "textvqa": 49.96})
    text = markdown(collect([run]))
    assert "| model | gqa | pope | mme | textvqa |  | avg10 |" in text
    assert "| teacher | - | - | - | - |  | - |" in text
    assert "| pt-sft | 58.3 | 85.0 | - | - |  | 51.2 |" in text
    assert "| dpt-sft-dft | 60.0 | - | - | 50.0 |  | - |" in text
    assert "<td>60.0</td><td>-</td><td>-</td><td>50.0</td><td></td><td>-</td>" in page(collect([run]))


def test_benchmarks_without_an_average_have_no_empty_column(make_run: Writer) -> None:
    text = markdown(two_models(make_run, benchmarks={"gqa": 50.0}))
    assert "| model | gqa |\n| --- | ---: |\n| teacher | - |\n| dpt-sft-dft | 50.0 |\n" in text


def test_segments_have_a_row_for_each_model_that_was_measured(make_run: Writer) -> None:
    results = two_models(make_run, segments=SEGMENTS)
    text = markdown(results)
    assert "| model | segment | positions | KL nats | agreement % | teacher entropy nats |" in text
    assert "| dpt-sft-dft | response | 1,234 | 0.123 | 91.1 | 0.300 |" in text
    assert "| dpt-sft-dft | visual | 98,765 | 1.500 | 40.0 | 2.250 |" in text
    assert "| teacher | response" not in text
    html = page(results)
    assert "<td>visual</td><td>98,765</td><td>1.500</td><td>40.0</td><td>2.250</td>" in html
    assert widths(html, "KL, nats a position") == ["8.23", "100.00"]  # 0.1234 / 1.5, and the longest
    assert widths(html, "Agreement, % of positions") == ["91.10", "40.00"]  # of all positions


def test_a_segment_may_lack_numbers(make_run: Writer) -> None:
    results = two_models(make_run, segments={"response": {"kl": 0.0, "positions": 7}})
    assert "| dpt-sft-dft | response | 7 | 0.000 | - | - |" in markdown(results)
    assert widths(page(results), "KL, nats a position") == ["0.00"]
    assert widths(page(results), "Agreement, % of positions") == []


def test_absent_benchmarks_and_segments_are_said_on_the_page_and_left_out_of_the_markdown(make_run: Writer) -> None:
    for row in ({}, {"benchmarks": None, "segments": None}, {"benchmarks": {}, "segments": {}}):
        results = two_models(lambda name, *rest, row=row: make_run(f"{name}{len(str(row))}", *rest), **row)
        assert "No run recorded benchmark scores." in page(results)
        assert "No run measured its student against a teacher." in page(results)
        assert "Benchmarks" not in markdown(results)
        assert "by segment" not in markdown(results)


def test_names_of_benchmarks_and_segments_are_escaped(make_run: Writer) -> None:
    results = two_models(make_run, benchmarks={"g<q>a|1": 50.0}, segments={"<seg>|": SEGMENTS["visual"]})
    html, text = page(results), markdown(results)
    assert "g<q>" not in html
    assert "<seg>" not in html
    assert html.count("g&lt;q&gt;a|1") == 1
    assert html.count("&lt;seg&gt;") == 3  # two figures and a table
    assert "| g<q>a\\|1 |" in text
    assert "| <seg>\\| |" in text


def test_the_cost_of_models_and_stages(make_run: Writer) -> None:
    run = make_run("a", {"teacher": flags(9, 10), "dpt-sft-dft": flags(6, 10)})
    facts = {"state": "done", "steps": 10, "tokens": 30_000, "train_seconds": 60.0}
    stages = [{"name": "dpt", **facts}, {"name": "sft", "state": "done"}, {"name": "late", "state": "running"}]
    (run / "pipeline.json").write_text(json.dumps({"stages": stages}))
    (run / "dpt" / "metrics.jsonl").write_text(
        '{"step": 5, "loss": 3.0, "memory_gib": 2.5}\n{"step": 10, "loss": 2.0, "memory_gib": 1.5}\n'
    )
    (run / "sft" / "metrics.jsonl").write_text('{"step": 4, "ce": 1.0}\n')
    html = page(collect([run]))
    cells = ["10", "2.000", "30,000", "60", "500", "2.50"]
    assert "<td>dpt</td>" + "".join(f"<td>{cell}</td>" for cell in cells) in html
    assert "<td>sft</td><td>4</td><td>-</td><td>-</td><td>-</td><td>-</td><td>-</td>" in html
    assert "<td>late</td><td>-</td><td>-</td>" in html
    # 1,234,567 tokens in 200.5 seconds
    assert "| dpt-sft-dft | 7,654,321 | 30 | 1,234,567 | 200 | 6,157 |" in markdown(collect([run]))
    assert "| teacher | 7,654,321 | - | - | - | - |" in markdown(collect([run]))


def test_names_without_stages_are_told_apart_by_the_stages_of_their_runs(make_run: Writer) -> None:
    control = make_run("a", {"mine": flags(10, 20)}, stages=("pt", "sft", "sft2"))
    results = collect([control, make_run("b", {"teacher": flags(19, 20), "qwen2.5-0.5b": flags(14, 20)})])
    assert "qwen2.5-0.5b answers 70.0 % right and the control mine 50.0 %" in headline(results)
    assert find_control(results, results.rows[0]) is results.rows[0]


def test_a_control_may_have_its_stages_at_the_end_of_its_name_and_a_teacher_is_none(make_run: Writer) -> None:
    teacher = make_run("a", {"teacher-qwen2.5-3b": flags(19, 20)}, stages=("pt", "sft"), steps=60)
    control = make_run("b", {"qwen2.5-0.5b-pt-sft-sft": flags(10, 20)}, stages=("pt", "sft", "sft2"))
    results = collect([teacher, control, make_run("c", {"qwen2.5-0.5b": flags(14, 20)})])
    assert "the control qwen2.5-0.5b-pt-sft-sft 50.0 %" in headline(results)


def test_bare_rows_have_dashes_for_what_they_lack(tmp_path) -> None:
    rows = [{"name": name, "accuracy": 0.5, "n": 4} for name in ("pt-sft", "dpt-sft-dft")]
    (tmp_path / "results.json").write_text(json.dumps({"rows": rows}))
    text = markdown(collect([tmp_path]))
    assert "| dpt-sft-dft | 50.0 ± 35.0 | 4 | - | - | - | +0.0 ± 69.3 |" in text
    assert "| dpt-sft-dft | - | - | - | - | - |" in text
