import assert from "node:assert/strict";
import { test } from "node:test";
import * as format from "../../static/format.js";

test("a number has four significant digits, scientific beyond 1e-4 and 1e6", () => {
  const cases = [[0.91128489, "0.9113"], [12.3456, "12.35"], [30, "30"], [0, "0"], [1234.56, "1235"],
    [0.00001234, "1.234e-5"], [12345678, "1.235e+7"], [-0.5, "-0.5000"], ["NaN", "NaN"], [null, "–"], [undefined, "–"]];
  for (const [value, text] of cases) assert.equal(format.num(value), text);
});

test("a column has one number of decimals, NaN and whole numbers as they are", () => {
  const decimals = format.columnDecimals([0.97, 0.3333, "NaN", null]);
  assert.equal(decimals, 4);
  assert.deepEqual([0.97, 0.3333, "NaN"].map((v) => format.fixed(v, decimals)), ["0.9700", "0.3333", "NaN"]);
  assert.equal(format.columnDecimals([1, 20, 300]), null);
  assert.equal(format.fixed(300, null), "300");
  assert.equal(format.columnDecimals([0, 0.5]), 4);
  assert.equal(format.columnDecimals([]), null);
});

test("a param is shown as typed, and missing, null, empty and text differ", () => {
  assert.deepEqual([0.001, undefined, null, "", "1", true, [1, 2]].map(format.param), ["0.001", "–", "null", '""', "1", "true", "[1,2]"]);
});

test("durations and ages take their largest units", () => {
  assert.deepEqual([0.416, 12.4, 185, 7620, 273600, null].map(format.duration),
    ["0.42 s", "12 s", "3 m 05 s", "2 h 07 m", "3 d 04 h", "–"]);
  const now = Date.parse("2026-11-24T12:00:00Z");
  assert.equal(format.ago("2026-11-24T11:59:58.000000Z", now), "just now");
  assert.equal(format.ago("2026-11-24T11:59:20.000000Z", now), "40 seconds ago");
  assert.equal(format.ago("2026-11-24T09:00:00.000000Z", now), "3 hours ago");
  assert.equal(format.ago("no time", now), "–");
});

test("bytes step by 1024", () => {
  assert.deepEqual([0, 1023, 2048, 5 * 1024 ** 2, null].map(format.bytes), ["0 B", "1023 B", "2.0 KB", "5.0 MB", ""]);
});

test("an address survives the round trip and stays readable", () => {
  const query = { experiment_name: "a/b c&d=é", sort: "-metrics.val_loss", selected: "3f9c1a2b-77de,,b" };
  const hash = format.makeHash("runs", query);
  assert.ok(hash.includes("sort=-metrics.val_loss") && hash.includes("selected=3f9c1a2b-77de,,b"), hash);
  assert.deepEqual(format.parseHash(hash), { view: "runs", query });
  assert.equal(format.makeHash("dashboard", { top: "" }), "#/");
  assert.deepEqual(format.parseHash(""), { view: "dashboard", query: {} });
  assert.deepEqual(format.parseHash("#/runs?q=100%25+and+%2B"), { view: "runs", query: { q: "100% and +" } });
});

test("a run keeps its slot until it is taken out, and the next one takes the hole", () => {
  const [a, b, c] = ["a", "b", "c"].map((x) => `${x}0000000-0000-4000-8000-000000000001`);
  let selection = [a, b, c].reduce((chosen, id) => format.toggled(chosen, id), []);
  assert.deepEqual(selection, ["a0000000-0000", "b0000000-0000", "c0000000-0000"]);
  selection = format.toggled(selection, b);
  assert.equal(format.slotOf(selection, c), 2);
  assert.equal(format.joinSelection(selection), "a0000000-0000,,c0000000-0000");
  assert.deepEqual(format.parseSelection("a0000000-0000,,c0000000-0000"), selection);
  assert.equal(format.slotOf(format.toggled(selection, "plain-sql-7"), "plain-sql-7"), 1);
  assert.deepEqual(format.toggled(selection, a, true), selection);
});

test("nested params are flattened, and only those that differ are named", () => {
  const runs = [{ params: { lr: 0.1, opt: { name: "sgd", m: 0 } } }, { params: { lr: 0.1, opt: { name: "adam", m: 0 }, extra: 1 } }];
  assert.deepEqual(format.differingParams(runs), ["opt.name", "extra"]);
  assert.deepEqual(format.flatten({ a: { b: { c: 1 } }, d: [], e: {} }), { "a.b.c": 1, d: [], e: {} });
});

test("the first metric is accuracy, then what was validated, training last", () => {
  const metric = (metric_name, n_runs) => ({ metric_name, n_runs });
  const order = (...metrics) => format.orderMetrics(metrics);
  assert.deepEqual(order(metric("train_loss", 9), metric("val_loss", 5), metric("accuracy", 2)), ["accuracy", "val_loss", "train_loss"]);
  assert.deepEqual(order(metric("reward", 3), metric("steps", 8)), ["steps", "reward"]);
});

test("the last line of a traceback names the error", () => {
  assert.equal(format.lastLine("Traceback\n  File\nValueError: no\n\n"), "ValueError: no");
  assert.equal(format.lastLine(null), "");
});

test("a reason is taken apart: which kind of end, in what words, with what detail", () => {
  const parts = (end_reason, status = "killed", error = null) => {
    const end = format.endingOf({ end_reason, status, error });
    return end && [end.kind, end.head, end.what, end.detail];
  };
  assert.deepEqual(parts("finished: the function returned", "finished"), ["finished", "finished", "the function returned", ""]);
  assert.deepEqual(parts("failed: ValueError: bad; at rate: 3; at model.py:12 in forward, from train.py:40 in step", "failed"),
    ["failed", "failed", "ValueError: bad; at rate: 3", "at model.py:12 in forward, from train.py:40 in step"]);
  assert.deepEqual(parts("interrupted: KeyboardInterrupt; at train.py:3 in train"),
    ["interrupted", "interrupted", "KeyboardInterrupt", "at train.py:3 in train"]);
  assert.deepEqual(parts("killed without a word: process 4711 on host is gone, last sign of life 2026-11-24 12:00:03 UTC; "
    + "likely out of memory: 15.2 of 15.6 GiB (97 %) were in use 4 s before"),
  ["killed", "killed without a word", "process 4711 on host is gone, last sign of life 2026-11-24 12:00:03 UTC",
    "likely out of memory: 15.2 of 15.6 GiB (97 %) were in use 4 s before"]);
  assert.deepEqual(parts("lost: no sign of life from host for 300 s"), ["lost", "lost", "no sign of life from host for 300 s", ""]);
});

test("a run without a reason has its error's last line, or says that none was recorded", () => {
  const parts = (run) => Object.values(format.endingOf(run) ?? {});
  assert.deepEqual(parts({ status: "failed", error: "Traceback\nValueError: no\n" }), ["failed", "failed", "ValueError: no", ""]);
  assert.deepEqual(parts({ status: "killed", error: null }), ["killed", "killed", "no reason was recorded", ""]);
  assert.deepEqual(parts({ status: "failed", end_reason: "cosmic rays" }), ["failed", "failed", "cosmic rays", ""]);
  assert.deepEqual(["running", "finished", null].map((status) => format.endingOf({ status })), [null, null, null]);
});

test("a system metric has a chart with its unit and a line of its own", () => {
  const cases = { "system/cpu_percent": ["CPU, %", "cpu"], "system/process_memory_gib": ["Process memory, GiB", "process"],
    "system/disk_free_gib": ["Disk free, GiB", "disk"], "system/gpu.0.utilization_percent": ["GPU utilization, %", "GPU 0"],
    "system/gpu.10.temperature_c": ["GPU temperature, °C", "GPU 10"], "system/gpu.1.power_w": ["GPU power, W", "GPU 1"],
    "system/fan": ["Fan", "fan"], "system/": ["", ""] };
  for (const [name, place] of Object.entries(cases)) assert.deepEqual(format.systemPlace(name), place);
});

test("an ending or a system metric that somebody made up is shown whole, and at once", () => {
  const began = performance.now();
  const end = format.endingOf({ status: "failed", end_reason: `failed: ${"; at ".repeat(200_000)}` });
  assert.ok(performance.now() - began < 1000);            // 30 s where it is looked through for each "; at "
  assert.deepEqual([end.what.length, end.detail], [999_995, "at "]);
  assert.deepEqual(format.systemPlace("system/a\nb"), ["A\nb", "a\nb"]);
});
