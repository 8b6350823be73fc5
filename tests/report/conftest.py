"""The fixture that writes fake run folders."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from report_runs import Writer, write_run


@pytest.fixture
def make_run(tmp_path: Path) -> Writer:
    """Return a function that writes a fake run of a given name below `tmp_path`."""

    def make(name: str, correct: Mapping[str, Sequence[bool]], **options: object) -> Path:
        return write_run(tmp_path / name, correct, **({"steps": 30} | options))

    return make
