"""Another script of this folder, where Wan keeps diffusers' norm and rotary embedding.

    python benchmarks/without_norm_rope.py benchmarks/loop_times.py --rows topk@0.1 --out times.json

All but `without_norm_rope.py` is that script's own command.
"""

import runpy
import sys
from pathlib import Path

from dit_accel.pipelines import wan

if __name__ == "__main__":
    for adapter in (wan.ADAPTER, wan.SKYREELS, wan.VACE, wan.ANIMATE):
        object.__setattr__(adapter, "norm_rope", False)  # frozen: the registry has these objects
    del sys.argv[0]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    runpy.run_path(sys.argv[0], run_name="__main__")
