"""`--model parrot` of lm-eval: log-likelihoods and answers from the engine, with prompts as `--model hf` makes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import has_bos_prefix
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from parrot_sys.data.chat_templates import chat_template
from parrot_sys.data.packing import Sample
from parrot_sys.engine.requests import EngineRequest
from parrot_sys.errors import ConfigError
from parrot_sys.inference.generation import generate_texts, score_continuations
from parrot_sys.inference.pretrained import load_pretrained
from parrot_sys.integrations.task_requests import batches, new_tokens, refuse_arguments, requests_together, task_request

_BATCH = 64
_NO_DEVICE = "cuda:0"
"""Said by lm-eval where its user says nothing."""

TokenRequest = tuple[tuple[str, str], list[int], list[int]]
"""(context, continuation) as texts, and the ids of both."""


class ParrotLM(TemplateLM):
    """A checkpoint of parrot_sys; what is asked of it is text."""

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
        dtype: str | None = None,
        compat: Any = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        **others: Any,
    ) -> None:
        """
        Args:
            pretrained: exported directory or training run.
            batch_size: requests that run together; `auto` and None are 64. It changes no result.
            max_batch_size: not needed.
            device: None takes a GPU if there is one.
            dtype: of the parameters; None keeps that of the checkpoint.
            compat: whose rules the model follows, see `load_pretrained`.
            max_length: most rows of a request; longer contexts lose their beginning. None: as many as the model has.
            max_gen_toks: longest answer where the task does not say.
            add_bos_token: whether texts begin with the begin-of-sequence token; None: as the tokenizer does by itself.
            prefix_token_id: comes before a text without context; None: the begin of a sequence, or its end.
            others: must ask for nothing.

        Raises:
            ConfigError: an argument that does not exist, or a number out of range.
        """
        super().__init__()
        refuse_arguments(others)
        self.pretrained = pretrained
        self.batch_size = requests_together(batch_size, _BATCH)
        self.model, self.processor = load_pretrained(
            pretrained,
            device=None if device == _NO_DEVICE else device,
            dtype=None if dtype == "auto" else dtype,
            compat=compat,
        )
        self.tokenizer = self.processor.tokenizer
        self.tokenizer.chat_template = chat_template(self.processor.template, self.processor.image_position)
        rows = self.model.config.max_rows
        self.max_length = rows if max_length is None else int(max_length)
        if not 1 <= self.max_length <= rows:
            raise ConfigError(f"max_length must be from 1 to the {rows} rows of a request, got {max_length}")
        self.max_gen_toks, self.add_bos_token, self._prefix = int(max_gen_toks), add_bos_token, prefix_token_id

    @property
    def eot_token_id(self) -> int:
        """Id that ends a turn."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """Id before a text without context."""
        candidates = (self._prefix, self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)
        return next(int(token) for token in candidates if token is not None)

    @property
    def tokenizer_name(self) -> str:
        """For names of cached requests."""
        return self.pretrained.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Ids of a text, in which names of control tokens are control tokens, as chat templates need it."""
        special = self.add_bos_token if add_special_tokens is None else add_special_tokens
        if add_special_tokens is None and has_bos_prefix(string, self.tokenizer.decode(self.prefix_token_id)):
            special = False
        return list(self.tokenizer.encode(string, **({} if special is None else {"add_special_tokens": special})))

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Text of a conversation in the checkpoint's format."""
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    @torch.no_grad()
    def _loglikelihood_tokens(
        self, requests: Sequence[TokenRequest], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """(log-probability, whether every token is the most likely one) of each continuation."""
        results: list[tuple[float, bool]] = [(0.0, True)] * len(requests)  # of a continuation without tokens
        asked = [place for place, (_, _, continuation) in enumerate(requests) if continuation]
        # Longest first, and equal contexts next to each other: they run in one pass and share its rows.
        asked.sort(key=lambda place: (-len(requests[place][1]), requests[place][1]))
        with tqdm(total=len(asked), desc="log-likelihoods", unit="request", disable=disable_tqdm) as bar:
            for places in batches(asked, self.batch_size):
                samples, continuations = [], []
                for place in places:
                    _, context, continuation = requests[place]
                    context = context or [self.prefix_token_id]  # of a context that is nothing but white space
                    kept = context[-max(1, self.max_length + 1 - len(continuation)) :]
                    samples.append(Sample(input_ids=torch.tensor(kept)))
                    continuations.append([continuation])
                scores, _ = score_continuations(self.model.lockstep, samples, continuations)
                for place, (tokens,) in zip(places, scores, strict=True):
                    results[place] = (sum(own.logprob for own in tokens), all(own.is_greedy for own in tokens))
                    if requests[place][0] is not None:
                        self.cache_hook.add_partial("loglikelihood", requests[place][0], results[place])
                bar.update(len(places))
        return results

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of each text, a long one in windows."""
        windows, owners = [], []
        for owner, (text,) in enumerate(request.args for request in requests):
            for window in get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            ):
                windows.append((None, *make_disjoint_window(window)))
                owners.append(owner)
        sums = [0.0] * len(requests)
        for owner, (score, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            sums[owner] += score
        for request, total in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return sums

    @torch.no_grad()
    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Answers up to a stop string, each by its task's own settings."""
        arguments = [request.args for request in requests]
        prompts = [self._request(*own) for own in arguments]
        order = sorted(range(len(prompts)), key=lambda place: -len(prompts[place].sample.input_ids))
        answers = [""] * len(prompts)
        with tqdm(total=len(order), desc="answers", unit="request", disable=disable_tqdm) as bar:
            for places in batches(order, self.batch_size):
                own = generate_texts(self.model.lockstep, [prompts[place] for place in places], self.tokenizer)
                for place, text in zip(places, own, strict=True):
                    answers[place] = text
                    self.cache_hook.add_partial("generate_until", arguments[place], text)
                bar.update(len(places))
        return answers

    def _request(self, context: str, settings: dict[str, Any]) -> EngineRequest:
        """
        Raises:
            ConfigError: the task asks for what the engine does not do, or its answers leave no room for a prompt.
        """
        longest = new_tokens(settings, self.max_gen_toks)
        room = self.max_length - longest
        if room < 1:
            raise ConfigError(
                f"max_gen_toks must leave room for a prompt among {self.max_length} rows of a request, got {longest}"
            )
        return task_request(
            Sample(input_ids=torch.tensor(self.tok_encode(context)[-room:])),
            settings,
            max_new_tokens=longest,
            stop_ids={*self.model.eos_token_ids, self.eot_token_id},
        )
