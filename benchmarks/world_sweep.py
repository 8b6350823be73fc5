"""Students of the quickstart's recipe over seeds, loss weights, amounts of data and shares of wrong answers.

    python benchmarks/world_sweep.py --jobs 2 --out benchmarks/results/world_sweep.json   # goes on with what is there
    python benchmarks/world_sweep.py --jobs 14 --noise 0.3 --out ...                      # these only

Every run is `llava-kd train` on quickstart.yaml with overrides, one thread each; docs/log.md has the table.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch

import llavakd

QUICKSTART = Path(llavakd.__file__).parent / "assets" / "shapes" / "quickstart.yaml"
# What dpt and dft add to the cross-entropy: response KL, visual KL, relation.
WEIGHTS = {
    "control": ((0, 0, 0), (0, 0, 0)),
    "1, 1, 0.5": ((1, 1, 0.5), (1, 1, 0.5)),
    "1, 0.1, 0.05": ((1, 0.1, 0.05), (1, 0.1, 0.05)),
    "1, 0, 0": ((1, 0, 0), (1, 0, 0)),
    "1, 1, 0.5 in dpt only": ((1, 1, 0.5), (0, 0, 0)),
    "1, 1, 0.5 in dft only": ((0, 0, 0), (1, 1, 0.5)),
}
WORLD_SEEDS = {2000: 3, 3000: 1, 6000: 1}
PAIR = ("control", "1, 1, 0.5")
# (scenes, share of wrong answers, epochs of each stage, seeds, weights)
PLAN = [
    (6000, 0.0, 1, (1, 2, 3), PAIR),
    (6000, 0.0, 1, (1, 2), ("1, 0.1, 0.05",)),
    (6000, 0.0, 1, (1,), ("1, 0, 0", "1, 1, 0.5 in dpt only", "1, 1, 0.5 in dft only")),
    (2000, 0.0, 1, (1, 2), PAIR),
    (2000, 0.0, 2, (1, 2, 3), PAIR),
    (2000, 0.0, 2, (1, 2), ("1, 0.1, 0.05",)),
    (2000, 0.0, 3, (1, 2), PAIR),
    (3000, 0.3, 2, (1, 2, 3), (*PAIR, "1, 0, 0")),
    (2000, 0.3, 2, (1, 2), PAIR),
]
KEYS = ("scenes", "noise", "epochs", "seed", "weights")


def overrides(job: dict) -> list[str]:
    """The recipe's keys for one run."""
    changes = [f"world.{key}={job[key]}" for key in ("scenes", "noise")] + [f"seed={job['seed']}"]
    changes += [f"world.seed={WORLD_SEEDS[job['scenes']]}", "evaluation.teacher=false", "trackers=[]"]
    for stage in ("dpt", "sft", "dft"):
        changes += [f"stages.{stage}.epochs={job['epochs']}", f"stages.{stage}.micro_batch_size=64"]
    for stage, weights in zip(("dpt", "dft"), WEIGHTS[job["weights"]], strict=True):
        names = ("response_kl", "visual_kl", "relation")
        changes += [f"stages.{stage}.losses.{name}={weight}" for name, weight in zip(names, weights, strict=True)]
    return changes


def run(job: dict, device: str) -> dict:
    """Train and evaluate one student; its row."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "llavakd", "train", str(QUICKSTART), *overrides(job), "--out", f"{folder}/run"]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        if done.returncode:
            raise SystemExit(f"{job}: {done.stderr[-800:]}")
        row = json.loads((Path(folder) / "run" / "results.json").read_text(encoding="utf-8"))["rows"][0]
    return job | {"accuracy": row["accuracy"], "by_type": row["by_type"], "steps": row["steps"], "device": device}


def main() -> None:
    """Run what the file lacks, some at a time, writing it after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--noise", type=float, help="only the runs with this share of wrong answers")
    options = parser.parse_args()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU, one thread"
    rows = json.loads(options.out.read_text(encoding="utf-8"))["runs"] if options.out.is_file() else []
    done = {tuple(row[key] for key in KEYS) for row in rows}
    places = [(*part[:3], seed, weights) for part in PLAN for seed in part[3] for weights in part[4]]
    jobs = [
        dict(zip(KEYS, place, strict=True))
        for place in places
        if place not in done and options.noise in (None, place[1])
    ]
    with ThreadPoolExecutor(options.jobs) as pool:
        for row in pool.map(partial(run, device=device), jobs):
            rows.append(row)
            print({key: row[key] for key in (*KEYS, "accuracy")}, flush=True)
            options.out.write_text(json.dumps({"runs": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
