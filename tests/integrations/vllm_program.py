"""Greedy answers of vLLM with the plugin, for `test_vllm*.py`: JSON on standard input, a line of JSON out.

Input: `model`, `options` of the engine, `image_identity` (True: a picture's hash leaves its prompt out, as vLLM's own
models have it), `one_salt` (True: requests of Wings with pictures share the first blocks of those without), and
`rounds`, each a list of requests `{prompt | ids, images, tokens, salt}`.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from typing import Any


def leave_guidance_out() -> None:
    from parrot_vllm.processing import GUIDANCE, Processor
    from vllm.multimodal.processing import BaseMultiModalProcessor

    def hashes(self: Any, inputs: Any) -> Any:
        others = {name: value for name, value in inputs.hf_processor_mm_kwargs.items() if name != GUIDANCE}
        return BaseMultiModalProcessor._get_mm_hashes(self, dataclasses.replace(inputs, hf_processor_mm_kwargs=others))

    Processor._get_mm_hashes = hashes


def share_first_blocks() -> None:
    from parrot_vllm.processing import Processor
    from parrot_vllm.wings import WingsProcessor

    WingsProcessor.apply = Processor.apply


def bind_threads(ranks: int) -> None:
    """A core for each rank: left alone, the engine gives the first all of them."""
    cores = sorted(os.sched_getaffinity(0))
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(str(cores[i % len(cores)]) for i in range(ranks))


def encoded(model: Any) -> int | None:
    visual = getattr(model, "visual", None)
    return None if visual is None else visual.cache.encoded


def preempted(llm: Any) -> int:
    """Times that a request lost its blocks so far; 0 without `disable_log_stats=False`."""
    return sum(metric.value for metric in llm.get_metrics() if metric.name == "vllm:num_preemptions")


def main() -> None:
    asked = json.load(sys.stdin)
    os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    os.environ |= {"VLLM_ALLOW_INSECURE_SERIALIZATION": "1", "OMP_NUM_THREADS": "1"}
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    options = asked.get("options", {})
    if (ranks := options.get("tensor_parallel_size", 1) * options.get("pipeline_parallel_size", 1)) > 1:
        bind_threads(ranks)
    from PIL import Image
    from vllm import LLM, SamplingParams

    if asked.get("image_identity"):
        leave_guidance_out()
    if asked.get("one_salt"):
        share_first_blocks()
    llm = LLM(
        asked["model"],
        dtype="float32",
        limit_mm_per_prompt={"image": 4},
        **{"enforce_eager": True, "max_model_len": 512, **options},
    )
    rounds = []
    for requests in asked["rounds"]:
        prompts: list[Any] = []
        for request in requests:
            prompt: dict[str, Any] = (
                {"prompt": request["prompt"]} if "prompt" in request else {"prompt_token_ids": request["ids"]}
            )
            if request["images"]:
                prompt["multi_modal_data"] = {"image": [Image.open(path) for path in request["images"]]}
            if "salt" in request:
                prompt["cache_salt"] = request["salt"]
            prompts.append(prompt)
        sampling = [SamplingParams(temperature=0, max_tokens=r["tokens"], ignore_eos=True) for r in requests]
        outputs = llm.generate(prompts, sampling, use_tqdm=False)
        rounds.append(
            {
                "tokens": [list(output.outputs[0].token_ids) for output in outputs],
                "rows": [len(output.prompt_token_ids) for output in outputs],
                "cached": [output.num_cached_tokens for output in outputs],
                "encoded": llm.apply_model(encoded),
                "preempted": preempted(llm) if "disable_log_stats" in options else 0,
            }
        )
    print("\n" + json.dumps(rounds))


if __name__ == "__main__":
    main()
