"""Kinds of data sets: a file each, and a line in `registry.py`."""
