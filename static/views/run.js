/** One run: as the panel beside the table, and as a page of its own (#/run?id=...). */
import { curves, deleteRun, getRun, setNote } from "../api.js";
import { ChartGroup, toSeries } from "../chart.js";
import { attempt, button, chartsBox, confirmed, delegate, el, errorBox, isSave, listTable, message, muted, render,
  toast } from "../dom.js";
import { bytes, endingOf, flatten, num, param, refOf, shortId, slotOf, systemPlace } from "../format.js";
import { durationOf, slotMark, statusOf, when } from "../table.js";

const MAX_DIFF_LINES = 2000;
const isSystem = ({ metric_name: name }) => name.startsWith("system/");

/** Args: onClose(isDeleted), which a panel has and a page has not. */
export function create(app, root, onClose = null) {
  const state = {};
  const group = new ChartGroup({ onRange: () => fetchCurves().then(draw) });
  const machine = new ChartGroup({ xName: "time", base: [0], onRange: () => fetchSystem().then(draw) });
  const asked = () => app.query.run ?? app.query.id ?? "";

  async function load() {
    const ref = asked();
    leave();
    const run = await getRun(ref);
    if (ref !== asked()) return;
    state.run = run;
    await Promise.all([fetchCurves(), fetchSystem()]);
  }
  function leave() {
    Object.assign(state, { run: null, curves: [], system: null, isEditing: false, noteError: "" });
    [group, machine].forEach((one) => { one.keep(); one.range = null; });
  }
  /** Read the window that is shown; a zoom into a downsampled curve so gets its full resolution. */
  const fetchCurves = async () => { state.curves = await curves([state.run.run_id], group.range); };
  /** Read the machine's curves, where they are shown. */
  async function fetchSystem() {
    const names = state.run.metrics.filter(isSystem).map((metric) => metric.metric_name);
    const more = { names, x: "time", max_points: 400 };
    state.system = app.query.system && names.length ? await curves([state.run.run_id], machine.range, more) : null;
  }
  const closer = () => onClose
    && button("×", { act: "close", key: "close" }, { class: "lab-close", "aria-label": "Close the run" });

  function drawError(error) {
    render(root, closer(), error.status !== 404 ? errorBox(error) : message("error", `No run ${asked()} in this lab`,
      el("p", {}, error.message), el("a", { href: app.href("runs") }, "Show all runs")));
  }

  function draw() {
    const { run } = state;
    if (!run) return;
    const params = Object.entries(flatten(run.params)).map(([name, value]) => [name, param(value)]);
    render(root, closer(), el("article", { class: "lab-run", data: { key: run.run_id, run: run.run_id } },
      el("h2", {}, slotMark(app.selection, run.run_id), run.model_name ?? run.experiment_name ?? "Run", " ",
        el("code", { title: run.run_id }, shortId(run.run_id))),
      el("div", { class: "lab-row", data: { key: "status" } }, statusOf(run),
        actions(run, slotOf(app.selection, run.run_id) >= 0)),
      ending(run), noteEditor(run.note ?? ""), context(app, run),
      run.resumptions?.length > 0 && section("Resumptions", resumptionsTable(run)),
      section("Curves", curveCharts(run)), section("Metrics", metricsTable(run)),
      section("Params", facts("params", params)), run.metrics.some(isSystem) && section("System", systemCharts()),
      run.artifact_files.length > 0 && section("Artifacts", artifacts(run)), environment(run)));
  }

  const actions = ({ run_id: runId }, isIn) => [
    button(isIn ? "Selected" : "Select", { act: "pick" }, { "aria-pressed": String(isIn) }),
    button("Copy id", { copy: runId }),
    onClose && el("a", { class: "lab-button", href: app.href("run", { id: refOf(runId) }) }, "Open as page"),
    button("Delete", { act: "trash" }, { class: "lab-danger" })];

  function noteEditor(note) {
    const text = el("span", { class: note ? null : "lab-muted" }, note || "Add a note");
    return !state.isEditing ? el("div", { class: "lab-note", data: { key: "note" } },
      button(text, { act: "edit" }, { "aria-label": `Edit note: ${note || "Add a note"}` }))
      : el("div", { class: "lab-note", data: { key: "editor" } },
      el("textarea", { rows: "3", maxlength: "10000", "aria-label": "Note", value: note, data: { keydown: "note" },
        "aria-invalid": state.noteError && "true" }),
      el("div", { class: "lab-row" }, button("Save", { act: "save" }, { class: "lab-primary" }),
        button("Cancel", { act: "cancel" }), el("small", { class: "lab-muted" }, "Enter saves, Esc restores")),
      state.noteError && el("p", { role: "alert", class: "lab-bad" }, state.noteError));
  }

  function curveCharts(run) {
    const pairs = mergedPairs(state.curves.filter((curve) => curve.n_points > 0 && curve.run_id === run.run_id));
    if (!pairs.length) return muted("No point logged", run.status === "running" && " yet", ".");
    const slot = slotOf(app.selection, run.run_id);
    const look = ({ curve, isDashed }) => ({ label: curve.metric_name, slot: slot < 0 ? "accent" : slot, isDashed });
    return chartsBox(group.isLog, group.figures(pairs.map(({ name, title, lines }) => ({ name, title, labelName: "metric",
      series: lines.map((line) => toSeries(line.curve, look(line))) }))));
  }

  function systemCharts() {
    const { system } = state;
    const byTitle = Object.groupBy(system ?? [], (curve) => systemPlace(curve.metric_name)[0]);
    const isOpen = { "aria-expanded": String(Boolean(system)) };
    return [button(`${system ? "Hide" : "Show"} system metrics`, { act: "system" }, isOpen),
      el("div", { class: "lab-charts lab-small", data: { key: "system" } }, machine.figures(
        Object.entries(byTitle).map(([name, lines]) => ({ name, labelName: "of", series: lines.map((curve, slot) =>
          toSeries(curve, { label: systemPlace(curve.metric_name)[1], slot })) }))))];
  }

  function edit(isEditing) {
    Object.assign(state, { isEditing, noteError: "" });
    draw();
    root.querySelector(isEditing ? "textarea" : "[data-act=edit]")?.focus();
  }

  async function save() {
    const { run } = state;
    try {
      const { note } = await setNote(run.run_id, root.querySelector("textarea").value.trim() || null);
      Object.assign(run, { note });
      edit(false);
      toast("Note saved");
    } catch (error) {
      state.noteError = `Not saved: ${error.message}`;
      draw();
    }
  }

  async function trash() {
    const name = shortId(state.run.run_id);
    const detail = "It goes to the trash and leaves every list. Its artifact files stay where they are.";
    if (!await confirmed(`Delete run ${name}?`, detail, "Delete")) return;
    await attempt("Not deleted", async () => {
      await deleteRun(state.run.run_id);
      await app.refresh();
      toast(`Run ${name} is in the trash`);
      onClose ? onClose(true) : app.go("runs", {});
    });
  }

  delegate(root, "click", { close: () => onClose(), edit: () => edit(true), cancel: () => edit(false), save, trash,
    pick: () => app.pick(state.run.run_id), system: () => app.change({ system: app.query.system ? "" : "shown" }) });
  delegate(root, "keydown", { note: (target, event) => {
    if (!isSave(event) && event.key !== "Escape") return;
    event.preventDefault();
    if (isSave(event)) save();
    else edit(false);
  } });

  return {
    async update() {
      group.set({ isLog: app.query.log === "y" });
      if (state.run && refOf(state.run.run_id) === refOf(asked())) {
        if (Boolean(app.query.system) !== Boolean(state.system)) await fetchSystem();
        return draw();
      }
      if (!root.childNodes.length) render(root, message("loading", "Loading the run"));
      return load().then(draw, drawError);
    },
    async tick(isFull) {
      const { run } = state;
      if (!run || (run.status !== "running" && !isFull)) return;
      const fresh = await getRun(run.run_id);
      if (state.run !== run) return;
      state.run = fresh;
      if (nSamples(run) !== nSamples(fresh)) await fetchSystem();
      if (run.status === "running") await fetchCurves();
      draw();
    },
    runId: () => state.run?.run_id, close: leave,
  };
}

const section = (title, ...children) => el("section", { data: { key: title } }, el("h3", {}, title), children);

function facts(key, pairs) {
  const row = ([name, value]) => el("tr", {}, el("th", { scope: "row" }, name), el("td", {}, value));
  if (!pairs.length) return muted("None recorded.");
  return el("table", { class: "lab-facts", data: { key, table: key } }, el("tbody", {}, pairs.map(row)));
}

const nSamples = ({ metrics }) => metrics.filter(isSystem).reduce((sum, metric) => sum + metric.n_points, 0);

/** How the run ended, in words; its traceback folded below. */
function ending(run) {
  const end = endingOf(run);
  return end && el("div", { class: "lab-ending", data: { key: "ending", kind: end.kind } },
    el("p", {}, el("b", {}, `${end.head}:`), " ", end.what), end.detail && el("p", { class: "lab-muted" }, end.detail),
    run.error && el("details", {}, el("summary", {}, "Traceback"), el("pre", { tabindex: "0" }, run.error)));
}

const resumptionsTable = ({ resumptions }) => listTable("Resumptions", ["When", "Host", "Process", "Command"],
  resumptions.map(({ at, hostname, pid, command }, key) => ({ key, cells: [when(at), hostname, pid,
    { class: "lab-cut", title: command, text: command && el("code", {}, command) }] })));

function context(app, run) {
  const runLink = (id) => el("a", { href: app.href("run", { id: refOf(id) }) }, shortId(id), " ");
  const { experiment_name, git_hash: hash, command } = run;
  const pairs = { Experiment: experiment_name && el("a", { href: app.href("runs", { experiment_name }) }, experiment_name),
    Model: run.model_name, Dataset: run.dataset_id, Task: run.task_name,
    Started: when(run.timestamp), Duration: durationOf(run), Host: run.hostname,
    "Received from": run.received_from,
    Git: hash && [el("code", { title: hash }, hash.slice(0, 10)), run.git_diff && " + uncommitted changes"],
    Parent: run.parent_run_id && runLink(run.parent_run_id),
    Nested: run.child_run_ids.length > 0 && run.child_run_ids.map(runLink),
    Command: command && el("span", { class: "lab-command" }, el("code", {}, command),
      button("Copy", { copy: command }, { "aria-label": "Copy the command" })) };
  return facts("context", Object.entries(pairs).filter(([, value]) => value));
}

/** Each metric's first, best (with its place), last and final value. */
function metricsTable({ metrics }) {
  const best = (metric) => {
    const which = metric.direction === "minimize" ? "min" : "max";
    const [epoch, step] = [metric[`${which}_epoch`], metric[`${which}_step`]];
    const place = epoch !== null ? ` @ epoch ${epoch}` : step !== null && ` @ step ${step}`;
    return el("span", {}, num(metric[`${which}_value`]), el("small", {}, place));
  };
  const heads = ["Metric", ...["First", "Best", "Last", "Final"].map((head) => [head, "num"])];
  const own = metrics.filter((metric) => !isSystem(metric));
  const rows = own.map((metric) => ({ key: metric.metric_name, metric: metric.metric_name, cells: [metric.metric_name,
    num(metric.first_value), best(metric), num(metric.last_value),
    el("b", { title: metric.is_returned ? "returned by the run" : "last logged" }, num(metric.value))] }));
  return rows.length ? listTable("Metrics", heads, rows) : muted("None recorded.");
}

const artifacts = ({ artifact_files: files }) => el("ul", { class: "lab-plain" }, files.map((file) => {
  const name = file.path.split(/[\\/]/).pop();
  const about = file.exists ? ` ${file.kind} ${bytes(file.size_bytes)}` : " missing on this machine";
  return el("li", { data: { key: file.index }, title: file.path }, file.exists
    ? el("a", { href: file.url, download: true }, name) : name, el("small", { class: !file.exists && "lab-warn" }, about));
}));

function environment({ device_info: device, python_version: python, cwd, pip_freeze: packages, git_diff: patch }) {
  const known = Object.entries(flatten(device)).map(([name, value]) => [name, param(value)]);
  const fold = (title, body) => el("details", { data: { key: title } }, el("summary", {}, title), body);
  return section("Environment",
    facts("device", [["Python", python], ["Directory", cwd], ...known].filter(([, value]) => value)),
    packages && fold("Packages", el("pre", { tabindex: "0" }, packages)),
    patch && fold("Uncommitted changes", diff(patch)));
}

/** A unified diff, its lines coloured by what their first characters say. */
function diff(text) {
  const isAbout = (line) => /^(\+\+\+|---|diff |index |@@)/.test(line);
  const kind = (line) => (isAbout(line) ? "about" : { "+": "added", "-": "removed" }[line[0]]);
  return el("pre", { class: "lab-diff", tabindex: "0" }, text.split("\n").slice(0, MAX_DIFF_LINES)
    .map((line) => el("span", { data: { line: kind(line) } }, `${line}\n`)));
}

/** Curves of one run, train drawn (dashed) with its val: [{name, title, lines: [{curve, isDashed}]}]. */
export function mergedPairs(curves) {
  const byName = new Map(curves.map((curve) => [curve.metric_name, curve]));
  const isPaired = (name) => /^train[_/.]/.test(name) && byName.has(name.replace(/^train/, "val"));
  return [...byName].filter(([name]) => !isPaired(name)).map(([name, curve]) => {
    const train = /^val[_/.]/.test(name) && byName.get(name.replace(/^val/, "train"));
    return { name, title: train ? `${name} · ${train.metric_name} dashed` : name,
      lines: [{ curve, isDashed: false }, ...(train ? [{ curve: train, isDashed: true }] : [])] };
  });
}
