/** The lab's HTTP API: one function a route, plain data out; a failure throws ApiError(detail). */

/** The API's own sentence; `status` 0 means that no server answered. */
export class ApiError extends Error { status = 0; }

/** Whether the server answers: dispatches "change"; `since` is when it was last heard, in ms. */
export const connection = Object.assign(new EventTarget(), { isOnline: true, since: Date.now() });

function heard(isOnline) {
  if (isOnline) connection.since = Date.now();
  if (connection.isOnline === isOnline) return;
  connection.isOnline = isOnline;
  connection.dispatchEvent(new Event("change"));
}

async function request(url, options = {}) {
  let response;
  try {
    response = await fetch(url, { cache: "no-cache", ...options });   // asks If-None-Match where it can
  } catch (error) {
    if (error.name === "AbortError") throw error;
    heard(false);
    throw new ApiError("The lab's server does not answer: is `python ailab.py serve` still running?");
  }
  heard(true);
  const { ok, status, headers } = response;
  const body = await response.json().catch(() => null);
  const detail = body?.detail ?? `${url} answered ${status} without JSON`;
  if (!ok || body === null) throw Object.assign(new ApiError(detail), { status });
  return headers.has("X-Total-Count") ? { rows: body, total: Number(headers.get("X-Total-Count")) } : body;
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
/** Curves of these runs inside a range of x ([from, to], null for all); `more` is names, x, max_points (two a pixel). */
export const curves = async (ids, range, more) =>
  (await request(`/curves${search({ ids, from: range?.[0], to: range?.[1], max_points: 1200, ...more })}`)).curves;
export const compareRuns = (ids) => request(`/runs/compare${search({ ids })}`);
export const leaderboard = (params) => request(`/runs/leaderboard${search(params)}`);
export const setNote = (runId, note) => request(`${path(runId)}/note`, send("PATCH", { note }));
export const deleteRun = (runId) => request(path(runId), { method: "DELETE" });
export const ask = (query, signal) => request("/agent/query", send("POST", { query }, signal));
