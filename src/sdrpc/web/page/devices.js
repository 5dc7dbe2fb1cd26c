// The devices: how full and how busy they are, and which part of a model goes where: by drag, by select, or in words.
import { $, API, get, send } from "./server.js";

const SECONDS = 4;
const gigabytes = (bytes) => (bytes / 2 ** 30).toFixed(1);
let devices = [], placement = null, dragged = null;

/** Shows them in the header, and in their dialog for the model that `chosen` names. */
export function showDevices(chosen) {
  const look = async () => {
    try {
      devices = await get("/devices");
      $("devices").textContent = devices.map(inWords).join(" · ");
      if (!$("places").open || dragged) return;
      placement = await get(`/placement?model=${encodeURIComponent(chosen())}`);
      const atIt = $("selects").contains(document.activeElement) && !$("usual").disabled;
      if (!atIt) show(); // what somebody writes stays
    } catch { /* next time */ }
  };
  $("devices").addEventListener("click", () => {
    $("usual").disabled = true; // until it is known what is where
    $("places").showModal();
    look();
  });
  $("usual").addEventListener("click", () => place({}));
  $("leave").addEventListener("click", () => $("places").close());
  look();
  setInterval(look, SECONDS * 1000);
}

const inWords = ({ name, description, free, total, load }) =>
  `${name}: ${description}, ${total ? `${gigabytes(free)} of ${gigabytes(total)} GB free` : "gone"}${load ? `, ${Math.round(100 * load)} % busy` : ""}`;

async function place(components) {
  try {
    placement = await send("PUT", `${API}/placement`, { model: placement.model, components });
    $("misplaced").textContent = "";
  } catch (error) {
    $("misplaced").textContent = error.message;
  }
  show();
}

/** What somebody chose, with `component` at `places`; without any it is where the server was started with. */
function moved(component, places) {
  const { [component]: _, ...others } = placement.chosen;
  return places.length ? { ...others, [component]: places } : others;
}

// What a drop with a key held down makes of where a component is.
const add = (places, device, sign) => {
  if (!sign || places.some((place) => place === "auto" || place.split(/[&|]/).includes(device))) return [device];
  const last = places[places.length - 1];
  return sign === "," ? [...places, device] : [...places.slice(0, -1), `${last}${sign}${device}`];
};
const signOf = (event) => (event.shiftKey ? "&" : event.ctrlKey || event.metaKey ? "|" : event.altKey ? "," : "");

function show() {
  $("usual").disabled = false;
  $("placed").textContent = placement.model;
  $("cards").replaceChildren(...devices.map((device) => card(device)));
  const at = document.activeElement?.dataset.part;
  $("selects").replaceChildren(...Object.entries(placement.components).map(([component, names]) => row(component, names)));
  if (at) $("selects").querySelector(`[data-part="${at}"]`)?.focus();
}

/** One component: a device to select, or words for several. */
function row(component, names) {
  const line = document.createElement("div");
  line.className = "row";
  const [label, select] = [document.createElement("label"), document.createElement("select")];
  const [words, text] = [document.createElement("label"), document.createElement("input")];
  const now = placement.chosen[component] ?? [];
  const single = now.length === 1 && [...devices.map(({ name }) => name), "auto"].includes(now[0]) ? now[0] : "";
  const usual = now.length && !single ? now.join(", ") : `as started${now.length ? "" : `: ${names.join(", ")}`}`;
  select.append(new Option(usual, ""), ...devices.map(({ name }) => new Option(name, name)), new Option("auto: by a plan", "auto"));
  select.value = single;
  select.addEventListener("change", () => place(moved(component, select.value ? [select.value] : [])));
  label.append(component, select);
  text.value = (now.length ? now : names).join(", ");
  text.spellcheck = false;
  [select.dataset.part, text.dataset.part] = [component, `${component} in words`];
  text.addEventListener("change", () =>
    place(moved(component, text.value.split(",").map((name) => name.trim()).filter(Boolean))));
  words.append(`${component}, in words`, text);
  line.append(label, words);
  return line;
}

function card(device) {
  const box = document.createElement("section");
  box.setAttribute("aria-label", device.name);
  const name = document.createElement("h3");
  name.textContent = device.name;
  const what = document.createElement("p");
  what.textContent = device.description;
  const parts = Object.entries(placement.components).filter(([, names]) => names.some((name) => name.split(/[&|]/).includes(device.name)));
  box.append(name, what,
    meter("Memory", device.total ? 1 - device.free / device.total : 0, device.total ? `${gigabytes(device.total - device.free)} of ${gigabytes(device.total)} GB used` : "gone"),
    meter("Load", device.load, `${Math.round(100 * device.load)} % of the last minute${device.jobs.length ? ", drawing now" : ""}`),
    ...parts.map(([component]) => chip(component)));
  box.addEventListener("dragover", (event) => { event.preventDefault(); box.classList.add("over"); });
  box.addEventListener("dragleave", () => box.classList.remove("over"));
  box.addEventListener("drop", (event) => {
    event.preventDefault();
    if (dragged) place(moved(dragged, add(placement.components[dragged], device.name, signOf(event))));
    dragged = null;
  });
  return box;
}

function meter(title, value, words) {
  const label = document.createElement("label");
  const bar = Object.assign(document.createElement("meter"), { min: 0, max: 1, high: 0.9, value });
  label.append(`${title}: ${words}`, bar);
  return label;
}

function chip(component) {
  const part = document.createElement("span");
  part.className = "chip";
  part.draggable = true;
  part.textContent = component;
  part.addEventListener("dragstart", (event) => { dragged = component; event.dataTransfer.setData("text/plain", component); });
  part.addEventListener("dragend", () => { dragged = null; });
  return part;
}
