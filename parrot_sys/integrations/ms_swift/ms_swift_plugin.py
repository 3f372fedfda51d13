"""For `--external_plugins` of ms-swift: exported directories of parrot_sys as models that it trains and asks.

A model type for each released layout (`parrot_qwen2`, `wings_qwen2`, ...), chosen by config.json. Ids and labels are
those of `parrot train`: the template of ms-swift only hands the conversation over.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from swift.model import (
    ModelGroup,
    ModelLoader,
    ModelMeta,
    MultiModelKeys,
    register_model,
    register_model_arch,
)
from swift.pipelines.train.tuner import TunerMixin
from swift.template import Template, TemplateMeta, register_template
from torch import Tensor
from transformers.utils.generic import ModelOutput

import parrot_sys  # noqa: F401  (registers the classes of transformers)
from parrot_sys.data.constants import IMAGE_TOKEN, IMAGE_TOKEN_ID
from parrot_sys.data.parts import Turn
from parrot_sys.data.templates import ROLE_NAMES
from parrot_sys.errors import ConfigError, DataError
from parrot_sys.integrations.hugging_face.configuration import CONFIGURATIONS
from parrot_sys.integrations.hugging_face.processing import ReleasedProcessor

# B samples, N ids, n rows of a picture, V vocabulary

NAME = "parrot_sys"
"""Of the template and of the architecture."""
_FROM = {role: name for name, role in ROLE_NAMES.items()}
_NOT_OURS = ("tools", "videos", "audios", "objects", "chat_template_kwargs")
_NOT_OF_MESSAGES = ("loss", "loss_scale")
"""Parts that records of ms-swift, and their messages, may have besides."""


class ReleasedLoader(ModelLoader):
    """Loads through the classes of `parrot_sys.integrations.hugging_face`."""

    default_trust_remote_code = False

    def get_processor(self, model_dir: str, config: Any) -> Any:
        """The processor of an exported directory, also where its preprocessing is that of a tower beside it."""
        return ReleasedProcessor.from_pretrained(model_dir)

    def get_model(self, model_dir: str, config: Any, processor: Any, model_kwargs: Mapping[str, Any]) -> Any:
        """The model of an exported directory.

        Raises:
            ConfigError: something else than a causal language model is asked for, or quantization.
        """
        if self.model_info.task_type != "causal_lm" or self.return_dummy_model:
            raise ConfigError(f"task_type={self.model_info.task_type}: models of {NAME} are causal language models")
        from parrot_sys.integrations.hugging_face import modeling

        asked = {name: value for name, value in model_kwargs.items() if value is not None}
        model = getattr(modeling, config.architecture).from_pretrained(model_dir, **asked)
        # (What ms-swift sets in a configuration is of the models of transformers; the file decides here.)
        model.config.keys_to_ignore_at_inference = ["past_key_values"]
        processor.end_ids = frozenset(model.parrot.eos_token_ids)
        return model


class ReleasedTemplate(Template):
    """Conversations in the format of the checkpoint."""

    load_images = False  # the checkpoint's own preprocessing reads them
    placeholder_tokens: ClassVar[list[int]] = [IMAGE_TOKEN_ID]

    def _init_placeholder_tokens(self) -> None:
        """The usual ones are not ours; checks the settings."""
        if self._loss_scale != "default" or self.padding_free or self.response_prefix:
            raise ConfigError(
                f"loss_scale={self._loss_scale}, padding_free={self.padding_free}, response_prefix="
                f"{self.response_prefix!r}: models of {NAME} know the default, False and none"
            )

    def _encode(self, inputs: Any) -> dict[str, Any]:
        """Ids, labels and pictures of a conversation.

        Raises:
            ConfigError: it has what there is nothing for here, by its name.
            DataError: pictures and markers do not fit together.
        """
        turns = _turns(inputs)
        marked = sum(turn["value"].count(IMAGE_TOKEN) for turn in turns if turn["from"] == "human")
        if marked != len(inputs.images):
            raise DataError(f"a conversation has {marked} {IMAGE_TOKEN} and {len(inputs.images)} pictures")
        own = self.processor.processor
        encoded = own.format_conversation(turns, add_generation_prompt=not self.is_training)
        result: dict[str, Any] = {"input_ids": encoded["input_ids"], "loss_scale": None}
        result["labels"] = encoded["labels"] if self.is_training else None
        return result | self.processor.picture_inputs(inputs.images, return_tensors="pt")

    def prepare_generate_kwargs(self, generate_kwargs: dict[str, Any], *, model: Any = None) -> dict[str, Any]:
        """Stop words as stop strings of the engine, which takes no criteria of transformers."""
        config = copy.deepcopy(generate_kwargs["generation_config"])
        words = list(vars(config).pop("stop_words", None) or ())
        if ids := [word for word in words if not isinstance(word, str)]:
            raise ConfigError(f"stop words must be texts for models of {NAME}, got {ids!r:.80}")
        config.stop_strings = [*(config.stop_strings or ()), *words] or None
        return {**generate_kwargs, "generation_config": config}

    def generate(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        """Prompts and answers, int64 [B, N + M], by the engine; as `sequences` of an output where that is asked for."""
        if (config := kwargs.get("generation_config")) is None:
            return model.generate(*args, **kwargs)
        wrapped, config.return_dict_in_generate = config.return_dict_in_generate, False
        sequences = model.generate(*args, tokenizer=self.tokenizer, **kwargs)
        return ModelOutput(sequences=sequences) if wrapped else sequences

    def skip_stop_tokens(self, generate_ids: list[int], is_finished: bool = True) -> list[int]:
        """An answer without the id that ends it."""
        ends: frozenset[int] = getattr(self.processor, "end_ids", frozenset())
        return generate_ids[:-1] if generate_ids and generate_ids[-1] in ends else generate_ids

    def compute_sft_loss(
        self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None, trainer: Any = None
    ) -> Any:
        """Loss, and logits with one row for each id, as ms-swift compares them with the labels."""
        outputs = super().compute_sft_loss(model, inputs, num_items_in_batch=num_items_in_batch, trainer=trainer)
        rows = self.get_base_model(model).parrot.config.rows_per_image
        outputs.logits = rows_of_ids(outputs.logits, inputs["input_ids"], rows)
        return outputs


def rows_of_ids(logits: Tensor, input_ids: Tensor, rows_per_image: int) -> Tensor:
    """Logits [B, N, V] from those of the expanded sequence: a picture keeps its last row."""
    widths = torch.where(input_ids == IMAGE_TOKEN_ID, rows_per_image, 1)
    last = (widths.cumsum(1) - 1).clamp(max=logits.shape[1] - 1)  # (ids after the end have no label)
    return logits.take_along_dim(last.unsqueeze(-1), dim=1)


def _turns(inputs: Any) -> list[Turn]:
    """Turns of a conversation of ms-swift."""
    messages: Sequence[Mapping[str, Any]] = inputs.messages
    if messages and messages[-1]["role"] == "assistant" and messages[-1]["content"] is None:
        messages = messages[:-1]
    asked = [name for name in _NOT_OURS if getattr(inputs, name, None)]
    asked += [name for name in _NOT_OF_MESSAGES if any(message.get(name) is not None for message in messages)]
    asked += sorted({str(message["role"]) for message in messages} - _FROM.keys())
    if asked:
        raise ConfigError(f"{', '.join(asked)} in a record: not supported by models of {NAME}")
    system = [{"from": "system", "value": inputs.system}] if inputs.system else []
    return [*system, *({"from": _FROM[message["role"]], "value": message["content"]} for message in messages)]


def _refuse_adapters() -> None:
    """Makes ms-swift refuse adapters for our models: it asks no plugin before it puts them in.

    Left alone, peft would find none of the decoder's layers, which are Megatron's, and adapt what else is linear.
    """
    prepare = TunerMixin.prepare_model.__func__

    def prepare_model(cls: Any, args: Any, model: Any, **kwargs: Any) -> Any:
        if args.tuner_type != "full" and isinstance(getattr(model, "config", None), tuple(CONFIGURATIONS.values())):
            raise ConfigError(
                f"tuner_type={args.tuner_type}: models of {NAME} have no adapters here; take --tuner_type full, and "
                "choose the parts with --freeze_llm, --freeze_vit, --freeze_aligner"
            )
        return prepare(cls, args, model, **kwargs)

    TunerMixin.prepare_model = classmethod(prepare_model)


def _register() -> None:
    register_template(
        TemplateMeta(
            NAME,
            prefix=[],
            system_prefix=["{{SYSTEM}}"],  # (these are never used: the template above writes the prompt)
            prompt=["{{QUERY}}"],
            chat_sep=[],
            suffix=[],
            template_cls=ReleasedTemplate,
        )
    )
    parts = {"language_model": "parrot.model.decoder", "vision_tower": "parrot.model.vision_tower"}
    aligner = [f"parrot.model.{part}" for part in ("projector", "moe", "resampler")]
    register_model_arch(MultiModelKeys(NAME, aligner=aligner, **parts))
    for kind, configuration in CONFIGURATIONS.items():
        register_model(
            ModelMeta(
                kind,
                [ModelGroup([])],
                ReleasedLoader,
                template=NAME,
                model_arch=NAME,
                architectures=[configuration.architecture],
                is_multimodal=True,
            )
        )


_register()
_refuse_adapters()
