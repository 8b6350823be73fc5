"""Merging run folders, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
from report_runs import Writer, edit_row, flags, notes

from llavakd.report import collect, write_report


def test_rows_of_all_runs_are_merged_and_an_equal_teacher_is_kept_once(make_run: Writer) -> None:
    first = make_run("a", {"teacher": flags(18, 20), "pt-sft": flags(10, 20)})
    second = make_run("b", {"teacher": flags(18, 20), "dpt-sft-dft": flags(14, 20)}, seed=1)
    results = collect([first, second])
    assert [row.name for row in results.rows] == ["teacher", "pt-sft", "dpt-sft-dft"]
    assert [run.label for run in results.runs] == ["a", "b"]
    assert list(results.runs[0].stages) == ["dpt", "sft", "dft"]
    assert len(results.rows[2].predictions) == 20
    assert not notes(results)


def test_two_teachers_that_differ_are_refused(make_run: Writer) -> None:
    first = make_run("a", {"teacher": flags(18, 20)})
    second = make_run("b", {"teacher": flags(17, 20)})
    with pytest.raises(ValueError, match="'teacher' with seed 0"):
        collect([first, second])


def test_two_rows_of_one_name_and_seed_name_both_folders(make_run: Writer) -> None:
    first, second = make_run("a", {"pt-sft": flags(10, 20)}), make_run("b", {"pt-sft": flags(11, 20)})
    with pytest.raises(ValueError, match="different rows") as error:
        collect([first, second])
    assert str(first) in str(error.value)
    assert str(second) in str(error.value)


def test_seeds_of_one_name_are_both_kept_and_labelled(make_run: Writer) -> None:
    runs = [make_run(f"s{seed}", {"pt-sft": flags(10 + seed, 20)}, seed=seed) for seed in (0, 1)]
    results = collect(runs)
    assert [results.label(row) for row in results.rows] == ["pt-sft (seed 0)", "pt-sft (seed 1)"]


def test_a_row_copied_by_an_earlier_report_keeps_the_predictions_of_its_own_run(make_run: Writer) -> None:
    first, second = make_run("a", {"pt-sft": flags(10, 20)}), make_run("b", {"dpt-sft-dft": flags(14, 20)})
    rows = [json.loads((run / "results.json").read_text())["rows"][0] for run in (first, second)]
    (first / "results.json").write_text(json.dumps({"rows": rows}))
    results = collect([first, second])
    assert [row.name for row in results.rows] == ["pt-sft", "dpt-sft-dft"]
    assert results.rows[1].run.folder == second
    assert len(results.rows[1].predictions) == 20


def test_environments_that_differ_are_listed(make_run: Writer) -> None:
    first, second = make_run("a", {"pt-sft": flags(1, 2)}), make_run("b", {"dpt": flags(1, 2)})
    data = json.loads((second / "results.json").read_text())
    (second / "results.json").write_text(json.dumps(data | {"environment": {"torch": "2.12", "device": "cpu"}}))
    wanted = {"torch": ["2.11", "2.12"], "device": "cpu"}
    assert collect([first, second]).environment == wanted
    write_report([first, second], first)  # the first run now holds the list itself
    assert collect([first, second]).environment == wanted


def test_no_results_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no results\.json; run `llava-kd train` there first"):
        collect([tmp_path])
    with pytest.raises(ValueError, match="no run folder"):
        collect([])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", 'no list "rows"'),
        ('{"rows": [{"name": "x", "n": 3}]}', "row 0 lacks accuracy"),
        ('{"rows": [{"name": "x", "accuracy": 0.5, "n": 0}]}', "has n = 0"),
    ],
)
def test_broken_results_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        collect([tmp_path])


@pytest.mark.parametrize("line", ["{", '{"id": "q0"}', "3"])
def test_a_broken_prediction_names_file_and_line(make_run: Writer, line: str) -> None:
    run = make_run("a", {"pt-sft": flags(1, 2)})
    path = run / "evaluation" / "pt-sft" / "predictions.jsonl"
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(ValueError, match=r"predictions\.jsonl, line 3"):
        collect([run])


def test_missing_parts_are_noted(make_run: Writer) -> None:
    run = make_run("a", {"pt-sft": flags(1, 2)}, evaluation=False, gram=False, metrics=False)
    (run / "recipe.yaml").unlink()
    told = " ".join(notes(collect([run])))
    assert "pt-sft: no predictions" in told
    assert "pt-sft: no Gram matrix" in told
    assert "a: no metrics of dpt, sft, dft." in told
    assert "a: no recipe.yaml." in told


def test_an_unfinished_stage_is_noted(make_run: Writer) -> None:
    run = make_run("a", {"pt-sft": flags(1, 2)})
    (run / "pipeline.json").write_text(json.dumps({"stages": [{"name": "dpt", "state": "running"}]}))
    assert "a: stage dpt is running, not done." in notes(collect([run]))


def test_stages_keep_the_order_of_training_without_a_pipeline_file(make_run: Writer) -> None:
    run = make_run("a", {"pt-sft": flags(1, 2)})
    (run / "pipeline.json").unlink()
    assert list(collect([run]).runs[0].stages) == ["dpt", "sft", "dft"]
    assert notes(collect([run])) == []


def test_a_gram_matrix_of_another_picture_is_left_out(make_run: Writer) -> None:
    first, second = make_run("a", {"pt-sft": flags(1, 2)}), make_run("b", {"dpt": flags(1, 2)})
    (second / "evaluation" / "probe.json").write_text(json.dumps({"id": "other", "images": []}))
    results = collect([first, second])
    assert isinstance(results.rows[0].gram, np.ndarray)
    assert results.rows[1].gram is None
    assert any("another probe picture" in note for note in notes(results))


def test_runs_of_one_folder_name_are_told_apart_by_the_folders_above(make_run: Writer) -> None:
    runs = [make_run("x/run", {"pt-sft": flags(1, 2)}), make_run("y/run", {"dpt-sft-dft": flags(1, 2)})]
    assert [run.label for run in collect(runs).runs] == ["x/run", "y/run"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"accuracy": "high"}, "row 1 lacks accuracy"), ({"n": 2.5}, "row 1 lacks n"), ({"name": 3}, "row 1 lacks name")],
)
def test_a_row_of_wrong_types_is_refused(make_run: Writer, changes: dict[str, object], message: str) -> None:
    run = make_run("a", {"teacher": flags(1, 2), "pt-sft": flags(1, 2)})
    edit_row(run, 1, **changes)
    with pytest.raises(ValueError, match=message):
        collect([run])


def test_a_whole_number_is_an_accuracy(make_run: Writer) -> None:
    run = make_run("a", {"pt-sft": flags(2, 2)})
    edit_row(run, 0, accuracy=1)
    assert collect([run]).rows[0].accuracy == 1


def test_lines_end_at_newlines_only(make_run: Writer) -> None:
    run = make_run("a", {"pt-sft": flags(0, 2)}, prediction="one\u2028two")
    path = run / "evaluation" / "pt-sft" / "predictions.jsonl"
    path.write_text(path.read_text().replace("\\u2028", "\u2028"), encoding="utf-8")
    assert collect([run]).rows[0].predictions["q0"]["prediction"] == "one\u2028two"


def test_an_emptied_log_is_a_missing_one(make_run: Writer) -> None:
    run = make_run("a", {"pt-sft": flags(1, 2)})
    (run / "sft" / "metrics.jsonl").write_text("")
    assert "a: no metrics of sft." in notes(collect([run]))
