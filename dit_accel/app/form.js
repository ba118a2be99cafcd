// The settings: their values, what they cost, what is wrong with them; kept, linked, opened.
import { all, ask, copy, facts, local, one, post } from "./dom.js";

const form = one("#columns"), note = one("#note");
const named = () => all("#ask [name], #options [name]");
let card = facts.card, plain = {}, changed = () => {};

function put(out, name, value) {
  const [side, key] = name.split(".");
  if (key) (out[side] ||= {})[key] = value; else out[name] = value;
}
export function values() {
  const out = {};
  for (const field of named()) {
    if (field.type === "radio" ? !field.checked : field.closest("[hidden]")) continue;
    const value = field.type === "checkbox" ? field.checked : field.value;
    if (value !== "" && value !== false) put(out, field.name, value);
  }
  return out;
}
export function flat(data) {
  const out = {};
  for (const [name, value] of Object.entries(data || {})) {
    if (value && typeof value === "object")
      for (const [key, inner] of Object.entries(value)) out[`${name}.${key}`] = inner;
    else out[name] = value;
  }
  return out;
}
export function fill(data) {
  const found = flat(data);
  for (const field of named()) {
    const value = found[field.name] ?? plain[field.name] ?? "";
    if (field.type === "radio") field.checked = field.value === String(value);
    else if (field.type === "checkbox") field.checked = value === true || value === "true";
    else {
      if (field.tagName === "SELECT" && !all("option", field).some((o) => o.value === value)) {
        if (!String(value).startsWith("opened:")) continue;
        offer(value, "opened preset");
      }
      field.value = String(value);
    }
  }
  all("[data-sent]").forEach(pictured);
  update();
}
function offer(value, label) {
  for (const select of all("select[name$='.method']"))
    if (!all("option", select).some((o) => o.value === value)) select.add(new Option(label, value));
}

function sides() {
  for (const set of all(".side")) {
    const method = one("select", set).value, dense = method === "dense";
    const kind = facts.kinds.find((k) => k.value === method);
    const level = one("input[type=radio]:checked", set)?.value;
    one(".about", set).textContent = kind ? kind.about : "A preset that you opened.";
    one(".more", set).hidden = dense;
    one(".levels", set).hidden = !kind || !Object.keys(kind.own).some((name) => name);
    const told = facts.speeds[one("[name$='.speed']", set)?.value], plainly = kind?.own[level] ?? kind?.own[""];
    const own = told ? { ...plainly, ...told } : plainly, unknown = kind ? "as trained" : "the preset's";
    for (const field of all(".field", set)) {
      const box = one("[name]", field), name = box.name.split(".")[1];
      if (name === "method") continue;
      box.placeholder = own ? own[name] ?? "" : name === "keep" ? unknown : "";
      if (name === "min_tokens") box.placeholder ||= facts.crossover;
      if (name === "keep") continue;
      field.hidden = (dense && !facts.beside.includes(name)) || (name === "prune" && kind && !kind.prunes);
    }
  }
}
function hints() {
  for (const [name, value] of Object.entries(card.defaults)) {
    const field = one(`#${name}`);
    if (field) field.placeholder = value === null || value === "" ? (name === "negative" ? "" : "the model's") : String(value);
  }
  one("#seed").placeholder = "0";
  one("#draws").hidden = !card.draws.length;
  one("#count").textContent = `in ${card.draws.length}`;
  one("#grammar").replaceChildren(...card.grammar.map((line) => Object.assign(document.createElement("li"), { textContent: line })));
  list();
}
function list() {
  const wanted = one("#find").value.trim().toLowerCase();
  const found = card.draws.filter(([name]) => name.toLowerCase().includes(wanted));
  one("#names").replaceChildren(...found.map(([name, prompt]) => {
    const item = document.createElement("li"), button = document.createElement("button");
    button.type = "button";
    button.textContent = name;
    button.onclick = () => { one("#prompt").value = placed(name, prompt); update(); };
    item.append(button);
    return item;
  }));
  if (!found.length) one("#names").textContent = "It knows nothing of that name.";
}
// The name in place of the first one that the prompt holds, else its own prompt.
function placed(name, prompt) {
  const text = one("#prompt").value, low = text.toLowerCase();
  const held = card.draws.map(([n]) => n).filter((n) => new RegExp(`(^|\\W)${n.replace(/\W/g, "\\$&")}(\\W|$)`).test(low))
    .sort((a, b) => low.indexOf(a) - low.indexOf(b) || b.length - a.length)[0];
  if (!held) return prompt;
  const at = low.indexOf(held), article = /^[aeio]|^u(?!n)/.test(name) ? "an" : "a";
  return text.slice(0, at).replace(/\ban? $/, article + " ") + name + text.slice(at + held.length);
}

let timer = 0, turn = 0;
function update() {
  sides();
  local.set("form", values());
  changed();
  clearTimeout(timer);
  timer = setTimeout(estimate, 250);
}
export async function estimate() {
  const mine = ++turn;
  try {
    const told = await post("estimate", values());
    if (mine !== turn) return;
    clear();
    one("#cost").textContent = told.text + ".";
    one("#trouble").textContent = told.refused || told.notes.join(" ");
    short(told.short);
  } catch (wrong) {
    if (mine !== turn) return;
    one("#cost").textContent = "";
    one("#trouble").textContent = "";
    if (wrong.status) mark(wrong, false);
  }
}
function short(words) {
  if (!words) return;
  const button = document.createElement("button");
  Object.assign(button, { type: "button", textContent: "Accelerate short clips too" });
  button.onclick = () => fix("right.min_tokens", "0");
  one("#cost").append(" " + words + " ", button);
}
export function fix(name, value) {
  const field = one(`[name="${name}"]`);
  field.value = value;
  update();
}
// What is wrong, beside the button and at the field it is about.
export function mark(wrong, go = true) {
  clear();
  note.textContent = wrong.error;
  const field = wrong.field && one(`[name="${CSS.escape(wrong.field)}"]`);
  if (!field) return;
  field.setAttribute("aria-invalid", "true");
  if (!go) return;
  for (let box = field.closest("details"); box; box = box.parentElement.closest("details")) box.open = true;
  field.focus();
}
export function clear() {
  note.textContent = "";
  for (const field of all("[aria-invalid]", form)) field.removeAttribute("aria-invalid");
}

// A checkpoint is run as it was trained, unless a method was chosen for it.
function checkpointChanged() {
  const method = one("#right-method"), [usual, trained] = [plain["right.method"], "trained"];
  const [from, to] = one("#checkpoint").value.trim() ? [usual, trained] : [trained, usual];
  if (method.value === from) method.value = to;
  update();
}
async function modelChanged() {
  const name = one("#model").value.trim();
  try { card = await ask("models?name=" + encodeURIComponent(name)); hints(); update(); }
  catch (wrong) { mark(wrong); }
}
function pictured(input) {
  const held = one(`[name="${input.dataset.name}"]`);
  one(`[data-for="${input.id}"]`).hidden = !held.value;
  if (!held.value) input.value = "";
}
async function sendPicture(input) {
  const held = one(`[name="${input.dataset.name}"]`);
  try {
    if (input.files[0]) held.value = (await ask("sent/picture", { method: "POST", body: input.files[0] })).token;
    update();
  } catch (wrong) { held.value = ""; mark(wrong); }
  pictured(input);
}
async function open(input) {
  const [file] = input.files;
  input.value = "";
  if (!file) return;
  try {
    const text = await file.text(), data = JSON.parse(text);
    if (data.asked && Object.keys(data.asked).length) return fill(data.asked);
    const config = data.attention?.config || data.right?.report?.config || data.config || data;
    const { token } = await ask("sent/preset", { method: "POST", body: config === data ? text : JSON.stringify(config) });
    offer(`opened:${token}`, file.name);
    one("#right-method").value = `opened:${token}`;
    if (data.prompt) one("#prompt").value = data.prompt;
    if (Number.isInteger(data.seed)) one("#seed").value = data.seed;
    update();
  } catch (wrong) {
    mark(wrong.error ? wrong : { error: `${file.name} is no JSON file.`, field: "" });
  }
}
export function link() {
  const out = new URLSearchParams();
  for (const [name, value] of Object.entries(flat(values())))
    if (String(value) !== String(plain[name] ?? "") || name === "prompt") out.set(name, value);
  return `${location.origin}${location.pathname}#${out}`;
}
function linked() {
  if (location.hash.length < 2) return null;
  const out = {};
  for (const [name, value] of new URLSearchParams(location.hash.slice(1)))
    if (name !== "__proto__" && !name.startsWith("__proto__.")) put(out, name, value);
  return out;
}

export function start(onChange) {
  changed = onChange;
  plain = flat(values());
  hints();
  form.addEventListener("input", (event) => { if (event.target.name) update(); });
  one("#find").oninput = list;
  one("#model").onchange = modelChanged;
  if (one("#checkpoint")) one("#checkpoint").onchange = checkpointChanged;
  one("#dice").onclick = () => { one("#seed").value = Math.floor(Math.random() * 2 ** 31); update(); };
  one("#link").onclick = () => {
    history.replaceState(null, "", link());
    copy(one("#link"), link(), () => "It is the address");
  };
  one("#reset").onclick = () => { history.replaceState(null, "", location.pathname); fill({ prompt: plain.prompt }); };
  one("#open").onchange = (event) => open(event.target);
  for (const input of all("[data-sent]")) {
    input.onchange = () => sendPicture(input);
    one(`[data-for="${input.id}"]`).onclick = () => { one(`[name="${input.dataset.name}"]`).value = ""; pictured(input); update(); };
  }
  const kept = linked() || local.get("form");
  fill(kept || facts.shown?.asked || {});
  if (one("#model").value) modelChanged();
}
