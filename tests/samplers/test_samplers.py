"""Few-step grids: their figures, one step by hand, a whole clip by hand, and the way back."""

import copy
import math

import pytest
import torch
from diffusers import (
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanVideoToVideoPipeline,
)
from diffusers.schedulers import MiniMaxH3Scheduler
from runs import run
from tiny import tiny_flux, tiny_wan

from dit_accel.samplers import GridScheduler, H3GridScheduler, Sampler, install, sampling


def shifted(shift, u):
    return shift * u / (1 + (shift - 1) * u)


def rcm(sigma_max, *between):
    """TrigFlow's angles as rectified flow's levels."""
    return [math.tan(t) / (1 + math.tan(t)) for t in (math.atan(sigma_max), *between)]


@pytest.mark.parametrize(
    "text,steps,expected",
    [
        ("rcm", 4, rcm(80, 1.5, 1.4, 1.0)),
        ("rcm:200", 2, rcm(200, 1.5)),
        ("dmd", 3, [1.0, 0.757, 0.522]),
        ("flow:5", 4, [1.0, 15 / 16, 5 / 6, 5 / 8]),
        ("renoise", 2, [1.0, 0.5]),
    ],
)
def test_the_grids(text, steps, expected):
    sampler = Sampler.named(text)
    assert sampler.sigmas(steps) == pytest.approx(expected)
    assert Sampler.named(str(sampler)) == sampler
    scheduler = GridScheduler(text)
    scheduler.set_timesteps(steps)
    torch.testing.assert_close(scheduler.timesteps, 1000 * torch.tensor(expected))
    assert scheduler.sigmas.tolist() == pytest.approx([*expected, 0])


def test_the_grid_of_minimax_h3_is_shifted_for_clip_and_sound():
    for shift in (12.0, 3.0):
        scheduler = H3GridScheduler("dmd:999,749,500,250", shift)
        scheduler.set_timesteps(5)
        levels = [shifted(shift, u / 1000) for u in (999, 749, 500, 250)]
        assert scheduler.sigmas.tolist() == pytest.approx([*levels, 0])
        torch.testing.assert_close(scheduler.timesteps, 1 - torch.tensor(levels))
    turbo, stock = H3GridScheduler("flow", 6.0), MiniMaxH3Scheduler(6.0)
    turbo.set_timesteps(5), stock.set_timesteps(5)
    torch.testing.assert_close(turbo.sigmas, stock.sigmas)


@pytest.mark.parametrize(
    "text,steps,why",
    [
        ("ddim", 4, "a sampler is rcm, dmd, flow, renoise, not 'ddim'"),
        ("flow:x", 4, "'flow:x' is a name, ':' and numbers"),
        ("flow:3,4", 4, "takes one number, not '3,4'"),
        ("flow:-1", 4, "shift is a number > 0"),
        ("rcm:0", 4, "sigma_max is a noise level > 0"),
        ("dmd:500,700", 2, "rungs fall from at most 1000"),
        ("rcm", 20, "rcm makes 1 to 4 steps, not 20"),
        ("dmd", 4, "makes 3 steps, those it was trained on, not 4"),
        ("flow", 0, "at least one step"),
    ],
)
def test_what_is_refused(text, steps, why):
    with pytest.raises(ValueError, match=why):
        Sampler.named(text).sigmas(steps)


def by_hand(pipe, text, steps, generator):
    """The loop that distilled models are published with, around the pipeline's own transformer."""
    prompt = pipe.encode_prompt(
        "a rocket", do_classifier_free_guidance=False, max_sequence_length=16
    )[0]
    levels = [*Sampler.named(text).sigmas(steps), 0.0]
    x = torch.randn(1, 16, 3, 16, 16, generator=generator) * levels[0]
    for now, then in zip(levels, levels[1:], strict=False):
        time = torch.tensor([1000 * now], dtype=torch.float32)
        v = pipe.transformer(x, time, prompt, return_dict=False)[0]
        if text.startswith("flow"):
            x = x - (now - then) * v
            continue
        x = x - now * v
        if then:
            x = (1 - then) * x + then * torch.randn(x.shape, generator=generator)
    return x


@pytest.mark.parametrize("text,steps", [("rcm", 4), ("dmd", 3), ("flow:5", 4), ("renoise:3", 2)])
@torch.no_grad()
def test_a_clip_is_what_the_published_loop_makes(text, steps):
    pipe = tiny_wan()
    with sampling(pipe, text):
        out = run(pipe, steps=steps, guidance=1.0)
        again = run(pipe, steps=steps, guidance=1.0)
    assert torch.equal(out, again)
    expected = by_hand(pipe, text, steps, torch.Generator().manual_seed(0))
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


def test_the_pipeline_is_given_back():
    pipe = tiny_wan()
    before, scheduler = run(pipe), pipe.scheduler
    undo = install(pipe, Sampler("rcm"))
    assert "prepare_latents" in vars(pipe)
    undo(), undo()
    assert pipe.scheduler is scheduler and "prepare_latents" not in vars(pipe)
    assert torch.equal(run(pipe), before)


def test_other_pipelines_and_schedulers():
    """Flux hands over its own levels and a shift; Wan's published scheduler is UniPC."""
    flux = tiny_flux()
    with sampling(flux, "flow:3"):
        assert run(flux, steps=2).isfinite().all() and len(flux.scheduler.timesteps) == 2
    pipe = tiny_wan()
    pipe.scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True
    )
    with sampling(pipe, "dmd"):
        assert run(pipe, steps=3).isfinite().all()
    pipe.scheduler = UniPCMultistepScheduler()
    with pytest.raises(ValueError, match="has UniPCMultistepScheduler: leave the sampler out"):
        install(pipe, "dmd")


def test_only_the_noise_is_scaled_in_image_to_video():
    pipe = tiny_wan(kind=WanImageToVideoPipeline, in_channels=36)
    image = torch.zeros(1, 3, 64, 64)
    asked = (image, 1, 16, 64, 64, 9, torch.float32, torch.device("cpu"))
    plain, condition = pipe.prepare_latents(*asked, torch.Generator().manual_seed(1))
    install(pipe, "rcm:200")
    pipe.scheduler.set_timesteps(4)
    noise, same = pipe.prepare_latents(*asked, torch.Generator().manual_seed(1))
    torch.testing.assert_close(noise, plain * 200 / 201)
    assert torch.equal(same, condition)


def test_a_scheduler_can_be_saved(tmp_path):
    GridScheduler("dmd:999,500").save_pretrained(tmp_path)
    assert GridScheduler.from_pretrained(tmp_path).sampler == Sampler("dmd", rungs=(999, 500))


def test_copies_of_a_scheduler_draw_one_after_another():
    """As pipelines have one for each frame."""
    scheduler = GridScheduler("renoise:5")
    scheduler.set_timesteps(4)
    scheduler.generator = torch.Generator().manual_seed(0)
    frames = [copy.deepcopy(scheduler) for _ in range(3)]
    x = torch.zeros(1, 64)
    made = [f.step(x, f.timesteps[0], x)[0] for f in frames]
    assert not torch.equal(made[0], made[1]) and not torch.equal(made[1], made[2])
    scheduler.generator.manual_seed(0)
    assert torch.equal(scheduler.step(x, scheduler.timesteps[0], x)[0], made[0])
    assert copy.deepcopy(GridScheduler("dmd")).sampler == Sampler("dmd")


def test_noise_levels_to_each_token_are_refused():
    scheduler = GridScheduler("flow")
    scheduler.set_timesteps(4)
    x = torch.zeros(1, 6, 4)
    scheduler.step(x, scheduler.timesteps[0], x, per_token_timesteps=None)
    with pytest.raises(ValueError, match="one noise level for all tokens"):
        scheduler.step(x, scheduler.timesteps[1], x, per_token_timesteps=torch.zeros(1, 6))


def test_latents_that_are_placed_at_a_level_are_not_scaled_again():
    parts = tiny_wan().components
    names = ("tokenizer", "text_encoder", "vae", "scheduler", "transformer")
    pipe = WanVideoToVideoPipeline(**{name: parts[name] for name in names})
    seen = []
    install(pipe, "rcm:80")
    own = pipe.scheduler.scale_noise

    def scale_noise(*args, **kwargs):
        seen.append(own(*args, **kwargs))
        return seen[-1]

    pipe.scheduler.scale_noise = scale_noise
    pipe.scheduler.set_timesteps(4)
    video, level = torch.zeros(1, 3, 9, 64, 64), pipe.scheduler.timesteps[:1]
    asked = (video, 1, 16, 64, 64, torch.float32, torch.device("cpu"))
    made = pipe.prepare_latents(
        *asked, torch.Generator().manual_seed(0), timestep=level, latents=None
    )
    assert torch.equal(made, seen[-1])
