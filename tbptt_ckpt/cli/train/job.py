"""The training job: options in, a measured outcome out."""

from __future__ import annotations

import math
from pathlib import Path

from tbptt_ckpt import NonFiniteError
from tbptt_ckpt.cli.files import check_target, file_digest, save_weights, weights_digest
from tbptt_ckpt.cli.models import make_task
from tbptt_ckpt.cli.ranks import own_place, share_of
from tbptt_ckpt.cli.task import Task
from tbptt_ckpt.cli.train.config import TrainingConfig
from tbptt_ckpt.cli.train.loop import TrainingLoop
from tbptt_ckpt.cli.train.outcome import MemoryUse, Scores, TrainingOutcome
from tbptt_ckpt.memory.resident import RssSampler, rss_bytes
from tbptt_ckpt.module.recurrence import parameters_of
from tbptt_ckpt.profiling.peaks import metered, retained_peak
from tbptt_ckpt.profiling.sweep import Watch, unwatched
from tbptt_ckpt.schedule import Window
from tbptt_ckpt.trainer.passes import limited
from tbptt_ckpt.trainer.rank_states import by_first

# Held-out data is scored in pieces of k1 steps, but of no more than this many, so that scoring
# does not take more memory than training.
_MOST_EVALUATION_STEPS = 32


def run_training_job(config: TrainingConfig, watch: Watch = unwatched) -> TrainingOutcome:
    """Train a model, score it on what is held out of its data, measure its memory.

    The same options on the same machine give the same weights. Torch's global seed is set.
    Weights are saved as soon as they are trained, before memory is compared; never those of
    a loss that became infinite or NaN.
    """
    config.check()
    task = share_of(make_task(config, lr=config.lr, seed=config.seed), own_place())
    return _Job(config, task, watch).run()


class _Job:
    """One run and what its stages share."""

    def __init__(self, config: TrainingConfig, task: Task, watch: Watch) -> None:
        self.config, self.task, self.watch = config, task, watch
        self.evaluation_steps = min(config.k1, _MOST_EVALUATION_STEPS)
        self.loop = TrainingLoop(config, task)

    def run(self) -> TrainingOutcome:
        """Score, train, score, save, compare memory."""
        config, scorecard = self.config, self.loop.scorecard
        rss_before_bytes = rss_bytes().total
        with RssSampler() as rss:
            resumed_step = self.loop.resume() if config.resume else None
            by_first(self.loop.ranks, self._check_save)
            if resumed_step is None:
                scorecard.score(self._score("scoring the untrained model"))
            work = self.loop.run(self.watch)
            after = self._score("scoring the trained model")
        by_first(self.loop.ranks, self._save)
        parameters = parameters_of(self.task.module)
        return TrainingOutcome(
            config=config,
            data=self.task.data,
            num_train_steps=len(self.task.workload.source),
            device=str(self.task.workload.device),
            num_parameters=sum(p.numel() for p in parameters if p.requires_grad),
            scores=self._scores(after),
            resumed_step=resumed_step,
            work=work,
            gradient_error=self.loop.gradient_error(),
            memory=self._memory_use(rss_before_bytes, rss.peak_bytes),
        )

    def _scores(self, after: float) -> Scores:
        baseline = self.task.baseline
        return Scores(
            unit=self.task.unit,
            before=self.loop.scorecard.untrained,
            after=after,
            baseline=None if baseline is None else baseline.score(),
            baseline_name="" if baseline is None else baseline.name,
        )

    def _check_save(self) -> None:
        """A file at --save is replaced by the run that wrote it, begun anew or gone on with.

        It holds the weights that are loaded now, or is one that was noted when it did.
        """
        path, scorecard = self.config.save, self.loop.scorecard
        if self.config.resume and path is not None and path.exists():
            if file_digest(path) == (digest := weights_digest(self.task.module)):
                scorecard.own(digest)
            check_target("--save", path, force=self._may_replace(path))

    def _save(self) -> None:
        if (path := self.config.save) is not None:
            save_weights("--save", path, self.task.module, force=self._may_replace(path))

    def _may_replace(self, path: Path) -> bool:
        return self.config.force or file_digest(path) == self.loop.scorecard.weights_file

    def _score(self, stage: str) -> float:
        """On what is held out; NaN where nothing is."""
        if self.task.held_out is None:
            return math.nan
        self.watch(self.loop.progress(stage))
        found = self.task.evaluate(self.task.held_out, self.evaluation_steps)
        ranks = self.loop.ranks
        loss = found.loss if ranks is None else ranks.mean(found.loss, found.positions)
        assert loss is not None, "every step has a target"
        score = loss / self.task.unit_size
        if not math.isfinite(score):
            raise NonFiniteError(f"the held-out loss is {score}; a lower --lr may help")
        return score

    def _memory_use(self, rss_before_bytes: int, rss_peak_bytes: int) -> MemoryUse:
        """What training and scoring took, and what the same window takes retained."""
        self.watch(self.loop.progress("measuring the same window retained"))
        scorecard, window = self.loop.scorecard, Window(*self.loop.scorecard.metered)
        work = self.task.workload
        scoring_bytes, held_out = 0, self.task.held_out
        if held_out is not None:
            piece, steps = limited(held_out, 2 * self.evaluation_steps), self.evaluation_steps
            _, scoring_bytes = metered(work, lambda: self.task.evaluate(piece, steps))
        peak_bytes, ranks = max(scorecard.peak_bytes, scoring_bytes), self.loop.ranks
        peaks = None if ranks is None else ranks.told(peak_bytes)
        retained, is_measured = None, False
        if not scorecard.ran_out:  # what did not fit does not fit now
            retained, is_measured = retained_peak(work, window)
        return MemoryUse(
            window_steps=window.stop - window.first,
            peak_bytes=peak_bytes,
            peak_bytes_of_ranks=peaks,
            retained_peak_bytes=retained,
            retained_is_measured=is_measured,
            rss_before_bytes=rss_before_bytes,
            rss_peak_bytes=rss_peak_bytes,
        )
