import { gapsOf, keywordOf, markWith, MARK, plainText, pythonOf, requestOf, stream, withGaps } from "./asking.js";
import { Growth } from "./growth.js";

const at = (id) => document.getElementById(id);
const state = { keywords: [], past: [], asked: null, facts: "", writing: null, timer: null, served: {} };
const growth = new Growth(at("tokens"), changed);
const MODES = [...document.querySelectorAll("input[name=mode]")];

// --- what is given

function mode() {
  return MODES.find((radio) => radio.checked).value;
}

function setMode(value) {
  for (const radio of MODES) radio.checked = radio.value === value;
  at("by-text").hidden = value !== "text";
  at("by-words").hidden = value !== "words";
}

function addGap() {
  const box = at("text");
  if (mode() !== "text") return;
  const before = box.value.slice(0, box.selectionStart);
  const behind = box.value.slice(box.selectionEnd);
  const left = before && !/\s$/.test(before) ? " " : "";
  const right = behind && !/^[\s.,;:!?]/.test(behind) ? " " : "";
  box.setRangeText(left + MARK + right, box.selectionStart, box.selectionEnd, "end");
  box.focus();
  showGaps();
}

function showGaps() {
  const items = gapsOf(at("text").value).map((gap, index) => {
    const item = document.createElement("li");
    const inputs = ["low", "high"].map((name) => {
      const input = document.createElement("input");
      Object.assign(input, { type: "number", min: 0, value: gap[name], placeholder: name === "low" ? "0" : "∞" });
      input.setAttribute("aria-label", `${name === "low" ? "Least" : "Most"} tokens of gap ${index + 1}`);
      input.addEventListener("change", () => setBounds(index, inputs));
      return input;
    });
    item.append(`gap ${index + 1}`, inputs[0], "to", inputs[1]);
    return item;
  });
  at("gaps").replaceChildren(...items);
}

function setBounds(index, inputs) {
  const gap = gapsOf(at("text").value)[index];
  if (gap === undefined) return;
  at("text").setRangeText(markWith(inputs[0].value, inputs[1].value), gap.start, gap.end, "preserve");
}

function addWord() {
  const keyword = keywordOf(at("word").value);
  if (keyword !== null) state.keywords.push(keyword);
  at("word").value = "";
  showWords();
}

function showWords() {
  const items = state.keywords.map((keyword, index) => {
    const item = document.createElement("li");
    const name = document.createElement("span");
    name.textContent = [keyword].flat().join(" / ");
    const buttons = [["◂", "earlier", -1], ["▸", "later", 1], ["✕", "remove", 0]].map(([sign, what, move]) => {
      const button = document.createElement("button");
      Object.assign(button, { type: "button", textContent: sign });
      button.setAttribute("aria-label", `${name.textContent}: ${what}`);
      button.addEventListener("click", () => moveWord(index, move));
      return button;
    });
    item.append(buttons[0], name, buttons[1], buttons[2]);
    return item;
  });
  at("words").replaceChildren(...items);
}

function moveWord(index, move) {
  const [keyword] = state.keywords.splice(index, 1);
  if (move) state.keywords.splice(Math.max(0, index + move), 0, keyword);
  showWords();
  const row = at("words").children[Math.max(0, Math.min(index + move, state.keywords.length - 1))];
  (row?.children[move < 0 ? 0 : move > 0 ? 2 : 3] ?? at("word")).focus();
}

function showSliders() {
  for (const output of document.querySelectorAll(".sliders output")) {
    output.value = at(output.htmlFor.value).value;
  }
  // what acts on sampling rests without it
  const greedy = Number(at("temperature").value) === 0;
  for (const id of ["slot-temperature", "top-p", "seed"]) {
    at(id).disabled = greedy;
    at(id).closest("label").classList.toggle("off", greedy);
  }
}

function formValues() {
  const number = (id) => Number(at(id).value);
  const seed = at("seed").value === "" ? Math.floor(Math.random() * 2 ** 31) : number("seed");
  return {
    mode: mode(),
    text: at("text").value,
    keywords: [...state.keywords],
    ordered: at("ordered").checked,
    maxTokens: number("max-tokens"),
    temperature: number("temperature"),
    slotTemperature: number("slot-temperature"),
    topP: number("top-p"),
    seed,
    ebr: at("ebr").value === "" ? null : at("ebr").value === "true",
  };
}

// --- writing

function remember() {
  if (growth.tokens.length || state.past.length === 0) {
    state.past.push({ mode: mode(), text: at("text").value, keywords: [...state.keywords], tokens: growth.tokens, asked: state.asked, facts: state.facts });
  }
  at("undo").disabled = false;
}

function goBack() {
  const past = state.past.pop();
  if (past === undefined) return;
  state.writing?.abort();
  setMode(past.mode);
  at("text").value = past.text;
  Object.assign(state, { keywords: past.keywords, asked: past.asked, facts: past.facts });
  showGaps();
  showWords();
  at("grown").hidden = !past.tokens.length;
  at("facts").textContent = past.facts;
  growth.set(past.tokens);
  at("undo").disabled = !state.past.length;
}

async function write() {
  if (at("word").value.trim()) addWord();
  remember();
  state.writing?.abort();
  stopGrowing();
  const writing = (state.writing = new AbortController());
  state.asked = requestOf(formValues());
  Object.assign(at("error"), { hidden: true, textContent: "" });
  at("grown").hidden = false;
  at("stop").disabled = false;
  fact("Waiting …");
  growth.set([]);
  // below the fold on a phone
  at("grown").scrollIntoView({ block: "nearest" });
  const began = performance.now();
  try {
    await stream(state.asked, writing.signal, (name, data) => take(name, data, began));
  } catch (error) {
    if (!writing.signal.aborted) {
      // what fetch throws where nobody answers has no words for readers
      const message = error instanceof TypeError ? "The server does not answer: is it still running?" : error.message;
      Object.assign(at("error"), { hidden: false, textContent: message });
      fact("");
    } else if (state.writing === writing) {
      fact("Stopped.");
    }
  }
  if (state.writing === writing) {
    state.writing = null;
    at("stop").disabled = true;
  }
}

function take(name, data, began) {
  if (name === "start") growth.set(data.tokens);
  if (name === "insert") {
    growth.insert(data, data.place);
    fact(`Writing, step ${data.step} …`);
  }
  if (name === "done") {
    growth.set(data.tokens);
    const anew = data.reencoded_at.length ? `, encoded anew after step ${data.reencoded_at.join(", ")}` : "";
    const seed = state.asked.seed === undefined ? "" : `; seed ${state.asked.seed}`;
    const seconds = ((performance.now() - began) / 1000).toFixed(1);
    const empty = data.usage.completion_tokens ? "" : "; the model left it as it is: a gap of at least two tokens is ___{2,}";
    const end = data.finish_reason === "length" ? "; no more tokens were allowed" : empty;
    fact(`${data.usage.completion_tokens} tokens in ${growth.steps} steps, ${seconds} s; ${data.encoded_tokens} encoded${anew}${seed}${end}`);
  }
}

function fact(text) {
  state.facts = text;
  at("facts").textContent = text;
}

// --- looking at it

function changed() {
  Object.assign(at("step"), { max: growth.steps, value: growth.shown });
  at("shown").value = growth.shown ? `step ${growth.shown} of ${growth.steps}` : "given";
  at("first").disabled = at("back").disabled = growth.shown === 0;
  at("forth").disabled = growth.shown === growth.steps;
  at("play").disabled = growth.steps === 0;
  showChosen();
}

function showChosen() {
  const picked = growth.picked;
  at("chosen").hidden = picked === null;
  if (picked === null) return;
  const tokens = growth.tokens.slice(picked[0], picked[1] + 1);
  const text = plainText(tokens);
  const one = tokens.length === 1 ? tokens[0] : null;
  const what = one === null ? `${tokens.length} tokens` : one.step ? `written at step ${one.step}; what else could have stood there` : "given";
  at("chosen-title").textContent = `“${text}”: ${what}`;
  at("alternatives").replaceChildren(...(one?.step ? ranked(one) : []));
}

// the likeliest tokens at that step, and the one that was taken
function ranked(token) {
  const rows = [...token.alternatives];
  if (!rows.some((other) => other.id === token.id)) rows.push(token);
  return rows.map((other) => {
    const probability = Math.exp(other.logprob);
    const item = document.createElement("li");
    const [text, share, bar] = ["text", "share", "bar"].map((name) => {
      const span = document.createElement("span");
      span.className = name;
      return span;
    });
    text.textContent = other.text.replaceAll("\n", "↵");
    text.classList.toggle("took", other.id === token.id);
    share.textContent = `${(100 * probability).toFixed(1)} %`;
    bar.style.setProperty("--p", probability);
    item.append(text, share, bar);
    return item;
  });
}

function rewrite(keeps) {
  const picked = growth.picked;
  if (picked === null || state.writing) return;
  const inside = (index) => index >= picked[0] && index <= picked[1];
  const goes = keeps ? (token, index) => token.step > 0 && !inside(index) : (_, index) => inside(index);
  const visible = growth.tokens.filter((token) => token.step <= growth.shown);
  const where = new Map(visible.map((token) => [token, growth.tokens.indexOf(token)]));
  const text = withGaps(visible, (token) => goes(token, where.get(token)));
  remember();
  setMode("text");
  at("text").value = text;
  showGaps();
  write();
}

function stopGrowing() {
  clearInterval(state.timer);
  state.timer = null;
}

function grow() {
  stopGrowing();
  growth.show(0);
  state.timer = setInterval(() => {
    growth.show(growth.shown + 1);
    if (growth.shown >= growth.steps) stopGrowing();
  }, 180);
}

function go(step) {
  stopGrowing();
  growth.show(step);
}

async function copy(text, what) {
  try {
    await navigator.clipboard.writeText(text);
    at("copied").textContent = `${what} copied`;
  } catch {
    at("copied").textContent = "the browser does not let a page copy";
  }
}

// --- keys and buttons

function onClick(id, act) {
  at(id).addEventListener("click", act);
}

for (const radio of MODES) radio.addEventListener("change", () => setMode(mode()));
onClick("add-gap", addGap);
onClick("add-word", addWord);
onClick("stop", () => state.writing?.abort());
onClick("undo", goBack);
onClick("first", () => go(0));
onClick("back", () => go(growth.shown - 1));
onClick("forth", () => go(growth.shown + 1));
onClick("play", grow);
onClick("wider-left", () => growth.widen(-1));
onClick("wider-right", () => growth.widen(1));
onClick("rewrite", () => rewrite(false));
onClick("keep", () => rewrite(true));
onClick("copy-text", () => copy(plainText(growth.tokens), "text"));
onClick("copy-python", () => copy(pythonOf(state.asked, state.served), "Python"));
at("step").addEventListener("input", () => go(Number(at("step").value)));
at("text").addEventListener("input", showGaps);
at("asked").addEventListener("submit", (event) => {
  event.preventDefault();
  write();
});
for (const input of document.querySelectorAll(".sliders input")) input.addEventListener("input", showSliders);
at("word").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.ctrlKey && !event.metaKey) {
    event.preventDefault();
    addWord();
  } else if (event.key === "Backspace" && at("word").value === "" && state.keywords.length) {
    moveWord(state.keywords.length - 1, 0);
    at("word").focus();
  }
});
document.addEventListener("keydown", (event) => {
  const inTokens = at("tokens").contains(event.target);
  const keys = {
    "ctrl+Enter": write,
    Escape: () => state.writing?.abort(),
    "alt+g": addGap,
    "alt+z": goBack,
    "alt+ArrowLeft": () => go(growth.shown - 1),
    "alt+ArrowRight": () => go(growth.shown + 1),
    ...(inTokens ? { r: () => rewrite(false), k: () => rewrite(true) } : {}),
  };
  const name = `${event.ctrlKey || event.metaKey ? "ctrl+" : ""}${event.altKey ? "alt+" : ""}${event.key}`;
  if (keys[name]) {
    event.preventDefault();
    keys[name]();
  }
});

fetch("/v1/limits").then((response) => response.json()).then((limits) => {
  state.served = limits;
  at("max-tokens").max = limits.max_tokens;
  at("model").textContent = limits.inserts ? limits.model : `${limits.model} writes from left to right: it has no gaps`;
  at("write").disabled = !limits.inserts;
}).catch(() => {
  at("model").textContent = "the server does not answer";
});
showGaps();
showSliders();
changed();
