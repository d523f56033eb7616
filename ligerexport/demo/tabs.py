"""The tabs of the page: Gradio's components, and which action of `Demo` fills them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gradio as gr

from ligerexport.demo import page
from ligerexport.demo.host import Demo
from ligerexport.demo.kept import UNKNOWN, marked
from ligerexport.demo.prompts import FIRST, MOST, PASSKEY, PRESETS
from ligerexport.demo.sweep import POINTS, Curve, Sweep

USERS = 8
"""Largest number of concurrent answers."""
HIDDEN: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
SHOW = """(...values) => {
  const narrow = innerWidth < 1000;
  document.querySelector(narrow ? '#status' : '#ours').scrollIntoView({block: narrow ? 'start' : 'nearest'});
  return values;
}"""
"""Brings the answers into view, which are below the question on a phone, under the status line."""
SYSTEM = "You are a helpful assistant."


def html(value: str, **settings: Any) -> gr.HTML:
    """Return a part of the page whose style is only in `style.css`."""
    return gr.HTML(value, apply_default_css=False, **settings)


def _buttons(run: str, name: str, stop: str) -> tuple[gr.Button, gr.Button]:
    """Return a button that starts something and one that stops it."""
    with gr.Row(elem_classes="lx-actions"):
        return (gr.Button(run, variant="primary", elem_id=name, min_width=90),
                gr.Button("Stop", interactive=False, elem_id=stop, min_width=90))  # fmt: skip


def compare_tab(demo: Demo, kept: gr.State) -> gr.Button:
    """Make the tab in which both models answer, and return its stop button; `kept` gets what the first one holds."""
    idle, trained = demo.idle(), demo.pair.facts(demo.pair.names[1])["trained_length"]
    with gr.Row():
        with gr.Column(scale=3, min_width=280):
            preset = gr.Radio(list(PRESETS), value=FIRST.name, label="Example")
            prompt = gr.Textbox(FIRST.prompt, label="Question", lines=2, max_lines=6, elem_id="prompt")
            context = gr.Slider(0, MOST, FIRST.context, step=256, label="Text before it (tokens)", buttons=[],
                                info=f"They trained on up to {trained:,}.", elem_id="context")  # fmt: skip
            depth = gr.Slider(0, 100, 50, step=5, label="Place of the pass key (%)", buttons=[], elem_id="depth",
                              info="0 is the beginning of the text.", visible=False)  # fmt: skip
            most = gr.Slider(4, 512, FIRST.tokens, step=4, label="Answer (tokens)", buttons=[], elem_id="most",
                             info="The likeliest token is taken.")  # fmt: skip
            run, stop = _buttons("Ask both", "run", "stop")
        with gr.Column(scale=9, min_width=640):
            with gr.Row():
                with gr.Column(min_width=300):
                    ours = html(idle["ours"], elem_id="ours")
                with gr.Column(min_width=300):
                    theirs = html(idle["theirs"], elem_id="theirs")
            status = html(page.status("Press “Ask both” to begin."), elem_id="status")
            plots = html(idle["plots"], elem_id="plots")
    asked = html(demo.before(FIRST.context), elem_id="asked")
    runs = html(page.runs(demo.pair.names, []), elem_id="runs")
    parts = {"ours": ours, "theirs": theirs, "plots": plots, "runs": runs, "rows": gr.State([]), "status": status,
             "kept": kept, "asked": asked}  # fmt: skip

    def choose(name: str) -> list[Any]:
        row, asks = PRESETS[name], name == PASSKEY.name
        said = "The page hides a pass key in the text and asks for it." if asks else None
        return [gr.Textbox(row.prompt, interactive=not asks, placeholder=said), row.context, row.tokens,
                gr.Slider(visible=asks), demo.before(row.context)]  # fmt: skip

    def answer(
        preset: str, prompt: str, context: int, depth: int, most: int, rows: Any, request: gr.Request
    ) -> Iterator[dict[Any, Any]]:
        for change in demo.run(preset, prompt, context, depth, most, rows, str(request.session_hash)):
            yield _shown(change, parts, run, stop)

    preset.input(choose, preset, [prompt, context, most, depth, asked], queue=False, **HIDDEN)
    context.change(demo.before, context, asked, trigger_mode="always_last", **HIDDEN)
    gr.on([run.click, prompt.submit], answer, [preset, prompt, context, depth, most, parts["rows"]],
          [*parts.values(), run, stop], concurrency_limit=USERS, js=SHOW, **HIDDEN)  # fmt: skip
    return stop


def _shown(change: dict[str, Any], parts: dict[str, Any], run: gr.Button, stop: gr.Button) -> dict[Any, Any]:
    """Return a change by component, with both buttons."""
    shown: dict[Any, Any] = {parts[name]: value for name, value in change.items() if name != "busy"}
    if "busy" in change:
        shown |= {run: gr.Button(interactive=not change["busy"]), stop: gr.Button(interactive=change["busy"])}
    return shown


def chat_tab(demo: Demo) -> gr.Button:
    """Make the tab for a chat of several turns with the first model, and return its stop button."""
    temperature, top_p = demo.talks.settings
    empty = page.memory(demo.pair.names[0], [], demo.manifest)
    with gr.Row():
        with gr.Column(scale=8, min_width=300):
            turns = gr.Chatbot(label=f"Chat with {demo.pair.names[0]}", height=400, elem_id="turns",
                               placeholder="Write a message. However long the chat gets, the memory keeps its size.",
                               show_label=False, buttons=[])  # fmt: skip
            text = gr.Textbox(label="Message", placeholder="Enter sends it.", lines=1, max_lines=5, elem_id="message")
            send, stop = _buttons("Send", "send", "hush")
            status = html(page.status(""), elem_id="said")
        with gr.Column(scale=4, min_width=280):
            memory = html(empty, elem_id="memory")
            with gr.Accordion("System prompt and sampling", open=False, elem_id="settings"):
                system = gr.Textbox(
                    SYSTEM, label="System prompt", info="The next chat begins with it.", lines=2, elem_id="system"
                )
                heat = gr.Slider(0, 2, temperature, step=0.05, label="Temperature", buttons=[], elem_id="temperature",
                                 info="0 always takes the likeliest token.")  # fmt: skip
                top = gr.Slider(0.05, 1, top_p, step=0.05, label="Top-p", buttons=[], elem_id="top_p",
                                info="1 allows all tokens.")  # fmt: skip
            clear = gr.Button("New chat", elem_id="clear")
    parts = {"turns": turns, "memory": memory, "status": status, "text": text}

    def say(
        text: str, turns: list[Any], system: str, heat: float, top: float, request: gr.Request
    ) -> Iterator[dict[Any, Any]]:
        if not text.strip():
            return
        told = [*turns, {"role": "user", "content": text}, {"role": "assistant", "content": ""}]
        yield {parts["turns"]: told, parts["text"]: ""}
        for change in demo.chat(text, system, heat, top, str(request.session_hash)):
            if "answer" in change:
                told[-1]["content"] = change.pop("answer")
                change["turns"] = told
            yield _shown(change, parts, send, stop)

    def forget(request: gr.Request) -> tuple[Any, ...]:
        demo.stop(str(request.session_hash))
        demo.talks.forget(str(request.session_hash))
        return [], empty, page.status("")

    gr.on([send.click, text.submit], say, [text, turns, system, heat, top], [*parts.values(), send, stop],
          concurrency_limit=USERS, **HIDDEN)  # fmt: skip
    clear.click(forget, None, [turns, memory, status], **HIDDEN)
    return stop


def held_tab(demo: Demo, kept: gr.State) -> None:
    """Make the tab that shows which tokens the first model holds after an answer."""
    with gr.Row(visible=False) as choice:
        layer = gr.Slider(0, 1, 0, step=1, label="Layer", info="0 shows all layers.", elem_id="layer", min_width=300,
                          buttons=[])  # fmt: skip
        head = gr.Slider(0, 1, 0, step=1, label="Head", info="Each head has its own memory; 0 shows all.",
                         elem_id="head", min_width=300, buttons=[])  # fmt: skip
    shown = html(UNKNOWN if demo.manifest is None else marked(None, 0, 0), elem_id="held")

    def arrived(kept: Any, layer: int, head: int) -> list[Any]:
        layers, heads = (len(kept.held), kept.heads) if kept else (1, 1)
        return [gr.Row(visible=kept is not None), gr.Slider(maximum=layers), gr.Slider(maximum=heads),
                marked(kept, int(layer), int(head))]  # fmt: skip

    kept.change(arrived, [kept, layer, head], [choice, layer, head, shown], **HIDDEN)
    gr.on([layer.change, head.change], lambda kept, layer, head: marked(kept, int(layer), int(head)),
          [kept, layer, head], shown, **HIDDEN)  # fmt: skip


def growth_tab(demo: Demo) -> gr.Button:
    """Make the tab that measures both models while a text gets longer, and return its stop button."""
    with gr.Row():
        with gr.Column(scale=3, min_width=280):
            html(f'<p class="lx-note">Both models read the same text. At {POINTS} lengths up to the chosen one, a few '
                 "tokens are timed. The curves fill meanwhile.</p>")  # fmt: skip
            longest = gr.Slider(512, MOST, 4096, step=512, label="Longest text (tokens)", buttons=[], elem_id="longest",
                                info="Long texts take minutes.")  # fmt: skip
            measure, halt = _buttons("Measure", "measure", "halt")
            progress = html(page.status(""), elem_id="progress")
        with gr.Column(scale=9, min_width=640):
            curves = [Curve(name) for name in demo.pair.names]
            growth = html(page.growth(Sweep(4096, curves)), elem_id="growth")
    html(page.measured(demo.result), elem_id="measured")

    def time_both(longest: int, request: gr.Request) -> Iterator[tuple[Any, ...]]:
        for shown in demo.measure(longest, str(request.session_hash)):
            yield *shown, gr.Button(interactive=False), gr.Button(interactive=True)
        yield *shown, gr.Button(interactive=True), gr.Button(interactive=False)

    measure.click(time_both, longest, [growth, progress, measure, halt], concurrency_limit=USERS, **HIDDEN)
    return halt
