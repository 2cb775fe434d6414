"""The plots of a diagnosis as PNG files. The only part that needs matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from keepsight.diagnose.results import Diagnosis


def save_plots(diagnosis: Diagnosis, folder: str | Path) -> list[Path]:
    """Write what can be drawn: decay.png, layers.png, lens.png, causal.png; VisMem: invocations.png, latents.png.

    Args:
        diagnosis: what was found.
        folder: where to; must exist.

    Returns:
        The files written; parts that were not measured give none.

    Raises:
        ImportError: without matplotlib (the lab extra has it).
    """
    import matplotlib

    matplotlib.use("Agg", force=False)
    folder, files = Path(folder), []
    drawn = {
        "decay": _decay,
        "layers": _layers,
        "lens": _lens,
        "causal": _causal,
        "invocations": _invocations,
        "latents": _latents,
    }
    for name, draw in drawn.items():
        figure = draw(diagnosis)
        if figure is not None:
            files.append(folder / f"{name}.png")
            figure.savefig(files[-1], dpi=150)
    return files


def _figure(width: float = 7.0, height: float = 4.0) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure((width, height), layout="constrained")
    return figure, figure.subplots()


def _decay(diagnosis: Diagnosis) -> Any:
    curves = [
        (written, name)
        for written, name in ((diagnosis.written, "as it is"), (diagnosis.written_off, "memory off"))
        if written is not None and written.decay is not None
    ]
    if not curves:
        return None
    figure, axes = _figure()
    for (written, name), colour in zip(curves, ("C3", "C0"), strict=False):
        trace, fit = written.attention[0], written.decay
        assert fit is not None
        text = trace.text_tokens[:, 0]
        axes.loglog(text, trace.mass[:, :, 0].mean((1, 2)), color=colour, alpha=0.6, lw=1, label=name)
        ends = np.array([fit.first, fit.last])
        label = f"n^{fit.slope:.2f} [{fit.low:.2f}, {fit.high:.2f}]"
        axes.loglog(ends, np.exp(fit.intercept) * ends**fit.slope, color=colour, ls="--", label=label)
    trace = curves[0][0].attention[0]
    first = trace.first_token_mass[:, :, 0].mean((1, 2))
    axes.loglog(trace.text_tokens[:, 0], first, color="C2", lw=1, alpha=0.6, label="first token (sink)")
    axes.set(xlabel="text tokens in sight", ylabel="share of attention", title="Visual attention mass")
    axes.legend(fontsize=8)
    return figure


def _layers(diagnosis: Diagnosis) -> Any:
    if diagnosis.written is None or diagnosis.written.decay is None:
        return None
    trace = diagnosis.written.attention[0]
    figure, axes = _figure(height=1.6 + 0.28 * len(trace.layers))
    mass = trace.mass[:, :, 0].mean(2).T  # [L, S]
    edges = np.append(trace.steps, trace.steps[-1] + 1)
    mesh = axes.pcolormesh(edges, np.arange(len(trace.layers) + 1), mass, cmap="magma", vmin=0)
    axes.set_yticks(np.arange(len(trace.layers)) + 0.5, [str(i) for i in trace.layers])
    axes.set(xlabel="tokens written", ylabel="layer", title="Visual attention mass by layer and time")
    axes.invert_yaxis()
    figure.colorbar(mesh, ax=axes)
    return figure


def _lens(diagnosis: Diagnosis) -> Any:
    if diagnosis.lens is None:
        return None
    figure, axes = _figure()
    for trace, name, colour in ((diagnosis.lens, "as it is", "C3"), (diagnosis.lens_off, "memory off", "C0")):
        if trace is not None:
            axes.plot(trace.by_depth, "o-", color=colour, label=name)
    axes.set(xlabel="decoder layer", ylabel="KL to the final prediction, nats", title="Logit lens", ylim=(0, None))
    axes.legend(fontsize=8)
    return figure


def _causal(diagnosis: Diagnosis) -> Any:
    causal = diagnosis.causal
    if causal is None or not causal.conditions:
        return None
    figure, axes = _figure(height=1.2 + 0.4 * len(causal.conditions))
    names = [condition.name for condition in causal.conditions]
    found = [condition.score or condition.content or condition.logprob for condition in causal.conditions]
    values = np.array([e.value for e in found])
    errors = np.array([[e.value - e.low for e in found], [e.high - e.value for e in found]])
    axes.errorbar(values, np.arange(len(names)), xerr=np.maximum(errors, 0), fmt="o", color="C3", capsize=3)
    axes.axvline(0, color="grey", lw=0.8)
    axes.set_yticks(np.arange(len(names)), names)
    axes.invert_yaxis()
    measure = "task score" if causal.conditions[0].score is not None else "log-probability per token"
    axes.set(xlabel=f"difference in {measure} to the intact memory", title=causal.verdict.word)
    return figure


def _invocations(diagnosis: Diagnosis) -> Any:
    """Ratio of invocations by relative position, a panel per data set (as the paper's figure 5)."""
    from matplotlib.figure import Figure

    found = diagnosis.invocations
    if found is None or not found.datasets:
        return None
    figure = Figure((1.0 + 3.6 * len(found.datasets), 3.4), layout="constrained")
    panels = figure.subplots(1, len(found.datasets), squeeze=False, sharey=True)[0]
    for axes, (name, counted) in zip(panels, found.datasets.items(), strict=True):
        for (kind, ratio), colour in zip(counted.ratio.items(), ("C3", "C0"), strict=True):
            middle = (np.arange(len(ratio)) + 0.5) / len(ratio)
            axes.plot(middle, [e.value for e in ratio], "o-", color=colour, label=f"{kind}-term memory")
            axes.fill_between(middle, [e.low for e in ratio], [e.high for e in ratio], color=colour, alpha=0.15, lw=0)
        axes.set(xlabel="relative place in the output", title=f"{name} ({counted.outputs} outputs)", xlim=(0, 1))
        axes.set_ylim(0, None)
    panels[0].set_ylabel("share of outputs that invoke")
    panels[0].legend(fontsize=8)
    return figure


def _latents(diagnosis: Diagnosis) -> Any:
    """What a linear map reads from the latents of each type, and where they look while they are formed."""
    from matplotlib.figure import Figure

    probes = [probe for probe in diagnosis.probes if probe.facts or probe.forming is not None]
    if not probes:
        return None
    figure = Figure((9.0, 3.4 * len(probes)), layout="constrained")
    for (left, right), probe in zip(figure.subplots(len(probes), 2, squeeze=False), probes, strict=True):
        if probe.facts:
            rows = (("latents", "C3"), ("shuffled", "C7"), ("visual", "C0"), ("text", "C2"))
            for shift, (name, colour) in enumerate(rows):
                found = [getattr(fact, name) for fact in probe.facts]
                errors = np.array([[e.value - e.low for e in found], [e.high - e.value for e in found]])
                at = np.arange(len(found)) + 0.2 * shift - 0.3
                left.bar(at, [e.value for e in found], 0.18, yerr=np.maximum(errors, 0), color=colour, label=name)
            left.set_xticks(np.arange(len(probe.facts)), [fact.name for fact in probe.facts], fontsize=8)
            left.set(ylim=(0, 1.15), ylabel="right answers", title=f"{probe.kind}-term memory: a linear map reads")
            left.legend(fontsize=8, ncols=4, loc="upper center")
        else:
            left.set_axis_off()
        where = None if probe.forming is None else probe.forming.where
        if where is None:
            right.set_axis_off()
            continue
        mesh = right.pcolormesh(where, cmap="magma", vmin=0)
        right.invert_yaxis()
        right.set(xlabel="visual token", ylabel="latent", title="where it looks while it is formed")
        figure.colorbar(mesh, ax=right)
    return figure
