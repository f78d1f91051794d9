"""Measure the API over a lab of 5,000 runs, each figure beside raw SQLite or a bare server.

$ python tests/bench/bench_api.py               # about a minute, in a temporary folder
"""

import http.client
import http.server
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import ailab  # noqa: E402
import lab_logger  # noqa: E402

N_RUNS, N_CALLS = 5_000, 300
PAGE_SQL = """
SELECT run_id, timestamp, status, experiment_name, model_name, note, params_json,
    final_metrics_json FROM runs ORDER BY timestamp DESC LIMIT 50 OFFSET ?"""
TOP_SQL = """
SELECT run_id, value FROM metric_summary WHERE metric_name = 'accuracy' AND value >= ?
ORDER BY value DESC LIMIT 10"""


def fill(db_path: str) -> None:
    """Write N_RUNS runs of 5 metrics and 10 params by plain SQL, as an imported lab would be."""
    conn = ailab.open_lab(db_path)
    with lab_logger.transaction(conn):
        for i in range(N_RUNS):
            params = {f"param_{j}": i * j for j in range(8)} | {"learning_rate": 0.1 / (1 + i % 7)}
            finals = {
                name: (i * 7919 % 10_007) / 10_007 + j
                for j, name in enumerate(("accuracy", "f1", "auc", "val_loss", "train_loss"))
            }
            conn.execute(
                "INSERT INTO runs (run_id, timestamp, experiment_name, model_name, status, "
                "params_json, final_metrics_json) VALUES (?, ?, ?, ?, 'finished', ?, ?)",
                (
                    f"{i * 2654435761 % 2**32:08x}-bench",
                    lab_logger.utc(1.7e9 + 60 * i),
                    f"experiment_{i % 20}",
                    f"model_{i % 5}",
                    json.dumps(params),
                    json.dumps(finals),
                ),
            )
    conn.close()


def p50_p95(call) -> tuple[float, float]:
    """Time `call(i)` N_CALLS times; gives milliseconds."""
    times = []
    for i in range(N_CALLS):
        start = time.perf_counter()
        call(i)
        times.append((time.perf_counter() - start) * 1e3)
    times.sort()
    return statistics.median(times), times[int(len(times) * 0.95)]


def show(what: str, ours: tuple[float, float], base: float, baseline: str) -> None:
    print(
        f"{what:<40}p50 {ours[0]:7.2f} ms   p95 {ours[1]:7.2f} ms   {baseline} {base:.2f} ms"
        f"   {ours[0] / base:.1f}x"
    )


class Bare(http.server.BaseHTTPRequestHandler):
    """Answers a constant in one write."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        self.wfile.write(b'HTTP/1.1 200 OK\r\nContent-Length: 15\r\n\r\n{"status":"ok"}')

    def log_message(self, *args) -> None:
        """Say nothing: a log line costs more than the answer."""


def client(server):
    """Serve in a thread; gives a function that asks for an address over one connection."""
    threading.Thread(target=server.serve_forever, daemon=True).start()
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1])

    def get(path: str) -> bytes:
        connection.request("GET", path)
        return connection.getresponse().read()

    return get


def bench_queries(db_path: str) -> None:
    server = ailab.make_server(db_path, port=0)
    get, conn = client(server), ailab.open_lab(db_path, "ro")
    bare = client(http.server.ThreadingHTTPServer(("127.0.0.1", 0), Bare))
    nothing = p50_p95(lambda i: bare("/"))[0]
    show("GET /health", p50_p95(lambda i: get("/health")), nothing, "bare http.server")
    page = p50_p95(lambda i: conn.execute(PAGE_SQL, (i,)).fetchall())[0]
    show(
        "page of 50 runs, never the same",
        p50_p95(lambda i: get(f"/runs?limit=50&offset={i}")),
        page,
        "raw SQLite",
    )
    top = p50_p95(lambda i: conn.execute(TOP_SQL, (i / 1000,)).fetchall())[0]
    show(
        "metric filter, ordered, top 10",
        p50_p95(
            lambda i: get(f"/runs/leaderboard?metric_name=accuracy&metric_min={i / 1000}&top_k=10")
        ),
        top,
        "raw SQLite",
    )
    show(
        "one run",
        p50_p95(lambda i: get(f"/runs/{i * 2654435761 % 2**32:08x}-bench")),
        nothing,
        "bare http.server",
    )
    conn.close()
    server.shutdown()
    server.server_close()


def bench_start(db_path: str) -> None:
    """Time `serve` until its first answer, and read its memory then (Linux)."""
    times = []
    for port in range(18431, 18436):
        start = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "ailab.py"), "serve", "--db", db_path, "--port", str(port)],
            stderr=subprocess.DEVNULL,
        )
        while process.poll() is None and time.perf_counter() - start < 10:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1).close()
                break
            except OSError:
                time.sleep(0.002)
        times.append(time.perf_counter() - start)
        if os.path.exists(f"/proc/{process.pid}/status"):
            memory = Path(f"/proc/{process.pid}/status").read_text().split("VmRSS:")[1].split()[0]
        process.terminate()
        process.wait(10)
    print(
        f"{'serve until its first answer':<40}p50 {statistics.median(times):7.2f} s"
        f"    memory {int(memory) / 1024:.0f} MB"
    )


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        db_path = os.path.join(folder, "lab.db")
        fill(db_path)
        bench_queries(db_path)
        bench_start(db_path)


if __name__ == "__main__":
    main()
