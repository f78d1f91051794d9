"""A local server that speaks Ollama's protocol, scripted per test.

    with FakeOllama([call("leaderboard", metric_name="accuracy"), say("The best ...")]) as fake:
        ... ask with base url fake.url; fake.chats holds the bodies of the chat requests ...

Each chat request takes the next entry of the script; the last one is repeated. An entry is made by
`say`, `call`, `fail`, or is one of DIE, HANG, ERROR_LINE, LOAD_ONLY and CUT, or a function of the
request's body that returns one. GET /api/tags and /api/version, POST /api/show and /api/chat
answer in the shapes of Ollama's docs/api.md: newline-delimited JSON, chunked, tool calls whole.
"""
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

DIE, HANG, ERROR_LINE, LOAD_ONLY, CUT = ({"special": name} for name in (
    "die", "hang", "error line", "load only", "cut"))


def say(text):
    """A reply of plain text."""
    return {"content": text}


def call(name, **arguments):
    """A reply that calls one tool."""
    return {"content": "", "tool_calls": [{"function": {"name": name, "arguments": arguments}}]}


def fail(status, error):
    """An HTTP error with Ollama's body."""
    return {"status": status, "error": error}


class FakeOllama:
    """The server; a context manager. `models` maps each pulled model to its capabilities."""

    def __init__(self, script=(), models=None):
        self.script = list(script)
        self.models = {"qwen3:8b": ["completion", "tools"]} if models is None else models
        self.chats = []                      # bodies of POST /api/chat
        self.released = threading.Event()    # ends HANG when the test is over
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self.server.daemon_threads = True
        self.server.fake = self
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.released.set()
        self.server.shutdown()
        self.server.server_close()

    def next_reply(self, body):
        """Take the script's next entry for a chat request."""
        self.chats.append(body)
        entry = self.script.pop(0) if len(self.script) > 1 else self.script[0]
        return entry(body) if callable(entry) else entry


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_):
        """Keep the tests' output clean."""

    def do_GET(self):
        models = self.server.fake.models
        if self.path == "/api/version":
            self._json(200, {"version": "0.12.6"})
        elif self.path == "/api/tags":
            self._json(200, {"models": [{
                "name": name, "model": name, "modified_at": "2026-11-01T00:00:00Z",
                "size": 5_200_000_000,
                "digest": "0" * 64, "details": {"format": "gguf", "family": "qwen3",
                                                "parameter_size": "8.2B",
                                                "quantization_level": "Q4_K_M"}}
                                        for name in models]})
        else:
            self._json(404, {"error": "not found"})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        name, models = body.get("model"), self.server.fake.models
        if name not in models:
            self._json(404, {"error": f"model '{name}' not found"})
        elif self.path == "/api/show":
            self._json(200, {"modelfile": "", "details": {}, "model_info": {},
                             "capabilities": models[name]})
        elif self.path == "/api/chat":
            if body.get("tools") and "tools" not in models[name]:
                self._json(400, {
                    "error": f"registry.ollama.ai/library/{name} does not support tools"})
            else:
                self._chat(body, self.server.fake.next_reply(body))

    def _chat(self, body, reply):
        if "status" in reply:
            self._json(reply["status"], {"error": reply["error"]})
        elif body.get("stream", True):
            self._stream(body["model"], reply)
        else:
            self._json(200, self._line(body["model"], reply, done=True))

    def _stream(self, model, reply):
        special = reply.get("special", "")
        self.send_response(200)
        self.send_header("Content-Type", "application/x-ndjson")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        if special == "hang":
            self._chunk(self._line(model, say("Let me")))
            self.server.fake.released.wait(20)
        if special in ("die", "hang"):
            self._chunk(self._line(model, say("The best run is ")))
            self.close_connection = True
            return                           # no last chunk: the client sees a connection cut
        if special == "error line":
            self._chunk(self._line(model, say("The")))
            self._chunk({"error": "llama runner process has terminated: exit status 2"})
        elif special == "cut":               # ends in good order, without done: true
            self._chunk(self._line(model, say("The best run is")))
        elif special == "load only":
            self._chunk({"model": model, "created_at": _now(), "done": True, "done_reason": "load",
                         "message": {"role": "assistant", "content": ""}})
        else:
            for piece in _pieces(reply):
                self._chunk(self._line(model, piece))
            self._chunk(self._line(model, say(""), done=True))
        self.wfile.write(b"0\r\n\r\n")

    def _line(self, model, reply, done=False):
        line = {"model": model, "created_at": _now(), "message": {"role": "assistant", **reply},
                "done": done}
        return {**line, "done_reason": "stop", "total_duration": 5_000_000,
                "load_duration": 1_000_000,
                "prompt_eval_count": 200, "prompt_eval_duration": 1_000_000, "eval_count": 15,
                "eval_duration": 2_000_000} if done else line

    def _chunk(self, line):
        data = json.dumps(line).encode() + b"\n"
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))

    def _json(self, status, body):
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json; charset=utf-8")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def _pieces(reply):
    """Text comes word by word, tool calls whole."""
    words = reply["content"].split(" ")
    text = [say(word + " " * (n < len(words) - 1)) for n, word in enumerate(words) if word]
    return text + ([{"content": "", "tool_calls": reply["tool_calls"]}] if "tool_calls" in reply
                   else [])


def _now():
    return time.strftime("%Y-%m-%dT%H:%M:%S.000000Z", time.gmtime())
