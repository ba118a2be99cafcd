"""Every pipeline of diffusers with a transformer of ours, called once through its own `__call__`.

Those that cannot be driven with tiny parts (drive.py) are skipped with what they miss.
"""

from __future__ import annotations

import warnings

import pytest
import torch
from drive import build, pipelines, run, why_not

import dit_accel
from dit_accel import Schedule, TopK

QUICK = (
    "AuraFlowPipeline",
    "BriaFibo2Pipeline",
    "EasyAnimatePipeline",
    "FluxKontextPipeline",
    "Kandinsky5T2IPipeline",
    "Krea2Pipeline",
    "NucleusMoEImagePipeline",
    "PRXPipeline",
    "QwenImageInpaintPipeline",
    "SkyReelsV2Pipeline",
    "WanVACEPipeline",
)
DRIVEN = 70  # at least
NOW = {"schedule": Schedule(warmup=0), "min_tokens": 0}


def slow(name):
    return pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow])


@pytest.mark.parametrize("name", [slow(name) for name in sorted(pipelines())])
def test_a_call_gives_what_stock_gives_when_all_is_kept(name):
    why = why_not(name)
    if why:
        assert name not in QUICK, why
        pytest.skip(why)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe = build(name)
        stock = run(pipe, name)
        handle = dit_accel.accelerate(pipe, TopK(keep=0.999), **NOW)
        out = run(pipe, name)
        report = handle.report()
        handle.restore()
        assert torch.equal(run(pipe, name), stock)
    scale = float(stock.abs().max())
    torch.testing.assert_close(out, stock, rtol=1e-3, atol=1e-3 * scale)
    assert all(row["sparse"] + row["dense"] for row in report.layers)
    assert report.layers[0]["sparse"] or report.unplanned
    assert max(row["step"] for row in report.steps) <= 1 + report.steps[0]["step"]


@pytest.mark.slow
def test_most_pipelines_are_driven():
    assert sum(not why_not(name) for name in pipelines()) >= DRIVEN
