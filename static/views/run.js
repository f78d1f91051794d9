/** One run: as the panel beside the table, and as a page of its own (#/run?id=...). */
import { curves, deleteRun, getRun, setNote } from "../api.js";
import { ChartGroup, mergedPairs, toSeries } from "../chart.js";
import { confirmed, delegate, el, errorBox, message, render, toast } from "../dom.js";
import { absolute, bytes, flatten, lastLine, num, param, refOf, shortId, slotOf } from "../format.js";
import { durationOf, slotMark, statusOf, when } from "../table.js";

const MAX_POINTS = 1200;   // a curve, about two a pixel

/** Args: onClose(isDeleted), for the panel; a page has none. */
export function create(app, root, onClose = null) {
  const state = { run: null, curves: [], isEditing: false, noteError: "" };
  let group = null;
  const asked = () => app.query.run ?? app.query.id ?? "";

  async function fetchCurves() {
    const [from, to] = group.range ?? [];
    state.curves = (await curves([state.run.run_id], { max_points: MAX_POINTS, from, to })).curves;
  }

  async function load() {
    const ref = asked();
    group?.close();
    Object.assign(state, { run: null, curves: [], isEditing: false, noteError: "" });
    group = new ChartGroup({ isLog: app.query.log === "y", onRange: zoomed });
    const run = await getRun(ref);
    if (ref !== asked()) return;
    state.run = run;
    await fetchCurves();
  }

  /** A zoom into a downsampled curve reads that window again, at full resolution. */
  async function zoomed() {
    if (!state.curves.some((curve) => curve.n_points > curve.x.length) && group.range) return;
    await fetchCurves();
    draw();
  }

  function unknown(error) {
    render(root, close(), error.status !== 404 ? errorBox(error) : message("error", `No run ${asked()} in this lab`,
      el("p", {}, error.message), el("a", { href: app.href("runs") }, "Show all runs")));
  }

  const close = () => onClose && el("button", { type: "button", class: "lab-close", "aria-label": "Close the run", data: { act: "close", key: "close" } }, "×");

  function draw() {
    const { run } = state;
    if (!run) return;
    render(root, close(), el("article", { class: "lab-run", data: { key: run.run_id, run: run.run_id } },
      el("h2", {}, slotMark(app.selection, run.run_id), run.model_name ?? run.experiment_name ?? "Run", " ", el("code", { title: run.run_id }, shortId(run.run_id))),
      el("div", { class: "lab-row", data: { key: "status" } }, statusOf(run.status), actions()), failure(run), noteEditor(), context(app, run),
      section("Curves", curvesOf(run)), section("Metrics", metricsTable(run)), section("Params", facts(Object.entries(flatten(run.params)).map(([name, value]) => [name, param(value)]), "params")),
      run.artifact_files.length > 0 && section("Artifacts", artifacts(run)), environment(run)));
  }

  function actions() {
    const { run } = state;
    const isIn = slotOf(app.selection, run.run_id) >= 0;
    return el("span", { class: "lab-row" }, el("button", { type: "button", "aria-pressed": String(isIn), data: { act: "pick" } }, isIn ? "Selected" : "Select"),
      el("button", { type: "button", data: { copy: run.run_id } }, "Copy id"),
      onClose && el("a", { class: "lab-button", href: app.href("run", { id: refOf(run.run_id) }) }, "Open as page"),
      el("button", { type: "button", class: "lab-danger", data: { act: "trash" } }, "Delete"));
  }

  function noteEditor() {
    const { run, isEditing, noteError } = state;
    if (!isEditing) {
      return el("div", { class: "lab-note", data: { key: "note" } }, el("button", { type: "button", data: { act: "edit", note: "" }, "aria-label": `Edit note: ${run.note ?? "none yet"}` },
        run.note ? el("span", {}, run.note) : el("span", { class: "lab-muted" }, "Add a note")));
    }
    return el("div", { class: "lab-note", data: { key: "editor" } },
      el("textarea", { rows: "3", maxlength: "10000", "aria-label": "Note", "aria-invalid": noteError && "true", "aria-describedby": noteError && "lab-note-error", value: run.note ?? "", data: { keydown: "note" } }),
      el("div", { class: "lab-row" }, el("button", { type: "button", class: "lab-primary", data: { act: "save" } }, "Save"), el("button", { type: "button", data: { act: "cancel" } }, "Cancel"),
        el("small", { class: "lab-muted" }, "Enter saves, Esc restores")), noteError && el("p", { role: "alert", id: "lab-note-error", class: "lab-bad" }, noteError));
  }

  function curvesOf(run) {
    const pairs = mergedPairs(state.curves.filter((curve) => curve.n_points > 0));
    if (!pairs.length) return el("p", { class: "lab-muted" }, run.status === "running" ? "No point logged yet." : "This run logged no points.");
    group.keep(pairs.map((pair) => pair.name));
    const slot = slotOf(app.selection, run.run_id);
    const figures = pairs.map(({ name, title, lines }) => {
      const direction = run.metrics.find((metric) => metric.metric_name === name)?.direction;
      const chart = group.chart(name, { title, direction, labelName: "metric" });
      chart.setSeries(lines.map(({ curve, isDashed }) => toSeries(curve, { label: curve.metric_name, slot: slot < 0 ? undefined : slot, isDashed })));
      return chart.figure;
    });
    return [el("div", { class: "lab-row", data: { key: "tools" } }, el("label", {}, el("input", { type: "checkbox", checked: group.isLog, data: { change: "log" } }), " log y"),
      el("small", { class: "lab-muted" }, "drag to zoom, double-click to reset")), el("div", { class: "lab-charts", data: { key: "charts" } }, figures)];
  }

  function edit(isEditing) {
    Object.assign(state, { isEditing, noteError: "" });
    draw();
    root.querySelector(isEditing ? "textarea" : "[data-act=edit]")?.focus();
  }

  async function save() {
    const text = root.querySelector("textarea").value.trim();
    try {
      const saved = await setNote(state.run.run_id, text || null);
      state.run = { ...state.run, note: saved.note };
      edit(false);
      toast("Note saved");
    } catch (error) {
      state.noteError = `Not saved: ${error.message}`;
      draw();
    }
  }

  async function trash() {
    const { run } = state;
    if (!await confirmed(`Delete run ${shortId(run.run_id)}?`, "It goes to the trash and leaves every list. Its artifact files stay where they are.", "Delete")) return;
    try {
      await deleteRun(run.run_id);
      toast(`Run ${shortId(run.run_id)} is in the trash`);
      if (onClose) onClose(true);
      else app.go("runs", {});
    } catch (error) {
      toast(`Not deleted: ${error.message}`);
    }
  }

  const acts = { close: () => onClose(), edit: () => edit(true), cancel: () => edit(false), save, trash, pick: () => app.pick(state.run.run_id) };
  const onClick = { ...acts };
  delegate(root, "click", onClick);
  delegate(root, "change", { log: (target) => { group.set({ isLog: target.checked }); app.change({ log: target.checked ? "y" : "" }); } });
  delegate(root, "keydown", { note: (target, event) => {
    if (event.key === "Escape") edit(false);
    else if (event.key === "Enter" && !event.shiftKey && !event.isComposing) save();
    else return;
    event.preventDefault();
    event.stopPropagation();
  } });

  return {
    async update() {
      group?.set({ isLog: app.query.log === "y" });
      if (state.run && refOf(state.run.run_id) === refOf(asked())) return draw();
      const isFirst = !root.childNodes.length;
      try {
        if (isFirst) render(root, message("loading", "Loading the run"));
        await load();
        draw();
      } catch (error) {
        unknown(error);
      }
      return undefined;
    },
    async tick(isFull) {
      const { run } = state;
      if (!run || (run.status !== "running" && !isFull)) return;
      const fresh = await getRun(run.run_id);
      if (state.run?.run_id !== fresh.run_id) return;
      if (run.status === "running" || fresh.status === "running") await fetchCurves();
      state.run = fresh;
      draw();
    },
    close: () => { group?.close(); state.run = null; },
  };
}

const section = (title, ...children) => el("section", { data: { key: title } }, el("h3", {}, title), children);

function facts(pairs, key) {
  if (!pairs.length) return el("p", { class: "lab-muted" }, "None recorded.");
  return el("table", { class: "lab-facts", data: { key, table: key } }, el("tbody", {}, pairs.map(([name, value]) => el("tr", {}, el("th", { scope: "row" }, name), el("td", {}, value)))));
}

function failure(run) {
  if (!run.error) return run.status === "killed" && el("p", { class: "lab-failure", data: { key: "failure" } }, "Killed: the process went away without a word.");
  return el("div", { class: "lab-failure", data: { key: "failure" } }, el("p", {}, el("b", {}, lastLine(run.error))),
    el("details", {}, el("summary", {}, "Traceback"), el("pre", { tabindex: "0" }, run.error)));
}

function context(app, run) {
  const pairs = [["Experiment", run.experiment_name && el("a", { href: app.href("runs", { experiment_name: run.experiment_name }) }, run.experiment_name)], ["Model", run.model_name],
    ["Dataset", run.dataset_id], ["Task", run.task_name], ["Started", run.timestamp && when(run.timestamp)], ["Duration", durationOf(run)],
    ["Git", run.git_hash && [el("code", { title: run.git_hash }, run.git_hash.slice(0, 10)), run.git_diff && " + uncommitted changes"]], ["Host", run.hostname],
    ["Parent", run.parent_run_id && el("a", { href: app.href("run", { id: run.parent_run_id }) }, shortId(run.parent_run_id))],
    ["Nested", run.child_run_ids?.length > 0 && run.child_run_ids.map((id) => [el("a", { href: app.href("run", { id: refOf(id) }) }, shortId(id)), " "])],
    ["Command", run.command && el("span", { class: "lab-command" }, el("code", {}, run.command), el("button", { type: "button", data: { copy: run.command }, "aria-label": "Copy the command" }, "Copy"))]];
  return facts(pairs.filter(([, value]) => value), "context");
}

function metricsTable(run) {
  if (!run.metrics.length) return el("p", { class: "lab-muted" }, "None recorded.");
  const at = (value, epoch, step) => [num(value), (epoch ?? step) !== null && (epoch ?? step) !== undefined && el("small", {}, ` @ ${epoch !== null ? "epoch" : "step"} ${epoch ?? step}`)];
  const best = (metric) => (metric.direction === "minimize" ? "min" : "max");
  return el("div", { class: "lab-wide-box", tabindex: "0", role: "group", "aria-label": "Metrics" }, el("table", { class: "lab-list", data: { table: "metrics" } },
    el("thead", {}, el("tr", {}, ["Metric", "First", "Best", "Last", "Final"].map((head, i) => el("th", { scope: "col", class: i > 0 && "lab-num" }, head)))),
    el("tbody", {}, run.metrics.map((metric) => el("tr", { data: { key: metric.metric_name, metric: metric.metric_name } }, el("th", { scope: "row" }, metric.metric_name),
      el("td", { class: "lab-num" }, num(metric.first_value)), el("td", { class: "lab-num" }, at(metric[`${best(metric)}_value`], metric[`${best(metric)}_epoch`], metric[`${best(metric)}_step`])),
      el("td", { class: "lab-num" }, num(metric.last_value)), el("td", { class: "lab-num" }, el("b", { title: metric.is_returned ? "returned by the run" : "last logged" }, num(metric.value))))))));
}

const artifacts = (run) => el("ul", { class: "lab-plain" }, run.artifact_files.map((file) => el("li", { data: { key: file.index } },
  file.exists ? el("a", { href: file.url, download: true }, file.path.split(/[\\/]/).pop()) : el("span", {}, file.path.split(/[\\/]/).pop()),
  el("small", { class: file.exists ? "lab-muted" : "lab-warn", title: file.path }, file.exists ? ` ${file.kind} ${bytes(file.size_bytes)}` : " missing on this machine"))));

function environment(run) {
  const device = Object.entries(flatten(run.device_info)).map(([name, value]) => [name, param(value)]);
  const fold = (title, key, body) => el("details", { data: { key } }, el("summary", {}, title), body);
  return section("Environment", facts([["Python", run.python_version], ["Directory", run.cwd], ...device].filter(([, value]) => value), "device"),
    run.pip_freeze && fold(`Packages (${run.pip_freeze.trim().split("\n").length})`, "packages", el("pre", { tabindex: "0" }, run.pip_freeze)),
    run.git_diff && fold("Uncommitted changes", "diff", diff(run.git_diff)));
}

/** A unified diff, its lines coloured and marked by their own first character. */
export function diff(text) {
  const kind = (line) => (/^(\+\+\+|---|diff |index )/.test(line) ? "file" : line.startsWith("@@") ? "hunk" : line[0] === "+" ? "added" : line[0] === "-" ? "removed" : null);
  return el("pre", { class: "lab-diff", tabindex: "0" }, text.split("\n").slice(0, 2000).map((line) => el("span", { data: { line: kind(line) } }, `${line}\n`)));
}
