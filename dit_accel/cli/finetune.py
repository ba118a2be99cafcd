"""`dit-accel finetune`. Nothing heavy is imported until it runs."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

from dit_accel.cli.options import PROMPTS, BadInput, checked, numbers, option
from dit_accel.generation import options as say
from dit_accel.generation.options import parse_size

if TYPE_CHECKING:
    from dit_accel.finetune.config import Settings
    from dit_accel.methods.learned import Learned

_DATA, _METHOD, _TRAIN, _RUN = "Data", "Method", "Training", "Run"
Text: TypeAlias = str | None
Whole: TypeAlias = int | None
Real: TypeAlias = float | None

Out = Annotated[
    Text, option("Folder of the result; may be left out with --prepare.", _RUN, "--out", "-o")
]
Resume = Annotated[bool, option("Go on with the run in --out.", _RUN, "--resume")]


@dataclass(frozen=True)
class DataOptions:
    """What is learned from."""

    data: Annotated[
        Text, option("Prepared folder, or self: the model's own samples. \\[self]", _DATA)
    ] = None
    prepare: Annotated[Text, option("Encode this captioned folder into --data.", _DATA)] = None
    prompts: Annotated[Text, option(f"{PROMPTS} \\[the package's]", _DATA)] = None
    samples: Annotated[Whole, option("Clips of --data self. \\[64]", _DATA)] = None
    size: Annotated[Text, option(f"{say.SIZE} \\[the model's]", _DATA)] = None
    frames: Annotated[Whole, option(f"{say.FRAMES} \\[the model's]", _DATA)] = None


@dataclass(frozen=True)
class MethodOptions:
    """The method that is trained."""

    method: Annotated[Text, option("sla or vsa. \\[sla]", _METHOD)] = None
    tile: Annotated[Text, option("Of vsa, tokens: 4,4,4 or 4,4,8. \\[4,4,4]", _METHOD)] = None
    keep: Annotated[Real, option("Share of key blocks kept. \\[0.1]", _METHOD)] = None
    select: Annotated[Text, option("How sla chooses blocks, see selectors. \\[means]", _METHOD)] = (
        None
    )
    sort: Annotated[Text, option("Order of each head of sla. \\[none]", _METHOD)] = None
    linear: Annotated[Text, option("all, rest, marginal or none. \\[all]", _METHOD)] = None
    combine: Annotated[Text, option("project or gate. \\[project]", _METHOD)] = None
    branch: Annotated[
        Text, option("What sla's linear branch weighs, see branches. \\[plain]", _METHOD)
    ] = None
    linear_layers: Annotated[
        Text, option("Layers of linear attention alone: 1,2,5 or profile.json@0.75.", _METHOD)
    ] = None
    feature_map: Annotated[Text, option("softmax, elu or relu. \\[softmax]", _METHOD)] = None
    block_q: Annotated[Whole, option("64 or 128. \\[128 from 8,192 tokens on]", _METHOD)] = None
    block_k: Annotated[Whole, option("64 or 128. \\[64]", _METHOD)] = None
    weights: Annotated[Text, option("Weights to start from (.safetensors).", _METHOD)] = None


@dataclass(frozen=True)
class TrainingOptions:
    """How it is trained."""

    train: Annotated[
        Text, option("What is trained: projection, lora or full. \\[projection]", _TRAIN)
    ] = None
    objective: Annotated[
        Text, option("Velocity to match: teacher or diffusion. \\[teacher]", _TRAIN)
    ] = None
    few_steps: Annotated[Whole, option("Distil it to so many denoising steps.", _TRAIN)] = None
    substeps: Annotated[Whole, option("Dense steps that one of them learns. \\[8]", _TRAIN)] = None
    shift: Annotated[Real, option("Of their noise levels, as in flow:3. \\[3]", _TRAIN)] = None
    guidance: Annotated[Real, option("Dense model's, learned too. \\[the model's]", _TRAIN)] = None
    steps: Annotated[Whole, option("Optimizer steps. \\[2000]", _TRAIN)] = None
    batch: Annotated[Whole, option("Clips at a time on each device. \\[1]", _TRAIN)] = None
    accumulate: Annotated[Whole, option("Batches in a step. \\[1]", _TRAIN)] = None
    lr: Annotated[Real, option("Rate of weights \\[1e-5] or LoRA \\[1e-4].", _TRAIN)] = None
    lr_projection: Annotated[Real, option("Rate of SLA's tensors. \\[1e-3]", _TRAIN)] = None
    lr_warmup: Annotated[Whole, option("Steps of linear warm-up. \\[100]", _TRAIN)] = None
    lr_decay: Annotated[Real, option("Share of the steps that fall to rate 0. \\[0]", _TRAIN)] = (
        None
    )
    weight_decay: Annotated[Real, option("AdamW's. \\[0.01]", _TRAIN)] = None
    clip: Annotated[Real, option("Largest gradient norm. \\[1]", _TRAIN)] = None
    ema: Annotated[Real, option("Decay of the averaged weights, 0: off. \\[0.999]", _TRAIN)] = None
    drop_prompt: Annotated[Real, option("Share with the negative prompt. \\[0.1]", _TRAIN)] = None
    rank: Annotated[Whole, option("Of the LoRA. \\[16]", _TRAIN)] = None
    adapt: Annotated[Text, option("Where it is: attention or blocks. \\[attention]", _TRAIN)] = None
    seed: Annotated[Whole, option("Of noise, order and samples. \\[0]", _TRAIN)] = None


@dataclass(frozen=True)
class RunOptions:
    """How the run goes and is watched."""

    precision: Annotated[Text, option("Mixed precision: no, bf16 or fp16. \\[no]", _RUN)] = None
    checkpointing: Annotated[bool, option("Save memory.", _RUN, "--checkpointing")] = False
    device: Annotated[Text, option("cpu. \\[a GPU if any]", _RUN)] = None
    save_every: Annotated[Whole, option("Steps between checkpoints. \\[500]", _RUN)] = None
    validate_every: Annotated[Whole, option("Steps between validations. \\[500]", _RUN)] = None
    log_every: Annotated[Whole, option("Steps between lines of log.jsonl. \\[10]", _RUN)] = None
    clips: Annotated[Whole, option("Validation clips. \\[2]", _RUN)] = None
    validation: Annotated[
        Text, option("Text file of their prompts. \\[those of --prompts]", _RUN)
    ] = None
    warmup: Annotated[Real, option("Dense share of their steps. \\[0]", _RUN)] = None


def finetune(
    *,
    out: Out = None,
    resume: Resume = False,
    data: DataOptions,
    method: MethodOptions,
    order: say.Order = None,
    training: TrainingOptions,
    run: RunOptions,
    model: say.Model = None,
) -> None:
    """Train a method with tensors, SLA or VSA, so that it gives what dense attention gives.

    Its own tensors are trained, and the model's weights or a LoRA with them. See
    docs/train/finetune.md.
    """
    if out is None and data.prepare is None:
        raise BadInput("finetune writes to a folder: name it with --out")
    with checked():
        values = {"out": out, "model": model, "order": order}
        for group in (data, training, run):
            values |= vars(group)
        _run(_settings(values, method), data.prepare, out is not None, resume)


def _settings(values: dict[str, Any], method: MethodOptions) -> Settings:
    """The run that is asked for; ValueError for what cannot be."""
    from dit_accel.finetune.config import Settings

    form = {"keep": 0.1} | _given(vars(method))
    if form.get("linear") == "none":
        form["linear"] = None
    known = {field.name for field in fields(Settings)}
    given = {name: value for name, value in _given(values).items() if name in known}
    if "size" in given:
        given["size"] = parse_size(given["size"])
    return Settings(**{"out": ".", **given, "method": _method(form)})


def _method(form: dict[str, Any]) -> Learned:
    """SLA or VSA with these options; ValueError for one that it does not have."""
    from dit_accel.methods import find
    from dit_accel.methods.budget import linear_layers
    from dit_accel.methods.learned import Learned

    name = form.pop("method", "sla")
    kind = find(name)
    if not issubclass(kind, Learned):
        raise ValueError(f"{name} has nothing to train: sla and vsa have")
    if "linear_layers" in form:
        form["linear_layers"] = linear_layers(form["linear_layers"])
    if "tile" in form:
        form["tile"] = tuple(numbers(form["tile"], int, "tile"))
    known = {field.name for field in fields(kind)}
    foreign = [option for option in form if option not in known]
    if foreign:
        raise ValueError(f"{name} has no {foreign[0].replace('_', '-')}: leave it out")
    return kind(**form)


def _given(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _run(asked: Settings, prepare: str | None, train: bool, resume: bool) -> None:
    """Prepare data, train, or both. Raises ValueError for bad input."""
    import diffusers
    import transformers

    from dit_accel.cli.progress import Progress
    from dit_accel.cli.screen import screen
    from dit_accel.finetune.run import finetune, prepare_data

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    out = screen()
    if prepare is not None:
        with Progress() as progress:
            count = prepare_data(asked, prepare, progress)
        out.print(f"{count} clips encoded in {asked.data}")
    if not train:
        return
    with Progress() as progress:
        done = finetune(asked, resume, progress)
    before, after = done.velocity_error
    if done.files:
        out.print(
            f"{done.steps} steps: velocity error to the dense model {before:.4f} before, "
            f"{after:.4f} after",
        )
        for path in done.files:
            out.print(str(path))
        if asked.sampler is not None:
            words = f"--steps {asked.few_steps} --sampler {asked.sampler} --guidance 1"
            lora = f" --lora {asked.out}/lora" if asked.train == "lora" else ""
            out.print(f"dit-accel generate PROMPT --method {asked.out}/preset.json{lora} {words}")
