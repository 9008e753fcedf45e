"""What the explainer is compared with, on the same maps and with the same measures."""
