"""A whole training step at the paper's size: what the released trainer computes beside ours, in one process.

    python benchmarks/step.py --out benchmarks/results/step.json --profile    # on one H200, about six minutes
    python benchmarks/step.py --out /tmp/step.json --tiny                     # anywhere, in seconds: does it run?
    python benchmarks/step.py --render benchmarks/results/step.json           # docs/performance-step.png

SigLIP-so400m-384, Qwen2.5-3B -> 0.5B, random weights, the same rows for all: 20 tokens, 729 of a picture, 180 of which the
last 100 are the answer. No optimiser step, but for the contender that says so. The reference holds its student in bfloat16
and runs both models whole; ours is the trainer's own path, float32 weights under autocast. `ms` is of steps in a row, as
they are in training; `watts` and `mhz` are the GPU's meanwhile. Memory is what a contender needs by itself: its models, and
the peak beyond what stands between two steps.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import gc
import json
import statistics
import tempfile
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from plan_measured import prepared
from power import watched
from step_contenders import (
    CONTENDERS,
    FAST,
    NARROW,
    OURS,
    QUANTIZED,
    REFERENCE,
    TINY,
    USUAL,
    Case,
    Contender,
    Size,
    Step,
    cast,
    make_case,
    make_models,
    make_step,
    quantized,
    read_recipe,
    released,
    switched,
    weigh,
)
from torch import Tensor
from torch._dynamo.utils import counters
from torch.profiler import ProfilerActivity, profile

from llavakd.config import Recipe
from llavakd.data.collate import Batch
from llavakd.errors import UserError
from llavakd.models.student import VisionLanguageModel
from llavakd.plan import StageCost, Tokens
from llavakd.train.step import look
from losses import environment, measure


class PartClock:
    """Milliseconds of each part; it waits for the device around each, so that their sum is a little more than a step."""

    def __init__(self, device: str) -> None:
        self.wait = torch.cuda.synchronize if device == "cuda" else (lambda: None)
        self.found: dict[str, list[float]] = defaultdict(list)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Time what happens inside."""
        self.wait()
        start = time.perf_counter()
        yield
        self.wait()
        self.found[name].append(1e3 * (time.perf_counter() - start))

    def medians(self) -> dict[str, float]:
        """Of all steps."""
        return {name: statistics.median(times) for name, times in self.found.items()}


def measure_contender(case: Case, contender: Contender, size: Size, device: str) -> dict[str, Any]:
    """Time, memory, time by part, seconds of compilation, where the host waits, and a quantised teacher's drift."""
    drift = None
    if contender.quantize:
        case, drift = quantized(case, contender.quantize)
    graphs = counters["stats"]["unique_graphs"]
    with switched(case, contender):
        step, stands = make_step(case, contender)
        clock = PartClock(device)
        with clock("first"):
            step()
        first = clock.found.pop("first")[0]
        with watched(device) as drawn:
            milliseconds, beyond = measure(step, device, 1, in_a_row=2 * size.repeats)
        for _ in range(0 if contender.optimizer else size.repeats):
            step(clock)
        line = {
            "ms": milliseconds,
            "gib": beyond + stands() / 2**30,
            "tokens_per_s": case.batch.labels.numel() / milliseconds * 1e3,
            "parts_ms": clock.medians(),
            "host_waits": host_waits(step) if device == "cuda" else None,
            **drawn,
        }
    graphs = counters["stats"]["unique_graphs"] - graphs
    if graphs:  # of those that an earlier contender has compiled, none
        line |= {"graphs": graphs, "compile_s": (first - milliseconds) / 1e3}
    if drift:
        line["teacher_drift"] = drift
    return line


def host_waits(step: Step) -> dict[str, int]:
    """How often one step waits for the device, by line of code."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = [one for one in seen if "synchroniz" in str(one.message)]
    return dict(Counter(f"{'/'.join(Path(one.filename).parts[-3:])}:{one.lineno}" for one in waits))


def agreement(case: Case) -> list[dict[str, Any]]:
    """Losses by part and gradients of ours and of the reference, which takes its rows one by one, beside float32's."""
    found = {}
    exact = copy.deepcopy(case.models.teacher)
    cast(exact, torch.float32)
    found["float32"] = released_gradients(case, case.models.student, exact)
    del exact
    found["reference"] = released_gradients(case, case.models.narrow, case.models.teacher)
    with switched(case, OURS):
        state = prepared(case.stage, case.models.student, case.teacher, vocab_size=len(case.models.student.head))
        told = state.module(case.host, *look(state, case.host), case.counts)
        state.accelerator.backward(told.total)
        found["ours"] = told.parts, taken_gradients(case.models.student)
    lines = []
    for name, beside in (("ours", "float32"), ("reference", "float32"), ("ours", "reference")):
        (parts, gradients), (other_parts, others) = found[name], found[beside]
        values = {key: {name: float(parts[key]), beside: float(other_parts[key])} for key in other_parts}
        errors = relative_errors(gradients, others)
        lines.append({"name": name, "beside": beside, "losses": values, "gradient_error": errors})
    return lines


def released_gradients(
    case: Case, student: VisionLanguageModel, teacher: VisionLanguageModel
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Mean losses and gradients over rows taken one by one: its relation is one cosine over all that it is given."""
    student.train_only(case.stage.train)
    student.model.train()
    sums: dict[str, Any] = defaultdict(float)
    rows = len(case.batch.labels)
    for row in range(rows):
        parts = released(case, row_of(case.batch, row), student, teacher)
        (weigh(parts, case.stage) / rows).backward()
        for name, value in parts.items():
            sums[name] += value.detach().float() / rows
    return dict(sums), taken_gradients(student)


def row_of(batch: Batch, row: int) -> Batch:
    """One row with its picture."""
    cut: dict[str, Any] = {name: held[row : row + 1] for name, held in vars(batch).items() if isinstance(held, Tensor)}
    return dataclasses.replace(batch, **cut | {"image_rows": torch.zeros_like(cut["image_rows"])})


def taken_gradients(model: VisionLanguageModel) -> dict[str, Tensor]:
    """By name, in float32; the model is left without."""
    found = {name: p.grad.float() for name, p in model.model.named_parameters() if p.grad is not None}
    model.model.zero_grad()
    return found


def relative_errors(gradients: dict[str, Tensor], others: dict[str, Tensor]) -> dict[str, float]:
    """Norm of the difference over the norm of the other, for all that learns and by part."""
    assert gradients.keys() == others.keys(), "not the same parameters learn"
    kinds = {"projector": "multi_modal_projector", "layers": ".layers.", "head": "embed_tokens", "all": ""}
    squares: dict[str, list[Tensor]] = defaultdict(lambda: [torch.zeros(()), torch.zeros(())])
    for name, gradient in gradients.items():
        pair = ((gradient - others[name]).square().sum().cpu(), others[name].square().sum().cpu())
        for kind in (kind for kind, mark in kinds.items() if mark in name):
            squares[kind] = [total + one for total, one in zip(squares[kind], pair, strict=True)]
    return {kind: float((difference / whole).sqrt()) for kind, (difference, whole) in squares.items()}


def product_rates(size: Size, device: str) -> dict[str, float]:
    """TFLOP/s of a bfloat16 matrix product by itself, and of so many in a row that a GPU comes to its limit of power."""
    left, right = (torch.randn(size.matrix, size.matrix, device=device).bfloat16() for _ in range(2))
    tflop = 2 * size.matrix**3 / 1e12
    alone, _ = measure(lambda: left @ right, device, 4 * size.repeats)
    with watched(device) as drawn:
        lasting, _ = measure(lambda: left @ right, device, 1, in_a_row=400 * size.repeats if device == "cuda" else 1)
    return {"tflops": 1e3 * tflop / alone, "lasting_tflops": 1e3 * tflop / lasting, **drawn}


def floor_of(case: Case, recipe: Recipe, size: Size, rates: dict[str, float]) -> dict[str, Any]:
    """FLOPs of a step by part, as `llava-kd plan` counts them, and the time they would take at these rates."""
    rows = len(case.batch.labels)
    tokens = Tokens(rows, size.visual, size.text, size.response, size.visual + size.text)
    cost = StageCost(recipe, case.stage, case.models.student, case.teacher, tokens, 1)
    tflop = {part: rows * flops / 1e12 for part, flops in cost.row_flops(rows).items()}
    ms, lasting = (1e3 * sum(tflop.values()) / rates[key] for key in ("tflops", "lasting_tflops"))
    return {"ms": ms, "lasting_ms": lasting, "tflop": tflop}


def write_profile(path: Path, case: Case, contender: Contender, device: str) -> dict[str, Any]:
    """Add the 30 operators that take most of two steps to a file."""
    kinds = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * (device == "cuda")]
    if contender.quantize:
        case, _ = quantized(case, contender.quantize)
    with switched(case, contender):
        step, _ = make_step(case, contender)
        step()
        with profile(activities=kinds) as found:
            step()
            step()
    by = "self_cuda_time_total" if device == "cuda" else "self_cpu_time_total"
    table = found.key_averages().table(sort_by=by, row_limit=30, max_name_column_width=90)
    with path.open("a", encoding="utf-8") as file:
        file.write(f"{contender.name}, {case.stage.name}, {len(case.batch.labels)} rows, two steps\n{table}\n\n")
    return {"file": path.name}


@dataclass(kw_only=True)
class Results:
    """What was found so far; on disk after every line, so that a run that is cut off keeps it."""

    out: Path
    started: float
    minutes: float
    found: dict[str, Any]

    def note(self, section: str, place: dict[str, Any], make: Callable[[], Any]) -> None:
        """Add what `make` tells, or why it could not."""
        if time.perf_counter() - self.started > 60 * self.minutes:
            told: Any = {"skipped": f"{self.minutes} minutes were over"}
        else:
            try:
                told = make()
            except UserError as error:  # what this device does not have
                told = {"skipped": str(error)}
            except Exception as error:  # out of memory, or what a compiler cannot do: the others are measured still
                told = {"failed": f"{type(error).__name__}: {str(error)[:300]}"}
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        for line in told if isinstance(told, list) else [told]:
            line = place | line
            if section == "steps":
                line |= self._ratios(line)
            self.found[section].append(line)
            print(json.dumps(rounded({"section": section, **line})), flush=True)
        self.found["seconds"] = time.perf_counter() - self.started
        self.out.write_text(json.dumps(self.found, indent=1) + "\n", encoding="utf-8")

    def _ratios(self, line: dict[str, Any]) -> dict[str, float]:
        """Time and memory beside the reference of the same stage and rows."""
        same = [one for one in [*self.found["steps"], line] if all(one[key] == line[key] for key in ("stage", "rows"))]
        base = next((one for one in same if one["name"] == REFERENCE.name and "ms" in one), None)
        if base is None or "ms" not in line:
            return {}
        return {f"{key}_to_reference": line[key] / base[key] for key in ("ms", "gib") if base[key]}


def rounded(value: Any) -> Any:
    """For people to read."""
    if isinstance(value, dict):
        return {key: rounded(one) for key, one in value.items()}
    return round(value, 4) if isinstance(value, float) else value


def run(results: Results, size: Size, device: str, only: Sequence[str], table: Path | None) -> None:
    """Everything, what matters most first, or `only` contenders of these names; profiles go to the file `table`."""
    rates = product_rates(size, device)
    results.found["product"] = rates
    with tempfile.TemporaryDirectory() as folder:
        recipe = read_recipe(Path(folder))
        models = make_models(recipe, size, device)
        most, fewer = size.rows[0], size.rows[1:]
        for stage in ("dft", "dpt"):
            place = {"stage": stage, "rows": 2}
            case = make_case(recipe, stage, models, size, 2, device)
            results.note("agreement", place, partial(agreement, case))
        distilled = (REFERENCE, CONTENDERS[1], OURS, FAST, QUANTIZED, USUAL, NARROW)
        plan = [("dft", most, CONTENDERS), ("dpt", most, distilled), ("sft", most, (REFERENCE, OURS, FAST))]
        plan += [(stage, rows, (REFERENCE, OURS, FAST)) for rows in fewer for stage in ("dft", "dpt")]
        for stage, rows, contenders in plan:
            case, place = make_case(recipe, stage, models, size, rows, device), {"stage": stage, "rows": rows}
            results.note("floor", place, partial(floor_of, case, recipe, size, rates))
            for contender in (one for one in contenders if not only or one.name in only):
                place["name"] = contender.name
                results.note("steps", place, partial(measure_contender, case, contender, size, device))
            if table and rows == most and case.teacher:
                for contender in (REFERENCE, FAST, QUANTIZED):
                    place["name"] = contender.name
                    results.note("profile", place, partial(write_profile, table, case, contender, device))


SHOWN = ("reference", "ours", "ours, both compiled", "ours, both compiled, fp8 teacher")
COLOURS = {  # of the parts, from below
    "tower": "#9467bd",
    "teacher with its tower": "#c6866b",
    "teacher forward": "#8c564b",
    "student with its tower": "#9edae5",
    "student forward": "#17becf",
    "loss": "#2ca02c",
    "backward": "#1f77b4",
}


def render(source: Path) -> None:
    """docs/performance-step.png from a results file: the parts of a step on one another, beside the floor."""
    import matplotlib.pyplot as plt

    found = json.loads(source.read_text(encoding="utf-8"))
    most = max(found["size"]["rows"])
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), sharey=True, layout="constrained")
    for axis, stage in zip(axes, ("dft", "dpt"), strict=True):
        shown = [line for line in found["steps"] if (line["stage"], line["rows"]) == (stage, most)]
        lines = [line for line in shown if line["name"] in SHOWN and "ms" in line]
        below = [0.0] * len(lines)
        for part, colour in COLOURS.items():
            heights = [line["parts_ms"].get(part, 0.0) for line in lines]
            names = [line["name"].replace(" ", "\n") for line in lines]
            axis.bar(names, heights, bottom=below, label=part, color=colour)
            below = [low + height for low, height in zip(below, heights, strict=True)]
        floor = next(line for line in found["floor"] if (line["stage"], line["rows"]) == (stage, most))
        for key, style, name in (("ms", ":", "floor: products, alone"), ("lasting_ms", "--", "without a pause")):
            axis.axhline(floor[key], color="black", linestyle=style, linewidth=1, label=name)
        axis.set(title=f"{stage}, {most} rows", ylabel="milliseconds", ylim=(0, 1.1 * max(below)))
        axis.label_outer()
    figure.legend(*axes[0].get_legend_handles_labels(), fontsize=8, loc="outside right center")
    figure.savefig(Path("docs") / "performance-step.png", dpi=110)


def main(argv: list[str] | None = None) -> None:
    """Parse and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--render", type=Path, help="docs/performance-step.png from this results file, and no more")
    parser.add_argument("--tiny", action="store_true", help="models of a few layers, to see that everything runs")
    parser.add_argument("--profile", action="store_true", help="operators by time beside the JSON, as .txt")
    parser.add_argument("--backend", help="of torch.compile; inductor, for --tiny aot_eager")
    parser.add_argument(
        "--rows", type=int, nargs="+", help="of a step: all is measured at the first, less at the others"
    )
    names = [contender.name for contender in CONTENDERS]
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=names, default=(), help="contenders; all")
    parser.add_argument("--minutes", type=float, default=5.5, help="after these no new measurement is begun")
    options = parser.parse_args(argv)
    if options.render:
        return render(options.render)
    if not options.out:
        parser.error("give --out or --render")
    size = TINY if options.tiny else Size()
    given = {"backend": options.backend, "rows": tuple(options.rows) if options.rows else None}
    size = dataclasses.replace(size, **{name: value for name, value in given.items() if value})
    device = "cuda" if torch.cuda.is_available() else "cpu"
    versions = {name: version(name) for name in ("transformers", "accelerate")}
    told = environment(device) | versions | {"compiled": "layers", "backend": size.backend}
    found: dict[str, Any] = {"environment": told, "size": dataclasses.asdict(size)}
    found |= {section: [] for section in ("agreement", "floor", "steps", "profile")}
    results = Results(out=options.out, started=time.perf_counter(), minutes=options.minutes, found=found)
    table = options.out.with_suffix(".txt") if options.profile else None
    if table:
        table.unlink(missing_ok=True)
    # Stages, numbers of rows and the two models share a layer's code: more versions of it than dynamo would keep.
    with torch._dynamo.config.patch(recompile_limit=64):
        run(results, size, device, options.only, table)


if __name__ == "__main__":
    main()
