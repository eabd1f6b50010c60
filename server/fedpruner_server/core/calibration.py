"""What a device's past says about its memory: measured against predicted, and what was too much.

The byte model predicts a peak above the floor, which the device has measured itself. Where a
device keeps needing more, its predictions are scaled up; where it needs clearly less, down. A
submodel that ran out of memory is never sent again, nor one that is predicted to need as much.

Computed from the journal alone, so a restarted coordinator knows the same. Small differences do not
count: plans would change with the noise of the measurement.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

_TOLERANCE = 0.03  # of the whole peak: what the byte model is off by on machines like ours
_RECENT = 5  # observations that count
_STEPS = 32  # ratios are rounded up to a multiple of one part in so many
_SMALLEST, _LARGEST = 0.5, 4.0
_SHRINK = 0.9


@dataclass(frozen=True)
class Observation:
    """How one task went on a device, bytes of its training process.

    Attributes:
        floor_bytes: the process before any model, when the task was planned.
        predicted_bytes: peak by the byte model as it is, floor included.
        measured_bytes: peak that came; None when memory ran out.
    """

    floor_bytes: int
    predicted_bytes: int
    measured_bytes: int | None


@dataclass(frozen=True)
class Calibration:
    """How a device's predictions are corrected.

    Attributes:
        ratio: measured / predicted, both above the floor.
        too_much_bytes: smallest prediction above the floor that ran out of memory, uncorrected;
            None if none did.
    """

    ratio: float = 1.0
    too_much_bytes: int | None = None

    def peak_bytes(self, predicted_bytes: int, floor_bytes: int) -> int:
        """The peak to expect where the byte model says `predicted_bytes`."""
        return floor_bytes + round(self.ratio * (predicted_bytes - floor_bytes))

    def usable_bytes(self, usable_bytes: int, floor_bytes: int, *, fixed_bytes: int = 0) -> int:
        """What the byte model may predict at most where `usable_bytes` may be used.

        Args:
            usable_bytes: of the device, floor included.
            floor_bytes: its training process before any model.
            fixed_bytes: what every submodel takes beyond that.
        """
        above_floor = int((usable_bytes - floor_bytes) / self.ratio)
        if self.too_much_bytes is not None:
            # Of what a smaller submodel makes smaller, a tenth less at least.
            fixed = min(fixed_bytes, self.too_much_bytes)
            less = fixed + int(_SHRINK * (self.too_much_bytes - fixed))
            above_floor = min(above_floor, less, self.too_much_bytes - 1)
        return floor_bytes + above_floor


UNCALIBRATED = Calibration()


def calibrate(observations: Sequence[Observation]) -> Calibration:
    """The correction that a device's tasks ask for, oldest first."""
    too_much = [o.predicted_bytes - o.floor_bytes for o in observations if o.measured_bytes is None]
    measured = [o for o in observations if o.measured_bytes is not None][-_RECENT:]
    return Calibration(_ratio(measured), min(too_much, default=None))


def _ratio(observations: Sequence[Observation]) -> float:
    """The largest recent ratio; 1 while the byte model is right within its tolerance."""
    worst = max(observations, key=_above_floor, default=None)
    if worst is None or worst.measured_bytes is None:
        return 1.0
    off = worst.measured_bytes - worst.predicted_bytes
    tolerated = _TOLERANCE * worst.predicted_bytes
    if abs(off) <= tolerated or (off < 0 and len(observations) < _RECENT):
        return 1.0  # more must be believed at once, less only after a while
    return min(_LARGEST, max(_SMALLEST, ceil(_above_floor(worst) * _STEPS) / _STEPS))


def _above_floor(observation: Observation) -> float:
    predicted = max(1, observation.predicted_bytes - observation.floor_bytes)
    return ((observation.measured_bytes or 0) - observation.floor_bytes) / predicted
