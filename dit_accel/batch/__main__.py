"""`python -m dit_accel.batch`, also under `accelerate launch -m`."""

import sys

from dit_accel.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "batch")
    main()
