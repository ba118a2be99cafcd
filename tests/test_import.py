import subprocess
import sys


def test_import_is_light():
    """Importing the package loads neither triton nor diffusers and costs < 0.3 s beyond torch."""
    code = (
        "import torch, time, sys; t = time.perf_counter(); import dit_accel; "
        "cost = time.perf_counter() - t; "
        "heavy = {'triton', 'diffusers', 'transformers', 'starlette'} & set(sys.modules); "
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


def test_an_editor_sees_every_name():
    """The imports under TYPE_CHECKING are those that `__getattr__` makes."""
    import ast
    from pathlib import Path

    import dit_accel

    tree = ast.parse(Path(dit_accel.__file__).read_text("utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    known = {name.name: line.module for line in block.body for name in line.names}
    assert known == {name: f"dit_accel.{home}" for name, home in dit_accel._HOME.items()}
    assert {*known, "methods", "__version__"} == set(dit_accel.__all__)
    assert Path(dit_accel.__file__).with_name("py.typed").is_file()
