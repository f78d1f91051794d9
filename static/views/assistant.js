/** A question in plain words, its answer, and the runs it stands on. */
import { ask, getRun, setNote } from "../api.js";
import { swatch } from "../chart.js";
import { button, delegate, el, listTable, render, toast } from "../dom.js";
import { columnDecimals, count, flatten, orderMetrics, param, parseSelection, refOf, shortId, slotOf } from "../format.js";
import { number } from "../table.js";

const TICK_MS = 100;       // of the seconds shown while it thinks
const turns = [];          // of this page: {question, answer, error, startedAt, seconds, names, flagged}

export function create(app, root) {
  let aborter = null;
  let timer = null;
  let draft = app.query.ask ?? "";

  async function put(question) {
    if (aborter || !question.trim()) return;
    const turn = { question: question.trim(), startedAt: Date.now(), before: new Map() };
    turns.unshift(turn);
    aborter = new AbortController();
    timer = setInterval(draw, TICK_MS);
    draw();
    try {
      turn.answer = await ask(turn.question, aborter.signal);
      draft = "";
      await describe(turn);
    } catch (error) {
      turn.error = error.name === "AbortError" ? "Cancelled." : error.message;
      draft = turn.question;
    } finally {
      clearInterval(timer);
      turn.seconds = (Date.now() - turn.startedAt) / 1000;
      aborter = null;
      root.querySelector("textarea").value = draft;
    }
    if (turn.answer?.used_run_ids.length) highlight(turn.answer.used_run_ids);
    draw();
  }

  /** Read what the chips and the flagged run show; an answer stands without it. */
  async function describe(turn) {
    const { used_run_ids: used, flagged_run_id: flagged } = turn.answer;
    const runs = await Promise.all([...new Set([...used.slice(0, 20), ...(flagged ? [flagged] : [])])]
      .map((runId) => getRun(runId).catch(() => null)));
    turn.runs = new Map(runs.filter(Boolean).map((run) => [run.run_id, run]));
  }

  /** The runs an answer stands on become the selection, and so light up in Runs. */
  function highlight(runIds) {
    app.change({}, { replace: true, selection: parseSelection(runIds.slice(0, 20).map(refOf).join(",")) });
  }

  async function undo(turn) {
    try {
      await setNote(turn.answer.flagged_run_id, null);
      turn.isUndone = true;
      toast("The note is taken off again");
    } catch (error) {
      toast(`Not undone: ${error.message}`);
    }
    draw();
  }

  function draw() {
    render(root, el("h1", {}, "Assistant"),
      el("form", { class: "lab-ask", data: { key: "ask", submit: "ask" } },
        el("label", { for: "lab-question-box", class: "lab-hidden" }, "Your question"),
        el("textarea", { id: "lab-question-box", rows: "2", value: draft, placeholder: "Ask about the runs of this lab",
          data: { keydown: "ask", input: "draft" } }),
        aborter ? button("Cancel", { act: "cancel" }) : el("button", { class: "lab-primary" }, "Ask")),
      el("div", { class: "lab-row", data: { key: "suggestions" } }, suggestions(app).map((text) =>
        button(text, { act: "suggest", text }, { class: "lab-chip", disabled: Boolean(aborter) }))),
      turns.map((turn, i) => el("article", { class: "lab-card lab-turn", data: { key: `turn${turns.length - i}` } },
        el("h2", {}, turn.question), turnBody(turn, turns.length - i))));
  }

  function turnBody(turn, key) {
    if (turn.error) return el("p", { role: "alert", class: "lab-bad" }, turn.error);
    if (!turn.answer || turn.seconds === undefined) {
      return el("p", { role: "status" }, "Thinking ", el("span", { class: "lab-muted", "aria-hidden": "true" },
        `${((Date.now() - turn.startedAt) / 1000).toFixed(1)} s`));
    }
    const { answer } = turn;
    return [el("p", { class: "lab-answer", role: "status" }, answer.natural_language_answer),
      answer.used_run_ids.length > 0 && el("div", { class: "lab-row", data: { key: "chips" } },
        answer.used_run_ids.map((runId) => chip(runId, turn.runs?.get(runId))), compareLink(answer.used_run_ids)),
      answer.comparison?.runs.length > 0 && comparisonTable(answer.comparison),
      answer.flagged_run_id && flagged(turn, key), footer(answer, turn.seconds)];
  }

  function chip(runId, run) {
    const slot = slotOf(app.selection, runId);
    return el("a", { class: "lab-chip", href: app.href("runs", { run: refOf(runId) }), title: runId,
      data: { runRef: runId, key: runId } }, slot >= 0 && swatch(slot), run?.model_name && `${run.model_name} `,
    el("code", {}, shortId(runId)));
  }

  const compareLink = (ids) => ids.length > 1 && ids.length <= 20 && el("a", { class: "lab-button", data: { do: "compare" },
    href: app.href("compare", {}, parseSelection(ids.map(refOf).join(","))) }, "Compare these");

  function flagged(turn, key) {
    const run = turn.runs?.get(turn.answer.flagged_run_id);
    return el("div", { class: "lab-flagged", data: { key: "flagged" } }, chip(turn.answer.flagged_run_id, run),
      turn.isUndone ? " The note was taken off again." : [" A note was written: ", el("b", {}, run?.note ?? ""), " ",
        button("Undo", { act: "undo", turn: key })]);
  }

  const form = () => root.querySelector("textarea");
  delegate(root, "click", {
    suggest: (target) => put(target.dataset.text),
    cancel: () => aborter?.abort(),
    undo: (target) => undo(turns[turns.length - Number(target.dataset.turn)]),
  });
  delegate(root, "submit", { ask: (target, event) => { event.preventDefault(); put(form().value); } });
  delegate(root, "input", { draft: (target) => { draft = target.value; } });
  delegate(root, "keydown", { ask: (target, event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    put(target.value);
  } });

  return {
    update: async () => draw(),
    close: () => { aborter?.abort(); clearInterval(timer); },
  };
}

/** Three questions that this lab can answer. */
export function suggestions({ lab }) {
  const metric = orderMetrics(lab.metrics)[0]?.metric_name;
  const [a, b] = lab.models.map((model) => model.name).filter(Boolean);
  return [metric && `Show me my top 3 runs by ${metric} and compare them.`,
    a && b && metric ? `Compare the ${a} and ${b} runs by ${metric}.` : metric && `Which run has the best ${metric}?`,
    lab.counts.failed ? "Which runs failed?" : "Summarize my experiments."].filter(Boolean);
}

function comparisonTable({ metric_keys: metrics, param_keys: params, runs }) {
  const column = (name) => columnDecimals(runs.map((run) => run.final_metrics[name]));
  const decimals = new Map(metrics.map((name) => [name, column(name)]));
  const heads = ["Run", "Model", ...[...metrics, ...params].map((name) => [name, "num"])];
  return listTable("Comparison", heads, runs.map((run) => ({ key: run.run_id, cells: [
    el("code", {}, shortId(run.run_id)), run.model_name,
    ...metrics.map((name) => number(run.final_metrics[name], decimals.get(name))),
    ...params.map((name) => param(flatten(run.params)[name]))] })));
}

/** Which planner answered, in what time, by which requests. */
function footer(answer, seconds) {
  return el("details", { class: "lab-steps", data: { key: "steps" } },
    el("summary", {}, `${answer.answered_by} · ${seconds.toFixed(1)} s · ${count(answer.steps.length, "step")}`),
    el("ol", {}, answer.steps.map((step) => el("li", {}, el("b", {}, step.tool), " ", el("code", {}, JSON.stringify(step.args)),
      el("br"), el("code", { class: "lab-muted" }, step.request), ` · ${count(step.n_results ?? 0, "result")}`))));
}
