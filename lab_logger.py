"""AI-Lab's logger: paste this one file into a project and every training run is recorded.

    from lab_logger import log, log_run

    @log_run(experiment_name="iris_svm")
    def train(learning_rate=0.01, n_epochs=30):
        for epoch in range(1, n_epochs + 1):
            ...                                            # train
            log(epoch=epoch, train_loss=loss, accuracy=accuracy)
        return {"accuracy": accuracy, "artifacts": ["model.joblib"]}

    train(learning_rate=0.1)                               # one call, one run

Recorded, into one SQLite file (~/.ai-lab/lab.db, or DB_PATH): params (all arguments), metrics while
they come, what the function returns, git hash and diff, command, Python, packages, device, how the
call ended. `python ailab.py serve` shows it.

Every `log()` is one append to the run's own journal file, which survives `kill -9`; a background
thread moves journals into SQLite. A store that is locked, full, read-only or broken costs one
warning on stderr and never the training: the journal is kept, and taken in by the next process
that opens the store. Standard library only, Python 3.10 or later, Linux, macOS and Windows.

Sections: configuration, store, capture, journal and drain, run, log_run.
"""
from __future__ import annotations

import atexit
import contextlib
import contextvars
import functools
import json
import math
import os
import re
import sys
import threading
import time

__all__ = ["log", "log_artifact", "log_run", "note", "start_run"]
__version__ = "0.1.0"

SCHEMA_VERSION = 1
DRAIN_EVERY_S = 0.5          # how far the store may be behind a live run's journal
HEARTBEAT_EVERY_S = 10.0     # a running run says this often that it is alive
FINISH_WAIT_S = 2.0          # a call that returns waits this long for a busy store
EXIT_WAIT_S = 15.0           # and the end of the process this long, for all its runs together
CHUNK_BYTES = 1 << 19        # of a journal, taken in by one transaction
MAX_TEXT = 1_000             # characters of the repr of an object that JSON cannot hold
MAX_DIFF_BYTES = 1 << 20     # of git_diff
MAX_UNTRACKED_BYTES = 1 << 17  # of one untracked file in git_diff


class StoreError(Exception):
    """The lab's database cannot be used; the message is one sentence for the user."""


# --- Configuration ------------------------------------------------------------

def read_dotenv(start: str | None = None) -> tuple[str | None, dict[str, str]]:
    """Read the nearest `.env` from `start` (the working directory) upward.

    Returns its path, None if there is none, and its KEY=VALUE lines; comments, `export` and
    matching quotes are taken off.
    """
    with contextlib.suppress(OSError):
        folder = os.path.abspath(start or os.getcwd())
        while True:
            path = os.path.join(folder, ".env")
            if os.path.isfile(path):
                with open(path, encoding="utf-8", errors="replace") as lines:
                    return path, dict(_dotenv_pairs(lines))
            if os.path.dirname(folder) == folder:
                break
            folder = os.path.dirname(folder)
    return None, {}


def _dotenv_pairs(lines):
    for line in lines:
        key, equals, value = line.strip().removeprefix("export ").partition("=")
        if not equals or key.lstrip().startswith("#"):
            continue
        value = value.strip()
        if value[:1] in ("'", '"') and value[:1] in value[1:]:
            value = value[1:value.index(value[0], 1)]
        else:
            value = re.split(r"\s#", value, maxsplit=1)[0].strip()
        yield key.strip(), value


def setting(key: str, default: str = "") -> tuple[str, str]:
    """Look a setting up: environment, the nearest `.env`, `default`.

    Returns the value and where it came from, for messages. An empty value counts as not set.
    """
    if os.environ.get(key):
        return os.environ[key], "the environment"
    path, values = read_dotenv()
    if values.get(key):
        return values[key], str(path)
    return default, "the default"


def default_db_path() -> str:
    """Absolute path of the lab's database: DB_PATH (relative to its `.env`), else ~/.ai-lab/lab.db."""
    value, source = setting("DB_PATH", os.path.join("~", ".ai-lab", "lab.db"))
    base = os.path.dirname(source) if source.endswith(".env") else ""
    return os.path.abspath(os.path.join(base, os.path.expanduser(value)))


# --- Store --------------------------------------------------------------------
# The tables `runs` and `run_metrics` are public: any tool may read, add and change rows under the
# spec's columns. Triggers note what changed in `stale`; refresh() then brings the three side tables
# up to date, the same way for our own writes and everybody else's.

RUN_COLUMNS = {                       # in order; what grows large comes last, so that lists skip it
    "run_id": "TEXT PRIMARY KEY",     # UUID
    "timestamp": "TEXT",              # start; every time is UTC, ISO 8601, 27 characters
    "experiment_name": "TEXT",
    "model_name": "TEXT",
    "task_name": "TEXT",
    "dataset_id": "TEXT",
    "command": "TEXT",                # as launched, secrets replaced by ***
    "git_hash": "TEXT",               # NULL outside a repository
    "python_version": "TEXT",
    "wandb_url": "TEXT",
    "note": "TEXT",
    "status": "TEXT NOT NULL DEFAULT 'finished'",  # running, finished, failed, killed
    "ended_at": "TEXT",               # NULL while running
    "duration_s": "REAL",             # by a monotonic clock; NULL while running
    "hostname": "TEXT",
    "pid": "INTEGER",
    "process_key": "TEXT",            # tells a recycled pid: boot id/pid namespace/start time
    "heartbeat_at": "TEXT",           # the last sign of life
    "parent_run_id": "TEXT",          # the run that was current when this one began
    "cwd": "TEXT",                    # working directory at the start
    "journal_offset": "INTEGER",      # bytes of the journal that are in the store
    "deleted_at": "TEXT",             # in the trash since; NULL = not in the trash
    "params_json": "TEXT",            # object
    "final_metrics_json": "TEXT",     # object; non-finite numbers are "NaN", "Infinity", "-Infinity"
    "artifacts_json": "TEXT",         # list of paths
    "device_info": "TEXT",            # JSON object
    "error": "TEXT",                  # traceback
    "pip_freeze": "TEXT",             # name==version, one a line
    "git_diff": "TEXT",               # against HEAD, untracked text files included, capped
}
METRIC_COLUMNS = {
    "id": "INTEGER PRIMARY KEY AUTOINCREMENT",
    "run_id": "TEXT",
    "epoch": "INTEGER",
    "metric_name": "TEXT",
    "metric_value": "REAL",           # NULL is a logged NaN: SQLite stores it so
    "step": "INTEGER",
    "timestamp": "TEXT",              # NULL in rows that came by plain SQL
}
_AT = [f"{which}_{field}" for which in ("first", "last", "min", "max")
       for field in ("value", "epoch", "step")]
_INDEX_SCHEMA = f"""
CREATE TABLE metric_summary (        -- one row per run and metric
    run_id TEXT NOT NULL,
    metric_name TEXT NOT NULL,
    value REAL,                      -- final metric: returned, else the last logged; NULL is NaN
    is_returned INTEGER NOT NULL DEFAULT 0,
    n_points INTEGER NOT NULL DEFAULT 0,
    {" , ".join(f"{column} {'REAL' if column.endswith('value') else 'INTEGER'}" for column in _AT)},
    PRIMARY KEY (run_id, metric_name)  -- min and max are over finite values
) WITHOUT ROWID;
CREATE INDEX metric_summary_value ON metric_summary (metric_name, value, run_id);
CREATE TABLE run_params (            -- one row per run and param, nested names joined by dots
    run_id TEXT NOT NULL,
    param_name TEXT NOT NULL,
    value,                           -- number, text, JSON text of a list; NULL is null
    PRIMARY KEY (run_id, param_name)
) WITHOUT ROWID;
CREATE INDEX run_params_value ON run_params (param_name, value, run_id);
CREATE TABLE run_text (              -- what full-text search reads
    key INTEGER PRIMARY KEY,         -- our own key, since VACUUM may renumber rowids
    run_id TEXT NOT NULL UNIQUE,
    text TEXT NOT NULL
);
CREATE VIRTUAL TABLE run_search USING fts5(text, content='run_text', content_rowid='key');
CREATE TRIGGER run_text_insert AFTER INSERT ON run_text BEGIN
    INSERT INTO run_search (rowid, text) VALUES (NEW.key, NEW.text); END;
CREATE TRIGGER run_text_delete AFTER DELETE ON run_text BEGIN
    INSERT INTO run_search (run_search, rowid, text) VALUES ('delete', OLD.key, OLD.text); END;
CREATE TABLE stale (                 -- what refresh() has to bring up to date
    run_id TEXT NOT NULL,
    metric_name TEXT NOT NULL,       -- '' is the row in runs
    PRIMARY KEY (run_id, metric_name)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS run_metrics_curve ON run_metrics (run_id, metric_name);
CREATE INDEX runs_timestamp ON runs (timestamp, run_id);
CREATE INDEX runs_duration ON runs (duration_s, run_id);
CREATE INDEX runs_command ON runs (command, timestamp);
CREATE INDEX runs_note ON runs (note, timestamp) WHERE note IS NOT NULL;
CREATE INDEX runs_parent ON runs (parent_run_id) WHERE parent_run_id IS NOT NULL;
""" + "".join(f"CREATE INDEX runs_{column} ON runs ({column}, timestamp);\n" for column in (
    "experiment_name", "model_name", "task_name", "dataset_id", "status"))
_MARK = "INSERT OR IGNORE INTO stale SELECT {0}.run_id, {1} WHERE {0}.run_id IS NOT NULL;"
_RUN_MARK, _OLD_RUN_MARK = _MARK.format("NEW", "''"), _MARK.format("OLD", "''")
_NEW_POINT, _OLD_POINT = (_MARK.format(row, f"ifnull({row}.metric_name, '')") for row in ("NEW", "OLD"))
_INDEXED = ("run_id, experiment_name, model_name, task_name, dataset_id, note, "
            "params_json, final_metrics_json")
_TRIGGERS = f"""
CREATE TRIGGER runs_insert AFTER INSERT ON runs BEGIN {_RUN_MARK} END;
CREATE TRIGGER runs_update AFTER UPDATE OF {_INDEXED} ON runs BEGIN {_OLD_RUN_MARK} {_RUN_MARK} END;
CREATE TRIGGER runs_delete AFTER DELETE ON runs BEGIN {_OLD_RUN_MARK} END;
CREATE TRIGGER run_metrics_insert AFTER INSERT ON run_metrics
    WHEN NEW.timestamp IS NULL BEGIN {_NEW_POINT} END;  -- our own points come with a time, summarised
CREATE TRIGGER run_metrics_update AFTER UPDATE ON run_metrics BEGIN {_OLD_POINT} {_NEW_POINT} END;
CREATE TRIGGER run_metrics_delete AFTER DELETE ON run_metrics BEGIN {_OLD_POINT} END;
INSERT INTO stale SELECT run_id, '' FROM runs WHERE run_id IS NOT NULL;
INSERT OR IGNORE INTO stale SELECT DISTINCT run_id, metric_name FROM run_metrics
    WHERE run_id IS NOT NULL AND metric_name IS NOT NULL;
"""


def _create(conn) -> None:
    """Bring a file of version 0 to version 1: an empty one, or a lab with only the spec's tables."""
    for table, columns in (("runs", RUN_COLUMNS), ("run_metrics", METRIC_COLUMNS)):
        body = ", ".join(f"{name} {kind}" for name, kind in columns.items())
        if table == "run_metrics":
            body += ", FOREIGN KEY(run_id) REFERENCES runs(run_id)"
        conn.execute(f"CREATE TABLE IF NOT EXISTS {table} ({body})")
        present = {row[1] for row in conn.execute(f"PRAGMA table_info({table})")}
        for name, kind in columns.items():
            if name not in present:
                conn.execute(f"ALTER TABLE {table} ADD COLUMN {name} {kind}")
    for statement in _statements(_INDEX_SCHEMA + _TRIGGERS):
        conn.execute(statement)


def _statements(script: str):
    """Yield a script's statements: executescript() would commit the transaction it runs in."""
    import sqlite3
    pending = ""
    for line in script.splitlines(keepends=True):
        pending += line
        if sqlite3.complete_statement(pending):
            yield pending
            pending = ""


MIGRATIONS = (_create,)               # append only: entry N brings version N to version N + 1


def connect(path: str, mode: str = "rw", timeout_s: float = 30.0):
    """Open the lab's database, made or migrated first where needed.

    Args:
        path: the file; "rw" creates it, its folder and its tables, private to the user.
        mode: "rw" or "ro" (the connection cannot write; an older file is migrated first).
        timeout_s: how long a statement waits for another writer.
    Returns: a sqlite3.Connection in autocommit mode; a caller spells BEGIN IMMEDIATE itself.
    Raises: StoreError, one sentence: missing (ro), not a database, newer than this file, not writable.
    """
    import sqlite3
    try:
        if mode == "ro":
            if not os.path.isfile(path):
                raise StoreError(f"there is no lab at {path!r}: log a first run, or name another "
                                 "file with --db or DB_PATH")
            conn = _open(path, "ro", timeout_s)
            if _version(conn, path) == SCHEMA_VERSION:
                return conn
            conn.close()
            connect(path, "rw", timeout_s).close()
            return _open(path, "ro", timeout_s)
        os.makedirs(os.path.dirname(path) or ".", mode=0o700, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
        conn = _open(path, "rw", timeout_s)
        if _version(conn, path) < SCHEMA_VERSION:
            _use_wal(conn, path)
            migrate(conn, path)
        return conn
    except (sqlite3.Error, OSError) as error:
        raise StoreError(f"the lab at {path!r} cannot be used ({error})") from error


def _open(path, mode, timeout_s):
    import sqlite3
    from urllib.request import pathname2url
    conn = sqlite3.connect(f"file:{pathname2url(path)}?mode={mode}", uri=True, timeout=timeout_s,
                           isolation_level=None, check_same_thread=False)
    # NORMAL: a commit survives the process, and a power cut may take the last ones, never the file.
    conn.execute("PRAGMA synchronous = NORMAL")
    return conn


def _version(conn, path) -> int:
    version = conn.execute("PRAGMA user_version").fetchone()[0]
    if version > SCHEMA_VERSION:
        conn.close()
        raise StoreError(f"the lab at {path!r} has schema version {version}, and this AI-Lab knows "
                         f"up to {SCHEMA_VERSION}: update AI-Lab; the file was left untouched")
    return version


def _use_wal(conn, path) -> None:
    """Switch to WAL unless the file is on a network, where its shared memory does not work."""
    import sqlite3
    if network_filesystem(path):
        return
    with contextlib.suppress(sqlite3.OperationalError):  # another process is switching right now
        conn.execute("PRAGMA journal_mode = WAL")


def network_filesystem(path: str) -> str | None:
    """Name the network or FUSE file system that holds `path`; None for a local one or unknown."""
    kinds = {"nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "afs", "ceph", "glusterfs", "lustre",
             "gpfs", "beegfs", "fuse"}
    best, found = "", None
    with contextlib.suppress(OSError):
        real = os.path.realpath(path)
        with open("/proc/self/mounts", encoding="utf-8", errors="replace") as mounts:
            for line in mounts:
                _, point, kind, *_ = line.split(" ")
                point = point.replace("\\040", " ")
                if len(point) >= len(best) and (real + "/").startswith(point.rstrip("/") + "/"):
                    best, found = point, kind
    return found if found and (found in kinds or found.startswith("fuse.")) else None


def migrate(conn, path: str) -> None:
    """Bring the file to SCHEMA_VERSION in one transaction; several processes may race for it."""
    with transaction(conn):
        version = _version(conn, path)
        for step in MIGRATIONS[version:]:
            step(conn)
        conn.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        refresh(conn)


@contextlib.contextmanager
def transaction(conn):
    """Hold the store's write lock for a block: commit at its end, roll back when it raises."""
    conn.execute("BEGIN IMMEDIATE")
    try:
        yield conn
    except BaseException:
        conn.execute("ROLLBACK")
        raise
    conn.execute("COMMIT")


def refresh(conn) -> None:
    """Bring summaries, params and search text up to date with all that `stale` names.

    Inside a transaction of the caller. Rows logged by this module cost it nothing: their summary
    is written with them.
    """
    marks = conn.execute("SELECT run_id, metric_name FROM stale").fetchall()
    for run_id, metric_name in marks:
        if metric_name:
            _resummarise(conn, run_id, metric_name)
    for run_id in dict.fromkeys(mark[0] for mark in marks):
        _index_run(conn, run_id)
    if marks:
        conn.execute("DELETE FROM stale")


def _resummarise(conn, run_id, metric_name) -> None:
    where = "WHERE run_id = ? AND metric_name = ?"
    points = conn.execute(f"SELECT metric_value, epoch, step FROM run_metrics {where} ORDER BY id",
                          (run_id, metric_name)).fetchall()
    conn.execute(f"DELETE FROM metric_summary {where}", (run_id, metric_name))
    _add_points(conn, run_id, {metric_name: points})


def _add_points(conn, run_id, points_by_metric) -> None:
    """Add points, (value, epoch, step) in order of logging, to the run's summaries."""
    rows = []
    for name, points in points_by_metric.items():
        if not points:
            continue
        finite = [p for p in points if isinstance(p[0], (int, float)) and math.isfinite(p[0])]
        least = min(finite, key=_value_of) if finite else (None, None, None)
        most = max(finite, key=_value_of) if finite else (None, None, None)
        rows.append((run_id, name, points[-1][0], len(points),
                     *points[0], *points[-1], *least, *most))
    conn.executemany(_SUMMARY_UPSERT, rows)


def _value_of(point):
    return point[0]


def _summary_upsert() -> str:
    keep = {"first": "n_points > 0",
            "min": "min_value <= excluded.min_value OR excluded.min_value IS NULL",
            "max": "max_value >= excluded.max_value OR excluded.max_value IS NULL"}
    sets = [f"{column} = CASE WHEN {keep[which]} THEN {column} ELSE excluded.{column} END"
            if (which := column.split("_")[0]) in keep else f"{column} = excluded.{column}"
            for column in _AT]
    return (f"INSERT INTO metric_summary (run_id, metric_name, value, n_points, {', '.join(_AT)}) "
            f"VALUES ({', '.join('?' * (4 + len(_AT)))}) "
            "ON CONFLICT (run_id, metric_name) DO UPDATE SET n_points = n_points + excluded.n_points, "
            "value = CASE WHEN is_returned THEN value ELSE excluded.value END, " + ", ".join(sets))


_SUMMARY_UPSERT = _summary_upsert()


def _index_run(conn, run_id) -> None:
    row = conn.execute(f"SELECT {_INDEXED} FROM runs WHERE run_id = ?", (run_id,)).fetchone()
    conn.execute("DELETE FROM run_params WHERE run_id = ?", (run_id,))
    conn.execute("DELETE FROM run_text WHERE run_id = ?", (run_id,))
    conn.execute("UPDATE metric_summary SET is_returned = 0, value = last_value "
                 "WHERE run_id = ? AND is_returned", (run_id,))
    if row is not None:
        params, finals = flatten(load_json(row[6], {})), flatten(load_json(row[7], {}), "/")
        conn.executemany("INSERT OR REPLACE INTO run_params VALUES (?, ?, ?)", [
            (run_id, name, storable(value)) for name, value in params.items()])
        conn.executemany(
            "INSERT INTO metric_summary (run_id, metric_name, value, is_returned) VALUES (?, ?, ?, 1) "
            "ON CONFLICT (run_id, metric_name) DO UPDATE SET value = excluded.value, is_returned = 1",
            [(run_id, name, value) for name, value in numbers(finals).items()])
        words = [*row[:6], *(f"{name} {value}" for name, value in params.items())]
        text = "\n".join(str(word) for word in words if word is not None)
        conn.execute("INSERT INTO run_text (run_id, text) VALUES (?, ?)", (run_id, text))
    conn.execute("DELETE FROM metric_summary WHERE run_id = ? AND n_points = 0 AND NOT is_returned",
                 (run_id,))


def load_json(text: str | None, default):
    """Parse a JSON column: `default` for NULL, invalid text or another kind than `default`'s."""
    try:
        value = json.loads(text) if text else default
    except (ValueError, RecursionError):
        return default
    return value if isinstance(value, type(default)) else default


def flatten(tree: dict, separator: str = ".", prefix: str = "") -> dict:
    """Flatten nested objects: {"val": {"acc": 1}} becomes {"val.acc": 1}; lists stay whole."""
    flat = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat.update(flatten(value, separator, f"{prefix}{key}{separator}"))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def numbers(metrics: dict) -> dict[str, float]:
    """Keep what is a number, written "NaN" or "Infinity" too; text and booleans are no metrics."""
    found = {}
    for name, value in metrics.items():
        if value in ("NaN", "Infinity", "-Infinity"):
            found[name] = float(value)
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            found[name] = float(value) if abs(value) < 1e308 or value != value else math.inf * (value > 0 or -1)
    return found


def storable(value):
    """Make a param comparable in SQL: numbers and short text as they are, else JSON text."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 1 << 63:
        return float(value) if abs(value) < 1 << 1000 else str(value)[:MAX_TEXT]
    if value is None or isinstance(value, (bool, int, float)):
        return value
    return (value if isinstance(value, str) else json.dumps(value))[:MAX_TEXT]
