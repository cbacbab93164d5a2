"""How far back windows reach under `k2="auto"`: a rule that is fed by audits.

NOTE [Why means, and not one window's error]
What is rare and the same every time is small in any one window, and may be all that there is to
learn. An audit reaches back `max_k2` steps and says for each smaller size what a window of it
would miss: a vector, in a few sums. Its running mean is what the size cuts off for good. Of T with
mean m, J audits have a mean M with E|M|^2 = |m|^2 + (E|T|^2 - |m|^2) / J, so that without any m
|M|^2 is E|T|^2 / J. A size is too small where |M|^2 is clearly above that, and |M|^2 - E|T|^2 / J
is above the tolerance of the same estimate for the whole gradient. Noise widens nothing, however
large; what does not average out does, however small it is in any one window. Who wants single
windows to be right as well asks for that: then a size is also too small where more than one audit
in twenty misses more than that of a running norm.

NOTE [Why in units of steps, and why all audits have one length]
Adam makes steps of one size of elements that are a thousand times apart. What comes from far back
may be all that some weights ever get, and vanish beside what others get: an audit is therefore
taken in the units of the optimizer, where it has any. And a gradient whose loss has jumped is a
hundred times as long as those before and after it: a mean over such lengths is that of a few audits
with all their noise. So each audit is divided by the norm of its whole gradient.

NOTE [What is not audited is not trusted]
A size is taken only where it and all larger ones are found to be enough, and the first audits come
before any of it. Where smaller ones are not, the next above it is taken: what is needed grows while
a network begins to learn, and between two audits nobody sees it. A wider reach is taken at once, a
smaller one a size at a time. Audits come more often as soon as one finds that the reach was too
short.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tbptt_ckpt.errors import SnapshotError
from tbptt_ckpt.executor.gradient_sketch import BUCKETS

_GROWTH = 1.25  # of sizes
_WIDER = 1  # sizes above the smallest that is enough
_FIRST = 16  # audits, one after the other, before any size is trusted
_MEMORY = 0.98  # of the running means
_CLEARLY = 1.5  # |M|^2 over what it would be without a mean
_LEAST_SHARE = 0.1  # of |M|^2 that is taken for the mean gradient's, however noisy
_FEWEST, _MOST = 2, 8  # windows between two audits
# Audits after which there may be more windows between two, and how many: what they take is then
# small; delayed recall with 24 steps is still learned from three seeds that begin blind to cues.
_EARLY, _RARE = 32, 32
_FEW = 0.05  # of the audits may miss more than a window is allowed to
_ARRAYS = ("means", "squares", "errors", "over")  # of the state


def reach_sizes(k1: int, max_k2: int) -> tuple[int, ...]:
    """The reaches that are chosen from: `k1` times powers of 1.25, in whole `k1`, and `max_k2`."""
    found, power = [], 0
    while (size := round(_GROWTH**power) * k1) < max_k2:
        found.append(size)
        power += 1
    return (*dict.fromkeys(found), max_k2)


def audited_steps(point: int, sizes: Sequence[int]) -> tuple[int, ...]:
    """Where windows of each size but the largest that end at an update point begin, in order."""
    return tuple(point - size for size in reversed(sizes[:-1]))


def later_of_audit(cuts: Sequence[int], start: int, k1: int) -> tuple[int, ...]:
    """Where leaves of an audit begin, and where the next window may, whatever size it has."""
    return tuple(sorted({start + k1, *cuts, *(cut + k1 for cut in cuts)}))


@dataclass(frozen=True, slots=True)
class ChosenK2:
    """How far back a window reached under `k2="auto"`, and what is known of that.

    Attributes:
        k2: Steps that it was to reach back; fewer where a sequence begins.
        is_audit: Whether it reached back `max_k2` to see what smaller sizes miss.
        missing: Norm of the mean of what the chosen size cuts off, relative to that of the mean
            gradient, less what is noise: estimated from all audits, with the newest counting
            most. None before enough of them; 0.0 of `max_k2`, beyond which nothing is known.
        audited_error: What that size missed of the gradient of the last window that was audited,
            relative to it; None before the first.
    """

    k2: int
    is_audit: bool
    missing: float | None
    audited_error: float | None


class ReachRule:
    """Chooses a size from audits.

    Args:
        sizes: Those to choose from, in order.
        tolerance: What the mean of what is cut off may be, relative to the mean gradient.
        window_tolerance: What 19 of 20 windows may miss, relative to the root of the mean squared
            norm of the gradients; None for anything.

    Attributes:
        k2: The size for the next window that is no audit.
    """

    def __init__(
        self, sizes: Sequence[int], tolerance: float, window_tolerance: float | None = None
    ) -> None:
        self.sizes, self._tolerance = tuple(sizes), tolerance
        self._window_tolerance = window_tolerance
        self.k2 = self.sizes[-1]
        # Of what each size misses of a gradient of norm 1, and in the last row of all of it.
        self._means = np.zeros((len(self.sizes), BUCKETS))
        self._squares = np.zeros(len(self.sizes))
        self._power = 0.0  # mean squared norm of the gradients as they are
        self._errors = np.zeros(len(self.sizes))  # of the last audit
        self._over = np.zeros(len(self.sizes))  # share of audits that missed too much
        self._audits, self._since, self._gap = 0, 0, _MOST

    @property
    def is_due(self) -> bool:
        """Whether the next window is to be audited."""
        return self._audits < _FIRST or self._since >= self._gap

    def ran(self) -> None:
        """A window was not audited."""
        self._since += 1

    def audited(self, sums: Any, in_steps: Any) -> None:
        """A window was.

        Args:
            sums: [sizes, BUCKETS], of the gradient of each size, the whole one last.
            in_steps: The same in units of the optimizer's steps.
        """
        self._audits, self._since = self._audits + 1, 0
        keep = min(_MEMORY, 1 - 1 / self._audits)
        missed, size = _missed(in_steps)
        missed = missed / size if size else missed
        self._means = keep * self._means + (1 - keep) * missed
        self._squares = keep * self._squares + (1 - keep) * (missed**2).sum(1)
        missed, size = _missed(sums)
        norms = np.sqrt((missed**2).sum(1))
        self._power = keep * self._power + (1 - keep) * size**2
        if self._window_tolerance is not None:
            is_over = norms > self._window_tolerance * math.sqrt(self._power)
            self._over = keep * self._over + (1 - keep) * is_over
        self._errors = norms / size if size else np.zeros_like(norms)
        if self._audits >= _FIRST:
            self._choose()

    def chosen(self, k2: int, *, is_audit: bool) -> ChosenK2:
        """What is known of the present choice, for a window that reached back `k2`."""
        place = self.sizes.index(self.k2)
        is_most = place == len(self.sizes) - 1
        missing: float | None = None
        if self._audits >= _FIRST:
            missing = 0.0 if is_most else math.sqrt(self._shares()[place])
        error = None if not self._audits else 0.0 if is_most else float(self._errors[place])
        return ChosenK2(k2, is_audit, missing, error)

    def _choose(self) -> None:
        enough = self._enough()
        wanted = min(enough + _WIDER, len(self.sizes) - 1) if enough else 0
        now = self.sizes.index(self.k2)
        if wanted > now:
            self.k2, self._gap = self.sizes[wanted], max(_FEWEST, self._gap // 2)
        elif self._audits == _FIRST:
            self.k2 = self.sizes[wanted]
        elif wanted < now:
            self.k2 = self.sizes[now - 1]
        else:
            self._gap = min(_MOST if self._audits < _EARLY else _RARE, self._gap + 1)

    def _enough(self) -> int:
        """The place of the smallest size that misses nothing, as all larger ones do."""
        sizes_of_means = (self._means**2).sum(1)
        is_clear = sizes_of_means > _CLEARLY * self._noise()
        too_small = (is_clear & (self._shares() > self._tolerance**2)) | (self._over > _FEW)
        too_small[-1] = False
        return int(np.flatnonzero(too_small)[-1]) + 1 if too_small.any() else 0

    def _shares(self) -> Any:
        """Squared, the mean of what each size misses over the mean gradient."""
        sizes_of_means = (self._means**2).sum(1)
        without_noise = np.maximum(0.0, sizes_of_means - self._noise())
        whole = max(without_noise[-1], _LEAST_SHARE * sizes_of_means[-1])
        return without_noise / whole if whole else np.zeros_like(without_noise)

    def _noise(self) -> Any:
        """What the squared means would be of nothing but noise."""
        return self._squares / min(self._audits, (1 + _MEMORY) / (1 - _MEMORY))

    def state_dict(self) -> dict[str, Any]:
        """What the next choices follow from; tensors are its own."""
        return {
            **{name: torch.from_numpy(getattr(self, f"_{name}").copy()) for name in _ARRAYS},
            **{"k2": self.k2, "audits": self._audits, "since": self._since, "gap": self._gap},
            "power": self._power,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there.

        Raises:
            SnapshotError: It is of no rule with these sizes.
        """
        shapes = [tuple(state[name].shape) for name in _ARRAYS]
        count = len(self.sizes)
        if state["k2"] not in self.sizes or shapes != [(count, BUCKETS), *[(count,)] * 3]:
            raise SnapshotError(
                f"it chose k2={state['k2']}, from means of shape {shapes[0]}; this run chooses "
                f"from {list(self.sizes)}"
            )
        self.k2, self._audits = state["k2"], state["audits"]
        self._since, self._gap, self._power = state["since"], state["gap"], state["power"]
        self._means, self._squares, self._errors, self._over = (
            np.array(state[name].tolist()) for name in _ARRAYS
        )


def _missed(sums: Any) -> tuple[Any, float]:
    """What each size misses, and in the last row the whole gradient; and the norm of that."""
    whole = sums[-1]
    return np.vstack([whole - sums[:-1], whole]), math.sqrt((whole**2).sum())
