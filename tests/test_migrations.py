"""Opening a store: new, the spec's own, an older one, a newer one, and what is no store at all."""
import os
import sqlite3
import stat
import subprocess
import sys

import pytest
from conftest import ROOT, insert_points, insert_run

import ailab
import lab_logger

# The two tables exactly as section 3.1 of the spec writes them.
SPEC_SCHEMA = """
CREATE TABLE runs (
    run_id TEXT PRIMARY KEY,
    timestamp TEXT,
    experiment_name TEXT,
    model_name TEXT,
    task_name TEXT,
    dataset_id TEXT,
    command TEXT,
    git_hash TEXT,
    git_diff TEXT,
    python_version TEXT,
    pip_freeze TEXT,
    device_info TEXT,
    params_json TEXT,          -- full kwargs of the run
    final_metrics_json TEXT,   -- final metrics (accuracy, f1, loss, etc.)
    artifacts_json TEXT,       -- ["path/to/ckpt", "path/to/metrics.csv"]
    wandb_url TEXT,
    note TEXT                  -- free-form tag, e.g. "PUBLISH", "BAD", etc.
);
CREATE TABLE run_metrics (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    run_id TEXT,
    epoch INTEGER,
    metric_name TEXT,   -- "train_loss", "val_loss", "accuracy", etc.
    metric_value REAL,
    FOREIGN KEY(run_id) REFERENCES runs(run_id)
);
"""


def make_spec_lab(path):
    """Fill a store that knows only the spec's tables with two runs and four points."""
    old = sqlite3.connect(path)
    old.executescript(SPEC_SCHEMA)
    insert_run(old, run_id="run-a", timestamp="2026-10-01T08:00:00", experiment_name="old",
               model_name="linear_svm", params_json='{"learning_rate": 0.1}',
               final_metrics_json='{"accuracy": 0.9, "f1": 0.8}', artifacts_json='["a.csv"]',
               note="PUBLISH")
    insert_run(old, run_id="run-b", timestamp="2026-10-02T08:00:00", experiment_name="old",
               final_metrics_json='{"accuracy": 0.7}')
    insert_points(old, "run-a", [(1, "train_loss", 0.5), (2, "train_loss", 0.25),
                                 (1, "accuracy", 0.6), (2, "accuracy", 0.9)])
    old.commit()
    old.close()


def summary(conn, run_id, metric_name):
    return conn.execute("SELECT value, is_returned, n_points, first_value, last_value FROM "
                        "metric_summary WHERE run_id = ? AND metric_name = ?",
                        (run_id, metric_name)).fetchone()


def shape(path):
    with sqlite3.connect(path) as conn:
        return conn.execute("SELECT type, name, sql FROM sqlite_master ORDER BY 1, 2").fetchall()


def read_bytes(path):
    with open(path, "rb") as file:
        return file.read()


# --- New stores -----------------------------------------------------------------

@pytest.fixture(params=[lab_logger.connect, ailab.open_lab], ids=["logger", "server"])
def open_it(request):
    """Either way to open a store: the logger's, or the server's, which adds its index."""
    return request.param


def test_a_store_when_nothing_is_there_is_made_with_its_folder_and_both_tables(tmp_path, open_it):
    path = str(tmp_path / "deep" / "er" / "lab.db")
    conn = open_it(path)
    assert conn.execute("SELECT count(*) FROM runs").fetchone() == (0,)
    assert conn.execute("SELECT count(*) FROM run_metrics").fetchone() == (0,)
    assert conn.execute("PRAGMA user_version").fetchone() == (lab_logger.SCHEMA_VERSION,)
    conn.close()


def test_a_store_when_the_file_is_empty_gets_the_tables(db_path, open_it):
    open(db_path, "w").close()
    conn = open_it(db_path)
    assert conn.execute("SELECT count(*) FROM runs").fetchone() == (0,)
    conn.close()


def test_a_store_when_it_is_new_is_private(db_path, open_it):
    open_it(db_path).close()
    assert stat.S_IMODE(os.stat(db_path).st_mode) == 0o600


def test_a_new_store_uses_wal(conn):
    assert conn.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_the_columns_of_the_spec_come_with_their_names(conn):
    spec = sqlite3.connect(":memory:")
    spec.executescript(SPEC_SCHEMA)
    for table in ("runs", "run_metrics"):
        wanted = {row[1] for row in spec.execute(f"PRAGMA table_info({table})")}
        assert wanted <= {row[1] for row in conn.execute(f"PRAGMA table_info({table})")}
    spec.close()


def test_a_store_when_nothing_is_there_to_read_is_one_sentence(db_path, open_it):
    with pytest.raises(lab_logger.StoreError) as caught:
        open_it(db_path, "ro")
    assert repr(db_path) in str(caught.value)
    assert "DB_PATH" in str(caught.value)
    assert not os.path.exists(db_path)


def test_a_read_only_connection_cannot_write(lab):
    conn = ailab.open_lab(lab.db_path, "ro")
    with pytest.raises(sqlite3.OperationalError):
        conn.execute("UPDATE runs SET note = 'x'")
    conn.close()


@pytest.mark.parametrize("opener", ["lab_logger.connect", "ailab.open_lab"])
def test_processes_that_race_to_create_a_store_all_get_it(db_path, opener):
    code = (f"import sys, {opener.split('.')[0]}; c = {opener}(sys.argv[1]); "
            "c.execute('INSERT INTO runs (run_id) VALUES (?)', (sys.argv[2],))")
    racers = [subprocess.Popen([sys.executable, "-c", code, db_path, f"racer-{n}"], cwd=ROOT,
                               stderr=subprocess.PIPE, text=True) for n in range(4)]
    assert [racer.communicate()[1] for racer in racers] == [""] * 4
    conn = ailab.open_lab(db_path)
    assert conn.execute("SELECT run_id FROM runs ORDER BY 1").fetchall() == [
        ("racer-0",), ("racer-1",), ("racer-2",), ("racer-3",)]
    assert conn.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    conn.close()


# --- A lab with only the spec's tables --------------------------------------------

def test_a_spec_lab_is_taken_over_with_every_row(db_path):
    make_spec_lab(db_path)
    conn = ailab.open_lab(db_path)
    assert conn.execute("SELECT run_id, experiment_name, note, params_json, artifacts_json, status "
                        "FROM runs ORDER BY run_id").fetchall() == [
        ("run-a", "old", "PUBLISH", '{"learning_rate": 0.1}', '["a.csv"]', "finished"),
        ("run-b", "old", None, None, None, "finished")]
    assert conn.execute("SELECT id, run_id, epoch, metric_name, metric_value FROM run_metrics "
                        "ORDER BY id").fetchall() == [
        (1, "run-a", 1, "train_loss", 0.5), (2, "run-a", 2, "train_loss", 0.25),
        (3, "run-a", 1, "accuracy", 0.6), (4, "run-a", 2, "accuracy", 0.9)]
    conn.close()


def test_a_spec_lab_when_taken_over_has_its_summaries(db_path):
    make_spec_lab(db_path)
    conn = ailab.open_lab(db_path)
    assert summary(conn, "run-a", "accuracy") == (0.9, 1, 2, 0.6, 0.9)
    assert summary(conn, "run-a", "train_loss") == (0.25, 0, 2, 0.5, 0.25)
    assert summary(conn, "run-a", "f1") == (0.8, 1, 0, None, None)
    assert summary(conn, "run-b", "accuracy") == (0.7, 1, 0, None, None)
    assert conn.execute("SELECT * FROM run_params").fetchall() == [("run-a", "learning_rate", 0.1)]
    assert conn.execute("SELECT count(*) FROM stale").fetchone() == (0,)
    conn.close()


def test_a_spec_lab_when_opened_read_only_is_taken_over_first(db_path):
    make_spec_lab(db_path)
    conn = ailab.open_lab(db_path, "ro")
    assert conn.execute("SELECT run_id, status FROM runs ORDER BY 1").fetchall() == [
        ("run-a", "finished"), ("run-b", "finished")]
    conn.close()


def test_a_spec_lab_when_taken_over_still_takes_the_specs_inserts(db_path):
    make_spec_lab(db_path)
    ailab.open_lab(db_path).close()
    plain = sqlite3.connect(db_path)
    insert_run(plain, run_id="run-c", timestamp="2026-10-03T08:00:00")
    insert_points(plain, "run-c", [(1, "accuracy", 0.5)])
    plain.commit()
    plain.close()
    conn = ailab.open_lab(db_path)
    with lab_logger.transaction(conn):
        ailab.refresh(conn)
    assert summary(conn, "run-c", "accuracy") == (0.5, 0, 1, 0.5, 0.5)
    conn.close()


def test_a_spec_lab_with_broken_json_is_taken_over_all_the_same(db_path):
    old = sqlite3.connect(db_path)
    old.executescript(SPEC_SCHEMA)
    insert_run(old, run_id="broken", params_json="{not json", final_metrics_json="[1, 2",
               artifacts_json="\x00", device_info="[]")
    insert_run(old, run_id="odd", params_json="[1]", final_metrics_json='"text"')
    old.commit()
    old.close()
    conn = ailab.open_lab(db_path)
    assert conn.execute("SELECT run_id, params_json FROM runs ORDER BY 1").fetchall() == [
        ("broken", "{not json"), ("odd", "[1]")]
    conn.close()


def test_a_store_that_only_the_logger_has_opened_gets_its_summaries_from_the_server(db_path):
    plain = lab_logger.connect(db_path)
    insert_run(plain, run_id="logged", params_json='{"lr": 0.1}',
               final_metrics_json='{"accuracy": 0.9}')
    insert_points(plain, "logged", [(1, "accuracy", 0.4), (2, "accuracy", 0.6)])
    plain.close()
    conn = ailab.open_lab(db_path)
    assert summary(conn, "logged", "accuracy") == (0.9, 1, 2, 0.4, 0.6)
    assert conn.execute("SELECT * FROM run_params").fetchall() == [("logged", "lr", 0.1)]
    conn.close()


# --- A lab whose index another version made ---------------------------------------------

OLD_INDEX = """
DROP TABLE summarised;
DROP TABLE tally;
DROP TRIGGER metric_insert;
DROP TRIGGER metric_delete;
DROP TRIGGER run_metrics_replace;
CREATE TRIGGER run_metrics_insert AFTER INSERT ON run_metrics BEGIN
    INSERT INTO metric_summary (run_id, metric_name, value, n_points)
    VALUES (NEW.run_id, NEW.metric_name, NEW.metric_value, 1)
    ON CONFLICT (run_id, metric_name) DO UPDATE SET n_points = n_points + 1; END;
"""


@pytest.mark.parametrize("mode", ["rw", "ro"])
def test_an_index_of_an_older_version_is_made_anew(lab, mode):
    """Version 0.1 kept summaries by a trigger on every point: both together would count twice."""
    wanted = shape(lab.db_path)
    lab.conn.executescript(OLD_INDEX)
    insert_points(lab.conn, lab.ids["lr_01"], [(6, "accuracy", 0.5)])
    conn = ailab.open_lab(lab.db_path, mode)
    assert shape(lab.db_path) == wanted
    assert summary(conn, lab.ids["lr_01"], "accuracy")[2] == 6
    insert_points(lab.conn, lab.ids["lr_01"], [(7, "accuracy", 0.5)])
    with lab_logger.transaction(lab.conn):
        ailab.refresh(lab.conn)
    assert summary(conn, lab.ids["lr_01"], "accuracy")[2] == 7
    assert conn.execute("SELECT count(*) FROM run_search WHERE run_search MATCH 'publish'"
                        ).fetchone() == (1,)
    conn.close()


def test_an_index_part_that_was_made_otherwise_is_made_anew(lab, db_path):
    parts = "SELECT name, sql FROM sqlite_master ORDER BY name"
    made = lab.conn.execute(parts).fetchall()
    lab.conn.executescript("DROP INDEX runs_duration; CREATE INDEX runs_duration ON runs (note);")
    assert lab.conn.execute(parts).fetchall() != made
    ailab.open_lab(db_path).close()
    assert lab.conn.execute(parts).fetchall() == made


def test_a_lab_of_the_schema_before_gets_its_new_columns(lab):
    lab.conn.executescript("".join(f"ALTER TABLE runs DROP COLUMN {name};" for name in (
        "end_reason", "received_from", "resumptions_json")) + "PRAGMA user_version = 1;")
    ailab.open_lab(lab.db_path, "ro").close()
    run = ailab.get_run(lab.conn, lab.ids["lr_01"])
    assert (run["end_reason"], run["received_from"], run["resumptions"]) == (None, None, [])


# --- Other versions -----------------------------------------------------------------

def test_a_store_when_opened_again_keeps_schema_and_rows(lab):
    before = shape(lab.db_path)
    conn = ailab.open_lab(lab.db_path)
    assert conn.execute("SELECT count(*) FROM runs").fetchone() == (12,)
    conn.close()
    assert shape(lab.db_path) == before


def test_every_version_has_a_step_that_leads_to_it():
    assert len(lab_logger.MIGRATIONS) == lab_logger.SCHEMA_VERSION


@pytest.mark.parametrize("mode", ["rw", "ro"])
def test_a_newer_store_is_refused_and_left_byte_for_byte(db_path, mode, open_it):
    newer = sqlite3.connect(db_path)
    newer.execute("CREATE TABLE runs (run_id TEXT, marvel TEXT)")
    newer.execute("PRAGMA user_version = 99")
    newer.close()
    before = read_bytes(db_path)
    with pytest.raises(lab_logger.StoreError, match="version 99.*update AI-Lab"):
        open_it(db_path, mode)
    assert read_bytes(db_path) == before


# --- No store at all -----------------------------------------------------------------

@pytest.mark.parametrize("content", [b"this is a text file, not a database\n" * 40, b"SQLite",
                                     b"SQLite format 3\0" + b"\xff" * 4096, b"\0" * 5000],
                         ids=["text", "short", "torn", "zeros"])
@pytest.mark.parametrize("mode", ["rw", "ro"])
def test_a_file_that_is_no_database_is_refused_and_left_untouched(db_path, content, mode, open_it):
    with open(db_path, "wb") as file:
        file.write(content)
    with pytest.raises(lab_logger.StoreError) as caught:
        open_it(db_path, mode)
    assert "\n" not in str(caught.value)
    assert repr(db_path) in str(caught.value)
    assert read_bytes(db_path) == content


@pytest.mark.parametrize("mode", ["rw", "ro"])
@pytest.mark.parametrize("version", [0, lab_logger.SCHEMA_VERSION])
def test_the_database_of_another_program_is_refused_and_left_untouched(
        db_path, mode, version, open_it):
    conn = sqlite3.connect(db_path)
    conn.executescript(f"CREATE TABLE customers (name); PRAGMA user_version = {version}")
    conn.close()
    before = read_bytes(db_path)
    with pytest.raises(lab_logger.StoreError, match="the database of another program"):
        open_it(db_path, mode)
    assert read_bytes(db_path) == before


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="no /proc")
def test_a_store_that_cannot_be_used_is_closed_again(db_path):
    with open(db_path, "wb") as file:
        file.write(b"SQLite format 3\0" + bytes(range(256)) * 32)
    before, errors = len(os.listdir("/proc/self/fd")), []
    for mode in ("rw", "ro") * 10:
        with pytest.raises(lab_logger.StoreError, match="cannot be used") as caught:
            lab_logger.connect(db_path, mode)
        errors.append(caught.value)               # with what its traceback holds
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_folder_in_the_place_of_the_store_is_one_sentence(db_path):
    os.mkdir(db_path)
    with pytest.raises(lab_logger.StoreError, match="cannot be used"):
        ailab.open_lab(db_path)


def test_a_foreign_table_named_runs_is_left_with_its_rows(db_path):
    other = sqlite3.connect(db_path)
    other.executescript("CREATE TABLE runs (distance_km REAL); INSERT INTO runs VALUES (42.2)")
    other.close()
    with pytest.raises(lab_logger.StoreError) as caught:
        ailab.open_lab(db_path)
    assert "\n" not in str(caught.value)
    kept = sqlite3.connect(db_path)
    assert kept.execute("SELECT * FROM runs").fetchall() == [(42.2,)]
    kept.close()
