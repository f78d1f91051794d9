"""The command line: each verb, its JSON, its exit code, its one line of error."""
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
from conftest import ROOT, insert_points, insert_run, started
from processes import free_port, wait_until

import ailab
import lab_logger


@pytest.fixture
def cli(lab, capsys):
    """cli("runs", "--json") -> (exit code, what stdout got, what stderr got)."""
    def run(*arguments):
        try:
            code = ailab.main(list(arguments))
        except SystemExit as end:                 # argparse's own way out
            code = end.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err
    return run


@pytest.fixture
def body(server):
    """body(path) -> the bytes the API answers."""
    def ask(path):
        with urllib.request.urlopen(f"http://127.0.0.1:{server.server_port}{path}") as answer:
            return answer.read()
    return ask


def start(*arguments, **environment):
    """Start `python ailab.py ...` in a process of its own."""
    return subprocess.Popen([sys.executable, str(ROOT / "ailab.py"), *arguments],
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env={**os.environ, "PYTHONUNBUFFERED": "1", **environment})


# --- JSON -------------------------------------------------------------------------------

BEST = "32c3d4e5"
JSON_VERBS = [
    (("runs",), "/runs"), (("runs", "--limit", "3", "--offset", "2"), "/runs?limit=3&offset=2"),
    (("runs", "--model_name", "perceptron", "--sort", "metrics.accuracy"),
     "/runs?model_name=perceptron&sort=metrics.accuracy"),
    (("runs", "--metric_name", "accuracy", "--metric_min", "0.9"),
     "/runs?metric_name=accuracy&metric_min=0.9"),
    (("runs", "--q", "publish iris"), "/runs?q=publish+iris"),
    (("runs", "--where", "metrics.accuracy > 0.9"), "/runs?where=metrics.accuracy+%3E+0.9"),
    (("runs", "--sort", "metrics.val_loss", "--by", "best"), "/runs?sort=metrics.val_loss&by=best"),
    (("compare", BEST, "10a1b2c3", "--by", "max"),
     f"/runs/compare?ids={BEST}&ids=10a1b2c3&by=max"),
    (("leaderboard", "accuracy", "--where", "params.learning_rate < 1", "--by", "min"),
     "/runs/leaderboard?metric_name=accuracy&where=params.learning_rate+%3C+1&by=min"),
    (("show", BEST), f"/runs/{BEST}"),
    (("compare", BEST, "10a1b2c3"), f"/runs/compare?ids={BEST}&ids=10a1b2c3"),
    (("leaderboard", "accuracy"), "/runs/leaderboard?metric_name=accuracy"),
    (("leaderboard", "val_loss", "--top_k", "3", "--order", "best"),
     "/runs/leaderboard?metric_name=val_loss&top_k=3&order=best"),
    (("metrics", BEST), f"/runs/{BEST}/metrics"),
]


@pytest.mark.parametrize("arguments, path", JSON_VERBS, ids=[" ".join(v) for v, _ in JSON_VERBS])
def test_json_is_the_apis_body_byte_for_byte(cli, body, arguments, path):
    code, out, err = cli(*arguments, "--json")
    assert (code, err) == (0, "")
    assert out.encode().rstrip(b"\n") == body(path)


def test_json_of_a_note_is_the_run(cli, lab):
    code, out, _ = cli("note", BEST, "PUBLISH: again", "--json")
    assert code == 0
    assert json.loads(out)["note"] == "PUBLISH: again"


# --- Tables -----------------------------------------------------------------------------

def test_runs_lists_a_line_each_newest_first(cli):
    code, out, err = cli("runs")
    assert (code, err) == (0, "")
    short = [line for line in out.splitlines() if re.search(r"[0-9a-f]{8}", line)]
    assert len(short) == 12
    assert "cbf2a3b4" in short[0] and "10a1b2c3" in short[-1]
    assert "digits_sweep" in short[0] and "perceptron" in short[0]


def test_runs_shows_only_what_the_filters_leave(cli):
    _, out, _ = cli("runs", "--status", "failed")
    assert "a9d0e1f2" in out
    assert "10a1b2c3" not in out


def test_runs_of_an_empty_lab_says_what_to_do(db_path, capsys):
    ailab.open_lab(db_path).close()
    assert ailab.main(["runs"]) == 0
    assert "log_run" in capsys.readouterr().out


def test_show_prints_params_metrics_and_note(cli):
    code, out, _ = cli("show", BEST)
    assert code == 0
    for text in ("32c3d4e5-0003-4a00-8000-000000000003", "learning_rate", "0.1", "accuracy", "0.95",
                 "PUBLISH: best of iris", "iris_sweep"):
        assert text in out


def test_show_of_a_failed_run_prints_its_traceback(cli):
    assert "ValueError: learning rate too large" in cli("show", "a9d0e1f2")[1]


LOST = "lost: no sign of life from far for 300 s, last 2026-11-20 12:00:03 UTC"


def test_show_gives_the_reason_first_and_the_traceback_below(lab, cli):
    reason = "failed: ValueError: learning rate too large; at train.py:12 in train"
    lab.conn.execute("UPDATE runs SET end_reason = ? WHERE status = 'failed'", (reason,))
    _, out, _ = cli("show", "a9d0e1f2")
    lines = out.splitlines()
    assert lines[2].split(maxsplit=1) == ["end_reason", reason]
    assert lines[lines.index("traceback") + 1:] == [
        "Traceback (most recent call last):", '  File "train.py", line 12, in train',
        '    raise ValueError("learning rate too large")', "ValueError: learning rate too large"]
    assert lines.index("traceback") > lines.index("metrics")


def test_show_tells_of_resumptions_and_of_the_machine_that_sent_the_run(lab, cli):
    insert_run(lab.conn, run_id="far-away", timestamp=started(12), received_from="10.0.0.7",
               resumptions_json='{"0123abcd": {"at": "2026-11-20T12:00:03.000000Z", '
                                '"hostname": "far"}}')
    _, out, _ = cli("show", "far-away")
    assert "  resumed          2026-11-20T12:00:03.000000Z on far\n" in out
    assert "  received_from    10.0.0.7\n" in out


def test_show_sums_the_machine_up_in_a_line(lab, cli):
    insert_points(lab.conn, lab.ids["lr_01"], [(None, f"system/{name}", value) for name, value in (
        ("process_memory_gib", 1.25), ("process_memory_gib", 3.5), ("process_memory_gib", "odd"),
        ("memory_percent", 80.4),
        ("process_cpu_percent", 100.0), ("process_cpu_percent", 300.0),
        ("gpu.0.utilization_percent", 70.0), ("gpu.0.utilization_percent", 90.0),
        ("gpu.0.memory_gib", 21.75), ("gpu.1.utilization_percent", 5.0), ("cpu_percent", 50.0))])
    _, out, _ = cli("show", BEST)
    assert ("  machine          peak memory 3.5 GiB, mean CPU 200 % of a core, mean GPU 0 80 %, "
            "mean GPU 1 5 %\n") in out
    assert "system/" not in out
    assert "machine" not in cli("show", "54e5f6a7-0006")[1]


def test_runs_says_why_those_ended_that_did_not_end_well(lab, cli, monkeypatch):
    monkeypatch.setenv("COLUMNS", "240")
    assert "why" not in cli("runs")[1]
    lab.conn.execute("UPDATE runs SET end_reason = ? WHERE status = 'killed'", (LOST,))
    lab.conn.execute("UPDATE runs SET end_reason = 'finished: the function returned' "
                     "WHERE status = 'finished'")
    _, out, _ = cli("runs")
    assert "why" in out and LOST in out and "the function returned" not in out


def test_compare_says_how_each_run_ended(lab, cli, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    lab.conn.execute("UPDATE runs SET end_reason = ? WHERE status = 'killed'", (LOST,))
    ended = cli("compare", BEST, lab.ids["killed"])[1].splitlines()[1]
    assert ended.split(maxsplit=2) == ["ended", "finished", LOST]


def test_compare_names_what_differs(cli):
    code, out, _ = cli("compare", BEST, "98c9d0e1")
    assert code == 0
    for text in ("model_name", "optimizer.momentum", "accuracy", "0.95", "0.82"):
        assert text in out


def test_leaderboard_ranks_the_runs(cli):
    code, out, _ = cli("leaderboard", "accuracy", "--top_k", "3")
    assert code == 0
    assert out.index("0.95") < out.index("0.91")
    assert "54e5f6a7" in out and "10a1b2c3" not in out


def test_a_leaderboard_by_another_value_than_the_final_one_shows_its_epoch(cli):
    code, out, _ = cli("leaderboard", "val_loss", "--top_k", "1", "--by", "max")
    assert code == 0
    assert "metric_epoch" in out and "5.1" in out
    code, out, _ = cli("runs", "--sort", "metrics.val_loss", "--by", "max", "--limit", "1")
    assert code == 0
    assert "metric_epoch" in out and "5.1" in out


def test_direction_sets_which_way_a_metric_is_better(cli):
    assert cli("direction", "accuracy", "minimize")[:2] == (0, "accuracy: minimize\n")
    assert "better: minimize" in cli("leaderboard", "accuracy")[1]
    code, out, _ = cli("direction", "accuracy", "auto", "--json")
    assert (code, json.loads(out)) == (0, {"metric_name": "accuracy", "n_runs": 12,
                                           "direction": "maximize"})


def test_metrics_prints_a_runs_curves(cli):
    code, out, _ = cli("metrics", BEST)
    assert code == 0
    for text in ("accuracy", "val_loss", "train_loss", "0.87", "0.95"):
        assert text in out


def test_note_writes_and_says_so(cli, lab):
    code, out, _ = cli("note", "43d4e5f6", "BAD: too slow")
    assert code == 0
    assert "43d4e5f6" in out
    assert lab.conn.execute("SELECT note FROM runs WHERE run_id LIKE '43d4e5f6%'").fetchone() == (
        "BAD: too slow",)


def test_delete_moves_a_run_to_the_trash(cli, lab):
    code, out, _ = cli("delete", "43d4e5f6")
    assert code == 0
    assert "43d4e5f6" in out
    assert "43d4e5f6" not in cli("runs")[1]
    assert lab.conn.execute("SELECT count(*) FROM runs").fetchone() == (12,)


def test_restore_brings_a_run_back(cli):
    cli("delete", "43d4e5f6")
    code, out, _ = cli("restore", "43d4e5f6")
    assert code == 0
    assert "43d4e5f6" in out
    assert "43d4e5f6" in cli("runs")[1]


def test_a_note_is_taken_away_by_clear(cli, lab):
    assert cli("note", BEST, "--clear")[0] == 0
    assert lab.conn.execute("SELECT note FROM runs WHERE run_id = ?",
                            (lab.ids["lr_01"],)).fetchone() == (None,)


# --- The terminal -----------------------------------------------------------------------

def test_a_table_fits_a_narrow_terminal(cli, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    for arguments in (("runs",), ("leaderboard", "accuracy"), ("compare", BEST, "10a1b2c3"),
                      ("metrics", BEST)):
        _, out, _ = cli(*arguments)
        assert max(map(len, out.splitlines())) <= 60, arguments


def test_a_table_has_no_colour_off_a_terminal(cli):
    assert "\x1b" not in cli("runs")[1] + cli("show", BEST)[1]


def test_a_table_has_no_colour_on_a_terminal_where_no_color_is_set(lab):
    assert "\x1b" not in on_a_terminal("runs", NO_COLOR="1")


def test_a_table_has_colour_on_a_terminal(lab):
    assert "\x1b[" in on_a_terminal("runs", TERM="xterm-256color")


def on_a_terminal(*arguments, **environment):
    """What the command prints when its stdout is a terminal."""
    pty = pytest.importorskip("pty")
    ours, theirs = pty.openpty()
    surroundings = {key: value for key, value in os.environ.items() if key != "NO_COLOR"}
    process = subprocess.Popen([sys.executable, str(ROOT / "ailab.py"), *arguments], stdout=theirs,
                               stderr=theirs, env={**surroundings, **environment})
    os.close(theirs)
    out = b""
    try:
        while chunk := os.read(ours, 4096):
            out += chunk
    except OSError:                               # Linux: the other side has closed it
        pass
    finally:
        os.close(ours)
    assert process.wait(60) == 0, out
    return out.decode()


def test_control_characters_in_a_run_never_reach_the_terminal(cli, lab):
    lab.conn.execute("UPDATE runs SET note = ?, model_name = ? WHERE run_id = ?",
                     ("\x1b]0;owned\x07\x1b[2J", "a\r\nb\x9b31m", lab.ids["diverged"]))
    for arguments in (("runs",), ("show", "cbf2a3b4")):
        out = cli(*arguments)[1]
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f]", out)


# --- Errors -------------------------------------------------------------------------------

@pytest.mark.parametrize("arguments, words", [
    (("show", "ffffffff"), "'ffffffff'"), (("show", "54e5f6"), "54e5f6a7-0006"),
    (("compare", BEST), "2"), (("compare", BEST, "ffffffff"), "'ffffffff'"),
    (("leaderboard", "acuracy"), "accuracy"), (("runs", "--limit", "0"), "limit"),
    (("runs", "--limit", "-1"), "limit"), (("runs", "--status", "paused"), "paused"),
    (("runs", "--sort", "colour"), "colour"), (("metrics", "ffffffff"), "'ffffffff'"),
    (("note", "ffffffff", "x"), "'ffffffff'"), (("delete", "ffffffff"), "'ffffffff'"),
    (("runs", "--where", "metrics.accurcy > 1"), "column 1: no run has a metric 'accurcy'"),
    (("direction", "accurcy", "auto"), "'accuracy'"),
    (("runs", "--metric_min", "0.5"), "metric_name"), (("note", BEST, "x" * 10_001), "10")])
def test_an_error_is_one_line_and_exit_code_1(cli, arguments, words):
    code, out, err = cli(*arguments)
    assert (code, out) in ((1, ""), (2, ""))
    if code == 1:
        assert err.startswith("ailab: ") and err.count("\n") == 1
    assert words in err


@pytest.mark.parametrize("arguments", [("runs", "--colour"), ("colour",), ("show",), (),
                                       ("serve", "--port", "many"), ("note", BEST),
                                       ("direction", "accuracy", "up")])
def test_wrong_usage_is_exit_code_2(cli, arguments):
    code, _, err = cli(*arguments)
    assert code == 2
    assert "usage" in err


def test_help_and_version_are_exit_code_0(cli):
    assert cli("--help")[0] == 0
    assert lab_logger.__version__ in cli("--version")[1]


@pytest.mark.parametrize("verb", [("runs",), ("show", "32c3d4"), ("leaderboard", "accuracy"),
                                  ("compare", "32c3d4", "10a1b2"), ("metrics", "32c3d4"),
                                  ("note", "32c3d4", "x"), ("delete", "32c3d4")])
def test_a_lab_that_is_not_there_is_one_sentence_and_is_not_made(db_path, capsys, verb):
    assert ailab.main(list(verb)) == 1
    err = capsys.readouterr().err
    assert err.startswith("ailab: ") and err.count("\n") == 1
    assert db_path in err
    assert not os.path.exists(db_path)


def test_a_file_that_is_no_lab_is_one_sentence(db_path, capsys):
    with open(db_path, "w") as file:
        file.write("no database\n" * 100)
    assert ailab.main(["runs"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("ailab: ") and err.count("\n") == 1


def test_db_names_another_lab(tmp_path, lab, capsys):
    other = str(tmp_path / "other.db")
    ailab.open_lab(other).close()
    assert ailab.main(["runs", "--db", other, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == []


@pytest.mark.parametrize("port", ["many", "70000", "-1"])
def test_a_bad_port_in_the_environment_is_named_with_its_key(lab, monkeypatch, capsys, port):
    monkeypatch.setenv("AILAB_PORT", port)
    assert ailab.main(["serve"]) == 1
    err = capsys.readouterr().err
    assert "AILAB_PORT" in err and repr(port) in err and "environment" in err
    assert err.count("\n") == 1


def test_a_busy_port_is_a_sentence_that_names_another(lab, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert ailab.main(["serve", "--port", str(port)]) == 1
    err = capsys.readouterr().err
    assert err.startswith("ailab: ") and err.count("\n") == 1
    assert str(port) in err
    another = re.search(r"--port (\d+)", err)
    assert another and int(another[1]) != port


def test_a_reader_that_stops_reading_is_no_error(lab):
    process = start("runs", "--json")
    process.stdout.close()
    assert "Traceback" not in process.stderr.read()
    assert process.wait(60) in (0, 1, 141, -signal.SIGPIPE)


# --- serve, ask, doctor --------------------------------------------------------------------

@pytest.fixture
def served(lab):
    """served("serve", "--port", "0") -> (address, what stderr got until then); ended afterwards."""
    processes = []

    def begin(*arguments, **environment):
        process = start(*arguments, **environment)
        processes.append(process)
        said = ""
        for line in process.stderr:
            said += line
            if line.startswith("Stop with Ctrl-C"):
                return re.search(r"http://127\.0\.0\.1:\d+", said)[0], said, process
        raise AssertionError(said)
    yield begin
    for process in processes:
        process.kill()
        process.communicate()


def fetch(address, **headers):
    with urllib.request.urlopen(urllib.request.Request(address, headers=headers),
                                timeout=10) as answer:
        return json.load(answer)


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_serve_prints_the_address_it_got_and_ends_when_told_to(served, lab, sent):
    address, said, process = served("serve", "--port", "0")
    assert lab.db_path in said
    assert fetch(address + "/health")["status"] == "ok"
    process.send_signal(sent)
    _, err = process.communicate(timeout=60)
    assert process.returncode in (0, 128 + sent)
    assert "Traceback" not in err


def test_serve_with_a_token_of_its_own_making_prints_it_in_the_address(served):
    address, said, _ = served("serve", "--port", "0", "--token")
    token = re.search(r"\?token=([\w-]{20,})", said)[1]
    assert len(fetch(address + "/runs", Authorization=f"Bearer {token}")) == 12
    with pytest.raises(urllib.error.HTTPError, match="401"):
        fetch(address + "/runs")


def test_serve_quietly_prints_a_token_of_its_own_making_and_else_nothing(served, lab):
    _, said, process = served("serve", "--port", "0", "--token", "--quiet")
    assert "?token=" in said
    process.send_signal(signal.SIGTERM)
    port = free_port()
    quiet = start("serve", "--port", str(port), "--quiet")
    wait_until(lambda: socket.socket().connect_ex(("127.0.0.1", port)) == 0)
    quiet.send_signal(signal.SIGTERM)
    assert quiet.communicate(timeout=60) == ("", "")


def test_serve_beyond_this_machine_asks_for_a_token_and_prints_it(lab):
    process = start("serve", "--host", "0.0.0.0", "--port", "0", "--quiet")
    said = "".join(next(process.stderr) for _ in range(3))
    address, token = re.search(r"(http://127\.0\.0\.1:\d+)/\?token=([\w-]{20,}) \(bound",
                               said).groups()
    try:
        with pytest.raises(urllib.error.HTTPError, match="401"):
            fetch(address + "/health")
        assert fetch(address + "/health", Authorization=f"Bearer {token}")["status"] == "ok"
    finally:
        process.kill()
        process.communicate()


@pytest.mark.skipif(not hasattr(socket, "AF_UNIX"), reason="this system has no Unix sockets")
def test_serve_on_a_socket_prints_how_to_reach_it_opens_no_port_and_takes_it_along(lab, tmp_path):
    path = tmp_path / "s"
    process = start("serve", "--socket", str(path), AILAB_HOST="0.0.0.0", AILAB_PORT="1")
    said = "".join(next(process.stderr) for _ in range(3))
    assert f"ssh -L 8000:{path} HOST" in said and "token" not in said
    if os.path.exists("/proc/self/net/tcp"):
        with open(f"/proc/{process.pid}/net/tcp", encoding="ascii") as table:
            listening = {line.split()[9] for line in table if line.split()[3] == "0A"}
        held = {os.readlink(f"/proc/{process.pid}/fd/{fd}")
                for fd in os.listdir(f"/proc/{process.pid}/fd")}
        assert not {f"socket:[{inode}]" for inode in listening} & held
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
        client.sendall(b"GET /health HTTP/1.1\r\nHost: localhost:8000\r\n\r\n")
        assert client.recv(100).startswith(b"HTTP/1.1 200")
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=60) == ("", "") and process.returncode == 0
    assert not path.exists()


@pytest.mark.parametrize("more", [["--port", "8001"], ["--host", "127.0.0.1"]])
def test_serve_on_a_socket_and_a_port_is_wrong_usage(cli, tmp_path, more):
    code, _, err = cli("serve", "--socket", str(tmp_path / "s"), *more)
    assert code == 2 and "--socket opens no port" in err


def test_serve_on_a_socket_without_a_name_opens_no_port_instead(cli):
    code, _, err = cli("serve", "--socket", "", "--quiet")
    assert code == 1 and "is no socket: give another --socket" in err


def test_serve_without_unix_sockets_says_so(cli, tmp_path, monkeypatch):
    monkeypatch.delattr(socket, "AF_UNIX", raising=False)
    code, _, err = cli("serve", "--socket", str(tmp_path / "s"))
    assert (code, err) == (1, "ailab: this system has no Unix sockets: leave --socket out\n")


def test_serve_verbosely_logs_one_escaped_line_a_request_without_the_token(served):
    address, _, process = served("serve", "--port", "0", "--verbose", "--token", "s3cret-token")
    host, port = address[7:].split(":")
    with socket.create_connection((host, int(port)), timeout=10) as client:
        client.sendall(b"GET /runs?token=s3cret-token&q=\x1b[31mred\xff\r\n"
                       b"GET /runs?token=s3cret-token HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        assert client.recv(100).startswith(b"HTTP/1.1 400")
    with socket.create_connection((host, int(port)), timeout=10) as client:
        client.sendall(b"GET /runs?token=s3cret-token HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        assert client.recv(100).startswith(b"HTTP/1.1 303")
    process.send_signal(signal.SIGTERM)
    lines = process.communicate(timeout=60)[1].splitlines()
    assert [re.sub(r"\[.*?Z\]|\d+$", "", line) for line in lines] == [
        "127.0.0.1  GET /runs?token=***&q=\\x1b[31mred\\xff 400 ",
        "127.0.0.1  GET /runs?token=*** HTTP/1.1 303 "]


def test_demo_of_a_lab_that_has_runs_serves_it_at_once_with_three_questions(served):
    address, said, process = served("demo", "--port", "0")
    said += "".join(process.stderr.readline() for _ in range(3))
    assert said.count("ask: ") == 3
    assert fetch(address + "/lab")["n_runs"] == 12


def test_ask_uses_the_server_that_runs(served, lab, cli, monkeypatch):
    address, _, process = served("serve", "--port", "0", "--verbose")
    monkeypatch.setenv("AILAB_PORT", address.rpartition(":")[2])
    code, out, _ = cli("ask", "Which run has the best accuracy?")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (code, "0.95" in out) == (0, True)
    assert "POST /agent/query" in err


def test_ask_of_a_server_that_goes_silent_is_one_sentence(server, lab, cli, monkeypatch):
    monkeypatch.setenv("AILAB_PORT", str(server.server_port))
    ask = ailab.http

    def silent(url, *more, **named):
        if url.endswith("/agent/query"):
            raise TimeoutError("timed out")
        return ask(url, *more, **named)
    monkeypatch.setattr(ailab, "http", silent)
    assert cli("ask", "Which run has the best accuracy?") == (1, "", "ailab: timed out\n")


def test_ask_starts_a_server_of_its_own_where_none_runs(cli, lab, monkeypatch):
    monkeypatch.setenv("AILAB_PORT", "1")         # nothing listens there
    code, out, err = cli("ask", "Which run has the best accuracy?")
    assert code == 0, err
    assert "0.95" in out


def test_ask_as_json_is_an_agent_answer(cli, lab, monkeypatch):
    monkeypatch.setenv("AILAB_PORT", "1")
    code, out, _ = cli("ask", "Show me my top 3 runs by accuracy and compare them.", "--json")
    answer = json.loads(out)
    assert code == 0
    assert set(answer["used_run_ids"]) == {lab.ids[name] for name in ("lr_01", "svm_01", "svm_001")}
    assert answer["answered_by"] == "builtin planner"


def test_ask_writes_a_note_only_where_told_to(cli, lab, monkeypatch):
    monkeypatch.setenv("AILAB_PORT", "1")
    before = lab.conn.execute("SELECT run_id, note FROM runs ORDER BY 1").fetchall()
    cli("ask", "Summarize my experiments.")
    assert lab.conn.execute("SELECT run_id, note FROM runs ORDER BY 1").fetchall() == before


def test_doctor_of_a_healthy_lab_finds_no_fault(cli):
    code, out, err = cli("doctor")
    assert (code, err) == (0, "")
    assert "12" in out


def test_doctor_takes_in_what_a_dead_process_left(lab, cli):
    journals = lab.db_path + ".journals"
    os.makedirs(journals, exist_ok=True)
    with open(os.path.join(journals, "left-behind.jsonl"), "w") as journal:
        journal.write(json.dumps({"v": 1, "db": lab.db_path, "t": 1_790_000_000.0, "set": {
            "timestamp": "2026-11-05T00:00:00.000000Z", "status": "finished",
            "experiment_name": "left"}}) + "\n")
        journal.write(json.dumps({"t": 1_790_000_001.0, "e": 1, "m": {"accuracy": 0.5}}) + "\n")
    code, out, _ = cli("doctor")
    assert code == 0
    assert "1 journal" in out
    assert lab.conn.execute("SELECT experiment_name, status FROM runs WHERE run_id = 'left-behind'"
                            ).fetchone() == ("left", "finished")
    assert lab_logger.pending(lab.db_path) == []


def put_journals(folder, head, *names):
    """Leave journals as processes that are gone leave them; the first is ten minutes old."""
    os.makedirs(folder, exist_ok=True)
    for name in names:
        with open(os.path.join(folder, name + ".jsonl"), "w") as journal:
            journal.write(json.dumps({"v": 2, **head, "t": 1_790_000_000.0, "set": {
                "timestamp": "2026-11-05T00:00:00.000000Z", "status": "finished"}}) + "\n")
    then = time.time() - 600
    os.utime(os.path.join(folder, names[0] + ".jsonl"), (then, then))


def test_doctor_tells_what_was_pending_before_it_takes_it_in(lab, cli):
    put_journals(lab.db_path + ".journals", {"db": lab.db_path}, "run-a", "run-a.0123abcd", "run-b")
    size = sum(journal["bytes"] for journal in lab_logger.pending(lab.db_path))
    code, out, _ = cli("doctor")
    assert code == 0
    assert (f"not wholly in the lab until now: 3 journals of 2 runs, {size:,} bytes, the oldest "
            "last written 10 minutes ago\n") in out
    assert "3 journals of ended runs taken in, 0 still in use" in out
    assert "not wholly" not in cli("doctor")[1]


def test_doctor_says_which_journal_could_not_be_taken_in_and_why(lab, cli):
    folder = lab.db_path + ".journals"
    put_journals(folder, {"db": lab.db_path}, "good")
    put_journals(folder, {"db": lab.db_path, "v": 99}, "newer")
    code, out, _ = cli("doctor")
    assert code == 1
    [fault] = [line for line in out.splitlines() if line.startswith("fail")]
    assert "newer.jsonl" in fault and "update AI-Lab" in fault
    assert "1 journal of ended runs taken in, 0 still in use" in out
    assert os.path.exists(os.path.join(folder, "newer.jsonl"))


def test_doctor_sends_what_waits_for_another_machine_or_says_why_not(
    lab, server, cli, monkeypatch
):
    url = "http://127.0.0.1:1"
    monkeypatch.setenv("AILAB_URL", url)
    assert f"ok    0 journals wholly sent to {url}" in cli("doctor")[1]
    put_journals(lab_logger.journal_dirs(url)[0], {"db": url}, "far-1", "far-2")
    code, out, _ = cli("doctor")
    assert code == 0 and f"to be sent to {url}: 2 journals of 2 runs, " in out
    faults = [line for line in out.splitlines() if line.startswith("warn") and "far-" in line]
    assert len(faults) == 1 and "is kept" in faults[0]
    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("AILAB_URL", url)
    put_journals(lab_logger.journal_dirs(url)[0], {"db": url}, "far-3")
    assert f"1 journal wholly sent to {url}" in cli("doctor")[1]
    assert lab_logger.pending(url) == []
    monkeypatch.delenv("AILAB_URL")
    assert "sent to" not in cli("doctor")[1]


def test_doctor_says_when_the_lab_lies_on_a_network_file_system(lab, cli, monkeypatch):
    assert "the lab is on a local file system" in cli("doctor")[1]
    monkeypatch.setattr(lab_logger, "network_filesystem", lambda *_: "nfs4")
    assert "warn  the lab is on a network file system (nfs4)" in cli("doctor")[1]


def test_doctor_of_a_broken_lab_says_so_and_fails(db_path, capsys):
    with open(db_path, "w") as file:
        file.write("no database\n" * 100)
    assert ailab.main(["doctor"]) == 1
    captured = capsys.readouterr()
    assert "not a database" in captured.out + captured.err
    assert "Traceback" not in captured.out + captured.err


def test_the_command_of_a_copied_logger_needs_no_agent(lab):
    """Read verbs start fast: LangChain is imported only when a question is asked."""
    code = ("import sys, ailab; ailab.main(['runs']); "
            "sys.exit(any(name.startswith('langchain') for name in sys.modules))")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True)
    assert done.returncode == 0, done.stderr


def test_metrics_of_an_unknown_name_says_so_and_times_can_be_told_apart(lab, capsys):
    assert ailab.main(["metrics", lab.ids["svm_01"], "--names", "nope", "--db", lab.db_path]) == 1
    assert "has no point of 'nope': show lists its metrics" in capsys.readouterr().err


def test_closed_standard_output_is_no_traceback(lab):
    code = "import sys; sys.stdout = None; import ailab; sys.exit(ailab.main(sys.argv[1:]))"
    done = subprocess.run([sys.executable, "-c", code, "runs", "--db", lab.db_path],
                          capture_output=True, text=True, timeout=30, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")
