"""The papers' networks, where they tapped them, and how they trained them."""
