"""The systems: what each adds to a decoder with pictures, one folder a system and one line in `registry.py`."""
