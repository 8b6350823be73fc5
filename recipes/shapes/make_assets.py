"""Make the assets of the Shapes world and put them into the package.

    python recipes/shapes/make_assets.py --work runs/assets [--only teacher]

Trains the tower (make_tower.py), then text-teacher.yaml and text-student.yaml side by side, then teacher.yaml; casts
the weights to float16 and writes src/llavakd/assets/shapes/{tower,teacher-lm,student-lm,teacher}, each with the recipe
that made it and a made.json. Finished training runs under --work are not repeated; the tower is made anew.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import torch
import transformers
from make_tower import BATCH, PARTS, SEED, STEPS, train_tower

from llavakd.models.parts import extract_language_model, load_image_processor
from llavakd.models.student import load_student, save_model

HERE = Path(__file__).parent
ASSETS = HERE.parents[1] / "src" / "llavakd" / "assets" / "shapes"
# asset -> (recipe, its last stage)
FIRST = {"teacher-lm": ("text-teacher", "text"), "student-lm": ("text-student", "text")}
LAST = {"teacher": ("teacher", "mixed")}


def start(recipe: str, work: Path) -> subprocess.Popen:
    """Begin or go on with one recipe in its own process and log."""
    out = work / recipe
    out.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "llavakd", "train", str(HERE / f"{recipe}.yaml"), "trackers=[]", "--out", str(out)]
    return subprocess.Popen(command, stdout=(out / "log.txt").open("a"), stderr=subprocess.STDOUT)


def run(assets: dict[str, tuple[str, str]], work: Path) -> None:
    """Run the recipes of these assets side by side, then ship each."""
    processes = {asset: start(recipe, work) for asset, (recipe, _) in assets.items()}
    failed = [asset for asset, process in processes.items() if process.wait()]
    if failed:
        raise SystemExit(f"{', '.join(failed)} failed; see log.txt under {work}")
    for asset, (recipe, stage) in assets.items():
        ship(asset, work / recipe, stage)


def ship(asset: str, run_folder: Path, stage: str) -> None:
    """Cast a finished run's part to float16 and write it as an ordinary transformers folder with its provenance."""
    student = load_student(str(run_folder / stage / "model"))
    target = ASSETS / asset
    shutil.rmtree(target, ignore_errors=True)
    student.model.half()
    if asset == "teacher":
        save_model(student, target, template="chatml")
    else:
        extract_language_model(student.model).save_pretrained(target)
        student.tokenizer.save_pretrained(target)
    shutil.copy(run_folder / "recipe.yaml", target / "recipe.yaml")
    write_provenance(target, provenance(run_folder, stage))


def ship_tower() -> None:
    """Train the tower and write it, cast to float16, with what its heads knew."""
    tower, right = train_tower()
    target = ASSETS / "tower"
    shutil.rmtree(target, ignore_errors=True)
    tower.half().save_pretrained(target)
    load_image_processor(str(PARTS)).save_pretrained(target)
    settings = {"recipe": "recipes/shapes/make_tower.py", "seed": SEED, "steps": STEPS, "batch": BATCH}
    write_provenance(target, settings | {"score": right})


def write_provenance(target: Path, what: dict) -> None:
    """made.json: what is known of the run, and the machine's versions."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=HERE).stdout.strip()
    machine = {
        "commit": commit,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
    }
    (target / "made.json").write_text(json.dumps(what | machine, indent=1) + "\n", encoding="utf-8")


def provenance(run_folder: Path, stage: str) -> dict:
    """Recipe, steps, seconds, last loss and score of a run."""
    stages = json.loads((run_folder / "pipeline.json").read_text(encoding="utf-8"))["stages"]
    last = json.loads((run_folder / stage / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    results = run_folder / "results.json"
    row = json.loads(results.read_text(encoding="utf-8"))["rows"][-1] if results.is_file() else {}
    return {
        "recipe": f"recipes/shapes/{run_folder.name}.yaml",
        "steps": {entry["name"]: entry["steps"] for entry in stages},
        "train_seconds": round(sum(entry["train_seconds"] for entry in stages)),
        "last_loss": last["loss"],
        "score": {key: row[key] for key in ("accuracy", "n", "by_type") if key in row},
    }


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of the training runs")
    parser.add_argument("--only", choices=["tower", *FIRST, *LAST], help="make one asset from what the package holds")
    options = parser.parse_args()
    if options.only in (None, "tower"):
        ship_tower()
    for group in (FIRST, LAST):
        chosen = {asset: run for asset, run in group.items() if options.only in (None, asset)}
        if chosen:
            run(chosen, options.work)


if __name__ == "__main__":
    main()
