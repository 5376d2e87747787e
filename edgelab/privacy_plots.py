"""Figures of the privacy rooms: what states give away against what they keep, and what epsilon costs. Each with its sentence."""

import plotly.graph_objects as go

from edgelab import plots
from edgelab.features import Curve
from edgelab.report import Report


def leak_figure(curve: Curve) -> go.Figure:
    """Tokens that the server reads (95 % interval) against next tokens that stay the same, a point per setting; all in per cent."""
    fig = go.Figure(layout={"template": plots.TEMPLATE, "title": {"text": "What states give away, and what they are still good for"}})
    guards = list(dict.fromkeys(x.guard for x in curve.leaks))
    for i, guard in enumerate(guards):
        here = [x for x in curve.leaks if x.guard == guard]
        spread = [(100 * ((x.high if x.high is not None else x.recovered) - x.recovered)) for x in here]
        below = [(100 * (x.recovered - (x.low if x.low is not None else x.recovered))) for x in here]
        fig.add_scatter(
            x=[round(100 * x.same_top, 2) for x in here], y=[round(100 * x.recovered, 2) for x in here], name=guard, mode="markers+text",
            text=[f"k={x.k}" for x in here], textposition="bottom center", error_y={"array": spread, "arrayminus": below, "thickness": 1.4},
            marker={"symbol": plots.SYMBOLS[i % len(plots.SYMBOLS)], "color": plots.OKABE_ITO[i % len(plots.OKABE_ITO)], "size": 10},
        )  # fmt: skip
    likeliest = 100 * max(x.unigram for x in curve.leaks)
    fig.add_hline(y=likeliest, line={"dash": "dot", "color": plots.INK}, annotation_text="always the likeliest token")
    fig.update_xaxes(title_text="next tokens that stay the same, %")
    fig.update_yaxes(title_text="input tokens that the server reads, %", range=[0, 105])
    return fig


def cost_figure(report: Report, metric: str = "tokens_right") -> go.Figure:
    """`metric` of every model of a study of `private` or `federated`, with its interval, as bars in the study's order."""
    rows = [r for r in report if r.metric == metric]
    if not rows:
        raise ValueError(f"metric={metric!r} is in no row; there are {', '.join(dict.fromkeys(r.metric for r in report))}")
    scale = 100 if rows[0].unit == "share" else 1
    up, down = ([scale * (getattr(r, end) - r.value) * sign for r in rows] for end, sign in (("high", 1), ("low", -1)))
    fig = go.Figure(layout={"template": plots.TEMPLATE, "title": {"text": f"{metric.replace('_', ' ')}, 95 % intervals"}})
    fig.add_bar(
        x=[r.model for r in rows], y=[round(scale * r.value, 3) for r in rows], marker_color=plots.OKABE_ITO[0],
        error_y={"array": up, "arrayminus": down, "thickness": 1.4},
    )  # fmt: skip
    fig.update_yaxes(title_text="%" if scale == 100 else rows[0].unit, rangemode="tozero")
    return fig


def say_private(report: Report) -> str:
    """The sentence beside the private study."""
    parts = []
    for model in report.models():
        quality = report.get(model=model, metric="tokens_right")
        whole = report.get(model=model, metric="exact_match").value
        told = f"{model}: {quality.value:.0%} of the answers' tokens right, {whole:.0%} of whole answers"
        attack = report.where(model=model, metric="auc odd ones").rows
        parts.append(told + (f", odd examples told from unseen ones with AUC {attack[0].text(2)}" if attack else ""))
    return "; ".join(parts) + ". An AUC of 0.5 is chance."


def say_federated(report: Report) -> str:
    """The sentence beside the federated study."""

    def share(model: str) -> str:
        row = report.get(model=model, metric="exact_match")
        return row.text(2) + (" (one seed)" if row.note.startswith("1 seeds") else "")

    def value(model: str) -> float:
        return report.get(model=model, metric="exact_match").value

    def against(own: str, averaged: str) -> str:
        """What averaging does to a device's own task: over all kinds, each test command is one device's own."""
        change = value(averaged) - value(own)
        return f"costs each device {-change:.2f} of its own task" if change < 0 else f"gives each device {change:.2f} on its own task"

    up = report.get(model="federated", metric="bytes up").value
    return (
        f"Whole answers right over all kinds of command: {share('alone')} for a device alone, {share('federated')} federated, "
        f"{share('pooled')} with all data in one place. On its own kind alone a device has {share('alone, own kind')}: averaging "
        f"{against('alone, own kind', 'federated')}. With A frozen (FFA), whose mean is exact, it has "
        f"{share('alone, A frozen, own kind')} alone and {share('federated, A frozen')} federated: averaging FFA adapters "
        f"{against('alone, A frozen, own kind', 'federated, A frozen')}. "
        f"A device sends {up / 1000:,.0f} kB a round and none of its examples."
    )
