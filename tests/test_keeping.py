"""Keeping a lab: purge what is in the trash, export, and take an export into another lab."""
import contextlib
import csv
import gzip
import io
import json
import os
import sqlite3
import stat

import pytest
from conftest import insert_run
from processes import train

import ailab
import lab_logger

OTHERWISE = ("id", "received_from", "journal_offset")     # in the lab that took a row in


def run_cli(*arguments):
    return ailab.main(list(map(str, arguments)))


def table(path, name):
    """All rows of a table, without what another lab has otherwise."""
    with contextlib.closing(sqlite3.connect(path)) as conn:
        conn.row_factory = sqlite3.Row
        rows = [dict(row) for row in conn.execute(f"SELECT * FROM {name} ORDER BY 1")]
    return sorted(({key: value for key, value in row.items() if key not in OTHERWISE}
                   for row in rows), key=lambda row: row["run_id"])


@pytest.fixture
def other(tmp_path):
    return str(tmp_path / "other.db")


def write_lines(path, *records):
    """Write an export by hand; what is text is a line as it is."""
    path.write_text("".join(f"{record if isinstance(record, str) else json.dumps(record)}\n"
                            for record in (ailab._EXPORT, *records)), "utf-8")
    return path


# --- Export and import ------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["jsonl", "db"])
def test_export_taken_into_another_lab_holds_the_same_rows_and_a_second_time_nothing_more(
        lab, tmp_path, other, kind, capsys):
    lab.conn.execute("INSERT INTO run_metrics (run_id, epoch, metric_name, metric_value) VALUES "
                     "(?, 9, 'odd', 9e999), (?, 9, 'odd', NULL)", [lab.ids["lr_01"]] * 2)
    ailab.set_note(lab.conn, lab.ids["lr_01"], "PUBLISH: \u00e4 \u2028, 'x'")
    out = tmp_path / f"exported.{kind}"
    assert run_cli("export", "-o", out) == 0
    for told in (f"{len(lab.runs)} runs taken in, 0 already there",
                 f"0 runs taken in, {len(lab.runs)} already there"):
        assert run_cli("import", out, "--db", other) == 0
        assert told in capsys.readouterr().err
    for name in ("runs", "run_metrics"):
        assert table(other, name) == table(lab.db_path, name)


def test_run_that_the_other_lab_has_stays_as_it_is(lab, tmp_path, other):
    out, run_id = tmp_path / "lab.jsonl", lab.ids["lr_01"]
    run_cli("export", "-o", out)
    run_cli("import", out, "--db", other)
    conn = ailab.open_lab(other)
    ailab.set_note(conn, run_id, "mine")
    ailab.delete_run(conn, lab.ids["svm_01"])
    run_cli("import", out, "--db", other)
    assert ailab.get_run(conn, run_id)["note"] == "mine"
    with pytest.raises(ailab.NotFound, match="trash"):
        ailab.get_run(conn, lab.ids["svm_01"])
    conn.close()


def test_imported_run_offers_no_file_of_this_machine_and_says_why(lab, tmp_path, other, capsys):
    (tmp_path / "here.csv").write_text("a")
    lab.conn.execute("UPDATE runs SET hostname = 'gpu-3', artifacts_json = ? WHERE run_id = ?",
                     (json.dumps([str(tmp_path / "here.csv"), "metrics_gone.csv"]),
                      lab.ids["lr_01"]))
    run_cli("export", "-o", tmp_path / "lab.jsonl")
    run_cli("import", tmp_path / "lab.jsonl", "--db", other)
    away = "(not on this machine: the run is from gpu-3)"
    for db_path, told in ((lab.db_path, ["(1 byte)", "(missing)"]), (other, [away, away])):
        capsys.readouterr()
        run_cli("show", lab.ids["lr_01"], "--db", db_path)
        files = capsys.readouterr().out.partition("artifacts\n")[2].splitlines()
        assert files == [f"  {tmp_path / 'here.csv'} {told[0]}", f"  metrics_gone.csv {told[1]}"]
        run_cli("metrics", lab.ids["lr_01"], "--db", db_path)
        assert capsys.readouterr().out.endswith(f"metrics_gone.csv {told[1]}\n")
    with contextlib.closing(ailab.open_lab(other)) as conn:
        run = ailab.get_run(conn, lab.ids["lr_01"])
    assert run["received_from"] == "gpu-3"
    assert [file["exists"] for file in run["artifact_files"]] == [False, False]


def test_lab_with_the_tables_of_the_spec_alone_is_taken_in(tmp_path, other):
    old = tmp_path / "old.db"
    with contextlib.closing(sqlite3.connect(old)) as conn:
        conn.executescript("CREATE TABLE runs (run_id TEXT PRIMARY KEY, params_json TEXT);"
                           "CREATE TABLE run_metrics (id INTEGER PRIMARY KEY, run_id TEXT, epoch "
                           "INTEGER, metric_name TEXT, metric_value REAL);"
                           "INSERT INTO runs VALUES ('run-a', '{\"lr\": 1}');"
                           "INSERT INTO run_metrics VALUES (1, 'run-a', 3, 'loss', 0.5);")
    before = old.read_bytes()
    assert run_cli("import", old, "--db", other) == 0
    conn = ailab.open_lab(other)
    assert ailab.get_run(conn, "run-a")["final_metrics"] == {"loss": 0.5}
    conn.close()
    assert old.read_bytes() == before


def test_run_that_was_logged_here_is_completed_by_no_import(lab, tmp_path):
    run_id, out = lab.ids["killed"], tmp_path / "more.jsonl"
    run_cli("export", "-o", out)
    lines = out.read_text("utf-8").splitlines()
    at = next(n for n, line in enumerate(lines) if f'"run_id":"{run_id}"' in line)
    lines[at:at + 1] = [lines[at].replace('"killed"', '"finished"'),
                        '{"points":[[9,9,"accuracy",1.0,null]]}']
    out.write_text("\n".join(lines), "utf-8")
    assert run_cli("import", out) == 0
    got = ailab.get_run(lab.conn, run_id)
    assert (got["status"], got["final_metrics"]["accuracy"]) == ("killed", 0.6)


@pytest.mark.parametrize("kind", ["jsonl", "db"])
def test_rows_of_plain_sql_with_odd_values_go_out_and_come_in(lab, tmp_path, other, kind, capsys):
    lab.conn.execute("INSERT INTO runs (run_id, note, params_json, timestamp) VALUES "
                     "('odd', CAST(x'ff41' AS TEXT), 'no json', x'00ff'), (NULL, 'nameless', 1, 2)")
    lab.conn.execute("INSERT INTO run_metrics (run_id, epoch, metric_name, metric_value, step) "
                     "VALUES ('odd', 'first', 'm', 'high', x'01'), ('odd', 2, NULL, x'00', 3),"
                     " ('odd', 1, 'm', -9e999, NULL), (NULL, 1, 'm', 1, 1)")
    out = tmp_path / f"odd.{kind}"
    assert run_cli("export", "-o", out) == 0
    for told in ("13 runs taken in, 0 already there", "0 runs taken in, 13 already there"):
        assert run_cli("import", out, "--db", other) == 0
        assert told in capsys.readouterr().err
    conn = ailab.open_lab(other)
    got = ailab.get_run(conn, "odd")
    assert (got["params"], got["final_metrics"]) == ({}, {"m": "-Infinity"})
    conn.close()


def test_trash_goes_along_where_it_is_asked_for_and_stays_trash(lab, tmp_path, other, capsys):
    ailab.delete_run(lab.conn, lab.ids["lr_01"])
    ailab.delete_run(lab.conn, lab.ids["lr_001"])
    run_cli("purge", lab.ids["lr_001"], "--yes")
    out = tmp_path / "all.jsonl"
    run_cli("export", "-o", out)
    assert lab.ids["lr_01"] not in out.read_text("utf-8")
    run_cli("export", "-o", out, "--trash")
    assert run_cli("import", out, "--db", other) == 0
    assert "11 runs taken in" in capsys.readouterr().err
    conn = ailab.open_lab(other)
    assert [run["run_id"] for run in ailab.trash(conn)] == [lab.ids["lr_01"]]
    assert ailab.count_runs(conn, ailab.RunQuery()) == 10
    ailab.restore_run(conn, lab.ids["lr_01"])
    assert ailab.get_run(conn, lab.ids["lr_01"])["final_metrics"]["f1"] == 0.94
    conn.close()


@pytest.mark.parametrize(("text", "told"), [
    ("", "line 1"), ("{}\n", "line 1"), ("nonsense", "line 1"), ("[]\n", "line 1"),
    ('HEAD{"run": {}}', "line 2"), ('HEAD{"run": {"run_id": 5}}', "line 2"),
    ('HEAD{"run": {"run_id": "a", "note": {}}}', "line 2"), ('HEAD{"points": 3}', "line 2"),
    ('HEAD{"run": {"run_id": "a", "pid": 99999999999999999999}}', "line 2"),
    ('HEAD{"run": {"run_id": "a"}}\n{"points": [[1, 2]]}', "line 3"),
    ('HEAD{"run": {"run_id": "a"}}\n{"points": [[1, 2, "m", {}, null]]}', "line 3"),
    ('HEAD{"run": {"run_id": "a"}}\n{"points": [[[], 2, "m", 1, null]]}', "line 3"),
    ('HEAD{"points": [[1, 2, "m", 1, null]]}', "line 2"),
    ('HEAD{"run": {"run_id": "a", "note": "\\ud800"}}', "line 2"),
    ("HEAD" + "[" * 100_000, "line 2")], ids=range(15))
def test_file_that_is_no_export_is_refused_with_its_line(tmp_path, other, capsys, text, told):
    path = tmp_path / "bad.jsonl"
    path.write_text(text.replace("HEAD", ailab.encode(ailab._EXPORT).decode() + "\n"))
    assert run_cli("import", path, "--db", other) == 1
    assert told in (err := capsys.readouterr().err) and "Traceback" not in err
    assert table(other, "runs") == []


def test_points_of_a_run_are_taken_in_before_all_of_them_are_read(tmp_path):
    path = write_lines(tmp_path / "x.jsonl", {"run": {"run_id": "a"}},
                       {"points": [[1, None, "m", 0.5, None]]}, "broken")
    run, points = next(ailab.imported(str(path)))
    assert (run, next(points)) == ({"run_id": "a"}, (1, None, "m", 0.5, None))
    with pytest.raises(ailab.LabError, match="line 4 "):
        next(points)


def test_run_with_a_broken_line_is_left_out_whole_and_those_before_it_stay(
        tmp_path, other, capsys):
    point, runs = [1, None, "m", 0.5, None], [{"run": {"run_id": name}} for name in "abc"]
    lines = [runs[0], {"points": [point]}, runs[1], {"points": [point]}, '{"points": [[1,', runs[2]]
    path = write_lines(tmp_path / "x.jsonl", *lines)
    assert run_cli("import", path, "--db", other) == 1
    err = capsys.readouterr().err
    assert "1 run taken in" in err and "but for 'b', which may be cut short" in err
    assert f"line 6 of '{path}' is none of an export (Expecting value)" in err
    assert [row["run_id"] for row in table(other, "runs")] == ["a"]
    assert [row["run_id"] for row in table(other, "run_metrics")] == ["a"]
    write_lines(path, *lines[:4], lines[5])
    assert run_cli("import", path, "--db", other) == 0
    assert [row["run_id"] for row in table(other, "run_metrics")] == ["a", "b"]


@pytest.mark.parametrize("n_lines", [2, 3])
def test_export_that_was_cut_between_two_lines_brings_no_half_of_a_run(
        lab, tmp_path, other, capsys, n_lines):
    lab.conn.executemany("INSERT INTO run_metrics (run_id, metric_name, metric_value) "
                         "VALUES (?, 'long', ?)", [(lab.ids["lr_01"], i) for i in range(1_500)])
    out = tmp_path / "x.jsonl"
    run_cli("export", "-o", out, "--where", f"run_id = '{lab.ids['lr_01']}'")
    lines = out.read_text("utf-8").splitlines(keepends=True)
    assert len(lines) == 4                       # its head, the run, 1,000 points, the rest
    for rest in ([], ['{"run": {"run_id": "next"}}\n']):
        out.write_text("".join(lines[:n_lines] + rest), "utf-8")
        assert run_cli("import", out, "--db", other) == 1
        assert f"of '{lab.ids['lr_01']}' should be there by now" in capsys.readouterr().err
    assert table(other, "runs") == table(other, "run_metrics") == []


@pytest.mark.parametrize("name", ["a", "b"])
def test_points_of_a_run_that_stays_out_go_to_no_other(tmp_path, other, name):
    points = [{"points": [[1, None, run_id, 0.5, None]] * 3} for run_id in "abc"]
    path = write_lines(tmp_path / "x.jsonl", *[line for run_id, block in zip(
        "abc", points, strict=True) for line in ({"run": {
            "run_id": run_id, "status": "running" if run_id == name else "failed"}}, block)])
    run_cli("import", path, "--db", other)
    assert [(row["run_id"], row["metric_name"]) for row in table(other, "run_metrics")] == [
        (run_id, run_id) for run_id in "abc" if run_id != name for _ in range(3)]


@pytest.mark.parametrize(("column", "value", "told"), [
    ("status", "banana", "status is not one of running, finished, failed, killed in 2 runs, as "
                         "'banana' of 'a'"),
    ("timestamp", "yesterday", "timestamp is not a time such as 2026-11-01T09:30:00.000000Z in 2 "
                               "runs, as 'yesterday'"),
    ("ended_at", 5, "ended_at is not a time such as 2026-11-01T09:30:00.000000Z in 2 runs, as 5 of "
                    "'a'"),
    ("heartbeat_at", "2026-13-45", "heartbeat_at is not a time"),
    ("duration_s", "long", "duration_s is not a number"),
    ("params_json", "[1]", "params_json is not a JSON object in 2 runs, as '[1]' of 'a'"),
    ("artifacts_json", "{}", "artifacts_json is not a JSON list"),
    ("device_info", "{", "device_info is not a JSON object")])
@pytest.mark.parametrize("kind", ["jsonl", "db"])
def test_value_that_no_lab_writes_is_taken_in_and_told(
        tmp_path, other, capsys, kind, column, value, told):
    path = write_lines(tmp_path / "x.jsonl", *({"run": {"run_id": name, column: value}}
                                               for name in "ab"), {"run": {"run_id": "good"}})
    if kind == "db":
        told = told.replace("as 5", "as '5'")                # by its column's type
        assert run_cli("import", path, "--db", tmp_path / "x.db") == 0
        path = tmp_path / "x.db"
        capsys.readouterr()
    assert run_cli("import", path, "--db", other) == 0
    err = capsys.readouterr().err
    assert told in err and "taken in as it is" in err and len(err.splitlines()) == 2
    assert {row[column] for row in table(other, "runs")} >= {str(value)}
    assert run_cli("doctor", "--check", "--db", other) == 0
    told = told.replace("as 5", "as '5'")
    assert [line[:4] for line in capsys.readouterr().out.splitlines() if told in line] == ["warn"]


@pytest.mark.parametrize("text", ["2026-11-26T00:30:00+02:00", "2026-11-25 22:30",
                                  "2026-11-25T22:30Z"])
def test_times_are_taken_in_in_the_spelling_that_sorts(tmp_path, other, capsys, text):
    path = write_lines(tmp_path / "x.jsonl", {"run": {"run_id": "a", "timestamp": text,
                                                      "ended_at": text}})
    assert run_cli("import", path, "--db", other) == 0
    assert len(capsys.readouterr().err.splitlines()) == 1
    [row] = table(other, "runs")
    assert row["timestamp"] == row["ended_at"] == "2026-11-25T22:30:00.000000Z"


def test_import_of_sound_runs_tells_of_no_value(lab, tmp_path, other, capsys):
    run_cli("export", "-o", tmp_path / "x.jsonl")
    run_cli("import", tmp_path / "x.jsonl", "--db", other)
    assert capsys.readouterr().err == f"{len(lab.runs)} runs taken in, 0 already there\n"


def test_run_whose_status_is_null_is_taken_in_as_finished(tmp_path, other):
    path = write_lines(tmp_path / "x.jsonl", {"run": {"run_id": "a", "status": None}})
    assert run_cli("import", path, "--db", other) == 0
    assert [row["status"] for row in table(other, "runs")] == ["finished"]


def test_binary_file_and_foreign_database_are_refused(tmp_path, other, capsys):
    (tmp_path / "zip").write_bytes(gzip.compress(b"x" * 100))
    with contextlib.closing(sqlite3.connect(tmp_path / "foreign.db")) as conn:
        conn.execute("CREATE TABLE t (x)")
    for name in ("zip", "foreign.db", "absent"):
        assert run_cli("import", tmp_path / name, "--db", other) == 1
        assert name in capsys.readouterr().err


def test_csv_has_a_row_for_each_run_that_the_filter_keeps(lab, capsys):
    assert run_cli("export", "-o", "-", "--format", "csv", "--where",
                   "metrics.accuracy >= 0.9", "--status", "finished") == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    query = ailab.query_of(lab.conn, {"where": "metrics.accuracy >= 0.9", "status": "finished"})
    runs = ailab.list_runs(lab.conn, query, limit=100)
    assert [row["run_id"] for row in rows] == [run["run_id"] for run in runs] != []
    assert [float(row["metrics.accuracy"]) for row in rows] == [
        run["final_metrics"]["accuracy"] for run in runs]
    assert rows[0]["params.learning_rate"] == str(runs[0]["params"]["learning_rate"])


@pytest.mark.parametrize("note", ["=1+1", "+1 better", "-cmd|' /C calc'!A0", "@SUM(A1)", "\t=1"])
def test_csv_starts_no_formula_of_a_strangers_note(lab, capsys, note):
    ailab.set_note(lab.conn, lab.ids["lr_01"], note)
    lab.conn.execute("UPDATE runs SET params_json = '{\"a\": -1, \"b\": \"-1e-3\"}', "
                     "final_metrics_json = '{\"m\": \"-Infinity\"}' WHERE run_id = ?",
                     (lab.ids["lr_01"],))
    assert run_cli("export", "-o", "-", "--format", "csv", "--note-substring", note.strip()) == 0
    (row,) = csv.DictReader(io.StringIO(capsys.readouterr().out))
    assert row["note"] == "'" + note
    assert (row["params.a"], row["params.b"], row["metrics.m"]) == ("-1", "-1e-3", "-Infinity")


def test_export_with_where_takes_what_time_it_needs(lab, monkeypatch, capsys):
    monkeypatch.setattr(ailab, "WHERE_S", -1.0)
    monkeypatch.setattr(ailab, "PROGRESS_OPS", 1)
    assert run_cli("runs", "--where", "metrics.accuracy > 0") == 1
    assert "where takes longer" in capsys.readouterr().err
    assert run_cli("export", "-o", "-", "--format", "csv", "--where", "metrics.accuracy > 0") == 0
    assert len(capsys.readouterr().out.splitlines()) > 2


def test_export_that_fails_leaves_the_older_file_and_no_other(lab, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out" / "runs.jsonl"
    out.parent.mkdir()
    out.write_text("older")

    def fail(*_):
        yield "half"
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(ailab, "export_lines", fail)
    assert run_cli("export", "-o", out) == 1
    assert "No space left" in capsys.readouterr().err
    assert out.read_text() == "older" and os.listdir(out.parent) == ["runs.jsonl"]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such files")
@pytest.mark.parametrize("end", ["-wal", "-shm", "-journal", "/", ".fifo"])
def test_export_puts_its_file_in_the_place_of_files_only_and_of_none_of_the_labs(lab, capsys, end):
    out = os.path.dirname(lab.db_path) if end == "/" else lab.db_path + end
    if end == ".fifo":
        os.mkfifo(out)
    before = os.path.exists(out) and os.stat(out).st_ino
    assert run_cli("export", "--format", "jsonl", "-o", out) == 1
    assert "Traceback" not in capsys.readouterr().err
    assert (os.path.exists(out) and os.stat(out).st_ino) == before


@pytest.mark.parametrize("arguments", [
    ["-o", "x.csv", "--trash"], ["-o", "x.txt"], ["-o", "-"], ["-o", "-", "--format", "db"],
    ["-o", "x.db", "--status", "failed"]])
def test_export_that_cannot_be_is_refused_as_usage(lab, capsys, arguments):
    assert run_cli("export", *arguments) == 2
    assert capsys.readouterr().err


def test_export_never_writes_over_the_lab(lab, capsys):
    assert run_cli("export", "--format", "csv", "-o", lab.db_path) == 1
    assert "is the lab itself" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["db", "csv", "jsonl"])
def test_export_never_takes_the_place_of_another_lab(lab, other, capsys, kind):
    with contextlib.closing(ailab.open_lab(other)) as conn:
        insert_run(conn, run_id="theirs", timestamp="2026-11-01T00:00:00.000000Z")
    assert run_cli("export", "-o", other, "--format", kind) == 1
    assert "no older copy of this lab" in capsys.readouterr().err
    assert [row["run_id"] for row in table(other, "runs")] == ["theirs"]


def test_export_takes_the_place_of_an_older_copy_unless_that_is_in_use(lab, other, capsys):
    assert run_cli("export", "-o", other) == 0
    insert_run(lab.conn, run_id="newer", timestamp="2026-11-01T00:00:00.000000Z")
    with contextlib.closing(ailab.open_lab(other)) as conn:
        ailab.set_note(conn, lab.ids["lr_01"], "written to the copy")
        assert run_cli("export", "-o", other) == 1
        assert "other.db-wal' is there: end what has it open" in capsys.readouterr().err
    assert "newer" not in [row["run_id"] for row in table(other, "runs")]
    assert run_cli("export", "-o", other) == 0
    assert table(other, "runs") == table(lab.db_path, "runs")


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such modes")
@pytest.mark.parametrize("kind", ["csv", "jsonl", "db"])
def test_export_is_the_users_alone(lab, tmp_path, kind):
    run_cli("export", "-o", tmp_path / f"x.{kind}")
    assert stat.S_IMODE(os.stat(tmp_path / f"x.{kind}").st_mode) == 0o600


def test_copy_of_the_database_is_whole_while_a_run_logs(db_path, tmp_path):
    with lab_logger.start_run("live") as run:
        lab_logger.log(epoch=1, loss=0.5)
        assert run_cli("export", "-o", tmp_path / "copy.db") == 0
        lab_logger.log(epoch=2, loss=0.25)
    assert [path.name for path in tmp_path.glob("*copy*")] == ["copy.db"]
    os.chmod(tmp_path / "copy.db", 0o400)
    with contextlib.closing(sqlite3.connect(f"file:{tmp_path}/copy.db?immutable=1",
                                            uri=True)) as conn:
        assert conn.execute("PRAGMA journal_mode").fetchone() == ("delete",)
        assert conn.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert conn.execute("SELECT run_id FROM runs").fetchall() == [(run.run_id,)]


def test_point_that_is_text_or_a_blob_goes_through_an_export(lab, tmp_path, other):
    lab.conn.execute("INSERT INTO run_metrics (run_id, metric_name, metric_value) VALUES "
                     "(?, 'odd', 'abc'), (?, 'odd', x'00ff')", [lab.ids["lr_01"]] * 2)
    run_cli("export", "-o", tmp_path / "x.jsonl")
    assert run_cli("import", tmp_path / "x.jsonl", "--db", other) == 0
    assert len(table(other, "runs")) == len(lab.runs)


@pytest.mark.parametrize("kind", ["jsonl", "db"])
def test_run_that_is_alive_is_left_out_of_an_import_until_it_has_ended(
        db_path, tmp_path, other, capsys, kind):
    with lab_logger.start_run("live") as run:
        lab_logger.log(epoch=1, loss=0.5)
        run_cli("export", "-o", tmp_path / f"early.{kind}")
        assert run_cli("import", tmp_path / f"early.{kind}", "--db", other) == 0
        assert "0 runs taken in, 0 already there, 1 still running" in capsys.readouterr().err
        lab_logger.log(epoch=2, loss=0.25)
    run_cli("export", "-o", tmp_path / f"late.{kind}")
    run_cli("import", tmp_path / f"late.{kind}", "--db", other)
    conn = ailab.open_lab(other)
    assert ailab.get_run(conn, run.run_id)["final_metrics"] == {"loss": 0.25}
    conn.close()


def test_lab_is_taken_in_with_the_journals_that_wait_beside_it(db_path, other, tmp_path):
    process = train("from lab_logger import log, start_run\nimport os, signal\n"
                    "run = start_run('killed')\nfor e in range(50): log(epoch=e, loss=e)\n"
                    "os.kill(os.getpid(), signal.SIGKILL)", DB_PATH=db_path)
    process.communicate(timeout=60)
    assert run_cli("import", db_path, "--db", other) == 0
    (row,) = table(other, "runs")
    assert row["status"] == "killed" and len(table(other, "run_metrics")) == 50


# --- Purge ------------------------------------------------------------------------------------

def test_purge_says_what_would_go_and_takes_it_with_yes_alone(lab, capsys):
    run_id = lab.ids["lr_01"]
    ailab.delete_run(lab.conn, run_id)
    assert run_cli("purge") == 1
    out, err = capsys.readouterr()
    assert run_id in out and "1 run would go for good: give --yes" in err
    n_points = lab.conn.execute("SELECT count(*) FROM run_metrics WHERE run_id = ?",
                                (run_id,)).fetchone()[0]
    assert run_cli("purge", "--yes") == 0
    assert f"gone for good: 1 run, {n_points} points" in capsys.readouterr().err
    left = [column for row in table(lab.db_path, "runs") if row["run_id"] == run_id
            for column, value in row.items() if value is not None]
    assert set(left) <= {"run_id", "timestamp", "status", "journal_offset", "deleted_at",
                         "end_reason"}
    for name in ("run_metrics", "run_params", "metric_summary", "run_text"):
        assert run_id not in [row["run_id"] for row in table(lab.db_path, name)]
    for verb in ("restore", "show"):
        assert run_cli(verb, run_id) == 1
        assert f"there is no run '{run_id}'" in capsys.readouterr().err
    assert run_cli("purge", "--yes") == 0
    assert capsys.readouterr() == ("", "the trash is empty\n")


def test_purge_leaves_no_word_of_the_run_in_any_file_of_the_lab(lab, tmp_path):
    word = b"xylophonic"
    params = json.dumps({"phrase": word.decode(), "nested": {"list": [word.decode()] * 99}})
    lab.conn.execute("UPDATE runs SET params_json = ?, note = ?, git_diff = ? WHERE run_id = ?",
                     (params, word.decode(), word.decode() * 5_000, lab.ids["lr_01"]))
    lab.conn.execute("UPDATE run_metrics SET metric_name = ? WHERE run_id = ?",
                     (word.decode(), lab.ids["lr_01"]))
    ailab.take_in(lab.conn, lab.db_path)
    lab.conn.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    ailab.delete_run(lab.conn, lab.ids["lr_01"])

    def holders():
        return [path.name for path in tmp_path.glob("lab.db*")
                if path.is_file() and word in path.read_bytes().lower()]
    assert holders()
    assert run_cli("purge", "--yes") == 0
    assert holders() == []


@pytest.mark.parametrize("is_resumed", [False, True])
def test_journal_of_a_purged_run_that_is_found_again_brings_nothing_back(
        db_path, is_resumed):
    kept = {}
    with contextlib.ExitStack() as stack:
        for _ in range(1 + is_resumed):
            with lab_logger.start_run("again", run_id="job-1") as run:
                lab_logger.log(epoch=1, loss=0.5)
                kept[run.path] = stack.enter_context(open(run.path, "rb"))
        kept = {path: journal.read() for path, journal in kept.items()}      # gone by their names
    conn = ailab.open_lab(db_path)
    ailab.delete_run(conn, "job-1")
    assert run_cli("purge", "--yes") == 0
    for path, lines in kept.items():
        with open(path, "wb") as journal:
            journal.write(lines)
    ailab.take_in(conn, db_path)
    assert conn.execute("SELECT count(*) FROM run_metrics").fetchone() == (0,)
    assert ailab.trash(conn) == ailab.list_runs(conn, ailab.RunQuery(), limit=9) == []
    assert [path for path in kept if os.path.exists(path)] == []
    conn.close()


def test_run_that_is_not_in_the_trash_is_not_purged(lab, capsys):
    assert run_cli("purge", lab.ids["lr_01"], "--yes") == 1
    assert "in the trash" in capsys.readouterr().err
    assert ailab.get_run(lab.conn, lab.ids["lr_01"])["run_id"]


def test_running_run_is_not_purged(db_path, capsys):
    with lab_logger.start_run() as run:
        lab_logger.log(loss=1)
        run._drainer.drain_live(5)
        conn = ailab.open_lab(db_path)
        ailab.delete_run(conn, run.run_id)
        assert run_cli("purge", "--yes") == 1
        assert "is running" in capsys.readouterr().err
        conn.close()


def test_purged_run_does_not_come_back_with_its_journal_but_with_an_import(lab, tmp_path, api):
    with lab_logger.start_run("again") as run:
        lab_logger.log(epoch=1, loss=0.5)
        with open(run.path, "rb") as journal:
            lines = journal.read()
    out = tmp_path / "all.jsonl"
    run_cli("export", "-o", out)
    lines += b'{"t":1,"set":{"status":"finished"}}\n'
    ailab.delete_run(lab.conn, run.run_id)
    assert run_cli("purge", "--yes") == 0
    status, _, held = api("POST", f"/ingest?journal={run.run_id}&offset=0", lines[:50], {
        "Content-Type": "application/x-ndjson"})
    assert (status, held["status"]) == (200, "finished")
    with pytest.raises(ailab.NotFound, match="no run"):
        ailab.get_run(lab.conn, run.run_id)
    run_cli("import", out)
    assert ailab.get_run(lab.conn, run.run_id)["final_metrics"] == {"loss": 0.5}


def test_purged_run_takes_no_line_that_comes_later(lab):
    def lines(*records):
        return b"".join(ailab.encode(record) + b"\n" for record in records)
    head = lines({"v": 2, "t": 1.0, "set": {"timestamp": "2026-11-24T00:00:00.000000Z",
                                            "status": "running"}}, {"t": 2.0, "m": {"loss": 1}})
    more = lines({"t": 3.0, "m": {"loss": 0.5}}, {"t": 4.0, "set": {"note": "back", "status":
                                                                    "finished"}})
    lab_logger.take_lines(lab.conn, "silent", 0, head, "far")
    lab.conn.execute("UPDATE runs SET status = 'killed' WHERE run_id = 'silent'")
    ailab.delete_run(lab.conn, "silent")
    ailab.purge_run(lab.conn, lab.db_path, "silent")
    held, status = lab_logger.take_lines(lab.conn, "silent", len(head), more, "far")
    assert (held, status) == (len(head + more), "killed")
    assert ailab.trash(lab.conn) == []
    assert "silent" not in [row["run_id"] for row in table(lab.db_path, "run_metrics")]
    assert lab.conn.execute("SELECT note FROM runs WHERE run_id = 'silent'").fetchone() == (None,)
    with pytest.raises(ValueError, match="was purged: give another run_id"):
        lab_logger.take_lines(lab.conn, "silent.0123abcd", 0, head, "far")


def test_purge_as_json_names_what_went(lab, capsys):
    ailab.delete_run(lab.conn, lab.ids["lr_01"])
    assert run_cli("purge", "--yes", "--json") == 0
    assert [run["run_id"] for run in json.loads(capsys.readouterr().out)] == [lab.ids["lr_01"]]


# --- doctor --check ---------------------------------------------------------------------------

def test_check_of_a_good_lab_finds_nothing(lab, capsys):
    assert run_cli("doctor", "--check") == 0
    out = capsys.readouterr().out
    assert "integrity of the file: ok" in out
    assert "the index for reading has all, and no more" in out


def test_check_finds_orphans_a_wrong_tally_and_a_damaged_journal(lab, capsys):
    with lab_logger.start_run() as run:
        path = run.path
        with open(path, "ab") as journal:
            journal.write(b"not json\n")
        lab.conn.execute("INSERT INTO run_metrics (run_id, metric_name) VALUES ('gone', 'loss')")
        lab.conn.execute("UPDATE tally SET n_runs = n_runs + 1 WHERE kind = 'run'")
        assert run_cli("doctor", "--check") == 1
        out = capsys.readouterr().out
    assert "fail  1 point of runs that are not in the lab" in out
    assert "is made anew" in out and "1 damaged line" in out
    conn = ailab.open_lab(lab.db_path)
    assert ailab.count_runs(conn, ailab.RunQuery()) == len(lab.runs) + 1
    conn.close()


WRONG = {
    "metric_summary lacks 1 row and has 1": "UPDATE metric_summary SET max_value = 9 WHERE "
                                            "run_id = ? AND metric_name = 'accuracy'",
    "metric_summary lacks 0 rows and has 1": "INSERT INTO metric_summary (run_id, metric_name, "
                                             "n_points) VALUES (?, 'new', 3)",
    "run_params lacks 1 row and has 1": "UPDATE run_params SET value = -1 WHERE run_id = ? AND "
                                        "param_name = 'learning_rate'",
    "run_text lacks 1 row and has 1": "UPDATE run_text SET model_name = 'x' WHERE run_id = ?",
    "tally lacks 1 row and has 1": "UPDATE tally SET n_runs = 99 WHERE kind = 'metric' AND "
                                   "name = 'accuracy' AND ? <> ''",
    "full-text search finds other words": "INSERT INTO run_search (run_search, rowid, text) "
                                          "SELECT 'delete', key, text FROM run_text "
                                          "WHERE run_id = ?"}


@pytest.mark.parametrize("told", WRONG)
def test_check_finds_what_is_wrong_in_each_part_of_the_index_and_mends_it(lab, capsys, told):
    lab.conn.execute(WRONG[told], (lab.ids["lr_01"],))
    assert run_cli("doctor", "--check") == 0
    out = capsys.readouterr().out
    assert f"warn  the index for reading is wrong: {told}" in out
    assert (lab.ids["lr_01"] in out or "as of metric accuracy" in out) == ("words" not in told)
    assert "ok    the index for reading is made anew" in out
    assert run_cli("doctor", "--check") == 0
    assert "the index for reading has all, and no more" in capsys.readouterr().out


def test_check_takes_points_that_are_not_yet_summarised_for_no_fault(lab):
    lab.conn.execute("INSERT INTO run_metrics (run_id, metric_name, metric_value) "
                     "VALUES (?, 'late', 1)", (lab.ids["lr_01"],))
    assert ailab.is_stale(lab.conn)
    assert ailab.index_problems(lab.conn, lab.db_path) == []


def test_check_is_of_one_moment_while_points_come_in(lab, monkeypatch):
    calls, refresh = [], ailab.refresh

    def refresh_and_log(conn):
        refresh(conn)
        calls.append(conn)
        if len(calls) < 3:
            lab.conn.execute("INSERT INTO run_metrics (run_id, metric_name, metric_value) "
                             "VALUES (?, 'late', 1)", (lab.ids["lr_01"],))
    monkeypatch.setattr(ailab, "refresh", refresh_and_log)
    assert ailab.index_problems(lab.conn, lab.db_path) == []
    assert [conn is lab.conn for conn in calls] == [True, True, True, False]


def test_check_finds_journals_that_cannot_be_read_or_have_another_offset(lab, capsys):
    folder = lab.db_path + ".journals"
    os.mkdir(folder)
    (journal := "job-1.jsonl")
    for name, text in ((journal, '{"v": 2, "t": 1, "set": {"status": "running"}}\n'),
                       ("a.b.c.jsonl", "{}\n"), ("deep.jsonl", "[" * 100_000 + "\n")):
        with open(os.path.join(folder, name), "w", encoding="utf-8") as file:
            file.write(text)
    insert_run(lab.conn, run_id="job-1", status="running", journal_offset=500)
    assert run_cli("doctor", "--check", "--json") == 1
    told = [line for line in json.loads(capsys.readouterr().out) if line["level"] == "fail"]
    for name, words in ((journal, "500 of them in the lab, which is no end of a line"),
                        ("a.b.c.jsonl", "cannot be read"), ("deep.jsonl", "1 damaged line")):
        assert [line for line in told if name in line["text"] and words in line["text"]], name


def test_check_of_a_torn_lab_is_a_sentence_and_the_other_checks_go_on(lab, capsys):
    lab.conn.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    lab.conn.close()
    size = os.path.getsize(lab.db_path)
    with open(lab.db_path, "r+b") as file:
        file.seek(4096 * 5)
        file.write(b"\xa5" * (size - 4096 * 8))
    assert run_cli("doctor", "--check") == 1
    out, err = capsys.readouterr()
    assert "fail" in out and "port" in out
    assert "Traceback" not in err


def test_a_lab_that_is_locked_is_busy_and_a_damaged_one_has_a_way_out(lab, capsys, monkeypatch):
    monkeypatch.setattr(ailab, "READ_WAIT_S", 0.1)
    monkeypatch.setattr(ailab, "WRITE_WAIT_S", 0.1)
    assert run_cli("export", "--format", "db", "-o", lab.db_path + ".copy") == 0
    with contextlib.closing(sqlite3.connect(lab.db_path + ".copy")) as holder:
        holder.execute("BEGIN EXCLUSIVE")
        assert run_cli("runs", "--db", lab.db_path + ".copy") == 1
    assert "is busy: try again in a moment" in capsys.readouterr().err
    with open(lab.db_path + ".copy", "r+b") as file:
        file.seek(100)
        file.write(b"\xff" * 8_000)
    assert run_cli("runs", "--db", lab.db_path + ".copy") == 1
    assert "malformed): `ailab doctor` says more" in capsys.readouterr().err
    assert run_cli("doctor", "--db", lab.db_path + ".copy") == 1
    assert "put an export, or a copy, in its place" in capsys.readouterr().out


def test_a_table_of_points_without_ids_is_taken_in(tmp_path, other, capsys):
    with contextlib.closing(sqlite3.connect(tmp_path / "plain.db")) as conn:
        conn.executescript("""
            CREATE TABLE runs (run_id TEXT, note TEXT); INSERT INTO runs VALUES ('a', 'n');
            CREATE TABLE run_metrics (run_id TEXT, epoch INTEGER, metric_name TEXT,
                                      metric_value REAL);
            INSERT INTO run_metrics VALUES ('a', 1, 'loss', 0.5), ('a', 2, 'loss', 0.25)""")
    assert run_cli("import", tmp_path / "plain.db", "--db", other) == 0
    assert [row["metric_value"] for row in table(other, "run_metrics")] == [0.5, 0.25]
    with contextlib.closing(sqlite3.connect(tmp_path / "half.db")) as conn:
        conn.execute("CREATE TABLE runs (run_id TEXT)")
    assert run_cli("import", tmp_path / "half.db", "--db", other) == 1
    assert "no tables of runs and run_metrics" in capsys.readouterr().err
