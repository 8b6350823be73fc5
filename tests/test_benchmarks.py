"""The scripts that need a GPU or free cores for their figures run through on models and data of a toy's size."""

import dataclasses
import gc
import json
import math
import threading

import pipeline
import plan_step
import power
import pytest
import scaling
import step
import step_contenders
import torch
from accelerate.state import AcceleratorState

from llavakd.data.chat import Segment
from llavakd.models.quantized import QuantizedLinear
from llavakd.plan import _COMPILED

PARTS = ("ce", "response_kl", "visual_kl", "relation")


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    out = tmp_path_factory.mktemp("step") / "step.json"
    gc.freeze()  # it collects for each contender, and need not look through all that is imported each time
    step.main(["--tiny", "--out", str(out), "--rows", "2", "--backend", "eager", "--profile"])
    gc.unfreeze()
    AcceleratorState._reset_state(reset_partial_state=True)
    return json.loads(out.read_text(encoding="utf-8")), out.with_suffix(".txt").read_text(encoding="utf-8")


def test_every_contender_is_measured_beside_the_reference(steps):
    lines = steps[0]["steps"]
    fp8 = [] if torch.cuda.is_available() else [(stage, "ours, both compiled, fp8 teacher") for stage in ("dft", "dpt")]
    left_out = [line for line in lines if "failed" in line or "skipped" in line]
    assert [(line["stage"], line["name"]) for line in left_out] == fp8
    assert all("fp8 needs a Hopper GPU" in line["skipped"] for line in left_out)
    names = [line["name"] for line in lines if line["stage"] == "dft"]
    assert names == [contender.name for contender in step_contenders.CONTENDERS]
    for line in (line for line in lines if line not in left_out):
        base = next(one for one in lines if one["stage"] == line["stage"])
        assert base["name"] == "reference"
        assert line["ms"] > 0
        assert line["gib"] > 0
        assert line["ms_to_reference"] == pytest.approx(line["ms"] / base["ms"])


def test_a_quantised_teacher_is_measured_with_its_drift_and_the_next_contender_gets_the_exact_one(tmp_path):
    size = dataclasses.replace(step_contenders.TINY, backend="eager")
    models = step_contenders.make_models(recipe := step_contenders.read_recipe(tmp_path), size, "cpu")
    case = step_contenders.make_case(recipe, "dft", models, size, 2, "cpu")
    contender = dataclasses.replace(step_contenders.QUANTIZED, quantize="int8")
    line = step.measure_contender(case, contender, size, "cpu")
    assert set(line["parts_ms"]) == {"tower", "teacher forward", "student forward", "loss", "backward"}
    assert line["teacher_drift"].keys() == {"response_kl", "visual_kl"}
    assert 0 < max(line["teacher_drift"].values()) < 0.1
    exact = step.measure_contender(case, step_contenders.FAST, size, "cpu")
    assert "teacher_drift" not in exact
    assert line["gib"] > 0
    kinds = {type(module) for module in models.teacher.parts()["language_model"].modules()}
    assert torch.nn.Linear in kinds
    assert QuantizedLinear not in kinds
    changed, drift = step_contenders.quantized(case, "int8")
    given = {name: getattr(case.batch, name) for name in ("input_ids", "attention_mask")}
    given["pixel_values"] = case.batch.pixel_values.bfloat16()
    with torch.no_grad():
        hidden = [one.models.teacher.model.model(**given).last_hidden_state.double() for one in (case, changed)]
    p, q = ((one @ models.teacher.head.double().T).softmax(-1) for one in hidden)
    kl = (p * (p / q).log()).sum(-1)
    assert drift["response_kl"] == pytest.approx(float(kl[:, :-1][case.batch.labels[:, 1:] != -100].mean()), rel=0.1)
    assert drift["visual_kl"] == pytest.approx(float(kl[case.batch.segments == Segment.VISUAL].mean()), rel=0.1)
    AcceleratorState._reset_state(reset_partial_state=True)


def test_the_parts_of_a_step_are_those_of_its_path(steps):
    for line in steps[0]["steps"]:
        if line["name"] == "ours":
            teacher = {"teacher forward"} if line["stage"] != "sft" else set()
            assert set(line["parts_ms"]) == {"tower", "student forward", "loss", "backward"} | teacher
        if line["name"] == "reference" and line["stage"] == "dft":
            assert set(line["parts_ms"]) == {"student with its tower", "teacher with its tower", "loss", "backward"}


def test_losses_and_gradients_of_ours_and_of_the_reference_agree(steps):
    lines = steps[0]["agreement"]
    pairs = [("ours", "float32"), ("reference", "float32"), ("ours", "reference")]
    assert [(line["name"], line["beside"]) for line in lines] == pairs * 2
    for line in lines:
        assert line["losses"].keys() == set(PARTS)
        for part, values in line["losses"].items():
            assert values[line["name"]] == pytest.approx(values[line["beside"]], rel=0.15), part
        assert 0 < max(line["gradient_error"].values()) < 0.05
    assert lines[0]["gradient_error"].keys() == {"projector", "layers", "head", "all"}
    assert lines[3]["gradient_error"].keys() == {"projector", "all"}  # dpt


def test_what_a_gpu_draws_is_the_median_of_the_last_third(monkeypatch):
    with power.watched("cpu") as none:
        pass
    assert none == {}
    watts, third = iter([100_000, 200_000, 300_000, 900_000, 400_000, 500_000, 600_000]), threading.Event()

    def drawn() -> int:
        found = next(watts, 700_000)
        if found == 600_000:
            third.set()
        return found

    monkeypatch.setattr(torch.cuda, "power_draw", drawn)
    monkeypatch.setattr(torch.cuda, "clock_rate", lambda: 1500)
    with power.watched("cuda") as told:
        third.wait(10)
    assert told["watts"] in (550, 650, 700)
    assert told["mhz"] == 1500


def test_a_step_has_a_floor_and_a_profile(steps):
    told, table = steps
    assert [line["stage"] for line in told["floor"]] == ["dft", "dpt", "sft"]
    for line in told["floor"]:
        for time, rate in (("ms", "tflops"), ("lasting_ms", "lasting_tflops")):
            assert line[time] == pytest.approx(1e3 * sum(line["tflop"].values()) / told["product"][rate])
    assert table.count("Self CPU") >= 4
    assert "ours, both compiled, dpt, 2 rows" in table


def test_a_contender_that_fails_is_noted_and_the_next_ones_go_on(tmp_path):
    results = step.Results(out=tmp_path / "x.json", started=0.0, minutes=math.inf, found={"steps": []})
    place = {"stage": "dft", "rows": 2, "name": "reference"}
    results.note("steps", place, lambda: 1 / 0)
    results.note("steps", place, lambda: {"ms": 2.0, "gib": 1.0})
    results.minutes = 0
    results.note("steps", place, lambda: {"ms": 2.0, "gib": 1.0})
    failed, measured, skipped = json.loads(results.out.read_text(encoding="utf-8"))["steps"]
    assert failed["failed"].startswith("ZeroDivisionError")
    assert measured["ms_to_reference"] == 1
    assert "skipped" in skipped


def test_the_loader_is_timed_and_padding_counted(tmp_path):
    out = tmp_path / "pipeline.json"
    pipeline.main(["--tiny", "--out", str(out)])
    told = json.loads(out.read_text(encoding="utf-8"))
    assert [line["grouping"] for line in told["padding"]] == ["none", "length", "modality_length"]
    for line in told["padding"]:
        assert 0 <= line["padding"] < 1
        assert line["padded_tokens"] >= line["live_tokens"] > 0
    (row,) = told["row_ms"]
    parts = sum(value for name, value in row.items() if not name.startswith("all"))
    assert 0.3 * parts < row["all, by the data set"] < 3 * parts
    assert [(line["workers"], line["step_ms"]) for line in told["loader"]] == [(0, 0), (1, 0), (0, 20), (1, 20)]
    for line in told["loader"]:
        assert line["rows_per_s"] > 0
        assert line["waiting"] is None or 0 <= line["waiting"] <= 1


def test_the_plan_beside_the_measured_steps_is_that_of_the_source_as_it_is():
    kept = json.loads((plan_step.STEP.parent / "plan_step.json").read_text(encoding="utf-8"))
    found = plan_step.beside(json.loads(plan_step.STEP.read_text(encoding="utf-8")))
    assert {case["name"] for case in found["cases"]} == set(plan_step.CONTENDERS)
    for case in found["cases"]:
        case |= {key: pytest.approx(case[key], rel=0.01) for key in ("planned", "kept") if key in case}
    assert found["cases"] == kept["cases"]
    shares = {(case["stage"], round(case["kept"], 1)) for case in kept["cases"] if "kept" in case}
    assert shares == {(stage, round(_COMPILED[stage != "dpt"], 1)) for stage in ("dpt", "sft", "dft")}


@pytest.mark.dist
def test_two_processes_have_the_losses_of_one_in_every_way_to_hold_the_models(tmp_path):
    out = tmp_path / "scaling.json"
    scaling.main(["--tiny", "--out", str(out)])
    base, *lines = json.loads(out.read_text(encoding="utf-8"))["lines"]
    assert [(line["processes"], line["sharding"]) for line in lines] == [(2, one) for one in scaling.SHARDINGS]
    assert base["losses"][0]["loss"] != base["losses"][1]["loss"]
    for line in lines:
        assert line["loss_error"].keys() == {*PARTS, "loss", "grad_norm"}
        assert max(line["loss_error"].values()) < 1e-5
        assert line["scaling"] == pytest.approx(line["tokens_per_s"] / base["tokens_per_s"] / 2)


@pytest.mark.dist
def test_shards_of_one_process_have_the_losses_of_none(tmp_path):
    out = tmp_path / "scaling.json"
    scaling.main(["--tiny", "--alone", "--out", str(out)])
    base, *lines = json.loads(out.read_text(encoding="utf-8"))["lines"]
    assert [(line["processes"], line["sharding"]) for line in lines] == [(1, one) for one in scaling.ALONE]
    for line in lines:
        assert max(line["loss_error"].values()) < 1e-5
    assert [line["shards"] > 20 for line in lines] == [False, True, True]
    assert [line["alone"] for line in (base, *lines)] == [False, True, True, True]
