"""Build and serve the page with Gradio.

By default only this machine can open it. It sends nothing to other servers and loads nothing from them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware

from ligerexport.demo import page
from ligerexport.demo.host import Demo
from ligerexport.demo.tabs import HIDDEN, chat_tab, compare_tab, growth_tab, held_tab, html
from ligerexport.errors import UsageError
from ligerexport.versions import warn_if_untried

warn_if_untried("gradio")

POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; base-uri 'self'; form-action 'self'"
)
"""Content security policy: Gradio's own scripts are inline, and other servers are not contacted."""
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def make_page(demo: Demo) -> gr.Blocks:
    """Return the Gradio app."""
    first, second = demo.pair.names
    with gr.Blocks(title=f"{first} and {second}") as blocks:
        html(page.about(demo.pair, demo.threads))
        kept = gr.State(None)
        with gr.Tabs(overflow_behavior="wrap"):
            with gr.Tab("Compare"):
                stops = [compare_tab(demo, kept)]
            if demo.text.chat_template and demo.pair.facts(first)["kind"] in page.RECURRENT:
                with gr.Tab("Chat"):
                    stops.append(chat_tab(demo))
            with gr.Tab("What it still holds"):
                held_tab(demo, kept)
            with gr.Tab("Growth"):
                stops.append(growth_tab(demo))
            with gr.Tab("Model card"):
                html(page.model_card(first, demo.manifest, demo.pair.facts(first)), elem_id="card")

        def end(request: gr.Request) -> None:
            demo.stop(str(request.session_hash))

        def leave(request: gr.Request) -> None:
            end(request)
            demo.talks.forget(str(request.session_hash))

        gr.on([stop.click for stop in stops], end, queue=False, **HIDDEN)
        blocks.unload(leave)
    return blocks


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
        body_text_color_subdued="*neutral_600", body_text_color_subdued_dark="*neutral_300",
        input_placeholder_color="*neutral_600", input_placeholder_color_dark="*neutral_300",
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
