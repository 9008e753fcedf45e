"""The papers' tables as code: each experiment makes one table from data, with its baselines."""
