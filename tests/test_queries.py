"""What the store answers, each case asked twice: of the store function and over HTTP."""
import contextlib
import json
import math
import os
import sqlite3
import subprocess
import sys
import time
import urllib.parse

import pytest
from conftest import RUNS, insert_points, insert_run, started
from test_migrations import make_spec_lab

import ailab
import lab_logger

NAN = float("nan")
PATHS = {
    "list_runs": "/runs", "leaderboard": "/runs/leaderboard", "compare": "/runs/compare",
    "run": "/runs/{run_id}", "run_metrics": "/runs/{run_id}/metrics", "curves": "/curves",
    "experiments": "/experiments", "metrics": "/metrics", "lab": "/lab"}


def ask_http(api, name, run_id, query):
    path = PATHS[name].format(run_id=run_id)
    status, _, answer = api("GET", path + "?" + urllib.parse.urlencode(query, doseq=True))
    return (answer, 200) if status == 200 else (answer["detail"], status)


@pytest.fixture(params=["store", "http"])
def answer(request, lab):
    """answer("list_runs", limit=5) -> plain data, as JSON has it. A refusal fails the test."""
    ask = asker(request, lab)

    def good(name, run_id="", **query):
        got, status = ask(name, run_id, **query)
        assert status == 200, got
        return got
    return good


@pytest.fixture(params=["store", "http"])
def refusal(request, lab):
    """refusal("run", "abc") -> (status, sentence). A good answer fails the test."""
    ask = asker(request, lab)

    def bad(name, run_id="", **query):
        got, status = ask(name, run_id, **query)
        assert status != 200, got
        return status, got
    return bad


def asker(request, lab):
    if request.param == "http":
        api = request.getfixturevalue("api")
        return lambda name, run_id="", **query: ask_http(api, name, run_id, query)
    conn = lab.conn

    def ask(name, run_id="", **query):
        refresh(conn)                             # as the server does before it reads
        return ask_store(conn, name, run_id, query)
    return ask


def ask_store(conn, name, run_id, query):
    """Call the store function that serves the route, parameters parsed by the route's own table."""
    pairs = [(key, str(value)) for key, values in query.items()
             for value in (values if isinstance(values, list) else [values])]
    try:
        return json.loads(ailab.encode(STORE[name](conn, run_id, pairs))), 200
    except ailab.LabError as error:
        return error.detail, error.status


def list_of_runs(conn, _, pairs):
    given = ailab.parse_params(ailab.RUN_FILTERS + ailab.PAGE, pairs)
    return ailab.list_runs(conn, ailab.query_of(conn, given), limit=given["limit"],
                           offset=given["offset"])


def curves_of(conn, run_id, pairs):
    table = ailab.WINDOW if run_id else ailab.CURVE_RUNS + ailab.WINDOW
    given = ailab.parse_params(table, pairs)
    return ailab.run_metrics(conn, [run_id] if run_id else given["ids"], given)


STORE = {
    "list_runs": list_of_runs, "run_metrics": curves_of, "curves": curves_of,
    "leaderboard": lambda conn, _, pairs: ailab.leaderboard(
        conn, ailab.parse_params(ailab.BOARD, pairs)),
    "compare": lambda conn, _, pairs: ailab.compare_runs(
        conn, *ailab.parse_params(ailab.COMPARED, pairs).values()),
    "run": lambda conn, run_id, _: ailab.get_run(conn, urllib.parse.unquote(run_id)),
    "experiments": lambda conn, *_: ailab.list_experiments(conn),
    "metrics": lambda conn, *_: ailab.list_metrics(conn),
    "lab": lambda conn, *_: ailab.lab_overview(conn)}


def ids(lab, *names):
    return [lab.ids[name] for name in names]


def names(lab, runs):
    return [lab.names.get(run["run_id"], run["run_id"]) for run in runs]


def refresh(conn):
    with lab_logger.transaction(conn):
        ailab.refresh(conn)


def trash(conn, run_id):
    conn.execute("UPDATE runs SET deleted_at = '2026-11-20T00:00:00.000000Z' WHERE run_id = ?",
                 (run_id,))


# --- Lists ------------------------------------------------------------------------

def test_a_run_in_a_list_tells_all_that_the_table_shows(lab, answer):
    [run] = answer("list_runs", note_substring="PUBLISH")
    assert run == {
        "run_id": lab.ids["lr_01"], "timestamp": "2026-11-01T12:00:00.000000Z",
        "ended_at": "2026-11-01T12:00:12.000000Z", "duration_s": 12.0, "status": "finished",
        "end_reason": None,
        "experiment_name": "iris_sweep", "model_name": "logistic_regression",
        "task_name": "classification", "dataset_id": "iris",
        "command": "python train.py --model logistic_regression --learning_rate 0.1",
        "git_hash": "0123456789abcdef0123456789abcdef01234567", "python_version": "3.11.9",
        "wandb_url": None, "note": "PUBLISH: best of iris", "hostname": "testhost",
        "heartbeat_at": None, "parent_run_id": None,
        "params": {"model_name": "logistic_regression", "learning_rate": 0.1, "n_epochs": 5,
                   "optimizer": {"name": "sgd", "momentum": 0.0}},
        "final_metrics": {"accuracy": 0.95, "val_loss": 0.2, "f1": 0.94, "train_loss": 0.1},
        "n_epochs_logged": 5}


def test_a_run_that_was_killed_shows_its_last_logged_values(lab, answer):
    [run] = answer("list_runs", status="killed")
    assert run["final_metrics"] == {"accuracy": 0.6, "val_loss": 0.9, "train_loss": 0.1}
    assert run["n_epochs_logged"] == 3


def test_a_nan_in_the_final_metrics_is_the_word_nan(lab, answer):
    [run] = answer("list_runs", note_substring="diverged")
    assert run["final_metrics"] == {"accuracy": 0.33, "val_loss": "NaN", "train_loss": 0.1}


def test_infinities_in_the_final_metrics_are_words(lab, answer):
    insert_run(lab.conn, run_id="endless", timestamp=started(12), final_metrics_json=json.dumps(
        {"up": "Infinity", "down": "-Infinity", "huge": 1e300}))
    insert_points(lab.conn, "endless", [(1, "logged", math.inf)])
    refresh(lab.conn)
    run = answer("list_runs", limit=1)[0]
    assert run["final_metrics"] == {"up": "Infinity", "down": "-Infinity", "huge": 1e300,
                                    "logged": "Infinity"}


def test_a_run_without_points_has_no_number_of_epochs(lab, answer):
    insert_run(lab.conn, run_id="bare", timestamp=started(12))
    refresh(lab.conn)
    run = answer("list_runs", limit=1)[0]
    assert (run["run_id"], run["n_epochs_logged"], run["params"], run["final_metrics"]) == (
        "bare", None, {}, {})


def test_a_row_with_nothing_but_its_id_is_listed_last(lab, answer):
    insert_run(lab.conn, run_id="no-time")
    runs = answer("list_runs")
    assert len(runs) == 13
    assert runs[-1]["run_id"] == "no-time"
    assert runs[-1]["timestamp"] is None


@pytest.mark.parametrize("broken", ["{not json", "", "null", "[1]", "\"x\"", "{\"a\": NaN}",
                                    "{\"a\": 1e999}", "[" * 10_000, "\x00"])
def test_invalid_json_in_a_column_never_breaks_an_answer(lab, answer, broken):
    insert_run(lab.conn, run_id="broken-row", timestamp=started(12), params_json=broken,
               final_metrics_json=broken, artifacts_json=broken, device_info=broken)
    refresh(lab.conn)
    assert answer("list_runs", limit=1)[0]["run_id"] == "broken-row"
    detail = answer("run", "broken-row")
    assert isinstance(detail["artifacts"], list)
    assert isinstance(detail["device_info"], dict)
    assert isinstance(answer("compare", ids=["broken-row", lab.ids["lr_01"]])["runs"], list)


def test_deleted_runs_are_in_no_list_and_no_count(lab, answer):
    trash(lab.conn, lab.ids["lr_01"])
    assert lab.ids["lr_01"] not in [run["run_id"] for run in answer("list_runs")]
    assert names(lab, answer("leaderboard", metric_name="accuracy", top_k=1)) == ["svm_01"]
    assert {row["metric_name"] for row in answer("metrics")} == {
        "accuracy", "val_loss", "train_loss"}     # f1 was its own
    assert [row["n_runs"] for row in answer("experiments")
            if row["experiment_name"] == "iris_sweep"] == [6]
    assert answer("lab")["n_runs"] == 11


def test_deleted_runs_are_not_found_one_by_one(lab, refusal):
    trash(lab.conn, lab.ids["lr_01"])
    assert refusal("run", lab.ids["lr_01"])[0] == 404
    assert refusal("run_metrics", lab.ids["lr_01"])[0] == 404
    assert refusal("compare", ids=ids(lab, "lr_01", "svm_01"))[0] == 404


def test_a_deleted_run_when_restored_is_back_whole(lab, answer):
    before = answer("run", lab.ids["lr_01"])
    trash(lab.conn, lab.ids["lr_01"])
    lab.conn.execute("UPDATE runs SET deleted_at = NULL")
    assert answer("run", lab.ids["lr_01"]) == before


def test_a_deleted_run_no_longer_makes_a_prefix_ambiguous(lab, answer):
    trash(lab.conn, lab.ids["svm_001"])
    assert answer("run", "54e5f6")["run_id"] == lab.ids["svm_01"]


# --- One run ------------------------------------------------------------------------

def test_a_run_tells_its_surroundings(lab, answer):
    run = answer("run", lab.ids["lr_01"])
    assert (run["pid"], run["cwd"], run["error"], run["git_diff"]) == (
        4242, "/nowhere", None, "+lr = 0.1\n")
    assert run["pip_freeze"] == "numpy==2.1.0\nscikit-learn==1.5.2"
    assert run["device_info"] == {"cpu": "test", "n_cpus": 2, "gpus": []}
    assert run["metrics_url"] == f"/runs/{lab.ids['lr_01']}/metrics"
    assert (run["artifacts"], run["artifact_files"], run["child_run_ids"]) == ([], [], [])


def test_a_run_summarises_each_metric(lab, answer):
    summaries = {m["metric_name"]: m for m in answer("run", lab.ids["lr_01"])["metrics"]}
    assert sorted(summaries) == ["accuracy", "f1", "train_loss", "val_loss"]
    assert summaries["accuracy"] == {
        "metric_name": "accuracy", "value": 0.95, "is_returned": True, "n_points": 5,
        "direction": "maximize", "first_value": 0.87, "first_epoch": 1, "first_step": 100,
        "last_value": 0.95, "last_epoch": 5, "last_step": 500, "min_value": 0.87, "min_epoch": 1,
        "min_step": 100, "max_value": 0.95, "max_epoch": 5, "max_step": 500}
    assert (summaries["f1"]["value"], summaries["f1"]["n_points"],
            summaries["f1"]["last_value"]) == (0.94, 0, None)
    assert (summaries["train_loss"]["is_returned"], summaries["train_loss"]["value"],
            summaries["train_loss"]["direction"]) == (False, 0.1, "minimize")


def test_a_diverged_metric_keeps_its_finite_extremes(lab, answer):
    [loss] = [m for m in answer("run", lab.ids["diverged"])["metrics"]
              if m["metric_name"] == "val_loss"]
    assert (loss["value"], loss["last_value"]) == ("NaN", "NaN")
    assert (loss["min_value"], loss["min_epoch"], loss["max_value"], loss["max_epoch"]) == (
        0.9, 1, 1.5, 2)


def test_a_failed_run_tells_its_traceback(lab, answer):
    run = answer("run", lab.ids["failed"])
    assert run["status"] == "failed"
    assert run["error"].endswith("ValueError: learning rate too large\n")


def test_a_run_names_the_runs_that_began_inside_it(lab, answer):
    for number in (1, 2):
        insert_run(lab.conn, run_id=f"child-{number}", timestamp=started(12, number),
                   parent_run_id=lab.ids["lr_01"])
    assert answer("run", lab.ids["lr_01"])["child_run_ids"] == ["child-1", "child-2"]


@pytest.mark.parametrize("given", ["32c3d4", "32c3d4e5", "32c3d4e5-0003-4a00-8000-00000000000"])
def test_a_unique_prefix_of_six_characters_or_more_is_enough(lab, answer, given):
    assert answer("run", given)["run_id"] == lab.ids["lr_01"]
    assert answer("run_metrics", given)["curves"][0]["run_id"] == lab.ids["lr_01"]
    assert answer("compare", ids=[given, "10a1b2"])["run_ids"] == ids(lab, "lr_01", "lr_0001")
    assert answer("curves", ids=[given], names=["accuracy"])["curves"][0]["run_id"] == \
        lab.ids["lr_01"]


def test_a_short_prefix_is_not_looked_up(lab, refusal):
    assert refusal("run", "32c3d")[0] == 404


def test_an_ambiguous_prefix_names_the_candidates(lab, refusal):
    for call in (("run", "54e5f6"), ("run_metrics", "54e5f6a7")):
        status, sentence = refusal(*call)
        assert status == 409
        assert lab.ids["svm_001"] in sentence and lab.ids["svm_01"] in sentence
    assert refusal("compare", ids=["54e5f6", lab.ids["lr_01"]])[0] == 409
    assert refusal("curves", ids=["54e5f6"])[0] == 409


def test_a_whole_id_that_is_also_a_prefix_of_another_is_that_run(lab, answer):
    insert_run(lab.conn, run_id="prefix-run", timestamp=started(12))
    insert_run(lab.conn, run_id="prefix-run-2", timestamp=started(13))
    assert answer("run", "prefix-run")["run_id"] == "prefix-run"


@pytest.mark.parametrize("given", ["32c3d%", "______", "%%%%%%", "32c3d4%", "32C3D*", "32c3d?",
                                   "[3]2c3d4", "32c3d_", "32c3d4e5-0003' OR '1'='1", "zzzzzz"])
def test_wildcards_in_a_run_id_are_plain_characters(lab, refusal, given):
    status, sentence = refusal("run", urllib.parse.quote(given))
    assert status == 404
    assert given in sentence or repr(given) in sentence or urllib.parse.quote(given) in sentence


@pytest.mark.parametrize("run_id", ["a b", "a/b", "..", "ünïcode-run", "dots.and~tilde", "100%",
                                    "x:y", "#1", "semi;colon", "quote'd", "plus+sign", "a&b=c"])
def test_any_text_may_be_a_run_id(lab, api, run_id):
    insert_run(lab.conn, run_id=run_id, timestamp=started(12))
    status, _, run = api("GET", "/runs/" + urllib.parse.quote(run_id, safe=""))
    assert (status, run["run_id"]) == (200, run_id)
    assert api("GET", run["metrics_url"])[0] == 200


# --- Leaderboard --------------------------------------------------------------------

def test_a_leaderboard_is_descending_unless_told_otherwise(lab, answer):
    board = answer("leaderboard", metric_name="accuracy", top_k=4)
    assert [run["metric_value"] for run in board] == [0.95, 0.95, 0.91, 0.9]
    assert {run["metric_name"] for run in board} == {"accuracy"}
    assert {run["direction"] for run in board} == {"maximize"}


def test_a_leaderboard_ranks_a_tie_with_one_rank(lab, answer):
    board = answer("leaderboard", metric_name="accuracy", top_k=3)
    assert sorted(names(lab, board[:2])) == ["lr_01", "svm_01"]
    assert [run["rank"] for run in board] in ([1, 1, 3], [1, 2, 3])


def test_a_leaderboard_never_ranks_nan_nor_a_run_without_the_metric(lab, answer):
    for order in ("asc", "desc", "best"):
        board = answer("leaderboard", metric_name="val_loss", top_k=100, order=order)
        assert len(board) == 11
        assert "diverged" not in names(lab, board)
        assert len(answer("leaderboard", metric_name="f1", order=order)) == 1


@pytest.mark.parametrize("metric_name, order, first", [
    ("val_loss", "asc", "lr_01"), ("val_loss", "desc", "failed"), ("val_loss", "best", "lr_01"),
    ("accuracy", "asc", "diverged")])
def test_a_leaderboards_order_says_which_end_comes_first(lab, answer, metric_name, order, first):
    assert names(lab, answer("leaderboard", metric_name=metric_name, order=order, top_k=1)) == [
        first]


def test_a_leaderboard_by_best_takes_the_highest_accuracy(lab, answer):
    assert answer("leaderboard", metric_name="accuracy", order="best", top_k=1)[0][
        "metric_value"] == 0.95


@pytest.mark.parametrize("filters, first", [
    ({"model_name": "perceptron"}, "perceptron_001"), ({"status": "killed"}, "killed"),
    ({"dataset_id": "digits", "to_timestamp": "2026-11-01T16:30:00Z"}, "perceptron_0001"),
    ({"q": "diverged"}, "diverged"), ({"metric_max": "0.9", "experiment_name": "iris_sweep"},
                                      "lr_001")])
def test_a_leaderboard_takes_the_filters_of_the_list(lab, answer, filters, first):
    assert names(lab, answer("leaderboard", metric_name="accuracy", top_k=1, **filters)) == [first]


def test_a_leaderboard_whose_filters_leave_nothing_is_empty(lab, answer):
    assert answer("leaderboard", metric_name="accuracy", model_name="resnet") == []


def test_a_leaderboard_of_an_unknown_metric_names_near_ones(lab, refusal):
    status, sentence = refusal("leaderboard", metric_name="acuracy")
    assert status == 404
    assert "'acuracy'" in sentence and "accuracy" in sentence.replace("'acuracy'", "")


def test_a_leaderboard_ranks_infinities_as_numbers(lab, answer):
    insert_run(lab.conn, run_id="endless", timestamp=started(12),
               final_metrics_json='{"accuracy": "Infinity"}')
    refresh(lab.conn)
    best = answer("leaderboard", metric_name="accuracy", top_k=1)[0]
    assert (best["run_id"], best["metric_value"]) == ("endless", "Infinity")


# --- Curves ---------------------------------------------------------------------------

SPIKY = sqlite3.connect(":memory:", check_same_thread=False)


def spiky(conn):
    """Add a run of 20,000 points around 1.0 with a single 5.0 at epoch 13,337, made once."""
    if SPIKY.execute("SELECT count(*) FROM sqlite_master").fetchone() == (0,):
        insert_run(conn, run_id="spiky-run", timestamp=started(12))
        with lab_logger.transaction(conn):
            insert_points(conn, "spiky-run", (
                (epoch, "loss", 5.0 if epoch == 13_337 else 1.0 + (epoch % 10) / 1000)
                for epoch in range(1, 20_001)))
        conn.backup(SPIKY)
    SPIKY.backup(conn)


def only_curve(got):
    [curve] = got["curves"]
    return curve


def test_a_short_curve_has_every_point_as_it_was_logged(lab, answer):
    got = answer("run_metrics", lab.ids["lr_01"], names=["accuracy"])
    assert got["x"] == "epoch"
    curve = only_curve(got)
    assert (curve["run_id"], curve["metric_name"], curve["n_points"]) == (
        lab.ids["lr_01"], "accuracy", 5)
    assert curve["x"] == [1, 2, 3, 4, 5]
    for column in ("first", "min", "max", "last", "mean"):
        assert curve[column] == [0.87, 0.89, 0.91, 0.93, 0.95]
    assert curve["count"] == [1, 1, 1, 1, 1]
    assert (curve["nonfinite"], curve["n_nonfinite"]) == ([], 0)
    assert curve["time"][0] == pytest.approx(1793534401.0)     # 2026-11-01T12:00:01Z
    assert curve["time"][4] - curve["time"][0] == pytest.approx(4.0)


def test_curves_of_a_run_are_all_its_logged_metrics_unless_named(lab, answer):
    curves = answer("run_metrics", lab.ids["lr_01"])["curves"]
    assert sorted(c["metric_name"] for c in curves) == ["accuracy", "train_loss", "val_loss"]


def test_curves_of_many_runs_come_in_one_answer(lab, answer):
    got = answer("curves", ids=ids(lab, "lr_01", "svm_01"), names=["accuracy", "val_loss"])
    assert sorted((lab.names[c["run_id"]], c["metric_name"]) for c in got["curves"]) == [
        ("lr_01", "accuracy"), ("lr_01", "val_loss"), ("svm_01", "accuracy"),
        ("svm_01", "val_loss")]


def test_curves_of_a_metric_that_a_run_lacks_are_left_out_or_empty(lab, answer):
    got = answer("curves", ids=ids(lab, "lr_01"), names=["accuracy", "f1", "nothing"])
    assert [c["metric_name"] for c in got["curves"] if c["n_points"]] == ["accuracy"]


@pytest.mark.parametrize("max_points", [10, 100, 1000])
def test_a_long_curve_keeps_a_single_spike(lab, answer, max_points):
    spiky(lab.conn)
    curve = only_curve(answer("run_metrics", "spiky-run", max_points=max_points))
    assert curve["n_points"] == 20_000
    assert 0 < len(curve["x"]) <= max_points
    assert max(curve["max"]) == 5.0
    assert min(curve["min"]) == 1.0
    assert sum(curve["count"]) == 20_000
    assert curve["first"][0] == 1.001 and curve["last"][-1] == 1.0
    assert {len(curve[c]) for c in ("x", "time", "first", "min", "max", "last", "mean",
                                    "count")} == {len(curve["x"])}


def test_a_long_curves_means_average_what_was_logged(lab, answer):
    spiky(lab.conn)
    curve = only_curve(answer("run_metrics", "spiky-run", max_points=50))
    total = sum(mean * count for mean, count in zip(curve["mean"], curve["count"], strict=True))
    assert total / 20_000 == pytest.approx(1.0045 + (5.0 - 1.007) / 20_000, abs=1e-9)


def test_a_long_curves_x_goes_up(lab, answer):
    spiky(lab.conn)
    x = only_curve(answer("run_metrics", "spiky-run", max_points=100))["x"]
    assert x == sorted(x)
    assert 1 <= x[0] <= 200 and 19_800 <= x[-1] <= 20_000


def test_a_curve_of_exactly_max_points_is_not_bucketed(lab, answer):
    curve = only_curve(answer("run_metrics", lab.ids["lr_01"], names=["accuracy"], max_points=5))
    assert curve["count"] == [1, 1, 1, 1, 1]


def test_a_window_keeps_its_points_only(lab, answer):
    curve = only_curve(answer("run_metrics", lab.ids["lr_01"], names=["accuracy"],
                              **{"from": 2, "to": 4}))
    assert (curve["x"], curve["n_points"]) == ([2, 3, 4], 3)


def test_a_window_zoomed_into_a_long_curve_shows_every_point(lab, answer):
    spiky(lab.conn)
    curve = only_curve(answer("run_metrics", "spiky-run", max_points=50,
                              **{"from": 13_330, "to": 13_340}))
    assert curve["x"] == list(range(13_330, 13_341))
    assert curve["last"][7] == 5.0


def test_since_the_cursor_only_new_points_come(lab, answer):
    first = only_curve(answer("run_metrics", lab.ids["lr_01"], names=["accuracy"]))
    insert_points(lab.conn, lab.ids["lr_01"], [(6, "accuracy", 0.96), (7, "accuracy", 0.97)])
    more = only_curve(answer("run_metrics", lab.ids["lr_01"], names=["accuracy"],
                             since=first["cursor"]))
    assert (more["x"], more["last"], more["n_points"]) == ([6, 7], [0.96, 0.97], 2)
    assert more["cursor"] > first["cursor"]


def test_since_the_cursor_when_nothing_is_new_nothing_comes(lab, answer):
    first = only_curve(answer("run_metrics", lab.ids["lr_01"], names=["accuracy"]))
    again = answer("run_metrics", lab.ids["lr_01"], names=["accuracy"], since=first["cursor"])
    assert all(curve["x"] == [] and curve["cursor"] == first["cursor"]
               for curve in again["curves"])


def test_a_curve_marks_where_it_was_not_a_number(lab, answer):
    curve = only_curve(answer("run_metrics", lab.ids["diverged"], names=["val_loss"]))
    assert curve["x"] == [1, 2, 3, 4, 5]
    assert curve["last"] == [0.9, 1.5, None, None, None]
    assert curve["mean"] == [0.9, 1.5, None, None, None]
    assert curve["nonfinite"] == [{"x": 3, "value": "NaN"}, {"x": 4, "value": "NaN"},
                                  {"x": 5, "value": "NaN"}]
    assert curve["n_nonfinite"] == 3


def test_a_curve_marks_infinities_with_their_sign(lab, answer):
    insert_run(lab.conn, run_id="endless", timestamp=started(12))
    insert_points(lab.conn, "endless", [(1, "loss", 1.0), (2, "loss", math.inf),
                                        (3, "loss", -math.inf)])
    curve = only_curve(answer("run_metrics", "endless"))
    assert curve["nonfinite"] == [{"x": 2, "value": "Infinity"}, {"x": 3, "value": "-Infinity"}]
    assert curve["max"] == [1.0, None, None]


def test_a_curve_marks_at_most_100_nonfinite_points_and_counts_all(lab, answer):
    insert_run(lab.conn, run_id="all-nan", timestamp=started(12))
    insert_points(lab.conn, "all-nan", [(epoch, "loss", None) for epoch in range(1, 501)])
    curve = only_curve(answer("run_metrics", "all-nan", max_points=50))
    assert len(curve["nonfinite"]) == 100
    assert curve["n_nonfinite"] == 500
    assert set(curve["last"]) == {None}


def test_a_nan_beside_a_spike_in_one_bucket_hides_neither(lab, answer):
    spiky(lab.conn)
    lab.conn.execute("UPDATE run_metrics SET metric_value = NULL WHERE epoch = 13338 "
                     "AND run_id = 'spiky-run'")
    curve = only_curve(answer("run_metrics", "spiky-run", max_points=10))
    assert max(curve["max"]) == 5.0
    assert curve["nonfinite"] == [{"x": 13_338, "value": "NaN"}]


def test_x_may_be_the_step(lab, answer):
    got = answer("run_metrics", lab.ids["lr_01"], names=["accuracy"], x="step")
    assert got["x"] == "step"
    assert only_curve(got)["x"] == [100, 200, 300, 400, 500]


def test_x_may_be_the_time(lab, answer):
    got = answer("run_metrics", lab.ids["lr_01"], names=["accuracy"], x="time")
    curve = only_curve(got)
    assert got["x"] == "time"
    assert curve["x"] == pytest.approx([1793534401.0 + n for n in range(5)])


def test_x_as_time_drops_points_without_one(lab, answer):
    insert_run(lab.conn, run_id="timeless", timestamp=started(12))
    insert_points(lab.conn, "timeless", [(1, "loss", 1.0)])
    got = answer("run_metrics", "timeless", x="time")
    assert all(curve["x"] == [] for curve in got["curves"])


def test_x_falls_back_from_epoch_to_step_to_the_points_number(lab, answer):
    insert_run(lab.conn, run_id="mixed-run", timestamp=started(12))
    lab.conn.executemany(
        "INSERT INTO run_metrics (run_id, metric_name, metric_value, epoch, step) "
        "VALUES ('mixed-run', ?, ?, ?, ?)",
        [("by_step", 1.0, None, 10), ("by_step", 2.0, None, 20), ("by_number", 1.0, None, None),
         ("by_number", 2.0, None, None), ("by_epoch", 1.0, 7, None)])
    curves = {c["metric_name"]: c for c in answer("run_metrics", "mixed-run")["curves"]}
    assert curves["by_step"]["x"] == [10, 20]
    assert curves["by_number"]["x"] == [1, 2]
    assert curves["by_epoch"]["x"] == [7]
    curves = {c["metric_name"]: c for c in answer("run_metrics", "mixed-run", x="step")["curves"]}
    assert curves["by_epoch"]["x"] == [7]


def test_a_curve_keeps_the_order_of_logging_when_epochs_repeat(lab, answer):
    insert_run(lab.conn, run_id="restarted", timestamp=started(12))
    insert_points(lab.conn, "restarted", [(1, "loss", 3.0), (2, "loss", 2.0), (1, "loss", 2.5)])
    curve = only_curve(answer("run_metrics", "restarted"))
    assert (curve["x"], curve["last"]) == ([1, 2, 1], [3.0, 2.0, 2.5])


def test_text_where_a_metric_should_be_never_breaks_a_curve(lab, answer):
    insert_run(lab.conn, run_id="texty-run", timestamp=started(12))
    insert_points(lab.conn, "texty-run", [(1, "loss", 1.0), ("two", "loss", "high"),
                                          (3, "loss", b"\x00"), (4, "loss", 0.5)])
    refresh(lab.conn)
    curve = only_curve(answer("run_metrics", "texty-run"))
    assert curve["last"][0] == 1.0 and curve["last"][-1] == 0.5
    assert answer("run", "texty-run")["run_id"] == "texty-run"
    assert answer("list_runs", limit=1)[0]["run_id"] == "texty-run"


@pytest.mark.parametrize("query", [{"x": "colour"}, {"max_points": 0}, {"max_points": "many"},
                                   {"since": "x"}, {"from": "a"}, {"to": "nan"}])
def test_a_bad_curve_parameter_is_refused_by_name(lab, refusal, query):
    status, sentence = refusal("run_metrics", lab.ids["lr_01"], **query)
    assert status == 422
    assert next(iter(query)) in sentence


# --- How a run ended ----------------------------------------------------------------------

HERE, GONE = lab_logger.host_name(), 999_999_999            # no system has such a pid
AT = "2026-11-20T12:00:03.000000Z"


def begin(conn, run_id="ended", **columns):
    insert_run(conn, **{"run_id": run_id, "timestamp": "2026-11-20T12:00:00.500000Z",
                        "status": "running", "hostname": HERE, "pid": GONE, "heartbeat_at": AT,
                        **columns})


def memory(conn, run_id, percent, gib, at):
    conn.executemany(
        "INSERT INTO run_metrics (run_id, metric_name, metric_value, timestamp) "
        "VALUES (?, ?, ?, ?)", [(run_id, "system/memory_percent", percent, at),
                                (run_id, "system/memory_gib", gib, at)])


def test_a_run_whose_process_is_gone_says_so_in_words(lab, answer):
    begin(lab.conn)
    ailab.take_in(lab.conn, lab.db_path)
    run = answer("run", "ended")
    assert (run["status"], run["ended_at"], run["duration_s"]) == ("killed", AT, 2.5)
    assert run["end_reason"] == (f"killed without a word: process {GONE} on {HERE} is gone, "
                                 "last sign of life 2026-11-20 12:00:03 UTC")
    assert answer("list_runs", status="killed", limit=1)[0]["end_reason"] == run["end_reason"]


def test_a_run_that_was_never_heard_of_ends_when_it_began(lab, answer):
    begin(lab.conn, heartbeat_at=None)
    ailab.take_in(lab.conn, lab.db_path)
    assert answer("run", "ended")["end_reason"].endswith(
        ", last sign of life 2026-11-20 12:00:00 UTC")


def test_a_run_of_plain_sql_without_any_time_is_closed_all_the_same(lab, answer):
    begin(lab.conn, heartbeat_at=None, timestamp=None)
    ailab.take_in(lab.conn, lab.db_path)
    run = answer("run", "ended")
    assert (run["status"], run["ended_at"]) == ("killed", None)
    assert run["end_reason"].endswith("is gone")


def test_a_run_killed_with_its_memory_full_says_what_is_likely(lab, answer):
    begin(lab.conn)
    memory(lab.conn, "ended", 40.0, 6.24, "2026-11-20T12:00:03.000000Z")
    memory(lab.conn, "ended", 97.4359, 15.2, "2026-11-20T11:59:59.000000Z")    # the last by id
    ailab.take_in(lab.conn, lab.db_path)
    assert answer("run", "ended")["end_reason"].endswith(
        "12:00:03 UTC; likely out of memory: 15.2 of 15.6 GiB (97 %) were in use 4 s before")


@pytest.mark.parametrize("percent, gib, at", [
    (89.9, 14.0, AT), (None, 15.2, AT), (97.0, None, AT), ("x", 15.2, AT), (97.0, 0.0, AT),
    (97.0, 15.2, "2026-11-20T11:58:02.000000Z"), (97.0, 15.2, None)])    # 121 s before, any time
def test_a_run_killed_with_memory_left_says_nothing_of_memory(lab, answer, percent, gib, at):
    begin(lab.conn)
    memory(lab.conn, "ended", percent, gib, at)
    ailab.take_in(lab.conn, lab.db_path)
    assert answer("run", "ended")["end_reason"].endswith("12:00:03 UTC")


def test_a_run_of_another_machine_that_is_silent_is_lost(lab, answer):
    begin(lab.conn, hostname="far")
    begin(lab.conn, "alive", hostname="far", heartbeat_at=lab_logger.utc(time.time() - 60))
    ailab.take_in(lab.conn, lab.db_path)
    assert answer("run", "ended")["end_reason"] == (
        "lost: no sign of life from far for 300 s, last 2026-11-20 12:00:03 UTC")
    assert (answer("run", "alive")["status"], answer("run", "alive")["end_reason"]) == (
        "running", None)


def test_a_sent_run_of_a_machine_of_our_name_ends_by_silence_alone(lab, answer):
    """Its boot is another one, which on this machine would mean that it was restarted."""
    sent = {"received_from": "10.0.0.7", "process_key": "b00t/pid:[1]/5"}
    begin(lab.conn, **sent)
    begin(lab.conn, "alive", heartbeat_at=lab_logger.utc(time.time()), **sent)
    ailab.take_in(lab.conn, lab.db_path)
    assert answer("run", "ended")["end_reason"].startswith(f"lost: no sign of life from {HERE} for")
    assert (answer("run", "alive")["status"], answer("run", "alive")["end_reason"]) == (
        "running", None)


@pytest.mark.skipif(not lab_logger.process_key(), reason="no /proc")
def test_a_sent_run_of_this_machine_ends_with_its_process(lab, answer):
    boot = lab_logger.process_key().rpartition("/")[0]
    begin(lab.conn, received_from="127.0.0.1", process_key=f"{boot}/5")
    ailab.take_in(lab.conn, lab.db_path)
    assert answer("run", "ended")["end_reason"].startswith(
        f"killed without a word: process {GONE} on {HERE} is gone")


@pytest.mark.parametrize("column", ["hostname", "pid", "process_key", "heartbeat_at", "timestamp",
                                    "resumptions_json", "end_reason", "received_from"])
def test_a_running_run_of_plain_sql_with_bytes_for_text_stops_nothing(lab, answer, column):
    begin(lab.conn, "odd-run", **{column: b"\xff\0"})
    begin(lab.conn)
    ailab.take_in(lab.conn, lab.db_path)
    assert answer("run", "ended")["status"] == "killed"
    assert answer("run", "odd-run")["run_id"] == "odd-run"


def test_a_lost_run_that_is_heard_of_again_lives_and_has_no_reason_any_more(lab, answer):
    begin(lab.conn, hostname="far")
    ailab.take_in(lab.conn, lab.db_path)
    assert answer("run", "ended")["status"] == "killed"
    line = json.dumps({"t": time.time(), "e": 1, "m": {"loss": 0.5}}).encode() + b"\n"
    lab_logger.take_lines(lab.conn, "ended", 0, line)
    ailab.take_in(lab.conn, lab.db_path)
    run = answer("run", "ended")
    assert (run["status"], run["end_reason"], run["ended_at"], run["duration_s"]) == (
        "running", None, None, None)


def test_a_run_that_ended_by_itself_keeps_its_reason(lab, answer):
    begin(lab.conn, status="failed", end_reason="failed: ValueError: bad rate; at a.py:1 in f")
    ailab.take_in(lab.conn, lab.db_path)
    assert answer("run", "ended")["end_reason"] == "failed: ValueError: bad rate; at a.py:1 in f"


def test_a_run_tells_its_resumptions_oldest_first(lab, answer):
    def told(hour, **more):
        return {"at": f"2026-11-20T{hour}:00:00.000000Z", "hostname": "far", "pid": 7, **more}
    insert_run(lab.conn, run_id="resumed", timestamp="2026-11-20T12:00:00.000000Z",
               resumptions_json=json.dumps({
                   "aaaaaaaa": told(14, command="b", params={"lr": 0.1}, offset=9, since_id=3),
                   "bbbbbbbb": told(13), "cccccccc": "odd", "dddddddd": told(12)}))
    nothing = {"command": None, "git_hash": None, "params": None}
    assert answer("run", "resumed")["resumptions"] == [   # the last of the four is its beginning
        {**told(13), **nothing},
        {**told(14), **nothing, "command": "b", "params": {"lr": 0.1}}]
    assert answer("run", lab.ids["lr_01"])["resumptions"] == []


def test_resumptions_of_another_shape_tell_nothing(lab, answer):
    """The page takes an object for a cell's attributes; another machine may send any."""
    odd = {"text": "x", "onclick": "alert(1)"}
    insert_run(lab.conn, run_id="resumed", resumptions_json=json.dumps({"aaaaaaaa": {
        "at": odd, "hostname": odd, "pid": "7", "command": [odd], "git_hash": 5, "params": "x"}}))
    assert answer("run", "resumed")["resumptions"] == [dict.fromkeys(
        ["at", "hostname", "pid", "command", "git_hash", "params"])]


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"a": 1}', '{"a": {"at": 5}}'])
def test_odd_resumptions_of_plain_sql_never_break_a_run(lab, answer, text):
    insert_run(lab.conn, run_id="resumed", resumptions_json=text)
    assert answer("run", "resumed")["run_id"] == "resumed"


# --- System metrics -----------------------------------------------------------------------

CPU = "system/cpu_percent"


@pytest.fixture
def machine(lab):
    """Three known runs with system metrics, as the logger samples them."""
    for name, percent in (("lr_01", 90.0), ("svm_01", 20.0), ("failed", 50.0)):
        lab.conn.executemany(
            "INSERT INTO run_metrics (run_id, metric_name, metric_value, timestamp) VALUES "
            "(?, ?, ?, ?)", [(lab.ids[name], CPU, percent - 10, AT), (lab.ids[name], CPU, percent,
                                                                      AT)])
    return lab


def test_system_metrics_stay_out_of_lists_unless_they_are_named(machine, answer):
    assert all(CPU not in run["final_metrics"] for run in answer("list_runs"))
    for query in ({"metric_name": CPU}, {"sort": f"metrics.{CPU}", "limit": 3}):
        runs = answer("list_runs", **query)
        assert {names(machine, [run])[0]: run["final_metrics"][CPU] for run in runs} == {
            "lr_01": 90.0, "svm_01": 20.0, "failed": 50.0}
    assert names(machine, answer("list_runs", metric_name=CPU, metric_min=60)) == ["lr_01"]
    assert names(machine, answer("list_runs", sort=f"metrics.{CPU}", order="asc", limit=3)) == [
        "svm_01", "failed", "lr_01"]


def test_system_metrics_rank_runs_when_they_are_named(machine, answer):
    board = answer("leaderboard", metric_name=CPU)
    assert [(row["rank"], row["metric_value"]) for row in board] == [(1, 90.0), (2, 50.0),
                                                                     (3, 20.0)]
    assert answer("leaderboard", metric_name=CPU, model_name="perceptron") == []


def test_system_metrics_stay_out_of_other_leaderboards_and_of_the_vocabulary(machine, answer):
    assert all(CPU not in row["final_metrics"]
               for row in answer("leaderboard", metric_name="accuracy"))
    for metrics in (answer("metrics"), answer("lab")["metrics"]):
        assert sorted(metric["metric_name"] for metric in metrics) == [
            "accuracy", "f1", "train_loss", "val_loss"]


def test_system_metrics_stay_out_of_a_comparison_but_not_of_its_runs(machine, answer):
    got = answer("compare", ids=ids(machine, "lr_01", "svm_01"))
    assert CPU not in got["metric_keys"] and CPU not in got["best"]
    assert all(CPU not in run["final_metrics"] for run in got["runs"])


def test_system_metrics_are_summarised_in_a_runs_detail(machine, answer):
    run = answer("run", machine.ids["lr_01"])
    assert CPU not in run["final_metrics"]
    [metric] = [metric for metric in run["metrics"] if metric["metric_name"] == CPU]
    assert (metric["value"], metric["min_value"], metric["n_points"]) == (90.0, 80.0, 2)


@pytest.mark.parametrize("query", [{}, {"x": "time"}, {"from": 0}, {"since": 1}])
def test_system_metrics_are_no_curves_unless_they_are_named(machine, answer, query):
    run_id = machine.ids["lr_01"]
    for curves in (answer("run_metrics", run_id, **query), answer("curves", ids=run_id, **query)):
        assert {curve["metric_name"] for curve in curves["curves"]} == {
            "accuracy", "train_loss", "val_loss"}
    named = answer("run_metrics", run_id, names=CPU, **query)
    assert only_curve(named)["last"] == [80.0, 90.0]


def test_metrics_whose_names_only_look_like_system_ones_are_ordinary(lab, answer):
    odd = ["system", "system.cpu", "systems/x", "System/x", "system0"]
    insert_run(lab.conn, run_id="lookalike", timestamp=started(12))
    insert_points(lab.conn, "lookalike", [(1, name, 1.0) for name in odd])
    assert sorted(answer("list_runs", limit=1)[0]["final_metrics"]) == sorted(odd)
    assert {c["metric_name"] for c in answer("run_metrics", "lookalike")["curves"]} == set(odd)


# --- Summaries of points, however they come -------------------------------------------------

def shape_of(run, name="loss"):
    [metric] = [metric for metric in run["metrics"] if metric["metric_name"] == name]
    return [metric[key] for key in (
        "n_points", "first_value", "first_epoch", "last_value", "last_epoch", "min_value",
        "min_epoch", "max_value", "max_epoch")]


@pytest.mark.parametrize("cuts", [(), (1,), (2, 3), (1, 2, 3, 4, 5, 6)])
def test_a_summary_is_the_same_in_whatever_pieces_its_points_came(lab, answer, cuts):
    insert_run(lab.conn, run_id="pieces", timestamp=started(12))
    points = [(1, "loss", NAN), (2, "loss", 0.5), (3, "loss", 0.25), (4, "loss", 0.25),
              (5, "loss", 0.5), (6, "loss", float("inf")), (7, "loss", 0.3)]
    for start, end in zip((0, *cuts), (*cuts, 7), strict=True):
        insert_points(lab.conn, "pieces", points[start:end])
        refresh(lab.conn)
    assert shape_of(answer("run", "pieces")) == [7, "NaN", 1, 0.3, 7, 0.25, 3, 0.5, 2]


def test_a_summary_of_points_without_a_finite_one_has_no_extremes(lab, answer):
    insert_run(lab.conn, run_id="nothing", timestamp=started(12))
    insert_points(lab.conn, "nothing", [(1, "loss", NAN), (2, "loss", float("-inf"))])
    assert shape_of(answer("run", "nothing")) == [2, "NaN", 1, "-Infinity", 2, None, None, None,
                                                  None]


def test_points_that_plain_sql_adds_under_ids_of_old_are_counted(lab, answer):
    insert_run(lab.conn, run_id="by-id-run", timestamp=started(12))
    add = "INSERT INTO run_metrics (id, run_id, epoch, metric_name, metric_value) VALUES "
    lab.conn.execute(add + "(1000, 'by-id-run', 1, 'loss', 1.0)")
    refresh(lab.conn)
    lab.conn.execute(add + "(999, 'by-id-run', 2, 'loss', 2.0), (-5, 'by-id-run', 3, 'acc', 3.0)")
    assert shape_of(answer("run", "by-id-run"))[:5] == [2, 2.0, 2, 1.0, 1]
    assert shape_of(answer("run", "by-id-run"), "acc")[:3] == [1, 3.0, 3]


def test_points_that_replace_others_leave_no_trace_of_them(lab, answer):
    for run_id in ("before", "behind"):
        insert_run(lab.conn, run_id=run_id, timestamp=started(12))
    put = "REPLACE INTO run_metrics (id, run_id, epoch, metric_name, metric_value) VALUES "
    lab.conn.execute(put + "(1000, 'before', 1, 'loss', 9.0), (1001, 'before', 2, 'loss', 1.0)")
    refresh(lab.conn)
    lab.conn.execute(put + "(1000, 'behind', 1, 'loss', 5.0), (1002, 'behind', 2, 'loss', 6.0)")
    assert shape_of(answer("run", "before"))[:6] == [1, 1.0, 2, 1.0, 2, 1.0]
    assert shape_of(answer("run", "behind"))[:6] == [2, 5.0, 1, 6.0, 2, 5.0]


def test_points_added_and_deleted_between_two_looks_are_counted_right(lab, answer):
    insert_run(lab.conn, run_id="undone", timestamp=started(12))
    insert_points(lab.conn, "undone", [(1, "loss", 3.0), (2, "loss", 2.0)])
    refresh(lab.conn)
    insert_points(lab.conn, "undone", [(3, "loss", 1.0), (4, "loss", 4.0)])
    lab.conn.execute("DELETE FROM run_metrics WHERE run_id = 'undone' AND epoch IN (1, 4)")
    assert shape_of(answer("run", "undone")) == [2, 2.0, 2, 1.0, 3, 1.0, 3, 2.0, 2]


def test_points_after_all_were_deleted_and_numbered_anew_are_counted(lab, answer):
    lab.conn.execute("DELETE FROM run_metrics")
    lab.conn.execute("DELETE FROM sqlite_sequence")
    refresh(lab.conn)
    insert_points(lab.conn, lab.ids["lr_01"], [(1, "loss", 3.0)])
    assert shape_of(answer("run", lab.ids["lr_01"]))[:2] == [1, 3.0]


def test_new_points_are_read_by_their_ids_alone(lab):
    insert_points(lab.conn, lab.ids["lr_01"], [(6, "loss", 1.0)])
    statements = []
    lab.conn.set_trace_callback(statements.append)
    refresh(lab.conn)
    lab.conn.set_trace_callback(None)
    # Told once more for each trigger that it fires.
    (statement,) = {text for text in statements if "INSERT INTO metric_summary" in text}
    plan = " ".join(row[3] for row in lab.conn.execute("EXPLAIN QUERY PLAN " + statement))
    assert "SEARCH run_metrics USING INTEGER PRIMARY KEY (rowid>?)" in plan
    assert "SCAN run_metrics" not in plan         # a lab may hold millions


# --- Compare ----------------------------------------------------------------------------

def test_compare_keeps_the_order_asked_for(lab, answer):
    wanted = ids(lab, "svm_01", "diverged", "lr_01")
    got = answer("compare", ids=wanted)
    assert got["run_ids"] == wanted
    assert [run["run_id"] for run in got["runs"]] == wanted


def test_compare_unites_the_keys(lab, answer):
    got = answer("compare", ids=ids(lab, "lr_01", "killed"))
    assert sorted(got["metric_keys"]) == ["accuracy", "f1", "train_loss", "val_loss"]
    assert sorted(got["param_keys"]) == ["learning_rate", "model_name", "n_epochs",
                                         "optimizer.momentum", "optimizer.name"]


def test_compare_names_the_params_that_differ_nested_ones_too(lab, answer):
    got = answer("compare", ids=ids(lab, "lr_01", "perceptron_01"))
    assert sorted(got["differing_params"]) == ["model_name", "optimizer.momentum"]


def test_compare_counts_a_missing_param_as_a_difference(lab, answer):
    insert_run(lab.conn, run_id="fewer", timestamp=started(12), params_json='{"n_epochs": 5}')
    refresh(lab.conn)
    got = answer("compare", ids=["fewer", lab.ids["lr_01"]])
    assert "learning_rate" in got["differing_params"]
    assert "n_epochs" not in got["differing_params"]


def test_compare_names_every_run_of_a_tie_as_best(lab, answer):
    got = answer("compare", ids=ids(lab, "svm_01", "lr_01", "svm_001"))
    assert got["best"]["accuracy"]["direction"] == "maximize"
    assert got["best"]["accuracy"]["value"] == 0.95
    assert sorted(got["best"]["accuracy"]["run_ids"]) == sorted(ids(lab, "svm_01", "lr_01"))
    best, = ids(lab, "lr_01")
    assert got["best"]["val_loss"] == {"direction": "minimize", "value": 0.2, "run_ids": [best],
                                       "epochs": {best: None}, "steps": {best: None}}


def test_compare_never_takes_nan_for_the_best(lab, answer):
    insert_run(lab.conn, run_id="nan-only", timestamp=started(12),
               final_metrics_json='{"odd_metric": "NaN"}')
    refresh(lab.conn)
    got = answer("compare", ids=[lab.ids["diverged"], lab.ids["killed"], "nan-only"])
    assert got["best"]["val_loss"]["run_ids"] == ids(lab, "killed")
    assert "odd_metric" not in got["best"]
    assert "odd_metric" in got["metric_keys"]


def test_compare_names_the_packages_that_differ(lab, answer):
    a, b = ids(lab, "lr_01", "perceptron_01")
    assert answer("compare", ids=[a, b])["differing_packages"] == {
        "scikit-learn": {a: "1.5.2", b: "1.6.0"}}


def test_compare_says_null_for_a_package_one_run_lacks(lab, answer):
    insert_run(lab.conn, run_id="with-torch", timestamp=started(12),
               pip_freeze="numpy==2.1.0\nscikit-learn==1.5.2\ntorch==2.5.0")
    got = answer("compare", ids=["with-torch", lab.ids["lr_01"]])
    assert got["differing_packages"] == {"torch": {"with-torch": "2.5.0", lab.ids["lr_01"]: None}}


def test_compare_shows_each_runs_metrics_artifacts_and_diff(lab, answer):
    first = answer("compare", ids=ids(lab, "lr_01", "svm_01"))["runs"][0]
    assert first["git_diff"] == "+lr = 0.1\n"
    assert first["artifacts"] == []
    assert [m["metric_name"] for m in first["metrics"] if m["max_epoch"] == 5] == ["accuracy"]
    assert first["final_metrics"]["f1"] == 0.94


def test_compare_drops_an_id_given_twice(lab, answer):
    a, b = ids(lab, "lr_01", "svm_01")
    assert answer("compare", ids=[a, b, a, a[:8]])["run_ids"] == [a, b]


@pytest.mark.parametrize("count", [0, 1, 21])
def test_compare_takes_2_to_20_runs(lab, refusal, count):
    for number in range(21):
        insert_run(lab.conn, run_id=f"many-{number:02d}", timestamp=started(12))
    status, sentence = refusal("compare", ids=[f"many-{n:02d}" for n in range(count)])
    assert status == 422
    assert "2" in sentence and "20" in sentence


def test_compare_of_one_run_twice_is_refused(lab, refusal):
    assert refusal("compare", ids=[lab.ids["lr_01"]] * 2)[0] == 422


def test_compare_of_twenty_runs_works(lab, answer):
    for number in range(20):
        insert_run(lab.conn, run_id=f"many-{number:02d}", timestamp=started(12))
    assert len(answer("compare", ids=[f"many-{n:02d}" for n in range(20)])["runs"]) == 20


# --- Names ---------------------------------------------------------------------------

def test_experiments_are_counted(lab, answer):
    got = {row["experiment_name"]: row for row in answer("experiments")}
    assert {name: (row["n_runs"], row["n_running"]) for name, row in got.items()} == {
        "iris_sweep": (7, 0), "digits_sweep": (5, 0)}
    assert got["digits_sweep"]["last_activity"] >= "2026-11-01T21:00:00"


def test_metrics_come_with_their_direction_most_used_first(lab, answer):
    got = [(row["metric_name"], row["n_runs"], row["direction"]) for row in answer("metrics")]
    assert sorted(got[:3]) == [("accuracy", 12, "maximize"), ("train_loss", 12, "minimize"),
                               ("val_loss", 12, "minimize")]
    assert got[3:] == [("f1", 1, "maximize")]


@pytest.mark.parametrize("name, direction", [
    ("loss", "minimize"), ("val_loss", "minimize"), ("val/loss", "minimize"),
    ("test.rmse", "minimize"), ("eval-perplexity", "minimize"), ("word err rate", "minimize"),
    ("train_time", "minimize"), ("ms", "minimize"), ("Val_Loss", "minimize"),
    ("accuracy", "maximize"), ("f1", "maximize"), ("lossless_ratio", "maximize"),
    ("auc", "maximize"), ("timely", "maximize"), ("r2", "maximize"), ("reward", "maximize")])
def test_a_metric_is_minimised_when_a_word_of_its_name_says_so(name, direction):
    assert ailab.direction(name) == direction


def test_the_lab_at_a_glance_counts_and_names(lab, answer):
    got = answer("lab")
    assert got["n_runs"] == 12
    assert got["counts"] == {"running": 0, "finished": 10, "failed": 1, "killed": 1}
    assert {row["name"]: row["n_runs"] for row in got["models"]} == {
        "logistic_regression": 4, "linear_svm": 4, "perceptron": 4}
    assert {row["name"]: row["n_runs"] for row in got["datasets"]} == {"iris": 7, "digits": 5}
    assert {row["name"]: row["n_runs"] for row in got["tasks"]} == {"classification": 12}
    assert {row["experiment_name"] for row in got["experiments"]} == {"iris_sweep", "digits_sweep"}
    params = {row["param_name"]: (row["n_runs"], row["n_values"]) for row in got["params"]}
    assert params == {"learning_rate": (12, 6), "model_name": (12, 3), "n_epochs": (12, 1),
                      "optimizer.name": (12, 1), "optimizer.momentum": (12, 2)}
    assert {row["metric_name"] for row in got["metrics"]} == {
        "accuracy", "val_loss", "train_loss", "f1"}


# --- The best of a curve ------------------------------------------------------------------

@pytest.fixture
def peaks(lab):
    """Runs that were better before their end: accuracy, val_loss and loss by epoch."""
    for number, (name, accuracy, val_loss) in enumerate([
            ("early", [0.5, 0.99, 0.6], [0.9, 0.1, 0.8]), ("late", [0.7, 0.8, 0.97], [1, 2, 3]),
            ("wild", [float("nan"), 0.98, float("inf")], [float("nan")] * 3)]):
        insert_run(lab.conn, run_id=name, timestamp=started(12 + number), status="finished",
                   final_metrics_json='{"val_loss": 0.5}' if name == "late" else "{}")
        insert_points(lab.conn, name, [
            (epoch, metric, values[epoch - 1]) for epoch in (1, 2, 3) for metric, values in (
                ("accuracy", accuracy), ("val_loss", val_loss), ("loss", [3, 2, 1]))])
    refresh(lab.conn)
    return lab


@pytest.mark.parametrize("metric_name, by, order, ranking", [
    ("accuracy", "best", "best", [("early", 0.99), ("wild", 0.98), ("late", 0.97)]),
    ("accuracy", "max", "desc", [("early", 0.99), ("wild", 0.98), ("late", 0.97)]),
    ("accuracy", "min", "desc", [("wild", 0.98)]),
    ("accuracy", "last", "desc", [("wild", "Infinity"), ("late", 0.97)]),
    ("accuracy", "final", "desc", [("wild", "Infinity"), ("late", 0.97)]),
    ("val_loss", "best", "best", [("early", 0.1), ("lr_01", 0.2), ("svm_01", 0.25)]),
    ("val_loss", "min", "asc", [("early", 0.1), ("lr_01", 0.2), ("svm_01", 0.25)]),
    ("val_loss", "max", "desc", [("failed", 5.1), ("late", 3), ("diverged", 1.5)]),
    ("val_loss", "last", "desc", [("failed", 5), ("late", 3), ("killed", 0.9)]),
    ("val_loss", "final", "desc", [("failed", 5), ("killed", 0.9)]),
    ("f1", "best", "best", [("lr_01", 0.94)]),             # returned, never logged
])
def test_a_leaderboard_ranks_by_the_value_asked_for(peaks, answer, metric_name, by, order, ranking):
    board = answer("leaderboard", metric_name=metric_name, by=by, order=order, top_k=3)
    got = [(name, row["metric_value"]) for name, row in zip(names(peaks, board), board,
                                                            strict=True)]
    assert got[:len(ranking)] == ranking
    assert {row["by"] for row in board} == {by}


def test_a_leaderboard_by_best_tells_the_epoch_and_the_other_metrics_there(peaks, answer):
    first = answer("leaderboard", metric_name="accuracy", by="best", order="best", top_k=1)[0]
    assert (first["run_id"], first["metric_epoch"], first["metric_step"]) == ("early", 2, None)
    assert first["at_epoch"] == {"val_loss": 0.1, "loss": 2}
    assert first["final_metrics"]["accuracy"] == 0.6
    wild = answer("leaderboard", metric_name="accuracy", by="best", order="best", top_k=2)[1]
    assert wild["at_epoch"] == {"val_loss": "NaN", "loss": 2}
    known = answer("leaderboard", metric_name="val_loss", by="min", order="asc", top_k=2)[1]
    assert (known["metric_epoch"], known["metric_step"]) == (5, 500)
    assert known["at_epoch"] == {"accuracy": 0.95, "train_loss": 0.1}


def test_a_leaderboard_by_final_tells_no_epoch(peaks, answer):
    row = answer("leaderboard", metric_name="accuracy", top_k=1)[0]
    assert (row["by"], row["metric_epoch"], row["metric_step"], row["at_epoch"]) == (
        "final", None, None, {})


def test_the_metrics_of_an_epoch_are_found_in_long_curves_whatever_they_are_beside(lab, answer):
    insert_run(lab.conn, run_id="long", timestamp=started(13), status="finished")
    top = 613
    insert_points(lab.conn, "long", [(n, "score", -abs(n - top)) for n in range(1_000)])
    insert_points(lab.conn, "long", [(n // 10, "batch_loss", n) for n in range(10_000)])
    insert_points(lab.conn, "long", [(n, "every_second", n) for n in range(0, 1_000, 2)])
    insert_points(lab.conn, "long", [(n, "resumed", n) for n in [*range(700), *range(600, 1_000)]])
    insert_points(lab.conn, "long", [(top, "once", 7), (None, "no_epoch", 1)])
    refresh(lab.conn)
    row, = answer("leaderboard", metric_name="score", by="best")
    assert row["metric_epoch"] == top
    assert row["at_epoch"] == {"batch_loss": 6_139, "resumed": top, "once": 7}


def test_where_only_steps_were_logged_the_best_is_told_by_its_step(lab, answer):
    insert_run(lab.conn, run_id="steps", timestamp=started(13), status="finished")
    lab.conn.executemany("INSERT INTO run_metrics (run_id, step, metric_name, metric_value) "
                         "VALUES ('steps', ?, ?, ?)", [
        (step, name, value) for step, score in [(10, 0.1), (20, 0.9), (30, 0.2)]
        for name, value in (("score", score), ("other", step))])
    refresh(lab.conn)
    row, = answer("leaderboard", metric_name="score", by="best")
    assert (row["metric_epoch"], row["metric_step"], row["at_epoch"]) == (None, 20, {"other": 20})


def test_a_list_sorted_by_best_tells_what_it_ranked_by(peaks, answer):
    runs = answer("list_runs", sort="metrics.accuracy", by="best", limit=20)
    assert names(peaks, runs)[:3] == ["early", "wild", "late"]
    assert len(runs) == 15
    ranked = runs[0]["ranked"]
    assert (ranked["metric_value"], ranked["metric_epoch"], ranked["direction"], ranked["by"]) == (
        0.99, 2, "maximize", "best")
    assert "ranked" not in answer("list_runs", sort="metrics.accuracy")[0]
    bare = answer("list_runs", sort="metrics.f1", by="best", limit=20)
    assert bare[0]["ranked"]["metric_epoch"] is None
    assert bare[1]["ranked"] is None


@pytest.mark.parametrize("by, limits, found", [
    ("best", {"metric_min": 0.96}, ["early", "late", "wild"]),
    ("last", {"metric_min": 0.96}, ["late", "wild"]),
    ("min", {"metric_max": 0.5}, ["diverged", "early", "failed"]),
    ("max", {"metric_max": 0.4}, ["diverged", "failed"])])
@pytest.mark.parametrize("sort", ["timestamp", "metrics.accuracy", "metrics.val_loss"])
def test_metric_bounds_compare_the_value_asked_for(peaks, answer, by, limits, found, sort):
    runs = answer("list_runs", metric_name="accuracy", by=by, sort=sort, **limits)
    assert sorted(names(peaks, runs)) == found


@pytest.mark.parametrize("by, metric_name, value, epochs", [
    ("final", "accuracy", 0.97, {"late": None}), ("best", "accuracy", 0.99, {"early": 2}),
    ("max", "accuracy", 0.99, {"early": 2}), ("min", "accuracy", 0.98, {"wild": 2}),
    ("best", "val_loss", 0.1, {"early": 2}), ("last", "val_loss", 0.8, {"early": 3}),
    ("final", "val_loss", 0.5, {"late": None}), ("max", "val_loss", 0.9, {"early": 1}),
    ("best", "loss", 1, {"early": 3, "late": 3, "wild": 3})])
def test_compare_finds_the_best_by_the_value_asked_for(peaks, answer, by, metric_name, value,
                                                       epochs):
    best = answer("compare", ids=["early", "late", "wild"], by=by)["best"][metric_name]
    assert (best["value"], best["epochs"]) == (value, epochs)
    assert set(best["steps"]) == set(best["run_ids"]) == set(epochs)


# --- Directions -----------------------------------------------------------------------------

@pytest.fixture
def minimised(peaks):
    """peaks, where accuracy was set to be minimised."""
    ailab.set_direction(peaks.conn, "accuracy", "minimize")
    return peaks


def test_a_direction_that_was_set_is_told_everywhere(minimised, answer):
    for listed in (answer("metrics"), answer("lab")["metrics"], answer("run", "early")["metrics"],
                   answer("compare", ids=["early", "late"])["runs"][0]["metrics"]):
        ways = {metric["metric_name"]: metric["direction"] for metric in listed}
        assert (ways["accuracy"], ways["val_loss"]) == ("minimize", "minimize")


def test_a_direction_that_was_set_decides_what_is_best(minimised, answer):
    row = answer("leaderboard", metric_name="accuracy", order="best", by="best", top_k=1)[0]
    assert names(minimised, [row]) == ["diverged"]
    assert (row["direction"], row["metric_value"], row["metric_epoch"]) == ("minimize", 0.25, 1)
    best = answer("compare", ids=["early", "late"], by="best")["best"]["accuracy"]
    assert (best["direction"], best["value"], best["run_ids"]) == ("minimize", 0.5, ["early"])
    runs = answer("list_runs", where="metrics.accuracy.best <= 0.25")
    assert names(minimised, runs) == ["diverged"]
    assert names(minimised, answer("list_runs", metric_name="accuracy", metric_max=0.25,
                                   by="best")) == ["diverged"]


def test_a_direction_outlives_the_index_and_goes_back_to_the_rule(minimised, db_path):
    minimised.conn.execute("DROP INDEX runs_git_hash")    # as an older AI-Lab left it
    with contextlib.closing(ailab.open_lab(db_path)) as conn:
        assert ailab.directions(conn)("accuracy") == "minimize"
        assert ailab.set_direction(conn, "accuracy", None) == {
            "metric_name": "accuracy", "n_runs": 15, "direction": "maximize"}
        assert ailab.directions(conn)("accuracy") == "maximize"


# --- Notes and the trash --------------------------------------------------------------

def test_a_note_when_set_is_in_the_store_and_in_the_answer(lab, api):
    status, _, run = api("PATCH", f"/runs/{lab.ids['svm_01']}/note", {"note": "PUBLISH: svm"})
    assert (status, run["note"], run["run_id"]) == (200, "PUBLISH: svm", lab.ids["svm_01"])
    assert lab.conn.execute("SELECT note FROM runs WHERE run_id = ?",
                            (lab.ids["svm_01"],)).fetchone() == ("PUBLISH: svm",)


def test_a_note_when_null_is_taken_off(lab, api):
    assert api("PATCH", f"/runs/{lab.ids['lr_01']}/note", {"note": None})[2]["note"] is None
    assert lab.conn.execute("SELECT count(*) FROM runs WHERE note LIKE 'PUBLISH%'").fetchone() == (
        0,)


def test_set_note_takes_a_prefix(lab):
    ailab.set_note(lab.conn, "32c3d4", "by prefix")
    assert lab.conn.execute("SELECT note FROM runs WHERE run_id = ?",
                            (lab.ids["lr_01"],)).fetchone() == ("by prefix",)


def test_a_deleted_run_keeps_its_row_and_its_artifact_files(lab, api, tmp_path):
    artifact = tmp_path / "work" / "model.joblib"
    artifact.write_text("weights")
    lab.conn.execute("UPDATE runs SET artifacts_json = ?, cwd = ? WHERE run_id = ?",
                     (json.dumps([str(artifact)]), str(tmp_path / "work"), lab.ids["svm_01"]))
    status, _, got = api("DELETE", f"/runs/{lab.ids['svm_01']}")
    assert (status, got["run_id"]) == (200, lab.ids["svm_01"])
    assert lab.conn.execute("SELECT deleted_at FROM runs WHERE run_id = ?",
                            (lab.ids["svm_01"],)).fetchone() == (got["deleted_at"],)
    assert artifact.read_text() == "weights"
    assert api("GET", f"/runs/{lab.ids['svm_01']}")[0] == 404
    assert api("DELETE", f"/runs/{lab.ids['svm_01']}")[0] == 404


# --- Cost -------------------------------------------------------------------------------

def n_statements(conn, call):
    statements = []
    conn.set_trace_callback(statements.append)
    try:
        call()
    finally:
        conn.set_trace_callback(None)
    return len(statements)


@pytest.mark.parametrize("name", ["list_runs", "leaderboard", "compare", "metrics", "lab"])
def test_the_number_of_statements_does_not_grow_with_the_runs(lab, name):
    few = {"compare": {"ids": ids(lab, "lr_01", "svm_01")},
           "list_runs": {"limit": 2},
           "leaderboard": {"metric_name": "accuracy", "top_k": 2}}.get(name, {})
    many = {"compare": {"ids": [run.run_id for run in RUNS]},
            "list_runs": {"limit": 12},
            "leaderboard": {"metric_name": "accuracy", "top_k": 12}}.get(name, {})

    def count(query):
        return n_statements(lab.conn, lambda: ask_store(lab.conn, name, "", query))
    if name in ("metrics", "lab"):
        before = count(few)
        for number in range(50):
            insert_run(lab.conn, run_id=f"more-{number}", experiment_name=f"more-{number}",
                       params_json=f'{{"p{number}": 1}}', final_metrics_json=f'{{"m{number}": 1}}')
        refresh(lab.conn)
        assert count(many) == before
    elif name == "compare":                       # one look-up for each id, at most
        extra = len(many["ids"]) - len(few["ids"])
        assert count(many) - count(few) <= extra
    else:
        assert count(many) == count(few)


def test_a_curve_costs_a_few_statements_however_long(lab):
    insert_points(lab.conn, lab.ids["lr_01"], [(n, "accuracy", 0.5) for n in range(6, 3_000)])

    def read():
        ask_store(lab.conn, "curves", "", {"ids": [lab.ids["lr_01"]], "names": ["accuracy"]})
    assert n_statements(lab.conn, read) <= 5


# --- Rows that came by plain SQL ----------------------------------------------------------

def plain(db_path, *statements):
    with sqlite3.connect(db_path, timeout=10) as other:
        for statement, values in statements:
            other.execute(statement, values)
    other.close()


def soon(check, within_s=60.0):
    """Ask again until it is true: the server looks for foreign changes every two seconds."""
    deadline = time.monotonic() + within_s
    while True:
        got = check()
        if got or time.monotonic() > deadline:
            return got
        time.sleep(0.05)


INSERT_RUN = ("INSERT INTO runs (run_id, timestamp, experiment_name, params_json, "
              "final_metrics_json) VALUES (?, ?, ?, ?, ?)",
              ("plain-sql", "2026-12-01T00:00:00", "by_hand", '{"learning_rate": 7}',
               '{"accuracy": 0.99}'))


def test_a_lab_made_by_plain_sql_is_served_whole(spec_api):
    runs = spec_api("GET", "/runs")[2]
    assert [run["run_id"] for run in runs] == ["run-b", "run-a"]
    assert runs[1]["params"] == {"learning_rate": 0.1}
    assert runs[1]["final_metrics"] == {"accuracy": 0.9, "f1": 0.8, "train_loss": 0.25}
    board = spec_api("GET", "/runs/leaderboard?metric_name=accuracy")[2]
    assert [(run["run_id"], run["metric_value"]) for run in board] == [("run-a", 0.9),
                                                                       ("run-b", 0.7)]
    curve = only_curve(spec_api("GET", "/runs/run-a/metrics?names=train_loss")[2])
    assert (curve["x"], curve["last"], curve["time"]) == ([1, 2], [0.5, 0.25], [None, None])
    assert spec_api("GET", "/experiments")[2][0]["n_runs"] == 2


@pytest.fixture
def spec_api(db_path, request):
    make_spec_lab(db_path)
    return request.getfixturevalue("api")


def test_a_run_inserted_by_plain_sql_shows_up_everywhere(lab, api):
    api("GET", "/runs")
    plain(lab.db_path, INSERT_RUN, ("INSERT INTO run_metrics (run_id, epoch, metric_name, "
                                    "metric_value) VALUES ('plain-sql', 1, 'accuracy', 0.5)", ()))
    assert soon(lambda: api("GET", "/runs")[2][0]["run_id"] == "plain-sql")
    assert soon(lambda: api("GET", "/runs/leaderboard?metric_name=accuracy")[2][0]["run_id"]
                == "plain-sql")
    assert only_curve(api("GET", "/runs/plain-sql/metrics")[2])["last"] == [0.5]
    assert soon(lambda: "by_hand" in [e["experiment_name"] for e in api("GET", "/experiments")[2]])
    assert soon(lambda: [r["run_id"] for r in api("GET", "/runs?sort=params.learning_rate&limit=2")
                         [2]][1] == "plain-sql")
    assert soon(lambda: [r["run_id"] for r in api("GET", "/runs?q=by_hand")[2]] == ["plain-sql"])


def test_a_run_updated_by_plain_sql_changes_everywhere(lab, api):
    api("GET", "/runs")
    plain(lab.db_path, ("UPDATE runs SET final_metrics_json = '{\"accuracy\": 0.999}', "
                        "experiment_name = 'moved', note = 'by hand' WHERE run_id = ?",
                        (lab.ids["svm_0001"],)))
    best = soon(lambda: [run for run in api("GET", "/runs/leaderboard?metric_name=accuracy")[2]
                         if run["metric_value"] == 0.999])
    assert [run["run_id"] for run in best] == [lab.ids["svm_0001"]]
    assert best[0]["note"] == "by hand"
    assert [run["run_id"] for run in api("GET", "/runs?experiment_name=moved")[2]] == [
        lab.ids["svm_0001"]]


def test_points_changed_by_plain_sql_change_curve_and_summary(lab, api):
    path = f"/runs/{lab.ids['killed']}"
    api("GET", path)
    plain(lab.db_path, ("UPDATE run_metrics SET metric_value = 0.75 WHERE run_id = ? AND "
                        "metric_name = 'accuracy' AND epoch = 3", (lab.ids["killed"],)))
    assert only_curve(api("GET", path + "/metrics?names=accuracy")[2])["last"] == [0.56, 0.58, 0.75]
    assert soon(lambda: api("GET", path)[2]["final_metrics"]["accuracy"] == 0.75)


def test_a_run_deleted_by_plain_sql_is_gone_everywhere(lab, api):
    api("GET", "/runs")
    plain(lab.db_path, ("DELETE FROM run_metrics WHERE run_id = ?", (lab.ids["lr_01"],)),
          ("DELETE FROM runs WHERE run_id = ?", (lab.ids["lr_01"],)))
    assert soon(lambda: len(api("GET", "/runs")[2]) == 11)
    assert soon(lambda: [r["run_id"] for r in api(
        "GET", "/runs/leaderboard?metric_name=accuracy&top_k=1")[2]] == [lab.ids["svm_01"]])
    assert api("GET", f"/runs/{lab.ids['lr_01']}")[0] == 404
    assert soon(lambda: "f1" not in [m["metric_name"] for m in api("GET", "/metrics")[2]])


@pytest.fixture
def eager(monkeypatch):
    """Let the server look for what dead processes left every twentieth of a second."""
    monkeypatch.setattr(ailab, "TIDY_EVERY_S", 0.05)


def test_a_journal_left_behind_is_taken_in_while_the_server_runs(eager, lab, api):
    os.makedirs(lab.db_path + ".journals", exist_ok=True)
    lines = [{"v": 1, "db": lab.db_path, "t": 1_796_000_000.0, "set": {
        "timestamp": "2026-11-30T00:00:00.000000Z", "status": "finished",
        "experiment_name": "left"}}, {"t": 1_796_000_001.0, "e": 1, "m": {"accuracy": 0.99}}]
    with open(lab.db_path + ".journals/left-behind.jsonl", "w") as journal:
        journal.writelines(json.dumps(line) + "\n" for line in lines)
    assert soon(lambda: api("GET", "/runs?experiment_name=left")[2])
    assert api("GET", "/runs/leaderboard?metric_name=accuracy&top_k=1")[2][0][
        "run_id"] == "left-behind"


def test_a_run_whose_process_is_gone_shows_as_killed_while_the_server_runs(eager, lab, api):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    insert_run(lab.conn, run_id="orphan-run", timestamp=started(12), status="running",
               hostname=lab_logger.host_name(), pid=gone.pid, heartbeat_at=started(12, 90))
    assert soon(lambda: api("GET", "/runs/orphan-run")[2]["status"] == "killed")
    run = api("GET", "/runs/orphan-run")[2]
    assert (run["ended_at"], run["duration_s"]) == (started(12, 90), 90.0)


def test_a_run_of_a_living_process_keeps_running(eager, lab, api):
    insert_run(lab.conn, run_id="living-run", timestamp=started(12), status="running",
               hostname=lab_logger.host_name(), pid=os.getpid(),
               process_key=lab_logger.process_key())
    insert_run(lab.conn, run_id="orphan-run", timestamp=started(12), status="running",
               hostname=lab_logger.host_name(), pid=os.getpid(), process_key="another/boot/1")
    assert soon(lambda: api("GET", "/runs/orphan-run")[2]["status"] == "killed")
    assert api("GET", "/runs/living-run")[2]["status"] == "running"
    assert api("GET", "/lab")[2]["counts"]["running"] == 1


def test_open_store_takes_in_what_plain_sql_changed(lab):
    plain(lab.db_path, INSERT_RUN)
    conn = ailab.open_store(lab.db_path)
    got, status = ask_store(conn, "leaderboard", "", {"metric_name": "accuracy", "top_k": 1})
    conn.close()
    assert (status, got[0]["run_id"]) == (200, "plain-sql")


def test_points_replaced_by_plain_sql_change_the_summary(lab, api):
    row = lab.conn.execute("SELECT id, run_id FROM run_metrics WHERE run_id = ? AND "
                           "metric_name = 'val_loss' ORDER BY id LIMIT 1",
                           (lab.ids["svm_01"],)).fetchone()
    lab.conn.execute("INSERT OR REPLACE INTO run_metrics (id, run_id, epoch, metric_name, "
                     "metric_value) VALUES (?, ?, 1, 'val_loss', -5)", tuple(row))
    with lab_logger.transaction(lab.conn):
        ailab.refresh(lab.conn)
    found = lab.conn.execute("SELECT n_points, min_value FROM metric_summary WHERE run_id = ? "
                             "AND metric_name = 'val_loss'", (lab.ids["svm_01"],)).fetchone()
    assert tuple(found) == (5, -5)


def test_rows_without_an_id_and_names_that_are_no_text_break_nothing(lab, api, capsys):
    lab.conn.execute("INSERT INTO runs (run_id, timestamp) VALUES (NULL, '2026-11-25')")
    lab.conn.execute("INSERT INTO run_metrics (run_id, metric_name, metric_value) "
                     "VALUES (?, x'00ff', 1)", (lab.ids["svm_01"],))
    for path in ("/lab", "/runs", "/metrics", f"/runs/{lab.ids['svm_01']}",
                 f"/curves?ids={lab.ids['svm_01']}"):
        assert api("GET", path)[0] == 200
    assert ailab.main(["runs", "--db", lab.db_path]) == 0
    assert ailab.main(["show", lab.ids["svm_01"], "--db", lab.db_path]) == 0


@pytest.mark.parametrize("asked", ["", "&sort=duration", "&status=finished",
                                   "&note_substring=none"])
def test_run_without_an_id_is_neither_listed_nor_counted(lab, api, asked):
    lab.conn.execute("INSERT INTO runs (run_id, timestamp, status, note, duration_s) VALUES "
                     "(NULL, '2026-11-25', 'finished', 'none', 1)")
    _, headers, page = api("GET", f"/runs?limit=3{asked}")
    _, _, runs = api("GET", f"/runs?limit=1000{asked}")
    assert None not in [run["run_id"] for run in page + runs]
    assert int(headers["X-Total-Count"]) == len(runs)


def test_sender_whose_clock_is_an_hour_behind_is_alive_and_not_lost(lab, server, api):
    behind = time.time() - 3600
    head = {"v": 2, "t": behind, "set": {"status": "running", "hostname": "far", "pid": 1,
                                         "timestamp": lab_logger.utc(behind)}}
    body = json.dumps(head) + "\n"
    for now, status in ((behind, "running"), (time.time(), "killed")):
        run_id = f"behind-{status}"
        answer = api("POST", f"/ingest?journal={run_id}&offset=0&now={now:.0f}", body,
                     {"Content-Type": "application/x-ndjson"})
        assert answer[0] == 200
        ailab.take_in(lab.conn, lab.db_path)
        assert ailab.get_run(lab.conn, run_id)["status"] == status


# --- Answers that are kept ----------------------------------------------------------------

@pytest.fixture
def curves_made(monkeypatch):
    """The calls of run_metrics() so far."""
    calls, real = [], ailab.run_metrics
    monkeypatch.setattr(ailab, "run_metrics", lambda *given: calls.append(given) or real(*given))
    return calls


def test_the_curves_of_a_run_are_kept_while_others_log(lab, api, curves_made):
    path = f"/runs/{lab.ids['lr_01']}/metrics?names=accuracy"
    first = api("GET", path)[2]
    for epoch in range(6, 9):
        plain(lab.db_path, ("INSERT INTO run_metrics (run_id, epoch, metric_name, metric_value) "
                            "VALUES (?, ?, 'accuracy', 0.5)", (lab.ids["svm_01"], epoch)))
        assert api("GET", path)[2] == first
    assert len(curves_made) == 1


@pytest.mark.parametrize("change", [
    "INSERT INTO run_metrics (run_id, epoch, metric_name, metric_value) "
    "VALUES (:run_id, 6, 'accuracy', 0.5)",
    "UPDATE run_metrics SET metric_value = 0.5 WHERE run_id = :run_id AND epoch = 3",
    "UPDATE run_metrics SET epoch = 33 WHERE run_id = :run_id AND epoch = 3",
    "UPDATE run_metrics SET timestamp = NULL WHERE run_id = :run_id",
    "REPLACE INTO run_metrics (id, run_id, epoch, metric_name, metric_value) "
    "SELECT id, run_id, epoch, metric_name, 0.5 FROM run_metrics WHERE run_id = :run_id",
    "UPDATE run_metrics SET metric_name = 'moved' WHERE run_id = :run_id AND epoch = 2",
    "DELETE FROM run_metrics WHERE run_id = :run_id AND epoch = 3"])
def test_the_curves_of_a_run_are_never_stale(lab, api, change):
    path = f"/runs/{lab.ids['lr_01']}/metrics"
    before = api("GET", path)[2]
    plain(lab.db_path, (change, {"run_id": lab.ids["lr_01"]}))
    after = api("GET", path)[2]
    assert after != before
    assert after == ask_store(lab.conn, "run_metrics", lab.ids["lr_01"], {})[0]


def test_the_curves_of_a_run_that_went_to_the_trash_are_gone(lab, api):
    path = f"/runs/{lab.ids['lr_01']}/metrics"
    assert api("GET", path)[0] == 200
    plain(lab.db_path, ("UPDATE runs SET deleted_at = 'now' WHERE run_id = ?",
                        (lab.ids["lr_01"],)))
    assert api("GET", path)[0] == 404


def test_the_curves_are_right_while_nobody_can_summarise(lab, api, server):
    path = f"/runs/{lab.ids['lr_01']}/metrics?names=accuracy"
    assert only_curve(api("GET", path)[2])["n_points"] == 5
    plain(lab.db_path, ("INSERT INTO run_metrics (run_id, epoch, metric_name, metric_value) "
                        "VALUES (?, 6, 'accuracy', 0.5)", (lab.ids["lr_01"],)))
    with sqlite3.connect(lab.db_path) as other:
        other.execute("BEGIN IMMEDIATE")          # whoever writes for long
        assert only_curve(api("GET", path)[2])["n_points"] == 6
        other.execute("ROLLBACK")
    other.close()


@pytest.mark.parametrize("odd", ["0.25", "NULL", "9e999", "'text'", "x'00'", "1e308"])
def test_a_long_bucket_is_what_its_points_are(lab, monkeypatch, odd):
    insert_run(lab.conn, run_id="long-run", timestamp=started(12))
    insert_points(lab.conn, "long-run", [(n, "loss", 1 / n) for n in range(1, 1_001)])
    lab.conn.execute(f"UPDATE run_metrics SET metric_value = {odd} "
                     "WHERE run_id = 'long-run' AND epoch IN (13, 14, 500, 1000)")
    refresh(lab.conn)

    def read(**query):
        [curve] = ask_store(lab.conn, "run_metrics", "long-run", {"max_points": 7, **query})[0][
            "curves"]
        return {**curve, "mean": pytest.approx(curve["mean"], rel=1e-12)}
    windows = [{}, {"from": 10, "to": 900}, {"x": "time"}, {"since": 100}]
    monkeypatch.setattr(ailab, "LONG_BUCKET", 10_000)
    slow = [read(**window) for window in windows]
    monkeypatch.setattr(ailab, "LONG_BUCKET", 1)
    quick = [read(**window) for window in windows]
    assert [{**curve, "mean": 0} for curve in slow] == [{**curve, "mean": 0} for curve in quick]
    assert [curve["mean"].expected for curve in quick] == [curve["mean"] for curve in slow]
