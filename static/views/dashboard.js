/** The home view: what runs, what is best, what happened lately. */
import { getRun, leaderboard, listRuns } from "../api.js";
import { ChartGroup } from "../chart.js";
import { button, card, delegate, el, listTable, message, option, render } from "../dom.js";
import { ago, columnDecimals, count, differingParams, endingOf, fixed, flatten, num, orderMetrics, param, refOf,
  shortId } from "../format.js";
import { durationOf, statusOf, when } from "../table.js";

const N_HISTORY = 500;     // dots in the history plot
const N_TROUBLE = 6;       // and of them the failed and killed ones that are listed with the reason
const ORDERS = { best: "best first", desc: "highest first", asc: "lowest first" };

export function create(app, root) {
  const state = { asked: null };   // and what fetchAll() answers
  const group = new ChartGroup({ xName: "time",
    onPick: ({ runs }, index) => app.go("runs", { run: refOf(runs[index].run_id) }) });
  /** What the address asks of the leaderboard. */
  const board = () => ({ metric_name: app.query.metric ?? orderMetrics(app.lab.metrics)[0],
    order: app.query.order in ORDERS ? app.query.order : "best",
    top_k: Math.min(100, Math.max(1, parseInt(app.query.top, 10) || 10)) });

  async function fetchAll() {
    const asked = board();
    const [top, { rows: history }] = await Promise.all([asked.metric_name ? leaderboard(asked) : [],
      listRuns({ limit: N_HISTORY })]);
    const trouble = await Promise.all(history.filter(isLost).slice(0, N_TROUBLE)
      .map((run) => (run.end_reason ? run : getRun(run.run_id).catch(() => run))));
    Object.assign(state, { asked, top, history, trouble });
  }

  function draw() {
    const { metric_name: metric } = state.asked;
    render(root, el("h1", { class: "lab-hidden" }, "Dashboard"), tiles(app),
      app.running.length > 0 && liveCard(app, metric), el("div", { class: "lab-columns", data: { key: "main" } },
        card("Leaderboard", null, controls(app.lab, state.asked), boardTable(app, state)),
        card("History", `${metric ?? "no metric"} · final value by start · ${count(state.history.length, "run")}`,
          metric && historyChart(metric))),
      el("div", { class: "lab-columns", data: { key: "more" } }, experimentsCard(app),
        state.trouble.length > 0 && troubleCard(app, state)));
  }
  /** Dots by start time, the best so far as a step line, failures on the baseline. */
  function historyChart(metric) {
    const { direction } = app.lab.metrics.find((one) => one.metric_name === metric) ?? {};
    const runs = state.history.filter((run) => run.timestamp).reverse();
    const measured = runs.filter((run) => typeof run.final_metrics[metric] === "number");
    const lost = runs.filter(isLost);
    const values = measured.map((run) => run.final_metrics[metric]);
    let best = values[0];
    const steps = values.map((value) => (best = (direction === "minimize" ? Math.min : Math.max)(best, value)));
    const series = (id, slot, mode, of, ys, name) => ({ id, slot, mode, runs: of, label: id, curve: curveOf(of, ys),
      labels: name && of.map((run) => `${run[name] ?? ""} ${shortId(run.run_id)}`) });
    return group.figures([{ name: metric, direction, series: [series("best so far", "good", "step", measured, steps),
      series("run", "accent", "dots", measured, values, "model_name"),
      ...(lost.length ? [series("failed or killed", "bad", "cross", lost, lost.map(() => null), "status")] : [])] }]);
  }

  delegate(root, "change", { board: (target) => app.change({ [target.dataset.name]: target.value }) });
  delegate(root, "click", {
    open: (target, event) => { if (!event.target.closest("a")) app.go("runs", { run: target.dataset.ref }); },
    jump: () => root.querySelector("[data-key=Experiments]").scrollIntoView(), });
  return {
    async update() { if (await app.load(root, fetchAll, !state.asked)) draw(); },
    async tick(isFull) {
      if (!state.asked) return;
      if (isFull) await fetchAll();
      draw();
    },
    close: () => group.keep(), };
}

const isLost = ({ status }) => ["failed", "killed"].includes(status);
const curveOf = (runs, values) => ({ x: runs.map((run) => Date.parse(run.timestamp) / 1000),
  first: values, min: values, max: values, last: values });
/** A row of a list that opens its run. */
const runRow = (app, run, cells) => ({ key: run.run_id, runId: run.run_id, ref: refOf(run.run_id), act: "open",
  cells: [el("a", { href: app.href("runs", { run: refOf(run.run_id) }) }, el("code", {}, shortId(run.run_id))),
    ...cells] });

function tiles(app) {
  const { counts, n_runs: n, experiments } = app.lab;
  const says = (text) => [el("b", {}, text.split(" ")[0]), ` ${text.split(" ")[1]}`];
  const tile = (name, text, query) => el("a", { class: "lab-tile", href: app.href("runs", query),
    data: { count: name, key: name } }, says(text));
  return el("nav", { class: "lab-tiles", "aria-label": "Counts", data: { key: "counts" } },
    tile("runs", count(n, "run"), {}), ["running", "failed", "killed"].map((status) =>
      tile(status, `${counts[status].toLocaleString("en")} ${status}`, { status })),
    button(says(count(experiments.length, "experiment")),
      { count: "experiments", key: "experiments", act: "jump" }, { class: "lab-tile" }));
}

function liveCard(app, metric) {
  const heads = ["Run", "Experiment", "Model", ...["Epoch", metric, "Elapsed"].map((head) => [head, "num"]), "Last sign"];
  return card("Running now", null, listTable("Running now", heads, app.running.map((run) => {
    const params = flatten(run.params);
    const planned = params.n_epochs ?? params.epochs;
    return runRow(app, run, [run.experiment_name, run.model_name,
      `${run.n_epochs_logged ?? "–"}${planned ? ` / ${planned}` : ""}`, num(run.final_metrics[metric]),
      durationOf(run), run.heartbeat_at ? ago(run.heartbeat_at) : null]);
  })));
}

function controls(lab, { metric_name: metric = "", order, top_k: top }) {
  const pick = (name, value, label, options) => el("label", {}, `${label} `,
    el("select", { value, data: { change: "board", name } }, options));
  const sizes = [...new Set([5, 10, 20, 50, top])].sort((a, b) => a - b);
  const names = [...new Set([...orderMetrics(lab.metrics), metric])];
  return el("form", { class: "lab-filters", data: { submit: "none" } },
    pick("metric", metric, "Metric", names.map((name) => option(name))),
    pick("order", order, "Order", Object.entries(ORDERS).map(([value, text]) => option(value, text))),
    pick("top", String(top), "Show", sizes.map((n) => option(n, `top ${n}`))));
}

function boardTable(app, { top, asked }) {
  if (!top.length) return message("nomatch", "No run has a value to rank yet");
  const names = differingParams(top).filter((name) => !["model_name", "experiment_name"].includes(name)).slice(0, 3);
  const values = top.map((run) => run.metric_value);
  const decimals = columnDecimals(values);
  const [low, high] = [Math.min(0, ...values), Math.max(...values)];
  const share = (value) => (high > low ? (value - low) / (high - low) : 1);
  const hasNote = top.some((run) => run.note);
  return listTable("Leaderboard", ["Run", el("span", {}, asked.metric_name, el("small", {}, " final")), "Model",
    ...names.map((name) => [name, "num"]), ...(hasNote ? ["Note"] : [])], top.map((run) => runRow(app, run, [
    { class: "lab-value", title: String(run.metric_value), text: [el("i", { class: "lab-bar", "aria-hidden": "true",
      style: { "--share": share(run.metric_value) } }), el("span", {}, fixed(run.metric_value, decimals))] },
    run.model_name, ...names.map((name) => param(flatten(run.params)[name])),
    ...(hasNote ? [{ class: "lab-cut", title: run.note, text: run.note ?? "" }] : [])])));
}

function experimentsCard(app) {
  const heads = ["Experiment", ["Runs", "num"], ["Running", "num"], "Last activity"];
  return card("Experiments", null, listTable("Experiments", heads, app.lab.experiments.map((one) => ({
    key: one.experiment_name ?? "none", cells: [one.experiment_name === null ? "without a name"
      : el("a", { href: app.href("runs", { experiment_name: one.experiment_name }) }, one.experiment_name),
    one.n_runs, one.n_running || null, when(one.last_activity)] }))));
}

function troubleCard(app, { trouble }) {
  return card("Failed and killed", null, listTable("Failed and killed", ["Run", "Status", "Model", "Started", "Reason"],
    trouble.map((run) => {
      const { kind, head, what, detail } = endingOf(run);
      const text = [head !== run.status && `${head}: `, what, detail && el("small", {}, ` ${detail}`)];
      return runRow(app, run, [statusOf(run), run.model_name, when(run.timestamp),
        { class: "lab-reason", data: { kind }, text }]);
    })));
}
