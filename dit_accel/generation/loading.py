"""From a model's name to a diffusers pipeline: the embedded one, a folder, or a hub id."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dit_accel.generation.limits import check_limits
from dit_accel.generation.offload import Offload
from dit_accel.inputs.data import read_object
from dit_accel.inputs.fields import build, expect
from dit_accel.inputs.tensors import check_folder
from dit_accel.machine import is_out_of_memory
from dit_accel.pipelines.denoisers import SLOTS, transformers_of

if TYPE_CHECKING:
    import torch
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline
EMBEDDED = Path(__file__).parents[1] / "assets" / "emoji"
GENERATION = "generation.json"
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


@dataclass(frozen=True)
class Defaults:
    """What a pipeline is called with when the user says nothing; None leaves it to the pipeline.

    Sizes in pixels, fps for the file that is written. Read from generation.json in the model's
    folder, otherwise from the signature of the pipeline's `__call__`.
    """

    height: int | None = None
    width: int | None = None
    num_frames: int | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    negative_prompt: str | None = None
    max_sequence_length: int | None = None
    fps: float = 16

    @classmethod
    def from_file(cls, path: Path) -> Defaults:
        """Read generation.json; ValueError names the file when it is not what it should be."""
        what = "generation defaults"
        found = build(cls, read_object(path, what), f"{what} {path}")
        try:
            check_limits(vars(found))
        except ValueError as error:
            raise ValueError(f"{what} {path}: {error}") from None
        return found

    def taking(self, arguments: Mapping[str, Any]) -> Defaults:
        """With these arguments of the pipeline's call in place of its own."""
        return replace(self, **arguments)

    @classmethod
    def from_pipeline(cls, pipe: DiffusionPipeline) -> Defaults:
        """Those of the folder that the pipeline was loaded from, if it has a generation.json, else
        those in the signature of its `__call__`."""
        folder = getattr(pipe.config, "_name_or_path", None)
        if folder and (file := Path(folder) / GENERATION).is_file():
            return cls.from_file(file)
        known = inspect.signature(type(pipe).__call__).parameters
        names = [f.name for f in fields(cls) if f.name in known]
        return cls(**{n: known[n].default for n in names if known[n].default is not known[n].empty})


def load_pipeline(
    model: str | Path | None = None,
    device: str | None = None,
    dtype: str | None = None,
    offload: bool | str = False,
) -> tuple[DiffusionPipeline, Defaults]:
    """Load a diffusers pipeline that has a diffusion transformer.

    Args:
        model: a folder or a Hugging Face id; None is the embedded model.
        device: "cpu", "cuda", "cuda:1", "mps"; None takes a GPU when there is one.
        dtype: "bf16", "fp16" or "fp32"; None is bf16 on CUDA and fp32 elsewhere.
        offload: keep on the GPU only the part that is running (`enable_model_cpu_offload`); with
            "blocks" or "blocks:4" of the transformer only so many blocks (see `Offload`).

    Raises ValueError, in one sentence, for a model that cannot be had or has no transformer.
    """
    import torch
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    where = pick_device(device)
    kind = pick_dtype(dtype, where)
    moving = Offload.named(offload)
    if moving is not None:
        moving.check(where)
    source = find_model(model)
    check_folder(Path(source))
    try:
        pipe = DiffusionPipeline.from_pretrained(source, torch_dtype=getattr(torch, kind))
    except Exception as error:  # every library below has errors of its own
        if is_out_of_memory(error):
            raise
        raise ValueError(f"{source} cannot be loaded: {_first_line(error)}") from error
    pipe.set_progress_bar_config(disable=True)
    if moving is None:
        pipe = pipe.to(where)
    else:
        moving.switch_on(pipe, where)
    return pipe, Defaults.from_pipeline(pipe)


def pick_device(device: str | None) -> torch.device:
    """The device asked for, or the best there is; ValueError when it is not there."""
    import torch

    if device is None:
        mps = torch.backends.mps.is_available()
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if mps else "cpu")
    try:
        where = torch.device(device)
    except RuntimeError:
        raise ValueError(f"unknown device {device!r}: give cpu, cuda, cuda:1 or mps") from None
    if where.type == "meta":
        raise ValueError("the device 'meta' holds no numbers: give cpu, cuda, cuda:1 or mps")
    if where.type == "cuda" and (where.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"there is no device {device!r} here: PyTorch sees {_gpus()}")
    if where.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError("there is no device 'mps' here: use --device cpu")
    if where.type not in ("cpu", "cuda", "mps"):
        try:
            torch.empty(1, device=where)
        except (RuntimeError, AssertionError, ImportError, NotImplementedError):
            raise ValueError(f"there is no device {device!r} here: use --device cpu") from None
    return where


def _gpus() -> str:
    import torch

    count = torch.cuda.device_count()
    return f"{count} CUDA device(s)" if count else "no CUDA device; use --device cpu"


def pick_dtype(dtype: str | None, where: torch.device) -> str:
    """The torch name of a dtype: bf16 on CUDA and fp32 elsewhere when none is given."""
    if dtype is None:
        return "bfloat16" if where.type == "cuda" else "float32"
    if dtype not in DTYPES and dtype not in DTYPES.values():
        raise ValueError(f"unknown dtype {dtype!r}: choose one of {', '.join(DTYPES)}")
    return DTYPES.get(dtype, dtype)


def find_model(model: str | Path | None = None) -> str:
    """The folder or hub id of a loadable pipeline with a transformer, without loading weights.

    Raises ValueError for a missing folder, a folder or repository that holds no pipeline, a
    pipeline without a diffusion transformer, and a hub that does not answer.
    """
    if model is None:
        if not (EMBEDDED / "model_index.json").is_file():
            raise ValueError(f"the embedded model is missing from {EMBEDDED}: give --model")
        return str(EMBEDDED)
    folder = Path(model).expanduser()
    if folder.is_dir():
        index = folder / "model_index.json"
        if not index.is_file():
            raise ValueError(f"{folder} is not a diffusers pipeline: it has no model_index.json")
        _check_index(str(folder), index)
        return str(folder)
    text = str(model)
    if folder.exists():
        raise ValueError(f"{text} is a file: give the folder of a pipeline or a Hugging Face id")
    if text.startswith((".", "/", "~")) or text.count("/") > 1:
        raise ValueError(f"there is no folder {text}")
    _check_index(text, _hub_index(text))
    return text


def _check_index(name: str, index: Path) -> None:
    try:
        parts = read_object(index, index.name)
        kind = parts.get("_class_name")
        expect(f"_class_name in {index.name}", kind, str)
        slots = {slot: parts.get(slot) or [None] for slot in SLOTS}
        for slot, named in slots.items():
            expect(f"{slot} in {index.name}", named, list[str | None])
    except ValueError as error:
        raise ValueError(f"{name} is not a diffusers pipeline: {error}") from None
    if not any(named[0] for named in slots.values()):
        what = "a UNet" if "unet" in parts else "no transformer"
        raise ValueError(
            f"{name} is a {kind}, which has {what}: only diffusion transformers are accelerated"
        )


def _hub_index(model: str) -> Path:
    """model_index.json of a hub repository, from the cache or the hub."""
    from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache
    from huggingface_hub import errors as hub

    try:
        cached = try_to_load_from_cache(model, "model_index.json")
        if isinstance(cached, str):
            return Path(cached)
        HfApi().model_info(model, timeout=20)
        return Path(hf_hub_download(model, "model_index.json"))
    except hub.HFValidationError:
        why = "that is neither a folder nor a Hugging Face id (name/model)"
    except hub.GatedRepoError:
        why = "its authors ask for an agreement; accept it on its page and run `hf auth login`"
    except hub.RepositoryNotFoundError:
        why = "there is no such folder, and no such model on the Hugging Face hub"
    except hub.EntryNotFoundError:
        why = "it is not a diffusers pipeline, it has no model_index.json"
    except hub.OfflineModeIsEnabled:
        why = "it is not in the local cache and HF_HUB_OFFLINE is set"
    except Exception as error:  # which HTTP client raises depends on the hub library's version
        why = f"there is no such folder, and the Hugging Face hub cannot be reached ({error})"
    raise ValueError(f"cannot load {model!r}: {why}")


def _first_line(error: BaseException) -> str:
    """Of a message; Python's own words, which name neither file nor key, with their kind."""
    text = (str(error).strip().splitlines() or [""])[0].rstrip(".")
    plain = isinstance(error, (OSError, ValueError)) and text
    return text if plain else f"{type(error).__name__}: {text}".rstrip(": ")


EMBEDDED_NAME = "the embedded model"


def placement(pipe: DiffusionPipeline) -> dict[str, str]:
    """Device and dtype of a pipeline, as text."""
    transformer = transformers_of(pipe)[0]
    dtype = str(transformer.dtype).removeprefix("torch.")
    return {"device": str(pipe._execution_device), "dtype": dtype}


def fingerprint(pipe: DiffusionPipeline) -> str:
    """Hex digits that tell the weights of a pipeline's transformers from others: of some numbers
    of each tensor that is not offloaded one by one."""
    found = hashlib.sha256()
    for transformer in transformers_of(pipe):
        for name, parameter in transformer.named_parameters():
            if not parameter.is_meta:
                numbers = parameter.detach().flatten()
                some = numbers[:: max(1, len(numbers) // 16)].double().cpu().numpy()
                found.update(name.encode() + some.tobytes())
    return found.hexdigest()[:16]
