"""Journals into the store: exactly once, whoever dies and whenever."""

import contextlib
import functools
import json
import math
import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import ailab
import lab_logger

ROOT = Path(lab_logger.__file__).parent

TRAIN_FOR_EVER = """
import itertools, lab_logger
@lab_logger.log_run(experiment_name="killed")
def train(lr=0.1):
    for epoch in itertools.count():
        lab_logger.log(epoch=epoch, loss=1 / (epoch + 1))
        print(epoch, flush=True)
train()
"""


def start(body, db_path):
    return subprocess.Popen(
        [sys.executable, "-c", body],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "DB_PATH": db_path},
        cwd=os.path.dirname(db_path),
    )


def run_of(conn):
    conn.row_factory = sqlite3.Row
    (run,) = conn.execute("SELECT * FROM runs").fetchall()
    return dict(run)


def drain(conn, path):
    return lab_logger.drain(functools.partial(lab_logger.take_lines, conn), str(path))


def epochs(conn):
    return [row[0] for row in conn.execute("SELECT epoch FROM run_metrics ORDER BY id")]


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no SIGKILL")
@pytest.mark.parametrize("n_epochs", [0, 1, 50, 3000])
def test_sigkill_right_after_log_loses_no_point_and_doubles_none(db_path, n_epochs):
    with start(TRAIN_FOR_EVER, db_path) as process:
        last = next(epoch for line in process.stdout if (epoch := int(line)) >= n_epochs)
        process.kill()
        last = max([last, *(int(line) for line in process.stdout)])  # what it said before it died
    conn = ailab.open_lab(db_path)
    assert ailab.take_in(conn, db_path) == []
    run, stored = run_of(conn), epochs(conn)
    conn.close()
    assert run["status"] == "killed" and run["error"] is None
    assert run["ended_at"] >= run["timestamp"] and run["duration_s"] >= 0
    assert stored[: last + 1] == list(range(last + 1))
    assert stored == list(range(len(stored)))  # at most the one it could not tell us about more
    assert lab_logger.pending(db_path) == []


def test_os_exit_right_after_a_call_returned_finds_the_run_by_plain_sql(db_path):
    body = "import lab_logger, os; lab_logger.log_run(lambda: {'acc': 0.5})(); os._exit(7)"
    with start(body, db_path) as process:
        assert process.wait(30) == 7
    with sqlite3.connect(db_path) as conn:
        assert run_of(conn)["final_metrics_json"] == '{"acc":0.5}'
    conn.close()


@pytest.mark.skipif(os.name == "nt", reason="Windows ends processes in another way")
@pytest.mark.parametrize(
    ("number", "code", "status"), [(signal.SIGINT, -2, "killed"), (signal.SIGTERM, -15, "killed")]
)
def test_signal_ends_the_process_as_without_the_logger(db_path, number, code, status):
    with start(TRAIN_FOR_EVER, db_path) as process:
        process.stdout.readline()
        process.send_signal(number)
        process.stdout.read()
    assert process.returncode == code
    conn = ailab.open_lab(db_path)
    ailab.take_in(conn, db_path)
    run = run_of(conn)
    conn.close()
    assert run["status"] == status
    assert (number == signal.SIGINT) == ("KeyboardInterrupt" in (run["error"] or ""))


def test_run_of_a_live_process_is_not_taken_for_killed(db_path):
    with start(TRAIN_FOR_EVER, db_path) as process:
        process.stdout.readline()
        conn = ailab.open_lab(db_path)
        ailab.take_in(conn, db_path)
        assert run_of(conn)["status"] == "running"
        process.kill()
        process.stdout.read()
    ailab.take_in(conn, db_path)
    assert run_of(conn)["status"] == "killed"
    conn.close()


@pytest.mark.parametrize(
    ("host", "pid", "key", "is_dead"),
    [
        ("another-host", 999_999_999, None, False),
        (lab_logger.host_name(), None, None, False),
        (lab_logger.host_name(), os.getpid(), lab_logger.process_key(), False),
        (lab_logger.host_name(), 999_999_999, None, True),
        pytest.param(
            lab_logger.host_name(),
            os.getpid(),
            "an-older-boot/pid:[1]/5",
            True,
            marks=pytest.mark.skipif(not lab_logger.process_key(), reason="no /proc"),
        ),
        pytest.param(
            lab_logger.host_name(),
            os.getpid(),
            (lab_logger.process_key() or "//").rsplit("/", 1)[0] + "/5",
            True,
            marks=pytest.mark.skipif(not lab_logger.process_key(), reason="no /proc"),
        ),
        pytest.param(
            lab_logger.host_name(),
            999_999_999,
            (lab_logger.process_key() or "//").split("/")[0] + "/pid:[another]/5",
            False,
            marks=pytest.mark.skipif(not lab_logger.process_key(), reason="no /proc"),
        ),
    ],
)
def test_process_is_dead_only_where_that_is_certain(host, pid, key, is_dead):
    if os.name == "nt":
        pytest.skip("pids cannot be asked there")
    words = lab_logger.death(host, pid, key, None)
    assert (words is not None) is is_dead
    assert words is None or words.startswith("killed without a word: ")


LONG_AGO = lab_logger.utc(time.time() - lab_logger.LOST_AFTER_S - 60)


@pytest.mark.parametrize(
    ("host", "pid", "key", "heartbeat_at", "words"),
    [
        ("another-host", 7, None, LONG_AGO, "lost: no sign of life from another-host for 300 s"),
        ("another-host", 7, None, lab_logger.utc(time.time()), None),
        ("another-host", 7, None, None, None),
        (None, None, None, LONG_AGO, None),
        (lab_logger.host_name(), os.getpid(), lab_logger.process_key(), LONG_AGO, None),
    ],
    ids=["silent", "heard of", "never heard of", "no logger wrote it", "alive here"],
)
def test_run_of_another_machine_is_lost_after_silence_alone(host, pid, key, heartbeat_at, words):
    if pid == os.getpid() and not key:
        pytest.skip("this system cannot tell its processes apart")
    assert lab_logger.death(host, pid, key, heartbeat_at) == words


def test_recycled_pid_is_told_by_the_start_of_its_process():
    key = lab_logger.process_key()
    if not key:
        pytest.skip("this system cannot tell its processes apart")
    earlier = key.rsplit("/", 1)[0] + "/1"
    found = lab_logger.death(lab_logger.host_name(), os.getpid(), earlier, None)
    assert found == (
        f"killed without a word: process {os.getpid()} on {lab_logger.host_name()} is gone"
    )


# --- The journal by itself ----------------------------------------------------


def journal_of(points, *, ended):
    """Write a journal as the logger does: head, points as (name, value, epoch), an end."""
    lines = [
        {
            "v": 1,
            "t": 1.0,
            "set": {"timestamp": lab_logger.utc(1.0), "status": "running", "params_json": "{}"},
        }
    ]
    lines += [{"t": 2.0, "e": epoch, "m": {name: value}} for name, value, epoch in points]
    lines += (
        [
            {"t": 3.0, "artifact": "/a"},
            {"t": 4.0, "set": {"status": "finished", "final_metrics_json": '{"acc":0.5}'}},
        ]
        if ended
        else []
    )
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


def put_journal(db_path, data, run_id="r1"):
    os.makedirs(db_path + ".journals", exist_ok=True)
    path = Path(db_path + ".journals") / f"{run_id}.jsonl"
    path.write_bytes(data)
    return path


def test_torn_last_line_was_never_acknowledged_and_waits(db_path):
    whole = journal_of([("loss", 0.5, 1), ("loss", 0.25, 2)], ended=False)
    path = put_journal(db_path, whole[:-5])
    conn = ailab.open_lab(db_path)
    assert drain(conn, path) is False
    assert epochs(conn) == [1]
    path.write_bytes(whole)
    drain(conn, path)
    drain(conn, path)
    assert epochs(conn) == [1, 2]
    conn.close()


def test_damaged_line_is_left_out_with_a_warning_and_hides_no_other(db_path, capfd):
    lab_logger._warned.clear()
    lines = journal_of(
        [("loss", 0.5, 1), ("loss", 0.25, 2), ("loss", 0.1, 3)], ended=True
    ).splitlines(True)
    lines[2] = b"\0\0\xff garbage\n"
    path = put_journal(db_path, b"".join(lines))
    conn = ailab.open_lab(db_path)
    assert lab_logger.drain_all(conn, db_path) == []
    assert epochs(conn) == [1, 3] and not path.exists()
    assert "is damaged and was left out" in capfd.readouterr().err
    conn.close()


def test_journal_longer_than_a_chunk_is_taken_in_whole(db_path, monkeypatch):
    monkeypatch.setattr(lab_logger, "CHUNK_BYTES", 100)
    put_journal(db_path, journal_of([("loss", i / 7, i) for i in range(200)], ended=True))
    conn = ailab.open_lab(db_path)
    lab_logger.drain_all(conn, db_path)
    assert epochs(conn) == list(range(200)) and lab_logger.pending(db_path) == []
    conn.close()


def test_killed_run_that_goes_on_is_running_again(db_path):
    path = put_journal(db_path, journal_of([("loss", 0.5, 1)], ended=False))
    conn = ailab.open_lab(db_path)
    drain(conn, path)
    conn.execute("UPDATE runs SET status = 'killed', ended_at = timestamp")
    with open(path, "ab") as journal:
        journal.write(b'{"t":9.0,"e":2,"m":{"loss":0.1}}\n')
    drain(conn, path)
    assert (run_of(conn)["status"], run_of(conn)["ended_at"]) == ("running", None)
    conn.close()


class Crash(Exception):
    """Stands for a drainer that dies here."""


POINTS = st.lists(
    st.tuples(
        st.sampled_from(["loss", "acc", "val/été"]),
        st.one_of(st.floats(-1e6, 1e6), st.sampled_from(["NaN", "Infinity"])),
        st.integers(0, 50),
    ),
    max_size=30,
)


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(points=POINTS, cuts=st.lists(st.floats(0, 1), max_size=6), seed=st.integers(0, 2**16))
def test_store_equals_what_was_logged_whenever_writer_and_drainers_die(
    tmp_path_factory, points, cuts, seed
):
    """Cut at random bytes, kill drainers at random statements, replay: nothing lost or doubled."""
    db_path = str(tmp_path_factory.mktemp("drain") / "lab.db")
    data, dice = journal_of(points, ended=True), random.Random(seed)
    path = put_journal(db_path, b"")
    conn = ailab.open_lab(db_path)
    chunk, lab_logger.CHUNK_BYTES = lab_logger.CHUNK_BYTES, dice.choice([64, 500, 1 << 19])
    try:
        for cut in [*sorted(cuts), 1.0]:
            path.write_bytes(data[: int(len(data) * cut)])
            victim, countdown = ailab.open_lab(db_path), dice.randrange(1, 60)

            def die():
                nonlocal countdown
                countdown -= 1
                if countdown == 0:
                    return 1  # SQLite then fails the statement, as a crash would
                return 0

            victim.set_progress_handler(die, 25)
            with contextlib.suppress(sqlite3.Error):
                drain(victim, path)
            victim.close()  # rolls back what it had not committed
            drain(conn, path)
    finally:
        lab_logger.CHUNK_BYTES = chunk
    stored = [
        (row[0], row[1], row[2])
        for row in conn.execute(
            "SELECT metric_name, metric_value, epoch FROM run_metrics ORDER BY id"
        )
    ]
    assert stored == [
        (name, None if value == "NaN" else float(value), epoch) for name, value, epoch in points
    ]
    assert run_of(conn)["artifacts_json"] == '["/a"]'
    ailab.take_in(conn, db_path)
    counts = dict(
        conn.execute(
            "SELECT metric_name, n_points FROM metric_summary WHERE n_points > 0"
        ).fetchall()
    )
    assert counts == {
        name: sum(point[0] == name for point in points) for name in {p[0] for p in points}
    }
    conn.close()


@pytest.mark.parametrize("data", [b"", b'{"v":2,"t":1.0,"se'])
def test_journal_of_a_process_that_died_while_it_began_goes_after_a_while(db_path, data):
    path = put_journal(db_path, data)
    conn = ailab.open_lab(db_path)
    lab_logger.drain_all(conn, db_path)
    assert path.exists()  # its process may be about to write
    then = time.time() - lab_logger.LOST_AFTER_S - 1
    os.utime(path, (then, then))
    lab_logger.drain_all(conn, db_path)
    assert not path.exists()
    conn.close()


@pytest.mark.parametrize("data", [b"hello world\n", bytes(range(256)) * 20, b'{"t":1.0}\n'])
def test_file_that_is_no_journal_is_kept_and_makes_no_run(db_path, data):
    path = put_journal(db_path, data)
    conn = ailab.open_lab(db_path)
    (problem,) = lab_logger.drain_all(conn, db_path)
    assert "it does not begin as a journal does" in problem and path.exists()
    assert conn.execute("SELECT count(*) FROM runs").fetchone() == (0,)
    conn.close()


def test_lab_that_says_it_holds_more_than_there_is_gets_no_journal_removed(db_path):
    path = put_journal(db_path, journal_of([("loss", 0.5, 1)], ended=True))
    with pytest.raises(ValueError, match="holds more of it than there is"):
        lab_logger.drain(lambda *_: (99_999, "finished"), str(path))


def test_two_drainers_at_once_take_each_line_in_once(db_path):
    put_journal(db_path, journal_of([("loss", i / 7, i) for i in range(5000)], ended=True))
    ailab.open_lab(db_path).close()
    chunk, lab_logger.CHUNK_BYTES = lab_logger.CHUNK_BYTES, 4096
    problems = []

    def take_in():
        conn = ailab.open_lab(db_path)
        problems.extend(lab_logger.drain_all(conn, db_path))
        conn.close()

    try:
        threads = [threading.Thread(target=take_in) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        lab_logger.CHUNK_BYTES = chunk
    conn = ailab.open_lab(db_path)
    assert problems == [] and epochs(conn) == list(range(5000))
    conn.close()


def test_many_processes_log_into_one_new_lab_and_none_is_lost(db_path):
    body = """
import lab_logger
@lab_logger.log_run
def train(seed):
    for epoch in range(5):
        lab_logger.log(epoch=epoch, loss=seed)
    return seed
for seed in range(10):
    train(seed)
"""
    processes = [start(body, db_path) for _ in range(6)]
    assert [process.wait(60) for process in processes] == [0] * 6
    for process in processes:
        process.stdout.close()
    conn = ailab.open_lab(db_path)
    ailab.take_in(conn, db_path)
    assert conn.execute(
        "SELECT count(*), count(DISTINCT run_id) FROM runs WHERE status = 'finished'"
    ).fetchone() == (60, 60)
    assert conn.execute("SELECT count(*) FROM run_metrics").fetchone() == (300,)
    assert conn.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    conn.close()


def test_live_run_reaches_the_store_while_it_trains(db_path):
    with lab_logger.start_run("live") as run:
        run.log(epoch=1, loss=math.inf)
        deadline = time.monotonic() + 60
        found = None
        while not found and time.monotonic() < deadline:
            time.sleep(0.05)
            if os.path.exists(db_path):
                conn = lab_logger.connect(db_path)
                found = conn.execute("SELECT metric_value FROM run_metrics").fetchone()
                conn.close()
    assert found == (math.inf,)


def test_journals_in_a_shared_folder_go_only_to_their_own_lab(tmp_path, monkeypatch):
    monkeypatch.setattr(
        lab_logger, "journal_dirs", lambda db_path: [db_path + ".none", str(tmp_path / "shared")]
    )
    (tmp_path / "shared").mkdir()
    for lab in ("a", "b"):
        head = json.dumps({"v": 1, "t": 1.0, "db": f"/{lab}.db", "set": {"status": "running"}})
        (tmp_path / "shared" / f"run-{lab}.jsonl").write_text(head + "\n")
    assert [journal["run_id"] for journal in lab_logger.pending("/a.db")] == ["run-a"]
