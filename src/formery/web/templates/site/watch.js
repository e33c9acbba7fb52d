"use strict";
// Asks for a run, and draws each call as its line comes. Leaving the page, or Stop, ends the run on the server.
const form = document.getElementById("watch");
const [said, screen, counters, written, given, log] =
  ["said", "screen", "counters", "written", "given", "log"].map((id) => document.getElementById(id));
const [watch, stop, step] = [form.querySelector("button[type=submit]"), ...["stop", "step"].map((id) => document.getElementById(id))];
const stops = { end: "The model ended the text.", stop: "Ended at a stop string.", length: "All the tokens that were asked for.", time: "Stopped: the run took too long." };
let running = null;
let hurry = null;

function suit() {
  const chosen = form.model.selectedOptions[0];
  for (const option of form.method.options) {
    option.hidden = option.disabled = !option.dataset.models.split(" ").includes(chosen.value);
  }
  if (form.method.selectedOptions[0].disabled) form.method.value = "greedy";
  form.prompt.value = chosen.dataset.prompt;
}

function piece(text, kind) {
  const span = document.createElement(kind === "rejected" ? "del" : "span");
  span.className = kind;
  span.textContent = text;
  return span;
}

function draw(call) {
  while (written.childNodes.length > call.from) written.lastChild.remove();
  const first = written.childNodes.length + call.texts.length - call.written;
  call.texts.forEach((text) => {
    const place = written.childNodes.length;
    const kind = place >= first ? (place - first < call.accepted ? "accepted" : "own") : "accepted";
    const one = piece(text, kind);
    one.classList.add("fresh");
    written.append(one);
  });
  const line = document.createElement("li");
  const cost = piece(`${((call.drafting + call.verifying) * 1000).toFixed(1)} ms`, "cost");
  line.append(cost);
  const shown = (place) => piece(call.guesses[place].text, call.guesses[place].stands ? "accepted" : "rejected");
  const walk = (parent, into) => {  // the first child goes on in its line, others begin one of their own
    call.guesses.forEach((one, place) => {
      if (one.parent !== parent) return;
      const first = call.guesses.findIndex((other) => other.parent === parent) === place;
      let to = into;
      if (!first) {
        to = document.createElement("span");
        to.className = "branch";
        to.append("└ ");
        line.append(to);
      }
      to.append(shown(place));
      walk(place, to);
    });
  };
  const main = document.createElement("span");
  line.append(main);
  walk(-1, main);
  const own = call.texts.slice(call.texts.length - (call.written - call.accepted)).join("");
  if (call.written > call.accepted) line.append(piece(own.replaceAll("\n", "↵"), "own"));
  log.append(line);
  log.scrollTop = log.scrollHeight;
  const { tokens, calls, drafted, accepted } = call.totals;
  const figures = { tokens, calls, drafted, accepted, rejected: drafted - accepted, rate: (calls / tokens).toFixed(2), speed: (tokens / call.seconds).toFixed(0) };
  for (const [name, value] of Object.entries(figures)) counters.querySelector(`[data-count=${name}]`).textContent = value;
}

const pause = (milliseconds, signal) => new Promise((done) => {
  const ready = () => { clearTimeout(timer); done(); };
  const timer = setTimeout(ready, milliseconds);
  hurry = ready;
  signal.addEventListener("abort", ready);
});

async function* lines(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    rest += value;
    const parts = rest.split("\n");
    rest = parts.pop();
    for (const part of parts) yield JSON.parse(part);
  }
}

async function run(signal) {
  const temperature = form.temperature.value === "" ? null : Number(form.temperature.value);
  const asked = { model: form.model.value, method: form.method.value, prompt: form.prompt.value, tokens: Number(form.tokens.value), seed: Number(form.seed.value), temperature };
  const response = await fetch("watch/run", { method: "POST", signal, headers: { "Content-Type": "application/json" }, body: JSON.stringify(asked) });
  if (!response.ok) throw new Error((await response.json()).error);
  written.replaceChildren();
  log.replaceChildren();
  given.textContent = form.model.value === "translate" ? "" : asked.prompt;
  screen.hidden = counters.hidden = false;
  let ending = "The run ended.";
  for await (const call of lines(response)) {
    if (call.error) throw new Error(call.error);
    if (call.waiting) { said.textContent = "Waiting for a place …"; continue; }
    if (call.loading) { said.textContent = `Loading ${call.loading} …`; continue; }
    said.textContent = "Decoding …";
    draw(call);
    if (call.stop) { ending = stops[call.stop]; continue; }
    await pause(Number(form.pace.value), signal);
    if (signal.aborted) return "Stopped.";
  }
  return ending;
}

form.addEventListener("submit", async (event) => {
  event.preventDefault();
  if (running) running.abort();
  const own = running = new AbortController();
  watch.disabled = true;
  stop.disabled = step.disabled = false;
  said.textContent = "Asking …";
  try {
    said.textContent = await run(own.signal);
  } catch (error) {
    said.textContent = own.signal.aborted ? "Stopped." : error.message;
  }
  if (running === own) {
    running = null;
    watch.disabled = false;
    stop.disabled = step.disabled = true;
  }
});
stop.addEventListener("click", () => running && running.abort());
step.addEventListener("click", () => hurry && hurry());
form.pace.addEventListener("input", () => form.pace.setAttribute("aria-valuetext", `${form.pace.value} milliseconds`));
form.model.addEventListener("change", suit);
suit();
