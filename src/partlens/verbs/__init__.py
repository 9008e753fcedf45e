"""The verbs: each a Python function and a sub-command of the same name and defaults."""
