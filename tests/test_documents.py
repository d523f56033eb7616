"""Figures in documents come from the results, and the files that documents name exist."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import toy

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def test_tables_are_those_of_the_results() -> None:
    command = [sys.executable, "benchmarks/report.py", "--check"]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip() == "up to date"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)", document.read_text()):
        if "://" not in target:
            assert (document.parent / target).exists(), target


def test_sessions_guide_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All of its Python, from the first line to the last."""
    toy.build(tmp_path / "engine")
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "guides" / "sessions.md").read_text()
    exec("\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL)), {})
    assert "[11  8  0  0]" in capsys.readouterr().out
    assert (tmp_path / "text.cache").is_file()
