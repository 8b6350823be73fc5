"""LLaVA-KD: distil a large vision-language model into a small one in three stages (arXiv 2410.16236)."""

import importlib
from typing import Any

_NAMES = {
    "chat": "ask_about",
    "config": "load_recipe",
    "data.check": "check_source",
    "demo": "run_demo",
    "evaluate": "evaluate_model",
    "export": "export_model push_folder",
    "losses": "distill_rows objective relation_distance",
    "models.student": "build_student load_student template_of",
    "models.tinyllava": "convert",
    "pipeline": "evaluate_folder run_pipeline",
    "plan": "plan_run",
    "preflight": "check_recipe",
    "quickstart": "run_quickstart",
    "report": "write_report",
    "shapes.world": "write_world",
}
# Looked up on first use: `import llavakd` and `llava-kd --help` need not wait for torch.
_PUBLIC = {name: f"llavakd.{module}" for module, names in _NAMES.items() for name in names.split()}

__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"llavakd has no {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)
