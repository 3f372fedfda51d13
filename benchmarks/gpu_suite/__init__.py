"""Proof and measurement on a GPU: kernels (correctness, sanitizer, timings beside peers, counters), accelerators.

    python -m benchmarks.gpu_suite correctness|sanitize|bench|profile|accelerators --json FILE
    python -m benchmarks.gpu_suite render FILE

See the README of `benchmarks` for what each stage does, and how it keeps its time and resumes.
"""
