"""Events of a `Trainer` in Weights & Biases and MLflow, under the names that TensorBoard has."""

from __future__ import annotations

import time
from typing import Any

from tbptt_ckpt.arguments import checked
from tbptt_ckpt.errors import ArgumentError, shown
from tbptt_ckpt.integrations.hosts import imported
from tbptt_ckpt.trainer.events import Notice
from tbptt_ckpt.trainer.scalars import ScalarSink

__all__ = ["MLflow", "WandB"]


class WandB(ScalarSink):
    """Logs to a run of Weights & Biases, over steps; a notice is the run's summary of its kind.

    Of a run that goes on from an earlier step it drops, with a warning, what it is told again.

    Args:
        run: What `wandb.init` returned.

    Raises:
        ArgumentError: It is no run.
    """

    @checked
    def __init__(self, run: Any) -> None:
        if isinstance(run, type) or not callable(getattr(run, "log", None)):
            raise ArgumentError(f"run={shown(run)} must be what wandb.init() returns")
        self._run = run

    def _write(self, scalars: dict[str, float], steps: int) -> None:
        self._run.log(scalars, step=steps)

    def _say(self, notice: Notice) -> None:
        self._run.summary[notice.kind] = notice.message


class MLflow(ScalarSink):
    """Logs to a run of MLflow, over steps; a notice is the run's tag of its kind.

    It waits for the answer of MLflow's server, once a window and once an update. Of a run that goes
    on from an earlier step it has what it is told again twice.

    Args:
        run_id: Of the run; by default the one that is active, which there must be.

    Raises:
        ArgumentError: The package is missing, or no run is active.
    """

    @checked
    def __init__(self, run_id: str | None = None) -> None:
        mlflow = imported("mlflow", "mlflow")
        if run_id is None and (active := mlflow.active_run()) is None:
            raise ArgumentError(
                "run_id=None is the active run, and there is none: mlflow.start_run()"
            )
        self._client = mlflow.MlflowClient()
        self._run_id = active.info.run_id if run_id is None else run_id
        self._metric = mlflow.entities.Metric

    def _write(self, scalars: dict[str, float], steps: int) -> None:
        now = round(1000 * time.time())
        metrics = [self._metric(name, value, now, steps) for name, value in scalars.items()]
        self._client.log_batch(self._run_id, metrics=metrics)

    def _say(self, notice: Notice) -> None:
        self._client.set_tag(self._run_id, notice.kind, notice.message)
