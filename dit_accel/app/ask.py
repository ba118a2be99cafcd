"""What a visitor asks for, and what the page allows: validated before anything runs."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from dit_accel.config import AccelConfig
from dit_accel.generation.limits import LIMITS
from dit_accel.generation.loading import Defaults
from dit_accel.generation.options import How, What, parse_size
from dit_accel.generation.request import Request
from dit_accel.inputs import fields
from dit_accel.methods.selectors import opens_a_file
from dit_accel.samplers.grids import Sampler

# Token-steps that a visitor may ask for on each kind of device: minutes of work.
WORK = {"cpu": 500_000, "mps": 2_000_000, "cuda": 8_000_000}
# Options that read files of the server, or keep it busy before the first step.
PRIVATE = ("heads", "lora", "compile", "dense", "quantize")
STOCK = How("dense")
Weights = tuple[str | None, tuple[str, ...]]  # a model, None for the embedded one; files over it


class BadField(ValueError):
    """What is wrong with one field of the form, in a sentence; `name` is the field's."""

    def __init__(self, name: str, text: str) -> None:
        super().__init__(text)
        self.name = name


@dataclass(frozen=True)
class Limits:
    """The most a visitor may ask for.

    prompt: characters.
    side: pixels.
    frames, steps: of a clip.
    work: visual tokens times steps.
    queue: visitors who may wait; places: of these, for one address.
    models: folders or ids offered beside the embedded model.
    public: no other model may be typed in, and no file of the server named.
    """

    prompt: int = 500
    side: int = 1280
    frames: int = 129
    steps: int = 100
    work: int = WORK["cpu"]
    queue: int = 8
    places: int = 4
    models: tuple[str, ...] = ()
    public: bool = False

    @classmethod
    def for_public(cls, models: tuple[str, ...] = ()) -> Limits:
        """Tighter bounds, and only the operator's models, for a page that strangers can reach."""
        few = {"prompt": 200, "side": 512, "frames": 49, "steps": 50, "places": 2}
        return cls(**few, work=WORK["cpu"] // 2, models=models, public=True)

    def on(self, device: str) -> Limits:
        """The same page on another device: its work in that device's minutes."""
        times = WORK.get(device, WORK["cpu"]) // WORK["cpu"]
        return replace(self, work=self.work * times)


@dataclass(frozen=True)
class Ask:
    """A whole request: a clip, made in two ways.

    model: a folder or an id; None is the embedded one. checkpoint: files over its weights, two for
    two experts. trained: what these were trained for, once they are loaded; a side that names no
    method runs it.

    Raises ValueError, in a sentence a visitor understands, for anything outside `limits`.
    """

    what: What
    left: How = STOCK
    right: How = field(default_factory=How)
    model: str | None = None
    checkpoint: tuple[str, ...] = ()
    limits: Limits = field(default=Limits(), repr=False)
    trained: AccelConfig | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self._check_text()
        fields.check(self.what)
        self._check_sampler()
        limits = self.limits
        most = {"steps": limits.steps, "frames": limits.frames}
        for name in ("seed", "steps", "frames", "guidance", "fps"):
            low, high = LIMITS[name]
            self._within(name, getattr(self.what, name), low, min(high, most.get(name, high)))
        for name, value in zip(("width", "height"), self.size, strict=True):
            self._within(name, value, 16, limits.side)
        for side, how in (("left", self.left), ("right", self.right)):
            self._check_side(side, how)

    def _check_text(self) -> None:
        limits, prompt = self.limits, self.what.prompt
        if not isinstance(prompt, str) or not prompt.strip():
            raise BadField("prompt", "The prompt is empty: say what to show.")
        for name in ("prompt", "negative"):
            length = len(getattr(self.what, name) or "")
            if length > limits.prompt:
                words = "prompt" if name == "prompt" else "text of what not to show"
                raise BadField(
                    name, f"The {words} has {length} characters; this page takes {limits.prompt}."
                )
        if limits.public and self.model not in (None, *limits.models):
            raise BadField("model", "This page is public and runs only the models in its list.")
        if limits.public and self.checkpoint:
            raise BadField("checkpoint", "This page is public: leave checkpoint out.")

    def _check_sampler(self) -> None:
        try:
            Sampler.named(self.what.sampler) if self.what.sampler else None
        except ValueError as error:
            raise BadField("sampler", f"{error}.") from None

    @staticmethod
    def _within(name: str, value: float | None, low: float, high: float) -> None:
        if value is None or low <= value <= high:
            return
        kind = "a number" if name in ("guidance", "fps") else "a whole number"
        raise BadField(
            {"width": "size", "height": "size"}.get(name, name),
            f"{name.capitalize()} is {kind} from {low} to {high}, not {fields.shown(value)}.",
        )

    def _check_side(self, side: str, how: How) -> None:
        for name in PRIVATE if self.limits.public else ():
            if getattr(how, name):
                raise BadField(f"{side}.{name}", f"This page is public: leave {name} out.")
        for name in ("select", "sort") if self.limits.public else ():
            if opens_a_file(str(getattr(how, name))):
                raise BadField(f"{side}.{name}", "This page is public: name no file.")
        try:
            fields.check(how)
            config = self.config(how)
            how.boost()
        except ValueError as error:
            raise BadField(f"{side}.method", f"On the {side}: {error}") from None
        if config is None or how.method is None or not self.limits.public:
            return
        if config.method.files or config.dense is not None:
            words = "This page is public: name no file and no backend of dense attention."
            raise BadField(f"{side}.method", words)

    @property
    def weights(self) -> Weights:
        """Which weights it runs: those of a model, and those over them."""
        return self.model, self.checkpoint

    def config(self, how: How) -> AccelConfig | None:
        """What `accelerate` takes for a side; None for the stock pipeline."""
        return config_of(how, self.trained)

    def label(self, how: How) -> str:
        """What a side runs, in a few words."""
        if how.method is None and self.checkpoint and self.trained is None:
            return "as trained"
        return label(how, self.trained)

    @property
    def size(self) -> tuple[int | None, int | None]:
        """(width, height) asked for, in pixels."""
        if self.what.size is None:
            return None, None
        try:
            return parse_size(self.what.size)
        except ValueError as error:
            raise BadField("size", f"{str(error).capitalize()}.") from None

    def request(self) -> Request:
        """What `generate` takes; its picture tells nothing of the server's folders."""
        request = self.what.request()
        if request.image is not None:
            request.image.filename = "picture.png"
        return request

    def filled(self, defaults: Defaults) -> Ask:
        """With the model's defaults where nothing is asked; BadField where these are more than the
        page allows."""
        width, height = self.size
        width, height = width or defaults.width, height or defaults.height
        what, size = self.what, f"{width}x{height}" if width and height else None
        steps = what.steps
        if steps is None:
            usual = what.sampler and Sampler.named(what.sampler).steps
            steps = usual or defaults.num_inference_steps
        frames = defaults.num_frames if what.frames is None else what.frames
        return replace(self, what=replace(what, size=size, steps=steps, frames=frames))


def config_of(how: How, trained: AccelConfig | None = None) -> AccelConfig | None:
    """What `accelerate` takes; None for the stock pipeline."""
    config = how.config(trained)
    stock = config.method.name == "dense" and config.prune is None and config.dense is None
    return None if stock else config


def label(how: How, trained: AccelConfig | None = None) -> str:
    """What a side runs, in a few words."""
    config = how.config(trained)
    name = config.method.label
    words = [name if name == "dense" else f"{name}, keep {config.method.keep:g}"]
    words += [f"prune {how.prune}"] if how.prune is not None else []
    words += [f"step cache {how.step_cache:g}"] if how.step_cache is not None else []
    words += ["LoRA"] if how.lora else []
    words += ["compiled"] if how.compile else []
    words += [f"linear layers in {how.quantize}"] if how.quantize else []
    return ", ".join(words)
