"""The report of a run: one HTML page that needs nothing but itself (extra ``report``)."""

from drlora_core.report.page import render, render_run
from drlora_core.report.rows import event_rows
from drlora_core.report.writing import write_report

__all__ = ["event_rows", "render", "render_run", "write_report"]
