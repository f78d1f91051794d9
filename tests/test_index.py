"""The read index: exact whoever writes, and what every list is read by, whatever is asked."""
import json
import re
from collections import Counter

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import ailab
import lab_logger

NAMES = ("experiment_name", "model_name", "task_name", "dataset_id", "status")
IDS = st.sampled_from(["run-a", "run-b", "run-c"])
WORD = st.sampled_from([None, "x", "y"])
METRICS = st.dictionaries(st.sampled_from(["loss", "val/acc"]), st.sampled_from([0.5, "NaN"]))
PARAMS = st.dictionaries(st.sampled_from(["lr", "a.b"]),
                         st.sampled_from([1, "one", None, {"b": 2}, {"": 3}]))
STEPS = st.lists(st.one_of(
    st.tuples(st.sampled_from(["INSERT OR REPLACE", "INSERT OR IGNORE"]), IDS, WORD, PARAMS,
              METRICS, st.sampled_from([None, "2026-11-24T00:00:00.000000Z"])),
    st.tuples(st.just("points"), IDS, st.sampled_from(["loss", "f1"]), st.integers(0, 3)),
    st.tuples(st.sampled_from(["trash", "restore", "delete", "forget points", "refresh"]), IDS),
    st.tuples(st.sampled_from(NAMES[:-1]), IDS, WORD),
    st.tuples(st.just("status"), IDS, st.sampled_from(["running", "failed"])),
    st.tuples(st.just("params_json"), IDS, PARAMS.map(json.dumps)),
    st.tuples(st.just("final_metrics_json"), IDS, METRICS.map(json.dumps)),
    st.tuples(st.just("run_id"), IDS, IDS)), max_size=25)
PLAIN = {
    "trash": "UPDATE runs SET deleted_at = '2026-11-24T00:00:00.000000Z' WHERE run_id = ?",
    "restore": "UPDATE runs SET deleted_at = NULL WHERE run_id = ?",
    "delete": "DELETE FROM runs WHERE run_id = ?",
    "forget points": "DELETE FROM run_metrics WHERE run_id = ?"}


def take(conn, step):
    """Do one thing to the public tables, as any SQLite tool may."""
    kind, run_id, *values = step
    if kind == "refresh":
        with lab_logger.transaction(conn):
            ailab.refresh(conn)
    elif kind.startswith("INSERT"):
        word, params, finals, deleted_at = values
        conn.execute(f"{kind} INTO runs (run_id, experiment_name, model_name, status, params_json, "
                     "final_metrics_json, deleted_at) VALUES (?, ?, ?, 'running', ?, ?, ?)",
                     (run_id, word, word, json.dumps(params), json.dumps(finals), deleted_at))
    elif kind == "points":
        conn.execute("INSERT INTO run_metrics (run_id, metric_name, epoch, metric_value) "
                     "VALUES (?, ?, ?, 0.5)", (run_id, *values))
    elif kind in PLAIN:
        conn.execute(PLAIN[kind], (run_id,))
    else:
        conn.execute(f"UPDATE OR IGNORE runs SET {kind} = ? WHERE run_id = ?", (*values, run_id))


def tally_of(conn):
    """The tally, but for what nothing has."""
    return sorted(conn.execute("SELECT kind, name, n_runs FROM tally WHERE n_runs <> 0"))


def tallied(conn):
    """The tally as it should be, counted run by run from the public tables."""
    shown = "run_id IN (SELECT run_id FROM runs WHERE deleted_at IS NULL)"
    counted = Counter({("run", ""): conn.execute(
        "SELECT count(*) FROM runs WHERE deleted_at IS NULL").fetchone()[0]})
    for name in NAMES:
        counted.update((name, value) for (value,) in conn.execute(
            f"SELECT {name} FROM runs WHERE {shown} AND {name} IS NOT NULL"))
    points = conn.execute(f"SELECT DISTINCT run_id, metric_name FROM run_metrics WHERE {shown}")
    metrics = set(points.fetchall())
    for run_id, params, finals in conn.execute(
            f"SELECT run_id, params_json, final_metrics_json FROM runs WHERE {shown}"):
        metrics |= {(run_id, name) for name in json.loads(finals or "{}")}
        counted.update(("param", name) for name in ailab.flatten(json.loads(params or "{}")))
    counted.update(("metric", name) for _, name in metrics)
    return sorted((*key, n) for key, n in counted.items() if n)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(steps=STEPS)
def test_index_is_what_a_new_one_would_be_whatever_plain_sql_did(tmp_path_factory, steps):
    path = str(tmp_path_factory.mktemp("lab") / "lab.db")
    conn = ailab.open_lab(path)
    for step in steps:
        take(conn, step)
    take(conn, ("refresh", ""))
    assert ailab.index_problems(conn, path) == []
    conn.close()


def test_tally_counts_the_runs_that_lists_show(lab):
    assert tally_of(lab.conn) == tallied(lab.conn)
    ailab.delete_run(lab.conn, lab.ids["lr_01"])
    assert tally_of(lab.conn) == tallied(lab.conn)
    ailab.restore_run(lab.conn, lab.ids["lr_01"])
    assert tally_of(lab.conn) == tallied(lab.conn)


CHANGES = [
    "INSERT INTO runs (run_id, status, experiment_name) VALUES ('new', 'running', 'new')",
    "UPDATE runs SET status = 'finished', experiment_name = 'other' WHERE run_id = 'new'",
    "UPDATE runs SET params_json = '{\"a\": 1, \"b\": null}' WHERE run_id = 'new'",
    "UPDATE runs SET params_json = '{\"a\": 1.0, \"n\": {\"b\": 2}}' WHERE status = 'failed'",
    "UPDATE runs SET params_json = '{\"a.b\": 1, \"a\": {\"b\": 3}}' WHERE run_id = 'new'",
    "UPDATE runs SET final_metrics_json = '{\"f1\": 1, \"mine\": \"NaN\"}' WHERE run_id = 'new'",
    "INSERT INTO run_metrics (run_id, metric_name, metric_value) VALUES ('new', 'logged', 1)",
    "INSERT INTO run_metrics (run_id, metric_name, metric_value) VALUES ('later', 'logged', 1)",
    "INSERT INTO runs (run_id, model_name) VALUES ('later', 'late')",
    "INSERT OR REPLACE INTO runs (run_id, status, task_name) VALUES ('new', 'failed', 'again')",
    "REPLACE INTO runs (run_id, params_json) SELECT run_id, '{\"a\": 5}' FROM runs LIMIT 3",
    "INSERT OR IGNORE INTO runs (run_id, status) SELECT run_id, 'killed' FROM runs",
    "INSERT INTO runs (run_id, status) SELECT run_id, 'killed' FROM runs WHERE true "
    "ON CONFLICT (run_id) DO UPDATE SET status = excluded.status, model_name = NULL",
    "UPDATE runs SET deleted_at = 'now' WHERE dataset_id = 'iris'",
    "UPDATE runs SET status = 'finished' WHERE deleted_at IS NOT NULL",
    "INSERT INTO runs (run_id, deleted_at, final_metrics_json) VALUES ('t', 'now', '{\"f1\": 1}')",
    "DELETE FROM run_metrics WHERE metric_name = 'train_loss'",
    "INSERT INTO runs (run_id, status) VALUES ('live', 'running')",
    "INSERT INTO run_metrics (run_id, metric_name, metric_value) VALUES ('live', 'logged', 1)",
    "UPDATE runs SET status = 'killed' WHERE run_id = 'live'",
    "UPDATE runs SET run_id = 'renamed' WHERE run_id = 'new'",
    "UPDATE OR REPLACE runs SET run_id = 'later' WHERE run_id = 'renamed'",
    "DELETE FROM runs WHERE dataset_id = 'digits'",
    "UPDATE runs SET deleted_at = NULL",
    "DELETE FROM runs"]


@pytest.mark.parametrize("is_recursive", [0, 1])
def test_tally_and_index_stay_exact_whatever_plain_sql_does(lab, is_recursive):
    """With recursive triggers, REPLACE also fires those of DELETE."""
    lab.conn.execute(f"PRAGMA recursive_triggers = {is_recursive}")
    for change in CHANGES:
        lab.conn.execute(change)
        take(lab.conn, ("refresh", ""))
        assert tally_of(lab.conn) == tallied(lab.conn), change
    assert tally_of(lab.conn) == []


@pytest.mark.parametrize("timestamp", ["9999-12-31T00:00:00Z", "0001-01-01", "1600", "-5", "now",
                                       "2300-01-01T00:00:00.5Z", b"\xff", 3, None])
def test_run_of_any_start_is_taken_found_and_indexed_anew(db_path, timestamp):
    conn = ailab.open_lab(db_path)
    conn.execute("INSERT INTO runs (run_id, timestamp, note) VALUES ('odd', ?, 'found')",
                 (timestamp,))
    conn.execute("DROP TABLE tally")
    conn.close()
    conn = ailab.open_lab(db_path)
    assert ailab.count_runs(conn, ailab.run_query({"q": "found"})) == 1
    conn.close()


def test_search_finds_the_newest_first_whatever_the_form_of_its_time(lab):
    times = [f"2031-01-01T00:00:0{rest}" for rest in (
        "0Z", "0.000200Z", "0.123456Z", "0.5Z", "0.9Z", "1Z", "2+02:00")]
    for at in reversed(times):
        lab.conn.execute("INSERT INTO runs (run_id, timestamp, note) VALUES (?, ?, 'timely')",
                         (at, at))
    found = ailab.list_runs(lab.conn, ailab.run_query({"q": "timely"}), limit=10)
    assert [run["timestamp"] for run in found] == times[::-1]


@pytest.mark.parametrize("written", [
    '{"a": NaN, "b": 2}', '{"a":NaN,"b":2}', '{"b":2,"a":[NaN, 1]}', '{"a":{"c":-Infinity},"b":2}',
    '{"a":"NaN","c":Infinity,"b":2}'])
def test_json_of_plain_sql_with_bare_nan_is_indexed(lab, written):
    lab.conn.execute("INSERT INTO runs (run_id, params_json, final_metrics_json) VALUES "
                     "('bare', ?, ?)", (written, written))
    assert ailab.get_run(lab.conn, "bare")["final_metrics"]["b"] == 2
    query = ailab.query_of(lab.conn, {"where": "params.b = 2"})
    assert [run["run_id"] for run in ailab.list_runs(lab.conn, query, limit=5)] == ["bare"]


def test_restored_run_has_its_curves_back_at_once(lab):
    run_id = lab.ids["lr_01"]
    before = ailab.get_run(lab.conn, run_id)
    ailab.delete_run(lab.conn, run_id)
    ailab.restore_run(lab.conn, run_id)
    assert ailab.get_run(lab.conn, run_id) == before


# --- Plans --------------------------------------------------------------------------------

FILTERS = [{}, {"experiment_name": "iris"}, {"status": "failed"}, {"note_substring": "best"},
           {"command_substring": "train"}, {"from_timestamp": "2026-11-24T00:00:00.000000Z"},
           {"metric_name": "accuracy"}, {"metric_name": "accuracy", "metric_min": 0.9},
           {"q": "svm"}, {"q": "svm", "metric_name": "accuracy", "metric_min": 0.9},
           {"metric_name": "accuracy", "metric_max": 0.9, "by": "best"},
           {"where": "metrics.accuracy > 0.9 and params.learning_rate < 0.1"},
           {"where": "metrics.accuracy.best > 0.9 or model_name = 'linear_svm'"},
           {"where": "note is not null and duration > 5"}, {"where": "not status in ['failed']"},
           {"where": "metrics.accuracy is null"}, {"where": "metrics.accuracy.min > 0.1 and "
            "params.learning_rate < 1 and model_name in ['linear_svm', 'mlp'] and duration > 1"}]
SORTS = ["timestamp", "duration", "metrics.accuracy", "metrics.f1", "params.learning_rate"]
# A walk over the whole of an index, in its order, that ends with the page; and what is computed.
WALKED = re.compile(
    r"SCAN r USING COVERING INDEX runs_status|"   # of a negation: all but those of one state
    r"SCAN (r|runs|s) USING (COVERING )?INDEX (runs_(timestamp|duration|note|command)|"
    r"metric_summary_\w+|run_params_value)|SCAN run_search VIRTUAL TABLE INDEX.*|"
    r"SCAN metric_directions|SCAN (look|l)")      # as many as were set by hand; a page of runs


@pytest.mark.parametrize("sort", SORTS)
@pytest.mark.parametrize("asked", FILTERS, ids=repr)
@pytest.mark.parametrize(("order", "wide", "few"), [("asc", 1_000, 16_000), ("desc", 1_000, 16_000),
                                                    ("desc", 1, 4)])
def test_no_list_reads_a_table_from_end_to_end(lab, monkeypatch, asked, sort, order, wide, few):
    monkeypatch.setattr(ailab, "WIDE", wide)
    monkeypatch.setattr(ailab, "FEW", few)
    statements = []
    lab.conn.set_trace_callback(statements.append)
    for offset in (0, 3):
        query = ailab.query_of(lab.conn, {**asked, "sort": sort, "order": order})
        ailab.list_runs(lab.conn, query, limit=5, offset=offset)
    ailab.count_runs(lab.conn, ailab.query_of(lab.conn, asked))
    lab.conn.set_trace_callback(None)
    for statement in statements:
        if statement.startswith("--"):            # of full-text search's own tables
            continue
        plan = "EXPLAIN QUERY PLAN " + re.sub(r"\bInf\b", "9e999", statement)
        for (*_, step) in lab.conn.execute(plan).fetchall():
            told = f"{step} in {statement}"
            assert "SCAN" not in step or WALKED.fullmatch(step), told


@pytest.mark.parametrize("make", [ailab.list_experiments, ailab.list_metrics, ailab.lab_overview])
def test_no_overview_reads_the_runs_one_by_one(lab, make):
    statements = []
    lab.conn.set_trace_callback(statements.append)
    make(lab.conn)
    lab.conn.set_trace_callback(None)
    steps = [step for statement in statements
             for (*_, step) in lab.conn.execute("EXPLAIN QUERY PLAN " + statement).fetchall()]
    assert steps and not [step for step in steps if re.search(
        r"SCAN (r|runs|run_metrics|metric_summary|run_params|run_text)\b", step)]
