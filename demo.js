// The picture of demo.py's page: before and after with a divider, zoom to pixels, the dial, and a brush that gives a region its own t.
//
// The server restores at one t at a time. What it has given is kept here, and between two such t this page mixes their
// pixels: so the picture follows the slider at once, and the exact one, which is asked for as soon as the slider rests,
// takes its place. With the student the two differ by less than the eye sees; the line below the picture says which it is.
const find = (name) => element.querySelector(`.${name}`);
const canvas = find("canvas"), context = canvas.getContext("2d", { willReadFrequently: true }), dial = find("dial");
const layer = (width, height) => Object.assign(document.createElement("canvas"), { width, height });
const AHEAD = [0, 1, 0.5, 0.25, 0.75];

let session = null;  // what the server said of the picture: id, width, height, scale (of the network), shown (pixels of the result for one of the screen's)
let results = new Map();  // t -> ImageBitmap
let before = null, mask = null, painted = false;  // the picture as it came; painted t in red, where alpha is
let view = { zoom: 1, x: 0, y: 0 }, divider = 0.5, tool = "move", seconds = 0, busy = 0, message = "";

// --- drawing ---

function around(t) {  // the two results nearest to t from below and above, and t's place between them
  const ts = [...results.keys()].sort((a, b) => a - b);
  const low = ts.filter((x) => x <= t + 1e-6).pop() ?? ts[0], high = ts.find((x) => x >= t - 1e-6) ?? ts[ts.length - 1];
  return [low, high, high > low ? (t - low) / (high - low) : 0];
}

function place(target, image) {  // the whole picture at the present zoom
  target.imageSmoothingEnabled = view.zoom * session.width / image.width < 2 || image === before;
  target.imageSmoothingQuality = "high";
  target.drawImage(image, view.x, view.y, session.width * view.zoom, session.height * view.zoom);
}

function mixed(width, height) {  // pixels of the screen where a region has a t of its own
  const pixels = (image) => {
    const target = layer(width, height).getContext("2d");
    place(target, image);
    return target.getImageData(0, 0, width, height).data;
  };
  const data = new Map([...results].map(([t, image]) => [t, pixels(image)])), ts = pixels(mask);
  const table = Array.from({ length: 257 }, (_, i) => around(i < 256 ? i / 255 : +dial.value));
  const out = new ImageData(width, height);
  for (let p = 0; p < out.data.length; p += 4) {
    const [low, high, share] = table[ts[p + 3] > 127 ? ts[p] : 256], a = data.get(low), b = data.get(high);
    for (let c = 0; c < 4; c++) out.data[p + c] = a[p + c] + share * (b[p + c] - a[p + c]);
  }
  return out;
}

function draw() {
  const { width, height } = canvas;
  context.clearRect(0, 0, width, height);
  if (!session || !before) return;
  if (results.size && painted) {
    context.putImageData(mixed(width, height), 0, 0);
  } else if (results.size) {
    const [low, high, share] = around(+dial.value);
    place(context, results.get(low));
    context.globalAlpha = share;
    if (share) place(context, results.get(high));
    context.globalAlpha = 1;
  }
  const split = results.size ? divider * width : width;
  context.save();
  context.beginPath();
  context.rect(0, 0, split, height);
  context.clip();
  context.clearRect(0, 0, width, height);
  place(context, before);
  context.restore();
  context.fillStyle = "#fff";
  if (results.size) context.fillRect(split - 1, 0, 2, height);
  if (tool === "paint" && painted) {
    context.globalAlpha = 0.25;
    place(context, mask);
    context.globalAlpha = 1;
  }
}

function say() {
  const t = +dial.value, [low, high, share] = results.size ? around(t) : [];
  const exact = share === 0 && Math.abs(low - t) < 1e-6;
  const words = !session ? "" : !results.size ? "" : painted ? "regions: mixed here, computed exactly for the download" : exact ? `t = ${t.toFixed(2)}`
    : share ? `t = ${t.toFixed(2)}, mixed from ${low.toFixed(2)} and ${high.toFixed(2)}` : `t = ${low.toFixed(2)} so far`;
  const size = session ? `${session.width} x ${session.height}` + (session.shown > 1 ? `, shown at 1/${session.shown}` : "") : "";
  find("state").textContent = [size, words, message].filter(Boolean).join(" · ");
  find("value").textContent = t.toFixed(2);
  element.dataset.exact = exact ? t : "";
}

const refresh = () => { draw(); say(); };

function fit() {
  const zoom = Math.min(canvas.width / session.width, canvas.height / session.height);
  view = { zoom, x: (canvas.width - session.width * zoom) / 2, y: (canvas.height - session.height * zoom) / 2 };
}

function zoomTo(zoom, x = canvas.width / 2, y = canvas.height / 2) {
  zoom = Math.min(16, Math.max(0.02, zoom));
  view = { zoom, x: x - (x - view.x) * zoom / view.zoom, y: y - (y - view.y) * zoom / view.zoom };
  draw();
}

function resize() {
  const ratio = window.devicePixelRatio || 1, old = canvas.width;
  canvas.width = Math.round(canvas.clientWidth * ratio);
  canvas.height = Math.round(canvas.clientHeight * ratio);
  if (session && old !== canvas.width) fit();
  refresh();
}

// --- what the server computes ---

const bitmap = async (url) => createImageBitmap(await (await fetch(url)).blob());

async function ask(t, ahead) {  // the picture at t; false where it was put off, cancelled or has failed
  const mine = session;
  if (results.has(t)) return true;
  const start = performance.now();
  if (!ahead) watchProgress(mine, ++busy);
  const answer = await server.show({ id: mine.id, t, ahead });
  if (!ahead) busy--;
  if (session !== mine) return false;
  if (!answer.url) {
    message = answer.message ?? message;
    say();
    return false;
  }
  results.set(t, await bitmap(answer.url));
  const room = Math.max(7, 5e8 / (4 * session.width * session.height / session.shown ** 2));
  for (const old of [...results.keys()]) if (results.size > room && !AHEAD.includes(old) && old !== t) results.delete(old);
  seconds = (performance.now() - start) / 1000;
  message = "";
  refresh();
  return true;
}

async function computeAhead() {  // the t on which the others are mixed, one after the other, whenever nobody waits for another
  const mine = session;
  await ask(+dial.value, false);
  for (const t of AHEAD) {
    if (seconds > 30 || (seconds > 4 && t > 0 && t < 1)) continue;
    while (session === mine && !message && !(await ask(t, true))) await new Promise((r) => setTimeout(r, 200));
    if (session !== mine) return;
  }
}

async function watchProgress(mine, number) {
  await new Promise((r) => setTimeout(r, 700));
  while (session === mine && busy >= number) {
    const { share, waiting } = await server.progress({ id: mine.id });
    if (session !== mine || share === undefined) break; // another picture is open
    find("progress").hidden = find("cancel").hidden = false;
    find("progress").value = share;
    message = waiting ? "waiting for another picture" : `${Math.round(100 * share)} %`;
    say();
    await new Promise((r) => setTimeout(r, 300));
  }
  find("progress").hidden = find("cancel").hidden = true;
}

async function save() {
  const button = find("save"), mine = session;
  if (!mine) return;
  button.disabled = true;
  watchProgress(mine, ++busy);
  const answer = await server.download({ id: mine.id, t: +dial.value, regions: painted ? regions() : null });
  busy--;
  button.disabled = false;
  message = answer.message ?? "";
  say();
  if (answer.url) Object.assign(document.createElement("a"), { href: answer.url, download: answer.name }).click();
}

function regions() {  // the map of t as a picture: the dial, and over it what was painted
  const map = layer(mask.width, mask.height), target = map.getContext("2d"), gray = Math.round(255 * dial.value);
  target.drawImage(mask, 0, 0);
  const image = target.getImageData(0, 0, map.width, map.height);
  for (let p = 0; p < image.data.length; p += 4) {
    image.data[p] = image.data[p + 1] = image.data[p + 2] = image.data[p + 3] > 127 ? image.data[p] : gray;
    image.data[p + 3] = 255;
  }
  target.putImageData(image, 0, 0);
  return map.toDataURL("image/png");
}

async function open() {
  const next = props.value;
  if (!next || next.id === session?.id) return;
  const same = session && next.name === session.name && next.width === session.width && next.height === session.height;
  session = next;
  results = new Map();
  message = "";
  before = await bitmap(next.before);
  if (!same) {
    mask = layer(Math.min(1024, next.width), Math.round(Math.min(1024, next.width) * next.height / next.width));
    painted = false;
    fit();
  }
  find("hint").hidden = true;
  refresh();
  computeAhead();
}

// --- hands ---

const at = (event) => {
  const box = canvas.getBoundingClientRect(), ratio = canvas.width / box.width;
  return [(event.clientX - box.left) * ratio, (event.clientY - box.top) * ratio];
};

function paint([x, y], [x0, y0]) {
  const target = mask.getContext("2d"), k = mask.width / (session.width * view.zoom), gray = Math.round(255 * find("region").value);
  target.strokeStyle = `rgb(${gray}, ${gray}, ${gray})`;
  target.lineWidth = find("brush").value * k * (window.devicePixelRatio || 1);
  target.lineCap = "round";
  target.beginPath();
  target.moveTo((x0 - view.x) * k, (y0 - view.y) * k);
  target.lineTo((x - view.x) * k, (y - view.y) * k);
  target.stroke();
  painted = true;
}

let held = null, last = null;
canvas.addEventListener("pointerdown", (event) => {
  if (!session) return;
  canvas.setPointerCapture(event.pointerId);
  last = at(event);
  held = Math.abs(last[0] - divider * canvas.width) < 12 ? "divider" : tool;
  if (held === "paint") { paint(last, last); refresh(); }
});
canvas.addEventListener("pointermove", (event) => {
  const now = at(event);
  canvas.style.cursor = Math.abs(now[0] - divider * canvas.width) < 12 ? "ew-resize" : tool === "paint" ? "crosshair" : "grab";
  if (!held) return;
  if (held === "divider") divider = Math.min(1, Math.max(0, now[0] / canvas.width));
  else if (held === "paint") paint(now, last);
  else { view.x += now[0] - last[0]; view.y += now[1] - last[1]; }
  last = now;
  requestAnimationFrame(draw);
});
canvas.addEventListener("pointerup", () => { held = null; refresh(); });
canvas.addEventListener("wheel", (event) => {
  if (!session) return;
  event.preventDefault();
  zoomTo(view.zoom * Math.exp(-event.deltaY / 400), ...at(event));
}, { passive: false });
canvas.addEventListener("dblclick", (event) => { if (session) zoomTo(1, ...at(event)); });

element.addEventListener("dragover", (event) => event.preventDefault());
element.addEventListener("drop", async (event) => {
  event.preventDefault();
  const file = event.dataTransfer.files[0];
  if (!file) return;
  message = `reading ${file.name}`;
  say();
  try {
    trigger("dropped", { path: (await upload(file)).path });
  } catch (error) {
    message = `${file.name} was not taken: ${error.message ?? error}`;
    say();
  }
});

let rest = null;
dial.addEventListener("input", () => {
  refresh();
  clearTimeout(rest);
  rest = setTimeout(() => { if (session && !painted) ask(+dial.value, false); }, 50);
});
find("region").addEventListener("input", () => { find("region-value").textContent = (+find("region").value).toFixed(2); });
find("fit").addEventListener("click", () => { if (session) { fit(); draw(); } });
find("pixels").addEventListener("click", () => { if (session) zoomTo(1); });
find("closer").addEventListener("click", () => { if (session) zoomTo(4); });
find("paint").addEventListener("click", () => {
  tool = tool === "paint" ? "move" : "paint";
  find("paint").classList.toggle("on", tool === "paint");
  find("brushes").hidden = tool !== "paint";
  draw();
});
find("clear").addEventListener("click", () => {
  mask.getContext("2d").clearRect(0, 0, mask.width, mask.height);
  painted = false;
  refresh();
  ask(+dial.value, false);
});
find("cancel").addEventListener("click", () => server.cancel({ id: session.id }));
find("save").addEventListener("click", save);
new ResizeObserver(resize).observe(canvas);
watch("value", open);
open();
