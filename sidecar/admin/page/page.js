// The live page. `events` sends `start` with all data, then `tick` once a second; both contain the current `status`.
// Callers choose the names of cameras and models, so the page inserts these names only as text, never as HTML.
"use strict";

const CAUSES = {request_rate: "orange", token_rate: "blue", growth: "purple", concurrency: "sky", hold: "red", turn: "grey"};
const CHARTS = [
  {title: "Attempts a second and the learned limit", unit: "/s", series: [
    {name: "sent", colour: "blue", of: rate("sent")},
    {name: "refused", colour: "red", of: rate("refused")},
    {name: "learned limit", colour: "green", dashed: true, of: (view, point) => view.value(point, "limit")}]},
  {title: "Requests that wait, by what holds them", unit: "", stacked: true, series: Object.entries(CAUSES).map(
    ([cause, colour]) => ({name: cause.replace("_", " "), colour, of: (view, point) => view.value(point, `waiting.${cause}`)}))},
  {title: "In flight", unit: "", series: [
    {name: "in flight", colour: "green", of: (view, point) => view.value(point, "in_flight")}]},
  {title: "LLM tokens a second", unit: "/s", series: [
    {name: "input", colour: "blue", of: rate("input_tokens")},
    {name: "output", colour: "orange", of: rate("output_tokens")},
    {name: "learned limit", colour: "green", dashed: true, of: (view, point) => view.value(point, "token_limit")}]},
];
const PARTS = {queue: ["waits in the queue", "orange"], lock: ["waits for the backend's lock", "purple"], upstream: ["at the backend", "blue"]};

const $ = (selector, root = document) => root.querySelector(selector);
const views = new Map();
let range = "recent";
let spoken = "";

function rate(field) {
  return (view, point) => view.value(point, field) / (view.value(point, "span") || 1);
}

/** One backend: its section of the page, its points and its latest status. */
class View {
  constructor(name, fields, told) {
    this.name = name;
    this.fields = new Map(fields.map((field, at) => [field, at]));
    this.points = told;
    this.section = $("#backend").content.cloneNode(true).firstElementChild;
    $("h2", this.section).textContent = name;
    this.charts = CHARTS.map((about) => new Chart(about, this));
    $(".charts", this.section).append(...this.charts.map((chart) => chart.figure));
  }

  value(point, field) { return point[this.fields.get(field)]; }

  /** The mean of the last ten seconds. */
  now(of) {
    const last = this.points.recent.slice(-10);
    return last.length ? last.reduce((sum, point) => sum + of(this, point), 0) / last.length : 0;
  }

  add(point) {
    this.points.recent.push(point);
    if (this.points.recent.length > 300) this.points.recent.shift();
  }

  show(backend, throttles) {
    const {models, queue, totals} = backend;
    fill($(".words", this.section), models.length ? models.slice(0, 5).map((model) => {
      const tone = model.hold ? "bad" : model.bound_by ? "busy" : "good";
      return element("li", {}, element("b", {}, model.model), " ", element("span", {class: tone}, model.in_words));
    }) : [element("li", {}, "nothing was asked yet")]);
    const learned = models.map((model) => model.requests.learned).filter((limit) => limit !== null);
    fill($(".tiles", this.section), [
      tile("sent", number(this.now(rate("sent"))) + "/s"),
      tile("refused", number(this.now(rate("refused"))) + "/s"),
      tile("learned limit", learned.length ? number(sum(learned)) + "/s" : "not known"),
      tile("in flight", number(backend.in_flight)),
      tile("waiting", number(queue.requests)),
      tile("high · normal · low", Object.values(queue.by_priority).join(" · ")),
    ]);
    this.showTime();
    const waited = Object.keys(CAUSES).map((cause) => [cause, totals[`waited.${cause}`] || 0]);
    const all = sum(waited.map(([, seconds]) => seconds)) || 1;
    rows($(".causes", this.section), waited.filter(([, seconds]) => seconds > 0).map(([cause, seconds]) =>
      [cause.replace("_", " "), `${number(seconds)} s`, seconds / all, `waited.${cause}`, seconds, CAUSES[cause]]));
    rows($(".outcomes", this.section), Object.entries(totals).filter(([key]) => /^(requests|attempts|throttles|tokens)\./.test(key))
      .map(([key, count]) => [key.replace(".", ": ").replaceAll("_", " "), number(count), undefined, key, count]));
    const queues = models.flatMap((model) => model.longest_queues).slice(0, 10);
    rows($(".queues", this.section), queues.map(({key, requests, oldest_seconds}) =>
      [key || "(no key)", `${requests}, since ${oldest_seconds.toFixed(1)} s`]));
    rows($(".throttles", this.section), throttles.slice(0, 10).map(({seconds_ago, kind, count}) =>
      [`${count} × ${kind.replace("_", " ")}`, `${duration(seconds_ago)} ago`]));
    this.draw();
  }

  /** Show how the time of an answer is divided between queue, lock and upstream. */
  showTime() {
    const ended = this.now((view, point) => view.value(point, "answered"));
    const parts = Object.entries(PARTS).map(([part, [text, colour]]) =>
      ({text, colour, seconds: ended ? this.now((view, point) => view.value(point, `${part}_seconds`)) / ended : 0}));
    const whole = sum(parts.map((part) => part.seconds));
    const figure = $(".time", this.section), stack = $(".stack", figure);
    $("figcaption", figure).textContent = ended ? `An answer takes ${whole.toFixed(2)} s, mean of the last 10 s` : "No answer in the last 10 s";
    fill(stack, parts.map(({colour, seconds}) => {
      const piece = element("i", {class: colour});
      piece.style.flexGrow = 100 * seconds / (whole || 1);  // a sum of the factors below 1 would not fill the bar
      return piece;
    }));
    const told = parts.map(({text, seconds}) => `${text} ${seconds.toFixed(2)} s`);
    stack.setAttribute("aria-label", told.join(", "));
    fill($(".legend", figure), parts.map(({colour}, at) => element("li", {class: colour}, element("i", {}), told[at])));
  }

  draw() { for (const chart of this.charts) chart.draw(this.points[range]); }
}

/** A chart of lines or stacked areas over time. It is drawn again for every point. */
class Chart {
  constructor(about, view) {
    this.about = about;
    this.view = view;
    this.svg = svg("svg", {role: "img"});
    this.legend = element("ul", {class: "legend"});
    this.figure = element("figure", {}, element("figcaption", {}, about.title), this.svg, this.legend);
  }

  draw(points) {
    const {about, view} = this;
    const width = Math.max(this.svg.clientWidth, 200), height = 150, left = 42, bottom = 132, top = 8;
    const columns = about.series.map((series) => points.map((point) => series.of(view, point)));
    const tops = about.stacked
      ? points.map((_, at) => sum(columns.map((column) => column[at] || 0)))
      : columns.flat().map((value) => value || 0);
    const highest = nice(Math.max(...tops, about.unit ? 0.1 : 1));
    const times = points.map((point) => view.value(point, "t"));
    const end = times.at(-1) || 0, start = points.length > 1 ? times[0] : end - 1;
    const x = (at) => left + (width - left - 4) * (times[at] - start) / (end - start || 1);
    const y = (value) => bottom - (bottom - top) * value / highest;
    const drawn = [0, 0.5, 1].flatMap((share) => [
      svg("line", {class: "grid", x1: left, x2: width - 4, y1: y(share * highest), y2: y(share * highest)}),
      svg("text", {x: left - 6, y: y(share * highest) + 4, "text-anchor": "end"}, number(share * highest)),
    ]);
    drawn.push(svg("text", {x: left, y: height - 4}, `${duration(end - start)} ago`),
      svg("text", {x: width - 4, y: height - 4, "text-anchor": "end"}, "now"));
    const base = points.map(() => 0);
    about.series.forEach(({colour, dashed}, index) => {
      const column = columns[index];
      if (about.stacked) {
        if (!column.some((value) => value > 0)) return;
        const lower = base.map((value, at) => `${x(at).toFixed(1)},${y(value).toFixed(1)}`).reverse();
        const upper = column.map((value, at) => `${x(at).toFixed(1)},${y(base[at] += value || 0).toFixed(1)}`);
        drawn.push(svg("polygon", {class: `area ${colour}`, points: [...upper, ...lower].join(" ")}));
        return;
      }
      let path = "", pen = "M";
      column.forEach((value, at) => {
        if (value === null) { pen = "M"; return; }
        path += `${pen}${x(at).toFixed(1)},${y(value).toFixed(1)}`;
        pen = "L";
      });
      drawn.push(svg("path", {class: `line ${colour}${dashed ? " dashed" : ""}`, d: path}));
    });
    fill(this.svg, drawn);
    this.svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    const last = about.series.map(({name}, at) => `${name} ${quantity(columns[at].at(-1) ?? null, about.unit)}`);
    this.svg.setAttribute("aria-label", `${about.title}, now: ${last.join(", ")}`);
    // The legend of stacked areas lists only the visible ones: usually one of the six causes.
    const shown = about.series.map(({colour}, at) => [colour, at]).filter(([, at]) => !about.stacked || columns[at].some((value) => value > 0));
    fill(this.legend, shown.map(([colour, at]) => element("li", {class: colour}, element("i", {}), last[at])));
  }
}

function sum(values) { return values.reduce((total, value) => total + value, 0); }

/** Three significant digits: 0.25, 16.2k, 1.3M. */
function number(value) {
  for (const [size, unit] of [[1e6, "M"], [1e3, "k"]]) if (value >= 0.9995 * size) return Number((value / size).toPrecision(3)) + unit;
  return String(Number(value.toPrecision(3)));
}

function quantity(value, unit) { return value === null ? "not known" : number(value) + unit; }

function duration(seconds) {
  for (const [size, unit] of [[86400, "d"], [3600, "h"], [60, "min"]]) if (seconds >= 2 * size) return `${Math.round(seconds / size)} ${unit}`;
  return `${Math.round(seconds)} s`;
}

/** Return the next round number that is not smaller. */
function nice(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 3, 4, 5, 6, 8, 10].find((step) => step * power >= value * 0.999) * power;
}

function element(name, attributes, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

function svg(name, attributes, text) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

function fill(parent, children) { parent.replaceChildren(...children); }

function tile(name, value) { return element("div", {}, element("dt", {}, name), element("dd", {}, value)); }

function rows(table, entries) {
  table.hidden = entries.length === 0;
  fill($("tbody", table), entries.map(([text, value, share, key, exact, colour]) => {
    const cell = element("td", key ? {"data-total": key, "data-value": exact} : {}, value);
    const bar = share === undefined ? [] : [element("td", {}, element("meter", {value: share, "aria-label": `${text}: share`}))];
    return element("tr", colour ? {class: colour} : {}, element("th", {scope: "row"}, text), cell, ...bar);
  }));
}

function show(status) {
  const state = $("#state");
  state.textContent = status.ready ? "ready" : status.reason;
  state.className = `badge ${status.ready ? "good" : "bad"}`;
  $("#about").textContent = `${status.version} · Python ${status.python} · up ${duration(status.uptime_seconds)}`;
  $("#simulated").hidden = !status.simulated;
  $("#lost").hidden = true;
  document.title = `${sum(status.backends.map((backend) => backend.queue.requests))} waiting · vlm-sidecar`;
  for (const backend of status.backends) views.get(backend.name)?.show(backend, status.throttles.filter((seen) => seen.backend === backend.name));
  speak(status);
}

/** Let a screen reader say why requests wait, but only when the cause changes, not every second. */
function speak(status) {
  const models = status.backends.flatMap((backend) => backend.models);
  const held = models.map((model) => `${model.model} ${model.hold?.kind ?? model.bound_by}`).join();
  if (held === spoken) return;
  spoken = held;
  $("#spoken").textContent = models.map((model) => `${model.model}: ${model.in_words}`).join(". ");
}

function begin({status, fields, history}) {
  views.clear();
  for (const [name, told] of Object.entries(history)) views.set(name, new View(name, fields, told));
  fill($("#backends"), [...views.values()].map((view) => view.section));
  show(status);
}

/** Fetch the points since the start. The sidecar merges them, so the page cannot build them; they change slowly. */
async function refresh() {
  if (range !== "whole" || document.hidden) return;
  try {
    const {history} = await (await fetch("history")).json();
    for (const [name, view] of views) view.points.whole = history[name].whole;
  } catch { return; }  // the sidecar does not answer; #lost already says so
  for (const view of views.values()) view.draw();
}

const source = new EventSource("events");
source.addEventListener("start", (event) => begin(JSON.parse(event.data)));
source.addEventListener("tick", (event) => {
  const {status, points} = JSON.parse(event.data);
  for (const [name, point] of Object.entries(points)) views.get(name)?.add(point);
  if (!document.hidden) show(status);
});
source.addEventListener("error", () => { $("#lost").hidden = false; $("#state").className = "badge bad"; $("#state").textContent = "no answer"; });
$("#range").addEventListener("click", (event) => {
  if (event.target.tagName !== "BUTTON") return;
  range = event.target.value;
  for (const button of document.querySelectorAll("#range button")) button.setAttribute("aria-pressed", button.value === range);
  for (const view of views.values()) view.draw();
  refresh();
});
addEventListener("resize", () => { for (const view of views.values()) view.draw(); });
setInterval(refresh, 10_000);
