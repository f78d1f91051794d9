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
from typing import Any

__all__ = ["log", "log_artifact", "log_run", "note", "start_run"]
__version__ = "0.1.0"

SCHEMA_VERSION = 1
DRAIN_EVERY_S = 0.5          # how far the store may be behind a live run's journal
HEARTBEAT_EVERY_S = 10.0     # a running run says this often that it is alive
FINISH_WAIT_S = 2.0          # a call that returns waits this long for a busy store
EXIT_WAIT_S = 15.0           # and the end of the process this long, for all its runs together
CAPTURE_WAIT_S = 20.0        # git, nvidia-smi and the package list together may take this long
CHUNK_BYTES = 1 << 19        # of a journal, taken in by one transaction
MAX_TEXT = 1_000             # characters of the repr of an object that JSON cannot hold
MAX_DIFF_BYTES = 1 << 20     # of git_diff
MAX_UNTRACKED_BYTES = 1 << 17  # of one untracked file in git_diff
MAX_BACKLOG = 100_000        # lines held in memory while no journal can be written (a full disk)


class StoreError(Exception):
    """The lab's database cannot be used; the message is one sentence for the user."""


# --- Configuration ------------------------------------------------------------

def read_dotenv() -> tuple[str | None, dict[str, str]]:
    """Read the nearest `.env` from the working directory upward: its path (or None), its pairs."""
    pair = (r"\s*(?:export\s+)?([A-Za-z_]\w*)\s*=\s*"
            r"(?:'([^']*)'|\"([^\"]*)\"|(.*?))\s*(?:(?<=\s)#.*)?$")
    with contextlib.suppress(OSError):            # a working directory that is gone, say
        folder, child = os.getcwd(), ""
        while folder != child:
            path = os.path.join(folder, ".env")
            if os.path.isfile(path):
                with open(path, encoding="utf-8-sig", errors="replace") as lines:
                    matches = [re.match(pair, line.rstrip("\n")) for line in lines]
                return path, {m[1]: m[2] or m[3] or m[4] or "" for m in matches if m}
            folder, child = os.path.dirname(folder), folder
    return None, {}


def setting(key: str, default: str = "") -> tuple[str, str]:
    """Look a setting up: environment, the nearest `.env`, `default`.

    Returns the value and where it came from, for messages. An empty value counts as not set.
    """
    if os.environ.get(key):
        return os.environ[key], "the environment"
    path, values = read_dotenv()
    return (values[key], str(path)) if values.get(key) else (default, "the default")


def default_db_path() -> str:
    """Give the database's absolute path: DB_PATH (relative to its `.env`), or ~/.ai-lab/lab.db."""
    value, source = setting("DB_PATH", os.path.join("~", ".ai-lab", "lab.db"))
    base = os.path.dirname(source) if source.endswith(".env") else ""
    return os.path.abspath(os.path.join(base, os.path.expanduser(value)))


# --- Store --------------------------------------------------------------------
# The tables `runs` and `run_metrics` are public: any tool may read, add and change rows under the
# spec's columns. What ailab.py adds for reading is kept fresh by triggers of its own.

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
    "final_metrics_json": "TEXT",     # object; NaN is "NaN", infinities "Infinity", "-Infinity"
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


def _create(conn) -> None:
    """Bring version 0 to 1: an empty file, or a lab with only the spec's two tables."""
    for table, columns in (("runs", RUN_COLUMNS), ("run_metrics", METRIC_COLUMNS)):
        body = ", ".join(f"{name} {kind}" for name, kind in columns.items())
        if table == "run_metrics":
            body += ", FOREIGN KEY(run_id) REFERENCES runs(run_id)"
        conn.execute(f"CREATE TABLE IF NOT EXISTS {table} ({body})")
        present = {row[1] for row in conn.execute(f"PRAGMA table_info({table})")}
        for name in [name for name in columns if name not in present]:
            conn.execute(f"ALTER TABLE {table} ADD COLUMN {name} {columns[name]}")
    conn.execute("CREATE INDEX IF NOT EXISTS run_metrics_curve "
                 "ON run_metrics (run_id, metric_name)")


MIGRATIONS = (_create,)               # append only: entry N brings version N to version N + 1


def connect(path: str, mode: str = "rw", timeout_s: float = 30.0):
    """Open the lab's database: a sqlite3.Connection in autocommit mode.

    Args:
        path: the file; "rw" creates it, its folder and its tables, private to the user.
        mode: "rw", or "ro" for reading only; an older file is migrated first either way.
        timeout_s: how long a statement waits for another writer.
    Raises: StoreError, one sentence: missing (ro), no database, newer than this, not writable.
    """
    import sqlite3
    try:
        if mode == "ro":
            if not os.path.isfile(path):
                raise StoreError(f"there is no lab at {path!r}: log a first run, or name another "
                                 "file with --db or DB_PATH")
            conn = _open(path, "ro", timeout_s)
            if _version(conn, path) < SCHEMA_VERSION:
                conn.close()
                connect(path, "rw", timeout_s).close()
                conn = _open(path, "ro", timeout_s)
            return conn
        os.makedirs(os.path.dirname(path) or ".", mode=0o700, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
        conn = _open(path, "rw", timeout_s)
        if _version(conn, path) < SCHEMA_VERSION:
            with transaction(conn):               # several processes may race for it
                for step in MIGRATIONS[_version(conn, path):]:
                    step(conn)
                conn.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        is_wal = conn.execute("PRAGMA journal_mode").fetchone()[0] == "wal"
        if not is_wal and not network_filesystem(path):   # WAL shares memory between its users
            with contextlib.suppress(sqlite3.OperationalError):   # others have it open: next time
                conn.execute("PRAGMA journal_mode = WAL")
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


# --- Capture ------------------------------------------------------------------
# One function per fact; a fact that cannot be had is None or left out.

def utc(seconds: float) -> str:
    """Write seconds since 1970 as UTC ISO 8601 with microseconds, always 27 characters."""
    whole = math.floor(seconds)
    return f"{_utc_second(whole)}.{int((seconds - whole) * 1e6):06d}Z"


@functools.lru_cache(maxsize=16)      # points come many to the second
def _utc_second(whole: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(whole))


def git_info(deadline: float) -> dict[str, str | None]:
    """Read the code state of the working directory: git_hash, git_diff; {} outside git."""
    def git(*args: str, at: str = ".") -> bytes:
        return _output(["git", "-C", at, *args], deadline)
    root = os.fsdecode(git("rev-parse", "--show-toplevel").rstrip(b"\n"))
    if not root:
        return {}
    head = git("rev-parse", "--verify", "-q", "HEAD").decode().strip()
    diff = git("diff", "--no-ext-diff", "--no-textconv", "--no-color", *([head] if head else []),
               "--", ".", ":(exclude,glob)**/.env*", at=root)
    for name in git("ls-files", "--others", "--exclude-standard", "-z", at=root).split(b"\0"):
        if name and len(diff) <= MAX_DIFF_BYTES and time.monotonic() < deadline:
            diff += _untracked_diff(root, name)
    text = diff[:MAX_DIFF_BYTES].decode("utf-8", "replace")
    if len(diff) > MAX_DIFF_BYTES:
        text += f"\n[cut by lab_logger after {MAX_DIFF_BYTES} bytes]\n"
    return {"git_hash": head or None, "git_diff": text}


def _untracked_diff(root: str, name: bytes) -> bytes:
    """Write an untracked file as a diff that adds it; none for `.env`s, binary or large ones."""
    path, body = os.path.join(os.fsencode(root), name), b"\0"
    with contextlib.suppress(OSError):
        if os.path.isfile(path) and not os.path.basename(name).startswith(b".env"):
            with open(path, "rb") as file:
                body = file.read(MAX_UNTRACKED_BYTES + 1)
    if b"\0" in body or len(body) > MAX_UNTRACKED_BYTES:
        return b""
    lines = body.splitlines(keepends=True)
    head = b"diff --git a/%b b/%b\nnew file mode 100644\n--- /dev/null\n+++ b/%b\n" % ((name,) * 3)
    tail = b"" if body.endswith(b"\n") or not body else b"\n\\ No newline at end of file\n"
    added = b"@@ -0,0 +1,%d @@\n+%b" % (len(lines), b"+".join(lines)) if lines else b""
    return head + added + tail


def _output(command: list[str], deadline: float) -> bytes:
    """Run a program and return what it prints; b"" when it is absent, fails or is too slow."""
    import subprocess
    with contextlib.suppress(OSError, ValueError, subprocess.SubprocessError):
        return subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            timeout=max(0.0, deadline - time.monotonic()), check=True,
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0", "GIT_TERMINAL_PROMPT": "0"}).stdout
    return b""


def packages(deadline: float) -> dict[str, str]:
    """List the installed packages under pip_freeze: `name==version` lines, by name."""
    from importlib.metadata import distributions
    found: dict[str, str] = {}
    for distribution in distributions():
        with contextlib.suppress(Exception):      # a broken dist-info must not hide the others
            found.setdefault(distribution.metadata["Name"] or "", distribution.version)
    names = sorted(filter(None, found), key=str.lower)
    return {"pip_freeze": "\n".join(f"{name}=={found[name]}" for name in names)}


def device_info(deadline: float) -> dict[str, str]:
    """Describe the machine under device_info: platform, cpu, n_cpus, memory_bytes, gpus ..."""
    import platform
    cpu, memory = platform.processor(), None
    with contextlib.suppress(OSError, ValueError, AttributeError):
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as info:
        cpu = next((line.split(":", 1)[1].strip() for line in info if "model name" in line), cpu)
    rows = [line.split(", ") for line in _output(
        ["nvidia-smi", "--query-gpu=name,memory.total,driver_version",
         "--format=csv,noheader,nounits"], min(deadline, time.monotonic() + 5)
    ).decode("utf-8", "replace").splitlines()]
    gpus = [{"name": row[0], "memory_mib": float(row[1]) if row[1].isdigit() else None,
             "driver": row[2]} for row in rows if len(row) == 3]
    return {"device_info": _dumps({
        "platform": platform.platform(), "machine": platform.machine(), "cpu": cpu, "gpus": gpus,
        "n_cpus": os.cpu_count(), "memory_bytes": memory,
        "cuda_visible_devices": os.environ.get("CUDA_VISIBLE_DEVICES")})}


@functools.lru_cache(maxsize=1)
def _facts() -> dict:
    """Capture what is slow to ask, once per process: git, device and packages."""
    found: dict = {}
    deadline = time.monotonic() + CAPTURE_WAIT_S
    for capture in (git_info, device_info, packages):
        try:
            found.update(capture(deadline))
        except Exception as error:  # noqa: BLE001  a fact is never worth a run
            _warn(capture, f"{capture.__name__} could not be captured ({error!r}); the run goes on")
    return found


def launch_command() -> str:
    """The command line that started this process, quoted for a shell, secrets replaced by ***."""
    import shlex
    argv = [str(word) for word in sys.argv] or [""]
    full = list(getattr(sys, "orig_argv", argv))
    module = full[full.index("-m") + 1:][:1] if "-m" in full else ["\0"]
    if not (full[-len(argv):] == argv or argv[0] in ("", "-c")
            or module[0].rpartition(".")[2] in argv[0]):
        full = [sys.executable, *argv]            # a worker process: what its parent was told
    words, hide = [], False
    for word in full:
        name, equals, _ = word.partition("=")
        if hide and not word.startswith("--"):
            word = "***"
        elif equals and is_secret(name.lstrip("-")):
            word = f"{name}=***"
        hide = word.startswith("-") and not equals and is_secret(word.lstrip("-"))
        words.append(shlex.quote(_hide_in_url(_text(word))))
    return " ".join(words).replace("'***'", "***")


def is_secret(name: str) -> bool:
    """Tell whether a name says that its value is a secret: `api_key`, never `max_tokens`."""
    words = re.sub(r"[^a-z]+", "_", re.sub(r"([a-z])([A-Z])", r"\1_\2", name).lower()).strip("_")
    if re.fullmatch(r"(pad|eos|bos|unk|mask|sep|cls|start|end)_token", words):
        return False                              # a tokenizer's special tokens are no secrets
    return re.search(r"(^|_)(password|passwd|passphrase|secret|credentials?|api_?key|access_key|"
                     r"private_key|token)$|(^|_)secret_", words) is not None


def _hide_in_url(text: str) -> str:
    if "://" not in text:
        return text
    text = re.sub(r"(https?://)[^/\s:@]+@", r"\1***@", text)         # a token alone
    text = re.sub(r"(://[^/\s:@]*:)[^/\s@]+@", r"\1***@", text)
    return re.sub(r"([?&]([^=&\s]+)=)[^&#\s]+",
                  lambda pair: pair[1] + "***" if is_secret(pair[2]) else pair[0], text)


def process_key(pid: int | str = "self") -> str | None:
    """Tell a process from a later one of its pid: boot id/pid namespace/start time, or None."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            boot = file.read().strip()
        with open(f"/proc/{pid}/stat", "rb") as file:
            state, *fields = file.read().rpartition(b")")[2].split()
        if state in (b"Z", b"X"):                 # dead, and its parent has not asked yet
            return None
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}/{fields[18].decode()}"
    except (OSError, IndexError, ValueError):
        return None


def host_name() -> str:
    """Name this machine, as runs record it."""
    return os.uname().nodename if hasattr(os, "uname") else os.environ.get("COMPUTERNAME", "")


def jsonable(value, name: str = "", parents: tuple = ()):
    """Turn any object into what strict JSON holds, without ever raising.

    Non-finite numbers become "NaN", "Infinity", "-Infinity"; a value whose name says that it is a
    secret "***"; numpy-like scalars, dataclasses, namespaces and paths their plain value; anything
    else its repr, cut at MAX_TEXT characters. `parents` are the ids of the objects around it.
    """
    try:
        if value is None or isinstance(value, bool):
            return value
        if is_secret(name):
            return "***"
        if isinstance(value, str):
            return _hide_in_url(_text(str(value)))
        if isinstance(value, int):
            return int(value) if abs(value) < 1 << 63 else repr(int(value))[:MAX_TEXT]
        if isinstance(value, float):
            return _number(float(value))
        if id(value) in parents or len(parents) > 20:
            return _repr(value)
        tree, parents = _children(value), (*parents, id(value))
        if isinstance(tree, (dict, list)) and len(tree) > 1_000:
            return f"<{type(value).__name__} of {len(tree)} items>"
        if isinstance(tree, dict):
            return {_text(str(key)): jsonable(tree[key], str(key), parents) for key in tree}
        if isinstance(tree, list):
            return [jsonable(item, "", parents) for item in tree]
        return _repr(value) if tree is value else jsonable(tree, "", parents)
    except Exception:  # noqa: BLE001  an object's own methods may raise anything
        return _repr(value)


def _children(value):
    """Give an object's plain form: a dict, a list, a simpler value, or the object itself."""
    if isinstance(value, dict) or (_is_mapping(value) and hasattr(value, "__getitem__")):
        return {key: value[key] for key in value.keys()}  # noqa: SIM118  not every mapping iterates so
    if isinstance(value, (list, tuple)):
        return list(value)
    if isinstance(value, (set, frozenset)):
        return sorted(value, key=repr)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "__dataclass_fields__") and not isinstance(value, type):
        return {field: getattr(value, field) for field in value.__dataclass_fields__}
    if type(value).__name__ in ("Namespace", "SimpleNamespace"):
        return dict(vars(value))
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:    # numpy, torch scalars
        return value.item()
    if isinstance(value, type) or hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    return value


def _repr(value) -> str:
    try:
        return _text(repr(value)[:MAX_TEXT])
    except Exception:  # noqa: BLE001  see _jsonable
        return f"<{type(value).__name__}>"


def _text(value: str) -> str:
    """Replace lone surrogates, which neither UTF-8 nor SQLite can hold."""
    return value.encode("utf-8", "backslashreplace").decode("utf-8")


def _number(value: float):
    if value - value == 0:                        # finite
        return value
    return "NaN" if value != value else "Infinity" if value > 0 else "-Infinity"


def _dumps(value) -> str:
    return json.dumps(value, allow_nan=False, separators=(",", ":"), ensure_ascii=False)


# --- Journal and drain --------------------------------------------------------
# One file per run, `<run_id>.jsonl`, appended to by the run's process only, one JSON object a line.
# The first line holds "v" (format version, 1), "db" and "set"; any line may hold
#   "t"         seconds since 1970
#   "set"       {column of runs: value}
#   "m"         {metric name: number, or "NaN" ...}, with "e" (epoch) and "s" (step)
#   "artifact"  a path to append to artifacts_json
# A line with "t" alone is a heartbeat. What follows the last newline was never acknowledged. Lines
# and the offset behind them enter the store in one transaction, so any number of processes may
# drain one journal any number of times, and each line counts once.

_JOURNAL_COLUMNS = frozenset(RUN_COLUMNS) - {"run_id", "journal_offset", "deleted_at"}


def journal_dirs(db_path: str) -> list[str]:
    """List where a lab's journals may lie, best first: beside it, in the home, in /tmp."""
    import tempfile
    user = os.getuid() if hasattr(os, "getuid") else os.environ.get("USERNAME", "")
    return [db_path + ".journals", os.path.expanduser(os.path.join("~", ".ai-lab", "journals")),
            os.path.join(tempfile.gettempdir(), f"ai-lab-{user}-journals")]


def pending(db_path: str) -> list[dict]:
    """List a lab's journals that are not yet wholly taken in: path, run_id, bytes; oldest first."""
    found = []
    for place, folder in enumerate(journal_dirs(db_path)):
        with contextlib.suppress(OSError):        # no such folder, or not ours to read
            for entry in os.scandir(folder):
                run_id, extension = os.path.splitext(entry.name)
                if extension != ".jsonl" or not entry.is_file(follow_symlinks=False):
                    continue
                if hasattr(os, "getuid") and place and entry.stat().st_uid != os.getuid():
                    continue                      # /tmp is everybody's
                with contextlib.suppress(OSError, ValueError, AttributeError):
                    with open(entry.path, "rb") as file:   # later folders are shared by all labs
                        if place > 0 and json.loads(file.readline()).get("db") != db_path:
                            continue
                    status = os.stat(entry.path)
                    found.append((status.st_mtime, {"path": entry.path, "run_id": run_id,
                                                    "bytes": status.st_size}))
    return [journal for _, journal in sorted(found, key=lambda pair: pair[0])]


def drain(conn, path: str) -> bool:
    """Take a journal's new lines into the store, exactly once each.

    Returns: True when nothing is left and the run has ended, so that the file may go.
    Raises: sqlite3.Error, OSError; the store then holds what it held before the failed chunk.
    """
    run_id = os.path.splitext(os.path.basename(path))[0]
    with open(path, "rb") as journal:
        while True:
            with transaction(conn):
                row = conn.execute("SELECT journal_offset FROM runs WHERE run_id = ?",
                                   (run_id,)).fetchone()
                offset = row[0] or 0 if row else 0
                journal.seek(offset)
                chunk = journal.read(CHUNK_BYTES)
                if len(chunk) == CHUNK_BYTES:
                    chunk += journal.readline()   # end on a whole line, however long
                end = chunk.rfind(b"\n") + 1
                is_last = len(chunk) < CHUNK_BYTES or end < len(chunk)
                if end:
                    _apply(conn, run_id, chunk[:end].splitlines(), path)
                    conn.execute("UPDATE runs SET journal_offset = ? WHERE run_id = ?",
                                 (offset + end, run_id))
            if is_last:
                break
    status = conn.execute("SELECT status FROM runs WHERE run_id = ?", (run_id,)).fetchone()
    return status is not None and status[0] != "running" and end == len(chunk)


def _parse(lines: list[bytes], path: str) -> list[dict]:
    records = []
    try:                                          # one call for all: half the time of one for each
        records = json.loads(b"[" + b",".join(lines) + b"]")
    except ValueError:
        for line in lines:
            try:
                records.append(json.loads(line))
            except ValueError:
                _warn(path, f"a line of {path} is damaged and was left out: {line[:80]!r}")
    return [record for record in records if isinstance(record, dict)]


def _apply(conn, run_id: str, lines: list[bytes], path: str) -> None:
    """Write journal lines into runs and run_metrics."""
    columns: dict = {}
    artifacts, rows, last_t = [], [], 0.0
    for record in _parse(lines, path):
        last_t = record.get("t", last_t)
        if "m" in record:
            at, epoch, step = utc(last_t), record.get("e"), record.get("s")
            for name, value in record["m"].items():
                rows.append((run_id, name, float(value) if value.__class__ is str else value,
                             epoch, step, at))
        else:
            columns.update(record.get("set", {}))
            if "artifact" in record:
                artifacts.append(record["artifact"])
    if last_t:
        columns["heartbeat_at"] = utc(last_t)
    if "status" not in columns:                   # more from a run once taken for dead: it lives
        conn.execute("UPDATE runs SET status = 'running', ended_at = NULL, duration_s = NULL "
                     "WHERE run_id = ? AND status = 'killed'", (run_id,))
    names = [name for name in columns if name in _JOURNAL_COLUMNS] or ["heartbeat_at"]
    conn.execute(f"INSERT INTO runs (run_id, {', '.join(names)}) VALUES (?{', ?' * len(names)}) "
                 "ON CONFLICT (run_id) DO UPDATE SET "
                 + ", ".join(f"{name} = excluded.{name}" for name in names),
                 (run_id, *(columns.get(name) for name in names)))
    for artifact in artifacts:
        conn.execute("UPDATE runs SET artifacts_json = json_insert(ifnull(artifacts_json, '[]'), "
                     "'$[#]', ?) WHERE run_id = ?", (artifact, run_id))
    conn.executemany("INSERT INTO run_metrics (run_id, metric_name, metric_value, epoch, step, "
                     "timestamp) VALUES (?, ?, ?, ?, ?, ?)", rows)


def drain_all(conn, db_path: str) -> list[str]:
    """Take in every journal of this lab, whoever wrote it; those of ended runs go.

    Returns: a sentence for each journal that could not be taken in; it is kept.
    """
    problems = []
    for journal in pending(db_path):
        try:
            if drain(conn, journal["path"]):
                _remove(journal["path"])
        except FileNotFoundError:
            continue                              # another process has just taken it in
        except Exception as error:  # noqa: BLE001  one odd journal hides no other
            problems.append(f"the journal {journal['path']!r} is kept: it could not be taken in "
                            f"({error})")
    return problems


def _remove(path: str) -> None:
    with contextlib.suppress(OSError):            # gone, or still open on Windows: next time
        os.unlink(path)


_warned: set = set()


def _warn(cause, message: str) -> None:
    """Say something once per cause on stderr; a closed or absent stderr is no reason to raise."""
    if cause not in _warned and len(_warned) < 30:
        _warned.add(cause)
        with contextlib.suppress(OSError, ValueError, AttributeError):
            sys.stderr.write(f"lab_logger: {message}\n")
            sys.stderr.flush()


class _Drainer:
    """Moves this process's live journals into one store: a connection, a lock, a thread."""

    def __init__(self, db_path: str) -> None:
        self.db_path = db_path
        self.lock = threading.RLock()
        self.conn: Any = None
        self.file: tuple | None = None            # which file the connection is of
        self.runs: dict[str, Run] = {}
        self.is_healthy, self.is_busy = True, False
        self.is_closing = threading.Event()
        threading.Thread(target=self._loop, name="lab_logger", daemon=True).start()

    def _loop(self) -> None:
        """Every half second while runs live; first of all take in what dead processes left."""
        beat, has_looked = time.monotonic(), False
        while not self.is_closing.wait(DRAIN_EVERY_S if self.is_healthy else 5.0):
            if not has_looked:
                has_looked = self._take_in_others()
            is_beat = time.monotonic() - beat >= HEARTBEAT_EVERY_S
            for run in list(self.runs.values()):
                run._write(_dumps({"t": time.time()}).encode() + b"\n"
                           if is_beat and not run.is_over else b"")
            beat = time.monotonic() if is_beat else beat
            self.drain_live(30.0)

    def _take_in_others(self) -> bool:
        """Take in what dead processes left, beside the lock: a live run need not wait for it."""
        with contextlib.suppress(Exception):      # a broken store: drain_live() speaks of it
            with contextlib.closing(connect(self.db_path, timeout_s=5.0)) as conn:
                drain_all(conn, self.db_path)
            return True
        return False

    def _connection(self, wait_s: float):
        if self.conn is not None and self.file != _file_key(self.db_path):
            _warn(("gone", self.db_path), f"the lab {self.db_path!r} was removed or replaced while "
                  "runs were alive: they go whole into the one that is there now")
            self.disconnect()
        if self.conn is None:
            self.conn = connect(self.db_path, timeout_s=wait_s)
            self.file = _file_key(self.db_path)
        self.conn.execute(f"PRAGMA busy_timeout = {int(wait_s * 1000)}")
        return self.conn

    def drain_live(self, wait_s: float, only: Run | None = None) -> bool:
        """Drain the live runs, or one; False when the store would not have it. Never raises."""
        deadline = time.monotonic() + wait_s
        if not self.lock.acquire(timeout=wait_s):
            return False
        try:
            for run in [only] if only else list(self.runs.values()):
                self._drain_run(run, max(0.0, deadline - time.monotonic()))
            self.is_healthy = True
        except Exception as error:  # noqa: BLE001  whatever the store does, training goes on
            self.is_healthy = False
            self.is_busy = any(word in str(error) for word in ("locked", "busy"))
            if not self.is_busy:
                self.disconnect()
            if only or not self.is_busy:
                folders = {os.path.dirname(run.path) for run in self.runs.values()}
                _warn(("store", self.db_path), f"the lab {self.db_path!r} cannot take in runs at "
                      f"present ({error}); training goes on, every point is kept in "
                      f"{' and '.join(sorted(folders))} and is taken in by the next process that "
                      "opens the lab")
        finally:
            self.lock.release()
        return self.is_healthy

    def _drain_run(self, run: Run, wait_s: float) -> None:
        try:
            size = os.stat(run.path).st_size
            if size > run.taken_in or run.is_over:
                if drain(self._connection(wait_s), run.path) and run.is_over:
                    _remove(run.path)
                    self.runs.pop(run.run_id, None)
                run.taken_in = size
        except (ValueError, TypeError, AttributeError, OverflowError) as error:   # no store's fault
            self.runs.pop(run.run_id, None)
            _warn(run.path, f"the journal {run.path!r} is kept: it cannot be taken in ({error!r})")
        except FileNotFoundError as error:
            self.runs.pop(run.run_id, None)
            if not run.is_over:                   # an ended one was taken in by another process
                _warn(("lost", run.run_id), f"the journal {run.path!r} was removed under its run "
                      f"({error}): points of the last half second, and those to come, are lost")

    def disconnect(self) -> None:
        conn, self.conn = self.conn, None
        if conn is not None:
            conn.close()

    def close(self, wait_s: float) -> None:
        """At the end of the process: take in what is left, within a bounded time."""
        self.is_closing.set()
        deadline = time.monotonic() + wait_s
        while self.runs and time.monotonic() < deadline:
            for run in list(self.runs.values()):
                run._write(b"")                   # what a full disk kept back
            is_done = self.drain_live(max(0.1, deadline - time.monotonic()))
            if not is_done and not self.is_busy:
                break                             # a broken store does not mend within seconds
            if self.runs:
                time.sleep(0.1)
        if self.lock.acquire(timeout=1):
            self.disconnect()
            self.lock.release()


def _file_key(path: str) -> tuple | None:
    try:
        status = os.stat(path)
        return status.st_dev, status.st_ino
    except OSError:
        return None


_drainers: dict[str, _Drainer] = {}
_drainers_lock = threading.Lock()                 # never held while anything is waited for
_abandoned: list = []                             # a parent's connections, never closed here


def _drainer(db_path: str) -> _Drainer:
    with _drainers_lock:
        if not _drainers and not _abandoned:
            atexit.register(_at_exit)
            if hasattr(os, "register_at_fork"):
                os.register_at_fork(after_in_child=_after_fork)
        if db_path not in _drainers:
            _drainers[db_path] = _Drainer(db_path)
        return _drainers[db_path]


def _at_exit() -> None:
    deadline = time.monotonic() + EXIT_WAIT_S
    for drainer in list(_drainers.values()):
        for run in [run for run in drainer.runs.values() if not run.is_over]:
            run.finish(error=getattr(sys, "last_value", None), wait_s=0)   # what ended the script
        drainer.close(max(0.1, deadline - time.monotonic()))


def _after_fork() -> None:
    """In a forked child: leave the parent's runs, locks and connections alone."""
    global _drainers_lock
    _abandoned.append(dict(_drainers))
    for drainer in _drainers.values():
        for run in drainer.runs.values():
            run._leave("a forked process does not write it: log from the process that began it")
    _drainers.clear()
    _drainers_lock = threading.Lock()


# --- Run ----------------------------------------------------------------------

_current: contextvars.ContextVar[Run | None] = contextvars.ContextVar("ailab_run", default=None)


class Run:
    """One run, made by start_run() or @log_run: `with` it, or call finish().

    Attributes: run_id (UUID), path (of its journal), db_path (of its lab), result (what `with`
    ends it with). Its methods never raise for a fault of the lab: they warn once on stderr.
    """

    def __init__(self, columns: dict, params: Any, db_path: str | None) -> None:
        import uuid
        self.run_id = str(uuid.uuid4())           # from the system: no seed makes it twice
        self.is_over, self.taken_in, self.result = False, 0, None
        self._keys: dict[str, str] = {}           # metric name -> '"name":'
        self._backlog: list[bytes] = []           # what the journal would not take
        self._lock = threading.Lock()          # of the backlog
        self._wandb: Any = None
        try:
            self._begin(columns, params, db_path)
        except Exception as error:  # noqa: BLE001  nothing of ours may end a training
            _warn(("begin", repr(error)), f"a run goes unrecorded: it did not begin ({error!r})")
            self._leave("it could not be begun")

    def _begin(self, columns: dict, params: Any, db_path: str | None) -> None:
        self.db_path = default_db_path() if not db_path else os.path.abspath(
            os.path.expanduser(db_path))
        facts, parent, cwd = _facts(), _current.get(), None
        columns = {name: None if value is None else _text(str(value))
                   for name, value in columns.items()}
        self._began, self._t = time.monotonic(), time.time()
        with contextlib.suppress(OSError):        # it was deleted
            cwd = _text(os.getcwd())
        self._open_journal()
        self._append({"v": 1, "t": self._t, "db": self.db_path, "set": {
            "timestamp": utc(self._t), "status": "running", **facts, **columns,
            "dataset_id": columns.get("dataset_id") or setting("DATASET_ID")[0] or None,
            "command": launch_command(), "python_version": sys.version.split()[0],
            "hostname": host_name(), "pid": os.getpid(), "process_key": process_key(), "cwd": cwd,
            "params_json": _dumps(_params(params)),
            "parent_run_id": parent.run_id if parent else None}})
        if self._fd >= 0:
            self._drainer = _drainer(self.db_path)
            self._drainer.runs[self.run_id] = self
        if setting("WANDB_PROJECT")[0]:
            self._start_wandb(columns.get("experiment_name"), _params(params))

    def _open_journal(self) -> None:
        errors, flags = [], os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_WRONLY
        for folder in journal_dirs(self.db_path):
            try:
                os.makedirs(folder, mode=0o700, exist_ok=True)
                self.path = os.path.join(folder, self.run_id + ".jsonl")
                self._fd = os.open(self.path, flags | getattr(os, "O_BINARY", 0), 0o600)
                return
            except OSError as error:
                errors.append(str(error))
        self._leave(f"no journal can be written ({'; '.join(errors)})")

    def _leave(self, why: str) -> None:
        """Write no more to the journal: from now on log() warns once."""
        self._fd, self._why_left, self._backlog, self._lock = -1, why, [], threading.Lock()

    def log(self, metrics=None, /, *, epoch=None, step=None, **named) -> None:
        """Append one point of each metric to the journal: numbers, NaN and infinity included.

        Args:
            metrics: a mapping for names that are no identifiers; nested ones join by `/`.
            epoch, step: whole numbers; named metrics follow as keywords.
        """
        try:
            if metrics is not None:
                named = {**_flatten(metrics), **named}
            points = []
            for name, value in named.items():
                if value.__class__ is not float or value - value != 0:
                    value = _as_json(f"metric {name!r}", value)
                if value is not None:
                    points.append(f"{self._keys.get(name) or self._key(name)}{value}")
            if points:
                at = f'{{"t":{time.time()}'
                if epoch is not None:
                    at += f',"e":{_as_json("epoch", epoch, is_whole=True) or "null"}'
                if step is not None:
                    at += f',"s":{_as_json("step", step, is_whole=True) or "null"}'
                self._write(f'{at},"m":{{{",".join(points)}}}}}\n'.encode())
                if self._wandb is not None:
                    more = {} if epoch is None else {"epoch": epoch}
                    self._wandb.log({**named, **more}, step=step)
        except Exception as error:  # noqa: BLE001  nothing of ours may end a training
            _warn(("log", repr(error)), f"a point could not be logged and was left out ({error!r})")

    def _key(self, name) -> str:
        self._keys[name] = json.dumps(_text(str(name))) + ":"
        return self._keys[name]

    def _append(self, record: dict) -> None:
        self._write(_dumps(record).encode() + b"\n")

    def _write(self, line: bytes) -> None:
        """Append to the journal: one system call, and no lock unless that failed."""
        n_written = 0
        with contextlib.suppress(OSError):        # told below, if it lasts
            if not self._backlog:
                n_written = os.write(self._fd, line)
                if n_written == len(line):
                    return
        with self._lock:
            try:
                if line[n_written:]:
                    self._backlog.append(line[n_written:])
                while self._backlog and self._fd >= 0:
                    self._backlog[0] = self._backlog[0][os.write(self._fd, self._backlog[0]):]
                    if not self._backlog[0]:
                        self._backlog.pop(0)
            except OSError as error:
                _warn(("journal", self.run_id), f"the journal {self.path!r} cannot be written "
                      f"({error}); training goes on, its points wait in memory for room")
            if self._backlog and (self._fd < 0 or len(self._backlog) > MAX_BACKLOG):
                self._backlog.clear()
                why = self._why_left if self._fd < 0 else "its journal had no room for too long"
                _warn(("lost", self.run_id), f"points of run {self.run_id} are lost: {why}")

    def log_artifact(self, path) -> None:
        """Record the path of a file that the run made, as absolute; a URL stays as it is."""
        try:
            text = os.fsdecode(os.fspath(path))
            if "://" not in text:
                text = os.path.abspath(text)
                if not os.path.exists(text):
                    _warn(text, f"the artifact {text!r} does not exist; its path is recorded")
            self._append({"t": time.time(), "artifact": _text(text)})
        except Exception as error:  # noqa: BLE001  see log()
            _warn(repr(error), f"the artifact {_repr(path)} was not recorded ({error})")

    def note(self, text: str) -> None:
        """Set the run's note, such as "PUBLISH: best so far"."""
        try:
            note = None if text is None else _text(str(text))
            self._append({"t": time.time(), "set": {"note": note}})
        except Exception as error:  # noqa: BLE001  see log()
            _warn(repr(error), f"the note was not recorded ({error!r})")

    def finish(self, result=None, *, error: BaseException | None = None,
               wait_s: float = FINISH_WAIT_S) -> None:
        """End the run and take it into the store, within `wait_s` where that is busy.

        Args:
            result: as a decorated function returns it: final metrics, artifacts, history.
            error: what ended the run; None, `sys.exit(0)` or a closed generator is a good end.
        """
        if self.is_over or self._fd < 0:
            return
        is_good = (error is None or isinstance(error, GeneratorExit)
                   or (isinstance(error, SystemExit) and error.code in (None, 0)))
        is_stopped = isinstance(error, KeyboardInterrupt)
        metrics: dict = {}
        try:
            metrics, artifacts, history = _split_result(result)
            logged = {"epoch", "step", *self._keys}   # what log() wrote is not written twice
            for row in history:
                self.log({name: value for name, value in row.items() if name not in logged},
                         epoch=row.get("epoch"), step=row.get("step"))
            for path in artifacts:
                self.log_artifact(path)
        except Exception as problem:  # noqa: BLE001  see log()
            _warn(repr(problem), f"what a run returned could not all be read ({problem!r})")
        try:
            duration = time.monotonic() - self._began
            self._append({"t": time.time(), "set": {
                "status": "finished" if is_good else "killed" if is_stopped else "failed",
                "ended_at": utc(self._t + duration), "duration_s": round(duration, 6),
                "final_metrics_json": _dumps({name: _number(metrics[name]) for name in metrics}),
                "error": None if is_good else _traceback(error)}})
            if self._wandb is not None:
                self._wandb.summary.update(metrics)
                self._wandb.finish(exit_code=int(not is_good))
        except Exception as problem:  # noqa: BLE001  see log()
            _warn(repr(problem), f"the end of a run could not be recorded ({problem!r})")
        self.is_over = True
        if not self._backlog:
            fd = self._fd
            self._leave("it was over")
            os.close(fd)                          # Windows removes no open file
        self._drainer.drain_live(wait_s, only=self)

    def _start_wandb(self, name: str | None, params: dict) -> None:
        """Mirror the run to W&B, where that is installed."""
        try:
            if setting("WANDB_API_KEY")[0]:
                os.environ.setdefault("WANDB_API_KEY", setting("WANDB_API_KEY")[0])
            import wandb  # type: ignore[import-not-found, unused-ignore]
            self._wandb = wandb.init(project=setting("WANDB_PROJECT")[0], name=name, config=params,
                                     reinit="create_new")
            self._append({"t": time.time(), "set": {"wandb_url": self._wandb.url}})
        except Exception as error:  # noqa: BLE001  see log()
            _warn("wandb", f"W&B does not mirror this run ({error!r}); the lab records it still")

    def __enter__(self) -> Run:
        self._token = _current.set(self)
        return self

    def __exit__(self, kind, error, trace) -> None:
        with contextlib.suppress(ValueError):     # left in another context than it was entered in
            _current.reset(self._token)
        self.finish(self.result, error=error)


def _is_mapping(value) -> bool:
    return hasattr(value, "keys") and callable(getattr(value, "items", None))


def _flatten(tree, prefix: str = "") -> dict:
    flat: dict = {}
    for name, value in tree.items():
        path = f"{prefix}{name}"
        flat.update(_flatten(value, path + "/") if _is_mapping(value) else {path: value})
    return flat


def _params(value) -> dict:
    """Give params as an object of JSON values: of a mapping, a namespace or a dataclass."""
    tree: Any = {}
    with contextlib.suppress(Exception):          # an object's own methods may raise anything
        tree = {} if value is None else _children(value)
    if not isinstance(tree, dict):
        tree = {"params": value}
    return {_text(str(name)): jsonable(item, str(name)) for name, item in tree.items()}


def _as_float(value) -> float | None:
    """Turn a number of any library into a float; None for text, lists and objects."""
    try:
        if isinstance(value, (str, bytes)):
            return None
        return float(value.item() if hasattr(value, "item") else value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf
    except Exception:  # noqa: BLE001  an object's own methods may raise anything
        return None


def _as_json(what: str, value, is_whole: bool = False) -> str | None:
    """Write a number as the journal does; None, with a warning, for what is none."""
    number = _as_float(value)
    if number is None or (is_whole and (number % 1 != 0 or abs(number) >= 1 << 63)):
        _warn(("number", what), f"the {what} is no {'whole ' * is_whole}number but "
              f"{_repr(value)[:80]}: left out")
        return None
    return str(int(value)) if is_whole else json.dumps(_number(number))


def _traceback(error) -> str:
    import traceback
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename == __file__:
        trace = trace.tb_next                     # the user's frames only
    return _text("".join(traceback.format_exception(type(error), error, trace))[-100_000:])


def _split_result(result) -> tuple[dict[str, float], list, list[dict]]:
    """Read what a decorated function returned: final metrics, artifact paths, per-epoch rows."""
    artifacts: object = []
    if isinstance(result, (tuple, list)) and len(result) == 2 and _is_mapping(result[0]):
        result, artifacts = result
    if not _is_mapping(result):
        result = {} if isinstance(result, bool) else {"result": result}
    metrics = dict(result.items())
    artifacts = metrics.pop("artifacts", artifacts)
    rows = [metrics.pop(name, None) for name in ("history", "epoch_metrics")]
    history = rows[1] if rows[0] is None else rows[0]
    if isinstance(artifacts, (str, os.PathLike)):
        artifacts = [artifacts]
    elif hasattr(artifacts, "values"):
        artifacts = list(artifacts.values())
    if _is_mapping(history):                 # Keras: {"loss": [0.5, 0.4], ...}
        columns = {name: list(values) for name, values in history.items()
                   if isinstance(values, (list, tuple)) or getattr(values, "ndim", None) == 1}
        history = [{"epoch": i + 1, **{name: values[i] for name, values in columns.items()
                                       if i < len(values)}}
                   for i in range(max(map(len, columns.values()), default=0))]
    finals = {_text(str(name)): _as_float(value) for name, value in _flatten(metrics).items()
              if not isinstance(value, bool)}
    return ({name: value for name, value in finals.items() if value is not None},
            list(artifacts) if isinstance(artifacts, (list, tuple, set)) else [],
            [dict(row) for row in history if _is_mapping(row)]
            if isinstance(history, (list, tuple)) else [])


def start_run(experiment_name: str | None = None, *, model_name: str | None = None,
              task_name: str | None = None, dataset_id: str | None = None, note: str | None = None,
              params: Any = None, db_path: str | None = None) -> Run:
    """Begin a run where a decorator does not fit: `with start_run("iris", params={...}):`."""
    return Run({"experiment_name": experiment_name, "model_name": model_name,
                "task_name": task_name, "dataset_id": dataset_id, "note": note},
               params, db_path)


def _run(caller: str) -> Run | None:
    """Find the run that log() means: the context's, else the only one alive in this process."""
    live = [run for drainer in list(_drainers.values()) for run in list(drainer.runs.values())
            if not run.is_over]
    run = _current.get() or (live[0] if len(live) == 1 else None)
    if run is None:
        _warn("no run", f"{caller}() did nothing: {len(live) or 'no'} runs are alive and none "
              "is the current one: call it inside a @log_run function or `with start_run()`")
    return run


def log(metrics: object = None, /, *, epoch: object = None, step: object = None,
        **named: object) -> None:
    """Log metrics of the current run: `log(epoch=3, loss=0.2)` or `log({"val/acc": 0.9})`."""
    run = _current.get() or _run("log")
    if run is not None:
        run.log(metrics, epoch=epoch, step=step, **named)


def log_artifact(path: object) -> None:
    """Record the path of a file that the current run made."""
    if run := _run("log_artifact"):
        run.log_artifact(path)


def note(text: str) -> None:
    """Set the note of the current run."""
    if run := _run("note"):
        run.note(text)


# --- log_run ------------------------------------------------------------------

def log_run(function: object = None, /, *, experiment_name: str | None = None,
            model_name: str | None = None, task_name: str | None = None,
            dataset_id: str | None = None, note: str | None = None, db_path: str | None = None):
    """Record every call as a run: `@log_run`, `@log_run()` or `@log_run(task_name="x")`.

    The function may be sync, async or a generator; its signature, return value and exceptions stay
    as they were. Its arguments are the run's params; those called experiment_name, model_name,
    task_name and dataset_id win over the ones given here. A returned mapping holds final metrics,
    and under `artifacts` paths, under `history` or `epoch_metrics` rows per epoch; a pair is
    (metrics, artifacts); a bare number is the metric `result`.

    Raises: TypeError, at once, for what cannot be decorated.
    """
    columns = {"experiment_name": experiment_name, "model_name": model_name, "task_name": task_name,
               "dataset_id": dataset_id, "note": note}
    for name, value in {**columns, "db_path": db_path}.items():
        if value is not None and not isinstance(value, str):
            raise TypeError(f"log_run({name}={value!r}): it takes text, or nothing")
    decorate = functools.partial(_decorate, columns=columns, db_path=db_path)
    return decorate if function is None else decorate(function)


def _decorate(function, columns: dict, db_path: str | None):
    import inspect
    if not callable(function) or isinstance(function, (type, classmethod, staticmethod)):
        raise TypeError(f"log_run decorates a function, not {function!r}: use it as @log_run or "
                        "@log_run(experiment_name=...), below @staticmethod or @classmethod")
    signature = None
    with contextlib.suppress(TypeError, ValueError):  # some built-ins have none
        signature = inspect.signature(function)

    def begin(args, kwargs) -> Run:
        params = _bound(signature, args, kwargs)
        named = {name: params[name] for name in columns
                 if name != "note" and params.get(name) is not None}
        return Run({**columns, **named}, params, db_path)

    wrap = (_wrap_async_generator if inspect.isasyncgenfunction(function)
            else _wrap_async if inspect.iscoroutinefunction(function)
            else _wrap_generator if inspect.isgeneratorfunction(function) else _wrap_sync)
    return functools.wraps(function)(wrap(function, begin))


def _bound(signature, args: tuple, kwargs: dict) -> dict:
    """Give a call's params: bound arguments, defaults included, `self` left out."""
    try:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
    except (TypeError, AttributeError):           # the call itself will say what is wrong
        return kwargs
    params = {}
    for position, (name, value) in enumerate(bound.arguments.items()):
        if signature.parameters[name].kind is signature.parameters[name].VAR_KEYWORD:
            params.update(value)
        elif position or name not in ("self", "cls"):
            params[name] = value
    return params


def _wrap_sync(function, begin):
    def wrapper(*args, **kwargs):
        with begin(args, kwargs) as run:
            run.result = function(*args, **kwargs)
        return run.result
    return wrapper


def _wrap_async(function, begin):
    async def wrapper(*args, **kwargs):
        with begin(args, kwargs) as run:
            run.result = await function(*args, **kwargs)
        return run.result
    return wrapper


def _wrap_generator(function, begin):
    def wrapper(*args, **kwargs):
        generator, run = function(*args, **kwargs), begin(args, kwargs)
        step, value = generator.send, None
        while True:
            token = _current.set(run)             # between items the caller's run is
            try:
                item = step(value)
            except StopIteration as stop:
                run.finish(stop.value)
                return stop.value
            except BaseException as error:
                run.finish(error=error)
                raise
            finally:
                _current.reset(token)
            try:
                step, value = generator.send, (yield item)
            except BaseException as error:  # noqa: BLE001  the caller's, handed on
                step, value = generator.throw, error
    return wrapper


def _wrap_async_generator(function, begin):
    async def wrapper(*args, **kwargs):
        generator, run = function(*args, **kwargs), begin(args, kwargs)
        step, value = generator.asend, None
        while True:
            token = _current.set(run)
            try:
                item = await step(value)
            except StopAsyncIteration:
                run.finish()
                return
            except BaseException as error:
                run.finish(error=error)
                raise
            finally:
                _current.reset(token)
            try:
                step, value = generator.asend, (yield item)
            except BaseException as error:  # noqa: BLE001  the caller's, handed on
                step, value = generator.athrow, error
    return wrapper
