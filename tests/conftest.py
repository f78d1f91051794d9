"""Fixtures shared by all tests: a private store, a known lab, a server on a free loopback port.

    db_path   the temporary file that DB_PATH names (made only when something opens it)
    conn      an open connection to it
    lab       that store with the twelve runs of RUNS in it; lab.ids["svm_01"] is a run id
    server    ailab.make_server on port 0, in a thread
    api       api("GET", "/runs") -> (status, headers, JSON; bytes where the answer is not JSON)

A test that wants known runs behind the server asks for both `lab` and `api`.
"""
import http.client
import json
import os
import sys
import threading
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

TRACEBACK = """Traceback (most recent call last):
  File "train.py", line 12, in train
    raise ValueError("learning rate too large")
ValueError: learning rate too large
"""
KnownRun = namedtuple("KnownRun", "name run_id experiment model dataset learning_rate status "
                                  "accuracy val_loss n_epochs duration_s note")
RUNS = [KnownRun(*row) for row in [   # oldest first, one hour apart from 2026-11-01T10:00
    ("lr_0001", "10a1b2c3-0001-4a00-8000-000000000001", "iris_sweep", "logistic_regression", "iris",
     0.001, "finished", 0.80, 0.60, 5, 10.0, None),
    ("lr_001", "21b2c3d4-0002-4a00-8000-000000000002", "iris_sweep", "logistic_regression", "iris",
     0.01, "finished", 0.90, 0.40, 5, 11.0, None),
    ("lr_01", "32c3d4e5-0003-4a00-8000-000000000003", "iris_sweep", "logistic_regression", "iris",
     0.1, "finished", 0.95, 0.20, 5, 12.0, "PUBLISH: best of iris"),
    ("svm_0001", "43d4e5f6-0004-4a00-8000-000000000004", "iris_sweep", "linear_svm", "iris",
     0.001, "finished", 0.78, 0.65, 5, 20.0, None),
    ("svm_001", "54e5f6a7-0005-4a00-8000-000000000005", "iris_sweep", "linear_svm", "iris",
     0.01, "finished", 0.91, 0.35, 5, 21.0, None),
    ("svm_01", "54e5f6a7-0006-4a00-8000-000000000006", "iris_sweep", "linear_svm", "iris",
     0.1, "finished", 0.95, 0.25, 5, 22.0, None),        # shares 9 characters with the one above
    ("perceptron_0001", "76a7b8c9-0007-4a00-8000-000000000007", "digits_sweep", "perceptron",
     "digits", 0.001, "finished", 0.70, 0.80, 5, 30.0, None),
    ("perceptron_001", "87b8c9d0-0008-4a00-8000-000000000008", "digits_sweep", "perceptron",
     "digits", 0.01, "finished", 0.85, 0.50, 5, 31.0, "check: 100% of_it\\now"),
    ("perceptron_01", "98c9d0e1-0009-4a00-8000-000000000009", "digits_sweep", "perceptron",
     "digits", 0.1, "finished", 0.82, 0.55, 5, 32.0, None),
    ("failed", "a9d0e1f2-0010-4a00-8000-000000000010", "iris_sweep", "logistic_regression", "iris",
     10.0, "failed", 0.40, 5.00, 2, 4.0, None),
    ("killed", "bae1f2a3-0011-4a00-8000-000000000011", "digits_sweep", "linear_svm", "digits",
     0.05, "killed", 0.60, 0.90, 3, 6.0, None),
    ("diverged", "cbf2a3b4-0012-4a00-8000-000000000012", "digits_sweep", "perceptron", "digits",
     1.0, "finished", 0.33, float("nan"), 5, 33.0, "BAD: diverged"),
]]


def curve(run: KnownRun) -> list[tuple]:
    """Write a known run's points as (epoch, metric_name, value): lines to its last value."""
    points = []
    for epoch in range(1, run.n_epochs + 1):
        left = run.n_epochs - epoch
        val_loss = round(run.val_loss + 0.1 * left, 3)
        if run.name == "diverged":
            val_loss = {1: 0.9, 2: 1.5}.get(epoch, float("nan"))
        points += [(epoch, "train_loss", round(0.1 + 0.05 * left, 3)),
                   (epoch, "val_loss", val_loss),
                   (epoch, "accuracy", round(run.accuracy - 0.02 * left, 3))]
    return points


def started(index: int, seconds: int = 0) -> str:
    """The time of the known run number `index`, `seconds` later."""
    return f"2026-11-01T{10 + index:02d}:{seconds // 60:02d}:{seconds % 60:02d}.000000Z"


def insert_run(conn, **columns) -> None:
    """Add a row to `runs` by plain SQL, without refreshing anything."""
    marks = ", ".join("?" * len(columns))
    conn.execute(f"INSERT INTO runs ({', '.join(columns)}) VALUES ({marks})",
                 list(columns.values()))


def insert_points(conn, run_id: str, points) -> None:
    """Add (epoch, metric_name, value) rows to `run_metrics` under the spec's columns only."""
    conn.executemany("INSERT INTO run_metrics (run_id, epoch, metric_name, metric_value) "
                     "VALUES (?, ?, ?, ?)", [(run_id, *point) for point in points])


def _insert_known(conn, index: int, run: KnownRun) -> None:
    is_nan = run.val_loss != run.val_loss
    finals = {"accuracy": run.accuracy, "val_loss": "NaN" if is_nan else run.val_loss}
    if run.name == "lr_01":
        finals["f1"] = 0.94                       # returned, never logged, by this run only
    scikit_learn = "1.6.0" if run.model == "perceptron" else "1.5.2"
    params = {"model_name": run.model, "learning_rate": run.learning_rate, "n_epochs": 5,
              "optimizer": {"name": "sgd", "momentum": 0.9 if run.model == "perceptron" else 0.0}}
    insert_run(
        conn, run_id=run.run_id, timestamp=started(index), experiment_name=run.experiment,
        model_name=run.model, task_name="classification", dataset_id=run.dataset,
        command=f"python train.py --model {run.model} --learning_rate {run.learning_rate}",
        git_hash="0123456789abcdef0123456789abcdef01234567",
        git_diff="+lr = 0.1\n" if run.name == "lr_01" else "", python_version="3.11.9",
        pip_freeze=f"numpy==2.1.0\nscikit-learn=={scikit_learn}",
        device_info='{"cpu":"test","n_cpus":2,"gpus":[]}', params_json=json.dumps(params),
        final_metrics_json=json.dumps(finals) if run.status == "finished" else "{}",
        artifacts_json="[]", note=run.note, status=run.status, duration_s=run.duration_s,
        ended_at=started(index, int(run.duration_s)), hostname="testhost", pid=4242, cwd="/nowhere",
        error=TRACEBACK if run.status == "failed" else None)
    insert_points(conn, run.run_id, curve(run))
    conn.execute("UPDATE run_metrics SET step = epoch * 100, timestamp = "
                 "replace(?, ':00.0', ':' || printf('%02d', epoch) || '.0') WHERE run_id = ?",
                 (started(index), run.run_id))


LINES = {"Content-Type": "application/x-ndjson"}


def journal_lines(*records: dict, n_points: int = 0, **columns) -> bytes:
    """Write a journal: its head with these columns of `runs`, n_points of loss, then records."""
    head = {"v": 2, "t": 1_764_000_000.0, "db": "http://127.0.0.1:1", "set": {
        "timestamp": "2025-11-24T16:00:00.000000Z", "status": "running", **columns}}
    points = [{"t": 1_764_000_000.0 + n, "e": n, "m": {"loss": 1 / n}}
              for n in range(1, n_points + 1)]
    return b"".join(json.dumps(record).encode() + b"\n" for record in [head, *points, *records])


@pytest.fixture
def db_path(tmp_path):
    return str(tmp_path / "lab.db")


@pytest.fixture(autouse=True)
def private_surroundings(tmp_path, db_path, monkeypatch):
    """Keep the user's lab, home, settings and .env files out of every test."""
    import lab_logger
    for key in list(os.environ):
        if key.startswith(("AILAB_", "OLLAMA_", "WANDB_")) or key in ("PROJECT_NAME", "DATASET_ID"):
            monkeypatch.delenv(key)
    for folder in ("home", "work"):
        (tmp_path / folder).mkdir()
    monkeypatch.setenv("DB_PATH", db_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("AILAB_LLM", "builtin")
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr(lab_logger, "_warned", set(), raising=False)


@pytest.fixture
def conn(db_path):
    import ailab
    connection = ailab.open_lab(db_path)
    yield connection
    connection.close()


@pytest.fixture
def lab(conn, db_path):
    """A store with RUNS in it: lab.conn, .db_path, .runs by name, .ids (name to run_id), .names."""
    import ailab
    import lab_logger
    with lab_logger.transaction(conn):
        for index, run in enumerate(RUNS):
            _insert_known(conn, index, run)
        ailab.refresh(conn)
    return SimpleNamespace(conn=conn, db_path=db_path, runs={run.name: run for run in RUNS},
                           ids={run.name: run.run_id for run in RUNS},
                           names={run.run_id: run.name for run in RUNS})


@pytest.fixture
def server(db_path):
    """The lab's server, running in a thread; server.server_port is its port."""
    import ailab
    running = ailab.make_server(db_path, "127.0.0.1", 0)
    thread = threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield running
    running.shutdown()
    running.server_close()
    thread.join(5)


@pytest.fixture
def api(server):
    """Ask the server one thing over a connection of its own."""
    def ask(method, path, body=None, headers=None):
        headers = dict(headers or {})
        if isinstance(body, (dict, list)):
            body = json.dumps(body)
            headers.setdefault("Content-Type", "application/json")
        connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
        try:
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            content = answer.read()
        finally:
            connection.close()
        if content and answer.headers.get_content_type() == "application/json" \
                and "Content-Encoding" not in answer.headers:
            content = json.loads(content)
        return answer.status, answer.headers, content
    return ask
