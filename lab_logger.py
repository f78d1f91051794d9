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
they come, what the function returns, git hash and diff, command, Python, packages, device, the
machine's load, how the call ended. `python ailab.py serve` shows it. With AILAB_URL the runs go to
such a server on another machine; `python lab_logger.py sync` sends what is left there.

Every `log()` is one append to the run's own journal file, which survives `kill -9`; a background
thread moves journals into the lab. A lab that is locked, full, broken or out of reach costs one
warning on stderr and never the training: the journal is kept, and taken in by the next process
that opens the lab. Standard library only, Python 3.10 or later, Linux, macOS and Windows.
A W&B loop runs as it is after `import lab_logger as wandb`.
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

TYPE_CHECKING = False                 # at run time typing costs a quarter of the whole import
if TYPE_CHECKING:
    from typing import Any

__all__ = ["log", "log_artifact", "log_run", "note", "start_run"]
__version__ = "0.1.0"

SCHEMA_VERSION = 2
JOURNAL_VERSION = 2
STATUSES = ("running", "finished", "failed", "killed")
DRAIN_EVERY_S = 0.5          # how far the lab may be behind a live run's journal
RETRY_S = (1.0, 60.0)        # first and longest pause after a lab has failed
HEARTBEAT_EVERY_S = 10.0     # a running run says this often that it is alive
LOST_AFTER_S = 300.0         # without a sign of life, where its process cannot be asked
SAMPLE_EVERY_S = 10.0        # system metrics, unless AILAB_SAMPLE_EVERY_S says otherwise; 0 = off
FINISH_WAIT_S = 2.0          # a call that returns waits this long for a busy lab
EXIT_WAIT_S = 15.0           # and the end of the process this long, for all its runs together
CAPTURE_WAIT_S = 20.0        # git, nvidia-smi and the package list together may take this long
CHUNK_BYTES = 1 << 19        # of a journal, taken in by one transaction
MAX_TEXT = 1_000             # characters of the repr of an object that JSON cannot hold
MAX_STRING = 1 << 20         # characters of one text among the params
MAX_DIFF_BYTES = 1 << 20     # of git_diff
MAX_UNTRACKED_BYTES = 1 << 17  # of one untracked file in git_diff
MAX_OUTPUT_BYTES = 1 << 22   # of git and nvidia-smi
SECRET_FILES = (".env*", "*.env", "*.pem", "*.key", "id_rsa*", "id_ed25519*", "*credentials*",
                "*creds*", "*secrets*", ".netrc")     # never in git_diff
MAX_BACKLOG_BYTES = 1 << 26  # held in memory while no journal can be written (a full disk)


class StoreError(Exception):
    """The lab cannot be used; the message is one sentence for the user."""


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


def lab_url(url: str = "") -> str | None:
    """Give the address of the lab server to log to (AILAB_URL), without a ?token= behind it."""
    from urllib.parse import urlsplit
    source = "the command line"
    if not url:
        url, source = setting("AILAB_URL")
    url = url.partition("?")[0].rstrip("/")
    with contextlib.suppress(ValueError):
        parts = urlsplit(url)
        if not url or (parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
                       and not re.search(r"[@\s#]", url)):
            return url or None
    _warn(url, f"the address {_text(url)!r} in {source} is no lab server's; give http://HOST:PORT, "
          f"and a token as AILAB_TOKEN: runs go into the lab {default_db_path()!r} until then")
    return None


# --- Store --------------------------------------------------------------------
# The tables `runs` and `run_metrics` are public: any tool may read, add and change rows under the
# spec's columns. What ailab.py adds for reading is kept fresh by triggers of its own.

RUN_COLUMNS = {                       # in order; what grows large comes last, so that lists skip it
    "run_id": "TEXT PRIMARY KEY",     # UUID, or as given to start_run()
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
    "end_reason": "TEXT",             # how it ended, in words; NULL while running
    "received_from": "TEXT",          # machine whose journal came over HTTP; NULL = logged here
    "resumptions_json": "TEXT",       # object: part of the journal -> at, hostname, pid, offset ...
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
# SQL, of a row of runs: how many seconds the run was at work until its last sign of life.
LASTED_S = """(SELECT 86400 * (julianday(max(ifnull(heartbeat_at, timestamp), timestamp))
     - julianday(ifnull(max(json_extract(value, '$.at')), timestamp)))
     + ifnull(max(json_extract(value, '$.spent_s')), 0)
FROM json_each(CASE WHEN json_valid(resumptions_json) THEN resumptions_json ELSE '{}' END))"""
NETWORK_KINDS = (r"(nfs4?|cifs|smb3|smbfs|9p|afs|afpfs|ceph|glusterfs|lustre|gpfs|beegfs|webdav|"
                 r"fuse(\..*)?)$")


def _create(conn) -> None:
    """Make the tables, or add the columns they lack: the spec's two tables are version 0."""
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


MIGRATIONS = (_create, _create)       # append only: entry N brings version N to version N + 1


def connect(path: str, mode: str = "rw", timeout_s: float = 30.0):
    """Open the lab's database: a sqlite3.Connection in autocommit mode.

    Args:
        path: the file; "rw" creates it, its folder and its tables, private to the user.
        mode: "rw", or "ro" for reading only; an older file is migrated first either way.
        timeout_s: how long a statement waits for another writer.
    Raises: StoreError, one sentence: missing (ro), no database, newer than this, not writable.
    """
    import sqlite3
    from urllib.parse import quote
    conn = None
    try:
        if mode == "rw":
            os.makedirs(os.path.dirname(path) or ".", mode=0o700, exist_ok=True)
            with contextlib.suppress(FileExistsError):
                os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
        elif not os.path.isfile(path):
            raise StoreError(f"there is no lab at {path!r}: log a first run, or name another file "
                             "with --db or DB_PATH")
        conn = sqlite3.connect(f"file:{quote(os.fsencode(path))}?mode={mode}", uri=True,
                               isolation_level=None, timeout=timeout_s, check_same_thread=False)
        # NORMAL: a commit survives the process; a power cut may take the last ones, never the file.
        conn.execute("PRAGMA synchronous = NORMAL")
        if mode == "rw":
            _prepare(conn, path)
        elif _version(conn, path) < SCHEMA_VERSION:
            conn.close()
            connect(path, "rw", timeout_s).close()
            return connect(path, "ro", timeout_s)
        return conn
    except (sqlite3.Error, OSError) as error:
        if conn is not None:                      # the error's traceback would keep it open
            conn.close()
        raise StoreError(f"the lab at {path!r} cannot be used ({error})") from error


# Tables, and none of ours: of a lab whose two were dropped, those of its index are left.
_IS_FOREIGN = """SELECT count(*) > 0 AND max(name IN ('runs', 'run_metrics', 'tally')) = 0
    FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite%'"""


def _version(conn, path) -> int:
    if conn.execute(_IS_FOREIGN).fetchone()[0]:
        conn.close()
        raise StoreError(f"{path!r} is the database of another program: name another file with "
                         "DB_PATH")
    version = conn.execute("PRAGMA user_version").fetchone()[0]
    if version > SCHEMA_VERSION:
        conn.close()
        raise StoreError(f"the lab at {path!r} has schema version {version}, and this AI-Lab knows "
                         f"up to {SCHEMA_VERSION}: update AI-Lab; the file was left untouched")
    return version


def _prepare(conn, path) -> None:
    """Migrate; use a write-ahead log, except where its shared memory does not reach all users."""
    import sqlite3
    if _version(conn, path) < SCHEMA_VERSION:
        with transaction(conn):                   # several processes may race for it
            for step in MIGRATIONS[_version(conn, path):]:
                step(conn)
            conn.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
    if kind := network_filesystem(path):
        _warn(path, f"the lab {path!r} lies on a network file system ({kind}): it uses a rollback "
              "journal, which is safe there and slower; a local DB_PATH, or AILAB_URL, is faster")
    with contextlib.suppress(sqlite3.OperationalError):       # others have it open: next time
        conn.execute(f"PRAGMA journal_mode = {'delete' if kind else 'wal'}")


def network_filesystem(path: str, mounts: str = "/proc/self/mounts") -> str | None:
    """Name the network or FUSE file system that holds `path`; None for a local one or unknown."""
    real, text, row = os.path.realpath(path), "", r"(?m)^\S+ (\S+) (\S+)"
    if sys.platform == "win32":
        import ctypes
        drive = os.path.splitdrive(real)[0] + "\\"
        is_remote = ctypes.windll.kernel32.GetDriveTypeW(drive) == 4   # DRIVE_REMOTE
        return "network drive" if is_remote else None
    if sys.platform == "darwin":                  # server:/share on /Volumes/share (smbfs, nodev)
        text, row = _output(["/sbin/mount"]).decode(), r"(?m)^.* on (.*) \(([^,)]+)"
    else:
        with contextlib.suppress(OSError):
            text = _read(mounts)
    found = ("", "")
    for point, kind in re.findall(row, text):
        point = point.replace("\\040", " ").rstrip("/") + "/"
        if (real + "/").startswith(point) and len(point) >= len(found[0]):
            found = (point, kind)
    return found[1] if re.match(NETWORK_KINDS, found[1]) else None


@contextlib.contextmanager
def transaction(conn):
    """Hold the store's write lock for a block: commit at its end, roll back when it raises."""
    conn.execute("BEGIN IMMEDIATE")
    try:
        yield conn
        conn.execute("COMMIT")
    except BaseException:
        conn.rollback()
        raise


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
    def git(*args: str) -> bytes:
        return _output(["git", "-C", root, *args], deadline)
    root = "."
    root = os.fsdecode(git("rev-parse", "--show-toplevel").rstrip(b"\n"))
    if not root:
        return {}
    head = git("rev-parse", "--verify", "-q", "HEAD").decode().strip()
    where = ["--", ".", *(f":(exclude,glob,icase)**/{pattern}{below}" for pattern in SECRET_FILES
                           for below in ("", "/**"))]
    diff = git("diff", "--no-ext-diff", "--no-textconv", "--no-color", *([head] if head else []),
               *where)
    for name in git("ls-files", "--others", "--exclude-standard", "-z", *where).split(b"\0"):
        if name and len(diff) <= MAX_DIFF_BYTES and time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                diff += _untracked_diff(os.path.join(os.fsencode(root), name), name)
    text = _text(diff[:MAX_DIFF_BYTES].decode("utf-8", "replace"), is_code=True)
    if len(diff) > MAX_DIFF_BYTES:
        text += f"\n[cut by lab_logger after {MAX_DIFF_BYTES} bytes]\n"
    return {"git_hash": head or None, "git_diff": text}


def _untracked_diff(path: bytes, name: bytes) -> bytes:
    """Write an untracked file as a diff that adds it; none for binary or large ones."""
    if not os.path.isfile(path) or os.path.islink(path):
        return b""
    with open(path, "rb") as file:
        body = file.read(MAX_UNTRACKED_BYTES + 1)
    if b"\0" in body or len(body) > MAX_UNTRACKED_BYTES:
        return b""
    lines = body.splitlines(keepends=True)
    added = b"@@ -0,0 +1,%d @@\n+%b" % (len(lines), b"+".join(lines)) if lines else b""
    tail = b"\n\\ No newline at end of file\n" if body and not body.endswith(b"\n") else b""
    return (b"diff --git a/%b b/%b\nnew file mode 100644\n--- /dev/null\n+++ b/%b\n" % ((name,) * 3)
            + added + tail)


def _output(command: list[str], deadline: float = math.inf) -> bytes:
    """Run a program and return the first of what it prints; b"" when absent, failing or slow."""
    import subprocess
    with contextlib.suppress(OSError, ValueError), subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0", "GIT_TERMINAL_PROMPT": "0"},
            start_new_session=True) as program:
        def end() -> None:                        # it, and what it has started
            with contextlib.suppress(OSError):
                os.killpg(program.pid, 9) if hasattr(os, "killpg") else program.kill()
        timer = threading.Timer(max(0.0, min(deadline - time.monotonic(), CAPTURE_WAIT_S)), end)
        timer.start()
        try:                                      # a diff may have gigabytes
            found = program.stdout.read(MAX_OUTPUT_BYTES) if program.stdout else b""
            is_cut = len(found) == MAX_OUTPUT_BYTES
            if is_cut:
                end()
            return found if not program.wait() or is_cut else b""
        finally:
            timer.cancel()
    return b""


def _read(path: str) -> str:
    with open(path, encoding="utf-8", errors="replace") as file:
        return file.read()


def _nvidia_smi(fields: str, deadline: float) -> list[list[str]]:
    """Ask for fields of each GPU that this process may see; [] where there is none."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
    if not re.match(r"\d|GPU|MIG", visible):      # "" and "-1" hide them all
        return []
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        command += ["-i", visible]
    rows = _output(command, deadline).decode("utf-8", "replace").splitlines()
    return [row.split(", ") for row in rows if row.count(",") == fields.count(",")]


def packages(deadline: float) -> dict[str, str]:
    """List the installed packages under pip_freeze: `name==version` lines, by name."""
    from importlib.metadata import distributions
    found: dict[str, str] = {}
    for distribution in distributions():
        if time.monotonic() > deadline:           # a cold network drive: what was found by then
            break
        with contextlib.suppress(Exception):      # a broken dist-info must not hide the others
            found.setdefault(distribution.metadata["Name"] or "", distribution.version)
    names = sorted(filter(None, found), key=str.lower)
    return {"pip_freeze": "\n".join(f"{name}=={found[name]}" for name in names)}


def device_info(deadline: float) -> dict[str, str]:
    """Describe the machine under device_info: platform, cpu, n_cpus, memory_bytes, gpus ..."""
    import platform
    cpu, memory = "", None
    with contextlib.suppress(OSError, ValueError, AttributeError, IndexError):
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        cpu = re.findall(r"model name\s*: (.*)", _read("/proc/cpuinfo"))[0]
    gpus = _nvidia_smi("name,memory.total,driver_version", min(deadline, time.monotonic() + 5))
    return {"device_info": _dumps({
        "platform": platform.platform(), "machine": platform.machine(),
        "cpu": cpu or platform.processor(), "n_cpus": os.cpu_count(), "memory_bytes": memory,
        "gpus": [{"name": name, "memory_mib": float(mib) if mib.isdigit() else None,
                  "driver": driver} for name, mib, driver in gpus],
        "cuda_visible_devices": os.environ.get("CUDA_VISIBLE_DEVICES")})}


@functools.lru_cache(maxsize=1)
def _facts() -> dict:
    """Capture what is slow to ask, once per process: git, device and packages."""
    found: dict = {}
    deadline = time.monotonic() + CAPTURE_WAIT_S
    for capture in (git_info, device_info, packages):
        with _harmless(f"{capture.__name__} could not be captured; the run goes on"):
            found.update(capture(deadline))
    return found


def system_metrics(last: dict[str, Any]) -> dict[str, float]:
    """Measure machine, process and GPUs as metrics named system/...; what cannot be had is absent.

    Args:
        last: counters of the call before, kept here: CPU shares are of the time since then.
    Sources: proc(5); the kernel's cgroup-v2.rst for memory.max, memory.current, inactive_file.
    """
    found: dict[str, float] = {}
    gib = float(1 << 30)

    def share(name: str, spent: float, of: float) -> None:
        before, last[name] = last.get(name), (spent, of)
        if before and of > before[1]:
            found[name] = 100 * (spent - before[0]) / (of - before[1])
    share("process_cpu_percent", time.process_time(), time.monotonic())
    with contextlib.suppress(OSError, ValueError):
        ticks = [int(word) for word in _read("/proc/stat").split()[1:9]]   # idle and iowait: 3, 4
        share("cpu_percent", sum(ticks) - ticks[3] - ticks[4], sum(ticks))
    with contextlib.suppress(OSError, ValueError):
        pages = int(_read("/proc/self/statm").split()[1])
        found["process_memory_gib"] = pages * os.sysconf("SC_PAGE_SIZE") / gib
    with contextlib.suppress(OSError, ValueError, KeyError):
        used, limit = min(_memory(), key=lambda pair: (pair[1] - pair[0]) / pair[1])
        found["memory_gib"], found["memory_percent"] = used / gib, 100 * used / limit
    with contextlib.suppress(OSError, AttributeError):
        disk = os.statvfs(".")
        found["disk_percent"] = 100 - 100 * disk.f_bavail / max(1, disk.f_blocks)
        found["disk_free_gib"] = disk.f_bavail * disk.f_frsize / gib
    if last.get("n_misses", 0) < 3:               # a busy machine may be slow once
        rows = _nvidia_smi("index,utilization.gpu,memory.used,memory.total,temperature.gpu,"
                           "power.draw", time.monotonic() + 5)
        last["n_misses"] = 0 if rows else last.get("n_misses", 0) + 1
        for index, *texts in rows:
            use, memory, total, heat, power = (
                float(text) if re.fullmatch(r"[\d.]+", text) else None for text in texts)
            gpu = {"utilization_percent": use, "temperature_c": heat, "power_w": power,
                   "memory_gib": memory and memory / 1024,
                   "memory_percent": memory and total and 100 * memory / total}
            found |= {f"gpu.{index}.{name}": value for name, value in gpu.items()
                      if value is not None}
    return {f"system/{name}": round(value, 3) for name, value in found.items()}


def _memory() -> list[tuple[int, int]]:
    """Give (bytes in use, limit) of the machine and of each control group around this process."""
    machine = {line.split(":")[0]: int(line.split()[1]) * 1024
               for line in _read("/proc/meminfo").splitlines()}
    found = [(machine["MemTotal"] - machine["MemAvailable"], machine["MemTotal"])]
    for _, kinds, group in (line.split(":", 2) for line in _read("/proc/self/cgroup").splitlines()):
        if kinds in ("", "memory"):               # version 2; version 1
            names = ("current", "max") if not kinds else ("usage_in_bytes", "limit_in_bytes")
            for depth in range(group.count("/") + 1):
                folder = f"/sys/fs/cgroup/{kinds}{group.rsplit('/', depth)[0]}/memory."
                with contextlib.suppress(OSError, ValueError, KeyError):
                    used, limit = (int(_read(folder + name)) for name in names)
                    stat = dict(line.split() for line in _read(folder + "stat").splitlines())
                    used -= int(stat.get("total_inactive_file") or stat["inactive_file"])
                    if limit < machine["MemTotal"]:
                        found.append((used, limit))
    return found


def launch_command() -> str:
    """The command line that started this process, quoted for a shell, secrets replaced by ***."""
    import shlex
    argv = [str(word) for word in sys.argv] or [""]
    full = list(sys.orig_argv)
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
        words.append(shlex.quote(_text(word)))
    return " ".join(words).replace("'***'", "***")


def is_secret(name: str) -> bool:
    """Tell whether a name says that its value is a secret: `api_key`, never `max_tokens`."""
    words = re.sub(r"[^a-z]+", "_", re.sub(r"([a-z])([A-Z])", r"\1_\2", name).lower()).strip("_")
    if re.fullmatch(r"(pad|eos|bos|unk|mask|sep|cls|start|end)_token", words):
        return False                              # a tokenizer's special tokens are no secrets
    return re.search(r"(^|_)(pwd|passwd|passphrase|secrets?|credentials?|(db|user|admin|root)_pass|"
                     r"(gh|github|gitlab|azure)_pat|"
                     r"(api|access|private|ssh|wandb|encryption|signing)_?keys?|token|(hf|api)_tokens|"
                     r"auth|authorization|bearer|cookies?|jwt|signature|sig)$|password$|(^|_)secret_",
                     words) is not None


_PAIR = (r"""(?im)((?:^|\\n)[ \t]*[a-z][\w-]{0,60}: |(?<![\w-])(?:-{0,2}[a-z][\w-]{0,60}=|"""
         r"""--[a-z][\w-]{0,60} +(?!-)|authorization: ?|(["'])[a-z][\w-]{0,60}\2: ?))"""
         r"""("[^"\n]*"|'[^'\n]*'|((basic|bearer|token) )?[^\s"',;&)\]}\\]+)""")


def _text(text: str, is_code: bool = False) -> str:
    """Make text fit for the store: secrets in URLs and pairs hidden, surrogates spelled out."""
    if "earer " in text:
        text = re.sub(r"\b([Bb]earer )[\w.~+/=-]{5,}", r"\1***", text)
    if "=" in text or ": " in text or "--" in text:   # password=X, --token X; not f(token=token)
        text = re.sub(_PAIR, lambda pair: pair[1] + "***" if is_secret(pair[1]) and not (
            is_code and pair[3].isidentifier()) else pair[0], text)
    if "://" in text:
        text = re.sub(r"(https?://)[^/\s:@]+@", r"\1***@", text)     # a token alone
        text = re.sub(r"(://[^/\s:@]*:)[^/\s@]+@", r"\1***@", text)
        text = re.sub(r"([?&]([^=&\s]+)=)[^&#\s]+",
                      lambda pair: pair[1] + "***" if is_secret(pair[2]) else pair[0], text)
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def process_key(pid: int | str = "self") -> str | None:
    """Tell a process from a later one of its pid: boot id/pid namespace/start time, or None."""
    try:
        boot = _read("/proc/sys/kernel/random/boot_id").strip()
        state, *fields = _read(f"/proc/{pid}/stat").rpartition(")")[2].split()
        if state in ("Z", "X"):                   # dead, and its parent has not asked yet
            return None
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}/{fields[18]}"
    except (OSError, IndexError, ValueError):
        return None


def death(hostname: str | None, pid: int | None, key: str | None,
          heartbeat_at: str | None = None) -> str | None:
    """Say in words how a run's process ended; None while it may be alive.

    This machine's processes are asked for, told by `key` (see process_key) from later ones of the
    same pid; any other is lost after LOST_AFTER_S without a sign of life.
    """
    own, killed = process_key() or "", "killed without a word: "
    is_here = pid and hostname == host_name() and os.name != "nt"
    if is_here and key and own:
        if not key.startswith(own.partition("/")[0] + "/"):
            return f"{killed}{hostname} was restarted"
        if process_key(pid or 0) == key:
            return None
        is_here = key.startswith(own.rpartition("/")[0] + "/")    # not in another container
    if is_here:
        with contextlib.suppress(PermissionError):
            is_gone = bool(key and own)           # else a later process may have its pid
            try:
                os.kill(pid or 0, 0)              # only asks; on Windows it would end it
            except (ProcessLookupError, OverflowError, TypeError):
                is_gone = True
            if is_gone:
                return f"{killed}process {pid} on {hostname} is gone"
    if hostname and heartbeat_at and heartbeat_at < utc(time.time() - LOST_AFTER_S):
        return f"lost: no sign of life from {hostname} for {LOST_AFTER_S:.0f} s"
    return None


def host_name() -> str:
    """Name this machine, as runs record it."""
    return os.uname().nodename if hasattr(os, "uname") else os.environ.get("COMPUTERNAME", "")


def jsonable(value, name: str = "", parents: tuple = ()):
    """Turn any object into what strict JSON holds, without ever raising.

    Non-finite numbers become "NaN", "Infinity", "-Infinity"; what is named like a secret "***";
    scalars of numpy's kind, dataclasses, namespaces and paths their plain value; anything else its
    repr, cut at MAX_TEXT characters. `parents` are the ids of the objects around it.
    """
    if value is None or isinstance(value, bool):
        return value
    try:
        if is_secret(name):
            return "***"
        if id(value) in parents or len(parents) > 20:
            return f"<{type(value).__name__}>"
        is_many = isinstance(value, (list, tuple, set, frozenset)) or (
            _is_mapping(value) and hasattr(type(value), "__len__"))
        if parents and is_many and len(value) > 1_000:    # a table, say, is not read
            return f"<{type(value).__name__} of {len(value)} items>"
        plain, parents = _plain(value), (*parents, id(value))
        if isinstance(plain, list):               # ["--token", "X"]
            flags = ["", *(item if isinstance(item, str) and item[:1] == "-" else ""
                           for item in plain)]
            return [jsonable(item, flags[i], parents) for i, item in enumerate(plain)]
        return plain if not isinstance(plain, dict) else {
            _text(str(key)): jsonable(item, str(key), parents) for key, item in plain.items()}
    except Exception:  # noqa: BLE001  an object's own methods may raise anything
        return _repr(value)


def _plain(value):
    """Give an object's plain form: a dict or a list of objects, a number, or text."""
    if isinstance(value, str):
        cut = f" [cut by lab_logger after {MAX_STRING} characters]"
        return _text(value[:MAX_STRING] + cut * (len(value) > MAX_STRING))
    if isinstance(value, int):
        return int(value) if abs(value) < 1 << 63 else repr(int(value))[:MAX_TEXT]
    if isinstance(value, float):
        return _number(float(value))
    if _is_mapping(value):
        return dict(value)
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return dict(value._asdict())
    if isinstance(value, (list, tuple)):
        return list(value)
    if isinstance(value, (set, frozenset)):
        return sorted(value, key=repr)
    if isinstance(value, os.PathLike):
        return _text(os.fsdecode(value))
    if hasattr(value, "__dataclass_fields__") and not isinstance(value, type):
        return {field: getattr(value, field) for field in value.__dataclass_fields__}
    if type(value).__name__ in ("Namespace", "SimpleNamespace"):
        return dict(vars(value))
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:    # numpy, torch scalars
        return jsonable(value.item())
    if isinstance(value, type) or hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    return _repr(value)


def _is_mapping(value) -> bool:                   # its class is asked: instances may raise
    return hasattr(type(value), "keys") and hasattr(type(value), "__getitem__")


def _repr(value) -> str:
    try:
        return _text(repr(value)[:1 << 20])[:MAX_TEXT]   # a cut address shows its password
    except Exception:  # noqa: BLE001  an object's own methods may raise anything
        return f"<{type(value).__name__}>"


def _number(value: float):
    if value - value == 0:                        # finite
        return value
    return "NaN" if value != value else "Infinity" if value > 0 else "-Infinity"


def _dumps(value) -> str:
    return json.dumps(value, allow_nan=False, separators=(",", ":"), ensure_ascii=False)


# --- Journal and drain --------------------------------------------------------
# One file per run, `<run_id>.jsonl`, appended to by the run's process only, one JSON object a line;
# a resumed run has one more for each resumption, `<run_id>.<part>.jsonl`, part being 8 hex digits.
# The first line holds "v" (format version), "db" (path or URL of the lab) and "set"; any may hold
#   "t"         seconds since 1970
#   "set"       {column of runs: value}
#   "m"         {metric name: number, or "NaN" ...}, with "e" (epoch) and "s" (step)
#   "artifact"  a path to append to artifacts_json
#   "resume"    what resumptions_json tells of this part; then "set" holds for a new run only
# A line with "t" alone, or an empty "m", is a heartbeat. What follows the last newline was never
# acknowledged. Lines and the offset behind them enter the store in one transaction, so any number
# of processes may drain one journal any number of times, here or over HTTP: each line counts once.
# Version 1 had no "resume".

_JOURNAL_COLUMNS = RUN_COLUMNS.keys() - {"run_id", "journal_offset", "deleted_at", "received_from",
                                         "resumptions_json"}
_STATE = ("status", "ended_at", "duration_s", "end_reason", "error", "hostname", "pid",
          "process_key", "heartbeat_at")          # of the newest part


def journal_dirs(lab: str) -> list[str]:
    """List where a lab's journals may lie, best first: beside it, in the home, in /tmp."""
    import tempfile
    user = os.getuid() if hasattr(os, "getuid") else os.environ.get("USERNAME", "")
    home = os.path.abspath(os.path.expanduser(os.path.join("~", ".ai-lab")))
    own = os.path.join(home, re.sub(r"\W+", "_", lab)) if "://" in lab else lab
    return [own + ".journals", os.path.join(home, "journals"),
            os.path.join(tempfile.gettempdir(), f"ai-lab-{user}-journals")]


def pending(lab: str) -> list[dict]:
    """List a lab's journals that are not yet wholly taken in: path, run_id, bytes; oldest first."""
    from glob import escape, glob
    found = []
    for place, folder in enumerate(journal_dirs(lab)):
        for path in glob(os.path.join(escape(folder), "*.jsonl")):
            with contextlib.suppress(OSError, ValueError, AttributeError):   # gone, or no journal
                status = os.lstat(path)
                if not os.path.isfile(path) or os.path.islink(path):
                    continue
                if place and hasattr(os, "getuid") and status.st_uid != os.getuid():
                    continue                      # /tmp is everybody's
                is_own = not place and "://" not in lab   # other folders hold several labs'
                if is_own or _head(path).get("db") == lab:
                    found.append((status.st_mtime, path, status.st_size))
    return [{"path": path, "run_id": os.path.basename(path).partition(".")[0], "bytes": size}
            for _, path, size in sorted(found)]


def _head(path: str) -> dict:
    with open(path, "rb") as journal:
        return json.loads(journal.readline())


def drain(take: Any, path: str, offset: int = 0) -> bool:
    """Hand a journal's new lines to a lab, exactly once each.

    Args:
        take: take_lines of a connection, or post_lines of a server.
        offset: bytes that the lab is thought to hold; it is asked where 0.
    Returns: True when nothing is left and the run has ended, so that the file may go.
    Raises: as `take`; the lab holds what it held before the failed chunk.
    """
    name = os.path.splitext(os.path.basename(path))[0]
    held, status = (offset, None) if offset else take(name, 0, b"")
    with open(path, "rb") as journal:
        while True:
            if journal.seek(held) > os.fstat(journal.fileno()).st_size:
                raise ValueError("the lab says that it holds more of it than there is")
            chunk = journal.read(CHUNK_BYTES)
            if len(chunk) == CHUNK_BYTES:
                chunk += journal.readline()       # end on a whole line, however long
            end = chunk.rfind(b"\n") + 1
            if not end:
                is_over = status not in (None, "running", "lost")
                age_s = time.time() - os.stat(path).st_mtime
                return is_over or (not held and age_s > LOST_AFTER_S)   # it died while beginning
            before = held
            held, status = take(name, held, chunk[:end])
            if held == before:
                raise StoreError("the lab took in nothing of a whole line")


def take_lines(conn, journal: str, offset: int, lines: bytes,
               received_from: str | None = None, ahead_s: float = 0.0) -> tuple[int, str | None]:
    """Take whole lines of a journal into the store, in one transaction with the offset behind them.

    Args:
        journal: run id, or run id.part.
        offset: of the first line; lines that are held are skipped, after a gap none is taken.
        received_from: the machine that sent them; None for this one.
        ahead_s: how far this machine's clock is ahead of the sender's, for the signs of life.
    Returns: bytes of the journal held, status of the run (None: no run; "lost": by silence alone).
    Raises: sqlite3.Error; StoreError for a journal of a newer format; ValueError for what is none.
    """
    import sqlite3
    if not re.fullmatch(r"[\w-]{1,64}(\.[0-9a-f]{8})?", journal, re.ASCII):
        raise ValueError(f"{journal!r} is no name of a journal: give RUN_ID or RUN_ID.PART")
    run_id, _, part = journal.partition(".")
    held = f"""json_extract(resumptions_json, '$."{part}".offset')""" if part else "journal_offset"

    def state() -> tuple:
        return conn.execute(
            f"SELECT ifnull({held}, 0), CASE WHEN end_reason LIKE 'lost%' THEN 'lost' ELSE status "
            "END FROM runs WHERE run_id = ?", (run_id,)).fetchone() or (0, None)
    if not lines:
        return state()
    with transaction(conn):
        start, end = state()[0], offset + len(lines)
        try:
            if offset <= start < end:
                _apply(conn, run_id, part, lines[start - offset:], end, received_from, ahead_s)
        except (TypeError, KeyError, AttributeError, OverflowError, OSError, RecursionError,
                sqlite3.InterfaceError, sqlite3.ProgrammingError, sqlite3.IntegrityError) as error:
            raise ValueError(f"the journal of run {run_id} holds what no lab can ({error})"
                             ) from error
        return state()


def _parse(lines: list[bytes], run_id: str) -> list[dict]:
    try:                                          # one call for all: half the time of one for each
        records = json.loads(b"[" + b",".join(lines) + b"]")
    except ValueError:
        if len(lines) > 1:
            return [record for line in lines for record in _parse([line], run_id)]
        _warn(run_id, f"a line of the journal of run {run_id} is damaged and was left out: "
              f"{lines[0][:80]!r}")
        return []
    return [record for record in records if isinstance(record, dict)]


def _fold(records: list[dict], run_id: str, part: str, parts: dict, begun: str | None,
          ahead_s: float) -> tuple:
    """Add journal records up: columns of runs, artifacts, rows of run_metrics; amends `parts`."""
    columns: dict = {}
    artifacts, rows, last_t, since = [], [], 0.0, parts.get(part, {}).get("at", "")
    record: dict = {}
    try:
        for record in records:
            last_t = record.get("t", last_t)
            if "m" in record:                     # no earlier than its part, whatever the clock did
                at, epoch, step = max(utc(last_t), since), record.get("e"), record.get("s")
                rows += [(run_id, name, float(value) if value.__class__ is str else value, epoch,
                          step, at) for name, value in record["m"].items()]
                continue
            if record.get("v", 1) > JOURNAL_VERSION:
                raise StoreError(
                    f"run {run_id} was logged by a newer lab_logger (journal version "
                    f"{record['v']}, known are up to {JOURNAL_VERSION}): update AI-Lab")
            values = record.get("set", {})
            if part and "resume" in record:
                parts[part], since = record["resume"], record["resume"].get("at", "")
                if begun and begun <= values["timestamp"]:
                    values = {name: values.get(name) for name in _STATE}
            columns.update(values)
            if "artifact" in record:
                artifacts.append(record["artifact"])
        if (columns.get("status") or "running") not in STATUSES:
            raise ValueError(f"status is one of {', '.join(STATUSES)}")
        float(columns.get("duration_s") or 0)
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise TypeError(f"{error}, in {str(record)[:100]}") from error
    if last_t:
        columns["heartbeat_at"] = utc(last_t + ahead_s)
    return columns, artifacts, rows


def _apply(conn, run_id: str, part: str, lines: bytes, end: int, received_from: str | None,
           ahead_s: float) -> None:
    """Write journal lines, which end at byte `end`, into runs and run_metrics."""
    begun, status, told, known, deleted_at = conn.execute(
        "SELECT timestamp, status, resumptions_json, artifacts_json, deleted_at FROM runs "
        "WHERE run_id = ?", (run_id,)).fetchone() or (None,) * 5
    parts = json.loads(told or "{}")
    records = _parse([line for line in lines.splitlines() if line], run_id)
    if status is None and "v" not in (records or [{}])[0]:
        raise ValueError("it does not begin as a journal does")
    if part and part not in parts and (deleted_at or status == "running"):
        _refuse_second(conn, run_id, records[0], parts, deleted_at)
    columns, artifacts, rows = _fold(records, run_id, part, parts, begun, ahead_s)
    if str(deleted_at).startswith("purged"):      # its lines are passed over
        columns, artifacts, rows, status = {}, [], [], "finished"
    is_newest = part == max(parts, key=lambda name: parts[name].get("at", ""), default="")
    if is_newest and status == "killed":          # more from a run once taken for dead: it lives
        columns = {"status": "running", "ended_at": None, "duration_s": None, "end_reason": None,
                   **columns}
    columns = {name: columns[name] for name in columns
               if name in _JOURNAL_COLUMNS and (is_newest or name not in _STATE)}
    if artifacts:
        columns["artifacts_json"] = _dumps(json.loads(known or "[]") + artifacts)
    if received_from:
        columns["received_from"] = received_from
    conn.executemany("INSERT INTO run_metrics (run_id, metric_name, metric_value, epoch, step, "
                     "timestamp) VALUES (?, ?, ?, ?, ?, ?)", rows)
    if rows and not is_newest:
        _move_behind(conn, run_id, part, parts)
    if parts:
        _keep_newest(conn, run_id, part, parts, rows)
    if part:
        parts.setdefault(part, {})["offset"] = end
    else:
        columns["journal_offset"] = end
    columns["resumptions_json"] = _dumps(parts) if parts else None
    conn.execute(f"INSERT INTO runs (run_id, {', '.join(columns)}) "
                 f"VALUES (?{', ?' * len(columns)}) ON CONFLICT (run_id) DO UPDATE SET "
                 + ", ".join(f"{name} = excluded.{name}" for name in columns),
                 (run_id, *columns.values()))


def _gone(deleted_at: object) -> str:
    return ("was purged: give another run_id" if str(deleted_at).startswith("purged")
            else "is in the trash: `ailab.py restore` brings it back")


def _move_behind(conn, run_id: str, part: str, parts: dict) -> None:
    """Give the points of newer parts new ids: by their ids points are the last of a curve."""
    own = parts.get(part, {}).get("at", "")
    begun = min((at for told in parts.values() if (at := told.get("at", "")) > own), default="~")
    for told in parts.values():                   # what newer parts have passed may come again
        told.pop("past", None)
    newer = (run_id, begun, conn.execute("SELECT max(id) FROM run_metrics").fetchone()[0])
    names = ", ".join(name for name in METRIC_COLUMNS if name != "id")
    conn.execute(f"INSERT INTO run_metrics ({names}) SELECT {names} FROM run_metrics "
                 "WHERE run_id = ? AND timestamp >= ? AND id <= ? ORDER BY id", newer)
    conn.execute("DELETE FROM run_metrics WHERE run_id = ? AND timestamp >= ? AND id <= ?", newer)


def _refuse_second(conn, run_id: str, head: dict, parts: dict, deleted_at: str | None) -> None:
    """Raise ValueError for a part of a run in the trash, or one that a living process resumed."""
    if deleted_at:
        raise ValueError(f"run {run_id} {_gone(deleted_at)}")
    hostname, pid, *signs = conn.execute(
        "SELECT hostname, pid, process_key, heartbeat_at FROM runs WHERE run_id = ?",
        (run_id,)).fetchone()
    told = head.get("resume", {})
    is_known = [hostname, pid] in ([told.get("hostname"), told.get("pid")], told.get("replaces"))
    newest = max((other.get("at", "") for other in parts.values()), default="")
    is_late = utc(head["t"] + 60) < newest        # of a process that ended before that one began
    if hostname and not (is_known or is_late or death(hostname, pid, *signs)):
        raise ValueError(f"run {run_id} was resumed at the same time by process {pid} on "
                         f"{hostname}, which is alive")


def _keep_newest(conn, run_id: str, part: str, parts: dict, rows: list[tuple]) -> None:
    """Of points at one epoch and step, keep those of the newest part that logged them.

    Metrics that are beyond all that older parts logged are noted as "past": looked up no more.
    """
    from bisect import bisect
    own = parts.get(part, {})
    keyed = [row for row in rows
             if not row[3] is row[4] is None and row[1] not in own.get("past", ())]
    if not keyed:
        return
    names, begins = {row[1] for row in keyed}, sorted(told.get("at", "") for told in parts.values())
    first_epoch, first_step = (
        min((row[i] for row in keyed if row[i] is not None), default=-1 << 63) for i in (3, 4))
    found = [(row[0], bisect(begins, row[1]), row[2:]) for row in conn.execute(
        "SELECT id, ifnull(timestamp, ''), metric_name, epoch, step FROM run_metrics "
        "WHERE run_id = ? AND metric_name IN (SELECT value FROM json_each(?)) "
        "AND (epoch >= ? OR step >= ?)",
        (run_id, json.dumps(sorted(names)), first_epoch, first_step))]
    newest: dict[tuple, int] = {}
    for _, place, key in found:
        newest[key] = max(place, newest.get(key, 0))
    conn.executemany("DELETE FROM run_metrics WHERE id = ?",
                     [(row_id,) for row_id, place, key in found if place < newest[key]])
    repeated = {key[0] for _, place, key in found if place < bisect(begins, own.get("at", ""))}
    own["past"] = [*own.get("past", ()), *(names - repeated)]


def post_lines(url: str, journal: str, offset: int, lines: bytes, death: str = "",
               timeout_s: float = 10.0) -> tuple[int, str | None]:
    """Hand lines to the lab server at `url`, as take_lines() does to a store.

    `death` are the words of death() where the run's process, on this machine, is gone.
    Raises: OSError: out of reach. StoreError: it refuses. ValueError: it will never take that.
    """
    import gzip
    from urllib.parse import urlencode
    query = {"journal": journal, "offset": offset, "now": int(time.time()),
             **({"death": death} if death else {})}
    answer = _call(f"{url}/ingest?{urlencode(query)}", timeout_s, gzip.compress(lines, 1))
    if not isinstance(answer.get("offset", 0), int):
        raise StoreError(f"the server gave no answer of a lab: {answer!r}")
    return answer.get("offset", 0), answer.get("status")


def _call(url: str, timeout_s: float, body: bytes | None = None) -> dict:
    """Ask a lab server, for JSON, in a thread: it may drip its headers for ever."""
    found: list[tuple[Any, Any]] = []

    def ask() -> None:
        try:
            found.append((_asked(url, timeout_s, body), None))
        except Exception as error:  # noqa: BLE001  raised again below
            found.append((None, error))
    thread = threading.Thread(target=ask, name="lab_logger", daemon=True)
    try:
        thread.start()
        thread.join(timeout_s)
    except RuntimeError:                          # at the interpreter's end none can be started
        ask()
    if not found:
        raise StoreError("timed out: it has not answered")
    answer, error = found[0]
    if error is not None:
        raise error
    return answer


def _asked(url: str, timeout_s: float, body: bytes | None) -> dict:
    """Send one request; AILAB_TOKEN (or the ?token= of AILAB_URL) opens the server's door."""
    from http.client import HTTPException
    from urllib import error, request
    token = (setting("AILAB_TOKEN")[0] or setting("AILAB_URL")[0].partition("?token=")[2]).strip()
    headers = {"Content-Type": "application/x-ndjson", "Content-Encoding": "gzip"} if body else {}
    if not re.fullmatch(r"[!-~]*", token):
        raise StoreError("AILAB_TOKEN holds characters that no token has")
    if token:
        headers["Authorization"] = f"Bearer {token}"
    # No redirect is followed: it would carry the token away.
    stay = type("Stay", (request.HTTPRedirectHandler,), {"redirect_request": lambda *_: None})
    opener, deadline = request.build_opener(stay), time.monotonic() + timeout_s
    try:
        with opener.open(request.Request(url, body, headers), timeout=timeout_s) as answer:
            found = b""
            while block := answer.read1(1 << 16):
                found += block
                if time.monotonic() > deadline or len(found) > 1 << 24:
                    raise StoreError("timed out: the server's answer has no end")
            return dict(json.loads(found))
    except error.HTTPError as problem:
        with problem:
            told = problem.read(2_000).decode("utf-8", "replace")
        with contextlib.suppress(ValueError, TypeError, KeyError):
            told = json.loads(told)["detail"]
        missing = {404: LookupError, 409: LookupError}    # 409: several ids begin so
        kind = (missing if body is None else {409: ValueError, 413: ValueError, 422: ValueError}
                ).get(problem.code, StoreError)
        if problem.code in (401, 403):
            told = f"AILAB_TOKEN is {'not the one it wants' if token else 'not set'}"
        raise kind(f"the server answered {problem.code}: {told}") from None
    except (HTTPException, ValueError, TypeError) as problem:
        raise StoreError(f"the server gave no answer of a lab: {problem!r}") from None


def drain_all(conn, lab: str, run_id: str | None = None, timeout_s: float = 10.0) -> list[str]:
    """Take in every journal of this lab, or of one run; those of ended runs go.

    Args:
        conn: of the lab's store; None where `lab` is the URL of a server.
        timeout_s: of each request to that.
    Returns: a sentence for each journal that could not be taken in; it is kept.
    """
    problems = []
    take: Any = (functools.partial(post_lines, lab, timeout_s=timeout_s) if conn is None
                 else functools.partial(take_lines, conn))
    for path in [found["path"] for found in pending(lab) if run_id in (None, found["run_id"])]:
        try:
            if conn is None:                      # a server cannot ask for this machine's processes
                writer = _head(path).get("set", {})
                words = death(*(writer.get(name) for name in ("hostname", "pid", "process_key")))
                if words and not drain(take, path):
                    take(os.path.basename(path)[:-len(".jsonl")], 0, b"", words)
            if drain(take, path):
                _remove(path)
        except FileNotFoundError:
            continue                              # another process has just taken it in
        except Exception as error:  # noqa: BLE001  one odd journal hides no other
            problems.append(f"the journal {path!r} is kept: it could not be taken in ({error})")
            if conn is None and isinstance(error, (OSError, StoreError)):
                break                             # the server is away: so it is for the others
    return problems


def _remove(path: str) -> None:
    with contextlib.suppress(OSError):            # gone, or still open on Windows: next time
        os.unlink(path)


def _take_in(lab: str, timeout_s: float = 30.0) -> list[str]:
    """Open a lab, file or server, for drain_all()."""
    if "://" in lab:
        return drain_all(None, lab)
    with contextlib.closing(connect(lab, timeout_s=timeout_s)) as conn:
        return drain_all(conn, lab)


_warned: set = set()


def _warn(cause, message: str) -> None:
    """Say something once per cause on stderr; a closed or absent stderr is no reason to raise."""
    is_small = isinstance(cause, tuple) and cause[0] in ("number", "log", "wandb")
    if cause not in _warned and len(_warned) < (15 if is_small else 40):   # losses are told last
        _warned.add(cause)
        with contextlib.suppress(Exception):      # whatever stands for stderr
            sys.stderr.write(f"lab_logger: {message}\n")
            sys.stderr.flush()


@contextlib.contextmanager
def _harmless(what: str):
    """Run a block whose failure costs one warning: nothing of ours may end a training."""
    try:
        yield
    except Exception as error:  # noqa: BLE001  whatever it is
        _warn((what, _repr(error)), f"{what} ({_repr(error)})")


def _start_thread(target) -> None:
    with _harmless("no thread can be started: runs reach a file when they end, a server by `sync`"):
        threading.Thread(target=target, name="lab_logger", daemon=True).start()


class _Drainer:
    """Moves this process's live journals into one lab: a connection, a lock, a thread."""

    def __init__(self, lab: str) -> None:
        self.lab, self.is_remote = lab, "://" in lab
        self.lock = threading.RLock()
        self.conn: Any = None
        self.inode: int | None = None             # of the file that the connection is of
        self.runs: set[Run] = set()
        self.n_failures, self.is_busy, self.is_closing = 0, False, threading.Event()
        _start_thread(self._loop)

    def _loop(self) -> None:
        """Every half second while runs live; first of all take in what dead processes left."""
        pause_s, has_looked = DRAIN_EVERY_S, False
        while not self.is_closing.wait(pause_s):
            pause_s = DRAIN_EVERY_S
            if self.drain_live():
                if not has_looked:                # beside the lock: live runs need not wait
                    with contextlib.suppress(Exception):  # a broken lab: drain_live() speaks of it
                        _take_in(self.lab, timeout_s=5.0)
                        has_looked = True
            else:                                 # longer each time, never in step with others
                has_looked, longest = False, RETRY_S[0] * 2 ** min(self.n_failures - 1, 20)
                pause_s = min(longest, RETRY_S[1]) * (0.5 + os.urandom(1)[0] / 255)

    def _take(self, deadline: float):
        """Give what drain() hands lines to, until `deadline`."""
        wait_s = min(max(0.1, deadline - time.monotonic()), 30.0)
        inode = os.stat(self.lab).st_ino if os.path.exists(self.lab) else None
        if self.conn is not None and self.inode != inode:
            _warn(("gone", self.lab), f"the lab {self.lab!r} was removed or replaced while "
                  "runs were alive: they go whole into the one that is there now")
            self.disconnect()
        if self.conn is None and not self.is_remote:
            self.conn = connect(self.lab, timeout_s=wait_s)
            self.inode = os.stat(self.lab).st_ino
        if self.conn is not None:
            self.conn.execute(f"PRAGMA busy_timeout = {int(wait_s * 1000)}")

        take: Any = (functools.partial(take_lines, self.conn) if self.conn is not None else
                     functools.partial(post_lines, self.lab, timeout_s=min(wait_s, 10.0)))

        def take_in_time(*lines) -> tuple[int, str | None]:
            if time.monotonic() > deadline:
                raise StoreError("timed out: it is slow")
            return take(*lines)
        return take_in_time

    def drain_live(self, wait_s: float = math.inf, only: Run | None = None) -> bool:
        """Drain the live runs, or one; False when the lab has not all in time. Never raises."""
        if only and self.is_remote and self.n_failures:
            return False                          # training waits for no server that is away
        deadline = time.monotonic() + wait_s
        if not self.lock.acquire(timeout=min(wait_s, 30.0)):
            self.is_busy = True
            return False
        try:
            for run in [only] if only else list(self.runs):
                self._drain_run(run, deadline)
            self.n_failures = 0
        except Exception as error:  # noqa: BLE001  whatever the lab does, training goes on
            self.n_failures += 1
            self.is_busy = any(word in str(error) for word in ("locked", "busy", "timed out"))
            self.disconnect()
            if only or not self.is_busy:
                self._warn_kept(error)
        except BaseException:                     # Ctrl-C: perhaps in the middle of a transaction
            self.disconnect()
            raise
        finally:
            self.lock.release()
        return not self.n_failures

    def _warn_kept(self, why: object) -> None:
        folders = " and ".join(sorted({os.path.dirname(run.path) for run in list(self.runs)}))
        then = ("once the server answers, or by `python lab_logger.py sync`" if self.is_remote
                else "by the next process that opens the lab")
        _warn((self.lab, "cannot"), f"the lab {self.lab!r} cannot take in runs at present ({why}); "
              f"training goes on, every point is kept in {folders} and is taken in {then}")

    def _drain_run(self, run: Run, deadline: float) -> None:
        run._may_move = time.monotonic() > run._moved + 10   # there may be room by now
        run._write(b"")                           # what a full disk kept back
        try:
            size = os.stat(run.path).st_size
            if run.is_over or size > run.taken_in:
                # How a run that is over stands must be asked: its last lines may be in already.
                offset, run.taken_in = 0 if run.is_over else run.taken_in, 0   # 0 where it fails
                if drain(self._take(deadline), run.path, offset) and run.is_over:
                    run._leave("it was over")     # Windows removes no open file
                    _remove(run.path)
                    self.runs.discard(run)
                run.taken_in = size
        except ValueError as error:               # no fault of the lab's
            self.runs.discard(run)
            _warn(run.path, f"the journal {run.path!r} is kept: it cannot be taken in ({error})")
        except FileNotFoundError:
            if run.is_over:                       # another process took it in
                self.runs.discard(run)
            else:
                run._rewrite("was removed while it was written")

    def disconnect(self) -> None:
        conn, self.conn = self.conn, None
        if conn is not None:
            conn.close()

    def close(self, wait_s: float) -> None:
        """At the end of the process: take in what is left, within a bounded time."""
        self.is_closing.set()
        deadline = time.monotonic() + wait_s
        while self.runs and time.monotonic() < deadline:
            wait_s = max(0.1, deadline - time.monotonic())
            if not self.drain_live(wait_s if self.is_remote else min(wait_s, 1.0)) \
                    and not self.is_busy:         # SQLite hears no Ctrl-C while it waits
                break                             # a broken lab does not mend within seconds
            if self.runs:
                time.sleep(0.1)
        for run in list(self.runs):
            self._warn_kept("timed out: it is slow, or locked")
            run._lose("there was no room for them to the end")
        if self.lock.acquire(timeout=1):
            self.disconnect()
            self.lock.release()


_drainers: dict[str, _Drainer] = {}
_drainers_lock = threading.Lock()                 # never held while anything is waited for
_abandoned: list = []                             # a parent's connections, never closed here


def _drainer(lab: str) -> _Drainer:
    with _drainers_lock:
        if not _drainers:
            _start_thread(_sample)
        if lab not in _drainers:
            _drainers[lab] = _Drainer(lab)
        return _drainers[lab]


def _live_runs() -> list[Run]:
    return [run for drainer in list(_drainers.values()) for run in list(drainer.runs)
            if not run.is_over]


def _sample() -> None:
    """Write a heartbeat, and system metrics when due, into every live run; nvidia-smi is slow."""
    text, source = setting("AILAB_SAMPLE_EVERY_S", str(SAMPLE_EVERY_S))
    is_number = re.fullmatch(r"\d+(\.\d*)?", text)
    every_s = float(text) if is_number else SAMPLE_EVERY_S
    if not is_number:
        _warn(text, f"AILAB_SAMPLE_EVERY_S is {text!r} in {source}; give seconds, 0 for no system "
              f"metrics: they are taken every {every_s:g} s")
    pause_s, due = min(max(every_s, 0.1) if every_s else math.inf, HEARTBEAT_EVERY_S), 0.0
    last: dict[str, Any] = {}
    while True:
        metrics: dict[str, float] = {}
        with _harmless("system metrics could not be taken; training goes on"):
            if every_s and time.monotonic() >= due:
                is_first, due = not last, time.monotonic() + every_s
                metrics = system_metrics(last)
                if is_first:                      # no CPU shares yet: they are of the time between
                    metrics = {}
        for run in _live_runs():
            with _harmless("a sign of life could not be written"), run._lock:
                if not run.is_over:
                    run._append(m=metrics)
        time.sleep(pause_s)


def _at_exit() -> None:
    deadline = time.monotonic() + EXIT_WAIT_S
    with contextlib.suppress(KeyboardInterrupt):  # enough of waiting: the journals are kept
        for run in _live_runs():
            last = None if hasattr(sys, "ps1") else getattr(sys, "last_value", None)
            run.finish(error=last, wait_s=0, how="the process ended before finish() was called")
        for drainer in list(_drainers.values()):
            drainer.close(max(0.1, deadline - time.monotonic()))


def _after_fork() -> None:
    """In a forked child: leave the parent's runs, locks and connections alone."""
    global _drainers_lock
    _abandoned.append(dict(_drainers))
    for drainer in _drainers.values():
        for run in drainer.runs:
            run._leave("a forked process does not write it: log from the process that began it")
    _drainers.clear()
    _drainers_lock = threading.Lock()


atexit.register(_at_exit)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


# --- Run ----------------------------------------------------------------------

_current: contextvars.ContextVar[Run | None] = contextvars.ContextVar("ailab_run", default=None)


class Run:
    """One run: `with start_run("iris", params={...}) as run:`, or call finish() at its end.

    With `run_id` that run goes on, after a preemption say, or begins where the lab has none: epochs
    logged again replace what they repeat. Is it alive elsewhere, this one gets an id of its own.
    Attributes: run_id, path (of its journal), lab (path or URL), result (what `with` ends it with),
        config and summary (dicts of params and final metrics, to be changed).
    Its methods never raise for a fault of the lab: they warn once on stderr.
    """

    def __init__(self, experiment_name: str | None = None, *, model_name: str | None = None,
                 task_name: str | None = None, dataset_id: str | None = None,
                 note: str | None = None, params: Any = None, db_path: str | None = None,
                 run_id: str | None = None) -> None:
        import uuid
        self.run_id = self.id = self.name = str(uuid.uuid4())   # no seed makes it twice
        self.project, self.path = experiment_name, ""
        self.is_over, self.taken_in, self.result = False, 0, None
        self._fd, self._may_move, self._moved = -1, True, -math.inf   # of the journal
        self._is_stepwise = False                 # a generator's: one item is not its end
        self._keys: dict[str, str] = {}           # metric name -> ',"name":'
        self._wandb: Any = None
        self._spent_s = 0.0                       # by this run before it was resumed
        self._replaces: list = []                 # host and pid of the process that did
        self._leave("it could not be begun")
        self.config = _Live(self, "params_json", _params)
        self.summary = _Live(self, "final_metrics_json", _numbers)
        columns = {"experiment_name": experiment_name, "model_name": model_name,
                   "task_name": task_name, "note": note,
                   "dataset_id": dataset_id or setting("DATASET_ID")[0] or None}
        with _harmless("a run goes unrecorded: it did not begin"):
            self._begin({name: None if value is None else _text(str(value))
                         for name, value in columns.items()}, params, db_path, run_id)

    def _begin(self, columns: dict, params: Any, lab: str | None, run_id: str | None) -> None:
        self.lab = os.path.abspath(os.path.expanduser(lab)) if lab else lab_url() \
            or default_db_path()
        self._drainer = _drainer(self.lab)
        facts, parent, cwd = _facts(), _current.get(), None
        self._began, self._t = time.monotonic(), time.time()
        self._resumed_at = utc(self._t)
        with contextlib.suppress(OSError):        # it was deleted
            cwd = _text(os.getcwd())
        # A file is named after it: PBS says 123.server, a Slurm array 7_1.
        part = self._part(re.sub(r"[^A-Za-z0-9_-]", "-", str(run_id))[:64]) if run_id else ""
        values = _params(params)
        who = {"hostname": host_name(), "pid": os.getpid(), "command": launch_command()}
        head = {"v": JOURNAL_VERSION, "t": self._t, "db": self.lab, "set": {
            "timestamp": utc(self._t), "status": "running", **facts, **columns, **who,
            "python_version": sys.version.split()[0], "process_key": process_key(), "cwd": cwd,
            "params_json": _dumps(values), "parent_run_id": parent.run_id if parent else None}}
        if part:
            head["resume"] = {"at": self._resumed_at, **who, "git_hash": facts.get("git_hash"),
                              "params": values, "replaces": self._replaces,
                              "spent_s": self._spent_s}
            if "://" in self.lab and not self._may_begin(part, head):
                part = ""
                del head["resume"]
        self._open_journal(f"{self.run_id}{part}.jsonl")
        self._write(_dumps(head).encode() + b"\n")
        self._drainer.runs.add(self)
        dict.update(self.config, values)
        if setting("WANDB_PROJECT")[0]:
            with _harmless("W&B does not mirror this run; the lab records it still"):
                self._start_wandb(columns["experiment_name"], values)

    def _part(self, run_id: str) -> str:
        """Take over a run that is not alive elsewhere; returns its journal's new part, or ""."""
        try:
            self._take_over(run_id)
        except ValueError as error:
            _warn(("resume", run_id), f"run {run_id!r} cannot be resumed ({error}): what is "
                  f"trained here is recorded as a run of its own, {self.run_id}")
            return ""
        except Exception as error:  # noqa: BLE001  the part has a journal of its own: no harm
            _warn((self.lab, "cannot"), f"whether run {run_id!r} is alive elsewhere could not be "
                  f"asked ({error}); it is resumed, and taken in once the lab can be used")
        self.run_id = self.id = run_id
        return f".{os.urandom(4).hex()}"

    def _may_begin(self, part: str, head: dict) -> bool:
        """Have the server decide between processes that resume a run at the same time."""
        with contextlib.suppress(OSError, StoreError):            # it is away: it decides later
            try:
                post_lines(self.lab, self.run_id + part, 0, _dumps(head).encode() + b"\n",
                           timeout_s=FINISH_WAIT_S)
            except ValueError as error:
                import uuid
                self.run_id = self.id = str(uuid.uuid4())
                _warn(("resume", part), f"{error}: what is trained here is recorded as a run of "
                      f"its own, {self.run_id}")
                return False
        return True

    def _take_over(self, run_id: str) -> None:
        """Raise ValueError for a run that is alive; in a lab's file, mark it as this process's."""
        if "://" in self.lab:
            drain_all(None, self.lab, run_id, FINISH_WAIT_S)      # what a killed process left here
            with contextlib.suppress(LookupError):                # the server has no such run
                run = _call(f"{self.lab}/runs/{run_id}", FINISH_WAIT_S)
                if run.get("run_id") == run_id:   # else one whose id begins so
                    self._check_dead(*(run.get(name) for name in (
                        "status", "hostname", "pid", "process_key", "heartbeat_at", "duration_s")))
            return
        with contextlib.closing(connect(self.lab, timeout_s=FINISH_WAIT_S)) as conn:
            drain_all(conn, self.lab, run_id)
            with transaction(conn):               # of two that resume at once, one is refused
                conn.execute("INSERT INTO runs (run_id) VALUES (?) ON CONFLICT DO NOTHING",
                             (run_id,))
                deleted_at, *state = conn.execute(
                    "SELECT deleted_at, status, hostname, pid, process_key, heartbeat_at, ifnull("
                    f"duration_s, {LASTED_S}) FROM runs WHERE run_id = ?", (run_id,)).fetchone()
                if deleted_at:
                    raise ValueError(f"it {_gone(deleted_at)}")
                self._check_dead(*state)
                conn.execute("UPDATE runs SET status = 'running', hostname = ?, pid = ?, "
                             "process_key = ?, heartbeat_at = ? WHERE run_id = ?",
                             (host_name(), os.getpid(), process_key(), utc(self._t), run_id))

    def _check_dead(self, status, hostname, pid, key, heartbeat_at, duration_s) -> None:
        if status == "running" and not death(hostname, pid, key, heartbeat_at):
            raise ValueError(f"it is alive, process {pid} on {hostname}, last heard of at "
                             f"{heartbeat_at}")
        self._spent_s, self._replaces = float(duration_s or 0), [hostname, pid]
        self._resumed_at = max(self._resumed_at, heartbeat_at or "")   # clocks of machines differ

    def _open_journal(self, name: str) -> None:
        """Make the journal's file, with what an older one of the run holds, where there is room."""
        errors, flags = [], os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_RDWR
        for folder in journal_dirs(self.lab):
            path, new, start, sent = os.path.join(folder, name), -1, 0, 0
            try:
                os.makedirs(folder, mode=0o700, exist_ok=True)
                new = os.open(path, flags | getattr(os, "O_BINARY", 0), 0o600)
                while self._fd >= 0 and os.lseek(self._fd, start, 0) >= 0 and (
                        block := os.read(self._fd, CHUNK_BYTES)):
                    start += os.write(new, block)
                while sent < len(self._backlog):  # an empty file needs no room: this does
                    sent += os.write(new, self._backlog[sent:sent + CHUNK_BYTES])
            except OSError as error:
                errors.append(str(error))
                if new >= 0:                      # too small
                    os.close(new)
                    _remove(path)
                continue
            if self._fd >= 0:
                os.close(self._fd)
            if self.path not in ("", path):
                _remove(self.path)
            self._fd, self.path = new, path
            self._backlog.clear()
            return
        raise OSError(f"no journal can be written ({'; '.join(errors)})")

    def _rewrite(self, fault: str) -> None:
        """Write the journal anew where there is room: it was removed, or its disk is full."""
        with self._lock:
            old, self._may_move, self._moved = self.path, False, time.monotonic()
            with contextlib.suppress(OSError):
                self._open_journal(os.path.basename(old))
            told = (f"all of it is in {self.path!r}, to be taken in as before"
                    if os.path.exists(self.path) and not self._backlog
                    else "its points wait for room, and are taken in then")
            _warn((self.lab, fault[:6]), f"the journal {old!r} {fault}; training goes on, {told}")

    def _leave(self, why: str) -> None:
        """Write no more to the journal: from now on log() warns once."""
        fd, self._fd, self._why_left = self._fd, -1, why
        self._lock = threading.RLock()            # of the journal; held for one append
        self._backlog = bytearray()               # what the journal would not take
        with contextlib.suppress(OSError):
            os.close(fd)

    def log(self, metrics=None, at=None, /, *, epoch=None, step=None, **named) -> None:
        """Append one point of each metric to the journal: numbers, NaN and infinity included.

        Args:
            metrics: a mapping for names that are no identifiers; nested ones join by `/`.
            epoch, step: whole numbers; named metrics follow as keywords.
            at: the step, as W&B takes it.
        """
        try:
            if metrics is None and "data" in named and _is_mapping(named["data"]):
                metrics = named.pop("data")       # W&B's
            if metrics is not None:
                step = at if step is None else step
                named.pop("commit", None)         # W&B's
                named = {**_flatten(metrics), **named}
                if epoch is None and isinstance(named.get("epoch"), int):
                    epoch = named.pop("epoch")
            keys, body = self._keys, ""
            for name, value in named.items():
                if value.__class__ is not float or value - value != 0:
                    value = _as_json(f"metric {name!r}", value)
                if value is not None:
                    body += f"{keys.get(name) or self._key(name)}{value}"
            if body:
                at = "" if epoch is None else f',"e":{_whole("epoch", epoch)}'
                if step is not None:
                    at += f',"s":{_whole("step", step)}'
                self._write(f'{{"t":{time.time():.6f}{at},"m":{{{body[1:]}}}}}\n'.encode())
                if self._wandb is not None:
                    place = {"epoch": epoch, "step": step}   # W&B's own steps never go back
                    self._wandb.log({**named, **{name: number for name, number in place.items()
                                                 if number is not None}})
        except Exception as error:  # noqa: BLE001  nothing of ours may end a training
            _warn(("log", _repr(error)), "a point could not be logged and was left out "
                  f"({_repr(error)})")

    def _key(self, name) -> str:
        self._keys[name] = f",{json.dumps(_text(str(name)))}:"
        return self._keys[name]

    def _append(self, **record) -> None:
        self._write(_dumps({"t": time.time(), **record}).encode() + b"\n")

    def _write(self, line: bytes) -> None:
        """Append to the journal: one system call; what a full disk refuses waits in memory."""
        with self._lock:
            try:
                if not self._backlog:
                    n_written = os.write(self._fd, line)
                    if n_written == len(line):
                        return
                    line = line[n_written:]
                self._backlog += line
                line = b""
                while self._backlog:
                    del self._backlog[:os.write(self._fd, self._backlog)]
            except OSError as error:
                self._backlog += line
                if self._may_move and self._fd >= 0:
                    self._rewrite(f"cannot be written ({error})")
                if self._fd < 0 or len(self._backlog) > MAX_BACKLOG_BYTES:
                    self._lose(self._why_left if self._fd < 0 else "its disk was full for too long")

    def _lose(self, why: str) -> None:
        if self._backlog:
            self._backlog[:] = b"\n"              # the first of it may be half written
            _warn(("lost", self.run_id), f"points of run {self.run_id} are lost: {why}")

    def log_artifact(self, path, **ignored) -> None:
        """Record the path of a file that the run made, as absolute; a URL stays as it is."""
        with _harmless(f"the artifact {_repr(path)} was not recorded"):
            text = _text(os.fsdecode(path))
            if "://" not in text:
                text = os.path.abspath(text)
                if not os.path.exists(text):
                    _warn(text, f"the artifact {text!r} does not exist; its path is recorded")
            self._append(artifact=text)

    def note(self, text: str) -> None:
        """Set the run's note, such as "PUBLISH: best so far"."""
        with _harmless("the note was not recorded"):
            self._append(set={"note": None if text is None else _text(str(text))})

    save = log_artifact
    notes = property(lambda self: None, note)
    url = dir = None

    def finish(self, result=None, *, error: BaseException | None = None, exit_code: int = 0,
               wait_s: float = FINISH_WAIT_S, how: str = "ran to its end",
               quiet: object = None) -> None:
        """End the run and take it into the lab, within `wait_s` where that is busy.

        Args:
            result: as a decorated function returns it: final metrics, artifacts, history.
            error: what ended the run; None, `sys.exit(0)` or a closed generator is a good end.
            exit_code: instead of an error, as W&B takes it.
            how: a good end in words.
            quiet: W&B's, without effect.
        """
        if _current.get() is self:
            _current.set(None)
        if self.is_over or self._fd < 0:
            return
        error = SystemExit(exit_code) if exit_code else error
        finals: dict = {}
        status = "failed"
        with _harmless("what a run returned could not all be read"):
            finals = _numbers(self.summary)
            metrics, artifacts, history = _split_result(result)
            finals |= _numbers(metrics)
            logged = {"epoch", "step", *self._keys}   # what log() wrote is not written twice
            for row in history:
                self.log({name: value for name, value in row.items() if name not in logged},
                         epoch=row.get("epoch"), step=row.get("step"))
            for path in artifacts:
                self.log_artifact(path)
        with _harmless("the end of a run could not be recorded"):
            if not os.path.exists(self.path):
                self._rewrite("was removed while it was written")
            duration = time.monotonic() - self._began
            status, reason, trace = _end_of(error, how)
            self._append(set={
                "status": status, "end_reason": reason, "error": trace,
                "ended_at": utc(self._t + duration), "final_metrics_json": _dumps(finals),
                "duration_s": round(self._spent_s + duration, 6)})
        self.is_over = True
        with self._lock:
            if not self._backlog:
                self._leave("it was over")
        if wait_s:
            self._drainer.drain_live(wait_s, only=self)
        if self._wandb is not None:
            with _harmless("the run's end could not be told to W&B"):
                self._wandb.summary.update(finals)
                self._wandb.finish(exit_code=int(status != "finished"))

    def _start_wandb(self, name: str | None, params: dict) -> None:
        if setting("WANDB_API_KEY")[0]:
            os.environ.setdefault("WANDB_API_KEY", setting("WANDB_API_KEY")[0])
        import wandb  # type: ignore[import-not-found, unused-ignore]
        self._wandb = wandb.init(project=setting("WANDB_PROJECT")[0], name=name, config=params,
                                 reinit="create_new")
        self._append(set={"wandb_url": self._wandb.url})

    def __enter__(self) -> Run:
        self._token = _current.set(self)
        return self

    def __exit__(self, kind, error, trace) -> None:
        with contextlib.suppress(ValueError, RuntimeError):   # left in another context, or twice
            _current.reset(self._token)
        try:
            if isinstance(error, (StopIteration, StopAsyncIteration)) and self._is_stepwise:
                self.finish(getattr(error, "value", None))
            elif error or not self._is_stepwise:
                self.finish(self.result, error=error)
        except KeyboardInterrupt as interrupt:    # while it was ended
            self.finish(self.result, error=error or interrupt)
            raise
        self.result = None                        # a broken lab keeps runs: not models with them


start_run = Run                       # reads better: a run begins where this is called


def _end_of(error: BaseException | None, how: str) -> tuple[str, str, str | None]:
    """Tell how a run ended: status, end_reason (last frames first), traceback."""
    import traceback
    if error is None or isinstance(error, GeneratorExit):
        return "finished", f"finished: {how if error is None else 'the generator was closed'}", None
    message = ""
    with contextlib.suppress(Exception):          # an object's own methods may raise anything
        message = str(error).partition("\n")[0][:300]
    told = f"{type(error).__name__}: {message}".rstrip(": ")
    if isinstance(error, SystemExit):
        told = f"sys.exit({'' if error.code is None else _repr(error.code)[:200]})"
        if error.code is None or (isinstance(error.code, int) and not error.code):
            return "finished", f"finished: {told}", None
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename == __file__:
        trace = trace.tb_next                     # the user's frames only
    frames = [f"{os.path.basename(frame.filename)}:{frame.lineno} in {frame.name}"
              for frame in reversed(traceback.extract_tb(trace)) if frame.filename != __file__][:5]
    where = f"; at {', from '.join(frames)}" if frames else ""
    is_stopped = type(error).__name__ in ("KeyboardInterrupt", "CancelledError")     # asyncio's
    status, word = ("killed", "interrupted") if is_stopped else ("failed", "failed")
    text = told
    with contextlib.suppress(Exception):          # its __notes__, say
        text = "".join(traceback.format_exception(type(error), error, trace))
    return status, _text(f"{word}: {told}{where}"), _text(text[-100_000:])


def _flatten(tree, prefix: str = "") -> dict:
    flat: dict = {}
    for name, value in dict(tree).items():
        path = f"{prefix}{name}"
        flat.update(_flatten(value, path + "/") if _is_mapping(value) else {path: value})
    return flat


def _numbers(tree) -> dict:
    """Find the numbers in a nested mapping: by names joined with `/`, as JSON holds them."""
    found = {_text(str(name)): _as_float(value) for name, value in _flatten(tree).items()
             if not isinstance(value, bool)}
    return {name: _number(value) for name, value in found.items() if value is not None}


def _params(value) -> dict:
    """Give params as an object of JSON values: of a mapping, a namespace or a dataclass."""
    tree = jsonable(value)
    if tree is None:
        return {}
    return tree if isinstance(tree, dict) else {"params": tree}


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


def _as_json(what: str, value) -> str | None:
    """Write a number as the journal does; None, with a warning, for what is none."""
    number = _as_float(value)
    if number is None:
        _warn(("number", what), f"the {what} is no number but {_repr(value)[:80]}: left out")
        return None
    return json.dumps(_number(number))


def _whole(what: str, value) -> str:
    """Write an epoch or a step as the journal does; null, with a warning, for what is none."""
    if value.__class__ is int and -1 << 63 < value < 1 << 63:
        return str(value)
    number = _as_float(value)
    if number is not None and number % 1 == 0 and abs(number) < 1 << 63:
        return str(int(number))
    _warn(("number", what), f"the {what} is no whole number but {_repr(value)[:80]}: left out")
    return "null"


def _split_result(result) -> tuple[dict, list, list[dict]]:
    """Read what a decorated function returned: final metrics, artifact paths, per-epoch rows."""
    artifacts: Any = []
    if isinstance(result, (tuple, list)) and len(result) == 2 and _is_mapping(result[0]):
        result, artifacts = result
    metrics = dict(result) if _is_mapping(result) else {"result": result}
    artifacts = metrics.pop("artifacts", artifacts)
    rows = [metrics.pop(name, None) for name in ("history", "epoch_metrics")]
    history = rows[1] if rows[0] is None else rows[0]
    if isinstance(artifacts, (str, os.PathLike)):
        artifacts = [artifacts]
    elif _is_mapping(artifacts):
        artifacts = list(dict(artifacts).values())
    if _is_mapping(history):                      # Keras: {"loss": [0.5, 0.4], ...}
        columns = {name: list(values) for name, values in dict(history).items()
                   if isinstance(values, (list, tuple)) or getattr(values, "ndim", None) == 1}
        history = [{"epoch": i + 1, **{name: values[i] for name, values in columns.items()
                                       if i < len(values)}}
                   for i in range(max(map(len, columns.values()), default=0))]
    return (metrics, list(artifacts) if isinstance(artifacts, (list, tuple, set)) else [],
            [dict(row) for row in history if _is_mapping(row)]
            if isinstance(history, (list, tuple)) else [])


def _run(caller: str) -> Run | None:
    """Find the run that log() means: the context's, else the only one alive in this process."""
    live = _live_runs()
    run = _current.get() or (live[0] if len(live) == 1 else None)
    if run is None:
        _warn("no run", f"{caller}() did nothing: {len(live) or 'no'} runs are alive and none "
              "is the current one: call it inside a @log_run function or `with start_run()`")
    return run


def log(metrics: object = None, at: object = None, /, *, epoch: object = None,
        step: object = None, **named: object) -> None:
    """Log metrics of the current run: `log(epoch=3, loss=0.2)` or `log({"val/acc": 0.9})`."""
    run = _current.get() or _run("log")
    if run is not None:
        run.log(metrics, at, epoch=epoch, step=step, **named)


def log_artifact(path: object, **ignored: object) -> None:
    """Record the path of a file that the current run made; what else W&B takes is ignored."""
    if run := _run("log_artifact"):
        run.log_artifact(path)


def note(text: str) -> None:
    """Set the note of the current run."""
    if run := _run("note"):
        run.note(text)


# --- log_run ------------------------------------------------------------------

def log_run(function: object = None, /, *, experiment_name: str | None = None,
            model_name: str | None = None, task_name: str | None = None,
            dataset_id: str | None = None, note: str | None = None, db_path: str | None = None,
            resume: bool = False):
    """Record every call as a run: `@log_run`, `@log_run()` or `@log_run(task_name="x")`.

    The function may be sync, async or a generator; its signature, value and exceptions stay as they
    were. Its arguments are the params; experiment_name, model_name, task_name and dataset_id among
    them win over those here. A returned mapping holds final metrics, and under `artifacts` paths,
    under `history` or `epoch_metrics` rows per epoch; a pair is (metrics, artifacts); a bare number
    the metric `result`. With `resume`, a process's first call goes on with the run AILAB_RUN_ID;
    of a job's ranks (RANK, SLURM_PROCID) the first alone does.
    Raises: TypeError, at once, for what cannot be decorated.
    """
    columns = {"experiment_name": experiment_name, "model_name": model_name, "task_name": task_name,
               "dataset_id": dataset_id, "note": note}
    for name, value in {**columns, "db_path": db_path}.items():
        if value is not None and not isinstance(value, str):
            raise TypeError(f"log_run({name}={value!r}): it takes text, or nothing")
    decorate = functools.partial(_decorate, columns=columns, db_path=db_path, resume=resume)
    return decorate if function is None else decorate(function)


def _decorate(function, columns: dict, db_path: str | None, resume: bool):
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
        rank = os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0"   # in its job
        run_id = setting("AILAB_RUN_ID")[0] if resume and rank == "0" else ""
        is_known = run_id in _resumed
        _resumed.add(run_id)
        return Run(**{**columns, **named}, params=params, db_path=db_path,
                   run_id=None if is_known else run_id)

    wrap = (_wrap_async_generator if inspect.isasyncgenfunction(function)
            else _wrap_async if inspect.iscoroutinefunction(function)
            else _wrap_generator if inspect.isgeneratorfunction(function) else _wrap_sync)
    return functools.wraps(function)(wrap(function, begin))


_resumed: set[str] = set()            # a process goes on with a run once; later calls are others


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
            result = run.result = function(*args, **kwargs)
        return result
    return wrapper


def _wrap_async(function, begin):
    async def wrapper(*args, **kwargs):
        with begin(args, kwargs) as run:
            result = run.result = await function(*args, **kwargs)
        return result
    return wrapper


def _wrap_generator(function, begin):
    def wrapper(*args, **kwargs):
        generator, run = function(*args, **kwargs), begin(args, kwargs)
        step, value = generator.send, None
        run._is_stepwise = True
        while True:
            try:
                with run:                         # between items the caller's run is current
                    item = step(value)
            except StopIteration as stop:
                return stop.value
            try:
                step, value = generator.send, (yield item)
            except BaseException as error:  # noqa: BLE001  the caller's, handed on
                step, value = generator.throw, error
    return wrapper


def _wrap_async_generator(function, begin):
    async def wrapper(*args, **kwargs):
        generator, run = function(*args, **kwargs), begin(args, kwargs)
        step, value = generator.asend, None
        run._is_stepwise = True
        while True:
            try:
                with run:
                    item = await step(value)
            except StopAsyncIteration:
                return
            try:
                step, value = generator.asend, (yield item)
            except BaseException as error:  # noqa: BLE001  the caller's, handed on
                step, value = generator.athrow, error
    return wrapper


# --- Drop-in for W&B: import lab_logger as wandb ---------------------------------

class _Live(dict):
    """A dict with attributes; what is set or update()d goes to the journal: config, summary."""

    def __init__(self, run: Run, column: str, as_json) -> None:
        super().__init__()
        self.__dict__.update(_run=run, _column=column, _as_json=as_json)

    def _change(self, method, *args, **kwargs):
        try:
            return method(self, *args, **kwargs)
        finally:
            with _harmless("a change of config or summary was not recorded"):
                self._run._append(set={self._column: _dumps(self._as_json(self))})

    def update(self, values: Any = (), allow_val_change: object = None,   # type: ignore[override]
               **named) -> None:
        with _harmless("a change of config or summary was not recorded"):
            self._change(dict.update, values if isinstance(values, (dict, list, tuple))
                         else _plain(values), **named)

    def setdefaults(self, values) -> None:
        self.update({name: value for name, value in dict(values).items() if name not in self})

    def __getattr__(self, name):
        if name in self:
            return self[name]
        raise AttributeError(f"{name!r} is not set; set are: {', '.join(map(str, self))}")

    def as_dict(self) -> dict:
        return dict(self)

    def __reduce__(self):                         # a copy is a plain dict
        return dict, (dict(self),)


for _name in ("__setitem__", "__delitem__", "__ior__", "setdefault", "pop", "popitem", "clear"):
    setattr(_Live, _name, functools.partialmethod(_Live._change, getattr(dict, _name)))
_Live.__setattr__ = _Live.__setitem__             # type: ignore[assignment]


def init(project: str | None = None, *, name: str | None = None, config: Any = None,
         notes: str | None = None, job_type: str | None = None, tags: Any = (),
         id: str | None = None, resume: object = None, **ignored: object) -> Run:
    """Begin a run as `wandb.init` does; project is the experiment, job_type the task.

    `id` with `resume` goes on with that run. What else W&B takes is ignored.
    """
    note = " · ".join(str(text) for text in (name, notes, *(tags or ())) if text)
    if (before := _current.get()) and ignored.get("reinit"):
        before.finish()
    is_off = "disabled" in (ignored.get("mode"), setting("WANDB_MODE")[0])
    run = (_Unrecorded if is_off else Run)(project, task_name=job_type, note=note or None,
                                           params=config, run_id=id if resume else None)
    run._token, run.name = _current.set(run), name or run.run_id
    with contextlib.suppress(Exception):          # as given: a script may use what is secret
        dict.update(run.config, _plain(config))
    return run


class _Unrecorded(Run):
    """A run of mode="disabled": it takes every call and leaves no trace."""

    def _begin(self, *_) -> None:
        pass

    def _write(self, line: bytes) -> None:
        pass


def finish(exit_code: int | None = None, **ignored: object) -> None:
    """End the current run as `wandb.finish` does."""
    if run := _run("finish"):
        run.finish(exit_code=exit_code or 0)


class _Ignored:
    """Stands for what W&B offers beyond its loop: takes calls, has attributes, records nothing."""

    def __init__(self, *args, **kwargs) -> None:
        name = type(self).__name__
        _warn(("wandb", name), f"{name} of W&B is accepted and not recorded")

    def __call__(self, *args, **kwargs):
        return self

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return self


_BEYOND = ("watch", "unwatch", "define_metric", "alert", "login", "plot", "use_artifact")
for _name in _BEYOND:
    setattr(Run, _name, type(_name, (_Ignored,), {}))


@functools.lru_cache
def _beyond(name: str) -> type:
    """Give the same class each time: scripts ask isinstance(x, wandb.Image)."""
    return type(name, (_Ignored,), {})


def __getattr__(name: str):
    run = _current.get()
    if name == "run" or run and name in ("config", "summary"):
        return run if name == "run" else getattr(run, name)
    if name in _BEYOND or name[:1].isupper():
        return _beyond(name)() if name == "plot" else _beyond(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


Error = StoreError
save = log_artifact


# --- Command line ---------------------------------------------------------------

def main(argv: list[str] | None = None) -> int:
    """`python lab_logger.py sync` hands pending journals to their lab: 0 when it has all."""
    import argparse
    parser = argparse.ArgumentParser("lab_logger.py", description=main.__doc__)
    parser.add_argument("verb", choices=["sync"])
    parser.add_argument("--url", default="", help="of a lab server; default: AILAB_URL")
    parser.add_argument("--db", help="a lab's file instead; default: DB_PATH without AILAB_URL")
    options = parser.parse_args(argv)
    url = lab_url(options.url)
    if options.url and not url:
        return 2
    os.environ["AILAB_TOKEN"] = options.url.partition("?token=")[2] or setting("AILAB_TOKEN")[0]
    labs = [os.path.abspath(os.path.expanduser(options.db))] if options.db else \
        [url] if url else [default_db_path(), *_outboxes()]
    is_whole = True
    for lab in dict.fromkeys(labs):
        n_before, problems = len(pending(lab)), list[str]()
        try:
            problems = _take_in(lab) if n_before else []
        except StoreError as error:
            problems = [str(error)]
        left = len(pending(lab))
        print(f"{n_before - left} of {n_before} journals are wholly in {lab}"
              + (f"; {left} stay: their runs have not ended, or as told below" if left else ""))
        for problem in problems:
            print(f"lab_logger: {problem}", file=sys.stderr)
        is_whole = is_whole and not problems
    return 0 if is_whole else 1


def _outboxes() -> list[str]:
    """List the lab servers that journals in the home wait for."""
    from glob import glob
    found: list[str] = []
    for path in glob(os.path.expanduser(os.path.join("~", ".ai-lab", "*journals", "*.jsonl"))):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            found += [lab for lab in [str(_head(path).get("db"))] if "://" in lab]
    return found


if __name__ == "__main__":
    sys.exit(main())
