"""The training examples: they really train, record what they say, and survive bad input and Ctrl-C.

Each test copies the two scripts and what they import into a directory of its own, so that
checkpoints never land in the checkout.
"""
import csv
import importlib.util
import json
import math
import os
import shutil
import signal
import sqlite3
import subprocess
import sys

import joblib
import numpy as np
import pytest
from conftest import ROOT
from processes import TOKEN, LabServer, rows, wait_until
from sklearn.datasets import load_iris
from sklearn.linear_model import SGDClassifier
from sklearn.metrics import hinge_loss, log_loss

HEADER = ["epoch", "train_loss", "val_loss", "accuracy", "f1"]      # the spec's four, then macro F1
SMALL_SWEEP = ["--models", "linear_svm", "perceptron", "--seeds", "0", "1", "--learning_rates",
               "0.1", "--n_epochs", "3", "--n_jobs", "2"]


@pytest.fixture
def project(tmp_path):
    """A directory with what the examples need, as the checkout lays it out."""
    return copy_project(tmp_path / "project")


def copy_project(place):
    shutil.copytree(ROOT / "examples", place / "examples",
                    ignore=shutil.ignore_patterns("checkpoints", "__pycache__"))
    for name in ("lab_logger.py", "ailab.py"):
        shutil.copy(ROOT / name, place)
    return place


def start(project, script, *arguments, before=""):
    """Start a script from outside the project, in a process group of its own."""
    path = f"{project}/examples/train_model/{script}"
    code = f"import sys, runpy; {before}; sys.path.insert(0, {os.path.dirname(path)!r}); " \
           f"runpy.run_path({path!r}, run_name='__main__')"
    command = [sys.executable, *(["-c", code] if before else [path]), *arguments]
    return subprocess.Popen(command, cwd=project.parent, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, start_new_session=True)


def run(project, script, *arguments, before=""):
    """Run a script to its end, after a line of Python: (exit code, stdout, stderr)."""
    job = start(project, script, *arguments, before=before)
    stdout, stderr = job.communicate(timeout=60)
    return job.returncode, stdout, stderr


def living(group):
    """Commands of the processes of a process group that still run; a zombie does not."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
                state, _, pgid = file.read().rpartition(")")[2].split()[:3]
            with open(f"/proc/{pid}/cmdline", encoding="utf-8", errors="replace") as file:
                command = file.read().replace("\0", " ")
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(pgid) == group and state not in "ZX":
            found.append(command)
    return found


# --- run.py -------------------------------------------------------------------------

@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """One run by the spec's command line (section 5.1), from another directory: its outcome."""
    place = copy_project(tmp_path_factory.mktemp("trained"))
    elsewhere, db_path = place / "elsewhere", place / "lab.db"
    elsewhere.mkdir()
    done = subprocess.run(
        [sys.executable, "../examples/train_model/run.py", "--experiment_name", "iris_svm",
         "--model_name", "linear_svm", "--n_epochs", "30", "--learning_rate", "0.01"],
        cwd=elsewhere, env={**os.environ, "DB_PATH": str(db_path)}, capture_output=True, text=True,
        timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    conn = sqlite3.connect(db_path)
    conn.row_factory = sqlite3.Row
    record = dict(conn.execute("SELECT * FROM runs").fetchone())
    points = conn.execute("SELECT epoch, metric_name, metric_value FROM run_metrics").fetchall()
    conn.close()
    return {"place": place, "stdout": done.stdout, "record": record,
            "points": [tuple(point) for point in points]}


def test_the_specs_command_line_records_one_finished_run_with_its_names(trained):
    record = trained["record"]
    columns = ("status", "experiment_name", "model_name", "task_name", "dataset_id")
    assert [record[column] for column in columns] == [
        "finished", "iris_svm", "linear_svm", "classification", "iris"]
    params = json.loads(record["params_json"])
    assert (params["n_epochs"], params["learning_rate"], params["test_size"]) == (30, 0.01, 0.25)


def test_training_reaches_a_real_accuracy_with_finite_losses(trained):
    final = json.loads(trained["record"]["final_metrics_json"])
    assert final["accuracy"] > 0.8 and final["f1"] > 0.8
    assert all(math.isfinite(value) for _, _, value in trained["points"])
    losses = [value for _, name, value in trained["points"] if name == "train_loss"]
    assert losses[-1] < 0.7 * losses[0]


def test_every_epoch_has_a_row_per_metric_in_the_store(trained):
    for name in HEADER[1:]:
        epochs = [epoch for epoch, metric, _ in trained["points"] if metric == name]
        assert epochs == list(range(1, 31))


def test_the_artifacts_are_recorded_by_their_absolute_paths(trained):
    csv_path, model_path = json.loads(trained["record"]["artifacts_json"])
    folder = str(trained["place"] / "examples" / "train_model" / "checkpoints")
    assert csv_path.startswith(f"{folder}/linear_svm_metrics_") and csv_path.endswith(".csv")
    assert model_path.startswith(f"{folder}/linear_svm_model_") and model_path.endswith(".joblib")


def test_the_metrics_csv_has_the_specs_header_and_the_logged_values(trained):
    csv_path = json.loads(trained["record"]["artifacts_json"])[0]
    with open(csv_path, newline="", encoding="utf-8") as file:
        table = list(csv.reader(file))
    assert table[0] == HEADER and len(table) == 31
    logged = [value for _, name, value in trained["points"] if name == "val_loss"]
    assert [float(row[2]) for row in table[1:]] == logged


def test_the_saved_model_predicts_on_raw_features(trained):
    model = joblib.load(json.loads(trained["record"]["artifacts_json"])[1])
    features, labels = load_iris(return_X_y=True)
    assert (model.predict(features) == labels).mean() > 0.8


def test_it_prints_one_line_of_progress_with_units_and_the_run_id_last(trained):
    lines = trained["stdout"].splitlines()
    assert lines[0].startswith("epoch 30/30: train_loss 0.") and lines[0].endswith(" ms")
    assert lines[-1] == f"run {trained['record']['run_id']}"
    assert len(lines) == 4


@pytest.mark.parametrize("arguments, sentence", [
    (["--n_epochs", "0"], "n_epochs is 0; give a whole number from 1"),
    (["--n_epochs", "two"], "argument --n_epochs: invalid int value: 'two'"),
    (["--learning_rate", "-1"], "learning_rate is -1.0; give a number above 0"),
    (["--learning_rate", "nan"], "learning_rate is nan; give a number above 0"),
    (["--test_size", "2"], "test_size is 2.0; give a fraction from 0.1 to 0.9"),
    (["--random_state", "-1"],
     "random_state is -1; give a whole number from 0 to 4294967295"),
    (["--model_name", "resnet"], "model_name is 'resnet'; "
     "give one of logistic_regression, linear_svm, perceptron"),
    (["--dataset", "mnist"], "dataset is 'mnist'; give one of iris, wine, breast_cancer, digits"),
])
def test_a_bad_argument_is_one_sentence_and_leaves_no_run(train, capsys, db_path, arguments,
                                                          sentence):
    with pytest.raises(SystemExit) as stopped:
        train.main(arguments)
    assert stopped.value.code == 2
    assert capsys.readouterr().err == f"run.py: error: {sentence}\n"
    assert not os.path.exists(db_path)


# --- Inside run.py --------------------------------------------------------------------

@pytest.fixture
def train(project, monkeypatch):
    """The module examples/train_model/run.py, loaded from the copy."""
    monkeypatch.setattr(sys, "path", list(sys.path))     # it puts the copy's top level first
    spec = importlib.util.spec_from_file_location("run", project / "examples/train_model/run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("dataset", ["iris", "wine", "breast_cancer", "digits"])
@pytest.mark.parametrize("model", ["logistic_regression", "linear_svm", "perceptron"])
def test_every_model_learns_every_data_set(train, model, dataset):
    result = train.train_model(model_name=model, dataset_id=dataset, n_epochs=10, learning_rate=0.1)
    assert list(result) == [*HEADER[1:], "artifacts"]
    assert result["accuracy"] > 0.75
    assert math.isfinite(result["val_loss"]) and result["val_loss"] >= 0


@pytest.mark.parametrize("n_classes", [2, 3])
@pytest.mark.parametrize("loss", ["log_loss", "hinge", "perceptron"])
def test_the_mean_loss_agrees_with_an_independent_reading(train, loss, n_classes):
    generator = np.random.default_rng(0)
    features, labels = generator.normal(size=(60, 4)), np.arange(60) % n_classes
    model = SGDClassifier(loss=loss, random_state=0).fit(features, labels)
    scores = model.decision_function(features)
    if loss == "log_loss":
        expected = log_loss(labels, model.predict_proba(features))
    elif loss == "hinge":
        expected = hinge_loss(labels, scores)
    elif n_classes == 2:                          # the size of the score of each wrong prediction
        expected = np.mean(np.abs(scores) * (model.predict(features) != labels))
    else:                                         # how far the highest score is above the label's
        expected = np.mean(scores.max(axis=1) - scores[np.arange(60), labels])
    assert train.mean_loss(model, features, labels) == pytest.approx(expected)


def test_the_scaler_never_sees_the_validation_part(train):
    path = train.train_model(n_epochs=1, random_state=3)["artifacts"][1]
    features, labels = load_iris(return_X_y=True)
    seen = joblib.load(path)[0].n_samples_seen_
    assert (len(features), seen) == (150, 112)    # a quarter, rounded up, is held out


def test_runs_that_save_in_the_same_microsecond_get_names_of_their_own(train, monkeypatch):
    stamps = iter([1_733_000_000_000_000_000] * 2 + [1_733_000_000_000_001_000])
    monkeypatch.setattr(train.time, "time_ns", lambda: next(stamps))
    row = dict.fromkeys(HEADER, 1)
    first, second = (train.save("perceptron", "a model", [row]) for _ in range(2))
    assert [os.path.basename(path) for path in first + second] == [
        "perceptron_metrics_1733000000000000.csv", "perceptron_model_1733000000000000.joblib",
        "perceptron_metrics_1733000000000001.csv", "perceptron_model_1733000000000001.joblib"]


def test_a_call_with_a_bad_argument_raises_the_same_sentence(train):
    with pytest.raises(ValueError, match="n_epochs is 0; give a whole number from 1"):
        train.train_model(n_epochs=0)


# --- sweep.py -------------------------------------------------------------------------

def test_a_sweep_in_two_processes_records_every_run(project, db_path):
    code, stdout, stderr = run(project, "sweep.py", *SMALL_SWEEP)
    assert (code, stdout.split(" in ")[0]) == (0, "4 of 4 runs finished")
    assert stdout.endswith(f", recorded in {db_path}\n")
    assert len(stderr.splitlines()) == 4 and stderr.startswith("1/4 ")
    found = rows(db_path, "SELECT experiment_name, status, count(*), count(DISTINCT pid) > 0 "
                          "FROM runs GROUP BY 1, 2 ORDER BY 1")
    assert found == [("iris_linear_svm_sweep_v1", "finished", 2, 1),
                     ("iris_perceptron_sweep_v1", "finished", 2, 1)]
    assert rows(db_path, "SELECT count(*) FROM run_metrics") == [(4 * 3 * 4,)]
    artifacts = [json.loads(row[0]) for row in rows(db_path, "SELECT artifacts_json FROM runs")]
    assert len({path for pair in artifacts for path in pair}) == 8


def test_the_runs_of_a_sweep_come_from_worker_processes(project, db_path):
    job = start(project, "sweep.py", *SMALL_SWEEP)
    job.communicate(timeout=60)
    pids = {row[0] for row in rows(db_path, "SELECT pid FROM runs")}
    assert pids and job.pid not in pids


def test_a_failing_run_stops_no_other_and_is_listed(project, db_path):
    code, stdout, stderr = run(project, "sweep.py", "--models", "logistic_regression",
                               "--seeds", "0", "--learning_rates", "1e308", "0.1")
    assert code == 1
    assert stdout.startswith("1 of 2 runs finished")
    assert "1 failed:\n  logistic_regression, seed 0, learning rate 1e+308: ValueError: " in stderr
    assert "Traceback" not in stderr
    assert rows(db_path, "SELECT status FROM runs ORDER BY status") == [("failed",), ("finished",)]


@pytest.mark.parametrize("arguments, sentence", [
    (["--n_jobs", "0"], "n_jobs is 0; give a whole number from 1, or -1 for all CPUs"),
    (["--models", "perceptron", "resnet"], "model_name is 'resnet'; "
     "give one of logistic_regression, linear_svm, perceptron"),
    (["--learning_rates", "0.1", "0"], "learning_rate is 0.0; give a number above 0"),
])
def test_a_bad_argument_of_the_sweep_is_one_sentence(project, db_path, arguments, sentence):
    assert run(project, "sweep.py", *arguments) == (2, "", f"sweep.py: error: {sentence}\n")
    assert not os.path.exists(db_path)


def start_long_sweep(project, db_path):
    """Start 27 long runs and wait until one is done and another not half way: (sweep, its pid)."""
    job = start(project, "sweep.py", "--n_jobs", "2", "--n_epochs", "300")
    assert job.stderr.readline().startswith("1/27 ")
    query = ("SELECT pid FROM runs JOIN run_metrics USING (run_id) WHERE status = 'running' "
             "GROUP BY run_id HAVING max(epoch) < 150")
    wait_until(lambda: rows(db_path, query))
    return job, rows(db_path, query)[0][0]


def test_ctrl_c_leaves_finished_runs_finished_the_others_killed_and_no_process(project, db_path):
    job = start_long_sweep(project, db_path)[0]
    os.killpg(job.pid, signal.SIGINT)
    stdout, stderr = job.communicate(timeout=60)
    assert job.returncode == 130
    assert stdout == "" and "Traceback" not in stderr
    assert stderr.splitlines()[-1].startswith("interrupted after ")
    wait_until(lambda: not living(job.pid), limit_s=30)
    statuses = dict(rows(db_path, "SELECT status, count(*) FROM runs GROUP BY status"))
    assert set(statuses) == {"finished", "killed"}
    assert statuses["finished"] >= 1 and 1 <= statuses["killed"] <= 2


def test_a_worker_that_dies_is_told_in_one_sentence(project, db_path):
    job, worker = start_long_sweep(project, db_path)
    os.kill(worker, signal.SIGKILL)
    stderr = job.communicate(timeout=60)[1]
    assert job.returncode == 1
    assert "Traceback" not in stderr and "a worker process died after " in stderr
    assert rows(db_path, "SELECT count(*) FROM runs WHERE status = 'running'") == [(0,)]


def test_ctrl_c_on_a_sweep_that_logs_elsewhere_records_the_killed_runs_there(project, tmp_path,
                                                                             monkeypatch):
    server = LabServer(tmp_path / "server.db").start()
    try:
        for key, value in server.env.items():
            monkeypatch.setenv(key, value)
        job = start_long_sweep(project, server.db_path)[0]
        os.killpg(job.pid, signal.SIGINT)
        stdout, stderr = job.communicate(timeout=60)
    finally:
        server.kill()
    assert (job.returncode, stdout) == (130, "")
    assert stderr.splitlines()[-1].startswith("interrupted after ") and TOKEN not in stderr
    statuses = dict(rows(server.db_path, "SELECT status, count(*) FROM runs GROUP BY status"))
    assert set(statuses) == {"finished", "killed"} and 1 <= statuses["killed"] <= 2


# --- sweep.py --backend dask ------------------------------------------------------------

class Cluster:
    """A Dask scheduler and workers as processes on loopback, each in a folder of its own."""

    def __init__(self, place):
        self.place, self.processes, self.workers = place, [], []
        self.scheduler = self.start("scheduler", [
            "-m", "dask", "scheduler", "--port", "0", "--host", "127.0.0.1",
            "--scheduler-file", "../file.json"])
        wait_until((place / "file.json").exists)
        self.address = json.loads((place / "file.json").read_text())["address"]

    def start(self, name, arguments, **env):
        folder = self.place / name
        folder.mkdir(parents=True)
        env = {**os.environ, "DB_PATH": str(folder / "own.db"), **env}
        with open(folder / "log", "w") as log:
            self.processes.append(subprocess.Popen([sys.executable, *arguments, "--no-dashboard"],
                                                   cwd=folder, env=env, stdout=log, stderr=log))
        return self.processes[-1]

    def add_worker(self, host=None):
        """Start a worker, on this host or on one that says to be another."""
        code = "import os, sys; from distributed.cli.dask_worker import main; name = " \
               f"{host!r}; told = list(os.uname()); told[1] = name or told[1]; " \
               "os.uname = lambda: os.uname_result(told); main(sys.argv[1:])"
        name = f"worker{len(self.workers)}"
        self.workers.append(self.start(name, [
            "-c", code, self.address, "--no-nanny", "--nthreads", "1", "--local-directory", "."]))
        return self

    def stop(self):
        for process in self.processes:
            process.kill()
            process.wait()


@pytest.fixture
def cluster(tmp_path):
    running = Cluster(tmp_path / "cluster")
    yield running
    running.stop()


@pytest.fixture
def quick(project):
    """The project with a sweep that waits a second for the cluster, not ten."""
    script = project / "examples/train_model/cluster.py"
    text = script.read_text().replace("WAIT_S = 10.0 ", "WAIT_S = 1.0 ")
    assert "WAIT_S = 1.0 " in text
    script.write_text(text)
    return project


def on(cluster, *arguments):
    return "--backend", "dask", "--scheduler", cluster.address, *arguments


def test_a_sweep_on_a_dask_cluster_records_every_run_at_the_server_of_ailab_url(
        project, cluster, tmp_path, monkeypatch):
    cluster.add_worker().add_worker()
    server = LabServer(tmp_path / "server.db").start()
    try:
        for key, value in server.env.items():
            monkeypatch.setenv(key, value)
        code, stdout, stderr = run(project, "sweep.py", *on(cluster, *SMALL_SWEEP))
        assert (code, stdout.split(" in ")[0]) == (0, "4 of 4 runs finished"), stderr
        assert stdout.endswith(f", recorded in {server.url}\n")
        assert len(stderr.splitlines()) == 4 and stderr.startswith("1/4 ")
        query = ("SELECT experiment_name, status, count(*), count(received_from) FROM runs "
                 "GROUP BY 1, 2 ORDER BY 1")
        expected = [("iris_linear_svm_sweep_v1", "finished", 2, 2),
                    ("iris_perceptron_sweep_v1", "finished", 2, 2)]
        wait_until(lambda: rows(server.db_path, query) == expected, limit_s=30)
    finally:
        server.kill()
    points = "SELECT count(*) FROM run_metrics WHERE metric_name NOT LIKE 'system/%'"
    assert rows(server.db_path, points) == [(4 * 3 * 4,)]
    pids = {row[0] for row in rows(server.db_path, "SELECT pid FROM runs")}
    assert pids <= {worker.pid for worker in cluster.workers} and len(pids) == 2
    for cwd, artifacts in rows(server.db_path, "SELECT cwd, artifacts_json FROM runs"):
        assert cwd.startswith(f"{cluster.place}/worker")
        assert all(path.startswith(f"{cwd}/checkpoints/perceptron_") or path.startswith(
            f"{cwd}/checkpoints/linear_svm_") for path in json.loads(artifacts))
        assert all(map(os.path.isfile, json.loads(artifacts)))
    everything = stdout + stderr + "".join(
        path.read_text(errors="replace") for path in cluster.place.rglob("log"))
    assert TOKEN not in everything
    assert not list(cluster.place.rglob("own.db"))


def test_without_ailab_url_workers_elsewhere_are_told_of_and_record_into_db_path(project, cluster,
                                                                                 db_path):
    cluster.add_worker("far-away")
    code, stdout, stderr = run(project, "sweep.py", *on(cluster, *SMALL_SWEEP))
    assert (code, stdout.split(", recorded")[1]) == (0, f" in {db_path}\n")
    assert stderr.splitlines()[0] == (
        f"sweep.py: the workers on far-away record into {db_path} there, which is another lab than "
        "here unless shared; for one lab run `ailab.py serve --host 0.0.0.0` here and set "
        "AILAB_URL to this machine's address and AILAB_TOKEN")
    assert rows(db_path, "SELECT hostname, pid, status, count(*) FROM runs GROUP BY 1, 2, 3") == [
        ("far-away", cluster.workers[0].pid, "finished", 4)]
    assert not list(cluster.place.rglob("own.db"))


def start_sweep_on(project, cluster, db_path, n_epochs):
    """Start a sweep and wait until a run has begun: (sweep, pid of that run's worker)."""
    job = start(project, "sweep.py", *on(cluster, "--models", "perceptron", "--dataset", "digits",
                                         "--seeds", "0", "1", "--n_epochs", str(n_epochs)))
    query = "SELECT pid FROM runs JOIN run_metrics USING (run_id) WHERE status = 'running'"
    begun = wait_until(lambda: os.path.exists(db_path) and rows(
        db_path, "SELECT 1 FROM sqlite_master WHERE name = 'run_metrics'") and rows(db_path, query))
    return job, begun[0][0]


def test_a_run_whose_dask_worker_dies_is_trained_again_by_another(project, cluster, db_path):
    cluster.add_worker().add_worker()
    job, worker = start_sweep_on(project, cluster, db_path, n_epochs=40)
    os.kill(worker, signal.SIGKILL)
    stdout, stderr = job.communicate(timeout=60)
    assert (job.returncode, stdout.split(" in ")[0]) == (0, "6 of 6 runs finished"), stderr
    assert "Traceback" not in stderr
    finished = rows(db_path, "SELECT pid FROM runs WHERE status = 'finished'")
    assert len(finished) >= 6 and set(finished) != {(worker,)}
    assert rows(db_path, "SELECT pid FROM runs WHERE status = 'running'") == [(worker,)]
    subprocess.run([sys.executable, project / "ailab.py", "doctor"], stdout=subprocess.DEVNULL)
    assert rows(db_path, "SELECT status FROM runs WHERE end_reason LIKE 'killed without a word: "
                         "process ' || ? || ' on % is gone, %'", worker) == [("killed",)]


def test_when_the_last_dask_worker_dies_it_is_one_sentence(quick, cluster, db_path):
    cluster.add_worker()
    job, worker = start_sweep_on(quick, cluster, db_path, n_epochs=100_000)
    os.kill(worker, signal.SIGKILL)
    stdout, stderr = job.communicate(timeout=60)
    assert (job.returncode, stdout) == (1, "")
    assert stderr == (f"no worker is left at '{cluster.address}' after 0 of 6 runs; how those "
                      "under way end on their workers is recorded\n")


def test_when_the_dask_scheduler_dies_it_is_one_sentence(quick, cluster, db_path):
    cluster.add_worker()
    job, _ = start_sweep_on(quick, cluster, db_path, n_epochs=100_000)
    cluster.scheduler.kill()
    stdout, stderr = job.communicate(timeout=60)
    assert (job.returncode, stdout) == (1, "")
    assert stderr == (f"the scheduler at '{cluster.address}' went away after 0 of 6 runs; how "
                      "those under way end on their workers is recorded\n")
    assert set(rows(db_path, "SELECT status FROM runs")) == {("running",)}       # they go on


def test_ctrl_c_on_dask_begins_no_more_runs_and_lets_those_under_way_end(project, cluster, db_path):
    cluster.add_worker()
    job, _ = start_sweep_on(project, cluster, db_path, n_epochs=60)
    os.killpg(job.pid, signal.SIGINT)
    stdout, stderr = job.communicate(timeout=60)
    assert (job.returncode, stdout) == (130, "")
    n_done = len(stderr.splitlines()) - 1
    assert stderr.splitlines()[-1] == (f"interrupted after {n_done} of 6 runs; how those under "
                                       "way end on their workers is recorded")
    wait_until(lambda: not rows(db_path, "SELECT 1 FROM runs WHERE status = 'running'"))
    statuses = rows(db_path, "SELECT status, count(*) FROM runs GROUP BY status")
    assert statuses[0][0] == "finished" and 1 <= statuses[0][1] < 6 and len(statuses) == 1


def test_a_cluster_that_cannot_train_is_one_sentence(quick, cluster, db_path):
    gone = Cluster(cluster.place / "gone")
    gone.stop()
    for target, sentence in (
            (gone, f"no Dask scheduler answers at '{gone.address}' ("),
            (cluster, f"no worker at '{cluster.address}' within 1 s: start some with `dask worker "
                      f"{cluster.address}`\n")):
        code, stdout, stderr = run(quick, "sweep.py", *on(target))
        assert (code, stdout) == (1, "")
        assert stderr.startswith(f"sweep.py: {sentence}") and len(stderr.splitlines()) == 1
    assert not os.path.exists(db_path)


@pytest.mark.parametrize("arguments, before, sentence", [
    (["--backend", "dask"], "",
     "--backend dask and --scheduler ADDRESS go together; `dask scheduler` prints its address"),
    (["--scheduler", "tcp://here:1"], "",
     "--backend dask and --scheduler ADDRESS go together; `dask scheduler` prints its address"),
    (["--backend", "dask", "--scheduler", "here"], "",
     "scheduler is 'here'; give tcp://HOST:PORT, as `dask scheduler` prints it"),
    (["--backend", "dask", "--scheduler", "here:1"], "sys.modules['distributed'] = None",
     "--backend dask needs a package: pip install distributed"),
])
def test_a_bad_argument_about_the_cluster_is_one_sentence(project, arguments, before, sentence):
    assert run(project, "sweep.py", *arguments, before=before) == (
        2, "", f"sweep.py: error: {sentence}\n")
