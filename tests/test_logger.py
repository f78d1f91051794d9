"""The logger as a training script meets it: what is recorded, what never harms training."""

import asyncio
import dataclasses
import inspect
import json
import math
import os
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import NamedTuple

import pytest

import lab_logger
from lab_logger import log, log_artifact, log_run, note, start_run

ROOT = Path(lab_logger.__file__).parent


@pytest.fixture(autouse=True)
def _fresh_warnings():
    lab_logger._warned.clear()


def rows(db_path, sql, *values):
    with sqlite3.connect(db_path) as conn:
        conn.row_factory = sqlite3.Row
        found = [dict(row) for row in conn.execute(sql, values)]
    conn.close()
    return found


def only_run(db_path):
    (run,) = rows(db_path, "SELECT * FROM runs")
    return run


def points(db_path, name):
    return [
        (row["epoch"], row["metric_value"])
        for row in rows(
            db_path,
            "SELECT epoch, metric_value FROM run_metrics WHERE metric_name = ? ORDER BY id",
            name,
        )
    ]


def script(db_path, body, *argv, **env):
    """Run a training script of its own, as a user would; returns the finished process."""
    return subprocess.run(
        [sys.executable, "-c", body, *argv],
        cwd=os.path.dirname(db_path),
        env={**os.environ, "PYTHONPATH": str(ROOT), **env},
        capture_output=True,
        text=True,
        timeout=60,
    )


# --- What is recorded ---------------------------------------------------------


def test_run_when_function_returns_is_in_the_store_whole(db_path):
    @log_run(experiment_name="iris", task_name="classify")
    def train(learning_rate, n_epochs=2, *, model_name="svm", **extra):
        for epoch in range(n_epochs):
            log(epoch=epoch, loss=1 / (epoch + 1))
        return {"accuracy": 0.9, "artifacts": [__file__]}

    result = train(0.1, seed=3)

    run = only_run(db_path)
    assert result == {"accuracy": 0.9, "artifacts": [__file__]}
    assert json.loads(run["params_json"]) == {
        "learning_rate": 0.1,
        "n_epochs": 2,
        "model_name": "svm",
        "seed": 3,
    }
    assert json.loads(run["final_metrics_json"]) == {"accuracy": 0.9}
    assert json.loads(run["artifacts_json"]) == [__file__]
    assert (run["experiment_name"], run["model_name"], run["task_name"]) == (
        "iris",
        "svm",
        "classify",
    )
    assert (run["status"], run["error"], run["note"]) == ("finished", None, None)
    assert run["python_version"] == sys.version.split()[0]
    assert run["ended_at"] >= run["timestamp"] and len(run["timestamp"]) == 27
    assert f"pytest=={pytest.__version__}" in run["pip_freeze"].splitlines()
    assert json.loads(run["device_info"])["n_cpus"] == os.cpu_count()
    assert points(db_path, "loss") == [(0, 1.0), (1, 0.5)]
    assert os.listdir(db_path + ".journals") == []


def test_decorator_in_each_form_leaves_the_function_as_it_was(db_path):
    def plain(a: int, b: str = "x") -> float:
        """Say something."""
        return 0.5

    for decorated in (log_run(plain), log_run()(plain), log_run(experiment_name="e")(plain)):
        assert inspect.signature(decorated) == inspect.signature(plain)
        assert (decorated.__name__, decorated.__doc__) == ("plain", "Say something.")
        assert decorated(1) == 0.5
    assert len(rows(db_path, "SELECT 1 FROM runs")) == 3


@pytest.mark.parametrize("bad", [3, "name", int, classmethod(print)])
def test_decorator_when_given_no_function_says_so_at_once(bad):
    with pytest.raises(TypeError, match="log_run decorates a function"):
        log_run(bad)


def test_decorator_when_given_a_name_that_is_no_text_says_so_at_once():
    with pytest.raises(TypeError, match=r"log_run\(experiment_name=3\): it takes text"):
        log_run(experiment_name=3)


@pytest.mark.parametrize(
    ("result", "finals"),
    [
        ({"acc": 1, "val": {"loss": 0.25}}, {"acc": 1.0, "val/loss": 0.25}),
        (({"acc": 0.5}, "model.bin"), {"acc": 0.5}),
        (0.75, {"result": 0.75}),
        (SimpleNamespace(ndim=0, item=lambda: 0.5), {"result": 0.5}),
        (None, {}),
        ("text", {}),
        (True, {}),
        ([1, 2, 3], {}),
        (object(), {}),
        ({"acc": "high", "flag": True, "n": 10**400}, {"n": "Infinity"}),
        ({"loss": math.nan, "gain": -math.inf}, {"loss": "NaN", "gain": "-Infinity"}),
    ],
)
def test_final_metrics_are_the_numbers_that_were_returned(db_path, result, finals):
    returned = log_run(lambda: result)()
    assert returned is result
    assert json.loads(only_run(db_path)["final_metrics_json"]) == finals


@pytest.mark.parametrize(
    "history", [[{"epoch": 1, "loss": 0.5}, {"epoch": 2, "loss": 0.25}], {"loss": [0.5, 0.25]}]
)
@pytest.mark.parametrize("key", ["history", "epoch_metrics"])
def test_history_when_returned_becomes_points(db_path, key, history):
    log_run(lambda: {key: history})()
    assert points(db_path, "loss") == [(1, 0.5), (2, 0.25)]


def test_history_when_its_metric_was_logged_live_is_not_written_twice(db_path):
    @log_run
    def train():
        log(epoch=1, loss=0.5)
        return {"history": [{"epoch": 1, "loss": 0.5, "f1": 0.9}]}

    train()
    assert points(db_path, "loss") == [(1, 0.5)]
    assert points(db_path, "f1") == [(1, 0.9)]


def test_params_are_stored_as_they_were_at_the_call(db_path):
    @dataclasses.dataclass
    class Config:
        lr: float = 0.1

    @log_run
    def train(layers, config, path, when=print):
        layers.append(3)

    train([1, 2], Config(), Path("data"))
    assert json.loads(only_run(db_path)["params_json"]) == {
        "layers": [1, 2],
        "config": {"lr": 0.1},
        "path": "data",
        "when": "builtins.print",
    }


def repr_or_type(value):
    return type(value).__name__


class Hostile:
    """Raises whatever is done to it."""

    def __getattr__(self, name):
        raise RuntimeError("no attribute for you")

    def __repr__(self):
        raise RuntimeError("no repr for you")


CYCLE: list = [1]
CYCLE.append(CYCLE)
DEEP: list = []
for _ in range(20_000):
    DEEP = [DEEP]


@pytest.mark.parametrize(
    "value",
    [
        Hostile(),
        CYCLE,
        DEEP,
        {1: {2, 3}},
        {(1, 2): 3},
        b"\xff",
        "\ud800",
        "a\0b",
        10**6000,
        math.nan,
        1j,
        object(),
        "x" * 5_000_000,
        list(range(100_000)),
        range(3),
        {"k": math.inf},
    ],
    ids=lambda value: type(value).__name__,
)
def test_param_that_json_cannot_hold_is_stored_as_strict_json_beside_the_others(db_path, value):
    log_run(lambda odd, good: None)(value, 7)

    def refuse(token):
        raise AssertionError(token)

    assert json.loads(only_run(db_path)["params_json"], parse_constant=refuse)["good"] == 7


def test_secrets_never_reach_the_store(db_path):
    secret = "hunter" + "2"  # in two parts: `-c` puts this code into the command
    done = script(
        db_path,
        "from lab_logger import log_run; s = 'hunter' + '2'; log_run(lambda api_key, "
        "config, max_tokens, url: None)(s, {'password': s}, 99, f'https://me:{s}@host/x')",
        "--api-key",
        secret,
        f"--token={secret}",
        f"postgres://u:{secret}@h/db",
        "--max_tokens",
        "5",
    )
    run = only_run(db_path)
    assert done.returncode == 0, done.stderr
    assert not [column for column, value in run.items() if secret in str(value)]
    assert json.loads(run["params_json"])["max_tokens"] == 99
    assert "--api-key *** '--token=***' " in run["command"] and "--max_tokens 5" in run["command"]


@pytest.mark.parametrize(("orig_argv", "argv", "command"), [
    (["python", "-u", "run.py", "--lr", "1"], ["run.py", "--lr", "1"], "python -u run.py --lr 1"),
    (["python", "-m", "pkg.train", "x"], ["/a/pkg/train.py", "x"], "python -m pkg.train x"),
    (["python", "-c", "code"], ["-c"], "python -c code"),
    (["python", "-m", "joblib.loky.popen", "--pipe", "14"], ["sweep.py"], "EXE sweep.py"),
    (["python", "-c", "spawn_main()", "--multiprocessing-fork"], ["a b.py", "3"], "EXE 'a b.py' 3"),
])
def test_command_is_what_was_typed_also_in_a_worker(monkeypatch, orig_argv, argv, command):
    monkeypatch.setattr(sys, "orig_argv", orig_argv)
    monkeypatch.setattr(sys, "argv", argv)
    assert lab_logger.launch_command() == command.replace("EXE", sys.executable)


def test_git_state_holds_hash_and_diff_without_dotenv_files(tmp_path, db_path):
    def git(*args):
        subprocess.run(
            ["git", "-c", "user.name=a", "-c", "user.email=a@b", *args],
            cwd=tmp_path,
            check=True,
            capture_output=True,
        )

    (tmp_path / "model.py").write_text("old = 1\n")
    git("init", "-q")
    git("add", "model.py")
    git("commit", "-qm", "first")
    (tmp_path / "model.py").write_text("new = 2\n")
    (tmp_path / "extra.py").write_text("untracked = 3\n")
    for name in (".env", "prod.env", "id_rsa", "tls.pem", "credentials.json"):
        (tmp_path / name).write_text("API_KEY=hunter2\n")
    (tmp_path / "blob.bin").write_bytes(b"\0\1")
    head = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=tmp_path, capture_output=True, text=True
    )

    done = subprocess.run(
        [sys.executable, "-c", "from lab_logger import log_run; log_run(lambda: 1)()"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=60,
    )

    run = only_run(db_path)
    assert done.returncode == 0
    assert run["git_hash"] == head.stdout.strip()
    assert "-old = 1\n+new = 2\n" in run["git_diff"]
    assert "+++ b/extra.py\n@@ -0,0 +1,1 @@\n+untracked = 3\n" in run["git_diff"]
    assert "hunter2" not in run["git_diff"] and "blob.bin" not in run["git_diff"]


# --- Points -------------------------------------------------------------------


def test_log_takes_mappings_nested_names_and_numbers_of_any_kind(db_path):
    with start_run("e") as run:
        run.log({"val": {"acc": 0.5}, "n": 3, "flag": True}, epoch=1, step=120)
        log(epoch=2, nan=math.nan, up=math.inf, tensor=SimpleNamespace(item=lambda: 0.25))
    found = rows(
        db_path, "SELECT epoch, step, metric_name, metric_value FROM run_metrics ORDER BY id"
    )
    assert [tuple(row.values()) for row in found] == [
        (1, 120, "val/acc", 0.5),
        (1, 120, "n", 3.0),
        (1, 120, "flag", 1.0),
        (2, None, "nan", None),
        (2, None, "up", math.inf),
        (2, None, "tensor", 0.25),
    ]


def test_metric_that_is_no_number_is_left_out_with_one_warning(db_path, capfd):
    with start_run():
        for _ in range(3):
            log(epoch=1, loss="low", good=1)
    assert points(db_path, "loss") == [] and len(points(db_path, "good")) == 3
    assert (
        capfd.readouterr().err == "lab_logger: the metric 'loss' is no number but 'low': left out\n"
    )


@pytest.mark.parametrize("epoch", ["three", 1.5, math.nan, [], 2**63, "3"])
def test_epoch_that_is_no_whole_number_costs_a_warning_and_no_point(db_path, capfd, epoch):
    with start_run():
        log(epoch=epoch, loss=0.5)
    assert points(db_path, "loss") == [(None, 0.5)]
    assert capfd.readouterr().err.startswith("lab_logger: the epoch is no whole number but ")


def test_hostile_metric_names_are_stored_as_text(db_path):
    names = ['a"b', "new\nline", "\ud800", "x" * 10_000, "'; DROP TABLE runs; --", "été"]
    with start_run():
        log(dict.fromkeys(names, 1.0))
    stored = [
        row["metric_name"]
        for row in rows(db_path, "SELECT metric_name FROM run_metrics ORDER BY id")
    ]
    assert stored == [name.encode("utf-8", "backslashreplace").decode() for name in names]


def test_log_outside_of_a_run_says_what_to_do(db_path, capfd):
    log(loss=1)
    assert "call it inside a @log_run function or `with start_run()`" in capfd.readouterr().err


def test_artifact_that_does_not_exist_is_recorded_with_a_warning(
    db_path, capfd, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    with start_run():
        log_artifact("gone.bin")
        log_artifact("s3://bucket/model")
        log_artifact(3)
    gone = str(tmp_path / "gone.bin")
    assert json.loads(only_run(db_path)["artifacts_json"]) == [gone, "s3://bucket/model"]
    err = capfd.readouterr().err
    assert (
        f"the artifact {gone!r} does not exist" in err and "the artifact 3 was not recorded" in err
    )


def test_note_and_result_of_a_with_block_are_stored(db_path):
    with start_run("e", params={"lr": 0.1}) as run:
        note("KEEP: baseline")
        run.result = {"accuracy": 0.5}
    run = only_run(db_path)
    assert (run["note"], run["final_metrics_json"]) == ("KEEP: baseline", '{"accuracy":0.5}')


# --- How a run ends -----------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ValueError("boom"), "failed"),
        (KeyboardInterrupt(), "killed"),
        (SystemExit(0), "finished"),
        (SystemExit(3), "failed"),
        (MemoryError(), "failed"),
        (GeneratorExit(), "finished"),
    ],
)
def test_exception_passes_untouched_and_its_run_says_so(db_path, error, status):
    @log_run
    def train():
        raise error

    with pytest.raises(type(error)) as caught:
        train()
    run = only_run(db_path)
    assert caught.value is error and error.__context__ is None
    assert run["status"] == status
    assert (run["error"] is None) == (status == "finished")
    if run["error"]:
        assert run["error"].startswith("Traceback") and "raise error" in run["error"]
        assert "lab_logger.py" not in run["error"]


def test_call_with_wrong_arguments_raises_its_own_error(db_path):
    @log_run
    def train(a):
        return a

    with pytest.raises(TypeError, match="missing 1 required positional argument: 'a'"):
        train()
    assert only_run(db_path)["status"] == "failed"


def test_generator_keeps_its_protocol_and_its_run_is_current_only_inside(db_path):
    @log_run(experiment_name="outer")
    def outer():
        @log_run(experiment_name="inner")
        def steps():
            got = yield 1
            log(inner=got)
            try:
                yield 2
            except ValueError:
                yield 3
            return 0.5

        generator = steps()
        seen = [next(generator)]
        log(outer=1)
        seen.append(generator.send(7))
        seen.append(generator.throw(ValueError()))
        with pytest.raises(StopIteration) as stop:
            next(generator)
        return {"seen": len(seen), "stop": stop.value.value}

    assert outer() == {"seen": 3, "stop": 0.5}
    by_run = rows(
        db_path,
        "SELECT experiment_name, metric_name, metric_value FROM run_metrics "
        "JOIN runs USING (run_id) ORDER BY metric_name",
    )
    assert [tuple(row.values()) for row in by_run] == [
        ("inner", "inner", 7.0),
        ("outer", "outer", 1.0),
    ]
    inner, outer_run = (
        rows(db_path, "SELECT * FROM runs WHERE experiment_name = ?", name)[0]
        for name in ("inner", "outer")
    )
    assert inner["parent_run_id"] == outer_run["run_id"] and outer_run["parent_run_id"] is None


def test_async_runs_side_by_side_keep_their_points_apart(db_path):
    @log_run
    async def train(seed):
        for epoch in range(3):
            log(epoch=epoch, seed=seed)
            await asyncio.sleep(0)
        return seed

    @log_run(experiment_name="stream")
    async def stream():
        for epoch in range(2):
            log(epoch=epoch, streamed=epoch)
            yield epoch

    async def main():
        return await asyncio.gather(*(train(seed) for seed in range(5))), [
            item async for item in stream()
        ]

    assert asyncio.run(main()) == ([0, 1, 2, 3, 4], [0, 1])
    found = rows(
        db_path,
        "SELECT count(DISTINCT metric_value) AS n, count(*) AS rows FROM run_metrics "
        "WHERE metric_name = 'seed' GROUP BY run_id",
    )
    assert found == [{"n": 1, "rows": 3}] * 5
    assert points(db_path, "streamed") == [(0, 0.0), (1, 1.0)]


def test_threads_keep_their_runs_apart_and_a_helper_thread_finds_the_only_run(db_path):
    @log_run
    def train(seed):
        for epoch in range(20):
            log(epoch=epoch, seed=seed)

    threads = [threading.Thread(target=train, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with start_run("helped"):
        helper = threading.Thread(target=log, kwargs={"helped": 1})
        helper.start()
        helper.join()
    found = rows(
        db_path,
        "SELECT count(DISTINCT metric_value) AS n, count(*) AS rows FROM run_metrics "
        "WHERE metric_name = 'seed' GROUP BY run_id",
    )
    assert found == [{"n": 1, "rows": 20}] * 8
    assert points(db_path, "helped") == [(None, 1.0)]


def test_run_ids_stay_unique_when_seeds_are_equal(db_path):
    import random

    for _ in range(5):
        random.seed(0)
        log_run(lambda: None)()
    ids = {row["run_id"] for row in rows(db_path, "SELECT run_id FROM runs")}
    assert len(ids) == 5 and all(len(run_id) == 36 and run_id[14] == "4" for run_id in ids)


# --- Nobody's training dies ---------------------------------------------------

TRAIN = """
import lab_logger, sys
@lab_logger.log_run
def train():
    for epoch in range(5):
        lab_logger.log(epoch=epoch, loss=0.5)
    return "untouched"
assert train() == "untouched"
print("trained")
"""


def broken_corrupt(db_path):
    Path(db_path).write_bytes(b"this is no database, and it is kept as it is" * 100)


def broken_directory(db_path):
    os.mkdir(db_path)


def broken_foreign_table(db_path):
    with sqlite3.connect(db_path) as conn:
        conn.execute("CREATE TABLE runs (something TEXT)")
    conn.close()


def broken_newer(db_path):
    with sqlite3.connect(db_path) as conn:
        conn.execute("PRAGMA user_version = 99")
    conn.close()


def broken_parent(db_path):
    Path(db_path).parent.joinpath("file").write_text("in the way")


@pytest.mark.parametrize(
    "break_store",
    [broken_corrupt, broken_directory, broken_foreign_table, broken_newer, broken_parent],
)
def test_broken_store_costs_one_warning_and_keeps_the_journal(tmp_path, break_store):
    db_path = str(tmp_path / "lab.db")
    break_store(db_path)
    if break_store is broken_parent:
        db_path = str(tmp_path / "file" / "lab.db")
    before = Path(db_path).read_bytes() if os.path.isfile(db_path) else None

    done = subprocess.run(
        [sys.executable, "-c", TRAIN],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": str(ROOT), "DB_PATH": db_path},
        cwd=tmp_path,
    )

    assert (done.returncode, done.stdout) == (0, "trained\n"), done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"lab_logger: the lab {db_path!r} cannot take in runs at present (")
    assert "is taken in by the next process that opens the lab" in line
    assert before is None or Path(db_path).read_bytes() == before
    (journal,) = lab_logger.pending(db_path)
    assert Path(journal["path"]).read_bytes().count(b'"m":{"loss":0.5}') == 5


def test_store_locked_by_another_writer_delays_a_run_but_loses_nothing(db_path):
    blocker = lab_logger.connect(db_path)
    blocker.execute("BEGIN IMMEDIATE")
    try:
        lab_logger.FINISH_WAIT_S, waited = 0.1, lab_logger.FINISH_WAIT_S
        try:
            assert log_run(lambda: 0.5)() == 0.5
        finally:
            lab_logger.FINISH_WAIT_S = waited
        assert len(lab_logger.pending(db_path)) == 1
    finally:
        blocker.execute("ROLLBACK")
    assert lab_logger.drain_all(blocker, db_path) == []
    blocker.close()
    assert only_run(db_path)["final_metrics_json"] == '{"result":0.5}'


def test_closed_stderr_and_warnings_as_errors_change_nothing(tmp_path):
    db_path = str(tmp_path / "lab.db")
    broken_corrupt(db_path)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", "import sys; sys.stderr.close()\n" + TRAIN],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "DB_PATH": db_path},
    )
    assert (done.returncode, done.stdout) == (0, "trained\n")


def test_full_disk_keeps_points_until_there_is_room_again(db_path, monkeypatch, capfd):
    write, is_full = os.write, [False]

    def write_or_fail(fd, data):
        if is_full[0]:
            raise OSError(28, "No space left on device")
        return write(fd, data[: len(data) // 2 + 1])  # and a short write now and then

    monkeypatch.setattr(os, "write", write_or_fail)
    with start_run():
        log(epoch=1, loss=1)
        is_full[0] = True
        log(epoch=2, loss=2)
        is_full[0] = False
        log(epoch=3, loss=3)
    assert points(db_path, "loss") == [(1, 1.0), (2, 2.0), (3, 3.0)]
    assert "No space left on device" in capfd.readouterr().err


def test_journal_that_cannot_be_written_anywhere_costs_a_warning(
    db_path, monkeypatch, capfd, tmp_path
):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(lab_logger, "journal_dirs", lambda db_path: [str(tmp_path / "file" / "x")])
    assert log_run(lambda: log(loss=1) or 5)() == 5
    err = capfd.readouterr().err
    assert "no journal can be written" in err and "are lost" in err


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_forked_child_leaves_the_parents_run_alone(db_path):
    body = """
import os, lab_logger
with lab_logger.start_run("parent") as run:
    lab_logger.log(epoch=1, loss=1)
    pid = os.fork()
    if pid == 0:
        lab_logger.log(epoch=9, loss=9)
        with lab_logger.start_run("child"):
            lab_logger.log(epoch=5, loss=5)
        raise SystemExit(3)
    os.waitpid(pid, 0)
    lab_logger.log(epoch=2, loss=2)
"""
    done = script(db_path, body)
    assert done.returncode == 0, done.stderr
    assert "log from the process that began it" in done.stderr
    found = rows(
        db_path,
        "SELECT experiment_name, status, epoch FROM runs JOIN run_metrics USING (run_id) "
        "ORDER BY epoch",
    )
    assert [tuple(row.values()) for row in found] == [
        ("parent", "finished", 1),
        ("parent", "finished", 2),
        ("child", "finished", 5),
    ]


def test_logger_changes_no_global_state(db_path):
    body = """
import logging, os, random, signal, sys, threading, warnings
def state():
    return (random.getstate(), [signal.getsignal(s) for s in (2, 15)], os.getcwd(),
        dict(os.environ),
            sys.excepthook, threading.excepthook, logging.root.handlers[:], logging.root.level,
            sys.stdout, sys.stderr, warnings.filters[:], sys.getrecursionlimit(), sys.gettrace())
import lab_logger
before = state()
lab_logger.log_run(lambda: lab_logger.log(loss=1))()
assert state() == before
"""
    done = script(db_path, body)
    assert (done.returncode, done.stderr) == (0, "")


def test_one_copied_file_runs_on_a_bare_interpreter(db_path):
    done = subprocess.run(
        [
            sys.executable,
            "-I",
            "-S",
            "-c",
            f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
            "before = set(sys.modules)\nimport lab_logger\n"
            "assert 'sqlite3' not in sys.modules and 'subprocess' not in sys.modules",
        ],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_run_still_open_at_exit_ends_as_its_script_did(db_path):
    body = "import lab_logger; run = lab_logger.start_run('left'); run.log(loss=1){}"
    assert script(db_path, body.format("")).returncode == 0
    assert script(db_path, body.format("; 1/0")).returncode == 1
    found = rows(db_path, "SELECT status, error FROM runs ORDER BY timestamp")
    assert [row["status"] for row in found] == ["finished", "failed"]
    assert found[1]["error"].endswith("ZeroDivisionError: division by zero\n")


# --- Settings -----------------------------------------------------------------


def test_dotenv_is_read_from_the_nearest_folder_upward(tmp_path, monkeypatch):
    (tmp_path / ".env").write_text(
        "# comment\nexport DB_PATH='sub/lab.db'  # beside\nDATASET_ID=\"iris # 1\"\n"
        "PROJECT_NAME = my lab # x\n"
        "EMPTY=\nURL=http://x/#frag\nnot a pair\n"
    )
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a" / "b")
    monkeypatch.delenv("DB_PATH", raising=False)
    path, values = lab_logger.read_dotenv()
    assert path == str(tmp_path / ".env")
    assert values == {
        "DB_PATH": "sub/lab.db",
        "DATASET_ID": "iris # 1",
        "PROJECT_NAME": "my lab",
        "EMPTY": "",
        "URL": "http://x/#frag",
    }
    assert lab_logger.default_db_path() == str(tmp_path / "sub" / "lab.db")
    assert lab_logger.setting("EMPTY", "d") == ("d", "the default")
    monkeypatch.setenv("DATASET_ID", "wine")
    assert lab_logger.setting("DATASET_ID") == ("wine", "the environment")


def test_dataset_comes_from_the_argument_then_the_environment(db_path, monkeypatch):
    monkeypatch.setenv("DATASET_ID", "wine")
    log_run(lambda: None)()
    log_run(lambda dataset_id: None)("iris")
    assert [
        row["dataset_id"] for row in rows(db_path, "SELECT dataset_id FROM runs ORDER BY timestamp")
    ] == ["wine", "iris"]


def test_wandb_when_it_fails_is_a_warning(db_path, monkeypatch, capfd):
    monkeypatch.setenv("WANDB_PROJECT", "p")
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert log_run(lambda: 5)() == 5
    assert "W&B does not mirror this run" in capfd.readouterr().err


def test_wandb_mirrors_params_points_and_finals(db_path, monkeypatch):
    calls = []

    class FakeRun:
        url = "https://wandb.example/run"
        summary = SimpleNamespace(update=lambda metrics: calls.append(("summary", metrics)))

        def log(self, metrics, step=None):
            calls.append(("log", metrics, step))

        def finish(self, exit_code):
            calls.append(("finish", exit_code))

    fake = SimpleNamespace(
        init=lambda **kw: calls.append(("init", kw["project"], kw["config"])) or FakeRun()
    )
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setenv("WANDB_PROJECT", "p")

    @log_run
    def train(lr):
        log(epoch=1, loss=0.5)
        return 0.9

    train(0.1)
    assert calls == [
        ("init", "p", {"lr": 0.1}),
        ("log", {"loss": 0.5, "epoch": 1}, None),
        ("summary", {"result": 0.9}),
        ("finish", 0),
    ]
    assert only_run(db_path)["wandb_url"] == "https://wandb.example/run"


# --- Odd input ----------------------------------------------------------------

def test_more_keyword_arguments_than_anyone_needs_are_all_recorded(db_path):
    names = {f"p{i}": i for i in range(1500)}
    log_run(lambda **kw: None)(**names)
    start_run("e", params=names).finish()
    for row in rows(db_path, "SELECT params_json FROM runs"):
        assert json.loads(row["params_json"]) == names


@pytest.mark.parametrize(
    "history", [[0.5, 0.4], {"lr": 0.1, "loss": [3, 2]}, {"loss": 3}, 7, [None], {"loss": []}]
)
def test_history_of_an_odd_shape_never_costs_the_end_of_a_run(db_path, history):
    log_run(lambda: {"accuracy": 0.9, "history": history})()
    run = only_run(db_path)
    assert (run["status"], run["final_metrics_json"]) == ("finished", '{"accuracy":0.9}')
    if isinstance(history, dict) and history.get("lr"):
        assert points(db_path, "loss") == [(1, 3.0), (2, 2.0)]


def test_history_columns_of_unequal_length_lose_no_point(db_path):
    log_run(lambda: {"history": {"loss": [3, 2, 1], "val": [5]}})()
    assert points(db_path, "loss") == [(1, 3.0), (2, 2.0), (3, 1.0)]
    assert points(db_path, "val") == [(1, 5.0)]


@pytest.mark.parametrize("name", [2**70, ["a"], Path("d/x.csv"), 3.5])
def test_name_that_is_no_text_is_stored_as_text(db_path, name):
    with start_run(name, dataset_id=name):
        log(loss=1)
    run = only_run(db_path)
    assert (run["experiment_name"], run["dataset_id"]) == (str(name), str(name))
    assert len(points(db_path, "loss")) == 1


@pytest.mark.parametrize(
    "params", [SimpleNamespace(lr=1), Path("x"), 3, [1, 2], Hostile(), None], ids=repr_or_type
)
def test_start_run_takes_any_params(db_path, params):
    start_run("e", params=params).finish()
    assert isinstance(json.loads(only_run(db_path)["params_json"]), dict)


def test_note_that_cannot_be_text_is_a_warning(db_path, capfd):
    class NoText:
        def __str__(self):
            raise RuntimeError("no text for you")

    with start_run("e"):
        note(NoText())
        note(3)
    assert only_run(db_path)["note"] == "3"
    assert "the note was not recorded" in capfd.readouterr().err


def test_lab_deleted_under_a_live_run_takes_it_in_whole_when_made_again(db_path, capfd):
    with start_run("e") as run:
        run.log(epoch=1, loss=1)
        assert run._drainer.drain_live(5.0)
        for end in ("", "-wal", "-shm"):
            Path(db_path + end).unlink(missing_ok=True)
        run.log(epoch=2, loss=2)
    assert points(db_path, "loss") == [(1, 1.0), (2, 2.0)]
    assert "was removed or replaced while runs were alive" in capfd.readouterr().err


def test_journal_that_cannot_be_taken_in_hides_no_other(db_path, capfd):
    os.makedirs(db_path + ".journals")
    for name, points_of in (("bad", 5), ("good", {"loss": 1})):
        head = {"v": 1, "t": 1.0, "set": {"status": "finished", "timestamp": lab_logger.utc(1.0)}}
        lines = [json.dumps(head), json.dumps({"t": 1.0, "m": points_of})]
        Path(db_path + ".journals", name + ".jsonl").write_text("\n".join(lines) + "\n")
    conn = lab_logger.connect(db_path)
    (problem,) = lab_logger.drain_all(conn, db_path)
    conn.close()
    assert "bad.jsonl" in problem and "is kept" in problem
    assert [row["run_id"] for row in rows(db_path, "SELECT run_id FROM runs")] == ["good"]


def test_dotenv_may_begin_with_a_byte_order_mark(tmp_path, monkeypatch):
    (tmp_path / ".env").write_bytes(b"\xef\xbb\xbfPROJECT_NAME=mine\n")
    monkeypatch.chdir(tmp_path)
    assert lab_logger.setting("PROJECT_NAME")[0] == "mine"


def test_named_tuple_with_a_field_called_items_ends_its_run(db_path):
    class Pair(NamedTuple):
        items: int
        other: int

    assert log_run(lambda: Pair(1, 2))() == (1, 2)
    assert only_run(db_path)["status"] == "finished"


def test_secrets_in_odd_places_never_reach_the_store(db_path):
    secret = "hunter" + "2"
    log_run(lambda *args: None)(
        MappingProxyType({"password": secret}), [{"password": secret}] * 1001,
        f"https://{secret}@github.com/x", f"https://h/x?api_key={secret}&n=1",
        {"db_pass": secret, "wandb_key": secret, "encryption_key": secret, "hf_tokens": secret},
        {"pwd": secret, "headers": {"Authorization": secret}, "MYPASSWORD": secret},
        f"curl -H 'X: Bearer {secret}{secret}'",
    )
    run = only_run(db_path)
    assert secret not in run["params_json"] and "&n=1" in run["params_json"]


@pytest.mark.parametrize(("text", "told"), [
    ("login failed: password=hunter2", "login failed: password=***"),
    ("Settings(api_key='hunter2 x', lr=0.1)", "Settings(api_key=***, lr=0.1)"),
    ('{"api_key": "hunter2", "n": 1}', '{"api_key": ***, "n": 1}'),
    ("Authorization: Basic aHVudGVyMg==", "Authorization: ***"),
    ("run --token=hunter2 --max_tokens=5", "run --token=*** --max_tokens=5"),
    ("train --token hunter2 --lr 1 --max-tokens 5", "train --token *** --lr 1 --max-tokens 5"),
    ("lr: 1\n  password: hunter2\nurl: x", "lr: 1\n  password: ***\nurl: x"),
    ("unexpected token: 'foo' in (n,k),signature: x", None),
    ("n_tokens=5, tokenizer=bpe, a == b, x=1", None),
])
def test_secret_inside_a_text_is_hidden_and_the_rest_of_it_kept(db_path, text, told):
    with pytest.raises(ValueError):
        log_run(lambda text: int(text))(text)
    run = only_run(db_path)
    assert json.loads(run["params_json"])["text"] == (told or text)
    assert (told or text).partition("***")[2] in run["error"].replace("\\n", "\n")
    assert told is None or ("hunter2" not in run["error"] + run["end_reason"])


def test_secret_behind_its_flag_in_a_list_is_hidden(db_path):
    log_run(lambda args: None)(["--token", "hunter2", "--lr", "0.1", "-p", "x"])
    assert json.loads(only_run(db_path)["params_json"])["args"] == [
        "--token", "***", "--lr", "0.1", "-p", "x"]


def test_code_that_only_names_a_secret_stays_whole_in_the_diff():
    code = 'login(token=token)\nlogin(token="hunter2")\n'
    assert lab_logger._text(code, is_code=True) == 'login(token=token)\nlogin(token=***)\n'


@pytest.mark.timeout(20)
def test_long_text_without_secrets_costs_no_more_than_its_length():
    for text in ("a-" * 500_000, "a=" * 500_000, "'a': " * 200_000, "authorization: " * 60_000):
        assert len(lab_logger._text(text)) <= len(text)


def test_large_table_among_the_params_is_not_read(db_path):
    class Table:
        def keys(self):
            raise AssertionError("read")

        def __getitem__(self, name):
            raise AssertionError("read")

        def __len__(self):
            return 5_000_000
    log_run(lambda table, lr: None)(Table(), 0.1)
    assert json.loads(only_run(db_path)["params_json"]) == {
        "table": "<Table of 5000000 items>", "lr": 0.1}


@pytest.mark.timeout(30)                          # a program that is not ended goes on for ever
def test_diff_without_end_is_cut_and_its_program_ended(tmp_path, db_path, monkeypatch):
    program = tmp_path / "git"
    program.write_text(f"#!{sys.executable}\nimport sys\n"
                       "if 'diff' in sys.argv:\n    while True:\n        print('+' * 10_000)\n"
                       f"print({str(tmp_path)!r})\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(lab_logger, "CAPTURE_WAIT_S", 1_000)
    found = lab_logger.git_info(math.inf)
    assert len(found["git_diff"]) < lab_logger.MAX_DIFF_BYTES + 100
    assert "[cut by lab_logger after" in found["git_diff"]


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="this system has no process groups")
@pytest.mark.timeout(30)
def test_program_whose_child_hangs_is_ended_with_it():
    code = ("import subprocess, sys; subprocess.run([sys.executable, '-c', "
            "'import time; time.sleep(1000)'])")
    assert lab_logger._output([sys.executable, "-c", code], time.monotonic() + 1) == b""


@pytest.mark.timeout(30)
def test_program_that_prints_and_hangs_is_ended_at_the_deadline():
    code = "import time; print('x', flush=True); time.sleep(1000)"
    assert lab_logger._output([sys.executable, "-c", code], time.monotonic() + 1) == b""


def test_lines_after_a_torn_and_lost_one_are_taken_in_whole(db_path, monkeypatch):
    lab_logger._warned.clear()
    with start_run() as run:
        log(epoch=1, loss=1.0)
        write = os.write
        with monkeypatch.context() as patched:
            patched.setattr(lab_logger, "MAX_BACKLOG_BYTES", 10)
            patched.setattr(run, "_may_move", False)
            patched.setattr(os, "write", lambda fd, line: write(fd, line[:5])
                            if len(line) > 40 else (_ for _ in ()).throw(OSError(28, "full")))
            log(epoch=2, loss=2.0)
        log(epoch=3, loss=3.0)
    assert points(db_path, "loss") == [(1, 1.0), (3, 3.0)]


def test_interpreter_without_argv_or_sqlite_trains_all_the_same(db_path):
    body = (
        "import sys; sys.argv = []; sys.modules['sqlite3'] = None; import lab_logger; "
        "print(lab_logger.log_run(lambda: 5)())"
    )
    done = script(db_path, body)
    assert (done.returncode, done.stdout) == (0, "5\n")
    assert "cannot take in runs at present" in done.stderr
    assert len(lab_logger.pending(db_path)) == 1


def test_generator_called_with_wrong_arguments_begins_no_run(db_path):
    @log_run
    def steps(n):
        yield n

    with pytest.raises(TypeError, match="missing 1 required positional argument"):
        next(steps())
    log_run(lambda: None)()
    assert len(rows(db_path, "SELECT 1 FROM runs")) == 1


def test_exit_with_many_open_runs_and_a_locked_store_is_bounded(db_path):
    body = """
import lab_logger, os, time
lab_logger.EXIT_WAIT_S = 0.5
blocker = lab_logger.connect(os.environ["DB_PATH"])
blocker.execute("BEGIN IMMEDIATE")
runs = [lab_logger.start_run("open") for _ in range(6)]
began = time.monotonic()
lab_logger._at_exit()
print(time.monotonic() - began)
os._exit(0)
"""
    done = script(db_path, body)
    assert float(done.stdout) < 5, done.stderr
    assert len(lab_logger.pending(db_path)) == 6


@pytest.mark.parametrize(
    ("url", "good"),
    [("http://login1:8000/", "http://login1:8000"), ("https://lab.example.org/x", None),
     ("http://[::1]:80?token=x", "http://[::1]:80"), ("HTTP://h:1", "HTTP://h:1")],
)
def test_address_of_a_server_is_taken_without_its_token(url, good):
    assert lab_logger.lab_url(url) == (good or url)


@pytest.mark.parametrize(
    "url", ["login1:8000", "ftp://x", "http://", "http://h:abc", "http://[::1", "http://a b",
            "http://me:hunter2@h", "http://h/#x"]
)
def test_address_that_is_no_servers_is_told_and_shows_no_password(db_path, monkeypatch, capfd, url):
    lab_logger._warned.clear()
    monkeypatch.setenv("AILAB_URL", url)
    log_run(lambda: 1)()
    assert only_run(db_path)["status"] == "finished"
    told = capfd.readouterr().err
    assert told.count("lab_logger:") == 1 and "give http://HOST:PORT" in told
    assert "hunter2" not in told


@pytest.mark.parametrize("token", ["tok\nen", "t\u00f6ken"])
def test_token_that_no_header_can_hold_is_told_and_not_shown(monkeypatch, token):
    monkeypatch.setenv("AILAB_TOKEN", token)
    with pytest.raises(lab_logger.StoreError) as caught:
        lab_logger.post_lines("http://127.0.0.1:9", "r1", 0, b"")
    assert str(caught.value) == "AILAB_TOKEN holds characters that no token has"


def test_interrupt_in_the_middle_of_an_ending_is_recorded_and_passes(db_path, monkeypatch):
    take_lines, is_first = lab_logger.take_lines, [True]

    def interrupted(conn, *args, **kwargs):
        if is_first and threading.current_thread() is threading.main_thread():
            is_first.clear()
            conn.execute("BEGIN IMMEDIATE")
            raise KeyboardInterrupt
        return take_lines(conn, *args, **kwargs)

    monkeypatch.setattr(lab_logger, "take_lines", interrupted)
    monkeypatch.setattr(lab_logger, "DRAIN_EVERY_S", 60)
    with pytest.raises(KeyboardInterrupt), start_run("first"):
        log(loss=1.0)
    with start_run("second"):                     # by a connection that is in no transaction
        log(loss=2.0)
    lab_logger._drainers[db_path].drain_live(5)
    assert rows(db_path, "SELECT experiment_name, status FROM runs ORDER BY timestamp") == [
        {"experiment_name": "first", "status": "finished"},
        {"experiment_name": "second", "status": "finished"}]


def test_sync_sends_what_waits_for_any_server_and_makes_no_lab(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("DB_PATH", str(tmp_path / "typo.db"))
    assert lab_logger.main(["sync"]) == 0
    url = "http://127.0.0.1:9"
    folder = Path(lab_logger.journal_dirs(url)[0])
    folder.mkdir(parents=True)
    (folder / "r1.jsonl").write_text(json.dumps({"v": 2, "t": 1.0, "db": url, "set": {}}) + "\n")
    assert lab_logger.main(["sync"]) == 1
    told = capfd.readouterr()
    assert f"0 of 1 journals are wholly in {url}; 1 stay" in told.out and "is kept" in told.err
    assert lab_logger.main(["sync", "--url", "ftp://x"]) == 2
    assert not (tmp_path / "typo.db").exists()


def test_text_of_20_megabytes_among_the_params_is_cut_and_says_so(db_path):
    log_run(lambda text, n: None)("x" * 20_000_000, 3)
    params = json.loads(only_run(db_path)["params_json"])
    assert params["n"] == 3 and params["text"].startswith("x" * 1_000)
    assert params["text"].endswith("x [cut by lab_logger after 1048576 characters]")


def test_cancelled_generator_is_an_interrupted_run_and_shows_no_frame_of_ours(db_path):
    @log_run
    async def train():
        yield 1
        yield 2

    async def main():
        async for _ in train():
            break

    asyncio.run(main())
    run = only_run(db_path)
    assert (run["status"], run["end_reason"].split(":")[0]) in (
        ("killed", "interrupted"), ("finished", "finished"))
    assert "lab_logger.py" not in run["end_reason"]


@pytest.mark.skipif(sys.version_info < (3, 11), reason="exceptions have notes from 3.11 on")
def test_error_that_cannot_be_printed_ends_its_run_all_the_same(db_path):
    class Odd(Exception):
        @property
        def __notes__(self):
            raise RuntimeError("no notes for you")

        def __str__(self):
            raise RuntimeError("no text for you")

    def fail():
        raise Odd

    with pytest.raises(Odd):
        log_run(fail)()
    run = only_run(db_path)
    assert run["status"] == "failed" and run["end_reason"].startswith("failed: Odd; at ")


def test_journal_that_moves_twice_loses_no_waiting_byte(db_path, tmp_path, monkeypatch):
    """The next folder takes a part of what waits, and is full too: the third has all of it."""
    folders = [str(tmp_path / name) for name in ("first", "second", "third")]
    monkeypatch.setattr(lab_logger, "journal_dirs", lambda lab: folders)
    write, full, taken = os.write, [], []

    def write_or_fail(fd, data):
        where = os.readlink(f"/proc/self/fd/{fd}") if full else ""
        is_waiting = len(data) < 1_000            # and no copy of the journal's beginning
        if "/first/" in where or ("/second/" in where and is_waiting and taken):
            raise OSError(28, "No space left on device")
        if "/second/" in where and is_waiting:
            taken.append(True)
            return write(fd, data[:5])
        return write(fd, data)

    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("no /proc")
    monkeypatch.setattr(os, "write", write_or_fail)
    with start_run() as run:
        log(epoch=0, loss=0.0)
        full.append(True)
        for epoch in range(1, 4):
            log(epoch=epoch, loss=epoch / 4)
        assert run.path.startswith(folders[2])
    points = rows(db_path, "SELECT epoch FROM run_metrics ORDER BY id")
    assert [point["epoch"] for point in points] == [0, 1, 2, 3]


def test_what_a_function_returned_is_not_kept(db_path, monkeypatch):
    import gc
    import weakref

    class Model:
        pass

    os.mkdir(db_path)                             # a broken lab keeps its runs
    monkeypatch.setattr(lab_logger, "FINISH_WAIT_S", 0.1)
    result = log_run(lambda model: Model())(Model())
    found = weakref.ref(result)
    del result
    gc.collect()
    assert found() is None
    os.rmdir(db_path)


def test_link_to_a_file_of_secrets_is_not_followed(tmp_path, db_path):
    for command in (["git", "init", "-q"], ["ln", "-s", ".env", "cfg"]):
        subprocess.run(command, cwd=tmp_path, check=True)
    (tmp_path / ".env").write_text("API_KEY=hunter2\n")
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets" / "db.yaml").write_text("hunter2\n")
    (tmp_path / "My-API.PEM").write_text("hunter2\n")
    (tmp_path / "model.py").write_text("x = 1\n")
    subprocess.run(
        [sys.executable, "-c", "from lab_logger import log_run; log_run(lambda: 1)()"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=60, check=True)
    diff = only_run(db_path)["git_diff"]
    assert "+x = 1" in diff and "hunter2" not in diff


def test_secret_field_of_a_named_tuple_or_a_cycle_never_reaches_the_store(db_path):
    class Config(NamedTuple):
        lr: float
        api_key: str

    cycle = {"api_key": "hunter2"}
    cycle["self"] = cycle
    log_run(lambda config, cycle: None)(Config(0.1, "hunter2"), cycle)
    assert "hunter2" not in only_run(db_path)["params_json"]


@pytest.mark.parametrize("name", ["max_tokens", "tokenizer", "n_tokens", "eos_token", "key",
                                  "n_keys", "passes", "author", "secretary", "monkey", "signal"])
def test_name_that_only_sounds_like_a_secret_is_kept(name):
    assert not lab_logger.is_secret(name)


def test_package_list_ends_at_its_deadline():
    late = lab_logger.packages(0.0)["pip_freeze"]
    assert late == "" and "pytest==" in lab_logger.packages(math.inf)["pip_freeze"]
