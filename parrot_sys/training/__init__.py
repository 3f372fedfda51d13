"""The trainer and what it writes: checkpoints and metrics."""
