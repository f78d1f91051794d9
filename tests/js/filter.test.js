import assert from "node:assert/strict";
import { test } from "node:test";
import { mergedPairs } from "../../static/views/run.js";
import { chipsOf, filtersOf, nextSort, sortOf } from "../../static/filter.js";
import { columnsFor } from "../../static/table.js";
import { search } from "../../static/api.js";

test("a metric bound without its metric is not asked for", () => {
  assert.deepEqual(filtersOf({ metric_min: "0.9", q: "svm", run: "x", sort: "duration" }), { q: "svm" });
  assert.deepEqual(filtersOf({ metric_name: "accuracy", metric_min: "0.9" }), { metric_name: "accuracy", metric_min: "0.9" });
});

test("a header's clicks go to the good end, the other one, off", () => {
  assert.equal(nextSort("", "metrics.accuracy", true), "-metrics.accuracy");
  assert.equal(nextSort("-metrics.accuracy", "metrics.accuracy", true), "metrics.accuracy");
  assert.equal(nextSort("metrics.accuracy", "metrics.accuracy", true), "");
  assert.equal(nextSort("", "metrics.val_loss", false), "metrics.val_loss");
  assert.deepEqual(sortOf({ sort: "-metrics.accuracy" }), { sort: "metrics.accuracy", order: "desc" });
  assert.deepEqual(sortOf({}), {});
});

test("a metric and its bounds are one chip", () => {
  const chips = chipsOf({ status: "failed", metric_name: "accuracy", metric_min: "0.9", metric_max: "1" });
  assert.deepEqual(chips.map((chip) => chip.text), ["status: failed", "accuracy ≥ 0.9 and ≤ 1"]);
  assert.deepEqual(chips[1].names, ["metric_name", "metric_min", "metric_max"]);
});

test("columns are the metrics logged and the params that differ; empty ones are left out", () => {
  const run = (lr, note) => ({ run_id: "a", status: "finished", timestamp: "t", model_name: "svm", experiment_name: null, dataset_id: null,
    note, duration_s: 1, params: { lr, seed: 1 }, final_metrics: { accuracy: 0.9 } });
  const lab = { metrics: [{ metric_name: "accuracy", n_runs: 2, direction: "maximize" }, { metric_name: "val_loss", n_runs: 1, direction: "minimize" }] };
  const keys = (rows, query = {}) => columnsFor(rows, lab, query).map((column) => column.key);
  assert.deepEqual(keys([run(0.1, null), run(0.2, null)]),
    ["status", "run_id", "model_name", "metrics.accuracy", "params.lr", "timestamp", "duration_s"]);
  assert.ok(keys([run(0.1, "BAD")], { sort: "metrics.val_loss" }).includes("metrics.val_loss"));
  assert.ok(keys([run(0.1, "BAD")]).includes("note"));
});

test("train and val of one metric share a chart, others stand alone", () => {
  const pairs = mergedPairs(["train_loss", "val_loss", "accuracy", "train_only"].map((metric_name) => ({ metric_name })));
  assert.deepEqual(pairs.map((pair) => [pair.name, pair.lines.map((line) => line.isDashed)]),
    [["val_loss", [false, true]], ["accuracy", [false]], ["train_only", [false]]]);
});

test("a query string repeats a list's name and drops what is not set", () => {
  assert.equal(search({ ids: ["a", "b"], q: "", from: undefined, limit: 0 }), "?ids=a&ids=b&limit=0");
  assert.equal(search({}), "");
});
