"""The memory that `llava-kd plan` plans for the steps of step.json, which are the trainer's own, beside what they took.

    python benchmarks/plan_step.py --out benchmarks/results/plan_step.json     # anywhere, half a minute
    python benchmarks/step.py --out benchmarks/results/step.json --profile     # what it is put beside, on a GPU

`kept`: of what layers keep where they are not compiled, as the plan has it, the share that they must have kept where they are.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from plan_llava_kd import write_configs
from plan_measured import one_stage
from step_contenders import RECIPE

from llavakd.plan import _COMPILED, plan_run

STEP = Path(__file__).parent / "results" / "step.json"
CONTENDERS = {  # of step.json -> compile, gradient_checkpointing, and whether AdamW's moments were there
    "ours": (False, False, False),
    "ours, both compiled": (True, False, False),
    "ours, both compiled, train_step": (True, False, True),
    "ours, checkpointing": (False, True, False),
    "ours, both compiled, checkpointing": (True, True, False),
}


def planned(folder: Path, line: dict[str, Any], size: dict[str, Any], compiled: bool) -> float:
    """GiB at the peak of this line's step, compiled or not."""
    _, checkpointing, optimizer = CONTENDERS[line["name"]]
    more = ["student.vision_feature_select_strategy=full", f"compile={compiled}".lower()]
    more += [f"data.{source}.max_length={size['visual'] + size['text']}" for source in ("pretrain", "instruct")]
    recipe = one_stage(folder, RECIPE, line["stage"], line["rows"], checkpointing, *more)
    plan = plan_run(recipe, rows=1024, text_tokens=size["text"])
    memory = next(one for one in plan["stages"] if one["name"] == line["stage"])["memory"]
    return (memory["peak"] - (0 if optimizer else memory["optimizer"])) / 2**30


def beside(told: dict[str, Any]) -> dict[str, Any]:
    """Planned and measured GiB of each contender of step.json that the trainer could be."""
    cases = []
    with tempfile.TemporaryDirectory() as folder:
        write_configs(Path(folder))
        for line in (line for line in told["steps"] if line["name"] in CONTENDERS and "gib" in line):
            compiled, checkpointing, _ = CONTENDERS[line["name"]]
            case = {"stage": line["stage"], "rows": line["rows"], "name": line["name"]}
            case |= {"planned": planned(Path(folder), line, told["size"], compiled), "measured": line["gib"]}
            if compiled and not checkpointing:
                usual = planned(Path(folder), line, told["size"], False)
                layers = (usual - case["planned"]) / (1 - _COMPILED[line["stage"] != "dpt"])
                case["kept"] = round(1 - (usual - line["gib"]) / layers, 3)
            cases.append(case)
    return {"environment": told["environment"], "cases": cases}


def main() -> None:
    """Plan and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    found = beside(json.loads(STEP.read_text(encoding="utf-8")))
    options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    for case in found["cases"]:
        print(f"{case['stage']} {case['rows']:2} {case['name']:40} {case['planned']:.1f} {case['measured']:.1f}")


if __name__ == "__main__":
    main()
