/** The home view: what runs, what is best, what happened lately. */
import { getRun, leaderboard, listRuns } from "../api.js";
import { ChartGroup } from "../chart.js";
import { delegate, el, message, render } from "../dom.js";
import { option } from "../filter.js";
import { absolute, ago, columnDecimals, count, differingParams, fixed, flatten, lastLine, num, orderMetrics, param, refOf, shortId } from "../format.js";
import { durationOf, number, statusOf, when } from "../table.js";

const N_HISTORY = 500;     // dots in the history plot
const N_TROUBLE = 3;       // failed runs shown, and as many killed ones
const ORDERS = { best: "best first", desc: "highest first", asc: "lowest first" };

export function create(app, root) {
  const state = { top: [], history: [], trouble: [], errors: new Map(), missing: "" };
  const group = new ChartGroup({ xName: "time", onPick: (series, index) => app.go("runs", { run: refOf(series.runs[index].run_id) }) });
  const board = () => ({ metric_name: app.query.metric ?? orderMetrics(app.lab.metrics)[0]?.metric_name,
    order: app.query.order in ORDERS ? app.query.order : "best", top_k: Math.min(100, Math.max(1, parseInt(app.query.top, 10) || 10)) });

  delegate(root, "change", { board: (target) => app.change({ [target.dataset.name]: target.value }) });
  delegate(root, "click", { open: (target, event) => { if (!event.target.closest("a")) app.go("runs", { run: target.dataset.ref }); } });

  async function fetchAll() {
    const asked = board();
    const [top, history, failed, killed] = await Promise.all([
      asked.metric_name ? leaderboard(asked).catch((error) => (error.status === 404 ? error : Promise.reject(error))) : [],
      listRuns({ limit: N_HISTORY }),
      ...["failed", "killed"].map((status) => (app.lab.counts[status] ? listRuns({ status, limit: N_TROUBLE }) : { rows: [] }))]);
    const trouble = [...failed.rows, ...killed.rows].sort((a, b) => (a.timestamp < b.timestamp ? 1 : -1));
    Object.assign(state, { top: Array.isArray(top) ? top : [], missing: top instanceof Error ? top.message : "", history: history.rows, trouble, asked });
    await Promise.all(failed.rows.filter((run) => !state.errors.has(run.run_id))
      .map(async (run) => state.errors.set(run.run_id, lastLine((await getRun(run.run_id)).error))));
  }

  function draw() {
    const { lab } = app;
    render(root, el("h1", { class: "lab-hidden" }, "Dashboard"), counts(app),
      app.running.length > 0 && liveTable(app, state.asked.metric_name),
      el("div", { class: "lab-columns", data: { key: "main" } },
        el("section", { class: "lab-card", "aria-labelledby": "lab-best" }, el("h2", { id: "lab-best" }, "Leaderboard"), controls(lab, state.asked), boardTable(app, state)),
        el("section", { class: "lab-card", "aria-labelledby": "lab-history" }, el("h2", { id: "lab-history" }, "History"),
          el("p", { class: "lab-muted" }, `${state.asked.metric_name ?? "no metric"} · final value by start, the last ${count(state.history.length, "run")}`),
          state.asked.metric_name && historyChart(state.asked.metric_name).figure)),
      el("div", { class: "lab-columns", data: { key: "more" } }, experiments(app), state.trouble.length > 0 && troubleTable(app, state)));
  }

  /** Dots by start time, the best so far as a step line, failures on the baseline. */
  function historyChart(metric) {
    const direction = lab_direction(app.lab, metric);
    group.keep([metric]);
    const chart = group.chart(metric, { direction, labelName: "run" });
    if (chart.runs === state.history && chart.errors === app.lab.metrics) return chart;
    Object.assign(chart, { runs: state.history, errors: app.lab.metrics });
    const runs = state.history.filter((run) => run.timestamp).sort((a, b) => (a.timestamp < b.timestamp ? -1 : 1));
    const measured = runs.filter((run) => typeof run.final_metrics[metric] === "number");
    const lost = runs.filter((run) => run.status === "failed" || run.status === "killed");
    const better = direction === "minimize" ? Math.min : Math.max;
    const values = measured.map((run) => run.final_metrics[metric]);
    const best = values.reduce((line, value) => [...line, line.length ? better(line.at(-1), value) : value], []);
    const dot = { id: "runs", label: "run", slot: 0, mode: "dots", runs: measured, curve: columns(measured, values),
      labels: measured.map((run) => `${run.model_name ?? ""} ${shortId(run.run_id)}`) };
    const cross = { id: "lost", label: "failed or killed", slot: "bad", mode: "cross", curve: columns(lost, lost.map(() => null)), labels: lost.map((run) => `${run.status} ${shortId(run.run_id)}`) };
    chart.setSeries([dot, { id: "best", label: "best so far", slot: "good", mode: "step", curve: columns(measured, best) }, ...(lost.length ? [cross] : [])]);
    return chart;
  }

  return {
    async update() {
      const isFirst = !state.asked;
      const isLoaded = await app.load(root, async () => { await fetchAll(); return true; }, isFirst);
      if (isLoaded) draw();
    },
    async tick(isFull) {
      if (isFull) await fetchAll();
      if (state.asked) draw();
    },
    close: () => group.close(),
  };
}

const lab_direction = (lab, metric) => lab.metrics.find((one) => one.metric_name === metric)?.direction;

function columns(runs, values) {
  return { x: runs.map((run) => Date.parse(run.timestamp) / 1000), first: values, min: values, max: values, last: values };
}

function counts(app) {
  const { counts: by, n_runs: n, experiments: all } = app.lab;
  const tile = (key, value, label, href) => el("a", { class: "lab-tile", href, data: { count: key, key } }, el("b", {}, value.toLocaleString("en")), ` ${label}`);
  return el("nav", { class: "lab-tiles", "aria-label": "Counts", data: { key: "counts" } }, tile("runs", n, n === 1 ? "run" : "runs", app.href("runs")),
    tile("running", by.running, "running", app.href("runs", { status: "running" })),
    el("div", { class: "lab-tile lab-pair", data: { key: "trouble" } }, ["failed", "killed"].map((status) =>
      el("a", { href: app.href("runs", { status }), data: { count: status } }, el("b", { data: { bad: by[status] > 0 && "yes" } }, by[status]), ` ${status}`))),
    el("a", { class: "lab-tile", href: "#lab-experiments", data: { count: "experiments", key: "experiments", act: "jump" } }, el("b", {}, all.length), ` experiment${all.length === 1 ? "" : "s"}`));
}

function liveTable(app, metric) {
  return el("section", { class: "lab-card", "aria-labelledby": "lab-live", data: { key: "live" } }, el("h2", { id: "lab-live" }, "Running now"),
    wide("Running now", ["Run", "Experiment", "Model", "Epoch", metric, "Elapsed", "Last sign"], app.running.map((run) => {
      const planned = flatten(run.params).n_epochs ?? flatten(run.params).epochs;
      return runRow(app, run, [run.experiment_name, run.model_name, `${run.n_epochs_logged ?? "–"}${planned ? ` / ${planned}` : ""}`,
        num(run.final_metrics[metric]), durationOf(run), run.heartbeat_at ? ago(run.heartbeat_at) : "–"]);
    })));
}

const link = (app, run) => el("a", { href: app.href("runs", { run: refOf(run.run_id) }), data: { open: run.run_id } }, el("code", {}, shortId(run.run_id)));

function runRow(app, run, cells) {
  return el("tr", { data: { key: run.run_id, runId: run.run_id, ref: refOf(run.run_id), act: "open" } }, el("td", {}, link(app, run)), cells.map((cell) => el("td", {}, cell)));
}

/** A table that scrolls sideways by itself where it does not fit. */
function wide(label, heads, rows) {
  return el("div", { class: "lab-wide-box", tabindex: "0", role: "group", "aria-label": label }, el("table", { class: "lab-list" },
    el("thead", {}, el("tr", {}, heads.map((head) => el("th", { scope: "col" }, head)))), el("tbody", {}, rows)));
}

function controls(lab, asked) {
  const pick = (name, value, label, options) => el("label", {}, `${label} `, el("select", { value, data: { change: "board", name } }, options));
  const names = orderMetrics(lab.metrics).map((metric) => metric.metric_name);
  return el("form", { class: "lab-filters", data: { submit: "none" } },
    pick("metric", asked.metric_name ?? "", "Metric", (names.includes(asked.metric_name) ? names : [asked.metric_name ?? "", ...names]).map((name) => option(name))),
    pick("order", asked.order, "Order", Object.entries(ORDERS).map(([value, text]) => option(value, text))),
    pick("top", String(asked.top_k), "Show", [...new Set([5, 10, 20, 50, asked.top_k])].sort((a, b) => a - b).map((n) => option(String(n), `top ${n}`))));
}

function boardTable(app, { top, missing, asked }) {
  if (!top.length) return message("nomatch", missing || "No run has a value to rank yet");
  const names = differingParams(top).filter((name) => !["model_name", "experiment_name"].includes(name)).slice(0, 4);
  const values = top.map((run) => run.metric_value);
  const decimals = columnDecimals(values);
  const [low, high] = [Math.min(0, ...values), Math.max(...values)];
  const bar = (value) => el("i", { class: "lab-bar", "aria-hidden": "true", style: { "--share": high > low ? (value - low) / (high - low) : 1 } });
  return wide("Leaderboard", ["#", "Run", el("span", {}, asked.metric_name, el("small", {}, " final")), "Model", ...names, "Note"], top.map((run) =>
    el("tr", { data: { key: run.run_id, runId: run.run_id, ref: refOf(run.run_id), act: "open" } }, el("td", { class: "lab-muted" }, run.rank), el("td", {}, link(app, run)),
      el("td", { class: "lab-value" }, bar(run.metric_value), el("span", { title: String(run.metric_value) }, fixed(run.metric_value, decimals))),
      el("td", {}, run.model_name ?? "–"), names.map((name) => el("td", { class: "lab-num" }, param(flatten(run.params)[name]))), el("td", { class: "lab-cut", title: run.note }, run.note ?? ""))));
}

function experiments(app) {
  return el("section", { class: "lab-card", id: "lab-experiments", "aria-labelledby": "lab-exp" }, el("h2", { id: "lab-exp" }, "Experiments"),
    wide("Experiments", ["Experiment", "Runs", "Running", "Last activity"], app.lab.experiments.map((one) => el("tr", { data: { key: one.experiment_name ?? "none" } },
      el("td", {}, one.experiment_name ? el("a", { href: app.href("runs", { experiment_name: one.experiment_name }) }, one.experiment_name) : "without a name"),
      el("td", { class: "lab-num" }, one.n_runs), el("td", { class: "lab-num" }, one.n_running || "–"), el("td", {}, one.last_activity ? when(one.last_activity) : "–")))));
}

function troubleTable(app, { trouble, errors }) {
  return el("section", { class: "lab-card", "aria-labelledby": "lab-trouble" }, el("h2", { id: "lab-trouble" }, "Failed and killed"),
    wide("Failed and killed runs", ["Run", "Status", "Model", "When", "Reason"], trouble.map((run) => runRow(app, run,
      [statusOf(run.status), run.model_name, run.timestamp ? when(run.timestamp) : "–", el("span", { class: "lab-reason" }, errors.get(run.run_id) || "the process went away")]))));
}
