import json

import pytest

import dit_accel
from dit_accel.config import AccelConfig, resolve


def test_json_round_trip(tmp_path):
    config = AccelConfig(
        dit_accel.TopK(keep=0.1, block_k=128),
        dit_accel.Schedule(warmup=3, dense_layers=(0, -1), layer_keep=((2, 0.5),)),
        order="tile",
        tile=(4, 4, 4),
    )
    assert AccelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    config.save(tmp_path / "preset.json")
    assert resolve(tmp_path / "preset.json") == config
    assert resolve(str(tmp_path / "preset.json"), order="raster").order == "raster"


def test_names_and_presets():
    assert resolve("topk").method == dit_accel.TopK()
    assert resolve("topk:fast").method.keep == dit_accel.TopK.presets["fast"]["keep"]
    assert resolve(dit_accel.TopK(keep=0.3), strict=True).strict


@pytest.mark.parametrize(
    ("method", "error", "words"),
    [
        ("warp", ValueError, "unknown method 'warp': choose one of"),
        ("topk:warp", ValueError, "no preset 'warp'"),
        ("nowhere.json", ValueError, "no preset file"),
        (3, TypeError, "not int"),
    ],
)
def test_bad_methods(method, error, words):
    with pytest.raises(error, match=words):
        resolve(method)


@pytest.mark.parametrize("keep", [0, -0.1, 1.01])
def test_keep_outside_its_range(keep):
    with pytest.raises(ValueError, match=r"\(0, 1\]"):
        dit_accel.TopK(keep=keep)


def test_bad_fields():
    with pytest.raises(ValueError, match="block_k"):
        dit_accel.TopK(block_k=48)
    with pytest.raises(ValueError, match="unknown order"):
        AccelConfig(dit_accel.TopK(), order="spiral")
    with pytest.raises(ValueError, match="no option 'speed'"):
        AccelConfig.from_dict({"method": {"name": "topk"}, "speed": 9})
    with pytest.raises(ValueError, match="Dense keeps everything"):
        dit_accel.Dense(keep=0.5)


def test_preset_file_that_is_no_json(tmp_path):
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        resolve(tmp_path / "x.json")
