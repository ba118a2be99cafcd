// A run: asked for, followed, stopped, and found again after a reload.
import { ask, one, post, session } from "./dom.js";
import { clear, mark, values } from "./form.js";

const status = one("#status"), go = one("#go"), stop = one("#stop");
let job = null, source = null, tell = {}, retry = 0;

export const current = () => job;
export const running = () => Boolean(source);

function buttons(busy) { go.disabled = busy; stop.disabled = !busy; }
function words(text) { if (status.textContent !== text) status.textContent = text; }
// A screen reader hears what changes, not every step; the tab's title tells how far it is.
let heardLast = "";
const title = document.title;
function announce(news) {
  const side = news.value.right.busy ? "right" : "left";
  const phase = news.state === "running" ? `${side} side: ${(news.value[side].state || "").split(",")[0]}` : news.said;
  if (news.state !== "waiting" && phase !== heardLast) one("#said").textContent = heardLast = phase;
  else if (news.state === "waiting" && heardLast !== `${news.before}`) { heardLast = `${news.before}`; one("#said").textContent = news.said; }
  const share = ["left", "right"].reduce((sum, name) => sum + (news.value[name].src ? 1 : news.value[name].share || 0), 0) / 2;
  document.title = news.state === "running" ? `${Math.round(100 * share)} % · ${title}`
    : news.state === "done" && document.hidden ? `Done · ${title}` : title;
}
addEventListener("visibilitychange", () => { if (!source) document.title = title; });

export async function generate() {
  if (go.disabled) return;
  clear();
  buttons(true);
  words("");
  try {
    const news = await post("jobs", values());
    tell.began(news);
    follow(news.job);
  } catch (wrong) { buttons(false); mark(wrong); }
}
function follow(id) {
  job = id;
  session.set("job", id);
  buttons(true);
  source = new EventSource(`jobs/${id}/events`);
  source.onmessage = (event) => heard(JSON.parse(event.data));
  source.onerror = lost;
}
function heard(news) {
  retry = 0;
  words(news.said);
  announce(news);
  tell.moved(job, news);
  if (!["done", "failed", "cancelled"].includes(news.state)) return;
  end();
  if (news.note) mark({ error: news.note, field: "" });
  tell.ended(job, news);
}
function end() {
  source?.close();
  source = null;
  buttons(false);
}
// The server went away, or it forgot the run: say which, and try again for a minute.
async function lost() {
  const id = job;
  source?.close();
  if (!source) return;
  words("The connection to the server is lost: trying again.");
  try {
    await ask(`jobs/${id}`);
    follow(id);
  } catch (wrong) {
    if (wrong.status === 404 || ++retry > 20) {
      end();
      session.set("job", null);
      words("");
      tell.vanished();
      mark({ error: wrong.status === 404 ? "The server was restarted and this run is lost: generate it again." : wrong.error, field: "" });
    } else setTimeout(lost, Math.min(3000, 500 * retry));
  }
}
// A page that is put aside follows nothing; one that comes back goes on.
addEventListener("pagehide", () => source?.close());
addEventListener("pageshow", (event) => { if (event.persisted && source) follow(job); });
export async function cancel() {
  if (!job || !source) return;
  stop.disabled = true;
  words("Stopping at the next layer.");
  try { await ask(`jobs/${job}`, { method: "DELETE" }); }
  catch (wrong) { mark(wrong); }
}
export async function start(listener) {
  tell = listener;
  one("#ask").onsubmit = (event) => { event.preventDefault(); generate(); };
  stop.onclick = cancel;
  const id = session.get("job");
  if (!id) return;
  try {
    const news = await ask(`jobs/${id}`);
    if (["failed", "cancelled"].includes(news.state)) return;
    tell.found(id, news);
    if (news.state === "done") job = id; else follow(id);
  } catch (wrong) {
    session.set("job", null);
    if (wrong.status === 404) words("The run of before the reload is no longer on the server.");
  }
}
