"""Sanity checks of explanations: randomised weights, randomised labels, a planted cue."""
