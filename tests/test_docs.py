"""README, .env.example and CHANGELOG say what the code does, and all of it."""
import argparse
import ast
import os
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

import ailab
import lab_logger

README = (ROOT / "README.md").read_text(encoding="utf-8")
SETTING = r"(?:PROJECT_NAME|DB_PATH|DATASET_ID|(?:AILAB|WANDB|OLLAMA)_[A-Z][A-Z_]*)"


def section(title):
    """The text under a heading of the README."""
    return re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", README, re.M | re.S)[1]


def first_cells(title):
    """The first cell of each row of a section's table, the code spans in it."""
    rows = [line for line in section(title).splitlines() if line.startswith("| `")]
    return [re.findall(r"`([^`]+)`", row.split("|")[1]) for row in rows]


def marked(name):
    """The lines of the block that a `newcomer` comment marks."""
    (body,) = re.findall(rf"^<!-- newcomer: {name} -->\n```bash\n(.*?)^```$", README, re.M | re.S)
    return body.splitlines()


def verbs():
    """Every verb of the command line with its parser."""
    (found,) = [action for action in ailab.build_parser()._actions
                if isinstance(action, argparse._SubParsersAction)]
    return found.choices


def settings_in_code():
    """Every setting whose name stands as a whole string in one of the three modules."""
    found = set()
    for name in ("lab_logger.py", "ailab.py", "agent.py"):
        for node in ast.walk(ast.parse((ROOT / name).read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and re.fullmatch(
                    SETTING, node.value):
                found.add(node.value)
    return found


# --- README -----------------------------------------------------------------------------

def test_the_readme_is_under_200_lines_of_at_most_150_characters():
    lines = README.splitlines()
    assert len(lines) < 200
    prose = [line for line in lines if not line.startswith(("|", "!", "python"))]
    assert max(map(len, prose)) <= 150


@pytest.mark.parametrize("name", ["run", "test"])
def test_a_newcomers_command_is_one_line(name):
    assert len(marked(name)) == 1


def test_the_readme_lists_every_route_and_no_other():
    listed = [tuple(cells[0].split(" ")) for cells in first_cells("HTTP API")]
    assert len(listed) == len(set(listed))
    routes = {(route.method, route.path) for route in ailab.ROUTES}
    assert set(listed) == routes


def test_the_readme_lists_every_verb_and_no_other():
    assert sorted(cells[0] for cells in first_cells("Command line")) == sorted(verbs())


def test_every_verb_says_what_it_does():
    (found,) = [action for action in ailab.build_parser()._actions
                if isinstance(action, argparse._SubParsersAction)]
    assert all(choice.help for choice in found._choices_actions)


def test_every_file_that_the_readme_names_exists():
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", README) if "://" not in link]
    paths = re.findall(r"`((?:examples|tests|static|\.ci)/[\w/.]+)`", README)
    assert links and paths
    assert [name for name in links + paths if not (ROOT / name).exists()] == []


def test_the_readmes_decorator_prints_what_the_readme_shows(tmp_path, db_path):
    (code,) = re.findall(r"^```python\n(.*?)^```$", section("Record a run"), re.M | re.S)
    (tmp_path / "train.py").write_text(code, encoding="utf-8")
    shutil.copy(ROOT / "lab_logger.py", tmp_path)
    for command in (["train.py"], [ROOT / "ailab.py", "runs"]):
        done = subprocess.run([sys.executable, *command], cwd=tmp_path, capture_output=True,
                              text=True, timeout=60)
        assert (done.returncode, done.stderr) == (0, "")
    (shown,) = re.findall(r"^\$ python ailab.py runs\n(.*?)^```$", README, re.M | re.S)
    assert without_ids_and_times(done.stdout) == without_ids_and_times(shown)


def without_ids_and_times(text):
    text = re.sub(r"\b[0-9a-f]{8}\b", "RUN", text)
    return re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d", "TIME", text)


# --- Settings -----------------------------------------------------------------------------

def test_readme_env_example_and_code_name_the_same_settings():
    example = (ROOT / ".env.example").read_text(encoding="utf-8")
    keys = re.findall(r"^([A-Z_]+)=", example, re.M)
    assert len(keys) == len(set(keys))
    documented = {key for cells in first_cells("Settings") for key in cells}
    assert set(keys) == documented == settings_in_code()


def test_every_setting_of_the_example_has_a_comment_above_it():
    blocks = (ROOT / ".env.example").read_text(encoding="utf-8").split("\n\n")
    for block in blocks[1:]:
        assert all(re.match(r"#|[A-Z_]+=", line) for line in block.splitlines())
    uncommented = re.findall(r"\n\n([A-Z_]+)=", "\n\n".join(blocks))
    assert uncommented == []


def test_an_unchanged_copy_of_the_example_changes_no_setting(tmp_path, monkeypatch):
    shutil.copy(ROOT / ".env.example", tmp_path / ".env")
    monkeypatch.chdir(tmp_path)
    for key in settings_in_code():
        monkeypatch.delenv(key, raising=False)
    home = os.path.expanduser("~")
    assert lab_logger.default_db_path() == os.path.join(home, ".ai-lab", "lab.db")
    defaults = {key: value for key, value in lab_logger.read_dotenv()[1].items() if value}
    assert defaults == {"PROJECT_NAME": "ai-lab", "AILAB_HOST": "127.0.0.1", "AILAB_PORT": "8000",
                        "AILAB_LLM": "auto", "OLLAMA_BASE_URL": "http://localhost:11434"}


# --- CHANGELOG ----------------------------------------------------------------------------

def test_the_changelog_opens_with_what_is_unreleased_and_names_the_schema():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.findall(r"^## (.+)$", text, re.M)[0] == "Unreleased"
    assert f"`user_version` {lab_logger.SCHEMA_VERSION}" in text
    assert set(re.findall(r"^### (.+)$", text, re.M)) <= {
        "Added", "Changed", "Fixed", "Removed", "Schema"}
