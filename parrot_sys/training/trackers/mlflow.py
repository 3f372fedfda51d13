"""MLflow: to the server that MLFLOW_TRACKING_URI names, else to OUTPUT/mlflow.db with files in OUTPUT/mlartifacts."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from parrot_sys.training.trackers.base import CaptionedImage, Number, RunFacts, flattened
from parrot_sys.training.trackers.identity import run_identity

_LONGEST_PARAM = 500
_PARAMS_AT_ONCE = 100


class MlflowTracker:
    """A run of MLflow; one that goes on after an interruption is the same run there."""

    def __init__(self, run: RunFacts) -> None:
        import mlflow  # optional, so only where it is asked for

        local = not mlflow.is_tracking_uri_set()
        uri = f"sqlite:///{run.output.resolve() / 'mlflow.db'}" if local else None
        self._client = mlflow.MlflowClient(tracking_uri=uri)
        files = (run.output.resolve() / "mlartifacts").as_uri() if local else None
        self._id = run_identity(run.output, "mlflow", lambda: self._create(run, files))
        self._client.update_run(self._id, status="RUNNING")
        self._write_params(run.config)
        self._client.log_text(self._id, yaml.safe_dump(dict(run.config), sort_keys=False), "config.yaml")
        self._client.log_text(self._id, json.dumps(run.environment, indent=2), "environment.json")

    def write_numbers(self, step: int, numbers: Sequence[Number]) -> None:
        """Metrics of a step."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._client.log_batch(self._id, metrics=[Metric(each.name, each.value, now, step) for each in numbers])

    def write_images(self, step: int, name: str, images: Sequence[CaptionedImage]) -> None:
        """Images over steps, and their captions as a text file."""
        for index, each in enumerate(images):
            self._client.log_image(self._id, each.image, key=f"{name}/{index}", step=step)
        captions = "\n\n".join(each.caption for each in images)
        self._client.log_text(self._id, captions, f"{name}/step-{step:08d}.txt")

    def close(self, *, failed: bool = False) -> None:
        """Ends the run there."""
        self._client.set_terminated(self._id, "FAILED" if failed else "FINISHED")

    def _create(self, run: RunFacts, files: str | None) -> str:
        found = self._client.get_experiment_by_name(run.project)
        experiment = found.experiment_id if found else self._client.create_experiment(run.project, files)
        identity: str = self._client.create_run(experiment, run_name=run.name).info.run_id
        return identity

    def _write_params(self, config: Mapping[str, Any]) -> None:
        """Settings as parameters. MLflow keeps the first value of each; config.yaml has those of the last start."""
        from mlflow.entities import Param

        known = self._client.get_run(self._id).data.params
        texts = {name: str(value)[:_LONGEST_PARAM] for name, value in flattened(config).items() if name not in known}
        params = [Param(name, text) for name, text in texts.items()]
        for start in range(0, len(params), _PARAMS_AT_ONCE):
            self._client.log_batch(self._id, params=params[start : start + _PARAMS_AT_ONCE])
