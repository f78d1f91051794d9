/** A question in plain words, its answer, and the runs it stands on. */
import { ask, getRun, setNote } from "../api.js";
import { swatch } from "../chart.js";
import { attempt, button, delegate, el, isSave, listTable, render } from "../dom.js";
import { columnDecimals, count, differingParams, flatten, orderMetrics, param, parseSelection, refOf, shortId,
  slotOf } from "../format.js";
import { number } from "../table.js";

const TICK_MS = 100;       // of the seconds shown while it thinks
const MAX_RUNS = 20;       // that are read, highlighted and compared
const turns = [];          // newest first: {question, startedAt, seconds, answer, error, runs}
const refsOf = (runIds) => parseSelection(runIds.slice(0, MAX_RUNS).map(refOf).join());
export function create(app, root) {
  let [aborter, timer] = [null, null];   // of the question that is being thought about
  const box = () => root.querySelector("textarea");

  async function put(question) {
    if (aborter || !question.trim()) return;
    const turn = { question: question.trim(), startedAt: Date.now(), runs: new Map() };
    turns.unshift(turn);
    aborter = new AbortController();
    timer = setInterval(draw, TICK_MS);
    draw();
    box().value = turn.question;
    try {
      turn.answer = await ask(turn.question, aborter.signal);
      await describe(turn);
      box().value = "";
      // The runs it stands on become the selection, and so light up in Runs.
      const refs = refsOf(turn.answer.used_run_ids);
      if (refs.length) app.change({}, { replace: true, selection: refs });
    } catch (error) {
      turn.error = error.name === "AbortError" ? "Cancelled." : error.message;
    }
    clearInterval(timer);
    turn.seconds = (Date.now() - turn.startedAt) / 1000;
    aborter = null;
    draw();
  }
  /** Read what chips and the flagged run show; an answer stands without it. */
  async function describe({ answer, runs }) {
    const ids = new Set([...answer.used_run_ids.slice(0, MAX_RUNS), answer.flagged_run_id].filter(Boolean));
    await Promise.all([...ids].map((runId) => getRun(runId).then((run) => runs.set(runId, run), () => {})));
  }

  const undo = (turn) => attempt("Not undone", async () => {
    await setNote(turn.answer.flagged_run_id, turn.answer.previous_note ?? null);
    turn.isUndone = true;
    draw();
  });

  function draw() {
    render(root, el("h1", {}, "Assistant"), el("form", { class: "lab-ask", data: { key: "ask", submit: "ask" } },
      el("textarea", { rows: "2", "aria-label": "Your question", placeholder: "Ask about the runs of this lab",
        value: box()?.value ?? "", data: { keydown: "ask" } }),
      aborter ? button("Cancel", { act: "cancel" }) : el("button", { class: "lab-primary" }, "Ask")),
    el("div", { class: "lab-row", data: { key: "suggestions" } }, suggestions(app.lab).map((text) =>
      button(text, { act: "suggest", text }, { class: "lab-chip", disabled: Boolean(aborter) }))),
    turns.map((turn, i) => el("article", { class: "lab-card lab-turn", data: { key: `turn${turns.length - i}` } },
      el("h2", {}, turn.question), turnBody(turn, i))));
  }

  function turnBody(turn, index) {
    const { answer, error, seconds, startedAt, runs } = turn;
    if (error) return el("p", { role: "alert", class: "lab-bad" }, error);
    if (seconds === undefined) {
      return el("p", { role: "status" }, "Thinking ", el("span", { class: "lab-muted", "aria-hidden": "true" },
        `${((Date.now() - startedAt) / 1000).toFixed(1)} s`));
    }
    const { used_run_ids: used, flagged_run_id: flagged, comparison } = answer;
    const chips = used.map((runId) => chip(runId, runs.get(runId)));
    return [el("p", { class: "lab-answer", role: "status" }, answer.natural_language_answer),
      used.length > 0 && el("div", { class: "lab-row", data: { key: "chips" } }, chips, used.length > 1 && el("a", {
        class: "lab-button", href: app.href("compare", {}, refsOf(used)), data: { do: "compare" } }, "Compare these")),
      comparison?.runs.length > 0 && comparisonTable(comparison),
      flagged && el("div", { class: "lab-flagged", data: { key: "flagged" } }, chip(flagged, runs.get(flagged)),
        turn.isUndone ? " The note before is back." : [" A note was written: ", el("b", {}, runs.get(flagged)?.note),
          " ", button("Undo", { act: "undo", turn: index }, { title: "Put the note back as it was" })]), footer(answer, seconds)];
  }

  function chip(runId, run) {
    const slot = slotOf(app.selection, runId);
    return el("a", { class: "lab-chip", href: app.href("runs", { run: refOf(runId) }), title: runId,
      data: { runRef: runId, key: runId } }, slot >= 0 && swatch(slot), run?.model_name && `${run.model_name} `,
    el("code", {}, shortId(runId)));
  }

  delegate(root, "click", { suggest: (target) => put(target.dataset.text), cancel: () => aborter?.abort(),
    undo: (target) => undo(turns[target.dataset.turn]) });
  delegate(root, "submit", { ask: (target, event) => { event.preventDefault(); put(box().value); } });
  delegate(root, "keydown", { ask: (target, event) => {
    if (!isSave(event)) return;
    event.preventDefault();
    put(target.value);
  } });
  return { update: async () => draw(), close: () => aborter?.abort() };
}

/** Three questions that this lab can answer. */
export function suggestions({ metrics, models, counts }) {
  const [metric] = orderMetrics(metrics);
  const [a, b] = models.map((model) => model.name).filter(Boolean);
  return [metric && `Show me my top 3 runs by ${metric} and compare them.`,
    metric && (b ? `Compare the ${a} and ${b} runs by ${metric}.` : `Which run has the best ${metric}?`),
    counts.failed ? "Which runs failed?" : "Summarize my experiments."].filter(Boolean);
}

function comparisonTable({ metric_keys: metrics, runs }) {
  const params = differingParams(runs).filter((name) => name !== "model_name");
  const decimals = metrics.map((name) => columnDecimals(runs.map((run) => run.final_metrics[name])));
  return listTable("Comparison", ["Run", "Model", ...[...metrics, ...params].map((name) => [name, "num"])],
    runs.map((run) => ({ key: run.run_id, cells: [el("code", {}, shortId(run.run_id)), run.model_name,
      ...metrics.map((name, i) => number(run.final_metrics[name], decimals[i])),
      ...params.map((name) => param(flatten(run.params)[name]))] })));
}

/** Which planner answered, in what time, by which requests. */
const footer = ({ answered_by: who, steps }, seconds) => el("details", { class: "lab-steps", data: { key: "steps" } },
  el("summary", {}, `${who} · ${seconds.toFixed(1)} s · ${count(steps.length, "step")}`),
  el("ol", {}, steps.map(({ tool, args, request, n_results: n }) => el("li", {}, el("b", {}, tool), " ",
    el("code", {}, JSON.stringify(args)), el("br"), el("code", {}, request), ` · ${count(n ?? 0, "result")}`))));
