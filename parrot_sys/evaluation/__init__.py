"""Evaluation on MMMB and multilingual MMBench: tables, prompts, answers, option extraction, scores, report."""

from __future__ import annotations

from parrot_sys.evaluation.extraction import extract_option

__all__ = ["extract_option"]
