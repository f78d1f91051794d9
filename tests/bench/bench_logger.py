"""Measure the logger, each figure beside a baseline of the same run.

$ python tests/bench/bench_logger.py            # about a minute, in a temporary folder

Read the ratios: on a shared machine each figure alone is the weather's too. Eight processes log
at once, after eight that wrote a line as long with a bare os.write. With 0.5 ms between two calls
caches are cold, as between two training steps. A whole run is one call of a decorated function; a
point is durable once any process finds it in SQLite. System metrics are off.
"""

import json
import os
import shutil
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
N_CALLS, N_RUNS, N_STEPS = 50_000, 100, 20_000
N_PROCESSES = 8
LINE = (
    b'{"t":1732480000.123456,"e":1234,"m":{"train_loss":0.5,"val_loss":0.25,"accuracy":0.125,'
    b'"f1":0.0625}}\n'
)


def quantiles(seconds: list[float]) -> list[float]:
    """Give p50, p99 and the maximum, in microseconds."""
    ordered = sorted(seconds)
    return [ordered[int(len(ordered) * q) - (q == 1)] * 1e6 for q in (0.5, 0.99, 1)]


def show(what: str, ours: float, base: float, unit: str, baseline: str) -> None:
    print(f"{what:<46}{ours:>11,.1f} {unit:<9}{base:>11,.1f} {baseline:<26}{ours / base:>7.2f}x")


def show_quantiles(what: str, ours: list[float], base: list[float]) -> None:
    for which, mine, bare in zip(("p50", "p99", "max"), ours, base, strict=True):
        show(f"{what}, {which}", mine, bare, "us", "us, bare os.write")


# --- log() ------------------------------------------------------------------------------

WRITER = """
import json, os, sys, time
sys.path.insert(0, sys.argv[1])
is_ours, n_calls = sys.argv[2] == "ours", int(sys.argv[3])
begin_at, pause_s = float(sys.argv[4]), float(sys.argv[5])
line = sys.argv[6].encode() + b"\\n"
times, clock, i = [], time.perf_counter, 0

def measure(write):
    global i
    while time.time() < begin_at:                # all begin together
        time.sleep(0.01)
    while i < n_calls:
        start = clock()
        write()
        times.append(clock() - start)
        i += 1
        if pause_s:
            time.sleep(pause_s)                  # a training step

if is_ours:
    import lab_logger
    log = lab_logger.log
    with lab_logger.start_run("bench"):
        measure(lambda: log(epoch=i, train_loss=0.5 + i, val_loss=0.25, accuracy=0.125, f1=0.0625))
else:
    fd = os.open(sys.argv[7], os.O_CREAT | os.O_APPEND | os.O_WRONLY)
    measure(lambda: os.write(fd, line))
times.sort()
print(json.dumps([times[int(len(times) * q) - (q == 1)] * 1e6 for q in (0.5, 0.99, 1)]))
"""


def measure(folder: str, who: str, n: int, n_calls: int, begin_at: float, pause_s: float) -> list:
    """Give [p50, p99, max] of each of `n` processes that write beside each other."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(ROOT), who, str(n_calls), str(begin_at),
             str(pause_s), LINE.decode().rstrip(), os.path.join(folder, f"bare{i}")],
            stdout=subprocess.PIPE)  # fmt: skip
        for i in range(n)
    ]
    return [json.loads(process.communicate()[0]) for process in processes]


def bench_log(folder: str) -> None:
    """One process, as fast as it can; and with 0.5 ms between two calls. Medians of five each."""
    for what, n_calls, pause_s in (
        ("log() of four metrics", N_CALLS, 0.0),
        ("log(), 0.5 ms between calls", N_CALLS // 20, 0.0005),
    ):
        found: dict[str, list] = {"bare": [], "ours": []}
        for _ in range(5):
            for who, each in found.items():
                each += measure(folder, who, 1, n_calls, 0.0, pause_s)
        base, ours = ([statistics.median(column) for column in zip(*each, strict=True)]
                      for each in found.values())  # fmt: skip
        show_quantiles(what, ours, base)


def bench_eight(folder: str) -> None:
    """Eight at once: the median of their p50 and p99, the worst maximum."""
    for what, n_calls, pause_s in (
        ("log(), eight processes", N_CALLS // 2, 0.0),
        ("log(), eight, 0.5 ms between calls", N_CALLS // 20, 0.0005),
    ):
        found = []
        for who in ("bare", "ours"):
            each = measure(folder, who, N_PROCESSES, n_calls, time.time() + 2.0, pause_s)
            p50, p99, longest = zip(*each, strict=True)
            found.append([statistics.median(p50), statistics.median(p99), max(longest)])
        show_quantiles(what, found[1], found[0])


# --- Runs and points into SQLite --------------------------------------------------------------


def raw_store(path: str) -> sqlite3.Connection:
    """Make a store with the same tables and settings, and nothing that keeps an index."""
    import lab_logger

    os.makedirs(os.path.dirname(path), exist_ok=True)
    conn = sqlite3.connect(path, isolation_level=None)
    conn.execute("PRAGMA journal_mode = WAL")
    conn.execute("PRAGMA synchronous = NORMAL")
    for step in lab_logger.MIGRATIONS:
        step(conn)
    return conn


def in_turn(folder: str, ours, base) -> tuple[float, float]:
    """Give the medians of three measurements of each, taken in turn: both see the same weather."""
    pairs = [
        (ours(os.path.join(folder, f"{number}.db")), base(os.path.join(folder, f"raw{number}.db")))
        for number in range(3)
    ]
    mine, bare = zip(*pairs, strict=True)
    return statistics.median(mine), statistics.median(bare)


def bench_runs(folder: str) -> None:
    """Whole short runs: 10 params, 5 finals, 90 points, with and without the reader's index."""
    import ailab
    import lab_logger

    @lab_logger.log_run(experiment_name="short")
    def train(a=1, b=2, c=3, d=4, e=5, f=6, g=7, h=8, i="x", j="y"):
        for epoch in range(30):
            lab_logger.log(epoch=epoch, loss=0.5, accuracy=0.9, f1=0.8)
        return {"accuracy": 0.9, "f1": 0.8, "auc": 0.7, "loss": 0.1, "val_loss": 0.2}

    def whole_runs(db_path: str) -> float:
        os.environ["DB_PATH"] = db_path
        if is_indexed:
            ailab.open_lab(db_path).close()
        train()  # what is captured once per process
        start = time.perf_counter()
        for _ in range(N_RUNS):
            train()
        seconds = time.perf_counter() - start
        assert (count(db_path, "runs"), count(db_path, "run_metrics") // 90) == (N_RUNS + 1,) * 2
        return N_RUNS / seconds

    for what in ("no index", "the reader's index"):
        is_indexed = what != "no index"
        ours, base = in_turn(os.path.join(folder, "runs", what), whole_runs, raw_runs)
        show(f"whole short runs a second, {what}", ours, base, "runs/s", "runs/s, raw SQLite")


def raw_runs(db_path: str) -> float:
    """Give runs a second by plain SQL: a row and executemany of its points, a transaction each."""
    import lab_logger

    conn = raw_store(db_path)
    freeze = lab_logger.packages(time.monotonic() + 20)["pip_freeze"]
    start = time.perf_counter()
    for number in range(N_RUNS):
        run_id = f"{number:032x}"
        points = [(run_id, epoch, name, 0.5) for epoch in range(30)
                  for name in ("loss", "accuracy", "f1")]  # fmt: skip
        conn.execute("BEGIN IMMEDIATE")
        conn.execute(
            "INSERT INTO runs (run_id, params_json, final_metrics_json, pip_freeze) "
            "VALUES (?, ?, ?, ?)",
            (run_id, json.dumps(dict.fromkeys("abcdefghij", 1)), json.dumps({"accuracy": 0.9}),
             freeze))  # fmt: skip
        conn.executemany(
            "INSERT INTO run_metrics (run_id, epoch, metric_name, metric_value) "
            "VALUES (?, ?, ?, ?)", points)  # fmt: skip
        conn.execute("COMMIT")
    seconds = time.perf_counter() - start
    conn.close()
    return N_RUNS / seconds


def bench_points(folder: str) -> None:
    """Steps of four metrics until all points are in SQLite, with and without the reader's index."""
    import ailab
    import lab_logger

    def points(db_path: str) -> float:
        if is_indexed:
            ailab.open_lab(db_path).close()
        start = time.perf_counter()
        with lab_logger.start_run("drain", db_path=db_path) as run:
            for i in range(N_STEPS):
                run.log(epoch=i, train_loss=0.5 / (i + 1), val_loss=0.25, accuracy=0.125, f1=i)
            run.finish(wait_s=60)
        if is_indexed:
            conn = ailab.open_lab(db_path)
            ailab.take_in(conn, db_path)  # what the index has still to do
            conn.close()
        seconds = time.perf_counter() - start
        assert count(db_path, "run_metrics") == 4 * N_STEPS
        return 4 * N_STEPS / seconds

    for what in ("no index", "the reader's index"):
        is_indexed = what != "no index"
        ours, base = in_turn(os.path.join(folder, "points", what), points, raw_points)
        show(f"durable points a second, {what}", ours, base, "points/s", "points/s, executemany")


def raw_points(db_path: str) -> float:
    """Give points a second of the least that does the same: write lines, parse them, insert."""
    conn = raw_store(db_path)
    start = time.perf_counter()
    with open(db_path + ".lines", "wb", buffering=0) as file:
        for i in range(N_STEPS):
            metrics = {"train_loss": 0.5 / (i + 1), "val_loss": 0.25, "accuracy": 0.125, "f1": i}
            file.write(json.dumps({"t": time.time(), "e": i, "m": metrics}).encode() + b"\n")
    with open(db_path + ".lines", "rb") as file:
        rows = [
            ("r", record["e"], name, value, record["t"])
            for record in map(json.loads, file)
            for name, value in record["m"].items()
        ]
    conn.execute("BEGIN")
    conn.executemany(
        "INSERT INTO run_metrics (run_id, epoch, metric_name, metric_value, timestamp) "
        "VALUES (?, ?, ?, ?, ?)", rows)  # fmt: skip
    conn.execute("COMMIT")
    seconds = time.perf_counter() - start
    conn.close()
    return 4 * N_STEPS / seconds


def count(db_path: str, table: str) -> int:
    """Count a table's rows as another process would."""
    conn = sqlite3.connect(db_path)
    (n,) = conn.execute(f"SELECT count(*) FROM {table}").fetchone()
    conn.close()
    return n


# --- Import -------------------------------------------------------------------------------------


def bench_import(folder: str) -> None:
    """The whole process, compiled before, in turn with a bare one."""
    shutil.copy(ROOT / "lab_logger.py", folder)
    env = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    times: dict[str, list[float]] = {"pass": [], "import lab_logger": []}
    for _ in range(25):
        for code, found in times.items():
            start = time.perf_counter()
            subprocess.run([sys.executable, "-c", code], cwd=folder, env=env, check=True)
            found.append((time.perf_counter() - start) * 1e3)
    bare, ours = map(statistics.median, times.values())
    show("import lab_logger, whole process", ours, bare, "ms", f"ms, bare (+{ours - bare:.1f} ms)")


def main() -> None:
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        os.environ.update(DB_PATH=os.path.join(folder, "lab.db"), AILAB_SAMPLE_EVERY_S="0")
        for bench in (bench_import, bench_log, bench_eight, bench_runs, bench_points):
            bench(folder)
        import lab_logger

        lab_logger._at_exit()  # before the folder goes
    print(f"measured in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
