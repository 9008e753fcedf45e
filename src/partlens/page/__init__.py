"""The page of a run: one HTML file that a person reads, without network and without JavaScript.

Data and drawing are separate: :func:`~partlens.page.page.collect_page` reads a run directory into values,
:func:`~partlens.page.page.render_page` turns them into HTML, :func:`~partlens.page.page.write_report` does both.
:func:`~partlens.page.explanation_page.write_explanation_page` does the same for the folder of one explained image.
"""
