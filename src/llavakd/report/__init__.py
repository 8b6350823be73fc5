"""Turn finished run folders into a table of results and a self-contained HTML report."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from llavakd.report.html import page
from llavakd.report.results import Results, collect
from llavakd.report.tables import console_rows, markdown

__all__ = ["Results", "collect", "console_rows", "markdown", "write_report"]


def write_report(runs: Sequence[Path], out: Path) -> Results:
    """Merge finished runs and write `results.json`, `report.md` and `report.html`.

    Args:
        runs: Run folders, each with a `results.json`.
        out: Folder to write to; it may be one of the runs, whose rows then stay as they are.

    Returns:
        The merged results.

    Raises:
        ValueError: If a run folder is unusable or two of them disagree; nothing is written then.
    """
    results = collect(runs)
    merged = {"rows": [dict(row.raw) for row in results.rows], "environment": dict(results.environment)}
    texts = {
        "results.json": json.dumps(merged, indent=2, ensure_ascii=False) + "\n",
        "report.md": markdown(results),
        "report.html": page(results),
    }
    out.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        _write(out / name, text)
    return results


def _write(path: Path, text: str) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".report-") as folder:
        draft = Path(folder) / path.name
        draft.write_text(text, encoding="utf-8")
        os.replace(draft, path)
