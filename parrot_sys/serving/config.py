"""Settings of `parrot serve`."""

from __future__ import annotations

import ipaddress
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from parrot_sys.data.decoding import ImageLimits
from parrot_sys.data.languages import MMMB_LANGUAGES, language_codes
from parrot_sys.engine.config import AdmissionLimits, EngineConfig
from parrot_sys.errors import ConfigError
from parrot_sys.megatron.runtime.initialize import ParallelConfig
from parrot_sys.paths import INPUT_FILE, INPUT_FOLDER
from parrot_sys.platform import DtypeName
from parrot_sys.systems.section import Compat


@dataclass(kw_only=True, frozen=True, slots=True)
class RemoteImages:
    """Pictures that requests name by an address (`https://...`), which the server then fetches."""

    enabled: bool = False
    """Fetch them. Off: requests bring their pictures as data URLs."""
    allowed_networks: tuple[str, ...] = ()
    """Private networks that may be fetched from (`10.1.0.0/16`). All other private, local and reserved addresses are
    refused, also after a redirect."""
    max_redirects: int = 3
    """Redirects that are followed."""
    seconds: float = 10.0
    """Longest fetch of one picture, redirects included."""
    max_fetches: int = 32
    """Pictures that are fetched at the same time; further requests are told to come again."""

    def __post_init__(self) -> None:
        for network in self.allowed_networks:
            try:
                ipaddress.ip_network(network)
            except ValueError as error:
                raise ConfigError(f"remote.allowed_networks must be networks such as 10.1.0.0/16: {error}") from None
        if self.max_redirects < 0:
            raise ConfigError(f"remote.max_redirects must be >= 0, got {self.max_redirects}")
        if self.max_fetches < 1:
            raise ConfigError(f"remote.max_fetches must be >= 1, got {self.max_fetches}")
        _check_positive("remote.seconds", self.seconds)


def _engine() -> EngineConfig:
    return EngineConfig(limits=AdmissionLimits(max_images=16, max_pixels=2**26, max_bytes=32 * 2**20))


@dataclass(kw_only=True, frozen=True, slots=True)
class ServeConfig:
    """Serves a checkpoint behind OpenAI's interface, with a page to try it at `/`.

    In one process or in two; then open http://127.0.0.1:8000, or point any OpenAI client to http://127.0.0.1:8000/v1:

      $ parrot serve --checkpoint runs/demo/instruct/hf
      $ torchrun --nproc-per-node 2 -m parrot_sys serve ... --parallel.tensor-model-parallel-size 2
    """

    checkpoint: Annotated[Path, INPUT_FOLDER]
    """Folder of the model: released layout, training checkpoint, or training run (its newest checkpoint)."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 for all of this machine's."""
    port: int = 8000
    """Port to listen on; 0 takes a free one, which the log names."""
    name: str | None = None
    """Name of the model in the interface; that of the checkpoint's folder when not given."""
    api_key_file: Annotated[Path | None, INPUT_FILE] = None
    """File with keys, one a line, of which requests must bring one (`Authorization: Bearer KEY`). PARROT_API_KEY in the
    environment is one more."""
    cors_origins: tuple[str, ...] = ()
    """Origins of web pages that may call this server from a browser, besides its own page."""
    languages: tuple[str, ...] = MMMB_LANGUAGES
    """Languages that the page offers, as BCP 47 codes. Its own texts are in those of MMMB; for others they stay as they
    are, and only questions are asked in them."""
    engine: EngineConfig = field(default_factory=_engine)
    """Cache, scheduler and limits of requests."""
    image_limits: ImageLimits = field(default_factory=lambda: ImageLimits(max_pixels=2**25))
    """Largest pictures that are decoded."""
    image_workers: int = 2
    """Threads that decode pictures and tokenise prompts."""
    remote: RemoteImages = field(default_factory=RemoteImages)
    """Pictures behind addresses."""
    replicas: int = 1
    """Copies of the model behind the port, each in a process of its own (on GPUs: one on each); a request goes to the
    one that answers the fewest."""
    max_choices: int = 16
    """Most answers of a request: `n`, times prompts where there are several."""
    max_pending_bytes: int = 256 * 2**20
    """Bytes of request bodies that are held at the same time; further requests are told to come again."""
    max_pixel_bytes: int = 2 * 2**30
    """Bytes of pictures, as the model takes them, that requests hold from their arrival to the end of their answers;
    further requests are told to come again."""
    request_seconds: float = 600.0
    """Longest time from a request to the end of its answer."""
    head_seconds: float = 75.0
    """Longest time in which a connection must ask for something, and the head of a request must arrive."""
    body_seconds: float = 60.0
    """Longest time in which a request's body must arrive."""
    stream_queue: int = 64
    """Pieces of a stream that wait for its reader; a stream with more is paused until they are read."""
    drain_seconds: float = 20.0
    """After SIGTERM, time in which answers may end."""
    linger_seconds: float = 5.0
    """After a failure of the engine, time in which `/health` still says so (503) before the process ends with 1."""
    log_texts: bool = False
    """Write prompts and answers into the log."""
    device: str | None = None
    """Where the model runs; the GPU if there is one, else the CPU."""
    dtype: DtypeName | None = None
    """Type of parameters and activations; that of the checkpoint when not given."""
    cuda_graphs: bool = False
    """On a GPU, record steps of answers as CUDA graphs, one for each of a ladder of batch sizes."""
    allow_non_finite: bool = False
    """Load NaN and infinite weights with a warning; otherwise they are an error that names their tensors."""
    compat: Compat | None = None
    """Rules that a model follows where the public code differs from its paper: Wings' released weights need
    `released`. As the checkpoint says when not given."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """Layout over the processes of torchrun, for models that need several."""

    def __post_init__(self) -> None:
        if not 0 <= self.port < 2**16:
            raise ConfigError(f"port must be from 0 to 65535, got {self.port}")
        sizes = ("image_workers", "replicas", "max_choices", "max_pending_bytes", "max_pixel_bytes", "stream_queue")
        for name in sizes:
            if (value := getattr(self, name)) < 1:
                raise ConfigError(f"{name} must be >= 1, got {value}")
        if not language_codes(self.languages):
            raise ConfigError("languages must name at least one language, got nothing")
        for name in ("request_seconds", "head_seconds", "body_seconds"):
            _check_positive(name, getattr(self, name))
        for name in ("drain_seconds", "linger_seconds"):
            if not 0 <= (seconds := getattr(self, name)) < math.inf:
                raise ConfigError(f"{name} must be >= 0 and finite, got {seconds}")

    @property
    def max_body(self) -> int:
        """Largest body of a request in bytes."""
        limit = self.engine.limits.max_bytes
        return self.max_pending_bytes if limit is None else min(limit, self.max_pending_bytes)


def _check_positive(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise ConfigError(f"{name} must be > 0 and finite, got {value}")
