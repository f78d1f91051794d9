/** Two to twenty runs side by side: who is best, what differs, and the curves over each other. */
import { compareRuns, curves } from "../api.js";
import { ChartGroup, swatch, toSeries } from "../chart.js";
import { button, card, delegate, el, listTable, message, render } from "../dom.js";
import { columnDecimals, count, flatten, orderMetrics, param, refOf, shortId } from "../format.js";
import { number } from "../table.js";

const MAX_POINTS = 1000;   // a curve
const [LEAST, MOST] = [2, 20];

export function create(app, root) {
  const state = { asked: null, comparison: null, curves: [], isAll: false };
  const group = new ChartGroup({ onRange: zoomed });
  const slotAt = (i) => app.selection.flatMap((ref, slot) => (ref ? [slot] : []))[i] ?? i;

  async function fetchAll() {
    const ids = app.selection.filter(Boolean);
    const [comparison] = await Promise.all([compareRuns(ids), fetchCurves(ids)]);
    state.comparison = comparison;
  }

  async function fetchCurves(ids = app.selection.filter(Boolean)) {
    const [from, to] = group.range ?? [];
    state.curves = (await curves(ids, { max_points: MAX_POINTS, from, to })).curves;
  }

  /** A zoom into downsampled curves reads that window again, at full resolution. */
  async function zoomed() {
    await fetchCurves();
    draw();
  }

  function draw() {
    const { comparison } = state;
    if (!comparison) return;
    const { runs } = comparison;
    render(root, el("h1", {}, `Compare ${count(runs.length, "run")}`),
      el("p", { class: "lab-verdict", data: { key: "verdict" } }, verdict(comparison)),
      card("Metrics", "final", metricsTable(comparison)), card("Params", null, paramsTable(comparison)),
      card("Curves", null, curveCharts(runs)), card("Code and packages", null, codeTable(comparison)));
  }

  /** One column a run: its colour, model and id, and a way out of the comparison. */
  const heads = (runs) => runs.map((run, i) => el("span", { class: "lab-head" }, swatch(slotAt(i)),
    el("a", { href: app.href("runs", { run: refOf(run.run_id) }) },
      `${run.model_name ?? run.experiment_name ?? ""} `, el("code", {}, shortId(run.run_id))),
    button("×", { act: "drop", runId: run.run_id },
      { class: "lab-x", "aria-label": `Take ${shortId(run.run_id)} out` })));

  function metricsTable({ runs, metric_keys: names, best }) {
    if (!names.length) return el("p", { class: "lab-muted" }, "These runs have no metrics.");
    const rows = ordered(names).map((name) => {
      const decimals = columnDecimals(runs.map((run) => run.final_metrics[name]));
      const goal = best[name] && (best[name].direction === "minimize" ? " lower is better" : " higher is better");
      const cell = (run) => {
        const isBest = best[name]?.run_ids.includes(run.run_id);
        return { class: isBest && "lab-best", data: { best: isBest && "yes" },
          text: [isBest && el("span", { title: "best of these" }, "★ "), number(run.final_metrics[name], decimals)] };
      };
      return { key: name, metric: name, cells: [[name, el("small", {}, goal)], ...runs.map(cell)] };
    });
    return listTable("Metrics", ["Metric", ...heads(runs)], rows);
  }

  /** What differs, the first run being the one compared to; all params on demand. */
  function paramsTable({ runs, param_keys: names, differing_params: differing }) {
    const equal = names.filter((name) => !differing.includes(name));
    const shown = state.isAll ? [...differing, ...equal] : differing;
    const values = runs.map((run) => flatten(run.params));
    const rows = shown.map((name) => ({ key: name, param: name, cells: [name, ...values.map((of) => ({
      text: param(of[name]), title: typeof of[name],
      data: { diff: param(of[name]) !== param(values[0][name]) && "yes" } }))] }));
    return [shown.length ? listTable("Params", ["Param", ...heads(runs)], rows)
      : el("p", { class: "lab-muted" }, "All params are equal."),
    equal.length > 0 && button(state.isAll ? "Hide equal" : `Show ${equal.length} equal`, { act: "equal" })];
  }

  function curveCharts(runs) {
    const logged = state.curves.filter((curve) => curve.n_points > 0);
    const names = ordered([...new Set(logged.map((curve) => curve.metric_name))]);
    if (!names.length) return el("p", { class: "lab-muted" }, "None of these runs logged points.");
    group.keep(names);
    const figures = names.map((name) => {
      const direction = app.lab.metrics.find((metric) => metric.metric_name === name)?.direction;
      const chart = group.chart(name, { direction });
      chart.setSeries(logged.filter((curve) => curve.metric_name === name).map((curve) => {
        const i = runs.findIndex((run) => run.run_id === curve.run_id);
        return toSeries(curve, { label: `${runs[i]?.model_name ?? ""} ${shortId(curve.run_id)}`, slot: slotAt(i) });
      }));
      return chart.figure;
    });
    return [el("label", {}, el("input", { type: "checkbox", checked: group.isLog, data: { change: "log" } }), " log y"),
      el("div", { class: "lab-charts", data: { key: "charts" } }, figures)];
  }

  function codeTable({ runs, differing_packages: packages }) {
    const row = (name, of) => {
      const cells = runs.map(of);
      return { key: name, cells: [name, ...cells.map((text) => ({ text, data: { diff: text !== cells[0] && "yes" } }))] };
    };
    return listTable("Code and packages", ["Fact", ...heads(runs)], [row("status", (run) => run.status),
      row("git hash", (run) => run.git_hash?.slice(0, 10) ?? "–"),
      row("uncommitted changes", (run) => (run.git_diff ? "yes" : "no")),
      row("python", (run) => run.python_version ?? "–"),
      ...Object.entries(packages).map(([name, by]) => row(name, (run) => by[run.run_id] ?? "not installed"))]);
  }

  delegate(root, "click", {
    equal: () => { state.isAll = !state.isAll; draw(); },
    drop: (target) => app.pick(target.dataset.runId),
  });
  delegate(root, "change", { log: (target) => app.change({ log: target.checked ? "y" : "" }) });

  return {
    async update() {
      const ids = app.selection.filter(Boolean);
      group.set({ isLog: app.query.log === "y" });
      if (ids.length < LEAST || ids.length > MOST) {
        Object.assign(state, { asked: null, comparison: null });
        return render(root, el("h1", {}, "Compare"), message("nomatch", `Choose ${LEAST} to ${MOST} runs`,
          el("p", {}, ids.length ? `${count(ids.length, "run")} chosen so far.` : "Nothing is chosen yet.",
            " Tick them in the table of runs; their colours stay the same here."),
          el("a", { class: "lab-button", href: app.href("runs", app.last.runs ?? {}) }, "Choose runs")));
      }
      const asked = ids.join();
      if (asked !== state.asked) {
        Object.assign(state, { asked, comparison: null });
        await app.load(root, fetchAll, true);
      }
      return asked === state.asked && draw();
    },
    async tick(isFull) {
      const isLive = state.comparison?.runs.some((run) => run.status === "running");
      if (!state.comparison || !(isFull || isLive)) return;
      await fetchAll();
      draw();
    },
    close: () => group.keep(),
  };
}

const ordered = (names) => orderMetrics(names.map((name) => ({ metric_name: name, n_runs: 0 })))
  .map((metric) => metric.metric_name);

/** One sentence: who is ahead on how many metrics, and in what the runs differ. */
export function verdict({ runs, best, differing_params: differing, differing_packages: packages }) {
  const ranked = Object.values(best);
  const wins = runs.map((run) => ranked.filter((one) => one.run_ids.includes(run.run_id)).length);
  const most = Math.max(...wins);
  const leaders = runs.filter((run, i) => wins[i] === most).map((run) => `${run.model_name ?? ""} ${shortId(run.run_id)}`.trim());
  const ahead = !ranked.length ? "No metric to compare"
    : `${leaders.join(" and ")} ${leaders.length > 1 ? "are" : "is"} best on ${most} of ${count(ranked.length, "metric")}`;
  const names = [...differing.slice(0, 4), ...(differing.length > 4 ? [`${differing.length - 4} more params`] : []),
    ...(new Set(runs.map((run) => `${run.git_hash}${run.git_diff}`)).size > 1 ? ["code"] : []),
    ...(Object.keys(packages).length ? ["packages"] : [])];
  return `${ahead}; they ${names.length ? `differ in ${names.join(", ")}` : "have the same params, code and packages"}.`;
}
