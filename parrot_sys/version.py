"""The version of the package, alone, so that whoever wants to know it imports nothing else."""

__version__ = "0.2.0"
