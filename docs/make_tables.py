"""Put the figures of benchmarks/results into the pages, between `<!-- table: NAME -->` and `<!-- end -->`.

python docs/make_tables.py
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import study_tables
from study_tables import table

DOCS = Path(__file__).parent
RESULTS = DOCS.parent / "benchmarks" / "results"
PLACE = re.compile(r"(<!-- table: (.+?) -->\n).*?(<!-- end -->)", re.DOTALL)


def read(name: str) -> Any:
    """A results file."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def measured(environment: dict[str, str]) -> str:
    """Where and with what."""
    rest = ", ".join(f"{key} {value}" for key, value in environment.items() if key not in ("device", "processes"))
    return f"Measured on {environment['device']}; {rest}.\n\n"


def quickstart() -> str:
    """Accuracy of the built-in run."""
    names = {"pt-sft-sft": "`pt-sft-sft`, the equal-step control", "dpt-sft-dft": "`dpt-sft-dft`"}
    rows = sorted(read("quickstart")["rows"], key=lambda row: ["teacher", *names].index(row["name"]))
    return table(
        ["", "right"],
        ([names.get(row["name"], row["name"]), f"{row['accuracy']:.1%}".replace("%", " %")] for row in rows),
    )


def quickstart_cost() -> str:
    """Seconds of the built-in run."""
    told = read("quickstart")
    rows = [(f"training of `{row['name']}`", row) for row in told["rows"] if row["train_seconds"]]
    lines = [(name, f"{row['train_seconds']:.0f}", f"{row['steps']}", f"{row['tokens']:,}") for name, row in rows]
    lines.append(("the whole command", f"{told['command_seconds']}", "", ""))
    return measured(told["environment"]) + table(["", "seconds", "steps", "tokens"], lines)


def losses() -> str:
    """Time and memory at the largest batch of each pair."""
    told = read("losses")
    largest = max(line["rows"] for line in told["speed"])
    lines = [line for line in told["speed"] if line["rows"] == largest]
    rows = [(line["pair"], line["name"], *_cost(line)) for line in lines]
    header = ["pair", f"{largest:,} rows", "ms", "x floor", "GiB beyond"]
    return measured(told["environment"]) + table(header, rows, text_columns=2)


def _cost(line: dict[str, Any]) -> tuple[str, str, str]:
    if "failed" in line:
        return line["failed"], "", ""
    return (
        f"{line['ms']:.1f}",
        f"{line['to_floor']:.2f}",
        "" if line["extra_gib"] is None else f"{line['extra_gib']:.2f}",
    )


def errors() -> str:
    """Error of the gradients."""
    rows = [
        (
            line["pair"],
            line["name"],
            f"{line['kl']:.4f}",
            f"{line['hidden_error']:.2%}",
            f"{line['head_error']:.2%}",
        )
        for line in read("losses")["errors"]
    ]
    return table(["pair", "", "KL", "to hidden states", "to the head"], rows, text_columns=2)


def step() -> str:
    """A whole step of each stage at most rows, beside the released one."""
    told = read("step")
    most = max(told["size"]["rows"])
    rows: list[tuple[str, ...]] = []
    for floor in (line for line in told["floor"] if line["rows"] == most):
        stage = floor["stage"]
        lines = [line for line in told["steps"] if (line["stage"], line["rows"]) == (stage, most)]
        for what, key in (("alone", "ms"), ("without a pause", "lasting_ms")):
            rows.append((stage, f"floor: its products, as fast as one {what}", f"{floor[key]:.0f}", *[""] * 5))
        rows += [(stage, line["name"], *_step_cost(line), *_drawn(line)) for line in lines]
    header = ["stage", f"{most} rows", "ms", "x reference", "GiB", "x reference", "W", "MHz"]
    return measured(told["environment"]) + table(header, rows, text_columns=2)


def _step_cost(line: dict[str, Any]) -> tuple[str, ...]:
    if "ms" not in line:
        return line.get("failed", line.get("skipped", "")), "", "", ""
    share = line["ms_to_reference"], line["gib_to_reference"]
    return f"{line['ms']:.0f}", f"{share[0]:.2f}", f"{line['gib']:.1f}", f"{share[1]:.2f}"


def _drawn(line: dict[str, Any]) -> tuple[str, str]:
    return f"{line['watts']:.0f}" if "watts" in line else "", f"{line['mhz']:,.0f}" if "mhz" in line else ""


def step_headline() -> str:
    """The distilling step in three lines."""
    lines = {line["name"]: line for line in read("step")["steps"] if (line["stage"], line["rows"]) == ("dft", 16)}
    names = {
        "reference": "what the released trainer computes",
        "ours, both compiled": "`compile: true`",
        "ours, both compiled, fp8 teacher": "`compile: true`, `teacher.quantize: fp8`",
    }
    rows = [(text, *_step_cost(lines[name])) for name, text in names.items()]
    return table(["", "ms", "", "GiB", ""], rows)


def step_parts() -> str:
    """Milliseconds by part of the distilling stages."""
    told = read("step")
    most, names = max(told["size"]["rows"]), ("reference", "ours, both compiled", "ours, both compiled, fp8 teacher")
    rows = [
        (line["stage"], line["name"], ", ".join(f"{part} {ms:.0f}" for part, ms in line["parts_ms"].items()))
        for line in told["steps"]
        if line["name"] in names and line["rows"] == most and line["stage"] != "sft" and "ms" in line
    ]
    return table(["stage", "", "ms by part, waiting for the device after each"], rows, text_columns=3)


def step_exactness() -> str:
    """Losses and gradients of one step."""
    lines = [line for line in read("step")["agreement"] if line["stage"] == "dft" and "losses" in line]
    rows = [
        (
            f"{line['name']} beside {line['beside']}",
            *(
                f"{pair[line['name']]:.4f}, {pair[line['beside']]:.4f}"
                for pair in (line["losses"][part] for part in ("ce", "response_kl", "visual_kl", "relation"))
            ),
            f"{line['gradient_error']['all']:.1%}",
        )
        for line in lines
    ]
    return table(["", "ce", "response KL", "visual KL", "relation", "gradient off by"], rows)


def packing() -> str:
    """Tokens a second on uneven rows."""
    told = read("step_packing")
    rows = [
        (
            line["kind"],
            f"{line['padding']:.0%}",
            f"{line['live_tokens_per_s']:,.0f}",
            f"{line['to_padded']:.2f}",
            f"{line['peak_gib']:.1f}",
            f"{line['loss']:.4f}",
        )
        for line in told["kinds"]
    ]
    header = [f"{told['rows']} rows", "padding", "tokens/s", "x padded", "peak GiB", "mean loss"]
    return measured(told["environment"]) + table(header, rows)


def loader() -> str:
    """Rows a second of the trainer's own loader, and what a step waits for."""
    told = read("pipeline")
    rate = {line["workers"]: line["rows_per_s"] for line in told["loader"] if not line["step_ms"]}
    steps = [line for line in told["loader"] if line["step_ms"]]
    rows = [(f"{line['workers']}", f"{rate[line['workers']]:.0f}", f"{line['waiting']:.2%}") for line in steps]
    header = ["workers", "rows/s, as fast as it can", f"of a step of {steps[0]['step_ms']:.0f} ms, waiting"]
    return measured(told["environment"]) + table(header, rows)


def scaling() -> str:
    """The step on several GPUs beside one."""
    told = read("scaling")
    rows = [
        (
            "compiled" if line["compiled"] else "not compiled",
            str(line["processes"]),
            f"`{line['sharding']}`" if line["processes"] > 1 else "",
            f"{line['ms']:.0f}",
            f"{line['tokens_per_s']:,.0f}",
            f"{line['scaling']:.3f}",
            f"{line['gib']:.1f}",
            *(f"{line['loss_error'][name]:.0e}" if line["processes"] > 1 else "" for name in ("loss", "grad_norm")),
        )
        for line in told["lines"]
    ]
    beside = ["x so many times one", "peak GiB each", "loss off by", "gradient's norm off by"]
    header = ["", "GPUs", "`sharding`", "ms", "tokens/s", *beside]
    return measured(told["environment"]) + table(header, rows)


def scaling_alone() -> str:
    """The step in shards of one process beside that of a plain one."""
    told = read("scaling_alone")
    rows = [
        (
            "compiled" if line["compiled"] else "not compiled",
            f"`{line['sharding']}`" if line["alone"] else "",
            f"{line['ms']:.0f}",
            f"{line['scaling']:.3f}",
            f"{line['gib']:.1f}",
            f"{line['loss_error']['loss']:.0e}" if line["alone"] else "",
        )
        for line in told["lines"]
    ]
    header = ["", "`sharding`", "ms", "x a plain process", "peak GiB", "loss off by"]
    return measured(told["environment"]) + table(header, rows)


def plan_step() -> str:
    """Planned and measured memory of the trainer's own step."""
    told = read("plan_step")
    rows = [
        (
            f"{case['stage']}, {case['rows']} rows{case['name'].removeprefix('ours')}",
            f"{case['planned']:.1f}",
            f"{case['measured']:.1f}",
            f"{case['planned'] / case['measured'] - 1:+.0%}",
            f"{case['kept']:.2f}" if "kept" in case else "",
        )
        for case in told["cases"]
    ]
    header = ["", "peak GiB, planned", "measured", "", "layers keep, of what they do uncompiled"]
    return measured(told["environment"]) + table(header, rows)


def plan_measured() -> str:
    """Planned and measured FLOPs."""
    told = read("plan_measured")
    rows = [
        (
            f"`{case['recipe']}`, {case['stage']}, {case['rows']} rows"
            + (", checkpointing" if case["gradient_checkpointing"] else ""),
            *(f"{case['tflop'][key]:.1f}" for key in ("planned", "measured")),
            f"{case['tflop']['planned / measured'] - 1:+.0%}",
        )
        for case in told["cases"]
    ]
    return measured(told["environment"]) + table(["", "TFLOP of a step, planned", "measured", ""], rows)


def gpu_tests() -> str:
    """Outcomes by file."""
    told = read("gpu_tests")
    tests = told["tests"] | read("gpu_tests_two")["tests"]  # which one GPU skips
    found = Counter((test.partition("::")[0], result["outcome"]) for test, result in tests.items())
    rows = [(f"`{file}`", outcome, str(count)) for (file, outcome), count in sorted(found.items())]
    return measured(told["environment"]) + table(["file", "outcome", "tests"], rows, text_columns=2)


def plan() -> str:
    """Estimated hours by recipe and stage."""
    told = read("plan_llava_kd")["hours"]
    gpus = list(next(iter(told.values())))
    rows = [
        (f"`{name}`", _stages(hours[gpus[0]]), *(f"{sum(hours[gpu].values()):.0f}" for gpu in gpus))
        for name, hours in told.items()
    ]
    return table(["recipe", f"by stage, {gpus[0]}", *(f"in all, {gpu}" for gpu in gpus)], rows, text_columns=2)


def _stages(hours: dict[str, float]) -> str:
    return ", ".join(f"{stage} {value:.1f}" for stage, value in hours.items())


def sweep() -> str:
    """Accuracy of every seed beside the control's, by setting and weights."""
    found: dict[tuple[float, ...], dict[str, dict[int, float]]] = {}
    for run in read("world_sweep")["runs"]:
        setting = found.setdefault((-run["noise"], run["scenes"], run["epochs"]), {})
        setting.setdefault(run["weights"], {})[run["seed"]] = run["accuracy"]
    rows = [
        (f"{scenes:,}", f"{epochs:g}", f"{-100 * noise:.0f} %", weights, *_beside(scores, setting["control"]))
        for (noise, scenes, epochs), setting in sorted(found.items())
        for weights, scores in setting.items()
        if weights != "control"
    ]
    header = ["scenes", "epochs", "wrong answers", "weights", "control", "distilled", "difference"]
    return table(header, rows, text_columns=0)


def _beside(scores: dict[int, float], control: dict[int, float]) -> Iterator[str]:
    """Control, distilled and their difference, seed by seed."""
    for form, values in (
        (".1f", [control[seed] for seed in sorted(scores)]),
        (".1f", [scores[seed] for seed in sorted(scores)]),
        ("+.1f", [scores[seed] - control[seed] for seed in sorted(scores)]),
    ):
        yield ", ".join(f"{100 * value:{form}}" for value in values)


def check() -> str:
    """Seconds to start, and rows a second."""
    told = read("check")
    start, fast, decode = told["start"], told["fast"], told["decode"]
    rows = [
        (
            f"start on {start['rows']:,} rows, every picture looked up",
            f"{start['seconds']:.0f} s, {start['resident_gib']:.1f} GiB",
        ),
        (
            f"`check --fast`, {fast['rows']:,} rows of {fast['text_tokens']:.0f} text tokens",
            f"{fast['rows_per_s']:,.0f} rows/s",
        ),
        (f"`check`, {decode['rows']:,} rows with pictures of 640 x 480", f"{decode['rows_per_s']:,.0f} rows/s"),
        ("the bare decoder on the same pictures", f"{decode['bare_decoder_rows_per_s']:,.0f} rows/s"),
    ]
    versions = told["environment"] | {"device": f"{told['cores']} CPU cores"}
    return measured({key: versions[key] for key in ("device", "python", "torch", "commit")}) + table(["", ""], rows)


def nlvr() -> str:
    """Accuracy beside the majority answer's."""
    rows = [
        (row["name"], *(f"{100 * row[key]:.1f}" for key in ("accuracy", "majority")), f"{row['n']:,}")
        for row in read("nlvr_full")["rows"]
    ]
    return table(["", "right, %", "most frequent answer, %", "questions"], rows)


TABLES = {
    "quickstart": quickstart,
    "quickstart cost": quickstart_cost,
    "losses": losses,
    "errors": errors,
    "step": step,
    "step headline": step_headline,
    "step parts": step_parts,
    "step exactness": step_exactness,
    "packing": packing,
    "loader": loader,
    "scaling": scaling,
    "scaling alone": scaling_alone,
    "plan step": plan_step,
    "plan measured": plan_measured,
    "gpu tests": gpu_tests,
    "plan": plan,
    "sweep": sweep,
    "nlvr": nlvr,
    "check": check,
    **study_tables.TABLES,
}
PAGES = [DOCS.parent / "README.md", *sorted(DOCS.glob("*.md"))]


def filled(text: str) -> str:
    """A page with every table made anew."""
    return PLACE.sub(lambda found: f"{found[1]}\n{TABLES[found[2]]()}\n{found[3]}", text)


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")
