"""Scenes: what is drawn, where it stands, and a toy training from begin to export."""

import json
import random
import re
from pathlib import Path

import pytest
import torch

from dit_accel.inputs.scene import Backdrop, Object, Scene


def _random(seed: int = 0) -> random.Random:
    return random.Random(seed)


def test_drawn_scenes_are_prompts_and_none_is_held_out() -> None:
    import scene_set
    from words import TEXT_POSITIONS

    from dit_accel.inputs.scene import split

    rng, held = _random(), 0
    for number in range(200):
        scene = scene_set.draw(rng, 512, held=number % 4 == 0)
        assert scene_set.VOCABULARY.read(scene.text()) == scene
        assert len(split(scene.text())) < TEXT_POSITIONS
        assert scene_set.is_held_out(scene) == (number % 4 == 0)
        held += scene_set.is_held_out(scene)
    assert held == 50 and len(scene_set.EMOJI) == len(set(scene_set.EMOJI)) == 80


@pytest.mark.parametrize(("canvas", "frames"), [(256, 33), (512, 33), (512, 65)])
def test_a_layout_shows_what_the_words_say(canvas: int, frames: int) -> None:
    import scene_set
    from layout import APART, LARGEST_PIXELS, arrange

    rng = _random()
    for _ in range(60):
        scene = scene_set.draw(rng, canvas)
        layout = arrange(scene, canvas, frames, rng)
        boxes, end = layout.boxes, (frames - 1) / 2
        assert max(b[2] for b in boxes) * canvas <= LARGEST_PIXELS + 1e-6
        for relation, first, second in zip(scene.relations, boxes, boxes[1:], strict=False):
            gap = {"left of": second[0] - first[0], "right of": first[0] - second[0],
                   "above": second[1] - first[1], "below": first[1] - second[1]}  # fmt: skip
            least = APART * (first[2] + second[2]) / 2
            assert relation == "and" or gap[relation] >= least - 1e-9
        before, after = layout.boxes_at(torch.tensor([-end, end]))[0].tolist()
        dx, dy, growth = (b - a for a, b in zip(before, after, strict=True))
        ways = {"moving right": dx, "moving left": -dx, "moving down": dy, "moving up": -dy}
        if scene.motion in ways:
            assert ways[scene.motion] > 0.15 and growth == 0
        elif scene.motion:
            assert (growth > 0) == (scene.motion == "zooming in")
        else:
            assert before == after


def test_a_composed_object_lies_in_its_box(archive: Path) -> None:
    from clips import Clips
    from compose import Composer, latent_cover, owners
    from layout import Layout

    composer = Composer(Clips.load(archive, "cpu"))
    scene = Scene((Object("rocket"),), Backdrop("plain", "blue"))
    layout = Layout(((0.25, 0.75, 0.5),), (0.01, 0.0))
    video, cover = composer.draw([scene], [layout], 64, 9)
    assert video.shape == (1, 3, 9, 64, 64) and cover.shape == (1, 1, 9, 8, 8)
    one = cover[0, 0]
    assert one[4, :4].max() == 0 and one[4, :, 4:].max() == 0 and one[4].max() == 1
    x = [(one[t].sum(0) * torch.arange(8)).sum() / one[t].sum() for t in (0, 8)]
    assert x[1] > x[0]
    ground = video[0, :, 4, 0, 0]
    assert torch.allclose((ground + 1) / 2, torch.tensor([30, 136, 229]) / 255)
    small = latent_cover(cover)
    assert small.shape == (1, 1, 3, 8, 8) and small.max() == 1 and small[..., :4, :].max() == 0
    who = owners(small, torch.tensor([[7]]))
    assert who.shape == (1, 3, 4, 4) and set(who.unique().tolist()) == {0, 7}
    assert (who[0, 1, :2] == 0).all() and (who[0, 1, 2:, :2] == 7).any()


def test_scenes_drawn_together_are_those_drawn_alone(archive: Path) -> None:
    from clips import Clips
    from compose import Composer
    from layout import Layout

    composer = Composer(Clips.load(archive, "cpu"))
    scenes = [
        Scene((Object("rocket"),), Backdrop("ramp", "blue", "red")),
        Scene((Object("t-rex"), Object("rocket")), Backdrop("dotted", "red"), ("left of",)),
    ]
    layouts = [
        Layout(((0.5, 0.5, 0.8),), growth=0.01),
        Layout(((0.3, 0.5, 0.4), (0.7, 0.5, 0.3))),
    ]
    video, cover = composer.draw(scenes, layouts, 64, 5)
    for n, (scene, layout) in enumerate(zip(scenes, layouts, strict=True)):
        alone, covered = composer.draw([scene], [layout], 64, 5)
        assert torch.equal(video[n], alone[0])
        assert torch.equal(cover[n, : len(scene.objects)], covered[0])
    assert cover[0, 1].max() == 0 and cover[1, 0, :, :, 4:].max() == 0


def test_heads_tell_what_stands_at_a_token() -> None:
    from models import TINY, build_transformer
    from whereabouts import Whereabouts

    torch.manual_seed(0)
    transformer = build_transformer(TINY)
    heads = Whereabouts(transformer, classes=4)
    owner = torch.tensor([[[[0, 2], [0, 0]]], [[[3, 3], [0, 1]]]])
    transformer(torch.randn(2, TINY.latent, 1, 4, 4), torch.ones(2), torch.randn(2, 3, TINY.text))
    loss, _ = heads.what(owner, torch.tensor([True, True]))
    assert loss.requires_grad and (loss > 1).all()
    heads.read = dict.fromkeys(heads.named, torch.nn.functional.one_hot(owner.flatten(1), 16) * 9.0)
    for head in heads.names:
        head[0] = torch.nn.Identity()
        head[1].weight.data = torch.eye(4, 16)
        head[1].bias.data.zero_()
    loss, right = heads.what(owner, torch.tensor([True, False]))
    assert (loss < 0.01).all() and right.tolist() == [1, 1]


def test_noise_levels_reach_the_top() -> None:
    from scene_flow import LAYOUT, noise_levels

    torch.manual_seed(0)
    levels = noise_levels(4000, torch.device("cpu"))
    assert levels.min() > 0 and levels.max() <= 1
    assert (levels > 0.99).float().mean() > 0.08 and (levels < LAYOUT).float().mean() > 0.25


def test_words_keep_their_embeddings_in_a_new_vocabulary() -> None:
    from models import TINY, build_text_encoder, build_word_tokenizer
    from scene_flow import with_vocabulary

    old, new = build_word_tokenizer({"owl", "red"}), build_word_tokenizer({"above", "red"})
    encoder = build_text_encoder(TINY, len(old))
    made = with_vocabulary(encoder, old, new)
    rows = [t.get_vocab()["red"] for t in (old, new)]
    assert torch.equal(encoder.shared.weight[rows[0]], made.shared.weight[rows[1]])
    kept = "encoder.block.0.layer.0.SelfAttention.q.weight"
    assert torch.equal(encoder.state_dict()[kept], made.state_dict()[kept])


@pytest.fixture(scope="module")
def begun(archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained toy pipeline to begin with."""
    from diffusers import WanPipeline
    from models import (
        TINY,
        build_scheduler,
        build_text_encoder,
        build_tokenizer,
        build_transformer,
        build_vae,
    )

    tokenizer = build_tokenizer(["rocket"])
    folder = tmp_path_factory.mktemp("begun")
    WanPipeline(
        tokenizer=tokenizer,
        text_encoder=build_text_encoder(TINY, len(tokenizer)),
        transformer=build_transformer(TINY),
        vae=build_vae(TINY),
        scheduler=build_scheduler(),
    ).save_pretrained(folder)
    return folder


def test_scenes_are_trained_resumed_distilled_shown_and_exported(
    archive: Path, begun: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:  # fmt: skip
    import export_scenes
    import scene_set
    import show_scenes
    import train_scenes
    import words
    from diffusers import WanPipeline

    monkeypatch.setattr(scene_set, "EMOJI", ("red heart", "rocket", "t-rex"))
    monkeypatch.setattr(show_scenes, "SIDE", 16)
    monkeypatch.setattr(train_scenes, "WARMUP", 5)
    common = ["--data", str(archive), "--model", str(begun), "--device", "cpu", "--every", "10"]
    common += ["--canvas", "32:9:4:1", "--first", "8", "--pool", "8", "--seconds", "100"]
    out = tmp_path / "run"
    common += ["--out", str(out)]
    monkeypatch.setattr(train_scenes, "PROFILED", 2)
    train_scenes.main([*common, "--steps", "3", "--profile", "--out", str(tmp_path / "profiled")])
    assert re.search(r"aten::\w+ .*Self CPU time total", capsys.readouterr().out, re.DOTALL)
    train_scenes.main([*common, "--steps", "30", "--short", "0.3"])
    more = ["--steps", "10", "--resume", str(out / "dit"), "--distil", "3", "--fall", "0"]
    train_scenes.main([*common, *more, "--show", "32:9:1:3", "--show-count", "2"])
    lines = [json.loads(line) for line in (out / "scenes.jsonl").read_text().splitlines()]
    assert len(lines) == 4 and lines[2]["loss"] < lines[0]["loss"]
    assert json.loads((out / "dit" / "state.json").read_text())["step"] == 40
    assert (out / "32x9-g1-s3.jpg").exists() and (out / "32x9-g1-s3.npz").exists()
    learnt = ["--model", str(begun), "--out", str(out / "words"), "--device", "cpu"]
    words.main([str(out / "dit"), *learnt, "--steps", "150", "--batch", "16"])
    lost = [float(line.split()[-1]) for line in capsys.readouterr().out.splitlines()
            if ": moved" in line]  # fmt: skip
    assert len(lost) == 3 and lost[-1] < 0.8 * lost[0]
    pipe = export_scenes.pipeline(out / "words", begun)
    pipe.save_pretrained(tmp_path / "export")
    again = WanPipeline.from_pretrained(tmp_path / "export")
    again.set_progress_bar_config(disable=True)
    video = again("rocket above a t-rex on a blue background", height=32, width=32, num_frames=5,
                  num_inference_steps=2, guidance_scale=1.0, output_type="pt").frames  # fmt: skip
    assert video.shape == (1, 5, 3, 32, 32) and video.isfinite().all()
    _is_evaluated(tmp_path / "export", archive, export_scenes.GENERATION, monkeypatch)
    facts = export_scenes.facts()
    assert facts["scenes"] and len(facts["held_out"]) == 80 and facts["held_out_pairs"]


def _is_evaluated(model: Path, data: Path, call: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    import evaluate_scenes

    call = call | {"height": 32, "width": 32, "num_frames": 9, "num_inference_steps": 2}
    (model / "generation.json").write_text(json.dumps(call))
    out, picture = model / "report.json", model / "grid.png"
    command = ["evaluate_scenes.py", "--model", model, "--data", data, "--out", out]
    command += ["--count", "4", "--batch", "2", "--grid", picture, "--device", "cpu"]
    monkeypatch.setattr("sys.argv", [str(word) for word in command])
    evaluate_scenes.main()
    report = json.loads(out.read_text())
    assert report["trained"]["prompts"] == report["held_out"]["prompts"] == 2
    assert report["trained"]["emoji"] == 0 and picture.exists()


def test_a_squeezed_checkpoint_is_restored(tmp_path: Path) -> None:
    from run_state import Progress
    from squeeze import STEP, restore, squeeze

    torch.manual_seed(0)
    tensors = {
        "a.weight": torch.randn(200, 160) * 0.02,
        "a.bias": torch.randn(200),
        "b.weight": torch.randn(8, 300, 2, 2, 4),
        "shared.weight": torch.randn(300, 200),
    }
    file = tmp_path / "small"
    file.write_bytes(squeeze(tensors, Progress(7, 1.5), {"scenes": True}))
    again, progress, extra = restore(file)
    assert (progress, extra) == (Progress(7, 1.5), {"scenes": True})
    assert again.keys() == tensors.keys()
    for name in ("a.weight", "b.weight"):
        error = (again[name] - tensors[name]).norm() / tensors[name].norm()
        assert again[name].shape == tensors[name].shape and error < 1.02 * STEP / 12**0.5
    assert torch.equal(again["shared.weight"], tensors["shared.weight"].bfloat16())
    whole = sum(t.numel() for n, t in tensors.items() if n in ("a.weight", "b.weight"))
    exact = sum(2 * t.numel() for n, t in tensors.items() if n not in ("a.weight", "b.weight"))
    assert file.stat().st_size - exact < 0.5 * whole
    file.write_bytes(b"hello there, no file")
    with pytest.raises(ValueError, match="file of squeeze.py"):
        restore(file)


def test_words_stand_for_places() -> None:
    import words
    from layout import Layout

    scene = Scene(
        (Object("christmas tree"), Object("rocket", "small")),
        Backdrop("ramp", "red", "blue"), ("left of",),
    )  # fmt: skip
    prompt = scene.text(articles=True)
    wanted = words.places(scene, Layout(((0.25, 0.5, 0.3), (0.75, 0.5, 0.3))), prompt)
    known = [w for w, row in zip(prompt.split(), wanted, strict=False) if row[2]]
    assert known == ["christmas", "tree", "rocket", "red", "blue"]
    assert wanted[1].tolist() == [-0.5, 0.0, 1.0] and wanted[7].tolist() == [0.5, 0.0, 1.0]
    assert wanted[wanted[:, 2] > 0][-2:, 1].tolist() == [-1.0, 1.0]  # the ramp from top to bottom


def test_an_encoder_that_looks_at_neighbours_hears_the_order() -> None:
    import words
    from models import TINY, build_text_encoder

    torch.manual_seed(0)
    encoder = build_text_encoder(TINY, 20).eval()
    words.look_at_neighbours(encoder)
    ids = torch.tensor([[3, 4, 5, 6, 7, 8], [3, 6, 5, 4, 7, 8]])
    one, other = encoder(ids, torch.ones_like(ids)).last_hidden_state
    assert (one[2] - other[2]).norm() > 0.1 * one[2].norm()  # between the two that changed places


def test_listed_prompts_are_scenes_half_of_them_held_out(tmp_path: Path) -> None:
    import listed_prompts
    import scene_set

    listed_prompts.main(["--out", str(tmp_path)])
    lines = {f.name: f.read_text().splitlines() for f in tmp_path.iterdir()}
    assert {name: len(found) for name, found in lines.items()} == listed_prompts.FILES
    assert len({p for found in lines.values() for p in found}) == sum(map(len, lines.values()))
    for found in lines.values():
        held = [scene_set.is_held_out(scene_set.VOCABULARY.read(p)) for p in found]
        assert held == [False] * (len(held) // 2) + [True] * (len(held) // 2)
