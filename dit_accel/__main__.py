"""`python -m dit_accel`, also under `accelerate launch -m`."""

from dit_accel.cli.main import main

if __name__ == "__main__":
    main()
