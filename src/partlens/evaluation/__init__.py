"""Measure a finished run on photos it has not seen: one streaming pass, every score with its nulls for comparison."""
