"""The memory that `llava-kd plan` plans for the steps of step.json, which are the trainer's own, beside what they took.

python benchmarks/plan_step.py --out benchmarks/results/plan_step.json     # anywhere, half a minute
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from plan_llava_kd import RECIPES, local, write_configs
from step_contenders import RECIPE

from llavakd.config import load_recipe
from llavakd.plan import plan_run

STEP = Path(__file__).parent / "results" / "step.json"
CONTENDERS = {  # of step.json -> compile, gradient_checkpointing, and whether AdamW's moments were there
    "ours": (False, False, False),
    "ours, both compiled": (True, False, False),
    "ours, both compiled, train_step": (True, False, True),
    "ours, checkpointing": (False, True, False),
    "ours, both compiled, checkpointing": (True, True, False),
}


def planned(folder: Path, line: dict[str, Any], size: dict[str, Any]) -> float:
    """GiB at the peak of this line's step."""
    stage, rows, (compiled, checkpointing, optimizer) = line["stage"], line["rows"], CONTENDERS[line["name"]]
    length = size["visual"] + size["text"]
    changes = [f"stages.{stage}.global_batch_size={rows}", f"stages.{stage}.micro_batch_size={rows}"]
    changes += [f"data.{source}.max_length={length}" for source in ("pretrain", "instruct")]
    changes += ["student.vision_feature_select_strategy=full", f"compile={compiled}".lower()]
    changes.append(f"gradient_checkpointing={checkpointing}".lower())
    recipe = load_recipe(RECIPES / f"{RECIPE}.yaml", [*local(folder, RECIPE), *changes])
    plan = plan_run(recipe, rows=1024, text_tokens=size["text"])
    memory = next(one for one in plan["stages"] if one["name"] == stage)["memory"]
    return (memory["peak"] - (0 if optimizer else memory["optimizer"])) / 2**30


def beside(told: dict[str, Any]) -> dict[str, Any]:
    """Planned and measured GiB of each contender of step.json that the trainer could be."""
    lines = [line for line in told["steps"] if line["name"] in CONTENDERS and "gib" in line]
    with tempfile.TemporaryDirectory() as folder:
        write_configs(Path(folder))
        cases = [
            {"stage": line["stage"], "rows": line["rows"], "name": line["name"]}
            | {"planned": planned(Path(folder), line, told["size"]), "measured": line["gib"]}
            for line in lines
        ]
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
