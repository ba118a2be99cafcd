import subprocess
import sys


def test_import_is_light():
    """Importing the package loads neither triton nor diffusers and costs < 0.3 s beyond torch."""
    code = (
        "import torch, time, sys; t = time.perf_counter(); import dit_accel; "
        "cost = time.perf_counter() - t; "
        "heavy = {'triton', 'diffusers', 'transformers', 'gradio'} & set(sys.modules); "
        "before = set(sys.modules); "
        "assert not heavy, heavy; assert cost < 0.3, cost"
    )
    # torch itself may import triton: count only what we add
    code = code.replace("import torch,", "import torch, sys; pre = set(sys.modules); import")
    code = code.replace("& set(sys.modules)", "& (set(sys.modules) - pre)")
    subprocess.run([sys.executable, "-c", code], check=True)


def test_root_folders_do_not_shadow_other_packages():
    code = (
        "import importlib.util as u; "
        "spec = u.find_spec('kernels'); assert spec is None or spec.origin is None or "
        "'site-packages' in spec.origin, spec; import dit_accel.kernels, dit_accel.pipelines"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
