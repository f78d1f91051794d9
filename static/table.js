/** The runs table: which columns, and a grid that keeps only the rows on screen in the page. */
import { swatch } from "./chart.js";
import { button, el, render } from "./dom.js";
import { absolute, ago, columnDecimals, differingParams, duration, fixed, flatten, orderMetrics, param, shortId,
  slotOf } from "./format.js";

const SPARE_ROWS = 10;     // kept above and below what is seen
const [N_METRICS, N_PARAMS] = [3, 4];
const FACTS = ["experiment_name", "model_name", "dataset_id", "task_name"];   // params that have a column as facts
const ICONS = { running: "●", finished: "✓", failed: "✕", killed: "†" };
/** A run's status as icon and word, how it ended in its title. */
export const statusOf = ({ status, end_reason: title }) => el("span", { class: "lab-status", title, data: { status } },
  el("span", { "aria-hidden": "true" }, ICONS[status] ?? "?"), ` ${status}`);
/** A time as "3 hours ago", the absolute one in its title. */
export const when = (iso) => iso && el("time", { datetime: iso, title: absolute(iso) }, ago(iso));
/** A number of a column, the full value in its title. */
export const number = (value, decimals) => el("span", { title: value === undefined ? "not logged" : String(value),
  class: typeof value === "string" && "lab-bad" }, fixed(value, decimals));
/** The colour of a run's place in the selection; nothing for a run that is not selected. */
export const slotMark = (selection, runId) => slotOf(selection, runId) >= 0 && swatch(slotOf(selection, runId));

/** A run's duration; of a running one, the time since its start. */
export function durationOf({ duration_s: seconds, status, timestamp }, now = Date.now()) {
  return duration(status === "running" && timestamp ? Math.max(0, (now - Date.parse(timestamp)) / 1000) : seconds);
}

/**
 * The columns for these rows: facts, up to 3 metrics, the params that differ, note, times. A fact
 * that would be missing in every row has none.
 * Returns [{key, label, sub, sort, isGoodHigh, isNumber, width, cell(row)}], in order of showing.
 */
export function columnsFor(rows, lab, query) {
  const text = (key, label, width) => ({ key, label, width, cell: (row) => row[key] ?? "" });
  const hasValue = ({ key }) => rows.some((row) => ![null, undefined, ""].includes(row[key]));
  return [{ key: "status", label: "Status", width: 92, cell: (row) => statusOf(row) },
    { key: "run_id", label: "Run", width: 96, cell: (row) => el("code", {}, shortId(row.run_id)) },
    ...[text("experiment_name", "Experiment", 200), text("model_name", "Model", 140),
      text("dataset_id", "Dataset", 88)].filter(hasValue),
    ...metricColumns(rows, lab, query), ...paramColumns(rows, query), ...[text("note", "Note", 150)].filter(hasValue),
    { key: "timestamp", label: "Started", width: 112, sort: "timestamp", isGoodHigh: true,
      cell: (row) => when(row.timestamp) },
    { key: "duration_s", label: "Duration", width: 84, sort: "duration", isNumber: true, cell: (row) => durationOf(row) }
  ];
}

function metricColumns(rows, lab, query) {
  const asked = [query.metric_name, query.sort?.match(/^-?metrics\.(.+)$/)?.[1]].filter(Boolean);
  const logged = orderMetrics(lab.metrics).filter((name) => rows.some((row) => name in row.final_metrics));
  return [...new Set([...asked, ...logged])].slice(0, N_METRICS).map((name) => {
    const decimals = columnDecimals(rows.map((row) => row.final_metrics[name]));
    const isGoodHigh = lab.metrics.find((metric) => metric.metric_name === name)?.direction !== "minimize";
    return { key: `metrics.${name}`, label: name, sub: "final", sort: `metrics.${name}`, isGoodHigh, isNumber: true,
      width: 104, cell: (row) => number(row.final_metrics[name], decimals) };
  });
}

function paramColumns(rows, query) {
  const asked = query.sort?.match(/^-?params\.(.+)$/)?.[1];
  const differing = differingParams(rows).filter((name) => !FACTS.includes(name));
  return [...new Set([asked, ...differing])].filter(Boolean).slice(0, N_PARAMS).map((name) => ({
    key: `params.${name}`, label: name, sort: `params.${name}`, isNumber: true, isGoodHigh: false, width: 112,
    cell: (row) => param(flatten(row.params)[name]) }));
}

/** A windowed grid over sparse rows. */
export class Grid {
  /** Args: root; callbacks onOpen(row), onSelect(index, isRange), onSort(column), onNeed(first, last). */
  constructor(root, callbacks) {
    Object.assign(this, callbacks, { at: 0, rows: [], total: 0, columns: [], selection: [] });
    [this.head, this.body] = [el("thead"), el("tbody")];
    this.table = el("table", { class: "lab-grid", role: "grid", "aria-label": "Runs", "aria-multiselectable": "true",
      on: { click: (event) => this.click(event), keydown: (event) => this.key(event) } }, this.head, this.body);
    const scroll = () => this.schedule();
    this.scroller = el("div", { class: "lab-scroll", tabindex: "-1", on: { scroll } }, this.table);
    this.body.addEventListener("focusin", ({ target }) => { this.at = Number(target.closest("tr").dataset.index); });
    this.observer = new ResizeObserver(scroll);
    this.observer.observe(this.scroller);
    root.append(this.scroller);
  }
  /** Show this state: {rows (sparse), total, columns, sort, selection, open (a run's ref)}. */
  show(state) {
    Object.assign(this, state);
    this.at = Math.max(0, Math.min(this.at, this.total - 1));
    this.table.setAttribute("aria-rowcount", this.total + 1);
    render(this.head, el("tr", { "aria-rowindex": "1" }, el("th", { scope: "col", class: "lab-tick" },
      el("span", { class: "lab-hidden" }, "Selected")), this.columns.map((column) => this.header(column))));
    this.draw();
  }

  header({ key, label, sub, sort, width, isNumber }) {
    const order = !sort ? null : this.sort === `-${sort}` ? "descending" : this.sort === sort ? "ascending" : "none";
    const text = [label, sub && el("small", {}, ` ${sub}`)];
    const arrow = el("span", { "aria-hidden": "true" }, { descending: " ↓", ascending: " ↑" }[order] ?? "");
    return el("th", { scope: "col", "aria-sort": order, title: label, class: isNumber && "lab-num",
      data: { key, col: key }, style: { width: `${width}px` } }, sort ? button([text, arrow], { sort }) : text);
  }

  schedule() {
    this.frame ??= requestAnimationFrame(() => { this.frame = null; this.draw(); });
  }
  get rowHeight() {
    return parseFloat(getComputedStyle(this.table).getPropertyValue("--lab-row-px"));
  }

  draw() {
    const { scrollTop, clientHeight } = this.scroller;
    const height = this.rowHeight;
    const first = Math.max(0, Math.floor(scrollTop / height) - SPARE_ROWS);
    const last = Math.min(this.total, Math.ceil((scrollTop + clientHeight) / height) + SPARE_ROWS);
    const hadFocus = this.body.contains(document.activeElement);
    const spacer = (n, key) => n > 0 && el("tr", { role: "presentation", class: "lab-spacer", data: { key } },
      el("td", { role: "presentation", colspan: this.columns.length + 1, style: { height: `${n * height}px` } }));
    const shown = Array.from({ length: Math.max(0, last - first) }, (_, i) => this.row(first + i));
    render(this.body, spacer(first, "above"), shown, spacer(this.total - last, "below"));
    if (hadFocus && !this.body.contains(document.activeElement)) this.scroller.focus({ preventScroll: true });
    this.onNeed(first, last);
  }

  row(index) {
    const run = this.rows[index];
    const props = { "aria-rowindex": index + 2, tabindex: index === this.at ? "0" : "-1" };
    const span = el("td", { colspan: this.columns.length + 1 }, "…");
    if (!run) return el("tr", { ...props, data: { key: `row${index}`, index } }, span);
    const isSelected = slotOf(this.selection, run.run_id) >= 0;
    const tick = el("input", { type: "checkbox", tabindex: "-1", checked: isSelected,
      "aria-label": `Select run ${shortId(run.run_id)}` });
    return el("tr", { ...props, "aria-selected": String(isSelected),
      "aria-current": Boolean(this.open) && run.run_id.startsWith(this.open) && "true",
      data: { key: run.run_id, runId: run.run_id, index } },
    el("td", { class: "lab-tick" }, tick, slotMark(this.selection, run.run_id)),
    this.columns.map((column) => this.cell(run, column)));
  }

  cell(run, { key, isNumber, cell, sub }) {
    const isName = key === "run_id";
    return el(isName ? "th" : "td", { scope: isName && "row", class: isNumber && "lab-num", data: { col: key, sub },
      title: typeof run[key] === "string" && key !== "timestamp" && run[key] }, cell(run));
  }

  click(event) {
    const sort = event.target.closest("[data-sort]")?.dataset.sort;
    if (sort) this.onSort(this.columns.find((column) => column.sort === sort));
    const row = event.target.closest("tr[data-run-id]");
    if (!row) return;
    this.at = Number(row.dataset.index);
    const isTick = event.target.closest(".lab-tick") || event.shiftKey || event.metaKey || event.ctrlKey;
    if (isTick) this.onSelect(this.at, event.shiftKey);
    else if (!String(getSelection())) this.onOpen(this.rows[this.at]);
  }

  key(event) {
    if (event.altKey || event.ctrlKey || event.metaKey) return;
    const moves = { ArrowDown: 1, j: 1, ArrowUp: -1, k: -1, PageDown: 20, PageUp: -20, Home: -this.total, End: this.total };
    const { key, shiftKey } = event;
    if (this.head.contains(event.target)) return;
    if (key in moves) this.move(this.at + moves[key], shiftKey);
    else if (key === "Enter") this.onOpen(this.rows[this.at]);
    else if (key === "x" || key === " ") this.onSelect(this.at, shiftKey);
    else return;
    event.preventDefault();
  }
  /** Focus row `index`, scrolled into view; with `isRange` the rows on the way are selected. */
  move(index, isRange = false) {
    const { scroller, rowHeight: height } = this;
    this.at = Math.max(0, Math.min(index, this.total - 1));
    const top = this.at * height;
    const lowest = top + height - (scroller.clientHeight - this.head.offsetHeight);
    scroller.scrollTop = Math.min(top, Math.max(lowest, scroller.scrollTop));
    this.draw();
    this.body.querySelector(`tr[data-index="${this.at}"]`)?.focus({ preventScroll: true });
    if (isRange) this.onSelect(this.at, true);
  }
}
