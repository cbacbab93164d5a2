"""The training job: options in, a measured outcome out."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import torch

from tbptt_ckpt import NonFiniteError
from tbptt_ckpt.cli.bytes.corpus import ByteLanes, Corpus, load_corpus
from tbptt_ckpt.cli.bytes.models import build_model, check_model, initial_state
from tbptt_ckpt.cli.bytes.score import bigram_bits, bits_per_byte, byte_work
from tbptt_ckpt.cli.configs import TrainingConfig
from tbptt_ckpt.cli.devices import DTYPES, autocast_dtype, find_device, repeatable
from tbptt_ckpt.cli.files import check_target, file_digest, save_weights, weights_digest
from tbptt_ckpt.cli.train.loop import TrainingLoop
from tbptt_ckpt.cli.train.outcome import MemoryUse, Scores, TrainingOutcome
from tbptt_ckpt.memory.resident import RssSampler, rss_bytes
from tbptt_ckpt.module.ambient import untouched
from tbptt_ckpt.profiling.peaks import metered, retained_peak
from tbptt_ckpt.profiling.sweep import Watch, unwatched

# Held-out text is scored in pieces of k1 steps, but of no more than this many, so that scoring
# does not take more memory than training; and no more than this many bytes of it are scored.
_MOST_EVALUATION_STEPS = 32
_MOST_SCORED_BYTES = 1 << 20


def run_training_job(config: TrainingConfig, watch: Watch = unwatched) -> TrainingOutcome:
    """Train a byte-level language model, score it on held-out bytes, measure its memory.

    The same options on the same machine give the same weights. Torch's global seed is set.
    Weights are saved as soon as they are trained, before memory is compared; never those of
    a loss that became infinite or NaN.
    """
    config.check()
    device = find_device(config.device)
    corpus = load_corpus(config.data, config.lanes)
    with repeatable(device):
        return _Job(config, corpus, device, watch).run()


class _Job:
    """One run and what its stages share."""

    def __init__(
        self, config: TrainingConfig, corpus: Corpus, device: torch.device, watch: Watch
    ) -> None:
        self.config, self.corpus, self.device, self.watch = config, corpus, device, watch
        self.evaluation_steps = min(config.k1, _MOST_EVALUATION_STEPS)
        torch.manual_seed(config.seed)
        module = build_model(config.model, hidden=config.hidden, layers=config.layers)
        self.module = module.to(device, DTYPES[config.dtype])
        self.held_out = self._held_out_lanes(_MOST_SCORED_BYTES // config.lanes)
        train = ByteLanes(corpus.train, config.lanes, device=device)
        self.work = byte_work(self.module, train, lr=config.lr, dtype=config.dtype)
        self.loop = TrainingLoop(config, self.module, self.work)

    def run(self) -> TrainingOutcome:
        """Score, train, score, save, compare memory."""
        config, scorecard = self.config, self.loop.scorecard
        inputs, _ = self.held_out.read(0, min(2, len(self.held_out)))
        with untouched(self.module):
            check_model(config.model, self.module, inputs, config.lanes)
        rss_before_bytes = rss_bytes().total
        with RssSampler() as rss:
            resumed = config.resume and self.loop.resume()
            self._check_save()
            if not resumed:
                scorecard.score(self._score("scoring the untrained model"))
            work = self.loop.run(self.watch)
            after = self._score("scoring the trained model")
        if config.save is not None:
            save_weights("--save", config.save, self.module, force=self._may_replace(config.save))
        return TrainingOutcome(
            config=config,
            corpus=self.corpus.name,
            num_train_bytes=len(self.corpus.train),
            device=str(self.device),
            num_parameters=sum(p.numel() for p in self.module.parameters() if p.requires_grad),
            bits_per_byte=Scores(
                before=scorecard.untrained_bits,
                after=after,
                bigram=bigram_bits(self.corpus.train, self.held_out),
                num_bytes=len(self.held_out) * config.lanes,
            ),
            work=work,
            memory=self._memory_use(rss_before_bytes, rss.peak_bytes),
        )

    def _check_save(self) -> None:
        """A file at --save is replaced by the run that wrote it, begun anew or gone on with.

        It holds the weights that are loaded now, or is one that was noted when it did.
        """
        path, scorecard = self.config.save, self.loop.scorecard
        if self.config.resume and path is not None and path.exists():
            if file_digest(path) == (digest := weights_digest(self.module)):
                scorecard.own(digest)
            check_target("--save", path, force=self._may_replace(path))

    def _may_replace(self, path: Path) -> bool:
        return self.config.force or file_digest(path) == self.loop.scorecard.weights_file

    def _held_out_lanes(self, max_steps: int) -> ByteLanes:
        lanes = self.config.lanes
        return ByteLanes(
            self.corpus.held_out, lanes, device=self.device, max_steps=max(1, max_steps)
        )

    def _score(self, stage: str) -> float:
        self.watch(self.loop.progress(stage))
        bits = self._bits_per_byte(self.held_out)
        if not math.isfinite(bits):
            raise NonFiniteError(f"the held-out loss is {bits}; a lower --lr may help")
        return bits

    def _bits_per_byte(self, source: ByteLanes) -> float:
        return bits_per_byte(
            self.module,
            source,
            segment_steps=self.evaluation_steps,
            autocast_dtype=autocast_dtype(self.config.dtype),
        )

    def _memory_use(self, rss_before_bytes: int, rss_peak_bytes: int) -> MemoryUse:
        """What training and scoring took, and what the same window takes retained."""
        self.watch(self.loop.progress("measuring the same window retained"))
        scorecard, window = self.loop.scorecard, self.loop.scorecard.metered_window
        piece = self._held_out_lanes(2 * self.evaluation_steps)
        _, scoring_bytes = metered(self.work, lambda: self._bits_per_byte(piece))
        retained, is_measured = None, False
        if not scorecard.ran_out:  # what did not fit does not fit now
            state = initial_state(self.module, self.config.lanes)
            retained, is_measured = retained_peak(replace(self.work, init_state=state), window)
        return MemoryUse(
            window_steps=window.stop - window.first,
            peak_bytes=max(scorecard.peak_bytes, scoring_bytes),
            retained_peak_bytes=retained,
            retained_is_measured=is_measured,
            rss_before_bytes=rss_before_bytes,
            rss_peak_bytes=rss_peak_bytes,
        )
