"""Logging to a lab on another machine: whatever its server does, each point arrives exactly once.

The server is a process that is killed and brought back; trainings are processes that log an epoch
for each line they are given, so that what happens between two epochs is the test's to say.
"""
import contextlib
import gzip
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from processes import ROOT, TOKEN, LabServer, Stub, environment, forward, rows, train, wait_until

import ailab

pytestmark = pytest.mark.skipif(os.name == "nt", reason="the signals here are POSIX's")

# Waits that would be too slow here: between two sendings, after a failure, a call's end, the exit.
QUICK = """
import sys
import lab_logger
lab_logger.DRAIN_EVERY_S, lab_logger.RETRY_S, lab_logger.EXIT_WAIT_S = 0.05, (0.05, 0.2), 1.0
lab_logger.Run.finish.__kwdefaults__["wait_s"] = 0.3
"""
TRAIN = QUICK + """
RESULT = {"accuracy": 0.5}

@lab_logger.log_run(experiment_name="remote")
def train(secret_token="hush"):
    for line in sys.stdin:
        epoch = int(line)
        lab_logger.log(epoch=epoch, loss=epoch / 4)
        print(epoch, flush=True)
    return RESULT

print(train() is RESULT)
sys.exit(7)
"""


class Training:
    """A training process that logs the epochs it is told to, one after another."""

    def __init__(self, env, body=TRAIN):
        self.process, self.n_epochs = train(body, **env), 0

    def log(self, n):
        """Have `n` more epochs logged; returns when log() has returned for the last."""
        until = self.n_epochs + n
        self.process.stdin.write("".join(f"{epoch}\n" for epoch in range(self.n_epochs, until)))
        self.process.stdin.flush()
        for epoch in range(self.n_epochs, until):
            assert self.process.stdout.readline() == f"{epoch}\n", self.process.stderr.read()
        self.n_epochs = until

    def end(self):
        """Let the function return: the sentences on stderr. Value and exit status are untouched."""
        stdout, stderr = self.process.communicate(timeout=60)
        assert (self.process.returncode, stdout) == (7, "True\n"), stderr
        return stderr.splitlines()

    def kill(self):
        self.process.kill()
        return self.process.communicate(timeout=60)


@pytest.fixture
def server(tmp_path):
    lab = LabServer(tmp_path / "server" / "lab.db")
    lab.env["DB_PATH"] = str(tmp_path / "own" / "lab.db")      # which nothing must ever make
    yield lab
    lab.kill()
    assert not os.path.exists(tmp_path / "own")


@pytest.fixture
def stub(server):
    """A server between the trainings and the real one; it hands on unless it is told otherwise."""
    between = Stub(forward(server))
    server.env["AILAB_URL"] = between.url
    yield between
    between.close()


@pytest.fixture
def begin(server):
    """begin() starts a training; those that a failing test leaves are ended."""
    begun = []

    def start(body=TRAIN, **env):
        begun.append(Training({**server.env, **env}, body))
        return begun[-1]
    yield start
    for training in begun:
        with contextlib.suppress(ValueError):     # its pipes are closed
            training.kill()


def losses(server):
    """What the lab holds as (status, [(epoch, value)]) of each run."""
    if not os.path.exists(server.db_path):
        return []
    return [(status, rows(server.db_path, "SELECT epoch, metric_value FROM run_metrics WHERE "
                          "run_id = ? ORDER BY id", run_id))
            for run_id, status in rows(server.db_path, "SELECT run_id, status FROM runs")]


def logged(n):
    return [(epoch, epoch / 4) for epoch in range(n)]


def wait_for(server, status, n):
    wait_until(lambda: losses(server) == [(status, logged(n))], limit_s=60)


def sync(server, folder, *arguments, **env):
    """Run `python lab_logger.py sync` where there is nothing but the pasted file."""
    folder.mkdir(exist_ok=True)
    shutil.copy(ROOT / "lab_logger.py", folder)
    assert os.listdir(folder) == ["lab_logger.py"]
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-B", "lab_logger.py", "sync", *arguments], cwd=folder,
        env=environment(**{**server.env, "PYTHONPATH": None, **env}), capture_output=True,
        text=True, timeout=60)
    return done.returncode, done.stdout, done.stderr


def assert_synced(outcome, told):
    code, stdout, stderr = outcome
    assert (code, stderr, stdout.count("\n")) == (0, "", 1) and stdout.startswith(told)


def folder_of(url):
    return os.path.expanduser("~/.ai-lab/" + url.replace("://", "_").replace(".", "_")
                              .replace(":", "_") + ".journals")


def sentence(url, why):
    return (f"lab_logger: the lab '{url}' cannot take in runs at present ({why}); training goes "
            f"on, every point is kept in {folder_of(url)} and is taken in once the server answers, "
            "or by `python lab_logger.py sync`")


REFUSED = "<urlopen error [Errno 111] Connection refused>"


# --- Away and back ------------------------------------------------------------------------

def test_run_reaches_the_server_while_it_trains_and_is_whole_when_it_ends(server, begin):
    server.start()
    training = begin()
    training.log(3)
    wait_for(server, "running", 3)
    training.log(3)
    assert training.end() == []
    assert losses(server) == [("finished", logged(6))]
    run, = rows(server.db_path, "SELECT received_from, end_reason, final_metrics_json, pid, "
                "params_json FROM runs")
    assert run == ("127.0.0.1", "finished: ran to its end", '{"accuracy":0.5}',
                   training.process.pid, '{"secret_token":"***"}')
    assert os.listdir(folder_of(server.url)) == []


def test_server_that_is_absent_at_the_start_gets_all_once_it_is_there(server, begin):
    training = begin()
    training.log(5)
    server.start()
    wait_for(server, "running", 5)
    training.log(5)
    assert training.end() == [sentence(server.url, REFUSED)]
    assert losses(server) == [("finished", logged(10))]


def test_server_that_is_away_in_the_middle_gets_all_when_it_is_back(server, begin):
    server.start()
    training = begin()
    training.log(5)
    wait_for(server, "running", 5)
    server.kill()
    training.log(500)
    server.start()
    wait_for(server, "running", 505)
    training.log(5)
    told = training.end()
    assert losses(server) == [("finished", logged(510))]
    assert len(told) <= 1 and all(line.startswith("lab_logger: the lab") for line in told)


def test_server_that_is_away_to_the_end_gets_all_from_sync_in_an_empty_folder(
        server, begin, tmp_path):
    training = begin()
    training.log(2000)
    assert training.end() == [sentence(server.url, REFUSED)]
    code, stdout, stderr = sync(server, tmp_path / "empty")
    assert code == 1 and stdout.startswith(f"0 of 1 journals are wholly in {server.url}")
    assert stderr.count("\n") == 1 and "is kept: it could not be taken in" in stderr
    server.start()
    assert_synced(sync(server, tmp_path / "empty"), f"1 of 1 journals are wholly in {server.url}")
    assert losses(server) == [("finished", logged(2000))]
    assert_synced(sync(server, tmp_path / "empty"), f"0 of 0 journals are wholly in {server.url}")
    assert losses(server) == [("finished", logged(2000))]


def test_server_killed_again_and_again_gets_each_point_once(server, begin):
    dice, training = random.Random(3), None
    server.start()
    training = begin()
    for _ in range(6):
        for _ in range(dice.randrange(1, 6)):
            training.log(dice.randrange(1, 120))
        server.kill(dice.choice([signal.SIGKILL, signal.SIGTERM]))
        training.log(dice.randrange(1, 120))
        server.start()
    assert len(training.end()) <= 1
    wait_for(server, "finished", training.n_epochs)


def test_server_whose_lab_was_lost_gets_a_live_run_whole_again(server, begin):
    """As after a restore from an old backup: it holds less than it has said."""
    server.start()
    training = begin()
    training.log(50)
    wait_for(server, "running", 50)
    server.kill()
    shutil.rmtree(os.path.dirname(server.db_path))
    server.start()
    training.log(50)
    wait_for(server, "running", 100)
    assert len(training.end()) <= 1
    assert losses(server) == [("finished", logged(100))]


# --- Answers that are none ----------------------------------------------------------------

@pytest.mark.parametrize("answer, why", [
    ((500, b'{"detail":"out of order"}'), "the server answered 500: out of order"),
    ((502, b"<html>Bad gateway</html>"), "the server answered 502: <html>Bad gateway</html>"),
    ((200, b"<html>Log in to the hotel's network</html>"), "the server gave no answer of a lab: "),
    ((200, b'{"offset": "many"}'), "the server gave no answer of a lab"),
    ((200, b"[]"), "the lab took in nothing of a whole line"),
    ((200, b"{}"), "the lab took in nothing of a whole line"),
    (None, "Remote end closed connection without response"),
])
def test_server_that_answers_nonsense_gets_all_when_it_is_well(server, stub, begin, answer, why):
    server.start()
    stub.answer = lambda request: answer
    training = begin()
    training.log(5)
    wait_until(lambda: len(stub.requests) >= 3)
    training.log(5)
    stub.answer = forward(server)
    wait_for(server, "running", 10)
    told, = training.end()
    assert told.startswith("lab_logger: the lab '" + stub.url) and why in told
    assert f"every point is kept in {folder_of(stub.url)} and is taken in once" in told
    assert losses(server) == [("finished", logged(10))]


def test_answer_that_is_lost_doubles_no_point(server, stub, begin):
    """The server takes lines in and the connection breaks before it can say so."""
    server.start()
    hand_on, dice = forward(server), random.Random(5)

    def forgetful(request):
        told = hand_on(request)
        return told if dice.random() < 0.3 else None
    stub.answer = forgetful
    training = begin()
    for _ in range(20):                           # more is logged between a sending and the next
        n_before = len(stub.requests)
        training.log(50)
        wait_until(lambda n_before=n_before: len(stub.requests) > n_before)
    wait_for(server, "running", 1000)
    stub.answer = hand_on
    assert len(training.end()) == 1
    assert losses(server) == [("finished", logged(1000))]


def test_request_that_comes_twice_doubles_no_point(server, stub, begin):
    server.start()
    hand_on = forward(server)

    def twice(request):
        hand_on(request)
        return hand_on(request)
    stub.answer = twice
    training = begin()
    for _ in range(5):
        training.log(20)
    assert training.end() == []
    assert losses(server) == [("finished", logged(100))]


def test_server_that_never_answers_is_waited_for_by_no_log_call_and_by_no_exit(
        server, stub, begin, tmp_path):
    server.start()
    may_answer = threading.Event()
    hand_on = forward(server)

    def late(request):
        may_answer.wait(60)
        return hand_on(request)
    stub.answer = late
    training = begin()
    training.log(1)
    wait_until(lambda: stub.requests)             # the sender waits for its answer ...
    training.log(3000)                            # ... while log() returns 3,000 times
    told = training.end()                         # and the process ends
    assert not may_answer.is_set() and len(told) == 1 and "timed out" in told[0]
    may_answer.set()
    assert sync(server, tmp_path / "empty")[0] == 0
    wait_for(server, "finished", 3001)


def test_slow_server_gets_few_large_gzipped_requests(server, stub, begin):
    server.start()
    pace, hand_on = threading.Semaphore(0), forward(server)

    def slow(request):
        pace.acquire(timeout=60)
        return hand_on(request)
    stub.answer = slow
    training = begin()
    for n in range(30):
        training.log(200)
        if n % 10 == 9:
            pace.release()
    stub.answer = hand_on
    pace.release(100)
    wait_for(server, "running", 6000)
    assert training.end() == []
    posts = [request for request in stub.requests if request.body]
    assert all(request.headers["Content-Encoding"] == "gzip" for request in posts)
    assert len(posts) < 60                        # of 6,000 points
    assert sum(len(request.body) for request in posts) < sum(
        len(gzip.decompress(request.body)) for request in posts) / 3
    assert losses(server) == [("finished", logged(6000))]


def test_refused_token_is_told_without_it_and_the_right_one_sends_all(server, begin, tmp_path):
    server.start()
    training = begin(AILAB_TOKEN="wrong-token-of-mine")
    training.log(10)
    told, = training.end()
    assert "the server answered 401: " in told and folder_of(server.url) in told
    assert losses(server) == []
    code, _, stderr = sync(server, tmp_path / "empty", AILAB_TOKEN="wrong-token-of-mine")
    assert code == 1 and "401" in stderr
    assert "wrong-token-of-mine" not in told + stderr and TOKEN not in told + stderr
    assert sync(server, tmp_path / "empty")[0] == 0
    assert losses(server) == [("finished", logged(10))]


def test_url_that_carries_the_token_works_and_keeps_it_out_of_files(server, begin, tmp_path):
    training = begin(AILAB_URL=f"{server.url}/?token={TOKEN}", AILAB_TOKEN=None)
    training.log(10)
    told, = training.end()
    journal, = os.scandir(folder_of(server.url))
    with open(journal.path) as file:
        assert TOKEN not in file.read() + told
    server.start()
    assert sync(server, tmp_path / "empty", AILAB_URL=f"{server.url}/?token={TOKEN}",
                AILAB_TOKEN=None)[0] == 0
    assert losses(server) == [("finished", logged(10))]


def test_journal_that_the_server_can_never_take_hides_no_other(server, begin, tmp_path):
    training = begin()
    training.log(10)
    training.end()
    odd = os.path.join(folder_of(server.url), "odd.jsonl")
    with open(odd, "w") as file:
        file.write(json.dumps({"v": 99, "t": 1.0, "db": server.url, "set": {}}) + "\n")
    os.utime(odd, (1, 1))                         # the oldest, so it comes first
    server.start()
    code, stdout, stderr = sync(server, tmp_path / "empty")
    assert code == 1 and stdout.startswith("1 of 2 journals are wholly in ")
    assert stderr.count("\n") == 1 and odd in stderr and "newer" in stderr
    assert losses(server) == [("finished", logged(10))]


# --- Loggers that die ---------------------------------------------------------------------

@pytest.mark.parametrize("is_away", [False, True])
def test_logger_killed_in_the_middle_loses_nothing_and_sync_says_how_it_ended(
        server, begin, tmp_path, is_away):
    if not is_away:
        server.start()
    training = begin()
    training.log(300)
    training.kill()
    if is_away:
        server.start()
    assert_synced(sync(server, tmp_path / "empty"), f"1 of 1 journals are wholly in {server.url}")
    assert losses(server) == [("killed", logged(300))]
    (reason,), = rows(server.db_path, "SELECT end_reason FROM runs")
    assert reason.startswith(f"killed without a word: process {training.process.pid} on "
                             f"{os.uname().nodename} is gone, last sign of life 20")


def test_next_training_on_the_machine_sends_what_a_killed_one_left(server, begin):
    first = begin()
    first.log(20)
    first.kill()
    server.start()
    second = begin()
    second.log(5)
    wait_until(lambda: sorted(losses(server)) == [("killed", logged(20)), ("running", logged(5))])
    assert second.end() == []


def test_loggers_killed_at_any_moment_lose_no_acknowledged_point(server, begin, tmp_path):
    server.start()
    dice, n_of_pid = random.Random(7), {}
    for _ in range(5):
        training = begin(TRAIN.replace("DRAIN_EVERY_S, ", "DRAIN_EVERY_S, lab_logger.CHUNK_BYTES, ")
                         .replace("= 0.05, (", "= 0.001, 200, ("))
        training.log(dice.randrange(1, 200))
        training.kill()
        n_of_pid[training.process.pid] = training.n_epochs
    assert sync(server, tmp_path / "empty")[0] == 0
    for pid, n in n_of_pid.items():
        assert rows(server.db_path, "SELECT epoch, metric_value FROM run_metrics JOIN runs USING "
                    "(run_id) WHERE pid = ? ORDER BY id", pid) == logged(n)
    assert rows(server.db_path, "SELECT status, count(*) FROM runs GROUP BY 1") == [("killed", 5)]


def test_sync_beside_a_live_run_doubles_nothing_and_leaves_it_alive(server, begin, tmp_path):
    server.start()
    training = begin()
    for n in range(3):
        training.log(100)
        assert_synced(sync(server, tmp_path / f"empty{n}"),
                      f"0 of 1 journals are wholly in {server.url}")
        assert losses(server) == [("running", logged(training.n_epochs))]
    assert training.end() == []
    assert losses(server) == [("finished", logged(300))]


def test_several_syncs_at_once_double_nothing(server, begin, tmp_path):
    for _ in range(3):
        training = begin()
        training.log(400)
        training.end()
    server.start()
    with ThreadPoolExecutor(4) as pool:
        done = list(pool.map(lambda n: sync(server, tmp_path / f"empty{n}"), range(4)))
    assert [(code, told) for code, _, told in done] == [(0, "")] * 4
    assert losses(server) == [("finished", logged(400))] * 3
    assert os.listdir(folder_of(server.url)) == []


def test_many_loggers_and_one_server_that_comes_and_goes(server, begin):
    trainings = [begin() for _ in range(4)]
    for n in range(3):
        server.start()
        for training in trainings:
            training.log(50)
        if n < 2:
            server.kill()
            for training in trainings:
                training.log(50)
    for training in trainings:
        assert len(training.end()) <= 1
    wait_until(lambda: losses(server) == [("finished", logged(250))] * 4)


# --- What else is told --------------------------------------------------------------------

def test_doctor_shows_what_waits_for_the_server_and_sends_it(server, begin):
    training = begin()
    training.log(10)
    training.end()
    shown = []
    for _ in range(2):
        done = subprocess.run([sys.executable, str(ROOT / "ailab.py"), "doctor"], text=True,
                              env=environment(**server.env), capture_output=True, timeout=60)
        shown.append(done.stdout)
        if not server.process:
            server.start()
    assert all(f"to be sent to {server.url}: 1 journal of 1 run, " in told for told in shown)
    assert "is kept: it could not be taken in (<urlopen error" in shown[0]
    assert f"0 journals wholly sent to {server.url}" in shown[0]
    assert f"1 journal wholly sent to {server.url}" in shown[1]
    assert losses(server) == [("finished", logged(10))]


def test_url_that_is_none_is_told_and_the_run_goes_into_the_file(begin, tmp_path):
    db_path = str(tmp_path / "here.db")
    training = begin(AILAB_URL="lab.example.org", DB_PATH=db_path)
    training.log(3)
    told, = training.end()
    assert "'lab.example.org' in the environment" in told and "http://HOST:PORT" in told
    assert rows(db_path, "SELECT status FROM runs") == [("finished",)]


# --- Runs that go on ------------------------------------------------------------------------

RESUME = TRAIN.replace('(experiment_name="remote")', '(experiment_name="remote", resume=True)')


def test_killed_job_goes_on_with_its_run_over_the_server(server, begin):
    server.start()
    first = begin(RESUME, AILAB_RUN_ID="job-1")
    first.log(6)
    wait_for(server, "running", 6)
    first.kill()
    second = begin(RESUME, AILAB_RUN_ID="job-1")
    second.log(8)                                 # from the start: it repeats six epochs
    assert second.end() == []
    wait_for(server, "finished", 8)
    assert rows(server.db_path, "SELECT run_id FROM runs") == [("job-1",)]


def test_run_that_is_alive_is_refused_over_the_server(server, begin):
    server.start()
    first = begin(RESUME, AILAB_RUN_ID="job-1")
    first.log(2)
    wait_for(server, "running", 2)
    second = begin(RESUME, AILAB_RUN_ID="job-1")
    second.log(1)
    sentence, = second.end()
    assert f"it is alive, process {first.process.pid} on " in sentence
    first.log(1)
    assert first.end() == []
    wait_until(lambda: sorted(losses(server)) == [("finished", logged(1)), ("finished", logged(3))])


def test_run_whose_id_begins_anothers_is_not_taken_for_it(server, begin):
    server.start()
    first = begin(RESUME, AILAB_RUN_ID="job-1234567")
    first.log(2)
    wait_for(server, "running", 2)
    for run_id in ("job-123456", "job-12345678", "job-12345"):
        other = begin(RESUME, AILAB_RUN_ID=run_id)
        other.log(1)
        assert other.end() == []
    wait_until(lambda: len(losses(server)) == 4)
    assert {run_id for run_id, in rows(server.db_path, "SELECT run_id FROM runs")} == {
        "job-1234567", "job-123456", "job-12345678", "job-12345"}


def test_all_is_sent_where_no_thread_can_be_started_any_more(server, begin):
    server.start()
    body = TRAIN.replace("print(train() is RESULT)", """
import threading
def refuse(self):
    raise RuntimeError("can't create new thread at interpreter shutdown")
result = train()
threading.Thread.start = refuse
run = lab_logger.start_run("late")
run.log(loss=1)
print(result is RESULT)""")
    training = begin(body)
    training.log(3)
    assert training.end() == []
    assert losses(server) == [("finished", logged(3)), ("finished", [(None, 1.0)])]


def test_what_a_killed_process_left_here_is_sent_before_its_run_goes_on(server, begin):
    first = begin(RESUME, AILAB_RUN_ID="job-1")
    first.log(5)
    first.kill()
    server.start()
    second = begin(RESUME, AILAB_RUN_ID="job-1")
    second.log(3)
    second.end()
    assert losses(server) == [("finished", [(3, 0.75), (4, 1.0), (0, 0.0), (1, 0.25), (2, 0.5)])]


def test_run_in_the_trash_of_a_server_is_not_resumed(server, begin):
    server.start()
    first = begin(RESUME, AILAB_RUN_ID="job-1")
    first.log(2)
    first.end()
    conn = ailab.open_lab(server.db_path)
    ailab.delete_run(conn, "job-1")
    conn.close()
    second = begin(RESUME, AILAB_RUN_ID="job-1")
    second.log(3)
    (told,) = second.end()
    assert "is in the trash" in told and "a run of its own" in told
    assert rows(server.db_path, "SELECT run_id = 'job-1', deleted_at IS NULL FROM runs "
                "ORDER BY timestamp") == [(1, 0), (0, 1)]
    assert ("finished", logged(3)) in losses(server)


def test_server_that_drips_its_headers_holds_no_resumed_run_back(server, begin):
    with socket.create_server(("127.0.0.1", 0)) as door:
        def drip():
            with contextlib.suppress(OSError):
                while True:
                    client = door.accept()[0]
                    threading.Thread(target=drop_by_drop, args=(client,), daemon=True).start()

        def drop_by_drop(client):
            with contextlib.suppress(OSError), client:
                for letter in b"HTTP/1.1 200 OK\r\nX-Slow: " + b"x" * 10_000:
                    client.sendall(bytes([letter]))
                    time.sleep(0.2)
        threading.Thread(target=drip, daemon=True).start()
        url = f"http://127.0.0.1:{door.getsockname()[1]}"
        training = begin(RESUME.replace("EXIT_WAIT_S =", "EXIT_WAIT_S, lab_logger.FINISH_WAIT_S =")
                         .replace("(0.05, 0.2), 1.0", "(0.05, 0.2), 1.0, 0.3"),
                         AILAB_RUN_ID="job-1", AILAB_URL=url)
        training.log(3)
        (told,) = training.end()                  # its limit is 30 s; the header takes half an hour
    assert "could not be asked (timed out" in told and "it is resumed" in told


def test_of_many_that_resume_at_once_over_the_server_one_goes_on(server, begin):
    server.start()
    many = [begin(RESUME, AILAB_RUN_ID="job-1") for _ in range(4)]
    for training in many:
        training.log(3)
    told = [training.end() for training in many]
    assert sum(len(sentences) for sentences in told) == 3
    assert all("alive" in sentence for sentences in told for sentence in sentences)
    wait_until(lambda: losses(server) == [("finished", logged(3))] * 4)
