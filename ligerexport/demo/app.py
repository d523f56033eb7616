"""The page in Gradio: its parts, what they trigger, and how it is served.

It binds to this machine alone unless asked for more, says nothing to anybody, and loads nothing from elsewhere.
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
from ligerexport.demo.prompts import CHAT, MOST, PASSKEY, PRESETS
from ligerexport.errors import UsageError
from ligerexport.versions import warn_if_untried

warn_if_untried("gradio")

POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; base-uri 'self'; form-action 'self'"
)
"""Gradio's own scripts are inline; from elsewhere nothing is loaded, and nothing is sent there."""
LOOPBACK = ("127.0.0.1", "localhost", "::1")
USERS = 8
"""Answers that may be under way at a time."""
HIDDEN: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}


def make_page(demo: Demo) -> gr.Blocks:
    """Return the Gradio app."""
    idle = demo.idle()
    first, second = demo.pair.names
    trained = demo.pair.facts(second)["trained_length"]
    title = f"{escape(first)} beside {escape(second)}"
    about = "One prompt, two models, each in a process of its own. Figures are measured while the text comes."
    with gr.Blocks(title=f"{first} beside {second}") as blocks:
        _html(f'<div class="lx-head"><h1>{title}</h1><p>{about}</p></div>')
        with gr.Tab("Live"):
            preset = gr.Radio(list(PRESETS), value=CHAT.name, label="Question")
            prompt = gr.Textbox(CHAT.prompt, label="Prompt", lines=2, max_lines=6, elem_id="prompt")
            with gr.Row():
                context = gr.Slider(0, MOST, CHAT.context, step=256, label="Text before it, tokens", elem_id="context",
                                    info=f"They were trained on {trained:,}", min_width=300)  # fmt: skip
                most = gr.Slider(4, 512, CHAT.tokens, step=4, label="Answer, tokens", elem_id="most",
                                 info="Each is the most likely one", min_width=300)  # fmt: skip
                depth = gr.Slider(0, 100, 50, step=5, label="Pass key at, %", elem_id="depth",
                                  info="0 is the beginning", min_width=300, visible=False)  # fmt: skip
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
        with gr.Tab("Measured here"):
            measured = _html(page.measured(demo.result), elem_id="measured")
            lengths = " and ".join(f"{tokens:,}" for tokens in SHORT.contexts)
            measure = gr.Button(f"Measure at {lengths} tokens now", elem_id="measure")
            halt = gr.Button("Stop", interactive=False, elem_id="halt")
            progress = _html(page.status(""))
        with gr.Tab("Model card"):
            _html(page.model_card(first, demo.manifest, demo.pair.facts(first)), elem_id="card")
        rows = gr.State([])
        parts = {"ours": ours, "theirs": theirs, "plots": plots, "runs": runs, "rows": rows, "status": status}

        def choose(name: str) -> list[Any]:
            row, asks = PRESETS[name], name == PASSKEY.name
            said = "the page asks for a pass key that it hid in the text" if asks else None
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

        def end(request: gr.Request) -> None:
            demo.stop(str(request.session_hash))

        def time_both(request: gr.Request) -> Iterator[tuple[Any, ...]]:
            for shown in demo.measure(str(request.session_hash)):
                yield *shown, gr.Button(interactive=True)
            yield *shown, gr.Button(interactive=False)

        preset.input(choose, preset, [prompt, context, most, depth], **HIDDEN)
        gr.on([run.click, prompt.submit], answer, [preset, prompt, context, depth, most, rows],
              [*parts.values(), run, stop], concurrency_limit=USERS, **HIDDEN)  # fmt: skip
        gr.on([stop.click, halt.click], end, queue=False, **HIDDEN)
        measure.click(time_both, None, [measured, progress, halt], concurrency_limit=USERS, **HIDDEN)
        blocks.unload(end)
    return blocks


def launch(
    demo: Demo, host: str = "127.0.0.1", port: int | None = None, *, browser: bool = False
) -> tuple[gr.Blocks, str]:
    """Serve the page from a thread; return the Gradio app and the page's address.

    Raises:
        UsageError: The port is taken, or the host is not this machine's.
    """
    middleware = [Middleware(_Headers)]
    if host in LOOPBACK:  # another site's name that leads here is not meant
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
    """Return a part of the page whose look is `style.css` alone."""
    return gr.HTML(value, apply_default_css=False, **settings)


class _Headers:
    """Adds the policy to every answer, so that a browser loads nothing from elsewhere whatever a page asks for."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", POLICY.encode()),
                                      (b"referrer-policy", b"no-referrer")]  # fmt: skip
            await send(message)

        await self._app(scope, receive, with_policy)
