"""Data sets: the default one, made from vendored material, and public ones."""
