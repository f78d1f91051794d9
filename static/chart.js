/**
 * The one chart: canvas for lines, DOM for ticks, readout and text.
 *
 * A series is {id, label, slot, isDashed, mode, curve, labels}. `curve` is what GET /curves answers:
 * columns x, first, min, max, last, count of equal length, one entry a bucket, in order of logging;
 * null is missing. `mode` is "line", "step", "dots" or "cross" (marks on the baseline). Sizes are
 * CSS pixels. Charts of one ChartGroup share crosshair, x range and log axis.
 */
import { el, render } from "./dom.js";
import { absolute, clock, count, num } from "./format.js";
import { extent, logTicks, nearest, niceTicks, padded, pixelColumns, scale, timeLabel, timeTicks } from "./scale.js";

const EDGE = { left: 56, right: 12, top: 8, bottom: 22 };
const DASHES = [[], [6, 3], [2, 3]]; // slots 0-7 solid, 8-15 dashed, beyond that dotted
const N_COLOURS = 8;
const DRAG_PX = 5;                   // shorter than this, a drag is a click
const live = new Set();

/** Draw every chart again, its colours read afresh: the theme has changed. */
export function redrawAll() {
  for (const chart of live) {
    chart.colours.clear();
    chart.schedule();
  }
}

/** What charts side by side have in common. */
export class ChartGroup {
  /** Args: xName (epoch, step, time), isLog, range ([from, to] or null), onRange(range), onPick(series, index). */
  constructor({ xName = "epoch", isLog = false, range = null, onRange = () => {}, onPick = null } = {}) {
    Object.assign(this, { xName, isLog, range, onRange, onPick, cursor: null, charts: new Map() });
  }

  /** The group's chart of that name, made at its first mention. */
  chart(name, options) {
    if (!this.charts.has(name)) this.charts.set(name, new Chart(this, name, options));
    return this.charts.get(name);
  }

  set(changes) {
    Object.assign(this, changes);
    for (const chart of this.charts.values()) chart.schedule();
  }

  /** Drop the charts that `names` does not list. */
  keep(names) {
    for (const [name, chart] of this.charts) if (!names.includes(name)) { chart.close(); this.charts.delete(name); }
  }

  close() {
    this.keep([]);
  }
}

class Chart {
  /** Args: group, name (the metric; the figure's data-chart), {title, direction, labelName}. */
  constructor(group, name, { title = name, direction = "maximize", labelName = "run" } = {}) {
    Object.assign(this, { group, name, title, direction, labelName, series: [], colours: new Map(), notes: [] });
    this.canvas = el("canvas", { "aria-hidden": "true" });
    this.xTicks = el("div", { class: "lab-xticks", "aria-hidden": "true" });
    this.yTicks = el("div", { class: "lab-yticks", "aria-hidden": "true" });
    this.brush = el("div", { class: "lab-brush", hidden: true });
    this.plot = el("div", { class: "lab-plot", tabindex: "0", role: "slider", "aria-label": `Position in ${title}`,
      "aria-valuemin": "0", "aria-valuemax": "0", "aria-valuenow": "0", on: this.listeners() },
    this.canvas, this.xTicks, this.yTicks, this.brush);
    this.caption = el("figcaption");
    this.readout = el("table", { class: "lab-readout" });
    this.box = el("div", { class: "lab-readbox", tabindex: "0", role: "group", "aria-label": `Values of ${title}` }, this.readout);
    this.figure = el("figure", { class: "lab-chart", data: { chart: name, key: `chart-${name}`, keep: "" } }, this.caption, this.plot, this.box);
    this.observer = new ResizeObserver(() => this.schedule());
    this.observer.observe(this.plot);
    live.add(this);
  }

  setSeries(series) {
    if (series.length === this.series.length && series.every((one, i) => same(one, this.series[i]))) return;
    this.series = series;
    this.notes = series.flatMap((one) => nonfiniteNote(one, this.group.xName, series.length));
    this.schedule();
  }

  close() {
    this.observer.disconnect();
    live.delete(this);
  }

  schedule() {
    this.frame ??= requestAnimationFrame(() => {
      this.frame = null;
      if (this.plot.clientWidth) this.draw();
    });
  }

  // --- Drawing ---

  /** The x range shown, the y range of what lies in it, and the functions to pixels. */
  measure() {
    const curves = this.series.map((one) => one.curve);
    const [width, height] = [this.plot.clientWidth, this.plot.clientHeight];
    const isLog = this.group.isLog;
    const xAll = this.group.range ?? extent(curves.map((curve) => curve.x)) ?? [0, 1];
    const xRange = xAll[0] === xAll[1] ? [xAll[0] - 0.5, xAll[1] + 0.5]
      : this.series.some((one) => one.mode === "dots") ? padded(xAll, 0.02) : xAll;
    const within = (curve, column) => column.filter((y, i) => curve.x[i] >= xRange[0] && curve.x[i] <= xRange[1] && (!isLog || y > 0));
    const yData = extent(curves.flatMap((curve) => [within(curve, curve.min), within(curve, curve.max)])) ?? [isLog ? 0.1 : 0, 1];
    const yRange = padded(yData, 0.06, isLog);
    return { width, height, xRange, yRange, isLog,
      x: scale(xRange, [EDGE.left, width - EDGE.right]), y: scale(yRange, [height - EDGE.bottom, EDGE.top], isLog) };
  }

  draw() {
    const view = this.view = this.measure();
    const ratio = devicePixelRatio || 1;
    if (this.canvas.width !== Math.round(view.width * ratio) || this.canvas.height !== Math.round(view.height * ratio)) {
      this.canvas.width = Math.round(view.width * ratio);
      this.canvas.height = Math.round(view.height * ratio);
    }
    const pen = this.canvas.getContext("2d");
    pen.setTransform(ratio, 0, 0, ratio, 0, 0);
    pen.clearRect(0, 0, view.width, view.height);
    this.drawAxes(pen, view);
    pen.save();
    pen.beginPath();
    pen.rect(EDGE.left - 4, 0, view.width - EDGE.left - EDGE.right + 8, view.height - EDGE.bottom + 4);
    pen.clip();
    const nearestLine = this.closest(view);
    const drawn = this.series.map((one) => this.drawSeries(pen, view, one, nearestLine && one !== nearestLine));
    pen.restore();
    this.drawCursor(pen, view);
    this.figure.dataset.points = this.series.reduce((sum, one) => sum + (one.curve.n_points ?? one.curve.x.length), 0);
    this.figure.dataset.drawn = drawn.reduce((sum, n) => sum + n, 0);
    this.showText(view);
  }

  drawAxes(pen, { width, height, xRange, yRange, isLog, x, y }) {
    const isTime = this.group.xName === "time";
    const room = Math.max(2, Math.floor((width - EDGE.left) / 90));
    const xs = (isTime ? timeTicks : niceTicks)(...xRange, room).filter((tick) => isTime || Number.isInteger(tick) || xRange[1] - xRange[0] < 2);
    const ys = (isLog ? logTicks : niceTicks)(...yRange, Math.max(2, Math.floor(height / 45)));
    pen.strokeStyle = this.colour("line");
    pen.lineWidth = 1;
    pen.beginPath();
    for (const tick of ys) {
      const at = Math.round(y(tick)) + 0.5;
      pen.moveTo(EDGE.left, at);
      pen.lineTo(width - EDGE.right, at);
    }
    pen.stroke();
    render(this.yTicks, ys.map((tick) => el("span", { style: { top: `${y(tick)}px` } }, num(Number(tick.toPrecision(12))))));
    render(this.xTicks, xs.map((tick) => el("span", { style: { left: `${x(tick)}px` } }, isTime ? timeLabel(tick, xRange[1] - xRange[0]) : num(tick))));
  }

  drawSeries(pen, view, one, isDim) {
    pen.globalAlpha = isDim ? 0.3 : 1;
    pen.strokeStyle = pen.fillStyle = this.colour(one.slot);
    pen.lineWidth = 1.5;
    pen.lineJoin = "round";
    pen.setLineDash(one.isDashed ? [5, 3] : DASHES[Math.min(2, Math.floor((one.slot ?? 0) / N_COLOURS))]);
    if (one.mode === "cross") return this.drawCrosses(pen, one.curve.x.map((x) => [view.x(x), view.height - EDGE.bottom - 5]));
    const columns = pixelColumns(one.curve, view.x, ...view.xRange, view.isLog ? (y) => y > 0 : undefined);
    if (one.mode === "dots") drawDots(pen, columns, view);
    else drawLine(pen, columns, view, one.mode === "step");
    if (one.curve.nonfinite?.length && one.mode !== "step") this.drawCrosses(pen, lostPoints(one.curve, view));
    pen.globalAlpha = 1;
    return columns.length;
  }

  drawCrosses(pen, places) {
    pen.setLineDash([]);
    pen.lineWidth = 2;
    pen.beginPath();
    for (const [x, y] of places) {
      pen.moveTo(x - 4, y - 4);
      pen.lineTo(x + 4, y + 4);
      pen.moveTo(x + 4, y - 4);
      pen.lineTo(x - 4, y + 4);
    }
    pen.stroke();
    return places.length;
  }

  drawCursor(pen, { x, y, height }) {
    if (this.group.cursor === null) return;
    const at = Math.round(x(this.group.cursor)) + 0.5;
    pen.setLineDash([]);
    pen.lineWidth = 1;
    pen.strokeStyle = this.colour("edge");
    pen.beginPath();
    pen.moveTo(at, EDGE.top);
    pen.lineTo(at, height - EDGE.bottom);
    pen.stroke();
    for (const one of this.series) {
      const i = nearest(one.curve.x, this.group.cursor);
      if (i < 0 || typeof one.curve.last[i] !== "number" || one.mode === "step") continue;
      pen.fillStyle = this.colour(one.slot);
      pen.beginPath();
      pen.arc(x(one.curve.x[i]), y(one.curve.last[i]), 3.5, 0, 7);
      pen.fill();
    }
  }

  /** A token's or a slot's colour as the canvas wants it. */
  colour(slot) {
    const name = typeof slot === "number" ? (slot < 2 * N_COLOURS ? `slot-${(slot % N_COLOURS) + 1}` : "muted") : slot ?? "accent";
    if (!this.colours.has(name)) {
      this.canvas.style.color = `var(--lab-${name})`;
      this.colours.set(name, getComputedStyle(this.canvas).color);
    }
    return this.colours.get(name);
  }

  // --- Text ---

  showText({ xRange, isLog }) {
    const hidden = isLog ? this.series.flatMap((one) => one.curve.min).filter((y) => y !== null && y <= 0).length : 0;
    const total = Number(this.figure.dataset.points);
    const shown = this.series.reduce((sum, one) => sum + one.curve.x.length, 0);
    render(this.caption, el("b", {}, this.title), total > shown && el("span", {}, `${count(total, "point")}, min and max per pixel`),
      hidden > 0 && el("span", {}, `${count(hidden, "point")} ≤ 0 not shown`),
      this.notes.length > 3 ? el("span", { class: "lab-warn" }, `${this.notes.length} lines with NaN or infinite points`)
        : this.notes.map((note) => el("span", { class: "lab-warn" }, `✕ ${note}`)));
    const rows = this.readings();
    const at = this.group.cursor === null ? "last" : this.xText(this.group.cursor);
    render(this.readout, el("thead", {}, el("tr", {}, el("th", { scope: "col" }, this.labelName),
      el("th", { scope: "col", class: "lab-num" }, at === "last" ? "last" : "value"), el("th", { scope: "col", class: "lab-num" }, this.group.xName))),
    el("tbody", {}, rows.map(({ one, i, value, range }) => el("tr", { data: { key: one.id } },
      el("th", { scope: "row" }, swatch(one.slot, one.isDashed), one.labels?.[i] ?? one.label),
      el("td", { class: "lab-num", title: range ?? String(value) }, num(value), range && el("small", {}, ` ${range}`)),
      el("td", { class: "lab-num" }, i < 0 ? "" : this.xText(one.curve.x[i]))))));
    this.plot.setAttribute("aria-valuemin", xRange[0]);
    this.plot.setAttribute("aria-valuemax", xRange[1]);
    this.plot.setAttribute("aria-valuenow", this.group.cursor ?? xRange[1]);
    const first = rows[0];
    this.plot.setAttribute("aria-valuetext", `${this.group.xName} ${at}${first ? `: ${first.one.labels?.[first.i] ?? first.one.label} ${num(first.value)}` : ""}`);
  }

  xText(x) {
    if (this.group.xName !== "time") return num(x);
    return Date.now() / 1000 - x < 43200 ? clock(x * 1000) : absolute(x * 1000);
  }

  /** What each line says at the crosshair, or at its end without one; the good end first, NaN last. */
  readings() {
    const cursor = this.group.cursor;
    const sign = this.direction === "minimize" ? 1 : -1;
    const rank = ({ value }) => (typeof value === "number" ? sign * value : Infinity);
    return this.series.map((one) => {
      const { x, last, min, max, count: counts } = one.curve;
      const i = cursor === null ? x.length - 1 : nearest(x, cursor);
      const lost = last[i] ?? one.curve.nonfinite?.find((point) => point.x === x[i])?.value ?? "NaN";
      const range = counts?.[i] > 1 && min[i] !== null ? `${num(min[i])} … ${num(max[i])}` : null;
      return { one, i, value: i < 0 ? null : one.mode === "cross" ? null : lost, range };
    }).sort((a, b) => rank(a) - rank(b));
  }

  // --- Pointer and keys ---

  listeners() {
    const at = (event) => event.clientX - this.plot.getBoundingClientRect().left;
    let from = null;
    return {
      pointerdown: (event) => { if (event.button === 0) { from = at(event); this.plot.setPointerCapture(event.pointerId); } },
      pointermove: (event) => {
        if (!this.view) return;
        this.pointerY = event.offsetY;
        const dragged = from !== null && Math.abs(at(event) - from) > DRAG_PX && event.pointerType !== "touch";
        this.brush.hidden = !dragged;
        if (dragged) {
          this.brush.style.left = `${Math.min(from, at(event))}px`;
          this.brush.style.width = `${Math.abs(at(event) - from)}px`;
        }
        this.moveTo(this.view.x.invert(at(event)));
      },
      pointerup: (event) => {
        const [start, end] = [from, at(event)];
        from = null;
        if (!this.brush.hidden) this.zoom([start, end].sort((a, b) => a - b).map(this.view.x.invert));
        else if (start !== null) this.pick();
        this.brush.hidden = true;
      },
      pointercancel: () => { from = null; this.brush.hidden = true; },
      pointerleave: () => { this.pointerY = null; if (from === null) this.group.set({ cursor: null }); },
      dblclick: () => this.zoom(null),
      blur: () => this.group.set({ cursor: null }),
      keydown: (event) => this.key(event),
    };
  }

  key(event) {
    const xs = this.steps();
    const here = this.group.cursor === null ? xs.length : nearest(xs, this.group.cursor);
    const to = { ArrowLeft: here - 1, ArrowRight: here + 1, Home: 0, End: xs.length - 1, PageUp: here - 10, PageDown: here + 10 }[event.key];
    if (to !== undefined && xs.length) this.group.set({ cursor: xs[Math.max(0, Math.min(xs.length - 1, to))] });
    else if (event.key === "Escape" && this.group.cursor !== null) this.group.set({ cursor: null });
    else if (event.key === "0") this.zoom(null);
    else if (event.key === "Enter") this.pick();
    else return;
    event.preventDefault();
    event.stopPropagation();
  }

  /** Every x in view, once, ascending. */
  steps() {
    const [from, to] = this.group.range ?? [-Infinity, Infinity];
    return [...new Set(this.series.filter((one) => one.mode !== "step").flatMap((one) => one.curve.x))].filter((x) => x >= from && x <= to).sort((a, b) => a - b);
  }

  /** The crosshair snaps to the nearest x that some line has. */
  moveTo(x) {
    const xs = this.steps();
    this.group.set({ cursor: xs.length ? xs[nearest(xs, x)] : null });
  }

  zoom(range) {
    this.group.set({ range });
    this.group.onRange(range);
  }

  pick() {
    const one = this.series.find((series) => series.mode === "dots");
    if (one && this.group.onPick && this.group.cursor !== null) this.group.onPick(one, nearest(one.curve.x, this.group.cursor));
  }

  /** The line nearest to the pointer, if it is over this chart and there are several. */
  closest(view) {
    if (this.pointerY == null || this.group.cursor === null || this.series.length < 3) return null;
    const off = (one) => Math.abs(view.y(one.curve.last[nearest(one.curve.x, this.group.cursor)] ?? NaN) - this.pointerY);
    return this.series.filter((one) => !Number.isNaN(off(one))).sort((a, b) => off(a) - off(b))[0] ?? null;
  }
}

function drawLine(pen, columns, view, isStep) {
  pen.beginPath();
  let before = null;
  for (const [i, { px, first, min, max, last, isNew }] of columns.entries()) {
    const y = view.y(first);
    if (isNew) pen.moveTo(px, y);
    else if (isStep) pen.lineTo(px, view.y(before));
    if (!isNew) pen.lineTo(px, y);
    if (min !== max) for (const value of [min, max, last]) pen.lineTo(px, view.y(value)); // the whole band of this pixel
    if (isNew && (columns[i + 1]?.isNew ?? true)) pen.arc(px, y, 1.5, 0, 7);             // a lone point
    before = last;
  }
  if (isStep && columns.length) pen.lineTo(view.width - EDGE.right, view.y(before));
  pen.stroke();
}

function drawDots(pen, columns, view) {
  for (const { px, min, max } of columns) {
    for (const value of new Set([min, max])) {
      pen.beginPath();
      pen.arc(px, view.y(value), 3.5, 0, 7);
      pen.fill();
    }
  }
}

/** Where a line is lost to NaN or infinity: at the height of its last finite value. */
function lostPoints({ x, last, nonfinite }, view) {
  const lost = nonfinite.filter((point, k) => k === 0 || nearest(x, nonfinite[k - 1].x) !== nearest(x, point.x) - 1);
  return lost.map((point) => {
    const before = last.slice(0, nearest(x, point.x) + 1).findLast((y) => y !== null);
    return [view.x(point.x), before === undefined ? view.height - EDGE.bottom - 6 : view.y(before)];
  });
}

function nonfiniteNote({ label, curve }, xName, nSeries) {
  const first = curve.nonfinite?.[0];
  if (!first) return [];
  const isToEnd = curve.last.at(-1) === null && curve.last.slice(nearest(curve.x, first.x)).every((y) => y === null);
  return [`${nSeries > 1 ? `${label}: ` : ""}${first.value} ${isToEnd ? "from" : "at"} ${xName} ${num(first.x)}`];
}

const same = (a, b) => a.id === b.id && a.slot === b.slot && a.label === b.label && a.curve === b.curve;

/** A run's colour: one of eight, then the same with dashes. */
export const swatch = (slot, isDashed = false) => el("span", { class: "lab-swatch", "aria-hidden": "true",
  data: { slot: typeof slot === "number" && slot < 2 * N_COLOURS ? String((slot % N_COLOURS) + 1) : "0", dash: (isDashed || slot >= N_COLOURS) && "yes" } });

/** A curve as GET /curves answers it, made a series: {label, slot, isDashed} say how it looks. */
export const toSeries = (curve, look) => ({ id: `${curve.run_id} ${curve.metric_name}`, mode: "line", curve, ...look });

/** Curves of one run, a train metric together with its val one: [{name, title, lines: [{curve, isDashed}]}]. */
export function mergedPairs(curves) {
  const byName = new Map(curves.map((curve) => [curve.metric_name, curve]));
  const partner = (name) => byName.get(name.replace(/^train(?=[_/.])/, "val"));
  return curves.filter(({ metric_name: name }) => !/^train[_/.]/.test(name) || !partner(name)).map((curve) => {
    const name = curve.metric_name;
    const train = /^val[_/.]/.test(name) && byName.get(name.replace(/^val/, "train"));
    return { name, title: train ? `${name} · ${train.metric_name} dashed` : name,
      lines: [{ curve, isDashed: false }, ...(train ? [{ curve: train, isDashed: true }] : [])] };
  });
}
