import assert from "node:assert/strict";
import { test } from "node:test";
import * as scale from "../../static/scale.js";

const curve = (ys, xs = ys.map((_, i) => i + 1)) => ({ x: xs, first: ys, min: ys, max: ys, last: ys });

test("ticks are round, inside the range and evenly spaced", () => {
  assert.deepEqual(scale.niceTicks(0, 1, 5), [0, 0.2, 0.4, 0.6, 0.8, 1]);
  assert.deepEqual(scale.niceTicks(1, 30, 6), [5, 10, 15, 20, 25, 30]);
  assert.deepEqual(scale.niceTicks(-0.0003, 0.0004, 3), [-0.0002, 0, 0.0002, 0.0004]);
  assert.deepEqual(scale.niceTicks(2, 2), [2]);
});

test("ticks of a log axis are data values, finer where the range is short", () => {
  assert.deepEqual(scale.logTicks(0.001, 10, 5), [0.001, 0.01, 0.1, 1, 10]);
  assert.deepEqual(scale.logTicks(0.2, 3, 5), [0.2, 0.5, 1, 2]);
  assert.ok(scale.logTicks(0.31, 0.37).every((tick) => tick > 0.3 && tick < 0.4));
});

test("a scale goes to pixels and back, linear and log", () => {
  const y = scale.scale([0.01, 100], [200, 0], true);
  assert.ok(Math.abs(y(1) - 100) < 1e-9);
  assert.ok(Math.abs(y.invert(50) - 10) < 1e-9);
  const x = scale.scale([0, 10], [0, 100]);
  assert.deepEqual([x(5), x.invert(50)], [50, 5]);
});

test("the extent skips what is not finite, and is null without any number", () => {
  assert.deepEqual(scale.extent([[3, null, NaN], [Infinity, -1]]), [-1, 3]);
  assert.equal(scale.extent([[null], []]), null);
});

test("a flat line gets room above and below", () => {
  assert.deepEqual(scale.padded([2, 2], 0.1), [1, 3]);
  assert.deepEqual(scale.padded([0, 0], 0.1), [-0.5, 0.5]);
  assert.deepEqual(scale.padded([4, 4], 0.1, true), [2, 8]);
});

test("the nearest x is found even where the column steps back", () => {
  assert.equal(scale.nearest([1, 2, 3, 2, 3, 4], 3.9), 5);
  assert.equal(scale.nearest([], 1), -1);
});

test("a spike among 100,000 points survives on 400 pixels", () => {
  const ys = Array.from({ length: 100000 }, (_, i) => (i === 54321 ? 5 : 1));
  const columns = scale.pixelColumns(curve(ys), scale.scale([1, 100000], [0, 400]), 1, 100000);
  assert.ok(columns.length <= 401);
  assert.equal(Math.max(...columns.map((column) => column.max)), 5);
});

test("null breaks the line, and so does an x that steps back", () => {
  const toPx = scale.scale([0, 10], [0, 1000]);
  const starts = (...args) => scale.pixelColumns(curve(...args), toPx, 0, 10).map((column) => column.isNew);
  assert.deepEqual(starts([1, 2, null, 4]), [true, false, true]);
  assert.deepEqual(starts([1, 2, 3, 4], [1, 2, 1, 2]), [true, false, true, false]);
});

test("a zoomed line keeps one neighbour beyond each edge", () => {
  const columns = scale.pixelColumns(curve([1, 2, 3, 4, 5, 6]), scale.scale([3, 4], [0, 100]), 3, 4);
  assert.deepEqual(columns.map((column) => column.first), [2, 3, 4, 5]);
});

test("values a log axis cannot show break the line", () => {
  const columns = scale.pixelColumns(curve([1, 0, 2]), scale.scale([0, 4], [0, 100]), 0, 4, (y) => y > 0);
  assert.deepEqual(columns.map((column) => [column.first, column.isNew]), [[1, true], [2, true]]);
});

test("time ticks fall on round times", () => {
  const from = Date.parse("2026-11-24T09:07:00Z") / 1000;
  const ticks = scale.timeTicks(from, from + 3600, 5);
  assert.deepEqual(ticks.map((tick) => (tick - ticks[0]) / 60), ticks.map((_, i) => i * 15));
  assert.ok(ticks.every((tick) => tick % 900 === 0));
  assert.match(scale.timeLabel(ticks[0], 3600), /^\d\d:\d\d$/);
});
