"""Figures in documents match the results, and the files that documents name exist."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import toy

from ligerexport.run.sampling import CHAT

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
DOCUMENTS += sorted((ROOT / "benchmarks").rglob("*.md"))


def test_tables_are_those_of_the_results() -> None:
    command = [sys.executable, "benchmarks/report.py", "--check"]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip() == "up to date"


def test_pictures_are_those_of_their_script() -> None:
    assert subprocess.run([sys.executable, "benchmarks/drawings.py", "--check"], cwd=ROOT).returncode == 0


def test_readme_is_short() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 150 and sum(line.startswith("|---") for line in lines) <= 3


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)", document.read_text()):
        if "://" not in target:
            assert (document.parent / target).exists(), target


def run_guide(name: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run all Python code of a guide in order, and return the guide."""
    toy.build(place / "engine")
    monkeypatch.chdir(place)
    text = (ROOT / "docs" / "guides" / name).read_text()
    exec("\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL)), {})
    return text


def test_chat_guide_runs_and_names_the_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = run_guide("chat.md", tmp_path, monkeypatch)
    assert all(f"`{name}` {value}" in text for name, value in CHAT.items())


def test_sessions_guide_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_guide("sessions.md", tmp_path, monkeypatch)
    assert "[11  8  0  0]" in capsys.readouterr().out
    assert (tmp_path / "text.cache").is_file()
