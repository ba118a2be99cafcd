"""What the page shows: heat map, stage, previews."""

import re
from types import SimpleNamespace

import numpy as np
import torch
from asks import ASK

from dit_accel.app import preview, stage
from dit_accel.app.studio import News
from dit_accel.pages import charts, figures


def test_the_heat_map_has_a_cell_per_layer_and_step():
    found = charts.kept_map([[1.0, 0.25], [0.5, None]], ["blocks.0", "blocks.1"])
    assert re.findall("<title>(.*?)</title>", found) == [
        "step 1, blocks.0: all blocks",
        "step 2, blocks.0: 50% of the blocks",
        "step 1, blocks.1: 25% of the blocks",
    ]
    assert charts.kept_map([], ["blocks.0"]) is None
    assert figures.full_steps([[1.0, 1.0], [0.5, None]]) == (
        "All blocks were read in 1 of 2 steps, 50% of them in the other 1."
    )


def test_the_stage_keeps_a_finished_side_when_the_other_is_cancelled(alone):
    value = stage.waiting(ASK)
    value = stage.finished(value, alone.left, "url/left.mp4", 8)
    value = stage.moved(value, News("right", "denoise", 2, 4))
    assert value["right"]["share"] == 0.5 and value["right"]["state"] == "denoising, 2 of 4"
    value = stage.stopped(value, "cancelled")
    assert value["left"]["src"] == "url/left.mp4"
    assert value["right"]["state"] == "cancelled" and not value["right"]["busy"]


def test_the_clean_clip_is_read_off_two_steps():
    clean, noise = torch.randn(2, 1, 4, 3, 8, 8)
    sigmas = torch.tensor([1.0, 0.6, 0.3, 0.0])

    class FlowMatchFake:
        config: dict = {}

    scheduler = FlowMatchFake()
    scheduler.sigmas = sigmas
    drawing = preview.Preview(SimpleNamespace(scheduler=scheduler), ratio=1.0)
    drawing.before = (1 - sigmas[0]) * clean + sigmas[0] * noise
    now = (1 - sigmas[1]) * clean + sigmas[1] * noise
    assert torch.allclose(drawing._clean(1, now), clean, atol=1e-5)


def test_colours_are_learnt_from_what_was_decoded():
    latents = torch.randn(1, 16, 3, 8, 6)
    mixing = torch.randn(3, 16) * 0.05
    true = torch.einsum("kc,chw->hwk", mixing, latents[0, :, 0]) + 0.5
    frame = (true.clamp(0, 1) * 255).round().byte().numpy().repeat(8, 0).repeat(8, 1)
    colours = preview.fit_colours(latents, frame, ratio=8 / 6)
    drawn = preview.linear(latents[0, :, 0], colours)
    assert np.abs(drawn.astype(int) - (true.clamp(0, 1) * 255).numpy()).mean() < 8


def test_previews_of_packed_latents_have_the_clips_shape():
    plane = preview._plane(torch.randn(1, 6 * 12, 16), ratio=0.5)
    assert plane.shape == (16, 6, 12)
    picture = preview.principal(plane)
    assert picture.shape == (6, 12, 3) and picture.dtype == np.uint8 and picture.std() > 0


def test_a_sentence_says_where_a_run_stands():
    busy = {"left": {"state": "denoising, 2 of 4", "busy": True}, "right": {"state": "next"}}
    assert stage.said("waiting", busy, 0, 0, 9) == "Waiting for the machine."
    words = "2 runs are before yours: your turn in about 1 min 40 s. One runs at a time."
    assert stage.said("waiting", busy, 2, 100, 9) == words
    assert stage.said("running", busy, 0, 0, 9) == "Left side: denoising, 2 of 4. About 9 s left."
    late = stage.said("running", busy, 0, 0, 0)
    assert late == "Left side: denoising, 2 of 4. It takes longer than expected."
    right = {"left": {"src": "x"}, "right": {"busy": True}}
    assert stage.said("running", right, 0, 0, 1).startswith("Right side: starting.")
    assert [stage.said(x, busy, 0, 0, 0) for x in ("cancelled", "failed")] == ["Cancelled.", ""]
