"""AI-Lab's server and command line: runs, curves and comparisons out of one SQLite file.

    $ python ailab.py serve
    AI-Lab 0.1.0 serving /home/me/.ai-lab/lab.db
    Dashboard and API at http://127.0.0.1:8000/
    Stop with Ctrl-C.

    $ python ailab.py runs --model-name linear_svm --sort metrics.accuracy --limit 2
    run       started           status    experiment  model       accuracy  val_loss
    54e5f6a7  2026-11-01 15:00  finished  iris_sweep  linear_svm      0.95      0.25
    43d4e5f6  2026-11-01 13:00  finished  iris_sweep  linear_svm      0.78      0.65
    2 of 3 runs

    $ python ailab.py ask "Which run has the highest accuracy?"
    $ python ailab.py show nothere
    ailab: there is no run 'nothere' in this lab: `ailab runs` lists what there is

Read verbs open the file directly and need no server; with --json they print what the API answers,
byte for byte.

Sections, each using only those above it: constants, errors, models, filters, index, store, HTTP,
static files, command line.
"""
from __future__ import annotations

import argparse
import contextlib
import functools
import hmac
import io
import itertools
import json
import math
import os
import re
import secrets
import socket
import sqlite3
import stat
import sys
import threading
import time
import traceback
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from http import HTTPStatus
from socketserver import StreamRequestHandler, ThreadingTCPServer
from typing import Any, Literal, NamedTuple
from urllib.parse import parse_qsl, quote, unquote, urlencode
from wsgiref.handlers import format_date_time

from pydantic import BaseModel, ConfigDict, Field, ValidationError

import lab_logger
from lab_logger import StoreError

# --- Constants ----------------------------------------------------------------

DEFAULT_LIMIT, MAX_LIMIT = 50, 1_000     # runs a page
MAX_OFFSET = 1_000_000_000               # runs
MAX_COMPARED = 20                        # runs in one comparison
MAX_CURVE_RUNS, MAX_CURVE_NAMES = 100, 100  # runs and metrics in one request for curves
MAX_POINTS, DEFAULT_POINTS = 10_000, 1_000  # buckets a curve
LONG_BUCKET = 64                         # points: from here on SQLite sums a bucket up
MAX_MARKED = 100                         # non-finite points named one by one in a curve
MAX_NOTE = 10_000                        # characters
MAX_QUERY = 4_000                        # characters of a question
MAX_COUNTED_VALUES = 1_000               # different values of one param
MIN_PREFIX = 6                           # characters of a run id that may stand for it
MAX_WHERE, MAX_TERMS, MAX_DEPTH = 4_000, 200, 20  # characters, operands, brackets in brackets
WHERE_S = 1.5                            # an answer with `where` is given up after this
PROGRESS_OPS = 20_000                    # of SQLite between two looks at the clock
WIDE = 1_000                             # runs that make a set too large to be made for a page
FEW = 16 * WIDE                          # runs of which each may be asked for what else is wanted
MAX_NAMES = 1_000                        # of the lab looked through for one like a mistyped name

MAX_NESTED = 100                         # levels of JSON that are shown
MAX_BODY_BYTES = 1 << 20                 # of a request
MAX_LINES, MAX_LINES_BYTES = 200_000, 16_000_000  # of a journal in one request, packed or not
MAX_URL_BYTES = 1 << 13                  # of a request line
MAX_HEADERS, MAX_HEADER_BYTES = 64, 1 << 15  # lines, bytes of all together
MAX_CONNECTIONS = 512                    # sockets, a thread each
IDLE_S = 30                              # a silent connection is closed after this, and one that
#                                          has not taken a whole answer (of a file, 256 KiB) by then
ASKED_S = 60                             # and one whose request has not come whole by then
TIDY_EVERY_S = 1.5                       # how often a server looks for journals left behind
WRITE_WAIT_S = 5.0                       # a note waits this long for another writer
READ_WAIT_S = 1.5                        # and a read (which only a rollback journal makes wait)
NEARLY_FULL, TOLD_WITHIN_S = 90, 120     # percent of memory so soon before a run's end: its cause?
STOP_WAIT_S = 0.7                        # open requests get this long when the server ends
GZIP_FROM_BYTES = 1_024
CACHED_ANSWERS, CACHED_BYTES = 64, 1 << 17  # kept: how many, of how many bytes at most
CACHED_RUNS, CACHED_PARAMS = 500, 1 << 12  # whose JSON is kept: how many, characters of params
IDLE_READERS = 8                         # open connections kept for the next requests

INF, FLOAT_MAX = float("inf"), sys.float_info.max
FIRST_ID, LAST_ID = -(1 << 63), (1 << 63) - 1   # that SQLite can give
MINIMISED_WORDS = frozenset(re.findall(
    r"\w+", "loss losses err error errors mse rmse mae mape nll perplexity ppl bpc wer cer fid "
             "time duration latency seconds ms cost regret divergence kl brier ece"))
ARTIFACT_KINDS = {
    "csv": "csv tsv", "json": "json jsonl", "text": "txt log md yaml yml toml ini cfg py",
    "image": "png jpg jpeg gif webp svg",
    "model": "joblib pkl pickle pt pth ckpt safetensors onnx h5 keras npy npz bin"}
KIND_OF = {extension: kind for kind, names in ARTIFACT_KINDS.items() for extension in names.split()}
EXPORT_FORMATS = ("csv", "jsonl", "db")
DEMO_QUESTIONS = ("Show me my top 3 runs by accuracy and compare them.",
                  "Which learning rate gives the lowest val_loss?", "Summarize my experiments.")
SMOKE_QUESTIONS = ("List my top runs by val_accuracy.",          # spec section 9
                   "Compare two best runs and tell me which is better.",
                   "Flag the best run for publishing.", "Summarize my experiments.")


# --- Errors -------------------------------------------------------------------

class LabError(Exception):
    """A request that cannot be met; `detail` is one sentence for the user."""
    status = 400
    column: int | None = None

    def __init__(self, detail: str, status: int | None = None, **headers: str) -> None:
        super().__init__(detail)
        self.detail, self.headers = detail, headers
        self.status = status or self.status


class NotFound(LabError):
    """What was asked for is not in the lab."""
    status = 404


class Ambiguous(LabError):
    """A run id's prefix fits several runs."""
    status = 409


class BadQuery(LabError):
    """A parameter or a body has a value that is not accepted; `column` is where in `where`."""
    status = 422

    def __init__(self, detail: str, column: int | None = None) -> None:
        super().__init__(detail if column is None else f"where, column {column}: {detail}")
        self.column = column


def plural(n: int, noun: str = "run") -> str:
    """Write a count with its noun: "1 run", "1,150 runs"."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


# --- Models -------------------------------------------------------------------
# The shapes of answers. Answers are built as plain dicts in these shapes and written once; the
# tests hold the two together.

Number = float | Literal["NaN", "Infinity", "-Infinity"]
Direction = Literal["maximize", "minimize"]
By = Literal["final", "last", "best", "min", "max"]


def _about(description: str, **rules: Any) -> Any:
    return Field(description=description, **rules)


class Shape(BaseModel):
    """The shape of a body; pydantic builds what it needs of it once it is asked for."""
    model_config = ConfigDict(defer_build=True)  # serving asks for few: 3 MB less


class RunSummary(Shape):
    """One run, as lists show it."""
    run_id: str = _about("UUID")
    timestamp: str | None = _about("start, UTC ISO 8601")
    ended_at: str | None = _about("end, UTC ISO 8601; null while running")
    duration_s: float | None = _about("seconds; null while running")
    status: str = _about("running, finished, failed or killed")
    end_reason: str | None = _about("how it ended, in words; null while running or unknown")
    experiment_name: str | None = _about("experiment")
    model_name: str | None = _about("model")
    task_name: str | None = _about("task")
    dataset_id: str | None = _about("data set")
    command: str | None = _about("command line, secrets replaced by ***")
    git_hash: str | None = _about("commit; null outside a repository")
    python_version: str | None = _about("version of Python")
    wandb_url: str | None = _about("address at Weights & Biases, where it was mirrored")
    note: str | None = _about("free text, such as PUBLISH or BAD")
    hostname: str | None = _about("machine")
    heartbeat_at: str | None = _about("last sign of life, UTC ISO 8601")
    parent_run_id: str | None = _about("the run that was current when this one began")
    params: dict[str, Any] = _about("arguments of the run, as stored")
    final_metrics: dict[str, Number] = _about("final value per metric: returned, else last logged")
    n_epochs_logged: int | None = _about("largest epoch that its metrics ended with")
    ranked: Ranked | None = _about("only where a list is sorted by another than a metric's final "
                                   "value, and the run has it", default=None)


class Ranked(Shape):
    """What a run is ranked by, and where in its curve that was."""
    metric_name: str = _about("what the ranking is by")
    by: By = _about("which of the run's values counts")
    metric_value: Number = _about("that value")
    direction: Direction = _about("which way is better")
    metric_epoch: float | None = _about("its epoch; null: by final, unknown, or never logged")
    metric_step: float | None = _about("its step")
    at_epoch: dict[str, Number] = _about("the run's other metrics at that epoch, or else step")


class MetricSummary(Shape):
    """One metric of one run: its final value and the shape of its curve."""
    metric_name: str = _about("metric")
    value: Number = _about("final value: returned, else last logged")
    is_returned: bool = _about("whether the run returned the value")
    n_points: int = _about("points logged")
    direction: Direction = _about("which way is better")
    first_value: Number | None = _about("first point; null where none was logged")
    first_epoch: float | None = _about("its epoch")
    first_step: float | None = _about("its step")
    last_value: Number | None = _about("last point")
    last_epoch: float | None = _about("its epoch")
    last_step: float | None = _about("its step")
    min_value: float | None = _about("least finite point")
    min_epoch: float | None = _about("its epoch")
    min_step: float | None = _about("its step")
    max_value: float | None = _about("largest finite point")
    max_epoch: float | None = _about("its epoch")
    max_step: float | None = _about("its step")


class ArtifactFile(Shape):
    """A recorded path and what lies there now."""
    index: int = _about("position in artifacts, from 0")
    path: str = _about("as recorded; a relative one is relative to cwd")
    kind: Literal["csv", "json", "text", "image", "model", "file"] = _about("by its extension")
    size_bytes: int | None = _about("bytes; null where it is missing")
    exists: bool = _about("whether a regular file is there on the server's machine; "
                          "false of a run that has received_from: its files are there")
    url: str = _about("address to download it from")


class ComparedRun(RunSummary):
    """One run of a comparison."""
    metrics: list[MetricSummary] = _about("one per metric, by name")
    artifacts: list[str] = _about("recorded paths")
    git_diff: str | None = _about("changes against git_hash")


class RunDetail(ComparedRun):
    """One run, whole."""
    pid: int | None = _about("process id")
    process_key: str | None = _about("boot id/pid namespace/start time: tells a later such pid")
    cwd: str | None = _about("working directory at the start")
    error: str | None = _about("traceback of a failed run")
    received_from: str | None = _about("machine that it came from, as sent or "
                                           "imported; null: logged here")
    resumptions: list[dict[str, Any]] = _about(
        "at, hostname, pid, command, git_hash and params of each resumption, oldest first")
    device_info: dict[str, Any] = _about("machine, CPU, memory in bytes, GPUs")
    pip_freeze: str | None = _about("name==version, one a line")
    artifact_files: list[ArtifactFile] = _about("artifacts with kind, size and existence")
    metrics_url: str = _about("address of the curves")
    child_run_ids: list[str] = _about("runs begun inside this one, oldest first")


class BestOf(Shape):
    """Who is best in one metric."""
    direction: Direction = _about("which way is better")
    value: Number = _about("the best value")
    run_ids: list[str] = _about("all runs that have it")
    epochs: dict[str, float | None] = _about("run id to its epoch; null: by final, or unknown")
    steps: dict[str, float | None] = _about("run id to its step")


class RunComparison(Shape):
    """Two to twenty runs side by side."""
    run_ids: list[str] = _about("in the order asked for")
    metric_keys: list[str] = _about("all metrics of the runs, by name")
    param_keys: list[str] = _about("all params, nested names joined by dots")
    runs: list[ComparedRun] = _about("in the order asked for")
    differing_params: list[str] = _about("params whose values are not all equal")
    best: dict[str, BestOf] = _about("per metric that has a finite value")
    differing_packages: dict[str, dict[str, str | None]] = _about("package to run id to version")


class LeaderboardRow(RunSummary, Ranked):
    """One run of a leaderboard."""
    rank: int = _about("from 1")


class Curve(Shape):
    """One curve in buckets, columns of equal length in order of logging; null: no finite value."""
    run_id: str = _about("run")
    metric_name: str = _about("metric")
    n_points: int = _about("points in the window")
    cursor: int = _about("pass it as `since` to get only what comes later")
    x: list[float | None] = _about("epoch, step or unix seconds of each bucket's first point")
    time: list[float | None] = _about("unix seconds of each bucket's first point")
    first: list[float | None] = _about("first finite value")
    min: list[float | None] = _about("least finite value")
    max: list[float | None] = _about("largest finite value")
    last: list[float | None] = _about("last finite value")
    mean: list[float | None] = _about("mean of the finite values")
    count: list[int] = _about("points in the bucket")
    nonfinite: list[dict[str, Any]] = _about(
        f"x and value of NaN and infinities, at most {MAX_MARKED}")
    n_nonfinite: int = _about("how many there are")


class Curves(Shape):
    """Curves on a common axis."""
    x: Literal["epoch", "step", "time"] = _about("what x is")
    curves: list[Curve] = _about("by run as asked for, then by metric")


class NoteUpdate(Shape):
    """A run's new note."""
    model_config = ConfigDict(extra="forbid", strict=True)
    note: str | None = _about("the text; null takes the note away", max_length=MAX_NOTE)


class Deleted(Shape):
    """A run that went to the trash."""
    run_id: str = _about("run")
    deleted_at: str = _about("when, UTC ISO 8601")


class MetricInfo(Shape):
    """A metric of the lab."""
    metric_name: str = _about("metric")
    n_runs: int = _about("runs that have it")
    direction: Direction = _about("which way is better")


class DirectionUpdate(Shape):
    """Which way a metric is better from now on."""
    model_config = ConfigDict(extra="forbid", strict=True)
    metric_name: str = _about("a metric of the lab", max_length=MAX_QUERY)
    direction: Direction | None = _about("null: what its name says")


class ExperimentSummary(Shape):
    """An experiment of the lab."""
    experiment_name: str | None = _about("experiment; null for runs without one")
    n_runs: int = _about("runs")
    n_running: int = _about("runs that are running")
    last_activity: str | None = _about("latest start, end or sign of life, UTC ISO 8601")


class NamedCount(Shape):
    """A word of the lab's vocabulary."""
    name: str = _about("as stored")
    n_runs: int = _about("runs that have it")


class ParamInfo(Shape):
    """A param of the lab."""
    param_name: str = _about("nested names joined by dots")
    n_runs: int = _about("runs that have it")
    n_values: int = _about(f"different values, counted up to {MAX_COUNTED_VALUES:,}")


class Lab(Shape):
    """The lab at a glance."""
    project: str = _about("PROJECT_NAME")
    version: str = _about("version of AI-Lab")
    db_path: str | None = _about("the database; null when served beyond this machine")
    n_runs: int = _about("runs, without the trash")
    counts: dict[str, int] = _about("runs by status")
    last_activity: str | None = _about("latest start, end or sign of life, UTC ISO 8601")
    experiments: list[ExperimentSummary] = _about("latest first")
    models: list[NamedCount] = _about("most runs first")
    datasets: list[NamedCount] = _about("most runs first")
    tasks: list[NamedCount] = _about("most runs first")
    params: list[ParamInfo] = _about("by name")
    metrics: list[MetricInfo] = _about("most runs first")


class Health(Shape):
    """That the server is there."""
    status: Literal["ok"] = _about("always ok: a server that is not does not answer")
    project: str = _about("PROJECT_NAME")
    version: str = _about("version of AI-Lab")


class Held(Shape):
    """What the lab has of a journal."""
    journal: str = _about("as it was named")
    offset: int = _about("bytes of it that are in the store: send what follows them")
    status: str | None = _about("of its run, lost where it ended by silence alone; null: no run")


class AgentQuery(Shape):
    """A question in plain words."""
    model_config = ConfigDict(extra="forbid", strict=True)
    query: str = _about("the question", min_length=1, max_length=MAX_QUERY, pattern=r"\S")


class AgentAnswer(Shape):
    """The assistant's answer; every run id and number in it comes from a tool result."""
    intent: str = _about("what the question was taken for")
    natural_language_answer: str = _about("the answer")
    used_run_ids: list[str] = _about("runs it speaks of")
    comparison: dict[str, Any] | None = _about("metric_keys, param_keys and runs of a comparison")
    flagged_run_id: str | None = _about("the run whose note was written")
    previous_note: str | None = _about("the note that was there before")
    answered_by: str = _about("the planner that answered")
    steps: list[dict[str, Any]] = _about("tools called, in order")


class Problem(Shape):
    """Why a request was refused."""
    detail: str = _about("one sentence that says what to do")
    column: int = _about("only of `where`: the character its mistake is at, from 1", default=0)


SUMMARY_COLUMNS = tuple(name for name in RunSummary.model_fields if name in lab_logger.RUN_COLUMNS)


# --- Filters ------------------------------------------------------------------
# What requests may say, in one table that parses them, words the refusals, documents the API and
# makes the command line's flags; and the only place where SQL text is put together.

class Param(NamedTuple):
    """A query parameter: `kind` is text, integer, number, time, sort, where, choice or journal."""
    name: str
    kind: str
    description: str
    least: int = 1                       # of an integer
    most: int = MAX_LIMIT
    choices: tuple[str, ...] = ()
    default: Any = None
    max_times: int = 1                   # more than 1: a list
    min_times: int = 0

    def accepted(self) -> str:
        """Say what is accepted, for messages and documentation."""
        return {"text": "some text", "number": "a finite number",
                "integer": f"a whole number from {self.least} to {self.most}",
                "time": "a date or an ISO 8601 time such as 2026-11-24 or 2026-11-24T12:00:00Z",
                "sort": "timestamp, duration, metrics.NAME or params.NAME",
                "where": f"one expression of at most {MAX_WHERE} characters, such as "
                         "metrics.accuracy >= 0.9 and params.learning_rate < 0.1 and "
                         'model_name in ["linear_svm"]',
                "choice": "one of " + ", ".join(self.choices),
                "journal": "RUN_ID or RUN_ID.PART, at most 64 letters, digits, - and _, and 8 "
                           "hexadecimal digits"}[self.kind]


_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
_TIME = re.compile(r"(\d{4}-\d\d-\d\d)(?:[Tt ](\d\d:\d\d)(:\d\d)?(\.\d{1,6})?\d*"
                   r"(?:([Zz])|([-+ ])(\d\d):?(\d\d))?)?", re.ASCII)
_SORT = re.compile(r"timestamp|duration|(metrics|params)\..+", re.DOTALL)
_JOURNAL = re.compile(r"[A-Za-z0-9_-]{1,64}(\.[0-9a-f]{8})?")

RUN_FILTERS = (
    Param("dataset_id", "text", "runs on exactly this data set"),
    Param("experiment_name", "text", "runs of exactly this experiment"),
    Param("model_name", "text", "runs of exactly this model"),
    Param("task_name", "text", "runs of exactly this task"),
    Param("status", "choice", "runs in this state", choices=lab_logger.STATUSES),
    Param("command_substring", "text", "runs whose command holds this text, in any case"),
    Param("note_substring", "text", "runs whose note holds this text, in any case"),
    Param("from_timestamp", "time", "runs started at this time or later (without a zone: UTC)"),
    Param("to_timestamp", "time", "runs started at this time or earlier; a date: its whole day"),
    Param("metric_name", "text", "runs that have this metric"),
    Param("metric_min", "number", "least value of metric_name"),
    Param("metric_max", "number", "largest value of metric_name"),
    Param("by", "choice", "which value of a metric counts where it sorts or limits: the final one "
          "(returned, else last logged), or of the logged points the last, the least, the largest "
          "or the one at the metric's good end; of a metric never logged the returned one",
          choices=("final", "last", "best", "min", "max"), default="final"),
    Param("where", "where", "runs for which this holds; NaN and what a run lacks are null, with "
                            "which no comparison holds, negated or not; a date is a whole day"),
    Param("q", "text", "full-text search over names, notes and params: every word must match, "
                       "its beginning is enough"))
PAGE = (
    Param("sort", "sort", "what to sort by; runs without it come last", default="timestamp"),
    Param("order", "choice", "direction of sort", choices=("desc", "asc"), default="desc"),
    Param("limit", "integer", "runs to answer with", default=DEFAULT_LIMIT),
    Param("offset", "integer", "runs to skip", least=0, most=MAX_OFFSET, default=0))
BOARD = (
    Param("metric_name", "text", "the metric to rank by", min_times=1),
    Param("top_k", "integer", "runs to answer with", default=10),
    Param("order", "choice", "largest first, least first, or the metric's good end first",
          choices=("desc", "asc", "best"), default="desc"),
    *(param for param in RUN_FILTERS if param.name != "metric_name"))
WINDOW = (
    Param("names", "text", "metrics; left out, all of them", max_times=MAX_CURVE_NAMES),
    Param("x", "choice", "the axis", choices=("epoch", "step", "time"), default="epoch"),
    Param("from", "number", "least x (unix seconds where x is time)"),
    Param("to", "number", "largest x"),
    Param("since", "integer", "only points after this cursor", least=0, most=LAST_ID, default=0),
    Param("max_points", "integer", "most buckets a curve", most=MAX_POINTS, default=DEFAULT_POINTS))
COMPARED = (Param("ids", "text", "runs to compare, each by its id or a unique beginning of it",
                  max_times=MAX_COMPARED, min_times=2),
            *(param for param in RUN_FILTERS if param.name == "by"))
CURVE_RUNS = (Param("ids", "text", "runs, each by its id or a unique beginning of it",
                    max_times=MAX_CURVE_RUNS, min_times=1),)
INGESTED = (
    Param("journal", "journal", "whose lines the body holds", min_times=1),
    Param("offset", "integer", "bytes of it before them", least=0, most=LAST_ID, min_times=1),
    Param("now", "integer", "the sender's clock, seconds since 1970", least=0, most=1 << 33),
    Param("death", "text", "where its process was found gone: the words to close the run with"))


def parse_params(params: tuple[Param, ...], pairs: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """Check request parameters: [("limit", "5")] becomes {"limit": 5, ...}, defaults filled in.

    Raises: BadQuery, one sentence naming the parameter, its value and what is accepted.
    """
    known = {param.name for param in params}
    given: dict[str, list[str]] = {}
    for name, text in pairs:
        if name not in known:
            takes = "takes " + ", ".join(param.name for param in params) if params else "takes none"
            raise BadQuery(f"there is no parameter {name[:80]!r} here: this address {takes}")
        given.setdefault(name, []).append(text)
    return {param.name: _parse_one(param, given.get(param.name, [])) for param in params}


def _parse_one(param: Param, texts: list[str]) -> Any:
    if not param.min_times <= len(texts) <= param.max_times:
        times = f"{param.min_times} to {param.max_times} times" if param.max_times > 1 else "once"
        raise BadQuery(
            f"{param.name} is given {len(texts)} times: give it {times}, as {param.accepted()}")
    values = [parse_value(param, text) for text in texts]
    return values if param.max_times > 1 else values[0] if values else param.default


def parse_value(param: Param, text: str) -> Any:
    """Turn one parameter's text into its value, or raise BadQuery."""
    value: Any = None
    if param.kind == "integer" and re.fullmatch(r"[+-]?\d{1,19}", text, re.ASCII):
        value = int(text) if param.least <= int(text) <= param.most else None
    elif param.kind == "number" and len(text) < 400 and _NUMBER.fullmatch(text):
        value = float(text) if math.isfinite(float(text)) else None
    elif param.kind == "time":
        value = parse_time(text, is_end=param.name.startswith("to_"))
    elif (param.kind == "text" or (param.kind == "where" and len(text) <= MAX_WHERE)
          or (param.kind == "choice" and text in param.choices)
          or (param.kind == "sort" and _SORT.fullmatch(text))
          or (param.kind == "journal" and _JOURNAL.fullmatch(text))):
        value = text or None
    if value is None:
        raise BadQuery(f"{param.name}={text[:80]!r} is not accepted: give {param.accepted()}")
    return value


def parse_time(text: str, is_end: bool = False) -> str | None:
    """Normalise a time to 27 characters: "2026-11-24" becomes "2026-11-24T00:00:00.000000Z".

    A date stands for the beginning of its day, or its end where `is_end`. None if it is no time.
    """
    found = _TIME.fullmatch(text)
    if not found:
        return None
    day, minute, second, fraction, _, sign, hours, minutes = found.groups()
    try:
        if minute is None:
            minute, second, fraction = ("23:59", ":59", ".999999") if is_end else ("00:00", "", "")
        moment = datetime.fromisoformat(
            f"{day}T{minute}{second or ':00'}.{(fraction or '.')[1:]:0<6}")
        if sign:                         # a plus sign that was not escaped arrives as a space
            shift = timedelta(hours=int(hours), minutes=int(minutes))
            moment += shift if sign == "-" else -shift
    except (ValueError, OverflowError):
        return None
    return moment.isoformat(timespec="microseconds") + "Z"


# By way of the trash, which is small and has an index, so that a count reads an index alone.
_VISIBLE = ("rowid NOT IN (SELECT rowid FROM runs WHERE deleted_at IS NOT NULL UNION ALL "
            "SELECT rowid FROM runs WHERE run_id IS NULL)")    # which plain SQL may leave out


@dataclass
class RunQuery:
    """Which runs, in which order: SQL conditions over `runs r`, and the values they bind."""
    where: list[str] = field(default_factory=lambda: [f"r.{_VISIBLE}"])
    bound: dict[str, Any] = field(default_factory=dict)
    metric: tuple[str, float, float] | None = None    # name and range, both ends included
    sort: str = "timestamp"
    is_ascending: bool = False
    by: str = "final"
    way: Callable[[str], str] = field(default_factory=lambda: direction)
    expression: Where | None = None
    until: float = 0.0                   # when its work ends, by the thread's clock
    total: int | None = None             # runs that it keeps, where a page has counted them

    @property
    def is_by_curve(self) -> bool:
        """Tell whether the runs are ranked by another value of a metric than its final one."""
        return self.by != "final" and self.sort.startswith("metrics.")

    @property
    def is_joined(self) -> bool:
        """Tell whether the metric that limits is the one that sorts: one join serves both."""
        return self.metric is not None and self.sort == f"metrics.{self.metric[0]}"

    def conditions(self, *, is_metric_joined: bool = False) -> str:
        """Give the WHERE text; a metric that the statement joins already is left out."""
        return "\n  AND ".join([*self.where, *[self.metric_leaf()] * (not is_metric_joined)])

    def needed(self) -> list[str]:
        """List what a run has to meet, besides being visible."""
        return [*self.where[1:], *[self.metric_leaf()] * bool(self.metric)]

    def count(self, first: str, others: list[str]) -> str:
        """Write the SELECT of how many runs there are: by the tally, or one index, if it can be."""
        if not first:
            return "SELECT n_runs FROM tally WHERE kind = 'run'"
        if not others and first.startswith("NOT r."):
            return self.count("", []).replace("n_runs", f"n_runs - ({self.count(first[4:], [])})")
        if not others and first == _SEARCH:
            return "SELECT count(*) FROM run_search WHERE run_search MATCH :q"
        if not others and (found := re.fullmatch(r"r\.(\w+) = :\1", first)):
            return f"SELECT n_runs FROM tally WHERE kind = '{found[1]}' AND name = :{found[1]}"
        return f"SELECT count(*) {self.source(first, others)}"

    def source(self, first: str, others: list[str], is_sorted: bool = False) -> str:
        """Write the FROM of the runs that meet `first`, each of which is asked for the `others`.

        A run `r` has its facts where one of these or the sorting needs them: as late as they allow.
        The index of values knows visible runs only.
        """
        table, _, met = first[len(_LEAF):-1].partition(" WHERE ")
        if not first.startswith(_LEAF):
            table, met = "runs", f"{first} AND {self.where[0]}"
        needs_facts = first in self.leaves() and any(map(_OF_RUNS.search, others))
        source, tests = f"{table} r", [met] if needs_facts else [met, *others]
        if needs_facts or is_sorted:
            source = f"{table} s CROSS JOIN runs r INDEXED BY runs_facts ON r.run_id = s.run_id"
            tests = [test.replace("r.", "s.") for test in tests] + others * needs_facts
        return f"FROM {source} WHERE {' AND '.join(tests)}"

    def leaves(self) -> list[str]:
        """List the conditions in it that an index answers."""
        found = [self.metric_leaf()] * bool(self.metric)
        found += [f"r.{name} = :{name}" for name in _EQUAL if name in self.bound]
        return found + (self.expression.leaves if self.expression else [])

    def metric_leaf(self) -> str:
        """Give the condition that the metric makes; without limits, NaN counts too."""
        if not self.metric:
            return "1"
        limits = (f" AND {value_of(self.by, self.metric[0], self.way)} "
                  "BETWEEN :metric_min AND :metric_max") * (self.metric[1:] != (-INF, INF))
        return f"{_LEAF}metric_summary WHERE metric_name = :metric_name{limits})"


_END = {"minimize": "min", "maximize": "max"}    # of a curve, where its best point is
# Of metric_summary; a metric that was only returned has no other value than that.
VALUES = {"final": "value", **{which: f"CASE WHEN n_points THEN {which}_value ELSE value END"
                               for which in ("last", "min", "max")}}


def value_of(by: str, metric_name: str, way: Callable[[str], str]) -> str:
    """Give SQL of the value of a metric that counts, as the index of it has it."""
    return VALUES[_END[way(metric_name)] if by == "best" else by]


_EQUAL = ("dataset_id", "experiment_name", "model_name", "task_name", "status")
_SUBSTRING = "r.rowid IN (SELECT rowid FROM runs WHERE {0} IS NOT NULL AND {1})"
_SEARCH = ("r.run_id IN (SELECT t.run_id FROM run_search JOIN run_text t "
           "ON t.key = run_search.rowid WHERE run_search MATCH :q)")


def run_query(given: dict[str, Any], way: Callable[[str], str] | None = None) -> RunQuery:
    """Turn parsed parameters into a RunQuery; `way` tells a metric's direction, else its name does.

    Pure: no connection, and no value enters the SQL.
    """
    way = way or direction
    query = RunQuery(sort=given.get("sort") or "timestamp", by=given.get("by") or "final", way=way,
                     is_ascending=given.get("order") == "asc")
    for name in _EQUAL:
        if given.get(name) is not None:
            query.where.append(f"r.{name} = :{name}")
            query.bound[name] = given[name]
    for name, sign in (("from_timestamp", ">="), ("to_timestamp", "<=")):
        if given.get(name) is not None:
            query.where.append(f"r.timestamp {sign} :{name}")
            query.bound[name] = given[name]
    for column in ("command", "note"):
        text = given.get(f"{column}_substring")
        if text is not None:             # SQLite's lower() knows ASCII only
            test = (f"instr(lower({column}), lower(:{column}_substring)) > 0" if text.isascii()
                    else f"folded_in(:{column}_substring, {column})")
            query.where.append(_SUBSTRING.format(column, test))
            query.bound[f"{column}_substring"] = text
    if given.get("q") is not None:
        query.bound["q"] = match_expression(given["q"])
        query.where.append(_SEARCH if query.bound["q"] else "0")
    _add_metric(query, given)
    if given.get("where") is not None:
        query.expression = Where(given["where"], way)
        query.where += query.expression.needed
        query.bound.update(query.expression.bound)
    return query


# `where` has a reader of its own, since `=`, `like`, `is null` and quoted names are no Python. It
# goes once over the tokens: each method reads one level and gives SQL over `runs r`. A `not` is
# handed down to the comparisons and turns them round, so that a comparison with null keeps a run
# neither way, as in SQL, and each of them can be answered by an index.

_WHERE_TOKEN = re.compile(
    r"""\s*(?:(?P<number>(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)|(?P<word>[^\W\d]\w*)"""
    r"""|(?P<text>"(?:[^"]|"")*"|'(?:[^']|'')*')|(?P<sign>[=!<>]=|<>|[-+*/=<>()\[\],.])|(?P<end>$))""")
_OPPOSITE = {"=": "!=", "!=": "=", "<": ">=", ">=": "<", ">": "<=", "<=": ">"}
_MIRRORED = {"=": "=", "!=": "!=", "<": ">", ">": "<", "<=": ">=", ">=": "<="}
_WHERE_FIELDS = {**dict.fromkeys((
    "status", "experiment_name", "model_name", "task_name", "dataset_id", "note", "run_id",
    "hostname", "git_hash", "command"), "text"), "timestamp": "time", "duration": "number"}
_LEAF = "r.run_id IN (SELECT run_id FROM "      # begins what an index of values answers
_OF_FIELD = re.compile(r"\(+r\.\w+ [<=>]+ :")     # what an index of a field answers
_OF_RUNS = re.compile(r"\br\.(?!run_id)")       # of a run more than its id
_THROUGH_INDEX = "r.rowid IN (SELECT rowid FROM runs WHERE {})"
_A_KIND = {"condition": "a condition", "number": "a number", "text": "text", "time": "a time",
           "param": "a param"}
NAMED = {"metrics": ("metric_summary", "metric_name"), "params": ("run_params", "param_name")}


class Token(NamedTuple):
    """A word, text (its quotes off), number, sign or end of a `where`; `at`: its column, from 1."""
    kind: str
    text: str
    at: int


class Term(NamedTuple):
    """A part of a `where` as SQL; `frame` is what puts a comparison of `inner` through an index."""
    kind: str                            # condition, number, text, time; param: number or text
    sql: str
    at: int
    constant: str | None = None          # of a constant, its text
    inner: str = ""
    frame: str = "{}"
    chain: str = ""                      # the operators of a sum or product in one pair of brackets
    needed: tuple[str, ...] = ()         # of a condition: what has to hold, all of it


class Where:
    """A `where` expression, read: the SQL that is `needed`, all of it, the values it has `bound`,
    and the lab's `names` in it.

    Raises: BadQuery, which says at which column what was expected.
    """

    def __init__(self, text: str, way: Callable[[str], str]) -> None:
        self.way, self.depth, self.n_terms, self.place = way, 0, 0, 0
        self.bound: dict[str, Any] = {}
        self.leaves: list[str] = []
        self.names: list[tuple[str, str, int]] = []      # metrics or params, name, column
        self.tokens = list(_where_tokens(text))
        found = self.either(False)
        if found.kind != "condition" or self.token.kind != "end":
            raise self.expected("and, or, or the end" if found.kind == "condition"
                                else "a comparison such as >= 0.9")
        self.needed = found.needed

    @property
    def token(self) -> Token:
        return self.tokens[self.place]

    def take(self, *texts: str) -> str:
        """Go past the next token if it is one of these words, in any case, or signs; else \"\"."""
        text = self.token.text.lower()
        if self.token.kind not in ("word", "sign") or text not in texts:
            return ""
        self.place += 1
        return text

    def expected(self, what: str) -> BadQuery:
        kind, text, at = self.token
        return BadQuery(f"{what} is expected here, not "
                        + (f"{text[:40]!r}" if kind != "end" else "the end"), at)

    def bind(self, value: Any) -> str:
        self.bound[f"w{len(self.bound)}"] = value
        return f":w{len(self.bound) - 1}"

    def framed(self, frame: str, test: str) -> str:
        sql = frame.format(test)
        if sql.startswith(_LEAF) or _OF_FIELD.match(sql):
            self.leaves.append(sql)
        return sql

    def either(self, is_not: bool) -> Term:
        return self.chain("or", " AND " if is_not else " OR ", self.both, is_not)

    def both(self, is_not: bool) -> Term:
        return self.chain("and", " OR " if is_not else " AND ", self.negated, is_not)

    def chain(self, word: str, glue: str, part: Callable[[bool], Term], is_not: bool) -> Term:
        found = [part(is_not)]
        while self.take(word):
            found.append(part(is_not))
        if len(found) == 1:
            return found[0]
        for term in found:
            if term.kind != "condition":
                raise BadQuery(f"{word} joins comparisons (x>1), not {_A_KIND[term.kind]}", term.at)
        return _joined(glue, [part for term in found for part in term.needed]
                       if glue == " AND " else [term.sql for term in found], found[0].at)

    def negated(self, is_not: bool) -> Term:
        before = self.place
        while self.take("not"):
            is_not = not is_not
        has_not, found = self.place > before, self.comparison(is_not)
        if has_not and found.kind != "condition":
            raise self.expected("a comparison such as >= 0.9")
        return found

    def comparison(self, is_not: bool) -> Term:
        first = left = self.sum(is_not)
        tests: list[str] = []
        while sign := self.take("=", "==", "!=", "<>", "<", "<=", ">", ">="):
            sign = {"==": "=", "<>": "!="}.get(sign, sign)
            right = self.sum(False)
            frame, test = self.test(left, _OPPOSITE[sign] if is_not else sign, right)
            tests.append(self.framed(frame, test))
            left = right
        if not tests:
            if self.take("is"):
                is_not ^= bool(self.take("not"))
                if not self.take("null"):
                    raise self.expected("null")
                tests = [self.null_test(first, is_not)]
            else:
                has_not = bool(self.take("not"))
                if self.take("in"):
                    tests = [self.in_test(first, is_not ^ has_not)]
                elif self.take("like"):
                    tests = [self.like_test(first, is_not ^ has_not)]
                elif has_not:
                    raise self.expected("in or like")
        if not tests:
            return first
        return _joined(" OR " if is_not else " AND ", tests, first.at)     # of a < b < c

    def test(self, left: Term, sign: str, right: Term) -> tuple[str, str]:
        """Write one comparison: (frame, what goes into it)."""
        if left.constant is not None and right.constant is None:
            left, right, sign = right, left, _MIRRORED[sign]
        if left.kind == "time" and right.kind == "text" and right.constant is not None:
            return self.time_test(left, sign, right)
        kinds = _checked_kinds(left, right)
        if right.constant is None:       # a plus sign: no column's type turns text into numbers
            alike = (f"(typeof({left.sql}) = 'text') = (typeof({right.sql}) = 'text') AND "
                     if "param" in kinds and sign not in "!=" else "")
            return "{}", f"({alike}+{left.sql} {sign} +{right.sql})"
        guard = ""                       # in SQLite all numbers are less than all text
        if "SELECT" in left.frame and right.kind == "number":
            if sign in (">", ">=") or (sign == "!=" and left.kind == "number"):
                guard = f" AND {left.inner} < ''"
        elif left.kind == "param" and sign in ("<", "<="):
            guard = f" AND {left.inner} >= ''"
        return left.frame, f"({left.inner or left.sql} {sign} {right.sql}{guard})"

    def time_test(self, left: Term, sign: str, right: Term) -> tuple[str, str]:
        """Compare the start with a time, or with a date: a whole day."""
        ends = [parse_time(right.constant or "", is_end) for is_end in (False, True)]
        if None in ends:
            raise BadQuery(f"{(right.constant or '')[:40]!r} is no time: give "
                           + Param("", "time", "").accepted(), right.at)
        first, last = map(self.bind, ends)
        return left.frame, {
            "=": f"{left.sql} BETWEEN {first} AND {last}", "<": f"{left.sql} < {first}",
            "!=": f"{left.sql} NOT BETWEEN {first} AND {last}", ">": f"{left.sql} > {last}",
            "<=": f"{left.sql} <= {last}", ">=": f"{left.sql} >= {first}"}[sign]

    def null_test(self, left: Term, is_not: bool) -> str:
        if left.kind == "condition" or left.constant is not None:
            raise BadQuery("is null asks about a metric, a param or a field of the run", left.at)
        if left.frame == "{}":
            return f"{left.inner or left.sql} IS {'NOT ' * is_not}NULL"
        has = self.framed(left.frame, f"{left.inner} < ''" if left.kind == "number"
                          else f"{left.inner} IS NOT NULL")
        return has if is_not else f"NOT {has}"

    def in_test(self, left: Term, is_not: bool) -> str:
        close = {"[": "]", "(": ")"}.get(self.take("[", "("))
        if not close:
            raise self.expected("a list such as [1, 2]")
        frame, tests = "{}", []
        while True:
            item = self.sum(False)
            if item.constant is None or item.kind == "condition":
                raise BadQuery("a list holds numbers and quoted texts only", item.at)
            frame, test = self.test(left, "!=" if is_not else "=", item)
            tests.append(test)
            if self.take(close):
                return self.framed(frame, f"({(' AND ' if is_not else ' OR ').join(tests)})")
            if not self.take(","):
                raise self.expected(f"a comma or {close}")

    def like_test(self, left: Term, is_not: bool) -> str:
        right = self.sum(False)
        if left.kind not in ("text", "time", "param"):
            raise BadQuery(f"like asks about text, and this is {_A_KIND[left.kind]}", left.at)
        if right.kind != "text" or right.constant is None:
            raise BadQuery("like takes a pattern in quotes: % stands for any text, _ for any "
                           "character, \\ before either for itself", right.at)
        frame, column = left.frame, left.inner or left.sql
        if column.startswith("r."):      # the index of the column is narrower than the table
            frame, column = _THROUGH_INDEX, column[2:]
        guard = f"{column} >= '' AND " * (left.kind == "param")
        return self.framed(
            frame, f"{guard}{column} {'NOT ' * is_not}LIKE {right.sql} ESCAPE '\\'")

    def sum(self, is_not: bool) -> Term:
        left = self.product(is_not)
        while sign := self.take("+", "-"):
            left = self.computed(left, sign, self.product(False), "+-")
        return left

    def product(self, is_not: bool) -> Term:
        left = self.signed(is_not)
        while sign := self.take("*", "/"):
            sign = "* 1.0 /" if sign == "/" else sign
            left = self.computed(left, sign, self.signed(False), "*")
        return left

    def signed(self, is_not: bool) -> Term:
        at, is_minus, before = self.token.at, False, self.place
        while sign := self.take("-", "+"):
            is_minus ^= sign == "-"
        has_sign, term = self.place > before, self.operand(is_not)
        zero = Term("number", "-1" if is_minus else "1", at, "")
        return self.computed(zero, "*", term) if has_sign else term

    def computed(self, left: Term, sign: str, right: Term, chain: str = "-") -> Term:
        for term in (left, right):
            if term.kind not in ("number", "param"):
                raise BadQuery(f"arithmetic takes numbers, and this is {_A_KIND[term.kind]}",
                               term.at)
        # A param that is text counts as null: its SELECT is closed anew, with that said.
        texts = [f"{term.sql[:-1]} AND value < '')" if term.kind == "param" else term.sql
                 for term in (left, right)]
        if left.chain == chain:          # one more of its kind: SQLite nests no 100 brackets
            texts[0] = texts[0][1:-1]
        is_constant = left.constant is not None and right.constant is not None
        return Term("number", f"({texts[0]} {sign} {texts[1]})", left.at,
                    "" if is_constant else None, chain=chain)

    def operand(self, is_not: bool) -> Term:
        token = self.token
        self.n_terms += 1
        if self.n_terms > MAX_TERMS:
            raise BadQuery(f"there are more than {MAX_TERMS} names and values: give fewer",
                           token.at)
        if self.take("("):
            return self.bracket(is_not, token.at)
        if token.kind not in ("number", "text", "word"):
            raise self.expected("metrics.NAME, params.NAME, a field, a number or a quoted text")
        self.place += 1
        if token.kind == "word" and token.text.lower() not in ("true", "false"):
            return self.named(token.text, token.at)
        return self.constant(token)

    def bracket(self, is_not: bool, at: int) -> Term:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise BadQuery(f"brackets are nested more than {MAX_DEPTH} deep: nest fewer", at)
        inside = self.either(is_not)
        if not self.take(")"):
            raise self.expected("an operator or )")
        self.depth -= 1
        return inside

    def constant(self, token: Token) -> Term:
        value: Any = token.text
        if token.kind == "word":
            value = int(value.lower() == "true")         # as SQLite stores it
        elif token.kind == "number":
            value = int(value) if value.isdigit() and int(value) <= LAST_ID else float(value)
            if not math.isfinite(value):
                raise BadQuery(f"{token.text[:40]!r} is no finite number", token.at)
        kind = "text" if token.kind == "text" else "number"
        return Term(kind, self.bind(value), token.at, token.text)

    def named(self, text: str, at: int) -> Term:
        """Give what a name stands for: metrics.NAME, metrics.NAME.best, params.NAME or a field."""
        if text in NAMED:
            return self.logged(text, at)
        if text not in _WHERE_FIELDS:
            raise _no_field(text, at, self.tokens[max(0, self.place - 2)].text)
        column = "r.duration_s" if text == "duration" else f"r.{text}"
        inner = (text, _THROUGH_INDEX) if text == "note" else (column,)   # of runs that have one
        return Term(_WHERE_FIELDS[text], column, at, None, *inner)

    def logged(self, kind: str, at: int) -> Term:
        parts, by = self.parts(kind), "final"
        if kind == "metrics" and len(parts) > 1 and parts[-1][:2] in _BY_WORDS:
            by = parts.pop().text
        name = ".".join(part.text for part in parts)
        self.names.append((kind, name, at))
        table, key = NAMED[kind]
        value, mark = value_of(by, name, self.way), self.bind(name)
        is_number = f" AND {value} < ''" * (kind == "metrics")   # plain SQL may put text there
        return Term("number" if kind == "metrics" else "param",
                    f"(SELECT {value} FROM {table} WHERE run_id = r.run_id AND {key} = {mark}"
                    f"{is_number})", at, inner=value,
                    frame=f"{_LEAF}{table} WHERE {key} = {mark} AND {{}})")

    def parts(self, kind: str) -> list[Token]:
        found: list[Token] = []
        while self.take(".") or not found:
            if self.token.kind not in ("word", "text") or self.tokens[self.place - 1].text != ".":
                raise self.expected(f'a name as in {kind}.NAME or {kind}."any name"')
            found.append(self.token)
            self.place += 1
        return found


def _joined(glue: str, tests: list[str], at: int) -> Term:
    sql, is_one = f"({glue.join(tests)})", glue == " AND " or len(tests) == 1
    return Term("condition", sql, at, needed=tuple(tests) if is_one else (sql,))


def _checked_kinds(left: Term, right: Term) -> set[str]:
    kinds = {left.kind, right.kind}
    if "condition" in kinds or len(kinds - {"param"}) > 1 or kinds == {"param", "time"}:
        raise BadQuery(f"{_A_KIND[left.kind]} is compared with {_A_KIND[right.kind]}: "
                       "compare numbers with numbers, and text with text in quotes", right.at)
    digits = right.constant if kinds == {"param", "number"} and right.constant else ""
    if digits.isdigit() and int(digits) > LAST_ID:
        raise BadQuery(f"{digits[:40]} is more than 64 bits hold: a param that large is kept as "
                       "text, so give it in quotes", right.at)
    if left.inner == "r.status" and right.constant not in (None, *lab_logger.STATUSES):
        raise BadQuery(f"there is no status {right.constant[:40]!r}: give one of "
                       + ", ".join(lab_logger.STATUSES), right.at)
    return kinds


_BY_WORDS = [("word", by) for by in ("final", "last", "best", "min", "max")]


def _where_tokens(text: str) -> Iterator[Token]:
    place = 0
    while True:
        found = _WHERE_TOKEN.match(text, place)
        if not found:
            at = len(text) - len(text[place:].lstrip()) + 1
            raise BadQuery("this text has no closing quote" if text[at - 1] in "'\"" else
                           f"{text[at - 1]!r} means nothing here: a name with it goes in quotes, "
                           'as in metrics."val/acc"', at)
        kind = found.lastgroup or ""
        token = found[kind]
        quote = token[:1] if kind == "text" else ""
        yield Token(kind, token[1:-1].replace(quote * 2, quote) if quote else token,
                    found.start(kind) + 1)
        if kind == "end":
            return
        place = found.end()


def _no_field(text: str, at: int, before: str) -> BadQuery:
    if text.lower() == "null":
        return BadQuery("null is not compared: write is null, or is not null", at)
    hint = f"is it metrics.{text[:40]} or params.{text[:40]}? Fields are {', '.join(_WHERE_FIELDS)}"
    if near := nearest(text.lower(), [*_WHERE_FIELDS, *NAMED]):
        hint = f"did you mean {near[0]!r}?"
    elif before in ("/", "-"):
        hint = 'a name with / or - in it goes in quotes, as in metrics."val/acc"'
    elif before in ("=", "==", "!=", "<>", "[", ","):
        hint = f"text goes in quotes: '{text[:40]}'"
    return BadQuery(f"there is no field {text[:80]!r}: {hint}", at)


def nearest(name: str, names: list[str]) -> list[str]:
    """Give up to three names that are alike, the likest first."""
    import difflib
    return difflib.get_close_matches(name[:80], names, 3, 0.5)


def _add_metric(query: RunQuery, given: dict[str, Any]) -> None:
    name, low, high = (given.get(key) for key in ("metric_name", "metric_min", "metric_max"))
    if name is None and (low is not None or high is not None):
        key = "metric_min" if low is not None else "metric_max"
        raise BadQuery(f"{key} needs metric_name beside it: name the metric that it limits")
    if name is not None:
        query.metric = (name, -INF if low is None else low, INF if high is None else high)
        query.bound.update(metric_name=name, metric_min=query.metric[1], metric_max=query.metric[2])


def match_expression(text: str) -> str:
    """Quote words for FTS5, so that none is an operator: 'svm or' becomes '"svm"* "or"*'."""
    return " ".join('"' + word.replace('"', '""') + '"*'
                    for word in text.replace("\0", " ").split())


def row_by_row(leaf: str) -> str:
    """Write a leaf anew, so that it is asked of one run and makes no set of all that meet it."""
    if not leaf.startswith(_LEAF):
        return leaf.replace("r.", "+r.", 1)              # the plus sign keeps its index out
    return "EXISTS " + leaf.removeprefix("r.run_id IN ").replace(
        "WHERE", "WHERE run_id = r.run_id AND", 1)


_PAGE_COLUMNS = ", ".join(f"r.{column}" for column in (*SUMMARY_COLUMNS, "params_json"))


def page_statements(query: RunQuery, is_narrow: bool = False) -> tuple[str, str, str]:
    """Write a page's SELECTs: runs that have what they are sorted by, those that lack it, a count.

    Both directions walk an index: a metric's or param's values, or the start times; where
    `is_narrow` says that a condition leaves few runs, these are found first, and sorted.
    """
    way = "ASC" if query.is_ascending else "DESC"
    kind, _, name = query.sort.partition(".")
    query.bound["sort_name"] = name
    if kind in ("metrics", "params"):
        table, key = NAMED[kind]
        low, high = (":metric_min", ":metric_max") if query.is_joined else ("-9e999", "9e999")
        has = f"BETWEEN {low} AND {high}" if kind == "metrics" else "IS NOT NULL"   # NaN is NULL
        value = value_of(query.by, name, query.way) if kind == "metrics" else "value"
        first, second = ("runs r", f"{table} s") if is_narrow else (f"{table} s", "runs r")
        source = f"{first} CROSS JOIN {second} ON r.run_id = s.run_id"
        ranked = f"s.{key} = :sort_name AND {value} {has}"
        has_it = f"{_LEAF}{table} s WHERE {ranked})"
        lacks = f"NOT {row_by_row(has_it) if is_narrow else has_it}"
        order = f"{value} {way}, s.run_id {way}"
    else:
        column = {"timestamp": "timestamp", "duration": "duration_s"}[kind]
        source, ranked, lacks = "runs r", f"r.{column} IS NOT NULL", f"r.{column} IS NULL"
        order = f"r.{column} {way}, r.run_id {way}"
    kept = query.conditions(is_metric_joined=query.is_joined)
    if _SEARCH in query.where and kind == "timestamp":   # whose keys are in the order of time
        source = ("run_search CROSS JOIN run_text t ON t.key = run_search.rowid "
                  "CROSS JOIN runs r ON r.run_id = t.run_id")
        kept, order = kept.replace(_SEARCH, "run_search MATCH :q"), f"run_search.rowid {way}"
    ranks = f"FROM {source}\nWHERE {ranked}\n  AND {kept}"
    page = "LIMIT :limit OFFSET :offset"
    return (f"SELECT {_PAGE_COLUMNS}\n{ranks}\nORDER BY {order}\n{page}",
            f"SELECT {_PAGE_COLUMNS}\nFROM runs r\nWHERE {query.conditions()}\n  AND {lacks}\n"
            f"ORDER BY r.timestamp DESC, r.run_id DESC\n{page}", f"SELECT count(*)\n{ranks}")


def load_json(text: str | None, default: Any) -> Any:
    """Parse a JSON column: `default` for NULL, invalid text or another kind than `default`'s.

    So it is for text nested deeper than MAX_NESTED, which clients could not parse.
    """
    try:
        value = json.loads(text) if text else default
    except (ValueError, RecursionError):
        return default
    if text and text.count("{") + text.count("[") > MAX_NESTED and _is_deep(value):
        return default
    return value if isinstance(value, type(default)) else default


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(MAX_NESTED):
        level = [item for held in level if isinstance(held, (dict, list))
                 for item in (held.values() if isinstance(held, dict) else held)]
    return bool(level)


def direction(metric_name: str) -> str:
    """Say which way a metric is better: "minimize" where its name has a word for loss or time."""
    words = re.split(r"[/_\-. ]", metric_name.lower())
    return "minimize" if MINIMISED_WORDS.intersection(words) else "maximize"


# --- Index --------------------------------------------------------------------
# What makes reading fast, made when AI-Lab first opens a lab and kept from then on, whoever writes
# the two public tables, the logger or any SQLite tool: by triggers, and for points by refresh().

_SYSTEM = "(metric_name >= 'system/' AND metric_name < 'system0')"   # shown where it is named
_AT = [f"{which}_{field}" for which in ("first", "last", "min", "max")
       for field in ("value", "epoch", "step")]


def _summarise(which: str) -> str:
    """Write SQL that adds points to metric_summary: those after `:since`, and that are `which`.

    First and last are by id; of equal least or largest values the earliest counts.
    """
    points = ("FROM run_metrics p WHERE p.run_id = k.run_id AND p.metric_name = k.metric_name "
              "AND p.id > :since")
    finite = f"AND p.metric_value BETWEEN -{FLOAT_MAX} AND {FLOAT_MAX} ORDER BY p.metric_value"
    ends = {"first": "ORDER BY p.id", "last": "ORDER BY p.id DESC", "min": f"{finite}, p.id",
            "max": f"{finite} DESC, p.id"}
    keep = {"first": "n_points > 0", "last": "0",
            "min": "min_value <= excluded.min_value OR excluded.min_value IS NULL",
            "max": "max_value >= excluded.max_value OR excluded.max_value IS NULL"}
    return f"""
    INSERT INTO metric_summary (run_id, metric_name, value, n_points, {", ".join(_AT)})
    SELECT k.run_id, k.metric_name, last.metric_value, (SELECT count(*) {points}),
        {", ".join(at.replace("_", ".metric_" if at.endswith("value") else ".") for at in _AT)}
    FROM (SELECT DISTINCT run_id, metric_name FROM run_metrics {which} AND id > :since
          AND typeof(run_id) = 'text' AND typeof(metric_name) = 'text') k
    JOIN runs r ON r.run_id = k.run_id AND r.deleted_at IS NULL
    {" ".join(f"LEFT JOIN run_metrics {name} ON {name}.id = (SELECT p.id {points} {end} LIMIT 1)"
              for name, end in ends.items())} WHERE true
    ON CONFLICT (run_id, metric_name) DO UPDATE SET n_points = n_points + excluded.n_points,
        value = CASE WHEN is_returned THEN value ELSE excluded.value END,
        {", ".join(f"{at} = CASE WHEN {keep[at.split('_')[0]]} THEN {at} ELSE excluded.{at} END"
                   for at in _AT)}"""


def _leaves(column: str, join: str) -> str:
    """Write SQL that lists a JSON column's values as name, value, type; lists stay whole.

    Other tools write what Python's json.dumps makes of NaN, which is not JSON: it is quoted first.
    """
    quoted = f"NEW.{column}"
    for token in ("NaN", "Infinity", "-Infinity"):
        quoted = f"replace({quoted}, ': {token}', ': \"{token}\"')"
    bare = f"NEW.{column}"               # also in lists, and in JSON without spaces
    for found, put in (("NaN", '"NaN"'), ('""NaN""', '"NaN"'), ("Infinity", '"Infinity"'),
                       ('-"Infinity"', '"-Infinity"'), ('""Infinity""', '"Infinity"'),
                       ('""-Infinity""', '"-Infinity"')):
        bare = f"replace({bare}, '{found}', '{put}')"
    return ("SELECT CASE path WHEN '$' THEN key "
            f"ELSE replace(replace(substr(fullkey, 3), '\"', ''), '.', '{join}') END AS name, "
            f"value, type FROM json_tree(CASE WHEN json_valid(NEW.{column}) THEN NEW.{column} "
            f"WHEN json_valid({quoted}) THEN {quoted} WHEN json_valid({bare}) THEN {bare} "
            "ELSE '{}' END) "
            "WHERE type <> 'object' AND typeof(key) = 'text' AND path NOT LIKE '%[%'")


_NAMES = ("experiment_name", "model_name", "task_name", "dataset_id", "status")
_FORGET_TEXT = """
    DELETE FROM run_params WHERE run_id = {0}.run_id;
    DELETE FROM run_text WHERE run_id = {0}.run_id;"""
_FORGET_FINALS = """
    UPDATE metric_summary SET is_returned = 0, value = last_value
        WHERE run_id = {0}.run_id AND is_returned;
    DELETE FROM metric_summary WHERE run_id = {0}.run_id AND n_points = 0;"""
# Keys follow the start times, so that a search finds the newest first. Of runs that start at one
# microsecond, as imported ones may, those beyond 1,024 are found before all others; years that an
# integer cannot hold so (before 1685, after 2255) are all one.
_KEY = """(SELECT CASE WHEN max(key) = at + 1023 THEN NULL ELSE ifnull(max(key) + 1, at) END
    FROM (SELECT ifnull(1024 * (1000000 * max(-9000000000, min(9000000000, CAST(
              strftime('%s', substr(NEW.timestamp, 1, 19)) AS INTEGER)))
          + CAST(round(1000000 * ('0' || substr(NEW.timestamp, 20))) AS INTEGER) % 1000000), 0)
          AS at)
    LEFT JOIN run_text ON key BETWEEN at AND at + 1023)"""
_INDEX_TEXT = _FORGET_TEXT.format("NEW") + f"""
    INSERT INTO run_params SELECT NEW.run_id, name,
        CASE WHEN value = 'NaN' THEN NULL WHEN value = 'Infinity' THEN 9e999
        WHEN value = '-Infinity' THEN -9e999
        WHEN typeof(value) = 'text' THEN substr(value, 1, 1000) ELSE value END
        FROM ({_leaves("params_json", ".")}) WHERE NEW.deleted_at IS NULL GROUP BY name;
    INSERT INTO run_text SELECT {_KEY}, NEW.run_id, {", ".join(f"NEW.{name}" for name in _NAMES)},
        NEW.run_id
        {" ".join(f"|| char(10) || ifnull(NEW.{name}, '')" for name in (*_NAMES[:-1], "note"))}
        || char(10) || ifnull((SELECT group_concat(param_name || ' ' || value, char(10))
                               FROM run_params WHERE run_id = NEW.run_id), '')
        WHERE NEW.deleted_at IS NULL;"""
_INDEX_FINALS = _FORGET_FINALS.format("NEW") + f"""
    INSERT INTO metric_summary (run_id, metric_name, value, is_returned) SELECT NEW.run_id, name,
        CASE value WHEN 'NaN' THEN NULL WHEN 'Infinity' THEN 9e999 WHEN '-Infinity' THEN -9e999
        ELSE value END, 1 FROM ({_leaves("final_metrics_json", "/")})
        WHERE NEW.deleted_at IS NULL
            AND (type IN ('integer', 'real') OR value IN ('NaN', 'Infinity', '-Infinity'))
        ON CONFLICT (run_id, metric_name) DO UPDATE SET value = excluded.value, is_returned = 1;"""
# Points that were passed over while their run was not there, or in the trash.
_MARK_ALL = """INSERT OR IGNORE INTO stale SELECT DISTINCT run_id, metric_name FROM run_metrics
    WHERE run_id = NEW.run_id AND typeof(metric_name) = 'text'
        AND id <= (SELECT id FROM summarised);"""


def _tally(sign: str, row: str, *kinds: str) -> str:
    """Write SQL that counts a row of a trigger, NEW or OLD, in or out under names of these kinds.

    An INSERT that could conflict is avoided: REPLACE of a statement outside would empty the row.
    """
    names = {"run": "''", "metric": f"{row}.metric_name", "param": f"{row}.param_name"}
    pairs = [(kind, names.get(kind, f"{row}.{kind}")) for kind in kinds]
    rows = " UNION ALL ".join(f"SELECT '{kind}' AS kind, {name} AS name" for kind, name in pairs)
    return f"""
    INSERT INTO tally SELECT kind, name, 0 FROM ({rows}) k WHERE name IS NOT NULL AND
        NOT EXISTS (SELECT 1 FROM tally t WHERE t.kind = k.kind AND t.name = k.name);
    UPDATE tally SET n_runs = n_runs {sign} 1 WHERE (kind, name) IN ({rows});"""


_MARK = ("INSERT OR IGNORE INTO stale SELECT {0}.run_id, {0}.metric_name "
         "WHERE typeof({0}.run_id) = 'text' AND typeof({0}.metric_name) = 'text';")
_DIRECTIONS = """
CREATE TABLE IF NOT EXISTS metric_directions (   -- set by hand: no part of the index
    metric_name TEXT PRIMARY KEY,
    direction TEXT NOT NULL              -- maximize or minimize
) WITHOUT ROWID"""
_ACTIVITY = "max(ifnull(timestamp, ''), ifnull(ended_at, ''), ifnull(heartbeat_at, ''))"
_INDEX_SCHEMA = f"""
CREATE TABLE metric_summary (        -- one row per run and metric
    run_id TEXT NOT NULL,
    metric_name TEXT NOT NULL,
    value REAL,                      -- final metric: returned, else the last logged; NULL is NaN
    is_returned INTEGER NOT NULL DEFAULT 0,
    n_points INTEGER NOT NULL DEFAULT 0,
    {", ".join(f"{at} {'REAL' if at.endswith('value') else 'INTEGER'}" for at in _AT)},
    PRIMARY KEY (run_id, metric_name)  -- min and max are over finite values
) WITHOUT ROWID;;
{"".join(f"CREATE INDEX metric_summary_{name} ON metric_summary (metric_name, {sql}, run_id"
         f"{f', n_points, {name}_value, value' * (name != 'final')});;"
         for name, sql in VALUES.items())}
CREATE TABLE run_params (            -- one row per run and param, nested names joined by dots
    run_id TEXT NOT NULL,
    param_name TEXT NOT NULL,
    value,                           -- number, text, JSON text of a list; NULL is null
    PRIMARY KEY (run_id, param_name)
) WITHOUT ROWID;;
CREATE INDEX run_params_value ON run_params (param_name, value, run_id);;
CREATE TABLE tally (                 -- how many runs there are, of each name, with each metric
    kind TEXT NOT NULL,              -- run (all), a column of runs, metric, param
    name TEXT NOT NULL,
    n_runs INTEGER NOT NULL,
    PRIMARY KEY (kind, name)
) WITHOUT ROWID;;
CREATE TABLE run_text (              -- one row per run, with what full-text search reads
    key INTEGER PRIMARY KEY,         -- our own key, since VACUUM may renumber rowids
    run_id TEXT NOT NULL UNIQUE,
    {" TEXT, ".join(_NAMES)} TEXT,   -- under which the run is tallied
    text TEXT NOT NULL
);;
CREATE VIRTUAL TABLE run_search USING fts5(
    text, content='run_text', content_rowid='key', prefix='1 2');;
CREATE TRIGGER run_text_insert AFTER INSERT ON run_text BEGIN
    INSERT INTO run_search (rowid, text) VALUES (NEW.key, NEW.text);
    {_tally("+", "NEW", "run", *_NAMES)} END;;
CREATE TRIGGER run_text_delete AFTER DELETE ON run_text BEGIN
    INSERT INTO run_search (run_search, rowid, text) VALUES ('delete', OLD.key, OLD.text);
    {_tally("-", "OLD", "run", *_NAMES)} END;;
CREATE TRIGGER run_text_status AFTER UPDATE OF status ON run_text BEGIN
    {_tally("-", "OLD", "status")} {_tally("+", "NEW", "status")} END;;
CREATE TRIGGER metric_insert AFTER INSERT ON metric_summary
    BEGIN {_tally("+", "NEW", "metric")} END;;
CREATE TRIGGER metric_delete AFTER DELETE ON metric_summary
    BEGIN {_tally("-", "OLD", "metric")} END;;
CREATE TRIGGER param_insert AFTER INSERT ON run_params
    BEGIN {_tally("+", "NEW", "param")} END;;
CREATE TRIGGER param_delete AFTER DELETE ON run_params
    BEGIN {_tally("-", "OLD", "param")} END;;
CREATE TABLE stale (                 -- summaries that refresh() has to make again
    run_id TEXT NOT NULL,
    metric_name TEXT NOT NULL,
    PRIMARY KEY (run_id, metric_name)
) WITHOUT ROWID;;
CREATE TABLE summarised (            -- one row
    id INTEGER NOT NULL,             -- points up to this one are in metric_summary
    n_redone INTEGER NOT NULL        -- times that older points had changed
);;
INSERT INTO summarised               -- unlike in an index before
    VALUES ({FIRST_ID}, random() >> 32);;
CREATE TRIGGER runs_insert AFTER INSERT ON runs WHEN NEW.run_id IS NOT NULL
    BEGIN {_INDEX_TEXT} {_INDEX_FINALS} {_MARK_ALL}
    DELETE FROM metric_summary WHERE run_id = NEW.run_id AND NEW.deleted_at IS NOT NULL; END;;
CREATE TRIGGER runs_update_text AFTER UPDATE OF run_id, {", ".join(_NAMES[:-1])}, note, timestamp,
    params_json, deleted_at ON runs WHEN NEW.run_id IS NOT NULL
    BEGIN {_FORGET_TEXT.format("OLD")} {_INDEX_TEXT} END;;
CREATE TRIGGER runs_update_status AFTER UPDATE OF status ON runs BEGIN
    UPDATE run_text SET status = NEW.status WHERE run_id = NEW.run_id
        AND status IS NOT NEW.status; END;;
CREATE TRIGGER runs_update_finals AFTER UPDATE OF run_id, final_metrics_json ON runs
    WHEN NEW.run_id IS NOT NULL BEGIN {_FORGET_FINALS.format("OLD")} {_INDEX_FINALS} END;;
CREATE TRIGGER runs_update_trash AFTER UPDATE OF run_id, deleted_at ON runs
    WHEN OLD.deleted_at IS NOT NEW.deleted_at OR OLD.run_id IS NOT NEW.run_id BEGIN
    DELETE FROM metric_summary WHERE run_id IN (OLD.run_id, NEW.run_id);
    {_INDEX_FINALS} {_MARK_ALL} END;;
CREATE TRIGGER runs_delete AFTER DELETE ON runs BEGIN {_FORGET_TEXT.format("OLD")}
    DELETE FROM metric_summary WHERE run_id = OLD.run_id; END;;
CREATE TRIGGER run_metrics_replace BEFORE INSERT ON run_metrics  -- REPLACE fires no DELETE trigger
    WHEN NEW.id <> -1 AND NEW.id <= (SELECT id FROM summarised)  -- -1: SQLite will choose the id
    BEGIN INSERT OR IGNORE INTO stale SELECT run_id, metric_name FROM run_metrics WHERE
        id = NEW.id AND typeof(run_id) = 'text' AND typeof(metric_name) = 'text';
    {_MARK.format("NEW")} END;;
CREATE TRIGGER run_metrics_update AFTER UPDATE ON run_metrics
    BEGIN {_MARK.format("OLD")} {_MARK.format("NEW")} END;;
CREATE TRIGGER run_metrics_delete AFTER DELETE ON run_metrics BEGIN {_MARK.format("OLD")} END;;
CREATE INDEX runs_timestamp ON runs (timestamp, run_id);;
CREATE INDEX runs_facts ON runs (run_id, {", ".join(_NAMES)}, duration_s, timestamp);;
CREATE INDEX runs_duration ON runs (duration_s, run_id);;
CREATE INDEX runs_command ON runs (command, timestamp);;
CREATE INDEX runs_note ON runs (note, timestamp) WHERE note IS NOT NULL;;
CREATE INDEX runs_activity ON runs (experiment_name, {_ACTIVITY});;
CREATE INDEX runs_deleted ON runs (deleted_at) WHERE deleted_at IS NOT NULL;;
CREATE INDEX runs_parent ON runs (parent_run_id) WHERE parent_run_id IS NOT NULL;;
""" + "".join(f"CREATE INDEX runs_{column} ON runs ({column}, timestamp, run_id);;" for column in (
    *_NAMES, "hostname", "git_hash")) + (
    "UPDATE runs SET params_json = params_json, final_metrics_json = final_metrics_json")


_INDEX_STATEMENTS = [statement.strip() for statement in _INDEX_SCHEMA.split(";;")]
_WHOLE = {"metric_directions", "run_metrics_curve",
          *(made for made in _INDEX_STATEMENTS if made.startswith("CREATE"))}
_INDEX_PARTS = re.findall(r"CREATE (?:VIRTUAL )?(TABLE|TRIGGER|INDEX) (\w+)", _INDEX_SCHEMA)


def open_lab(path: str, mode: str = "rw", timeout_s: float = 30.0) -> sqlite3.Connection:
    """Open the lab as lab_logger.connect() does, its index made where it is missing.

    Raises: StoreError, one sentence; sqlite3.Error where the index cannot be made.
    """
    conn = lab_logger.connect(path, mode, timeout_s)
    conn.text_factory = functools.partial(str, encoding="utf-8", errors="replace")   # plain SQL's
    conn.create_function("folded_in", 2, deterministic=True,            # for more than ASCII
                         func=lambda part, text: part.casefold() in str(text).casefold())
    if _is_whole(conn):
        return conn
    if mode == "ro":
        open_lab(path, "rw", timeout_s).close()
        return conn
    with lab_logger.transaction(conn):
        if not _is_whole(conn):
            lab_logger.MIGRATIONS[0](conn)       # tables and columns, where other tools drop them
            if (conn.execute("SELECT max(id) FROM run_metrics").fetchone()[0] or 0) > 1_000_000:
                print(f"ailab: the index for reading {path!r} is made, once: this takes a while",
                      file=sys.stderr, flush=True)
            for kind, name in [("TRIGGER", "run_metrics_insert"), *_INDEX_PARTS]:   # older ones
                conn.execute(f"DROP {kind} IF EXISTS {name}")
            for statement in (_DIRECTIONS, *_INDEX_STATEMENTS):
                conn.execute(statement)
            refresh(conn)
    return conn


def _is_whole(conn: sqlite3.Connection) -> bool:
    """Tell whether both tables, their columns and all that makes reading fast are as made here."""
    made = {word for row in conn.execute("SELECT name, sql FROM sqlite_master") for word in row}
    columns = [{row[1] for row in conn.execute(f"PRAGMA table_info({table})")}
               for table in ("runs", "run_metrics")]
    return (made >= _WHOLE and columns[0].issuperset(lab_logger.RUN_COLUMNS)
            and columns[1].issuperset(lab_logger.METRIC_COLUMNS)
            and conn.execute("SELECT EXISTS (SELECT 1 FROM summarised)").fetchone()[0] == 1)


def refresh(conn: sqlite3.Connection) -> None:
    """Summarise, in a transaction of the caller, the points that came, changed or went."""
    since, newest = conn.execute("SELECT id, (SELECT max(id) FROM run_metrics) "
                                 "FROM summarised").fetchone() or (None, None)
    if newest != since:
        conn.execute(_summarise("NOT INDEXED WHERE true"), {"since": since})   # by id
        conn.execute("UPDATE summarised SET id = ?", (FIRST_ID if newest is None else newest,))
    which = "run_id = :run_id AND metric_name = :metric_name"
    stale = conn.execute("SELECT run_id, metric_name FROM stale").fetchall()
    if stale:
        conn.execute("UPDATE summarised SET n_redone = n_redone + 1")
    for run_id, name in stale:
        bound = {"run_id": run_id, "metric_name": name, "since": FIRST_ID}
        conn.execute(
            "UPDATE metric_summary SET n_points = 0, value = CASE WHEN is_returned THEN value END, "
            f"{', '.join(f'{at} = NULL' for at in _AT)} WHERE {which}", bound)
        conn.execute(_summarise(f"WHERE {which}"), bound)
        conn.execute(
            f"DELETE FROM metric_summary WHERE {which} AND n_points = 0 AND NOT is_returned", bound)
    conn.execute("DELETE FROM stale")


def is_stale(conn: sqlite3.Connection) -> bool:
    """Tell whether refresh() has something to do."""
    found = conn.execute("SELECT EXISTS (SELECT 1 FROM stale) OR (SELECT max(id) FROM run_metrics)"
                         " > id FROM summarised").fetchone()
    if not found:
        raise sqlite3.DatabaseError("its index was emptied")     # and is made anew when opened
    return found[0] == 1


def take_in(conn: sqlite3.Connection, db_path: str) -> list[str]:
    """Take in every journal, close dead processes' runs, and refresh what other tools changed.

    Returns: a sentence for each journal that could not be taken in; it is kept.
    """
    problems = lab_logger.drain_all(conn, db_path)
    if _dead(conn):
        problems = lab_logger.drain_all(conn, db_path)     # lines between our look and its death
        with lab_logger.transaction(conn):
            for run_id, words in _dead(conn):
                close_dead(conn, run_id, words)
        lab_logger.drain_all(conn, db_path)                # and their journals may go
    if is_stale(conn):
        with lab_logger.transaction(conn):
            refresh(conn)
    return problems


def _dead(conn: sqlite3.Connection) -> list[tuple[str, str]]:
    """List the running runs that death() has words for, as (run_id, words)."""
    boot = (lab_logger.process_key() or "?").partition("/")[0]   # other machines may have our name
    return [(row[0], words) for row in conn.execute(
        "SELECT run_id, hostname, CASE WHEN received_from IS NULL OR process_key LIKE ? THEN pid "
        "END, CAST(process_key AS TEXT), CAST(heartbeat_at AS TEXT) FROM runs "
        "WHERE status = 'running'", (f"{boot}/%",)).fetchall()
        if (words := lab_logger.death(*row[1:]))]


def close_dead(conn: sqlite3.Connection, run_id: str, words: str, part: str | None = None) -> None:
    """Close, in a transaction of the caller, a run with the words of lab_logger.death().

    Added is when the run was last heard of, and how full the memory was then, where that explains
    its end. Of a run that was resumed, only the newest `part` of its journal may close it.
    """
    found = conn.execute(
        "SELECT max(ifnull(heartbeat_at, timestamp), timestamp), resumptions_json FROM runs "
        "WHERE run_id = ? AND (status = 'running' OR end_reason LIKE 'lost:%')",
        (run_id,)).fetchone()
    if not found or part not in (None, (parts_of(found[1]) or [("", {})])[-1][0]):
        return
    last, kind = found[0], "last" if words.startswith("lost:") else "last sign of life"
    if last:
        words += f", {kind} {str(last)[:19].replace('T', ' ')} UTC" + _memory_at(conn, run_id, last)
    conn.execute("UPDATE runs SET status = 'killed', end_reason = :words, ended_at = :last, "
                 f"duration_s = round({lab_logger.LASTED_S}, 3) WHERE run_id = :run_id",
                 {"words": words, "last": last, "run_id": run_id})


def _memory_at(conn: sqlite3.Connection, run_id: str, last: str) -> str:
    """Say that a run's machine had hardly any memory left at its last sign of life, or nothing."""
    (percent, before), (used, _) = (conn.execute(
        "SELECT metric_value + 0.0, round((julianday(?) - julianday(timestamp)) * 86400) FROM "
        "run_metrics WHERE run_id = ? AND metric_name = ? ORDER BY id DESC LIMIT 1",
        (last, run_id, name)).fetchone() or (None, None)
        for name in ("system/memory_percent", "system/memory_gib"))
    if not used or (percent or 0) < NEARLY_FULL or before is None or before > TOLD_WITHIN_S:
        return ""
    return (f"; likely out of memory: {used:.1f} of {100 * used / percent:.1f} GiB "
            f"({percent:.0f} %) were in use {before:.0f} s before")


def parts_of(resumptions_json: str | None) -> list[tuple[str, dict]]:
    """List the parts of a resumed run's journal as (part, what is told of it), oldest first."""
    parts = load_json(resumptions_json, {})
    return sorted(((part, told) for part, told in parts.items() if isinstance(told, dict)),
                  key=lambda pair: str(pair[1].get("at")))


# --- Store --------------------------------------------------------------------
# Connection first, plain data out. No statement runs once per run of a list.

def store_trouble(error: Exception, path: str, name: str) -> str:
    """Write what the store at `path` says as a sentence, which calls it `name`."""
    cause = error.__cause__ if isinstance(error, StoreError) else error
    if not isinstance(cause, (sqlite3.Error, OSError)):
        return str(error).replace(repr(path), repr(name)).replace(path, name)
    why = cause.strerror if isinstance(cause, OSError) else cause   # str() names its folder
    return f"the lab at {name!r} " + (
        "is busy: try again in a moment" if re.search("locked|busy", str(cause)) else
        f"cannot be used ({why}): `ailab doctor` says more")


def open_store(path: str, mode: str = "ro") -> sqlite3.Connection:
    """Open a lab that is there, with all that processes left behind taken in first if possible."""
    if lab_logger.pending(path) or os.path.exists(path):
        with (contextlib.suppress(StoreError, sqlite3.Error),  # a read-only file can still be read
              contextlib.closing(open_lab(path, timeout_s=READ_WAIT_S)) as conn):
            take_in(conn, path)
    conn = open_lab(path, "ro", WRITE_WAIT_S)
    return conn if mode == "ro" else open_lab(path, mode, WRITE_WAIT_S)


def flatten(tree: dict, prefix: str = "") -> dict:
    """Join nested names by dots: {"val": {"acc": 1}} becomes {"val.acc": 1}; lists stay whole."""
    flat: dict = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


_PURGED = "ifnull(deleted_at LIKE 'purged%', 0)"    # for good, but for its id and offsets


def resolve(conn: sqlite3.Connection, run_id: str, *, is_trash: bool = False) -> str:
    """Find the whole id of a run given by its id or a unique beginning of it.

    Raises: NotFound; Ambiguous, which names the candidates.
    """
    kept = f"deleted_at IS NOT NULL AND NOT ({_PURGED})" if is_trash else "deleted_at IS NULL"
    bound = {"run_id": run_id, "end": run_id + "\U0010ffff"}
    if conn.execute(f"SELECT 1 FROM runs WHERE run_id = :run_id AND {kept}", bound).fetchone():
        return run_id
    rows = conn.execute(
        f"SELECT run_id FROM runs WHERE run_id >= :run_id AND run_id < :end AND {kept} "
        "ORDER BY run_id LIMIT 6", bound).fetchall() if len(run_id) >= MIN_PREFIX else []
    if len(rows) > 1:
        names = ", ".join(row[0] for row in rows[:5]) + (" and more" if len(rows) > 5 else "")
        raise Ambiguous(f"{run_id!r} is the beginning of several runs, give more of it: {names}")
    if rows:
        return rows[0][0]
    raise _no_run(conn, run_id, is_trash)


def _no_run(conn: sqlite3.Connection, run_id: str, is_trash: bool) -> NotFound:
    shown = run_id[:80]
    if is_trash:
        return NotFound(f"there is no run {shown!r} in the trash")
    if conn.execute(f"SELECT 1 FROM runs WHERE run_id = ? AND NOT ({_PURGED})",
                    (run_id,)).fetchone():
        return NotFound(f"run {shown!r} is in the trash: `ailab restore {shown}` brings it back")
    hint = ("`ailab runs` lists what there is" if len(run_id) >= MIN_PREFIX else
            f"give its id, or at least the first {MIN_PREFIX} characters of it")
    return NotFound(f"there is no run {shown!r} in this lab: {hint}")


def directions(conn: sqlite3.Connection) -> Callable[[str], str]:
    """Give what tells a metric's direction: as it was set by hand in this lab, else by its name."""
    told = dict(conn.execute("SELECT metric_name, direction FROM metric_directions"))
    return lambda metric_name: told.get(metric_name) or direction(metric_name)


def query_of(conn: sqlite3.Connection, given: dict[str, Any]) -> RunQuery:
    """Make a RunQuery with the lab's directions; raises BadQuery for an unknown name in it."""
    query = run_query(given, directions(conn))
    for kind, name, at in query.expression.names if query.expression else ():
        if hint := _unknown(conn, kind, name):
            raise BadQuery(hint, at)
    kind, _, name = query.sort.partition(".")
    if name and (hint := _unknown(conn, kind, name)):
        raise BadQuery(f"sort: {hint}")
    return query


def _unknown(conn: sqlite3.Connection, kind: str, name: str) -> str:
    """Say that no run has a metric or param, and which are named alike; "" where one has it."""
    table, key = NAMED[kind]
    if conn.execute(f"SELECT 1 FROM {table} WHERE {key} = ? LIMIT 1", (name,)).fetchone():
        return ""
    names = [row[0] for row in conn.execute(             # from name to name, not from run to run
        f"WITH RECURSIVE names (name) AS (SELECT min({key}) FROM {table} UNION ALL SELECT "
        f"(SELECT min({key}) FROM {table} WHERE {key} > name) FROM names WHERE name IS NOT NULL "
        f"LIMIT {MAX_NAMES}) SELECT name FROM names WHERE name IS NOT NULL")]
    near = nearest(name, names) or [known for known in names if not known.startswith("system/")][:5]
    near = [f"{known!r:.80}" for known in near]              # a nested param's can be long
    hint = f"did you mean {' or '.join(near)}?" if near else "none was logged yet"
    return f"no run has a {kind[:-1]} {name[:80]!r}: {hint}"


def _meet_more(conn: sqlite3.Connection, query: RunQuery, leaf: str, than: int) -> bool:
    met = (leaf[leaf.index("(") + 1:-1] if leaf.startswith(_LEAF)
           else f"SELECT 1 FROM runs r WHERE {leaf}")
    return conn.execute(f"{met} LIMIT 1 OFFSET {than}", query.bound).fetchone() is not None


def _by_width(conn: sqlite3.Connection, query: RunQuery) -> tuple[list[str], list[str]]:
    """Part a query's leaves: those that so many runs meet that a page is read sooner run by run."""
    parted: tuple[list[str], list[str]] = [], []
    for leaf in query.leaves()[query.is_joined:]:
        is_set, is_few = leaf.startswith(_LEAF), not _meet_more(conn, query, leaf, WIDE)
        if is_set or is_few or leaf not in query.needed():   # else its index has the runs in order
            parted[is_few].append(leaf)
    return parted


@contextlib.contextmanager
def _bounded(conn: sqlite3.Connection, query: RunQuery) -> Iterator[None]:
    """Give an answer with `where` up after WHERE_S, as a BadQuery: arithmetic has no index."""
    if query.expression is None:
        yield
        return
    # Of work: a cold disk is no fault of the expression.
    query.until = query.until or time.thread_time() + WHERE_S
    conn.set_progress_handler(lambda: time.thread_time() > query.until, PROGRESS_OPS)
    try:
        yield
    except sqlite3.OperationalError as error:
        if "interrupt" not in str(error):
            raise
        raise BadQuery(f"where takes longer than {WHERE_S:g} s in this lab: compare metrics and "
                       "params with constants, and not with each other") from error
    finally:
        conn.set_progress_handler(None, 0)


def list_runs(conn: sqlite3.Connection, query: RunQuery, *, limit: int, offset: int = 0,
              has_rest: bool = True) -> list[dict]:
    """List runs as RunSummary dicts in the query's order, those without what it sorts by last."""
    runs = [_summary(*found) for found in find_runs(conn, query, limit, offset, has_rest)]
    if query.is_by_curve:
        found = _ranked(conn, [run["run_id"] for run in runs], query)
        runs = [{**run, "ranked": found.get(run["run_id"])} for run in runs]
    return runs


def find_runs(conn: sqlite3.Connection, query: RunQuery, limit: int, offset: int,
              has_rest: bool = True) -> list[tuple[tuple, tuple]]:
    """Find the runs of list_runs(), each as what _summary() takes."""
    if query.sort == "timestamp":
        first, others, is_few = _rarest(conn, query, FEW)
        if is_few and others:
            return _find_all(conn, query, query.source(first, others, True), limit, offset)
    wide, narrow = _by_width(conn, query)
    ranked, rest, count = page_statements(
        query, is_narrow=any(leaf in query.needed() for leaf in narrow))
    bound = {**query.bound, "limit": limit, "offset": offset}
    for leaf in wide:
        ranked, rest = (text.replace(leaf, row_by_row(leaf)) for text in (ranked, rest))
    with _bounded(conn, query):
        rows = conn.execute(ranked, bound).fetchall()
        if has_rest and len(rows) < limit:
            n_ranked = offset + len(rows)
            if offset and not rows:
                n_ranked = conn.execute(count, bound).fetchone()[0]
            bound.update(limit=limit - len(rows), offset=max(0, offset - n_ranked))
            rows += conn.execute(rest, bound).fetchall()
    return _with_metrics(conn, rows, bound)


def _find_all(conn: sqlite3.Connection, query: RunQuery, source: str, limit: int,
              offset: int) -> list[tuple[tuple, tuple]]:
    """Find a page by listing all that a query keeps: so they need not be counted besides."""
    way = "ASC" if query.is_ascending else "DESC"
    with _bounded(conn, query):
        ids = [row[0] for row in conn.execute(
            f"SELECT r.run_id {source} ORDER BY r.timestamp {way} NULLS LAST, r.run_id {way}",
            query.bound)]
    query.total, ids = len(ids), ids[offset:offset + limit]
    rows = {row[0]: row for row in ids and conn.execute(
        f"SELECT {_PAGE_COLUMNS} FROM runs r WHERE r.run_id IN ({', '.join('?' * len(ids))})", ids)}
    return _with_metrics(conn, [rows[run_id] for run_id in ids if run_id in rows], query.bound)


def count_runs(conn: sqlite3.Connection, query: RunQuery) -> int:
    """Count the runs that a query keeps."""
    if query.total is None:
        first, others, _ = _rarest(conn, query, 4 * FEW)
        with _bounded(conn, query):
            query.total = (conn.execute(query.count(first, others),
                                        query.bound).fetchone() or (0,))[0]
    return query.total


def _rarest(conn: sqlite3.Connection, query: RunQuery, most: int) -> tuple[str, list[str], bool]:
    """Give a condition that at most `most` runs meet, the others, and whether these are FEW.

    Then the others are asked of each of them, and need no sets of all that meet them.
    """
    needed, is_few = query.needed(), False
    first, others = "".join(needed[:1]), needed[1:]
    leaves = query.leaves() if others else []
    for than, leaf in itertools.product((WIDE, 4 * WIDE, FEW, 4 * FEW), leaves):
        if than <= most and leaf in needed and not _meet_more(conn, query, leaf, than):
            first, is_few = leaf, than <= FEW
            others = [part for part in needed if part != leaf]
            break
    for leaf in leaves:
        if is_few or not leaf.startswith(_LEAF):
            others = [part.replace(leaf, row_by_row(leaf)) for part in others]
    return first, others, is_few


# The last point of each of a run's metrics at the epoch (or step) of the best: found by halving,
# since points are logged in the order of their epochs, and a run may have a million of them.
_AT_EPOCH = """
WITH RECURSIVE look (run_id, metric_name, epoch, step, low, high, level) AS (
    SELECT w.run_id, s.metric_name, w.{end}_epoch, w.{end}_step,
        (SELECT min(id) FROM run_metrics WHERE run_id = w.run_id AND metric_name = s.metric_name),
        (SELECT max(id) FROM run_metrics WHERE run_id = w.run_id AND metric_name = s.metric_name),
        0
    FROM metric_summary w JOIN metric_summary s ON s.run_id = w.run_id
    WHERE w.metric_name = ? AND w.run_id IN ({marks}) AND s.metric_name <> w.metric_name
        AND s.n_points > 0 AND NOT (s.metric_name >= 'system/' AND s.metric_name < 'system0')
    UNION ALL
    SELECT look.run_id, look.metric_name, look.epoch, look.step,
        iif(p.id <= high AND {is_before}, p.id, low),
        iif(p.id <= high AND {is_before}, high, low + (high - low + 1) / 2 - 1), level + 1
    FROM look JOIN run_metrics p ON p.id = (
        SELECT id FROM run_metrics WHERE run_id = look.run_id AND metric_name = look.metric_name
            AND id >= low + (high - low + 1) / 2 ORDER BY id LIMIT 1)
    WHERE low < high AND level < 70)
SELECT look.run_id, look.metric_name, p.metric_value FROM look JOIN run_metrics p ON p.id = low
WHERE low >= high AND iif(look.epoch IS NULL, p.step = look.step, p.epoch = look.epoch)"""


def _ranked(conn: sqlite3.Connection, run_ids: list[str], query: RunQuery) -> dict[str, dict]:
    """Say what runs are ranked by, by run id: Ranked dicts. Two statements."""
    name, by = query.sort.partition(".")[2], query.by
    way, marks = query.way(name), ", ".join("?" * len(run_ids))
    end = {"best": _END[way], "final": "last"}.get(by, by)
    found: dict[str, dict] = {row[0]: {
        "metric_name": name, "by": by, "metric_value": number(row[1]), "direction": way,
        **{key: at if by != "final" and isinstance(at, (int, float)) else None
           for key, at in zip(("metric_epoch", "metric_step"), row[2:], strict=True)},
        "at_epoch": {}} for row in conn.execute(
            f"SELECT run_id, {value_of(by, name, query.way)}, {end}_epoch, {end}_step FROM "
            f"metric_summary WHERE metric_name = ? AND run_id IN ({marks})", [name, *run_ids])}
    for run_id, other, value in conn.execute(_AT_EPOCH.format(
            end=end, marks=marks, is_before="iif(look.epoch IS NULL, p.step <= look.step, "
            "p.epoch <= look.epoch)"), [name, *run_ids]) if by != "final" else ():
        found[run_id]["at_epoch"][other] = number(value)
    return found


def _with_metrics(conn: sqlite3.Connection, rows: list[tuple],
                  bound: dict[str, Any]) -> list[tuple[tuple, tuple]]:
    """Put beside each run's row its metrics as (name, value, last epoch), by one query.

    System metrics are left out but for those that the query, which has `bound`, is about.
    """
    metrics: dict[str, list] = {row[0]: [] for row in rows}
    for run_id, *metric in rows and conn.execute(
            "SELECT run_id, metric_name, value, last_epoch FROM metric_summary "
            f"WHERE run_id IN ({', '.join('?' * len(metrics))}) AND (NOT {_SYSTEM} OR "
            "metric_name IN (?, ?))",
            [*metrics, bound.get("metric_name"), bound.get("sort_name")]):
        metrics[run_id].append(tuple(metric))
    return [(row, tuple(metrics[row[0]])) for row in rows]


def _summary(row: tuple, metrics: tuple) -> dict:
    """Make a RunSummary dict of a row of SUMMARY_COLUMNS to params_json, and its metrics."""
    run = {**dict(zip(SUMMARY_COLUMNS, row, strict=False)), "params": load_json(row[-1], {}),
           "final_metrics": {name: number(value) for name, value, _ in metrics},
           "n_epochs_logged": max((epoch for *_, epoch in metrics if epoch.__class__ is int),
                                  default=None)}
    if not isinstance(lasted := run["duration_s"], (float, int)) or abs(lasted) == INF:
        run["duration_s"] = None         # as plain SQL can put it there
    return run


def number(value: Any) -> float | str:
    """Write a metric's value for JSON: NULL, and text that plain SQL put there, is "NaN"."""
    if value.__class__ is float and value - value == 0.0:
        return value
    if isinstance(value, (int, float)) and value == value:
        return "Infinity" if value == INF else "-Infinity" if value == -INF else float(value)
    return "NaN"


def encode(answer: Any) -> bytes:
    """Write an answer as strict JSON, once for the API and the command line."""
    try:
        text = json.dumps(answer, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
        return text.encode()
    except (ValueError, TypeError, RecursionError):      # what only plain SQL can have put there
        return json.dumps(_plain(answer), allow_nan=False, separators=(",", ":")).encode()


def _plain(value: Any, depth: int = 0) -> Any:
    if isinstance(value, dict) and depth < 100:
        return {str(_plain(key)): _plain(item, depth + 1) for key, item in value.items()}
    if isinstance(value, list) and depth < 100:
        return [_plain(item, depth + 1) for item in value]
    if isinstance(value, float):
        return number(value)
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return value if isinstance(value, str | int | None) else repr(value)[:lab_logger.MAX_TEXT]


def get_run(conn: sqlite3.Connection, run_id: str) -> dict:
    """Give one run as a RunDetail dict. Raises NotFound, Ambiguous."""
    run_id = resolve(conn, run_id)
    run = _details(conn, [run_id])[run_id]
    url = f"/runs/{quote(run_id, safe='')}"
    cwd = None if run["received_from"] else run["cwd"] or ""
    run["artifact_files"] = [_artifact_file(cwd, url, index, path)
                             for index, path in enumerate(run["artifacts"])]
    run["metrics_url"] = f"{url}/metrics"
    run["child_run_ids"] = [row[0] for row in conn.execute(
        "SELECT run_id FROM runs WHERE parent_run_id = ? AND deleted_at IS NULL "
        "ORDER BY timestamp, run_id", (run_id,))]
    return run


_MACHINE = (                             # what a run's system metrics come down to
    ("process_memory_gib", "peak memory {peak:.4g} GiB"),
    ("process_cpu_percent", "mean CPU {mean:.0f} % of a core"),
    (r"gpu\.(\d+)\.utilization_percent", "mean GPU {0} {mean:.0f} %"))


def machine_use(conn: sqlite3.Connection, run_id: str) -> str:
    """Say in a line how a run used its machine; "" where no system metrics were logged."""
    rows = conn.execute(
        "SELECT metric_name, avg(metric_value), max(metric_value + 0.0) FROM run_metrics "
        f"WHERE run_id = ? AND {_SYSTEM} GROUP BY metric_name", (run_id,)).fetchall()
    return ", ".join(text.format(*found.groups(), mean=mean, peak=peak)
                     for pattern, text in _MACHINE for name, mean, peak in rows
                     if (found := re.fullmatch("system/" + pattern, name)) and mean is not None)


_DETAIL_COLUMNS = ("pid", "process_key", "cwd", "error", "received_from", "device_info", "git_diff",
                   "pip_freeze", "artifacts_json", "resumptions_json")
_TOLD = {"at": str, "hostname": str, "pid": int, "command": str, "git_hash": str, "params": dict}


def _details(conn: sqlite3.Connection, run_ids: list[str]) -> dict[str, dict]:
    """Give runs by id, RunSummary with the detail columns, artifacts and metrics beside it."""
    marks, way = ", ".join("?" * len(run_ids)), directions(conn)
    columns = (*SUMMARY_COLUMNS, *_DETAIL_COLUMNS, "params_json")
    rows = conn.execute(f"SELECT {', '.join(columns)} FROM runs WHERE run_id IN ({marks})",
                        run_ids).fetchall()
    runs = {found[0][0]: _summary(*found) for found in _with_metrics(conn, rows, {})}
    for row in rows:
        run = runs[row[0]]
        run.update(zip(_DETAIL_COLUMNS, map(_plain, row[len(SUMMARY_COLUMNS):]), strict=False))
        run["pid"] = run["pid"] if isinstance(run["pid"], int) else None
        run["device_info"] = load_json(run["device_info"], {})
        run["artifacts"] = [str(path) for path in load_json(run.pop("artifacts_json"), [])]
        run["resumptions"] = [
            {key: told[key] if type(told.get(key)) is kind else None for key, kind in _TOLD.items()}
            for _, told in parts_of(run.pop("resumptions_json"))
            if told.get("at") != run["timestamp"]]       # a run begun under a given id
        run["metrics"] = []
    for row in conn.execute(f"SELECT run_id, {', '.join(_METRIC_FIELDS)} FROM metric_summary "
                            f"WHERE run_id IN ({marks}) ORDER BY run_id, metric_name", run_ids):
        metric = dict(zip(_METRIC_FIELDS, row[1:], strict=True))
        runs[row[0]]["metrics"].append(_metric_summary(metric, way(metric["metric_name"])))
    return runs


_METRIC_FIELDS = [name for name in MetricSummary.model_fields if name != "direction"]


def _metric_summary(metric: dict, way: str) -> dict:
    metric.update(direction=way, value=number(metric["value"]),
                  is_returned=bool(metric["is_returned"]))
    for name in ("first_value", "last_value"):
        metric[name] = number(metric[name]) if metric["n_points"] else None
    for name in metric:
        if name.endswith(("_epoch", "_step")) and not isinstance(metric[name], (int, float)):
            metric[name] = None
    return metric


def _artifact_file(cwd: str | None, url: str, index: int, path: str) -> dict:
    size = None
    with contextlib.suppress(OSError, ValueError):
        full = "" if cwd is None else os.path.join(cwd, path)     # None: on another machine
        size = os.path.getsize(full) if os.path.isabs(full) and os.path.isfile(full) else None
    kind = KIND_OF.get(os.path.splitext(path)[1][1:].lower(), "file")
    return {"index": index, "path": path, "kind": kind, "size_bytes": size,
            "exists": size is not None, "url": f"{url}/artifacts/{index}"}


def run_metrics(conn: sqlite3.Connection, run_ids: list[str], given: dict[str, Any]) -> dict:
    """Give the curves of runs as a Curves dict; `given` has the values of the WINDOW parameters.

    Raises: NotFound, Ambiguous.
    """
    ids = list(dict.fromkeys(resolve(conn, run_id) for run_id in run_ids))
    logged = {(row[0], row[1]): row[2:] for row in conn.execute(
        "SELECT run_id, metric_name, n_points, (SELECT max(id) FROM run_metrics p WHERE "
        "p.run_id = s.run_id AND p.metric_name = s.metric_name) FROM metric_summary s "
        f"WHERE run_id IN ({', '.join('?' * len(ids))}) AND n_points > 0 ORDER BY metric_name",
        ids)}
    is_whole = given["from"] is given["to"] is None
    is_counted = is_whole and not given["since"] and given["x"] != "time" and not is_stale(conn)
    curves = []
    for run_id in ids:
        for name in dict.fromkeys(given["names"] or [
                name for owner, name in logged
                if owner == run_id and not name.startswith("system/")]):
            bound = {"run_id": run_id, "name": name}
            select = _points_statement(conn, given, bound)
            n_logged, cursor = n_points, _ = logged.get((run_id, name), (0, 0))
            if not is_counted:
                n_points, cursor = conn.execute(select.format("count(*), max(id)"),
                                                bound).fetchone()
            before = n_logged - n_points if is_whole else 0
            curves.append({"run_id": run_id, "metric_name": name, "n_points": n_points,
                           "cursor": cursor or given["since"], **_buckets(
                               conn, select, bound, n_points, max(0, before), given["max_points"])})
    return {"x": given["x"], "curves": curves}


def _points_statement(conn: sqlite3.Connection, given: dict[str, Any],
                      bound: dict[str, Any]) -> str:
    """Write the SELECT of a curve's points in the window, its columns left open as {}.

    More conditions may follow it. What it binds is added to `bound`.
    """
    low, high = given["from"], given["to"]
    where, later = "run_id = :run_id AND metric_name = :name", ""
    if given["since"]:
        bound["since"], later = given["since"], " AND id > :since"
    if given["x"] == "time":
        for name, sign, moment in (("low", ">=", low), ("high", "<=", high)):
            if moment is not None:
                bound[name] = lab_logger.utc(min(max(moment, 0.0), 2.5e11))
                later += f" AND timestamp {sign} :{name}"
        source = "(SELECT *, timestamp AS x FROM run_metrics)"
        return f"SELECT {{}} FROM {source} WHERE {where} AND julianday(x) IS NOT NULL{later}"
    order = "epoch, step" if given["x"] == "epoch" else "step, epoch"
    if low is None and high is None:
        return (f"SELECT {{}} FROM (SELECT *, coalesce({order}) AS x FROM run_metrics) "
                f"WHERE {where}{later}")
    bound |= {"low": -INF if low is None else low, "high": INF if high is None else high}
    place = "row_number() OVER (ORDER BY id)"
    if not conn.execute(f"SELECT EXISTS (SELECT 1 FROM run_metrics WHERE {where} "
                        "AND epoch IS NULL AND step IS NULL)", bound).fetchone()[0]:
        place = "NULL"                   # numbering a million points for nothing takes a second
    return (f"SELECT {{}} FROM (SELECT *, coalesce({order}, {place}) AS x FROM run_metrics "
            f"WHERE {where}) WHERE x BETWEEN :low AND :high{later}")


def _buckets(conn: sqlite3.Connection, select: str, bound: dict[str, Any], n_points: int,
             n_before: int, max_points: int) -> dict:
    """Read one curve into at most max_points buckets of equal size, in order of logging."""
    size = max(1, -(-n_points // max_points))
    columns: dict[str, list] = {name: [] for name in (
        "x", "time", "first", "min", "max", "last", "mean", "count")}
    marked: list[dict] = []
    n_nonfinite = 0
    points, bound["last"] = None, FIRST_ID
    if size < LONG_BUCKET or "row_number" in select:
        points = conn.execute(select.format("metric_value, x, timestamp") + " ORDER BY id", bound)
    for n_read in range(0, n_points, size):
        n = min(size, n_points - n_read)
        odd = (_add_bucket(columns, points.fetchmany(n), n_before + n_read) if points else
               _add_long_bucket(conn, select, bound, columns, n, n_before + n_read))
        n_nonfinite += len(odd)
        marked += odd[:MAX_MARKED - len(marked)]
    return {**columns, "nonfinite": marked, "n_nonfinite": n_nonfinite}


def _add_long_bucket(conn: sqlite3.Connection, select: str, bound: dict[str, Any],
                     columns: dict[str, list], n: int, n_before: int) -> list[dict]:
    """Do as _add_bucket() with the next `n` points after the id bound as `last`, and move that on.

    SQLite finds the bucket's end in the index alone, and its extremes without making rows: a
    third of the time that reading every point takes.
    """
    bound["after"] = bound["last"]
    bound["last"], = conn.execute(select.format("id") + " AND id > :after ORDER BY id "
                                  f"LIMIT 1 OFFSET {n - 1}", bound).fetchone()
    bucket = select + " AND id > :after AND id <= :last"
    bound["first"], n_numbers, low, high, total = conn.execute(bucket.format(
        "min(id), count(metric_value), min(metric_value), max(metric_value), sum(metric_value)"),
        bound).fetchone()
    rows = "metric_value, x, timestamp"
    if (n_numbers < n or not low.__class__ is high.__class__ is total.__class__ is float
            or total - total != 0):
        points = conn.execute(bucket.format(rows) + " ORDER BY id", bound)   # some are no numbers
        return _add_bucket(columns, points.fetchall(), n_before)
    ends = conn.execute(select.format(rows) + " AND id IN (:first, :last) ORDER BY id",
                        bound).fetchall()
    _append(columns, ends[0], n_before, n, (ends[0][0], low, high, ends[-1][0], total / n))
    return []


def _append(columns: dict[str, list], first: tuple, n_before: int, n: int, values: tuple) -> None:
    """Append a bucket of `n` points: its first point's row; first, min, max, last and mean."""
    row = (_axis(first[1], n_before + 1), unix(first[2]), *values, n)
    for column, value in zip(columns.values(), row, strict=True):
        column.append(value)


def _add_bucket(columns: dict[str, list], bucket: list[tuple], n_before: int) -> list[dict]:
    """Append one bucket to a curve's columns; returns its non-finite points."""
    values, odd = [row[0] for row in bucket], []
    try:
        total = sum(values)
    except TypeError:                    # NULL, or text
        total = INF
    if total - total != 0:
        odd = [{"x": _axis(row[1], n_before + i), "value": number(row[0])}
               for i, row in enumerate(bucket, 1) if number(row[0]).__class__ is str]
        values = [value for value in values if number(value).__class__ is float]
    mean = total / len(values) if total - total == 0 else math.fsum(v / len(values) for v in values)
    _append(columns, bucket[0], n_before, len(bucket), (
        values[0], min(values), max(values), values[-1], mean) if values else (None,) * 5)
    return odd


def _axis(x: Any, place: int) -> float:
    """Give x as a number: unix seconds of a time; the point's place where there is none."""
    return x if isinstance(x, (int, float)) else place if x is None else unix(x) or place


@functools.lru_cache(maxsize=4096)
def unix(timestamp: str | None) -> float | None:
    """Turn an ISO 8601 time into seconds since 1970; None for what is none."""
    try:
        moment = datetime.fromisoformat(str(timestamp).replace("Z", "+00:00"))
        return (moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)).timestamp()
    except (ValueError, OverflowError):
        return None


def compare_runs(conn: sqlite3.Connection, run_ids: list[str], by: str = "final") -> dict:
    """Put runs side by side as a RunComparison dict, the best of them `by` that value.

    Raises: BadQuery, NotFound, Ambiguous.
    """
    ids = list(dict.fromkeys(resolve(conn, run_id) for run_id in run_ids))
    if not 2 <= len(ids) <= MAX_COMPARED:
        raise BadQuery(f"{plural(len(ids), 'different run')} given: give 2 to {MAX_COMPARED} to "
                       "compare")
    details = _details(conn, ids)
    runs = [details[run_id] for run_id in ids]
    params = [flatten(run["params"]) for run in runs]
    packages = [dict(re.findall(r"(?m)^[ \t]*(.*?) *== *(.*?)\s*$", run["pip_freeze"] or ""))
                for run in runs]
    metric_keys = sorted({name for run in runs for name in run["final_metrics"]})
    param_keys = sorted({name for flat in params for name in flat})
    best = {name: _best(name, runs, by) for name in metric_keys}
    return {
        "run_ids": ids, "metric_keys": metric_keys, "param_keys": param_keys,
        "runs": [{name: run[name] for name in ComparedRun.model_fields if name in run}
                 for run in runs],
        "differing_params": [name for name in param_keys
                             if len({_typed(flat, name) for flat in params}) > 1],
        "best": {name: found for name, found in best.items() if found},
        "differing_packages": {
            name: {run_id: held.get(name) for run_id, held in zip(ids, packages, strict=True)}
            for name in sorted({name for versions in packages for name in versions}, key=str.lower)
            if len({versions.get(name) for versions in packages}) > 1}}


def _typed(flat: dict[str, Any], name: str) -> tuple:
    """Make a param's value comparable: 1 is 1.0, and 1, "1", true, null and missing all differ."""
    value = flat.get(name, flatten)      # a value that no JSON holds
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return "number", value
    return type(value).__name__, json.dumps(value, sort_keys=True, default=str)


def _best(metric_name: str, runs: list[dict], by: str) -> dict | None:
    metrics = {run["run_id"]: metric for run in runs for metric in run["metrics"]
               if metric["metric_name"] == metric_name}
    way = next(iter(metrics.values()))["direction"]
    end = {"best": _END[way]}.get(by, by)
    values = {run_id: metric["value" if by == "final" or not metric["n_points"] else f"{end}_value"]
              for run_id, metric in metrics.items()}
    finite = {run_id: float(value) for run_id, value in values.items()
              if value is not None and math.isfinite(float(value))}
    if not finite:
        return None
    best = min(finite.values()) if way == "minimize" else max(finite.values())
    held = [run_id for run_id, value in finite.items() if value == best]
    return {"direction": way, "value": best, "run_ids": held, **{
        f"{field}s": {run_id: metrics[run_id].get(f"{end}_{field}") for run_id in held}
        for field in ("epoch", "step")}}


def leaderboard(conn: sqlite3.Connection, given: dict[str, Any]) -> list[dict]:
    """Rank runs by a metric as LeaderboardRow dicts; `given` has the values of BOARD.

    Raises: NotFound, naming close names, for a metric that no run has; BadQuery.
    """
    name, way = given["metric_name"], directions(conn)(given["metric_name"])
    is_ascending = given["order"] == "asc" or (given["order"] == "best" and way == "minimize")
    if hint := _unknown(conn, "metrics", name):
        raise NotFound(hint)
    query = query_of(conn, given)
    query.sort, query.is_ascending = f"metrics.{name}", is_ascending
    runs = list_runs(conn, query, limit=given["top_k"], has_rest=False)
    if query.by == "final":
        found = _ranked(conn, [run["run_id"] for run in runs], query)
    return [{**run, "rank": rank, **(run.pop("ranked", None) or found[run["run_id"]])}
            for rank, run in enumerate(runs, 1)]


def set_direction(conn: sqlite3.Connection, metric_name: str, way: str | None) -> dict:
    """Set which way a metric is better, or None for what its name says; gives its MetricInfo dict.

    Raises: NotFound, naming close names.
    """
    with lab_logger.transaction(conn):
        if hint := _unknown(conn, "metrics", metric_name):
            raise NotFound(hint)
        conn.execute("DELETE FROM metric_directions WHERE metric_name = ?", (metric_name,))
        if way is not None:
            conn.execute("INSERT INTO metric_directions VALUES (?, ?)", (metric_name, way))
    return next(metric for metric in list_metrics(conn, with_system=True)
                if metric["metric_name"] == metric_name)


def set_note(conn: sqlite3.Connection, run_id: str, note: str | None) -> dict:
    """Write a run's note and return the run as get_run does. Raises NotFound, Ambiguous."""
    with lab_logger.transaction(conn):
        run_id = resolve(conn, run_id)
        conn.execute("UPDATE runs SET note = ? WHERE run_id = ?", (note, run_id))
        refresh(conn)
    return get_run(conn, run_id)


def delete_run(conn: sqlite3.Connection, run_id: str) -> dict:
    """Move a run to the trash; nothing of it is removed. Raises NotFound, Ambiguous."""
    with lab_logger.transaction(conn):
        run_id, now = resolve(conn, run_id), lab_logger.utc(time.time())
        conn.execute("UPDATE runs SET deleted_at = ? WHERE run_id = ?", (now, run_id))
    return {"run_id": run_id, "deleted_at": now}


def restore_run(conn: sqlite3.Connection, run_id: str) -> str:
    """Take a run out of the trash; returns its whole id. Raises NotFound, Ambiguous."""
    with lab_logger.transaction(conn):
        run_id = resolve(conn, run_id, is_trash=True)
        conn.execute("UPDATE runs SET deleted_at = NULL WHERE run_id = ?", (run_id,))
        refresh(conn)
    return run_id


def _tallies(conn: sqlite3.Connection, kind: str) -> list[tuple[str, int]]:
    """List what of a kind of name the lab has, as (name, number of runs), most runs first."""
    return conn.execute("SELECT name, n_runs FROM tally WHERE kind = ? AND n_runs > 0 "
                        "ORDER BY n_runs DESC, name", (kind,)).fetchall()


def list_experiments(conn: sqlite3.Connection) -> list[dict]:
    """List experiments as ExperimentSummary dicts, latest activity first."""
    running = dict(conn.execute(f"SELECT experiment_name, count(*) FROM runs WHERE {_VISIBLE} "
                                "AND status = 'running' GROUP BY experiment_name").fetchall())
    return [{"experiment_name": name, "n_runs": n_runs, "n_running": running.get(name, 0),
             "last_activity": latest} for name, n_runs, latest in conn.execute(f"""
        WITH named AS (SELECT name, n_runs FROM tally WHERE kind = 'experiment_name')
        SELECT k.name, n_runs, (SELECT CAST(nullif({_ACTIVITY}, '') AS TEXT) FROM runs
            WHERE experiment_name IS k.name AND deleted_at IS NULL
            ORDER BY {_ACTIVITY} DESC LIMIT 1) AS latest
        FROM (SELECT * FROM named UNION ALL SELECT NULL, n_runs - (
            SELECT ifnull(sum(n_runs), 0) FROM named) FROM tally WHERE kind = 'run') k
        WHERE n_runs > 0 ORDER BY latest DESC, k.name""")]


def list_metrics(conn: sqlite3.Connection, with_system: bool = False) -> list[dict]:
    """List metrics as MetricInfo dicts, most runs first; the machine's only where asked for."""
    way = directions(conn)
    return [{"metric_name": name, "n_runs": n_runs, "direction": way(name)}
            for name, n_runs in _tallies(conn, "metric")
            if with_system or not name.startswith("system/")]


def lab_overview(conn: sqlite3.Connection) -> dict:
    """Describe the lab as a Lab dict, without project, version and path."""
    experiments = list_experiments(conn)
    words = {plural: [{"name": name, "n_runs": n_runs} for name, n_runs in _tallies(conn, column)]
             for plural, column in (("models", "model_name"), ("datasets", "dataset_id"),
                                    ("tasks", "task_name"))}
    params = [dict(zip(ParamInfo.model_fields, row, strict=True)) for row in conn.execute(
        # From one value to the next in the index, not from run to run.
        "SELECT name, n_runs, EXISTS (SELECT 1 FROM run_params WHERE param_name = name AND value "
        "IS NULL) + (WITH RECURSIVE given(value, n) AS (SELECT min(value), 1 FROM run_params "
        "WHERE param_name = name UNION ALL SELECT (SELECT min(value) FROM run_params "
        "WHERE param_name = name AND value > given.value), n + 1 FROM given WHERE value IS NOT "
        f"NULL AND n < {MAX_COUNTED_VALUES}) SELECT count(value) FROM given) FROM tally "
        "WHERE kind = 'param' AND n_runs > 0 ORDER BY name")]
    return {"n_runs": count_runs(conn, RunQuery()),
            "counts": dict.fromkeys(lab_logger.STATUSES, 0) | dict(_tallies(conn, "status")),
            "last_activity": max((e["last_activity"] for e in experiments if e["last_activity"]),
                                 default=None),
            "experiments": experiments, **words, "params": params, "metrics": list_metrics(conn)}


def open_artifact(conn: sqlite3.Connection, run_id: str, index: str, db_path: str,
                  roots: list[str]) -> tuple[Any, str]:
    """Open a recorded file for reading: (binary file, its name).

    Only of a run that was logged on this machine, and only a regular file that, links resolved,
    lies under the run's working directory or one of `roots`, below no dot name, and is not the
    lab's own. Raises: NotFound, in the same words whether the file is refused or missing, so that
    nobody learns what exists.
    """
    run_id = resolve(conn, run_id)
    cwd, text, sender = conn.execute("SELECT cwd, artifacts_json, received_from FROM runs "
                                     "WHERE run_id = ?", (run_id,)).fetchone()
    paths = [] if sender else [str(path) for path in load_json(text, [])]
    refusal = NotFound(f"the run has no artifact {index[:9]!r} to download: it is missing, "
                       "or lies outside the run's working directory and AILAB_ARTIFACT_ROOTS")
    if not re.fullmatch(r"\d{1,6}", index, re.ASCII) or int(index) >= len(paths):
        raise refusal
    try:
        path = paths[int(index)]
        full = os.path.realpath(os.path.join(cwd or os.sep, path))
        if "://" in path or not _is_servable(full, [cwd or "", *roots], db_path):
            raise refusal
        flags = [getattr(os, name, 0) for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_BINARY")]
        return os.fdopen(os.open(full, sum(flags)), "rb"), os.path.basename(full)
    except (OSError, ValueError) as error:
        raise refusal from error


def own_files(db_path: str) -> list[str]:
    """Name the files that SQLite keeps a lab in."""
    return [os.path.realpath(db_path) + end for end in ("", "-wal", "-shm", "-journal")]


def _is_servable(full: str, roots: list[str], db_path: str) -> bool:
    own = own_files(db_path)
    if (not os.path.isfile(full) or full in own or full.startswith(own[0] + ".journals" + os.sep)
            or any(os.path.exists(path) and os.path.samefile(full, path) for path in own)):
        return False
    for root in filter(os.path.isabs, roots):
        real = os.path.realpath(root)
        if os.path.dirname(real) != real and full.startswith(real + os.sep):    # never "/"
            below = full[len(real) + 1:].split(os.sep)
            return not any(part.startswith(".") for part in below)
    return False


# --- Keeping ------------------------------------------------------------------
# What takes runs out of a lab: for good, or as a copy that another lab can take in.

_EXPORT = {"ailab": "export", "version": 1}      # the first line of JSON lines
_INFINITE = ("Infinity", "-Infinity")
_POINT = ("epoch", "step", "metric_name", "metric_value", "timestamp")
_NAMED = "typeof(run_id) = 'text'"               # SQLite lets plain SQL leave it out
_TIMES = ("timestamp", "ended_at", "heartbeat_at", "deleted_at")
_PROMISED: dict[str, tuple[str, Callable[[Any], Any]]] = {     # of columns of runs: what they hold
    "status": (f"one of {', '.join(lab_logger.STATUSES)}", lab_logger.STATUSES.__contains__),
    "duration_s": ("a number", lambda value: isinstance(value, (int, float))),
    "artifacts_json": ("a JSON list", lambda value: load_json(str(value), [0]) != [0]),
    **dict.fromkeys(_TIMES, ("a time such as 2026-11-01T09:30:00.000000Z",
                             lambda value: parse_time(str(value)) == value)),
    **dict.fromkeys(("resumptions_json", "params_json", "final_metrics_json", "device_info"),
                    ("a JSON object", lambda value: load_json(str(value), {0: 0}) != {0: 0}))}


def trash(conn: sqlite3.Connection) -> list[dict]:
    """List what is in the trash as dicts of run_id, timestamp, experiment_name, deleted_at."""
    names = ("run_id", "timestamp", "experiment_name", "deleted_at")
    return [dict(zip(names, row, strict=True)) for row in conn.execute(
        f"SELECT {', '.join(names)} FROM runs WHERE deleted_at IS NOT NULL AND NOT ({_PURGED}) "
        "ORDER BY deleted_at, run_id")]


def purge_run(conn: sqlite3.Connection, db_path: str, run_id: str) -> int:
    """Remove a run of the trash for good; gives how many points it had. No file is touched.

    Its id, start and state stay, and how much of its journal was taken in, so that nothing that a
    logger on another machine sends brings it back.
    Raises: NotFound, Ambiguous; LabError while it is alive.
    """
    with lab_logger.transaction(conn):
        run_id = resolve(conn, run_id, is_trash=True)
        if conn.execute("SELECT status FROM runs WHERE run_id = ?", (run_id,)
                        ).fetchone()[0] == "running":
            raise LabError(f"run {run_id} is running: end it first", 409)
        n_points = conn.execute("DELETE FROM run_metrics WHERE run_id = ?", (run_id,)).rowcount
        offsets = {part: {"offset": told.get("offset", 0)} for part, told in parts_of(conn.execute(
            "SELECT resumptions_json FROM runs WHERE run_id = ?", (run_id,)).fetchone()[0])}
        gone = [name for name in lab_logger.RUN_COLUMNS if name not in (
            "run_id", "timestamp", "status", "journal_offset", "deleted_at", "resumptions_json")]
        conn.execute("UPDATE runs SET deleted_at = 'purged ' || deleted_at, resumptions_json = ?, "
                     f"{' = NULL, '.join(gone)} = NULL WHERE run_id = ?",
                     (json.dumps(offsets) if offsets else None, run_id))
        refresh(conn)
    for journal in lab_logger.pending(db_path):          # kept since it could not be taken in
        if journal["run_id"] == run_id:
            lab_logger._remove(journal["path"])
    return n_points


def compact(conn: sqlite3.Connection) -> None:
    """Write the file anew without what was removed: until then its words and bytes are in it."""
    try:
        conn.executescript("DELETE FROM tally WHERE n_runs = 0 AND kind <> 'run'; "
                           "INSERT INTO run_search (run_search) VALUES ('optimize'); "
                           "VACUUM; PRAGMA wal_checkpoint(TRUNCATE)")
    except sqlite3.Error as error:
        raise LabError(f"the file could not be written anew ({error}), so bytes of what was purged "
                       "are still in it: `ailab purge --yes` tries again") from error


@contextlib.contextmanager
def replaced(path: str) -> Iterator[str]:
    """Give a name to write to, which becomes `path` at the end, or nothing where that fails.

    Nor while SQLite keeps a log beside it: the changes in it would be taken for the new file's.
    """
    part = f"{path}.{os.getpid()}.part"
    if os.path.exists(path) and not os.path.isfile(path):
        raise LabError(f"{path!r} is no file: name one, or - for stdout")
    try:
        os.close(os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    except OSError as error:
        raise LabError(f"{path!r} cannot be written: {error.strerror}") from error
    try:
        yield part
        with open(part, "rb+") as file:  # else a power cut may leave the name without the bytes
            os.fsync(file.fileno())
        for log in filter(os.path.exists, own_files(path)[1:]):
            raise LabError(f"{path!r} cannot be replaced while {log!r} is there: end what has it "
                           "open, or name another file")
        os.replace(part, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(part)


def check_target(conn: sqlite3.Connection, path: str, kind: str) -> None:
    """Raise LabError where `path` is a database, unless its copy has all the runs of it."""
    if not _is_database(path):
        return
    ids, is_older = "SELECT run_id FROM runs", False
    with (contextlib.suppress(sqlite3.Error),            # immutable: so it leaves no log there
          contextlib.closing(_open_file(path, "immutable=1")) as old):
        is_older = set(old.execute(ids)) <= set(conn.execute(ids))
    if kind != "db" or not is_older:
        raise LabError(f"{path!r} is a database and no older copy of this lab: name another file")


def export_lines(conn: sqlite3.Connection, query: RunQuery) -> Iterator[str]:
    """Write runs as JSON lines, whole, as the tables have them: each run, then its n_points points.

    Points are lists of epoch, step, metric_name, metric_value and timestamp; NaN, and what plain
    SQL put in place of a number, is null.
    """
    columns = ", ".join(f"r.{name}" for name in lab_logger.RUN_COLUMNS)
    yield encode(_EXPORT).decode()
    point = ", ".join(_POINT).replace(
        "metric_value", "CASE WHEN metric_value < '' THEN metric_value END")
    for row in conn.execute(f"SELECT {columns} FROM runs r WHERE {query.conditions()} "
                            f"AND {_NAMED} ORDER BY r.timestamp, r.run_id", query.bound):
        run = dict(zip(lab_logger.RUN_COLUMNS, row, strict=True))
        yield encode({"run": {name: value for name, value in run.items() if value is not None},
                      "n_points": conn.execute("SELECT count(*) FROM run_metrics WHERE run_id = ?",
                                               (run["run_id"],)).fetchone()[0]}).decode()
        points = conn.execute(f"SELECT {point} FROM run_metrics WHERE run_id = ? ORDER BY id",
                              (run["run_id"],))
        while block := points.fetchmany(MAX_LIMIT):
            yield encode({"points": list(map(list, block))}).decode()


def export_rows(conn: sqlite3.Connection, query: RunQuery) -> Iterator[list]:
    """Write runs as rows for CSV, heads first: columns, then params.NAME, then metrics.NAME."""
    pages = range(0, count_runs(conn, query), MAX_LIMIT)     # read twice: held is one at a time

    def rows() -> Iterator[dict]:
        for offset in pages:
            for run in list_runs(conn, query, limit=MAX_LIMIT, offset=offset):
                yield {**run, **flatten(run["params"], "params."),
                       **flatten(run["final_metrics"], "metrics.")}
    names = {name for row in rows() for name in row if "." in name}
    heads = [*SUMMARY_COLUMNS, *sorted(names, key=lambda name: (name[0] == "m", name))]
    yield heads
    yield from ([_for_sheet(row.get(name)) for name in heads] for row in rows())


def _for_sheet(value: Any) -> Any:
    """Put a ' before text that a spreadsheet would run as a formula: a note may be a stranger's."""
    if isinstance(value, (list, dict)):
        return encode(value).decode()
    is_formula = isinstance(value, str) and re.match(r"[=+@\t\r]|-(?!Infinity$)", value)
    return f"'{value}" if is_formula and not _NUMBER.fullmatch(value) else value


def imported(path: str) -> Iterator[tuple[dict, Iterator[tuple]]]:
    """Read what export wrote, or another lab's database: (columns of runs, its points), by run.

    Raises: LabError, saying which line is none of an export's.
    """
    if _is_database(path):
        yield from _of_database(path)
        return
    for _, told in itertools.groupby(_of_lines(path), key=lambda block: block[0]):
        yield next(told)[1], (point for _, points in told for point in points)  # noqa: B031


def _is_database(path: str) -> bool:
    if not os.path.isfile(path):         # a pipe would wait
        return False
    with open(path, "rb") as file:
        return file.read(16) == b"SQLite format 3\0"


def _open_file(path: str, how: str = "mode=ro") -> sqlite3.Connection:
    return sqlite3.connect(f"file:{quote(os.fsencode(os.path.abspath(path)))}?{how}", uri=True)


def _of_database(path: str) -> Iterator[tuple[dict, Iterator[tuple]]]:
    with contextlib.closing(_open_file(path)) as conn:
        conn.text_factory = functools.partial(str, encoding="utf-8", errors="replace")
        held = {table: [row[1] for row in conn.execute(f"PRAGMA table_info({table})")]
                for table in ("runs", "run_metrics")}
        columns = [name for name in lab_logger.RUN_COLUMNS if name in held["runs"]]
        point = ", ".join(name if name in held["run_metrics"] else "NULL" for name in _POINT)
        if "run_id" not in columns or "run_id" not in held["run_metrics"]:
            raise LabError(f"{path!r} is a database, and no lab's: it has no tables of runs and "
                           "run_metrics, each with a run_id")
        for row in conn.execute(f"SELECT {', '.join(columns)} FROM runs WHERE {_NAMED} "
                                "ORDER BY rowid"):
            run = dict(zip(columns, row, strict=True))
            yield run, conn.execute(f"SELECT {point} FROM run_metrics WHERE run_id = ? "
                                    "ORDER BY rowid", (run["run_id"],))


def _of_lines(path: str) -> Iterator[tuple[int, Any]]:
    """Read an export by the line: (line of the run, the run's columns, then its points)."""
    number, begun, run_id, n_left = 1, 0, "", 0
    try:
        with open(path, "rb") as file:
            if json.loads(next(file, "0")) != _EXPORT:
                raise ValueError("it does not begin as an export does")
            for number, text in enumerate(file, 2):
                line = json.loads(text)
                if "run" in line and n_left > 0:
                    break
                if "run" in line:
                    run = {name: _scalar(line["run"][name])
                           for name in lab_logger.RUN_COLUMNS if name in line["run"]}
                    if not isinstance(run.get("run_id"), str):
                        raise ValueError("a run without a run_id")
                    begun, run_id, n_left = number, run["run_id"], line.get("n_points", 0)
                    yield begun, run
                elif not begun:
                    raise ValueError("points before the first run")
                else:
                    n_left -= len(line["points"])
                    yield begun, [
                        (_scalar(epoch), _scalar(step), _scalar(name),
                         float(value) if value in _INFINITE else _scalar(value), _scalar(at))
                        for epoch, step, name, value, at in line["points"]]
            if n_left > 0:
                raise ValueError(f"{plural(n_left, 'point')} of {run_id!r} should be there by now")
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise LabError(f"line {number} of {path!r} is none of an export "
                       f"({getattr(error, 'msg', error)}): " + (
            "give JSON lines of `ailab export`, or a lab's database" if number < 2 else
            "the runs before it are taken in" + bool(run_id) * (
                f", but for {run_id!r}, which may be cut short"))) from error


def _scalar(value: Any) -> Any:
    """Give what a column can hold as it is; raise ValueError for all else."""
    if isinstance(value, str):
        value.encode()                   # UnicodeEncodeError is one: a lone surrogate
    if not isinstance(value, (str, int, float, type(None))) or (
            isinstance(value, int) and not FIRST_ID <= value <= LAST_ID):
        raise ValueError(f"{str(value)[:40]} in place of a number or text")
    return value


def add_odd(odd: dict[str, list[str]], run: dict) -> None:
    """Add to `odd`, by column, what is not as the columns of runs promise, and whose it is."""
    for name, (_, is_kept) in _PROMISED.items():
        if run.get(name) is not None and not is_kept(run[name]):
            odd.setdefault(name, []).append(f"{run[name]!r:.60} of {run['run_id']!r}")


def told_odd(odd: dict[str, list[str]]) -> Iterator[str]:
    """Write a sentence for each column of `odd`."""
    for name, found in odd.items():
        yield (f"{name} is not {_PROMISED[name][0]} in {plural(len(found), 'run')}, as {found[0]}")


def import_run(conn: sqlite3.Connection, run: dict, points: Iterator[tuple]) -> bool:
    """Take one run in, in one transaction; False where the lab has it, even in the trash.

    Files that it names are another machine's, as those of a run that came over HTTP. Its times
    are put into the one spelling that sorts.
    """
    run.update({name: parse_time(str(run[name])) or run[name] for name in _TIMES if run.get(name)})
    run = {name: value for name, value in run.items() if value is not None}   # for the defaults
    run["received_from"] = run.get("received_from") or run.get("hostname") or "an import"
    with lab_logger.transaction(conn):
        here = conn.execute(f"SELECT {_PURGED}, journal_offset FROM runs WHERE run_id = ?",
                            (run["run_id"],)).fetchone() or (1, 0)
        if not here[0]:
            return False
        run["journal_offset"] = here[1]          # of journals that came to this lab
        conn.execute("DELETE FROM runs WHERE run_id = ?", (run["run_id"],))
        conn.execute(f"INSERT INTO runs ({', '.join(run)}) VALUES ({', '.join('?' * len(run))})",
                     list(run.values()))
        conn.executemany(f"INSERT INTO run_metrics (run_id, {', '.join(_POINT)}) "
                         "VALUES (?, ?, ?, ?, ?, ?)", ((run["run_id"], *row) for row in points))
    return True


def index_problems(conn: sqlite3.Connection, path: str) -> list[str]:
    """Compare the index with one made anew beside the lab: a sentence for each part that is wrong.

    The lab's own stays as it is, and with a write-ahead log nobody who logs has to wait.
    """
    problems = []
    with contextlib.closing(sqlite3.connect("", isolation_level=None, uri=True)) as new:
        new.text_factory = conn.text_factory
        new.execute("ATTACH ? AS lab", (f"file:{quote(os.fsencode(path))}?mode=ro",))
        while not new.in_transaction or is_stale(new):   # the lab's: this has no such table yet
            new.rollback()
            with lab_logger.transaction(conn):
                refresh(conn)
            new.execute("BEGIN")
        lab_logger.MIGRATIONS[0](new)
        columns = ", ".join(lab_logger.RUN_COLUMNS)
        new.execute(f"INSERT INTO main.runs ({columns}) SELECT {columns} FROM lab.runs")
        for statement in _INDEX_STATEMENTS:
            new.execute(statement)
        new.execute("DROP TABLE main.run_metrics")       # from here on the name means the lab's
        refresh(new)
        for table, columns in {"metric_summary": "*", "run_params": "*", "tally WHERE n_runs": "*",
                               "run_text": f"run_id, {', '.join(_NAMES)}, text"}.items():
            right, held = (f"SELECT {columns} FROM {at}.{table}" for at in ("main", "lab"))
            lacked, wrong = (new.execute(
                f"SELECT count(*) OVER (), * FROM ({rows}) LIMIT 1").fetchone() or (0,)
                for rows in (f"{right} EXCEPT {held}", f"{held} EXCEPT {right}"))
            if example := lacked[1:3] or wrong[1:3]:
                problems.append(f"{table.split()[0]} lacks {plural(lacked[0], 'row')} and has "
                                f"{wrong[0]:,} that should not be, as of "
                                f"{' '.join(map(str, filter(None, example)))}")
    try:
        conn.execute("INSERT INTO run_search (run_search, rank) VALUES ('integrity-check', 1)")
    except sqlite3.DatabaseError as error:
        if isinstance(error, sqlite3.OperationalError):  # such as a lock
            raise
        problems.append("full-text search finds other words than the runs have")
    return problems


# --- HTTP ---------------------------------------------------------------------

@dataclass(eq=False)
class Connection:
    """A connection, the file it is of, its schema, and a reader's number of what it last saw."""
    conn: sqlite3.Connection
    file: tuple | None
    schema: tuple
    version: int = 0


def file_key(path: str) -> tuple | None:
    """Identify the file at `path`; None where there is none."""
    with contextlib.suppress(OSError):
        found = os.stat(path)
        return found.st_dev, found.st_ino
    return None


def schema_of(conn: sqlite3.Connection) -> tuple:
    """Give numbers that change with the tables, and with who may read them."""
    return conn.execute("SELECT * FROM pragma_schema_version, pragma_user_version").fetchone()


class Store:
    """A server's way to the lab: readers to borrow, and one writer behind a lock."""

    def __init__(self, path: str) -> None:
        self.path, self.lock = path, threading.RLock()
        self.writer: Connection | None = None
        self.idle: list[Connection] = []
        self.answers: dict[tuple, tuple[Any, Reply]] = {}    # with what each depends on
        self.answers_lock = threading.Lock()

    @contextlib.contextmanager
    def read(self) -> Iterator[Connection]:
        """Lend a reader for one answer, inside a transaction: all its queries see one state."""
        is_good = True
        try:
            reader = self._reader()
        except (StoreError, sqlite3.Error):
            self.close(wait_s=0)         # what is held of a broken file hinders the next try
            raise
        try:
            reader.conn.execute("BEGIN")
            try:
                yield reader
            finally:
                reader.conn.execute("COMMIT")
        except sqlite3.Error:
            is_good = False
            raise
        finally:
            if is_good and len(self.idle) < IDLE_READERS:
                self.idle.append(reader)
            else:
                reader.conn.close()

    def _open(self, mode: str, wait_s: float) -> Connection:
        conn = open_lab(self.path, mode, wait_s)
        return Connection(conn, file_key(self.path), schema_of(conn))

    def _reader(self) -> Connection:
        """Give a reader of the lab as it is now: one at hand if it still fits, else a new one."""
        with contextlib.suppress(IndexError):
            reader = self.idle.pop()
            with contextlib.suppress(sqlite3.Error):
                if reader.file == file_key(self.path) and self._catch_up(reader):
                    return reader
            reader.conn.close()
        reader = self._open("ro", READ_WAIT_S)
        self._catch_up(reader)
        return reader

    def _catch_up(self, reader: Connection) -> bool:
        """Have points that came summarised; False where another program changed the schema."""
        version = reader.conn.execute("PRAGMA data_version").fetchone()[0]
        if version == reader.version:
            return True
        if schema_of(reader.conn) != reader.schema:
            return False
        if is_stale(reader.conn):        # an old summary is better than an answer that waits
            with (contextlib.suppress(StoreError, sqlite3.Error), self.write(wait_s=0.2) as conn,
                  lab_logger.transaction(conn)):
                refresh(conn)
            version = reader.conn.execute("PRAGMA data_version").fetchone()[0]
        reader.version = 0 if is_stale(reader.conn) else version     # 0: it is tried again
        return True

    def kept(self, asked: tuple, state: Any, make: Callable[[], Reply]) -> Reply:
        """Give the answer that is kept to what was `asked` in this `state`, or make and keep it."""
        with self.answers_lock:
            known, reply = self.answers.pop(asked, (None, None))
        if reply is None or known != state:
            reply = make()
        if state is not None and len(reply.body) <= CACHED_BYTES:
            with self.answers_lock:
                while len(self.answers) >= CACHED_ANSWERS:   # the one that was unused for longest
                    del self.answers[next(iter(self.answers))]
                self.answers[asked] = state, reply
        return reply

    @contextlib.contextmanager
    def write(self, wait_s: float | None = None) -> Iterator[sqlite3.Connection]:
        """Lend the writer, which waits `wait_s` for others; a lab that is not there is not made."""
        wait_s = WRITE_WAIT_S if wait_s is None else wait_s
        if file_key(self.path) is None and not lab_logger.pending(self.path):
            raise StoreError(f"there is no lab at {self.path!r}: log a first run")
        if not self.lock.acquire(timeout=wait_s):
            raise StoreError("the lab is busy: try again in a moment")
        try:
            if (self.writer is None or self.writer.file != file_key(self.path)
                    or schema_of(self.writer.conn) != self.writer.schema):
                self._drop_writer()
                self.writer = self._open("rw", wait_s)
            self.writer.conn.execute(f"PRAGMA busy_timeout = {int(wait_s * 1000)}")
            yield self.writer.conn
        except sqlite3.Error:
            self._drop_writer()
            raise
        finally:
            self.lock.release()

    def _drop_writer(self) -> None:
        if self.writer is not None:
            self.writer.conn.close()
        self.writer = None

    def close(self, wait_s: float = 0.1) -> None:
        """Close all connections that are not lent; a writer at work ends with the process."""
        with contextlib.suppress(IndexError):
            while True:
                self.idle.pop().conn.close()
        if self.lock.acquire(timeout=wait_s):
            self._drop_writer()
            self.lock.release()


class Reply(NamedTuple):
    """What goes out: a body with its type, or `file` to stream."""
    body: bytes = b""
    status: int = 200
    content_type: str = "application/json"
    headers: Mapping[str, str] = {}
    file: Any = None
    etag: str = ""
    encoding: str = ""

    def finished(self, takes_gzip: bool) -> Reply:
        """Add the ETag, made of the body, and pack a body that is worth it."""
        reply = self._replace(etag=f'W/"{zlib.crc32(self.body):08x}{len(self.body):x}"')
        if len(self.body) <= GZIP_FROM_BYTES or not takes_gzip:
            return reply
        packer = zlib.compressobj(3, zlib.DEFLATED, 31)
        return reply._replace(body=packer.compress(self.body) + packer.flush(), encoding="gzip")


class Request(NamedTuple):
    """What an endpoint is given: path parts and parsed parameters together, and the parsed body."""
    server: LabServer
    conn: Any                            # a reader's; the writer's for PATCH and DELETE; or None
    given: dict[str, Any]
    body: Any
    pairs: list[tuple[str, str]]
    client: str                          # address it came from


def overview(request: Request) -> dict:
    """Describe the lab and who serves it; the path stays on this machine."""
    server = request.server
    return {"project": server.project, "version": lab_logger.__version__,
            "db_path": server.store.path if server.is_loopback else None,
            **lab_overview(request.conn)}


@functools.lru_cache(maxsize=CACHED_RUNS)
def _encoded(row: tuple, metrics: tuple) -> bytes:
    """Encode a run's summary: of a page that is asked for again, few runs have changed."""
    return encode(_summary(row, metrics))


def page_of_runs(request: Request) -> Reply:
    """List runs, with their number and the neighbouring pages in the headers."""
    given = request.given
    query, at, limit = query_of(request.conn, given), given["offset"], given["limit"]
    runs: list = (list_runs(request.conn, query, limit=limit, offset=at) if query.is_by_curve
                  else find_runs(request.conn, query, limit, at))
    body = encode(runs) if query.is_by_curve else b"[%b]" % b",".join(
        (_encoded if len(row[-1] or "") < CACHED_PARAMS else _encoded.__wrapped__)(row, metrics)
        for row, metrics in runs)
    is_last = len(runs) < limit and (runs or not at)
    total = at + len(runs) if is_last else count_runs(request.conn, query)
    links = [("first", 0), *([("prev", max(0, at - limit))] if at else []),
             *([("next", at + limit)] if at + limit < total else [])]
    kept = [pair for pair in request.pairs if pair[0] != "offset"]
    link = ", ".join(f'</runs?{urlencode([*kept, ("offset", offset)])}>; rel="{rel}"'
                     for rel, offset in links)
    return Reply(body, headers={"X-Total-Count": str(total), "Link": link})


def artifact(request: Request) -> Reply:
    """Send a recorded file as an attachment that runs nowhere."""
    server, given = request.server, request.given
    file, name = open_artifact(request.conn, given["run_id"], given["index"], server.store.path,
                               server.artifact_roots)
    name = quote(name.encode("utf-8", "replace"), safe="")
    return Reply(file=file, content_type="application/octet-stream", headers={
        "Content-Disposition": f"attachment; filename*=UTF-8''{name}",
        "Content-Security-Policy": "sandbox; default-src 'none'"})


def ingest(request: Request) -> dict:
    """Take in lines of a journal that a logger on another machine wrote, exactly once each."""
    conn, given, lines = request.conn, request.given, request.body
    run_id, _, part = (journal := given["journal"]).partition(".")
    if lines.count(b"\n") > MAX_LINES:    # empty ones would hold the store for most of a minute
        raise LabError(f"the body holds more than {MAX_LINES} lines: send fewer at a time", 413)
    ahead_s = time.time() - given["now"] if given["now"] else 0.0
    try:
        held, status = lab_logger.take_lines(conn, journal, given["offset"], lines[
            :lines.rfind(b"\n") + 1], request.client, ahead_s)
    except (StoreError, ValueError) as error:
        raise LabError(str(error), 409 if isinstance(error, StoreError) else 422) from error
    if given["death"] and status in ("running", "lost"):
        with lab_logger.transaction(conn):
            close_dead(conn, run_id, given["death"][:300], part)
        status = lab_logger.take_lines(conn, journal, 0, b"")[1]
    return {"journal": journal, "offset": held, "status": status}


def ask_agent(question: str, base_url: str, token: str | None = None) -> dict:
    """Put a question to the assistant over the API at `base_url`; gives an AgentAnswer dict."""
    try:
        import agent  # brings langchain: half a second that only questions pay
    except ImportError as error:
        raise LabError(f"the assistant needs a package that is missing ({error}): "
                       "pip install langchain-core langchain-ollama", 503) from error
    llm, url, model = (lab_logger.setting(key)[0]
                       for key in ("AILAB_LLM", "OLLAMA_BASE_URL", "OLLAMA_MODEL"))
    return agent.ask(question, base_url=base_url, token=token, llm=llm, ollama_base_url=url,
                     ollama_model=model).model_dump(mode="json")


def answered(request: Request) -> dict:
    """Put a question to the assistant, which speaks HTTP: to a Unix socket by way of a port."""
    server, question = request.server, request.body.query
    if not server.socket_path:
        return ask_agent(question, server.url, server.token)
    with private_server(server.store.path) as (url, token):
        return ask_agent(question, url, token)


class Route(NamedTuple):
    """An address and a method: its endpoint, parameters, body and answer."""
    method: str
    path: str                            # {name} stands for one part, {path} for the rest
    summary: str
    endpoint: Callable[[Request], Any]
    answer: Any = None                   # model of the JSON answer
    params: tuple[Param, ...] = ()
    body: Any = None                     # model of a JSON body, or bytes: journal lines
    needs: str = "read"                  # of the store: read, write, or nothing
    # What the answer depends on, to keep it for; None: files, too, decide it.
    state: Callable[[Connection, dict], Any] = lambda reader, given: (reader, reader.version)


def state_of_curves(reader: Connection, given: dict[str, Any]) -> Any:
    """Give what the curves of runs depend on: these runs' points, whatever else is logged.

    Only new points change n_points, and the rest counts in n_redone. None for what comes after a
    cursor: it is asked for once.
    """
    if given["since"]:
        return None
    if is_stale(reader.conn):
        return reader, reader.version
    ids = [resolve(reader.conn, run_id) for run_id in given.get("ids") or [given["run_id"]]]
    return ids, reader.file, reader.conn.execute(
        "SELECT n_redone, run_id, metric_name, n_points FROM summarised JOIN metric_summary "
        f"WHERE run_id IN ({', '.join('?' * len(ids))})", ids).fetchall()


ROUTES = (
    Route("GET", "/health", "Whether the server is there", lambda r: {
        "status": "ok", "project": r.server.project, "version": lab_logger.__version__},
        Health, needs=""),
    Route("GET", "/lab", "The lab at a glance", overview, Lab),
    Route("GET", "/runs", "List runs", page_of_runs, list[RunSummary], RUN_FILTERS + PAGE),
    Route("GET", "/runs/leaderboard", "Rank runs by a metric",
          lambda r: leaderboard(r.conn, r.given), list[LeaderboardRow], BOARD),
    Route("GET", "/runs/compare", "Put 2 to 20 runs side by side",
          lambda r: compare_runs(r.conn, r.given["ids"], r.given["by"]), RunComparison, COMPARED),
    Route("GET", "/runs/{run_id}", "One run, whole",
          lambda r: get_run(r.conn, r.given["run_id"]), RunDetail, state=lambda *_: None),
    Route("DELETE", "/runs/{run_id}", "Move a run to the trash",
          lambda r: delete_run(r.conn, r.given["run_id"]), Deleted, needs="write"),
    Route("GET", "/runs/{run_id}/metrics", "Curves of a run",
          lambda r: run_metrics(r.conn, [r.given["run_id"]], r.given), Curves, WINDOW,
          state=state_of_curves),
    Route("PATCH", "/runs/{run_id}/note", "Write a run's note",
          lambda r: set_note(r.conn, r.given["run_id"], r.body.note), RunDetail, (), NoteUpdate,
          needs="write"),
    Route("GET", "/runs/{run_id}/artifacts/{index}", "Download a recorded file", artifact,
          state=lambda *_: None),
    Route("GET", "/curves", "Curves of several runs",
          lambda r: run_metrics(r.conn, r.given["ids"], r.given), Curves, CURVE_RUNS + WINDOW,
          state=state_of_curves),
    Route("GET", "/experiments", "List experiments", lambda r: list_experiments(r.conn),
          list[ExperimentSummary]),
    Route("GET", "/metrics", "List metrics", lambda r: list_metrics(r.conn), list[MetricInfo]),
    Route("PATCH", "/metrics", "Set which way a metric is better",
          lambda r: set_direction(r.conn, r.body.metric_name, r.body.direction), MetricInfo, (),
          DirectionUpdate, needs="write"),
    Route("POST", "/ingest", "Take in journal lines from another machine", ingest, Held, INGESTED,
          bytes, needs="write"),
    Route("POST", "/agent/query", "Ask the assistant", answered, AgentAnswer, (), AgentQuery,
          needs=""),
    Route("GET", "/docs", "This API as a page", lambda r: docs_page(r.server.project), needs=""),
    Route("GET", "/openapi.json", "This description", lambda r: openapi(r.server.project),
          dict[str, Any], needs=""),
    Route("GET", "/", "The dashboard", lambda r: static_file("index.html"), needs=""),
    Route("GET", "/static/{path}", "A file of the dashboard",
          lambda r: static_file(r.given["path"]), needs=""))


@functools.lru_cache(maxsize=256)
def match_route(method: str, path: str,
                pairs: tuple[tuple[str, str], ...]) -> tuple[Route, dict[str, Any]]:
    """Find a request's route, its parameters and the parts of its path.

    GET /runs/ab%2Fc gives the route of /runs/{run_id} and {"run_id": "ab/c"}.
    Raises: LabError 404, 405 with Allow, or what parse_params() raises.
    """
    fits = [(route, found) for route in ROUTES if (found := _pattern(route.path).fullmatch(path))]
    if not fits:
        raise NotFound("there is nothing at this address: GET /openapi.json lists what there is")
    routes = {route.method: (route, found) for route, found in fits
              if route.path == fits[0][0].path}           # literal ones stand before /runs/{run_id}
    if method not in routes:
        allow = ", ".join("GET, HEAD" if name == "GET" else name for name in routes)
        raise LabError(f"{method} is not possible here: use {allow}", 405, Allow=allow)
    route, found = routes[method]
    try:                                 # unquoted once, so that %252e stays a name
        parts = {name: unquote(part, errors="strict") for name, part in found.groupdict().items()}
    except UnicodeDecodeError:
        raise LabError("the address is not UTF-8: percent-encode UTF-8 text") from None
    return route, {**parse_params(route.params, pairs), **parts}


@functools.lru_cache(maxsize=64)
def _pattern(template: str) -> re.Pattern[str]:
    return re.compile(re.sub(r"\\{(\w+)\\}", lambda name: (
        f"(?P<{name[1]}>{'.+' if name[1] == 'path' else '[^/]+'})"), re.escape(template)))


def openapi(project: str = "ai-lab") -> dict:
    """Describe the API as an OpenAPI 3.1 document, made from ROUTES."""
    from pydantic import TypeAdapter
    kinds = dict.fromkeys(kind for route in ROUTES for kind in (route.answer, route.body, Problem))
    shapes, schemas = TypeAdapter.json_schemas(
        [(kind, "validation", TypeAdapter(kind)) for kind in kinds],
        ref_template="#/components/schemas/{model}")
    paths: dict[str, dict] = {}
    for route in ROUTES:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(
            route, lambda kind: shapes[kind, "validation"])
    return {"openapi": "3.1.0", "paths": paths, "components": {"schemas": schemas["$defs"]},
            "info": {"title": f"{project}: AI-Lab", "version": lab_logger.__version__}}


def _operation(route: Route, shape_of: Callable[[Any], dict]) -> dict:
    names = re.findall(r"{(\w+)}", route.path)
    content = {"application/json": {"schema": shape_of(route.answer)}} if route.answer else {
        "*/*": {}}
    problem = {"application/json": {"schema": shape_of(Problem)}}
    statuses = [400, 401, 403, 404, 405, 413, 414, 422, 431, 503] + [415] * bool(route.body)
    statuses += [409] * ("run_id" in names or route.body is bytes or "ids" in str(route.params))
    operation: dict[str, Any] = {
        "operationId": "_".join([route.method.lower(), *re.findall(r"\w+", route.path)]),
        "summary": route.summary,
        "parameters": [{"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
                       for name in names] + [_parameter(param) for param in route.params],
        "responses": {"200": {"description": route.summary, "content": content},
                      "304": {"description": "Not changed since the ETag in If-None-Match"},
                      **{str(status): {"description": HTTPStatus(status).phrase, "content": problem}
                         for status in sorted(statuses)}}}
    if route.body:
        operation["requestBody"] = {"required": route.body is not bytes, "content": {
            content_type_of(route.body): {"schema": shape_of(route.body)}}}
    return operation


def content_type_of(body: Any) -> str:
    """Name the content type that a route's body is sent with."""
    return "application/x-ndjson" if body is bytes else "application/json"


def _parameter(param: Param) -> dict:
    rules: dict[str, dict[str, Any]] = {
        "integer": {"minimum": param.least, "maximum": param.most},
        "choice": {"enum": list(param.choices)}, "text": {"minLength": 1},
        "where": {"minLength": 1}, "sort": {"pattern": f"^({_SORT.pattern})$"},
        "journal": {"pattern": f"^({_JOURNAL.pattern})$"}}
    schema = {"type": param.kind if param.kind in ("integer", "number") else "string",
              **rules.get(param.kind, {})}
    if param.default is not None:
        schema["default"] = param.default
    if param.max_times > 1:
        schema = {"type": "array", "items": schema, "maxItems": param.max_times,
                  "minItems": param.min_times}
    return {"name": param.name, "in": "query", "required": param.min_times > 0, "schema": schema,
            "description": f"{param.description}; {param.accepted()}"}


def validated(model: type[BaseModel], content: Any) -> Any:
    """Give the model of a body, or raise BadQuery with one sentence."""
    try:
        return model.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"])) or "the body"
        raise BadQuery(f"{where}: {first['msg']}; accepted: an object with "
                       + ", ".join(model.model_fields)) from None


def inflated(body: bytes, encoding: str) -> bytes:
    """Undo the Content-Encoding of journal lines, and never beyond MAX_LINES_BYTES."""
    if encoding.strip().lower() in ("", "identity"):
        return body
    if encoding.strip().lower() != "gzip":
        raise LabError(f"the content encoding is {encoding[:80]!r}: send gzip, or none", 415)
    lines, unpacker = b"", zlib.decompressobj(31)
    with contextlib.suppress(zlib.error):
        lines = unpacker.decompress(body, MAX_LINES_BYTES + 1)
    if len(lines) > MAX_LINES_BYTES:
        raise LabError(f"the body holds more than {MAX_LINES_BYTES} bytes of lines: send fewer at "
                       "a time", 413)
    if not unpacker.eof or unpacker.unused_data:
        raise BadQuery("the body is not one whole gzip stream")
    return lines


_REQUEST_LINE = re.compile(rb"([A-Za-z]{1,20}) (/[!-~]*) HTTP/1\.([01])\r\n")
_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(:\d{1,5})?")
_TOKEN = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
_TAKES_GZIP = re.compile(r"\bgzip\b(?!\s*;\s*q=0(\.0*)?\s*(,|$))")
_ONCE = frozenset({"host", "content-length", "content-type", "origin", "authorization"})
_SAFE = ("X-Content-Type-Options: nosniff\r\nCross-Origin-Resource-Policy: same-origin\r\n"
         "Referrer-Policy: no-referrer")
_PHRASES = {status.value: status.phrase for status in HTTPStatus}
_http_date = functools.lru_cache(maxsize=2)(format_date_time)
_API_POLICY = {"Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'"}


class Handler(StreamRequestHandler):
    """One connection: read a request, guard, dispatch, reply with one write, until it is closed."""
    server: LabServer
    timeout = IDLE_S
    fields: dict[str, str]

    def setup(self) -> None:
        super().setup()
        if not self.server.socket_path:  # else headers and body wait 40 ms for each other
            self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)

    def handle(self) -> None:
        self.close_connection = False
        while not self.close_connection:
            self.handle_one_request()

    def handle_one_request(self) -> None:
        self.close_connection, self.is_body_read, self.command = True, False, ""
        self.server.reading[self] = time.monotonic() + ASKED_S
        try:
            if not self.read_head():
                return
            self.server.answering.add(self)
            self.reply(self.answer())
        except LabError as error:
            self.refuse(error)
        except OSError:                  # gone, or silent for too long
            self.close_connection = True
        except Exception:  # noqa: BLE001  the outer edge: ours, and no word of it goes out
            traceback.print_exc()
            self.close_connection = True
            self.refuse(LabError("the server failed at this: its terminal says why", 500))
        finally:
            self.server.reading.pop(self, None)
            self.server.answering.discard(self)

    def read_head(self) -> bool:
        """Read the request line and headers, strictly: what is ambiguous could hide a request.

        Sets command, path and `fields` (lower-case names). False at the end of the connection.
        """
        line = self.rfile.readline(MAX_URL_BYTES + 2)
        if not line:
            return False
        self.requestline, self.fields = line.decode("latin-1").rstrip("\r\n"), {}
        if len(line) > MAX_URL_BYTES:
            raise LabError(f"the address is too long: at most {MAX_URL_BYTES} bytes", 414)
        found = _REQUEST_LINE.fullmatch(line)
        if not found:
            raise LabError("this is not an HTTP/1.1 request line with a path")
        self.command, self.path = found[1].decode(), found[2].decode()
        n_bytes = 0
        while (line := self.rfile.readline(MAX_HEADER_BYTES + 2)) != b"\r\n":
            n_bytes += len(line)
            if n_bytes > MAX_HEADER_BYTES or len(self.fields) >= MAX_HEADERS:
                raise LabError(f"the headers are too long: at most {MAX_HEADERS}, "
                               f"{MAX_HEADER_BYTES} bytes", 431)
            name, colon, value = line.partition(b":")
            value = value.strip(b" \t\r\n")
            key = name.decode("latin-1").lower()
            if (not line.endswith(b"\r\n") or not colon or not _TOKEN.fullmatch(name)
                    or b"\0" in value or b"\r" in value):   # nor "\n", which ends a line
                raise LabError("a header is malformed: send Name: value lines")
            if key in self.fields and key in _ONCE:
                raise LabError(f"the header {key} is given twice")
            before = f"{self.fields[key]}, " if key in self.fields else ""
            self.fields[key] = before + value.decode("latin-1")
        asked = self.fields.get("connection", "").lower()
        self.close_connection = "close" in asked or (found[3] == b"0" and "keep-alive" not in asked)
        return True

    def answer(self) -> Reply:
        """Guard, dispatch, and turn what the endpoint gives into a reply."""
        is_large = self.body_length() > 1 << 16          # it is read once its sender is let in
        body = b"" if is_large else self.read_body(MAX_BODY_BYTES)
        self.guard()
        path, _, query = self.path.partition("?")
        try:
            pairs = parse_qsl(query, keep_blank_values=True, errors="strict", max_num_fields=500)
        except ValueError:               # UnicodeDecodeError is one
            raise BadQuery("the query is not UTF-8, or has more than 500 parameters: "
                           "percent-encode UTF-8 text") from None
        if (entered := self.enter(path, pairs)) is not None:
            return entered
        method = "GET" if self.command == "HEAD" else self.command
        route, given = match_route(method, path, tuple(pairs))
        if is_large:
            body = self.read_body(MAX_LINES_BYTES if route.body is bytes else MAX_BODY_BYTES)
        self.server.reading.pop(self, None)
        parsed = self.parse_body(route.body, body) if route.body else None
        return self.made(route, Request(self.server, None, {**given}, parsed, pairs,
                                        self.client_address[0]))

    def made(self, route: Route, request: Request) -> Reply:
        """Have an answer made with what it needs of the store, or take the one made before."""
        takes_gzip = bool(_TAKES_GZIP.search(self.fields.get("accept-encoding", "")))

        def make(conn: sqlite3.Connection | None) -> Reply:
            made = route.endpoint(request._replace(conn=conn))
            reply = made if isinstance(made, Reply) else Reply(encode(made))
            return reply.finished(takes_gzip)

        try:
            if route.needs == "write":
                with self.server.store.write() as conn:
                    return make(conn)
            if not route.needs:
                return make(None)
            with self.server.store.read() as reader:
                return self.server.store.kept(
                    (self.path, takes_gzip), route.state(reader, request.given),
                    lambda: make(reader.conn))
        except (StoreError, sqlite3.Error) as error:
            raise self.server.store_problem(error) from error

    def body_length(self) -> int:
        """Read how long the body is."""
        if "transfer-encoding" in self.fields:
            raise LabError("Transfer-Encoding is not accepted: send a Content-Length")
        length = self.fields.get("content-length")
        if length is None:
            if self.command in ("POST", "PATCH", "PUT"):
                raise LabError(f"{self.command} needs a Content-Length")
            return 0
        if not re.fullmatch(r"\d{1,18}", length, re.ASCII):
            raise LabError(f"Content-Length {length[:40]!r} is not a number of bytes")
        return int(length)

    def read_body(self, most: int) -> bytes:
        """Read the body to its end, so that it can never be taken for the next request."""
        length = self.body_length()
        if length > most:
            raise LabError(f"the body has {length} bytes: at most {most} are accepted", 413)
        if self.fields.get("expect", "").lower() == "100-continue":
            self.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        body = self.rfile.read(length)
        if len(body) < length:
            raise ConnectionError("the connection ended inside a body")
        self.is_body_read = True
        return body

    def guard(self) -> None:
        """Refuse what another site sends, its name rebound to this machine or not."""
        fields, host = self.fields, self.fields.get("host", "")
        found = _HOST.fullmatch(host.lower())
        if not found:
            raise LabError("the Host header is missing or malformed: name the server's host")
        if self.server.is_loopback and found[1] not in self.server.hosts:
            raise LabError(f"the host {host[:80]!r} is not this lab's: use localhost or 127.0.0.1",
                           403)
        origin, site = fields.get("origin"), fields.get("sec-fetch-site")
        own = (f"http://{host.lower()}", f"https://{host.lower()}")
        if origin is not None and origin.lower() not in own:
            raise LabError(f"requests from {origin[:80]!r} are not accepted: open the lab's own "
                           "page", 403)
        is_link = self.command in ("GET", "HEAD") and fields.get("sec-fetch-mode") == "navigate"
        if site not in (None, "same-origin", "none") and not is_link:
            raise LabError("requests from other sites are not accepted: open the lab's own page",
                           403)

    def enter(self, path: str, pairs: list[tuple[str, str]]) -> Reply | None:
        """Ask for the token, if there is one; one that came in the address moves into a cookie."""
        token, cookie = self.server.token, f"ailab_{self.server.server_port}"
        if token is None:
            return None
        shown = dict(pairs).get("token", "")
        pairs[:] = [pair for pair in pairs if pair[0] != "token"]
        scheme, _, bearer = self.fields.get("authorization", "").partition(" ")
        cookies = dict(part.strip().partition("=")[::2]     # a regex takes seconds to search 32 KB
                       for part in self.fields.get("cookie", "").split(";"))
        if _is_same(unquote(cookies.get(cookie, "")), token) or (
                scheme.lower() == "bearer" and _is_same(bearer.strip(), token)):
            return None
        if self.command in ("GET", "HEAD") and _is_same(shown, token):
            rest = "?" + urlencode(pairs) if pairs else ""
            return Reply(status=303, headers={
                "Location": "/" + path.lstrip("/\\") + rest,     # never //another.host
                "Set-Cookie": f"{cookie}={quote(token, safe='')}; Path=/; HttpOnly; "
                              "SameSite=Strict"})
        raise LabError("the lab needs its token: open what `ailab serve` printed, set AILAB_TOKEN, "
                       "or send Authorization: Bearer TOKEN", 401, **{"WWW-Authenticate": "Bearer"})

    def parse_body(self, model: Any, body: bytes) -> Any:
        kind = self.fields.get("content-type", "").partition(";")[0].strip().lower()
        if kind != content_type_of(model):
            raise LabError(f"the content type is {kind[:80]!r}: send {content_type_of(model)}", 415)
        if model is bytes:
            return inflated(body, self.fields.get("content-encoding", ""))
        try:
            content = json.loads(body.decode())
        except (ValueError, RecursionError):
            raise LabError("the body is not JSON: send an object such as "
                           f'{{"{next(iter(model.model_fields))}": "text"}}') from None
        return validated(model, content)

    def refuse(self, error: LabError) -> None:
        if not self.is_body_read:
            self.close_connection = True
        problem = {"detail": error.detail, **({"column": error.column} if error.column else {})}
        try:
            self.reply(Reply(encode(problem), error.status, headers=error.headers))
        except OSError:                  # gone
            self.close_connection = True
        if not self.is_body_read:
            self.linger()

    def linger(self) -> None:
        """Let a refused body run out for a moment: closing on it would wipe the refusal away."""
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)
            self.connection.settimeout(0.5)
            for _ in range(256):
                if not self.connection.recv(1 << 16):
                    break

    def reply(self, reply: Reply) -> None:
        """Send a reply: headers and body in one write."""
        status, is_json = reply.status, reply.content_type == "application/json"
        headers = {**reply.headers, **(_API_POLICY if is_json else {})}
        if status == 200 and reply.file is None and self.command in ("GET", "HEAD"):
            headers |= {"ETag": reply.etag, "Cache-Control": "no-cache", "Vary": "Accept-Encoding"}
            asked = self.fields.get("if-none-match", "")
            if asked == "*" or reply.etag[2:] in asked:
                status, reply = 304, reply._replace(body=b"", encoding="")
        elif status != 200 or is_json:
            headers["Cache-Control"] = "no-store"
        if reply.encoding:
            headers["Content-Encoding"] = reply.encoding
        size = len(reply.body) if reply.file is None else os.fstat(reply.file.fileno()).st_size
        if status != 304:
            headers |= {"Content-Type": reply.content_type, "Content-Length": str(size)}
        if self.close_connection:
            headers["Connection"] = "close"
        head = [f"HTTP/1.1 {status} {_PHRASES[status]}", f"Date: {_http_date(int(time.time()))}",
                _SAFE, *[f"{name}: {value}" for name, value in headers.items()]]
        self.log_request(status, size)
        start = ("\r\n".join(head) + "\r\n\r\n").encode("latin-1", "replace")
        self.wfile.write(start if self.command == "HEAD" else start + reply.body)
        if reply.file is not None:
            self.stream(reply.file, size)

    def stream(self, file: Any, size: int) -> None:
        with file:
            while size and self.command != "HEAD":
                chunk = file.read(min(size, 1 << 18))
                if not chunk:            # it shrank: the client must not wait for the rest
                    self.close_connection = True
                    return
                self.wfile.write(chunk)
                size -= len(chunk)

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        if self.server.is_verbose:
            line = "".join(c if " " <= c <= "~" else f"\\x{ord(c):02x}" for c in self.requestline)
            line = re.sub(r"([?&]token=)[^& ]*", r"\1***", line)
            sys.stderr.write(
                f"{self.client_address[0]} [{lab_logger.utc(time.time())}] {line} {code} {size}\n")


def _is_same(offered: str, token: str) -> bool:
    return hmac.compare_digest(offered.encode(), token.encode())     # in constant time


class LabServer(ThreadingTCPServer):
    """A lab's server, a thread a connection; while it serves, it takes in what killed runs left."""
    daemon_threads = allow_reuse_address = True
    request_queue_size = 256
    project: str
    token: str | None

    def __init__(self, address: tuple[str, int], store: Store, project: str, token: str | None,
                 is_verbose: bool, socket_path: str | None = None) -> None:
        self.store, self.project, self.token, self.is_verbose = store, project, token, is_verbose
        self.is_loopback, self.socket_path = is_loopback(address[0]), socket_path
        self.own_socket: tuple | None = None     # once it is bound
        self.hosts = {"localhost", "127.0.0.1", "[::1]", address[0].lower(),
                      f"[{address[0].lower()}]"}
        roots = lab_logger.setting("AILAB_ARTIFACT_ROOTS")[0]
        self.artifact_roots = list(filter(None, roots.split(os.pathsep)))
        self.answering: set[Handler] = set()
        self.reading: dict[Handler, float] = {}      # requests that are coming: until when
        self.slots = threading.BoundedSemaphore(MAX_CONNECTIONS)
        self.is_over = threading.Event()
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        if socket_path:
            self.address_family = socket.AF_UNIX
        super().__init__(address, Handler)

    def server_bind(self) -> None:
        if self.socket_path:
            return self._bind_socket(self.socket_path)
        super().server_bind()
        self.server_port = self.server_address[1]

    def _bind_socket(self, path: str) -> None:
        """Bind a Unix socket that is the user's alone, in place of one that nobody serves."""
        with socket.socket(socket.AF_UNIX) as probe, contextlib.suppress(
                FileNotFoundError, ConnectionRefusedError):
            probe.settimeout(1.0)        # one that is too busy to answer is alive
            probe.connect(path)
            raise LabError(f"a server is at {path!r} already: stop it, or give another --socket")
        if os.path.lexists(path) and not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise LabError(f"{path!r} is no socket: give another --socket")
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        self.socket.bind(path)
        os.chmod(path, 0o600)                    # nobody can connect before listen()
        self.server_port, self.own_socket = 0, file_key(path)

    def get_request(self) -> tuple[socket.socket, Any]:
        request, address = super().get_request()
        return request, ("local", 0) if self.socket_path else address

    @property
    def url(self) -> str:
        """The address that a program on this machine reaches it at."""
        host = str(self.server_address[0])
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
        return f"http://{f'[{host}]' if ':' in host else host}:{self.server_port}"

    def serve_forever(self, poll_interval: float = 0.2) -> None:
        self.is_over.clear()
        tidier = threading.Thread(target=self._keep_tidy, name="ailab-tidy", daemon=True)
        tidier.start()
        try:
            super().serve_forever(poll_interval)
        finally:
            self.is_over.set()

    def service_actions(self) -> None:
        """End connections whose request has not come whole in its time, several times a second."""
        now = time.monotonic()
        for late in [handler for handler, until in self.reading.copy().items() if now > until]:
            with contextlib.suppress(OSError):       # its thread finds the connection ended
                late.connection.shutdown(socket.SHUT_RDWR)

    def _keep_tidy(self) -> None:
        while not self.is_over.wait(TIDY_EVERY_S):
            with (contextlib.suppress(StoreError, sqlite3.Error, OSError),  # requests say it too
                  self.store.write() as conn):
                take_in(conn, self.store.path)

    def process_request(self, request: Any, client_address: Any) -> None:
        if self.slots.acquire(blocking=False):
            try:
                return super().process_request(request, client_address)
            except RuntimeError:                 # the system has no thread to give
                self.slots.release()
        self.turn_away(request)

    def turn_away(self, request: Any) -> None:
        """Answer 503 on a connection that gets no thread, without waiting for its request."""
        body = encode({"detail": "too many connections are open: try again later"})
        head = ("HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\n"
                f"Connection: close\r\nContent-Length: {len(body)}\r\n\r\n")
        with contextlib.suppress(OSError):
            request.settimeout(0.1)
            request.sendall(head.encode() + body)
        self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.slots.release()

    def store_problem(self, error: Exception) -> LabError:
        """Turn what the store says into a 503, which names no folder."""
        path = self.store.path
        return LabError(store_trouble(error, path, os.path.basename(path)), 503)

    def server_close(self) -> None:
        self.is_over.set()
        super().server_close()
        until = time.monotonic() + STOP_WAIT_S
        while self.answering and time.monotonic() < until:
            time.sleep(0.01)
        if self.socket_path and self.own_socket and file_key(self.socket_path) == self.own_socket:
            os.unlink(self.socket_path)          # and never that of a server that took its place
        self.store.close()


def is_loopback(host: str) -> bool:
    """Tell whether only this machine can reach an address."""
    return host in ("localhost", "::1") or re.fullmatch(r"127(\.\d{1,3}){3}", host) is not None


def make_server(db_path: str, host: str = "127.0.0.1", port: int = 0, *, token: str | None = None,
                project: str | None = None, is_verbose: bool = False,
                socket_path: str | None = None) -> LabServer:
    """Make a server that is bound and not yet running; `server_address` is the real one.

    A lab that cannot be opened is no reason to fail: its requests answer 503 until it can be.
    With `socket_path` it is bound to that Unix socket alone, and to no port.
    Raises: LabError beyond loopback without a token; OSError where the address cannot be bound.
    """
    if not is_loopback(host) and not token:
        raise LabError(f"{host!r} can be reached by others: give a token (--token or AILAB_TOKEN)")
    if not re.fullmatch(r"[!-~]*", token or ""):
        raise LabError("the token has characters that no header carries: give letters, digits and "
                       "signs of ASCII, without a space")
    path = os.path.abspath(db_path)
    with contextlib.suppress(StoreError, sqlite3.Error):
        open_lab(path, timeout_s=READ_WAIT_S).close()
    project = project or lab_logger.setting("PROJECT_NAME", "ai-lab")[0]
    return LabServer((host, port), Store(path), project, token, is_verbose, socket_path)


# --- Static files -------------------------------------------------------------

STATIC_TYPES = {kind: f"text/{name}; charset=utf-8" for kind, name in {
    "html": "html", "js": "javascript", "css": "css"}.items()}
_PAGE_POLICY = {"Content-Security-Policy":
                "default-src 'self'; img-src 'self' blob: data:; base-uri 'none'; "
                "form-action 'self'; frame-ancestors 'none'; object-src 'none'"}


def static_dir() -> str:
    """Find the dashboard's files: `static` beside this file, or `ailab_static` once installed."""
    here = os.path.dirname(os.path.abspath(__file__))
    installed = os.path.join(here, "ailab_static")
    return installed if os.path.isdir(installed) else os.path.join(here, "static")


def static_file(name: str) -> Reply:
    """Give a file of the dashboard; the same 404 for what is missing and what is outside."""
    root = os.path.realpath(static_dir())
    content_type = STATIC_TYPES.get(name.rpartition(".")[2])
    with contextlib.suppress(OSError, ValueError):       # a name too long, or with a NUL
        full = os.path.realpath(os.path.join(root, name))
        if (content_type and full.startswith(root + os.sep) and os.path.isfile(full)
                and not any(part.startswith(".") for part in name.split("/"))):
            with open(full, "rb") as file:
                return Reply(file.read(), content_type=content_type, headers=_PAGE_POLICY)
    raise NotFound("the dashboard has no such file")


def shape_link(schema: dict) -> str:
    """Tell a JSON schema in one line of HTML; a model is a link to its fields."""
    from html import escape
    if ref := schema.get("$ref"):
        name = ref.rpartition("/")[2]
        return f'<a href="#{name}">{name}</a>'
    if kinds := schema.get("anyOf"):
        return " or ".join(map(shape_link, kinds))
    if choices := schema.get("enum"):
        return escape(", ".join(map(str, choices)))
    inner = schema.get("items") or schema.get("additionalProperties")
    kind = escape(str(schema.get("type", "anything")))
    return f"{kind} of {shape_link(inner)}" if isinstance(inner, dict) else kind


def docs_page(project: str) -> Reply:
    """Show the OpenAPI document as a page, which needs no script and nothing from elsewhere."""
    from html import escape
    document = openapi(project)

    def table(rows: list[tuple[str, dict, str]]) -> str:
        return "<table>" + "".join(
            f"<tr><th scope=row><code>{escape(name)}</code><td>{shape_link(schema)}"
            f"<td>{escape(about)}" for name, schema, about in rows) + "</table>"

    parts = [f"<h1>{escape(document['info']['title'])}</h1><p>JSON over HTTP; for programs: "
             '<a href="/openapi.json">/openapi.json</a>. Errors: <a href="#Problem">Problem</a>.']
    for path, methods in document["paths"].items():
        for method, found in methods.items():
            parts.append(f"<h2><code>{method.upper()} {escape(path)}</code></h2>"
                         f"<p>{escape(found['summary'])}")
            for what, content in (("Body", found.get("requestBody", {}).get("content", {})),
                                  ("Answer", found["responses"]["200"]["content"])):
                parts += [f"<p>{what}: {shape_link(shape['schema'])}"
                          for shape in content.values() if shape.get("schema")]
            parts.append(table([(param["name"], param["schema"], param.get("description", ""))
                                for param in found["parameters"]]))
    for name, schema in document["components"]["schemas"].items():
        parts += [f'<h2 id="{name}">{name}</h2><p>{escape(schema.get("description", ""))}',
                  table([(field, shape, shape.get("description", ""))
                         for field, shape in schema.get("properties", {}).items()])]
    page = ('<!doctype html><html lang="en"><meta charset="utf-8"><title>AI-Lab API</title>'
            '<meta name="viewport" content="width=device-width"><link rel="icon" href="data:,">'
            '<link rel="stylesheet" href="/static/style.css">'
            f'<main class="lab-docs">{"".join(parts)}</main></html>')
    return Reply(page.encode(), content_type=STATIC_TYPES["html"], headers=_PAGE_POLICY)


# --- Command line -------------------------------------------------------------

COLOURS = {"running": "36", "finished": "32", "failed": "31", "killed": "33",
           "ok": "32", "warn": "33", "fail": "31"}


def clean(value: Any) -> str:
    """Make one line of text that a terminal takes for text: control characters are written out."""
    return "".join(c if c.isprintable() else " " if c in "\n\t" else repr(c)[1:-1]
                   for c in str(value))


def cell(value: Any) -> str:
    """Write a value for a table: numbers with 4 significant digits, nothing for None."""
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else clean(value)


def painted(text: str, code: str | None) -> str:
    """Colour a text, on a terminal that does not say NO_COLOR."""
    is_plain = code is None or os.environ.get("NO_COLOR") or not sys.stdout.isatty()
    return text if is_plain else f"\x1b[{code}m{text}\x1b[0m"


def print_table(heads: list[str], rows: list[list[Any]]) -> None:
    """Print a table that fits the terminal: long texts are cut, then last columns left out."""
    import shutil
    cells = [[clean(head) for head in heads], *([cell(value) for value in row] for row in rows)]
    is_number = [all(isinstance(row[i], (int, float, type(None))) or row[i] == "NaN"
                     for row in rows) for i in range(len(heads))]
    room = shutil.get_terminal_size((120, 24)).columns
    widths = [max(len(line[i]) for line in cells) for i in range(len(heads))]
    while sum(widths) + 2 * (len(widths) - 1) > room:
        texts = [i for i in range(1, len(widths)) if not is_number[i] and widths[i] > 9]
        if texts:
            widths[max(texts, key=widths.__getitem__)] -= 1
        elif len(widths) > 1:
            widths.pop()
        else:
            widths[0] = room
    for at, line in enumerate(cells):
        shown = [text if len(text) <= width else text[:width - 1] + "…"
                 for text, width in zip(line, widths, strict=False)]
        padded = [text.rjust(width) if is_number[i] else text.ljust(width)
                  for i, (text, width) in enumerate(zip(shown, widths, strict=True))]
        print("  ".join(painted(text, "1" if at == 0 else COLOURS.get(text.strip()))
                        for text in padded).rstrip())
    if len(widths) < len(heads):
        print(f"({plural(len(heads) - len(widths), 'column')} more in a wider terminal)"[:room])


def read_verb(verb: Callable[[sqlite3.Connection, argparse.Namespace], Iterator[Any]],
              mode: str = "ro") -> Callable[[argparse.Namespace], int]:
    """Make a verb of a generator that gives what the API answers, then prints it for people."""
    @functools.wraps(verb)
    def run(args: argparse.Namespace) -> int:
        with contextlib.closing(open_store(args.db, mode)) as conn:
            steps = verb(conn, args)
            answer = next(steps)
            if args.json:
                print_json(answer)
            else:
                next(steps, None)
        return 0
    return run


write_verb = functools.partial(read_verb, mode="rw")


def print_json(answer: Any) -> None:
    """Print what the API answers, byte for byte."""
    text = encode(answer).decode()
    print(text if sys.stdout.encoding.lower() in ("utf-8", "utf8")
          else json.dumps(json.loads(text)))


def pairs_of(args: argparse.Namespace, params: tuple[Param, ...]) -> list[tuple[str, str]]:
    """Write flags as the request parameters they stand for."""
    given = [(param.name, getattr(args, param.name, None)) for param in params]
    return [(name, text) for name, value in given if value is not None
            for text in (value if isinstance(value, list) else [value])]


def short(run_id: str, runs: list[dict]) -> str:
    """Cut a run id to what tells it from the other runs of a table, at least 8 characters."""
    n = 8
    while len({(run["run_id"] or "")[:n] for run in runs}) < len(runs) and n < 36:
        n += 1
    return (run_id or "")[:n]            # SQLite lets a text primary key be NULL


def print_runs(runs: list[dict], lead: tuple[str, ...] = ()) -> None:
    """Print runs as a table with their commonest metrics; `lead` names keys to show first."""
    from collections import Counter
    counted = Counter(name for run in runs for name in run["final_metrics"])
    shown = {run.get("metric_name") for run in runs}
    names = [name for name, _ in counted.most_common(3) if name not in shown]
    why = [run["end_reason"] if run["status"] in ("failed", "killed") else None for run in runs]
    print_table(["run", *lead, "started", "status", "experiment", "model", *names,
                 *["why"] * any(why), "note"], [
        [short(run["run_id"], runs), *(run[key] for key in lead),
         (run["timestamp"] or "")[:16].replace("T", " "), run["status"], run["experiment_name"],
         run["model_name"], *(run["final_metrics"].get(name) for name in names),
         *[reason] * any(why), run["note"]] for run, reason in zip(runs, why, strict=True)])


@read_verb
def cmd_runs(conn: sqlite3.Connection, args: argparse.Namespace) -> Iterator[Any]:
    """List runs, newest first; the filters are the API's."""
    given = parse_params(RUN_FILTERS + PAGE, pairs_of(args, RUN_FILTERS + PAGE))
    query = query_of(conn, given)
    yield (runs := list_runs(conn, query, limit=given["limit"], offset=given["offset"]))
    if runs:
        lead = ("metric_value", "metric_epoch") if "ranked" in runs[0] else ()
        print_runs([{**run, **dict.fromkeys(lead), **(run.get("ranked") or {})} for run in runs],
                   lead)
        print(f"{len(runs):,} of {plural(count_runs(conn, query))}")
    elif n_runs := count_runs(conn, RunQuery()):
        print(f"no run matches; the lab has {plural(n_runs)}")
    else:
        print("no runs yet: decorate a training function with @log_run of lab_logger.py, "
              "or see `ailab demo`")


@read_verb
def cmd_show(conn: sqlite3.Connection, args: argparse.Namespace) -> Iterator[Any]:
    """Show one run: params, metrics, artifacts, note, how it ended."""
    yield (run := get_run(conn, args.run))
    error = (run["error"] or "").rstrip().splitlines()
    print(painted(clean(run["run_id"]), "1"))
    for name, text in {
            "status": run["status"], "end_reason": run["end_reason"] or "".join(error[-1:]),
            **{name: run[name] for name in ("note", "experiment_name", "model_name", "task_name",
                                            "dataset_id", "timestamp")},
            "duration": run["duration_s"] is not None and f"{run['duration_s']:.1f} s",
            "resumed": "; ".join(
                f"{told['at']} on {told['hostname']}" + "".join(
                    f", {name} {value!r}" for name, value in flatten(told["params"] or {}).items()
                    if flatten(run["params"]).get(name) != value)
                for told in run["resumptions"]),
            "machine": machine_use(conn, run["run_id"]),
            **{name: run[name] for name in ("hostname", "received_from", "cwd", "command",
                                            "git_hash")}}.items():
        if text:
            print(f"  {name:<16} {painted(clean(text), COLOURS.get(text))}")
    print("params")
    for name, value in flatten(run["params"]).items():
        text = value if isinstance(value, str) else encode(value).decode()
        print(f"  {clean(name):<16} {clean(text)}")
    print("metrics")
    print_table(["", "final", "best", "at epoch", "points"], [
        [metric["metric_name"], metric["value"], *best_point(metric), metric["n_points"]]
        for metric in run["metrics"] if not metric["metric_name"].startswith("system/")])
    print("artifacts")
    for file in run["artifact_files"]:
        size = plural(file["size_bytes"], "byte") if file["exists"] else absent(run)
        print(f"  {clean(file['path'])} ({size})")
    for line in ["traceback"] * bool(error) + error:
        print(clean(line))


def absent(run: dict) -> str:
    """Say why a run's file is not there: it was never looked for where the run came from afar."""
    return clean(f"not on this machine: the run is from {run['received_from']}"
                 if run["received_from"] else "missing")


def best_point(metric: dict) -> tuple[Any, Any]:
    """Give a MetricSummary's best logged value, and the epoch, or else step, it came at."""
    end = _END[metric["direction"]]
    epoch = metric[f"{end}_epoch"]
    return metric[f"{end}_value"], metric[f"{end}_step"] if epoch is None else epoch


@read_verb
def cmd_compare(conn: sqlite3.Connection, args: argparse.Namespace) -> Iterator[Any]:
    """Compare runs: params that differ, metrics, the best marked by *."""
    given = parse_params(COMPARED, pairs_of(args, COMPARED))
    yield (found := compare_runs(conn, given["ids"], given["by"]))
    runs = found["runs"]
    rows: list[list[Any]] = [["ended", *(run["end_reason"] or run["status"] for run in runs)]]
    for name in found["metric_keys"]:
        best = found["best"].get(name, {}).get("run_ids", ())
        rows.append([name, *(cell(run["final_metrics"].get(name)) + " *" * (run["run_id"] in best)
                             for run in runs)])
    params = [flatten(run["params"]) for run in runs]
    rows += [[name, *(cell(flat.get(name)) for flat in params)]
             for name in found["differing_params"]]
    print_table(["", *(short(run["run_id"], runs) for run in runs)], rows)
    if found["differing_packages"]:
        print(f"packages that differ: {clean(', '.join(found['differing_packages']))}")


@read_verb
def cmd_leaderboard(conn: sqlite3.Connection, args: argparse.Namespace) -> Iterator[Any]:
    """Rank runs by a metric."""
    given = parse_params(BOARD, pairs_of(args, BOARD))
    yield (runs := leaderboard(conn, given))
    if runs:
        print(f"{clean(given['metric_name'])} (better: {runs[0]['direction']})")
        print_runs(runs, ("rank", "metric_value", *["metric_epoch"] * (given["by"] != "final")))
    else:
        print("no run matches")


@read_verb
def cmd_metrics(conn: sqlite3.Connection, args: argparse.Namespace) -> Iterator[Any]:
    """Print a run's curves, a line for each epoch, and its metrics_*.csv files."""
    given = parse_params(WINDOW, pairs_of(args, WINDOW))
    yield (found := run_metrics(conn, [args.run], given))
    table: dict[Any, dict] = {}
    for curve in found["curves"]:
        odd = {mark["x"]: mark["value"] for mark in curve["nonfinite"]}
        for x, value in zip(curve["x"], curve["last"], strict=True):
            table.setdefault(x, {})[curve["metric_name"]] = odd.get(x) if value is None else value
    names = [curve["metric_name"] for curve in found["curves"]]
    if given.get("names") and not table:
        raise NotFound(f"run {args.run!r} has no point of {', '.join(map(repr, names))}: "
                       "show lists its metrics")
    is_time = found["x"] == "time"
    print_table([found["x"], *names], [
        [lab_logger.utc(x) if is_time else x, *(row.get(name) for name in names)]
        for x, row in sorted(table.items())])
    for file in (run := get_run(conn, args.run))["artifact_files"]:
        if file["kind"] == "csv" and "metrics_" in file["path"]:
            print(clean(file["path"]) + ("" if file["exists"] else f" ({absent(run)})"))


@write_verb
def cmd_note(conn: sqlite3.Connection, args: argparse.Namespace) -> Iterator[Any]:
    """Write a run's note."""
    if (args.text is None) != args.clear:
        args.parser.error("give the note's text, or --clear")
    text = validated(NoteUpdate, {"note": args.text}).note
    yield (run := set_note(conn, args.run, text))
    print(f"{clean(run['run_id'])}: " + ("note taken away" if text is None else clean(text)))


@write_verb
def cmd_direction(conn: sqlite3.Connection, args: argparse.Namespace) -> Iterator[Any]:
    """Set which way a metric is better."""
    way = None if args.way == "auto" else args.way
    yield (told := set_direction(conn, args.metric_name, way))
    print(f"{clean(told['metric_name'])}: {told['direction']}")


def cmd_delete(args: argparse.Namespace) -> int:
    """Move runs to the trash, from where `restore` brings them back."""
    with contextlib.closing(open_store(args.db, "rw")) as conn:
        for run_id in [resolve(conn, run_id) for run_id in args.runs]:
            gone = delete_run(conn, run_id)
            if args.json:
                print_json(gone)
            else:
                print(f"{clean(run_id)} is in the trash; "
                      f"`ailab restore {clean(run_id)}` brings it back")
    return 0


def cmd_restore(args: argparse.Namespace) -> int:
    """Bring runs back from the trash."""
    with contextlib.closing(open_store(args.db, "rw")) as conn:
        for run_id in args.runs:
            print(f"{clean(restore_run(conn, run_id))} is back")
    return 0


def cmd_purge(args: argparse.Namespace) -> int:
    """Remove runs of the trash for good: those given, or all; artifact files are never touched."""
    with contextlib.closing(open_store(args.db, "rw")) as conn:
        ids = [resolve(conn, run_id, is_trash=True) for run_id in args.runs]
        chosen = [run for run in trash(conn) if run["run_id"] in ids or not ids]
        if args.json:
            print_json(chosen)
        elif chosen:
            print_table(["run", "started", "experiment", "in the trash since"], [
                [run["run_id"], run["timestamp"], run["experiment_name"], run["deleted_at"]]
                for run in chosen])
        if not args.yes and chosen:
            print(f"ailab: {plural(len(chosen))} would go for good: give --yes", file=sys.stderr)
            return 1
        n_points = sum(purge_run(conn, args.db, run["run_id"]) for run in chosen)
        print(f"gone for good: {plural(len(chosen))}, {plural(n_points, 'point')}" if chosen
              else "the trash is empty", file=sys.stderr)
        compact(conn)
    return 0


def cmd_export(args: argparse.Namespace) -> int:
    """Write runs to a file: CSV as lists show them, JSON lines whole, or a copy of the database."""
    import csv
    pairs = pairs_of(args, RUN_FILTERS)
    if os.path.realpath(args.output) in own_files(args.db):
        raise LabError(f"{args.output!r} is the lab itself: name another file")
    kind = args.format or os.path.splitext(args.output)[1][1:]
    if kind not in EXPORT_FORMATS:
        args.parser.error(f"give --format, one of {', '.join(EXPORT_FORMATS)}, or a file so named")
    if kind == "db" and (pairs or args.output == "-"):
        args.parser.error("a copy of the database is whole and goes to a file: no filter, no -")
    if kind == "csv" and args.trash:
        args.parser.error("CSV has what lists show: --trash goes with jsonl")
    with contextlib.closing(open_store(args.db)) as conn, contextlib.ExitStack() as stack:
        query = query_of(conn, parse_params(RUN_FILTERS, pairs))
        if args.trash:
            query.where[0] = f"NOT ({_PURGED})"
        if args.output == "-":
            file: Any = sys.stdout
        else:
            check_target(conn, args.output, kind)
            part = stack.enter_context(replaced(args.output))
            if kind == "db":
                with contextlib.closing(sqlite3.connect(part)) as copy:
                    conn.backup(copy)
                    copy.execute("PRAGMA journal_mode = DELETE")     # one file, wherever it lies
                return 0
            file = stack.enter_context(open(part, "w", encoding="utf-8", newline=""))
        query.until = INF                # Ctrl-C is at hand
        conn.execute("BEGIN")            # all of one moment, while logging goes on
        if kind == "csv":
            csv.writer(file).writerows(export_rows(conn, query))
        else:
            file.writelines(f"{line}\n" for line in export_lines(conn, query))
    return 0


def cmd_import(args: argparse.Namespace) -> int:
    """Take runs in from JSON lines of export or another lab's database; those it has stay as is."""
    if lab_logger.pending(path := os.path.abspath(args.file)):   # what is not in that lab yet
        open_store(path).close()
    if not os.path.isfile(path):
        raise LabError(f"there is no file {args.file!r}")
    n_new = n_held = n_alive = 0
    odd: dict[str, list[str]] = {}       # by column: what it promises no run to hold, and whose
    with contextlib.closing(open_lab(args.db, timeout_s=WRITE_WAIT_S)) as conn:
        take_in(conn, args.db)
        try:
            for run, points in imported(args.file):
                if str(run.get("deleted_at")).startswith("purged"):
                    continue
                is_alive = run.get("status") == "running"        # here it would stay half a run
                is_new = not is_alive and import_run(conn, run, points)
                n_alive, n_new = n_alive + is_alive, n_new + is_new
                if is_new:
                    add_odd(odd, run)
                n_held += not is_alive and not is_new
        except sqlite3.Error as error:
            raise LabError(f"taking {args.file!r} into {args.db!r} failed ({error}): `ailab doctor "
                           "--check` tells which is damaged") from error
        finally:
            with contextlib.suppress(sqlite3.Error), lab_logger.transaction(conn):
                refresh(conn)
            print(f"{plural(n_new)} taken in, {n_held:,} already there" + bool(n_alive) * (
                f", {n_alive:,} still running: import again when ended"), file=sys.stderr)
            for text in told_odd(odd):
                print(f"ailab: {text}: taken in as it is", file=sys.stderr)
    return 0


def _setting(key: str, flag: Any, default: str, check: Callable[[str], Any] = str) -> Any:
    """Read a setting: its flag, environment, nearest .env, default; LabError where it is bad."""
    if flag is not None:
        return flag
    text, source = lab_logger.setting(key, default)
    try:
        return check(text)
    except argparse.ArgumentTypeError as error:
        raise LabError(f"{key} in {source}: {error}") from None


def port_number(text: str) -> int:
    """Read a port; 0 lets the system choose."""
    if not re.fullmatch(r"\d{1,5}", text, re.ASCII) or int(text) > 65_535:
        raise argparse.ArgumentTypeError(f"{text!r} is not accepted: give a port, 0 to 65535")
    return int(text)


def cmd_serve(args: argparse.Namespace) -> int:
    """Serve the dashboard and the API."""
    import signal
    path = None if args.socket is None else os.path.abspath(args.socket)   # "" opens no port
    if path and (args.host is not None or args.port is not None):
        args.parser.error("--socket opens no port: leave --host and --port out")
    if path and not hasattr(socket, "AF_UNIX"):
        raise LabError("this system has no Unix sockets: leave --socket out")
    host = "localhost" if path else _setting("AILAB_HOST", args.host, "127.0.0.1")
    port = 0 if path else _setting("AILAB_PORT", args.port, "8000", port_number)
    token = _setting("AILAB_TOKEN", args.token, "") or None
    is_new = args.token == "" or not (token or is_loopback(host))
    token = secrets.token_urlsafe(24) if is_new else token
    open_lab(args.db, timeout_s=WRITE_WAIT_S).close()
    try:
        server = make_server(args.db, host, port, token=token, is_verbose=args.verbose,
                             socket_path=path)
    except (OSError, OverflowError) as error:
        raise LabError(f"cannot serve at {path!r} ({error})" if path
                       else bind_problem(host, port, error)) from error
    with server, contextlib.suppress(KeyboardInterrupt):
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        if is_new or not args.quiet:             # nobody could know a new token otherwise
            entry = f"?token={quote(token, safe='')}" if token else ""
            beyond = "" if server.is_loopback else f" (bound to {clean(host)})"
            where = f"{server.url}/{entry}{beyond}" if not path else (
                f"the socket {clean(path)}; from elsewhere: ssh -L 8000:{clean(path)} HOST, "
                f"then http://localhost:8000/{entry}")
            print(f"AI-Lab {lab_logger.__version__} serving {clean(args.db)}\n"
                  f"Dashboard and API at {where}\nStop with Ctrl-C.", file=sys.stderr, flush=True)
        for question in getattr(args, "questions", ()):
            print(f"  ask: {question}", file=sys.stderr, flush=True)
        server.serve_forever()
    return 0


def bind_problem(host: str, port: int, error: Exception) -> str:
    """Say why an address cannot be had, and name a port that is free."""
    import errno
    if getattr(error, "errno", None) not in (errno.EADDRINUSE, errno.EACCES):
        return f"cannot serve at {host!r} port {port} ({error}): give another --host or --port"
    with socket.create_server(("127.0.0.1", 0)) as free:
        return (f"port {port} is taken or not allowed: try --port {free.getsockname()[1]}, "
                "or set AILAB_PORT")


def cmd_demo(args: argparse.Namespace) -> int:
    """Train the example sweep, serve it, and show what to ask."""
    import importlib.util
    import subprocess
    here = os.path.dirname(os.path.abspath(__file__))
    sweep = os.path.join(here, "examples", "train_model", "sweep.py")
    n_runs = 0
    if os.path.exists(args.db):
        with contextlib.closing(open_store(args.db)) as conn:
            n_runs = count_runs(conn, run_query({"status": "finished"}))
    if n_runs < 9:
        if not os.path.exists(sweep):
            raise LabError("the demo needs the examples folder, which an installed AI-Lab does not "
                           "bring: run `python ailab.py demo` in a clone of the project")
        if missing := [name for name in ("sklearn", "joblib")
                       if importlib.util.find_spec(name) is None]:
            raise LabError("the demo trains with packages that are missing "
                           f"({', '.join(missing)}): pip install -e '.[examples]'")
        done = subprocess.run(           # from its clone, so that its artifacts can be downloaded
            [sys.executable, sweep], check=False, cwd=here, env={**os.environ, "DB_PATH": args.db})
        if done.returncode:
            raise LabError(f"the sweep ended with exit code {done.returncode}; {args.db} has its "
                           "runs")
    args.questions = DEMO_QUESTIONS
    return cmd_serve(args)


def http(url: str, token: str | None = None, content: Any = None,
         timeout_s: float = 5.0) -> tuple[int, bytes]:
    """Ask a server on this machine, past any proxy: status and body. Raises OSError."""
    import urllib.error
    import urllib.request
    body = None if content is None else json.dumps(content).encode()
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    if token:
        request.add_header("Authorization", f"Bearer {token}")
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=timeout_s) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


@contextlib.contextmanager
def served_lab(db_path: str) -> Iterator[tuple[str, str | None]]:
    """Give address and token of a server of this lab: the running one, else one for the moment.

    Anybody may listen at the port, so it is shown no token: a server that wants one goes unused.
    """
    url = f"http://127.0.0.1:{_setting('AILAB_PORT', None, '8000', port_number)}"
    is_running = False
    with contextlib.suppress(OSError, ValueError, AttributeError, TypeError):
        told = json.loads(http(f"{url}/lab", timeout_s=1.0)[1])
        is_running = os.path.samefile(told.get("db_path"), db_path)
    if is_running:
        yield url, None
        return
    open_store(db_path).close()
    with private_server(db_path) as address:
        yield address


@contextlib.contextmanager
def private_server(db_path: str) -> Iterator[tuple[str, str]]:
    """Serve a lab for the moment, on a port of loopback: its address and token."""
    token = secrets.token_urlsafe(24)
    with make_server(db_path, token=token) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        try:
            yield server.url, token
        finally:
            server.shutdown()


def cmd_ask(args: argparse.Namespace) -> int:
    """Put a question to the assistant."""
    if bool(args.question) == args.smoke:
        args.parser.error("give a question, or --smoke")
    with served_lab(args.db) as (url, token):
        answers = [http(f"{url}/agent/query", token, {"query": question}, 300.0)
                   for question in (SMOKE_QUESTIONS if args.smoke else [args.question])]
    return max(print_answer(args, *answer) for answer in answers)


def print_answer(args: argparse.Namespace, status: int, body: bytes) -> int:
    """Print one answer of the assistant; returns the exit code."""
    answer = json.loads(body)
    if args.smoke:
        print(f"STATUS: {status}\nRESPONSE:\n{json.dumps(answer, indent=2)}")
        with contextlib.suppress(ValidationError):
            AgentAnswer.model_validate(answer)
            return int(status != 200)
        return 1
    if status != 200:
        raise LabError(answer["detail"])
    if args.json:
        print_json(answer)
    else:
        print(*map(clean, answer["natural_language_answer"].splitlines()), sep="\n")
        if answer["used_run_ids"]:
            print("runs: " + clean(", ".join(answer["used_run_ids"])))
        print(f"({clean(answer['answered_by'])})")
    return 0


Found = Iterator[tuple[bool | None, str]]       # True ok, None warn, False fail; and a sentence


def cmd_doctor(args: argparse.Namespace) -> int:
    """Check Python, SQLite, lab, disk, assistant and port; take in or send what is pending."""
    code, told = 0, []
    for check in (check_python, functools.partial(check_store, is_whole=args.check), check_outbox,
                  check_disk, check_assistant, check_port):
        for verdict, text in check(args.db):
            level = {True: "ok", None: "warn", False: "fail"}[verdict]
            code = 1 if verdict is False else code
            told.append({"level": level, "text": text})
            if not args.json:
                print(f"{painted(f'{level:<4}', COLOURS[level])}  {clean(text)}")
    if args.json:
        print_json(told)
    return code


def check_python(db_path: str) -> Found:
    """Check what runs AI-Lab."""
    yield True, f"Python {sys.version.split()[0]}"           # an older one cannot read this file
    version = f"SQLite {sqlite3.sqlite_version}"
    with contextlib.closing(sqlite3.connect(":memory:")) as conn:
        try:
            conn.execute("CREATE VIRTUAL TABLE t USING fts5(a)")
            conn.execute("SELECT row_number() OVER () FROM json_each('[1]')")
            yield True, f"{version} with full-text search and JSON"
        except sqlite3.Error as error:
            yield False, f"{version} lacks what the lab needs ({error}): use another Python"


def check_store(db_path: str, is_whole: bool = False) -> Found:
    """Check the file, all of it where `is_whole`; take in the journals that dead processes left."""
    waiting = lab_logger.pending(db_path)
    if not os.path.exists(db_path) and not waiting:
        yield None, f"no lab at {db_path} yet: the first run makes it"
        return
    if waiting:
        yield True, f"not wholly in the lab until now: {described(waiting)}"
    try:
        with contextlib.closing(open_lab(db_path, timeout_s=WRITE_WAIT_S)) as conn:
            problems = take_in(conn, db_path)
            damage = conn.execute("PRAGMA quick_check(1)").fetchone()[0]
            version = conn.execute("PRAGMA user_version").fetchone()[0]
            yield damage == "ok", (
                f"lab {db_path}: {plural(count_runs(conn, RunQuery()))}, schema version {version}, "
                f"{plural(os.path.getsize(db_path), 'byte')}, integrity {damage}")
            yield from ((False, problem) for problem in problems)
            left = len(lab_logger.pending(db_path))
            yield True, (f"{plural(len(waiting) - left, 'journal')} of ended runs taken in, "
                         f"{left - len(problems)} still in use")
            if is_whole:
                yield from check_whole(conn, db_path)
    except (sqlite3.Error, OSError, StoreError) as error:
        text = (str(error) if isinstance(error, StoreError) else
                f"the lab at {db_path!r} cannot be used ({error})")
        if "malformed" in text:
            text += (": put an export, or a copy, in its place, once nothing has it open and its "
                     "-wal and -shm, which hold changes to this file, are removed")
        yield False, text


def check_whole(conn: sqlite3.Connection, db_path: str) -> Found:
    """Read the whole file, its references, its index, and every journal that is pending."""
    damage = [row[0] for row in conn.execute("PRAGMA integrity_check(10)")]
    yield damage == ["ok"], f"integrity of the file: {'; '.join(damage)}"
    orphans = sum(1 for _ in conn.execute("PRAGMA foreign_key_check"))
    yield not orphans, f"{plural(orphans, 'point')} of runs that are not in the lab" + (
        ": any SQLite tool can delete them from run_metrics" if orphans else "")
    odd: dict[str, list[str]] = {}
    names = ("run_id", *_PROMISED)
    for row in conn.execute(f"SELECT {', '.join(names)} FROM runs WHERE NOT ({_PURGED})"):
        add_odd(odd, dict(zip(names, row, strict=True)))
    yield from ((None, f"{text}: any SQLite tool can change it") for text in told_odd(odd))
    problems = index_problems(conn, db_path)
    yield from ((None, f"the index for reading is wrong: {text}") for text in problems)
    if problems:
        conn.execute("DROP TABLE tally")
        open_lab(db_path, timeout_s=WRITE_WAIT_S).close()
    yield True, "the index for reading " + ("is made anew" if problems else "has all, and no more")
    yield from (check_journal(conn, found["path"]) for found in lab_logger.pending(db_path))


def check_journal(conn: sqlite3.Connection, path: str) -> tuple[bool, str]:
    """Read a journal: whether every line of it is one, and the lab has a whole number of them."""
    n_bad, size = 0, 0
    try:
        held = lab_logger.take_lines(conn, os.path.basename(path)[:-len(".jsonl")], 0, b"")[0]
        is_apart = held == 0
        with open(path, "rb") as lines:
            for line in lines:
                size += len(line)
                is_apart |= size == held
                try:
                    n_bad += line.endswith(b"\n") and not isinstance(json.loads(line), dict)
                except (ValueError, RecursionError):
                    n_bad += line.endswith(b"\n")           # the last may be half written
    except (OSError, ValueError) as error:
        return False, f"journal {path} cannot be read ({error})"
    where = "" if is_apart else ", which is no end of a line: it is another run's, or was cut"
    return not n_bad and is_apart, (
        f"journal {path}: {plural(size, 'byte')}, {held:,} of them in the lab{where}, "
        f"{plural(n_bad, 'damaged line')}")


def described(journals: list[dict]) -> str:
    """Say how many journals these are of lab_logger.pending(), of what size and age."""
    text = (f"{plural(len(journals), 'journal')} of "
            f"{plural(len({journal['run_id'] for journal in journals}))}, "
            f"{plural(sum(journal['bytes'] for journal in journals), 'byte')}")
    with contextlib.suppress(OSError):            # it has just been taken in
        minutes = (time.time() - os.stat(journals[0]["path"]).st_mtime) / 60
        text += f", the oldest last written {plural(round(minutes), 'minute')} ago"
    return text


def check_outbox(db_path: str) -> Found:
    """Send what waits for the server that AILAB_URL names."""
    if url := lab_logger.lab_url():
        if waiting := lab_logger.pending(url):
            yield True, f"to be sent to {url}: {described(waiting)}"
        problems = lab_logger.drain_all(None, url)
        yield from ((None, problem) for problem in problems)
        n_sent = len(waiting) - len(lab_logger.pending(url))
        yield True, f"{plural(n_sent, 'journal')} wholly sent to {url}"


def check_disk(db_path: str) -> Found:
    """Check where the lab lies."""
    import shutil
    folder = os.path.dirname(db_path)
    while not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    kind = lab_logger.network_filesystem(folder)
    yield (None, f"the lab is on a network file system ({kind}): slower, and without a "
                 "write-ahead log") if kind else (True, "the lab is on a local file system")
    free = shutil.disk_usage(folder).free
    yield free > 1 << 30 or None, f"{free / (1 << 30):.1f} GiB free"


def check_assistant(db_path: str) -> Found:
    """Check the assistant's packages, and whether a language model answers."""
    import importlib.util
    missing = [name for name in ("langchain_core", "langchain_ollama")
               if importlib.util.find_spec(name) is None]
    yield not missing, (f"the assistant lacks {', '.join(missing)}: pip install langchain-core "
                        "langchain-ollama" if missing else "langchain-core, langchain-ollama found")
    url = lab_logger.setting("OLLAMA_BASE_URL", "http://localhost:11434")[0].rstrip("/")
    model = lab_logger.setting("OLLAMA_MODEL")[0]
    try:
        found = json.loads(http(f"{url}/api/tags", timeout_s=2.0)[1])["models"]
        names = [entry["name"] for entry in found]
        is_there = bool(names) and any(name.startswith(model.partition(":")[0]) for name in names)
        yield is_there or None, f"Ollama at {url} has {', '.join(names) or 'no model'}" + (
            "" if is_there else f": ollama pull {model or 'qwen3:4b'}")
    except (OSError, ValueError, KeyError, TypeError):
        yield True, f"no Ollama at {url}: the built-in planner answers (`ollama serve` starts one)"


def check_port(db_path: str) -> Found:
    """Check that the server's port is free, or a lab's."""
    try:
        port = _setting("AILAB_PORT", None, "8000", port_number)
        is_lab = b'"project"' in http(f"http://127.0.0.1:{port}/health", timeout_s=1.0)[1]
        yield is_lab or None, f"port {port} is taken by " + (
            "a lab's server" if is_lab else "another program: serve --port names another")
    except LabError as error:
        yield False, error.detail
    except OSError:
        yield True, f"port {port} is free"


_RUN = {"help": "a run id, or the beginning of one"}
_SERVER_FLAGS = (
    ("--host", {"help": "address to bind (AILAB_HOST, else 127.0.0.1); others need the token"}),
    ("--port", {"type": port_number, "help": "port (AILAB_PORT, else 8000); 0 takes a free one"}),
    ("--token", {"nargs": "?", "const": "", "help": "ask for this, or for a new token; AILAB_TOKEN "
                                                    "keeps it out of the list of processes"}),
    ("--socket", {"metavar": "PATH", "help": "serve on this Unix socket, and on no port"}),
    ("--verbose", {"action": "store_true", "help": "log each request"}),
    ("--quiet", {"action": "store_true", "help": "print nothing at the start but a new token"}))
VERBS: tuple[tuple[Callable, str, tuple, tuple[Param, ...]], ...] = (   # with example and arguments
    (cmd_serve, "serve --port 8001", _SERVER_FLAGS, ()),
    (cmd_demo, "demo", _SERVER_FLAGS, ()),
    (cmd_runs, "runs --status finished --sort metrics.accuracy", (), RUN_FILTERS + PAGE),
    (cmd_show, "show 54e5f6a7", (("run", _RUN),), ()),
    (cmd_compare, "compare 54e5f6 32c3d4",
     (("ids", {"nargs": "+", "metavar": "runs", **_RUN}),), COMPARED[1:]),
    (cmd_leaderboard, "leaderboard accuracy --top-k 3",
     (("metric_name", {"help": "the metric to rank by"}),), BOARD[1:]),
    (cmd_metrics, "metrics 54e5f6a7 --names val_loss", (("run", _RUN),), WINDOW),
    (cmd_note, "note 54e5f6a7 'PUBLISH: best of iris'",
     (("run", _RUN), ("text", {"nargs": "?", "help": "the note"}),
      ("--clear", {"action": "store_true", "help": "take the note away"})), ()),
    (cmd_direction, "direction val_score minimize",
     (("metric_name", {"help": "a metric of the lab"}),
      ("way", {"choices": ("maximize", "minimize", "auto"), "help": "auto: what its name says"})),
     ()),
    (cmd_delete, "delete 54e5f6a7", (("runs", {"nargs": "+", **_RUN}),), ()),
    (cmd_restore, "restore 54e5f6a7", (("runs", {"nargs": "+", **_RUN}),), ()),
    (cmd_purge, "purge --yes", (
        ("runs", {"nargs": "*", **_RUN}),
        ("--yes", {"action": "store_true", "help": "do it; without, say what would go"})), ()),
    (cmd_export, "export -o runs.csv --status finished", (
        ("-o", {"dest": "output", "metavar": "FILE", "required": True, "help": "- for stdout"}),
        ("--format", {"choices": EXPORT_FORMATS, "help": "else as the file's name ends"}),
        ("--trash", {"action": "store_true", "help": "what is in the trash, too (jsonl)"})),
     RUN_FILTERS),
    (cmd_import, "import runs.jsonl", (("file", {"help": "JSON lines of export, or a lab"}),), ()),
    (cmd_ask, "ask 'Which run has the highest accuracy?'",
     (("question", {"nargs": "?", "help": "in plain words"}),
      ("--smoke", {"action": "store_true", "help": "ask four standard questions"})), ()),
    (cmd_doctor, "doctor --check", (
        ("--check", {"action": "store_true", "help": "read the whole lab and every journal"}),),
     ()))


def build_parser() -> argparse.ArgumentParser:
    """Build the command line of VERBS."""
    parser = argparse.ArgumentParser(prog="ailab",
                                     description="Track training runs, see them, ask about them.")
    parser.add_argument("--version", action="version", version=f"AI-Lab {lab_logger.__version__}")
    verbs = parser.add_subparsers(title="verbs", required=True, metavar="VERB")
    for function, example, arguments, params in VERBS:
        about = (function.__doc__ or "").splitlines()[0]
        verb = verbs.add_parser(function.__name__.removeprefix("cmd_"), help=about,
                                description=about, epilog=f"example: ailab {example}")
        verb.set_defaults(run_verb=function, parser=verb)
        for name, options in arguments:
            verb.add_argument(name, **options)
        for param in params:
            names = dict.fromkeys((f"--{param.name.replace('_', '-')}", f"--{param.name}"))
            verb.add_argument(*names, dest=param.name, metavar=param.kind.upper(),
                              help=param.description, nargs="+" if param.max_times > 1 else None)
        verb.add_argument("--db", metavar="FILE",
                          help="the lab's database (DB_PATH, else ~/.ai-lab/lab.db)")
        if function not in (cmd_serve, cmd_demo, cmd_restore, cmd_export, cmd_import):
            verb.add_argument("--json", action="store_true", help="print what the API answers")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run one verb; returns the exit code: 0, 1 failed, 2 wrong usage."""
    if sys.stdout is None:               # `ailab runs >&-`
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  as long as the process
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    args = argparse.Namespace()
    try:
        args = build_parser().parse_args(argv)
        args.db = (os.path.abspath(os.path.expanduser(args.db)) if args.db
                   else lab_logger.default_db_path())
        code = args.run_verb(args)
        sys.stdout.flush()
        return code
    except SystemExit as end:            # argparse's, or a verb's own check of its usage
        return int(end.code or 0)
    except (sqlite3.Error, StoreError) as error:
        print(f"ailab: {clean(store_trouble(error, args.db, args.db))}", file=sys.stderr)
    except BrokenPipeError:              # the reader had enough: `ailab runs | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130
    except (LabError, OSError) as error:
        print(f"ailab: {clean(error)}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
