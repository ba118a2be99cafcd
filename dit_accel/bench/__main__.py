"""`python -m dit_accel.bench`."""

import sys

from dit_accel.bench.command import main

if __name__ == "__main__":
    sys.exit(main())
