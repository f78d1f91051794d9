"""Weights & Biases: a script of it runs on lab_logger alone, and a run is mirrored to the real one.

The real package runs in offline mode: it writes a file, and connects to nothing.
"""
import json
import os
import subprocess
import sys

import pytest
from processes import environment, rows

OFFLINE = {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}


def execute(script, cwd, **env):
    """Run a script by itself: (exit status, stdout, stderr)."""
    path = os.path.join(cwd, "script.py")
    with open(path, "w", encoding="utf-8") as file:
        file.write(script)
    done = subprocess.run([sys.executable, path], cwd=cwd, env=environment(**env), text=True,
                          capture_output=True, timeout=90)
    return done.returncode, done.stdout, done.stderr


# --- import lab_logger as wandb -----------------------------------------------------------

SCRIPT = """
import argparse, math
import wandb

parser = argparse.ArgumentParser()
parser.add_argument("--lr", type=float, default=0.1)
parser.add_argument("--api_key", default="hush")
assert wandb.run is None
run = wandb.init(project="iris", entity="team", name="svm-1", group="g", tags=["a", "b"],
                 notes="first try", config=parser.parse_args([]), job_type="train", dir=".",
                 reinit=True, save_code=False)
assert wandb.run is run
wandb.config.update({"n_epochs": 3, "optimizer": {"name": "sgd"}})
wandb.config.batch_size = 32
config = wandb.config
print(config.lr, config["n_epochs"], config.optimizer["name"], run.config.batch_size)
print("lr" in config, "none" in config, config.get("none", 5), sorted(config.keys()))
wandb.define_metric("val/*", step_metric="epoch")
for epoch in range(config.n_epochs):
    wandb.log({"train": {"loss": 1 / (epoch + 1)}, "epoch": epoch}, commit=False)
    wandb.log({"val/acc": epoch / 4, "bad": math.nan}, step=epoch)
run.log({"extra": 1}, step=10)
wandb.summary["best"] = 0.75
run.summary["n_params"] = 12
run.summary.update({"lowest": -1.5})
print(wandb.summary["best"], run.summary["n_params"], run.summary.get("none"))
with open("model.pt", "w") as file:
    file.write("x")
wandb.save("model.pt")
wandb.finish()
assert wandb.run is None
with wandb.init(project="iris", config={"lr": 1}) as second:
    second.config.update({"lr": 2}, allow_val_change=True)
    second.log({"loss": 1.0})
third = wandb.init(project="iris")
third.log({"loss": 0.5})
third.finish(exit_code=3)
fourth = wandb.init(project="iris")
wandb.log({"loss": 0.25})
raise ValueError("bad rate")
"""
BEYOND = """
import wandb
run = wandb.init(project="iris", settings=wandb.Settings(silent=True))
wandb.watch(None) if wandb.__name__ == "lab_logger" else None
run.define_metric("loss", summary="min")
run.log({"image": wandb.Image([[0.0, 1.0]]) if wandb.__name__ == "lab_logger" else None,
         "table": wandb.Table(columns=["a"], data=[[1]]), "loss": 0.5})
with open("model.pt", "w") as file:
    file.write("x")
artifact = wandb.Artifact("model", type="model", metadata={"a": 1})
artifact.add_file("model.pt")
run.log_artifact(artifact)
run.save("model.pt")
print(type(run.id), run.project)
wandb.log({"loss": 0.25})
run.finish()
print("end")
"""


def drop_in(script):
    return script.replace("import wandb", "import lab_logger as wandb")


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """The script on the real W&B, offline, and on lab_logger alone: (the two outcomes, the lab)."""
    ours, theirs = tmp_path_factory.mktemp("ours"), tmp_path_factory.mktemp("theirs")
    db_path = str(ours / "lab.db")
    place = {"DB_PATH": db_path, "WANDB_PROJECT": None}
    return (execute(SCRIPT, theirs, **place, **OFFLINE), execute(drop_in(SCRIPT), ours, **place),
            db_path)


def test_script_prints_and_ends_as_with_the_real_package(both):
    theirs, ours, _ = both
    assert ours[:2] == theirs[:2]
    assert ours[0] == 1 and ours[1].splitlines()[0] == "0.1 3 sgd 32"
    assert ours[2].splitlines()[-1] == "ValueError: bad rate"
    notes = [line for line in ours[2].splitlines() if line.startswith("lab_logger: ")]
    assert notes == ["lab_logger: define_metric of W&B is accepted and not recorded"]


def test_script_is_recorded_under_its_project_with_config_points_and_summary(both):
    db_path = both[2]
    run, = rows(db_path, "SELECT experiment_name, task_name, note, status, params_json, "
                "final_metrics_json, artifacts_json FROM runs WHERE note IS NOT NULL")
    assert run[:4] == ("iris", "train", "svm-1 · first try · a · b", "finished")
    assert json.loads(run[4]) == {"lr": 0.1, "api_key": "***", "n_epochs": 3,
                                  "optimizer": {"name": "sgd"}, "batch_size": 32}
    assert json.loads(run[5]) == {"best": 0.75, "n_params": 12, "lowest": -1.5}
    path, = json.loads(run[6])
    assert path == os.path.join(os.path.dirname(db_path), "model.pt")
    points = rows(db_path, "SELECT metric_name, metric_value, step FROM run_metrics JOIN runs "
                  "USING (run_id) WHERE note IS NOT NULL AND metric_name != 'epoch' ORDER BY id")
    assert points == [point for epoch in range(3) for point in (
        ("train/loss", 1 / (epoch + 1), None), ("val/acc", epoch / 4, epoch),
        ("bad", None, epoch))] + [("extra", 1, 10)]


def test_epoch_among_the_logged_values_is_the_points_epoch(both):
    assert rows(both[2], "SELECT epoch, metric_value FROM run_metrics WHERE metric_name = "
                "'train/loss' ORDER BY id") == [(0, 1.0), (1, 0.5), (2, 1 / 3)]


def test_each_way_to_end_a_script_is_told(both):
    ends = rows(both[2], "SELECT status, end_reason, params_json FROM runs ORDER BY timestamp")
    assert [end[0] for end in ends] == ["finished", "finished", "failed", "failed"]
    assert ends[1][2] == '{"lr":2}'
    assert ends[2][1].startswith("failed: sys.exit(3)")
    assert ends[3][1].startswith("failed: ValueError: bad rate; at script.py:")


def test_what_wandb_offers_beyond_the_loop_is_ignored_and_ends_nothing(tmp_path):
    """Images, tables, artifacts: noted once each and not recorded; the points beside them are."""
    db_path = str(tmp_path / "lab.db")
    (tmp_path / "theirs").mkdir()
    theirs = execute(BEYOND, tmp_path / "theirs", WANDB_PROJECT=None, **OFFLINE)
    ours = execute(drop_in(BEYOND), tmp_path, DB_PATH=db_path, WANDB_PROJECT=None)
    assert (ours[0], theirs[0]) == (0, 0), ours[2] + theirs[2]
    assert ours[1] == theirs[1] == "<class 'str'> iris\nend\n"
    notes = ours[2].splitlines()
    assert all(line.startswith("lab_logger: ") for line in notes)
    assert len(notes) == len(set(notes)) <= 12
    assert sum("watch of W&B" in line for line in notes) == 1
    assert rows(db_path, "SELECT metric_name, metric_value FROM run_metrics ORDER BY id") == [
        ("loss", 0.5), ("loss", 0.25)]
    assert rows(db_path, "SELECT status FROM runs") == [("finished",)]


# --- WANDB_PROJECT with the real package --------------------------------------------------

MIRRORED = """
import sys, lab_logger

@lab_logger.log_run(experiment_name="mirrored")
def train(lr=0.1, api_key="hush", fails=False):
    for epoch in range(4):
        lab_logger.log(epoch=epoch, loss=epoch / 4)
        lab_logger.log({"val/acc": 0.5 + epoch / 8}, step=epoch)
        lab_logger.log({"back": epoch}, step=100 - epoch)
    if fails:
        raise ValueError("bad rate")
    return {"accuracy": 0.5}

train()
try:
    train(fails=True)
except ValueError as error:
    print(error)
sys.exit(7)
"""


def records(path):
    """Read W&B's offline file: records in LevelDB's log format behind a header of 7 bytes."""
    from wandb.proto import wandb_internal_pb2
    content, at, body = path.read_bytes(), 7, b""
    while at + 7 <= len(content):
        left = (1 << 15) - at % (1 << 15)         # of the block; no record's head crosses its end
        if left < 7:
            at += left
            continue
        size, kind = int.from_bytes(content[at + 4:at + 6], "little"), content[at + 6]
        body = (b"" if kind in (1, 2) else body) + content[at + 7:at + 7 + size]
        at += 7 + size
        if kind in (1, 4):                        # whole, or the last part
            yield wandb_internal_pb2.Record.FromString(body)


def mirrored(path):
    """What an offline file holds: (name, config, history as dicts, summary, exit code)."""
    name, config, history, summary, code = None, {}, [], {}, None
    for record in records(path):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            name = record.run.display_name
            config.update({item.key: json.loads(item.value_json)
                           for item in record.run.config.update})
        elif kind == "history":
            history.append({"/".join(item.nested_key) or item.key: json.loads(item.value_json)
                            for item in record.history.item})
        elif kind == "summary":
            summary.update({"/".join(item.nested_key) or item.key: json.loads(item.value_json)
                            for item in record.summary.update})
        elif kind == "exit":
            code = record.exit.exit_code
    return name, config, history, summary, code


@pytest.fixture(scope="module")
def mirror(tmp_path_factory):
    place = tmp_path_factory.mktemp("mirror")
    outcome = execute(MIRRORED, place, DB_PATH=str(place / "lab.db"), WANDB_PROJECT="proj",
                      **OFFLINE)
    files = sorted(place.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime)
    return outcome, str(place / "lab.db"), [mirrored(path) for path in files]


def test_mirror_leaves_the_training_and_the_lab_as_they_are_without_it(mirror):
    outcome, db_path, _ = mirror
    assert outcome == (7, "bad rate\n", "")
    assert rows(db_path, "SELECT status, wandb_url FROM runs ORDER BY timestamp") == [
        ("finished", None), ("failed", None)]    # offline there is no address
    assert rows(db_path, "SELECT count(*) FROM run_metrics") == [(2 * 3 * 4,)]


def test_mirror_has_name_params_finals_and_how_each_run_ended(mirror):
    (name, config, _, summary, code), (_, _, _, _, failed_code) = mirror[2]
    assert (name, code, failed_code) == ("mirrored", 0, 1)
    assert (config["lr"], config["api_key"], config["fails"]) == (0.1, "***", False)
    assert summary["accuracy"] == 0.5


def test_mirror_has_every_point_in_whatever_order_of_steps(mirror):
    for _, _, history, _, _ in mirror[2]:
        def logged(name, history=history):
            return [point[name] for point in history if name in point]
        assert logged("loss") == [0, 0.25, 0.5, 0.75]
        assert logged("val/acc") == [0.5, 0.625, 0.75, 0.875]
        assert logged("back") == [0, 1, 2, 3]
        assert [point["epoch"] for point in history if "loss" in point] == [0, 1, 2, 3]


def test_mirror_that_cannot_begin_costs_one_sentence(tmp_path):
    code, stdout, stderr = execute(MIRRORED, tmp_path, DB_PATH=str(tmp_path / "lab.db"),
                                   WANDB_PROJECT="no/such:project", **OFFLINE)
    assert (code, stdout) == (7, "bad rate\n")
    told = [line for line in stderr.splitlines() if line.startswith("lab_logger: ")]
    assert len(told) == 1 and "W&B does not mirror this run" in told[0]
    assert rows(str(tmp_path / "lab.db"), "SELECT count(*) FROM run_metrics") == [(2 * 3 * 4,)]


def test_every_change_of_config_is_recorded(tmp_path):
    script = """
import lab_logger as wandb
run = wandb.init(config={"lr": 0.1, "a": 1, "b": 2, "c": 3})
print(run.config.setdefault("depth", 4), run.config.setdefault("lr", 9), run.config.pop("a"))
del run.config["b"]
run.config |= {"width": 5}
run.config.setdefaults({"width": 6, "z": 7})
del run.config["z"]
print(sorted(run.config))
"""
    code, stdout, stderr = execute(script, tmp_path, DB_PATH=str(tmp_path / "lab.db"))
    assert (code, stdout) == (0, "4 0.1 1\n['c', 'depth', 'lr', 'width']\n"), stderr
    ((params,),) = rows(str(tmp_path / "lab.db"), "SELECT params_json FROM runs")
    assert json.loads(params) == {"lr": 0.1, "c": 3, "depth": 4, "width": 5}


@pytest.mark.parametrize(("mode", "variables"),
                         [('"disabled"', {}), ("None", {"WANDB_MODE": "disabled"})])
def test_disabled_mode_trains_and_leaves_no_trace(tmp_path, mode, variables):
    script = f"""
import lab_logger as wandb
run = wandb.init(project="p", config={{"lr": 0.1}}, mode={mode})
wandb.config.update({{"n": 2}})
for epoch in range(wandb.config.n):
    wandb.log({{"loss": wandb.config.lr / (1 + epoch)}})
wandb.summary["best"] = 1
wandb.log_artifact("script.py")
wandb.finish()
print(run.config.lr, run.summary["best"])
"""
    code, stdout, stderr = execute(script, tmp_path, DB_PATH=str(tmp_path / "lab.db"), **variables)
    assert (code, stdout, stderr) == (0, "0.1 1\n", "")
    assert not list(tmp_path.glob("lab.db*"))


def test_what_scripts_of_wandb_also_write_ends_none_of_them(tmp_path):
    script = """
import argparse, copy
import lab_logger as wandb
run = wandb.init(project="p", name="n", config=argparse.Namespace(lr=0.1))
wandb.config.update(argparse.Namespace(depth=3), True)
assert wandb.config.as_dict() == copy.deepcopy(wandb.config) == {"lr": 0.1, "depth": 3}
wandb.log({"loss": 0.5}, 3)
wandb.log(data={"loss": 0.25}, step=4)
assert not isinstance(3, wandb.Image)
try:
    wandb.log({"plot": wandb.plot.line(None, "a", "b")})
except wandb.Error:
    raise SystemExit(9)
run.notes = "second thoughts"
print(run.name, run.url, wandb.run.id == run.run_id)
wandb.log_artifact("script.py", name="code", type="code")
first = run
run = wandb.init(project="p", reinit=True)
assert first.is_over
run.finish(quiet=True)
"""
    db_path = str(tmp_path / "lab.db")
    code, stdout, stderr = execute(script, tmp_path, DB_PATH=db_path)
    assert (code, stdout) == (0, "n None True\n"), stderr
    assert rows(db_path, "SELECT step, metric_value FROM run_metrics ORDER BY id") == [
        (3, 0.5), (4, 0.25)]
    found = rows(db_path, "SELECT params_json, note, status FROM runs ORDER BY timestamp")
    assert json.loads(found[0][0]) == {"lr": 0.1, "depth": 3}
    assert found[0][1:] == ("second thoughts", "finished") and found[1][2] == "finished"
