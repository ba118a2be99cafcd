"""Fine-tune SLA: `dit-accel finetune`, or `finetune(Settings(...))`."""

from dit_accel.finetune.config import Settings
from dit_accel.finetune.run import Result, finetune

__all__ = ["Result", "Settings", "finetune"]
