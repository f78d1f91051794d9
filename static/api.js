/** The lab's HTTP API: one function a route, plain data out; a failure throws ApiError(detail). */

export class ApiError extends Error {
  /** The API's own sentence; `status` 0 means that no server answered. */
  constructor(detail, status, request) {
    super(detail);
    this.status = status;
    this.request = request;
  }
}

/** Whether the server answers: dispatches "change"; `since` is when it was last heard, in ms. */
export const connection = Object.assign(new EventTarget(), { isOnline: true, since: Date.now() });
const MAX_REMEMBERED = 60;
const remembered = new Map(); // URL -> {etag, answer}: an unchanged answer is the same object again

function heard(isOnline) {
  if (isOnline) connection.since = Date.now();
  if (connection.isOnline === isOnline) return;
  connection.isOnline = isOnline;
  connection.dispatchEvent(new Event("change"));
}

async function request(url, options = {}) {
  const name = `${options.method ?? "GET"} ${url}`;
  const known = !options.method && remembered.get(url);
  try {
    const response = await fetch(url, { cache: "no-cache", ...options });
    heard(true);
    if (known && known.etag === response.headers.get("ETag")) return known.answer;
    return read(response, await response.text(), name, !options.method && url);
  } catch (error) {
    if (error.name === "AbortError" || error instanceof ApiError) throw error;
    heard(false);
    throw new ApiError("The lab's server does not answer: is `python ailab.py serve` still running?", 0, name);
  }
}

function read({ ok, status, headers }, text, name, url) {
  let body;
  try {
    body = JSON.parse(text);
  } catch {
    throw new ApiError(`The answer to ${name} is not JSON (status ${status})`, status, name);
  }
  if (!ok) throw new ApiError(body.detail ?? `${name} answered ${status}`, status, name);
  const total = headers.get("X-Total-Count");
  const answer = total === null ? body : { rows: body, total: Number(total) };
  const etag = headers.get("ETag");
  if (url && etag) {
    remembered.set(url, { etag, answer });
    if (remembered.size > MAX_REMEMBERED) remembered.delete(remembered.keys().next().value);
  }
  return answer;
}

/** A query string of what is set; a list repeats its name. */
export function search(params) {
  const pairs = Object.entries(params).flatMap(([name, value]) => [value].flat().map((one) => [name, one]));
  const text = String(new URLSearchParams(pairs.filter(([, value]) => !["", null, undefined].includes(value))));
  return text && `?${text}`;
}

const path = (runId) => `/runs/${encodeURIComponent(runId)}`;
const send = (method, body, signal) =>
  ({ method, signal, headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) });

export const lab = () => request("/lab");
/** {rows, total}: a page of run summaries, and how many match. */
export const listRuns = (params) => request(`/runs${search(params)}`);
export const getRun = (runId) => request(path(runId));
export const curves = (ids, params = {}) => request(`/curves${search({ ids, ...params })}`);
export const compareRuns = (ids) => request(`/runs/compare${search({ ids })}`);
export const leaderboard = async (params) => {
  const answer = await request(`/runs/leaderboard${search(params)}`);
  return answer.rows ?? answer;
};
export const setNote = (runId, note) => request(`${path(runId)}/note`, send("PATCH", { note }));
export const deleteRun = (runId) => request(path(runId), { method: "DELETE" });
export const ask = (query, signal) => request("/agent/query", send("POST", { query }, signal));
