"""Bad input of every kind: one shape, one sentence, never a 5xx; and a store that breaks."""
import contextlib
import functools
import gzip
import http.client
import json
import os
import socket
import sqlite3
import urllib.parse

import pytest
from conftest import LINES, insert_points, insert_run, journal_lines, started

import ailab
import lab_logger

PATH = "/runs/{run_id}/note"
GETS = ["/health", "/runs", "/runs/leaderboard?metric_name=accuracy", "/lab", "/experiments",
        "/metrics", "/openapi.json", "/runs/{run_id}", "/runs/{run_id}/metrics",
        "/curves?ids={run_id}", "/runs/compare?ids={run_id}&ids=32c3d4e5", "/"]


@pytest.fixture
def refused(lab, api):
    """refused(status, method, path, ...) -> the sentence, once its shape has been checked."""
    def check(wanted, method, path, body=None, headers=None):
        status, got_headers, answer = api(method, path.replace("{run_id}", lab.ids["svm_01"]), body,
                                          headers)
        wanted = wanted if isinstance(wanted, tuple) else (wanted,)
        assert status in wanted, (status, answer)
        assert got_headers.get_content_type() == "application/json"
        assert list(answer) in (["detail"], ["detail", "column"])
        # A 503 may name the lab's file to this machine's user, as GET /lab does.
        sentence = answer["detail"].replace(lab.db_path, "the file" if status == 503 else "\n")
        assert is_one_sentence(sentence), sentence
        return sentence
    return check


def is_one_sentence(text):
    """Whether the text is one line for a user: no traceback, SQL or path of ours."""
    leaks = ("Traceback", "File \"", "sqlite3.", "SELECT ", "ailab.py", "site-packages", "/tmp/",
             "object at 0x", "pydantic", "validation error")
    return (isinstance(text, str) and 10 < len(text) < 1_000 and "\n" not in text.strip()
            and not [leak for leak in leaks if leak in text])


# --- Parameters -----------------------------------------------------------------------

BAD_PARAMETERS = [
    ("/runs?limit=-1", "limit"), ("/runs?limit=0", "limit"), ("/runs?limit=1001", "limit"),
    ("/runs?limit=ten", "limit"), ("/runs?limit=", "limit"), ("/runs?limit=1.0", "limit"),
    ("/runs?limit=%2010", "limit"), ("/runs?limit=1_0", "limit"), ("/runs?limit=%D9%A3", "limit"),
    ("/runs?offset=x", "offset"), ("/runs?offset=-1", "offset"),
    ("/runs?offset=99999999999999999999999999", "offset"), ("/runs?offset=1e3", "offset"),
    ("/runs?limit=5&limit=6", "limit"), ("/runs?model_name=a&model_name=b", "model_name"),
    ("/runs?sort=timestamp&sort=duration", "sort"),
    ("/runs?metric_name=accuracy&metric_min=nan", "metric_min"),
    ("/runs?metric_name=accuracy&metric_max=NaN", "metric_max"),
    ("/runs?metric_name=accuracy&metric_min=inf", "metric_min"),
    ("/runs?metric_name=accuracy&metric_min=high", "metric_min"),
    ("/runs?metric_name=accuracy&metric_min=1e999", "metric_min"),
    ("/runs?metric_name=accuracy&metric_min=0x1", "metric_min"),
    ("/runs?metric_name=accuracy&metric_min=1_0", "metric_min"),
    ("/runs?metric_min=0.5", "metric_name"), ("/runs?status=paused", "status"),
    ("/runs?order=up", "order"), ("/runs?sort=colour", "sort"),
    ("/runs?from_timestamp=yesterday", "from_timestamp"),
    ("/runs?to_timestamp=2026-02-30", "to_timestamp"),
    ("/runs?colour=red", "colour"), ("/runs?Limit=5", "Limit"), ("/runs?where=", "where"),
    ("/runs?where=1", "where"), ("/runs?where=metrics.acc", "where, column 12"),
    ("/runs?where=1%3D1&where=1%3D1", "where"), ("/runs?by=", "by"), ("/runs?by=worst", "best"),
    ("/runs/leaderboard?metric_name=accuracy&by=first", "by"),
    ("/runs/leaderboard?metric_name=accuracy&where=1", "where"),
    ("/runs/compare?ids={run_id}&ids=32c3d4&by=mean", "by"), ("/metrics?by=best", "by"),
    ("/runs/leaderboard", "metric_name"), ("/runs/leaderboard?metric_name=", "metric_name"),
    ("/runs/leaderboard?metric_name=accuracy&top_k=0", "top_k"),
    ("/runs/leaderboard?metric_name=accuracy&top_k=-5", "top_k"),
    ("/runs/leaderboard?metric_name=accuracy&top_k=1001", "top_k"),
    ("/runs/leaderboard?metric_name=accuracy&top_k=all", "top_k"),
    ("/runs/leaderboard?metric_name=accuracy&order=worst", "order"),
    ("/runs/leaderboard?metric_name=accuracy&colour=red", "colour"),
    ("/runs/compare", "ids"), ("/runs/compare?ids=", "ids"), ("/runs/compare?ids={run_id}", "ids"),
    ("/runs/compare?ids={run_id}&ids=32c3d4&colour=red", "colour"),
    ("/curves", "ids"), ("/curves?names=loss", "ids"),
    ("/curves?ids={run_id}&max_points=0", "max_points"),
    ("/curves?ids={run_id}&max_points=1e9", "max_points"),
    ("/curves?ids={run_id}&max_points=99999999", "max_points"),
    ("/curves?ids={run_id}&x=colour", "x"), ("/curves?ids={run_id}&since=-1", "since"),
    ("/curves?ids={run_id}&since=x", "since"), ("/curves?ids={run_id}&from=nan", "from"),
    ("/curves?ids={run_id}&to=inf", "to"), ("/curves?ids={run_id}&colour=red", "colour"),
    ("/runs/{run_id}/metrics?x=", "x"), ("/runs/{run_id}/metrics?colour=red", "colour"),
    ("/runs/{run_id}?colour=red", "colour"), ("/lab?colour=red", "colour"),
    ("/experiments?colour=red", "colour"), ("/metrics?colour=red", "colour"),
]


@pytest.mark.parametrize("path, name", BAD_PARAMETERS, ids=[path for path, _ in BAD_PARAMETERS])
def test_a_bad_parameter_is_refused_by_its_name(refused, path, name):
    assert name in refused(422, "GET", path)


def test_an_unknown_parameter_is_answered_with_those_that_exist(refused):
    sentence = refused(422, "GET", "/runs?experment_name=iris")
    assert "'experment_name'" in sentence and "experiment_name" in sentence.replace(
        "'experment_name'", "")


@pytest.mark.parametrize("path", ["/runs?model_name=%ff%fe", "/runs?q=%c0%af", "/runs?%ff=1",
                                  "/runs/%ff%fe%fd%fc%fb%fa", "/runs/compare?ids=%ff&ids=%fe",
                                  "/static/%ff.js", "/%ff", "/runs?q=%ed%a0%80"])
def test_escapes_that_are_no_utf8_are_refused(refused, path):
    refused((400, 404, 422), "GET", path)


@pytest.mark.parametrize("query", [
    "model_name=" + "a" * 3_000, "q=" + "%20a" * 2_000, "&".join(["limit=1"] * 500),
    "&".join(f"p{n}=1" for n in range(2_000)), "q=%00", "note_substring=%00%00", "&&&&", "=",
    "=&=", "limit", "%", "%zz", "q=%", "?", "#", "model_name=%0d%0aX:%20y", ";limit=1",
    "limit=1;offset=2", "metric_name=" + "[" * 1_000, "sort=metrics." + "a." * 1_000])
def test_odd_queries_get_an_answer_or_a_sentence(lab, api, query):
    status, _, answer = api("GET", "/runs?" + query)
    assert status == 200 or (400 <= status < 500 and is_one_sentence(answer["detail"]))


# --- Every parameter and every body of the route table ----------------------------------------

LONG = "9" * 2_000
WRONG = {                                         # by kind: what no parameter of it accepts
    "text": [""],
    "integer": ["", "ten", "1.0", "1e3", " 5", "5 ", "0x10", "1_0", "\u0663", "NaN", "null", LONG],
    "number": ["", "high", "nan", "NaN", "inf", "-Infinity", "1e999", "0x1", "1_0", "1,5", LONG],
    "time": ["", "yesterday", "2026-02-30", "2026-13-01", "2026-11-24T25:00", "0000-00-00", LONG],
    "choice": ["", "up", "NaN", LONG], "sort": ["", "colour", "metrics.", "params", "NaN", LONG],
    "where": ["", "1", "(", "metrics.", "status", "NaN", "(" * 500, "not " * 500, LONG,
              "x = '" + "y" * 5_000],
    "journal": ["", "..", "a/b", "a.b", "a" * 65, "\u00e9", "a\n", "a\0", LONG]}
NEEDED = {"metric_name": "accuracy", "ids": ["54e5f6a7-0006", "32c3d4e5"], "journal": "job-1",
          "offset": "0"}
PARAMETERS = [(route, param) for route in ailab.ROUTES for param in route.params]


def wrong_queries(route, param):
    """Queries that are good but for one parameter."""
    good = [(other.name, NEEDED[other.name]) for other in route.params
            if other.min_times or (other.name, param.name[:7]) == ("metric_name", "metric_")]
    others = [pair for pair in good if pair[0] != param.name]
    wrong = list(WRONG[param.kind])
    if param.kind == "integer":
        wrong += [str(param.least - 1), str(param.most + 1)]
    if param.kind == "choice":
        wrong += [param.choices[0].upper(), param.choices[0] + "\0", param.choices[0] + " "]
    values = [[*NEEDED["ids"][:param.min_times - 1], text] for text in wrong]
    some = "accuracy" if param.kind in ("text", "sort") else "5"
    values += [[some] * (param.max_times + 1)] + [[]] * (param.min_times > 0)
    for texts in values:
        yield urllib.parse.urlencode([*others, *((param.name, text) for text in texts)], True)


@pytest.mark.parametrize("column", [name for name in lab_logger.RUN_COLUMNS if name != "run_id"])
def test_what_plain_sql_puts_in_a_column_is_shown_or_left_out(lab, api, capsys, column):
    run_id = lab.ids["svm_01"]
    for value in (b"\0\xff", "text", "", 1e999, '{"a": {"b": [1]}}'):
        with contextlib.closing(sqlite3.connect(lab.db_path)) as other, other:
            other.execute(f"UPDATE runs SET {column} = ? WHERE run_id = ?", (value, run_id))
        for path in GETS:
            status, _, answer = api("GET", path.replace("{run_id}", run_id))
            assert status == 200 or (column == "deleted_at" and status == 404), (path, value)
            if path == "/runs/{run_id}" and status == 200 and column != "status":
                ailab.RunDetail.model_validate_json(json.dumps(answer), strict=True)
        assert ailab.main(["show", run_id]) == (column == "deleted_at")
        status, _, answer = api("POST", "/agent/query", {"query": "best run by accuracy"})
        assert status == 200 and answer["used_run_ids"], (value, answer)
    capsys.readouterr()


@pytest.mark.parametrize("route, param", PARAMETERS,
                         ids=[f"{route.method} {route.path} {param.name}"
                              for route, param in PARAMETERS])
def test_a_wrong_value_of_any_parameter_is_refused_by_its_name(refused, lab, route, param):
    path = route.path.format(run_id=lab.ids["svm_01"])
    body = journal_lines() if route.body is bytes else None
    before = lab.conn.execute("PRAGMA data_version").fetchone()
    for query in wrong_queries(route, param):
        assert param.name in refused(422, route.method, f"{path}?{query}", body, LINES)
    for raw in (f"{param.name}=%ff%fe", f"{param.name}=%ed%a0%80", f"%ff{param.name}=1"):
        assert "UTF-8" in refused(422, route.method, f"{path}?{raw}", body, LINES)
    assert lab.conn.execute("PRAGMA data_version").fetchone() == before


@pytest.mark.parametrize("route", ailab.ROUTES, ids=lambda route: f"{route.method} {route.path}")
def test_a_route_is_given_parameters_of_its_own_only(refused, lab, route):
    body = {bytes: journal_lines(), None: None}.get(route.body, b'{"note": null, "query": "x"}')
    headers = {"Content-Type": ailab.content_type_of(route.body)}
    path = route.path.format(run_id=lab.ids["svm_01"], index="0", path="app.js")
    wanted = 422 if route.body in (None, bytes) else (422, 400)
    before = lab.conn.execute("PRAGMA data_version").fetchone()
    sentence = refused(wanted, route.method, path + "?colour=red", body, headers)
    if wanted == 422:
        assert "'colour'" in sentence
    assert lab.conn.execute("PRAGMA data_version").fetchone() == before


ODD_PARTS = ["%ff%fe", "%ed%a0%80", "%00", "a" * 3_000, "%2e%2e", "..", ".", "-1", "NaN", "%20",
             "%0d%0aX:%20y", "'%20OR%201=1--", "%F0%9F%9A%80", "1e9", "9" * 400, "%252e", "[]"]


@pytest.mark.parametrize("route", [route for route in ailab.ROUTES if "{" in route.path],
                         ids=lambda route: f"{route.method} {route.path}")
def test_an_odd_part_of_a_path_is_refused(refused, lab, route):
    body = b'{"note": "x"}' if route.body else None
    before = lab.conn.execute("PRAGMA data_version").fetchone()
    for part in ODD_PARTS:
        for given in ({"run_id": part, "index": "0"}, {"run_id": lab.ids["svm_01"], "index": part}):
            path = route.path.format(**given, path=part)
            if "{index}" in route.path or given["run_id"] == part:
                refused((400, 404), route.method, path, body, JSON)
    assert lab.conn.execute("PRAGMA data_version").fetchone() == before


WRONG_JSON = [5, -1.5, True, 10 ** 400, [], ["x"], {}, {"a": 1}, "\ud800"]
GOOD_JSON = {"note": "x", "query": "How many runs?", "metric_name": "accuracy",
             "direction": "minimize"}


def wrong_bodies(model):
    """JSON texts that are no object of the model: (what is wrong, the text, statuses)."""
    good = {name: GOOD_JSON[name] for name in model.model_fields}
    for name in good:
        for value in WRONG_JSON:
            yield name, json.dumps({**good, name: value}).encode(), 422
        for token in ("NaN", "Infinity", "-Infinity", "1e999"):
            yield name, json.dumps({**good, name: 0}).replace(" 0", f" {token}").encode(), 422
        yield name, json.dumps({**good, name: "x" * 600_000}).encode(), (404, 422)
        for deep in (b"[" * 900 + b"]" * 900, b'{"a":' * 900 + b"1" + b"}" * 900, b"[" * 50_000):
            yield "", json.dumps({**good, name: 0}).encode().replace(b" 0", b" " + deep), (400, 422)
    yield "colour", json.dumps({**good, "colour": 1}).encode(), 422
    yield next(iter(good)), b"{}", 422
    for text in (b"", b" ", b"null", b"true", b"5", b'"x"', b"[]", b"NaN", b"[" * 100_000, b"{" * 9,
                 b"\xff\xfe", b"\xef\xbb\xbf{}", json.dumps(good).encode("utf-16"), b"\0",
                 json.dumps(good).encode()[:-1], json.dumps(good).encode() * 2):
        yield "", text, (400, 422)
    yield "bytes", b"[" + b"1," * (1 << 19) + b"1]", 413


@pytest.mark.parametrize("route", [route for route in ailab.ROUTES if route.body not in
                                   (None, bytes)], ids=lambda route: f"{route.method} {route.path}")
def test_a_wrong_body_of_any_route_is_refused(refused, lab, route):
    path, before = route.path.format(run_id=lab.ids["svm_01"]), lab.conn.execute(
        "PRAGMA data_version").fetchone()
    for word, body, status in wrong_bodies(route.body):
        assert word in refused(status, route.method, path, body, JSON)
    for kind in ("", "text/plain", "application/x-ndjson", "text/json", "multipart/form-data"):
        assert "application/json" in refused(415, route.method, path, b"{}", {"Content-Type": kind})
    assert lab.conn.execute("PRAGMA data_version").fetchone() == before


def test_lines_nested_deep_are_served_or_refused_and_break_no_answer(lab, api):
    for depth in (99, 101, 400, *range(900, 1_000, 9), 5_000):
        deep = '{"a":' * depth + "1" + "}" * depth
        lines = journal_lines(n_points=1).replace(
            b'"status"', f'"params_json": {json.dumps(deep)}, "status"'.encode())
        run = f"deep-run-{depth}"
        assert api("POST", f"/ingest?journal={run}&offset=0", lines, LINES)[0] in (200, 422)
        insert_run(lab.conn, run_id=run + "-sql", params_json=deep, artifacts_json="[" * depth,
                   resumptions_json=deep, final_metrics_json=deep)
        for path in ("/runs", f"/runs/{run}", f"/runs/{run}-sql", f"/curves?ids={run}", "/lab",
                     f"/runs/compare?ids={run}-sql&ids=32c3d4e5",
                     f"/runs?sort=params.{'.'.join('a' * 99)}"):
            status, _, answer = api("GET", path)
            assert status in (200, 404), (depth, path, answer)
        status, _, answer = api("GET", "/runs?sort=params.a")
        assert status == 422 and len(answer["detail"]) < 500
    assert json.loads('{"a":' * 99 + "1" + "}" * 99) == api("GET", "/runs/deep-run-99")[2]["params"]
    assert api("GET", "/runs/deep-run-101-sql")[2]["params"] == {}


# --- Bodies -----------------------------------------------------------------------------

JSON = {"Content-Type": "application/json"}
BAD_BODIES = {
    "empty": (b"", (400, 422)), "no json": (b"{note: x", (400, 422)),
    "cut": (b'{"note": "x', (400, 422)),
    "two": (b'{"note": "x"} {"note": "y"}', (400, 422)), "nothing": (b"{}", 422),
    "list": (b'["note"]', 422), "text": (b'"note"', 422), "null": (b"null", 422),
    "number": (b"1", 422),
    "wrong type": (b'{"note": 5}', 422), "nested": (b'{"note": {"a": 1}}', 422),
    "true": (b'{"note": true}', 422), "unknown key": (b'{"note": "x", "stars": 5}', 422),
    "nan": (b'{"note": NaN}', (400, 422)), "too long": (
        json.dumps({"note": "x" * 10_001}).encode(), 422),
    "bytes": (b'{"note": "\xff\xfe"}', (400, 422)), "utf-16": ('{"note": "x"}'.encode("utf-16"),
                                                            (400, 422)),
    "deep": (b'{"note": ' + b"[" * 5_000 + b"]" * 5_000 + b"}", (400, 422)),
    "deeper": (b"[" * 100_000, (400, 413, 422)), "lone surrogate": (b'{"note": "\\ud800"}', 422),
    "digits": (b'{"note": ' + b"9" * 6_000 + b"}", (400, 422)),
}


@pytest.mark.parametrize("kind", BAD_BODIES)
def test_a_bad_body_is_refused_and_nothing_is_written(lab, refused, kind):
    body, status = BAD_BODIES[kind]
    before = lab.conn.execute("SELECT note FROM runs ORDER BY run_id").fetchall()
    refused(status, "PATCH", PATH, body, JSON)
    assert lab.conn.execute("SELECT note FROM runs ORDER BY run_id").fetchall() == before


@pytest.mark.parametrize("body, status, words", [
    ({"metric_name": "accurcy", "direction": "minimize"}, 404, "did you mean 'accuracy'"),
    ({"metric_name": "", "direction": None}, 404, "''"),
    ({"metric_name": "accuracy", "direction": "up"}, 422, "'maximize' or 'minimize'"),
    ({"metric_name": "accuracy"}, 422, "direction"), ({"direction": None}, 422, "metric_name"),
    ({"metric_name": 5, "direction": None}, 422, "metric_name"), ({}, 422, "metric_name"),
    ({"metric_name": "accuracy", "direction": "minimize", "x": 1}, 422, "x"), ([], 422, "object")],
    ids=str)
def test_a_bad_direction_is_refused_and_nothing_is_written(lab, refused, body, status, words):
    assert words in refused(status, "PATCH", "/metrics", json.dumps(body).encode(), JSON)
    assert lab.conn.execute("SELECT count(*) FROM metric_directions").fetchone() == (0,)


@pytest.mark.parametrize("body, status", [
    (b"", (400, 422)), (b"{", (400, 422)), (b"{}", 422), (b'{"query": 5}', 422),
    (b'{"query": null}', 422), (b'{"query": ""}', 422), (b'{"query": "   "}', 422), (b"[]", 422),
    (json.dumps({"query": "x" * 100_001}).encode(), (413, 422))])
def test_a_bad_question_is_refused(refused, body, status):
    refused(status, "POST", "/agent/query", body, JSON)


def test_a_note_of_exactly_10000_characters_is_taken(lab, api):
    status, _, run = api("PATCH", PATH.format(run_id=lab.ids["svm_01"]), {"note": "ü" * 10_000})
    assert (status, len(run["note"])) == (200, 10_000)


def test_a_body_that_is_too_large_is_refused_before_it_is_read(refused):
    refused(413, "PATCH", PATH, None, {**JSON, "Content-Length": str(1 << 30)})


def test_a_body_of_two_megabytes_is_too_large(refused):
    refused(413, "PATCH", PATH, json.dumps({"note": "x" * (2 << 20)}).encode(), JSON)


@pytest.mark.parametrize("path, method", [(PATH, "PATCH"), ("/agent/query", "POST")])
def test_a_body_of_another_type_is_refused(refused, path, method):
    sentence = refused(415, method, path, b'{"note": "x"}', {"Content-Type": "text/plain"})
    assert "application/json" in sentence


@pytest.mark.parametrize("content_type", ["application/json", "application/json; charset=utf-8",
                                          "Application/JSON;charset=UTF-8"])
def test_json_may_name_its_charset(lab, api, content_type):
    assert api("PATCH", PATH.format(run_id=lab.ids["svm_01"]), b'{"note": "x"}',
               {"Content-Type": content_type})[0] == 200


@pytest.mark.parametrize("extra", [b"", b"Transfer-Encoding: chunked\r\n"])
def test_a_body_without_a_length_is_refused(lab, server, extra):
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=10) as client:
        client.sendall(b"POST /agent/query HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: "
                       b"application/json\r\n" + extra + b"\r\n")
        answer = http.client.HTTPResponse(client)
        answer.begin()
        assert answer.status in (400, 411)
        assert list(json.loads(answer.read())) == ["detail"]


# --- Journal lines ------------------------------------------------------------------------

SEND = "/ingest?journal=job-1&offset=0"


@pytest.mark.parametrize("query, name", [
    ("offset=0", "journal"), ("journal=a", "offset"), ("journal=&offset=0", "journal"),
    ("journal=a.b&offset=0", "journal"), ("journal=a.0123ABCD&offset=0", "journal"),
    ("journal=a.0123abcde&offset=0", "journal"), ("journal=..&offset=0", "journal"),
    ("journal=a%2Fb&offset=0", "journal"), ("journal=a%0A&offset=0", "journal"),
    ("journal=%C3%A9&offset=0", "journal"), ("journal=" + "a" * 65 + "&offset=0", "journal"),
    ("journal=a&offset=-1", "offset"), ("journal=a&offset=x", "offset"),
    ("journal=a&offset=9223372036854775808", "offset"), ("journal=a&offset=0&death=", "death"),
    ("journal=a&journal=b&offset=0", "journal"), ("journal=a&offset=0&colour=red", "colour")])
def test_lines_under_a_wrong_name_or_offset_are_refused(lab, refused, query, name):
    assert name in refused(422, "POST", f"/ingest?{query}", journal_lines(), LINES)
    assert lab.conn.execute("SELECT count(*) FROM runs").fetchone() == (12,)


def test_lines_of_another_type_are_refused(refused):
    assert "application/x-ndjson" in refused(415, "POST", SEND, journal_lines(), JSON)


def test_lines_in_another_packing_are_refused(refused):
    sentence = refused(415, "POST", SEND, journal_lines(), {**LINES, "Content-Encoding": "br"})
    assert "'br'" in sentence and "gzip" in sentence


@pytest.mark.parametrize("body", [
    b"no gzip", b"", gzip.compress(journal_lines())[:-9], gzip.compress(b"{}\n") + b"tail",
    gzip.compress(b"{}\n") * 2], ids=["other", "empty", "cut", "tail", "two"])
def test_lines_that_are_no_whole_gzip_are_refused(refused, body):
    assert "gzip" in refused(422, "POST", SEND, body, {**LINES, "Content-Encoding": "gzip"})


def test_a_small_body_that_unpacks_to_a_gigabyte_is_never_unpacked_beyond_the_bound(refused):
    import resource
    import zlib
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    bomb = b"".join(packer.compress(b"\n" * (1 << 20)) for _ in range(1024)) + packer.flush()
    assert len(bomb) < 1_100_000
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    sentence = refused(413, "POST", SEND, bomb, {**LINES, "Content-Encoding": "gzip"})
    assert "16000000" in sentence
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000    # KiB


def test_lines_of_more_than_sixteen_megabytes_are_refused_before_they_are_read(refused):
    refused(413, "POST", SEND, None, {**LINES, "Content-Length": "16000001"})


def test_more_lines_than_a_logger_ever_sends_are_refused(refused):
    assert "200000 lines" in refused(413, "POST", SEND, b"\n" * 200_001, LINES)


@pytest.mark.parametrize("record", [
    {"set": {"note": {"a": 1}}}, {"set": {"status": None}}, {"m": {"loss": [1]}}, {"m": 5},
    {"m": {"loss": "high"}}, {"set": 5}, {"t": "soon", "m": {"loss": 1}}, {"e": 1 << 70, "m": {
        "loss": 1}}, {"t": 1e300, "m": {"loss": 1}}, {"set": {"pid": [1]}}],
    ids=json.dumps)
def test_lines_with_what_the_store_cannot_hold_are_refused_and_nothing_is_written(
        lab, api, refused, record):
    refused(422, "POST", SEND, journal_lines(record, n_points=2), LINES)
    assert api("GET", "/runs/job-1")[0] == 404
    assert lab.conn.execute("SELECT count(*) FROM run_metrics WHERE run_id = 'job-1'"
                            ).fetchone() == (0,)


def test_lines_of_a_newer_logger_are_refused_with_what_to_do(api, refused):
    lines = journal_lines().replace(b'"v": 2', b'"v": 99')
    assert "update AI-Lab" in refused(409, "POST", SEND, lines, LINES)
    assert api("GET", "/runs/job-1")[0] == 404


def test_lines_while_the_store_is_locked_are_refused_and_taken_later(lab, api, server,
                                                                     monkeypatch):
    monkeypatch.setattr(server.store, "write", functools.partial(server.store.write, wait_s=0.3))
    writer = sqlite3.connect(lab.db_path, isolation_level=None)
    writer.execute("BEGIN IMMEDIATE")
    try:
        status, _, answer = api("POST", SEND, journal_lines(), LINES)
    finally:
        writer.execute("ROLLBACK")
        writer.close()
    assert status == 503 and is_one_sentence(answer["detail"])
    assert api("POST", SEND, journal_lines(), LINES)[2]["status"] == "running"


# --- Paths and methods --------------------------------------------------------------------

@pytest.mark.parametrize("path", ["/nothing", "/runs/", "/run", "/Runs", "/runs/x/y/z",
                                  "/runs/{run_id}/", "/runs/{run_id}/colour", "/static", "/static/",
                                  "/static/nothing.js", "/favicon.png", "//runs", "/runs//",
                                  "/api/runs", "/.env", "/lab.db", "/%2e%2e/", "/.", "/*"])
def test_an_unknown_path_is_not_found(refused, path):
    refused(404, "GET", path)


@pytest.mark.parametrize("method, path", [
    ("GET", "/runs/{}"), ("GET", "/runs/{}/metrics"), ("GET", "/runs/{}/artifacts/0"),
    ("DELETE", "/runs/{}"), ("GET", "/runs/compare?ids={}&ids=32c3d4"), ("GET", "/curves?ids={}")])
def test_an_unknown_run_is_not_found_and_named(refused, method, path):
    sentence = refused(404, method, path.format("ffffffff-none"))
    assert "'ffffffff-none'" in sentence or "artifact" in sentence


def test_a_note_for_an_unknown_run_is_not_found(refused):
    assert "'ffffffff-none'" in refused(404, "PATCH", "/runs/ffffffff-none/note", {"note": "x"})


@pytest.mark.parametrize("method, path, allow", [
    ("POST", "/runs", {"GET", "HEAD"}), ("PUT", "/runs", {"GET", "HEAD"}),
    ("DELETE", "/runs", {"GET", "HEAD"}), ("POST", "/runs/{run_id}", {"GET", "HEAD", "DELETE"}),
    ("PATCH", "/runs/{run_id}", {"GET", "HEAD", "DELETE"}),
    ("GET", "/runs/{run_id}/note", {"PATCH"}), ("POST", "/runs/{run_id}/note", {"PATCH"}),
    ("GET", "/agent/query", {"POST"}), ("DELETE", "/health", {"GET", "HEAD"}),
    ("POST", "/", {"GET", "HEAD"}), ("PUT", "/static/app.js", {"GET", "HEAD"}),
    ("POST", "/curves", {"GET", "HEAD"}), ("OPTIONS", "/lab", {"GET", "HEAD"}),
    ("TRACE", "/lab", {"GET", "HEAD"}), ("BREW", "/lab", {"GET", "HEAD"})])
def test_a_wrong_method_is_told_which_are_right(lab, api, method, path, allow):
    status, headers, answer = api(method, path.replace("{run_id}", lab.ids["svm_01"]), {})
    assert status == 405
    assert set(headers["Allow"].replace(" ", "").split(",")) >= allow
    assert {"POST", "PUT", "PATCH", "DELETE"} & set(headers["Allow"].replace(" ", "").split(",")) \
        == allow - {"GET", "HEAD"}
    assert list(answer) == ["detail"] and is_one_sentence(answer["detail"])


def test_an_error_on_a_head_has_no_body(api):
    status, headers, body = api("HEAD", "/nothing")
    assert (status, body) == (404, b"")
    assert int(headers["Content-Length"]) > 0


# --- A store that fails under the server ------------------------------------------------------

def break_store(db_path, content):
    """Put other bytes in the store's place, as a careless copy would."""
    for suffix in ("-wal", "-shm"):
        if os.path.exists(db_path + suffix):
            os.unlink(db_path + suffix)
    os.replace(db_path, db_path + ".kept")
    if content is not None:
        with open(db_path, "wb") as file:
            file.write(content)


def restore_store(db_path):
    for suffix in ("", "-wal", "-shm"):
        if os.path.exists(db_path + suffix):
            os.unlink(db_path + suffix)
    os.replace(db_path + ".kept", db_path)


@pytest.mark.parametrize("content", [None, b"no database at all " * 300,
                                     b"SQLite format 3\0" + b"\xa5" * 8_000],
                         ids=["missing", "text", "torn"])
def test_a_store_that_breaks_is_a_503_until_it_is_back(lab, api, refused, content):
    lab.conn.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    assert len(api("GET", "/runs")[2]) == 12
    lab.conn.close()
    break_store(lab.db_path, content)
    try:
        for path in ("/runs", "/runs/{run_id}", "/lab", "/runs/leaderboard?metric_name=accuracy"):
            sentence = refused(503, "GET", path)
            assert "database" in sentence or "lab" in sentence
        refused(503, "PATCH", PATH, {"note": "lost?"})
        assert api("GET", "/")[0] == 200          # the page still comes, and says so
    finally:
        restore_store(lab.db_path)
    assert len(api("GET", "/runs")[2]) == 12


def test_a_server_starts_while_another_process_makes_the_labs_index(db_path):
    lab_logger.connect(db_path).close()           # as a training that never met ailab.py leaves it
    writer = sqlite3.connect(db_path, isolation_level=None)
    writer.execute("BEGIN IMMEDIATE")
    try:
        server = ailab.make_server(db_path)
    finally:
        writer.execute("ROLLBACK")
        writer.close()
    with server.store.read() as reader:
        assert ailab.list_runs(reader.conn, ailab.RunQuery(), limit=1) == []
    server.server_close()


def test_a_store_replaced_by_another_is_served_anew(lab, api, tmp_path):
    assert len(api("GET", "/runs")[2]) == 12
    copy = sqlite3.connect(tmp_path / "copy.db")
    lab.conn.backup(copy)
    copy.execute("DELETE FROM runs WHERE run_id <> ?", (lab.ids["lr_01"],))
    copy.commit()
    copy.close()
    lab.conn.close()
    break_store(lab.db_path, None)
    os.replace(tmp_path / "copy.db", lab.db_path)
    assert [run["run_id"] for run in api("GET", "/runs")[2]] == [lab.ids["lr_01"]]


@pytest.mark.parametrize("part", ["TABLE metric_summary", "TABLE run_text", "INDEX runs_timestamp",
                                  "TRIGGER runs_insert", "TABLE tally", "TABLE metric_directions",
                                  "INDEX run_metrics_curve", "TABLE summarised"])
def test_a_part_of_the_index_that_was_dropped_is_made_anew_for_the_next_request(lab, api, part):
    path = "/runs?q=svm&sort=metrics.accuracy"
    before = api("GET", path)[2]
    lab.conn.execute(f"DROP {part}")
    assert api("GET", path)[::2] == (200, before) and before != []
    assert api("PATCH", PATH.format(run_id=lab.ids["svm_01"]), {"note": "again"})[0] == 200
    assert lab.conn.execute("SELECT 1 FROM sqlite_master WHERE name = ?",
                            (part.split()[1],)).fetchone() == (1,)


def test_an_index_that_was_emptied_is_made_anew(lab, api):
    before = api("GET", "/runs")[2]
    lab.conn.execute("DELETE FROM summarised")
    assert api("GET", "/runs")[::2] == (200, before)
    insert_run(lab.conn, run_id="later")
    insert_points(lab.conn, "later", [(1, "loss", 0.5)])
    assert api("GET", "/runs/later")[2]["final_metrics"] == {"loss": 0.5}


@pytest.mark.parametrize("tables", [["runs"], ["run_metrics"], ["runs", "run_metrics"]])
def test_a_lab_whose_tables_were_dropped_takes_new_runs(lab, api, tables):
    assert len(api("GET", "/runs")[2]) == 12
    for name in tables:
        lab.conn.execute(f"DROP TABLE {name}")
    assert api("GET", "/runs")[0] == api("GET", "/lab")[0] == 200
    sent = api("POST", SEND, journal_lines(n_points=3), LINES)
    assert (sent[0], sent[2]["status"]) == (200, "running")
    assert api("GET", "/runs/job-1")[2]["final_metrics"] == {"loss": 1 / 3}
    assert len(api("GET", "/runs")[2]) == (1 if "runs" in tables else 13)


def test_a_column_that_was_dropped_comes_back_empty(lab, api):
    assert api("GET", "/runs")[0] == 200
    lab.conn.execute("ALTER TABLE runs DROP COLUMN received_from")
    assert api("GET", f"/runs/{lab.ids['svm_01']}")[2]["received_from"] is None


def test_a_store_written_over_in_place_is_a_503_until_it_is_good_again(lab, api, refused):
    assert api("PATCH", PATH.format(run_id=lab.ids["svm_01"]), {"note": "kept"})[0] == 200
    lab.conn.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    with open(lab.db_path, "r+b") as file:
        good = file.read()
        file.seek(0)
        file.write(b"no database " * 400)
        file.flush()
        for _ in range(2):
            refused(503, "GET", "/runs")
            refused(503, "PATCH", PATH, {"note": "lost?"})
        file.seek(0)
        file.write(good)
    assert api("GET", f"/runs/{lab.ids['svm_01']}")[2]["note"] == "kept"
    assert api("PATCH", PATH.format(run_id=lab.ids["svm_01"]), {"note": "new"})[0] == 200


def test_a_store_that_an_older_version_left_is_migrated_under_the_server(lab, api):
    assert api("GET", "/runs")[0] == 200
    lab.conn.execute("ALTER TABLE runs DROP COLUMN received_from")
    lab.conn.execute("PRAGMA user_version = 1")
    assert len(api("GET", "/runs")[2]) == 12
    assert lab.conn.execute("PRAGMA user_version").fetchone() == (lab_logger.SCHEMA_VERSION,)


def test_a_store_that_a_newer_version_migrated_is_a_503_until_it_is_back(lab, api, refused):
    assert api("GET", "/runs")[0] == 200
    lab.conn.execute("PRAGMA user_version = 99")
    for method, path, body in (("GET", "/runs", None), ("PATCH", PATH, {"note": "lost?"}),
                               ("DELETE", "/runs/{run_id}", None)):
        assert "99" in refused(503, method, path, body)
    assert lab.conn.execute("SELECT count(*) FROM runs WHERE note = 'lost?' OR deleted_at "
                            "IS NOT NULL").fetchone() == (0,)
    lab.conn.execute(f"PRAGMA user_version = {lab_logger.SCHEMA_VERSION}")
    assert api("GET", "/runs")[0] == 200


def test_a_store_that_another_program_writes_is_read_all_the_same(lab, api):
    writer = sqlite3.connect(lab.db_path, isolation_level=None)
    writer.execute("BEGIN IMMEDIATE")
    writer.execute("UPDATE runs SET note = 'not yet'")
    try:
        for path in GETS:
            path = path.replace("{run_id}", lab.ids["svm_01"])
            status, _, answer = api("GET", path)
            assert status == 200, answer
    finally:
        writer.execute("ROLLBACK")
        writer.close()


def test_a_store_with_a_rollback_journal_that_is_locked_is_busy_and_then_read_again(
        lab, api, server, refused, monkeypatch):
    lab.conn.execute("PRAGMA journal_mode = DELETE")
    monkeypatch.setattr(ailab, "READ_WAIT_S", 0.1)
    monkeypatch.setattr(ailab, "WRITE_WAIT_S", 0.1)
    monkeypatch.setattr(lab_logger, "network_filesystem", lambda *_: "nfs")
    assert api("GET", "/runs")[0] == 200
    server.store.close()
    lab.conn.execute("BEGIN EXCLUSIVE")
    for method, path, body in (("GET", "/runs", None), ("PATCH", PATH, {"note": "lost?"})):
        assert "busy: try again" in refused(503, method, path, body)
    lab.conn.execute("ROLLBACK")
    assert len(api("GET", "/runs")[2]) == 12


def test_a_note_while_the_store_is_locked_is_saved_or_refused_but_never_falsely_confirmed(
        lab, api, server, monkeypatch):
    monkeypatch.setattr(server.store, "write", functools.partial(server.store.write, wait_s=0.3))
    writer = sqlite3.connect(lab.db_path, isolation_level=None)
    writer.execute("BEGIN IMMEDIATE")
    try:
        status, _, answer = api("PATCH", PATH.format(run_id=lab.ids["svm_01"]), {"note": "now"})
    finally:
        writer.execute("ROLLBACK")
        writer.close()
    assert status == 503
    assert is_one_sentence(answer["detail"].replace(lab.db_path, "the file"))
    assert lab.conn.execute("SELECT note FROM runs WHERE run_id = ?",
                            (lab.ids["svm_01"],)).fetchone() == (None,)
    assert api("PATCH", PATH.format(run_id=lab.ids["svm_01"]), {"note": "now"})[0] == 200


def test_an_unexpected_fault_is_a_500_without_a_word_of_it(lab, api, monkeypatch, capfd):
    import ailab

    def fault(*_, **__):
        raise ZeroDivisionError("secret inner state")
    monkeypatch.setattr(ailab, "list_metrics", fault)
    status, _, answer = api("GET", "/metrics")
    assert status == 500
    assert list(answer) == ["detail"]
    assert "secret" not in answer["detail"] and "ZeroDivision" not in answer["detail"]
    assert "secret inner state" in capfd.readouterr().err
    assert api("GET", "/health")[0] == 200


def test_a_run_with_a_huge_row_is_served(lab, api):
    params = {f"p{number}": "x" * 900 for number in range(3_000)}
    insert_run(lab.conn, run_id="huge-row", timestamp=started(12), params_json=json.dumps(params),
               git_diff="+x\n" * 300_000)
    assert api("GET", "/runs/huge-row")[0] == 200
    assert api("GET", "/runs?limit=1")[2][0]["run_id"] == "huge-row"


@pytest.mark.parametrize("seed", range(4))
def test_no_random_request_is_ever_a_5xx(lab, api, seed):
    import random
    chance = random.Random(seed)
    words = ["", "0", "-1", "1e309", "NaN", "'", '"', "%", "\x00", "a" * 300, "iris_sweep",
             "accuracy", "metrics.accuracy", "asc", "é", "[", "{}", "null", "true",
             "2026-11-01", "32c3d4", "metrics.accuracy > 0.5", "final", "min",
             lab.ids["svm_01"], "54e5f6", "..", "time", "9" * 40, "best", "params.learning_rate"]
    names = ["limit", "offset", "metric_name", "metric_min", "metric_max", "q", "sort", "order",
             "ids", "names", "x", "from", "to", "since", "max_points", "top_k", "status",
             "model_name",
             "from_timestamp", "note_substring", "colour", "by", "where"]
    paths = ["/runs", "/runs/leaderboard", "/runs/compare", "/curves", "/lab", "/runs/32c3d4",
             "/runs/32c3d4/metrics", "/metrics", "/experiments", "/runs/{}", "/runs/{}/metrics",
             "/runs/{}/artifacts/{}", "/static/{}", "/{}"]
    for _ in range(150):
        path = chance.choice(paths)
        while "{}" in path:
            path = path.replace("{}", urllib.parse.quote(chance.choice(words), safe=""), 1)
        query = urllib.parse.urlencode([(chance.choice(names), chance.choice(words))
                                        for _ in range(chance.randrange(5))])
        status, _, answer = api("GET", f"{path}?{query}")
        assert status < 500, (path, query, answer)
        assert status == 200 or status == 304 or is_one_sentence(answer["detail"]), (path, query)
