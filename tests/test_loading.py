"""Loading: the right pipeline and defaults, and one clear sentence for everything else."""

import json

import pytest
import torch
from tiny import saved_tiny_wan, tiny_flux

from dit_accel.generation import loading
from dit_accel.generation.loading import (
    Defaults,
    find_model,
    load_pipeline,
    pick_device,
    pick_dtype,
)

GENERATION = {"height": 64, "width": 64, "num_frames": 9, "num_inference_steps": 2, "fps": 8}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return saved_tiny_wan(tmp_path_factory.mktemp("wan"), GENERATION)


def test_a_folder_with_its_defaults(folder):
    pipe, defaults = load_pipeline(folder, device="cpu")
    assert type(pipe).__name__ == "WanPipeline"
    assert pipe.transformer.dtype == torch.float32
    assert defaults == Defaults(**GENERATION)


def test_dtype(folder):
    pipe, _ = load_pipeline(str(folder), device="cpu", dtype="bf16")
    assert pipe.transformer.dtype == torch.bfloat16


def test_defaults_of_a_pipeline_without_generation_file():
    defaults = Defaults.from_pipeline(tiny_flux())
    assert defaults.num_inference_steps == 28
    assert defaults.num_frames is None
    assert defaults.height is None


def test_a_pipeline_remembers_the_defaults_of_its_folder(folder, tmp_path, monkeypatch):
    pipe, defaults = load_pipeline(folder, device="cpu")
    assert Defaults.from_pipeline(pipe) == defaults == Defaults(**GENERATION)
    # those of the working directory are nobody's
    (tmp_path / "generation.json").write_text(json.dumps(GENERATION))
    monkeypatch.chdir(tmp_path)
    assert Defaults.from_pipeline(tiny_flux()).num_inference_steps == 28


def test_a_bad_generation_file_is_named(tmp_path):
    path = tmp_path / "generation.json"
    for text in ("{", '{"hight": 3}', "[1]"):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"generation\.json"):
            Defaults.from_file(path)


def index(folder, **parts):
    (folder / "model_index.json").write_text(json.dumps(parts))
    return folder


def test_what_is_no_pipeline(tmp_path):
    with pytest.raises(ValueError, match=r"no model_index\.json"):
        find_model(tmp_path)
    with pytest.raises(ValueError, match="there is no folder"):
        find_model(str(tmp_path / "missing"))
    (tmp_path / "model_index.json").write_text("{")
    with pytest.raises(ValueError, match="not JSON: .* at column 2"):
        find_model(tmp_path)
    with pytest.raises(ValueError, match="is a file"):
        find_model(tmp_path / "model_index.json")


def test_pipelines_without_a_diffusion_transformer(tmp_path):
    unet = ["diffusers", "UNet2DConditionModel"]
    index(tmp_path, _class_name="StableDiffusionPipeline", unet=unet)
    with pytest.raises(ValueError, match="StableDiffusionPipeline, which has a UNet"):
        load_pipeline(tmp_path)
    index(tmp_path, _class_name="OddPipeline", transformer=[None, None])
    with pytest.raises(ValueError, match="no transformer"):
        load_pipeline(tmp_path)


def test_a_folder_without_its_weights(tmp_path):
    part = ["diffusers", "WanTransformer3DModel"]
    index(tmp_path, _class_name="WanPipeline", transformer=part)
    with pytest.raises(ValueError, match=f"{tmp_path} cannot be loaded"):
        load_pipeline(tmp_path, device="cpu")


def test_a_hub_that_does_not_answer(monkeypatch):
    import huggingface_hub

    def unreachable(self, model, **options):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", unreachable)
    with pytest.raises(ValueError, match="hub cannot be reached .no route to host"):
        find_model("nobody/nothing-at-all")


def test_a_name_that_is_no_id():
    with pytest.raises(ValueError, match="neither a folder nor a Hugging Face id"):
        find_model("two words")


def test_a_missing_embedded_model(monkeypatch, tmp_path):
    monkeypatch.setattr(loading, "EMBEDDED", tmp_path)
    with pytest.raises(ValueError, match="embedded model is missing"):
        find_model()


def test_devices_and_dtypes():
    with pytest.raises(ValueError, match="unknown device 'gpu'"):
        pick_device("gpu")
    with pytest.raises(ValueError, match="there is no device 'cuda:99'"):
        pick_device("cuda:99")
    with pytest.raises(ValueError, match="unknown dtype 'int8'"):
        pick_dtype("int8", torch.device("cpu"))
    assert pick_dtype(None, torch.device("cuda")) == "bfloat16"
    assert pick_dtype(None, torch.device("cpu")) == "float32"
    assert pick_dtype("fp16", torch.device("cpu")) == "float16"


def test_offload_needs_a_gpu(folder):
    with pytest.raises(ValueError, match="needs --device cuda"):
        load_pipeline(folder, device="cpu", offload=True)
