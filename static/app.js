/** Boot, address, header, and the clock that keeps the page live. */
import * as api from "./api.js";
import { redrawAll } from "./chart.js";
import { delegate, el, errorBox, message, render, snippet, toast } from "./dom.js";
import { clock, joinSelection, makeHash, parseHash, parseSelection, toggled } from "./format.js";

const LIVE_MS = 1000;      // between looks while something runs
const IDLE_MS = 15000;     // and while nothing does
const OFFLINE_MS = 3000;
const SKELETON_MS = 150;   // a wait shorter than this shows nothing
const VIEWS = {
  dashboard: { label: "Dashboard", load: () => import("./views/dashboard.js") },
  runs: { label: "Runs", load: () => import("./views/runs.js") },
  compare: { label: "Compare", load: () => import("./views/compare.js") },
  assistant: { label: "Assistant", load: () => import("./views/assistant.js") },
  run: { load: () => import("./views/run.js") },   // a run's page of its own: no tab
};
const main = document.getElementById("lab-main");
const html = document.documentElement;
const system = matchMedia("(prefers-color-scheme: dark)");

/** What a view is given: the lab's answer, the address, and the ways to change it. */
const app = {
  lab: null,
  running: [],
  view: "dashboard",
  query: {},
  selection: [],          // refs by colour slot, null where a slot is free
  last: {},               // the query each view had last, for its tab

  /** The link to a view that keeps the selection. */
  href(view, query = {}, selection = app.selection) {
    const name = view === "compare" ? "ids" : "selected";
    return makeHash(view, { ...query, [name]: joinSelection(selection) });
  },

  /** Go to an address: a step for Back, unless it replaces while typing or dragging. */
  go(view, query, { replace = false, selection = app.selection } = {}) {
    const hash = app.href(view, query, selection);
    if (hash === location.hash) return;
    history[replace ? "replaceState" : "pushState"](null, "", hash);
    route();
  },

  /** Put a run into the selection, or take it out. */
  pick(runId) {
    app.go(app.view, app.query, { selection: toggled(app.selection, runId) });
  },

  /** Change parts of this view's address; an empty value leaves one out. */
  change(parts, options) {
    app.go(app.view, { ...app.query, ...parts }, options);
  },

  /**
   * Run `job`, with a skeleton in `root` while a first load takes time, and the error in place of
   * content; what is already there stays when a later load fails.
   */
  async load(root, job, isFirst) {
    const timer = isFirst && setTimeout(() => render(root, message("loading", "Loading")), SKELETON_MS);
    try {
      return await job();
    } catch (error) {
      if (!(error instanceof api.ApiError)) throw error;
      if (isFirst || error.status) render(root, errorBox(error));
      return undefined;
    } finally {
      clearTimeout(timer);
    }
  },
};

// --- Address ------------------------------------------------------------------

let current = null;        // {name, view}: the view on the page
let turn = 0;              // a slow answer of an address left behind must not draw

async function route() {
  const { view, query } = parseHash(location.hash);
  const name = view in VIEWS ? view : "dashboard";
  const mine = ++turn;
  const { selected, ids, ...own } = query;
  Object.assign(app, { view: name, query: own, selection: parseSelection((name === "compare" ? ids : selected) ?? "") });
  app.last[name] = own;
  html.dataset.view = name;
  delete html.dataset.ready;
  drawHeader();
  if (!app.lab) return;
  if (!app.lab.n_runs) showEmpty();
  else await showView(name, mine);
  if (mine === turn) html.dataset.ready = "true";
}

async function showView(name, mine) {
  if (current?.name !== name) {
    const { create } = await VIEWS[name].load();
    if (mine !== turn) return;
    leave();
    const root = el("div", { class: `lab-view lab-${name}` });
    main.replaceChildren(root);
    main.scrollTop = 0;
    current = { name, view: create(app, root) };
  }
  document.title = `${VIEWS[name].label ?? "Run"} · ${app.lab.project}`;
  await current.view.update();
}

function leave() {
  current?.view?.close?.();
  current = null;
}

function showEmpty() {
  leave();
  const isAsking = app.view === "assistant";
  render(main, el("div", { class: "lab-view" }, message("empty", isAsking ? "Nothing to ask about yet" : "No runs yet",
    el("p", {}, "Put the logger beside your training script and three lines into it; the first run appears here by itself."),
    snippet("from lab_logger import log, log_run\n\n@log_run(experiment_name=\"first\")\ndef train(learning_rate=0.01, n_epochs=30):\n    for epoch in range(n_epochs):\n        log(epoch=epoch, loss=1 / (epoch + 1))"),
    el("p", {}, "Or see the examples train, in under a minute:"), snippet("python ailab.py demo"),
    app.lab.db_path && [el("p", {}, "This page reads"), snippet(app.lab.db_path)],
    el("p", { class: "lab-muted", data: { key: "read" } }, `Last read at ${clock(api.connection.since)}.`))));
}

// --- Header -------------------------------------------------------------------

function drawHeader() {
  const chosen = app.selection.filter(Boolean);
  const tab = ([name, { label }]) => label && el("a", { href: app.href(name, app.last[name] ?? {}), "aria-current": app.view === name && "page", data: { key: name } },
    label, name === "compare" && chosen.length > 0 && el("span", { class: "lab-count" }, ` (${chosen.length})`));
  render(document.getElementById("lab-tabs"), Object.entries(VIEWS).map(tab));
  const running = app.lab?.counts.running ?? 0;
  const isOnline = api.connection.isOnline;
  render(document.getElementById("lab-signs"),
    running > 0 && el("a", { href: app.href("runs", { status: "running" }), class: "lab-live", data: { key: "live" } }, el("i", { "aria-hidden": "true" }), `${running} running`),
    el("span", { class: "lab-connection", data: { online: String(isOnline), key: "connection" } }, isOnline ? "Connected" : "Offline"));
  document.getElementById("lab-project").textContent = app.lab?.project ?? "AI-Lab";
  const theme = document.getElementById("lab-theme");
  theme.textContent = isDark() ? "Light" : "Dark";
  theme.setAttribute("aria-label", `Switch to the ${isDark() ? "light" : "dark"} theme`);
}

function drawBanner() {
  const { isOnline, since } = api.connection;
  html.dataset.online = String(isOnline);
  render(document.getElementById("lab-banner"), !isOnline && el("div", { class: "lab-offline", role: "alert" },
    `Not connected since ${clock(since)}, retrying`, el("button", { type: "button", data: { act: "reconnect" } }, "Retry")));
  drawHeader();
}

const isDark = () => (html.dataset.theme ? html.dataset.theme === "dark" : system.matches);

function setTheme(theme) {
  if (theme) html.dataset.theme = theme;
  try {
    if (theme) localStorage.setItem("lab-theme", theme);
    else if (localStorage.getItem("lab-theme")) html.dataset.theme = localStorage.getItem("lab-theme");
  } catch (error) {
    console.info("The theme is not kept: storage is closed to this page.", error.name);
  }
  drawHeader();
  redrawAll();
}

// --- Clock --------------------------------------------------------------------

let timer = null;
let seen = "";             // the lab's counts at the last full refresh
let fullAt = 0;
let isTicking = false;     // one look at a time; "again" when another was asked for meanwhile

async function tick() {
  clearTimeout(timer);
  if (document.hidden) return;
  if (isTicking) {
    isTicking = "again";
    return;
  }
  isTicking = true;
  try {
    await look();
  } catch (error) {
    if (!(error instanceof api.ApiError)) throw error;
    if (!app.lab) render(main, errorBox(error));
  } finally {
    const isAgain = isTicking === "again";
    isTicking = false;
    const pause = !api.connection.isOnline ? OFFLINE_MS : app.lab?.counts.running ? LIVE_MS : IDLE_MS;
    timer = setTimeout(tick, isAgain ? 0 : pause);
  }
}

async function look() {
  const wasEmpty = !app.lab?.n_runs;
  app.lab = await api.lab();
  app.running = app.lab.counts.running ? (await api.listRuns({ status: "running", limit: 100 })).rows : [];
  drawHeader();
  const counts = JSON.stringify([app.lab.n_runs, app.lab.counts]);
  if (wasEmpty) {
    [seen, fullAt] = [counts, Date.now()];
    return route();
  }
  const isFull = counts !== seen || Date.now() - fullAt >= IDLE_MS - LIVE_MS;
  if (isFull) [seen, fullAt] = [counts, Date.now()];
  if (current && html.dataset.ready) await current.view.tick?.(isFull);
  return undefined;
}

// --- Boot ---------------------------------------------------------------------

delegate(document, "click", {
  theme: () => setTheme(isDark() ? "light" : "dark"),
  reconnect: () => tick(),
  retry: () => { leave(); main.replaceChildren(); if (app.lab) route(); else tick(); },
  skip: (target, event) => { event.preventDefault(); (main.querySelector("tr[tabindex='0']") ?? main).focus(); },
});
document.addEventListener("click", async (event) => {
  const target = event.target.closest("[data-copy]");
  if (!target) return;
  try {
    await navigator.clipboard.writeText(target.dataset.copy);
    toast("Copied");
  } catch {
    toast("This browser lets no page copy here: select the text and copy it by hand");
  }
});
document.addEventListener("submit", (event) => { if (event.target.dataset.submit) event.preventDefault(); });
document.addEventListener("visibilitychange", tick);
addEventListener("popstate", route);
system.addEventListener("change", () => setTheme());
api.connection.addEventListener("change", () => {
  drawBanner();
  if (api.connection.isOnline) fullAt = 0;
});
setTheme();
tick();
