// Talking to the server: with a key where it wants one, and its events.
export const API = "/sdcpp/v1";
export const $ = (id) => document.getElementById(id);
let key = localStorage.getItem("key");

export async function ask(path, options = {}) {
  const headers = { ...(options.headers ?? {}), ...(key ? { Authorization: `Bearer ${key}` } : {}) };
  const answer = await fetch(path, { ...options, headers });
  if (answer.status === 401) {
    await comeIn();
    return ask(path, options);
  }
  if (!answer.ok) {
    const told = await answer.json().catch(() => ({}));
    throw new Error(told.error?.message ?? told.detail ?? `${answer.status} ${answer.statusText}`);
  }
  return answer;
}

export const get = async (path) => (await ask(API + path)).json();
export const send = async (method, path, body) =>
  (await ask(path, { method, body: JSON.stringify(body), headers: { "Content-Type": "application/json" } })).json();
export const post = (path, body) => send("POST", API + path, body);

let door = null;
function comeIn() {
  door ??= new Promise((resolve) => {
    $("key").value = "";
    $("door").showModal();
    $("door").addEventListener("close", () => {
      key = $("key").value.trim();
      localStorage.setItem("key", key);
      door = null;
      resolve();
    }, { once: true });
  });
  return door;
}

const urls = new Map(); // picture → blob URL, so that pictures can be asked for with a key
export async function picture(path) {
  if (!urls.has(path)) urls.set(path, ask(API + path).then((answer) => answer.blob()).then((blob) => URL.createObjectURL(blob)));
  return urls.get(path);
}

export async function* events(path) {
  const reader = (await ask(API + path)).body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    text += value;
    let end;
    while ((end = text.indexOf("\n\n")) >= 0) {
      const data = text.slice(0, end).split("\n").filter((line) => line.startsWith("data: ")).map((line) => line.slice(6)).join("");
      text = text.slice(end + 2);
      if (data) yield JSON.parse(data);
    }
  }
}

export const dataUrl = (blob) => new Promise((resolve) => {
  const reader = new FileReader();
  reader.onload = () => resolve(reader.result);
  reader.readAsDataURL(blob);
});
