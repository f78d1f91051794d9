"""The dashboard in real Chromium: a lab of 27 runs, looked at through the page alone.

Every test fails on a console error, an uncaught error in the page, or a request to another host,
unless it says which error it provokes.
"""

import json
import shutil
import subprocess
import time
import uuid
from datetime import datetime, timedelta, timezone
from urllib.parse import urlsplit

import pytest
from conftest import ROOT, insert_points, insert_run
from playwright import sync_api
from playwright.sync_api import expect

import ailab

MODELS = ("logistic_regression", "linear_svm", "perceptron")
RATES = (0.001, 0.01, 0.1)
SEEDS = (0, 1, 2)
N_EPOCHS = 30
START = datetime(2026, 11, 20, 9, 0, tzinfo=timezone.utc)
TRACEBACK = ('Traceback (most recent call last):\n  File "train.py", line 31, in train\n'
             "ValueError: loss exploded\n")
HOSTILE = "<img src=x onerror=alert(1)>\"'</td><script>alert(2)</script>"
NAN = float("nan")
PHONE = {"width": 390, "height": 844}
WAIT_MS = 30_000  # for what has to happen: it ends a test that fails, and no other waits so long
expect.set_options(timeout=WAIT_MS)


def stamp(minutes):
    return (START + timedelta(minutes=minutes)).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def run_key(model, rate, seed):
    return str(uuid.uuid5(uuid.NAMESPACE_URL, f"{model}/{rate}/{seed}"))


DIVERGED = run_key("perceptron", 0.1, 2)
FAILED = run_key("linear_svm", 0.1, 1)
BEST = run_key("logistic_regression", 0.1, 0)  # accuracy 0.97, val_loss 0.2


def final_values(model, rate, seed):
    """Accuracy and val_loss of the last epoch: known numbers, the best ones at BEST."""
    accuracy = 0.97 - 0.03 * MODELS.index(model) - 0.05 * (2 - RATES.index(rate)) - 0.004 * seed
    return round(accuracy, 4), round(0.2 + (0.97 - accuracy) * 2, 4)


def points_of(model, rate, seed, n_epochs=N_EPOCHS):
    accuracy, val_loss = final_values(model, rate, seed)
    rows = []
    for epoch in range(1, n_epochs + 1):
        left = 0.85**epoch - 0.85**N_EPOCHS
        wave = 0.01 * ((epoch * 7 + seed * 3) % 5 - 2) * left
        lost = run_key(model, rate, seed) == DIVERGED and epoch >= 22
        rows += [
            (epoch, "train_loss", round(0.8 * val_loss + 1.1 * left, 4)),
            (epoch, "val_loss", NAN if lost else round(val_loss + 1.2 * left + wave, 4)),
            (epoch, "accuracy", 0.3333 if lost else round(accuracy - 0.5 * left + wave, 4)),
        ]
    return rows


def add_run(conn, run_id, minutes, **columns):
    """Insert a run that finished; any column of `runs` can be given."""
    row = {
        "run_id": run_id,
        "timestamp": stamp(minutes),
        "experiment_name": "iris_sweep",
        "status": "finished",
        "duration_s": 12.5,
        "params_json": "{}",
        "final_metrics_json": "{}",
        "artifacts_json": "[]",
        **columns,
    }
    insert_run(conn, **row)


def add_sweep(conn, folder):
    for i, (model, rate, seed) in enumerate(
        (m, r, s) for m in MODELS for r in RATES for s in SEEDS
    ):
        run_id = run_key(model, rate, seed)
        params = {
            "model_name": model,
            "learning_rate": rate,
            "random_state": seed,
            "n_epochs": N_EPOCHS,
            "test_size": 0.25,
            "optimizer": {"name": "sgd", "momentum": 0.9},
            "shuffle": True,
        }
        present = folder / "metrics.csv"
        present.write_text("epoch,accuracy\n1,0.5\n")
        add_run(
            conn,
            run_id,
            i * 20,
            experiment_name=f"iris_{model}_sweep_v1",
            model_name=model,
            dataset_id="iris",
            command=f"python run.py --model_name {model} --learning_rate {rate}",
            git_hash="0123456789abcdef" if seed else "fedcba9876543210",
            git_diff="--- a/run.py\n+++ b/run.py\n@@ -1 +1 @@\n-lr = 0.1\n+lr = 0.2\n"
            if seed == 2
            else "",
            python_version="3.11.9",
            pip_freeze=f"numpy==2.{seed}.0\nscikit-learn==1.5.2",
            device_info='{"cpu": "test", "n_cpus": 2}',
            params_json=json.dumps(params),
            artifacts_json=json.dumps([str(present), str(folder / "gone.joblib")]),
            hostname="testhost",
            cwd=str(folder),
            note="PUBLISH: best so far" if run_id == BEST else None,
            duration_s=10.0 + i,
            status="failed" if run_id == FAILED else "finished",
            error=TRACEBACK if run_id == FAILED else None,
        )
        insert_points(
            conn, run_id, points_of(model, rate, seed, 12 if run_id == FAILED else N_EPOCHS)
        )


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
    path = next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
    )
    if path is None:
        pytest.fail("these tests drive Chromium: apt-get install chromium, or put it on PATH")
    with sync_api.sync_playwright() as driver:
        chromium = driver.chromium.launch(
            executable_path=path,
            args=[
                "--no-sandbox",
                "--disable-gpu",
                "--disable-quic",
                "--no-first-run",
                "--disable-background-networking",
                "--disable-component-update",
                "--disable-sync",
            ],
        )
        yield chromium
        chromium.close()


@pytest.fixture
def visit(browser, server):
    """visit("#/runs") -> a page in a fresh context; provokes= names console errors meant."""
    opened = []

    def visit(address="#/", *, provokes=None, ready=True, **options):
        context = browser.new_context(
            viewport=options.pop("viewport", {"width": 1440, "height": 900}), **options
        )
        page = context.new_page()
        page.set_default_timeout(WAIT_MS)
        faults = []
        page.on(
            "console",
            lambda message: faults.append(message.text) if message.type == "error" else None,
        )
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on(
            "request",
            lambda request: (
                faults.append(f"foreign request {request.url}")
                if urlsplit(request.url).hostname not in ("127.0.0.1", None, "")
                else None
            ),
        )
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


def becomes(page, read, wanted=True):
    """Read again until it is `wanted`: a page draws in its own time."""
    until = time.monotonic() + WAIT_MS / 1000
    while (found := read()) != wanted and time.monotonic() < until:
        page.wait_for_timeout(50)
    assert found == wanted


def rows_of(page):
    """Run ids of the grid's rows, top to bottom."""
    return page.eval_on_selector_all(
        "tr[data-run-id]", "rows => rows.map(row => row.dataset.runId)"
    )


def select(page, *run_ids):
    for run_id in run_ids:
        page.locator(f"tr[data-run-id='{run_id}'] input[type=checkbox]").click()


def cells(page, column):
    return page.locator(f"[role=grid] td[data-col='{column}']").all_inner_texts()


def get(page, path):
    """Ask the API what the page should show."""
    return page.evaluate("path => fetch(path).then(answer => answer.json())", path)


# --- Pure modules -------------------------------------------------------------


def test_pure_modules_pass_under_node():
    node = shutil.which("node")
    if node is None:
        pytest.skip("no node on this machine")
    tests = sorted(str(path) for path in (ROOT / "tests" / "js").glob("*.test.js"))
    done = subprocess.run([node, "--test", *tests], capture_output=True, text=True, timeout=60)
    assert tests and done.returncode == 0, done.stdout[-3000:]


# --- Dashboard ----------------------------------------------------------------


def test_dashboard_counts_link_to_their_runs(sweep, visit):
    page = visit()
    counts = {"runs": "27", "running": "0", "failed": "1", "killed": "0", "experiments": "3"}
    for one, count in counts.items():
        expect(page.locator(f"[data-count={one}] b")).to_have_text(count)
    page.locator("[data-count=failed]").click()
    becomes(page, lambda: rows_of(page), [FAILED])
    assert "status=failed" in page.url


def test_leaderboard_is_the_apis_and_opens_a_run(sweep, visit):
    page = visit()
    board = page.get_by_role("group", name="Leaderboard")
    wanted = get(page, "/runs/leaderboard?metric_name=accuracy&order=best&top_k=10")
    rows = board.locator("[data-run-id]")
    becomes(page, lambda: rows.evaluate_all("rows => rows.map(r => r.dataset.runId)"),
            [run["run_id"] for run in wanted])
    assert wanted[0]["run_id"] == BEST
    page.locator("select[data-name=metric]").select_option("val_loss")
    expect(board).to_contain_text("val_loss")
    settle(page)
    wanted = get(page, "/runs/leaderboard?metric_name=val_loss&order=best&top_k=10")
    expect(board.locator("[data-run-id]").first).to_have_attribute(
        "data-run-id", wanted[0]["run_id"]
    )
    assert wanted[0]["final_metrics"]["val_loss"] == 0.2 and "metric=val_loss" in page.url
    board.locator("[data-run-id] a").first.click()
    expect(page.locator("article[data-run]")).to_have_attribute("data-run", BEST)


def test_failed_run_is_listed_with_its_reason(sweep, visit):
    page = visit()
    expect(page.get_by_role("group", name="Failed and killed")).to_contain_text(
        "ValueError: loss exploded"
    )


def test_history_draws_a_dot_for_each_run(sweep, visit):
    page = visit()
    figure = page.locator("figure[data-chart=accuracy]")
    becomes(page, lambda: int(figure.get_attribute("data-points")) >= 26)
    page.wait_for_function("""() => {
        const canvas = document.querySelector('figure[data-chart=accuracy] canvas');
        const bytes = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
        return bytes.some(byte => byte > 0);
    }""")


# --- Runs ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metric", "good", "is_high"), [("accuracy", 0.97, True), ("val_loss", 0.2, False)]
)
def test_first_click_on_a_metric_puts_its_good_end_on_top_and_nan_last(
    sweep, visit, metric, good, is_high
):
    page = visit("#/runs")
    head = page.locator(f"th[data-col='metrics.{metric}']")
    head.get_by_role("button").click()
    expect(head).to_have_attribute("aria-sort", "descending" if is_high else "ascending")
    expect(page.locator("tr[data-run-id]").first).to_have_attribute("data-run-id", BEST)
    values = cells(page, f"metrics.{metric}")
    assert float(values[0]) == good
    head.get_by_role("button").click()
    expect(head).to_have_attribute("aria-sort", "ascending" if is_high else "descending")
    if metric == "val_loss":
        becomes(page, lambda: rows_of(page)[-1], DIVERGED)


def test_filters_narrow_the_rows_as_the_api_counts_them_and_can_be_taken_off(sweep, visit):
    page = visit("#/runs")
    page.get_by_label("Model", exact=False).first.select_option("perceptron")
    expect(page.locator(".lab-foot")).to_contain_text("9 of 27 runs")
    page.get_by_label("Metric", exact=False).first.select_option("accuracy")
    page.get_by_label("min", exact=False).first.fill("0.85")
    wanted = get(page, "/runs?model_name=perceptron&metric_name=accuracy&metric_min=0.85&limit=100")
    expect(page.locator(".lab-foot")).to_contain_text(f"{len(wanted)} of 27 runs")
    becomes(page, lambda: sorted(rows_of(page)), sorted(run["run_id"] for run in wanted))
    assert wanted
    for _ in range(2):
        page.locator(".lab-chips button").first.click()
    expect(page.locator(".lab-foot")).to_contain_text("27 of 27 runs")


def test_filter_without_a_match_says_so_and_clears(sweep, visit):
    page = visit("#/runs?q=nothing-like-this")
    expect(page.get_by_text("No run matches")).to_be_visible()
    page.get_by_role("button", name="Clear all filters").click()
    expect(page.locator("tr[data-run-id]").first).to_be_visible()


def test_refused_filter_shows_the_apis_sentence(sweep, visit):
    page = visit("#/runs?metric_name=accuracy&metric_min=much", provokes="422")
    expect(page.get_by_text("metric_min", exact=False)).to_be_visible()


def test_copied_address_reopens_rows_order_selection_and_run(sweep, visit):
    page = visit("#/runs?model_name=linear_svm&sort=-metrics.accuracy")
    first, second = rows_of(page)[:2]
    select(page, first, second)
    page.locator(f"tr[data-run-id='{first}'] td[data-col]").nth(1).click()
    expect(page.locator("article[data-run]")).to_have_attribute("data-run", first)
    again = visit(page.url.split("/", 3)[3])
    becomes(again, lambda: rows_of(again), rows_of(page))
    expect(again.locator("tr[aria-selected=true]")).to_have_count(2)
    expect(again.locator("article[data-run]")).to_have_attribute("data-run", first)
    page.go_back()
    expect(page.locator("article[data-run]")).to_have_count(0)


def test_shift_click_selects_a_range_and_compare_takes_it(sweep, visit):
    page = visit("#/runs")
    boxes = page.locator("tr[data-run-id] input[type=checkbox]")
    boxes.nth(0).click()
    boxes.nth(3).click(modifiers=["Shift"])
    expect(page.locator("tr[aria-selected=true]")).to_have_count(4)
    wanted = rows_of(page)[:4]
    page.locator("[data-do=compare]").click()
    expect(page.locator("h1")).to_have_text("Compare 4 runs")
    assert all(run_id[:8] in page.url for run_id in wanted)


def test_table_of_thousands_keeps_few_rows_in_the_page_and_reaches_the_last(db_path, visit):
    def add(conn):
        for i in range(3000):
            insert_run(
                conn,
                run_id=f"{i:08x}-big",
                timestamp=stamp(i),
                status="finished",
                experiment_name="big",
                final_metrics_json=json.dumps({"acc": i / 3000}),
            )

    fill(db_path, add)
    page = visit("#/runs")
    grid = page.get_by_role("grid", name="Runs")
    becomes(page, lambda: int(grid.get_attribute("aria-rowcount")) >= 3000)
    page.locator(".lab-scroll").evaluate("box => { box.scrollTop = box.scrollHeight; }")
    expect(page.locator("tr[data-run-id='00000000-big']")).to_be_visible()
    assert page.evaluate("document.querySelectorAll('*').length") < 2000


def test_keyboard_alone_opens_a_run_and_returns(sweep, visit):
    page = visit("#/runs")
    page.locator("body").press("Tab")
    for _ in range(25):
        if page.evaluate("document.activeElement.closest('tr[data-run-id]') !== null"):
            break
        page.keyboard.press("Tab")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("x")
    expect(page.locator("tr[aria-selected=true]")).to_have_count(1)
    page.keyboard.press("Enter")
    expect(page.locator("article[data-run]")).to_be_visible()


# --- One run ------------------------------------------------------------------


def test_run_shows_params_metrics_artifacts_and_environment(sweep, visit):
    page = visit(f"#/run?id={BEST}")
    article = page.locator(f"article[data-run='{BEST}']")
    for text in (
        "logistic_regression",
        "optimizer.momentum",
        "PUBLISH: best so far",
        "metrics.csv",
        "gone.joblib",
        "missing",
        "testhost",
        "scikit-learn==1.5.2",
    ):
        expect(article).to_contain_text(text)
    expect(page.locator("figure[data-chart=accuracy]")).to_be_visible()
    expect(page.locator("figure")).to_have_count(2)  # train_loss and val_loss share one


def test_failed_run_shows_its_traceback_first(sweep, visit):
    page = visit(f"#/run?id={FAILED}")
    expect(page.locator("article[data-run]")).to_contain_text("ValueError: loss exploded")


def test_nan_is_told_in_words_and_drawn_as_a_break(sweep, visit):
    page = visit(f"#/run?id={DIVERGED}")
    expect(
        page.locator("figure[data-chart=val_loss], figure[data-chart=loss]").first
    ).to_contain_text("NaN from epoch 22")


def test_readout_gives_the_apis_values(sweep, visit):
    page = visit(f"#/run?id={BEST}")
    curve = get(page, f"/runs/{BEST}/metrics?names=accuracy")["curves"][0]
    figure = page.locator("figure[data-chart=accuracy]")
    assert curve["n_points"] == 30
    expect(figure).to_have_attribute("data-points", "30")
    expect(figure.locator("table")).to_contain_text(f"{curve['last'][-1]:.4g}")
    box = figure.locator("canvas").bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)

    def is_read_out():
        shown = figure.locator("tbody td").all_inner_texts()
        epochs = [int(text) for text in shown if text.isdigit() and 1 < int(text) < 30]
        return bool(epochs) and f"{curve['last'][epochs[0] - 1]:.4g}" in " ".join(shown)

    becomes(page, is_read_out)


def test_note_is_saved_with_one_request_and_escape_writes_nothing(sweep, visit):
    page = visit(f"#/run?id={FAILED}")
    writes = []
    page.on(
        "request",
        lambda request: writes.append(request.method) if request.method == "PATCH" else None,
    )
    page.get_by_role("button", name="Edit note", exact=False).click()
    page.get_by_label("Note", exact=True).fill("never mind")
    page.keyboard.press("Escape")
    assert writes == []
    page.get_by_role("button", name="Edit note", exact=False).click()
    page.get_by_label("Note", exact=True).fill("BAD: exploded")
    page.keyboard.press("Enter")
    expect(page.get_by_role("button", name="Edit note: BAD: exploded")).to_be_visible()
    becomes(page, lambda: get(page, f"/runs/{FAILED}")["note"], "BAD: exploded")
    assert writes == ["PATCH"]


def test_note_that_cannot_be_saved_stays_in_the_editor_with_the_reason(sweep, visit):
    page = visit(f"#/run?id={FAILED}", provokes="503")
    page.route(
        "**/note",
        lambda route: route.fulfill(
            status=503, content_type="application/json", body='{"detail": "the lab is locked"}'
        ),
    )
    page.get_by_role("button", name="Edit note", exact=False).click()
    page.get_by_label("Note", exact=True).fill("KEEP")
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert")).to_contain_text("the lab is locked")
    expect(page.get_by_label("Note", exact=True)).to_have_value("KEEP")


def test_deleted_run_leaves_the_list_after_a_question(sweep, visit):
    page = visit(f"#/runs?run={FAILED[:8]}")
    page.get_by_role("button", name="Delete").first.click()
    dialog = page.get_by_role("dialog")
    expect(dialog).to_contain_text("trash")
    dialog.get_by_role("button", name="Delete").click()
    expect(page.locator(".lab-foot")).to_contain_text("26 of 26 runs")
    becomes(page, lambda: FAILED not in rows_of(page))


def test_panel_opened_again_selects_its_run_once(sweep, visit):
    page = visit("#/runs")
    for run_id in (BEST, FAILED):
        page.locator(f"tr[data-run-id='{run_id}'] td[data-col='status']").click()
        page.locator(f"article[data-run='{run_id}']").get_by_role("button", name="Select").click()
        expect(page.locator(f"tr[data-run-id='{run_id}']")).to_have_attribute(
            "aria-selected", "true"
        )
        page.get_by_role("button", name="Close the run").click()
    expect(page.locator("tr[aria-selected=true]")).to_have_count(2)


def test_unknown_run_has_its_own_message(sweep, visit):
    page = visit("#/run?id=deadbeef00", provokes="404")
    expect(page.get_by_text("No run deadbeef00 in this lab")).to_be_visible()


# --- How a run ended, and on what machine ----------------------------------------

OOM_TEXT = "likely out of memory: 15.2 of 15.6 GiB (97 %) were in use 4 s before"
GONE = "process 4711 on node7 is gone, last sign of life 2026-11-20 09:00:03 UTC"
ENDS = {  # run: status, reason, then its parts as the page tells them apart
    "aaaa0001-run": ("finished", "finished: the function returned", "finished", ""),
    "aaaa0002-run": (
        "failed",
        "failed: ValueError: loss exploded; at model.py:12 in forward, from train.py:40 in step",
        "failed",
        "at model.py:12 in forward, from train.py:40 in step",
    ),
    "aaaa0003-run": (
        "killed",
        "interrupted: KeyboardInterrupt; at train.py:3 in train",
        "interrupted",
        "at train.py:3 in train",
    ),
    "aaaa0004-run": ("killed", f"killed without a word: {GONE}; {OOM_TEXT}", "killed", OOM_TEXT),
    "aaaa0005-run": ("killed", "lost: no sign of life from node9 for 312 s", "lost", ""),
}
GONE_RUN = "aaaa0004-run"
SYSTEM = {  # each sampled every 10 s
    "system/cpu_percent": [12, 90, 55],
    "system/memory_gib": [7.5, 15.2, 15.1],
    "system/gpu.0.memory_gib": [2, 20, 19.5],
    "system/gpu.1.memory_gib": [1, 10, 9.25],
    "system/gpu.0.temperature_c": [41, 78, 74],
    "system/gpu.0.power_w": [60, 290, 285],
}


def add_samples(conn, run_id, start=0, metrics=SYSTEM):
    conn.executemany(
        "INSERT INTO run_metrics (run_id, metric_name, metric_value, timestamp) "
        "VALUES (?, ?, ?, ?)",
        [
            (run_id, name, value, stamp(start + i / 6))
            for name, values in metrics.items()
            for i, value in enumerate(values)
        ],
    )


@pytest.fixture
def ended(db_path):
    def add(conn):
        for i, (run_id, (status, reason, *_)) in enumerate(ENDS.items()):
            is_gone = run_id == GONE_RUN
            told = {
                "at": stamp(40 + i),
                "hostname": "node8",
                "pid": 812,
                "command": "python train.py --resume",
                "params": {},
            }
            add_run(
                conn,
                run_id,
                i,
                model_name="mlp",
                status=status,
                end_reason=reason,
                error=TRACEBACK if status == "failed" else None,
                received_from="10.0.0.9" if is_gone else None,
                resumptions_json=json.dumps({"c0ffee00": told}) if is_gone else None,
            )
            insert_points(conn, run_id, [(1, "accuracy", 0.5), (2, "accuracy", 0.75)])
        add_samples(conn, GONE_RUN)

    fill(db_path, add)
    return db_path


def test_run_view_tells_in_words_how_each_run_ended(ended, visit):
    page = visit(f"#/run?id={GONE_RUN}")
    for run_id, (_, reason, kind, detail) in ENDS.items():
        page.goto(page.url.split("#")[0] + f"#/run?id={run_id}")
        box = page.locator(f"article[data-run='{run_id}'] .lab-ending")
        expect(box).to_have_attribute("data-kind", kind)
        lines = box.locator("p")
        becomes(page, lambda lines=lines: " ".join(lines.all_text_contents()),
                reason.replace("; at ", " at ").replace("; likely ", " likely "))
        if detail:
            expect(lines.nth(1)).to_have_text(detail)
    colours = set()
    for run_id in ("aaaa0001-run", "aaaa0002-run", GONE_RUN):
        page.goto(page.url.split("#")[0] + f"#/run?id={run_id}")
        box = page.locator(f"article[data-run='{run_id}'] .lab-ending")
        colours.add(box.evaluate("node => getComputedStyle(node).borderLeftColor"))
    assert len(colours) == 3


def test_traceback_is_folded_below_the_reason(ended, visit):
    page = visit("#/run?id=aaaa0002-run")
    fold = page.locator(".lab-ending details")
    expect(fold.locator("pre")).to_be_hidden()
    fold.get_by_text("Traceback", exact=True).click()
    expect(fold.locator("pre")).to_contain_text('File "train.py", line 31, in train')


def test_running_run_has_no_ending(sweep, visit):
    conn = ailab.open_lab(sweep)
    add_run(conn, "live-run-0001", 9999, status="running", hostname="elsewhere")
    conn.close()
    page = visit("#/run?id=live-run-0001")
    expect(page.locator("article[data-run='live-run-0001']")).to_contain_text("running")
    expect(page.locator(".lab-ending")).to_have_count(0)


def test_status_in_the_table_has_the_reason_as_its_title(ended, visit):
    page = visit("#/runs")
    for run_id, (status, reason, *_) in ENDS.items():
        word = page.locator(f"tr[data-run-id='{run_id}'] .lab-status")
        expect(word).to_have_attribute("title", reason)
        expect(word).to_contain_text(status)


def test_home_lists_what_failed_or_was_killed_with_the_reasons(ended, visit):
    page = visit()
    card = page.get_by_role("group", name="Failed and killed")
    expect(card.locator("tr[data-run-id]")).to_have_count(4)
    for run_id, text in (
        ("aaaa0002-run", "ValueError: loss exploded at model.py:12 in forward"),
        ("aaaa0003-run", "interrupted: KeyboardInterrupt"),
        (GONE_RUN, f"killed without a word: {GONE} {OOM_TEXT}"),
        ("aaaa0005-run", "lost: no sign of life from node9 for 312 s"),
    ):
        expect(card.locator(f"tr[data-run-id='{run_id}']")).to_contain_text(text)


def test_compare_tells_how_the_runs_ended(ended, visit):
    page = visit(f"#/compare?ids={GONE_RUN},aaaa0002-run")
    row = page.locator("tr", has=page.locator("th", has_text="ended"))
    expect(row).to_contain_text("killed without a word")
    expect(row).to_contain_text("failed: ValueError: loss exploded")


def test_resumptions_and_the_sender_are_listed(ended, visit):
    page = visit(f"#/run?id={GONE_RUN}")
    table = page.get_by_role("group", name="Resumptions")
    row = table.locator("tbody tr")
    expect(row).to_have_count(1)
    for text in ("node8", "812", "python train.py --resume"):
        expect(row).to_contain_text(text)
    expect(row.locator("time")).to_have_attribute("datetime", stamp(43))
    expect(page.locator("table[data-table=context]")).to_contain_text("Received from10.0.0.9")
    other = visit("#/run?id=aaaa0001-run")
    expect(other.locator("table[data-table=context]")).to_contain_text("Started")
    expect(other.get_by_role("group", name="Resumptions")).to_have_count(0)
    expect(other.locator("main")).not_to_contain_text("Received from")


def test_system_curves_are_asked_for_when_they_are_shown(ended, visit):
    page = visit(f"#/run?id={GONE_RUN}")
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    section = page.locator("section[data-key=System]")
    expect(section.get_by_role("button", name="Show system metrics")).to_be_visible()
    expect(page.locator("figure")).to_have_count(1)
    expect(section.locator("figure")).to_have_count(0)
    section.get_by_role("button").click()
    expect(section.locator("figure")).to_have_count(5)
    assert [url for url in asked if "system%2F" in url and "/curves" in url] != []
    expect(section.locator("figcaption b")).to_have_text(
        ["CPU, %", "GPU memory, GiB", "GPU power, W", "GPU temperature, °C", "Memory, GiB"])
    memory = section.locator("figure[data-chart='GPU memory, GiB']")
    expect(memory.locator("tbody tr", has_text="GPU 0")).to_contain_text("19.50")
    expect(memory.locator("tbody tr", has_text="GPU 1")).to_contain_text("9.250")
    assert "system=shown" in page.url
    again = visit(page.url.split("/", 3)[3])
    expect(again.locator("section[data-key=System] figure")).to_have_count(5)
    slider = memory.get_by_role("slider")
    becomes(page, lambda: float(slider.get_attribute("aria-valuemin")), START.timestamp())
    page.go_back()
    expect(section.locator("figure")).to_have_count(0)
    page.go_forward()
    expect(section.locator("figure")).to_have_count(5)
    section.get_by_role("button", name="Hide system metrics").click()
    expect(section.locator("figure")).to_have_count(0)


def test_system_chart_starts_at_zero(ended, visit):
    page = visit(f"#/run?id={GONE_RUN}&system=shown")
    figure = page.locator("figure[data-chart='Memory, GiB']")
    ticks = figure.locator(".lab-yticks span")
    becomes(page, lambda: min(map(float, ticks.all_inner_texts()), default=None), 0)


def test_run_without_system_metrics_has_no_such_section(ended, visit):
    page = visit("#/run?id=aaaa0001-run&system=shown")
    expect(page.locator("figure[data-chart=accuracy]")).to_be_visible()
    expect(page.locator("section[data-key=System]")).to_have_count(0)


def test_system_metrics_stay_out_of_columns_pickers_boards_and_tables(ended, visit):
    page = visit("#/runs")
    expect(page.locator("th[data-col='metrics.accuracy']")).to_be_visible()
    expect(page.locator("th[data-col*=system]")).to_have_count(0)
    for address in ("#/runs", "#/", f"#/compare?ids={GONE_RUN},aaaa0002-run"):
        page = visit(address)
        expect(page.locator("main")).to_contain_text("accuracy")
        assert "system/" not in page.locator("main").inner_html()
    page = visit(f"#/run?id={GONE_RUN}")
    expect(page.get_by_role("group", name="Metrics", exact=True)).to_contain_text("accuracy")
    assert "system/" not in page.locator("main").inner_html()
    page = visit("#/?metric=system/cpu_percent")
    board = page.get_by_role("group", name="Leaderboard")
    expect(board.locator(f"tr[data-run-id='{GONE_RUN}']")).to_contain_text("55")


def test_live_run_updates_its_system_charts(ended, visit):
    conn = ailab.open_lab(ended)
    add_run(conn, "live-run-0001", 50, status="running", hostname="elsewhere", duration_s=None)
    add_samples(conn, "live-run-0001", 50)
    page = visit("#/run?id=live-run-0001&system=shown")
    figure = page.locator("figure[data-chart='CPU, %']")
    expect(figure).to_have_attribute("data-points", "3")
    add_samples(conn, "live-run-0001", 51, {"system/cpu_percent": [66.5]})
    expect(figure).to_have_attribute("data-points", "4")
    expect(figure.locator("tbody")).to_contain_text("66.5")
    conn.close()


def test_run_that_dies_while_it_is_looked_at_shows_how(ended, visit):
    conn = ailab.open_lab(ended)
    add_run(conn, "live-run-0001", 50, status="running", hostname="elsewhere", duration_s=None)
    page = visit("#/run?id=live-run-0001")
    expect(page.locator("article[data-run='live-run-0001'] .lab-status")).to_contain_text("running")
    conn.execute(
        "UPDATE runs SET status = 'killed', end_reason = 'lost: no sign of life from node9' "
        "WHERE run_id = 'live-run-0001'"
    )
    expect(page.locator(".lab-ending")).to_contain_text("no sign of life from node9")
    conn.close()


def test_system_curves_are_not_asked_for_again_until_there_is_a_sample(ended, visit):
    conn = ailab.open_lab(ended)
    add_run(conn, "live-run-0001", 50, status="running", hostname="elsewhere", duration_s=None)
    add_samples(conn, "live-run-0001", 50)
    insert_points(conn, "live-run-0001", [(1, "accuracy", 0.5)])
    page = visit("#/run?id=live-run-0001&system=shown")
    expect(page.locator("figure[data-chart='CPU, %']")).to_have_attribute("data-points", "3")
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    insert_points(conn, "live-run-0001", [(2, "accuracy", 0.8125)])
    values = page.locator("figure[data-chart=accuracy] tbody")
    expect(values).to_contain_text("0.8125")
    assert [url for url in asked if "system%2F" in url] == []
    conn.close()


# --- Compare ------------------------------------------------------------------


def test_compare_marks_the_best_by_direction_ties_all_and_nan_never(sweep, visit):
    ids = [BEST, run_key("logistic_regression", 0.1, 1), DIVERGED]
    page = visit("#/compare?ids=" + ",".join(one[:8] for one in ids))
    for metric, value in (("accuracy", "0.97"), ("val_loss", "0.2")):
        expect(page.locator(f"tr[data-metric={metric}] td", has_text="★")).to_contain_text(value)
    expect(page.locator("tr[data-metric=val_loss]")).to_contain_text("NaN")
    expect(page.locator("figure").nth(2)).to_be_visible()


def test_compare_shows_only_differing_params_until_asked(sweep, visit):
    ids = [run_key("perceptron", 0.01, 0), run_key("perceptron", 0.01, 1)]
    page = visit("#/compare?ids=" + ",".join(one[:8] for one in ids))
    params = (
        page.locator("section, div").filter(has=page.get_by_role("heading", name="Params")).last
    )
    expect(params).to_contain_text("random_state")
    expect(params).not_to_contain_text("test_size")
    params.get_by_role("button", name="equal", exact=False).click()
    expect(params).to_contain_text("test_size")
    expect(page.locator("main")).to_contain_text("numpy")


def test_compare_without_runs_says_how_to_choose_them(sweep, visit):
    page = visit("#/compare")
    expect(page.locator("main")).to_contain_text("Choose 2 to 20 runs")
    expect(page.locator("figure")).to_have_count(0)


# --- Assistant ----------------------------------------------------------------


def test_assistant_answers_names_its_runs_and_compares_them(sweep, visit):
    page = visit("#/assistant")
    page.get_by_role("textbox").fill("Show me my top 3 runs by accuracy and compare them.")
    page.keyboard.press("Enter")
    chips = page.locator("[data-run-ref]")
    expect(chips).to_have_count(3)
    wanted = get(page, "/runs/leaderboard?metric_name=accuracy&top_k=3")
    assert chips.evaluate_all("all => all.map(one => one.dataset.runRef)") == [
        run["run_id"] for run in wanted
    ]
    expect(page.get_by_role("group", name="Comparison")).to_be_visible()
    page.locator("[data-do=compare]").click()
    expect(page.locator("h1")).to_have_text("Compare 3 runs")


def test_assistant_shows_the_note_it_wrote_and_takes_it_back(sweep, visit):
    page = visit("#/assistant")
    page.get_by_role("textbox").fill("Flag the best run for publishing.")
    page.keyboard.press("Enter")
    expect(page.get_by_text("A note was written")).to_be_visible()
    assert get(page, f"/runs/{BEST}")["note"].startswith("PUBLISH")
    page.get_by_role("button", name="Undo").click()
    expect(page.get_by_text("The note before is back").first).to_be_visible()
    becomes(page, lambda: get(page, f"/runs/{BEST}")["note"], "PUBLISH: best so far")


def test_assistant_keeps_the_question_when_it_fails(sweep, visit):
    page = visit("#/assistant", provokes="503")
    page.route(
        "**/agent/query",
        lambda route: route.fulfill(
            status=503, content_type="application/json", body='{"detail": "the assistant is away"}'
        ),
    )
    page.get_by_role("textbox").fill("Which is best?")
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert")).to_contain_text("the assistant is away")
    expect(page.get_by_role("textbox")).to_have_value("Which is best?")


# --- Care ---------------------------------------------------------------------


def test_hostile_text_is_shown_as_text_everywhere(db_path, visit):
    def add(conn):
        for i in range(2):
            add_run(
                conn,
                f"hostile{i}-0000",
                i,
                experiment_name=HOSTILE,
                model_name=HOSTILE,
                note=HOSTILE,
                params_json=json.dumps({HOSTILE: HOSTILE, "n": i}),
                final_metrics_json=json.dumps({HOSTILE: i}),
                error=HOSTILE,
                status="failed",
                end_reason=f"failed: {HOSTILE}; at {HOSTILE}:1 in {HOSTILE}",
                received_from=HOSTILE,
                resumptions_json=json.dumps(
                    {"part": {"at": HOSTILE, "hostname": HOSTILE, "command": HOSTILE, "pid": i}}
                ),
                artifacts_json=json.dumps([HOSTILE]),
                git_diff=HOSTILE,
            )
            add_samples(conn, f"hostile{i}-0000", 0, {f"system/{HOSTILE}": [1, 2]})

    fill(db_path, add)
    for address in (
        "#/",
        "#/runs?run=hostile0&system=shown",
        "#/compare?ids=hostile0,hostile1",
        "#/assistant",
    ):
        page = visit(address)
        page.on("dialog", lambda dialog: pytest.fail("a script ran"))
        expect(page.locator("img, main script")).to_have_count(0)
        if address != "#/assistant":
            expect(page.locator("main")).to_contain_text("<img src=x onerror=alert(1)>")


def test_empty_lab_teaches_the_first_run_and_shows_it_when_it_comes(db_path, visit):
    ailab.open_lab(db_path).close()
    page = visit()
    for text in ("@log_run", "python ailab.py demo", db_path):
        expect(page.locator("main")).to_contain_text(text)
    fill(db_path, lambda conn: add_run(conn, "first-run-0001", 0, model_name="svm"))
    page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
    expect(page.locator("[data-count=runs] b")).to_have_text("1")


def test_live_run_advances_without_a_reload(sweep, visit):
    page = visit("#/runs")
    conn = ailab.open_lab(sweep)
    add_run(
        conn,
        "live-run-0001",
        9999,
        status="running",
        model_name="live",
        duration_s=None,
        pid=None,
        hostname="elsewhere",
    )
    page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
    expect(page.locator("tr[data-run-id='live-run-0001']")).to_contain_text("running")
    insert_points(conn, "live-run-0001", [(1, "accuracy", 0.4321)])
    expect(page.locator("tr[data-run-id='live-run-0001']")).to_contain_text("0.4321")
    conn.close()


def test_lost_server_is_told_the_data_stays_and_it_recovers(sweep, visit):
    page = visit("#/runs", provokes="Failed to load resource")
    n_rows = page.locator("tr[data-run-id]").count()
    page.route("**/lab", lambda route: route.abort())
    page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
    expect(page.get_by_role("alert")).to_contain_text("Not connected since")
    expect(page.locator("tr[data-run-id]")).to_have_count(n_rows)
    page.unroute("**/lab")
    page.get_by_role("button", name="Retry").click()
    expect(page.get_by_text("Not connected since")).to_have_count(0)


def test_theme_follows_the_system_until_switched(sweep, visit):
    def ground(page):
        return page.evaluate("getComputedStyle(document.body).backgroundColor")

    page = visit(color_scheme="light")
    becomes(page, lambda: ground(page), "rgb(255, 255, 255)")
    page = visit(color_scheme="dark")
    becomes(page, lambda: ground(page), "rgb(21, 24, 30)")
    page.locator("#lab-theme").click()
    becomes(page, lambda: ground(page), "rgb(255, 255, 255)")


@pytest.mark.parametrize(
    "address",
    ["#/", "#/runs", f"#/run?id={BEST}", "#/assistant", f"#/compare?ids={BEST[:8]},{FAILED[:8]}"],
)
def test_no_sideways_scroll_at_360_pixels(sweep, visit, address):
    page = visit(address, viewport={"width": 360, "height": 740})
    assert page.evaluate("document.documentElement.scrollWidth") <= 360


def test_run_with_everything_fits_a_phone(ended, visit):
    page = visit(f"#/run?id={GONE_RUN}&system=shown", viewport={"width": 360, "height": 740})
    expect(page.locator("section[data-key=System] figure")).to_have_count(5)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360


def test_first_load_stays_small(sweep, visit):
    page = visit("#/runs", ready=False)
    sizes = page.evaluate("""async () => {
        await new Promise(resolve => setTimeout(resolve, 500));
        return performance.getEntriesByType('resource').map(one => one.encodedBodySize);
    }""")
    assert len(sizes) <= 20 and sum(sizes) < 150_000


def test_charts_share_crosshair_zoom_and_log_axis(sweep, visit):
    ids = [BEST, run_key("linear_svm", 0.01, 1)]
    page = visit(f"#/compare?ids={','.join(run_id[:13] for run_id in ids)}")
    accuracy = page.locator("figure[data-chart=accuracy]")
    accuracy.get_by_role("slider").focus()
    page.keyboard.press("Home")
    for _ in range(11):
        page.keyboard.press("ArrowRight")
    for name in ("accuracy", "val_loss", "train_loss"):
        figure = page.locator(f"figure[data-chart={name}]")
        expect(figure.get_by_role("slider")).to_have_attribute("aria-valuenow", "12")
        logged = {point[2] for point in points_of("logistic_regression", 0.1, 0)
                  if point[:2] == (12, name)}
        expect(figure.locator("tbody tr", has_text=BEST[:8])).to_contain_text(f"{logged.pop():.4f}")
    canvas = accuracy.locator("canvas").bounding_box()
    middle = canvas["y"] + canvas["height"] / 2
    page.mouse.move(canvas["x"] + canvas["width"] * 0.5, middle)
    page.mouse.down()
    page.mouse.move(canvas["x"] + canvas["width"] * 0.8, middle, steps=4)
    page.mouse.up()
    other = page.locator("figure[data-chart=val_loss]").get_by_role("slider")
    expect(other).not_to_have_attribute("aria-valuemin", "1")
    page.mouse.dblclick(canvas["x"] + canvas["width"] * 0.6, middle)
    expect(other).to_have_attribute("aria-valuemin", "1")
    page.get_by_label("log y").check()
    page.wait_for_function("location.hash.includes('log=y')")
    page.go_back()
    expect(page.get_by_label("log y")).not_to_be_checked()


def test_a_run_keeps_its_colour_when_another_is_taken_out(sweep, visit):
    ids = [run_key("perceptron", 0.01, seed) for seed in SEEDS]
    page = visit("#/runs")
    select(page, *ids)
    expect(page.locator(".lab-foot")).to_contain_text("3 selected")
    third = page.locator(f"tr[data-run-id='{ids[2]}'] .lab-swatch")
    colour = third.evaluate("node => getComputedStyle(node).borderTopColor")
    select(page, ids[0])
    expect(page.locator(".lab-foot")).to_contain_text("2 selected")
    becomes(page, lambda: third.evaluate("node => getComputedStyle(node).borderTopColor"), colour)
    page.locator("[data-do=compare]").click()
    expect(page.locator("h1")).to_have_text("Compare 2 runs")
    in_compare = page.locator(".lab-head", has_text=ids[2][:8]).first.locator(".lab-swatch")
    becomes(page, lambda: in_compare.evaluate("node => getComputedStyle(node).borderTopColor"),
            colour)
