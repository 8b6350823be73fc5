"""The embedded run: distilled stages and their equal-step control on one drawn world, then one report."""

import dataclasses
from pathlib import Path
from typing import Any

from llavakd.config import control_twin, load_recipe, resolve_paths
from llavakd.pipeline import draw_world, run_pipeline
from llavakd.progress import say
from llavakd.report import write_report

RECIPE = Path(__file__).parent / "assets" / "shapes" / "quickstart.yaml"


def run_quickstart(out: Path) -> dict[str, Any]:
    """Run, or go on with, OUT/pt-sft-sft and OUT/dpt-sft-dft (same start, data, steps); returns the merged results."""
    recipe = load_recipe(RECIPE)
    draw_world(recipe, out)
    distilled = dataclasses.replace(resolve_paths(recipe, out), world=None)  # both runs read OUT/world
    runs = {twin.name: twin for twin in (control_twin(distilled), distilled)}
    for name, twin in runs.items():
        say(f"== {name}: {', '.join(stage.name for stage in twin.stages)}")
        run_pipeline(twin, out / name)
    return write_report([out / name for name in runs], out)
