"""VLMEvalKit: its own run.py with checkpoints of parrot_sys, in the process or behind a server."""
