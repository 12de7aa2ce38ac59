// What is asked of the server, and the same as Python: no document is touched here.

export const MARK = "___";
const GAP = /_{3,}(\{(\d*)(,?)(\d*)\})?/g;

// the gaps of a text: where each stands, and its bounds, "" where there is none
export function gapsOf(text) {
  return [...text.matchAll(GAP)].map((match) => ({
    start: match.index,
    end: match.index + match[0].length,
    low: match[2] ?? "",
    high: match[1] === undefined ? "" : match[3] ? match[4] : match[2],
  }));
}

export function markWith(low, high) {
  if (low === "" && high === "") return MARK;
  if (low === high) return `${MARK}{${low}}`;
  return `${MARK}{${low},${high}}`;
}

// "look / looks" is one keyword in two forms
export function keywordOf(text) {
  const forms = text.split("/").map((form) => form.trim()).filter((form) => form);
  if (!forms.length) return null;
  return forms.length === 1 ? forms[0] : forms;
}

// the text with a gap in the place of every run of tokens that `goes` names
export function withGaps(tokens, goes) {
  let text = "";
  let inside = false;
  tokens.forEach((token, index) => {
    if (!goes(token, index)) {
      text += token.text;
      inside = false;
    } else if (!inside) {
      // a gap of whole words keeps the space on its left
      text += (token.text.startsWith(" ") && text !== "" ? " " : "") + MARK;
      inside = true;
    }
  });
  return text.replace(/^ /, "");
}

export function plainText(tokens) {
  return tokens.map((token) => token.text).join("").replace(/^ /, "");
}

// options as the server takes them; without temperature those of sampling mean nothing
export function requestOf(form) {
  const asked = { max_tokens: form.maxTokens, alternatives: 8, stream: true };
  if (form.mode === "text") asked.text = form.text;
  else Object.assign(asked, { keywords: form.keywords, ordered: form.ordered });
  if (form.temperature > 0) {
    Object.assign(asked, { temperature: form.temperature, slot_temperature: form.slotTemperature, top_p: form.topP, seed: form.seed });
  }
  if (form.ebr !== null) asked.ebr = form.ebr;
  return asked;
}

const python = (value) => {
  if (value === true) return "True";
  if (value === false) return "False";
  return Array.isArray(value) ? `[${value.map(python).join(", ")}]` : JSON.stringify(value);
};

// the call that writes the same text; an adapter is first merged into its base
export function pythonOf(asked, { folder, adapter }) {
  // a list of lists alone is a batch
  const words = asked.keywords && (asked.keywords.every(Array.isArray) ? [asked.keywords] : asked.keywords);
  const given = asked.text !== undefined ? python(asked.text) : `keywords=${python(words)}${asked.ordered ? "" : ", ordered=False"}`;
  const options = [`max_new_tokens=${asked.max_tokens}`];
  if (asked.temperature !== undefined) {
    options.push("do_sample=True", `temperature=${asked.temperature}`, "top_k=0", `top_p=${asked.top_p}`);
    options.push(`slot_temperature=${asked.slot_temperature}`, `seed=${asked.seed}`);
  }
  if (asked.ebr !== undefined) options.push(`ebr=${python(asked.ebr)}`);
  return `from transformers import AutoModelForCausalLM, AutoTokenizer

import modeling_insnext
${adapter ? "from conversion.smollm2 import adapted\n" : ""}
folder = ${adapter ? `adapted(${python(folder)})` : python(folder)}
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
canvas = model.canvas(tokenizer, ${given})
out = model.generate(**canvas, ${options.join(", ")})
print(tokenizer.decode(out[0], skip_special_tokens=True))
`;
}

// send a request and call `take(name, data)` for every event
export async function stream(asked, signal, take) {
  const response = await fetch("/v1/canvas", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(asked),
    signal,
  });
  if (!response.ok) throw new Error((await response.json()).error.message);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let waiting = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const frames = (waiting + value).split("\n\n");
    waiting = frames.pop();
    for (const frame of frames) {
      const lines = frame.split("\n");
      const data = lines.find((line) => line.startsWith("data: "));
      if (data === undefined) continue;
      const name = lines.find((line) => line.startsWith("event: "))?.slice(7) ?? "error";
      const content = JSON.parse(data.slice(6));
      if (name === "error") throw new Error(content.error.message);
      take(name, content);
    }
  }
}
