// Few words for what every part of the page does.
export const one = (query, root = document) => root.querySelector(query);
export const all = (query, root = document) => [...root.querySelectorAll(query)];
export const facts = JSON.parse(one("#facts").textContent);

// The answer of the server; a refusal is thrown as {error, field, status}.
export async function ask(url, options = {}) {
  let answer;
  try { answer = await fetch(url, options); }
  catch { throw { error: "The server does not answer: is it still running?", field: "", status: 0 }; }
  const data = await answer.json().catch(() => ({}));
  if (!answer.ok) throw { error: data.error || `The server refused (${answer.status}).`, field: data.field || "", status: answer.status };
  return data;
}
export const post = (url, data) => ask(url, { method: "POST", body: JSON.stringify(data) });

// What is kept over a reload; a browser that keeps nothing is served, too.
export const shelf = (store) => ({
  get(key) { try { return JSON.parse(store().getItem("dit_accel." + key)); } catch { return null; } },
  set(key, value) { try { store().setItem("dit_accel." + key, JSON.stringify(value)); } catch { /* private */ } },
});
export const local = shelf(() => localStorage), session = shelf(() => sessionStorage);
// Into the clipboard; where a browser gives none, as on a plain http address, `otherwise` says so.
export async function copy(button, text, otherwise) {
  try {
    await navigator.clipboard.writeText(text);
    flash(button, "Copied");
  } catch { flash(button, otherwise()); }
}
export function flash(button, words) {
  const before = button.dataset.words ||= button.textContent;
  button.textContent = words;
  setTimeout(() => { button.textContent = before; }, 1500);
}
