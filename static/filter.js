/** The filters of the runs table: controls, chips, and what the API is asked. */
import { el } from "./dom.js";

// Names in the address are the API's own. `from` is the list in GET /lab that holds the values.
const CHOICES = [
  { name: "experiment_name", label: "experiment", from: "experiments", key: "experiment_name" },
  { name: "model_name", label: "model", from: "models", key: "name" },
  { name: "dataset_id", label: "dataset", from: "datasets", key: "name" },
  { name: "status", label: "status" },
];
const TEXTS = [{ name: "q", label: "search" }, { name: "note_substring", label: "note" }];
const METRIC = ["metric_name", "metric_min", "metric_max"];
export const FILTER_NAMES = [...TEXTS, ...CHOICES].map((filter) => filter.name).concat(METRIC);

/** The part of the address that filters, as parameters of GET /runs; a bound without metric is left out. */
export function filtersOf(query) {
  const set = Object.entries(query).filter(([name, value]) => FILTER_NAMES.includes(name) && value !== "");
  return Object.fromEntries(set.filter(([name]) => query.metric_name || !METRIC.includes(name)));
}

/** `sort=-metrics.accuracy` as the API's sort and order. */
export function sortOf(query) {
  if (!query.sort) return {};
  const isDown = query.sort.startsWith("-");
  return { sort: isDown ? query.sort.slice(1) : query.sort, order: isDown ? "desc" : "asc" };
}

/** The next sort of a header: its good end, the other one, off. */
export function nextSort(current, name, isGoodHigh) {
  const [first, second] = isGoodHigh ? [`-${name}`, name] : [name, `-${name}`];
  if (current === first) return second;
  return current === second ? "" : first;
}

function choices(lab, filter, chosen) {
  const names = filter.name === "status" ? Object.keys(lab.counts).filter((status) => lab.counts[status])
    : (lab[filter.from] ?? []).map((row) => row[filter.key]).filter((name) => name !== null && name !== "");
  return chosen && !names.includes(chosen) ? [...names, chosen] : names;
}

function select(filter, names, query, any) {
  return el("select", { value: query[filter.name] ?? "", "aria-label": filter.label, data: { change: "filter", name: filter.name } },
    el("option", { value: "" }, any), names.map((name) => option(name)));
}

/** An option; its value is set as an attribute, so that any text survives. */
export function option(value, text = value) {
  const node = el("option", {}, text);
  node.setAttribute("value", value);
  return node;
}

const box = (name, label, query, props) => el("input", { value: query[name] ?? "", "aria-label": label, placeholder: label, autocomplete: "off",
  data: { input: "filter", name }, ...props });

/** The row of controls. */
export function filterBar(lab, query) {
  const shown = CHOICES.filter((filter) => choices(lab, filter, query[filter.name]).length > 1 || query[filter.name]);
  const metrics = choices({ counts: {}, metrics: lab.metrics }, { name: "metric_name", from: "metrics", key: "metric_name" }, query.metric_name);
  return el("form", { class: "lab-filters", role: "search", "aria-label": "Filter runs", data: { submit: "none" } },
    box("q", "Search runs", query, { type: "search", class: "lab-wide" }),
    shown.map((filter) => select(filter, choices(lab, filter, query[filter.name]), query, `any ${filter.label}`)),
    box("note_substring", "Note contains", query, { type: "search" }),
    metrics.length > 0 && [select({ name: "metric_name", label: "metric" }, metrics, query, "any metric"),
      box("metric_min", "min", query, { type: "number", step: "any", disabled: !query.metric_name, class: "lab-narrow" }),
      box("metric_max", "max", query, { type: "number", step: "any", disabled: !query.metric_name, class: "lab-narrow" })]);
}

/** One removable chip a filter, each naming the address parts it stands for. */
export function chipsOf(query) {
  const chips = [...TEXTS, ...CHOICES].filter(({ name }) => query[name])
    .map(({ name, label }) => ({ names: [name], text: `${label}: ${query[name]}` }));
  if (query.metric_name) {
    const bounds = [query.metric_min && `≥ ${query.metric_min}`, query.metric_max && `≤ ${query.metric_max}`].filter(Boolean);
    chips.push({ names: METRIC, text: `${query.metric_name} ${bounds.join(" and ") || "logged"}` });
  }
  return chips;
}

export const filterChips = (query) => chipsOf(query).map(({ names, text }) =>
  el("span", { class: "lab-chip", data: { key: names[0] } }, el("span", {}, text),
    el("button", { type: "button", "aria-label": `Remove filter ${text}`, data: { act: "unfilter", names: names.join(",") } }, "×")));
