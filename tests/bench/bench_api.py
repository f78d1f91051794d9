"""Measure the API over labs of up to 100,000 runs, each figure beside raw SQLite or a bare server.

$ python tests/bench/bench_api.py                    # 5,000 runs and 1,000,000 points: a minute
$ python tests/bench/bench_api.py 1000 10000 100000  # the table of growth: ten minutes, 2 GB

The server is a process of its own, and another logs a run into the lab meanwhile. Each request of a
route differs from the one before where it can, so that few answers come from those kept.
"""
import contextlib
import http.client
import http.server
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path
from urllib.parse import quote

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import ailab  # noqa: E402
import lab_logger  # noqa: E402

N_CALLS, N_EPOCHS = 200, 30
COLUMNS = "run_id, timestamp, status, experiment_name, model_name, note, params_json"
RAW = "SELECT " + COLUMNS + ", final_metrics_json FROM runs {} ORDER BY timestamp DESC LIMIT 50"
SUMMARY = "SELECT run_id, value FROM metric_summary WHERE metric_name = 'accuracy' AND value >= ?"
LOGGING = """
import sys, time
sys.path.insert(0, sys.argv[1])
from lab_logger import log, start_run
with start_run("live", db_path=sys.argv[2]):
    for epoch in range(10 ** 9):
        log(epoch=epoch, loss=1 / (1 + epoch))
        time.sleep(0.01)
"""


def run_id(i: int) -> str:
    return f"{i * 2654435761 % 2**32:08x}-0000-4000-8000-{i:012x}"


def fill(db_path: str, n_runs: int) -> None:
    """Write runs of 6 params, 2 finals and 3 curves of N_EPOCHS points, as an import would."""
    conn, chance = lab_logger.connect(db_path), random.Random(1)
    with lab_logger.transaction(conn):
        for i in range(n_runs):
            params = {"learning_rate": 10.0 ** -(1 + i % 5), "batch_size": 2 ** (4 + i % 5),
                      "seed": i, "optimizer": ("sgd", "adam", "adamw")[i % 3],
                      "dropout": (i % 10) / 10, "model": {"n_layers": i % 12}}
            best = chance.random()
            conn.execute(
                "INSERT INTO runs (run_id, timestamp, experiment_name, model_name, dataset_id, "
                "status, params_json, final_metrics_json, duration_s, note, command) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (run_id(i), lab_logger.utc(1.7e9 + 60 * i), f"experiment_{i % 200}",
                 f"model_{i % 8}", f"data_{i % 5}", ("finished", "failed", "killed")[i % 3],
                 json.dumps(params), json.dumps({"accuracy": best, "test_loss": 1 - best}),
                 100.0 + i % 977, f"note number {i}" if i % 20 == 0 else None,
                 f"python train.py --seed {i}"))
            conn.executemany(
                "INSERT INTO run_metrics (run_id, epoch, metric_name, metric_value, timestamp) "
                "VALUES (?, ?, ?, ?, '2026-11-24T00:00:00.000000Z')",
                [(run_id(i), epoch, name, best * epoch / N_EPOCHS + chance.random() / 50)
                 for epoch in range(1, N_EPOCHS + 1)
                 for name in ("train_loss", "val_loss", "accuracy")])
    conn.close()
    ailab.open_lab(db_path).close()


def p50_p95(call, n_calls: int = N_CALLS) -> tuple[float, float]:
    """Time `call(i)` so many times; gives milliseconds."""
    times = []
    for i in range(n_calls):
        start = time.perf_counter()
        call(i)
        times.append((time.perf_counter() - start) * 1e3)
    times.sort()
    return statistics.median(times), times[int(len(times) * 0.95)]


def routes(n_runs: int) -> dict[str, tuple]:
    """Name what is asked: (address of the i-th request, raw SQL of the same answer, its values)."""
    def where(text: str) -> str:
        return f"/runs?where={quote(text)}"

    def compared(i: int, n: int) -> str:
        return "/runs/compare?ids=" + "&ids=".join(run_id((i + j) % n_runs) for j in range(n))
    def raw(text: str) -> str:
        return RAW.format(f"WHERE {text.format(SUMMARY.replace(', value ', ' '))}")
    page, top = RAW.format(""), f"{SUMMARY} ORDER BY value DESC LIMIT 50"
    return {
        "page of 50": (lambda i: f"/runs?offset={i}", page, ()),
        "by metric, sorted by it": (
            lambda i: f"/runs?metric_name=accuracy&metric_min={0.9 + i / 1e4}"
                      "&sort=metrics.accuracy", top, (0.9,)),
        "by metric, newest first": (
            lambda i: f"/runs?metric_name=accuracy&metric_min={0.9 + i / 1e4}",
            raw("run_id IN ({})"), (0.9,)),
        "where, one metric": (lambda i: where(f"metrics.accuracy >= {0.9 + i / 1e4}"),
                              raw("run_id IN ({})"), (0.9,)),
        "where, three conditions": (
            lambda i: where(f"metrics.accuracy >= {0.95 + i / 1e5} and params.learning_rate < 0.1 "
                            'and model_name in ["model_3", "model_4"]'),
            raw("run_id IN ({}) AND model_name IN ('model_3', 'model_4') AND run_id IN (SELECT "
                "run_id FROM run_params WHERE param_name = 'learning_rate' AND value < 0.1)"),
            (0.95,)),
        "where, two wide metrics": (
            lambda i: where(f"metrics.accuracy >= {0.5 + i / 1e5} and metrics.test_loss < 0.4"),
            raw("run_id IN ({}) AND run_id IN (SELECT run_id FROM metric_summary WHERE "
                "metric_name = 'test_loss' AND value < 0.4)"), (0.5,)),
        "where, or": (lambda i: where(f"metrics.accuracy >= {0.99 + i / 1e5} or model_name = "
                                      '"model_3"'),
                      raw("run_id IN ({}) OR model_name = 'model_3'"), (0.99,)),
        "full-text q": (lambda i: f"/runs?q=experiment_{i}+sgd",
                        "SELECT count(*) FROM run_search WHERE run_search MATCH ?", ("sgd",)),
        "leaderboard": (lambda i: f"/runs/leaderboard?metric_name=accuracy&top_k={10 + i % 10}",
                        top, (0,)),
        "leaderboard by best": (
            lambda i: f"/runs/leaderboard?metric_name=accuracy&by=best&top_k={10 + i % 10}",
            top, (0,)),
        "one run": (lambda i: f"/runs/{run_id(i)}", RAW.format("WHERE run_id = ?"), (run_id(1),)),
        "comparison of 3": (lambda i: compared(i, 3), page, ()),
        "comparison of 20": (lambda i: compared(i, 20), page, ()),
        "curves of 20 runs": (lambda i: compared(i, 20).replace("runs/compare", "curves"),
                              "SELECT * FROM run_metrics WHERE run_id = ?", (run_id(1),)),
        "/experiments": (lambda i: "/experiments",
                         "SELECT experiment_name, count(*) FROM runs GROUP BY 1", ()),
        "/metrics": (lambda i: "/metrics", "SELECT metric_name, count(*) FROM metric_summary "
                                           "GROUP BY 1", ()),
        "/lab": (lambda i: "/lab", "SELECT status, count(*) FROM runs GROUP BY 1", ())}


class Bare(http.server.BaseHTTPRequestHandler):
    """Answers a constant in one write."""
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        self.wfile.write(b'HTTP/1.1 200 OK\r\nContent-Length: 15\r\n\r\n{"status":"ok"}')

    def log_message(self, *args) -> None:
        """Say nothing: a log line costs more than the answer."""


def client(port: int):
    """Give a function that asks for an address over one connection."""
    connection = http.client.HTTPConnection("127.0.0.1", port)

    def get(path: str) -> bytes:
        connection.request("GET", path)
        answer = connection.getresponse()
        body = answer.read()
        assert answer.status == 200, (path, body)
        return body
    return get


@contextlib.contextmanager
def served(db_path: str):
    """Serve in a process of its own: (seconds to its first answer, MB then, a client)."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Bare) as free:
        port = free.server_address[1]
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, str(ROOT / "ailab.py"), "serve", "--quiet", "--db",
                                db_path, "--port", str(port)], stderr=subprocess.DEVNULL)
    while process.poll() is None:
        try:
            get = client(port)
            get("/health")
            break
        except OSError:
            time.sleep(0.002)
    took_s, status = time.perf_counter() - start, f"/proc/{process.pid}/status"
    memory = Path(status).read_text().split("VmRSS:")[1].split()[0] if os.path.exists(status) else 0
    try:
        yield took_s, int(memory) / 1024, get
    finally:
        process.terminate()
        process.wait(10)


def bench_routes(db_path: str, n_runs: int) -> None:
    """Print a line for each route, while another process logs."""
    with served(db_path) as (took_s, megabytes, get), contextlib.ExitStack() as ends:
        print(f"\n{n_runs:,} runs: served after {took_s:.2f} s, {megabytes:.1f} MB")
        live = ends.enter_context(
            subprocess.Popen([sys.executable, "-c", LOGGING, str(ROOT), db_path]))
        ends.callback(live.kill)
        time.sleep(1)
        conn = ends.enter_context(contextlib.closing(ailab.open_lab(db_path, "ro")))
        for name, (address, sql, values) in routes(n_runs).items():
            ours = p50_p95(lambda i, address=address: get(address(i)))
            raw = p50_p95(lambda i, sql=sql, values=values: conn.execute(sql, values).fetchall(),
                          N_CALLS // 10)[0]
            print(f"  {name:<26}p50 {ours[0]:8.2f} ms  p95 {ours[1]:8.2f} ms   raw SQLite "
                  f"{raw:8.2f} ms  {ours[0] / raw:6.1f}x")


def bench_throughput(db_path: str) -> None:
    """Print requests a second over one connection, beside a server that does nothing."""
    bare = subprocess.Popen([sys.executable, __file__, "--bare"], stdout=subprocess.PIPE, text=True)
    ask = client(int(bare.stdout.readline()))
    with served(db_path) as (_, _, get):
        nothing = 1e3 / p50_p95(lambda i: ask("/"), 10 * N_CALLS)[0]
        for name, path in (("/health", "/health"), ("page of 50, unchanged lab", "/runs?limit=50")):
            ours = 1e3 / p50_p95(lambda i, path=path: get(path), 10 * N_CALLS)[0]
            print(f"  {name:<26}{ours:,.0f} requests/s, bare http.server {nothing:,.0f}: "
                  f"{ours / nothing:.2f}x")
    bare.kill()
    bare.wait()


def bench_curve(db_path: str, n_points: int = 1_000_000) -> None:
    """Print the first and the second reading of a long curve, beside reading all its rows."""
    conn = ailab.open_lab(db_path)
    with lab_logger.transaction(conn):
        conn.execute("INSERT INTO runs (run_id, timestamp) VALUES ('long-curve', ?)",
                     (lab_logger.utc(1.6e9),))
        conn.executemany("INSERT INTO run_metrics (run_id, epoch, metric_name, metric_value) "
                         "VALUES ('long-curve', ?, 'loss', ?)",
                         ((i, 1 + random.random()) for i in range(n_points)))
        ailab.refresh(conn)
    start = time.perf_counter()
    conn.execute("SELECT metric_value, epoch FROM run_metrics WHERE run_id = 'long-curve' AND "
                 "metric_name = 'loss' ORDER BY id").fetchall()
    raw = (time.perf_counter() - start) * 1e3
    conn.close()
    with served(db_path) as (_, _, get):
        times = []
        for _ in range(2):
            start = time.perf_counter()
            body = get("/runs/long-curve/metrics?names=loss")
            times.append((time.perf_counter() - start) * 1e3)
    print(f"  curve of {n_points:,} points: {times[0]:.0f} ms, then {times[1]:.1f} ms, "
          f"{len(zlib.compress(body)) / 1024:.0f} KB packed; reading its rows {raw:.0f} ms "
          f"({times[0] / raw:.1f}x)")


def main() -> None:
    if sys.argv[1:] == ["--bare"]:
        bare = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Bare)
        print(bare.server_address[1], flush=True)
        bare.serve_forever()
    for n_runs in list(map(int, sys.argv[1:])) or [5_000]:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            db_path = os.path.join(folder, "lab.db")
            fill(db_path, n_runs)
            bench_routes(db_path, n_runs)
            bench_throughput(db_path)
            bench_curve(db_path)


if __name__ == "__main__":
    main()
