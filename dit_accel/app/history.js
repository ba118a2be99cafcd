// The finished runs of this visit: each can be shown again, any two clips be held together.
import { all, ask, one, session } from "./dom.js";

let runs = session.get("runs") || [], shown = null, tell = {};

export function add(id, found) {
  runs = runs.filter((run) => run.id !== id);
  runs.push({ id, prompt: found.prompt, headline: found.headline, left: found.value.left.label, right: found.value.right.label });
  runs = runs.slice(-24);
  draw();
}
export function mark(id) { shown = id; draw(); }

function draw() {
  session.set("runs", runs);
  one("#history").hidden = !runs.length;
  one("#history ol").replaceChildren(...runs.map((run) => {
    const item = document.createElement("li"), button = document.createElement("button");
    Object.assign(button, { type: "button", textContent: `${run.prompt}: ${run.right}, ${run.headline}` });
    if (run.id === shown) button.setAttribute("aria-current", "true");
    button.onclick = () => tell.show(run.id);
    item.append(button);
    return item;
  }));
  for (const select of all("#pair select")) {
    const before = select.value;
    select.replaceChildren(...runs.flatMap((run, number) => ["left", "right"].map((side) =>
      new Option(`${number + 1} ${side}: ${run[side]}`, `${run.id}:${side}`))));
    const last = runs[runs.length - 1];
    select.value = before || `${last?.id}:${select.name}`;
    if (!select.value && last) select.value = `${last.id}:${select.name}`;
  }
}
export function forget(id) { runs = runs.filter((run) => run.id !== id); draw(); }
export async function start(listener) {
  tell = listener;
  draw();
  one("#pair").onsubmit = async (event) => {
    event.preventDefault();
    const [left, right] = all("#pair select").map((select) => select.value);
    try { tell.pair(await ask(`pairs?left=${left}&right=${right}`)); }
    catch (wrong) { tell.wrong(wrong); }
  };
}
