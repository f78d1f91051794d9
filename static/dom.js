/** Nodes: made by el(), brought up to date by render(); text only ever through textContent. */

const isSet = (value) => value !== undefined && value !== null && value !== false;
const nodes = (children) => children.flat(Infinity).filter(isSet)
  .map((child) => (child instanceof Node ? child : document.createTextNode(String(child))));
const keyOf = (node) => node.dataset?.key;

/**
 * Make an element. Props: `data` (object), `style` (object, set through CSSOM), `on` (object of
 * listeners), `value` and `checked` as properties, the rest as attributes; false, null and
 * undefined leave one out, true makes it empty.
 */
export function el(tag, { data = {}, style = {}, on = {}, value, checked, ...attributes } = {}, ...children) {
  const node = document.createElement(tag);
  const setOnes = (props) => Object.entries(props).filter(([, text]) => isSet(text));
  for (const [name, text] of setOnes(attributes)) node.setAttribute(name, text === true ? "" : text);
  for (const [name, text] of setOnes(data)) node.dataset[name] = text;
  for (const [name, text] of setOnes(style)) node.style.setProperty(name, text);
  for (const [type, listener] of setOnes(on)) node.addEventListener(type, listener);
  node.append(...nodes(children));
  if (value !== undefined) node.value = value;
  if (checked !== undefined) node.checked = checked;
  return node;
}

/**
 * Make the parent's children like these, touching only what differs: focus, scroll and what is
 * being typed stay. Children with `data-key` are matched by it; inside `data-keep` nothing is done.
 */
export function render(parent, ...children) {
  const wanted = nodes(children);
  const keys = new Set(wanted.map(keyOf));
  for (const node of [...parent.childNodes]) if (keyOf(node) && !keys.has(keyOf(node))) node.remove();
  const byKey = new Map([...parent.childNodes].filter(keyOf).map((node) => [keyOf(node), node]));
  let at = parent.firstChild;
  for (const want of wanted) {
    const isLike = at && !keyOf(at) && at.nodeName === want.nodeName;
    const have = keyOf(want) ? byKey.get(keyOf(want)) : isLike ? at : null;
    if (have && have === at) at = at.nextSibling;
    else parent.insertBefore(have ?? want, at);
    if (have) update(have, want);
  }
  while (at?.nextSibling) at.nextSibling.remove();
  at?.remove();
}

function update(have, want) {
  if (have === want) return;
  if (!(have instanceof Element)) {
    if (have.data !== want.data) have.data = want.data;
    return;
  }
  const isOurs = (name) => name !== "style" && !(name === "open" && have.matches("details"));  // the reader folds
  for (const name of have.getAttributeNames().filter(isOurs)) if (!want.hasAttribute(name)) have.removeAttribute(name);
  for (const name of want.getAttributeNames().filter(isOurs)) {
    if (have.getAttribute(name) !== want.getAttribute(name)) have.setAttribute(name, want.getAttribute(name));
  }
  if (have.style.cssText !== want.style.cssText) have.style.cssText = want.style.cssText;
  if (have.dataset.keep && want.dataset.keep) return;
  render(have, ...want.childNodes);
  if (have === document.activeElement && have.matches("textarea, input:not([type=checkbox])")) return;
  if (have.value !== want.value) have.value = want.value;
  if (have.checked !== want.checked) have.checked = want.checked;
}

/** Call `acts[NAME](target, event)` for the nearest `data-act="NAME"` (a click), or `data-TYPE`. */
export function delegate(root, type, acts) {
  const name = type === "click" ? "act" : type;
  root.addEventListener(type, (event) => {
    const target = event.target.closest(`[data-${name}]`);
    if (target && root.contains(target)) acts[target.dataset[name]]?.(target, event);
  });
}

/** A button; `data` says what it does: {act: NAME} for delegate(), {copy: TEXT} copies. */
export const button = (text, data, props = {}) => el("button", { type: "button", data, ...props }, text);
export const muted = (...text) => el("p", { class: "lab-muted" }, text);
/** Whether a key in a text box means "take it": Enter alone; Shift+Enter breaks the line. */
export const isSave = (event) => event.key === "Enter" && !event.shiftKey && !event.isComposing;
/** An option; its value is an attribute, so that any text survives. */
export const option = (name, text = name) => Object.assign(el("option", {}, text), { value: name });

/** A message in place of content: kind is loading, empty, nomatch or error. */
export const message = (kind, title, ...children) => el("div", { class: "lab-message", data: { state: kind },
  role: kind === "error" ? "alert" : "status" }, el("h2", {}, title), children);

/** An error's message with the API's own sentence and Retry. */
export const errorBox = (error) => message("error", error.status === 404 ? "Not in this lab" : "That did not work",
  el("p", {}, error.message), button("Retry", { act: "retry" }));
/** Code to paste, with its copy button. */
export const snippet = (text) => el("div", { class: "lab-snippet" },
  el("pre", { tabindex: "0" }, text), button("Copy", { copy: text }));
/** A titled card of a view. */
export const card = (title, sub, ...children) => el("section", { class: "lab-card", data: { key: title } },
  el("h2", {}, title, sub && el("small", {}, ` ${sub}`)), children);

/**
 * A table in a box that scrolls sideways where it does not fit.
 *
 * Args: heads (text, node, or [text, "num"] for a column of numbers), rows [{cells, ...data}]: a
 * cell is text, a node, or {text, class, title, data}; the first one heads its row.
 */
export function listTable(label, heads, rows) {
  const isNumber = heads.map((head) => head?.[1] === "num");
  const cell = (content, i) => {
    const { text = content, ...props } = content?.constructor === Object ? content : {};
    const name = [isNumber[i] && "lab-num", props.class].filter(Boolean).join(" ");
    return el(i ? "td" : "th", { ...props, scope: !i && "row", class: name || null }, text ?? "–");
  };
  const head = (text, i) => el("th", { scope: "col", class: isNumber[i] && "lab-num" }, isNumber[i] ? text[0] : text);
  return el("div", { class: "lab-wide-box", tabindex: "0", role: "group", "aria-label": label },
    el("table", { class: "lab-list", data: { table: label } }, el("thead", {}, el("tr", {}, heads.map(head))),
      el("tbody", {}, rows.map(({ cells, ...data }) => el("tr", { data }, cells.map(cell))))));
}

/** Charts side by side, under the switches that they share. */
export const chartsBox = (isLog, figures) => [el("div", { class: "lab-row", data: { key: "tools" } },
  el("label", {}, el("input", { type: "checkbox", checked: isLog, data: { change: "log" } }), " log y"),
  el("small", { class: "lab-muted" }, "drag to zoom, double-click to reset")),
el("div", { class: "lab-charts", data: { key: "charts" } }, figures)];

/** Ask before something that is hard to take back. Returns a promise of true or false. */
export async function confirmed(question, detail, action) {
  const dialog = el("dialog", { class: "lab-dialog", "aria-label": question }, el("form", { method: "dialog" },
    el("h2", {}, question), el("p", {}, detail), el("div", { class: "lab-row" },
      el("button", { value: "yes", class: "lab-danger" }, action), el("button", { value: "no" }, "Keep it"))));
  document.body.append(dialog);
  dialog.showModal();
  await new Promise((resolve) => { dialog.addEventListener("close", resolve); });
  dialog.remove();
  return dialog.returnValue === "yes";
}

/** Say something once, politely, at the foot of the page and to screen readers. */
export function toast(text) {
  const box = document.getElementById("lab-toast");
  Object.assign(box, { textContent: text, hidden: false });
  clearTimeout(toast.timer);
  toast.timer = setTimeout(() => { box.hidden = true; }, 6000);
}

/** Run `job`; its failure is said as "Not deleted: why". */
export const attempt = (not, job) => job().catch((error) => toast(`${not}: ${error.message}`));
