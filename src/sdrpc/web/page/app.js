// The page: a form that becomes jobs of /sdcpp/v1, the queue as it moves, and what was drawn.
import { $, API, ask, dataUrl, events, get, picture, post, send } from "./server.js";
import { showDevices } from "./devices.js";

const form = $("form");
let models = {};        // name → what is said of a model
let filmFormat = "webp";
let asked = null;       // the job that was asked for last, until it was shown
let opened = null;      // the job and picture that the viewer shows
let lastOver = null;    // when a job was last over, as the server says

// ---- the form

const NUMBERS = ["width", "height", "steps", "cfg_scale", "seed", "batch_count", "strength", "distilled_guidance",
  "video_frames", "fps", "hires_scale", "hires_steps", "hires_denoising_strength", "control_strength"];
const number = (name) => (form.elements[name].value === "" ? null : Number(form.elements[name].value));

async function request() {
  const body = {
    prompt: form.elements.prompt.value, negative_prompt: form.elements.negative_prompt.value, model: form.elements.model.value,
    width: number("width"), height: number("height"), seed: number("seed") ?? -1, strength: number("strength") ?? 0.75,
    lora: loras(), cache_mode: form.elements.cache_mode.value,
    sample_params: {
      sample_steps: number("steps"), sample_method: form.elements.sample_method.value || null,
      scheduler: form.elements.scheduler.value || null,
      guidance: { txt_cfg: number("cfg_scale"), distilled_guidance: number("distilled_guidance") },
    },
  };
  if (painting.image) body.init_image = painting.data;
  if (films()) {
    const [end_image] = await files("end_image");
    return { ...body, end_image, video_frames: number("video_frames"), fps: number("fps"), output_format: filmFormat };
  }
  if (painting.image && painting.painted) body.mask_image = painting.mask();
  if (number("hires_scale")) body.hires = { enabled: true, scale: number("hires_scale"), upscaler: form.elements.hires_upscaler.value,
    steps: number("hires_steps") ?? 0, denoising_strength: number("hires_denoising_strength") ?? 0.7 };
  if (model().references) body.ref_images = await files("ref_images");
  if (controlled()) [body.control_image, body.control_strength] = [(await files("control_image"))[0], number("control_strength") ?? 0.9];
  return { ...body, batch_count: number("batch_count") ?? 1 };
}

const model = () => models[form.elements.model.value] ?? {};
const films = () => model().films ?? false;
const controlled = () => model().components?.includes("control") ?? false;
const files = (id) => Promise.all([...$(id).files].map(dataUrl));
const loras = () => [...$("loras").querySelectorAll("input")].filter((input) => Number(input.value))
  .map((input) => ({ path: input.name, multiplier: Number(input.value) }));

form.addEventListener("submit", async (event) => {
  event.preventDefault();
  problem("");
  $("draw").disabled = true;
  try {
    asked = (await post(films() ? "/vid_gen" : "/img_gen", await request())).id;
    save();
  } catch (error) {
    problem(error.message);
  } finally {
    $("draw").disabled = false;
  }
});

document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
});

function problem(text) {
  $("problem").textContent = text;
  $("problem").hidden = !text;
}

const SAVED = ["prompt", "negative_prompt", "model", "sample_method", "scheduler", "cache_mode", "hires_upscaler", ...NUMBERS];
const save = () => localStorage.setItem("form", JSON.stringify(Object.fromEntries(SAVED.map((name) => [name, form.elements[name].value]))));

function fill(values) {
  for (const name of SAVED) if (values[name] !== undefined && values[name] !== null) form.elements[name].value = values[name];
}

function hints() {
  const known = model().defaults ?? {};
  for (const name of ["width", "height", "steps", "cfg_scale", "video_frames", "fps"]) form.elements[name].placeholder = known[name] ?? "";
  form.elements.distilled_guidance.placeholder = known.guidance ?? "";
  for (const id of ["film", "ending"]) $(id).hidden = !films();
  $("second").hidden = films();
  $("control").hidden = !controlled();
  $("references").hidden = !model().references;
  form.elements.batch_count.disabled = films();
}

function showLoras(names) {
  $("adapters").hidden = names.length === 0;
  $("loras").replaceChildren(...names.map((name) => {
    const label = document.createElement("label");
    const input = Object.assign(document.createElement("input"), { type: "number", name, step: 0.05, placeholder: "0" });
    label.append(`${name} `, input);
    return label;
  }));
}

function options(select, values, first) {
  select.replaceChildren(...(first ? [new Option(first, "")] : []), ...values.map((value) => new Option(value, value)));
}

// ---- a picture to begin with, and what of it is drawn anew

const painting = {
  image: null, data: "", painted: false,
  canvas: $("canvas"), strokes: document.createElement("canvas"),
  async begin(blob) {
    this.data = await dataUrl(blob);
    this.image = await createImageBitmap(blob);
    for (const canvas of [this.canvas, this.strokes]) [canvas.width, canvas.height] = [this.image.width, this.image.height];
    $("painting").hidden = false;
    $("begin").open = true;
    this.clear();
  },
  clear() {
    this.painted = false;
    this.strokes.getContext("2d").clearRect(0, 0, this.strokes.width, this.strokes.height);
    this.show();
  },
  end() {
    this.image = null;
    $("painting").hidden = true;
    $("init_file").value = "";
  },
  show() {
    const context = this.canvas.getContext("2d");
    context.globalAlpha = 1;
    context.drawImage(this.image, 0, 0);
    context.globalAlpha = 0.6;
    context.drawImage(this.strokes, 0, 0);
  },
  stroke(from, to) {
    const context = this.strokes.getContext("2d");
    context.strokeStyle = "#fff";
    context.lineCap = "round";
    context.lineWidth = ($("brush").value / 100) * Math.max(this.strokes.width, this.strokes.height);
    context.beginPath();
    context.moveTo(...from);
    context.lineTo(...to);
    context.stroke();
    this.painted = true;
    this.show();
  },
  mask() {
    const mask = document.createElement("canvas");
    [mask.width, mask.height] = [this.strokes.width, this.strokes.height];
    const context = mask.getContext("2d");
    context.fillRect(0, 0, mask.width, mask.height);
    context.drawImage(this.strokes, 0, 0);
    return mask.toDataURL("image/png");
  },
};

let pen = null;
const place = (event) => {
  const box = painting.canvas.getBoundingClientRect();
  return [((event.clientX - box.left) / box.width) * painting.canvas.width, ((event.clientY - box.top) / box.height) * painting.canvas.height];
};
painting.canvas.addEventListener("pointerdown", (event) => {
  painting.canvas.setPointerCapture(event.pointerId);
  pen = place(event);
  painting.stroke(pen, pen);
});
painting.canvas.addEventListener("pointermove", (event) => {
  if (!pen) return;
  const next = place(event);
  painting.stroke(pen, next);
  pen = next;
});
for (const end of ["pointerup", "pointercancel"]) painting.canvas.addEventListener(end, () => { pen = null; });
$("init_file").addEventListener("change", (event) => {
  const [file] = event.target.files;
  if (file) painting.begin(file).catch(() => problem(`${file.name} is no picture that the browser reads`));
});
$("unpaint").addEventListener("click", () => painting.clear());
$("remove").addEventListener("click", () => painting.end());

// ---- the queue

const title = (job) => job.request.prompt ?? `enlarged to ${job.request.width}×${job.request.height}`;
const moves = (job) => ["webm", "mp4"].includes(job.output_format);

const rows = new Map(); // job → its row
function words(job) {
  if (job.status === "queued") return `waiting, number ${job.queue_position}`;
  const { stage, component, step, steps, picture, done, total, seat } = job.progress ?? {};
  const where = seat ? ` on ${seat}` : "";
  if (stage === "sample") return `${job.request.batch_count > 1 ? `picture ${picture}, ` : ""}step ${step} of ${steps}${where}`;
  if (stage === "upload") return `${component}: sending weights, ${Math.round((100 * done) / Math.max(total, 1))} %${where}`;
  if (job.kind === "upscale") return `enlarging, tile ${done} of ${total}${where}`;
  return `${{ capture: `preparing ${component}`, encode: "reading the prompt", decode: "finishing", starting: "starting", opening: "opening the model" }[stage] ?? stage ?? ""}${where}`;
}

function showQueue(jobs) {
  const now = new Set(jobs.map((job) => job.id));
  for (const [id, row] of rows) if (!now.has(id)) { row.remove(); rows.delete(id); }
  jobs.forEach((job, index) => {
    let row = rows.get(job.id);
    if (!row) {
      row = $("job").content.firstElementChild.cloneNode(true);
      row.querySelector(".cancel").addEventListener("click", () => post(`/jobs/${job.id}/cancel`).catch((error) => problem(error.message)));
      rows.set(job.id, row);
    }
    if ($("queue").children[index] !== row) $("queue").insertBefore(row, $("queue").children[index] ?? null);
    if (job.id === asked) { // on a phone it is below the form
      row.scrollIntoView({ block: "nearest" });
      asked = null;
    }
    row.querySelector(".words").textContent = title(job);
    row.querySelector(".state").textContent = words(job);
    const progress = row.querySelector("progress");
    progress.hidden = job.status === "queued";
    if (job.progress?.stage === "sample") progress.value = job.progress.step / Math.max(job.progress.steps, 1);
    else if (job.progress?.stage === "upload") progress.value = job.progress.done / Math.max(job.progress.total, 1);
    if (job.progress?.preview && row.dataset.preview !== String(job.progress.preview)) {
      row.dataset.preview = job.progress.preview;
      preview(job.id, row.querySelector(".preview"));
    }
  });
}

async function preview(id, image) {
  try {
    const blob = await (await ask(`${API}/jobs/${id}/preview`)).blob();
    URL.revokeObjectURL(image.src);
    image.src = URL.createObjectURL(blob);
    image.hidden = false;
  } catch { /* the job is over meanwhile */ }
}

async function follow() {
  for (;;) {
    try {
      for await (const state of events("/events")) {
        showQueue(state.jobs);
        if (state.over !== lastOver) {
          lastOver = state.over;
          await showGallery();
        }
      }
    } catch { /* the server is gone for a moment */ }
    await new Promise((resolve) => setTimeout(resolve, 2000));
  }
}

// ---- the gallery

const tiles = new Map(); // job/picture → its tile
const seen = new IntersectionObserver((entries) => {
  for (const { isIntersecting, target } of entries) {
    if (!isIntersecting) continue;
    seen.unobserve(target);
    picture(target.dataset.path).then((url) => { target.firstElementChild.src = url; });
  }
}, { rootMargin: "300px" });

async function showGallery() {
  const jobs = (await get("/jobs")).filter((job) => ["completed", "failed"].includes(job.status));
  const wanted = [];
  for (const job of jobs) {
    if (job.status === "failed") wanted.push([`${job.id}/failed`, job, null]);
    job.seeds.forEach((_, index) => wanted.push([`${job.id}/${index}`, job, index]));
  }
  const names = new Set(wanted.map(([name]) => name));
  for (const [name, tile] of tiles) if (!names.has(name)) { tile.remove(); tiles.delete(name); }
  wanted.forEach(([name, job, index], position) => {
    if (!tiles.has(name)) tiles.set(name, index === null ? failure(job) : tile(job, index));
    if ($("gallery").children[position] !== tiles.get(name)) $("gallery").insertBefore(tiles.get(name), $("gallery").children[position] ?? null);
  });
  $("empty").hidden = wanted.length > 0;
}

function tile(job, index) {
  const button = document.createElement("button");
  button.type = "button";
  button.setAttribute("aria-label", title(job));
  button.dataset.path = `/jobs/${job.id}/images/${index}`;
  button.append(shown(job));
  button.addEventListener("click", () => view(job, index));
  seen.observe(button);
  return button;
}

function shown(job) { // a picture, or a film that plays
  if (moves(job)) return Object.assign(document.createElement("video"), { muted: true, loop: true, autoplay: true, playsInline: true });
  return Object.assign(document.createElement("img"), { alt: title(job) });
}

function failure(job) {
  const note = document.createElement("button");
  note.type = "button";
  note.className = "failed";
  note.textContent = `${title(job)}: ${job.error.message}`;
  note.title = "Delete this note";
  note.addEventListener("click", () => forget(job));
  return note;
}

async function view(job, index) {
  opened = { job, index };
  const large = shown(job);
  large.controls = true;
  large.src = await picture(`/jobs/${job.id}/images/${index}`);
  $("shown").replaceChildren(large);
  $("reuse").hidden = job.kind === "upscale";
  for (const id of ["continue", "larger"]) $(id).hidden = job.kind === "vid_gen";
  const known = models[job.model]?.defaults ?? {}; // what was not said
  const [width, height] = ["width", "height"].map((side) => job.request[side] ?? known[side]);
  const facts = { Prompt: job.request.prompt, Frames: job.request.video_frames, "A second": job.request.fps,
    LoRA: job.request.loras?.map(([name, strength]) => `${name} ${strength}`).join(", "), Enlarged: job.request.upscaler, "Not in it": job.request.negative_prompt, Model: job.model, Seed: job.seeds[index],
    Size: width && `${width}×${height}`, "Times as large": job.request.hires && (job.request.hires_scale ?? 2),
    Steps: job.request.steps ?? known.steps, "CFG scale": job.request.cfg_scale ?? known.cfg_scale,
    Sampler: job.request.sampling_method ?? known.sampling_method, Schedule: job.request.scheduler ?? known.scheduler, By: job.user };
  $("facts").replaceChildren(...Object.entries(facts).filter(([, value]) => value).flatMap(([name, value]) => {
    const [term, text] = [document.createElement("dt"), document.createElement("dd")];
    [term.textContent, text.textContent] = [name, value];
    return [term, text];
  }));
  $("viewer").showModal();
}

$("reuse").addEventListener("click", () => {
  const { job, index } = opened;
  for (const name of NUMBERS) if (name !== "strength" && name !== "batch_count") form.elements[name].value = "";
  fill({ ...job.request, model: job.model, seed: job.seeds[index], sample_method: job.request.sampling_method ?? "",
    scheduler: job.request.scheduler ?? "", cache_mode: job.request.cache_mode ?? "disabled", distilled_guidance: job.request.guidance, batch_count: 1,
    hires_scale: job.request.hires ? (job.request.hires_scale ?? 2) : "" });
  const strengths = Object.fromEntries(job.request.loras ?? []);
  for (const input of $("loras").querySelectorAll("input")) input.value = strengths[input.name] ?? "";
  hints();
  $("viewer").close();
  form.elements.prompt.focus();
});
$("continue").addEventListener("click", async () => {
  const { job, index } = opened;
  await painting.begin(await (await ask(`${API}/jobs/${job.id}/images/${index}`)).blob());
  $("viewer").close();
  $("begin").scrollIntoView({ block: "nearest" });
});
$("save").addEventListener("click", async () => {
  const { job, index } = opened;
  const link = document.createElement("a");
  link.href = await picture(`/jobs/${job.id}/images/${index}`);
  link.download = `${job.seeds[index]}.${job.output_format === "jpeg" ? "jpg" : job.output_format}`;
  link.click();
});
$("enlarge").addEventListener("click", async () => {
  const { job, index } = opened;
  $("viewer").close();
  try {
    const image = await dataUrl(await (await ask(`${API}/jobs/${job.id}/images/${index}`)).blob());
    const by = { upscaler_1: $("upscaler").value, upscaling_resize: Number($("times").value) || 2 };
    await send("POST", "/sdapi/v1/extra-single-image", { image, ...by });
  } catch (error) {
    problem(error.message);
  }
});
$("forget").addEventListener("click", async () => {
  $("viewer").close();
  await forget(opened.job);
});
$("close").addEventListener("click", () => $("viewer").close());

async function forget(job) {
  try {
    await ask(`${API}/jobs/${job.id}`, { method: "DELETE" });
  } catch (error) {
    problem(error.message);
  }
  await showGallery();
}

// ---- theme, beginning

const root = document.documentElement;
if (localStorage.getItem("theme")) root.dataset.theme = localStorage.getItem("theme");
$("theme").addEventListener("click", () => {
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
  localStorage.setItem("theme", root.dataset.theme);
});

async function begin() {
  const can = await get("/capabilities");
  models = Object.fromEntries(can.models.map((model) => [model.name, model]));
  filmFormat = can.output_formats_by_mode.vid_gen?.[0] ?? filmFormat;
  options(form.elements.model, Object.keys(models));
  options(form.elements.sample_method, can.samplers, "usual");
  options(form.elements.scheduler, can.schedulers, "usual");
  options(form.elements.hires_upscaler, can.upscalers.map((each) => each.name));
  options($("upscaler"), (await (await ask("/sdapi/v1/upscalers")).json()).map((each) => each.name).filter((name) => name !== "None"));
  showLoras(can.loras.map((lora) => lora.name));
  fill(JSON.parse(localStorage.getItem("form") ?? "{}"));
  if (!form.elements.model.value) form.elements.model.selectedIndex = 0;
  form.elements.model.addEventListener("change", hints);
  hints();
  follow();
  showDevices(() => form.elements.model.value);
}
begin().catch((error) => problem(error.message));
