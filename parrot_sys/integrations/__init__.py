"""Bridges to other people's programs: a folder each, which imports its program only when it is used."""
