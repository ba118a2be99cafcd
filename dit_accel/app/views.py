"""The results as HTML: plain functions from the record of a pair to markup."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from typing import Any

from dit_accel.pages import charts

PHASES = {"encode": "text", "denoise": "denoising", "decode": "decoding", "total": "whole run"}


def results(data: dict[str, Any], base: str) -> str:
    """Everything below the players; `base` is the URL of the folder with the files."""
    return f"""<div class="results">
{_headline(data)}
<div class="two">
<section><h2>Time</h2>{_times(data)}{_step_chart(data)}</section>
<section><h2>Closeness to the left clip</h2>{_closeness(data)}{_frame_charts(data)}</section>
</div>
<section><h2>What ran</h2>{_ran(data)}</section>
<section><h2>Make it again</h2>{_again(data, base)}</section>
<p class="note">{_fine_print(data)}</p>
</div>"""


def seconds(value: float) -> str:
    """1.23 → "1.2 s", with as many digits as mean something."""
    return (
        f"{value:.0f} s" if value >= 100 else f"{value:.1f} s" if value >= 1 else f"{value:.2f} s"
    )


def _headline(data: dict[str, Any]) -> str:
    ratio, near = data["speedup"]["denoise"], data["quality"]
    same = min(near["psnr"]) >= 100
    speed = f"{ratio:.2f}× faster" if ratio >= 1 else f"{1 / ratio:.2f}× slower"
    closeness = "identical" if same else f"{near['psnr_mean']:.1f} dB"
    left, right = (data[s]["times"]["denoise"] for s in ("left", "right"))
    report = data["right"]["report"]
    kept = f", with {report['kept']:.0%} of the attention work" if report else ""
    return (
        f'<p class="prompt">“{escape(data["prompt"])}”</p><h1>{speed}, {closeness}</h1>'
        f"<p class=lead>Right took {seconds(right)} for the denoising loop, left "
        f"{seconds(left)}{kept}.</p>"
    )


def _times(data: dict[str, Any]) -> str:
    left, right = (data[s]["times"] for s in ("left", "right"))
    rows = (
        f"<tr{' class=strong' if key == 'denoise' else ''}><th scope=row>{name}</th>"
        f"<td>{seconds(left[key])}</td><td>{seconds(right[key])}</td>"
        f"<td>{left[key] / right[key]:.2f}×</td></tr>"
        if key in ("denoise", "total")
        else f"<tr><th scope=row>{name}</th><td>{seconds(left[key])}</td>"
        f"<td>{seconds(right[key])}</td><td></td></tr>"
        for key, name in PHASES.items()
    )
    head = "<tr><th></th><th>left</th><th>right</th><th>speed-up</th></tr>"
    return f"<table><thead>{head}</thead><tbody>{''.join(rows)}</tbody></table>"


def _step_chart(data: dict[str, Any]) -> str:
    series = {s: data[s]["times"]["steps"] for s in ("left", "right")}
    if not all(series.values()):
        return ""
    small = max(max(line) for line in series.values()) < 1
    if small:
        series = {name: [1000 * x for x in line] for name, line in series.items()}
    chart = charts.lines(series, "step", "ms" if small else "s", from_zero=True)
    key = "<span><i class=left></i>left</span><span><i class=right></i>right</span>"
    return _figure(key + "time of each denoising step", chart)


def _closeness(data: dict[str, Any]) -> str:
    near, many = data["quality"], len(data["quality"]["psnr"]) > 1
    worst = f"<span>worst frame {min(near['psnr']):.1f} dB</span>" if many else ""
    rows = {"PSNR": f"{near['psnr_mean']:.1f} dB{worst}", "SSIM": f"{near['ssim_mean']:.4f}"}
    if "latent_error" in near:
        rows["latents, relative error"] = f"{near['latent_error']:.3f}"
    if many:
        before, after = near["flicker"]
        rows["flicker"] = f"{after:.2f}<span>left {before:.2f}</span>"
    body = "".join(f"<tr><th scope=row>{k}</th><td>{v}</td></tr>" for k, v in rows.items())
    return f"<table><tbody>{body}</tbody></table>"


def _frame_charts(data: dict[str, Any]) -> str:
    near = data["quality"]
    if len(near["psnr"]) < 2:
        return ""
    psnr = charts.lines({"right": near["psnr"]}, "frame", "dB")
    ssim = charts.lines({"right": near["ssim"]}, "frame", "")
    return _figure("PSNR of each frame", psnr) + _figure("SSIM of each frame", ssim)


def _figure(title: str, chart: str) -> str:
    return f'<figure class="chart"><p class="key">{title}</p>{chart}</figure>'


def _ran(data: dict[str, Any]) -> str:
    shown = [(s, data[s]) for s in ("left", "right") if data[s]["report"]]
    if not shown:
        return "<p>Both sides ran the stock pipeline: all attention was dense.</p>"
    return "".join(_side_ran(name, side, len(shown) > 1) for name, side in shown)


def _side_ran(name: str, side: dict[str, Any], named: bool) -> str:
    report = side["report"]
    sparse = sum(layer["sparse"] for layer in report["layers"])
    dense = sum(layer["dense"] for layer in report["layers"])
    served = ", ".join(f"{escape(n)} × {c}" for n, c in report["implementations"].items())
    reasons = "".join(
        f"<li>{count} because: {escape(why)}"
        f"{', which no schedule asked for' if why in report['unplanned'] else ''}</li>"
        for why, count in report["fallbacks"].items()
    )
    head = f"{name.capitalize()}: {sparse}" if named else f"{sparse}"
    return (
        f"<p>{head} attention calls ran sparse{f' ({served})' if served else ''} and {dense} ran "
        f"dense.{_pruned(report)}</p><ul>{reasons}</ul>{heat_map(side['cells'], report['layers'])}"
    )


def _pruned(report: dict[str, Any]) -> str:
    if report["config"]["prune"] is None:
        return ""
    shares = [step["tokens"] for step in report["steps"]]
    part, mean = sum(share < 1 for share in shares), sum(shares) / len(shares)
    return (
        f" {part} of {len(shares)} forwards ran part of the tokens through the middle of the "
        f"model: {mean:.0%} of all tokens over the run."
    )


def heat_map(cells: list[list[float | None]], layers: list[dict[str, Any]]) -> str:
    """Kept share of attention work: a row per layer, a column per step."""
    if not cells:
        return ""
    rows = "".join(
        f'<div class="name" title="{escape(layer["name"])}">{number}</div>'
        + "".join(_cell(step, layer["name"], row[number]) for step, row in enumerate(cells))
        for number, layer in enumerate(layers)
    )
    stride = max(1, -(-len(cells) // 10))
    axis = "".join(
        f'<div class="tick">{i + 1 if i % stride == 0 else ""}</div>' for i in range(len(cells))
    )
    scale = "".join(f'<i style="--kept:{k}"></i>' for k in (0.05, 0.25, 0.5, 0.75))
    key = f'attention work kept, layer × step<span class="scale">0 %{scale}<i></i>dense</span>'
    grid = f'<div class="heat" style="--steps:{len(cells)}">{rows}<div></div>{axis}</div>'
    return f'<figure class="chart"><p class="key">{key}</p>{grid}</figure>'


def _cell(step: int, layer: str, kept: float | None) -> str:
    if kept is None:
        return '<i class="none"></i>'
    what = "dense" if kept >= 1 else f"{kept:.0%} kept"
    style = "" if kept >= 1 else f' style="--kept:{kept:.3f}"'
    return f'<i{style} title="step {step + 1}, {escape(layer)}: {what}"></i>'


def _again(data: dict[str, Any], base: str) -> str:
    side = data["right"]
    kind = "clip" if data["size"][0] > 1 else "picture"
    files = {
        f"right {kind}": side["clip"],
        f"left {kind}": data["left"]["clip"],
        "side by side": data["both"],
        "right configuration (JSON)": side["config"],
        "left configuration (JSON)": data["left"]["config"],
        "right as Python": side["script"],
        "left as Python": data["left"]["script"],
        "everything measured (JSON)": "comparison.json",
    }
    return (
        f'<div class="code"><pre>{escape(side["python"].strip())}</pre>'
        f'<button type="button" class="copy">Copy</button></div>{_links(files.items(), base)}'
    )


def _links(files: Iterable[tuple[str, str]], base: str) -> str:
    links = (
        f'<a href="{escape(base)}/{escape(file)}" download="{escape(file)}">{label}</a>'
        for label, file in files
    )
    return f'<p class="downloads">{"".join(links)}</p>'


def _fine_print(data: dict[str, Any]) -> str:
    count, height, width = data["size"]
    machine = data["machine"]
    cores = "1 thread" if machine["threads"] == 1 else f"{machine['threads']} threads"
    device = machine["gpu"] or f"{cores} of {machine['cpu']}"
    moving = f", {count} frames at {data['fps']:g} fps" if count > 1 else ""
    return escape(
        f"{width} × {height}{moving}, {data['steps']} steps, seed {data['seed']}, "
        f"{data['model']} in {data['dtype']} on {device}. Both sides start from the same noise; "
        "each was timed once, the time of the previews left out."
    )


def sentence(error: Exception) -> str:
    """An error as a visitor reads it: only a ValueError is meant for visitors' eyes."""
    text = str(error).strip()
    if not isinstance(error, ValueError) or not text:
        text = f"the run failed ({type(error).__name__}); the server's log says why"
    return escape(f"{text[0].upper()}{text[1:].rstrip('.')}.")
