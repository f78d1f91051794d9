"""Who gets in and what gets out: hosts, origins, tokens, files, request framing, hostile SQL."""
import contextlib
import http.client
import json
import os
import re
import socket
import sqlite3
import stat
import threading
import time
import urllib.parse

import pytest
from conftest import LINES, journal_lines
from processes import wait_until

import ailab
import lab_logger

FOREIGN_HOSTS = [
    "evil.example", "evil.example:{port}", "localhost.evil.example", "127.0.0.1.evil.example",
    "127.0.0.1.nip.io:{port}", "evil.example#127.0.0.1", "127.0.0.1@evil.example",
    "evil.example:127", "0.0.0.0.evil", "xn--localhost-x.com", "localhost,evil.example",
    "127.0.0.1 evil.example", "169.254.169.254", "[::ffff:9.9.9.9]", "10.0.0.1:{port}",
    "local host", "127.0.0.1:evil", "127.0.0.1.", "localhos"]
FOREIGN_ORIGINS = [
    "http://evil.example", "https://evil.example", "null", "http://localhost.evil.example",
    "http://127.0.0.1.evil.example", "http://127.0.0.1:1", "http://localhost:{port}", "file://",
    "chrome-extension://abcdef", "http://evil.example:{port}", "http://127.0.0.1@evil.example",
    "http://[::1]:1", "http://127.0.0.1:{port}.evil.example", "data:"]


@pytest.fixture
def raw(server):
    """raw(bytes) -> what the server answers to them and to one last, good request."""
    last = b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n"

    def ask(request):
        with socket.create_connection(("127.0.0.1", server.server_port), timeout=10) as client:
            got = b""
            with contextlib.suppress(ConnectionError):        # it may close before all is sent
                client.sendall(request + last)
                while chunk := client.recv(65536):
                    got += chunk
            return got
    return ask


def statuses(answer):
    """The status of every response in a byte stream, but for that to the last, good request."""
    found = [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3}) ", answer)]
    return found[:-1] if b'{"status":"ok"' in answer else found


def note_of(lab, name):
    return lab.conn.execute("SELECT note FROM runs WHERE run_id = ?",
                            (lab.ids[name],)).fetchone()[0]


# --- Host -----------------------------------------------------------------------------

@pytest.mark.parametrize("host", FOREIGN_HOSTS)
def test_a_foreign_host_is_refused_on_every_kind_of_route(lab, api, server, host):
    host = host.format(port=server.server_port)
    path = f"/runs/{lab.ids['svm_01']}/note"
    for method, url, body in (("GET", "/runs", None), ("GET", "/", None), ("GET", "/health", None),
                              ("PATCH", path, {"note": "stolen"}),
                              ("POST", "/agent/query", {"query": "hi"}),
                              ("DELETE", f"/runs/{lab.ids['svm_01']}", None)):
        status, _, answer = api(method, url, body, {"Host": host})
        assert status in (400, 403), (method, url)
        assert set(answer) == {"detail"}
    assert note_of(lab, "svm_01") is None


@pytest.mark.parametrize("host", ["127.0.0.1:{port}", "localhost:{port}", "LOCALHOST:{port}",
                                  "127.0.0.1", "localhost", "[::1]:{port}"])
def test_a_loopback_host_is_let_in(lab, api, server, host):
    assert api("GET", "/health", headers={"Host": host.format(port=server.server_port)})[0] == 200


@pytest.mark.parametrize("head", [
    b"GET /health HTTP/1.1\r\n\r\n", b"GET /health HTTP/1.1\r\nHost:\r\n\r\n",
    b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nHost: evil.example\r\n\r\n",
    b"GET /health HTTP/1.1\r\nHost: evil.example\r\nHost: 127.0.0.1\r\n\r\n",
    b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nHost: 127.0.0.1\r\n\r\n",
    b"GET /health HTTP/1.0\r\n\r\n"],
    ids=["missing", "empty", "doubled", "doubled-foreign-first", "doubled-same", "http-1.0"])
def test_a_host_that_is_missing_empty_or_doubled_is_refused(raw, head):
    answer = raw(head)
    assert statuses(answer) in ([400], [403])


# --- Origin ---------------------------------------------------------------------------

def unsafe_requests(lab):
    run = f"/runs/{lab.ids['svm_01']}"
    return [("PATCH", run + "/note", {"note": "stolen"}), ("DELETE", run, None),
            ("POST", "/agent/query", {"query": "Flag the best run for publishing."})]


@pytest.mark.parametrize("origin", FOREIGN_ORIGINS)
def test_a_foreign_origin_cannot_write(lab, api, server, origin):
    origin = origin.format(port=server.server_port)
    for method, path, body in unsafe_requests(lab):
        assert api(method, path, body, {"Origin": origin})[0] == 403
    assert note_of(lab, "svm_01") is None
    assert api("GET", f"/runs/{lab.ids['svm_01']}")[0] == 200


@pytest.mark.parametrize("site", ["cross-site", "same-site", "garbage"])
def test_a_browser_that_says_another_site_sent_it_cannot_write(lab, api, site):
    for method, path, body in unsafe_requests(lab):
        assert api(method, path, body, {"Sec-Fetch-Site": site})[0] == 403
    assert note_of(lab, "svm_01") is None


def test_the_labs_own_page_can_write(lab, api, server):
    headers = {"Origin": f"http://127.0.0.1:{server.server_port}", "Sec-Fetch-Site": "same-origin"}
    assert api("PATCH", f"/runs/{lab.ids['svm_01']}/note", {"note": "own"}, headers)[0] == 200
    assert note_of(lab, "svm_01") == "own"


def test_a_client_that_sends_neither_origin_nor_site_can_write(lab, api):
    assert api("PATCH", f"/runs/{lab.ids['svm_01']}/note", {"note": "curl"})[0] == 200


@pytest.mark.parametrize("content_type", [
    "text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "",
    "text/plain; application/json", "application/jsonp", "*/*"])
def test_a_form_or_plain_text_cannot_write(lab, api, content_type):
    status, _, answer = api("PATCH", f"/runs/{lab.ids['svm_01']}/note", '{"note": "stolen"}',
                            {"Content-Type": content_type})
    assert status == 415
    assert "application/json" in answer["detail"]
    assert note_of(lab, "svm_01") is None


SEND = "/ingest?journal=job-1&offset=0"


@pytest.mark.parametrize("header, value", [
    ("Host", "evil.example"), ("Origin", "http://evil.example"), ("Origin", "null"),
    ("Sec-Fetch-Site", "cross-site"), ("Sec-Fetch-Site", "same-site")])
def test_another_site_sends_no_journal_lines(lab, api, header, value):
    for lines in (journal_lines(), journal_lines({"set": {"note": "x" * (2 << 20)}})):
        assert api("POST", SEND, lines, {**LINES, header: value})[0] == 403
    assert api("GET", "/runs/job-1")[0] == 404


@pytest.mark.parametrize("content_type", [
    None, "text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"])
def test_a_form_or_plain_text_sends_no_journal_lines(lab, api, content_type):
    headers = {"Content-Type": content_type} if content_type else {}
    assert api("POST", SEND, journal_lines(), headers)[0] == 415
    assert api("GET", "/runs/job-1")[0] == 404


def test_no_answer_grants_cross_origin_reading(lab, api):
    for method in ("GET", "OPTIONS"):
        _, headers, _ = api(method, "/runs", headers={"Origin": "http://evil.example",
                                                      "Access-Control-Request-Method": "PATCH"})
        assert not [name for name in headers if name.lower().startswith("access-control-")]


# --- Token ------------------------------------------------------------------------------

@pytest.fixture
def guarded(lab, db_path):
    """guarded(path, headers) -> status, with a server that wants the token `s3cret-token`."""
    running = ailab.make_server(db_path, "127.0.0.1", 0, token="s3cret-token")
    thread = threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True)
    thread.start()

    def ask(path, headers=(), method="GET", body=None):
        connection = http.client.HTTPConnection("127.0.0.1", running.server_port, timeout=10)
        connection.request(method, path, body, dict(headers))
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        return answer.status, answer.headers, content
    yield ask
    running.shutdown()
    running.server_close()
    thread.join(5)


@pytest.mark.parametrize("path", ["/runs", "/lab", "/runs/leaderboard?metric_name=accuracy",
                                  "/openapi.json", "/experiments"])
def test_a_guarded_lab_answers_nobody_without_the_token(guarded, path):
    status, _, content = guarded(path)
    assert status == 401
    assert set(json.loads(content)) == {"detail"}


def test_a_guarded_lab_writes_for_nobody_without_the_token(lab, guarded):
    headers = {"Content-Type": "application/json"}
    path = f"/runs/{lab.ids['svm_01']}/note"
    assert guarded(path, headers, "PATCH", '{"note": "stolen"}')[0] == 401
    assert note_of(lab, "svm_01") is None


def test_a_guarded_lab_takes_journal_lines_with_the_token_only(lab, guarded):
    large = journal_lines({"set": {"git_diff": "x" * (2 << 20)}})
    for lines in (b"", journal_lines(), large):
        assert guarded(SEND, LINES, "POST", lines)[0] == 401
    status, _, content = guarded(
        SEND, {**LINES, "Authorization": "Bearer s3cret-token"}, "POST", large)
    assert (status, json.loads(content)["offset"]) == (200, len(large))


def test_a_large_body_is_not_read_before_the_token_is_shown(guarded, monkeypatch):
    read = []
    inner = ailab.Handler.read_body
    monkeypatch.setattr(ailab.Handler, "read_body",
                        lambda self, most: read.append(most) or inner(self, most))
    assert guarded(SEND, LINES, "POST", b"\n" * (2 << 20))[0] == 401
    assert read == []


@pytest.mark.parametrize("headers", [
    {"Authorization": "Bearer wrong"}, {"Authorization": "Bearer s3cret-toke"},
    {"Authorization": "Bearer s3cret-tokenn"}, {"Authorization": "Basic s3cret-token"},
    {"Authorization": "Bearer "}, {"Authorization": "Bearer \xff\xfe"},
    {"Cookie": "ailab_token=wrong"}, {"Cookie": "x=s3cret-token"}, {"Cookie": ";;;=;"}])
def test_a_wrong_token_is_no_token(guarded, headers):
    assert guarded("/runs", headers)[0] == 401


def test_the_token_in_a_header_opens_the_lab(guarded):
    assert guarded("/runs", {"Authorization": "Bearer s3cret-token"})[0] == 200


def test_the_token_in_the_address_becomes_a_cookie_that_opens_the_lab(guarded):
    status, headers, _ = guarded("/?token=s3cret-token")
    assert status in (200, 302, 303)
    cookie = headers["Set-Cookie"]
    assert "HttpOnly" in cookie and "SameSite=Strict" in cookie
    assert guarded("/runs", {"Cookie": cookie.partition(";")[0]})[0] == 200


def test_a_wrong_token_in_the_address_sets_no_cookie(guarded):
    status, headers, _ = guarded("/?token=wrong")
    assert status == 401
    assert "Set-Cookie" not in headers


@pytest.fixture
def open_lab_for_others(lab, request):
    """A server that others could reach, asked over loopback with its token."""
    running = ailab.make_server(lab.db_path, "0.0.0.0", 0, token="s3cret-token")
    thread = threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield running
    running.shutdown()
    running.server_close()
    thread.join(5)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", ""])
def test_a_server_that_others_can_reach_is_not_made_without_a_token(db_path, host):
    with pytest.raises(ailab.LabError, match="token"):
        ailab.make_server(db_path, host, 0)


@pytest.mark.parametrize("token", ["two words", "café", "line\n", "byte\udcff"])
def test_token_that_no_header_carries_is_refused_at_the_start(db_path, token):
    with pytest.raises(ailab.LabError, match="no header carries") as refused:
        ailab.make_server(db_path, token=token)
    assert token not in refused.value.detail


def test_large_body_is_not_waited_for_before_the_token(open_lab_for_others):
    port = open_lab_for_others.server_port
    with socket.create_connection(("127.0.0.1", port), timeout=60) as client:
        client.sendall(b"POST /agent/query HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: "
                       b"application/json\r\nContent-Length: 100000\r\n\r\n")
        assert client.recv(4096).startswith(b"HTTP/1.1 401 ")


def test_a_server_that_others_can_reach_names_no_folder(lab, open_lab_for_others):
    def ask(path):
        connection = http.client.HTTPConnection("127.0.0.1", open_lab_for_others.server_port,
                                                timeout=10)
        connection.request("GET", path, headers={"Authorization": "Bearer s3cret-token",
                                                 "Host": "lab.example:1234"})
        answer = connection.getresponse()
        content = json.loads(answer.read())
        connection.close()
        return answer.status, content
    assert ask("/lab")[1]["db_path"] is None
    lab.conn.close()
    os.replace(lab.db_path, lab.db_path + ".moved")
    status, content = ask("/runs")
    assert status == 503
    assert os.path.dirname(lab.db_path) not in content["detail"]


# --- Files --------------------------------------------------------------------------------

ENCODINGS = ["../", "..%2f", "%2e%2e/", "%2e%2e%2f", "..%5c", "..\\", "%2e%2e%5c", "....//",
             "..././", "%252e%252e%252f", "..%252f", "%c0%ae%c0%ae/", "..%c0%af", "%uff0e%uff0e/",
             "..%00/", ".%2e/", "%2e./", "..;/", "..%3b/", "..%2f%2f", "./../", "%2f..%2f",
             "..%0d%0a/", "..%20/", "..%09/", "%5c..%5c", "%ff../", "/../", "//", "%2f", "%5c",
             "..%ef%bc%8f", "..#/", "..?/", "~/", "file:///", "C:/", "%00", "..%2F..%2F"]
TARGETS = ["etc/passwd", "ailab.py", "lab_logger.py", "pyproject.toml", "lab.db", ".env",
           ".git/config", "proc/self/environ"]


@pytest.mark.parametrize("step", ENCODINGS)
def test_no_way_of_writing_dot_dot_leaves_the_static_folder(server, step):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
    for target in TARGETS:
        for path in (f"/static/{step * 8}{target}", f"/static/{step}{target}", f"/{step}{target}",
                     f"/static/views/{step * 2}{target}"):
            connection.putrequest("GET", path, skip_accept_encoding=True)
            connection.endheaders()
            answer = connection.getresponse()
            content = answer.read()
            assert answer.status in (400, 404, 422), path
            assert set(json.loads(content)) == {"detail"}
            if answer.will_close:
                connection.close()
    connection.close()


def test_static_serves_no_script_from_elsewhere(api, tmp_path):
    (tmp_path / "secret.js").write_text("secret")
    up = "../" * 30
    for name in (f"/{tmp_path}/secret.js", f"{tmp_path}/secret.js", f"%2f{tmp_path}/secret.js",
                 f"{up}{tmp_path}/secret.js", f"{up.replace('/', '%2f')}{tmp_path}/secret.js",
                 f"views/{up}{tmp_path}/secret.js", f"x/../{up}{tmp_path}/secret.js"):
        assert api("GET", f"/static/{name}")[0] == 404, name


def test_static_answers_the_same_for_a_file_outside_and_for_none(api):
    outside = api("GET", "/static/%2e%2e/pyproject.toml")
    missing = api("GET", "/static/%2e%2e/no-such-file.toml")
    assert outside[0] == missing[0]
    assert outside[2]["detail"].replace("pyproject.toml", "X") == \
        missing[2]["detail"].replace("no-such-file.toml", "X")


@pytest.fixture
def artifact(lab, api, tmp_path):
    """artifact(path) -> (status, headers, body) of the file when svm_01 has recorded that path."""
    lab.conn.execute("UPDATE runs SET cwd = ? WHERE run_id = ?",
                     (str(tmp_path / "work"), lab.ids["svm_01"]))

    def ask(path, method="GET"):
        lab.conn.execute("UPDATE runs SET artifacts_json = ? WHERE run_id = ?",
                         (json.dumps([path]), lab.ids["svm_01"]))
        return api(method, f"/runs/{lab.ids['svm_01']}/artifacts/0")
    return ask


def test_an_artifact_under_the_runs_folder_is_an_attachment(artifact, tmp_path):
    (tmp_path / "work" / "metrics.csv").write_text("epoch,loss\n1,0.5\n")
    status, headers, body = artifact(str(tmp_path / "work" / "metrics.csv"))
    assert (status, body) == (200, b"epoch,loss\n1,0.5\n")
    assert headers["Content-Disposition"].startswith("attachment")
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert "sandbox" in headers["Content-Security-Policy"]


def test_a_relative_artifact_lies_under_the_runs_folder(artifact, tmp_path):
    (tmp_path / "work" / "out").mkdir()
    (tmp_path / "work" / "out" / "model.bin").write_bytes(b"\x00\x01")
    assert artifact("out/model.bin")[2] == b"\x00\x01"


@pytest.mark.parametrize("name", ["page.html", "image.svg", "page.xhtml", "data.xml", "code.js",
                                  "no_extension", "x.mhtml", "x.pdf"])
def test_an_artifact_never_runs_in_the_labs_origin(artifact, tmp_path, name):
    (tmp_path / "work" / name).write_text("<script>alert(1)</script>")
    status, headers, _ = artifact(name)
    assert status == 200
    assert headers["Content-Disposition"].startswith("attachment")
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers.get_content_type() not in ("text/html", "image/svg+xml", "application/xml",
                                              "text/xml", "application/xhtml+xml",
                                              "text/javascript")


def test_an_artifacts_name_cannot_break_out_of_its_header(artifact, tmp_path):
    name = 'a"b\r\nSet-Cookie: x=1\r\n\r\nbody; é.txt'
    (tmp_path / "work" / name).write_text("text")
    status, headers, body = artifact(name)
    assert "Set-Cookie" not in headers
    assert status in (200, 404)
    if status == 200:
        assert body == b"text"


def hostile_artifacts(tmp_path, db_path):
    """Paths that must never be served: (why, path)."""
    work = tmp_path / "work"
    (tmp_path / "secret.txt").write_text("secret")
    (tmp_path / "work-twin").mkdir()
    (tmp_path / "work-twin" / "twin.txt").write_text("secret")
    (work / "link.txt").symlink_to(tmp_path / "secret.txt")
    (work / "folder-link").symlink_to(tmp_path)
    (work / "sub").mkdir()
    (work / ".env").write_text("WANDB_API_KEY=secret")
    (work / ".hidden").mkdir()
    (work / ".hidden" / "file.txt").write_text("secret")
    os.mkfifo(work / "pipe")
    return {
        "missing": "no-such-file.txt", "absolute": "/etc/passwd", "dot-dot": "../secret.txt",
        "link": "link.txt", "folder-link": "folder-link/secret.txt", "folder": "sub",
        "twin": str(tmp_path / "work-twin" / "twin.txt"), "dot-file": ".env",
        "dot-folder": ".hidden/file.txt", "pipe": "pipe", "device": "/dev/zero", "url":
        "http://127.0.0.1:1/x", "file-url": "file:///etc/passwd", "empty": "", "nul": "a\x00b",
        "proc": "/proc/self/environ", "too-long": "a" * 5_000, "itself": ".", "database": db_path}


def test_every_artifact_that_must_not_be_served_gets_one_and_the_same_answer(
        artifact, lab, tmp_path):
    answers = {why: artifact(path)
               for why, path in hostile_artifacts(tmp_path, lab.db_path).items()}
    assert {why: answer[0] for why, answer in answers.items() if answer[0] != 404} == {}
    assert len({answer[2]["detail"] for answer in answers.values()}) == 1
    assert "secret" not in str(answers)


def test_the_database_and_journals_are_no_artifacts_even_under_the_runs_folder(
        artifact, lab, tmp_path):
    lab.conn.execute("UPDATE runs SET cwd = ? WHERE run_id = ?",
                     (str(tmp_path), lab.ids["svm_01"]))
    journals = tmp_path / "lab.db.journals"
    journals.mkdir(exist_ok=True)
    (journals / "some-run.jsonl").write_text("{}\n")
    (tmp_path / "hard-link").hardlink_to(lab.db_path)
    for path in ("lab.db", "lab.db-wal", "lab.db-shm", "lab.db.journals/some-run.jsonl",
                 "hard-link"):
        assert artifact(path)[0] == 404, path


@pytest.mark.parametrize("cwd", [None, "", "/", ".", "relative/folder"])
def test_without_a_folder_of_its_own_a_run_serves_no_file(artifact, lab, tmp_path, cwd):
    (tmp_path / "work" / "metrics.csv").write_text("epoch\n")
    lab.conn.execute("UPDATE runs SET cwd = ? WHERE run_id = ?", (cwd, lab.ids["svm_01"]))
    for path in ("metrics.csv", str(tmp_path / "work" / "metrics.csv"), "/etc/passwd"):
        assert artifact(path)[0] == 404


def test_a_named_artifact_root_opens_that_folder_only(tmp_path, monkeypatch, request):
    monkeypatch.setenv("AILAB_ARTIFACT_ROOTS", str(tmp_path / "models"))
    artifact = request.getfixturevalue("artifact")
    (tmp_path / "models").mkdir()
    (tmp_path / "models-twin").mkdir()
    (tmp_path / "models-twin" / "model.bin").write_text("secret")
    (tmp_path / "models" / "model.bin").write_bytes(b"weights")
    (tmp_path / "secret.txt").write_text("secret")
    assert artifact(str(tmp_path / "models" / "model.bin"))[2] == b"weights"
    assert artifact(str(tmp_path / "models-twin" / "model.bin"))[0] == 404
    assert artifact(str(tmp_path / "secret.txt"))[0] == 404


@pytest.mark.parametrize("more", [
    {}, {"set": {"received_from": None}}, {"set": {"received_from": ""}},
    {"set": {"resumptions_json": "{}", "received_from": None, "journal_offset": 0}}],
    ids=["as sent", "taken back", "emptied", "hidden"])
def test_an_artifact_of_a_run_that_was_sent_here_is_never_served(api, tmp_path, more):
    work = tmp_path / "work"
    (work / "secret.txt").write_text("secret")
    lines = journal_lines({"artifact": str(work / "secret.txt")}, more, cwd=str(work))
    assert api("POST", SEND, lines, LINES)[0] == 200
    status, _, answer = api("GET", "/runs/job-1/artifacts/0")
    assert (status, list(answer)) == (404, ["detail"])
    run = api("GET", "/runs/job-1")[2]
    assert run["received_from"] == "127.0.0.1"
    assert run["artifacts"] == [str(work / "secret.txt")]
    assert (run["artifact_files"][0]["exists"], run["artifact_files"][0]["size_bytes"]) == (
        False, None)                              # nor does it tell which files are here


def test_lines_sent_for_a_run_of_this_machine_open_no_file_of_it(artifact, lab, api, tmp_path):
    (tmp_path / "secret.txt").write_text("secret")
    lines = journal_lines({"artifact": str(tmp_path / "secret.txt")}, cwd=str(tmp_path))
    run_id = lab.ids["svm_01"]
    assert api("POST", f"/ingest?journal={run_id}&offset=0", lines, LINES)[0] == 200
    for index in (0, 1):
        assert api("GET", f"/runs/{run_id}/artifacts/{index}")[0] == 404


@pytest.mark.parametrize("index", ["1", "-1", "x", "0.0", "00000000000000000000001", "1e3", "%30",
                                   "0/../0", " 0", "99999999999999999999"])
def test_an_index_that_no_artifact_has_is_not_found(artifact, api, lab, index):
    artifact("metrics.csv")
    status, _, answer = api("GET", f"/runs/{lab.ids['svm_01']}/artifacts/"
                            + urllib.parse.quote(index, safe="/%"))
    assert status in (404, 422)
    assert set(answer) == {"detail"}


def test_a_fresh_store_made_by_the_server_is_private(db_path, api):
    assert api("GET", "/runs")[:3:2] == (200, [])
    assert stat.S_IMODE(os.stat(db_path).st_mode) == 0o600


def test_store_log_and_journals_are_the_users_alone_whatever_the_umask(db_path, tmp_path):
    before = os.umask(0)
    try:
        conn = ailab.open_lab(db_path)
        with lab_logger.start_run():
            lab_logger.log(loss=1)
            conn.execute("UPDATE runs SET note = 'x'")
            made = [path for path in tmp_path.rglob("lab.db*") if path.is_file()]
            made += tmp_path.rglob("*.jsonl")
            assert {path.name.partition(".db")[2] for path in made} >= {"", "-wal", "-shm"}
            assert [path for path in made if stat.S_IMODE(path.stat().st_mode) != 0o600] == []
            assert [path for path in made if path.suffix == ".jsonl"]
        conn.close()
    finally:
        os.umask(before)


# --- Headers ------------------------------------------------------------------------------

def test_the_dashboard_allows_its_own_scripts_only_and_no_frame(api):
    status, headers, _ = api("GET", "/")
    policy = headers["Content-Security-Policy"]
    assert status == 200
    assert "default-src 'self'" in policy or "default-src 'none'" in policy
    assert "unsafe-inline" not in policy and "unsafe-eval" not in policy and "*" not in policy
    assert "frame-ancestors 'none'" in policy
    assert headers["X-Content-Type-Options"] == "nosniff"


@pytest.mark.parametrize("path", ["/runs", "/runs?limit=x", "/nothing", "/<script>a</script>",
                                  "/runs/%3Cimg%20src=x%20onerror=alert(1)%3E",
                                  "/runs?sort=%3Cscript%3E", "/static/%3Cscript%3E"])
def test_every_answer_of_the_api_is_json_and_not_sniffed(lab, api, path):
    _, headers, _ = api("GET", path.replace("<", "%3C").replace(">", "%3E"))
    assert headers.get_content_type() == "application/json"
    assert headers["X-Content-Type-Options"] == "nosniff"


def test_the_server_does_not_name_its_python(api):
    _, headers, _ = api("GET", "/health")
    assert "Python" not in headers.get("Server", "")


# --- Request framing ------------------------------------------------------------------------

SMUGGLED = b"DELETE /runs/{id} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
FRAMINGS = {
    "unknown path": (b"POST /nothing HTTP/1.1", b"Content-Length: {n}"),
    "wrong method": (b"POST /runs HTTP/1.1", b"Content-Length: {n}"),
    "foreign host": (b"POST /agent/query HTTP/1.1", b"X: y\r\nContent-Length: {n}"),
    "foreign origin": (b"PATCH /runs/{id}/note HTTP/1.1",
                       b"Origin: http://evil.example\r\nContent-Length: {n}"),
    "wrong type": (b"PATCH /runs/{id}/note HTTP/1.1",
                   b"Content-Type: text/plain\r\nContent-Length: {n}"),
    "not json": (b"PATCH /runs/{id}/note HTTP/1.1",
                 b"Content-Type: application/json\r\nContent-Length: {n}"),
    "get with a body": (b"GET /runs HTTP/1.1", b"Content-Length: {n}"),
    "head with a body": (b"HEAD /runs HTTP/1.1", b"Content-Length: {n}"),
    "two lengths": (b"POST /agent/query HTTP/1.1", b"Content-Length: 0\r\nContent-Length: {n}"),
    "length list": (b"POST /agent/query HTTP/1.1", b"Content-Length: 0, {n}"),
    "negative length": (b"POST /agent/query HTTP/1.1", b"Content-Length: -1"),
    "plus length": (b"POST /agent/query HTTP/1.1", b"Content-Length: +0"),
    "underscored length": (b"POST /agent/query HTTP/1.1", b"Content-Length: 1_0"),
    "unicode length": (b"POST /agent/query HTTP/1.1", b"Content-Length: \xb2"),
    "hex length": (b"POST /agent/query HTTP/1.1", b"Content-Length: 0x10"),
    "huge length": (b"POST /agent/query HTTP/1.1", b"Content-Length: 99999999999999999999999"),
    "empty length": (b"POST /agent/query HTTP/1.1", b"Content-Length:"),
    "chunked": (b"POST /agent/query HTTP/1.1", b"Transfer-Encoding: chunked"),
    "chunked get": (b"GET /runs HTTP/1.1", b"Transfer-Encoding: chunked"),
    "chunked and length": (b"POST /agent/query HTTP/1.1",
                           b"Transfer-Encoding: chunked\r\nContent-Length: {n}"),
    "space before colon": (b"POST /agent/query HTTP/1.1", b"Content-Length : {n}"),
    "folded header": (b"POST /agent/query HTTP/1.1", b"Content-Length:\r\n {n}"),
    "bare newline": (b"POST /agent/query HTTP/1.1", b"X: a\nContent-Length: 0"),
    "no length": (b"POST /agent/query HTTP/1.1", b"X: y")}


@pytest.mark.parametrize("kind", FRAMINGS)
def test_a_body_is_never_run_as_the_next_request(lab, raw, kind):
    run_id = lab.ids["svm_01"].encode()
    line, headers = FRAMINGS[kind]
    body = SMUGGLED.replace(b"{id}", run_id)
    host = b"evil.example" if kind == "foreign host" else b"127.0.0.1"
    request = (line.replace(b"{id}", run_id) + b"\r\nHost: " + host + b"\r\n"
               + headers.replace(b"{n}", str(len(body)).encode()) + b"\r\n\r\n" + body)
    answer = raw(request)
    assert len(statuses(answer)) == 1
    assert statuses(answer)[0] < 500
    assert lab.conn.execute("SELECT deleted_at FROM runs WHERE run_id = ?",
                            (lab.ids["svm_01"],)).fetchone() == (None,)


def test_two_requests_on_one_connection_get_two_answers(lab, raw):
    one = b"GET /metrics HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
    assert statuses(raw(one + one)) == [200, 200]


@pytest.mark.parametrize("garbage", [
    b"\x00\x01\x02\r\n\r\n", b"GET\r\n\r\n", b"GET /runs\r\n\r\n", b"GET /runs HTTP/9.9\r\n\r\n",
    b"G" * 70_000 + b"\r\n\r\n", b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
    b"GET /runs HTTP/1.1\r\nHost: 127.0.0.1\r\nX: " + b"y" * 70_000 + b"\r\n\r\n",
    b"GET /runs HTTP/1.1\r\nHost: 127.0.0.1\r\n" 
    + b"".join(b"X%d: y\r\n" % n for n in range(300)) + b"\r\n",
    b"GET http://evil.example/runs HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"TRACE / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
    b"CONNECT evil.example:443 HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"],
    ids=["bytes", "verb", "http-0.9", "version", "long-line", "long-path", "long-header",
         "many-headers", "absolute", "tls", "trace", "connect"])
def test_garbage_is_refused_and_the_server_lives(raw, api, garbage):
    answer = raw(garbage)
    assert b"Traceback" not in answer
    assert all(400 <= status < 600 and status != 500 for status in statuses(answer))
    assert b"<html" not in answer.lower()
    assert api("GET", "/health")[0] == 200


def test_a_hundred_half_open_connections_leave_the_server_answering(server, api):
    idle = []
    try:
        for number in range(100):
            client = socket.create_connection(("127.0.0.1", server.server_port), timeout=10)
            client.sendall(b"GET /runs HTTP/1.1\r\nHost: 127.0" if number % 2 else
                           b"POST /agent/query HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: "
                           b"application/json\r\nContent-Length: 100\r\n\r\n{")
            idle.append(client)
        assert api("GET", "/health")[0] == 200
    finally:
        for client in idle:
            client.close()
    assert api("GET", "/health")[0] == 200


def test_a_silent_connection_is_closed(server, monkeypatch):
    monkeypatch.setattr(ailab.Handler, "timeout", 0.2)
    for said in (b"", b"GET /runs HTTP/1.1\r\nHost:",
                 b"POST /agent/query HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 9\r\n\r\n{"):
        with socket.create_connection(("127.0.0.1", server.server_port), timeout=60) as client:
            client.sendall(said)
            assert b"200" not in client.recv(100)


def test_connections_beyond_the_bound_are_told_to_come_back(server, api):
    server.slots = threading.BoundedSemaphore(2)
    idle = [socket.create_connection(("127.0.0.1", server.server_port)) for _ in range(2)]
    for client in idle:
        client.sendall(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        client.recv(1)
    status, _, answer = api("GET", "/health")
    assert (status, list(answer)) == (503, ["detail"])
    for client in idle:
        client.close()
    wait_until(lambda: api("GET", "/health")[0] == 200)


def test_the_server_connects_to_nothing_that_a_run_or_a_request_names(lab, api):
    with socket.create_server(("127.0.0.1", 0)) as canary:
        url = f"http://127.0.0.1:{canary.getsockname()[1]}/hit"
        lab.conn.execute("UPDATE runs SET artifacts_json = ?, wandb_url = ?, cwd = ?, note = ?, "
                         "hostname = ? WHERE run_id = ?",
                         (json.dumps([url, "//" + url[7:]]), url, url, url, url[7:-4],
                          lab.ids["svm_01"]))
        run = f"/runs/{lab.ids['svm_01']}"
        for path in (run, f"{run}/artifacts/0", f"{run}/artifacts/1", f"/runs?q={url}",
                     f"/static/{url}", f"/{url}"):
            assert api("GET", path)[0] < 500
        api("POST", "/agent/query", {"query": f"Fetch {url} and compare my best runs."})
        canary.setblocking(False)
        with pytest.raises(BlockingIOError):
            canary.accept()


@pytest.mark.skipif(os.name == "nt", reason="Windows resets in another way")
@pytest.mark.parametrize("sent", [b"GET /x y z\r\n\r\n", b"GET / HTTP/1.1\r\nno colon\r\n\r\n"])
def test_a_client_that_leaves_before_its_refusal_leaves_the_server_quiet(server, api, capfd, sent):
    for _ in range(10):
        with socket.create_connection(("127.0.0.1", server.server_port)) as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
            client.sendall(sent)
    assert api("GET", "/health")[0] == 200
    assert "Traceback" not in capfd.readouterr().err


def test_a_client_that_leaves_while_it_is_answered_leaves_the_server_quiet(server, api, lab, capfd):
    for _ in range(20):
        client = socket.create_connection(("127.0.0.1", server.server_port), timeout=10)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
        client.sendall(b"GET /runs HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        client.close()
    assert api("GET", "/health")[0] == 200
    assert "Traceback" not in capfd.readouterr().err


def test_32_clients_at_once_all_get_good_answers(lab, api):
    results = []

    def client():
        results.extend(api("GET", "/runs?limit=5")[0] for _ in range(5))
    threads = [threading.Thread(target=client) for _ in range(32)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert results == [200] * 160


# --- SQL ----------------------------------------------------------------------------------

TRUE_FALSE = [(template.replace("?", "1=1"), template.replace("?", "1=2")) for template in (
    "' OR ?--", "' OR ? OR '", '" OR ?--', "') OR ?--", "1) OR (?", "x' AND ?--",
    "' UNION SELECT ?", "accuracy' OR ?--", "accuracy\" OR ?--", "iris_sweep' AND ?--",
    "0 OR ?", "%' OR ?--",
    "\\' OR ?--", "'; SELECT ?;--", "'||(SELECT ?)||'", "CASE WHEN ? THEN 1 ELSE 0 END",
    "timestamp, (SELECT CASE WHEN ? THEN 1 ELSE randomblob(1) END)", "metrics.accuracy' OR ?--",
    "metrics.accuracy\" DESC, (SELECT ?)--", "params.learning_rate') OR ?--", "*' OR ?--",
    "\"accuracy\" NEAR (?)", "\x00' OR ?--", "json_extract('{}', '$') OR ?")]
PARAMETERS = ["dataset_id", "experiment_name", "model_name", "task_name", "status",
              "command_substring", "note_substring", "from_timestamp", "to_timestamp",
              "metric_name", "metric_min", "by", "where", "q", "sort", "order", "limit", "offset"]


@pytest.mark.parametrize("parameter", PARAMETERS)
def test_sql_in_a_parameter_of_the_list_makes_no_difference(lab, api, parameter):
    for true, false in TRUE_FALSE:
        got = []
        for text in (true, false):
            status, headers, body = api("GET", "/runs?" + urllib.parse.urlencode({parameter: text}))
            assert status < 500
            got.append((status, headers.get("X-Total-Count"),
                        len(body) if status == 200 else "refused"))
            if status != 200:
                assert not [word for word in ("sqlite", "syntax error", "SELECT r", "near \"")
                            if word in body["detail"]]
        assert got[0] == got[1], (parameter, true)


@pytest.mark.parametrize("path", ["/runs/{}", "/runs/{}/metrics", "/runs/{}/artifacts/0",
                                  "/runs/compare?ids={}&ids={}", "/curves?ids={}",
                                  "/runs/leaderboard?metric_name={}", "/curves?ids=32c3d4&names={}",
                                  "/runs/32c3d4/metrics?x={}", "/runs/32c3d4/metrics?from={}"])
def test_sql_in_an_id_or_a_name_makes_no_difference(lab, api, path):
    for true, false in TRUE_FALSE:
        got = []
        for text in (true, false):
            status, _, body = api("GET", path.replace("{}", urllib.parse.quote(text, safe="")))
            assert status < 500
            got.append((status, str(body).count("run_id")))
        assert got[0] == got[1], (path, true)


def test_sql_in_a_note_is_stored_as_written(lab, api):
    text = "'); DROP TABLE runs; --\" \\ % _ \u2028 <script>"
    api("PATCH", f"/runs/{lab.ids['svm_01']}/note", {"note": text})
    assert note_of(lab, "svm_01") == text
    assert lab.conn.execute("SELECT count(*) FROM runs").fetchone() == (12,)


def test_the_store_is_whole_after_all_that(lab, api):
    for true, _ in TRUE_FALSE:
        api("GET", "/runs?" + urllib.parse.urlencode({"q": true}))
    check = ailab.open_lab(lab.db_path, "ro")
    assert check.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    assert check.execute("SELECT count(*) FROM runs").fetchone() == (12,)
    check.close()


# --- Requests that never come whole, and the Unix socket ----------------------------------------

@pytest.mark.parametrize("start", [
    b"G", b"GET /health HTTP/1.1\r\nHost: lo",
    b"PATCH /runs/abcdef/note HTTP/1.1\r\nHost: localhost\r\n"
    b"Content-Type: application/json\r\nContent-Length: 99\r\n\r\n{"])
def test_request_that_drips_is_ended_after_its_time(server, monkeypatch, start):
    monkeypatch.setattr(ailab, "ASKED_S", 0.3)
    monkeypatch.setattr(ailab, "TIDY_EVERY_S", 0.05)
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=30) as client:
        client.sendall(start)
        ended = threading.Event()

        def drip():
            with contextlib.suppress(OSError):
                while not ended.wait(0.05):
                    client.sendall(b"x")
        dripping = threading.Thread(target=drip)
        dripping.start()
        with contextlib.suppress(ConnectionError):
            while client.recv(4096):              # a refusal, perhaps, and then the end
                pass
        ended.set()
        dripping.join()
    wait_until(lambda: not server.reading)


def test_server_that_ends_answers_what_it_was_asked_and_waits_for_no_writer(
        lab, db_path, monkeypatch):
    serving = ailab.make_server(db_path)
    threading.Thread(target=serving.serve_forever, args=(0.01,), daemon=True).start()
    is_asked, is_held, is_over = (threading.Event() for _ in range(3))

    def answer_late(conn):
        is_asked.set()
        return {"n_runs": is_over.wait(0.2) or 7}
    monkeypatch.setattr(ailab, "lab_overview", answer_late)

    def hold():
        with serving.store.write():               # as one who takes a large journal in
            is_held.set()
            is_over.wait(60)
    writer = threading.Thread(target=hold)
    writer.start()
    assert is_held.wait(10)
    with socket.create_connection(("127.0.0.1", serving.server_port), timeout=10) as client:
        client.sendall(b"GET /lab HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        assert is_asked.wait(10)
        serving.shutdown()
        serving.server_close()                    # comes back though the writer is at work
        assert b'"n_runs":7' in client.recv(4096)
    is_over.set()
    writer.join(10)
    serving.store.close()


def test_200_half_open_and_dripping_connections_leave_a_request_its_second(server, api):
    starts = [b"", b"GET /runs HT", b"GET /runs HTTP/1.1\r\nHost: 127.0", b"POST /agent/query "
              b"HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 10000\r\n\r\n{"]
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(socket.create_connection(
            ("127.0.0.1", server.server_port), timeout=10)) for _ in range(200)]
        for number, client in enumerate(clients):
            client.sendall(starts[number % 4])
        took = []
        for _ in range(5):
            for client in clients:
                client.sendall(b"x")
            before = time.monotonic()
            assert api("GET", "/health")[0] == api("GET", "/runs")[0] == 200
            took.append(time.monotonic() - before)
        assert min(took) < 1                      # the promise itself, P28, of a busy machine too


@pytest.mark.parametrize("path", ["/static/app.js", "/openapi.json", "/runs/{}/artifacts/0"])
def test_client_that_never_reads_its_answers_gives_its_thread_back(
        lab, server, monkeypatch, tmp_path, path):
    (tmp_path / "work" / "model.bin").write_bytes(bytes(20 << 20))
    lab.conn.execute("UPDATE runs SET cwd = ?, artifacts_json = '[\"model.bin\"]'",
                     (str(tmp_path / "work"),))
    monkeypatch.setattr(ailab.Handler, "timeout", 0.3)
    server.slots = threading.BoundedSemaphore(1)
    request = f"GET {path.format(lab.ids['svm_01'])} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode()
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=30) as client:
        client.setblocking(False)
        with contextlib.suppress(BlockingIOError, ConnectionError):
            for _ in range(5_000):
                client.sendall(request)
        assert server.slots.acquire(timeout=30)   # while the client holds its end open


def test_answer_that_takes_long_is_not_ended_with_slow_requests(server, api, monkeypatch):
    monkeypatch.setattr(ailab, "ASKED_S", 0.5)
    monkeypatch.setattr(ailab, "TIDY_EVERY_S", 0.02)
    wait = threading.Event()
    monkeypatch.setattr(ailab, "lab_overview", lambda conn: wait.wait(1) or {"n_runs": 0})
    assert api("GET", "/lab")[0] == 200


needs_sockets = pytest.mark.skipif(not hasattr(socket, "AF_UNIX"),
                                   reason="this system has no Unix sockets")


class SocketClient(http.client.HTTPConnection):
    def __init__(self, path):
        super().__init__("localhost")
        self.path = path

    def connect(self):
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(30)
        self.sock.connect(self.path)


@needs_sockets
def test_unix_socket_serves_its_user_alone_and_goes_with_its_server(lab, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)                   # a socket's path may have about 100 bytes
    serving = ailab.make_server(lab.db_path, socket_path="lab.sock")
    threading.Thread(target=serving.serve_forever, args=(0.01,), daemon=True).start()
    assert stat.S_IMODE(os.stat("lab.sock").st_mode) == 0o600
    client = SocketClient("lab.sock")
    client.request("GET", "/runs?limit=1")
    assert len(json.loads(client.getresponse().read())) == 1
    client.request("POST", "/agent/query", json.dumps({"query": "How many runs are there?"}),
                   {"Content-Type": "application/json"})
    told = json.loads(client.getresponse().read())["natural_language_answer"]
    assert str(len(lab.runs)) in told
    client.request("GET", "/runs", headers={"Host": "evil.example"})
    assert client.getresponse().status == 403
    client.close()
    with pytest.raises(ailab.LabError, match="a server is at 'lab.sock' already"):
        ailab.make_server(lab.db_path, socket_path="lab.sock")
    serving.shutdown()
    serving.server_close()
    assert not os.path.exists("lab.sock")


@needs_sockets
def test_socket_of_a_server_that_took_its_place_stays_when_the_first_one_ends(lab, tmp_path,
                                                                             monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = ailab.make_server(lab.db_path, socket_path="lab.sock")
    os.unlink("lab.sock")
    second = ailab.make_server(lab.db_path, socket_path="lab.sock")
    first.server_close()
    assert os.path.exists("lab.sock")
    second.server_close()
    assert not os.path.exists("lab.sock")


@needs_sockets
def test_socket_asks_for_a_token_where_one_is_set(lab, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    serving = ailab.make_server(lab.db_path, socket_path="lab.sock", token="s3cret-token")
    threading.Thread(target=serving.serve_forever, args=(0.01,), daemon=True).start()
    got = []
    for headers in ({}, {"Authorization": "Bearer s3cret-token"}):
        client = SocketClient("lab.sock")
        client.request("GET", "/runs", headers=headers)
        got.append(client.getresponse().status)
        client.close()
    serving.shutdown()
    serving.server_close()
    assert got == [401, 200]


@needs_sockets
def test_socket_of_a_dead_server_is_replaced_and_another_file_is_not(lab, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind("dead.sock")
    ailab.make_server(lab.db_path, socket_path="dead.sock").server_close()
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ailab.LabError, match="is no socket"):
        ailab.make_server(lab.db_path, socket_path="notes.txt")
    assert (tmp_path / "notes.txt").read_text() == "mine"


@needs_sockets
def test_socket_is_its_users_alone_before_anyone_can_connect(lab, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    modes = []

    class Watched(socket.socket):
        def listen(self, backlog):
            modes.append(stat.S_IMODE(os.stat("lab.sock").st_mode))
            super().listen(backlog)
    monkeypatch.setattr(socket, "socket", Watched)
    before = os.umask(0)
    try:
        with monkeypatch.context() as patch:      # it is of the whole process, whose threads go on
            patch.setattr(os, "umask", None)
            ailab.make_server(lab.db_path, socket_path="lab.sock").server_close()
    finally:
        os.umask(before)
    assert modes == [0o600]


def test_long_cookie_is_read_in_one_go(guarded, monkeypatch):
    monkeypatch.setattr(ailab, "MAX_HEADER_BYTES", 1 << 17)       # a search took a minute of these
    assert guarded("/runs", {"Cookie": "a" * 120_000})[0] == 401


@pytest.mark.parametrize("path", ["//evil.example/", "/\\evil.example/", "/\\/evil.example/"])
def test_token_in_the_address_leads_to_this_host_only(guarded, path):
    status, headers, _ = guarded(path + "?token=s3cret-token")
    assert (status, headers["Location"]) == (303, "/evil.example/")


def test_connection_for_which_there_is_no_thread_is_told_so_and_takes_no_slot(server, api,
                                                                              monkeypatch):
    server.slots = threading.BoundedSemaphore(1)

    def refuse(thread):
        raise RuntimeError("can't start new thread")
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        for _ in range(2):
            status, _, answer = api("GET", "/health")
            assert (status, list(answer)) == (503, ["detail"])
    assert api("GET", "/health")[0] == 200


@pytest.mark.parametrize("name", ["lab.db", "it's \"my\" lab.db"])
def test_503_names_no_folder_whatever_fails_and_whatever_the_path(tmp_path, name):
    serving = ailab.make_server(str(tmp_path / name))
    try:
        path = serving.store.path
        told = [ailab.StoreError(f"the lab at {path!r} has schema version 99")]
        for cause in (sqlite3.OperationalError("disk error"), sqlite3.OperationalError("locked"),
                      PermissionError(13, "Permission denied", str(tmp_path))):
            told.append(ailab.StoreError(f"the lab at {path!r} cannot be used ({cause})"))
            told[-1].__cause__ = cause
        details = [serving.store_problem(error).detail for error in told]
        assert [detail for detail in details if str(tmp_path)[1:] in detail] == []
        assert [detail for detail in details if repr(name) not in detail] == []
        assert "Permission denied" in details[-1] and "busy" in details[2]
    finally:
        serving.server_close()


def test_question_shows_no_token_to_whoever_listens_at_the_port(lab, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as squatter:
        got = []

        def listen():
            with squatter.accept()[0] as client:
                got.append(client.recv(65536))
        listener = threading.Thread(target=listen)
        listener.start()
        monkeypatch.setenv("AILAB_PORT", str(squatter.getsockname()[1]))
        monkeypatch.setenv("AILAB_TOKEN", "s3cret-token")
        with ailab.served_lab(lab.db_path) as (url, token):
            assert ailab.http(f"{url}/runs", token)[0] == 200
        listener.join(10)
    assert got[0].startswith(b"GET /lab") and b"s3cret-token" not in got[0]


def test_server_for_one_question_asks_for_a_token(lab, monkeypatch):
    monkeypatch.setenv("AILAB_PORT", "1")         # nobody is there
    with ailab.served_lab(lab.db_path) as (url, token):
        assert ailab.http(f"{url}/runs")[0] == 401
        assert ailab.http(f"{url}/runs", token)[0] == 200


# --- The page of the API ------------------------------------------------------------------------

def test_docs_tell_of_every_route_and_run_no_script(api):
    status, headers, page = api("GET", "/docs")
    page = page.decode()
    assert status == 200 and "'unsafe" not in headers["Content-Security-Policy"]
    assert "<script" not in page and "http://" not in page and "https://" not in page
    for route in ailab.ROUTES:
        assert f"<code>{route.method} {route.path}</code>" in page
        assert all(f"<code>{param.name}</code>" in page for param in route.params)
