"""Programs of others that run through `parrot_sys.megatron.run`: they ask for GPUs, and get CPU processes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.nn.functional as F
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.transformer_config import TransformerConfig

from parrot_sys.errors import ConfigError
from parrot_sys.megatron import specs
from parrot_sys.megatron.embed.moe_layer import GroupedExperts, TokenRouter
from parrot_sys.megatron.runtime.initialize import initialize, shutdown

PROGRAM = """
import sys
import torch
from megatron.core.tensor_parallel import random
import beside

seen = vars(random)["torch"].cuda  # what a module of Megatron asks
assert seen.is_available() and seen.device_count() == 1 and seen.get_device_properties(0).major == 10
assert torch.nn.Linear(2, 2).cuda().weight.cuda().device.type == "cpu"
print("arguments", sys.argv[1:], beside.VALUE)
"""


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "parrot_sys.megatron.run", *arguments]
    return subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=300, check=False
    )


def test_a_program_finds_what_it_asks_for(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "beside.py").write_text("VALUE = 7\n")
    result = run(str(tmp_path / "program.py"), "--layers", "2")
    assert result.returncode == 0, result.stderr
    assert result.stdout == "arguments ['--layers', '2'] 7\n"
    assert result.stderr.count("Megatron-LM runs on the CPU in this process") == 1
    left_alone = run(str(tmp_path / "program.py"), PARROT_CPU_LAYER="0")
    assert left_alone.returncode == 1
    assert "on the CPU" not in left_alone.stderr


@pytest.mark.parametrize("layer", ["1", "0"])
def test_loggers_of_the_program_stay_as_they_are(layer: str, tmp_path: Path) -> None:
    text = "import logging\nprint(*(f'{n}={x.level}' for n, x in logging.root.manager.loggerDict.items()\n"
    text += "    if isinstance(x, logging.Logger) and x.level and n.startswith('megatron')))\n"
    (tmp_path / "program.py").write_text(text)
    assert run(str(tmp_path / "program.py"), PARROT_CPU_LAYER=layer).stdout == "\n"


def test_a_missing_program_is_named(tmp_path: Path) -> None:
    result = run(str(tmp_path / "none.py"))
    assert (result.returncode, result.stderr.count(str(tmp_path / "none.py"))) == (2, 1)
    assert "--spec parrot_sys.megatron.specs" in run("--help").stdout


@pytest.fixture
def groups() -> Iterator[None]:
    initialize()
    yield
    shutdown()


@pytest.mark.usefixtures("groups")
def test_specs_have_our_router_and_experts() -> None:
    config = TransformerConfig(
        num_layers=2,
        hidden_size=8,
        num_attention_heads=2,
        num_moe_experts=2,
        moe_ffn_hidden_size=8,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        normalization="RMSNorm",
        use_cpu_initialization=True,
        transformer_impl="local",
        fp8=False,  # as programs say that read it from a flag
    )
    blocks = [
        specs.gpt_moe(SimpleNamespace(transformer=config)),
        specs.gpt_moe_norms(SimpleNamespace(transformer=config)),
    ]
    for spec in (specs.layer, *(layer for block in blocks for layer in block.layer_specs)):
        mlp = spec.submodules.mlp
        layer = MoELayer(config, mlp.submodules, layer_number=1)
        assert (type(layer.router), type(layer.experts)) == (TokenRouter, GroupedExperts)


def arguments_of_a_program(**changed: Any) -> SimpleNamespace:
    held = {
        **{"moe_layer_freq": 1, "qk_layernorm": False, "multi_latent_attention": False, "qk_l2_norm": False},
        **{"transformer_impl": "local", "normalization": "RMSNorm"},
    }
    return SimpleNamespace(**{**held, **changed})


def test_the_spec_of_a_layer_keeps_what_the_program_was_asked_for() -> None:
    plain, normed = (
        specs.layer_spec(arguments_of_a_program(qk_layernorm=asked)).submodules.self_attention
        for asked in (False, True)
    )
    assert plain.submodules.q_layernorm is IdentityOp
    assert normed.submodules.q_layernorm is not IdentityOp
    latent = specs.layer_spec(arguments_of_a_program(multi_latent_attention=True))
    assert latent.submodules.self_attention.module is MLASelfAttention
    assert latent.submodules.mlp.submodules.experts is GroupedExperts
    assert specs.layer_spec(arguments_of_a_program(moe_layer_freq=[1, 1])).submodules.mlp.module is MoELayer


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        ({"moe_layer_freq": 2}, "--moe-layer-freq"),
        ({"moe_layer_freq": [0, 1]}, "--moe-layer-freq"),
        ({"experimental_attention_variant": "dsa"}, "--experimental-attention-variant dsa"),
        ({"heterogeneous_layers_config_path": "x.json"}, "--heterogeneous-layers-config-path x.json"),
    ],
)
def test_what_one_spec_cannot_say_is_refused_by_name(asked: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        specs.layer_spec(arguments_of_a_program(**asked))
