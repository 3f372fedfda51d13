"""Names that peft gives to the updates of LoRA."""

from __future__ import annotations

import pytest

from parrot_sys.errors import CheckpointError
from parrot_sys.models.lora_maps import lora_key_from_peft


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (
            "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",
            "model.layers.0.self_attn.q_proj.lora_A.weight",
        ),
        (
            "module.lang_encoder.base_model.model.model.layers.11.decoder_layer.self_attn.o_proj.lora_B.default.weight",
            "model.layers.11.self_attn.o_proj.lora_B.weight",
        ),
        (
            "module.lang_encoder.base_model.model.model.layers.3.gated_cross_attn_layer.ff.1.lora_B.default.weight",
            "model.layers.3.gated_cross_attn_layer.ff.1.lora_B.weight",
        ),
        ("model.layers.3.mlp.up_proj.lora_B.weight", "model.layers.3.mlp.up_proj.lora_B.weight"),
    ],
)
def test_names_of_peft(theirs: str, ours: str) -> None:
    assert lora_key_from_peft(theirs) == ours


def test_a_name_that_is_no_update() -> None:
    with pytest.raises(CheckpointError, match="is no update of LoRA"):
        lora_key_from_peft("model.layers.3.mlp.up_proj.weight")
