"""The tests that a GPU decides, and their outcomes with versions.

    python benchmarks/gpu_tests.py --out benchmarks/results/gpu_tests.json     # on a GPU
    python benchmarks/gpu_tests.py --out benchmarks/results/gpu_tests_two.json tests/gpu/test_gpu_sharding.py   # on two

Without a GPU those of tests/gpu are skipped.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from losses import environment

FOLDERS = ("tests/gpu", "tests/ops", "tests/losses")


class Outcomes:
    """A pytest plugin that notes each test's outcome and seconds."""

    def __init__(self) -> None:
        self.found: dict[str, dict] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """A test counts as what its call was; a skip or a failure may come before it."""
        if report.when == "call" or report.outcome != "passed":
            self.found[report.nodeid] = {"outcome": report.outcome, "seconds": round(report.duration, 2)}


def main() -> None:
    """Run and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("tests", nargs="*", default=FOLDERS)
    options = parser.parse_args()
    outcomes = Outcomes()
    code = pytest.main(["-q", "-p", "no:cacheprovider", *options.tests], plugins=[outcomes])
    told = {"environment": environment("cuda"), "tests": outcomes.found}
    options.out.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    raise SystemExit(code)


if __name__ == "__main__":
    main()
