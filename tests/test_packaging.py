"""The wheel: what is in it, and that it serves the dashboard from an environment of its own."""
import os
import re
import signal
import subprocess
import sys
import sysconfig
import time
import urllib.request
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT

import lab_logger

pytestmark = pytest.mark.timeout(180)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from the source distribution as an index would, without going online."""
    place = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-m", "build", "--no-isolation", "--outdir", place, ROOT],
                   check=True, capture_output=True, timeout=120)
    (found,) = place.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory):
    """A virtual environment with the wheel in it.

    Its dependencies are the tests' own packages, which come by a .pth file: that adds their
    site-packages but no editable install in there, so the checkout cannot be imported.
    """
    place = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", place], check=True)
    subprocess.run([sys.executable, "-m", "pip", "--python", place / "bin" / "python", "install",
                    "-q", "--no-deps", "--no-index", wheel], check=True, timeout=120)
    (site_packages,) = place.glob("lib/python*/site-packages")
    (site_packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return place


def clean(db_path):
    """An environment for a process that knows nothing of the checkout."""
    kept = {key: value for key, value in os.environ.items()
            if not re.match(r"PYTHON|AILAB_|VIRTUAL_ENV|OLLAMA_", key)}
    return {**kept, "DB_PATH": db_path, "AILAB_LLM": "builtin"}


def fetch(url):
    with urllib.request.urlopen(url, timeout=10) as answer:
        return answer.headers.get_content_type(), answer.read()


def test_the_wheel_holds_three_modules_the_dashboard_the_licence_and_nothing_else(wheel):
    dashboard = {"ailab_static/" + path.relative_to(ROOT / "static").as_posix()
                 for path in (ROOT / "static").rglob("*") if path.is_file()}
    assert "ailab_static/index.html" in dashboard
    info = f"ai_lab-{lab_logger.__version__}.dist-info"
    metadata = {f"{info}/{name}" for name in (
        "METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE")}
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        assert names == {"ailab.py", "lab_logger.py", "agent.py"} | dashboard | metadata
        assert "MIT License" in archive.read(f"{info}/licenses/LICENSE").decode()


def test_the_wheel_has_the_loggers_version(wheel):
    assert wheel.name == f"ai_lab-{lab_logger.__version__}-py3-none-any.whl"


def test_the_installed_modules_are_the_wheels(environment, tmp_path, db_path):
    code = "import ailab, agent, lab_logger as l; print(ailab.__file__, agent.__file__, l.__file__)"
    found = subprocess.run([environment / "bin" / "python", "-c", code], cwd=tmp_path, check=True,
                           env=clean(db_path), capture_output=True, text=True, timeout=60).stdout
    assert all(Path(path).is_relative_to(environment) for path in found.split())


def test_the_installed_command_serves_the_dashboard_from_anywhere(environment, tmp_path, db_path):
    with open(tmp_path / "log", "w+", encoding="utf-8") as log:
        server = subprocess.Popen([environment / "bin" / "ailab", "serve", "--port", "0"],
                                  cwd=tmp_path, env=clean(db_path), stdout=log, stderr=log)
        try:
            address, deadline = None, time.monotonic() + 30
            while address is None and time.monotonic() < deadline and server.poll() is None:
                time.sleep(0.05)
                address = re.search(r"http://127\.0\.0\.1:\d+", (tmp_path / "log").read_text())
            assert address is not None, (tmp_path / "log").read_text()
            kind, health = fetch(address[0] + "/health")
            assert kind == "application/json" and b'"ok"' in health
            kind, page = fetch(address[0] + "/")
            assert kind == "text/html" and b'src="static/app.js"' in page
            kind, script = fetch(address[0] + "/static/app.js")
            assert kind == "text/javascript"
            assert script == (ROOT / "static" / "app.js").read_bytes()
        finally:
            server.send_signal(signal.SIGINT)
            server.wait(20)
    assert "Traceback" not in (tmp_path / "log").read_text()
