"""The demo without a browser: questions, turns and stops, measured figures, and the text of the page."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import toy

import ligerexport as lx
from ligerexport.artifact.artifact import open_artifact
from ligerexport.cli import main
from ligerexport.console import format_bytes
from ligerexport.demo import page
from ligerexport.demo.chart import Line, chart, nice_ceiling, thin
from ligerexport.demo.compare import Pair, Stream, same_text
from ligerexport.demo.host import Demo, read_result
from ligerexport.demo.kept import Kept, kept_of, marked
from ligerexport.demo.prompts import CHAT, MOST, PASSKEY, SUMMARISE, ask, filler, filler_ids
from ligerexport.demo.sweep import POINTS, TIMED, sweep
from ligerexport.demo.talk import ANSWER
from ligerexport.errors import LigerError, UsageError
from ligerexport.measure.bench.bench import bench, quantile
from ligerexport.measure.bench.settings import Settings
from ligerexport.measure.bench.worker import Worker
from ligerexport.run.generate import Conversation
from ligerexport.run.runtime import Session
from ligerexport.run.sampling import Sampler
from ligerexport.text.tokenizer import TextModel


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy.build(tmp_path_factory.mktemp("demo") / "left")


@pytest.fixture(scope="module")
def demo(artifact: Path) -> Iterator[Demo]:
    """The toy and a copy of it under another name: the answers are known, and no worker needs torch."""
    made = Demo(str(artifact), str(toy.build(artifact.parent / "right")), threads=1)
    yield made
    made.close()


@pytest.fixture(scope="module")
def text(artifact: Path) -> TextModel:
    return TextModel(artifact)


def answers(pair: Pair, session: str, ids: tuple[int, ...], text: TextModel, most: int = 12) -> tuple[Stream, Stream]:
    *_, last = pair.race(session, ids, text, most, threading.Event())
    return last


def test_questions(text: TextModel) -> None:
    plain = ask(text, CHAT.name, "hello", 0).ids
    assert text.decode(plain) == "hello\n" and plain[0] == toy.USER
    behind = ask(text, CHAT.name, "hello", 700).ids
    assert len(behind) == len(plain) + 700 + len("\n\n")
    assert text.decode(behind).startswith(filler()[:700] + "\n\nhello")
    assert len(text.encode(filler(), special=False)) > MOST
    typed = "</s>[[the text]]"
    for context in (0, 10):
        ids = ask(text, CHAT.name, typed, context).ids
        assert text.decode(ids).endswith(f"{typed}\n") and toy.EOS not in ids
    with pytest.raises(UsageError, match="no question"):
        ask(text, CHAT.name, "  ", 0)
    with pytest.raises(UsageError, match="no text above"):
        ask(text, SUMMARISE.name, SUMMARISE.prompt, 0)


@pytest.mark.parametrize("depth", [0.0, 0.25, 1.0])
def test_a_pass_key_is_said_once_at_its_depth(text: TextModel, depth: float) -> None:
    question = ask(text, PASSKEY.name, "", 400, depth)
    assert question.key is not None and question.ids[0] == toy.BOS
    said = text.decode(question.ids)
    assert said.count(question.key) == 1 and said.index(f"pass key is {question.key}.") > depth * 400
    assert said[: int(depth * 400)] == filler()[: int(depth * 400)]
    assert said.rstrip().endswith("What is the secret pass key? The secret pass key is")


def test_both_answer_as_they_do_alone(demo: Demo, artifact: Path, text: TextModel) -> None:
    ids = ask(text, CHAT.name, "a question", 100).ids
    expected = list(lx.generate(lx.load(artifact), ids, max_new_tokens=12))
    manifest = open_artifact(artifact).manifest
    for stream in answers(demo.pair, "one", ids, text):
        assert stream.text == "".join(chunk.text for chunk in expected)
        assert stream.finish == expected[-1].finish and stream.written == len(expected)
        assert stream.first is not None and stream.first <= stream.clock
        assert len(stream.latencies) == stream.written - 1 and min(stream.latencies) > 0
        for seen, state, resident, device in stream.memory:
            assert state == manifest.bytes.state_per_sequence + seen * manifest.growth
            assert resident > 0 and device is None
        assert stream.memory[-1][0] == len(ids) + stream.written - 1


def test_what_is_held_and_what_was_forgotten(demo: Demo, text: TextModel) -> None:
    """The toy holds the last tokens and no others; shades are shares of heads, and text is no markup."""
    ids = ask(text, CHAT.name, "<b>a question</b>", 100).ids
    stream, _ = answers(demo.pair, "held", ids, text)
    assert demo.manifest is not None
    kept = kept_of(stream, text, demo.manifest)
    assert kept is not None and len(kept.pieces) == stream.seen
    assert "".join(kept.pieces).startswith(text.decode(ids)[:50])
    assert stream.held == [[positions.tolist() for positions in heads] for heads in reread(demo, ids, stream).held()]
    html = marked(kept, 0, 0)
    assert "<b>" not in html and "&lt;b&gt;" in html
    assert "It is unknown" in html and "keeps nothing" in html
    evicts = replace(demo.manifest, liger={"recurrence": "evicted", "attention_weight": 1.0})
    unmetered = kept_of(stream, text, evicts)
    assert "without <code>--meter</code>" in marked(unmetered, 1, 0)
    two = Kept(["one ", "two ", "three ", "four"], [[[0, 3], [3]], [[3], [1, 3]]], [[0.1, 0.3], [0.3, 0.5]])
    assert two.heads == 2
    assert '<mark class="lx-held2">one two </mark>three <mark class="lx-held5">four</mark>' in marked(two, 0, 0)
    assert "one <mark" in marked(two, 2, 2) and "This head, one of 4, still holds 2 of 4 tokens" in marked(two, 2, 2)
    for layer, share, last in ((0, "30.0%", "40%"), (1, "20.0%", "30%"), (2, "40.0%", "50%")):
        assert f"At least {share}" in marked(two, layer, 0) and f": {last} at 2" in marked(two, layer, 0)
    assert kept_of(Stream("x", {}, ()), text, demo.manifest) is None and "Ask a question" in marked(None, 0, 0)


def reread(demo: Demo, ids: Sequence[int], stream: Stream) -> Session:
    """Return a session that has read what the model of a stream has seen."""
    session = lx.load(demo.talks._path)
    session.prefill([*ids, *stream.ids][: stream.seen])
    return session


def test_two_users_do_not_mix(demo: Demo, text: TextModel) -> None:
    questions = [ask(text, CHAT.name, "first", 0).ids, ask(text, CHAT.name, "another one", 130).ids]
    alone = [answers(demo.pair, f"alone {i}", ids, text)[0].text for i, ids in enumerate(questions)]
    races = [demo.pair.race(f"both {i}", ids, text, 12, threading.Event()) for i, ids in enumerate(questions)]
    together = ["", ""]
    while races:
        for i, race in reversed(list(enumerate(races))):
            streams = next(race, None)
            if streams is None:
                races.pop(i)
            else:
                together[questions.index(tuple(streams[0].prompt))] = streams[0].text
    assert together == alone and alone[0] != alone[1]


def test_the_one_that_computed_less_has_the_next_turn(
    demo: Demo, text: TextModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = demo.pair.names
    turns: list[str] = []

    def work(name: str, do: str, session: str, **arguments: Any) -> dict[str, Any]:
        if do in ("held", "warm"):
            return {"held": None}
        turns.append(name)
        seconds = 1 / 64 if name == ours else 8 / 64
        memory = {"state_bytes": 1, "rss": 1, "device": None, "forgotten": [0.25] if name == ours else None}
        if do == "prefill":
            return {"tokens": [65], "seconds": seconds} | memory
        return {"tokens": [[65]], "seconds": [seconds]} | memory

    monkeypatch.setattr(demo.pair, "work", work)
    first, second = answers(demo.pair, "turns", (1, 2), text, most=18)
    assert turns[:20] == [ours, theirs, *[ours] * 8, theirs, *[ours] * 8, theirs]
    assert turns.count(ours) == turns.count(theirs) == 18
    assert (first.clock, second.clock) == (18 / 64, 18 * 8 / 64)
    assert first.forgotten == [[0.25]] * 18 and second.forgotten == []


def test_a_stop_ends_both_and_leaves_the_workers(demo: Demo, text: TextModel) -> None:
    stop = threading.Event()
    race = demo.pair.race("stopped", ask(text, CHAT.name, "q", MOST).ids, text, 50, stop)
    next(race)
    stop.set()
    (streams,) = race
    assert [stream.finish for stream in streams] == ["stopped", "stopped"]
    assert all(stream.written == 0 for stream in streams)
    assert answers(demo.pair, "after", ask(text, CHAT.name, "q", 0).ids, text)[1].written


def began(demo: Demo, what: str, session: str) -> Iterator[Any]:
    changes = demo.run(CHAT.name, "q", MOST, 50, 512, [], session) if what == "run" else demo.measure(MOST, session)
    next(changes)
    return changes


@pytest.mark.parametrize("begun", [("run", "measure"), ("measure", "run"), ("measure", "measure"), ("run", "run")])
def test_a_stop_ends_all_that_its_page_has_under_way(demo: Demo, begun: tuple[str, str]) -> None:
    ends = [began(demo, what, "page") for what in begun]
    with ThreadPoolExecutor() as pool:
        lasts = [pool.submit(lambda changes: list(changes)[-1], changes) for changes in ends]
        other = pool.submit(list, demo.run(CHAT.name, "q", 0, 50, 4, [], "another page"))
        demo.stop("page")
        for last in lasts:
            assert "Stopped" in str(last.result())
        assert "Finished" in other.result()[-1]["status"]
    assert not demo._stops


def test_a_page_that_goes_at_once_and_a_demo_that_ends(demo: Demo, monkeypatch: pytest.MonkeyPatch) -> None:
    for what in ("run", "measure"):
        began(demo, what, "page").close()
        assert not demo._stops
    monkeypatch.setattr(demo.pair, "close", lambda: None)
    changes = [began(demo, what, what) for what in ("run", "measure")]
    demo.close()
    assert all("Stopped" in str(list(rest)[-1]) for rest in changes)


def test_a_dead_process_is_a_message_and_is_started_again(demo: Demo) -> None:
    demo.pair._workers[demo.pair.names[1]]._process.kill()
    demo.pair._workers[demo.pair.names[1]]._process.wait()
    changes = list(demo.run(CHAT.name, "q", 0, 50, 4, [], "page"))
    assert changes[0]["busy"] and not changes[-1]["busy"] and "Finished" in changes[-1]["status"]


def test_a_side_that_fails_leaves_the_other(demo: Demo, monkeypatch: pytest.MonkeyPatch) -> None:
    race = demo.pair.race("x", (1, 2, 3), demo.text, 50, threading.Event())
    next(race)
    demo.pair._workers[demo.pair.names[0]]._process.kill()
    monkeypatch.setitem(demo.pair._options, "threads", 0)  # so that it does not start again
    *_, (failed, whole) = race
    assert failed.finish == "failed" and failed.error and whole.finish in ("length", "eos") and whole.error is None
    *_, drawn, last = demo.run(CHAT.name, "q", 0, 50, 4, [], "page")
    assert 'role="alert"' in last["status"] and not last["busy"]
    assert "failed" in drawn["runs"] and drawn["kept"] is None
    monkeypatch.undo()
    assert "Finished" in list(demo.run(CHAT.name, "q", 0, 50, 4, [], "page"))[-1]["status"]


def test_a_text_without_room_is_refused_before_it_is_read(demo: Demo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(demo.pair.facts(demo.pair.names[1]), "room", 70)
    for context, read in ((200, False), (50, True)):
        changes = list(demo.run(CHAT.name, "q", context, 50, 40, [], "page"))
        card = [change["theirs"] for change in changes if "theirs" in change][-1]
        assert "has room for 70" in changes[-1]["status"] and 'data-finish="failed"' in card
        assert ('data-seen="70"' in card) is read and ('data-seen="0"' in card) is not read
        assert any('data-finish="length"' in change.get("ours", "") for change in changes)


def test_mistakes_are_messages(demo: Demo) -> None:
    changes = list(demo.run(CHAT.name, " ", 0, 50, 4, [], "page"))
    assert "There is no question" in changes[-1]["status"] and 'role="alert"' in changes[-1]["status"]
    assert not demo._stops


def test_curves_fill_while_both_read(demo: Demo, text: TextModel, artifact: Path) -> None:
    """A model that fails ends only its own curve, and a stop keeps what was measured."""
    shown = list(demo.measure(64, "page"))
    assert shown[-1][0].count(f'data-points="{2 * POINTS}"') == 2 and "Measured" in shown[-1][1]
    assert 'data-points="0"' in shown[0][0] and "0 of 64 tokens" in shown[0][1]
    state = open_artifact(artifact).manifest
    ids, stop = filler_ids(text, 64), threading.Event()
    *_, found = sweep(demo.pair, "sweep", ids, stop)
    for curve in found.curves:
        assert [at for at, _ in curve.time] == [4 * (i + 1) for i in range(POINTS)]
        read = [at + (1 + TIMED) * (i + 1) for i, (at, _) in enumerate(curve.time)]
        assert [size for _, size in curve.memory] == [
            state.bytes.state_per_sequence + count * state.growth for count in read
        ]
    for found in sweep(demo.pair, "half", ids, stop):
        if found.done > 0.5:
            stop.set()
    assert found.stopped and found.done == 36 / 64 and len(found.curves[0].time) == 8

    demo.pair._workers[demo.pair.names[1]]._process.kill()
    demo.pair._options["threads"] = 0  # so that it does not start again
    *_, found = sweep(demo.pair, "dead", ids, threading.Event())
    demo.pair._options["threads"] = 1
    assert found.curves[1].error and not found.curves[1].time and len(found.curves[0].time) == POINTS
    assert "ends early" in page.growth(found)


def test_a_chat_goes_on_where_it_stopped(demo: Demo, artifact: Path) -> None:
    """Turns, sampling and the system prompt are those of `Conversation`; the memory stays what it is."""
    talk = Conversation(lx.load(artifact), Sampler(0.0), system="be short", max_new_tokens=ANSWER)
    for said in ("hello", "and again"):
        expected = "".join(chunk.text for chunk in talk.say(said))
        *changes, last = demo.chat(said, "be short", 0.0, 1.0, "chat")
        assert changes[-1]["answer"] == expected and not last["busy"]
    made = demo.talks._talks["chat"]
    assert made.memory[-1] == (talk.position, talk.state_bytes)
    assert format_bytes(talk.state_bytes) in changes[-1]["memory"]

    changes = demo.chat("stop me", "", 1.5, 0.5, "chat")
    while "answer" not in next(changes):
        pass
    demo.stop("chat")
    assert "Stopped" in list(changes)[-1]["status"] and (made.sampler.temperature, made.sampler.top_p) == (1.5, 0.5)
    assert list(demo.chat("go on", "", 0.0, 1.0, "chat"))[-2]["answer"]
    demo.talks.forget("chat")
    assert not demo.talks._talks and not demo._stops


def test_the_command_serves_until_it_is_interrupted(artifact: Path) -> None:
    pytest.importorskip("gradio")
    words = ["demo", str(artifact), "--against", str(artifact), "--json", "--threads", "1"]
    with subprocess.Popen(
        [sys.executable, "-m", "ligerexport", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        address = json.loads(process.stdout.readline())["address"]
        assert address.startswith("http://127.0.0.1:")
        with urllib.request.urlopen(address) as page:
            assert b"gradio" in page.read()
        process.send_signal(signal.SIGINT)
        rest, said = process.communicate()
    assert process.returncode == 130 and rest == ""
    assert "serving" in said and "Traceback" not in said


def test_without_gradio_the_command_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "ligerexport.demo.app", raising=False)
    with pytest.raises(SystemExit, match="4"):
        main(["demo", "x", "--against", "y"])
    assert "pip install 'ligerexport[demo]'" in capfd.readouterr().err


def test_wrong_words_are_answered_before_models_load(
    tmp_path: Path, artifact: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("gradio")
    for words, said in (
        ([tmp_path, "--against", artifact], f"{tmp_path} holds no model"),
        ([artifact, "--against", tmp_path], f"{tmp_path} holds no model"),
        ([artifact, "--against", artifact, "--port", 70_000], "--port 70000 is out of range"),
    ):
        with pytest.raises(SystemExit):
            main(["demo", *map(str, words)])
        error, hint = capfd.readouterr().err.strip().splitlines()[-2:]
        assert error.startswith(f"error: {said}") and hint.startswith("hint: give ")


def test_runs_add_up_and_say_what_was_recalled(demo: Demo) -> None:
    changes = list(demo.run(PASSKEY.name, "", 20, 50, 3, [["earlier"]], "page"))
    rows = next(change["rows"] for change in changes if "rows" in change)
    assert rows[0] == ["earlier"] and len(rows) == 2
    assert all("recalled" in rows[1][column] for column in (2, 4))
    stream = Stream("m", demo.pair.facts(demo.pair.names[0]), (1,), text=" 1 2345.", finish="eos")
    assert "✓ It recalled 12345" in page.card(stream, "ours", "12345")
    assert "✗ It did not recall 54321" in page.card(stream, "ours", "54321")


def test_what_models_write_is_no_markup(demo: Demo) -> None:
    facts = demo.pair.facts(demo.pair.names[0])
    html = page.card(Stream("<b>", facts, (1,), text="<script>alert(1)</script>"), "ours")
    assert "<script>" not in html and "&lt;script&gt;" in html and "&lt;b&gt;" in html
    assert "<i>" not in page.table(("<i>",), [["<i>"]]) and "<i>" not in page.status(LigerError("<i>", hint="<i>"))


def test_the_model_card_is_the_manifest(artifact: Path, demo: Demo) -> None:
    manifest = open_artifact(artifact).manifest
    html = page.model_card("toy", manifest, demo.pair.facts(demo.pair.names[0]))
    assert "4,144 parameters" in html and "48 B at any length" in html and "passed" in html
    assert "vocab size" in page.model_card("toy", None, demo.pair.facts(demo.pair.names[0]))


def test_charts() -> None:
    assert [nice_ceiling(value) for value in (0, 0.7, 1, 1.1, 30, 7.58e6)] == [1, 0.8, 1, 2, 40, 8e6]
    assert len(thin([(i, i) for i in range(10_000)])) <= 161 and thin([(0, 0), (1, 1)])[-1] == (1, 1)
    svg = chart("Title", "x", [Line("a", "ours", [(0, 1.0), (10, 2.0)]), Line("b", "theirs", [])], str, (0, 10))
    assert 'data-points="2"' in svg and "<circle" in svg and 'aria-label="Title. a: 2.0 at 10"' in svg


def test_models_must_share_a_tokenizer(text: TextModel, tmp_path: Path) -> None:
    other = toy.tokenizer()
    other.add_special_tokens(["<more>"])
    other.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(LigerError, match="different tokenizers"):
        same_text(text, TextModel(tmp_path))


def test_figures_are_those_of_bench(
    demo: Demo, artifact: Path, text: TextModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both show measurements of the same workers."""
    answered: list[tuple[str, dict[str, Any]]] = []
    call = Worker.__call__

    def record(worker: Worker, do: str, session: str = "", **arguments: Any) -> dict[str, Any]:
        answered.append((do, call(worker, do, session, **arguments)))
        return answered[-1][1]

    def decoded(part: slice) -> list[float]:
        """Return the milliseconds of one of the two models, which take turns."""
        turns = [answer["seconds"] for do, answer in answered if do == "decode"][part]
        return [1e3 * seconds for turn in turns for seconds in turn]

    monkeypatch.setattr(Worker, "__call__", record)
    settings = Settings((60,), blocks=4, tokens=16, threads=1)
    result = bench(str(artifact), str(artifact), settings=settings)
    row = result["rows"][0]
    assert row["ms_p50"] == quantile(sorted(decoded(slice(2, None, 2))), 0.5)  # each model's first block warms up
    answered.clear()
    first, second = answers(demo.pair, "bench", tuple(range(60)), text, 5 * 16 + 1)
    assert first.written == 5 * 16 + 1, "the answer must be as long as what bench timed"
    assert sorted(first.latencies + second.latencies) == sorted(decoded(slice(None)))
    assert first.memory[-1][1] == row["state_bytes"]
    assert first.memory[-1][2] == pytest.approx(row["rss"], rel=0.2)
    (tmp_path / "bench.json").write_text(json.dumps(result))
    assert f"{row['ms_p50']:.1f} ms" in page.measured(read_result(tmp_path))
    (tmp_path / "bench.json").write_text("{}")
    with pytest.raises(UsageError, match="not a result of bench"):
        read_result(tmp_path)
