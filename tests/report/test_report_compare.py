"""Intervals against numbers worked out by hand, and the wording of the headline."""

import json
import math
from pathlib import Path

import pytest
from report_runs import Writer, flags, headline, markdown

from llavakd.report import collect
from llavakd.report.compare import difference, find_control, half_width


def test_wilson_half_width() -> None:
    # n = 100, p = 0.5: 1.96 * sqrt(0.0025 + 0.00009604) / 1.038416
    assert half_width(0.5, 100) == pytest.approx(0.0961704, abs=1e-6)
    # p = 1: 1.96^2 / (2 n) / (1 + 1.96^2 / n) = 1.9208 / 13.8416
    assert half_width(1.0, 10) == pytest.approx(0.138770, abs=1e-6)


def test_paired_difference(make_run: Writer) -> None:
    # Ten questions: three gained, one lost, so d has mean 0.2 and variance (4 - 10 * 0.04) / 9 = 0.4.
    control = [True] * 5 + [False] * 5
    distilled = [False] + [True] * 7 + [False] * 2
    rows = collect([make_run("a", {"pt-sft": control, "dpt-sft-dft": distilled})]).rows
    gap = difference(rows[1], rows[0])
    assert gap.paired
    assert gap.value == pytest.approx(0.2)
    assert gap.half_width == pytest.approx(1.96 * math.sqrt(0.4 / 10))


@pytest.mark.parametrize("how", ["missing", "other ids", "stale"])
def test_difference_without_the_same_answers_is_unpaired(make_run: Writer, how: str) -> None:
    run = make_run("a", {"pt-sft": flags(5, 10), "dpt-sft-dft": flags(8, 10)})
    path = run / "evaluation" / "pt-sft" / "predictions.jsonl"
    if how == "missing":
        path.unlink()
    elif how == "other ids":
        path.write_text(path.read_text().replace('"q0"', '"other"'))
    else:  # answers that do not give the row's accuracy come from another evaluation
        path.write_text(path.read_text().replace('"correct": true', '"correct": false'))
    rows = collect([run]).rows
    gap = difference(rows[1], rows[0])
    assert not gap.paired
    # sqrt(0.8 * 0.2 / 10 + 0.5 * 0.5 / 10) = sqrt(0.041)
    assert gap.half_width == pytest.approx(1.96 * math.sqrt(0.041))


@pytest.mark.parametrize(
    ("distilled", "words"),
    [
        (
            80,
            "Distillation helps here: dpt-sft-dft answers 80.0 % right and the control pt-sft 60.0 %, a difference of ",
        ),
        (62, "No difference seen: "),
        (60, "No difference seen: "),
        (40, "Distillation hurts here: "),
    ],
)
def test_headline(make_run: Writer, distilled: int, words: str) -> None:
    # Spread over other questions than the control's, lest the paired differences all have one sign.
    spread = flags(distilled, 100)[::-1]
    results = collect([make_run("a", {"pt-sft": flags(60, 100), "dpt-sft-dft": spread})])
    assert headline(results).startswith(words)
    assert "They did not train equally long" not in headline(results)


def test_headline_states_the_interval(make_run: Writer) -> None:
    # 30 questions gained, 10 lost: variance (40 - 100 * 0.04) / 99, half-width 1.96 * 0.0603 = 11.8 points.
    control = flags(60, 100)
    distilled = [False] * 10 + [True] * 80 + [False] * 10
    results = collect([make_run("a", {"pt-sft": control, "dpt-sft-dft": distilled})])
    assert "a difference of +20.0 points (95 % interval +8.2 to +31.8, paired by question)." in headline(results)


def test_headline_tells_of_unequal_training(make_run: Writer) -> None:
    first = make_run("a", {"pt-sft": flags(10, 20)}, steps=30)
    second = make_run("b", {"dpt-sft-dft": flags(14, 20)}, steps=60)
    assert "They did not train equally long: 60 and 30 steps." in headline(collect([first, second]))


def test_headline_without_anything_to_compare(make_run: Writer) -> None:
    assert "no control row" in headline(collect([make_run("a", {"dpt-sft-dft": flags(1, 2)})]))
    assert "no distilled row" in headline(collect([make_run("b", {"teacher": flags(1, 2), "pt-sft": flags(1, 2)})]))


def test_each_seed_is_compared_to_its_own_control(make_run: Writer) -> None:
    runs = [
        make_run(f"s{seed}", {"pt-sft": flags(10 + seed, 20), "dpt-sft-dft": flags(14, 20)}, seed=seed)
        for seed in (0, 1)
    ]
    results = collect(runs)
    for row in results.rows:
        control = find_control(results, row)
        assert control is not None
        assert (control.name, control.seed) == ("pt-sft", row.seed)
    assert "(seed 0) 50.0 %" in headline(results)
    assert "(seed 1) 55.0 %" in headline(results)


def test_the_control_is_the_longest_trained_row_without_distillation(make_run: Writer) -> None:
    rows = {"pt-sft": flags(8, 20), "pt-sft-dft": flags(9, 20), "pt-sft-sft": flags(10, 20)}
    run = make_run("a", rows | {"dpt-sft-dft": flags(14, 20)})
    data = json.loads((run / "results.json").read_text())
    for row, steps in zip(data["rows"], (20, 99, 30, 30), strict=True):
        row["steps"] = steps
    (run / "results.json").write_text(json.dumps(data))
    results = collect([run])
    control = find_control(results, results.rows[3])
    assert control is not None
    assert control.name == "pt-sft-sft"


def test_the_headline_is_about_the_papers_three_stages(make_run: Writer) -> None:
    rows = {"pt-sft": flags(8, 20), "dpt-dft-dft": flags(9, 20), "dpt-sft-dft": flags(10, 20), "dpt-sft": flags(11, 20)}
    assert "seen: dpt-sft-dft answers" in headline(collect([make_run("a", rows)]))
    del rows["dpt-sft-dft"]
    assert "seen: dpt-dft-dft answers" in headline(collect([make_run("b", rows)]))


def test_the_main_table(make_run: Writer) -> None:
    run = make_run("a", {"teacher": flags(9, 10), "pt-sft": flags(5, 10)})
    lines = markdown(collect([run])).splitlines()
    header, _, *rows = lines[next(at for at, line in enumerate(lines) if line.startswith("|")) :][:4]
    assert header.startswith("| model | accuracy % | questions | steps | seconds | parameters | ")
    assert rows[0].startswith("| teacher | 90.0 ± 19.3 | 10 | - | - | 7,654,321 | +40.0 ± ")
    assert rows[1] == "| pt-sft | 50.0 ± 26.3 | 10 | 30 | 200 | 7,654,321 | control |"
    assert {line.count("|") for line in (header, *rows)} == {8}


def test_markdown_has_both_tables_and_escapes_bars(make_run: Writer) -> None:
    run = make_run("a", {"pt-sft": flags(5, 10), "dpt|x": flags(6, 10)}, evaluation=False, gram=False)
    text = markdown(collect([run]))
    assert "| pt-sft | 50.0 ± 26.3 | 10 | 30 | 200 | 7,654,321 | control |" in text
    assert "| kind | questions | majority % | pt-sft % | dpt\\|x % |" in text
    assert "| count | 5 | 30.0 | 60.0 | 60.0 |" in text
    assert "| all | 10 | 35.0 | 50.0 | 60.0 |" in text


def test_a_run_without_kinds_has_no_kind_table(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text('{"rows": [{"name": "pt-sft", "accuracy": 0.5, "n": 4}]}')
    assert "kind of question" not in markdown(collect([tmp_path]))
