"""`report.html`: one page that opens from disk, needs no network and shows all that was found; its charts as files."""

from keepsight.diagnose.report.files import save_charts
from keepsight.diagnose.report.page import render_report

__all__ = ["render_report", "save_charts"]
