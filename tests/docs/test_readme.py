"""The front page is short, and its snippet runs as it stands."""

import re
from pathlib import Path

from diffusers import WanPipeline

README = Path(__file__).resolve().parents[2] / "README.md"


def test_it_is_short():
    assert len(README.read_text().split()) <= 800


def test_it_counts_the_models_that_were_observed():
    counts = r"(\d+) transformer classes(?: of diffusers)?, (\d+) pipelines"
    observed = (README.parent / "docs" / "reference" / "models.md").read_text()
    assert re.search(counts, README.read_text()).groups() == re.search(counts, observed).groups()


def test_the_snippet_runs(monkeypatch, capsys):
    call = WanPipeline.__call__

    def shorter(self, prompt, **asked):
        assert asked["num_frames"] == 33  # what the embedded model was trained on
        asked |= {"height": 128, "width": 128, "num_inference_steps": 3, "output_type": "latent"}
        return call(self, prompt, **asked)

    monkeypatch.setattr(WanPipeline, "__call__", shorter)
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    found = {}
    exec(compile(code, str(README), "exec"), found)
    said = capsys.readouterr().out
    assert re.search(r"shared/sub on WanTransformer3DModel: \d\d\.\d% of attention work kept", said)
    assert found["clip"].shape == (16, 9, 16, 16) and found["clip"].isfinite().all()
    assert not found["handle"].active
