"""The page of a run: one HTML file that a person reads, without network and without JavaScript.

Data and drawing are separate: :func:`collect_page` reads a run directory into values, :func:`render_page` turns them
into HTML, :func:`write_report` does both and writes the file. :func:`write_explanation_page` does the same for the
folder of one explained image.
"""

from __future__ import annotations

from partlens.page.explanation_page import write_explanation_page
from partlens.page.page import PageData, collect_page, render_page, write_report

__all__ = ["PageData", "collect_page", "render_page", "write_explanation_page", "write_report"]
