"""The CPU layer redirects Megatron's CUDA calls and nobody else's; layouts and platform."""

from __future__ import annotations

import os
import subprocess
import sys

import megatron.core.jit
import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.optimizer import clip_grads
from megatron.core.tensor_parallel import random as megatron_random

from parrot_sys import platform
from parrot_sys.errors import ConfigError
from parrot_sys.megatron.config import to_transformer_config
from parrot_sys.megatron.runtime import cpu_layer
from parrot_sys.megatron.runtime.initialize import ParallelConfig, initialize, shutdown
from parrot_sys.models.llm import LLMConfig
from parrot_sys.testing.distributed import run_distributed

cpu_only = pytest.mark.skipif(platform.cuda_available(), reason="the layer does nothing where CUDA runs")


def _as_megatron(code: str) -> dict[str, object]:
    """Run code as if it stood in a module of Megatron-Core."""
    scope = {"__name__": "megatron.core.anything", "torch": clip_grads.torch}
    exec(code, scope)
    return scope


@cpu_only
def test_megatron_sees_the_cpu() -> None:
    scope = _as_megatron(
        "made = torch.zeros(2, device='cuda'); device = torch.cuda.current_device()\n"
        "moved = made.cuda(); pinned = made.pin_memory(); made.record_stream(None); name = made.type()\n"
        "half = made.type(torch.float16)\n"
        "stream = torch.cuda.Stream(); event = stream.record_event(); stream.wait_event(event); stream.synchronize()\n"
        "later = torch.cuda.Event(); later.record(); elapsed = event.elapsed_time(later)\n"
        "with torch.cuda.stream(stream): pass\n"
        "pinned_too = torch.empty(3, pin_memory=True, device=torch.device('cuda', 0))\n"
        "same = isinstance(made, torch.Tensor)"
    )
    assert scope["made"].device == scope["device"] == scope["pinned_too"].device == torch.device("cpu")
    assert scope["moved"] is scope["made"]
    assert scope["pinned"] is scope["made"]
    assert scope["name"] == "torch.cuda.FloatTensor"
    assert scope["half"].dtype == torch.float16
    assert scope["elapsed"] >= 0
    assert scope["same"]


@cpu_only
def test_everybody_else_sees_the_real_torch() -> None:
    assert clip_grads.torch is not torch
    assert torch.zeros(1).type() == "torch.FloatTensor"
    assert torch.zeros(1).type(torch.int32).dtype == torch.int32
    with pytest.raises((RuntimeError, AssertionError)):
        torch.zeros(1, device="cuda")
    with pytest.raises((RuntimeError, AssertionError)):
        torch.zeros(1).cuda()
    assert dist.all_gather.__module__.startswith("torch.")


@cpu_only
def test_elementwise_functions_are_not_compiled() -> None:
    assert megatron.core.jit.jit_fuser(len) is len


@cpu_only
def test_random_states_are_those_of_the_cpu() -> None:
    state = megatron_random._get_cuda_rng_state()
    first = torch.rand(3)
    megatron_random._set_cuda_rng_state(state)
    assert torch.equal(torch.rand(3), first)


@cpu_only
def test_install_again_changes_nothing() -> None:
    before, method = list(sys.meta_path), torch.Tensor.type
    cpu_layer.install()
    assert list(sys.meta_path) == before
    assert torch.Tensor.type is method


_SIMULATED_ROCM = """
import sys, torch
from parrot_sys import platform
torch.version.cuda, torch.version.hip, torch.cuda.device_count = None, "6.4.1", lambda: GPUS
import parrot_sys.megatron
from parrot_sys.megatron.runtime import cpu_layer
from parrot_kernels import cuda_support
found = platform.backend(), platform.device().type, platform.gpu_toolkit(), cuda_support.why_not()
print(cpu_layer.is_installed(), *found, sep=";")
"""


def _run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command, settings = [sys.executable, "-c", code], {**os.environ, **environment}
    return subprocess.run(command, capture_output=True, text=True, check=True, env=settings)


def test_an_amd_gpu_is_a_gpu() -> None:
    done = _run_python(_SIMULATED_ROCM.replace("GPUS", "2"))
    reason = "the kernels are for NVIDIA GPUs, this torch is built for ROCm 6.4.1"
    assert done.stdout.strip() == f"False;nccl;cuda;ROCm 6.4.1;{reason}"
    assert "on the CPU" not in done.stderr


def test_one_line_says_that_the_layer_is_installed_and_how_to_leave_it_out() -> None:
    without_gpu = _SIMULATED_ROCM.replace("GPUS", "0")
    done = _run_python(without_gpu)
    assert done.stdout.startswith("True;gloo;cpu;ROCm 6.4.1;")
    (line,) = [line for line in done.stderr.splitlines() if "Megatron-Core runs on the CPU" in line]
    assert "built for ROCm 6.4.1 but sees no GPU; PARROT_CPU_LAYER=0 leaves it" in line
    left_out = _run_python(without_gpu, PARROT_CPU_LAYER="0")
    assert left_out.stdout.startswith("False;")
    assert "on the CPU" not in left_out.stderr


@cpu_only
def test_a_cpu_build_says_it_as_information() -> None:
    code = "import logging; logging.basicConfig(level='INFO'); import parrot_sys.megatron, parrot_sys.megatron.config"
    assert (
        _run_python(code).stderr.count("Megatron-Core runs on the CPU in this process, since torch is a CPU build") == 1
    )
    assert "Megatron-Core" not in _run_python("import parrot_sys.megatron").stderr


def _uneven_rank(rank: int, size: int) -> tuple[list[float], list[float]]:
    distributed = clip_grads.torch.distributed
    mine = torch.full((rank + 1,), float(rank))
    gathered = [torch.empty(r + 1) for r in range(size)]
    distributed.all_gather(gathered, mine)
    parts = [torch.full((r + 1,), float(rank + 1)) for r in range(size)]
    reduced = torch.empty(rank + 1)
    distributed.reduce_scatter(reduced, parts)
    return torch.cat(gathered).tolist(), reduced.tolist()


@cpu_only
def test_uneven_collectives() -> None:
    (gathered0, reduced0), (gathered1, reduced1) = run_distributed(_uneven_rank, 2)
    assert gathered0 == gathered1 == [0.0, 1.0, 1.0]
    assert (reduced0, reduced1) == ([3.0], [3.0, 3.0])


def test_importing_the_package_imports_no_megatron() -> None:
    code = "import sys, parrot_sys.megatron.runtime.initialize; print('megatron.core' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert result.stdout.strip() == "False"


def test_initialize_and_shutdown_can_be_repeated() -> None:
    for _ in range(2):
        layout = initialize()
        assert layout == ParallelConfig()
        assert initialize() == layout
        assert parallel_state.get_data_parallel_world_size() == 1
        with pytest.raises(ConfigError, match="already runs with 1: call shutdown"):
            initialize(ParallelConfig(tensor_model_parallel_size=2))
        shutdown()
        assert not dist.is_initialized()
        assert not any(isinstance(value, dist.ProcessGroup) for value in vars(parallel_state).values())


def test_layouts_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match="context_parallel_size must be >= 1, got 0"):
        ParallelConfig(context_parallel_size=0)
    with pytest.raises(ConfigError, match="expert_tensor_parallel_size must be >= 1"):
        ParallelConfig(expert_tensor_parallel_size=0)
    with pytest.raises(ConfigError, match="sequence_parallel needs"):
        ParallelConfig(sequence_parallel=True)
    with pytest.raises(ConfigError, match="virtual_pipeline_model_parallel_size must be >= 2"):
        ParallelConfig(virtual_pipeline_model_parallel_size=2)
    layout = ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=3)
    assert layout.data_parallel_size(12) == 2
    with pytest.raises(ConfigError, match=r"multiple of 6 .* got 8: start 6 or 12"):
        layout.data_parallel_size(8)
    with pytest.raises(ConfigError, match="expert x pipeline"):
        ParallelConfig(expert_model_parallel_size=4).data_parallel_size(2)
    with pytest.raises(ConfigError, match="number of processes must be a multiple of 2"):
        initialize(ParallelConfig(tensor_model_parallel_size=2))


def test_decoders_that_cannot_be_cut() -> None:
    llm = LLMConfig(hidden_size=60, num_layers=6, num_attention_heads=6, num_query_groups=3, ffn_hidden_size=64)
    with pytest.raises(
        ConfigError, match=r"num_attention_heads must be a multiple of .*=4, got 6: the nearest size that fits is 1"
    ):
        to_transformer_config(llm, ParallelConfig(tensor_model_parallel_size=4))
    with pytest.raises(ConfigError, match=r"num_layers must be >= the 8 pipeline stages .* use at most 6 stages"):
        to_transformer_config(llm, ParallelConfig(pipeline_model_parallel_size=8))
    with pytest.raises(ConfigError, match=r"pipeline_layers must add up to the 6 layers .* got \[1, 2\], which are 3"):
        to_transformer_config(llm, ParallelConfig(pipeline_model_parallel_size=2, pipeline_layers=(1, 2)))
    with pytest.raises(ConfigError, match=r"pipeline_layers must name the layers .* of each of the 4 stages"):
        ParallelConfig(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2, pipeline_layers=(3, 3))


@pytest.mark.parametrize(
    ("layers", "stages", "wanted"),
    [(6, 4, (1, 2, 2, 1)), (7, 3, (2, 3, 2)), (8, 4, (2, 2, 2, 2)), (5, 4, (1, 1, 2, 1)), (7, 4, (1, 2, 2, 2))],
)
def test_layers_are_spread_evenly_and_the_middle_gets_the_rest(
    layers: int, stages: int, wanted: tuple[int, ...]
) -> None:
    assert ParallelConfig(pipeline_model_parallel_size=stages).layers_of_stages(layers) == wanted


def test_translation_of_names() -> None:
    llm = LLMConfig(hidden_size=60, num_layers=6, num_attention_heads=6, num_query_groups=3, head_dim=16, norm_eps=1e-4)
    config = to_transformer_config(llm, ParallelConfig(), dtype=torch.bfloat16, recompute="full")
    assert (config.num_layers, config.hidden_size, config.num_attention_heads, config.num_query_groups) == (6, 60, 6, 3)
    assert (config.kv_channels, config.layernorm_epsilon, config.normalization) == (16, 1e-4, "RMSNorm")
    assert (config.bf16, config.params_dtype, config.recompute_granularity) == (True, torch.bfloat16, "full")
    with pytest.raises(ConfigError, match="recompute must be 'none' or 'full'"):
        to_transformer_config(llm, ParallelConfig(), recompute="some")  # type: ignore[arg-type]


def test_platform(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "MASTER_ADDR", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert platform.launch() == platform.Launch()
    for name, value in {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    assert platform.launch() == platform.Launch(rank=5, world_size=8, local_rank=1, from_launcher=True)
    assert platform.parse_dtype("bfloat16") == torch.bfloat16
    assert platform.dtype_name(torch.float32) == "float32"
    with pytest.raises(ConfigError, match=r"dtype must be one of .* got 'half'"):
        platform.parse_dtype("half")
