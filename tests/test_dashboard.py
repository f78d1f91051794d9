"""The dashboard in real Chromium: a lab of 27 runs, looked at through the page alone.

Every test fails on a console error, an uncaught error in the page, or a request to another host,
unless it says which error it provokes.
"""
import json
import shutil
import threading
import uuid
from datetime import datetime, timedelta, timezone
from types import SimpleNamespace
from urllib.parse import urlsplit

import pytest
from conftest import insert_points, insert_run

sync_api = pytest.importorskip("playwright.sync_api")
expect = sync_api.expect

MODELS = ("logistic_regression", "linear_svm", "perceptron")
RATES = (0.001, 0.01, 0.1)
SEEDS = (0, 1, 2)
N_EPOCHS = 30
START = datetime(2026, 11, 20, 9, 0, tzinfo=timezone.utc)
TRACEBACK = 'Traceback (most recent call last):\n  File "train.py", line 31, in train\nValueError: loss exploded\n'
HOSTILE = "<img src=x onerror=alert(1)>\"'</td><script>alert(2)</script>"
NAN = float("nan")
PHONE = {"width": 390, "height": 844}


def stamp(minutes):
    return (START + timedelta(minutes=minutes)).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def run_key(model, rate, seed):
    return str(uuid.uuid5(uuid.NAMESPACE_URL, f"{model}/{rate}/{seed}"))


DIVERGED = run_key("perceptron", 0.1, 2)
FAILED = run_key("linear_svm", 0.1, 1)
BEST = run_key("logistic_regression", 0.1, 0)      # accuracy 0.97, val_loss 0.2


def final_values(model, rate, seed):
    """Accuracy and val_loss of the last epoch: known numbers, the best ones at BEST."""
    accuracy = 0.97 - 0.03 * MODELS.index(model) - 0.05 * (2 - RATES.index(rate)) - 0.004 * seed
    return round(accuracy, 4), round(0.2 + (0.97 - accuracy) * 2, 4)


def points_of(model, rate, seed, n_epochs=N_EPOCHS):
    accuracy, val_loss = final_values(model, rate, seed)
    rows = []
    for epoch in range(1, n_epochs + 1):
        left = 0.85 ** epoch - 0.85 ** N_EPOCHS
        wave = 0.01 * ((epoch * 7 + seed * 3) % 5 - 2) * left
        lost = run_key(model, rate, seed) == DIVERGED and epoch >= 22
        rows += [(epoch, "train_loss", round(0.8 * val_loss + 1.1 * left, 4)),
                 (epoch, "val_loss", NAN if lost else round(val_loss + 1.2 * left + wave, 4)),
                 (epoch, "accuracy", 0.3333 if lost else round(accuracy - 0.5 * left + wave, 4))]
    return rows


def add_run(conn, run_id, minutes, **columns):
    """Insert a run that finished; any column of `runs` can be given."""
    row = {"run_id": run_id, "timestamp": stamp(minutes), "experiment_name": "iris_sweep", "status": "finished",
           "duration_s": 12.5, "params_json": "{}", "final_metrics_json": "{}", "artifacts_json": "[]", **columns}
    insert_run(conn, **row)


def add_sweep(conn, folder):
    for i, (model, rate, seed) in enumerate((m, r, s) for m in MODELS for r in RATES for s in SEEDS):
        run_id = run_key(model, rate, seed)
        params = {"model_name": model, "learning_rate": rate, "random_state": seed, "n_epochs": N_EPOCHS, "test_size": 0.25,
                  "optimizer": {"name": "sgd", "momentum": 0.9}, "shuffle": True}
        present = folder / "metrics.csv"
        present.write_text("epoch,accuracy\n1,0.5\n")
        add_run(conn, run_id, i * 20, experiment_name=f"iris_{model}_sweep_v1", model_name=model, dataset_id="iris",
                command=f"python run.py --model_name {model} --learning_rate {rate}", git_hash="0123456789abcdef" if seed else "fedcba9876543210",
                git_diff="--- a/run.py\n+++ b/run.py\n@@ -1 +1 @@\n-lr = 0.1\n+lr = 0.2\n" if seed == 2 else "", python_version="3.11.9",
                pip_freeze=f"numpy==2.{seed}.0\nscikit-learn==1.5.2", device_info='{"cpu": "test", "n_cpus": 2}', params_json=json.dumps(params),
                artifacts_json=json.dumps([str(present), str(folder / "gone.joblib")]), hostname="testhost", cwd=str(folder),
                note="PUBLISH: best so far" if run_id == BEST else None, duration_s=10.0 + i,
                status="failed" if run_id == FAILED else "finished", error=TRACEBACK if run_id == FAILED else None)
        insert_points(conn, run_id, points_of(model, rate, seed, 12 if run_id == FAILED else N_EPOCHS))


def fill(path, add):
    """Let `add(conn)` write into the lab at `path`, summaries brought up to date."""
    import lab_logger
    conn = ailab.open_lab(str(path))
    with lab_logger.transaction(conn):
        add(conn)
        ailab.refresh(conn)
    conn.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    conn.close()


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """The 27 runs, written once; each test gets a copy."""
    folder = tmp_path_factory.mktemp("sweep")
    fill(folder / "lab.db", lambda conn: add_sweep(conn, folder))
    return folder / "lab.db"


@pytest.fixture
def sweep(template, db_path):
    shutil.copy(template, db_path)
    return db_path


@pytest.fixture(scope="module")
def browser():
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("no Chromium on this machine")
    with sync_api.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=path, args=[
            "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
            "--disable-component-update", "--disable-sync"])
        yield chromium
        chromium.close()


@pytest.fixture
def visit(browser, server):
    """visit("#/runs") -> a page in a fresh context; provokes= names console errors that are meant."""
    opened = []

    def visit(address="#/", *, provokes=None, ready=True, **options):
        context = browser.new_context(viewport=options.pop("viewport", {"width": 1440, "height": 900}), **options)
        page = context.new_page()
        page.set_default_timeout(8000)
        faults = []
        page.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("request", lambda request: faults.append(f"foreign request {request.url}")
                if urlsplit(request.url).hostname not in ("127.0.0.1", None, "") else None)
        opened.append((context, faults, provokes))
        page.goto(f"http://127.0.0.1:{server.server_port}/{address}")
        if ready:
            settle(page)
        return page

    yield visit
    for context, faults, provokes in opened:
        context.close()
        assert [fault for fault in faults if provokes is None or provokes not in fault] == []


def settle(page):
    page.wait_for_selector("html[data-ready=true]")


def rows_of(page):
    """Run ids of the grid's rows, top to bottom."""
    return page.eval_on_selector_all("tr[data-run-id]", "rows => rows.map(row => row.dataset.runId)")


def select(page, *run_ids):
    for run_id in run_ids:
        page.locator(f"tr[data-run-id='{run_id}'] input[type=checkbox]").click()


def cells(page, column):
    return page.locator(f"[role=grid] td[data-col='{column}']").all_inner_texts()
