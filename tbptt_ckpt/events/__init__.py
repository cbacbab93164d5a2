"""What a training run tells while it goes on, and who can be told."""

from tbptt_ckpt.events.json_lines import JsonLines
from tbptt_ckpt.events.protocol import EventSink, Notice, UpdateEvent, WindowEvent
from tbptt_ckpt.events.tensorboard import TensorBoard

__all__ = ["EventSink", "JsonLines", "Notice", "TensorBoard", "UpdateEvent", "WindowEvent"]
