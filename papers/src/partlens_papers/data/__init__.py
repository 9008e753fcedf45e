"""Readers for the data sets of the explainer papers, each in the layout in which it is published."""
