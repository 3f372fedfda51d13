"""`parrot serve`: an OpenAI-compatible server for one model, and a page to try it."""

from __future__ import annotations

import importlib.util
import signal
import socket
from collections.abc import Sequence

from parrot_sys import platform
from parrot_sys.cli import parse_config
from parrot_sys.errors import ConfigError
from parrot_sys.logging import setup_logging
from parrot_sys.serving.config import ServeConfig

_NEEDED = ("fastapi", "uvicorn", "prometheus_client")


def main(argv: Sequence[str]) -> int:
    """Runs `parrot serve`; 0 after SIGTERM or Ctrl-C, 1 when the engine has failed."""
    config = parse_config(ServeConfig, argv, prog="parrot serve")
    if missing := [name for name in _NEEDED if importlib.util.find_spec(name) is None]:
        raise ConfigError(f"parrot serve needs {', '.join(missing)}: pip install 'parrot_sys[serve]'")
    setup_logging()
    keys = _keys(config)
    listener = _listen(config) if platform.launch().rank == 0 else None  # before the model, which takes long
    if config.replicas > 1:
        return _serve_replicas(argv, config, listener)
    # Imported late: Megatron takes seconds, and a wrong command line should not.
    from parrot_sys.engine.lockstep import check_processes
    from parrot_sys.inference.pretrained import load_pretrained

    check_processes(config.parallel, platform.launch().world_size)
    if listener is None:
        _ignore_signals()  # the first rank ends the others, when its answers have ended
    model, processor = load_pretrained(
        config.checkpoint,
        device=config.device,
        dtype=config.dtype,
        parallel=config.parallel,
        compat=config.compat,
        allow_non_finite=config.allow_non_finite,
    )

    def program() -> int:
        from parrot_sys.serving.server import serve

        assert listener is not None, "the first rank runs the program"
        return serve(model, processor, config, keys, listener)

    return model.lockstep.run(program)


def _serve_replicas(argv: Sequence[str], config: ServeConfig, listener: socket.socket | None) -> int:
    from parrot_sys.serving.replicas import serve_replicas

    if platform.launch().from_launcher or listener is None:
        raise ConfigError("replicas must be 1 under torchrun, whose processes serve one model together")
    return serve_replicas(argv, config, listener)


def _keys(config: ServeConfig) -> list[str]:
    """Keys of which requests must bring one."""
    lines = [platform.api_key()]
    if config.api_key_file is not None:
        lines += config.api_key_file.read_text(encoding="utf-8").splitlines()
        if not any(map(str.strip, lines[1:])):
            raise ConfigError(f"api_key_file {config.api_key_file} must hold a key, one a line, got none")
    return [line.strip() for line in lines if line.strip()]


def _listen(config: ServeConfig) -> socket.socket:
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    try:
        return socket.create_server((config.host, config.port), family=family, backlog=2048)
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {config.host}:{config.port}: {error.strerror}; set --port or --host"
        ) from None


def _ignore_signals() -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
