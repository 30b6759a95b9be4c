"""A bench result as one HTML file that needs nothing else."""

from hasten.measure.report.head import headline
from hasten.measure.report.page import report_html, write_report

__all__ = ["headline", "report_html", "write_report"]
