// The attention view: point at a place of the clip, and see which key blocks its query block reads.
import { ask, one } from "./dom.js";
import { frame, onFrame, onView, pause } from "./stage.js";

const toggle = one("#look"), layers = one("#layer"), words = one("#read");
const canvas = document.createElement("canvas");
canvas.tabIndex = 0;
canvas.className = "look";
canvas.setAttribute("role", "application");
canvas.setAttribute("aria-label", "attention: the arrow keys move the place that looks");
let sight = null, place = [0, 0], last = 0, source = null;

const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
const token = (t, y, x) => (t * sight.grid[1] + y) * sight.grid[2] + x;
const at = (index) => (sight.places ? sight.places[index] : index);
const now = () => Math.min(sight.grid[0] - 1, last ? Math.ceil(frame() * (sight.grid[0] - 1) / last) : 0);

export function offer(value) {
  close();
  source = ["right", "left"].map((name) => [name, value?.[name]?.attention]).find(([, url]) => url) || null;
  last = Math.max(0, (value?.frames || 1) - 1);
  toggle.hidden = !source || !value.left.src || !value.right.src;
}
function close() {
  sight = null;
  canvas.remove();
  toggle.setAttribute("aria-pressed", "false");
  for (const part of [layers.parentElement, words]) part.hidden = true;
}
async function open() {
  const [name, url] = source;
  const found = await ask(url);
  found.rows = new Map(found.layers.map(([layer, text]) => [layer, bytes(text)]));
  if (found.order) found.places = new Int32Array(bytes(found.order).buffer);
  sight = found;
  layers.replaceChildren(...found.layers.map(([layer]) => new Option(`layer ${layer}`, layer)));
  layers.value = found.layers[Math.floor(found.layers.length / 2)][0];
  place = [Math.floor(found.grid[1] / 2), Math.floor(found.grid[2] / 2)];
  toggle.setAttribute("aria-pressed", "true");
  for (const part of [layers.parentElement, words]) part.hidden = false;
  one(`figure.${name} .glass`).append(canvas);
  pause();
  draw();
}
function draw() {
  if (!sight) return;
  const [frames, high, wide] = sight.grid, scale = Math.max(1, Math.floor(512 / Math.max(high, wide)));
  [canvas.width, canvas.height] = [wide * scale, high * scale];
  const ink = canvas.getContext("2d"), t = now();
  const mine = Math.floor(at(token(t, ...place)) / sight.block_q);
  const rows = sight.rows.get(Number(layers.value)), count = Math.ceil(frames * high * wide / sight.block_k);
  const row = rows.subarray(mine * count, (mine + 1) * count);
  for (let y = 0; y < high; y++)
    for (let x = 0; x < wide; x++) {
      const where = at(token(t, y, x)), read = row[Math.floor(where / sight.block_k)] / 255;
      ink.fillStyle = `rgb(0 0 0 / ${0.78 * (1 - Math.sqrt(read))})`;
      ink.fillRect(x * scale, y * scale, scale, scale);
    }
  outline(ink, scale, (y, x) => y >= 0 && x >= 0 && y < high && x < wide && Math.floor(at(token(t, y, x)) / sight.block_q) === mine);
  const some = row.filter((x) => x).length, mean = row.reduce((a, b) => a + b, 0) / 255;
  words.textContent = `Step ${sight.step}: the outlined query block reads ${mean.toFixed(1)} of ${count} key blocks in each ` +
    `head, ${some} in some head; the darker a place of this frame, the fewer heads read it.`;
}
// The edges of the query block: white on black, seen on any picture.
function outline(ink, scale, inside) {
  const lines = new Path2D(), [, high, wide] = sight.grid;
  for (let y = 0; y < high; y++)
    for (let x = 0; x < wide; x++) {
      if (!inside(y, x)) continue;
      const [l, t, r, b] = [x * scale + 1.5, y * scale + 1.5, (x + 1) * scale - 1.5, (y + 1) * scale - 1.5];
      if (!inside(y - 1, x)) { lines.moveTo(l, t); lines.lineTo(r, t); }
      if (!inside(y + 1, x)) { lines.moveTo(l, b); lines.lineTo(r, b); }
      if (!inside(y, x - 1)) { lines.moveTo(l, t); lines.lineTo(l, b); }
      if (!inside(y, x + 1)) { lines.moveTo(r, t); lines.lineTo(r, b); }
    }
  for (const [colour, width] of [["#000", 5], ["#fff", 2.5]]) {
    Object.assign(ink, { strokeStyle: colour, lineWidth: width, lineCap: "square" });
    ink.stroke(lines);
  }
}
function move(y, x) {
  place = [Math.min(sight.grid[1] - 1, Math.max(0, y)), Math.min(sight.grid[2] - 1, Math.max(0, x))];
  draw();
}
canvas.addEventListener("pointermove", (event) => {
  const box = canvas.getBoundingClientRect();
  move(Math.floor((event.clientY - box.top) / box.height * sight.grid[1]), Math.floor((event.clientX - box.left) / box.width * sight.grid[2]));
});
canvas.addEventListener("keydown", (event) => {
  const way = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
  if (!way) return;
  event.preventDefault();
  event.stopPropagation();
  move(place[0] + way[0], place[1] + way[1]);
});
toggle.onclick = () => (sight ? close() : open().catch((wrong) => { words.hidden = false; words.textContent = wrong.error || "It cannot be drawn."; }));
layers.onchange = draw;
onFrame(draw);
onView((name) => {
  toggle.disabled = name === "apart"; // neither clip is seen there
  if (toggle.disabled) close();
});
