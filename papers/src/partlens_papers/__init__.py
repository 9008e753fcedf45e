"""The papers' experiments on top of partlens: data sets, networks, rivals, and tables next to the printed ones."""

from __future__ import annotations

__version__ = "0.1.0"
