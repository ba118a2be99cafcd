"""The end-to-end benchmark, tiny: every model, every kind of row, what a run is computed from."""

import csv
import io
import json
import subprocess
import sys

import pytest
import torch

import dit_accel
from dit_accel.bench import end_to_end, models, table
from dit_accel.bench.models import MODELS
from dit_accel.bench.rows import ROWS, TOGETHER, Course, Row, whole_run
from dit_accel.bench.whole_run import complete, kinds_of
from dit_accel.cli import main as cli
from dit_accel.doctor.sample import caught
from dit_accel.machine import describe
from dit_accel.pipelines import registry

CPU = torch.device("cpu")
# the rest differ in a number alone, or are contained in another
LEFT_OUT = ("@0.05", "@0.2", "@0.1+compile", "cudnn+compile")
KINDS = [name for name in ROWS if not name.endswith(LEFT_OUT)]
COLD = "sla@0.05+nowarmup+compile+prune"
OTHERS = ["stock", "none", "topk@0.1", "pooled@0.1+prune+cache"]


def tiny(**options):
    return end_to_end.Benchmark(
        CPU, 1, tiny=True, compiler="eager", echo=lambda line: None, **options
    )


def made(name):
    pipe = models.build(MODELS[name], CPU, torch.float32, tiny=True)
    return pipe, models.inputs(MODELS[name], pipe, CPU, tiny=True)


def check(row):
    recipe = Row.parse(row["row"])
    assert "error" not in row and "skipped" not in row, row
    warm = set() if "nowarmup" in recipe.added else {"dense"}
    assert set(row["seconds"]) == warm | set(recipe.kinds())
    assert all(count >= 1 for count in row["timed"].values())
    assert sum(row["run_steps"].values()) == 50 and row["run_seconds"] > 0
    assert row["speedup"] > 0 and not row.get("unplanned")
    if recipe.method is not None and recipe.method.name != "none":
        assert 0 < row["kept"] < 1 and row["implementations"]
    if "prune" in recipe.added:
        assert 0.4 < row["tokens"] < 0.8


def test_every_kind_of_row(tmp_path, monkeypatch):
    pipe, call = made("wan1.3b-480p")
    benchmark = tiny(out=tmp_path / "rows.json")
    call["generator"].manual_seed(0)
    before = pipe(**call, num_inference_steps=2)[0]
    monkeypatch.setattr(end_to_end, "build", lambda *rest: pipe)
    benchmark.run([MODELS["wan1.3b-480p"]], [Row.parse(name) for name in KINDS])
    assert [row["row"] for row in benchmark.rows] == KINDS
    for row in benchmark.rows:
        check(row)
    rows = {row["row"]: row for row in benchmark.rows}
    assert rows["stock+cudnn"]["speedup_cudnn"] == 1 and "attention_share" in rows["stock"]
    assert rows["shared@0.1"]["state_gib"] > rows["shared@0.1+fp8"]["state_gib"] > 0
    call["generator"].manual_seed(0)
    assert torch.equal(pipe(**call, num_inference_steps=2)[0], before)
    assert all(m._compiled_call_impl is None for m in pipe.transformer.modules())
    assert not any("forward" in b.__dict__ for b in pipe.transformer.blocks)
    record = json.loads(benchmark.out.read_text())
    assert record["rows"] == benchmark.rows and record["machine"]["torch"] == torch.__version__
    again = tiny(out=benchmark.out)
    again.run([MODELS["wan1.3b-480p"]], [Row.parse(TOGETHER)])
    assert again.rows == benchmark.rows
    _tables(record)


def _tables(record):
    lines = table.markdown(record).splitlines()
    assert lines[1].startswith("Tiny") and "× cuDNN" in lines[5]
    assert [line.split(" | ")[0][2:] for line in lines[7:]] == KINDS
    cells = list(csv.DictReader(io.StringIO(table.csv_text(record))))
    assert [row["row"] for row in cells] == KINDS
    assert float(cells[0]["run s"]) == pytest.approx(record["rows"][0]["run_seconds"], abs=0.06)


@pytest.mark.parametrize("name", [name for name in MODELS if name != "wan1.3b-480p"])
def test_every_model(name):
    benchmark = tiny()
    benchmark.run([MODELS[name]], [Row.parse(row) for row in OTHERS])
    for row in benchmark.rows:
        check(row)


def test_blocks_are_compiled_where_diffusers_does_not_name_them():
    benchmark = tiny()
    rows = ["stock", "pooled@0.1+compile"]
    benchmark.run([MODELS["cogvideox-5b"]], [Row.parse(row) for row in rows])
    for row in benchmark.rows:
        check(row)


@pytest.mark.parametrize(
    ("name", "tokens"),
    [
        ("wan1.3b-480p", 32760),
        ("wan14b-720p", 75600),
        ("hunyuan-720p", 118800),
        ("cogvideox-5b", 17550),
        ("ltx-512p", 6144),
        ("wan2.2-5b-720p", 27280),
        ("flux-1024", 4096),
        ("sd3.5-1024", 4096),
        ("qwen-1328", 6889),
    ],
)
def test_published_sizes(name, tokens):
    model, (pipe, call) = MODELS[name], made(name)
    sizes = dict(zip(("height", "width", "num_frames"), model.size, strict=False))
    _, given = caught(pipe.transformer, lambda: pipe(**call | sizes | {"num_inference_steps": 1}))
    assert registry.find(pipe.transformer).geometry(pipe.transformer, given).n_visual == tokens


def test_how_a_run_is_made_up():
    counts = {}
    for name in ("stock", "pooled@0.1", "shared@0.1", "pooled@0.1+prune", "stock+cache", COLD):
        kinds = whole_run(Row.parse(name), 50)
        counts[name] = {kind: kinds.count(kind) for kind in sorted(set(kinds))}
    assert counts == {
        "stock": {"dense": 50},
        "pooled@0.1": {"dense": 8, "sparse": 42},
        "shared@0.1": {"dense": 8, "full": 4, "sparse": 38},
        "pooled@0.1+prune": {"dense": 8, "pruned": 30, "sparse": 12},
        "stock+cache": {"dense": 29, "skipped": 21},
        COLD: {"pruned": 30, "sparse": 20},
    }


def test_speed_ups_are_those_of_whole_runs():
    seconds = {
        "stock": {"dense": 2.0},
        "stock+cudnn": {"dense": 1.6},
        "none": {"dense": 2.0, "sparse": 0.8},
        "topk@0.1": {"dense": 2.0, "sparse": 1.0},
        "topk@0.1+cudnn": {"sparse": 1.0},
        "topk@0.1+prune": {"dense": 2.0, "sparse": 1.0},
    }
    rows = [{"model": "m", "row": name, "seconds": of} for name, of in seconds.items()]
    complete(rows, 50)
    found = {row["row"]: row for row in rows}
    assert found["stock"]["run_seconds"] == 100 and found["stock"]["attention_share"] == 0.6
    assert found["stock+cudnn"]["speedup"] == 1.25
    assert found["topk@0.1"]["run_seconds"] == 8 * 2 + 42
    assert found["topk@0.1"]["speedup"] == round(100 / 58, 3)
    assert found["topk@0.1"]["speedup_cudnn"] == round(80 / 58, 3)
    assert found["topk@0.1+cudnn"]["dense_from"] == "stock+cudnn"
    assert found["topk@0.1+cudnn"]["run_seconds"] == pytest.approx(8 * 1.6 + 42)
    assert found["topk@0.1+prune"]["run_absent"] == "no pruned step was timed"
    assert found["topk@0.1+prune"]["speedup"] is None
    cold = {"model": "m", "row": "sla@0.1+nowarmup", "seconds": {"sparse": 1.0}}
    complete([*rows, cold], 50)
    assert cold["run_seconds"] == 50 and cold["speedup"] == 2 and "dense_from" not in cold


def test_sla_runs_its_linear_branch_in_every_layer():
    pipe, _ = made("flux-1024")
    row = Row.parse("sla@0.1")
    method, _ = Course(row, 1).options(pipe.transformer, 0)
    layers = registry.find(pipe.transformer).attentions(pipe.transformer)
    assert len(method._learned) == len(layers)
    benchmark = tiny()
    benchmark.run([MODELS["flux-1024"]], [Row.parse("stock"), row])
    assert "sparse_linear_attention" in " ".join(benchmark.rows[1]["implementations"])


@pytest.mark.parametrize("name", ["shared@0.1", "pooled@0.1+prune"])
def test_a_real_run_is_made_up_so(name):
    row, steps = Row.parse(name), 24
    pipe, call = made("wan14b-720p")
    prune = dit_accel.TokenPruning() if "prune" in row.added else None
    with dit_accel.accelerated(pipe, row.method, prune=prune, min_tokens=0) as handle:
        pipe(**call, num_inference_steps=steps)
        assert kinds_of(Course(row, 1), steps, handle.report()) == whole_run(row, steps)


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("name", ["stock", *OTHERS[1:], "shared@0.1", "stock+cache"])
def test_a_course_has_each_kind_often_enough(name, dense):
    course = Course(Row.parse(name), 2, dense)
    pipe, call = made("wan14b-720p")
    options = {"until": float("inf")}
    result = tiny()._timed(MODELS["wan14b-720p"], pipe, call, course, **options)
    wanted = set(course.row.kinds()) | ({"dense"} if course.first else set())
    assert set(result["seconds"]) == wanted
    assert all(count >= 2 for count in result["timed"].values())
    assert result["scaled"] == 2  # one of two guidance passes is timed


def test_dense_steps_of_slow_models_are_those_of_stock(monkeypatch):
    monkeypatch.setattr(end_to_end, "SLOW", 0.0)
    benchmark = tiny()
    benchmark.run([MODELS["flux-1024"]], [Row.parse("stock"), Row.parse("topk@0.1")])
    stock, row = benchmark.rows
    assert "dense" not in row["seconds"] and row["dense_from"] == "stock"
    wanted = 8 * stock["seconds"]["dense"] + 42 * row["seconds"]["sparse"]
    assert row["run_seconds"] == pytest.approx(wanted, abs=0.002)


def test_time_runs_out():
    benchmark = tiny(minutes=0.0)
    benchmark.run([MODELS["flux-1024"]], [Row.parse("stock")])
    assert benchmark.rows == [{"model": "flux-1024", "row": "stock", "skipped": "no time left"}]
    pipe, call = made("flux-1024")
    course = Course(Row.parse("topk@0.1"), 1)
    assert len(tiny()._steps(pipe, call, course, until=0.0)) == 1
    with pytest.raises(RuntimeError, match="no step was timed"):
        tiny()._timed(MODELS["flux-1024"], pipe, call, course, until=0.0)


def test_a_model_that_does_not_fit_says_so(monkeypatch):
    monkeypatch.setattr(models, "free_bytes", lambda device: 1000)
    benchmark = tiny()
    benchmark.run([MODELS["flux-1024"], MODELS["qwen-1328"]], [Row.parse("stock")])
    assert [row["model"] for row in benchmark.rows] == ["flux-1024", "qwen-1328"]
    assert all("GiB free" in row["error"] for row in benchmark.rows)


def test_a_row_that_fails_does_not_end_the_others(monkeypatch):
    monkeypatch.setattr(end_to_end, "books", lambda *rest: 1 / 0)
    benchmark = tiny()
    benchmark.run([MODELS["flux-1024"]], [Row.parse(name) for name in ("topk@0.1", "stock")])
    assert benchmark.rows[0]["error"] == "ZeroDivisionError: division by zero"
    check(benchmark.rows[1])


@pytest.mark.parametrize(
    "name",
    [
        "pooled@x",
        "pooled+frob",
        "stock+nowarmup",
        "shared+prune",
        "stock+fp8",
        "stock+int8",
        "pooled@0.1+int8",
        "stock+prune",
        "best@0.1",
        "stock@0.1",
        "none/sub",
        "pooled@0.1+cache@0.1",
        "topk/best@0.1",
    ],
)
def test_names_that_are_no_row(name):
    with pytest.raises(ValueError, match="row|unknown method|unknown selector"):
        Row.parse(name)


def test_a_row_may_name_a_selector():
    row = Row.parse("topk/sub(8)@0.1+compile")
    assert row.method == dit_accel.TopK(0.1, select="sub(8)") and row.added == {"compile"}


def test_another_setting_is_not_mixed_in(tmp_path):
    out = tmp_path / "rows.json"
    record = {"machine": describe(), "setting": tiny()._setting(), "rows": []}
    for name, value in (("steps", 20), ("compiler", "aot_eager"), ("min_tokens", 9)):
        out.write_text(json.dumps(record | {"setting": record["setting"] | {name: value}}))
        with pytest.raises(ValueError, match="another machine, version or setting"):
            tiny(out=out)
    with pytest.raises(ValueError, match="add --tiny"):
        end_to_end.Benchmark(CPU)


def test_the_commands(tmp_path, capsys):
    out = str(tmp_path / "rows.json")
    words = ["--e2e", "--tiny", "--device", "cpu", "--model", "flux-1024", "--rows", "stock"]
    assert cli.run(["bench", *words, "none", "--rounds", "1", "--out", out]) == 0
    capsys.readouterr()
    assert cli.run(["bench", "--e2e", "--table", out, "--csv"]) == 0
    assert [line[:14] for line in capsys.readouterr().out.splitlines()[1:]] == [
        "flux-1024,stoc",
        "flux-1024,none",
    ]
    assert cli.run(["bench", *words[:-1], "best@0.1"]) == 2


def test_it_runs_without_what_only_the_command_line_needs():
    script = (
        "import sys\n"
        "sys.modules |= dict.fromkeys(('rich', 'typer', 'imageio', 'uvicorn', 'skimage', 'ftfy'))\n"
        "import torch\n"
        "from dit_accel.bench.end_to_end import Benchmark\n"
        "from dit_accel.bench.models import find\n"
        "from dit_accel.bench.rows import Row\n"
        "rows = [Row.parse(name) for name in ('stock', 'pooled@0.1')]\n"
        "Benchmark(torch.device('cpu'), 1, tiny=True).run([find('flux-1024')], rows)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "pooled@0.1" in done.stdout and "error" not in done.stdout.lower()
