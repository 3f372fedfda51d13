"""Trainer: builds everything a TrainConfig describes and runs it to its end, from wherever it was interrupted."""

from __future__ import annotations

import functools
import itertools
import logging
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from parrot_sys import platform
from parrot_sys.cli import save_config
from parrot_sys.data.batch import PackedBatch
from parrot_sys.data.skipped import SkippedRecords
from parrot_sys.errors import ConfigError
from parrot_sys.locks import OutputLock
from parrot_sys.megatron.checkpoint.store import load_training_state, read_progress
from parrot_sys.megatron.model import MultimodalModel
from parrot_sys.megatron.runtime import optimizer as megatron_optimizer
from parrot_sys.megatron.runtime.initialize import initialize
from parrot_sys.megatron.state_dict import refuse_non_finite
from parrot_sys.parallel.agreement import on_first_rank
from parrot_sys.systems.build import build_chunks
from parrot_sys.systems.constants import check_constants
from parrot_sys.systems.export import export_released
from parrot_sys.systems.flops import FlopCounter
from parrot_sys.systems.parts import set_trainable
from parrot_sys.systems.registry import rate_of
from parrot_sys.training.checkpoint import (
    CheckpointStore,
    check_same_model,
    check_same_text,
    find_checkpoint,
    first_batch_size,
)
from parrot_sys.training.config import TrainConfig
from parrot_sys.training.export import exported_step, save_with_step
from parrot_sys.training.faults import StepGuard, TrainingError
from parrot_sys.training.feature_cache import cache_features
from parrot_sys.training.initial_weights import load_initial_weights
from parrot_sys.training.inputs import load_processor, training_loader, validation_loader
from parrot_sys.training.metrics import StepMetrics, counted_languages
from parrot_sys.training.samples import SampleAnswers
from parrot_sys.training.schedule import CosineSchedule, RunLength, warmup_steps
from parrot_sys.training.step import StepRunner, gather_values
from parrot_sys.training.step_log import StepLog
from parrot_sys.training.stop import StopSignals
from parrot_sys.training.trackers.registry import check_installed
from parrot_sys.training.watchdog import Watchdog
from parrot_sys.training.writer import MetricsWriter, shown, summary_line

logger = logging.getLogger(__name__)


class Trainer:
    """One training run. The constructor reads data and weights; `run` trains."""

    def __init__(self, config: TrainConfig) -> None:
        """
        Raises:
            ConfigError, DataError, CheckpointError: something does not fit; nothing has been trained or written then.
        """
        self.config = config
        self.output = Path(config.output)
        self.watchdog = Watchdog(config.faults)
        self.export_folder = self.output / "hf"
        with self.watchdog.section("setup", "starting"):
            self._meet()
            self._lock: OutputLock | None = None
            on_first_rank(self._lock_output)
            try:
                self._set_up()
            except BaseException:
                self._unlock_output()
                raise

    def _meet(self) -> None:
        """The other processes."""
        config = self.config
        platform.set_cpu_threads()
        # Later than the watchdog: a collective that gives up ends its rank before that rank has logged where it is.
        patience = 2 * max(seconds or 0.0 for seconds in config.faults.timeouts().values())
        initialize(config.parallel, seed=config.seed, timeout=max(600.0, patience))
        self.watchdog.meet()
        self.device = platform.device()
        if config.loss_reduction == "micro_batch":
            _warn(
                "loss_reduction=micro_batch: the loss depends on how samples fall into micro-batches, so on the "
                "data-parallel size (now %d) and on data.max_tokens_per_micro_batch; loss_reduction=global does not",
                megatron_optimizer.data_parallel_world_size(),
            )

    def _lock_output(self) -> None:
        self._lock = OutputLock(self.output)

    def _unlock_output(self) -> None:
        if self._lock is not None:
            self._lock.release()

    def _set_up(self) -> None:
        config = self.config
        check_installed(config.logging.trackers)
        self.checkpoints = CheckpointStore(config, on_progress=self.watchdog.beat)
        resume_from = self._resume_from()
        wanted = config.checkpoint.load_from if resume_from is None else None  # a run that goes on needs no other
        self.source = find_checkpoint(wanted) if wanted else None
        if wanted is not None:
            check_constants(config.model, self.source or wanted, allowed=config.checkpoint.allow_differences)
        # Data come before the model: their errors are cheap to find.
        self.processor = load_processor(config, resume_from or self.source)
        where = config.model.tokenizer_path or resume_from or config.checkpoint.load_from
        model, beat = config.model, self.watchdog.beat
        self.processor.check_fits(model.llm.vocab_size, model.vision.image_size, where, tiling=model.tiling)
        self.loader = training_loader(config, self.processor, on_progress=beat)
        self.validation_loader = (
            validation_loader(config, self.processor, on_progress=beat) if config.validation.paths else None
        )
        self.languages = self._languages()
        self.length = self._run_length(resume_from)
        settings = config.optimizer
        warmup = warmup_steps(self.length.total_steps, settings.warmup_fraction, settings.warmup_steps)
        self.schedule = CosineSchedule(self.length.total_steps, warmup)
        self.chunks = self._build_model(load=resume_from is None)
        self.wrapped = megatron_optimizer.wrap_data_parallel(
            self.chunks, distributed_optimizer=settings.distributed, overlap=self.device.type == "cuda"
        )
        self.optimizer = megatron_optimizer.build_optimizer(
            self.wrapped,
            lr=settings.lr,
            min_lr=settings.min_lr,
            part_lrs=config.part_lrs(),
            part_of=functools.partial(rate_of, model=config.model, rates=settings.lrs),
            weight_decay=settings.weight_decay,
            betas=settings.betas,
            eps=settings.eps,
            clip_grad=settings.clip_grad,
        )
        self.step = 0
        self.log = StepLog(config.model.moe.num_experts, self.device, self.languages)
        saved_guard = None
        if resume_from is not None:
            saved_guard = self._resume(resume_from)
        self.guard = StepGuard(config.faults, self.output, start_step=self.step)
        if saved_guard is not None:
            self.guard.load_state_dict(saved_guard)
        self.runner = self._make_runner()
        self.samples = SampleAnswers(config, self.processor, self.chunks, self.validation_loader)
        self.stop = StopSignals()

    def _languages(self) -> tuple[str, ...]:
        """Languages that metrics count apart: of all records, the same on all ranks."""
        loaders = [loader for loader in (self.loader, self.validation_loader) if loader is not None]
        return counted_languages(gather_values(language for loader in loaders for language in loader.languages))

    def _resume_from(self) -> Path | None:
        self.checkpoints.clean()
        latest = self.checkpoints.latest()
        if latest is not None and not self.config.checkpoint.resume:
            raise ConfigError(
                f"checkpoint.resume is false, but {latest} exists: choose another output or remove the old checkpoints"
            )
        return latest

    def _build_model(self, *, load: bool) -> list[MultimodalModel]:
        """The model of this rank, frozen where it should be; `load` fills it with the weights to start from."""
        config = self.config
        dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
        chunks = build_chunks(
            config.model,
            config.parallel,
            dtype=dtype,
            device=self.device,
            recompute=config.recompute,
            bypass=config.bypass,
        )
        if load:
            load_initial_weights(chunks, config, self.source)
        for model in chunks:
            tower = model.vision_tower
            set_trainable(model, config.learning())
            model.train()
            if tower is not None and not config.learning()["vision"]:
                tower.eval()
        return chunks

    def _run_length(self, resume_from: Path | None) -> RunLength:
        """In steps of the batch size that the run began with."""
        config, begun_with = self.config, self.config.global_batch_size
        if resume_from is not None:
            begun_with = first_batch_size(resume_from, read_progress(resume_from))
        return RunLength.of(self.loader.samples_per_epoch, begun_with, epochs=config.epochs, max_steps=config.max_steps)

    def _list_skipped(self) -> None:
        file = SkippedRecords(self.output, megatron_optimizer.data_parallel_rank())
        for loader in (self.loader, self.validation_loader):
            if loader is not None:
                loader.list_skipped(file)

    def _make_runner(self) -> StepRunner:
        config = self.config
        return StepRunner(
            chunks=self.wrapped,
            device=self.device,
            num_experts=config.model.moe.num_experts,
            num_visual_rows=config.model.vision.num_visual_rows,
            languages=self.languages,
            reduction=config.loss_reduction,
            optimizer=self.optimizer,
            flops=FlopCounter(
                config.model,
                config.learning(),
                bypass=config.bypass,
                cached_features=config.cache_image_features,
            ),
            guard=self.guard,
        )

    def _resume(self, folder: Path) -> dict[str, Any]:
        """Goes on from a checkpoint; the state that it has of `StepGuard`."""
        check_same_model(self.config, folder)
        check_same_text(self.processor, folder, read_progress(folder))
        common = load_training_state(folder, self.chunks, self.optimizer)
        refuse_non_finite(self.chunks, folder, allow=self.config.checkpoint.allow_non_finite)
        self.step = common["step"]
        self.loader.load_state_dict(common["loader"])
        if (log := common.get("log")) is not None:  # earlier versions saved none
            self.log.load_state_dict(log)
        logger.info("going on after step %d from %s", self.step, folder)
        for change in self.length.changes(common["total_steps"], self.config.global_batch_size):
            _warn("%s; %d steps are left", change, self._steps_left())
        return common["guard"]

    def run(self) -> dict[str, Any]:
        """Trains to the last step, validates and saves on the way, exports at the end.

        On SIGTERM or Ctrl-C the run saves a checkpoint after the current step and returns; `stop.received` says why.

        Returns:
            The summary; `finished` is False where the run was stopped, `steps` are those of this call.

        Raises:
            TrainingError: a loss or gradient is no number or spikes, and the configuration says stop.
            CheckpointWriteError: the last checkpoint could not be written.
        """
        try:
            return self._run()
        finally:
            self._unlock_output()

    def _run(self) -> dict[str, Any]:
        with self.watchdog.section("setup", "writing the settings"):
            on_first_rank(lambda: save_config(self.config, self.output / "config.yaml"))
            if megatron_optimizer.sees_samples_first():
                self._list_skipped()
        if self._steps_left():
            summary = self._run_steps()
        else:
            logger.info("all %d steps are done; nothing is left to train", self.step)
            summary = {"finished": True, "steps": 0}
        wants_export = summary["finished"] and self.config.checkpoint.export
        if wants_export and on_first_rank(lambda: exported_step(self.export_folder)) != self.step:
            self._export()
        return summary

    def _run_steps(self) -> dict[str, Any]:
        if self.config.cache_image_features:
            with self.watchdog.section("features", "computing image features"):
                loaders = [loader for loader in (self.loader, self.validation_loader) if loader is not None]
                beat = self.watchdog.beat
                cache_features(self.config, self.chunks[0], self.processor, loaders, self.device, on_progress=beat)
        total = self.step + self._steps_left()
        writer = MetricsWriter(self.config, total_steps=total, start_step=self.step)
        with writer, self.stop, self.watchdog.section("steps", f"training after step {self.step}"):
            try:
                summary = self._train(writer, total)
            except TrainingError:  # raised on every rank: the checkpoint that is being written can be completed
                self._advance_checkpoint(wait=True)
                raise
            # Without `steps`: how many of them this process did depends on where the run was interrupted.
            writer.write("summary", self.step, {name: v for name, v in summary.items() if name != "steps"})
        self.processor.image_processor.notes.log_counts()
        return summary

    def _train(self, writer: MetricsWriter, total: int) -> dict[str, Any]:
        config, started, first = self.config, time.perf_counter(), self.step
        self.log.restart_clock()
        batches = self._batches()
        while self.step < total:
            position = self._position()
            self.schedule.apply(position, self.optimizer.param_groups)
            result = self.runner.train(next(batches), self.step + 1, stop=self.stop.received is not None)
            self.step += 1
            self.watchdog.beat(f"training after step {self.step}")
            self.log.add(result)
            stopping = result.metrics.scalar("stop") > 0
            done = self.step == total
            if self.step % config.logging.interval == 0 or done:
                values = self._learning_rates(position) | {"epoch": self.loader.epoch}
                writer.write("train", self.step, self.log.take(result.grad_norm, **values))
            writer.advance(**shown(self.log.last, result.metrics.loss))
            if self.validation_loader is not None and (self.step % config.validation.interval == 0 or done):
                writer.write("validation", self.step, self.validate())
                writer.write_samples(self.step, self.samples.answer())
            if self.step % config.checkpoint.interval == 0 or done or stopping:
                self._save(wait=done or stopping or not config.checkpoint.asynchronous)
            self._advance_checkpoint()
            if stopping and not done:
                cause = "Ctrl-C" if self.stop.received is signal.SIGINT else "SIGTERM"
                _warn("stopped by %s after step %d; start the same command again to go on", cause, self.step)
                break
        if self.checkpoints.failure is not None:
            raise self.checkpoints.failure
        seconds = time.perf_counter() - started
        summary = {
            "finished": self.step == total,
            "steps": self.step - first,
            "seconds": seconds,
            "tokens_per_second": self.log.rows / seconds,
            **self.log.measured(),
        }
        writer.say(summary_line(summary, self.step, total))
        return summary

    def _position(self) -> float:
        """Place in the schedule before the next step."""
        return self.length.position(*self.loader.place)

    def _steps_left(self) -> int:
        return self.length.steps_left(*self.loader.place, self.config.global_batch_size)

    def _batches(self) -> Iterator[list[PackedBatch]]:
        """Steps of this rank, epoch after epoch."""
        while True:
            yield from self.loader

    def _learning_rates(self, position: float) -> dict[str, float]:
        """Learning rates applied in the last step; for groups that only other ranks have, the rates applied there."""
        settings = self.config.optimizer
        peaks = {"lr": settings.lr} | {f"lr/{name}": lr for name, lr in self.config.part_lrs().items()}
        rates = {name: megatron_optimizer.applied_lr(self.optimizer, peak) for name, peak in peaks.items()}
        computed = {name: self.schedule.lr(position, peak, settings.min_lr) for name, peak in peaks.items()}
        return {name: computed[name] if rate is None else rate for name, rate in rates.items()}

    def validate(self) -> dict[str, Any]:
        """Loss on the validation records, in all and per language; always over the same samples."""
        loader = self.validation_loader
        assert loader is not None, "called with validation paths only"
        start = loader.state_dict()
        total = StepMetrics(self.config.model.moe.num_experts, self.device, languages=self.languages)
        for batches in itertools.islice(loader, self.config.validation.batches):
            total.merge(self.runner.validate(batches))
            self.watchdog.beat("validating")
        loader.load_state_dict(start)
        if total.loss is None:
            cause = "their answers are empty, or model.max_seq_len cuts them off"
            _warn("validation after step %d: no label in %d samples; %s", self.step, total.scalar("samples"), cause)
        return total.record()

    def _save(self, *, wait: bool) -> None:
        # Ranks differ in the samples they left out and in their clocks: what rank 0 says is saved.
        own = [self.loader.state_dict(), self.log.state_dict()]
        dist.broadcast_object_list(own, src=0)
        loader, log = own
        common = {
            "loader": loader,
            "total_steps": self.length.total_steps,
            "batch_size": self.length.batch_size,
            "template": self.processor.template.version,
            "guard": self.guard.state_dict(),
            "log": log,
        }
        with self.watchdog.section("checkpoint", "saving a checkpoint"):
            self.checkpoints.save(self.step, self.chunks, self.optimizer, common, self.processor, wait=wait)

    def _advance_checkpoint(self, *, wait: bool = False) -> None:
        if self.checkpoints.is_writing:
            with self.watchdog.section("checkpoint", "completing a checkpoint"):
                self.checkpoints.advance(wait=wait)
                self.watchdog.judge(self.checkpoints.silent_seconds, "a checkpoint is written in the background")

    def _export(self) -> None:
        with self.watchdog.section("export", "exporting the model"):
            save = functools.partial(save_with_step, self.processor, self.step)
            beat = self.watchdog.beat
            export_released(self.chunks, self.export_folder, save_processor=save, overwrite=True, on_progress=beat)
            dist.barrier()


def _warn(text: str, *values: object) -> None:
    """A warning that is the same on all ranks."""
    if dist.get_rank() == 0:
        logger.warning(text, *values)
