"""The model object of `load_pretrained`: padded ids and images in; loss, logits or answers out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Unpack, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parrot_sys.data.constants import IMAGE_TOKEN_ID
from parrot_sys.data.packing import Sample
from parrot_sys.engine.detokenizer import TextDecoder
from parrot_sys.engine.lockstep import Lockstep
from parrot_sys.engine.requests import EngineRequest
from parrot_sys.engine.sampler import TokenLogprob
from parrot_sys.errors import ConfigError, DataError
from parrot_sys.inference.generation import Streamer, generate_tokens, score_continuations
from parrot_sys.inference.inputs import Images, pad_rows, padding_mask, split_batch
from parrot_sys.inference.requests import check_rows, free_rows
from parrot_sys.inference.sampling_options import SamplingOptions, sampling_params
from parrot_sys.megatron.model import MultimodalModel
from parrot_sys.modules.text_guided_moe import RoutingOutput, RoutingOverride
from parrot_sys.systems.build import config_of
from parrot_sys.systems.config import ParrotConfig
from parrot_sys.systems.export import ReleasedSource, export_tensors, released_tensors

_LONGEST_ANSWER = 512
"""Unless asked for otherwise."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CausalOutput:
    """Result of a forward pass over B samples with at most N rows after image expansion."""

    loss: Tensor | None = None  # 0-d float32, mean cross entropy over the rows with a label
    logits: Tensor  # [B, N, vocabulary] float32, expanded sequence, right-padded with zeros
    routing: RoutingOutput | None = None  # routes of the images in marker order
    router_weights: dict[int, Tensor] | None = None
    """Wings, when asked for: number of each layer with learners, from 1 -> float32 [B, N, 2], visual and textual."""


class ParrotForConditionalGeneration(nn.Module):
    """Parrot for one process, or for the ranks of one layout, which all call it alike (or follow one: `lockstep`).

    B samples, N ids, n images. `input_ids` hold -200 once for each image.
    """

    def __init__(
        self,
        model: MultimodalModel,
        *,
        eos_token_ids: Sequence[int] = (),
        pad_token_id: int | None = None,
        answer_header: Sequence[int] = (),
        source: ReleasedSource | None = None,
    ) -> None:
        """
        Args:
            model: the Megatron model.
            eos_token_ids: ids that end an answer.
            pad_token_id: fills rows after the end.
            answer_header: ids that open an answer: with guidance `first_turn` they tell where the first one begins.
            source: the released checkpoint it was read from, for export.
        """
        super().__init__()
        self.model = model
        self.lockstep = Lockstep(model)
        self.answer_header = tuple(answer_header)
        self.eos_token_ids = tuple(eos_token_ids)
        self.pad_token_id = pad_token_id
        self.source = source
        self.eval()  # nothing drops out, as after `from_pretrained` of transformers

    @property
    def config(self) -> ParrotConfig:
        """Sizes and options."""
        return config_of(self.model)

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of parameters and activations."""
        return self.model.config.params_dtype

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        images: Images = None,
        labels: Tensor | None = None,
        routing_override: RoutingOverride | None = None,
        output_router_weights: bool = False,
        truncation: bool = False,
    ) -> CausalOutput:
        """
        Args:
            input_ids: int64 [B, N].
            attention_mask: [B, N], 0 on padding (either side); None: padding ids at either end of a row are padding.
            images: [n, 3, h, w] or a list; one for each marker, or one for each sample with at most one marker.
            labels: int64 [B, N], not shifted, -100 without loss. With labels, rows without one guide the routing;
                without, all text rows do. With `moe.guidance: first_turn` only those before the first answer.
            routing_override: replaces the routes.
            output_router_weights: also return what the routers of Wings weigh the learners by; in one process only.
            truncation: cut samples of more rows than `config.max_rows`, as the released code does in training.

        Raises:
            DataError: ids, mask, labels and images do not fit together, or a sample is too long.
            ConfigError: router weights are asked of several processes.
        """
        config = self.config
        samples = self._split(input_ids, attention_mask, images, labels)
        if not truncation:
            check_rows(config, samples, [0] * len(samples), or_else=", or pass truncation=True")
        batch = self.lockstep.pack(samples, max_seq_len=config.max_rows)
        lengths = batch.cu_seqlens.diff().tolist()
        output = self.lockstep.forward(
            batch, routing_override=routing_override, output_router_weights=output_router_weights
        )
        assert output.logits is not None, "logits come back to every rank"
        logits = output.logits.float()
        loss = None
        if labels is not None:
            loss = F.cross_entropy(
                logits.index_select(0, batch.label_rows), batch.labels.index_select(0, batch.label_rows)
            )
        weights = output.router_weights
        if weights is not None:
            weights = {layer: pad_rows(rows, lengths) for layer, rows in weights.items()}
        return CausalOutput(loss=loss, logits=pad_rows(logits, lengths), routing=output.routing, router_weights=weights)

    @overload
    def generate(
        self, input_ids: Tensor, *args: object, return_routing: Literal[True], **kwargs: object
    ) -> tuple[Tensor, RoutingOutput | None]: ...

    @overload
    def generate(
        self, input_ids: Tensor, *args: object, return_routing: Literal[False] = ..., **kwargs: object
    ) -> Tensor: ...

    @torch.no_grad()  # type: ignore[misc]  # the overloads only tell the two results apart
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        images: Images = None,
        *,
        max_new_tokens: int | Sequence[int] | None = None,
        use_cache: bool = True,
        eos_token_id: int | Sequence[int] | None = None,
        pad_token_id: int | None = None,
        stop_strings: Sequence[str] = (),
        tokenizer: TextDecoder | None = None,
        seed: int | Sequence[int] | None = None,
        streamer: Streamer | None = None,
        routing_override: RoutingOverride | None = None,
        return_routing: bool = False,
        **sampling: Unpack[SamplingOptions],
    ) -> Tensor | tuple[Tensor, RoutingOutput | None]:
        """Answers, each as its request would get it alone; the prompt guides the routing, which the prefill fixes.

        Args:
            input_ids: int64 [B, N].
            attention_mask, images: as in `forward`.
            max_new_tokens: longest answer, of all or of each; None: 512, or as many as there is room for.
            use_cache: False runs the whole sequence again for each token; so does the released rule of Wings always.
            eos_token_id, pad_token_id: end an answer, and fill rows after it; those of the checkpoint when None.
            stop_strings, tokenizer: texts that end an answer with the token that completes one; of the checkpoint.
            seed: of every request's random numbers (equal prompts get equal answers), or of each; None: new ones.
            streamer: receives tokens as they come.
            routing_override, return_routing: replaces the routes; also return those of the images.
            sampling: `do_sample`, `temperature` and others, see `SamplingOptions`.

        Returns:
            int64 [B, N + M] on the device of `input_ids`: the prompt as given, then at most `max_new_tokens` tokens.

        Raises:
            DataError: ids, mask and images do not fit together, or a request with its answer is too long.
            CheckpointError: the model's logits are not finite.
        """
        params, stops, ends = sampling_params(**sampling), tuple(stop_strings), self._eos(eos_token_id)
        pad = self.pad_token_id if pad_token_id is None else pad_token_id
        samples = self._split(input_ids, attention_mask, images, pad_token_id=pad)
        lengths, seeds = self._lengths(samples, max_new_tokens), _each(seed, len(samples), "seed")
        requests = [
            EngineRequest(sample=sample, max_new_tokens=new, stop_ids=ends, stop_strings=stops, sampling=own)
            for sample, new, own in zip(samples, lengths, [replace(params, seed=own) for own in seeds], strict=True)
        ]
        if streamer is not None:
            streamer.put(input_ids.cpu())
        answers, routing = generate_tokens(
            self.lockstep,
            requests,
            pad_token_id=min(ends, default=0) if pad is None else pad,
            streamer=streamer,
            routing_override=routing_override,
            use_cache=use_cache,
            tokenizer=tokenizer,
        )
        output = torch.cat([input_ids, answers.to(input_ids.device)], dim=1)
        return (output, routing) if return_routing else output

    @torch.no_grad()
    def score(
        self,
        input_ids: Tensor,
        continuations: Sequence[Sequence[Sequence[int]]],
        attention_mask: Tensor | None = None,
        images: Images = None,
        routing_override: RoutingOverride | None = None,
        return_tokens: bool = False,
        prefix_token_id: int | None = None,
    ) -> list[Tensor] | list[list[list[TokenLogprob]]]:
        """Log-probabilities of continuations after their prompts; all of a prompt's run in one pass and share its rows.

        Args:
            input_ids: int64 [B, N] prompts.
            continuations: for each prompt the token ids of its K_b continuations.
            attention_mask, images: as in `forward`.
            routing_override: replaces the routes.
            return_tokens: log-probabilities of each token in the place of sums.
            prefix_token_id: id that stands in for an empty prompt, as something has to come before the first token; the
                checkpoint's first end of an answer when None.

        Returns:
            For each prompt float32 [K_b] on the CPU, summed over the tokens; with `return_tokens` for each prompt and
            continuation a list of its tokens, with log-probability and whether each is the most likely one.

        Raises:
            DataError: ids, mask, images and continuations do not fit together, or a prompt with one is too long.
            CheckpointError: the model's logits are not finite.
        """
        input_ids, attention_mask = self._without_empty(input_ids, attention_mask, prefix_token_id)
        samples = self._split(input_ids, attention_mask, images)
        scores, _ = score_continuations(self.lockstep, samples, continuations, routing_override)
        if return_tokens:
            return scores
        return [torch.tensor([sum(token.logprob for token in own) for own in options]) for options in scores]

    def _without_empty(
        self, input_ids: Tensor, attention_mask: Tensor | None, prefix_token_id: int | None
    ) -> tuple[Tensor, Tensor | None]:
        """The batch with a token in each prompt that has none."""
        if input_ids.dim() != 2 or (input_ids.shape[1] and attention_mask is None):
            return input_ids, attention_mask
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        empty = ~mask.bool().any(1) if mask.shape == input_ids.shape else torch.zeros(len(input_ids), dtype=torch.bool)
        if not bool(empty.any()):
            return input_ids, attention_mask
        prefix = next(iter(self.eos_token_ids), None) if prefix_token_id is None else prefix_token_id
        if prefix is None:
            raise DataError("an empty prompt needs prefix_token_id: the checkpoint names no token that ends an answer")
        column = torch.full_like(input_ids[:, :1] if input_ids.shape[1] else empty[:, None].long(), prefix)
        return torch.cat((column.to(input_ids), input_ids), dim=1), torch.cat((empty[:, None].to(mask), mask), dim=1)

    def hf_state_dict(self) -> dict[str, Tensor]:
        """Everything that an export holds, by its released name."""
        return dict(export_tensors(self.model, self.source))

    def hf_gradients(self) -> dict[str, Tensor]:
        """Gradients by the released names of their parameters; parameters without one are left out."""
        return dict(released_tensors(self.model, value=lambda tensor: tensor.grad))

    def _split(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        images: Images,
        labels: Tensor | None = None,
        pad_token_id: int | None = None,
    ) -> list[Sample]:
        if attention_mask is None:
            pad = self.pad_token_id if pad_token_id is None else pad_token_id
            attention_mask = padding_mask(input_ids, pad, self.eos_token_ids)
        if (marker := self.config.image_token_id) is not None:
            # A token of the vocabulary; here every model's images have the same mark.
            input_ids = torch.where(input_ids == marker, IMAGE_TOKEN_ID, input_ids)
        samples = split_batch(input_ids, attention_mask, images, labels, self.answer_header)
        size = self.config.llm.vocab_size
        for index, sample in enumerate(samples):
            ids = sample.input_ids
            wrong = ids[(ids != IMAGE_TOKEN_ID) & ((ids < 0) | (ids >= size))]
            if wrong.numel():
                raise DataError(
                    f"input_ids must be {IMAGE_TOKEN_ID} (an image) or in [0, {size}), "
                    f"got {int(wrong[0])} in sample {index}"
                )
        return samples

    def _lengths(self, samples: Sequence[Sample], max_new_tokens: int | Sequence[int] | None) -> list[int]:
        """Longest answer of each sample."""
        if max_new_tokens is None:
            return [min(_LONGEST_ANSWER, max(1, free_rows(self.config, sample))) for sample in samples]
        return [_positive(new) for new in _each(max_new_tokens, len(samples), "max_new_tokens")]

    def _eos(self, eos_token_id: int | Sequence[int] | None) -> frozenset[int]:
        if eos_token_id is None:
            return frozenset(self.eos_token_ids)
        return frozenset([eos_token_id] if isinstance(eos_token_id, int) else eos_token_id)


def _positive(count: int) -> int:
    if count < 1:
        raise ConfigError(f"max_new_tokens must be >= 1, got {count}")
    return count


def _each(value: int | Sequence[int] | None, count: int, name: str) -> list[Any]:
    """A value for each of `count` requests from one for all or one for each.

    Raises:
        ConfigError: there are more or fewer.
    """
    values = list(value) if isinstance(value, Sequence) else [value] * count
    if len(values) != count:
        raise ConfigError(f"{name} must be one number or one for each of {count} requests, got {len(values)}")
    return values
