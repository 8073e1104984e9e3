"""The demonstration's report: one HTML file, nothing to load from anywhere."""

from __future__ import annotations

import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fedml import __version__

if TYPE_CHECKING:
    from fedml.cli.demo.hospitals import Case
    from fedml.cli.demo.play import Summary

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
       color: #1b1f24; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .35rem .6rem; border-bottom: 1px solid #d8dee4; }
th { font-weight: 600; } code { font-size: .85em; word-break: break-all; }
.note { color: #57606a; font-size: .9rem; } svg { max-width: 100%; height: auto; }
"""


def write(summary: Summary, case: Case, path: Path) -> None:
    """Write the report of a demonstration."""
    parts = [
        f"<h1>{html.escape(case.title)}</h1>",
        f"<p>One coordinator and {len(summary.sites)} sites, each a process of its own, trained "
        f"<b>{html.escape(summary.model)}/{summary.version}</b> over mutual TLS in "
        f"{summary.rounds} rounds. No row left its site. Accuracy on the held-out rows of all "
        f"hospitals: <b>{summary.federated_accuracy:.3f}</b>.</p>",
        _sites(summary),
        f'<p class="note">{html.escape(case.note)}</p>',
        "<h2>Over the rounds</h2>",
        _curves(summary),
        '<p class="note">Left: accuracy on the held-out rows of all hospitals. Diamonds are what '
        "the coordinator learnt, with the noise that keeps those rows private; the line is what "
        "the demonstration, which may read all folders, measured. Right: what the sites' ledgers "
        "had charged to each training row.</p>",
        "<h2>Every model on every hospital's held-out rows</h2>",
        _cross(summary),
        '<p class="note">"Alone" is what a hospital gets from its own rows under the same '
        "privacy. The comparison is made by the demonstration, which may read all folders.</p>",
        _privacy(summary),
        "<h2>The signed release</h2>",
        f"<p>Digest <code>{summary.release}</code>, verified and served by all "
        f"{len(summary.sites)} sites; with the coordinator dead they predicted "
        f"{sum(s.offline_predictions for s in summary.sites)} rows, all as before.</p>",
        f'<p class="note">fedml {__version__}, {summary.seconds:.0f} s.</p>',
    ]
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>'
        f"{html.escape(case.title)}</title><style>{_STYLE}</style></head><body>"
        f"{''.join(parts)}</body></html>"
    )
    path.write_text(page)


def _sites(summary: Summary) -> str:
    head = [
        "site", "rows", "held out", "local only, all held-out rows", "federated, own held-out rows",
        "epsilon spent of budget", "release", "p50 latency",
    ]  # fmt: skip
    rows = [
        [
            s.site, s.rows, s.held_out, f"{s.local_accuracy:.3f}", f"{s.federated_accuracy:.3f}",
            f"{s.epsilon:.2f} of {s.budget:g}", f"{s.version} ({s.release[:8]})",
            f"{s.p50_ms:.1f} ms",
        ]
        for s in summary.sites
    ]  # fmt: skip
    return _table(head, rows)


def _cross(summary: Summary) -> str:
    hospitals = [s.site for s in summary.sites]
    rows = [
        [model, *(f"{scores[site]:.3f}" for site in hospitals)]
        for model, scores in summary.cross_site.items()
    ]
    return _table(["model", *hospitals], rows)


def _privacy(summary: Summary) -> str:
    second = summary.second_run
    refusals = second["refusals"]
    assert isinstance(refusals, dict)
    lines = "".join(
        f"<li>{html.escape(site)}: {html.escape(why)}</li>" for site, why in refusals.items()
    )
    return (
        "<h2>Privacy, and who has the last word</h2>"
        f"<p>Each training row is protected with epsilon {summary.epsilon_asked:g} at delta "
        f"{summary.delta:g} for adding or removing that row, over the whole run, against "
        "everyone who sees what leaves its hospital. A second run went on from version "
        f"{second['parent']}; after {second['rounds']} rounds the sites' own ledgers refused:</p>"
        f"<ul>{lines}</ul>"
    )


def _table(head: Sequence[object], rows: Sequence[Sequence[object]]) -> str:
    top = "".join(f"<th>{html.escape(str(cell))}</th>" for cell in head)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) + "</tr>"
        for row in rows
    )
    return f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"


def _curves(summary: Summary) -> str:
    """Return accuracy and spent epsilon over the rounds, as inline SVG."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    left.plot(*zip(*summary.measured, strict=True), "o-", markersize=3, label="federated")
    if summary.reported:
        left.plot(*zip(*summary.reported, strict=True), "D", color="C0", label="as reported")
    for number, site in enumerate(summary.sites, 1):
        left.axhline(site.local_accuracy, color=f"C{number}", ls=":", label=f"{site.site} alone")
        spent = summary.spent[site.site]
        right.plot(range(1, len(spent) + 1), spent, color=f"C{number}", label=site.site)
    right.axhline(summary.sites[0].budget, color="black", ls="--", label="lifetime budget")
    left.set(xlabel="round", ylabel="accuracy", xlim=(0, None))
    right.set(xlabel="round", ylabel="epsilon spent", xlim=(0, None), ylim=(0, None))
    for axes in (left, right):
        axes.legend(fontsize="small", loc="lower right")
    with io.StringIO() as file:
        figure.savefig(file, format="svg")
        pyplot.close(figure)
        text = file.getvalue()
    return text[text.index("<svg") :]
