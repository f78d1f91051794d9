/** Nodes: made by el(), brought up to date by render(); text only ever through textContent. */

/**
 * Make an element. Props: `class`, `data` (object), `style` (object, set through CSSOM), `on`
 * (object of listeners), `value` and `checked` as properties, the rest as attributes; false, null
 * and undefined leave an attribute out, true makes it empty.
 */
export function el(tag, props = {}, ...children) {
  const node = tag.startsWith("svg:")
    ? document.createElementNS("http://www.w3.org/2000/svg", tag.slice(4)) : document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (value === undefined || value === null || value === false) continue;
    if (name === "data") Object.assign(node.dataset, defined(value));
    else if (name === "style") for (const [key, text] of Object.entries(value)) node.style.setProperty(key, text);
    else if (name === "on") for (const [type, act] of Object.entries(value)) node.addEventListener(type, act);
    else if (name !== "value" && name !== "checked") node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...nodes(children));
  if (props.value !== undefined) node.value = props.value ?? "";
  if (props.checked !== undefined) node.checked = Boolean(props.checked);
  return node;
}

const defined = (values) => Object.fromEntries(Object.entries(values).filter(([, v]) => v !== undefined && v !== null && v !== false));
const nodes = (children) => children.flat(Infinity).filter((c) => c !== null && c !== undefined && c !== false)
  .map((c) => (c instanceof Node ? c : document.createTextNode(String(c))));

/**
 * Make the parent's children like these, touching only what differs: focus, scroll and what is
 * being typed stay. Children with `data-key` are matched by it; inside `data-keep` nothing is done.
 */
export function render(parent, ...children) {
  const wanted = nodes(children);
  const keys = new Set(wanted.map(keyOf).filter(Boolean));
  for (const node of [...parent.childNodes]) if (keyOf(node) && !keys.has(keyOf(node))) node.remove();
  const byKey = new Map([...parent.childNodes].filter(keyOf).map((node) => [keyOf(node), node]));
  let at = parent.firstChild;
  for (const want of wanted) {
    const key = keyOf(want);
    const have = key ? byKey.get(key) : at && !keyOf(at) && at.nodeName === want.nodeName ? at : null;
    if (!have) {
      parent.insertBefore(want, at);
      continue;
    }
    if (have === at) at = at.nextSibling;
    else parent.insertBefore(have, at);
    if (have.nodeName === want.nodeName) update(have, want);
    else have.replaceWith(want);
  }
  while (at) {
    const next = at.nextSibling;
    at.remove();
    at = next;
  }
}

const keyOf = (node) => node.dataset?.key;

function update(have, want) {
  if (have === want) return;
  if (!(have instanceof Element)) {
    if (have.data !== want.data) have.data = want.data;
    return;
  }
  for (const { name } of [...have.attributes]) {
    if (!want.hasAttribute(name) && name !== "style" && !(name === "open" && have.matches("details"))) have.removeAttribute(name);
  }
  for (const { name, value } of want.attributes) {
    if (name !== "style" && have.getAttribute(name) !== value) have.setAttribute(name, value);
  }
  if (have.style && have.style.cssText !== want.style.cssText) have.style.cssText = want.style.cssText;
  if ("keep" in have.dataset && "keep" in want.dataset) return;
  render(have, ...want.childNodes);
  if (have === document.activeElement) return;
  if (/^(INPUT|SELECT|TEXTAREA)$/.test(have.nodeName) && have.value !== want.value) have.value = want.value;
  if (have.checked !== undefined && have.checked !== want.checked) have.checked = want.checked;
}

/** Call `acts[NAME](target, event)` for the nearest `data-act="NAME"`, or `data-TYPE`, around an event. */
export function delegate(root, type, acts) {
  const name = type === "click" ? "act" : type;
  root.addEventListener(type, (event) => {
    const target = event.target.closest(`[data-${name}]`);
    if (target && root.contains(target) && acts[target.dataset[name]]) acts[target.dataset[name]](target, event);
  });
}

/** A message in place of content: kind is loading, empty, nomatch or error. */
export function message(kind, title, ...children) {
  const role = kind === "error" ? "alert" : "status";
  return el("div", { class: "lab-message", role, data: { state: kind }, "aria-busy": kind === "loading" && "true" },
    kind === "loading" ? [el("span", { class: "lab-hidden" }, title), el("div", { class: "lab-bones", "aria-hidden": "true" }, [1, 2, 3, 4].map(() => el("i")))]
      : [el("h2", {}, title), children]);
}

/** An error's message with the API's own sentence and Retry. */
export const errorBox = (error) => message("error",
  error.status === 404 ? "Not in this lab" : "That did not work",
  el("p", {}, error.message), button("Retry", { act: "retry" }));

/** A button; `data` says what it does: {act: NAME} for delegate(), {copy: TEXT} copies. */
export const button = (text, data, props = {}) => el("button", { type: "button", data, ...props }, text);

/** Code to paste, with its copy button. */
export const snippet = (text) => el("div", { class: "lab-snippet" },
  el("pre", { tabindex: "0" }, text), button("Copy", { copy: text }));

/**
 * A table in a box that scrolls sideways where it does not fit.
 *
 * Args: heads (text, node, or [text, "num"] for a column of numbers), rows [{cells, isRaw, ...data}]:
 * a cell is text, a node, or {text, class, title, data}; the first one heads its row.
 */
export function listTable(label, heads, rows) {
  const isNumber = heads.map((head) => Array.isArray(head) && head[1] === "num");
  const cell = (content, i) => {
    const { text = content, ...props } = content?.constructor === Object ? content : {};
    const name = [isNumber[i] && "lab-num", props.class].filter(Boolean).join(" ") || null;
    return el(i ? "td" : "th", { ...props, scope: !i && "row", class: name }, text ?? "–");
  };
  return el("div", { class: "lab-wide-box", tabindex: "0", role: "group", "aria-label": label },
    el("table", { class: "lab-list", data: { table: label } },
      el("thead", {}, el("tr", {}, heads.map((head, i) =>
        el("th", { scope: "col", class: isNumber[i] && "lab-num" }, isNumber[i] ? head[0] : head)))),
      el("tbody", {}, rows.map(({ cells, ...data }) => el("tr", { data }, cells.map(cell))))));
}

/** A titled card of a view. */
export const card = (title, sub, ...children) => el("section", { class: "lab-card", data: { key: title } },
  el("h2", {}, title, sub && el("small", {}, ` ${sub}`)), children);

/** Ask before something that is hard to take back. Returns a promise of true or false. */
export function confirmed(question, detail, action) {
  return new Promise((resolve) => {
    const dialog = el("dialog", { class: "lab-dialog", "aria-labelledby": "lab-question", on: {
      close: () => { dialog.remove(); resolve(dialog.returnValue === "yes"); } } },
      el("form", { method: "dialog" }, el("h2", { id: "lab-question" }, question), el("p", {}, detail),
        el("div", { class: "lab-row" }, el("button", { value: "yes", class: "lab-danger" }, action), el("button", { value: "no" }, "Keep it"))));
    document.body.append(dialog);
    dialog.showModal();
  });
}

/** Say something once, politely, at the foot of the page and to screen readers. */
export function toast(text) {
  const box = document.getElementById("lab-toast");
  box.textContent = text;
  box.hidden = false;
  clearTimeout(box.timer);
  box.timer = setTimeout(() => { box.hidden = true; }, 6000);
}
