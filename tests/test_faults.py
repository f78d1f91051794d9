"""What a fault of the lab or the process costs: a sentence on stderr, no training and no point.

Each training is a process of its own, run twice: with the logger, and with one that does nothing.
What the two print, raise and exit with must be the same. Afterwards `ailab.py doctor` takes in what
is pending, and the store holds what was logged.
"""
import contextlib
import ctypes
import os
import re
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys

import pytest
from processes import ROOT, environment, rows, train

pytestmark = pytest.mark.skipif(os.name == "nt", reason="these faults are made as POSIX makes them")

N_EPOCHS = 6
# Waits that would be too slow here: a call's end (2 s), the process's (15 s).
QUICK = """
import lab_logger
lab_logger.Run.finish.__kwdefaults__["wait_s"], lab_logger.EXIT_WAIT_S = 0.2, 0.5
"""
BODY = """
import os, sys, time
import lab_logger
RESULT, ERROR = {"accuracy": 0.5}, ValueError("bad rate")

@lab_logger.log_run(experiment_name="fault")
def train(fails):
    for epoch in range(6):
        lab_logger.log(epoch=epoch, loss=epoch / 4)
        if epoch == 2:
            middle()
    if fails:
        raise ERROR
    return RESULT

def middle():
    %s

print(train(False) is RESULT, flush=True)
try:
    train(True)
except ValueError as error:
    print(error is ERROR, error.__context__, error.__cause__, flush=True)
sys.exit(7)
"""
NO_LOGGER = """
def log_run(**ignored):
    return lambda function: function
def log(*args, **ignored):
    "Record nothing."
"""


def permissions_bind():
    """In the child of a root's test: take away what lets root write whatever its mode forbids."""
    if os.geteuid() == 0:
        for capability in (1, 2):                 # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
            ctypes.CDLL(None).prctl(24, capability, 0, 0, 0)   # PR_CAPBSET_DROP, felt after exec


@pytest.fixture
def place(tmp_path):
    """A folder of the test's own whose modes bind the trainings: place / "lab" is the lab's."""
    (tmp_path / "lab").mkdir()
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "lab_logger.py").write_text(NO_LOGGER)
    yield tmp_path
    for folder, _, _ in os.walk(tmp_path):
        os.chmod(folder, 0o700)


def run(place, body, tune=QUICK, **env):
    """Run a training with the logger and without: its (exit status, stdout, stderr)."""
    env = {"DB_PATH": str(place / "lab" / "lab.db"), "TMPDIR": str(place / "tmp"), **env}
    os.makedirs(env["TMPDIR"], exist_ok=True)
    with train(tune + body, place, before=permissions_bind, **env) as process:
        stdout, stderr = process.communicate(timeout=60)
    with train(body, place, **{**env, "PYTHONPATH": str(place / "none")}) as bare:
        expected = bare.communicate(timeout=60)[0]
    assert (process.returncode, stdout) == (bare.returncode, expected), stderr
    return process.returncode, stdout, stderr


def doctor(db_path, **env):
    done = subprocess.run([sys.executable, str(ROOT / "ailab.py"), "doctor", "--db", str(db_path)],
                          env=environment(**env), capture_output=True, text=True, timeout=60)
    assert done.stderr == ""
    return done.stdout


def taken_in(db_path, **env):
    """Let the doctor take in what is pending: (journals that it saw, those it took in)."""
    told = doctor(db_path, **env)
    seen = re.search(r"not wholly in the lab until now: (\d+) journals? of \d+ runs?,", told)
    took = re.search(r"(\d+) journals? of ended runs taken in, 0 still in use", told)
    assert took, told
    return int(seen[1]) if seen else 0, int(took[1])


def curves(db_path):
    """The points of each run, as (epoch, value) in the order of the store, by the run's status."""
    found = {}
    for run_id, status in rows(db_path, "SELECT run_id, status FROM runs"):
        assert status not in found
        found[status] = rows(db_path, "SELECT epoch, metric_value FROM run_metrics WHERE run_id = "
                                      "? AND metric_name = 'loss' ORDER BY id", run_id)
    return found


LOSSES = [(epoch, epoch / 4) for epoch in range(N_EPOCHS)]


# --- Faults of the store ------------------------------------------------------------------

class Fault:
    """One fault: `make(place)` before the training, `mend(place)` after it.

    `cause` is what the sentence says; `kept` the folder, below the test's, where points are kept.
    """

    def __init__(self, make, mend, cause, kept="lab/lab.db.journals", env=None):
        self.make, self.mend, self.cause, self.kept, self.env = make, mend, cause, kept, env or {}


def make_lab(place):
    """Make a sound lab first."""
    subprocess.run([sys.executable, "-c", "import lab_logger, os; "
                    "lab_logger.connect(os.environ['DB_PATH']).close()"], check=True,
                   env=environment(DB_PATH=str(place / "lab" / "lab.db")))


def lock(place):
    make_lab(place)
    writer = sqlite3.connect(place / "lab" / "lab.db", isolation_level=None)
    writer.execute("BEGIN IMMEDIATE")
    place.writers.append(writer)


def make_read_only(place):
    make_lab(place)
    os.chmod(place / "lab" / "lab.db", stat.S_IRUSR)


def close_folder(mode):
    def make(place):
        make_lab(place)
        os.chmod(place / "lab", mode)
    return make


def corrupt(place):
    make_lab(place)
    (place / "lab" / "lab.db").write_bytes(b"no database at all\n" * 500)


def damage(place):
    """Leave the header whole and fill the first table pages with nonsense."""
    make_lab(place)
    with open(place / "lab" / "lab.db", "r+b") as file:
        file.seek(100)
        file.write(b"\xff" * 16_000)


def nothing(place):
    """Leave all as it is."""


FAULTS = {
    "locked by another writer": Fault(
        lock, lambda place: place.writers.pop().close(), "database is locked"),
    "read-only file": Fault(
        make_read_only, lambda place: os.chmod(place / "lab" / "lab.db", 0o600),
        "attempt to write a readonly database"),
    "read-only folder": Fault(
        close_folder(0o500), lambda place: os.chmod(place / "lab", 0o700),
        "(attempt to write a readonly database|unable to open database file)",
        "home/.ai-lab/journals"),
    "permission denied": Fault(
        close_folder(0o000), lambda place: os.chmod(place / "lab", 0o700),
        "(Permission denied|unable to open database file)", "home/.ai-lab/journals"),
    "no database": Fault(
        corrupt, lambda place: os.unlink(place / "lab" / "lab.db"), "file is not a database"),
    "damaged database": Fault(
        damage, lambda place: os.unlink(place / "lab" / "lab.db"),
        "(file is not a database|database disk image is malformed)"),
    "a directory in its place": Fault(
        lambda place: os.mkdir(place / "lab" / "lab.db"),
        lambda place: os.rmdir(place / "lab" / "lab.db"), "unable to open database file"),
    "a file in the folder's place": Fault(
        lambda place: ((place / "lab").rmdir(), (place / "lab").touch()),
        lambda place: ((place / "lab").unlink(), (place / "lab").mkdir()),
        "(File exists|Not a directory|unable to open)", "home/.ai-lab/journals"),
}


class Place:
    """The test's folder, with what the faults hold open in it."""

    def __init__(self, path):
        self.path, self.writers = path, []

    def __truediv__(self, name):
        return self.path / name


@pytest.mark.parametrize("name", FAULTS)
def test_store_that_takes_nothing_in_costs_one_sentence_and_no_training(place, name):
    fault, there = FAULTS[name], Place(place)
    fault.make(there)
    code, stdout, stderr = run(place, BODY % "pass", **fault.env)
    assert (code, stdout) == (7, "True\nTrue None None\n")
    sentence, = stderr.splitlines()
    kept = place / fault.kept
    assert re.fullmatch(
        f"lab_logger: the lab '{place}/lab/lab.db' cannot take in runs at present "
        rf"\(.*{fault.cause}.*\); training goes on, every point is kept in {kept} and is "
        "taken in by the next process that opens the lab", sentence)
    assert len(list(kept.glob("*.jsonl"))) == 2
    fault.mend(there)
    db_path = place / "lab" / "lab.db"
    assert taken_in(db_path) == (2, 2)
    assert curves(db_path) == {"finished": LOSSES, "failed": LOSSES}
    assert taken_in(db_path) == (0, 0) and not list(kept.glob("*.jsonl"))


def test_store_locked_since_long_is_told_when_the_run_ends(place):
    """The drainer's own thread is in the middle of its wait for the lock, half a minute long."""
    there = Place(place)
    lock(there)
    tune = QUICK + "lab_logger.DRAIN_EVERY_S = 0.01\nlab_logger._Drainer._take_in_others = " \
                   "lambda self: True\n"
    code, stdout, stderr = run(place, BODY % "time.sleep(0.3)", tune)
    assert (code, stdout) == (7, "True\nTrue None None\n")
    sentence, = stderr.splitlines()
    assert "cannot take in runs at present (" in sentence and "locked" in sentence
    there.writers.pop().close()
    assert taken_in(place / "lab" / "lab.db") == (2, 2)
    assert curves(place / "lab" / "lab.db") == {"finished": LOSSES, "failed": LOSSES}


def test_home_that_is_missing_costs_one_sentence_and_no_training(place):
    home = place / "closed" / "home"
    home.parent.mkdir(mode=0o500)
    code, stdout, stderr = run(place, BODY % "pass", DB_PATH=None, HOME=str(home))
    assert (code, stdout) == (7, "True\nTrue None None\n")
    sentence, = stderr.splitlines()
    kept = place / "tmp" / f"ai-lab-{os.getuid()}-journals"
    assert f"the lab '{home}/.ai-lab/lab.db' cannot take in runs" in sentence
    assert "Permission denied" in sentence and f"every point is kept in {kept} and is" in sentence
    home.parent.chmod(0o700)
    db_path = home / ".ai-lab" / "lab.db"
    assert taken_in(db_path, DB_PATH=None, HOME=str(home), TMPDIR=str(place / "tmp")) == (2, 2)
    assert curves(db_path) == {"finished": LOSSES, "failed": LOSSES}


def test_no_folder_for_a_journal_anywhere_says_that_the_run_goes_unrecorded(place):
    closed = place / "closed"
    closed.mkdir(mode=0o500)
    tune = QUICK + f"import tempfile; tempfile.tempdir = {str(closed)!r}\n"
    code, stdout, stderr = run(place, BODY % "pass", tune, DB_PATH=str(closed / "lab.db"),
                               HOME=str(closed))
    assert (code, stdout) == (7, "True\nTrue None None\n")
    assert "no journal can be written" in stderr and "unrecorded" in stderr
    assert all(line.startswith("lab_logger: ") for line in stderr.splitlines())
    assert len(stderr.splitlines()) <= 4          # of two runs


# --- A full disk --------------------------------------------------------------------------

@contextlib.contextmanager
def small_disk(folder, n_bytes=8 << 20):
    """Mount a file system of that size at `folder`; skip where that is not allowed."""
    folder.mkdir(exist_ok=True)
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={n_bytes}", "tmpfs", str(folder)],
                          capture_output=True, text=True) if shutil.which("mount") else None
    if done is None or done.returncode:
        pytest.skip("no file system can be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


FULL = BODY.replace("range(6)", "range(3000)") % """
    with open(FILLER, "wb", 0) as file:
        try:
            while file.write(bytes(1 << 12)):
                pass
        except OSError as error:
            print(error.strerror)
""".strip()
MANY = [(epoch, epoch / 4) for epoch in range(3000)]


def until_late(body, mend):
    """Undo at epoch 2900 what a run's middle did."""
    return body.replace("        if epoch == 2:", f"        if epoch == 2900:\n            {mend}\n"
                        "        if epoch == 2:")


def assert_all_arrived(place, stderr):
    sentence, = stderr.splitlines()
    assert sentence.startswith("lab_logger: ") and "taken in" in sentence
    db_path = place / "lab" / "lab.db"
    taken_in(db_path)
    assert curves(db_path) == {"finished": MANY, "failed": MANY}
    return sentence


def test_disk_that_is_full_for_a_while_loses_nothing(place):
    with small_disk(place / "lab"):
        code, stdout, stderr = run(place, f"FILLER = '{place}/lab/filler'"
                                   + until_late(FULL, "os.unlink(FILLER)"))
        assert (code, stdout.count("No space left on device")) == (7, 2)
        assert "No space left on device" in assert_all_arrived(place, stderr)


def test_disk_that_stays_full_keeps_every_point_elsewhere(place):
    with small_disk(place / "lab"):
        code, stdout, stderr = run(place, f"FILLER = '{place}/lab/filler'" + FULL)
        assert (code, stdout.count("No space left on device")) == (7, 2)
        os.unlink(place / "lab" / "filler")
        assert "No space left on device" in assert_all_arrived(place, stderr)


def test_file_that_may_grow_no_further_for_a_while_loses_nothing(place):
    """RLIMIT_FSIZE: no folder takes more, so the points wait in memory."""
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (%s, -1))"
    code, stdout, stderr = run(place, until_late(
        BODY.replace("range(6)", "range(3000)") % (limit % 20_000), limit % -1))
    assert (code, stdout) == (7, "True\nTrue None None\n")
    assert "File too large" in assert_all_arrived(place, stderr)


def test_points_for_which_there_was_no_room_to_the_end_are_told_as_lost(place):
    body = BODY.replace("range(6)", "range(3000)") % (
        "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, -1))")
    code, stdout, stderr = run(place, body)
    assert (code, stdout) == (7, "True\nTrue None None\n")
    told, *lost = stderr.splitlines()
    assert told.startswith("lab_logger: ") and "File too large" in told
    assert 1 <= len(lost) <= 2 and all(  # of two runs
        line.startswith("lab_logger: ") and "lost" in line for line in lost)
    taken_in(place / "lab" / "lab.db")
    for run_id, in rows(place / "lab" / "lab.db", "SELECT run_id FROM runs"):
        points = rows(place / "lab" / "lab.db", "SELECT epoch, metric_value FROM run_metrics WHERE "
                                                "run_id = ? ORDER BY id", run_id)
        assert points == MANY[:len(points)] != MANY            # what was written is whole


# --- The journal's folder -----------------------------------------------------------------

def test_journal_folder_removed_while_running_loses_nothing(place):
    """Also what the lab had not yet taken in: the logger writes it anew."""
    body = BODY % """
    import shutil
    shutil.rmtree(os.environ["DB_PATH"] + ".journals", ignore_errors=True)
""".strip()
    code, stdout, stderr = run(place, body)
    assert (code, stdout) == (7, "True\nTrue None None\n")
    sentence, *more = stderr.splitlines()
    assert "was removed while it was written" in sentence and "taken in" in sentence
    assert [line.split(" of run ")[0] for line in more] in ([], [sentence.split(" of run ")[0]])
    db_path = place / "lab" / "lab.db"
    assert taken_in(db_path) == (0, 0)
    assert curves(db_path) == {"finished": LOSSES, "failed": LOSSES}


def test_journal_folder_removed_under_a_run_that_is_then_killed_loses_nothing(place):
    body = BODY % """
    import shutil, signal
    shutil.rmtree(os.environ["DB_PATH"] + ".journals")
    until = time.monotonic() + 60
    while not lab_logger._warned and time.monotonic() < until:     # the drainer looks now and then
        time.sleep(0.05)
    os.kill(os.getpid(), signal.SIGKILL)
""".strip()
    with train(body, place, DB_PATH=str(place / "lab" / "lab.db")) as process:
        stderr = process.communicate(timeout=60)[1]
    assert process.returncode == -signal.SIGKILL
    assert len(stderr.splitlines()) == 1 and "was removed while it was written" in stderr
    taken_in(place / "lab" / "lab.db")
    assert curves(place / "lab" / "lab.db") == {"killed": LOSSES[:3]}


# --- Forks and threads --------------------------------------------------------------------

@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_worker_processes_in_the_middle_of_a_run_change_nothing(place, method):
    """As a DataLoader's: they compute, and one that logs is told that it does not write the run."""
    (place / "job.py").write_text(f"""
import multiprocessing, os, sys
import lab_logger

def load(i):
    return i * i

def load_and_log(i):
    lab_logger.log(epoch=99, loss=99.0)
    return os.getpid()

@lab_logger.log_run(experiment_name="fault")
def train():
    for epoch in range(6):
        lab_logger.log(epoch=epoch, loss=epoch / 4)
        if epoch == 2:
            with multiprocessing.get_context({method!r}).Pool(2) as pool:
                assert pool.map(load, range(50)) == [i * i for i in range(50)]
        if epoch == 3 and len(sys.argv) > 1:
            with multiprocessing.get_context({method!r}).Pool(1) as pool:
                pool.map(load_and_log, range(5))
    return "done"

if __name__ == "__main__":
    print(train())
""")
    db_path = place / "lab" / "lab.db"
    for n_runs, arguments in enumerate(([], ["log too"]), start=1):
        done = subprocess.run([sys.executable, "job.py", *arguments], cwd=place, text=True,
                              env=environment(DB_PATH=str(db_path)), capture_output=True,
                              timeout=60)
        assert (done.returncode, done.stdout) == (0, "done\n")
        assert len(done.stderr.splitlines()) == len(arguments)
        assert rows(db_path, "SELECT status, count(*) FROM runs GROUP BY 1") == [
            ("finished", n_runs)]
    why = "log from the process that began it" if method == "fork" else "log() did nothing"
    assert why in done.stderr
    for run_id, in rows(db_path, "SELECT run_id FROM runs"):
        assert rows(db_path, "SELECT epoch, metric_value FROM run_metrics WHERE run_id = ? "
                             "ORDER BY id", run_id) == LOSSES
    assert taken_in(db_path) == (0, 0)


def test_child_forked_in_the_middle_that_ends_in_any_way_leaves_the_run_alone(place):
    body = BODY % """
    for end in (lambda: os._exit(0), lambda: sys.exit(0), lambda: 1 / 0):
        if not (pid := os.fork()):
            os.close(2)                           # of the traceback
            end()
        os.waitpid(pid, 0)
""".strip()
    with train(body, place, DB_PATH=str(place / "lab" / "lab.db")) as process:
        stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr) == (7, "")
    assert stdout.splitlines()[-2:] == ["True", "True None None"]
    assert taken_in(place / "lab" / "lab.db") == (0, 0)
    assert curves(place / "lab" / "lab.db")["failed"] == LOSSES


def test_child_that_lives_on_after_the_run_has_ended_holds_nothing_up(place):
    """A forked child keeps the journal's descriptor; the run ends and is taken in all the same."""
    body = BODY % """
    if not os.fork():
        os.close(1), os.close(2)
        time.sleep(3)
        os._exit(0)
""".strip()
    with train(body, place, DB_PATH=str(place / "lab" / "lab.db")) as process:
        assert process.communicate(timeout=60) == ("True\nTrue None None\n", "")
    assert process.returncode == 7
    assert curves(place / "lab" / "lab.db") == {"finished": LOSSES, "failed": LOSSES}


def test_threads_of_one_run_lose_and_mix_no_point(place):
    body = """
import threading
import lab_logger
with lab_logger.start_run("threads") as run:
    def work(name):
        for step in range(500):
            run.log({name: step / 2}, step=step)
    threads = [threading.Thread(target=work, args=(f"m{i}",)) for i in range(8)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
"""
    with train(body, place, DB_PATH=str(place / "lab" / "lab.db")) as process:
        assert process.communicate(timeout=60) == ("", "")
    for i in range(8):
        assert rows(place / "lab" / "lab.db", "SELECT step, metric_value FROM run_metrics WHERE "
                    "metric_name = ? ORDER BY id", f"m{i}") == [(n, n / 2) for n in range(500)]
    assert rows(place / "lab" / "lab.db", "SELECT count(*) FROM run_metrics") == [(4000,)]


# --- How processes end --------------------------------------------------------------------

@pytest.mark.parametrize("end, code", [
    ("os._exit(5)", 5),
    ("import signal; os.kill(os.getpid(), signal.SIGTERM); time.sleep(9)", -signal.SIGTERM),
    ("import signal; os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL),
    ("import ctypes; ctypes.string_at(0)", -signal.SIGSEGV),
])
def test_process_that_ends_without_a_word_says_nothing_and_loses_nothing(place, end, code):
    assert run(place, BODY % end) == (code, "", "")
    db_path = place / "lab" / "lab.db"
    assert taken_in(db_path) == (1, 1)
    assert curves(db_path) == {"killed": LOSSES[:3]}
    (reason, ended, began), = rows(db_path, "SELECT end_reason, ended_at, timestamp FROM runs")
    assert re.fullmatch(r"killed without a word: process \d+ on \S+ is gone, last sign of life "
                        r"20\d\d-\d\d-\d\d \d\d:\d\d:\d\d UTC", reason)
    assert ended >= began


def test_ctrl_c_ends_the_process_as_without_the_logger(place):
    code, stdout, stderr = run(
        place, BODY % "import signal; os.kill(os.getpid(), signal.SIGINT); time.sleep(9)")
    assert (code, stdout) == (-signal.SIGINT, "")
    assert stderr.splitlines()[0].startswith("Traceback") and "lab_logger: " not in stderr
    assert stderr.splitlines()[-1] == "KeyboardInterrupt"
    db_path = place / "lab" / "lab.db"
    assert taken_in(db_path) == (0, 0)            # it was taken in before the process ended
    assert curves(db_path) == {"killed": LOSSES[:3]}
    (reason,), = rows(db_path, "SELECT end_reason FROM runs")
    assert re.match(r"interrupted: KeyboardInterrupt; at <string>:\d+ in middle, from <string>:\d+ "
                    r"in train", reason)


def test_clock_set_back_in_the_middle_loses_nothing_and_no_duration_is_negative(place):
    code, stdout, stderr = run(
        place, BODY % "real = time.time; time.time = lambda: real() - 7200; time.sleep(0.7)")
    assert (code, stdout, stderr) == (7, "True\nTrue None None\n", "")
    db_path = place / "lab" / "lab.db"
    assert taken_in(db_path) == (0, 0)
    assert curves(db_path) == {"finished": LOSSES, "failed": LOSSES}
    for duration, begun, ended in rows(db_path, "SELECT duration_s, timestamp, ended_at FROM runs"):
        assert 0.7 <= duration < 60 and ended > begun


def test_clock_set_back_and_then_killed_is_closed_no_earlier_than_it_began(place):
    code, _, stderr = run(place, BODY % (
        "real = time.time; time.time = lambda: real() - 7200; "
        "lab_logger.log(epoch=3, loss=0.75); os._exit(5)"))
    assert (code, stderr) == (5, "")
    taken_in(place / "lab" / "lab.db")
    assert curves(place / "lab" / "lab.db") == {"killed": LOSSES[:4]}
    (duration, begun, ended), = rows(place / "lab" / "lab.db",
                                     "SELECT duration_s, timestamp, ended_at FROM runs")
    assert duration >= 0 and ended >= begun
