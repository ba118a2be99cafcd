"""What acceleration can give a model on this machine, before it is run."""

from dit_accel.doctor.diagnosis import Diagnosis
from dit_accel.doctor.run import examine
from dit_accel.doctor.sample import from_pipeline

__all__ = ["Diagnosis", "examine", "from_pipeline"]
