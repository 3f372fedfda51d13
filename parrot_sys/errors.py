"""Errors that a user can act on: each names the setting or record, what was wanted, what came, and the fix."""

from __future__ import annotations


class ParrotError(Exception):
    """Base of all errors that this package raises for users."""


class ConfigError(ParrotError, ValueError):
    """A setting is unknown, out of range or contradicts another one."""


class DataError(ParrotError, ValueError):
    """A record, image or data set is missing, broken or inconsistent; the message names file, record and reason."""


class CheckpointError(ParrotError, ValueError):
    """A checkpoint is missing, damaged or does not fit the model; the message lists the keys."""


class CheckpointWriteError(CheckpointError):
    """A checkpoint could not be written, for example onto a full disk; those before it are as they were."""
