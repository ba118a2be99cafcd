"""`python -m dit_accel.finetune` is `dit-accel finetune`, also under `accelerate launch -m`."""

import runpy
import sys

if __name__ == "__main__":
    sys.argv.insert(1, "finetune")
    runpy.run_module("dit_accel", run_name="__main__")
