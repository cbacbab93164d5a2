"""What a module costs, measured on a few short segments of the user's own data."""

from tbptt_ckpt.calibration.calibrate import Limits, calibrate
from tbptt_ckpt.calibration.segments import SegmentProbe
from tbptt_ckpt.calibration.update_bytes import UpdateBytes, update_bytes

__all__ = ["Limits", "SegmentProbe", "UpdateBytes", "calibrate", "update_bytes"]
