"""Turn finished run folders into a table of results and a self-contained HTML report."""

from llavakd.report.compare import console_rows
from llavakd.report.pages import markdown, write_report
from llavakd.report.results import Results, collect

__all__ = ["Results", "collect", "console_rows", "markdown", "write_report"]
