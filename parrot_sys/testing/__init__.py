"""Helpers for tests that need several ranks."""
