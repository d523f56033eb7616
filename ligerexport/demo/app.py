"""Build and serve the page with Gradio.

By default only this machine can open it. It sends nothing to other servers and loads nothing from them.
"""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware

from ligerexport.demo import page
from ligerexport.demo.host import SHORT, Demo
from ligerexport.demo.kept import marked
from ligerexport.demo.prompts import FIRST, MOST, PASSKEY, PRESETS
from ligerexport.errors import UsageError
from ligerexport.versions import warn_if_untried

warn_if_untried("gradio")

POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; base-uri 'self'; form-action 'self'"
)
"""Content security policy: Gradio's own scripts are inline, and other servers are not contacted."""
LOOPBACK = ("127.0.0.1", "localhost", "::1")
PAPER = '<a href="https://arxiv.org/abs/2503.01496" rel="noreferrer" target="_blank">Liger</a>'
USERS = 8
"""Largest number of concurrent answers."""
HIDDEN: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}


def make_page(demo: Demo) -> gr.Blocks:
    """Return the Gradio app."""
    first, second = demo.pair.names
    grows = demo.pair.facts(second)["kind"] == "transformer"
    title = "A constant memory beside a growing one" if grows else "Two models side by side"
    about = (
        f"<b>{escape(first)}</b> keeps a memory of constant size ({PAPER}), and <b>{escape(second)}</b> is what it is "
        f"compared with. Both answer one prompt, in turns, each in its own process. {page.difference(demo.pair)}"
    )
    with gr.Blocks(title=f"{first} and {second}") as blocks:
        _html(f'<div class="lx-head"><h1>{title}</h1><p>{about}</p></div>')
        kept = gr.State(None)
        with gr.Tab("Live"):
            stop = _live(demo, kept)
        with gr.Tab("What it still holds"):
            _held(kept)
        with gr.Tab("Measured here"):
            measured = _html(page.measured(demo.result), elem_id="measured")
            lengths = " and ".join(f"{tokens:,}" for tokens in SHORT.contexts)
            measure = gr.Button(f"Measure at {lengths} tokens now", elem_id="measure")
            halt = gr.Button("Stop", interactive=False, elem_id="halt")
            progress = _html(page.status(""))
        with gr.Tab("Model card"):
            _html(page.model_card(first, demo.manifest, demo.pair.facts(first)), elem_id="card")

        def end(request: gr.Request) -> None:
            demo.stop(str(request.session_hash))

        def time_both(request: gr.Request) -> Iterator[tuple[Any, ...]]:
            for shown in demo.measure(str(request.session_hash)):
                yield *shown, gr.Button(interactive=True)
            yield *shown, gr.Button(interactive=False)

        gr.on([stop.click, halt.click], end, queue=False, **HIDDEN)
        measure.click(time_both, None, [measured, progress, halt], concurrency_limit=USERS, **HIDDEN)
        blocks.unload(end)
    return blocks


def _held(kept: gr.State) -> None:
    """Make the tab that shows which tokens the first model holds after an answer."""
    with gr.Row():
        layer = gr.Slider(0, 1, 0, step=1, label="Layer", info="0 shows all layers", elem_id="layer", min_width=300)
        head = gr.Slider(0, 1, 0, step=1, label="KV head", info="0 shows all heads", elem_id="head", min_width=300)
    shown = _html(marked(None, 0, 0), elem_id="held")

    def arrived(kept: Any, layer: int, head: int) -> list[Any]:
        layers, heads = (len(kept.held), kept.heads) if kept else (1, 1)
        return [gr.Slider(maximum=layers), gr.Slider(maximum=heads), marked(kept, int(layer), int(head))]

    kept.change(arrived, [kept, layer, head], [layer, head, shown], **HIDDEN)
    gr.on([layer.change, head.change], lambda kept, layer, head: marked(kept, int(layer), int(head)),
          [kept, layer, head], shown, **HIDDEN)  # fmt: skip


def _live(demo: Demo, kept: gr.State) -> gr.Button:
    """Make the tab in which both models answer, and return its stop button; `kept` gets what the first one holds."""
    idle, trained = demo.idle(), demo.pair.facts(demo.pair.names[1])["trained_length"]
    preset = gr.Radio(list(PRESETS), value=FIRST.name, label="Question")
    prompt = gr.Textbox(FIRST.prompt, label="Prompt", lines=2, max_lines=6, elem_id="prompt")
    with gr.Row():
        context = gr.Slider(0, MOST, FIRST.context, step=256, label="Context length (tokens)", elem_id="context",
                            info=f"Both were trained on up to {trained:,}", min_width=300)  # fmt: skip
        most = gr.Slider(4, 512, FIRST.tokens, step=4, label="Answer length (tokens)", elem_id="most",
                         info="Greedy decoding", min_width=300)  # fmt: skip
        depth = gr.Slider(0, 100, 50, step=5, label="Position of the pass key (%)", elem_id="depth",
                          info="0 is the beginning of the text", min_width=300, visible=False)  # fmt: skip
    with gr.Row(elem_classes="lx-actions"):
        run = gr.Button("Run", variant="primary", elem_id="run", scale=0, min_width=140)
        stop = gr.Button("Stop", interactive=False, elem_id="stop", scale=0, min_width=140)
        with gr.Column(min_width=280):
            status = _html(page.status("ready"), elem_id="status")
    with gr.Row():
        with gr.Column(min_width=320):
            ours = _html(idle["ours"], elem_id="ours")
        with gr.Column(min_width=320):
            theirs = _html(idle["theirs"], elem_id="theirs")
    plots = _html(idle["plots"], elem_id="plots")
    runs = _html(page.runs(demo.pair.names, []), elem_id="runs")
    rows = gr.State([])
    parts = {"ours": ours, "theirs": theirs, "plots": plots, "runs": runs, "rows": rows, "status": status, "kept": kept}

    def choose(name: str) -> list[Any]:
        row, asks = PRESETS[name], name == PASSKEY.name
        said = "The page hides a pass key in the text and asks for it." if asks else None
        return [gr.Textbox(row.prompt, interactive=not asks, placeholder=said), row.context, row.tokens,
                gr.Slider(visible=asks)]  # fmt: skip

    def answer(
        preset: str, prompt: str, context: int, depth: int, most: int, rows: Any, request: gr.Request
    ) -> Iterator[dict[Any, Any]]:
        for change in demo.run(preset, prompt, context, depth, most, rows, str(request.session_hash)):
            shown: dict[Any, Any] = {parts[name]: value for name, value in change.items() if name != "busy"}
            if "busy" in change:
                shown |= {run: gr.Button(interactive=not change["busy"]),
                          stop: gr.Button(interactive=change["busy"])}  # fmt: skip
            yield shown

    preset.input(choose, preset, [prompt, context, most, depth], **HIDDEN)
    gr.on([run.click, prompt.submit], answer, [preset, prompt, context, depth, most, rows],
          [*parts.values(), run, stop], concurrency_limit=USERS, **HIDDEN)  # fmt: skip
    return stop


def launch(
    demo: Demo, host: str = "127.0.0.1", port: int | None = None, *, browser: bool = False
) -> tuple[gr.Blocks, str]:
    """Serve the page from a thread; return the Gradio app and the page's address.

    Raises:
        UsageError: The port is in use, or the address is not this machine's.
    """
    middleware = [Middleware(_Headers)]
    if host in LOOPBACK:  # refuse names of other sites that resolve to this machine
        middleware.append(Middleware(TrustedHostMiddleware, allowed_hosts=[*LOOPBACK, "[::1]"]))
    sans, mono = ["system-ui", "-apple-system", "Segoe UI", "sans-serif"], ["ui-monospace", "monospace"]
    theme = gr.themes.Base(primary_hue="zinc", neutral_hue="zinc", font=sans, font_mono=mono).set(
        block_info_text_color="*neutral_600", block_info_text_color_dark="*neutral_300",
        button_primary_background_fill="*neutral_800", button_primary_background_fill_hover="*neutral_700",
        button_primary_background_fill_dark="*neutral_200", button_primary_background_fill_hover_dark="*neutral_100",
        button_primary_text_color="white", button_primary_text_color_dark="*neutral_900",
    )  # fmt: skip
    blocks = make_page(demo)
    try:
        _, address, _ = blocks.launch(
            server_name=host, server_port=port, share=False, quiet=True, show_error=True, inbrowser=browser,
            prevent_thread_lock=True, ssr_mode=False, footer_links=[], run_history=False, enable_monitoring=False,
            app_kwargs={"middleware": middleware, "docs_url": None, "redoc_url": None},
            theme=theme, css_paths=Path(__file__).parent / "style.css",
        )  # fmt: skip
    except OSError as error:
        raise UsageError(f"cannot serve on {host}: {error}", hint="choose another port: --port 7861") from error
    return blocks, address


def _html(value: str, **settings: Any) -> gr.HTML:
    """Return a part of the page whose style is only in `style.css`."""
    return gr.HTML(value, apply_default_css=False, **settings)


class _Headers:
    """Adds the policy to every response, so that a browser loads nothing from other servers."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", POLICY.encode()),
                                      (b"referrer-policy", b"no-referrer")]  # fmt: skip
            await send(message)

        await self._app(scope, receive, with_policy)
