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
const remembered = new Map(); // URL -> {etag, answer}: an unchanged answer is the same object again

function heard(isOnline) {
  if (isOnline) connection.since = Date.now();
  if (connection.isOnline === isOnline) return;
  connection.isOnline = isOnline;
  connection.dispatchEvent(new Event("change"));
}

async function request(url, options = {}) {
  const name = `${options.method ?? "GET"} ${url}`;
  let response;
  let body;
  try {
    response = await fetch(url, { cache: "no-cache", ...options });
    const etag = response.headers.get("ETag");
    const known = !options.method && etag && remembered.get(url);
    if (known && known.etag === etag) return known.answer;
    body = await response.text();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The lab's server does not answer: is `python ailab.py serve` still running?", 0, name);
  } finally {
    if (!options.signal?.aborted) heard(Boolean(response));
  }
  return answerOf(url, name, response, body, options);
}

function answerOf(url, name, response, text, options) {
  let body;
  try {
    body = JSON.parse(text);
  } catch {
    throw new ApiError(`The server's answer to ${name} is not JSON (status ${response.status})`, response.status, name);
  }
  if (!response.ok) throw new ApiError(body.detail ?? `${name} answered ${response.status}`, response.status, name);
  const total = response.headers.get("X-Total-Count");
  const answer = total === null ? body : { rows: body, total: Number(total) };
  const etag = response.headers.get("ETag");
  if (!options.method && etag) {
    remembered.set(url, { etag, answer });
    if (remembered.size > 60) remembered.delete(remembered.keys().next().value);
  }
  return answer;
}

/** A query string of what is set; a list repeats its name. */
export function search(params) {
  const pairs = Object.entries(params).flatMap(([name, value]) => [value].flat().map((one) => [name, one]));
  const text = new URLSearchParams(pairs.filter(([, value]) => value !== undefined && value !== null && value !== "")).toString();
  return text && `?${text}`;
}

const send = (method, body, signal) => ({ method, signal, headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) });
const path = (runId) => `/runs/${encodeURIComponent(runId)}`;

export const lab = () => request("/lab");
/** {rows, total}: a page of run summaries, and how many match. */
export const listRuns = async (params) => {
  const answer = await request(`/runs${search(params)}`);
  return Array.isArray(answer) ? { rows: answer, total: answer.length } : answer;
};
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
