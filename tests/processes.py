"""Real processes for tests: trainings, a lab's server that can be killed, a server that misbehaves.

    train(body, cwd, **env)   a Python process that runs `body`, with lab_logger importable
    LabServer(db_path)        `python ailab.py serve` at an address that stays the same
    Stub(answer)              an HTTP server in a thread; `answer` decides about each request
"""
import http.server
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TOKEN = "field-test-token"


def wait_until(condition, limit_s=30.0):
    """Wait for a condition to become true, and return what it gave."""
    deadline = time.monotonic() + limit_s
    while not (found := condition()):
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)
    return found


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


def rows(db_path, sql, *values):
    """Ask a lab's file by plain SQL."""
    conn = sqlite3.connect(db_path, timeout=30)
    try:
        return conn.execute(sql, values).fetchall()
    finally:
        conn.close()


def environment(**env):
    """This process's environment with the logger importable, without what its values None name."""
    merged = {**os.environ, "PYTHONPATH": str(ROOT), "AILAB_SAMPLE_EVERY_S": "0", **env}
    return {key: value for key, value in merged.items() if value is not None}


def train(body, cwd=None, *, before=None, **env):
    """Start a training process; stdin, stdout and stderr are pipes of text."""
    return subprocess.Popen([sys.executable, "-c", body], cwd=cwd, env=environment(**env),
                            text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, preexec_fn=before)


class LabServer:
    """`python ailab.py serve` in a process of its own, to be killed and brought back."""

    def __init__(self, db_path, token=TOKEN):
        self.db_path, self.token, self.port = str(db_path), token, free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.env = {"AILAB_URL": self.url, "AILAB_TOKEN": token, "DB_PATH": "/nonexistent/lab.db"}
        self.process = None

    def start(self):
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "ailab.py"), "serve", "--db", self.db_path,
             "--port", str(self.port), "--token", self.token, "--quiet"],
            env=environment(AILAB_URL=None, AILAB_TOKEN=None), stderr=subprocess.DEVNULL)
        wait_until(self.is_up)
        return self

    def is_up(self):
        assert self.process.poll() is None, "the server ended"
        health = urllib.request.Request(f"{self.url}/health",
                                        headers={"Authorization": f"Bearer {self.token}"})
        try:
            with urllib.request.urlopen(health, timeout=2) as answer:
                return answer.status == 200
        except OSError:
            return False

    def kill(self, number=signal.SIGKILL):
        if self.process and self.process.poll() is None:
            self.process.send_signal(number)
            self.process.wait(10)


def forward(server):
    """Give an `answer` for a Stub that hands requests on to a LabServer."""
    def answer(request):
        handed = urllib.request.Request(server.url + request.path, request.body or None,
                                        dict(request.headers), method=request.command)
        handed.add_header("Host", f"127.0.0.1:{server.port}")
        try:
            with urllib.request.urlopen(handed, timeout=10) as reply:
                return reply.status, reply.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()
    return answer


class Stub:
    """An HTTP server that does as `answer(request) -> (status, body bytes) or None` says.

    `request` has .command, .path, .headers and .body; None drops the connection without an answer.
    What came is kept in `requests`; `answer` may be changed at any time.
    """

    def __init__(self, answer):
        stub, self.answer, self.requests = self, answer, []

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_one(self):
                self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                stub.requests.append(self)
                told = stub.answer(self)
                self.close_connection = True
                if told:
                    self.send_response(told[0])
                    self.send_header("Content-Length", str(len(told[1])))
                    self.send_header("Content-Type", "application/json")
                    self.end_headers()
                    self.wfile.write(told[1])

            do_GET = do_POST = handle_one

            def log_message(self, *_):
                """Say nothing."""

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads, self.server.block_on_close = True, False
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()
