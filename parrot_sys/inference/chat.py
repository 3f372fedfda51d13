"""`parrot chat`: a multi-turn conversation about pictures in the terminal, with the expert weights of each answer."""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
from torch import Tensor
from transformers import TextStreamer

from parrot_sys import platform
from parrot_sys.cli import parse_config, run_main
from parrot_sys.data.decoding import ImageLimits, load_image
from parrot_sys.data.packing import Sample
from parrot_sys.data.parts import human_turn
from parrot_sys.data.picture import Picture, join_pictures
from parrot_sys.data.processor import ParrotProcessor
from parrot_sys.errors import ConfigError, DataError, ParrotError
from parrot_sys.inference.chat_texts import texts_in
from parrot_sys.inference.requests import free_rows
from parrot_sys.megatron.runtime.initialize import ParallelConfig
from parrot_sys.paths import INPUT_FILE, INPUT_FOLDER
from parrot_sys.platform import DtypeName
from parrot_sys.systems.section import Compat
from parrot_sys.terminal import read_line

if TYPE_CHECKING:
    from parrot_sys.inference.model import ParrotForConditionalGeneration

_BAR_WIDTH = 30


@dataclass(kw_only=True, frozen=True, slots=True)
class ChatConfig:
    """Talks to a checkpoint about pictures, in any language that it knows."""

    checkpoint: Annotated[Path, INPUT_FOLDER]
    """Folder of the model: released layout, training checkpoint, or training run (its newest checkpoint)."""
    image: Annotated[tuple[Path, ...], INPUT_FILE] = ()
    """Pictures that the first message is about."""
    message: tuple[str, ...] = ()
    """Messages to send one after the other instead of reading them from the terminal."""
    show_routing: bool = False
    """Show the weight of each expert below each answer."""
    language: str = "en"
    """Language of the help and of the example questions (en, zh, pt, ar, tr or ru); the model answers in the language
    it is asked in."""
    max_new_tokens: int = 512
    """Longest answer in tokens."""
    temperature: float = 0.0
    """0 takes the most likely token; above, answers are drawn, the more freely the higher it is."""
    seed: int | None = None
    """Seed of drawn answers."""
    device: str | None = None
    """Where the model runs; the GPU if there is one, else the CPU."""
    dtype: DtypeName | None = None
    """Type of parameters and activations; that of the checkpoint when not given."""
    image_limits: ImageLimits = field(default_factory=ImageLimits)
    """Largest pictures that are read."""
    allow_non_finite: bool = False
    """Load NaN and infinite weights with a warning; otherwise they are an error that names their tensors."""
    compat: Compat | None = None
    """Rules that a model follows where the public code differs from its paper: Wings' released weights need
    `released`. As the checkpoint says when not given."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """Layout over the processes of torchrun, for models that need several."""

    def __post_init__(self) -> None:
        texts_in(self.language)
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens must be >= 1, got {self.max_new_tokens}")
        if not 0 <= self.temperature < math.inf:
            raise ConfigError(f"temperature must be >= 0 and finite, got {self.temperature}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """One answer of the model."""

    text: str
    experts: Tensor | None
    """float32 [images of the conversation so far, experts]; None without pictures or without experts."""


@dataclass(kw_only=True, slots=True)
class ChatSession:
    """A conversation: its turns, its pictures, and the model that answers."""

    model: ParrotForConditionalGeneration
    processor: ParrotProcessor
    max_new_tokens: int = 512
    temperature: float = 0.0
    seed: int | None = None
    turns: list[dict[str, Any]] = field(default_factory=list)
    images: list[Picture] = field(default_factory=list)
    """In the order of their markers."""
    waiting: list[Picture] = field(default_factory=list)
    """Pictures that go with the next message."""

    def add_image(self, path: str | Path) -> None:
        """Attaches a picture to the next message.

        Raises:
            DataError: the file is missing or is no picture.
        """
        self.waiting += self.processor.pictures([Path(path)])

    def reset(self) -> None:
        """Forgets turns and pictures."""
        self.turns, self.images, self.waiting = [], [], []

    def ask(self, message: str, on_text: Callable[[str], None] = lambda text: None) -> Answer:
        """Sends a message and returns the answer; one that fails or is interrupted leaves the conversation as it was.

        Args:
            message: text of the user.
            on_text: called with each new piece of the answer.

        Raises:
            DataError: the message has no UTF-8, or the conversation is too long.
        """
        user = human_turn(message, images=len(self.waiting))
        images = [*self.images, *self.waiting]
        prompt = self.processor.format_conversation([*self.turns, user], add_generation_prompt=True)
        input_ids = torch.tensor([prompt["input_ids"]])
        sample = Sample(input_ids=prompt["input_ids"], pictures=join_pictures(images)[1])
        sampling = {"do_sample": True, "temperature": self.temperature, "seed": self.seed} if self.temperature else {}
        output, routing = self.model.generate(
            input_ids,
            images=images,
            max_new_tokens=min(self.max_new_tokens, max(1, free_rows(self.model.config, sample))),
            streamer=_Streamer(self.processor, on_text),
            return_routing=True,
            **sampling,
        )
        text = self.processor.tokenizer.decode(output[0, input_ids.shape[1] :], skip_special_tokens=True).strip()
        self.turns += [user, {"from": "gpt", "value": text}]
        self.images, self.waiting = images, []
        return Answer(text=text, experts=None if routing is None else routing.probs.float().cpu())


class _Streamer(TextStreamer):
    """Hands finished pieces of text on; transformers decides where a piece ends (whole words, whole characters)."""

    def __init__(self, processor: ParrotProcessor, on_text: Callable[[str], None]) -> None:
        super().__init__(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._on_text = on_text

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Called by transformers with each piece."""
        self._on_text(text)


def routing_table(experts: Tensor) -> str:
    """Bars of the routing weights: one block per picture.

    Args:
        experts: [n, E] weights.
    """
    lines = []
    for number, weights in enumerate(experts.tolist(), 1):
        lines.append(f"  picture {number}: expert weights" if len(experts) > 1 else "  expert weights")
        for expert, weight in enumerate(weights, 1):
            lines.append(f"  {expert:>3} {weight:5.3f} {'#' * round(weight * _BAR_WIDTH)}".rstrip())
    return "\n".join(lines)


def main(argv: Sequence[str]) -> int:
    """Runs `parrot chat`."""
    config = parse_config(ChatConfig, argv, prog="parrot chat")
    for path in config.image:  # before the model is loaded, which takes long
        if not path.exists():
            raise DataError(f"--image {path} does not exist; wanted an image file")
        load_image(path, limits=config.image_limits)
    session = _open_session(config)
    return session.model.lockstep.run(lambda: _talk(session, config))


def _talk(session: ChatSession, config: ChatConfig) -> int:
    for path in config.image:
        session.add_image(path)
    if config.message:
        for message in config.message:
            print(f"> {message}")
            _answer(session, message, config)
        return 0
    return _loop(session, config)


def _open_session(config: ChatConfig) -> ChatSession:
    # Imported late: Megatron takes seconds, and a wrong command line should not.
    from parrot_sys.engine.lockstep import check_processes
    from parrot_sys.inference.pretrained import load_pretrained

    check_processes(config.parallel, platform.launch().world_size)
    model, processor = load_pretrained(
        config.checkpoint,
        device=config.device,
        dtype=config.dtype,
        parallel=config.parallel,
        compat=config.compat,
        allow_non_finite=config.allow_non_finite,
    )
    return ChatSession(
        model=model,
        processor=processor.with_image_limits(config.image_limits),
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        seed=config.seed,
    )


def _loop(session: ChatSession, config: ChatConfig) -> int:
    """Reads lines until the end of input or /quit."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (gives input() line editing and history)
    texts = texts_in(config.language)
    print(texts.welcome)
    while True:
        try:
            line = read_line("> ").strip()
        except EOFError:
            print()
            return 0
        except KeyboardInterrupt:
            print(f"\n{texts.how_to_quit}")
            continue
        if line == "/quit":
            return 0
        try:
            _handle(session, line, config)
        except KeyboardInterrupt:
            print(f"\n{texts.stopped}")
        except ParrotError as error:
            print(f"{texts.error}: {error}", file=sys.stderr)


def _handle(session: ChatSession, line: str, config: ChatConfig) -> None:
    texts = texts_in(config.language)
    command, _, argument = line.partition(" ")
    if not line:
        return
    if command == "/image" and argument.strip():
        session.add_image(Path(argument.strip()).expanduser())
        print(texts.attached.format(file=argument.strip()))
    elif command == "/reset":
        session.reset()
        print(texts.forgotten)
    elif command.startswith("/"):
        print(texts.help)
    else:
        _answer(session, line, config)


def _answer(session: ChatSession, message: str, config: ChatConfig) -> None:
    answer = session.ask(message, lambda text: print(text, end="", flush=True))
    print()
    if not config.show_routing:
        return
    print(routing_table(answer.experts) if answer.experts is not None else f"  {texts_in(config.language).no_experts}")


if __name__ == "__main__":
    sys.exit(run_main(main, sys.argv[1:], prog="parrot chat"))
