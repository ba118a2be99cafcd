"""`python -m dit_accel.bench` is `dit-accel bench`."""

import runpy
import sys

if __name__ == "__main__":
    sys.argv.insert(1, "bench")
    runpy.run_module("dit_accel", run_name="__main__")
