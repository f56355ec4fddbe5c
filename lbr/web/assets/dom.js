// Builds nodes, and updates the page to new ones. Text from models is hostile: it only ever becomes a text node.

const SVG = "http://www.w3.org/2000/svg";
const IN_SVG = new Set(["svg", "rect", "path"]);

/** Write out what would change the direction of the text around it, as the terminal does. */
const UNSAFE = /[\u202a-\u202e\u2066-\u2069]/g;
const shown = (child) => (child instanceof Node ? child : String(child).replace(UNSAFE, (one) => `\\u${one.charCodeAt(0).toString(16)}`));

/** Make an element. `on` maps events to functions, `key` finds it again among its siblings, `keep` leaves its content alone. */
export function h(tag, props, ...children) {
  const node = IN_SVG.has(tag) ? document.createElementNS(SVG, tag) : document.createElement(tag);
  const { on, key, keep, ...attributes } = props ?? {};
  Object.assign(node, { handlers: on, key, keep });
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false).map(shown));
  return node;
}

/** Give a node these children. What is the same stays, with its focus, its selection and what the user typed. */
export function patch(node, fresh) {
  const known = new Map([...node.childNodes].filter((child) => child.key).map((child) => [child.key, child]));
  let at = node.firstChild;
  for (const next of fresh) {
    const old = next.key ? known.get(next.key) : at?.key ? null : at;
    if (!old || old.nodeName !== next.nodeName) {
      node.insertBefore(next, at);
      continue;
    }
    if (old === at) at = at.nextSibling;
    else node.insertBefore(old, at);
    update(old, next);
  }
  while (at) {
    const gone = at;
    at = at.nextSibling;
    gone.remove();
  }
}

function update(old, next) {
  if (old.nodeType === Node.TEXT_NODE) {
    if (old.data !== next.data) old.data = next.data;
    return;
  }
  old.handlers = next.handlers;
  if (old.keep) return;
  for (const { name } of [...old.attributes]) {
    if (name !== "open" && !next.hasAttribute(name)) old.removeAttribute(name); // the user opens and closes details
  }
  for (const { name, value } of next.attributes) {
    if (old.getAttribute(name) !== value && name !== "open") old.setAttribute(name, value);
  }
  patch(old, [...next.childNodes]);
}

for (const type of ["click", "submit", "change"]) {
  document.addEventListener(type, (event) => {
    if (type === "submit") event.preventDefault();
    for (let node = event.target; node; node = node.parentNode) {
      const handle = node.handlers?.[type];
      if (handle) return handle(event);
    }
  });
}

/** Show a message for some seconds; screen readers read it out. */
export function toast(text, kind = "") {
  const place = document.getElementById("toast");
  place.className = `toast shown ${kind}`;
  place.textContent = text;
  clearTimeout(place.timer);
  place.timer = setTimeout(() => place.classList.remove("shown"), kind ? 10_000 : 5_000);
}

/** Ask in a dialog; `field` is {label, value, hint} of a number to ask for. Return {value}, or null if the user cancels. */
export function ask({ title, text, field, confirm, danger }) {
  const input = field && h("input", { type: "number", min: "0", step: "any", inputmode: "decimal", value: field.value, autofocus: true });
  const close = (value) => () => dialog.close(value);
  const dialog = h("dialog", { "aria-labelledby": "asked" },
    h("form", { on: { submit: close("yes") } },
      h("h2", { id: "asked" }, title),
      h("p", {}, text),
      field && h("label", { class: "field" }, field.label, input, h("small", {}, field.hint)),
      h("div", { class: "actions" },
        h("button", { type: "button", autofocus: danger, on: { click: close("") } }, "Back"),
        h("button", { class: danger ? "danger" : "primary", autofocus: !danger && !field }, confirm))));
  document.body.append(dialog);
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => {
      dialog.remove();
      resolve(dialog.returnValue === "yes" ? { value: input?.value ? Number(input.value) : null } : null);
    });
  });
}
