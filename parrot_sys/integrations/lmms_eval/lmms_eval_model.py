"""`--model parrot` of lmms-eval: answers and log-likelihoods from the engine, with prompts of `parrot eval`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lmms_eval.api.model import lmms
from tqdm import tqdm

from parrot_sys.data.packing import Sample
from parrot_sys.errors import ConfigError
from parrot_sys.inference.generation import generate_texts, score_continuations
from parrot_sys.inference.pretrained import load_pretrained
from parrot_sys.inference.requests import free_rows
from parrot_sys.integrations.task_requests import (
    batches,
    new_tokens,
    question_sample,
    refuse_arguments,
    requests_together,
    stop_texts,
    task_request,
)

_BATCH = 8
_NEW_TOKENS = 512
_OF_OTHERS = ("image_aspect_ratio", "skip_special_tokens")
"""Settings of tasks for some of lmms-eval's own models; those of transformers do not take them."""
_DELIMITER = "\n\n"
"""Between examples in a prompt. lmms-eval adds it to the stop strings of every task that has none, and its own models
leave it out again, since it cuts an answer after its first paragraph."""


class ParrotLMM(lmms):
    """A checkpoint of parrot_sys. Pictures come before the text of a question."""

    is_simple = True

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str | None = None,
        device: str | None = None,
        dtype: str | None = None,
        compat: Any = None,
        max_batch_size: int | None = None,
        **others: Any,
    ) -> None:
        """
        Args:
            pretrained: exported directory or training run.
            batch_size: requests that run together; `auto` and None are 8. It changes no result.
            device: None takes a GPU if there is one.
            dtype: of the parameters; `auto` and None keep that of the checkpoint.
            compat: whose rules the model follows, see `load_pretrained`.
            max_batch_size: not needed.
            others: must ask for nothing.

        Raises:
            ConfigError: an argument that does not exist, or a number out of range.
        """
        super().__init__()
        refuse_arguments(others)
        self.batch_size = requests_together(batch_size, _BATCH)
        self.model, self.processor = load_pretrained(
            pretrained, device=device, dtype=None if dtype == "auto" else dtype, compat=compat
        )

    @torch.no_grad()
    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answers up to a stop string, each by its task's own settings."""
        answers = [""] * len(requests)
        with tqdm(total=len(requests), desc="answers", unit="request") as bar:
            for places in batches(range(len(requests)), self.batch_size):
                own = [self._request(*requests[place].args) for place in places]
                texts = generate_texts(self.model.lockstep, own, self.processor.tokenizer)
                for place, text in zip(places, texts, strict=True):
                    answers[place] = text.strip()
                bar.update(len(places))
        return answers

    @torch.no_grad()
    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """(log-probability, whether every token is the most likely one) of each target."""
        results = []
        for request in tqdm(requests, desc="log-likelihoods", unit="request"):
            context, target, *place = request.args
            text = target if isinstance(target, str) else target(self._document(*place[1:]))
            options = [[self.processor.encode_text(text)]]
            ((tokens,),), _ = score_continuations(self.model.lockstep, [self._sample(context, *place)], options)
            results.append((sum(own.logprob for own in tokens), all(own.is_greedy for own in tokens)))
        return results

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """
        Raises:
            ConfigError: always; tasks of several rounds decide each by the answer before.
        """
        raise ConfigError("tasks of several rounds are not supported by --model parrot: choose others")

    def _request(self, context: str, settings: dict[str, Any], *place: Any) -> Any:
        sample = self._sample(context, *place)
        room = max(1, free_rows(self.model.config, sample))
        wanted = {name: value for name, value in settings.items() if name not in _OF_OTHERS}
        until = [text for text in stop_texts(settings.get("until")) if text != _DELIMITER]
        return task_request(
            sample,
            {**wanted, "until": until},
            max_new_tokens=min(new_tokens(settings, _NEW_TOKENS), room),
            stop_ids=self.model.eos_token_ids,
        )

    def _sample(self, context: str, visuals_of: Any, *place: Any) -> Sample:
        """The prompt of a question with its pictures."""
        return question_sample(self.processor, context, visuals_of(self._document(*place)) or [])

    def _document(self, number: int, task: str, split: str) -> Any:
        return self.task_dict[task][split][number]
