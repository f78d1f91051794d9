/** The runs table: which columns, and a grid that keeps only the rows on screen in the page. */
import { swatch } from "./chart.js";
import { el, render } from "./dom.js";
import { absolute, ago, columnDecimals, differingParams, duration, fixed, flatten, MISSING, orderMetrics, param, shortId, slotOf } from "./format.js";

const SPARE_ROWS = 10;     // kept above and below what is seen
const N_METRICS = 3;
const N_PARAMS = 4;
const ICONS = { running: "●", finished: "✓", failed: "✕", killed: "†" };

/** A run's status as icon and word. */
export const statusOf = (status) => el("span", { class: "lab-status", data: { status } }, el("span", { "aria-hidden": "true" }, ICONS[status] ?? "?"), ` ${status}`);

/** A time as "3 hours ago", the absolute one in its title. */
export const when = (iso) => el("time", { datetime: iso, title: absolute(iso) }, ago(iso));

/** The colour square of a run's place in the selection; empty for a run that is not selected. */
export function slotMark(selection, runId) {
  const slot = slotOf(selection, runId);
  return slot < 0 ? null : swatch(slot);
}

/**
 * The columns for these rows: facts, up to 3 metrics, the params that differ, note, times. A column
 * that would be all missing is not made.
 * Returns [{key, label, sub, sort, isGoodHigh, isNumber, width, cell(row)}], in order of showing.
 */
export function columnsFor(rows, lab, query) {
  const text = (key, label, width) => ({ key, label, width, cell: (row) => row[key] ?? "" });
  const columns = [
    { key: "status", label: "Status", width: 92, cell: (row) => statusOf(row.status) },
    { key: "run_id", label: "Run", width: 96, cell: (row) => el("code", {}, shortId(row.run_id)) },
    text("experiment_name", "Experiment", 190), text("model_name", "Model", 150), text("dataset_id", "Dataset", 110),
    ...metricColumns(rows, lab, query), ...paramColumns(rows, query),
    text("note", "Note", 170),
    { key: "timestamp", label: "Started", width: 116, sort: "timestamp", isGoodHigh: true, cell: (row) => (row.timestamp ? when(row.timestamp) : "") },
    { key: "duration_s", label: "Duration", width: 88, sort: "duration", isNumber: true, cell: (row) => durationOf(row) },
  ];
  return columns.filter(({ key }) => key.includes(".") || rows.some((row) => row[key] !== null && row[key] !== undefined && row[key] !== "") || key === "timestamp");
}

/** A run's duration; of a running one, the time since its start. */
export function durationOf(run, now = Date.now()) {
  if (run.duration_s === null && run.status === "running") return duration(Math.max(0, (now - Date.parse(run.timestamp)) / 1000));
  return duration(run.duration_s);
}

function metricColumns(rows, lab, query) {
  const asked = [query.metric_name, query.sort?.match(/^-?metrics\.(.+)$/)?.[1]].filter(Boolean);
  const logged = orderMetrics(lab.metrics).filter(({ metric_name: name }) => rows.some((row) => name in row.final_metrics));
  const names = [...new Set([...asked, ...logged.map((metric) => metric.metric_name)])].slice(0, Math.max(N_METRICS, asked.length));
  return names.map((name) => {
    const decimals = columnDecimals(rows.map((row) => row.final_metrics[name]));
    const isGoodHigh = lab.metrics.find((metric) => metric.metric_name === name)?.direction !== "minimize";
    return { key: `metrics.${name}`, label: name, sub: "final", sort: `metrics.${name}`, isGoodHigh, isNumber: true, width: 104,
      cell: (row) => number(row.final_metrics[name], decimals) };
  });
}

/** A number of a column, the full value in its title. */
export function number(value, decimals) {
  if (value === undefined || value === null) return el("span", { class: "lab-muted" }, MISSING);
  return el("span", { title: String(value), class: typeof value === "number" ? null : "lab-bad" }, fixed(value, decimals));
}

function paramColumns(rows, query) {
  const asked = query.sort?.match(/^-?params\.(.+)$/)?.[1];
  const isFact = (name) => ["experiment_name", "model_name", "dataset_id", "dataset", "task_name"].includes(name);
  const names = [...new Set([...(asked ? [asked] : []), ...differingParams(rows).filter((name) => !isFact(name))])].slice(0, N_PARAMS);
  return names.map((name) => ({ key: `params.${name}`, label: name, sort: `params.${name}`, isNumber: true, isGoodHigh: false, width: 116,
    cell: (row) => param(flatten(row.params)[name]) }));
}

/** A windowed grid over sparse rows. */
export class Grid {
  /** Args: root, and callbacks onOpen(row), onSelect(index, isRange), onSort(column), onNeed(first, last), all by row index. */
  constructor(root, callbacks) {
    Object.assign(this, callbacks, { at: 0, rows: [], total: 0, columns: [], selection: [] });
    this.head = el("thead");
    this.body = el("tbody");
    this.table = el("table", { class: "lab-grid", role: "grid", "aria-label": "Runs", "aria-multiselectable": "true" }, this.head, this.body);
    this.scroller = el("div", { class: "lab-scroll", tabindex: "-1", data: { keep: "" } }, this.table);
    this.scroller.addEventListener("scroll", () => this.schedule(), { passive: true });
    this.observer = new ResizeObserver(() => this.schedule());
    this.observer.observe(this.scroller);
    this.table.addEventListener("click", (event) => this.click(event));
    this.table.addEventListener("keydown", (event) => this.key(event));
    this.body.addEventListener("focusin", (event) => { this.at = Number(event.target.closest("tr").dataset.index ?? this.at); });
    root.append(this.scroller);
  }

  /** Show this state: {rows (sparse), total, columns, sort, selection, open}. */
  show(state) {
    Object.assign(this, state);
    this.at = Math.max(0, Math.min(this.at, this.total - 1));
    this.table.setAttribute("aria-rowcount", this.total + 1);
    render(this.head, el("tr", { "aria-rowindex": "1" }, el("th", { scope: "col", class: "lab-tick" }, el("span", { class: "lab-hidden" }, "Selected")),
      this.columns.map((column) => this.header(column))));
    this.draw();
  }

  header(column) {
    const direction = this.sort === `-${column.sort}` ? "descending" : this.sort === column.sort ? "ascending" : "none";
    const arrow = { descending: " ↓", ascending: " ↑", none: "" }[direction];
    const label = [el("span", {}, column.label), column.sub && el("small", {}, ` ${column.sub}`)];
    return el("th", { scope: "col", "aria-sort": column.sort && direction, class: column.isNumber && "lab-num", data: { key: column.key, col: column.key },
      title: column.label, style: { width: `${column.width}px` } },
    column.sort ? el("button", { type: "button", tabindex: "-1", data: { sort: column.sort } }, label, el("span", { "aria-hidden": "true" }, arrow)) : label);
  }

  schedule() {
    this.frame ??= requestAnimationFrame(() => {
      this.frame = null;
      this.draw();
    });
  }

  get rowHeight() {
    return parseFloat(getComputedStyle(this.table).getPropertyValue("--lab-row-px")) || 28;
  }

  draw() {
    const height = this.rowHeight;
    const first = Math.max(0, Math.floor(this.scroller.scrollTop / height) - SPARE_ROWS);
    const last = Math.min(this.total, Math.ceil((this.scroller.scrollTop + this.scroller.clientHeight) / height) + SPARE_ROWS);
    const hadFocus = this.body.contains(document.activeElement);
    const spacer = (n, key) => n > 0 && el("tr", { role: "presentation", class: "lab-spacer", data: { key } },
      el("td", { role: "presentation", colspan: this.columns.length + 1, style: { height: `${n * height}px` } }));
    const shown = [];
    for (let i = first; i < last; i++) shown.push(this.row(i));
    render(this.body, spacer(first, "above"), shown, spacer(this.total - last, "below"));
    if (hadFocus && !this.body.contains(document.activeElement)) this.scroller.focus({ preventScroll: true });
    this.onNeed(first, last);
  }

  row(i) {
    const run = this.rows[i];
    const index = { "aria-rowindex": i + 2, tabindex: i === this.at ? "0" : "-1" };
    if (!run) return el("tr", { ...index, class: "lab-pending", data: { key: `row${i}`, index: i } }, el("td", { colspan: this.columns.length + 1 }, "…"));
    const isSelected = slotOf(this.selection, run.run_id) >= 0;
    return el("tr", { ...index, "aria-selected": String(isSelected), "aria-current": Boolean(this.open) && run.run_id.startsWith(this.open) && "true",
      data: { key: run.run_id, runId: run.run_id, index: i, status: run.status } },
    el("td", { class: "lab-tick" }, el("input", { type: "checkbox", tabindex: "-1", checked: isSelected, "aria-label": `Select run ${shortId(run.run_id)}`, data: { tick: "" } }),
      slotMark(this.selection, run.run_id)),
    this.columns.map((column) => el(column.key === "run_id" ? "th" : "td", { scope: column.key === "run_id" && "row", class: column.isNumber && "lab-num",
      data: { col: column.key }, title: typeof run[column.key] === "string" && !column.sort ? run[column.key] : null }, column.cell(run))));
  }

  click(event) {
    const sort = event.target.closest("[data-sort]");
    if (sort) return this.onSort(this.columns.find((column) => column.sort === sort.dataset.sort));
    const row = event.target.closest("tr[data-run-id]");
    if (!row) return;
    this.at = Number(row.dataset.index);
    if (event.target.closest(".lab-tick") || event.shiftKey || event.metaKey || event.ctrlKey) this.onSelect(this.at, event.shiftKey);
    else if (!String(getSelection())) this.onOpen(this.rows[this.at]);
  }

  key(event) {
    if (event.altKey || event.ctrlKey || event.metaKey) return;
    const page = Math.floor(this.scroller.clientHeight / this.rowHeight) - 1;
    const inHead = this.head.contains(document.activeElement);
    const moves = { ArrowDown: 1, j: 1, ArrowUp: -1, k: -1, PageDown: page, PageUp: -page, Home: -this.total, End: this.total };
    if (inHead && this.headKey(event.key)) return event.preventDefault();
    if (inHead) return;
    if (event.key === "ArrowUp" && this.at === 0) this.head.querySelector("button")?.focus();
    else if (event.key in moves) this.move(this.at + moves[event.key], event.shiftKey);
    else if (event.key === "Enter") this.onOpen(this.rows[this.at]);
    else if (event.key === "x" || event.key === " ") this.onSelect(this.at, event.shiftKey);
    else return;
    event.preventDefault();
  }

  headKey(key) {
    const buttons = [...this.head.querySelectorAll("button")];
    const at = buttons.indexOf(document.activeElement);
    if (key === "ArrowRight") buttons[Math.min(at + 1, buttons.length - 1)].focus();
    else if (key === "ArrowLeft") buttons[Math.max(at - 1, 0)].focus();
    else if (key === "ArrowDown") this.move(this.at);
    else return false;
    return true;
  }

  /** Focus row `index`, scrolled into view; with `isRange` the rows on the way are selected. */
  move(index, isRange = false) {
    const height = this.rowHeight;
    this.at = Math.max(0, Math.min(index, this.total - 1));
    const [top, room] = [this.at * height, this.scroller.clientHeight - this.head.offsetHeight - height];
    if (top < this.scroller.scrollTop) this.scroller.scrollTop = top;
    else if (top > this.scroller.scrollTop + room) this.scroller.scrollTop = top - room;
    this.draw();
    this.body.querySelector(`tr[data-index="${this.at}"]`)?.focus({ preventScroll: true });
    if (isRange) this.onSelect(this.at, true);
  }

  close() {
    this.observer.disconnect();
  }
}
