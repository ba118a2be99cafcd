// What is shown, and who says so: an example, a run that forms, a finished one.
import { all, ask, copy, facts, one } from "./dom.js";
import * as form from "./form.js";
import * as look from "./look.js";
import * as past from "./history.js";
import * as job from "./job.js";
import * as stage from "./stage.js";

const results = one("#results");
let showing = { kind: "example", id: facts.example };

function put(found, what) {
  showing = what;
  stage.render(found.value);
  look.offer(found.value);
  results.innerHTML = found.html || "";
  past.mark(what.kind === "job" ? what.id : null);
  for (const chip of all("#chips button"))
    chip.setAttribute("aria-pressed", String(what.kind === "example" && chip.dataset.example === what.id));
}
async function example(name) {
  try {
    const found = await ask(`examples/${name}`);
    put(found, { kind: "example", id: name });
    if (Object.keys(found.asked).length) form.fill(found.asked);
    else form.fill({ prompt: found.prompt });
  } catch (wrong) { form.mark(wrong); }
}
async function restore(id) {
  try {
    const found = await ask(`jobs/${id}`);
    put(found, { kind: "job", id });
    form.fill(found.asked);
  } catch (wrong) { if (wrong.status === 404) past.forget(id); form.mark(wrong); }
}
let latest = null;
one("#back").onclick = () => put({ value: latest, html: "" }, { kind: "job", id: job.current() });
const mine = (id) => showing.kind === "job" && showing.id === id;

job.start({
  began(news) {
    put({ value: news.value, html: "" }, { kind: "job", id: news.job });
    const top = one("#player").getBoundingClientRect();
    if (top.top > innerHeight * 0.6 || top.bottom < 0) {
      const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
      one("#player").scrollIntoView({ behavior: calm ? "auto" : "smooth", block: "start" });
    }
  },
  moved(id, news) {
    latest = news.value;
    one("#back").hidden = mine(id);
    if (mine(id)) stage.render(news.value);
  },
  async ended(id, news) {
    one("#back").hidden = true;
    if (news.state !== "done") return;
    const found = await ask(`jobs/${id}`);
    past.add(id, found);
    form.estimate();
    if (mine(id)) put(found, { kind: "job", id });
  },
  found(id, news) {
    if (news.state === "done") past.add(id, news);
    put({ value: news.value, html: news.html }, { kind: "job", id });
  },
  vanished() { stage.stopped("lost"); },
});
past.start({
  show: restore,
  pair(found) { put(found, { kind: "pair", id: null }); one("#player").scrollIntoView({ block: "nearest" }); },
  wrong: form.mark,
});
for (const chip of all("#chips button")) chip.onclick = () => example(chip.dataset.example);
results.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (button?.classList.contains("copy")) {
    const code = one(".code pre", results);
    copy(button, code.textContent, () => { getSelection().selectAllChildren(code); return "Selected"; });
  }
  if (button?.dataset.fix) { form.fix(button.dataset.fix, button.dataset.value); job.generate(); }
});
addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); job.generate(); return; }
  if (!event.target.closest("#player") || event.target.closest("input, select, button") || event.ctrlKey || event.metaKey || event.altKey) return;
  if (stage.key(event.key)) event.preventDefault();
});
form.start(() => {});
if (showing.kind === "example" && facts.shown) {
  stage.render(facts.shown.value);
  look.offer(facts.shown.value);
  past.mark(null);
  one(`[data-example="${facts.example}"]`)?.setAttribute("aria-pressed", "true");
}
document.documentElement.dataset.ready = "true";
