"""Where the pictures that records name are stored: a file for each kind of place, `root.py` for the choice."""
