"""Every filter, sort and page of GET /runs and its kin, and that an index serves them."""
import json
import re
import urllib.parse

import pytest
from conftest import insert_run, started

import ailab
import lab_logger

IRIS = ["failed", "svm_01", "svm_001", "svm_0001", "lr_01", "lr_001", "lr_0001"]
DIGITS = ["diverged", "killed", "perceptron_01", "perceptron_001", "perceptron_0001"]
ALL = ["diverged", "killed", "failed", "perceptron_01", "perceptron_001", "perceptron_0001",
       "svm_01", "svm_001", "svm_0001", "lr_01", "lr_001", "lr_0001"]            # newest first


@pytest.fixture
def found(lab, api):
    """found(model_name="x") -> the names of the known runs that GET /runs lists, in its order."""
    def ask(**filters):
        status, _, runs = api("GET", "/runs?" + urllib.parse.urlencode(filters))
        assert status == 200, runs
        return [lab.names.get(run["run_id"], run["run_id"]) for run in runs]
    return ask


@pytest.fixture
def pages(lab, api):
    """pages(path) -> (names, headers)"""
    def ask(path):
        status, headers, runs = api("GET", path)
        assert status == 200, runs
        return [lab.names[run["run_id"]] for run in runs], headers
    return ask


def links(headers):
    """The Link header as {rel: query parameters}."""
    found = re.findall(r'<([^>]+)>;\s*rel="(\w+)"', headers.get("Link", ""))
    return {rel: dict(urllib.parse.parse_qsl(url.partition("?")[2])) for url, rel in found}


# --- Equality ---------------------------------------------------------------------

def test_runs_when_nothing_is_asked_come_newest_first(found):
    assert found() == ALL


@pytest.mark.parametrize("filters, names", [
    ({"experiment_name": "iris_sweep"}, IRIS),
    ({"dataset_id": "digits"}, DIGITS),
    ({"model_name": "perceptron"}, ["diverged", "perceptron_01", "perceptron_001",
                                    "perceptron_0001"]),
    ({"task_name": "classification"}, ALL),
    ({"task_name": "regression"}, []),
    ({"status": "failed"}, ["failed"]),
    ({"status": "killed"}, ["killed"]),
    ({"status": "running"}, []),
    ({"status": "finished", "dataset_id": "digits"}, ["diverged", "perceptron_01",
                                                      "perceptron_001", "perceptron_0001"]),
    ({"experiment_name": "iris"}, []),            # equal, not alike
    ({"experiment_name": "iris_sweep", "model_name": "perceptron"}, []),
])
def test_runs_when_a_column_is_asked_for_are_those_that_have_it(found, filters, names):
    assert found(**filters) == names


def test_runs_when_the_status_is_unknown_is_refused_with_those_that_exist(lab, api):
    status, _, answer = api("GET", "/runs?status=paused")
    assert status == 422
    for word in ("'paused'", "running", "finished", "failed", "killed"):
        assert word in answer["detail"]


# --- Substrings -------------------------------------------------------------------

@pytest.mark.parametrize("text, names", [
    ("PUBLISH", ["lr_01"]), ("publish", ["lr_01"]), ("best of", ["lr_01"]),
    ("%", ["perceptron_001"]), ("100% of_it", ["perceptron_001"]), ("_", ["perceptron_001"]),
    ("\\", ["perceptron_001"]), ("it\\now", ["perceptron_001"]), ("%diverged", []),
    ("d_verged", []), ("a%z", []), (":", ["diverged", "perceptron_001", "lr_01"]),
    ("*", []), ("[a-z]", []), ("?", []),
])
def test_note_substring_is_literal_and_ignores_case(found, text, names):
    assert found(note_substring=text) == names


def test_command_substring_finds_a_part_of_the_command(found):
    assert found(command_substring="--MODEL linear_svm --learning_rate 0.1") == ["svm_01"]
    assert found(command_substring="learning%rate") == []


def test_a_substring_beyond_ascii_is_found_as_written(lab, found):
    insert_run(lab.conn, run_id="uml", timestamp=started(12), note="größter Fehler 最小")
    assert found(note_substring="größter") == ["uml"]
    assert found(note_substring="最小") == ["uml"]


# --- Time -------------------------------------------------------------------------

@pytest.mark.parametrize("filters, names", [
    ({"from_timestamp": "2026-11-01T20:00:00.000000Z"}, ["diverged", "killed"]),
    ({"from_timestamp": "2026-11-01T20:00:00"}, ["diverged", "killed"]),      # naive is UTC
    ({"from_timestamp": "2026-11-01T22:00:00+02:00"}, ["diverged", "killed"]),
    ({"from_timestamp": "2026-11-01T20:00:00.000001Z"}, ["diverged"]),
    ({"to_timestamp": "2026-11-01T11:00:00Z"}, ["lr_001", "lr_0001"]),
    ({"from_timestamp": "2026-11-01T12:00:00Z", "to_timestamp": "2026-11-01T13:00:00Z"},
     ["svm_0001", "lr_01"]),
    ({"from_timestamp": "2026-11-01"}, ALL),
    ({"from_timestamp": "2026-11-02"}, []),
    ({"to_timestamp": "2026-10-31"}, []),
    ({"to_timestamp": "2026-11-01"}, ALL),        # a date as an end means all of that day
])
def test_timestamps_bound_the_runs_inclusively(found, filters, names):
    assert found(**filters) == names


@pytest.mark.parametrize("text", ["yesterday", "2026-13-01", "2026-11-01T25:00", "1e400", "", "-1"])
def test_a_timestamp_that_is_none_is_refused(lab, api, text):
    for name in ("from_timestamp", "to_timestamp"):
        status, _, answer = api("GET", f"/runs?{name}={urllib.parse.quote(text)}")
        assert status == 422
        assert name in answer["detail"]


# --- Metrics ------------------------------------------------------------------------

@pytest.mark.parametrize("filters, names", [
    ({"metric_name": "f1"}, ["lr_01"]),
    ({"metric_name": "accuracy", "metric_min": "0.95"}, ["svm_01", "lr_01"]),       # inclusive
    ({"metric_name": "accuracy", "metric_max": "0.4"}, ["diverged", "failed"]),
    ({"metric_name": "accuracy", "metric_min": "0.9", "metric_max": "0.91"}, ["svm_001", "lr_001"]),
    ({"metric_name": "accuracy", "metric_min": "0.9", "experiment_name": "digits_sweep"}, []),
    ({"metric_name": "accuracy", "metric_min": "0.6", "status": "killed"}, ["killed"]),
    ({"metric_name": "train_loss", "status": "failed"}, ["failed"]),                # only logged
    ({"metric_name": "no_such_metric"}, []),
    ({"metric_name": "accuracy", "metric_min": "-1e308", "metric_max": "1e308"}, ALL),
    ({"metric_name": "val_loss", "metric_min": "-1e308"}, [n for n in ALL if n != "diverged"]),
])
def test_metric_bounds_compare_the_final_value(found, filters, names):
    assert found(**filters) == names


def test_metric_name_alone_keeps_a_run_whose_value_is_nan(found):
    assert found(metric_name="val_loss") == ALL


def test_metric_bounds_without_a_metric_name_are_refused(lab, api):
    for bound in ("metric_min", "metric_max"):
        status, _, answer = api("GET", f"/runs?{bound}=0.5")
        assert status == 422
        assert "metric_name" in answer["detail"]


# --- Full text ----------------------------------------------------------------------

@pytest.mark.parametrize("text, names", [
    ("perceptron", ["diverged", "perceptron_01", "perceptron_001", "perceptron_0001"]),
    ("percep", ["diverged", "perceptron_01", "perceptron_001", "perceptron_0001"]),  # a prefix
    ("PUBLISH iris", ["lr_01"]),                  # every word
    ("publish digits", []),
    ("diverged", ["diverged"]),
    ("momentum", ALL),                            # a param's name
    ("  best   iris ", ["lr_01"]),
    ("nothing_like_it", []),
])
def test_q_finds_the_runs_that_have_every_word(found, text, names):
    assert found(q=text) == names


@pytest.mark.parametrize("text", [
    '"', '"perceptron', "perceptron OR iris", "NOT perceptron", "perceptron AND", "NEAR(a b)",
    "text:perceptron", "perceptron*", "^perceptron", "(", ")", "{a b}: c", "-perceptron", "+", "'",
    "*", "a\"b", "a''b", "%", "_", "\\", ";", "--", "/*", "\x00", "😀", "a" * 2_000, "\t\n", "- -"])
def test_q_takes_quotes_and_operators_for_plain_text(lab, api, text):
    status, _, runs = api("GET", "/runs?" + urllib.parse.urlencode({"q": text}))
    assert status in (200, 422), runs
    if status == 200:
        assert len(runs) in (0, 4, 12)


def test_q_when_an_operator_word_stands_in_it_does_not_obey_it(found):
    assert found(q="perceptron OR iris") == []
    assert found(q="NOT perceptron") == []


def test_q_finds_a_note_that_was_just_written(lab, api, found):
    api("PATCH", f"/runs/{lab.ids['svm_01']}/note", {"note": "flamingo candidate"})
    assert found(q="flamingo") == ["svm_01"]


# --- Order ----------------------------------------------------------------------------

@pytest.mark.parametrize("query, names", [
    ({"sort": "timestamp", "order": "asc"}, ALL[::-1]),
    ({"sort": "timestamp", "order": "desc"}, ALL),
    ({"order": "asc"}, ALL[::-1]),
    ({"sort": "duration", "limit": "3"}, ["diverged", "perceptron_01", "perceptron_001"]),
    ({"sort": "duration", "order": "asc", "limit": "3"}, ["failed", "killed", "lr_0001"]),
    ({"sort": "metrics.accuracy", "offset": "2", "limit": "2"}, ["svm_001", "lr_001"]),
    ({"sort": "metrics.accuracy", "order": "asc", "limit": "3"}, ["diverged", "failed", "killed"]),
    ({"sort": "metrics.val_loss", "order": "asc", "limit": "2"}, ["lr_01", "svm_01"]),
    ({"sort": "params.learning_rate", "limit": "2"}, ["failed", "diverged"]),
    ({"sort": "metrics.accuracy", "limit": "2", "model_name": "perceptron"},
     ["perceptron_001", "perceptron_01"]),
    ({"sort": "params.optimizer.momentum", "limit": "4"},
     ["diverged", "perceptron_01", "perceptron_001", "perceptron_0001"]),
])
def test_sort_orders_the_runs(found, query, names):
    assert found(**query) == names


def test_sort_puts_both_runs_of_a_tie_first(found):
    assert sorted(found(sort="metrics.accuracy", limit="2")) == ["lr_01", "svm_01"]


@pytest.mark.parametrize("order", ["asc", "desc"])
def test_sort_by_a_metric_puts_nan_and_missing_last_both_ways(lab, found, order):
    insert_run(lab.conn, run_id="bare", timestamp=started(12))
    with lab_logger.transaction(lab.conn):
        ailab.refresh(lab.conn)
    got = found(sort="metrics.val_loss", order=order)
    assert len(got) == 13
    assert sorted(got[-2:]) == ["bare", "diverged"]


@pytest.mark.parametrize("order", ["asc", "desc"])
def test_sort_by_a_metric_few_runs_have_still_lists_every_run(found, order):
    got = found(sort="metrics.f1", order=order)
    assert got[0] == "lr_01"
    assert sorted(got) == sorted(ALL)


def test_sort_by_a_param_few_runs_have_still_lists_every_run(lab, found):
    insert_run(lab.conn, run_id="rare", timestamp=started(12), params_json='{"dropout": 0.5}')
    with lab_logger.transaction(lab.conn):
        ailab.refresh(lab.conn)
    assert found(sort="params.dropout", order="asc")[0] == "rare"
    assert len(found(sort="params.dropout", order="desc")) == 13


@pytest.mark.parametrize("sort", ["metrics.accuracy", "metrics.val_loss", "metrics.f1",
                                  "params.learning_rate", "duration", "timestamp"])
@pytest.mark.parametrize("order", ["asc", "desc"])
def test_pages_of_any_sort_join_to_the_whole_list(found, sort, order):
    whole = found(sort=sort, order=order)
    paged = [name for offset in range(0, 14, 5)
             for name in found(sort=sort, order=order, limit=5, offset=offset)]
    assert paged == whole
    assert sorted(whole) == sorted(ALL)


@pytest.mark.parametrize("sort", ["colour", "metrics.", "params.", "metrics", "run_id; DROP TABLE",
                                  "", "metrics accuracy", "pip_freeze"])
def test_a_sort_that_does_not_exist_is_refused_with_those_that_do(lab, api, sort):
    status, _, answer = api("GET", "/runs?sort=" + urllib.parse.quote(sort))
    assert status == 422
    assert "metrics.NAME" in answer["detail"]


def test_an_order_that_does_not_exist_is_refused(lab, api):
    status, _, answer = api("GET", "/runs?order=sideways")
    assert status == 422
    assert "'sideways'" in answer["detail"]
    assert "asc" in answer["detail"] and "desc" in answer["detail"]


# --- Pages ------------------------------------------------------------------------------

def test_a_page_says_how_many_there_are_in_all(pages):
    names, headers = pages("/runs?limit=5")
    assert names == ALL[:5]
    assert headers["X-Total-Count"] == "12"


def test_the_total_counts_what_the_filters_leave(pages):
    names, headers = pages("/runs?limit=2&experiment_name=iris_sweep")
    assert names == IRIS[:2]
    assert headers["X-Total-Count"] == "7"


def test_the_total_counts_what_a_metric_filter_leaves(pages):
    names, headers = pages("/runs?limit=1&metric_name=accuracy&metric_min=0.9")
    assert names == ["svm_01"]
    assert headers["X-Total-Count"] == "4"


def test_links_of_the_first_page_lead_on_only(pages):
    _, headers = pages("/runs?limit=5")
    assert "prev" not in links(headers)
    assert links(headers)["next"] == {"limit": "5", "offset": "5"}


def test_links_of_a_middle_page_lead_both_ways_and_keep_the_filters(pages):
    _, headers = pages("/runs?limit=3&offset=3&experiment_name=iris_sweep")
    got = links(headers)
    assert got["next"] == {"limit": "3", "offset": "6", "experiment_name": "iris_sweep"}
    assert got["prev"].get("offset", "0") == "0"
    assert got["prev"]["experiment_name"] == "iris_sweep"


def test_links_followed_from_the_first_page_visit_every_run_once(pages):
    names, headers = pages("/runs?limit=5")
    while "next" in links(headers):
        more, headers = pages("/runs?" + urllib.parse.urlencode(links(headers)["next"]))
        names += more
    assert names == ALL


def test_links_of_the_last_page_lead_back_only(pages):
    names, headers = pages("/runs?limit=5&offset=10")
    assert names == ALL[10:]
    assert "next" not in links(headers)
    assert links(headers)["prev"]["offset"] == "5"


def test_a_page_beyond_the_end_is_empty_and_still_counts(pages):
    names, headers = pages("/runs?offset=1000")
    assert names == []
    assert headers["X-Total-Count"] == "12"


def test_a_page_holds_50_runs_unless_told_otherwise(lab, api):
    for number in range(60):
        insert_run(lab.conn, run_id=f"extra-{number}", timestamp=f"2026-11-02T00:00:{number:02d}")
    assert len(api("GET", "/runs")[2]) == 50
    assert len(api("GET", "/runs?limit=1000")[2]) == 72


@pytest.mark.parametrize("limit", ["0", "1001", "-1", "ten", "1e2", "", "1.5", "9" * 20])
def test_a_limit_outside_1_to_1000_is_refused(lab, api, limit):
    status, _, answer = api("GET", f"/runs?limit={limit}")
    assert status == 422
    assert "limit" in answer["detail"] and "1000" in answer["detail"].replace(",", "")


def test_runs_with_one_time_come_in_one_order_on_every_page(lab, api):
    for number in range(20):
        insert_run(lab.conn, run_id=f"same-{number:02d}", timestamp="2026-12-01T00:00:00.000000Z")
    got = [run["run_id"] for offset in range(0, 20, 5)
           for run in api("GET", f"/runs?limit=5&offset={offset}")[2]]
    assert sorted(got) == [f"same-{number:02d}" for number in range(20)]


# --- Which index serves -------------------------------------------------------------------

@pytest.fixture
def big_lab(conn, db_path):
    """A store with 3,000 runs, of which 30 are in the experiment `rare`; never analysed."""
    with lab_logger.transaction(conn):
        conn.executemany(
            "INSERT INTO runs (run_id, timestamp, experiment_name, duration_s, params_json, "
            "final_metrics_json, status) VALUES (?, ?, ?, ?, ?, ?, 'finished')",
            [(f"{n:06d}-run", f"2026-10-01T{n // 3600:02d}:{n // 60 % 60:02d}:{n % 60:02d}.000000Z",
              "rare" if n % 100 == 0 else "common", n / 10, '{"lr": %s}' % (n / 3000),
              json.dumps({"accuracy": n / 3000, "loss": 1 - n / 3000})) for n in range(3_000)])
        ailab.refresh(conn)
    return conn


def plans_of(conn, call):
    """Run `call(conn)` and return the query plan of every SELECT in it, one line per step."""
    statements = []
    conn.set_trace_callback(statements.append)
    try:
        call(conn)
    finally:
        conn.set_trace_callback(None)
    selects = [s for s in statements if s.lstrip().upper().startswith(("SELECT", "WITH"))]
    assert selects
    selects = [re.sub(r"\bInf\b", "9e999", select) for select in selects]  # as the trace writes it
    return [(row[3], select) for select in selects
            for row in conn.execute("EXPLAIN QUERY PLAN " + select)]


def full_reads(conn, call):
    """The steps that read a table from end to end, or sort in a temporary b-tree."""
    return [step for step, _ in plans_of(conn, call)
            if step.startswith("SCAN ") and not re.search(
                "USING|CONSTANT|VIRTUAL|SUBQUERY|metric_directions|SCAN look", step)]


def sorts(conn, call):
    return [step for step, _ in plans_of(conn, call) if "TEMP B-TREE FOR ORDER BY" in step]


def list_by(**filters):
    given = ailab.parse_params(ailab.RUN_FILTERS + ailab.PAGE, list(filters.items()))
    query = ailab.run_query(given)
    return lambda conn: ailab.list_runs(conn, query, limit=given["limit"], offset=0)


INDEXED_LISTS = {
    "newest": {}, "experiment": {"experiment_name": "rare"}, "status": {"status": "finished"},
    "metric filter": {"metric_name": "accuracy", "metric_min": "0.99"},
    "metric sort": {"sort": "metrics.accuracy"}, "param sort": {"sort": "params.lr"},
    "duration": {"sort": "duration"}, "metric both": {
        "metric_name": "accuracy", "metric_min": "0.99", "sort": "metrics.accuracy"},
    **{f"by {by}": {"metric_name": "accuracy", "metric_min": "0.99", "sort": "metrics.accuracy",
                    "by": by} for by in ("last", "best", "min", "max")},
    **{where: {"where": where, "limit": "10"} for where in (
        "metrics.accuracy >= 0.999", "metrics.accuracy >= 0.1", "params.lr < 0.01",
        "metrics.accuracy.best > 0.9 and params.lr > 0.5", "experiment_name = 'rare'",
        "experiment_name in ['rare', 'b'] or status = 'failed'", "not metrics.accuracy < 0.999",
        "timestamp > '2026-10-01T00:40:00Z' or note is not null", "hostname is null")},
    "where and sort, few": {"where": "metrics.accuracy > 0.999", "sort": "metrics.loss"},
    "where and sort, many": {"where": "params.lr > 0.1", "sort": "metrics.loss", "limit": "10"}}


@pytest.mark.parametrize("filters", INDEXED_LISTS.values(), ids=INDEXED_LISTS.keys())
def test_a_list_reads_no_table_from_end_to_end(big_lab, filters):
    assert full_reads(big_lab, list_by(**filters)) == []


@pytest.mark.parametrize("filters", [{}, {"experiment_name": "rare"}, {"sort": "duration"},
                                     {"sort": "metrics.accuracy"}, {"sort": "params.lr"}],
                         ids=["newest", "experiment", "duration", "metric", "param"])
def test_a_list_an_index_can_order_is_not_sorted(big_lab, filters):
    assert sorts(big_lab, list_by(**filters)) == []


@pytest.mark.parametrize("filters, most", [
    ({"where": "metrics.accuracy >= 0.999"}, 40), ({"where": "metrics.accuracy >= 0.1"}, 40),
    ({"where": "params.lr > 0.9995", "sort": "metrics.loss"}, 40),
    ({"where": "metrics.accuracy > 0.1 and params.lr > 0.1 and experiment_name = 'rare'"}, 120)],
    ids=str)
def test_where_costs_what_it_gives_and_not_what_the_lab_holds(big_lab, filters, most):
    n_thousands = 0

    def count():
        nonlocal n_thousands
        n_thousands += 1
    call = list_by(**filters, limit="5")
    big_lab.set_progress_handler(count, 1_000)             # of SQLite's own steps
    call(big_lab)
    big_lab.set_progress_handler(None, 0)
    assert n_thousands < most                              # a scan of 3,000 runs takes more


def test_a_leaderboard_reads_its_index_only_as_far_as_it_must(big_lab):
    def board(conn):
        return ailab.leaderboard(conn, ailab.parse_params(ailab.BOARD, [
            ("metric_name", "accuracy"), ("top_k", "5")]))
    assert full_reads(big_lab, board) == []
    assert sorts(big_lab, board) == []


@pytest.mark.parametrize("name, near", [
    ("metrics.acuracy", "accuracy"), ('metrics."accuracy"', "accuracy"),
    ("metrics.accuracy.last", "accuracy"), ("params.learning-rate", "learning_rate")])
def test_a_sort_by_what_no_run_has_names_what_is_near(lab, api, name, near):
    status, _, answer = api("GET", "/runs?sort=" + urllib.parse.quote(name))
    assert status == 422 and f"did you mean '{near}'" in answer["detail"]


def test_a_sort_by_a_param_has_infinities_at_its_ends_and_nan_last(lab, api):
    for name, clip in (("a", "Infinity"), ("b", 3), ("c", "-Infinity"), ("d", "NaN")):
        insert_run(lab.conn, run_id=name, timestamp="2020", params_json=f'{{"clip": "{clip}"}}'
                   if isinstance(clip, str) else f'{{"clip": {clip}}}')
    runs = api("GET", "/runs?sort=params.clip")[2]
    assert [run["run_id"] for run in runs][:3] == ["a", "b", "c"] and runs[-1]["run_id"] == "d"
