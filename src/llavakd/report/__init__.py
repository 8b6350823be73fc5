"""Turn finished run folders into a table of results and a self-contained HTML report."""

import json
from collections.abc import Sequence
from pathlib import Path

from llavakd.report.pages import markdown, page
from llavakd.report.results import Results, collect
from llavakd.report.tables import console_rows

__all__ = ["Results", "collect", "console_rows", "markdown", "write_report"]


def write_report(runs: Sequence[Path], out: Path) -> Results:
    """Merge finished runs and write `results.json`, `report.md` and `report.html` to `out`, which may be one of them.

    Raises:
        UserError: a run folder is unusable or two of them disagree; nothing is written then.
    """
    results = collect(runs)
    merged = {"rows": [row.raw for row in results.rows], "environment": results.environment}
    texts = {
        "results.json": json.dumps(merged, indent=2, ensure_ascii=False) + "\n",
        "report.md": markdown(results),
        "report.html": page(results),
    }
    out.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        draft = out / f".report-{name}"
        draft.write_text(text, encoding="utf-8")
        draft.replace(out / name)
    return results
