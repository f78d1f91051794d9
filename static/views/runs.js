/** All runs: filters, the grid, the selection, and one run's panel beside it. */
import { listRuns } from "../api.js";
import { delegate, el, message, render, toast } from "../dom.js";
import { FILTER_NAMES, filterBar, filterChips, filtersOf, nextSort, sortOf } from "../filter.js";
import { count, parseSelection, refOf, toggled } from "../format.js";
import { columnsFor, Grid } from "../table.js";
import { create as createRun } from "./run.js";

const PAGE = 100;          // rows a request
const TYPING_MS = 200;     // a pause that ends a word
const MAX_COMPARED = 20;

export function create(app, root) {
  const state = { rows: [], total: null, asked: null, pending: new Set(), from: 0, error: null };
  const bar = el("div", { class: "lab-bar-box" });
  const list = el("section", { class: "lab-listing", "aria-label": "Runs" });
  const note = el("div", { class: "lab-note-box" });
  const foot = el("div", { class: "lab-foot" });
  const side = el("aside", { class: "lab-side", "aria-label": "Run", hidden: true });
  const grid = new Grid(list, { onOpen: (run) => run && app.change({ run: refOf(run.run_id) }), onSelect: select,
    onSort: (column) => app.change({ sort: nextSort(app.query.sort, column.sort, column.isGoodHigh) }), onNeed: need });
  let panel = null;
  let typing = null;
  let opener = null;       // the row that the panel's closing gives focus back to
  list.append(note, foot);
  root.append(el("h1", { class: "lab-hidden" }, "Runs"), el("div", { class: "lab-left" }, bar, list), side);

  const params = () => ({ ...filtersOf(app.query), ...sortOf(app.query) });

  /** Fetch page `n` and put its rows in their places; an answer to an older question is dropped. */
  async function fetchPage(n) {
    const asked = state.asked;
    state.pending.add(n);
    try {
      const { rows, total } = await listRuns({ ...params(), limit: PAGE, offset: n * PAGE });
      if (asked !== state.asked) return;
      if (total !== state.total) state.rows.length = Math.min(state.rows.length, total);
      state.total = total;
      rows.forEach((run, i) => { state.rows[n * PAGE + i] = run; });
      state.error = null;
    } finally {
      if (asked === state.asked) state.pending.delete(n);
    }
  }

  function need(first, last) {
    for (let n = Math.floor(first / PAGE); n * PAGE < last; n++) {
      if (state.rows[n * PAGE] || state.pending.has(n) || state.total === null) continue;
      fetchPage(n).then(draw, (error) => toast(error.message));
    }
  }

  /** Pages around what is on screen, again: the counts have changed, or it has been a while. */
  async function refetch() {
    const { total } = state;
    const top = state.rows[0]?.run_id;
    const first = Math.floor(grid.scroller.scrollTop / grid.rowHeight / PAGE);
    await Promise.all([...new Set([0, first, first + 1])].filter((n) => n === 0 || n * PAGE < total).map(fetchPage));
    const added = state.rows.findIndex((run) => run?.run_id === top);
    if (added > 0 && grid.scroller.scrollTop > 0) grid.scroller.scrollTop += added * grid.rowHeight; // what is read stays put
  }

  function select(index, isRange) {
    const run = state.rows[index];
    if (!run) return;
    let { selection } = app;
    const [from, to] = isRange ? [state.from, index].sort((a, b) => a - b) : [index, index];
    for (let i = from; i <= to; i++) if (state.rows[i]) selection = toggled(selection, state.rows[i].run_id, isRange || undefined);
    state.from = index;
    app.change({}, { selection });
  }

  function draw() {
    const { query, lab } = app;
    render(bar, filterBar(lab, query), el("div", { class: "lab-chips" }, filterChips(query)));
    const loaded = state.rows.filter(Boolean);
    const isNone = state.total === 0;
    grid.scroller.hidden = isNone || Boolean(state.error);
    if (!isNone) grid.show({ rows: state.rows, total: state.total ?? 0, columns: columnsFor(loaded, lab, query), sort: query.sort, selection: app.selection, open: query.run });
    render(note, state.error ? message("error", "The lab refused this question", el("p", {}, state.error.message), retry(), clear())
      : isNone && message("nomatch", "No run matches", el("p", {}, `${count(lab.n_runs, "run")} in this lab; take a filter off to see more.`), clear()));
    drawFoot();
    root.dataset.panel = query.run ? "open" : "closed";
  }

  const retry = () => el("button", { type: "button", data: { act: "retry" } }, "Retry");
  const clear = () => el("button", { type: "button", data: { act: "clearFilters" } }, "Clear all filters");

  function drawFoot() {
    const n = app.selection.filter(Boolean).length;
    render(foot, el("span", { role: "status" }, state.total === null ? "" : `${state.total.toLocaleString("en")} of ${count(app.lab.n_runs, "run")}`, n > 0 && ` · ${n} selected`),
      n > 0 && el("span", { class: "lab-row" },
        n > 1 && n <= MAX_COMPARED && el("a", { class: "lab-button lab-primary", href: app.href("compare"), data: { do: "compare" } }, `Compare ${n}`),
        n > MAX_COMPARED && el("span", { class: "lab-muted" }, `Compare takes up to ${MAX_COMPARED}`),
        el("button", { type: "button", data: { copy: location.href } }, "Copy link"), el("button", { type: "button", data: { act: "clearSelection" } }, "Clear")));
  }

  async function showPanel() {
    const { run } = app.query;
    if (run && !panel) {
      opener = document.activeElement?.closest("tr")?.dataset.runId;
      panel = createRun(app, side, close);
    }
    side.hidden = !run;
    if (run) return panel.update();
    panel?.close();
    panel = null;
    side.replaceChildren();
    if (opener) grid.body.querySelector(`tr[data-run-id="${CSS.escape(opener)}"]`)?.focus({ preventScroll: true });
    opener = null;
    return undefined;
  }

  /** Close the panel; after a run was deleted, read the list afresh. */
  function close(isDeleted) {
    if (isDeleted) state.asked = null;
    app.change({ run: "" });
  }

  const without = (names) => Object.fromEntries(names.map((name) => [name, ""]));
  delegate(root, "click", {
    unfilter: (target) => app.change(without(target.dataset.names.split(","))),
    clearFilters: () => app.change(without(FILTER_NAMES)),
    clearSelection: () => app.change({}, { selection: parseSelection("") }),
  });
  delegate(root, "change", { filter: (target) => app.change({ [target.dataset.name]: target.value, ...(target.dataset.name === "metric_name" && !target.value ? without(FILTER_NAMES.slice(-2)) : {}) }) });
  delegate(root, "input", { filter: (target) => {
    clearTimeout(typing);
    typing = setTimeout(() => app.change({ [target.dataset.name]: target.value.trim() }, { replace: true }), TYPING_MS);
  } });
  const onKey = (event) => {
    if (event.defaultPrevented || event.target.closest("input, textarea, select, dialog") || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "Escape" && app.query.run) close();
    else if (event.key === "c" && app.selection.filter(Boolean).length > 1) location.hash = app.href("compare");
    else if (event.key === "/") root.querySelector("[data-name=q]").focus();
    else return;
    event.preventDefault();
  };
  document.addEventListener("keydown", onKey);

  return {
    async update() {
      const asked = JSON.stringify(params());
      const opening = showPanel();
      if (asked !== state.asked) {
        const isFirst = state.total === null;
        Object.assign(state, { asked, pending: new Set() });
        list.setAttribute("aria-busy", "true");
        const old = { rows: state.rows, total: state.total };
        Object.assign(state, { rows: [] });
        try {
          await fetchPage(0);
          if (!isFirst) grid.scroller.scrollTop = 0;
        } catch (error) {
          if (asked === state.asked) Object.assign(state, old, { error: error.status ? error : null, asked: null });
          if (!error.status && isFirst) throw error;
        }
        list.removeAttribute("aria-busy");
      }
      if (state.asked === asked || state.error) draw();
      await opening;
    },
    async tick(isFull) {
      if (state.total === null) return;
      const at = new Map(state.rows.map((run, i) => [run?.run_id, i]));
      for (const run of app.running) if (at.has(run.run_id)) state.rows[at.get(run.run_id)] = run;
      if (isFull) await refetch();
      draw();
      await panel?.tick(isFull);
    },
    close() {
      document.removeEventListener("keydown", onKey);
      clearTimeout(typing);
      panel?.close();
      grid.close();
    },
  };
}
