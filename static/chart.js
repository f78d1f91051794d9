/**
 * The one chart: canvas for lines, DOM for ticks, readout and text.
 *
 * A series is {id, label, slot, isDashed, mode, curve, labels}. `curve` is what GET /curves answers:
 * columns x, first, min, max, last, count of equal length, one entry a bucket, in order of logging;
 * null is missing. `mode` is "line", "step", "dots" or "cross" (marks on the baseline). Sizes are
 * CSS pixels. Charts of one ChartGroup share crosshair, x range and log axis.
 */
import { el, render } from "./dom.js";
import { absolute, count, num } from "./format.js";
import { extent, logTicks, nearest, niceTicks, padded, pixelColumns, scale, timeLabel, timeTicks } from "./scale.js";

const EDGE = { left: 56, right: 12, top: 8, bottom: 22 };
const DASHES = [[], [6, 3], [2, 3]]; // slots 0-7 solid, 8-15 dashed, beyond that dotted
const N_COLOURS = 8;
const DRAG_PX = 5;                   // shorter than this, a drag is a click
const live = new Set();

/** Draw every chart again, its colours read afresh: the theme has changed. */
export const redrawAll = () => live.forEach((chart) => { chart.colours.clear(); chart.schedule(); });

/** What charts side by side have in common. */
export class ChartGroup {
  /** Args: xName (epoch, time), isLog, base (values that y always shows), onRange(range), onPick(series, index). */
  constructor({ xName = "epoch", isLog = false, base = [], onRange = () => {}, onPick = null } = {}) {
    Object.assign(this, { xName, isLog, base, onRange, onPick, range: null, cursor: null, charts: new Map() });
  }
  /**
   * The figures of these charts, [{name, series, title, direction, labelName}], in order. A chart is
   * made at its first mention, and dropped where it is not mentioned.
   */
  figures(all) {
    this.keep(all.map(({ name }) => name));
    return all.map(({ name, series, ...options }) => {
      const chart = this.charts.get(name) ?? new Chart(this, name, options);
      this.charts.set(name, chart);
      chart.setSeries(series);
      return chart.figure;
    });
  }
  set(changes) {
    Object.assign(this, changes);
    this.charts.forEach((chart) => chart.schedule());
  }

  zoom(range) {
    this.set({ range });
    this.onRange(range);
  }
  /** Drop the charts that `names` does not list. */
  keep(names = []) {
    for (const [name, chart] of [...this.charts].filter(([one]) => !names.includes(one))) {
      chart.observer.disconnect();
      live.delete(chart);
      this.charts.delete(name);
    }
  }
}

class Chart {
  /** Args: group, name (the metric; the figure's data-chart), {title, direction, labelName}. */
  constructor(group, name, { title = name, direction = "maximize", labelName = "run" } = {}) {
    Object.assign(this, { group, title, direction, labelName, series: [], colours: new Map() });
    const layer = (className) => el("div", { class: className, "aria-hidden": "true" });
    this.canvas = el("canvas", { "aria-hidden": "true" });
    [this.xTicks, this.yTicks, this.brush] = ["lab-xticks", "lab-yticks", "lab-brush"].map(layer);
    this.plot = el("div", { class: "lab-plot", tabindex: "0", role: "slider", "aria-label": `Position in ${title}`,
      "aria-valuenow": "0", on: this.listeners() }, this.canvas, this.xTicks, this.yTicks, this.brush);
    this.caption = el("figcaption", {}, el("b", {}, title));
    this.readout = el("table", { class: "lab-readout" });
    this.figure = el("figure", { class: "lab-chart", data: { chart: name, key: `chart-${name}`, keep: "yes" } },
      this.caption, this.plot, el("div", { class: "lab-readbox", tabindex: "0", role: "group",
        "aria-label": `Values of ${title}` }, this.readout));
    this.brush.hidden = true;
    this.observer = new ResizeObserver(() => this.schedule());
    this.observer.observe(this.plot);
    live.add(this);
  }

  setSeries(series) {
    const isSame = (one, i) => ["id", "slot", "label", "curve"].every((key) => one[key] === this.series[i][key]);
    if (series.length === this.series.length && series.every(isSame)) return;
    this.series = series;
    this.schedule();
  }

  schedule() {
    this.frame ??= requestAnimationFrame(() => { this.frame = null; if (this.plot.clientWidth) this.draw(); });
  }

  /** The ranges shown, y of what lies in the x range, and the functions to pixels. */
  measure() {
    const curves = this.series.map((one) => one.curve);
    const [width, height] = [this.plot.clientWidth, this.plot.clientHeight];
    const { isLog } = this.group;
    const all = this.group.range ?? extent(curves.map((curve) => curve.x)) ?? [0, 1];
    const isOpen = all[0] === all[1] || this.series.some((one) => one.mode === "dots");
    const xRange = isOpen ? padded(all, 0.02) : all;
    const within = ({ x }, column) =>
      column.filter((y, i) => x[i] >= xRange[0] && x[i] <= xRange[1] && (!isLog || y > 0));
    const seen = curves.flatMap((curve) => [within(curve, curve.min), within(curve, curve.max)]);
    const yRange = padded(extent([...seen, this.group.base]) ?? [isLog ? 0.1 : 0, 1], 0.06, isLog);
    return { width, height, xRange, yRange, isLog, x: scale(xRange, [EDGE.left, width - EDGE.right]),
      y: scale(yRange, [height - EDGE.bottom, EDGE.top], isLog) };
  }

  draw() {
    const view = this.view = this.measure();
    const { width, height } = view;
    const ratio = devicePixelRatio || 1;
    Object.assign(this.canvas, { width: Math.round(width * ratio), height: Math.round(height * ratio) });
    const pen = this.canvas.getContext("2d");
    pen.scale(ratio, ratio);
    this.drawAxes(pen, view);
    pen.save();
    pen.beginPath();
    pen.rect(EDGE.left - 4, 0, width - EDGE.left - EDGE.right + 8, height - EDGE.bottom + 4);
    pen.clip();
    const drawn = this.series.reduce((sum, one) => sum + this.drawSeries(pen, view, one), 0);
    pen.restore();
    this.drawCursor(pen, view);
    const total = this.series.reduce((sum, { curve }) => sum + (curve.n_points ?? curve.x.length), 0);
    Object.assign(this.figure.dataset, { points: total, drawn });
    this.showText(view, total);
  }

  drawAxes(pen, { width, height, xRange, yRange, isLog, x, y }) {
    const isTime = this.group.xName === "time";
    const span = xRange[1] - xRange[0];
    const xs = (isTime ? timeTicks : niceTicks)(...xRange, Math.max(2, Math.floor((width - EDGE.left) / 90)))
      .filter((tick) => isTime || Number.isInteger(tick) || span < 2);
    const ys = (isLog ? logTicks : niceTicks)(...yRange, Math.max(2, Math.floor(height / 45)));
    pen.strokeStyle = this.colour("line");
    for (const tick of ys) strokePath(pen, [EDGE.left, width - EDGE.right].map((px) => [px, Math.round(y(tick)) + 0.5]));
    render(this.yTicks, ys.map((tick) => el("span", { style: { top: `${y(tick)}px` } }, tickText(tick))));
    render(this.xTicks, xs.map((tick) => el("span", { style: { left: `${x(tick)}px` } },
      isTime ? timeLabel(tick, span) : tickText(tick))));
  }
  /** Draw one series and return how many marks that took. */
  drawSeries(pen, view, one) {
    const round = typeof one.slot === "number" ? Math.floor(one.slot / N_COLOURS) : 0;
    pen.strokeStyle = pen.fillStyle = this.colour(one.slot);
    Object.assign(pen, { lineWidth: 1.5, lineJoin: "round" });
    pen.setLineDash(one.isDashed ? [5, 3] : DASHES[Math.min(2, round)]);
    const baseline = view.height - EDGE.bottom - 6;
    if (one.mode === "cross") return drawCrosses(pen, one.curve.x.map((x) => [view.x(x), baseline]));
    const columns = pixelColumns(one.curve, view.x, ...view.xRange, view.isLog ? (y) => y > 0 : undefined);
    if (one.mode !== "dots") drawLine(pen, columns, view, one.mode === "step");
    else for (const { px, min, max } of columns) [min, max].forEach((value) => drawDot(pen, px, view.y(value)));
    if (one.curve.nonfinite?.length) drawCrosses(pen, lostPoints(one.curve, view, baseline));
    return columns.length;
  }

  drawCursor(pen, { x, y, height }) {
    const { cursor } = this.group;
    if (cursor === null) return;
    pen.strokeStyle = this.colour("edge");
    strokePath(pen, [EDGE.top, height - EDGE.bottom].map((py) => [Math.round(x(cursor)) + 0.5, py]));
    for (const { curve, slot, mode } of this.series) {
      const i = nearest(curve.x, cursor);
      if (i < 0 || curve.last[i] === null || mode === "step") continue;
      pen.fillStyle = this.colour(slot);
      drawDot(pen, x(curve.x[i]), y(curve.last[i]));
    }
  }
  /** A token's or a slot's colour, resolved as the canvas wants it. */
  colour(slot) {
    const name = tokenOf(slot);
    if (!this.colours.has(name)) {
      this.canvas.style.color = `var(--lab-${name})`;
      this.colours.set(name, getComputedStyle(this.canvas).color);
    }
    return this.colours.get(name);
  }

  showText({ xRange, isLog }, total) {
    const { xName, cursor } = this.group;
    const shown = this.series.reduce((sum, { curve }) => sum + curve.x.length, 0);
    const hidden = isLog ? this.series.flatMap(({ curve }) => curve.min).filter((y) => y !== null && y <= 0).length : 0;
    const notes = this.series.map((one) => lostNote(one, xName, this.series.length > 1)).filter(Boolean);
    render(this.caption, el("b", {}, this.title),
      total > shown && el("span", {}, `${count(total, "point")}, min and max per pixel`),
      hidden > 0 && el("span", {}, `${count(hidden, "point")} ≤ 0 not shown`),
      notes.map((note) => el("span", { class: "lab-warn" }, `✕ ${note}`)));
    const rows = this.readings();
    const head = (text, isNumber) => el("th", { scope: "col", class: isNumber && "lab-num" }, text);
    render(this.readout, el("thead", {}, el("tr", {}, head(this.labelName),
      head(cursor === null ? "last" : "value", true), head(xName, true))),
    el("tbody", {}, rows.map(({ one, label, value, band, x }) => el("tr", { data: { key: one.id } },
      el("th", { scope: "row" }, swatch(one.slot, one.isDashed), label),
      el("td", { class: "lab-num", title: String(value ?? "") }, num(value), band && el("small", {}, ` ${band}`)),
      el("td", { class: "lab-num" }, x)))));
    const says = rows.slice(0, 1).map(({ label, value }) => `: ${label} ${num(value)}`);
    Object.assign(this.plot, { ariaValueMin: xRange[0], ariaValueMax: xRange[1], ariaValueNow: cursor ?? xRange[1],
      ariaValueText: `${xName} ${cursor === null ? "last" : this.xText(cursor)}${says}` });
  }

  xText = (x) => (this.group.xName === "time" ? absolute(x * 1000) : num(x));
  /** What each line says at the crosshair, or at its end without one; the good end first, NaN last. */
  readings() {
    const { cursor } = this.group;
    const sign = this.direction === "minimize" ? 1 : -1;
    const rank = ({ value }) => (typeof value === "number" ? sign * value : Infinity);
    return this.series.map((one) => {
      const { x, last, min, max, count: counts, nonfinite = [] } = one.curve;
      const i = cursor === null ? x.length - 1 : nearest(x, cursor);
      const lost = one.mode === "cross" ? null : nonfinite.find((point) => point.x === x[i])?.value ?? "NaN";
      return { one, label: one.labels?.[i] ?? one.label, value: i < 0 ? null : last[i] ?? lost,
        x: i < 0 ? "" : this.xText(x[i]), band: counts?.[i] > 1 && `${num(min[i])} … ${num(max[i])}` };
    }).sort((a, b) => rank(a) - rank(b));
  }

  listeners() {
    const at = (event) => event.clientX - this.plot.getBoundingClientRect().left;
    let from = null;
    const end = () => { from = null; this.brush.hidden = true; };
    return {
      pointerdown: (event) => { if (event.button === 0) from = at(event); },
      pointermove: (event) => {
        if (!this.view) return;
        if (from !== null && Math.abs(at(event) - from) > DRAG_PX && event.pointerType !== "touch") {
          this.plot.setPointerCapture(event.pointerId);
          this.brush.hidden = false;
          this.brush.style.left = `${Math.min(from, at(event))}px`;
          this.brush.style.width = `${Math.abs(at(event) - from)}px`;
        }
        const xs = this.steps();       // the crosshair snaps to an x that some line has
        this.group.set({ cursor: xs[nearest(xs, this.view.x.invert(at(event)))] ?? null });
      },
      pointerup: (event) => {
        const ends = [from, at(event)].sort((a, b) => a - b);
        if (!this.brush.hidden) this.group.zoom(ends.map(this.view.x.invert));
        else if (from !== null) this.pick();
        end();
      },
      pointercancel: end, pointerleave: () => this.group.set({ cursor: null }), dblclick: () => this.group.zoom(null),
      blur: () => this.group.set({ cursor: null }), keydown: (event) => this.key(event), };
  }

  key(event) {
    const xs = this.steps();
    const here = this.group.cursor === null ? xs.length : nearest(xs, this.group.cursor);
    const to = { ArrowLeft: here - 1, ArrowRight: here + 1, Home: 0, End: xs.length - 1 }[event.key];
    if (to !== undefined) this.group.set({ cursor: xs[Math.max(0, Math.min(xs.length - 1, to))] ?? null });
    else if (event.key === "Escape" && this.group.cursor !== null) this.group.set({ cursor: null });
    else if (event.key === "0") this.group.zoom(null);
    else if (event.key === "Enter") this.pick();
    else return;
    event.preventDefault();
    event.stopPropagation();
  }
  /** Every x in view, once, ascending. */
  steps() {
    const [from, to] = this.group.range ?? [-Infinity, Infinity];
    const all = this.series.flatMap(({ mode, curve }) => (mode === "step" ? [] : curve.x));
    return [...new Set(all)].filter((x) => x >= from && x <= to).sort((a, b) => a - b);
  }

  pick() {
    const { cursor, onPick } = this.group;
    const dots = this.series.find((one) => one.mode === "dots");
    if (dots && cursor !== null) onPick?.(dots, nearest(dots.curve.x, cursor));
  }
}

const tickText = (tick) => String(tick && (Math.abs(tick) >= 1e6 || Math.abs(tick) < 1e-4) ? tick.toExponential() : tick);

function strokePath(pen, points, lineWidth = 1) {
  Object.assign(pen, { lineWidth });
  pen.beginPath();
  for (const [x, y] of points) pen.lineTo(x, y);
  pen.stroke();
}

function drawLine(pen, columns, view, isStep) {
  pen.beginPath();
  let before = null;
  for (const [i, { px, first, min, max, last, isNew }] of columns.entries()) {
    if (isNew) pen.moveTo(px, view.y(first));
    else if (isStep) pen.lineTo(px, view.y(before));
    pen.lineTo(px, view.y(first));
    if (min !== max) for (const value of [min, max, last]) pen.lineTo(px, view.y(value)); // this pixel's band
    if (isNew && (columns[i + 1]?.isNew ?? true)) pen.arc(px, view.y(last), 1.5, 0, 7);     // a lone point
    before = last;
  }
  if (isStep && columns.length) pen.lineTo(view.width - EDGE.right, view.y(before));
  pen.stroke();
}

function drawDot(pen, x, y) {
  pen.beginPath();
  pen.arc(x, y, 3.5, 0, 7);
  pen.fill();
}

function drawCrosses(pen, places) {
  pen.setLineDash([]);
  for (const [x, y] of places) {
    for (const d of [4, -4]) strokePath(pen, [[x - 4, y - d], [x + 4, y + d]], 2);
  }
  return places.length;
}

/** Where a line is lost to NaN or infinity, at the height of its last finite value. */
function lostPoints({ x, last, nonfinite }, view, baseline) {
  const at = nonfinite.map((point) => nearest(x, point.x));
  return at.filter((i, k) => k === 0 || at[k - 1] !== i - 1).map((i) => {
    const before = last.slice(0, i + 1).findLast((y) => y !== null && (!view.isLog || y > 0));
    return [view.x(x[i]), before === undefined ? baseline : view.y(before)];
  });
}

function lostNote({ label, curve: { x, last, nonfinite } }, xName, isNamed) {
  if (!nonfinite?.length) return null;
  const [first] = nonfinite;
  const isToEnd = last.slice(nearest(x, first.x)).every((y) => y === null);
  return `${isNamed ? `${label}: ` : ""}${first.value} ${isToEnd ? "from" : "at"} ${xName} ${num(first.x)}`;
}

/** The token of a slot: one of eight colours, the same again, then grey; or a token's own name. */
function tokenOf(slot) {
  if (typeof slot !== "number") return slot;
  return slot < 2 * N_COLOURS ? `slot-${(slot % N_COLOURS) + 1}` : "muted";
}

/** A run's colour as a short line, dashed from the ninth slot on. */
export const swatch = (slot, isDashed = false) => el("span", { class: "lab-swatch", "aria-hidden": "true",
  data: { dash: (isDashed || slot >= N_COLOURS) && "yes" }, style: { "--lab-slot": `var(--lab-${tokenOf(slot)})` } });
/** A curve as GET /curves answers it, made a series: {label, slot, isDashed} say how it looks. */
export const toSeries = (curve, look) => ({ id: `${curve.run_id} ${curve.metric_name}`, mode: "line", curve, ...look });
