/** All runs: filters, the grid, the selection, and one run's panel beside it. */
import { listRuns } from "../api.js";
import { button, delegate, el, message, render, toast } from "../dom.js";
import { FILTER_NAMES, filterBar, filterChips, filtersOf, nextSort, sortOf } from "../filter.js";
import { count, refOf, toggled } from "../format.js";
import { columnsFor, Grid } from "../table.js";
import { create as createRun } from "./run.js";

const PAGE = 100;          // rows a request
const TYPING_MS = 200;     // a pause that ends a word
const MAX_COMPARED = 20;
const without = (names) => Object.fromEntries(names.map((name) => [name, ""]));

export function create(app, root) {
  // `asked` is the question that `rows` (sparse) answer; `from` is where a Shift range begins.
  const state = { rows: [], total: null, asked: null, pending: new Set(), from: 0, error: null };
  const [bar, note, foot] = ["bar-box", "note-box", "foot"].map((name) => el("div", { class: `lab-${name}` }));
  const list = el("section", { class: "lab-listing", "aria-label": "Runs" });
  const side = el("aside", { class: "lab-side", "aria-label": "Run", hidden: true });
  const grid = new Grid(list, { onOpen: (run) => run && app.change({ run: refOf(run.run_id) }), onSelect: select,
    onSort: ({ sort, isGoodHigh }) => app.change({ sort: nextSort(app.query.sort, sort, isGoodHigh) }), onNeed: need });
  const panel = createRun(app, side, (isDeleted) => {
    if (isDeleted) state.asked = null;         // read the list afresh
    app.change({ run: "" });
  });
  let typing = null;                           // the timer that waits for a word's end
  list.append(note, foot);
  root.append(el("h1", { class: "lab-hidden" }, "Runs"), el("div", { class: "lab-left" }, bar, list), side);

  const params = () => ({ ...filtersOf(app.query), ...sortOf(app.query) });
  /** Fetch page `n` and put its rows in their places; an answer to an older question is dropped. */
  async function fetchPage(n) {
    const { asked, pending } = state;
    pending.add(n);
    const page = listRuns({ ...params(), limit: PAGE, offset: n * PAGE });
    const { rows, total } = await page.finally(() => pending.delete(n));
    if (asked !== state.asked) return;
    if (n === 0 && asked !== state.shown) Object.assign(state, { rows: [], shown: asked });
    Object.assign(state, { total, error: null });
    rows.forEach((run, i) => { state.rows[n * PAGE + i] = run; });
    state.rows.length = Math.min(state.rows.length, total);
  }

  function need(first, last) {
    for (let n = Math.floor(first / PAGE); n * PAGE < last; n++) {
      if (state.rows[n * PAGE] || state.pending.has(n)) continue;
      fetchPage(n).then(draw, (error) => toast(error.message));
    }
  }
  /** Pages around what is on screen, again: the counts have changed, or it has been a while. */
  async function refetch() {
    const top = state.rows[0]?.run_id;
    const { scroller, rowHeight } = grid;
    const here = Math.floor(scroller.scrollTop / rowHeight / PAGE);
    await Promise.all([...new Set([0, here, here + 1])].filter((n) => !n || n * PAGE < state.total).map(fetchPage));
    const added = state.rows.findIndex((run) => run?.run_id === top);
    if (added > 0 && scroller.scrollTop > 0) scroller.scrollTop += added * rowHeight;  // what is read stays put
  }
  /** Ask again where the address asks something else; old rows stay, dimmed, until the answer is here. */
  async function fetchChanged() {
    const asked = JSON.stringify(params());
    if (asked === state.asked) return;
    const isFirst = state.total === null;
    Object.assign(state, { asked, pending: new Set() });
    list.setAttribute("aria-busy", "true");
    try {
      await fetchPage(0);
      if (!isFirst) grid.scroller.scrollTop = 0;
    } catch (error) {
      if (asked !== state.asked) return;
      Object.assign(state, { asked: null, error: isFirst || error.status ? error : null });
    }
    list.removeAttribute("aria-busy");
  }

  function select(index, isRange) {
    if (!state.rows[index]) return;
    const [from, to] = isRange ? [state.from, index].sort((a, b) => a - b) : [index, index];
    const picked = state.rows.slice(from, to + 1).filter(Boolean);
    state.from = index;
    const selection = picked.reduce((all, run) => toggled(all, run.run_id, isRange || undefined), app.selection);
    app.change({}, { selection });
  }

  function draw() {
    const { query, lab, selection } = app;
    const { rows, total, error } = state;
    render(bar, filterBar(lab, query), el("div", { class: "lab-chips" }, filterChips(query)));
    grid.scroller.hidden = !total || Boolean(error);
    const columns = columnsFor(rows.filter(Boolean), lab, query);
    if (total) grid.show({ rows, total, columns, sort: query.sort, selection, open: query.run });
    const clear = button("Clear all filters", { act: "clearFilters" });
    render(note, error ? message("error", "The lab did not answer this question", el("p", {}, error.message),
      button("Retry", { act: "retry" }), " ", clear) : total === 0 && message("nomatch", "No run matches",
        el("p", {}, `${count(lab.n_runs, "run")} in this lab; take a filter off to see more.`), clear));
    drawFoot(selection.filter(Boolean).length);
    root.dataset.panel = query.run ? "open" : "closed";
  }

  function drawFoot(n) {
    const says = [state.total !== null && `${state.total.toLocaleString("en")} of ${count(app.lab.n_runs, "run")}`,
      n > 0 && ` · ${n} selected`, n > MAX_COMPARED && ` · at most ${MAX_COMPARED} can be compared`];
    const link = { class: "lab-button lab-primary", href: app.href("compare"), data: { do: "compare" } };
    render(foot, el("span", { role: "status" }, says), n > 0 && el("span", { class: "lab-row" },
      n > 1 && n <= MAX_COMPARED && el("a", link, `Compare ${n}`), button("Copy link", { copy: location.href }),
      button("Clear", { act: "clearSelection" })));
  }

  async function showPanel() {
    side.hidden = !app.query.run;
    if (app.query.run) return panel.update();
    const opened = panel.runId();
    panel.close();
    side.replaceChildren();
    return opened && grid.body.querySelector(`tr[data-run-id="${CSS.escape(opened)}"]`)?.focus({ preventScroll: true });
  }

  delegate(root, "click", {
    unfilter: (target) => app.change(without(target.dataset.names.split(","))),
    clearFilters: () => app.change(without(FILTER_NAMES)), clearSelection: () => app.change({}, { selection: [] }), });
  delegate(root, "change", { filter: ({ dataset: { name }, value }) => app.change({
    ...(name === "metric_name" && !value ? without(["metric_min", "metric_max"]) : {}), [name]: value }) });
  delegate(root, "input", { filter: ({ dataset: { name }, value }) => {
    clearTimeout(typing);
    typing = setTimeout(() => app.change({ [name]: value.trim() }, { replace: true }), TYPING_MS);
  } });
  const onKey = (event) => {
    const isElsewhere = event.target.closest("input:not([type=checkbox]), textarea, select, dialog");
    if (event.defaultPrevented || isElsewhere || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "Escape" && app.query.run) app.change({ run: "" });
    else if (event.key === "c" && app.selection.filter(Boolean).length > 1) location.hash = app.href("compare");
    else if (event.key === "/") root.querySelector("[data-name=q]").focus();
    else return;
    event.preventDefault();
  };
  document.addEventListener("keydown", onKey);

  return {
    async update() {
      const opening = showPanel();
      await fetchChanged();
      draw();
      await opening;
    },
    async tick(isFull) {
      if (state.total === null) return;
      const at = new Map(state.rows.map((run, i) => [run?.run_id, i]));
      for (const run of app.running) if (at.has(run.run_id)) state.rows[at.get(run.run_id)] = run;
      if (isFull) await refetch();
      draw();
      await panel.tick(isFull);
    },
    close() {
      document.removeEventListener("keydown", onKey);
      clearTimeout(typing);
      panel.close();
      grid.observer.disconnect();
    },
  };
}
