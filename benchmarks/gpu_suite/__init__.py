"""Proof and measurement of the kernels on a GPU: correctness, sanitizer, timings beside peers, hardware counters.

    python -m benchmarks.gpu_suite correctness|sanitize|bench|profile --json FILE
    python -m benchmarks.gpu_suite render FILE

See the README of `benchmarks` for what each stage does, and how it keeps its time and resumes.
"""
