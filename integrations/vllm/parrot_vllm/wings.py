"""Wings in vLLM by the paper's rule: learners beside each layer's attention read pictures and words of a request."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.model_executor.models.interfaces import SupportsMRoPE
from vllm.model_executor.models.utils import maybe_prefix
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.sequence import IntermediateTensors

from parrot_sys.errors import ConfigError
from parrot_sys.models.tensor_files import TensorFiles
from parrot_sys.models.tensor_map import check_tensors
from parrot_sys.systems.wings.system import Wings, learner_maps
from parrot_vllm.learners import Learners, Step, add_learners
from parrot_vllm.model import ImageRowsForVllm
from parrot_vllm.processing import DummyInputs, ProcessingInfo, Processor
from parrot_vllm.visual import fill

_MEMORY = "memory"
"""Among what a pipeline stage sends on: the input of the first layer."""
_SPAN = 1 << 22
"""More than a request has rows. Place p of a request of text alone is numbered p, of one with pictures _SPAN + p, and
2 * _SPAN + p if the row is a picture's."""
_LEARNER_KEY = re.compile(r"^model\.layers\.\d+\.(attn_pool|attn_t_pool|reweight_module)\.")
_NORM = "post_attention_layernorm"
_NORM_KEY = re.compile(rf"^model\.layers\.(\d+)\.{_NORM}\.")


class _WithPictures(dict[str, Any]):
    """Inputs of a request with pictures: their rows differ from those of the same words without, from the first on, so
    the cache of keys and values must not mix the two. vLLM writes the salt of the request into the inputs last."""

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, f"pictures {value}" if key == "cache_salt" else value)


class WingsProcessor(Processor):
    """Ids and pixels; requests with pictures have blocks of their own in the KV cache."""

    def apply(self, inputs: Any, timing_ctx: Any) -> Any:
        """See the class."""
        made = super().apply(inputs, timing_ctx)
        if inputs.mm_data_items.get_count("image", strict=False):
            made = _WithPictures(made)
            made["cache_salt"] = made.get("cache_salt", "")
        return made


@MULTIMODAL_REGISTRY.register_processor(WingsProcessor, info=ProcessingInfo, dummy_inputs=DummyInputs)
class WingsForVllm(ImageRowsForVllm, SupportsMRoPE):
    """vLLM's decoder with learners.

    Layers need to know of each row whether it is a picture's, and whether its request has any, at later steps too. vLLM
    lets models number the rows of a request themselves (`get_mrope_input_positions`): the numbers say both.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        """
        Args:
            vllm_config: of the engine.
            prefix: of parameters' names.

        Raises:
            ConfigError: the released rule, or requests longer than the router has weights for.
        """
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        model, engine = self.checkpoint.config, vllm_config.model_config
        assert model.wings is not None, "the registry chose this system"
        if model.wings.rule != "paper":
            raise ConfigError(
                f"wings.rule={model.wings.rule!r}: earlier rows read later ones under it, which no KV cache can "
                "follow; serve this checkpoint with `parrot serve`"
            )
        if engine.max_model_len > model.wings.router_positions:
            raise ConfigError(
                f"the routers of Wings have weights for {model.wings.router_positions} positions, but requests "
                f"may have {engine.max_model_len}: start with --max-model-len {model.wings.router_positions} or less"
            )
        with TensorFiles(self.checkpoint.directory) as files:
            self.routed = not Wings().bypassed(files.names())
        self.skipped = model.wings.system_prompt_length
        self.step = Step(model, vllm_config.scheduler_config.max_num_batched_tokens, engine.dtype)
        name = maybe_prefix(maybe_prefix(prefix, "language_model"), "model")
        add_learners(self.language_model.model, model, self.step, vllm_config, name, routed=self.routed)
        self._make_empty = self.language_model.make_empty_intermediate_tensors
        self.make_empty_intermediate_tensors = self._make_empty_with_memory

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: list[Any]) -> tuple[Tensor, int]:
        """Numbers of the rows of a prompt, and how far those of its answer are from their places."""
        places = torch.arange(len(input_tokens))
        for feature in mm_features:
            where = feature.mm_position
            places[where.offset : where.offset + where.length] += _SPAN
        moved = _SPAN if mm_features else 0
        return (places + moved).expand(3, -1), moved

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        **others: Any,
    ) -> Any:
        """The decoder's, with the memory of this step's rows."""
        if intermediate_tensors is not None:
            memory = intermediate_tensors[_MEMORY]
        else:
            memory = self.language_model.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds
        numbers = positions[0] if positions.dim() > 1 else positions
        kind, places = numbers // _SPAN, numbers % _SPAN
        textual = (kind == 0) | ((kind == 1) & (places >= self.skipped))
        self.step.begin(memory, places, torch.stack((kind == 2, textual), dim=1), kind > 0)
        count = len(places)
        result = super().forward(None, self.step.positions[:count], intermediate_tensors, memory)
        if isinstance(result, IntermediateTensors):
            result.tensors[_MEMORY] = self.step.memory[:count]
        return result

    def _make_empty_with_memory(self, batch_size: int, dtype: torch.dtype, device: torch.device) -> IntermediateTensors:
        made = self._make_empty(batch_size, dtype, device)
        hidden = self.checkpoint.config.llm.hidden_size
        made.tensors[_MEMORY] = torch.zeros(batch_size, hidden, dtype=dtype, device=device)
        return made

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Released tensors: those of the learners, and the rest as for Parrot."""
        wings, own = self.checkpoint.config.wings, dict[str, Tensor]()
        assert wings is not None, "the registry chose this system"

        def others() -> Iterable[tuple[str, Tensor]]:
            for name, tensor in weights:
                if _LEARNER_KEY.match(name):
                    own[name] = tensor
                    continue
                norm = _NORM_KEY.match(name)
                within = norm is not None and wings.has_learners(int(norm[1]))
                yield name.replace(_NORM, f"{_NORM}.norm") if within else name, tensor

        return super().load_weights(others()) | self._load_learners(own)

    @torch.no_grad()
    def _load_learners(self, tensors: dict[str, Tensor]) -> set[str]:
        config = self.checkpoint.config
        assert config.wings is not None, "the registry chose this system"
        maps = learner_maps(config.wings, config.llm)
        if not self.routed:  # (textual learners may be there, and are passed by)
            maps = [entry for entry in maps if ".visual_learner." in entry.name]
            tensors = {name: tensor for name, tensor in tensors.items() if ".attn_pool." in name}
        check_tensors(maps, {name: tuple(t.shape) for name, t in tensors.items()}, str(self.checkpoint.directory))
        targets = {
            f"decoder.layers.{module.layer}.learners.{name}": (f"{prefix}.{name}", parameter)
            for prefix, module in self.named_modules()
            if isinstance(module, Learners)
            for name, parameter in module.named_parameters()
        }
        for entry in maps:
            if entry.name in targets:
                fill(targets[entry.name][1], entry.pack([tensors[key] for key in entry.keys]))
        return {name for name, _ in targets.values()}
