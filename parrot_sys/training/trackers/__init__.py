"""Experiment trackers: what a run reports, in the words of each tracker. One protocol (`base`), one file for each."""
