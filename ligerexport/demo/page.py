"""Render the page's content as HTML: two cards, charts, the runs so far, the text asked, the model card, tables.

All text from models and files is escaped. The style sheet fixes heights, so that nothing moves while text arrives.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from ligerexport.artifact.artifact import Manifest
from ligerexport.console import format_bytes
from ligerexport.demo.chart import Line, chart, legend
from ligerexport.demo.compare import Pair, Stream
from ligerexport.demo.sweep import Sweep
from ligerexport.errors import LigerError
from ligerexport.measure.bench.report import COLUMNS, cells

STYLES = ("ours", "theirs")
EMPTY = "-"
RECURRENT = ("artifact", "converted")
"""Kinds of models with a state."""
PAPER = '<a href="https://arxiv.org/abs/2503.01496" rel="noreferrer" target="_blank">Liger</a>'


def card(stream: Stream, style: str, key: str | None = None) -> str:
    """Return the figures and the text of one model.

    Args:
        stream: The model's answer so far.
        style: Row of `STYLES`.
        key: The pass key that the model is asked for.
    """
    facts = stream.facts
    memory = "state" if facts["kind"] in RECURRENT else "KV cache"
    shown = stream.median if stream.finish else stream.now
    _, state, resident, device = stream.memory[-1] if stream.memory else (0, None, None, None)
    figures = (
        ("time per token", *_figure(f"{shown:.1f} ms" if shown else None)),
        ("tokens per second", *_figure(f"{1e3 / shown:.1f}" if shown else None)),
        (memory, *_figure(None if state is None else format_bytes(state))),
    )
    rows = "".join(f"<div><dt>{what}</dt><dd>{value}<small>{unit}</small></dd></div>" for what, value, unit in figures)
    return (
        f'<section class="lx-card lx-{style}" aria-label="{escape(stream.name)}" data-state="{state or 0}" '
        f'data-resident="{resident or 0}" data-ms="{stream.median or 0:.4f}" data-seen="{stream.seen}" '
        f'data-finish="{stream.finish or ""}">'
        f"<header>{_shape(style)} <strong>{escape(stream.name)}</strong>"
        f'<span class="lx-kind">Memory: a {memory} {"that grows" if facts["grows"] else "of constant size"}<br>'
        f"Weights: {escape(facts['precision'])}, in {escape(facts['runtime'])}</span>"
        f"</header><dl>{rows}</dl>"
        f'<p class="lx-line"><span>{_process(stream, resident, device)}</span></p>'
        f'<div class="lx-text" tabindex="0" role="region" aria-label="Answer of {escape(stream.name)}">'
        f"<div>{_text(stream)}</div></div>"
        f'<p class="lx-line">{_progress(stream)}{_recalled(stream, key)}</p></section>'
    )


def about(pair: Pair, threads: int) -> str:
    """Return the title and the sentences that say what is compared, why, and how the models differ otherwise."""
    first, second = (pair.facts(name) for name in pair.names)
    ours, theirs = (f"<b>{escape(name)}</b>" for name in pair.names)
    if second["grows"] and not first["grows"]:
        title = "Constant memory beside a growing one"
        what = (f"{ours} has a memory of constant size, its state ({PAPER}). {theirs} is a Transformer and keeps every "
                "token in a growing memory, its KV cache. Ask both about a long text, and see what a token costs and "
                "what is remembered.")  # fmt: skip
    else:
        title, what = "Two models, one question", f"{ours} and {theirs} answer the same prompt."
    where = f"{threads} thread{'s' if threads > 1 else ''}" if first["device"] == "cpu" else escape(first["device"])
    fair = f"Each runs alone on {where} while the other waits."
    return f'<div class="lx-head"><h1>{title}</h1><p>{what} {fair}</p></div>'


def _figure(text: str | None) -> tuple[str, str]:
    number, _, unit = (text or EMPTY).partition(" ")
    return number, f" {unit}"


def _text(stream: Stream) -> str:
    """Return the answer so far, and why it failed."""
    if not stream.prompt:
        return '<span class="lx-soft">The answer will appear here.</span>'
    failed = f'<p class="lx-error">{escape(sentences(stream.error))}</p>' if stream.error else ""
    return escape(stream.text.lstrip()) + failed


def _process(stream: Stream, resident: int | None, device: int | None) -> str:
    """Return the memory of the whole process, and the time to the first token."""
    if resident is None:
        return f"Process: {format_bytes(stream.facts['memory']['rss'])} with the model loaded"
    grown = resident - stream.memory[0][2]
    gpu = f", GPU {format_bytes(device)}" if device is not None else ""
    first = "" if stream.first is None else f"<br>First token after {stream.first:.2f} s"
    change = f"{format_bytes(abs(grown))} {'more' if grown >= 0 else 'less'}"
    return f"Process: {format_bytes(resident)} ({change}){gpu}{first}"


def _progress(stream: Stream) -> str:
    if not stream.prompt:
        return ""
    if not stream.finish and stream.read < len(stream.prompt):
        done = f"{stream.read:,} of {len(stream.prompt):,} tokens"
        bar = f'<progress max="{len(stream.prompt)}" value="{stream.read}" aria-label="Tokens read">{done}</progress>'
        return f"Reading {bar} {done}"
    wrote = f"{stream.written:,} token{'' if stream.written == 1 else 's'} after reading {stream.read:,}"
    if not stream.finish:
        return f"Writing: {wrote}"
    how = {"eos": "Finished", "length": "Limit reached", "stopped": "Stopped", "failed": "Failed"}
    return f"{how[stream.finish]}: {wrote}"


def _recalled(stream: Stream, key: str | None) -> str:
    if key is None or stream.finish in (None, "stopped"):
        return ""
    if recalled(stream, key):
        return f' <b class="lx-yes">✓ It recalled {key}.</b>'
    return f' <b class="lx-no">✗ It did not recall {key}.</b>'


def recalled(stream: Stream, key: str) -> bool:
    """Return whether the answer contains the key."""
    return key in stream.text.replace(" ", "")


def plots(streams: Sequence[Stream], most: int) -> str:
    """Return both charts, latency by token and memory by context, with a legend."""
    latency = [
        Line(s.name, style, [(i + 2, ms) for i, ms in enumerate(s.latencies)])
        for s, style in zip(streams, STYLES, strict=True)
    ]
    memory = [
        Line(s.name, style, [(seen, state) for seen, state, _, _ in s.memory])
        for s, style in zip(streams, STYLES, strict=True)
    ]
    longest = max(len(s.prompt) for s in streams) + most
    return _figures(
        chart("Time per token (ms)", "token of the answer", latency, lambda y: f"{y:g}", (1, max(most, 2)))
        + chart("Memory: state or KV cache", "tokens read", memory, format_bytes, (0, max(longest, 1))), latency,
    )  # fmt: skip


def growth(sweep: Sweep) -> str:
    """Return the charts of a measurement: time per token and memory by length of the text."""
    parts = list(zip(sweep.curves, STYLES, strict=True))
    time = [Line(curve.name, style, curve.time) for curve, style in parts]
    memory = [Line(curve.name, style, curve.memory) for curve, style in parts]
    ends = "".join(
        f'<p class="lx-note">The curve of {escape(curve.name)} ends early: {escape(curve.error)}.</p>'
        for curve in sweep.curves
        if curve.error
    )
    return _figures(
        chart("Time per token (ms)", "tokens of text", time, lambda y: f"{y:g}", (0, sweep.longest))
        + chart("Memory: state or KV cache", "tokens of text", memory, format_bytes, (0, sweep.longest)), time,
    ) + ends  # fmt: skip


def grown(sweep: Sweep) -> str:
    """Return the status line of a measurement that has ended: the last point of each curve."""
    if sweep.stopped:
        return status("Stopped.")
    lasts = [
        f"{curve.name} took {curve.time[-1][1]:.1f} ms per token and {format_bytes(int(curve.memory[-1][1]))}"
        f" after {curve.time[-1][0]:,.0f} tokens"
        for curve in sweep.curves
        if curve.time
    ]
    return status(f"Measured: {'; '.join(lasts) or 'nothing'}.")


def measuring(sweep: Sweep) -> str:
    """Return the status line of a measurement that is under way."""
    done = f"{sweep.done * sweep.longest:,.0f} of {sweep.longest:,} tokens measured"
    return (
        f'<p class="lx-status" role="status"><progress max="1" value="{sweep.done:.3f}" aria-label="Measured">{done}'
        f"</progress> {done}</p>"
    )


def memory(name: str, points: Sequence[tuple[float, float]], manifest: Manifest | None) -> str:
    """Return the memory of a conversation, beside what the Transformer's cache would be.

    Args:
        name: Name of the model.
        points: Tokens seen, and bytes of state.
        manifest: Manifest with the size of the Transformer's cache; None if it is unknown.
    """
    seen, state = points[-1] if points else (0, None)
    lines, figures = [Line(name, "ours", points)], [("tokens so far", f"{seen:,.0f}", "ours")]
    figures.append(("state", EMPTY if state is None else format_bytes(int(state)), "ours"))
    if manifest is not None:
        cache = manifest.bytes.kv_per_token
        lines.append(Line("KV cache of the Transformer, calculated", "theirs", [(at, at * cache) for at, _ in points]))
        figures.append(("as a KV cache", format_bytes(int(seen) * cache), "theirs"))
    rows = "".join(f'<div class="lx-{style}"><dt>{what}</dt><dd>{value}</dd></div>' for what, value, style in figures)
    drawn = chart("Memory", "tokens so far", lines, format_bytes, (0, max(256, 2 ** math.ceil(math.log2(seen or 1)))))
    return f'<section class="lx-card lx-ours" aria-label="Memory"><dl>{rows}</dl></section>{_figures(drawn, lines)}'


def _figures(charts: str, lines: Sequence[Line]) -> str:
    return f'<figure class="lx-plots">{legend(lines)}<div>{charts}</div></figure>'


def asked(what: str, text: str, tokens: int, key: str | None = None) -> str:
    """Return a text that both models read, folded away, with the pass key marked."""
    if not tokens:
        return '<p class="lx-note">No text stands before the question.</p>'
    body = escape(text)
    if key is not None:
        body = body.replace(key, f'<mark class="lx-held5">{key}</mark>')
    return (
        f'<details class="lx-asked"><summary>{what} ({tokens:,} tokens)</summary>'
        f'<div class="lx-held" tabindex="0" role="region" aria-label="{what}">{body}</div></details>'
    )


def run_row(streams: Sequence[Stream], key: str | None) -> list[str]:
    """Return a row of the table of runs."""
    row = [f"{len(streams[0].prompt):,}"]
    for stream in streams:
        state = format_bytes(stream.memory[-1][1]) if stream.memory else EMPTY
        row += ["failed" if stream.error else f"{stream.median:.1f} ms" if stream.median else EMPTY, state]
        if key is not None:
            row[-1] += ", recalled" if recalled(stream, key) else ", not recalled"
    return row


def runs(names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return the runs of this page, the newest first."""
    if not rows:
        return '<p class="lx-note">Each answer adds a row here. Change the length of the text and ask again.</p>'
    header = ["tokens read", *(f"{escape(name)}: {what}" for name in names for what in ("time per token", "memory"))]
    return table(header, list(reversed(rows)))


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table that scrolls sideways if it is too wide; cells are escaped."""
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return (
        f'<div class="lx-table" tabindex="0" role="region" aria-label="Table"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def measured(result: Mapping[str, Any] | None) -> str:
    """Return the table of `bench`."""
    if result is None:
        return (
            '<p class="lx-note"><code>ligerexport bench</code> measures longer and with more care. '
            "<code>ligerexport demo --results DIRECTORY</code> shows its table here.</p>"
        )
    machine = result["machine"]
    note = f"{machine['cpu']}, {machine['threads']} threads. {result['command']}"
    return table(COLUMNS, [cells(row) for row in result["rows"]]) + f'<p class="lx-note">{escape(note)}</p>'


def model_card(name: str, manifest: Manifest | None, facts: Mapping[str, Any]) -> str:
    """Return a table of facts from the model's manifest."""
    if manifest is None:
        return table(("fact", name), [[key.replace("_", " "), str(value)] for key, value in facts.items()])
    checked, quality = manifest.verification, manifest.quality or {}
    rows = [
        ("made from", f"{manifest.source.model} ({manifest.source.revision or 'a directory'})"),
        ("licence", manifest.source.license or "not stated"),
        ("family", f"{manifest.family}, {manifest.model.parameters:,} parameters, {manifest.model.layers} layers"),
        ("trained context length", f"{manifest.model.trained_length:,} tokens"),
        ("written for", f"{manifest.target}, lowering {manifest.lowering}, {manifest.precision} weights"),
        ("weights", format_bytes(manifest.bytes.weights)),
        ("state of a sequence", f"{format_bytes(manifest.bytes.state_per_sequence)} at any length"
         + (f", and {format_bytes(manifest.growth)} per token in softmax layers" if manifest.growth else "")),
        ("KV cache of the Transformer", f"{format_bytes(manifest.bytes.kv_per_token)} per token in fp32"),
        ("KV cache larger than the state", f"from {manifest.crossover:,} tokens on" if manifest.crossover else "never"),
        ("training after the conversion", "none" if manifest.recovery is None else "yes"),
        ("compared with PyTorch", f"{checked['tokens']:,} tokens, logits within {checked['max_logit_error']:.1e}"
         if checked.get("tokens") else "passed" if checked.get("passed") else "no"),
        *([("loss by the precision of the weights", f"{quality['nll'] - quality['nll_float32']:+.3f} nats per token")]
          if {"nll", "nll_float32"} <= quality.keys() else []),
        ("written by", f"ligerexport {manifest.ligerexport}"),
    ]  # fmt: skip
    return table(("fact", name), rows)


def status(said: str | LigerError) -> str:
    """Return the status line. Screen readers announce errors at once."""
    if isinstance(said, LigerError):
        return f'<p class="lx-status lx-error" role="alert">{escape(sentences(said))}</p>'
    return f'<p class="lx-status" role="status">{escape(said)}</p>'


def sentences(error: LigerError) -> str:
    """Return what an error says and what to do, as sentences."""
    return " ".join(f"{part[0].upper()}{part[1:].rstrip('.')}." for part in (error.message, error.hint) if part)


def _shape(style: str) -> str:
    return f'<span class="lx-shape" aria-hidden="true">{"●" if style == "ours" else "■"}</span>'
