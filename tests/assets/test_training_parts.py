"""Exactness of the training shortcuts, and the rules of the data set."""

import pytest
import torch


def test_whole_clip_is_the_stock_autoencoder() -> None:
    import whole_clip
    from models import TINY, build_vae

    torch.manual_seed(0)
    vae = build_vae(TINY).eval()
    for frames in (1, 5, 13):
        video = torch.rand(2, 3, frames, 16, 32) * 2 - 1
        with torch.no_grad():
            moments = whole_clip.encode(vae, video)
            stock = vae.encode(video).latent_dist
            torch.testing.assert_close(moments, stock.parameters, rtol=1e-4, atol=1e-5)
            again = whole_clip.decode(vae, stock.mean).clamp(-1, 1)
            torch.testing.assert_close(again, vae.decode(stock.mean).sample, rtol=1e-4, atol=1e-5)


def test_whole_clip_refuses_other_lengths() -> None:
    import whole_clip
    from models import TINY, build_vae

    with pytest.raises(ValueError, match="4k \\+ 1 frames, got 4"):
        whole_clip.encode(build_vae(TINY), torch.zeros(1, 3, 4, 16, 16))


def test_few_prompt_keys_equal_the_512_of_the_stock_pipeline() -> None:
    import prompt_keys
    from models import TINY, build_transformer

    torch.manual_seed(0)
    transformer = build_transformer(TINY).eval()
    torch.nn.init.normal_(transformer.proj_out.weight)
    latents, time = torch.randn(3, 4, 2, 4, 4), torch.tensor([10.0, 500.0, 900.0])
    words, lengths = torch.randn(3, 16, 16), torch.tensor([0, 4, 15])
    stock = torch.zeros(3, 512, 16)
    for row, n in enumerate(lengths):
        stock[row, :n] = words[row, :n]
    with torch.no_grad():
        expected = transformer(latents, time, stock, return_dict=False)[0]
        bias = prompt_keys.install(transformer)
        packed, bias.value = prompt_keys.pack(words, lengths)
        found = transformer(latents, time, packed, return_dict=False)[0]
        bias.value = torch.zeros_like(bias.value)
        unweighted = transformer(latents, time, packed, return_dict=False)[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert (unweighted - expected).abs().max() > 1e-2


def test_muon_flattens_the_spectrum() -> None:
    from muon import orthogonal

    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonal(torch.randn(2, 24, 60)))
    assert values.min() > 0.5 and values.max() < 1.3


def test_rounding_with_the_inputs_beats_rounding_alone() -> None:
    from compress import EIGHT_BIT, round_columns

    torch.manual_seed(0)
    weight = torch.randn(32, 48) * 0.05
    inputs = torch.randn(400, 6) @ torch.randn(6, 48) + 0.1 * torch.randn(400, 48)
    rounded = round_columns(weight, inputs.T @ inputs / 400)
    assert rounded.dtype == EIGHT_BIT

    def error(w: torch.Tensor) -> float:
        return float((inputs @ (w.float() - weight).T).square().mean())

    assert error(rounded) < 0.5 * error(weight.to(EIGHT_BIT))


def test_variants_are_left_out_of_the_set() -> None:
    from emoji_set import code_points, is_chosen

    assert code_points("2764-fe0f") == (0x2764,)
    assert code_points("1f3f4-e0067_e0062") is None
    assert is_chosen((0x1F680,), "rocket", 72)
    assert not is_chosen((0x1F680,), "rocket", 47)
    assert not is_chosen((0x1F44D, 0x1F3FB), "thumbs up: light skin tone", 72)
    assert not is_chosen((0x1F468, 0x200D, 0x1F680), "man astronaut", 72)
    assert not is_chosen((0x1F550,), "one o’clock", 72)


def test_one_colour_of_each_emoji_is_held_out() -> None:
    from emoji_set import COLOURS, held_out

    names = [f"emoji {i}" for i in range(200)]
    assert {held_out(n) for n in names} == set(COLOURS)
    assert held_out("rocket") == held_out("rocket")
