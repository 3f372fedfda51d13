"""TextGuidedMoE: the prompt's language chooses the experts that make an image's visual rows language-specific."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from parrot_sys.errors import ConfigError
from parrot_sys.modules.routing_config import TextGuidedMoEConfig
from parrot_sys.modules.routing_losses import RoutingTotals, auxiliary_losses, routing_rows
from parrot_sys.ops import TopKRouting, expert_mlp, text_guided_experts, text_guided_routing, topk_routing
from parrot_sys.parallel import ExpertGroups, check_experts, dispatch_images

# n images, V visual rows an image (row 0 is the CLS row), H hidden_size, E num_experts, I ffn_hidden_size, K topk,
# G guidance rows of text

_EPS = 1e-12  # far below the mean square of any embedding


@dataclass(frozen=True, kw_only=True, slots=True)
class RoutingOutput:
    """Decisions of the router for n images and E experts."""

    logits: Tensor  # [n, E] float32
    probs: Tensor  # [n, E]; zeros for experts that were not chosen
    topk_indices: Tensor | None = None  # [n, K] int64 under routing=topk
    aux_loss: Tensor | None = None  # 0-d, already times its coefficient
    z_loss: Tensor | None = None  # 0-d, already times its coefficient


@dataclass(frozen=True, kw_only=True, slots=True)
class RoutingOverride:
    """Replaces what the router decides, for ablations in evaluation."""

    mode: Literal["off", "uniform"] | None = None
    """`off` returns the features unchanged, as a model without MoE; `uniform` weighs every expert 1/E."""
    probs: Tensor | None = None
    """[n, E] weights to use in place of the router's; needs `mode` None."""

    def __post_init__(self) -> None:
        if (self.mode is None) == (self.probs is None):
            raise ConfigError("RoutingOverride takes exactly one of mode ('off' or 'uniform') and probs")


class TextGuidedMoE(nn.Module):
    """Experts between projector and decoder; each image's route is guided by the text of its prompt.

    The CLS row of an image attends over the embeddings of its guiding text, a linear router scores the attended text,
    and all V rows of the image go through the experts with that one route (Parrot, arXiv 2406.02539, eq. 2 to 5; the
    released code's rules where they differ, by `config`).

    The auxiliary losses are means over the images of all ranks of `statistics_group` in one forward pass, the same on
    every rank. Under `over_step` they are the forward pass's share of the means over a whole step, so that the sum over
    micro-batches and ranks, and its gradient, do not depend on how the images were dealt.

    Parameters are stored fused, in the layout of `parrot_sys.ops.expert_mlp`; `released_experts.py`
    converts:
        router_weight  [E, H]
        w_gate_up      [E, 2, I, H], `[:, 0]` gate_proj.weight, `[:, 1]` up_proj.weight
        w_down         [E, I, H], down_proj.weight transposed
    and, with `expert_bias`, a buffer that `finish_step` moves:
        selection_bias [E] float32, added to the scores for the choice alone
    With `groups` each rank holds E / ep whole experts or, of these, I / etp inner columns; whole images go to the ranks
    of their experts (`parrot_sys.parallel.dispatch_images`). Router and results are the same on all ranks of
    `groups.tp`, and so are their gradients. Gradients of the experts are those of all images that any rank sent here.
    """

    def __init__(
        self,
        config: TextGuidedMoEConfig,
        hidden_size: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        statistics_group: ProcessGroup | None = None,
        groups: ExpertGroups | None = None,
    ) -> None:
        """
        Args:
            config: `num_experts` must be at least 1.
            hidden_size: H.
            device: where the parameters are made (`meta` allocates nothing).
            dtype: of the parameters.
            statistics_group: ranks whose images count together in the auxiliary losses.
            groups: ranks that share the experts; one rank holds them all when not given.

        Raises:
            ConfigError: the experts cannot be shared by `groups`.
        """
        super().__init__()
        if config.num_experts < 1:
            raise ConfigError(f"moe.num_experts must be >= 1 to build TextGuidedMoE, got {config.num_experts}")
        self.config = config
        self.hidden_size = hidden_size
        self.statistics_group = statistics_group
        self.groups = groups or ExpertGroups()
        self._alone = self.groups == ExpertGroups()
        self._step_totals: RoutingTotals | None = None
        self._scale = config.router_scale
        self._chosen: Tensor | None = None
        check_experts(config.num_experts, config.ffn_hidden_size, self.groups.ep_size, self.groups.etp_size)
        num_local, ffn_size = config.num_experts // self.groups.ep_size, config.ffn_hidden_size // self.groups.etp_size
        self.router_weight = nn.Parameter(torch.empty(config.num_experts, hidden_size, device=device, dtype=dtype))
        self.w_gate_up = nn.Parameter(torch.empty(num_local, 2, ffn_size, hidden_size, device=device, dtype=dtype))
        self.w_down = nn.Parameter(torch.empty(num_local, ffn_size, hidden_size, device=device, dtype=dtype))
        # (Megatron updates any module's `expert_bias` by counts of tokens: this one has another name.)
        bias = torch.zeros(config.num_experts, device=device, dtype=torch.float32) if config.expert_bias else None
        self.selection_bias: Tensor | None
        self.register_buffer("selection_bias", bias)
        self.reset_parameters()

    @property
    def needs_other_ranks(self) -> bool:
        """Whether the images of other ranks may come here: then a rank without any has to take part as well."""
        return not self.groups.same_images

    def reset_parameters(self) -> None:
        """Each matrix as `torch.nn.Linear` does by default (uniform in +-1/sqrt(fan_in)), as the released code.

        The same random numbers are drawn however the experts are shared.
        """
        bound = 1 / math.sqrt(self.hidden_size)
        nn.init.uniform_(self.router_weight, -bound, bound)
        if self.w_gate_up.is_meta:
            return
        self._reset_experts(self.w_gate_up, bound, columns=1)
        self._reset_experts(self.w_down, 1 / math.sqrt(self.config.ffn_hidden_size), columns=0)

    @torch.no_grad()
    def _reset_experts(self, weight: Tensor, bound: float, *, columns: int) -> None:
        """Draws every expert, one whole after the other, and keeps what this rank holds; `columns` is cut by `etp`."""
        groups, ffn_size = self.groups, self.config.ffn_hidden_size
        shape = list(weight.shape[1:])
        shape[columns] = ffn_size
        first = groups.ep_rank * len(weight)
        for e in range(self.config.num_experts):
            expert = weight.new_empty(shape).uniform_(-bound, bound)
            if first <= e < first + len(weight):
                weight[e - first] = expert.chunk(groups.etp_size, dim=columns)[groups.etp_rank]

    def extra_repr(self) -> str:
        """Sizes and rules, for `print(model)`."""
        config = self.config
        experts = f"{config.num_experts} experts of {config.ffn_hidden_size}"
        if self.w_down.shape[:2] != (config.num_experts, config.ffn_hidden_size):
            experts += f" ({self.w_down.shape[0]} of {self.w_down.shape[1]} here)"
        routing = config.routing if config.routing == "dense" else f"top-{config.topk}"
        return f"hidden_size={self.hidden_size}, {experts}, routing={routing}, residual={config.residual}"

    def forward(
        self,
        features: Tensor,
        text: Tensor,
        guidance_start: Tensor,
        guidance_end: Tensor,
        *,
        query: Tensor | None = None,
        languages: Tensor | None = None,
        override: RoutingOverride | None = None,
    ) -> tuple[Tensor, RoutingOutput]:
        """Language-specific visual rows.

        With n = 0 every parameter still takes part, with a zero gradient, so that a rank without images runs the same
        gradient hooks as the others.

        Args:
            features: [n, V, H], V >= 1, projected rows of each image.
            text: [G, H], word embeddings of the guiding tokens of all samples.
            guidance_start: [n] int, first row in `text` of each image's guidance; images may share rows.
            guidance_end: [n] int, one past the last; an empty span routes uniformly.
            query: [n, H], asks the text; row 0 of each image, its CLS row, when not given.
            languages: [n] int64, number of each image's language for the information loss, see `routing_rows`.
            override: replaces the route (evaluation only).

        Returns:
            [n, V, H] features and what the router decided.
        """
        if override is not None and override.mode == "off":
            unrouted = features.new_zeros((features.shape[0], self.config.num_experts), dtype=torch.float32)
            return features, RoutingOutput(logits=unrouted, probs=unrouted)
        config = self.config
        if override is None and self._fusable():
            return self._fused(features, query, text, guidance_start, guidance_end)
        query = features[:, 0] if query is None else query
        logits, routing = self._route(query, text, guidance_start, guidance_end)
        sparse = config.routing == "topk"
        probs, plan = routing.probs, routing if sparse else None
        if override is not None:
            # Overridden weights may be anything, so all experts run.
            plan = None
            even = torch.full_like(probs, 1 / config.num_experts)
            probs = even if override.probs is None else override.probs.to(probs)
        output = self._run_experts(features, probs, plan)
        if override is None and self.selection_bias is not None and torch.is_grad_enabled():
            counts = routing.tokens_per_expert.detach().double()
            self._chosen = counts if self._chosen is None else self._chosen + counts
        aux_loss = z_loss = None
        if torch.is_grad_enabled():  # their statistics need every rank of the group: only training brings all of them
            aux_loss, z_loss = auxiliary_losses(
                config, logits, routing, languages, totals=self._step_totals, group=self.statistics_group
            )
        indices = routing.topk_indices if plan is not None else None
        return output, RoutingOutput(logits=logits, probs=probs, topk_indices=indices, aux_loss=aux_loss, z_loss=z_loss)

    def _fusable(self) -> bool:
        """Whether nothing is needed between router and experts: no other rank, and no loss of the routes."""
        plain = self._scale == 1.0 and self.selection_bias is None
        return self._alone and plain and not (self.config.has_losses and torch.is_grad_enabled())

    def _guidance(self, text: Tensor) -> tuple[Tensor, float]:
        """The rows that guide, and the factor of the scores."""
        if self.config.normalize_guidance:
            return nn.functional.rms_norm(text, text.shape[1:], eps=_EPS), 1 / self.hidden_size
        return text, 1 / math.sqrt(self.hidden_size)

    def _fused(
        self, features: Tensor, query: Tensor | None, text: Tensor, guidance_start: Tensor, guidance_end: Tensor
    ) -> tuple[Tensor, RoutingOutput]:
        """`forward` where it is `_fusable`."""
        config = self.config
        text, scale = self._guidance(text)
        sparse = config.routing == "topk"
        residual_scale, output_scale = _residual_scales(config)
        output, logits, probs, indices = text_guided_experts(
            features,
            text,
            guidance_start,
            guidance_end,
            self.router_weight,
            self.w_gate_up,
            self.w_down,
            scale=scale,
            query=query,
            topk=config.topk if sparse else None,
            renormalize=sparse and config.renormalize,
            residual_scale=residual_scale,
            output_scale=output_scale,
            recompute=config.recompute,
            fp8=config.fp8,
        )
        return output, RoutingOutput(logits=logits, probs=probs, topk_indices=indices)

    def _run_experts(self, features: Tensor, probs: Tensor, plan: TopKRouting | None) -> Tensor:
        """[n, V, H], the experts' weighted sum with the residual."""
        residual_scale, output_scale = _residual_scales(self.config)
        options = {"recompute": self.config.recompute, "fp8": self.config.fp8}
        if self._alone:
            return expert_mlp(
                features,
                self.w_gate_up,
                self.w_down,
                probs,
                plan=plan,
                residual_scale=residual_scale,
                output_scale=output_scale,
                **options,
            )
        sent = dispatch_images(features, probs, plan, self.groups)
        output = expert_mlp(
            sent.images,
            self.w_gate_up,
            self.w_down,
            sent.probs,
            plan=sent.plan,
            output_scale=output_scale,
            **options,
        )
        return sent.combine(output, residual_scale=residual_scale)

    def _route(
        self, cls_rows: Tensor, text: Tensor, guidance_start: Tensor, guidance_end: Tensor
    ) -> tuple[Tensor, TopKRouting]:
        """Router logits [n, E] of the images with CLS rows [n, H], and what they choose."""
        config = self.config
        text, scale = self._guidance(text)
        logits, _ = text_guided_routing(cls_rows, text, guidance_start, guidance_end, self.router_weight, scale=scale)
        if self._scale != 1.0:
            logits = logits * self._scale
        sparse = config.routing == "topk"
        topk = config.topk if sparse else config.num_experts
        renormalize = sparse and config.renormalize
        return logits, topk_routing(logits, topk, renormalize=renormalize, expert_bias=self.selection_bias)

    def attention(self, cls_rows: Tensor, text: Tensor) -> Tensor:
        """Weights float32 [n, G] by which each of n images attends over the rows of one guiding text.

        Args:
            cls_rows: [n, H], projected CLS row of each image.
            text: [G, H], see `forward`.
        """
        rows, scale = self._guidance(text)
        return (cls_rows.float() @ rows.float().T * scale).softmax(-1)

    @torch.no_grad()
    def look(
        self, cls_rows: Tensor, text: Tensor, guidance_start: Tensor, guidance_end: Tensor, languages: Tensor
    ) -> Tensor:
        """`routing_rows` of some images, for `RoutingTotals`; runs the router only.

        Args:
            cls_rows: [n, H], projected CLS row of each image.
            text: see `forward`, as the other arguments.
            guidance_start: [n] int.
            guidance_end: [n] int.
            languages: [n] int64.
        """
        return routing_rows(self._route(cls_rows, text, guidance_start, guidance_end)[1], languages)

    def start_step(self, step: int) -> None:
        """Sets the factor of the logits for a step of a run, counted from 0; it stays until the next one."""
        self._scale = self.config.scale_at(step)

    @torch.no_grad()
    def finish_step(self, *, updated: bool) -> None:
        """Moves the selection bias by what the images of the step chose, on all ranks of `statistics_group`.

        Args:
            updated: whether the step changed the parameters; otherwise its choices are forgotten.
        """
        chosen, self._chosen = self._chosen, None
        bias, rate = self.selection_bias, self.config.bias_update_rate
        if bias is None or not rate or not updated or not self.router_weight.requires_grad:
            return
        counts = bias.new_zeros(bias.shape, dtype=torch.float64) if chosen is None else chosen
        if self.statistics_group is not None:
            dist.all_reduce(counts, group=self.statistics_group)
        bias.add_((counts.mean() - counts).sign().to(bias), alpha=rate)

    @contextmanager
    def over_step(self, totals: RoutingTotals) -> Iterator[None]:
        """Within it, auxiliary losses are shares of the loss of the whole step that `totals` counted."""
        self._step_totals = totals
        try:
            yield
        finally:
            self._step_totals = None


def _residual_scales(config: TextGuidedMoEConfig) -> tuple[float, float]:
    """Factors of the features and of the experts' output in the result."""
    if config.residual == "code":
        return config.residual_weight, 1.0
    if config.residual == "paper":
        return 1.0, config.residual_weight
    return 0.0, 1.0
