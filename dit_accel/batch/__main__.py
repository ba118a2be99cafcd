"""`python -m dit_accel.batch` is `dit-accel batch`, also under `accelerate launch -m`."""

import runpy
import sys

if __name__ == "__main__":
    sys.argv.insert(1, "batch")
    runpy.run_module("dit_accel", run_name="__main__")
