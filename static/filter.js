/** The filters of the runs table: controls, chips, and what the API is asked. */
import { button, el, option } from "./dom.js";

// Names in the address are the API's own. `from` is the list in GET /lab that holds the values.
const CHOICES = [{ name: "experiment_name", label: "experiment", from: "experiments", key: "experiment_name" },
  { name: "model_name", label: "model", from: "models", key: "name" },
  { name: "dataset_id", label: "dataset", from: "datasets", key: "name" },
  { name: "status", label: "status" },
];
const METRIC = { name: "metric_name", label: "metric", from: "metrics", key: "metric_name" };
const TEXTS = [{ name: "q", label: "search" }, { name: "note_substring", label: "note" }];
const METRIC_NAMES = ["metric_name", "metric_min", "metric_max"];
export const FILTER_NAMES = [...TEXTS, ...CHOICES].map((filter) => filter.name).concat(METRIC_NAMES);

/** The part of the address that filters, as parameters of GET /runs; a bound without metric is left out. */
export function filtersOf(query) {
  const isAsked = ([name, value]) => FILTER_NAMES.includes(name) && value !== ""
    && (query.metric_name || !METRIC_NAMES.includes(name));
  return Object.fromEntries(Object.entries(query).filter(isAsked));
}

/** `sort=-metrics.accuracy` as the API's sort and order. */
export const sortOf = ({ sort }) =>
  (sort ? { sort: sort.replace(/^-/, ""), order: sort.startsWith("-") ? "desc" : "asc" } : {});

/** The next sort of a header: its good end, the other one, off. */
export function nextSort(current, name, isGoodHigh) {
  const ends = isGoodHigh ? [`-${name}`, name] : [name, `-${name}`];
  return [...ends, ""][ends.indexOf(current) + 1];
}

/** The known values of a filter, the chosen one among them; a choice of one is none. */
function choice(lab, { name, label, from, key }, query) {
  const chosen = query[name] ?? "";
  const known = from ? lab[from].map((row) => row[key]) : Object.keys(lab.counts).filter((status) => lab.counts[status]);
  const values = [...new Set([...known, chosen])].filter(Boolean);
  return (values.length > 1 || chosen || name === METRIC.name) && el("select", { value: chosen, "aria-label": label,
    data: { change: "filter", name, key: name } }, option("", `any ${label}`), values.map((value) => option(value)));
}

const box = (name, label, query, props) => el("input", { value: query[name] ?? "", "aria-label": label,
  placeholder: label, autocomplete: "off", data: { input: "filter", name, key: name }, ...props });

/** The row of controls. */
export function filterBar(lab, query) {
  const bound = { type: "number", step: "any", class: "lab-narrow" };
  return el("form", { class: "lab-filters", role: "search", "aria-label": "Filter runs", data: { submit: "none" } },
    box("q", "Search runs", query, { type: "search", class: "lab-wide" }),
    CHOICES.map((filter) => choice(lab, filter, query)),
    box("note_substring", "Note contains", query, { type: "search" }), lab.metrics.length > 0 && choice(lab, METRIC, query),
    query.metric_name && [box("metric_min", "min", query, bound), box("metric_max", "max", query, bound)]);
}

/** One removable chip a filter, each naming the address parts it stands for. */
export function chipsOf(query) {
  const chips = [...TEXTS, ...CHOICES].filter(({ name }) => query[name])
    .map(({ name, label }) => ({ names: [name], text: `${label}: ${query[name]}` }));
  const { metric_name: metric, metric_min: min, metric_max: max } = query;
  const bounds = [min && `≥ ${min}`, max && `≤ ${max}`].filter(Boolean).join(" and ");
  return metric ? [...chips, { names: METRIC_NAMES, text: `${metric} ${bounds || "logged"}` }] : chips;
}

export const filterChips = (query) => chipsOf(query).map(({ names, text }) =>
  el("span", { class: "lab-chip", data: { key: names[0] } }, text,
    button("×", { act: "unfilter", names: names.join() }, { "aria-label": `Remove filter ${text}` })));
