"""The demo page: `python app.py`, then http://127.0.0.1:7860. See docs/start/app.md."""

import sys

from dit_accel.cli.main import main

if __name__ == "__main__":
    sys.argv.insert(1, "app")
    main()
