"""Reports: metrics tables -> one self-contained HTML page, and pictures of the worst images."""

from segbatch.report.page import write_report
from segbatch.report.worst import WorstImage, sources_of, worst_images, worst_overlay_jpeg, worst_overlay_png

__all__ = ["WorstImage", "sources_of", "worst_images", "worst_overlay_jpeg", "worst_overlay_png", "write_report"]
