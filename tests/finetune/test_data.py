"""Recording, encoding and drawing the data."""

import json

import numpy as np
import pytest
import torch
from diffusers import CogVideoXDDIMScheduler
from tiny import tiny_flux, tiny_wan

from dit_accel.finetune import data, prepare
from dit_accel.finetune.config import Settings
from dit_accel.finetune.record import Conditions, record
from dit_accel.finetune.run import prepare_data
from dit_accel.generation.loading import EMBEDDED, Defaults
from dit_accel.generation.request import Request, arguments
from dit_accel.media import video

SMALL = Defaults(64, 64, 9, 4, 3.0, "dog", 16, 8)


def test_the_recorded_arguments_are_those_of_the_pipeline():
    pipe = tiny_wan()
    known = record(pipe, SMALL, "a rocket")
    expected, _ = pipe.encode_prompt("a rocket", max_sequence_length=16)
    torch.testing.assert_close(known.tensors["encoder_hidden_states"], expected.detach())
    assert known.shape == (1, 16, 3, 8, 8) and known.time_scale == pytest.approx(1000)
    assert known.sigmas[0] == 1 and known.sigmas[-1] == 0 and len(known.sigmas) == 5


def test_a_packed_model_is_recorded_with_its_position_tables():
    known = record(tiny_flux(), Defaults(64, 64, num_inference_steps=2), "a cat")
    assert known.shape[0] == 1 and known.time_scale == pytest.approx(1)
    assert {"img_ids", "txt_ids", "pooled_projections"} <= set(known.tensors)


def test_a_model_of_scenes_is_recorded_with_any_prompt():
    """What stands in for the prompt is no scene, and neither is an empty negative one."""
    pipe = tiny_wan()
    pipe.register_to_config(_name_or_path=str(EMBEDDED))
    with pytest.raises(ValueError, match="expected"):
        arguments(pipe, SMALL, Request("a rocket"))
    assert record(pipe, SMALL, "").shape == (1, 16, 3, 8, 8)


def test_models_that_cannot_be_served_are_refused():
    pipe = tiny_wan()
    pipe.scheduler = CogVideoXDDIMScheduler()
    with pytest.raises(ValueError, match="no flow-matching scheduler"):
        record(pipe, SMALL, "a cat")
    with pytest.raises(ValueError, match="has two transformers"):
        record(tiny_wan(transformer_2=True, boundary_ratio=0.5), SMALL, "a cat")


def test_own_samples_are_the_clips_of_the_pipeline(tmp_path):
    pipe, names = tiny_wan(), ["a rocket", "a cat"]
    prepare.own_samples(pipe, SMALL, names, 3, 7, tmp_path, lambda *state: None, batch=2)
    prepare.finish(pipe, SMALL, ["a rocket", "a cat", "a rocket"], tmp_path)
    found = data.LatentData(tmp_path, "WanTransformer3DModel")
    assert [x["caption"] for x in found.index["samples"]] == ["a rocket", "a cat", "a rocket"]
    for number, prompt in enumerate(["a rocket", "a cat", "a rocket"]):
        call = arguments(pipe, SMALL, Request(prompt, seed=7 + number))
        expected = pipe(**call, output_type="latent")[0]
        torch.testing.assert_close(found._tensor(number, "latents"), expected)


@pytest.fixture
def clips(tmp_path):
    folder = tmp_path / "clips"
    frames = np.random.default_rng(0).integers(0, 255, (20, 72, 96, 3), np.uint8)
    for name in "ab":
        video.save(folder / f"{name}.mp4", frames, fps=16)
    rows = [{"file": f"{name}.mp4", "caption": f"a {name}"} for name in "ab"]
    (folder / "captions.json").write_text(json.dumps(rows))
    return folder


def test_clips_become_the_latents_that_the_transformer_sees(clips, model, tmp_path):
    out = tmp_path / "cache"
    asked = Settings(out=".", data=str(out), model=model, size=(64, 64), frames=9, device="cpu")
    assert prepare_data(asked, str(clips)) == 2
    found = data.LatentData(out, "WanTransformer3DModel")
    batch = found.draw(2, 0, 0.0)
    assert batch.latents.shape == (2, 16, 3, 8, 8) and batch.latents.isfinite().all()
    pipe = tiny_wan()
    pixels = prepare.load_clip(clips / "a.mp4", 9, 64, 64, 8)
    frames = video.read(clips / "a.mp4")  # 16 a second, read at 8
    assert torch.equal(
        pixels[0, :, 3], torch.tensor(prepare._fit(frames[6], 64, 64)).movedim(2, 0) / 127.5 - 1
    )
    mean, std = (
        torch.tensor(x).view(1, -1, 1, 1, 1)
        for x in (pipe.vae.config.latents_mean, pipe.vae.config.latents_std)
    )
    with torch.no_grad():
        expected = (pipe.vae.encode(pixels).latent_dist.mode() - mean) / std
    stored = found._tensor(0, "latents")
    torch.testing.assert_close(stored, expected)


def test_a_draw_is_decided_by_its_seed(clips, model, tmp_path):
    asked = Settings(out=".", data=str(tmp_path / "c"), model=model, size=(64, 64), device="cpu")
    prepare_data(asked, str(clips))
    found = data.LatentData(tmp_path / "c", "WanTransformer3DModel")
    one, two, other = (found.draw(1, seed, 0.0) for seed in (1, 1, 2))
    assert torch.equal(one.noisy, two.noisy) and not torch.equal(one.noise, other.noise)
    level = one.sigma.item()
    torch.testing.assert_close(one.noisy, (1 - level) * one.latents + level * one.noise)
    assert all(0 <= found.draw(1, seed, 0.0).sigma <= 1 for seed in range(20))
    negative = found.draw(1, 1, 1 - 1e-9).conditions["encoder_hidden_states"]
    assert not torch.equal(negative, one.conditions["encoder_hidden_states"])


def test_noise_levels_follow_the_pipelines_steps(clips, model, tmp_path):
    asked = Settings(out=".", data=str(tmp_path / "c"), model=model, size=(64, 64), device="cpu")
    prepare_data(asked, str(clips))
    found = data.LatentData(tmp_path / "c", "WanTransformer3DModel")
    sigmas = torch.tensor(found.index["sigmas"])
    ends = torch.linspace(0, 1, len(sigmas))
    torch.testing.assert_close(found._levels(ends), sigmas)
    torch.testing.assert_close(found._levels(ends[:1] + ends[1] / 2), (sigmas[:1] + sigmas[1]) / 2)


def test_somebody_elses_files_are_not_replaced(clips, tmp_path):
    asked = Settings(out=".", data=str(tmp_path / "c"))
    mine = tmp_path / "c" / data.NEGATIVE
    mine.parent.mkdir()
    mine.write_text("mine")
    with pytest.raises(ValueError, match="negative.safetensors was not written by this command"):
        prepare_data(asked, str(clips))
    assert mine.read_text() == "mine"
    shard, known = mine.with_name(data.shard_name(0)), Conditions({}, {}, (), [], 1.0)
    data.save_shard(shard, [torch.ones(1)], [known], "label")
    data.check_data(mine.parent)  # begun by us, and stopped before the index
    (mine.parent / data.INDEX).write_text("{}")
    with pytest.raises(ValueError, match="index.json was not written by this command"):
        data.check_data(mine.parent)


@pytest.mark.parametrize(
    ("rows", "match"),
    [
        (None, "neither captions.json nor captions.csv"),
        ([], "name no clip"),
        ([{"file": "a.mp4"}], "are not rows of file and caption"),
        ([{"file": "z.mp4", "caption": "a"}], "z.mp4, named in the captions, does not exist"),
        ([{"file": "a.mp4", "caption": " "}], "a.mp4, named in the captions, has no caption"),
    ],
)
def test_bad_captions_are_refused(clips, rows, match):
    listing = clips / "captions.json"
    listing.unlink() if rows is None else listing.write_text(json.dumps(rows))
    with pytest.raises(ValueError, match=match):
        prepare.read_captions(clips)


def test_a_csv_is_read_and_a_short_clip_refused(clips):
    (clips / "captions.csv").write_text("file,caption\nb.mp4,a fish\n")
    assert prepare.read_captions(clips) == [("a fish", clips / "b.mp4")]
    with pytest.raises(ValueError, match="has 20 frames at 16 a second, but 17 at 8"):
        prepare.load_clip(clips / "b.mp4", 17, 64, 64, 8)
