/** Two to twenty runs side by side: who is best, what differs, and the curves over each other. */
import { compareRuns, curves } from "../api.js";
import { ChartGroup, swatch, toSeries } from "../chart.js";
import { button, card, chartsBox, delegate, el, listTable, message, muted, render } from "../dom.js";
import { columnDecimals, count, flatten, orderMetrics, param, refOf, shortId } from "../format.js";
import { number } from "../table.js";

const [LEAST, MOST] = [2, 20];

export function create(app, root) {
  const state = { asked: null, comparison: null, curves: [], isAll: false };
  const group = new ChartGroup({ onRange: () => fetchCurves().then(draw) });
  const ids = () => app.selection.filter(Boolean);
  const slotAt = (i) => app.selection.flatMap((ref, slot) => (ref ? [slot] : []))[i];

  const fetchAll = async () => { [state.comparison] = await Promise.all([compareRuns(ids()), fetchCurves()]); };
  /** Read the window that is shown; a zoom into downsampled curves so gets their full resolution. */
  const fetchCurves = async () => { state.curves = await curves(ids(), group.range); };

  function draw() {
    const { comparison } = state;
    if (!comparison) return;
    render(root, el("h1", {}, `Compare ${count(comparison.runs.length, "run")}`),
      el("p", { class: "lab-verdict", data: { key: "verdict" } }, verdict(comparison)),
      card("Metrics", "final", metricsTable(comparison)), card("Params", null, paramsTable(comparison)),
      card("Curves", null, curveCharts(comparison.runs)), card("Code and packages", null, codeTable(comparison)));
  }
  /** One column a run: its colour, model and id, and a way out of the comparison. */
  const heads = (runs) => runs.map((run, i) => el("span", { class: "lab-head" }, swatch(slotAt(i)),
    el("a", { href: app.href("runs", { run: refOf(run.run_id) }) }, nameOf(run)),
    button("×", { act: "drop", ref: run.run_id }, { class: "lab-x", "aria-label": `Take ${shortId(run.run_id)} out` })));

  function metricsTable({ runs, metric_keys: names, best }) {
    const rows = ordered(names).map((name) => {
      const decimals = columnDecimals(runs.map((run) => run.final_metrics[name]));
      const goal = best[name] && (best[name].direction === "minimize" ? " lower is better" : " higher is better");
      return { key: name, metric: name, cells: [[name, el("small", {}, goal)], ...runs.map((run) => {
        const isBest = best[name]?.run_ids.includes(run.run_id);
        return { class: isBest && "lab-best", data: { best: isBest && "yes" },
          text: [isBest && el("span", { title: "best of these" }, "★ "), number(run.final_metrics[name], decimals)] };
      })] };
    });
    return rows.length ? listTable("Metrics", ["Metric", ...heads(runs)], rows) : muted("These runs have no metrics.");
  }
  /** What differs, the first run being the one compared to; all params on demand. */
  function paramsTable({ runs, param_keys: names, differing_params: differing }) {
    const equal = names.filter((name) => !differing.includes(name));
    const values = runs.map((run) => flatten(run.params));
    const rows = (state.isAll ? [...differing, ...equal] : differing).map((name) =>
      rowOf(name, values.map((of) => param(of[name])), { param: name }));
    return [rows.length ? listTable("Params", ["Param", ...heads(runs)], rows) : muted("All params are equal."),
      equal.length > 0 && button(state.isAll ? "Hide equal" : `Show ${equal.length} equal`, { act: "equal" })];
  }

  function curveCharts(runs) {
    const logged = state.curves.filter((curve) => curve.n_points > 0);
    const names = ordered([...new Set(logged.map((curve) => curve.metric_name))]);
    const at = (curve) => runs.findIndex((run) => run.run_id === curve.run_id);
    return !names.length ? muted("None of these runs logged points.") : chartsBox(group.isLog, group.figures(
      names.map((name) => ({ name, direction: app.lab.metrics.find((metric) => metric.metric_name === name)?.direction,
        series: logged.filter((curve) => curve.metric_name === name && at(curve) >= 0).map((curve) =>
          toSeries(curve, { label: nameOf(runs[at(curve)]), slot: slotAt(at(curve)) })) }))));
  }

  function codeTable({ runs, differing_packages: packages }) {
    const facts = { ended: (run) => run.end_reason ?? run.status, "git hash": (run) => run.git_hash?.slice(0, 10) ?? "–",
      "uncommitted changes": (run) => (run.git_diff ? "yes" : "no"), python: (run) => run.python_version ?? "–" };
    for (const [name, by] of Object.entries(packages)) facts[name] = (run) => by[run.run_id] ?? "not installed";
    return listTable("Code and packages", ["Fact", ...heads(runs)],
      Object.entries(facts).map(([name, of]) => rowOf(name, runs.map(of))));
  }

  function drawChoice(n) {
    Object.assign(state, { asked: null, comparison: null });
    render(root, el("h1", {}, "Compare"), message("nomatch", `Choose ${LEAST} to ${MOST} runs`,
      el("p", {}, n ? `${count(n, "run")} chosen so far.` : "Nothing is chosen yet.",
        " Tick them in the table of runs; their colours stay the same here."),
      el("a", { class: "lab-button", href: app.href("runs", app.last.runs) }, "Choose runs")));
  }

  delegate(root, "click", { drop: (target) => app.pick(target.dataset.ref),
    equal: () => { state.isAll = !state.isAll; draw(); } });
  return {
    async update() {
      group.set({ isLog: app.query.log === "y" });
      const asked = ids().join();
      if (ids().length < LEAST || ids().length > MOST) drawChoice(ids().length);
      else if (asked === state.asked || await app.load(root, fetchAll, !state.comparison)) {
        state.asked = asked;
        draw();
      }
    },
    async tick(isFull) {
      const isLive = state.comparison?.runs.some((run) => run.status === "running");
      if (!state.comparison || !(isFull || isLive)) return;
      await fetchAll();
      draw();
    },
    close: () => group.keep(), };
}

const nameOf = (run) => `${run.model_name ?? run.experiment_name ?? ""} ${shortId(run.run_id)}`.trim();
const ordered = (names) => orderMetrics(names.map((name) => ({ metric_name: name, n_runs: 0 })));
/** A row whose cells are marked where they differ from the first run's. */
const rowOf = (name, cells, data = {}) => ({ key: name, ...data,
  cells: [name, ...cells.map((text) => ({ text, data: { diff: text !== cells[0] && "yes" } }))] });

/** One sentence: who is ahead on how many metrics, and in what the runs differ. */
export function verdict({ runs, best, differing_params: differing, differing_packages: packages }) {
  const ranked = Object.values(best);
  const wins = runs.map((run) => ranked.filter((one) => one.run_ids.includes(run.run_id)).length);
  const most = Math.max(...wins);
  const leaders = runs.filter((run, i) => wins[i] === most).map(nameOf).join(" and ");
  const isCode = new Set(runs.map((run) => run.git_hash + run.git_diff)).size > 1;
  const names = [...differing.slice(0, 4), differing.length > 4 && `${differing.length - 4} more params`,
    isCode && "code", Object.keys(packages).length > 0 && "packages"].filter(Boolean).join(", ");
  return `Best on ${most} of ${count(ranked.length, "metric")}: ${leaders}. They differ in ${names || "nothing recorded"}.`;
}
