// The devices: how full and how busy they are, and which part of a model goes where, by drag or by select.
import { $, API, get, send } from "./server.js";

const SECONDS = 4;
const gigabytes = (bytes) => (bytes / 2 ** 30).toFixed(1);
let devices = [], placement = null, dragged = null;

/** Shows them in the header, and in their dialog for the model that `chosen` names; `complain` is told what is refused. */
export function showDevices(chosen, complain) {
  const look = async () => {
    try {
      devices = await get("/devices");
      $("devices").textContent = devices.map(inWords).join(" · ");
      if (!$("places").open || dragged) return;
      placement = await get(`/placement?model=${encodeURIComponent(chosen())}`);
      show(complain);
    } catch { /* next time */ }
  };
  $("devices").addEventListener("click", () => {
    $("usual").disabled = true; // until it is known what is where
    $("places").showModal();
    look();
  });
  $("usual").addEventListener("click", () => place({}, complain));
  $("leave").addEventListener("click", () => $("places").close());
  look();
  setInterval(look, SECONDS * 1000);
}

const inWords = ({ name, description, free, total, load }) =>
  `${name}: ${description}, ${total ? `${gigabytes(free)} of ${gigabytes(total)} GB free` : "gone"}${load ? `, ${Math.round(100 * load)} % busy` : ""}`;

async function place(components, complain) {
  try {
    placement = await send("PUT", `${API}/placement`, { model: placement.model, components });
    show(complain);
  } catch (error) {
    $("places").close();
    complain(error.message);
  }
}

/** What somebody chose, with `component` on `device`. */
function moved(component, device) {
  const kept = placement.chosen.map((each) => [each, placement.components[each].filter((name) => devices.some((one) => one.name === name))]);
  return { ...Object.fromEntries(kept), [component]: [device] };
}

function show(complain) {
  $("usual").disabled = false;
  $("placed").textContent = placement.model;
  $("cards").replaceChildren(...devices.map((device) => card(device, complain)));
  $("selects").replaceChildren(...Object.entries(placement.components).map(([component, names]) => {
    const label = document.createElement("label");
    const select = document.createElement("select");
    const usual = names.join(", ");
    const choices = devices.some((device) => device.name === usual) ? [] : [new Option(usual, "")];
    select.append(...choices, ...devices.map(({ name }) => new Option(name, name)));
    select.value = choices.length ? "" : usual;
    select.addEventListener("change", () => { if (select.value) place(moved(component, select.value), complain); });
    label.append(component, select);
    return label;
  }));
}

function card(device, complain) {
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
    if (dragged) place(moved(dragged, device.name), complain);
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
