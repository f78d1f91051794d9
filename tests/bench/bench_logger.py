"""Measure the logger, each figure beside a baseline of the same run.

$ python tests/bench/bench_logger.py            # about half a minute, in a temporary folder
"""

import json
import os
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
N_CALLS, N_RUNS, N_STEPS = 50_000, 200, 50_000


def quantiles(seconds: list[float]) -> tuple[float, float, float]:
    """Give p50, p99 and the maximum, in microseconds."""
    ordered = sorted(seconds)
    return tuple(ordered[int(len(ordered) * q) - (q == 1)] * 1e6 for q in (0.5, 0.99, 1))


def timed(call, n: int) -> list[float]:
    """Time each of `n` calls by itself, in seconds."""
    clock, found = time.perf_counter, []
    for i in range(n):
        start = clock()
        call(i)
        found.append(clock() - start)
    return found


def show(what: str, ours: float, base: float, unit: str, baseline: str) -> None:
    print(f"{what:<44}{ours:>10,.1f} {unit:<9}{base:>10,.1f} {baseline:<24}{ours / base:>7.2f}x")


def bench_log(folder: str) -> None:
    import lab_logger

    line = b'{"t":1732480000.123,"e":12,"m":{"loss":0.5,"val_loss":0.6,"accuracy":0.9,"f1":0.8}}\n'
    fd = os.open(os.path.join(folder, "bare"), os.O_CREAT | os.O_APPEND | os.O_WRONLY)
    base = quantiles(timed(lambda i: os.write(fd, line), N_CALLS))
    os.close(fd)
    with lab_logger.start_run("bench") as run:
        ours = quantiles(
            timed(
                lambda i: lab_logger.log(
                    epoch=i, train_loss=0.5 + i, val_loss=0.25 + i, accuracy=0.125, f1=0.0625
                ),
                N_CALLS,
            )
        )
        assert run.run_id
    for which, mine, bare in zip(("p50", "p99", "max"), ours, base, strict=True):
        show(f"log() of four metrics, {which}", mine, bare, "us", "us, bare os.write")


EIGHT = """
import sys, time; sys.path.insert(0, sys.argv[1])
import lab_logger
with lab_logger.start_run("eight"):
    times, clock, end = [], time.perf_counter, time.monotonic() + 3
    i = 0
    while time.monotonic() < end:
        start = clock()
        lab_logger.log(epoch=i, train_loss=0.5, val_loss=0.25, accuracy=0.125, f1=0.0625)
        times.append(clock() - start)
        i += 1
        time.sleep(0.0005)                       # a training step
times.sort()
print(times[len(times) // 2] * 1e6, times[int(len(times) * .99)] * 1e6)
"""


def bench_eight() -> None:
    processes = [
        subprocess.Popen([sys.executable, "-c", EIGHT, str(ROOT)], stdout=subprocess.PIPE)
        for _ in range(8)
    ]
    found = [[float(word) for word in process.communicate()[0].split()] for process in processes]
    for which, values in zip(("p50", "p99"), zip(*found, strict=True), strict=True):
        print(
            f"log(), eight processes, {which} (median of 8)  {statistics.median(values):>10,.1f} us"
        )


def bench_runs(folder: str) -> None:
    """Whole short runs into a lab that the reader has indexed; the baseline keeps no index."""
    import ailab
    import lab_logger

    ailab.open_lab(os.environ["DB_PATH"]).close()

    @lab_logger.log_run(experiment_name="short")
    def train(a=1, b=2, c=3, d=4, e=5, f=6, g=7, h=8, i="x", j="y"):
        for epoch in range(30):
            lab_logger.log(epoch=epoch, loss=0.5, accuracy=0.9, f1=0.8)
        return {"accuracy": 0.9, "f1": 0.8, "auc": 0.7, "loss": 0.1, "val_loss": 0.2}

    train()  # what is captured once per process
    start = time.perf_counter()
    for _ in range(N_RUNS):
        train()
    ours = N_RUNS / (time.perf_counter() - start)
    conn = sqlite3.connect(os.path.join(folder, "raw.db"), isolation_level=None)
    conn.execute("PRAGMA journal_mode = WAL")
    conn.execute("PRAGMA synchronous = NORMAL")
    lab_logger._create(conn)
    freeze = lab_logger.packages(0)["pip_freeze"]
    start = time.perf_counter()
    for number in range(N_RUNS):
        run_id = f"{number:032x}"
        conn.execute("BEGIN IMMEDIATE")
        conn.execute(
            "INSERT INTO runs (run_id, params_json, final_metrics_json, pip_freeze) "
            "VALUES (?, ?, ?, ?)",
            (
                run_id,
                json.dumps(dict.fromkeys("abcdefghij", 1)),
                json.dumps({"accuracy": 0.9}),
                freeze,
            ),
        )
        conn.executemany(
            "INSERT INTO run_metrics (run_id, epoch, metric_name, metric_value) "
            "VALUES (?, ?, ?, ?)",
            [
                (run_id, epoch, name, 0.5)
                for epoch in range(30)
                for name in ("loss", "accuracy", "f1")
            ],
        )
        conn.execute("COMMIT")
    show(
        "whole short runs a second",
        ours,
        N_RUNS / (time.perf_counter() - start),
        "runs/s",
        "runs/s, raw SQLite",
    )


def bench_drain(folder: str) -> None:
    """Steps of four metrics until all are in SQLite, the reader's index included."""
    import ailab
    import lab_logger

    db_path = os.path.join(folder, "drain.db")
    ailab.open_lab(db_path).close()
    start = time.perf_counter()
    with lab_logger.start_run("drain", db_path=db_path) as run:
        for i in range(N_STEPS):
            run.log(epoch=i, train_loss=0.5 / (i + 1), val_loss=0.25, accuracy=0.125, f1=i)
    ailab.take_in(conn := ailab.open_lab(db_path), db_path)
    ours = 4 * N_STEPS / (time.perf_counter() - start)
    assert conn.execute("SELECT count(*) FROM run_metrics").fetchone() == (4 * N_STEPS,)
    conn.close()
    conn = sqlite3.connect(os.path.join(folder, "raw2.db"), isolation_level=None)
    conn.execute("PRAGMA journal_mode = WAL")
    conn.execute("PRAGMA synchronous = NORMAL")
    lab_logger._create(conn)
    start = time.perf_counter()
    with open(os.path.join(folder, "lines"), "wb", buffering=0) as file:
        for i in range(N_STEPS):
            file.write(
                json.dumps(
                    {
                        "t": time.time(),
                        "e": i,
                        "m": {
                            "train_loss": 0.5 / (i + 1),
                            "val_loss": 0.25,
                            "accuracy": 0.125,
                            "f1": i,
                        },
                    }
                ).encode()
                + b"\n"
            )
    with open(os.path.join(folder, "lines"), "rb") as file:
        rows = [
            ("r", record["e"], name, value, record["t"])
            for line in file
            for record in [json.loads(line)]
            for name, value in record["m"].items()
        ]
    conn.execute("BEGIN")
    conn.executemany(
        "INSERT INTO run_metrics (run_id, epoch, metric_name, metric_value, timestamp) "
        "VALUES (?, ?, ?, ?, ?)",
        rows,
    )
    conn.execute("COMMIT")
    show(
        "points a second until all are in SQLite",
        ours,
        4 * N_STEPS / (time.perf_counter() - start),
        "points/s",
        "points/s, executemany",
    )


def bench_import() -> None:
    def seconds(code: str) -> float:
        times = []
        for _ in range(15):
            start = time.perf_counter()
            subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
            times.append(time.perf_counter() - start)
        return statistics.median(times) * 1e3

    bare, ours = seconds("pass"), seconds("import lab_logger")
    show("import lab_logger, whole process", ours, bare, "ms", f"ms, bare (+{ours - bare:.1f} ms)")


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.environ["DB_PATH"] = os.path.join(folder, "lab.db")
        bench_log(folder)
        bench_eight()
        bench_runs(folder)
        bench_drain(folder)
        bench_import()
        import lab_logger

        lab_logger._at_exit()  # before the folder goes


if __name__ == "__main__":
    main()
