"""The expressions of `where`: what they keep, and what they refuse and at which column."""
import json
import math
import operator
import random
import re
import urllib.parse

import hypothesis
import pytest
from conftest import insert_points, insert_run, started
from hypothesis import strategies

import ailab
import lab_logger

IRIS_SVM = ["svm_01", "svm_001", "svm_0001"]
ODD = {                                # runs beside the known ones: (params, final metrics, note)
    "odd_text": ({"mixed": "abc", "flag": True}, {"val/acc": 0.5, "a b": 1}, 'says "hi"'),
    "odd_number": ({"mixed": 3, "flag": False, "many words": 2}, {"val/acc": 0.7}, "100%_\\"),
    "odd_nan": ({"mixed": None}, {"val/acc": "NaN"}, ""),
    "odd_inf": ({"mixed": "3"}, {"val/acc": "Infinity", "accuracy": "-Infinity", "three": 3},
                "Ärger"),
    "odd_bare": ({}, {}, None)}


@pytest.fixture
def odd_lab(lab):
    """The known runs and those of ODD, which are newer, the first the newest."""
    for hour, (name, (params, finals, note)) in enumerate(reversed(ODD.items())):
        insert_run(lab.conn, run_id=name, timestamp=started(hour).replace("-01T", "-02T"),
                   params_json=json.dumps(params), final_metrics_json=json.dumps(finals), note=note,
                   status="running" if name == "odd_bare" else "finished", pid=1,
                   received_from="elsewhere", heartbeat_at="2999-01-01T00:00:00.000000Z")
    insert_points(lab.conn, "odd_number", [(1, "val/acc", 0.9), (2, "val/acc", 0.8)])
    with lab_logger.transaction(lab.conn):
        ailab.refresh(lab.conn)
    lab.names.update({name: name for name in ODD})
    return lab


def kept_by_store(lab, where, **more):
    """Name the runs that the store lists, and check that it counts as many."""
    pairs = [("where", where), *more.items()]
    given = ailab.parse_params(ailab.RUN_FILTERS + ailab.PAGE, pairs)
    query = ailab.query_of(lab.conn, given)
    runs = ailab.list_runs(lab.conn, query, limit=1_000)
    counted = [ailab.count_runs(lab.conn, each)
               for each in (query, ailab.query_of(lab.conn, given))]     # with a page, and alone
    assert counted == [len(runs)] * 2
    return [lab.names[run["run_id"]] for run in runs]


@pytest.fixture(params=["store", "http"])
def kept(request, odd_lab):
    """kept(where) -> names of the runs it keeps, newest first."""
    if request.param == "store":
        return lambda where, **more: kept_by_store(odd_lab, where, **more)
    api = request.getfixturevalue("api")

    def ask(where, **more):
        query = urllib.parse.urlencode({"where": where, "limit": 1_000, **more})
        status, headers, runs = api("GET", f"/runs?{query}")
        assert status == 200, runs
        assert headers["X-Total-Count"] == str(len(runs))
        return [odd_lab.names[run["run_id"]] for run in runs]
    return ask


@pytest.fixture
def refused(odd_lab, api):
    """refused(where) -> (the sentence, the column)"""
    def ask(where):
        status, _, answer = api("GET", "/runs?" + urllib.parse.urlencode({"where": where}))
        assert status == 422, answer
        return answer["detail"], answer.get("column")
    return ask


# --- What is kept -------------------------------------------------------------------

@pytest.mark.parametrize("where, names", [
    ('metrics.accuracy >= 0.9 and params.learning_rate < 0.1 and model_name in ["linear_svm"]',
     ["svm_001"]),
    ("metrics.accuracy = 0.95", ["svm_01", "lr_01"]),
    ("metrics.accuracy == 0.95", ["svm_01", "lr_01"]),
    ("metrics.accuracy <> 0.95 and model_name = 'linear_svm' and dataset_id = 'iris'",
     ["svm_001", "svm_0001"]),
    ("0.9 <= metrics.accuracy < 0.95", ["svm_001", "lr_001"]),
    ("not 0.4 <= metrics.accuracy", ["odd_inf", "diverged"]),
    ("0.95 <= metrics.accuracy", ["svm_01", "lr_01"]),
    ("metrics.f1 > 0 OR Status = 'failed'".replace("Status", "status"), ["failed", "lr_01"]),
    ("NOT (metrics.accuracy < 0.9 Or metrics.val_loss > 0.3)", ["svm_01", "lr_01"]),
    ('metrics."val/acc" > 0.6', ["odd_number", "odd_inf"]),
    ("metrics.'val/acc' = 0.5", ["odd_text"]),
    ('metrics."a b" = 1', ["odd_text"]),
    ('params."many words" = 2', ["odd_number"]),
    ('params.optimizer.momentum = 0.9 and params."learning_rate" = 1', ["diverged"]),
    ("params.optimizer.\"name\" = 'sgd' and status = 'failed'", ["failed"]),
    ("duration > 31", ["diverged", "perceptron_01"]),
    ("run_id like '54e5f6%'", ["svm_01", "svm_001"]),
    ("hostname = 'testhost' and git_hash like '0123%' and status = 'killed'", ["killed"]),
    ("command like '%--MODEL linear_svm --learning_rate 0.1'", ["svm_01"]),
    ("task_name is null", list(ODD)),
    ("experiment_name = 'iris_sweep' and model_name not in ('logistic_regression')", IRIS_SVM),
    ("status in ['killed', 'failed']", ["killed", "failed"]),
])
def test_where_keeps_the_runs_for_which_it_holds(kept, where, names):
    assert kept(where) == names


@pytest.mark.parametrize("where, names", [
    ("timestamp >= '2026-11-01T20:00:00Z' and timestamp < '2026-11-02'", ["diverged", "killed"]),
    ("timestamp = '2026-11-02'", list(ODD)),
    ("timestamp in ['2026-11-02', '2026-11-01T10:00:00Z']", [*ODD, "lr_0001"]),
    ("timestamp != '2026-11-01'", list(ODD)),
    ("timestamp > '2026-11-01'", list(ODD)),
    ("not timestamp <= '2026-11-01'", list(ODD)),
    ("'2026-11-01T11:00:00' >= timestamp", ["lr_001", "lr_0001"]),
    ("timestamp like '2026-11-01T1_:%' and metrics.accuracy > 0.9", ["svm_01", "svm_001", "lr_01"]),
])
def test_where_takes_a_date_for_its_whole_day(kept, where, names):
    assert kept(where) == names


@pytest.mark.parametrize("where, names", [
    ("metrics.accuracy + metrics.val_loss > 1.3", ["failed", "killed", "perceptron_0001",
                                                   "perceptron_01", "perceptron_001",
                                                   "svm_0001", "lr_0001"]),
    ("metrics.accuracy * 2 >= 1.9", ["svm_01", "lr_01"]),
    ("metrics.accuracy > 2 - 1.1 and model_name = 'linear_svm'", ["svm_01", "svm_001"]),
    ("-metrics.accuracy < -0.94", ["svm_01", "lr_01"]),
    ("params.n_epochs / 2 = 2.5 and metrics.f1 is not null", ["lr_01"]),
    ("params.mixed / 2 = 1.5", ["odd_number"]),
    ("params.mixed + 0 < 100", ["odd_number"]),                    # text is no number
    ("metrics.accuracy / 0 > 1 or metrics.accuracy / 0 <= 1", []),
    ("metrics.accuracy > params.learning_rate * 10 + 0.5",
     ["perceptron_001", "perceptron_0001", "svm_001", "svm_0001", "lr_001", "lr_0001"]),
])
def test_where_computes_with_numbers(kept, where, names):
    assert sorted(kept(where)) == sorted(names)


@pytest.mark.parametrize("where, names", [
    ("metrics.f1 is null and metrics.accuracy >= 0.95", ["svm_01"]),
    ("metrics.\"val/acc\" is not null", ["odd_text", "odd_number", "odd_inf"]),
    ("metrics.val_loss is null", ["odd_text", "odd_number", "odd_nan", "odd_inf", "odd_bare",
                                  "diverged"]),
    ("not metrics.f1 is not null and duration = 33", ["diverged"]),
    ("metrics.f1 > 0 or not metrics.f1 > 0", ["lr_01"]),
    ("metrics.f1 != 0", ["lr_01"]),
    ("metrics.f1 not in [0]", ["lr_01"]),
    ("params.mixed is null and timestamp > '2026-11-01'", ["odd_nan", "odd_bare"]),
    ("note is null and metrics.accuracy > 0.9", ["svm_01", "svm_001"]),
    ("not note like '%x%' and timestamp > '2026-11-01'", list(ODD)[:4]),
])
def test_where_has_null_for_what_is_missing_and_nothing_compares_with_it(kept, where, names):
    assert kept(where) == names


@pytest.mark.parametrize("where, names", [
    ("params.mixed > 2", ["odd_number"]), ("params.mixed < 'x'", ["odd_text", "odd_inf"]),
    ("params.mixed = '3'", ["odd_inf"]), ("params.mixed = 3", ["odd_number"]),
    ("params.mixed != 3", ["odd_text", "odd_inf"]),
    ("not params.mixed = 3", ["odd_text", "odd_inf"]),
    ("params.mixed >= 'abc'", ["odd_text"]), ("params.mixed in [3, 'abc']",
                                              ["odd_text", "odd_number"]),
    ("params.flag = true", ["odd_text"]), ("params.flag = False", ["odd_number"]),
    ("params.mixed like '%'", ["odd_text", "odd_inf"]),
    ("params.mixed < params.flag or params.flag < params.mixed", ["odd_number"]),
    ("params.mixed = metrics.\"val/acc\"", []), ("params.mixed = metrics.three", []),
    ("params.model_name = model_name and model_name like 'perc%' and duration > 32", ["diverged"]),
])
def test_where_compares_a_param_as_the_number_or_text_it_is(kept, where, names):
    assert kept(where) == names


@pytest.mark.parametrize("where, names", [
    ("params.seed = 9223372036854775807", ["large"]),
    ("params.seed in [1234567890123456789]", ["long"]),
    ("params.seed > 1234567890123456788 and params.seed < 1234567890123456790", ["long"]),
    ("params.seed = '18446744073709551615'", ["huge"]),
    ("params.clip > 0.5", ["long", "large"]), ("params.clip < 0", ["huge"]),
    ("params.clip is null and params.seed is not null", ["nan"]),
    ("params.clip != 1 and params.seed is not null", ["large", "huge"]),
    ("params.seed > 1e19 or metrics.\"val/acc\" > 18446744073709551616", ["odd_inf"])])
def test_where_compares_large_whole_numbers_and_infinities_as_numbers(kept, odd_lab, where, names):
    for name, seed, clip in (("long", 1234567890123456789, 1), ("large", 2**63 - 1, "Infinity"),
                             ("huge", str(2**64 - 1), "-Infinity"), ("nan", 1, "NaN")):
        insert_run(odd_lab.conn, run_id=name, params_json=json.dumps({"seed": seed, "clip": clip}))
        odd_lab.names[name] = name
    assert sorted(kept(where)) == sorted(names)


@pytest.mark.parametrize("where, names", [
    ("note = 'says \"hi\"'", ["odd_text"]), ('note = "says ""hi"""', ["odd_text"]),
    (r"note like '100\%\_\\'", ["odd_number"]), (r"note like '100\%_t%'", []),
    ("note like '%PUBLISH%'", ["lr_01"]), ("note like 'publish_ best%'", ["lr_01"]),
    ("note = ''", ["odd_nan"]), ("note like 'Ä%'", ["odd_inf"]), ("note like 'ä%'", []),
    ("note = ' or 1=1 --'", []), ("note like ''' OR 1=1 --'", []),
])
def test_where_takes_quoted_text_as_it_stands(kept, where, names):
    assert kept(where) == names


@pytest.mark.parametrize("where, names", [
    ('metrics."val/acc".best >= 0.9', ["odd_number", "odd_inf"]),
    ('metrics."val/acc".max = 0.9', ["odd_number"]),
    ('metrics."val/acc".min = 0.8', ["odd_number"]),
    ('metrics."val/acc".last = 0.8', ["odd_number"]),
    ('metrics."val/acc".final = 0.7', ["odd_number"]),
    ("metrics.val_loss.best < 0.3", ["svm_01", "lr_01"]),
    ("metrics.val_loss.max <= 0.8", ["svm_001", "svm_01", "lr_001", "lr_01"]),
])
def test_where_takes_another_value_of_a_curve_by_its_name(kept, where, names):
    assert sorted(kept(where)) == sorted(names)


def test_where_joins_the_other_filters_and_sorts(kept):
    assert kept("metrics.accuracy > 0.8", model_name="linear_svm") == ["svm_01", "svm_001"]
    assert kept("metrics.accuracy > 0.8", sort="metrics.val_loss", order="asc", status="finished",
                dataset_id="iris") == ["lr_01", "svm_01", "svm_001", "lr_001"]
    assert kept("metrics.accuracy > 0.8", metric_name="val_loss", metric_max="0.25",
                sort="metrics.val_loss") == ["svm_01", "lr_01"]
    assert kept("params.mixed is not null", sort="params.mixed") == [
        "odd_text", "odd_inf", "odd_number"]


def test_where_keeps_no_run_of_the_trash(odd_lab, kept):
    odd_lab.conn.execute("UPDATE runs SET deleted_at = timestamp WHERE model_name = 'linear_svm'")
    assert kept("metrics.accuracy = 0.95") == ["lr_01"]


def test_where_limits_a_leaderboard(odd_lab, api):
    query = urllib.parse.urlencode({"metric_name": "accuracy",
                                    "where": "params.learning_rate < 0.1"})
    board = api("GET", f"/runs/leaderboard?{query}")[2]
    assert [odd_lab.names[run["run_id"]] for run in board[:2]] == ["svm_001", "lr_001"]
    assert len(board) == 7


@pytest.mark.parametrize(("wide", "few"), [(1, 0), (1, 16), (10_000, 160_000)])
@pytest.mark.parametrize("more", [
    {}, {"sort": "metrics.val_loss"}, {"sort": "params.learning_rate"},
    {"sort": "metrics.accuracy", "metric_name": "accuracy", "metric_min": "0.5"},
    {"sort": "metrics.accuracy", "metric_name": "val_loss", "metric_max": "0.6", "by": "best"}])
def test_where_keeps_the_same_whether_many_runs_meet_it_or_few(odd_lab, monkeypatch, wide, few,
                                                               more):
    wheres = ("metrics.accuracy > 0.5 and params.learning_rate < 1",
              "model_name in ['linear_svm', 'mlp'] and metrics.accuracy > 0.5 and duration > 0",
              "status = 'finished' and model_name = 'linear_svm'", "metrics.accuracy is null",
              "note is null", "params.learning_rate != 1 and timestamp > '2026-01-01'",
              "metrics.accuracy > 0.9 or params.learning_rate > 5",
              "not (metrics.accuracy in [0.95] or params.mixed like '%')")
    usual = [kept_by_store(odd_lab, where, **more) for where in wheres]
    monkeypatch.setattr(ailab, "WIDE", wide)
    monkeypatch.setattr(ailab, "FEW", few)
    assert [kept_by_store(odd_lab, where, **more) for where in wheres] == usual


def test_text_where_plain_sql_put_it_for_a_metric_is_no_number(odd_lab, kept):
    odd_lab.conn.execute("UPDATE metric_summary SET value = 'abc' WHERE run_id = 'odd_text' "
                         "AND metric_name = 'val/acc'")
    assert kept('metrics."val/acc" > 0') == ["odd_number", "odd_inf"]
    assert kept('metrics."val/acc" != 0') == ["odd_number", "odd_inf"]
    assert kept('metrics."val/acc" + 0 > -1') == ["odd_number", "odd_inf"]
    assert "odd_text" in kept('metrics."val/acc" is null')


# --- Against plain Python ----------------------------------------------------------------

COMPARE = {"=": operator.eq, "!=": operator.ne, "<": operator.lt, "<=": operator.le,
           ">": operator.gt, ">=": operator.ge}
COMPUTE = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}


def compared(sign, a, b):
    if a is None or b is None:
        return None
    if isinstance(a, str) != isinstance(b, str):
        return {"=": False, "!=": True}.get(sign)
    return COMPARE[sign](a, b)


def computed(sign, a, b):
    if not all(isinstance(side, (int, float)) for side in (a, b)) or (sign == "/" and b == 0):
        return None
    result = COMPUTE[sign](float(a), float(b))
    return None if math.isnan(result) else result


def joined(word, a, b):
    """`and` and `or` of true, false and null, as SQL has them."""
    decisive = word == "or"
    return decisive if decisive in (a, b) else None if None in (a, b) else not decisive


def alike(text, pattern):
    if not isinstance(text, str):
        return None
    def low(text):
        return "".join(c.lower() if c.isascii() else c for c in text)
    parts = re.findall(r"\\.|.", low(pattern), re.S)
    match = "".join({"%": ".*", "_": "."}.get(part, re.escape(part[-1])) for part in parts)
    return re.fullmatch(match, low(text), re.S) is not None


def metric(name, which="value"):
    def of(run):
        found = next((m for m in run["metrics"] if m["metric_name"] == name), None)
        if not found:
            return None
        value = found[which] if found["n_points"] or which == "value" else found["value"]
        return None if value in (None, "NaN") else float(value)
    return of


def param(name):
    return lambda run: ailab.flatten(run["params"]).get(name)


def column(name):
    return lambda run: run[name]


NUMBERS = strategies.sampled_from([
    ("metrics.accuracy", metric("accuracy")), ("metrics.val_loss", metric("val_loss")),
    ("metrics.f1", metric("f1")), ('metrics."val/acc"', metric("val/acc")),
    ("metrics.accuracy.best", metric("accuracy", "max_value")),
    ("metrics.val_loss.min", metric("val_loss", "min_value")),
    ("metrics.'val/acc'.last", metric("val/acc", "last_value")),
    ("duration", column("duration_s"))]) | strategies.sampled_from(
        [0, 1, 0.5, 0.95, 0.1, 3, 30.0, 1e300]).map(lambda n: (repr(n), lambda run: n))
PARAMS = strategies.sampled_from([(f"params.{name}", param(name)) for name in (
    "learning_rate", "mixed", "optimizer.momentum", "model_name", "n_epochs", "flag")])
LITERALS = strategies.sampled_from(["", "abc", "linear_svm", "3", 'says "hi"', "it's", "zz"]).map(
    lambda text: ("'" + text.replace("'", "''") + "'", lambda run: text))
TEXTS = strategies.sampled_from([(name, column(name)) for name in (
    "note", "model_name", "dataset_id", "run_id")]) | LITERALS
PATTERNS = strategies.sampled_from(["%", "l%", "%_", "%HI%", "100\\%%", "\\_", "_", "%a%r%"])


def arithmetic(inner):
    both = strategies.tuples(inner, strategies.sampled_from(list(COMPUTE)), inner)
    return both.map(lambda t: (f"({t[0][0]} {t[1]} {t[2][0]})",
                               lambda run: computed(t[1], t[0][1](run), t[2][1](run)))) \
        | inner.map(lambda t: (f"-{t[0]}", lambda run: computed("*", -1, t[1](run))))


COMPUTED = strategies.recursive(NUMBERS | PARAMS, arithmetic, max_leaves=4)
NUMERIC = NUMBERS | strategies.tuples(COMPUTED, strategies.just(0)).map(
    lambda t: (f"({t[0][0]} + 0)", lambda run: computed("+", t[0][1](run), 0)))


def comparisons():
    def one(left, right):
        return strategies.tuples(left, strategies.sampled_from(list(COMPARE)), right).map(
            lambda t: (f"{t[0][0]} {t[1]} {t[2][0]}",
                       lambda run: compared(t[1], t[0][1](run), t[2][1](run))))

    def within(t):
        (text, value), items, is_not = t

        def holds(run):
            found = False
            for _, item in items:
                found = joined("or", found, compared("=", value(run), item(run)))
            return found if not is_not or found is None else not found
        listed = ", ".join(item[0] for item in items)
        return f"{text} {'not ' * is_not}in [{listed}]", holds

    def null(t):
        return (f"{t[0][0]} is {'not ' * t[1]}null",
                lambda run: (t[0][1](run) is None) != t[1])

    def like(t):
        def holds(run):
            found = alike(t[0][1](run), t[1])
            return found if not t[2] or found is None else not found
        return f"{t[0][0]} {'not ' * t[2]}like '{t[1]}'", holds
    constants = strategies.sampled_from([0.95, 3, 1, 0.1]).map(lambda n: (repr(n), lambda run: n))
    named = NUMBERS.filter(lambda t: t[0][0].isalpha()) | PARAMS
    return (one(NUMERIC, NUMERIC) | one(TEXTS, TEXTS) | one(PARAMS, PARAMS | NUMERIC | TEXTS)
            | one(NUMERIC | TEXTS, PARAMS)
            | strategies.tuples(named, strategies.lists(constants, min_size=1, max_size=3),
                                strategies.booleans()).map(within)
            | strategies.tuples(TEXTS | PARAMS, strategies.lists(LITERALS, min_size=1, max_size=3),
                                strategies.booleans()).map(within)
            | strategies.tuples(named | TEXTS.filter(lambda t: t[0][0].isalpha()),
                                strategies.booleans()).map(null)
            | strategies.tuples(TEXTS | PARAMS, PATTERNS, strategies.booleans()).map(like))


def conditions(inner):
    def negated(t):
        def holds(run):
            found = t[1](run)
            return None if found is None else not found
        return f"not ({t[0]})", holds
    return inner.map(negated) | strategies.tuples(
        inner, strategies.sampled_from(["and", "or"]), inner).map(lambda t: (
            f"({t[0][0]}) {t[1]} ({t[2][0]})",
            lambda run: joined(t[1], t[0][1](run), t[2][1](run))))


def test_where_keeps_what_plain_python_would(odd_lab, monkeypatch):
    runs = [ailab.get_run(odd_lab.conn, run_id) for run_id in odd_lab.names]

    @hypothesis.settings(max_examples=400, deadline=None, derandomize=True, database=None,
                         suppress_health_check=list(hypothesis.HealthCheck))
    @hypothesis.given(strategies.recursive(comparisons(), conditions, max_leaves=5),
                      strategies.sampled_from([{}, {"sort": "metrics.val_loss"}]),
                      strategies.sampled_from([(1, 0), (1, 4), (1_000, 16_000)]))
    def agrees(expression, more, widths):
        monkeypatch.setattr(ailab, "WIDE", widths[0])
        monkeypatch.setattr(ailab, "FEW", widths[1])
        where, holds = expression
        got = kept_by_store(odd_lab, where, **more)
        assert sorted(got) == sorted(
            odd_lab.names[run["run_id"]] for run in runs if holds(run) is True), where
    agrees()


# --- What is refused -----------------------------------------------------------------------

@pytest.mark.parametrize("where, column, words", [
    ("metrics.accurcy > 0.9", 1, "did you mean 'accuracy'"),
    ("status = 'failed' or  params.learning_rat < 1", 23, "did you mean 'learning_rate'"),
    ('metrics."val acc" > 0.9', 1, "'val/acc'"),
    ("metrics.Accuracy > 0.9", 1, "'accuracy'"),
    ("stats = 'failed'", 1, "did you mean 'status'"),
    ("accuracy > 0.9", 1, "metrics.accuracy"),
    ("status = finished", 10, "text goes in quotes: 'finished'"),
    ("model_name in [mlp, 'x']", 16, "text goes in quotes: 'mlp'"),
    ("metrics.val/acc > 0.9", 13, 'metrics."val/acc"'),
    ("metrics.accuracy > ", 20, "the end"),
    ("metrics.accuracy", 17, "a comparison"),
    ("metrics.accuracy >> 1", 19, "'>'"),
    ("metrics.accuracy > 1 and", 25, "the end"),
    ("metrics.accuracy > 1 and 3", 26, "a number"),
    ("metrics.accuracy > 1 status = 'failed'", 22, "and, or, or the end"),
    ("(metrics.accuracy > 1", 22, ")"),
    ("metrics.accuracy > 1)", 21, "the end"),
    ("metrics.accuracy > 'high'", 20, "a number is compared with text"),
    ("note > 3", 8, "text is compared with a number"),
    ("timestamp > 'noon'", 13, "2026-11-24"),
    ("timestamp > 3", 13, "a time"),
    ("status = 'done'", 10, "running, finished, failed, killed"),
    ("note = 'open", 8, "closing quote"),
    ("metrics.accuracy > 1 & 2", 22, "'&'"),
    ("metrics.accuracy = null", 20, "is null"),
    ("metrics.accuracy is 3", 21, "null"),
    ("metrics.accuracy not 3", 22, "in or like"),
    ("metrics.accuracy in 3", 21, "a list"),
    ("metrics.accuracy in []", 22, "a number"),
    ("metrics.accuracy in [1, duration]", 25, "a list holds"),
    ("metrics.accuracy in [1 2]", 24, "a comma"),
    ("metrics.accuracy like 'x'", 1, "like asks about text"),
    ("note like 3", 11, "a pattern"),
    ("note + 1 > 2", 1, "arithmetic"),
    ("(metrics.accuracy > 1) + 1 > 2", 2, "arithmetic"),
    ("metrics.accuracy > 1e999", 20, "finite"),
    ("params.mixed = 18446744073709551615", 16, "more than 64 bits hold"),
    ("metrics. > 1", 10, "a name"), ("metrics > 1", 9, "a name"), ("not", 4, "the end"),
    ("   ", 4, "the end"), ("1 is null", 1, "a metric"), ("note = 'größter' x", 18, "'x'"),
])
def test_a_mistake_in_where_is_told_with_its_column_and_what_to_do(refused, where, column, words):
    sentence, at = refused(where)
    assert words in sentence
    assert f"column {column}:" in sentence
    assert at == column


def test_a_mistake_in_where_has_the_same_words_on_a_leaderboard_and_in_the_store(odd_lab, api):
    query = urllib.parse.urlencode({"metric_name": "accuracy", "where": "metrics.accurcy > 1"})
    status, _, answer = api("GET", f"/runs/leaderboard?{query}")
    assert (status, answer["column"]) == (422, 1)
    with pytest.raises(ailab.BadQuery) as caught:
        kept_by_store(odd_lab, "metrics.accurcy > 1")
    assert (caught.value.detail, caught.value.column) == (answer["detail"], 1)


def test_a_refusal_that_is_not_about_where_has_no_column(lab, api):
    assert set(api("GET", "/runs?limit=0")[2]) == {"detail"}


def test_a_name_in_where_of_an_empty_lab_says_that_nothing_was_logged(conn, api):
    status, _, answer = api("GET", "/runs?where=metrics.accuracy%3E0")
    assert status == 422
    assert "none was logged yet" in answer["detail"]


@pytest.mark.parametrize("where, words", [
    ("(" * 21 + "1 = 1" + ")" * 21, "20 deep"), ("1 = 1" + " or 1 = 1" * 100, "200"),
    ("metrics.accuracy in [" + "1, " * 300 + "1]", "200"), ("1 + " * 250 + "1 = 1", "200"),
    ("note = '" + "x" * 4_000 + "'", "4000"), ("-" * 3_990 + "1 = 1", None),
    ("not " * 990 + "1 = 1", None), ("(" * 20 + "1 = 1" + ")" * 20, None)])
def test_where_is_bounded_in_length_depth_and_terms(refused, api, where, words):
    if words:
        assert words in refused(where)[0]
    else:
        assert api("GET", "/runs?" + urllib.parse.urlencode({"where": where}))[0] == 200


HOSTILE = [
    "__import__('os').system('touch /tmp/hit')", "().__class__.__bases__[0]", "exec('1')",
    "lambda: 1", "[x for x in (1,)]", "1; DROP TABLE runs", "1 = 1; DROP TABLE runs --",
    "note = '' OR 1=1 --'", "metrics.accuracy = 1 UNION SELECT 1", "1 = 1 /* x */", "${jndi:ldap}",
    "run_id in (SELECT run_id FROM runs)", "metrics.\"x' OR '1'='1\" > 1",
    "params.\"a\") OR 1=1--\" = 1",
    "metrics.a.b.c.d.e = 1", "sqlite_version() = 1", "note like '%' || note",
    "load_extension('x')",
    "randomblob(1000000000) = 1", "9**9**9**9 = 1", "9 ** 9 = 1", "1e308 * 10 = 1", "0x41 = 1",
    "'" + "a" * 3_000,
    '"' * 3_001, "[" * 3_000, "(" * 3_000, ")" * 3_000, "not " * 999, "-" * 3_999,
    "\x00 = 1", "note = '\x00'", "note = '\ud7ff\U0010ffff'", "\u202e = 1", "ｎｏｔｅ = 1",
    "note = 'x' \x00",
    "note like '" + "%a" * 1_900 + "'", "note like '" + "_" * 3_000 + "'", "{0} = 1", "{} = {}",
    ":w0 = 1", "? = ?", "@a = 1", "metrics.accuracy = :w1", "r.note = 'x'", "rowid = 1",
    "deleted_at = 1", "pip_freeze like '%'", "metrics.accuracy collate nocase = 1",
    "case when 1 then 1 end = 1",
    "metrics.run_id = 1", "params.\"\" = 1", "metrics.\"%\" = 1", "1 = 1 limit 1",
    "1 = 1 order by 1"]


@pytest.mark.parametrize("where", HOSTILE)
def test_a_hostile_expression_neither_runs_nor_breaks(odd_lab, api, where):
    insert_run(odd_lab.conn, run_id="long", timestamp=started(0), note="a" * 10_000)
    status, _, answer = api("GET", "/runs?" + urllib.parse.urlencode({"where": where}))
    if status == 200:
        assert len(answer) <= 18
    else:
        assert status in (414, 422), answer
        assert not re.search("Traceback|sqlite3|metric_summary|syntax error",
                             answer["detail"].replace(repr(where), ""))
    assert odd_lab.conn.execute("SELECT count(*) FROM runs").fetchone()[0] == 18


@pytest.mark.parametrize("seed", range(10))
def test_pieces_of_where_in_any_order_are_answered_or_refused_with_a_column(odd_lab, seed):
    values = ["metrics.accuracy", "params.mixed", "note", "timestamp", "duration", "status", "(",
              "'x%'", "3", "0.5", "not", "-", "true", "'2026-11-01'", "'failed'", "[3]", "null"]
    between = ["and", "or", "in", "is", "is not", "like", ")", ",", "+", "*", "/", "<", ">=", "=",
               "!=", "[", "]", ".", "not in", "not like"]
    chosen, n_kept = random.Random(seed), 0
    for _ in range(300):
        where = " ".join(chosen.choice((values, between)[n % 2])
                         for n in range(chosen.choice((3, 3, 5, 7, 8))))
        try:
            kept_by_store(odd_lab, where)
            n_kept += 1
        except ailab.BadQuery as refusal:
            assert 1 <= refusal.column <= len(where) + 1, where
    assert n_kept                                     # the pieces do fit at times


def test_where_that_takes_too_long_is_given_up_with_what_to_do(odd_lab, api, monkeypatch):
    monkeypatch.setattr(ailab, "WHERE_S", 0.0)
    rows = [(f"more-{n}", started(0), '{"accuracy": 0.5}') for n in range(2_000)]
    with lab_logger.transaction(odd_lab.conn):
        odd_lab.conn.executemany("INSERT INTO runs (run_id, timestamp, final_metrics_json) "
                                 "VALUES (?, ?, ?)", rows)
    heavy = " or ".join(["metrics.accuracy * metrics.accuracy > 9"] * 20)
    status, _, answer = api("GET", "/runs?" + urllib.parse.urlencode({"where": heavy}))
    assert status == 422
    assert "constants" in answer["detail"]
    monkeypatch.undo()
    assert api("GET", "/runs?where=metrics.accuracy%3D0.5&limit=3")[0] == 200


def test_no_text_of_a_request_is_in_the_sql():
    where = ailab.Where("params.\"zzqx\" = 'zzqx' or metrics.zzqx.best < 77123 or "
                        "note like 'zzqx%' or timestamp < '2031-01-01'", ailab.direction)
    for secret in ("zzqx", "77123", "2031"):
        assert secret not in "".join(where.needed)
        assert any(secret in str(value) for value in where.bound.values())


@pytest.mark.parametrize("text", [
    "params.learning_rate" + " + 1" * 150 + " > 0", "1" + " * 2 / 2" * 90 + " = 1",
    "params.learning_rate - 1 - 1 - (1 - 1) - 1 < 0", "2 * (3 + 4) * 5 - 6 / 3 = 68",
    "(" * 19 + "metrics.accuracy" + " + 1 - 1)" * 19 + " >= 0"])
def test_long_arithmetic_is_answered(lab, api, text):
    status, _, found = api("GET", "/runs?" + urllib.parse.urlencode({"where": text}))
    assert status == 200 and found


@pytest.mark.parametrize(("text", "n_needed", "n_leaves"), [
    ("metrics.f1 > 1 and params.a in [1, 2] and model_name in ['x', 'y']", 3, 3),
    ("metrics.f1 > 1 or params.a < 1", 0, 2), ("not (metrics.f1 > 1 and params.a < 1)", 0, 2),
    ("not (metrics.f1 > 1 or params.a < 1)", 2, 2), ("not 0 < metrics.f1 < 1", 0, 2),
    ("0 < metrics.f1 < 1", 2, 2), ("metrics.f1 > 1 and (params.a < 1 or params.b < 1)", 1, 3),
    ("(metrics.f1 > 1 and (status = 'failed')) and note is not null", 2, 2)])
def test_where_knows_which_conditions_every_run_has_to_meet(text, n_needed, n_leaves):
    found = ailab.Where(text, ailab.direction)
    assert (len(set(found.leaves) & set(found.needed)), len(found.leaves)) == (n_needed, n_leaves)
