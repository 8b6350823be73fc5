"""`llava-kd quickstart`, timed: the figures of README.md.

    python benchmarks/quickstart.py --out benchmarks/results/quickstart.json

Seconds are those of the whole command: drawing, both runs, evaluation and report.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def main() -> None:
    """Run the command in a folder of its own and keep its results, its seconds and the commit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "llavakd", "quickstart", "--out", f"{folder}/run"], check=True)
        seconds = time.perf_counter() - start
        results = json.loads((Path(folder) / "run" / "results.json").read_text(encoding="utf-8"))
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    results |= {"command_seconds": round(seconds), "commit": commit}
    options.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
