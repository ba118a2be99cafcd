// Two players in step, or two previews while they form: side by side, wiped, or their difference.
import { all, one } from "./dom.js";

const element = one("#player"), stage = one(".stage"), play = one(".play"), at = one(".at"), cut = one(".cut");
const sides = ["left", "right"].map((name) => {
  const figure = one("figure." + name), find = (query) => one(query, figure);
  return { name, figure, video: find("video"), img: find("img"), state: find(".state"), bar: find(".bar"),
           label: find(".label"), time: find(".time"), tag: find(".tag"), src: "" };
});
const [lead, follower] = sides.map((side) => side.video);
let value = null, fps = 16, last = 0, speed = 1, wanted = !matchMedia("(prefers-reduced-motion: reduce)").matches;
let zoom = 1, pan = [0, 0];

const apart = one(".apart-of"), canvas = one("canvas", apart), paint = canvas.getContext("2d");
let rolling = false, turn = 0;

const clips = () => sides.filter((side) => side.figure.classList.contains("clip"));
const both = () => clips().length === 2;
const differs = () => stage.classList.contains("apart");
const playing = () => (differs() ? rolling : clips().some((side) => !side.video.paused));
const listeners = [];
export const onFrame = (listener) => listeners.push(listener);
const viewers = [];
export const onView = (viewer) => viewers.push(viewer); // is told "", "wipe" or "apart"
export const pause = () => stop();
export const frame = () => Number(at.value);

function show() {
  const source = clips()[0];
  if (source && differs()) {
    one(".where").textContent = `${Number(at.value) + 1} / ${last + 1}`;
    play.textContent = rolling ? "Pause" : "Play";
  } else if (source) {
    at.value = Math.min(last, Math.floor(source.video.currentTime * fps + 0.01));
    one(".where").textContent = `${Number(at.value) + 1} / ${last + 1}`;
    play.textContent = playing() ? "Pause" : "Play";
  }
  for (const listener of listeners) listener();
}
function follow() {
  if (both() && !lead.paused && Math.abs(lead.currentTime - follower.currentTime) > 0.7 / fps)
    follower.currentTime = lead.currentTime;
  show();
  if (playing()) requestAnimationFrame(follow);
}
function start() {
  wanted = true;
  if (differs()) { rolling = true; differ(); return; }
  for (const side of clips()) side.video.playbackRate = speed;
  Promise.all(clips().map((side) => side.video.play())).then(follow, show);
}
function stop() {
  wanted = rolling = false;
  for (const side of sides) side.video.pause();
  show();
}
function seek(seconds) {
  if (differs()) { differ(); return; }
  for (const side of clips()) side.video.currentTime = seconds;
}
function step(frames) {
  stop();
  const next = (Number(at.value) + frames + last + 1) % (last + 1);
  at.value = next;
  seek((next + 0.5) / fps);
}

// The difference is of equal frames: both players are set to one, and drawn once both are there.
function set(video, time) {
  if (Math.abs(video.currentTime - time) < 1e-3 && !video.seeking && video.readyState > 1) return null;
  return new Promise((done) => {
    video.addEventListener("seeked", done, { once: true });
    video.currentTime = time;
  });
}
async function differ() {
  const mine = ++turn;
  for (let due = performance.now(); mine === turn && differs() && both(); ) {
    const time = (Number(at.value) + 0.5) / fps;
    await Promise.all([set(lead, time), set(follower, time)]);
    if (mine !== turn || !differs()) return;
    draw(lead, follower);
    show();
    if (!rolling) return;
    due = Math.max(due + 1000 / fps / speed, performance.now());
    await new Promise((done) => setTimeout(done, due - performance.now()));
    if (rolling) at.value = (Number(at.value) + 1) % (last + 1);
  }
}
function draw(first, second) {
  [canvas.width, canvas.height] = [value.width, value.height];
  paint.globalCompositeOperation = "source-over";
  paint.drawImage(first, 0, 0, canvas.width, canvas.height);
  paint.globalCompositeOperation = "difference";
  paint.drawImage(second, 0, 0, canvas.width, canvas.height);
}

function press(group, chosen) {
  for (const button of all(group + " button")) button.setAttribute("aria-pressed", String(button === chosen));
}
function view(name) {
  press(".view", one(`.view [data-view="${name}"]`));
  const was = playing();
  stage.classList.remove("wipe", "apart");
  if (name) stage.classList.add(name);
  element.classList.toggle("differs", name === "apart");
  apart.hidden = name !== "apart";
  turn++;
  if (name === "apart" && !clips().length) draw(sides[0].img, sides[1].img);
  else if (name === "apart") {
    for (const side of clips()) side.video.pause();
    rolling = was;
    differ();
  } else if (rolling) { rolling = false; start(); }
  for (const viewer of viewers) viewer(name);
}
canvas.style.filter = "brightness(4)";
function look() {
  const most = (zoom - 1) / 2 * 100;
  pan = pan.map((x) => Math.min(most, Math.max(-most, x)));
  stage.style.setProperty("--zoom", zoom);
  stage.style.setProperty("--x", pan[0] + "%");
  stage.style.setProperty("--y", pan[1] + "%");
  stage.classList.toggle("zoomed", zoom > 1);
  for (const listener of listeners) listener();
}
function zoomBy(way) {
  zoom = way ? Math.min(8, Math.max(1, zoom * (way > 0 ? 1.5 : 1 / 1.5))) : 1;
  if (zoom < 1.01) { zoom = 1; pan = [0, 0]; }
  look();
}

function update(side, now) {
  side.label.textContent = now.label || "";
  side.tag.textContent = `${side.name}: ${now.label || ""}`;
  side.time.textContent = now.time || "";
  side.state.textContent = now.state || "";
  const share = Math.round(100 * (now.share || 0));
  side.bar.setAttribute("aria-valuenow", share);
  one("i", side.bar).style.width = share + "%";
  side.figure.classList.toggle("busy", Boolean(now.busy));
  const moving = Boolean(now.src) && !now.still, shown = now.preview || (now.still && now.src);
  if (shown && side.img.getAttribute("src") !== shown) side.img.src = shown;
  side.figure.classList.toggle("picture", !moving && Boolean(shown));
  side.figure.classList.toggle("clip", moving);
  const src = moving ? now.src : "";
  if (side.src === src) return;
  side.src = src;
  side.loaded = false;
  side.video.pause();
  if (!src) { side.video.removeAttribute("src"); return; }
  side.video.src = src;
  side.video.onloadeddata = () => {
    side.loaded = true;
    if (both()) seek(0);
    // one clip alone does not start: playing it takes time from the other, which still forms
    if (wanted && both() && clips().every((s) => s.loaded)) start(); else show();
  };
}
export function render(found) {
  value = found;
  if (!value || !value.left) return;
  fps = value.fps || 16;
  last = Math.max(0, (value.frames || 1) - 1);
  at.max = last;
  stage.style.setProperty("--ratio", (value.width || 1) + " / " + (value.height || 1));
  sides.forEach((side) => update(side, value[side.name]));
  element.classList.toggle("still", last === 0 || !clips().length);
  const done = sides.every((side) => value[side.name].src);
  element.classList.toggle("single", !done);
  if (!done) { view(""); zoomBy(0); } else if (differs()) differ();
  show();
}
export function stopped(words) {
  if (!value) return;
  for (const name of ["left", "right"])
    if (!value[name].src) value[name] = { ...value[name], busy: false, state: words };
  render(value);
}
// A key pressed where nothing else wants it; true when it meant something here.
export function key(name) {
  if (!clips().length && name !== "0") return false;
  const keys = {
    " ": () => (playing() ? stop() : start()), ArrowLeft: () => step(-1), ArrowRight: () => step(1),
    Home: () => step(-Number(at.value)), End: () => step(last - Number(at.value)),
    "+": () => zoomBy(1), "=": () => zoomBy(1), "-": () => zoomBy(-1), "0": () => zoomBy(0),
    w: () => view(stage.classList.contains("wipe") ? "" : "wipe"),
    d: () => view(stage.classList.contains("apart") ? "" : "apart"),
  };
  if (!keys[name]) return false;
  keys[name]();
  return true;
}

play.onclick = () => (playing() ? stop() : start());
at.oninput = () => { const frame = Number(at.value); stop(); seek((frame + 0.5) / fps); };
cut.oninput = () => stage.style.setProperty("--cut", cut.value + "%");
for (const button of all(".view button")) button.onclick = () => view(button.dataset.view);
for (const button of all(".zooms button")) button.onclick = () => zoomBy(Number(button.dataset.zoom));
for (const button of all(".speed button"))
  button.onclick = () => {
    speed = Number(button.dataset.speed);
    press(".speed", button);
    for (const side of sides) side.video.playbackRate = speed;
  };
const gain = one(".gain input");
gain.oninput = () => {
  canvas.style.filter = `brightness(${gain.value})`;
  one(".gain output").textContent = gain.value;
};
let held = null;
stage.addEventListener("pointerdown", (event) => {
  if (zoom === 1 || event.target === cut) return;
  held = [event.clientX, event.clientY, ...pan];
  stage.setPointerCapture(event.pointerId);
});
stage.addEventListener("pointermove", (event) => {
  if (!held) return;
  const box = one(".screen", stage).getBoundingClientRect();
  pan = [held[2] + 100 * (event.clientX - held[0]) / box.width, held[3] + 100 * (event.clientY - held[1]) / box.height];
  look();
});
for (const end of ["pointerup", "pointercancel"]) stage.addEventListener(end, () => { held = null; });
stage.addEventListener("click", (event) => {
  if (zoom === 1 && event.target.closest(".screen") && !event.target.closest(".look") && clips().length) key(" ");
});
stage.addEventListener("dblclick", () => zoomBy(zoom > 1 ? 0 : 1));
stage.addEventListener("wheel", (event) => {
  if (!event.ctrlKey) return;
  event.preventDefault();
  zoomBy(event.deltaY < 0 ? 1 : -1);
}, { passive: false });
for (const { video } of sides) {
  video.onended = () => { seek(0); start(); };
  video.onseeked = () => { if (!differs()) show(); };
}
