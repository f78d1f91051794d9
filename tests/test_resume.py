"""A preempted job goes on with its run: one curve, what is repeated replaced, nothing doubled."""

import bisect
import functools
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import ailab
import lab_logger
from lab_logger import log, log_run, start_run

ROOT = Path(lab_logger.__file__).parent

TRAIN = """
import os, sys, time, lab_logger
@lab_logger.log_run(experiment_name="preempted", resume=True)
def train(first, last, rest_s=0.0):
    for epoch in range(first, last):
        lab_logger.log(epoch=epoch, loss=100 * first + epoch)
        print(epoch, flush=True)
        time.sleep(rest_s)
    return {"accuracy": 0.5}
train(int(sys.argv[1]), int(sys.argv[2]), rest_s=float(sys.argv[3]))
"""


def start(db_path, first, last, rest_s=0.0, run_id="slurm-4711"):
    return subprocess.Popen(
        [sys.executable, "-c", TRAIN, str(first), str(last), str(rest_s)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=os.path.dirname(db_path),
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "DB_PATH": db_path,
            "AILAB_RUN_ID": run_id,
            "AILAB_SAMPLE_EVERY_S": "0",
        },
    )


def rows(db_path, sql, *values):
    conn = ailab.open_lab(db_path)
    ailab.take_in(conn, db_path)
    conn.row_factory = sqlite3.Row
    found = [dict(row) for row in conn.execute(sql, values)]
    conn.close()
    return found


def curve(db_path, name="loss"):
    return [
        (row["epoch"], row["metric_value"])
        for row in rows(
            db_path,
            "SELECT epoch, metric_value FROM run_metrics WHERE metric_name = ? ORDER BY id",
            name,
        )
    ]


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no SIGKILL")
def test_killed_job_goes_on_with_its_run_and_repeated_epochs_replace_what_they_repeat(db_path):
    with start(db_path, 0, 100, 0.05) as process:
        assert [int(process.stdout.readline()) for _ in range(6)] == list(range(6))
        process.kill()
        n_logged = 6 + len(process.stdout.read().split())
        process.stderr.close()
    done = start(db_path, 4, 8)
    assert done.communicate(timeout=60)[1] == "" and done.returncode == 0
    (run,) = rows(db_path, "SELECT * FROM runs")
    assert (run["run_id"], run["status"]) == ("slurm-4711", "finished")
    assert (run["end_reason"], run["error"]) == ("finished: ran to its end", None)
    assert json.loads(run["final_metrics_json"]) == {"accuracy": 0.5}
    assert json.loads(run["params_json"])["first"] == 0
    parts = sorted(json.loads(run["resumptions_json"]).values(), key=lambda part: part["at"])
    assert [part["params"]["first"] for part in parts] == [0, 4]
    assert parts[0]["at"] == run["timestamp"] and parts[0]["pid"] != parts[1]["pid"] == run["pid"]
    assert run["duration_s"] >= 0.25  # both parts together
    kept = [(epoch, float(epoch)) for epoch in range(n_logged) if not 4 <= epoch < 8]
    assert sorted(curve(db_path)) == sorted(
        kept + [(epoch, 400.0 + epoch) for epoch in range(4, 8)]
    )
    assert lab_logger.pending(db_path) == []


def test_run_that_is_alive_elsewhere_is_refused_and_nothing_of_it_changes(db_path):
    with start(db_path, 0, 1000, 0.05) as process:
        process.stdout.readline()
        second = start(db_path, 50, 52)
        told = second.communicate(timeout=60)[1]
        assert second.returncode == 0
        assert len(told.splitlines()) == 1 and f"it is alive, process {process.pid}" in told
        assert "recorded as a run of its own" in told
        process.kill()
        process.stdout.read()
        process.stderr.close()
    runs = {run["run_id"]: run for run in rows(db_path, "SELECT * FROM runs")}
    assert len(runs) == 2 and runs.pop("slurm-4711")["pid"] == process.pid
    (own,) = runs.values()
    assert own["status"] == "finished" and own["resumptions_json"] is None
    of_first = rows(db_path, "SELECT max(epoch) AS epoch FROM run_metrics WHERE run_id = ?",
                    "slurm-4711")
    assert of_first[0]["epoch"] < 50


def test_of_many_that_resume_at_once_one_goes_on_and_the_others_are_runs_of_their_own(db_path):
    with start(db_path, 0, 3) as first:
        first.communicate(timeout=60)
    many = [start(db_path, 3, 5, 1.0) for _ in range(4)]
    told = [process.communicate(timeout=60)[1] for process in many]
    assert sum("is alive" in text for text in told) == 3
    assert len(rows(db_path, "SELECT * FROM runs")) == 4


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no SIGKILL")
def test_duration_of_a_run_killed_twice_leaves_out_the_time_between(db_path):
    for first in (0, 6):
        with start(db_path, first, first + 100, 0.05) as process:
            for _ in range(6):
                process.stdout.readline()
            process.kill()
            process.stdout.read()
            process.stderr.close()
        # A pause of an hour: before the second part, and after it nothing that counts.
        rows(db_path, "UPDATE runs SET timestamp = ?", lab_logger.utc(time.time() - 3600))
    (run,) = rows(db_path, "SELECT * FROM runs")
    assert run["status"] == "killed" and 0.4 <= run["duration_s"] < 60


def test_finished_run_may_be_trained_further(db_path):
    with start_run("more", run_id="more-1", params={"lr": 1}):
        log(epoch=1, loss=0.5)
    with start_run("more", run_id="more-1", params={"lr": 2}) as run:
        log(epoch=2, loss=0.25)
        assert run.run_id == "more-1"
        conn = lab_logger.connect(db_path)
        run._drainer.drain_live(5)
        assert conn.execute("SELECT status, ended_at, end_reason FROM runs").fetchall() == [
            ("running", None, None)
        ]
        conn.close()
    (run,) = rows(db_path, "SELECT * FROM runs")
    assert json.loads(run["params_json"]) == {"lr": 1}
    assert curve(db_path) == [(1, 0.5), (2, 0.25)]


def test_second_call_of_a_process_is_a_run_of_its_own(db_path, monkeypatch, capfd):
    monkeypatch.setenv("AILAB_RUN_ID", "once-1")
    train = log_run(resume=True)(lambda: None)
    train()
    train()
    ids = [run["run_id"] for run in rows(db_path, "SELECT run_id FROM runs ORDER BY timestamp")]
    assert ids[0] == "once-1" and len(ids) == 2
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("given", "run_id"),
    [("123.server", "123-server"), ("7[1]", "7-1-"), ("../x", "---x"), ("x" * 70, "x" * 64)],
)
def test_id_that_can_be_no_file_name_becomes_one_that_stays_the_same(db_path, given, run_id):
    for epoch in (1, 2):
        with start_run(run_id=given) as run:
            log(epoch=epoch, loss=0.5)
        assert run.run_id == run_id
    assert curve(db_path) == [(1, 0.5), (2, 0.5)]


def test_run_in_the_trash_is_not_resumed(db_path, capfd):
    lab_logger._warned.clear()
    start_run(run_id="gone-1").finish()
    conn = ailab.open_lab(db_path)
    ailab.delete_run(conn, "gone-1")
    with start_run(run_id="gone-1") as run:
        log(epoch=1, loss=0.5)
    assert run.run_id != "gone-1" and "it is in the trash" in capfd.readouterr().err
    assert conn.execute("SELECT count(*) FROM runs WHERE deleted_at IS NULL").fetchone() == (1,)
    conn.close()


def test_run_is_resumed_while_its_lab_cannot_be_asked_and_all_arrives_later(
    tmp_path, db_path, capfd
):
    lab_logger._warned.clear()
    with start_run(run_id="later-1"):
        log(epoch=1, loss=0.5)
    os.rename(db_path, db_path + ".away")
    os.mkdir(db_path)
    with start_run(run_id="later-1"):
        log(epoch=1, loss=0.25)
    assert "whether run 'later-1' is alive elsewhere could not be asked" in capfd.readouterr().err
    os.rmdir(db_path)
    os.rename(db_path + ".away", db_path)
    assert curve(db_path) == [(1, 0.25)]


# --- Journals in parts -----------------------------------------------------------


def part_of(run_id, at, points, *, status=None, part="", pid=1):
    """Write one part of a run's journal: its name and its bytes."""
    head = {"v": 2, "t": at, "set": {
        "timestamp": lab_logger.utc(at), "status": "running", "pid": pid, "params_json": "{}"}}
    if part:
        head["resume"] = {"at": lab_logger.utc(at), "pid": pid, "params": {}}
    lines = [head] + [
        {"t": at, "m": {name: value}, **({} if epoch is None else {"e": epoch}),
         **({} if step is None else {"s": step})}
        for name, value, epoch, step in points
    ]
    if status:
        lines.append({"t": at + 1, "set": {"status": status, "ended_at": lab_logger.utc(at + 1)}})
    name = f"{run_id}.{part}" if part else run_id
    return name, b"".join(json.dumps(line).encode() + b"\n" for line in lines)


POINTS = st.lists(
    st.tuples(
        st.sampled_from(["loss", "acc"]),
        st.floats(-1e6, 1e6),
        st.one_of(st.none(), st.integers(0, 6)),
        st.one_of(st.none(), st.integers(0, 6)),
    ),
    max_size=12,
).map(lambda points: sorted(points, key=lambda point: (point[2] or -1, point[3] or -1)))


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(parts=st.lists(POINTS, min_size=1, max_size=4), seed=st.integers(0, 2**16))
def test_parts_of_a_run_add_up_in_whatever_order_and_pieces_they_arrive(
    tmp_path_factory, parts, seed
):
    """Each key (metric, epoch, step) has the points of the newest part that logged it."""
    dice = random.Random(seed)
    db_path = str(tmp_path_factory.mktemp("parts") / "lab.db")
    conn = ailab.open_lab(db_path)
    journals = [
        part_of("r1", 1000.0 * (i + 1), points, part=f"{i:08x}" if i else "", pid=i + 1,
                status="finished" if i == len(parts) - 1 else None)
        for i, points in enumerate(parts)
    ]
    held = dict.fromkeys((name for name, _ in journals), 0)
    is_in_order = seed % 2 == 0
    while waiting := [(name, data) for name, data in journals if held[name] < len(data)]:
        name, data = waiting[0] if is_in_order else dice.choice(waiting)
        begin = max(0, held[name] - dice.randrange(3) * 10_000)  # a replay from an earlier offset
        lines = data[begin:].splitlines(True)
        piece = b"".join(lines[: dice.randrange(1, len(lines) + 1)])
        held[name], _ = lab_logger.take_lines(conn, name, begin, piece)
    expected = {}
    for i, points in enumerate(parts):
        for name, value, epoch, step in points:
            key = (name, epoch, step)
            if epoch is None and step is None:
                expected.setdefault(key, []).append(value)
            elif expected.get(key, (None,))[0] == i:
                expected[key].append(value)
            else:
                expected[key] = [i, value]
    wanted = sorted(
        (name, epoch or -1, step or -1, value)
        for (name, epoch, step), values in expected.items()
        for value in (values if epoch is None and step is None else values[1:])
    )
    stored = sorted(
        (name, epoch or -1, step or -1, value)
        for name, value, epoch, step in conn.execute(
            "SELECT metric_name, metric_value, epoch, step FROM run_metrics")
    )
    assert stored == wanted
    times = [at for at, in conn.execute("SELECT timestamp FROM run_metrics ORDER BY id")]
    begun = [lab_logger.utc(1000.0 * (i + 1)) for i in range(len(parts))]
    came = [bisect.bisect(begun, at) for at in times]
    assert came == sorted(came)                   # the newest part's are the last of a curve
    status, pid = conn.execute("SELECT status, pid FROM runs").fetchone()
    assert (status, pid) == ("finished", len(parts))
    conn.close()


def test_journal_of_version_1_is_taken_in(db_path):
    lines = (
        b'{"v":1,"t":1.5,"db":"x","set":{"timestamp":"1970-01-01T00:00:01.500000Z","status":'
        b'"running","params_json":"{\\"lr\\":1}"}}\n'
        b'{"t":2.5,"e":1,"m":{"loss":0.5,"nan":"NaN"}}\n{"t":3.0}\n'
        b'{"t":4.0,"set":{"status":"finished"}}\n'
    )
    os.makedirs(db_path + ".journals")
    Path(db_path + ".journals", "old-1.jsonl").write_bytes(lines)
    assert curve(db_path) == [(1, 0.5)] and curve(db_path, "nan") == [(1, None)]
    assert lab_logger.pending(db_path) == []


def test_journal_of_a_newer_version_is_kept_and_said_so(db_path):
    os.makedirs(db_path + ".journals")
    path = Path(db_path + ".journals", "new-1.jsonl")
    path.write_bytes(b'{"v":99,"t":1.5,"set":{"status":"running"}}\n')
    conn = ailab.open_lab(db_path)
    (problem,) = lab_logger.drain_all(conn, db_path)
    assert "journal version 99" in problem and "update AI-Lab" in problem
    assert path.exists() and conn.execute("SELECT count(*) FROM runs").fetchone() == (0,)
    conn.close()


@pytest.mark.parametrize(
    "line",
    [
        b'{"t":[1],"m":{"a":1}}',
        b'{"t":1e17,"m":{"a":1}}',
        b'{"t":1,"m":[1]}',
        b'{"t":1,"m":{"a":[1]}}',
        b'{"t":1,"e":{},"m":{"a":1}}',
        b'{"t":1,"set":{"status":null}}',
        b'{"t":1,"set":{"note":[1]}}',
        b'{"t":1,"m":{"a":' + b"9" * 400 + b"}}",
        b'{"v":"x","set":{}}',
        b'{"t":NaN,"m":{"a":1}}',
        b'{"t":1,"m":{"a":"high"}}',
        b'{"t":1,"set":{"status":"weird"}}',
        b'{"t":1,"set":{"duration_s":"long"}}',
    ],
)
def test_lines_that_no_store_can_hold_are_a_value_error_and_leave_nothing(db_path, line):
    conn = lab_logger.connect(db_path)
    with pytest.raises(ValueError, match="holds what no lab can"):
        lab_logger.take_lines(conn, "r1", 0, b'{"v":2,"t":1.0,"set":{}}\n' + line + b"\n")
    assert conn.execute("SELECT count(*) FROM runs").fetchone() == (0,)
    conn.close()


@pytest.mark.parametrize("name", ["", "a/b", "a.b", "a.0000000'", "a.0000000g", "x" * 65, 'a"b'])
def test_name_that_is_no_journals_is_refused(db_path, name):
    conn = lab_logger.connect(db_path)
    with pytest.raises(ValueError, match="no name of a journal"):
        lab_logger.take_lines(conn, name, 0, b"")
    conn.close()


def test_lines_after_a_gap_are_not_taken(db_path):
    conn = lab_logger.connect(db_path)
    name, data = part_of("r1", 1.0, [("loss", 0.5, 1, None)], status="finished")
    assert lab_logger.take_lines(conn, name, 7, data[7:]) == (0, None)
    take = functools.partial(lab_logger.take_lines, conn)
    assert take(name, 0, data) == (len(data), "finished") == take(name, 0, data)
    assert conn.execute("SELECT count(*) FROM run_metrics").fetchone() == (1,)
    conn.close()


def test_journal_of_a_lost_run_stays_for_it_may_live(db_path):
    name, data = part_of("r1", time.time(), [("loss", 0.5, 1, None)])
    os.makedirs(db_path + ".journals")
    path = Path(db_path + ".journals", f"{name}.jsonl")
    path.write_bytes(data)
    conn = ailab.open_lab(db_path)
    lab_logger.drain_all(conn, db_path)
    conn.execute("UPDATE runs SET status = 'killed', end_reason = 'lost: no sign of life'")
    lab_logger.drain_all(conn, db_path)
    assert path.exists()
    with open(path, "ab") as journal:
        journal.write(b'{"t":9.0,"e":2,"m":{"loss":0.1}}\n')
    lab_logger.drain_all(conn, db_path)
    assert conn.execute("SELECT status, end_reason FROM runs").fetchall() == [("running", None)]
    conn.close()


def test_second_of_two_that_resumed_without_the_lab_waits_for_the_first(db_path):
    """Both began while the lab could not be asked: their points never mix."""
    host, key = lab_logger.host_name(), lab_logger.process_key()
    own = {"hostname": host, "pid": os.getpid()}
    other = {"hostname": host, "pid": os.getppid()}
    conn, now = ailab.open_lab(db_path), time.time()
    lines = []
    for who in (own, other):
        now += 0.01
        head = {"v": 2, "t": now, "resume": {"at": lab_logger.utc(now), **who, "params": {}},
                "set": {"timestamp": lab_logger.utc(now), "status": "running", **who,
                        "process_key": key if who is own else None}}
        lines.append(json.dumps(head).encode() + b'\n{"t":%.3f,"e":1,"m":{"loss":%d}}\n' % (
            now, who["pid"]))
    lab_logger.take_lines(conn, "r1.00000001", 0, lines[0])
    with pytest.raises(ValueError, match="resumed at the same time by process"):
        lab_logger.take_lines(conn, "r1.00000002", 0, lines[1])
    assert conn.execute("SELECT metric_value FROM run_metrics").fetchall() == [(os.getpid(),)]
    conn.execute("UPDATE runs SET status = 'finished'")
    lab_logger.take_lines(conn, "r1.00000002", 0, lines[1])
    assert conn.execute("SELECT metric_value FROM run_metrics").fetchall() == [(os.getppid(),)]
    conn.close()
