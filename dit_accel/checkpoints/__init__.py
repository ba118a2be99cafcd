"""What others have trained: sparse and few-step checkpoints, into a stock pipeline."""

from dit_accel.checkpoints.content import Checkpoint
from dit_accel.checkpoints.convert import convert
from dit_accel.checkpoints.load import Loaded, load_checkpoint

__all__ = ["Checkpoint", "Loaded", "convert", "load_checkpoint"]
