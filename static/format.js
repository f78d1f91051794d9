/** Text for numbers, times, ids and the address; pure, so that node tests it. */

const MISSING = "–";
const SECONDS = { year: 31536000, month: 2592000, day: 86400, hour: 3600, minute: 60 };

/** A number in 4 significant digits, scientific beyond 1e-4 and 1e6; "NaN" stays, null is a dash. */
export function num(value) {
  if (typeof value !== "number") return String(value ?? MISSING);
  const size = Math.abs(value);
  if (Number.isInteger(value) && size < 1e6) return String(value);
  if (size !== 0 && (size < 1e-4 || size >= 1e6)) return value.toExponential(3);
  return value.toFixed(Math.max(0, 3 - Math.floor(Math.log10(size || 1))));
}

/** Decimals that give a column's middle value 4 significant digits; null for whole numbers. */
export function columnDecimals(values) {
  const sizes = values.filter((value) => typeof value === "number" && value !== 0).map(Math.abs).sort((a, b) => a - b);
  if (sizes.every(Number.isInteger)) return null;
  return Math.min(6, Math.max(0, 3 - Math.floor(Math.log10(sizes[Math.floor(sizes.length / 2)]))));
}

/** A number with its column's decimals. */
export function fixed(value, decimals) {
  const size = Math.abs(value);
  const isPlain = typeof value === "number" && (size === 0 || (size >= 1e-4 && size < 1e6));
  return isPlain && decimals !== null ? value.toFixed(decimals) : num(value);
}

/** A param as it was typed: 0.001, not 0.0010000; null, "" and a missing one look different. */
export const param = (value) => (typeof value === "string" && value ? value : JSON.stringify(value) ?? MISSING);

/** Seconds as 0.42 s, 12 s, 3 m 05 s, 2 h 07 m, 3 d 04 h. */
export function duration(seconds) {
  if (typeof seconds !== "number") return MISSING;
  if (seconds < 10) return `${seconds.toFixed(seconds < 1 ? 2 : 1)} s`;
  const whole = Math.round(seconds);
  const [size, unit, part, small] = [[86400, "d", 3600, "h"], [3600, "h", 60, "m"], [60, "m", 1, "s"]]
    .find(([least]) => whole >= least) ?? [1, "s"];
  const rest = part && ` ${String(Math.floor((whole % size) / part)).padStart(2, "0")} ${small}`;
  return `${Math.floor(whole / size)} ${unit}${rest ?? ""}`;
}

/** How long ago an ISO time was, in its largest unit. */
export function ago(iso, now = Date.now()) {
  const seconds = (Date.parse(iso) - now) / 1000;
  if (Number.isNaN(seconds)) return MISSING;
  const [unit, size] = Object.entries(SECONDS).find(([, least]) => Math.abs(seconds) >= least) ?? ["second", 1];
  return Math.abs(seconds) < 5 ? "just now" : new Intl.RelativeTimeFormat("en").format(Math.trunc(seconds / size), unit);
}

/** A time (ISO, or ms) as local date and time, with the seconds. */
export const absolute = (time) => new Date(time).toLocaleString("sv-SE");
/** A clock time of today: 14:03:22. */
export const clock = (ms) => new Date(ms).toLocaleTimeString("sv-SE");

export function bytes(size) {
  if (typeof size !== "number") return "";
  const power = size < 1024 ? 0 : Math.min(3, Math.floor(Math.log2(size) / 10));
  return `${(size / 1024 ** power).toFixed(power ? 1 : 0)} ${["B", "KB", "MB", "GB"][power]}`;
}

/** "1 run", "2,700 runs". */
export const count = (n, word) => `${n.toLocaleString("en")} ${word}${n === 1 ? "" : "s"}`;
const isUuid = (runId) => /^[0-9a-f]{8}-[0-9a-f-]{27}$/i.test(runId);
/** The id as shown: 8 characters of a UUID, all of anything else. */
export const shortId = (runId) => (isUuid(runId) ? runId.slice(0, 8) : runId);
/** The id in an address: 13 characters, 48 bits, so that no two runs of a lab meet. */
export const refOf = (runId) => (isUuid(runId) ? runId.slice(0, 13) : runId);
/** A run's place in the selection, which is its colour slot; -1 if it is not selected. */
export const slotOf = (selection, runId) => selection.findIndex((ref) => ref && runId.startsWith(ref));

/** {a: {b: 1}, c: 2} as {"a.b": 1, c: 2}. */
export function flatten(params, prefix = "", into = {}) {
  for (const [name, value] of Object.entries(params ?? {})) {
    const isGroup = value && typeof value === "object" && !Array.isArray(value);
    if (isGroup && Object.keys(value).length) flatten(value, `${prefix}${name}.`, into);
    else into[prefix + name] = value;
  }
  return into;
}

/** Names of the params whose value is not the same in all of the runs, in order of appearance. */
export function differingParams(runs) {
  const all = runs.map((run) => flatten(run.params));
  const names = new Set(all.flatMap(Object.keys));
  return [...names].filter((name) => new Set(all.map((params) => param(params[name]))).size > 1);
}

/** Names of metrics, the one to open with first: accuracy, else a val_ or test_ one, else the commonest. */
export function orderMetrics(metrics) {
  const order = [/^accuracy$/, /^(val|test)[_/.]|acc/, /^(?!train[_/.])/, /^/];
  const rank = ({ metric_name: name }) => order.findIndex((pattern) => pattern.test(name));
  return [...metrics].sort((a, b) => rank(a) - rank(b) || b.n_runs - a.n_runs).map((metric) => metric.metric_name);
}

/** The last line of a traceback that says something. */
export const lastLine = (text) => (text ?? "").trim().split("\n").pop().trim();

/** How a run ended, its reason taken apart: {kind, head, what, detail}; null where there is nothing to say. */
export function endingOf({ status, end_reason: reason, error }) {
  const isBad = status === "failed" || status === "killed";
  const text = reason || (isBad && `${status}: ${lastLine(error) || "no reason was recorded"}`);
  if (!text) return null;
  const [, head = status, kind = status, rest = text] =
    /^((finished|failed|interrupted|killed|lost)\b[^:]*): (.*)$/s.exec(text) ?? [];
  const cut = Math.max(...["; at ", "; likely "].map((mark) => rest.lastIndexOf(mark)));
  return { kind, head, what: cut < 0 ? rest : rest.slice(0, cut), detail: cut < 0 ? "" : rest.slice(cut + 2) };
}

const UNITS = { percent: ", %", gib: ", GiB", c: ", °C", w: ", W" };
/** Chart and line of a machine's metric: "system/gpu.0.memory_gib" gives ["GPU memory, GiB", "GPU 0"]. */
export function systemPlace(name) {
  const [, gpu, what, unit] = /^system\/(?:gpu\.(\w+)\.)?(.*?)(?:_(percent|gib|c|w))?$/s.exec(name);
  const title = `${gpu ? "GPU " : ""}${what.replaceAll("_", " ").replace("cpu", "CPU")}${UNITS[unit] ?? ""}`;
  return [title.charAt(0).toUpperCase() + title.slice(1), gpu ? `GPU ${gpu}` : what.split("_")[0]];
}

/** "#/runs?q=a" as {view: "runs", query: {q: "a"}}; the home view is "dashboard". */
export function parseHash(hash) {
  const [path, search = ""] = hash.replace(/^#?\/?/, "").split(/\?(.*)/s);
  return { view: path || "dashboard", query: Object.fromEntries(new URLSearchParams(search)) };
}

/** The reverse; empty values are left out, and what may stay readable does. */
export function makeHash(view, query = {}) {
  const plain = { "%2C": ",", "%2F": "/", "%20": "+" };
  const encode = (text) => encodeURIComponent(text).replace(/%2[CF0]/g, (code) => plain[code]);
  const pairs = Object.entries(query).filter(([, value]) => !["", null, undefined].includes(value));
  const search = pairs.map((pair) => pair.map(encode).join("=")).join("&");
  return `#/${view === "dashboard" ? "" : view}${search ? `?${search}` : ""}`;
}

/** "a,,b" as ["a", null, "b"]: the place of a run is its colour slot, and a hole keeps the others'. */
export const parseSelection = (text) => (text ? text.split(",").map((ref) => (ref ? refOf(ref) : null)) : []);
export const joinSelection = (selection) => selection.join().replace(/,+$/, "");

/** The selection with the run put into the first free place, or taken out. */
export function toggled(selection, runId, on = slotOf(selection, runId) < 0) {
  const place = slotOf(selection, runId);
  if (on === place >= 0) return selection;
  const free = [...selection, null].indexOf(null);
  return Object.assign([...selection], on ? { [free]: refOf(runId) } : { [place]: null });
}
