/** Boot, address, header, and the clock that keeps the page live. */
import * as api from "./api.js";
import { redrawAll } from "./chart.js";
import { button, delegate, el, errorBox, message, render, snippet, toast } from "./dom.js";
import { clock, joinSelection, makeHash, parseHash, parseSelection, toggled } from "./format.js";

const LIVE_MS = 1000;      // between looks while something runs
const IDLE_MS = 15000;     // and while nothing does
const OFFLINE_MS = 3000;
const TABS = { dashboard: "Dashboard", runs: "Runs", compare: "Compare", assistant: "Assistant" };
const TITLES = { ...TABS, run: "Run" };   // a run's page of its own has no tab
const FIRST_RUN = `from lab_logger import log, log_run\n
@log_run(experiment_name="first")\ndef train(learning_rate=0.01, n_epochs=30):
    for epoch in range(n_epochs):\n        log(epoch=epoch, loss=1 / (epoch + 1))\n\ntrain()`;
const html = document.documentElement;
const [main, project, tabs, signs, banner, theme] = ["main", "project", "tabs", "signs", "banner", "theme"]
  .map((name) => document.getElementById(`lab-${name}`));
const system = matchMedia("(prefers-color-scheme: dark)");

/** What a view is given: the lab's answer, the address, and the ways to change it. */
const app = {
  lab: null,
  running: [],            // summaries of what runs now
  view: "dashboard", query: {},
  selection: [],          // refs by colour slot, null where a slot is free
  last: {},               // the query each view had last, for its tab
  /** The link to a view that keeps the selection. */
  href(view, query = {}, selection = app.selection) {
    return makeHash(view, { ...query, [view === "compare" ? "ids" : "selected"]: joinSelection(selection) });
  },
  /** Go to an address: a step for Back, unless it replaces while typing or dragging. */
  go(view, query, { replace = false, selection } = {}) {
    const hash = app.href(view, query, selection);
    if (hash === location.hash) return;
    history[replace ? "replaceState" : "pushState"](null, "", hash);
    route();
  },
  /** Change parts of this view's address; an empty value leaves one out. */
  change: (parts, options) => app.go(app.view, { ...app.query, ...parts }, options),
  /** Read the lab's counts at once, after this page changed them. */
  refresh: async () => { app.lab = await api.lab(); },
  /** Put a run into the selection, or take it out. */
  pick: (runId) => app.change({}, { selection: toggled(app.selection, runId) }),
  /** Run `job`: bones in `root` while a first load takes its time, the error in place of content. */
  async load(root, job, isFirst) {
    if (isFirst) render(root, message("loading", "Loading"));
    try {
      await job();
      return true;
    } catch (error) {
      if (!(error instanceof api.ApiError)) throw error;
      if (isFirst || error.status) render(root, errorBox(error));  // offline, what is there stays
      return false;
    }
  },
};

let current = null;        // {name, view}: the view on the page
let turn = 0;              // a slow answer of an address left behind must not draw

async function route() {
  const { view, query: { selected, ids, ...query } } = parseHash(location.hash);
  const name = view in TITLES ? view : "dashboard";
  const mine = ++turn;
  Object.assign(app, { view: name, query, selection: parseSelection(name === "compare" ? ids : selected) });
  app.last[name] = query;
  html.dataset.view = name;
  delete html.dataset.ready;
  drawFrame();
  if (!app.lab) return;
  try {
    if (app.lab.n_runs) await showView(name, mine);
    else showEmpty();
  } catch (error) {                 // also a view's script that could not be read
    console.error(error);
    leave();
    render(main, errorBox(error));
  }
  if (mine === turn) html.dataset.ready = "true";
}

async function showView(name, mine) {
  if (current?.name !== name) {
    const { create } = await import(`./views/${name}.js`);
    if (mine !== turn) return;
    leave();
    const root = el("div", { class: `lab-view lab-${name}` });
    main.replaceChildren(root);
    current = { name, view: create(app, root) };
  }
  document.title = `${TITLES[name]} · ${app.lab.project}`;
  await current.view.update();
}

const leave = () => { current?.view.close?.(); current = null; };

function showEmpty() {
  leave();
  const path = app.lab.db_path;
  render(main, el("div", { class: "lab-view" }, message("empty", "No runs yet",
    el("p", {}, "Put lab_logger.py beside your script and three lines into it; the first run appears here by itself."),
    snippet(FIRST_RUN), el("p", {}, "Or see the examples train, in under a minute:"), snippet("python ailab.py demo"),
    path && [el("p", {}, `This page reads the lab below, last at ${clock(api.connection.since)}:`), snippet(path)])));
}

function drawFrame() {
  const n = app.selection.filter(Boolean).length;
  const running = app.lab?.counts.running ?? 0;
  const { isOnline, since } = api.connection;
  html.dataset.online = String(isOnline);
  render(banner, !isOnline && el("div", { class: "lab-offline", role: "alert" },
    `Not connected since ${clock(since)}, retrying`, button("Retry", { act: "reconnect" })));
  render(tabs, Object.entries(TABS).map(([name, label]) =>
    el("a", { href: app.href(name, app.last[name]), "aria-current": app.view === name && "page", data: { key: name } },
      label, name === "compare" && n > 0 && ` (${n})`)));
  render(signs, running > 0 && el("a", { class: "lab-live", data: { key: "live" },
    href: app.href("runs", { status: "running" }) }, el("i", { "aria-hidden": "true" }), `${running} running`),
  el("span", { class: "lab-connection", data: { online: String(isOnline), key: "connection" } },
    isOnline ? "Connected" : "Offline"));
  project.textContent = app.lab?.project ?? "AI-Lab";
  theme.textContent = isDark() ? "Light" : "Dark";
  theme.setAttribute("aria-label", `${theme.textContent} theme`);
}

const isDark = () => (html.dataset.theme ? html.dataset.theme === "dark" : system.matches);

/** Use and keep this theme; without one, what was kept, else the system's. */
function setTheme(chosen) {
  try {
    if (chosen) localStorage.setItem("lab-theme", chosen);
    html.dataset.theme = localStorage.getItem("lab-theme") ?? "";
  } catch {                         // storage is closed to this page: the choice lasts as long as it
    html.dataset.theme = chosen ?? "";
  }
  drawFrame();
  redrawAll();
}

let timer = null;
let [seen, fullAt] = ["", 0];   // the lab's counts at the last full refresh, and when that was
let isLooking = false;

async function tick() {
  clearTimeout(timer);
  if (document.hidden || isLooking) return;
  isLooking = true;
  try {
    await look();
  } catch (error) {
    if (!(error instanceof api.ApiError)) throw error;
    if (!app.lab) render(main, errorBox(error));
  } finally {
    isLooking = false;
    const pause = app.lab?.counts.running ? LIVE_MS : IDLE_MS;
    timer = setTimeout(tick, api.connection.isOnline ? pause : OFFLINE_MS);
  }
}

async function look() {
  const wasEmpty = !app.lab?.n_runs;
  app.lab = await api.lab();
  app.running = app.lab.counts.running ? (await api.listRuns({ status: "running", limit: 100 })).rows : [];
  drawFrame();
  const counts = JSON.stringify([app.lab.n_runs, app.lab.counts]);
  const isFull = counts !== seen || Date.now() - fullAt >= IDLE_MS - LIVE_MS;
  if (isFull) [seen, fullAt] = [counts, Date.now()];
  if (wasEmpty) await route();
  else if (current && html.dataset.ready) await current.view.tick?.(isFull);
}

delegate(document, "change", { log: (target) => app.change({ log: target.checked ? "y" : "" }) });
delegate(document, "click", {
  theme: () => setTheme(isDark() ? "light" : "dark"), reconnect: tick,
  retry: () => { leave(); main.replaceChildren(); (app.lab ? route : tick)(); },
  skip: (target, event) => { event.preventDefault(); (main.querySelector("tr[tabindex='0']") ?? main).focus(); },
});
document.addEventListener("click", async ({ target }) => {
  const text = target.closest("[data-copy]")?.dataset.copy;
  if (text === undefined) return;
  const isDone = await navigator.clipboard?.writeText(text).then(() => true, () => false);
  toast(isDone ? "Copied" : "This browser lets no page copy here: select the text and copy it by hand");
});
document.addEventListener("submit", (event) => { if (event.target.dataset.submit) event.preventDefault(); });
document.addEventListener("visibilitychange", tick);
addEventListener("popstate", route);
system.addEventListener("change", () => setTheme());
api.connection.addEventListener("change", () => { fullAt = 0; drawFrame(); });
setTheme();
tick();
