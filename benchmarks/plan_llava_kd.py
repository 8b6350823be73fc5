"""What `llava-kd plan` says of the recipes of the paper's pairs: the table of GPU-hours in docs/llava_kd.md.

    python benchmarks/plan_llava_kd.py --out benchmarks/results/plan_llava_kd.json

Config files of the true sizes stand in for the hub's folders, the published row counts for the data.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from pathlib import Path

from llavakd.config import load_recipe
from llavakd.plan import plan_run

RECIPES = Path(__file__).parents[1] / "recipes" / "llava_kd"
GPUS = ("A100-80", "H100")
# Width, inner width, layers, heads, key-value heads, tied, and the published number of parameters.
QWEN = {
    "qwen2.5-0.5b": (896, 4864, 24, 14, 2, True, 494_032_768),
    "qwen2.5-1.5b": (1536, 8960, 28, 12, 2, True, 1_543_714_304),
    "qwen2.5-3b": (2048, 11008, 36, 16, 2, True, 3_085_938_688),
    "qwen1.5-0.5b": (1024, 2816, 24, 16, 16, True, 463_987_712),
    "qwen1.5-1.8b": (2048, 5504, 24, 16, 16, False, 1_836_828_672),
    "qwen1.5-4b": (2560, 6912, 40, 20, 20, False, 3_950_369_280),
}
STUDENTS = {
    "qwen2.5-0.5b": "qwen2.5-3b",
    "qwen2.5-1.5b": "qwen2.5-3b",
    "qwen1.5-0.5b": "qwen1.5-4b",
    "qwen1.5-1.8b": "qwen1.5-4b",
}


def write_configs(folder: Path) -> None:
    """config.json files of the true sizes: SigLIP, the Qwen models, and a LLaVA teacher of each."""
    tower = {"model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304, "image_size": 384}
    tower |= {"num_hidden_layers": 27, "num_attention_heads": 16, "patch_size": 14}
    configs = {"tower": tower}
    for name, (width, inner, layers, heads, groups, tied, _) in QWEN.items():
        text = {"model_type": "qwen2", "hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers}
        text |= {"num_attention_heads": heads, "num_key_value_heads": groups, "tie_word_embeddings": tied}
        configs[name] = text | {"vocab_size": 151_936}
        llava = {
            "model_type": "llava",
            "vision_config": tower | {"vision_use_head": False},
            "text_config": configs[name],
        }
        llava |= {"vision_feature_layer": -2, "vision_feature_select_strategy": "default", "image_seq_length": 728}
        configs[f"{name}-llava"] = llava | {"image_token_index": 151_665, "tie_word_embeddings": tied}
    for name, config in configs.items():
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(config), encoding="utf-8")


def local(folder: Path, name: str) -> list[str]:
    """Overrides that put config folders in the place of hub names."""
    teacher = STUDENTS.get(name)
    language_model = name.removeprefix("teacher-").split("-pt-")[0]
    changes = [f"student.vision_tower={folder / 'tower'}", f"student.language_model={folder / language_model}"]
    return changes + ([f"teacher.path={folder / f'{teacher}-llava'}"] if teacher else [])


def main() -> None:
    """Plan every recipe, print the table's lines and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    told: dict = {"commit": commit, "hours": {}}
    with tempfile.TemporaryDirectory() as folder:
        write_configs(Path(folder))
        for path in sorted(RECIPES.glob("*.yaml")):
            recipe = load_recipe(path, local(Path(folder), path.stem))
            plans = {gpu: plan_run(recipe, gpu=gpu)["stages"] for gpu in GPUS}
            hours = {gpu: {stage["name"]: stage["hours"] for stage in stages} for gpu, stages in plans.items()}
            told["hours"][path.stem] = hours
            stages = ", ".join(f"{name} {value:.1f}" for name, value in hours[GPUS[0]].items())
            print(
                f"| `{path.stem}` | {stages} | " + " | ".join(f"{sum(hours[gpu].values()):.0f}" for gpu in GPUS) + " |"
            )
    options.out.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
