"""`python -m dit_accel.finetune`, also under `accelerate launch -m`."""

import sys

from dit_accel.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "finetune")
    main()
