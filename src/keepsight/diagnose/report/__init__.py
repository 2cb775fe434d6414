"""`report.html`: one page that opens from disk, needs no network and shows all that a diagnosis found."""

from keepsight.diagnose.report.page import render_report

__all__ = ["render_report"]
