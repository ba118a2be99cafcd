// Two players in step, or two previews while they form. `props.value` says which; see stage.py.
const one = (query) => element.querySelector(query);
const all = (query) => [...element.querySelectorAll(query)];
const stage = one(".stage"), play = one(".play"), at = one(".at"), cut = one(".cut");
const sides = ["left", "right"].map((name) => {
  const figure = one("figure." + name), find = (query) => figure.querySelector(query);
  return { name, figure, video: find("video"), img: find("img"), state: find(".state"),
           bar: find(".bar i"), label: find(".label"), time: find(".time"), src: "" };
});
const [lead, follower] = sides.map((side) => side.video);
let fps = 16, last = 0, speed = 1, wanted = !matchMedia("(prefers-reduced-motion: reduce)").matches;

const clips = () => sides.filter((side) => side.figure.classList.contains("clip"));
const both = () => clips().length === 2;
const playing = () => clips().some((side) => !side.video.paused);

function show() {
  const source = clips()[0];
  if (!source) return;
  at.value = Math.min(last, Math.floor(source.video.currentTime * fps + 0.01));
  at.style.setProperty("--at", last ? at.value / last : 0);
  one(".where").textContent = `${Number(at.value) + 1} / ${last + 1}`;
  play.textContent = playing() ? "Pause" : "Play";
}
function follow() {
  if (both() && !lead.paused && Math.abs(lead.currentTime - follower.currentTime) > 0.7 / fps)
    follower.currentTime = lead.currentTime;
  show();
  if (playing()) requestAnimationFrame(follow);
}
function start() {
  wanted = true;
  for (const side of clips()) side.video.playbackRate = speed;
  Promise.all(clips().map((side) => side.video.play())).then(follow, show);
}
function stop() {
  wanted = false;
  for (const side of sides) side.video.pause();
  show();
}
function seek(seconds) { for (const side of clips()) side.video.currentTime = seconds; }

function press(group, chosen) {
  for (const button of all(group + " button")) button.setAttribute("aria-pressed", button === chosen);
}
function view(button) {
  press(".views", button);
  stage.classList.remove("wipe", "apart");
  if (button.dataset.view) stage.classList.add(button.dataset.view);
}

function update(side, now) {
  side.label.textContent = now.label || "";
  side.time.textContent = now.time || "";
  side.state.textContent = now.state || "";
  side.bar.style.width = 100 * (now.share || 0) + "%";
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
function render() {
  const value = props.value;
  if (!value || !value.left) return;
  fps = value.fps || 16;
  last = Math.max(0, (value.frames || 1) - 1);
  at.max = last;
  stage.style.setProperty("--ratio", (value.width || 1) + " / " + (value.height || 1));
  sides.forEach((side) => update(side, value[side.name]));
  element.classList.toggle("still", last === 0 || !clips().length);
  const done = sides.every((side) => value[side.name].src);
  element.classList.toggle("single", !done);
  if (!done) view(one('[data-view=""]'));
  show();
}

play.onclick = () => (playing() ? stop() : start());
at.oninput = () => { const frame = Number(at.value); stop(); seek((frame + 0.5) / fps); };
cut.oninput = () => stage.style.setProperty("--cut", cut.value + "%");
for (const button of all(".views button")) button.onclick = () => view(button);
for (const button of all(".speeds button"))
  button.onclick = () => {
    speed = Number(button.dataset.speed);
    press(".speeds", button);
    for (const side of sides) side.video.playbackRate = speed;
  };
for (const { video } of sides) {
  video.onended = () => { seek(0); start(); };
  video.onseeked = show;
}
watch("value", render);
render();
