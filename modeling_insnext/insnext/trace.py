"""How a text grew: which token was written at which step, and where EBR encoded the text anew.

output = model.generate(**canvas, return_dict_in_generate=True)
trace = InsertionTrace.from_output(output, tokenizer)
print(trace.text())
trace.save("growth.html")
"""

import html
import os
import re
import tempfile
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from .canvas_pieces import text_of


PAD_STEP = -2
REPLACEMENT = "\ufffd"
# private-use characters stand for the marks while lines are broken, since text may hold brackets of its own
GIVEN_OPEN, GIVEN_CLOSE, NEW_OPEN, NEW_CLOSE = "\ue000", "\ue001", "\ue002", "\ue003"
PLAIN_MARKS = {GIVEN_OPEN: "‹", GIVEN_CLOSE: "›", NEW_OPEN: "[", NEW_CLOSE: "]"}
COLOR_MARKS = {GIVEN_OPEN: "\033[1m", GIVEN_CLOSE: "\033[22m", NEW_OPEN: "\033[7m[", NEW_CLOSE: "]\033[27m"}


class Unit(NamedTuple):
    """Tokens that make whole characters together, mostly one token; `step` 0 is given text."""

    text: str
    step: int


@dataclass(frozen=True)
class InsertionTrace:
    """The growth of one text.

    Args:
        units: The final text, left to right.
        reencoded_at: Steps after which the text was encoded anew.
        reencoded_tokens: Number of tokens encoded anew each time, or None if it was not recorded.
        encoded_tokens: Tokens passed through the network in all, or None.
    """

    units: tuple[Unit, ...]
    reencoded_at: tuple[int, ...] = ()
    reencoded_tokens: tuple[int, ...] | None = None
    encoded_tokens: int | None = None

    @classmethod
    def from_output(cls, output: Any, tokenizer, row: int = 0) -> "InsertionTrace":
        """Return the trace of one row of what `generate(..., return_dict_in_generate=True)` returned.

        Args:
            output: Has `sequences` and `insertion_steps` `[B, T]`; steps count from 1, -1 is given, -2 a pad.
                Optional: `reencoded_at` and `reencoded_tokens`, one list a row, and `encoded_tokens` `[B]`.
            tokenizer: Tokenizer of the model.
            row: Which text.

        Raises:
            ValueError: If `output` has no insertion steps or no such row.
        """
        sequences, steps = getattr(output, "sequences", None), getattr(output, "insertion_steps", None)
        if sequences is None or steps is None:
            raise ValueError(
                "a trace needs sequences and insertion_steps, use generate(..., return_dict_in_generate=True), "
                f"got {type(output).__name__}"
            )
        if sequences.shape != steps.shape:
            raise ValueError(
                "sequences and insertion_steps must have one shape, "
                f"got {list(sequences.shape)} and {list(steps.shape)}"
            )
        if not 0 <= row < len(sequences):
            raise ValueError(f"row must be in [0, {len(sequences)}), got {row}")
        # what stands for unknown text is text, unless it frames texts as well, as in GPT-2's vocabulary
        frame = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
        hidden = set(tokenizer.all_special_ids) - ({tokenizer.unk_token_id} - frame)
        pairs = [
            (token, max(step, 0))
            for token, step in zip(sequences[row].tolist(), steps[row].tolist(), strict=True)
            if step != PAD_STEP and token not in hidden
        ]
        encoded = getattr(output, "encoded_tokens", None)
        reencoded_tokens = getattr(output, "reencoded_tokens", None)
        return cls(
            units=tuple(_units(pairs, tokenizer)),
            reencoded_at=tuple(int(step) for step in (getattr(output, "reencoded_at", None) or [()] * (row + 1))[row]),
            reencoded_tokens=None
            if reencoded_tokens is None
            else tuple(int(count) for count in reencoded_tokens[row]),
            encoded_tokens=None if encoded is None else int(encoded[row]),
        )

    @property
    def steps(self) -> int:
        """Number of steps that wrote something."""
        return max((unit.step for unit in self.units), default=0)

    def text_at(self, step: int) -> str:
        """Return the text as it stood after `step`, 0 being the given text."""
        return "".join(unit.text for unit in self.units if unit.step <= step).strip(" ")

    def text(self, width: int = 80, frames: int = 12, color: bool = False) -> str:
        """Return a picture for the terminal: given words in ‹ ›, words written since the last line in [ ].

        Args:
            width: Columns.
            frames: Most texts to show; the first is the given text, the last the final one. If some are left out, the
                picture says so.
            color: Write given words bold and new ones inverse, with ANSI codes.

        Raises:
            ValueError: If `width` is below 30 or `frames` below 2.
        """
        if width < 30:
            raise ValueError(f"width must be at least 30, got {width}")
        if frames < 2:
            raise ValueError(f"frames must be at least 2, got {frames}")
        last = self.steps
        shown = sorted({round(i * last / (frames - 1)) for i in range(frames)}) if last >= frames else range(last + 1)
        digits = len(str(last))
        lines, previous = [], 0
        for step in shown:
            label = f"step {step:{digits}} " if step else f"{'given':{digits + 5}} "
            lines += self._frame(step, previous, label, width)
            strikes = [index for index, at in enumerate(self.reencoded_at) if previous < at <= step]
            lines += [f"{'⟳':>{digits + 5}} {self._strike(index)}" for index in strikes]
            previous = step
        if len(shown) <= last:
            lines.append(f"{len(shown)} of {last + 1} texts shown")
        if self.encoded_tokens is not None:
            lines.append(f"{self.encoded_tokens} tokens encoded")
        marks = str.maketrans(COLOR_MARKS if color else PLAIN_MARKS)
        return "\n".join(lines).translate(marks)

    def __str__(self) -> str:
        return self.text()

    def html(self) -> str:
        """Return a page that needs no other file: the text shaded by step, a slider, marks where EBR struck."""
        values = {
            "facts": self._facts(),
            "text": "".join(self._spans()),
            "steps": str(self.steps),
            "ticks": "".join(self._ticks()),
            "legend": '<span><b class="tick key"></b> encoded anew (EBR)</span>' if self.reencoded_at else "",
        }
        # one pass, so that what a user wrote is never read as a placeholder
        return re.sub("@(facts|text|steps|ticks|legend)@", lambda match: values[match[1]], PAGE)

    def save(self, path: str | os.PathLike) -> None:
        """Write the page, or the terminal picture if the name ends with .txt; a failure leaves the old file.

        Folders that are missing are made.

        Args:
            path: File name ending with .html or .txt.

        Raises:
            ValueError: If it ends otherwise.
        """
        path = os.fspath(path)
        writers = {".html": self.html, ".txt": self.text}
        ending = os.path.splitext(path)[1]
        if ending not in writers:
            raise ValueError(f"a trace is saved as .html or .txt, got {path!r}")
        content = writers[ending]()
        folder = os.path.dirname(path) or "."
        os.makedirs(folder, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=folder, prefix=".trace-", delete=False) as file:
            try:
                file.write(content)
                file.close()
                # a temporary file is private, what the user asked for is not
                os.chmod(file.name, 0o644)
                os.replace(file.name, path)
            except BaseException:
                os.unlink(file.name)
                raise

    def _frame(self, step: int, previous: int, label: str, width: int) -> list[str]:
        pieces = []
        for unit in _runs_of_given(self.units):
            if unit.step <= step:
                kind = "given" if unit.step == 0 else "new" if unit.step > previous else "old"
                pieces.append((kind, unit.text))
        line = _mark_runs(pieces).replace("\n", "↵ ").strip(" ")
        indent = " " * len(label)
        return textwrap.wrap(line, width, initial_indent=label, subsequent_indent=indent) or [f"{label}(nothing)"]

    def _strike(self, index: int) -> str:
        count = f"{self.reencoded_tokens[index]} tokens " if self.reencoded_tokens else ""
        return f"{count}encoded anew after step {self.reencoded_at[index]}"

    def _facts(self) -> str:
        written = sum(unit.step > 0 for unit in self.units)
        facts = [f"{written} tokens written in {self.steps} steps" if written else "nothing written"]
        if self.encoded_tokens is not None:
            facts.append(f"{self.encoded_tokens} tokens encoded")
        if self.reencoded_at:
            plural = "s" if len(self.reencoded_at) > 1 else ""
            facts.append(f"encoded anew after step{plural} " + ", ".join(str(step) for step in self.reencoded_at))
        return " · ".join(facts)

    def _spans(self) -> list[str]:
        """Return one element a written unit and one a run of given units, the spaces outside the shade and the box."""
        spans = []
        for unit in _runs_of_given(self.units):
            body = unit.text.lstrip(" ")
            space = unit.text[: len(unit.text) - len(body)]
            if unit.step == 0:
                spans.append(f'{space}<b class="given" title="given">{html.escape(body)}</b>' if body else space)
            else:
                shade = (unit.step - 1) / max(self.steps - 1, 1)
                spans.append(
                    f'<span data-s="{unit.step}" style="--t:{shade:.3g}" title="step {unit.step}">'
                    f"{space}<i>{html.escape(body)}</i></span>"
                )
        return spans

    def _ticks(self) -> list[str]:
        return [
            f'<b class="tick" data-at="{step}" style="--p:{step / max(self.steps, 1):.4g}" '
            f'title="{self._strike(index)}"></b>'
            for index, step in enumerate(self.reencoded_at)
        ]


def _units(pairs: Sequence[tuple[int, int]], tokenizer) -> list[Unit]:
    """Decode token by token in context; tokens whose bytes make a character only together become one unit."""
    ids = [token for token, _ in pairs]
    units = []
    context = begin = 0
    for end in range(1, len(pairs) + 1):
        before = text_of(tokenizer, ids[context:begin])
        text = text_of(tokenizer, ids[context:end])
        unfinished = text.endswith(REPLACEMENT) or len(text) <= len(before)
        if not unfinished or end == len(pairs):
            units.append(Unit(text[len(before) :], max(step for _, step in pairs[begin:end])))
            context, begin = begin, end
    return units


def _runs_of_given(units: Sequence[Unit]) -> list[Unit]:
    runs = []
    for unit in units:
        if runs and unit.step == 0 and runs[-1].step == 0:
            runs[-1] = Unit(runs[-1].text + unit.text, 0)
        else:
            runs.append(unit)
    return runs


def _mark_runs(pieces: Sequence[tuple[str, str]]) -> str:
    """Put marks around runs of given text and around new words, the space before them outside."""
    marks = {"given": (GIVEN_OPEN, GIVEN_CLOSE), "new": (NEW_OPEN, NEW_CLOSE), "old": ("", "")}
    merged = []
    for kind, text in pieces:
        if merged and merged[-1][0] == kind == "new" and not text[:1].isspace():
            merged[-1] = (kind, merged[-1][1] + text)
        else:
            merged.append((kind, text))
    line = ""
    for kind, text in merged:
        body = text.strip()
        opening, closing = marks[kind] if body else ("", "")
        start = text.index(body) if body else len(text)
        line += text[:start] + opening + body + closing + text[start + len(body) :]
    return line


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>How this text grew</title>
<style>
:root {
  color-scheme: light dark;
  --paper: #fbfaf7; --ink: #1d1c1a; --soft: #6a675f; --line: #dcd8cd; --card: #ffffff; --strike: #b4361f;
  --light: .955; --fall: -.165; --rich: .045; --gain: .085;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #16171a; --ink: #eceae4; --soft: #a3a099; --line: #35363b; --card: #1e2024; --strike: #ff8b70;
    --light: .30; --fall: .17; --rich: .04; --gain: .085;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 46rem; margin: 0 auto; padding: 2.5rem 1.25rem; }
h1 { font-size: 1.15rem; font-weight: 600; margin: 0; }
.facts, .legend, output { color: var(--soft); font-size: .85rem; }
.facts { margin: .2rem 0 1.25rem; }
#text {
  background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: 1.4rem 1.6rem;
  min-height: 7rem; font: 1.2rem/2 Georgia, "Times New Roman", serif; white-space: pre-wrap; overflow-wrap: anywhere;
}
/* spaces at the left edge show in the final text only */
#text.growing { white-space: pre-line; }
#text i { font-style: normal; padding: .18em 0; border-radius: .15em; }
#text i, .bar s {
  --shade: calc(var(--light) + var(--fall) * var(--t));
  background: oklch(var(--shade) calc(var(--rich) + var(--gain) * var(--t)) calc(85 + 185 * var(--t)));
}
.given { font-weight: 600; border: 1.5px solid var(--ink); border-radius: .3em; padding: .08em .28em; }
.off { display: none; }
.new i { outline: 2px solid var(--ink); outline-offset: 1px; }
.player { display: flex; align-items: center; gap: .9rem; margin: 1.1rem 0 .3rem; }
button {
  flex: none; width: 2.6rem; height: 2.6rem; border-radius: 50%; border: 1px solid var(--line);
  background: var(--card); color: var(--ink); cursor: pointer; padding: 0; display: grid; place-items: center;
}
button svg { width: 1rem; height: 1rem; fill: currentColor; }
button .pause, .playing .play { display: none; }
.playing .pause { display: block; }
button:focus-visible, input:focus-visible { outline: 2px solid var(--ink); outline-offset: 3px; }
.track { position: relative; flex: 1; padding-top: 1rem; }
input { display: block; width: 100%; height: 1.5rem; margin: 0; accent-color: var(--ink); }
/* the middle of a range thumb stays half a thumb away from both ends */
.track .tick {
  position: absolute; top: .1rem; left: calc(.5rem + (100% - 1rem) * var(--p)); transform: translateX(-50%);
}
.tick {
  width: 0; height: 0; border: .32rem solid transparent; border-top: .55rem solid var(--strike); border-bottom: 0;
}
.key { display: inline-block; margin-right: .3rem; }
output { display: block; min-height: 1.5em; margin-left: 3.5rem; }
.hit { color: var(--strike); }
.legend {
  display: flex; flex-wrap: wrap; align-items: center; gap: .5rem 1.6rem;
  margin-top: 1.4rem; padding-top: 1rem; border-top: 1px solid var(--line);
}
.legend .given { border-width: 1px; color: var(--ink); font-family: Georgia, serif; }
.scale { display: inline-flex; align-items: center; gap: .5rem; }
.bar { display: inline-flex; border-radius: .2rem; overflow: hidden; }
.bar s { width: .8rem; height: .9rem; }
</style>
</head>
<body>
<main>
<h1>How this text grew</h1>
<p class="facts">@facts@</p>
<div id="text" dir="auto">@text@</div>
<div class="player" hidden>
<button type="button" aria-label="Play" aria-pressed="false"><svg class="play" viewBox="0 0 16 16" aria-hidden="true">
<path d="M4 2v12l10-6z"/></svg><svg class="pause" viewBox="0 0 16 16" aria-hidden="true">
<path d="M3 2h4v12H3zM9 2h4v12H9z"/></svg></button>
<div class="track">@ticks@<input type="range" min="0" max="@steps@" value="@steps@" aria-label="Step"></div>
</div>
<output aria-live="polite"></output>
<div class="legend">
<span><span class="given">given</span></span>
<span class="scale">written first <span class="bar" aria-hidden="true"><s style="--t:0"></s><s style="--t:.14"></s>
<s style="--t:.29"></s><s style="--t:.43"></s><s style="--t:.57"></s><s style="--t:.71"></s><s style="--t:.86"></s>
<s style="--t:1"></s></span> last</span>
@legend@
</div>
</main>
<script>
const text = document.querySelector("#text"), words = [...text.querySelectorAll("[data-s]")];
const strikes = new Map([...document.querySelectorAll(".track .tick")].map(tick => [+tick.dataset.at, tick.title]));
const player = document.querySelector(".player"), slider = document.querySelector("input");
const button = document.querySelector("button"), output = document.querySelector("output");
const last = +slider.max;
let timer = 0;

function show(step) {
  const fresh = [];
  for (const word of words) {
    const at = +word.dataset.s;
    word.classList.toggle("off", at > step);
    word.classList.toggle("new", at === step && step < last);
    if (at === step) fresh.push(word.textContent.trim());
  }
  text.classList.toggle("growing", step < last);
  slider.value = step;
  const quoted = fresh.map(word => `\\u201c${word}\\u201d`).join(", ");
  output.textContent = step ? `step ${step} of ${last}: ${quoted}` : "given text";
  slider.setAttribute("aria-valuetext", output.textContent);
  if (strikes.has(step)) {
    const hit = document.createElement("span");
    hit.className = "hit";
    hit.textContent = ` \\u00b7 ${strikes.get(step)}`;
    output.append(hit);
  }
}

function stop() {
  clearInterval(timer);
  timer = 0;
  button.classList.remove("playing");
  button.setAttribute("aria-pressed", "false");
  output.setAttribute("aria-live", "polite");
}

function play() {
  if (+slider.value === last) show(0);
  button.classList.add("playing");
  button.setAttribute("aria-pressed", "true");
  // a screen reader should not speak every step of the replay
  output.setAttribute("aria-live", "off");
  timer = setInterval(() => {
    if (+slider.value >= last) stop();
    else show(+slider.value + 1);
  }, Math.max(60, Math.min(500, 12000 / last)));
}

if (last) {
  player.hidden = false;
  // the page keeps its height while the text grows
  text.style.minHeight = `${text.offsetHeight}px`;
  button.addEventListener("click", () => timer ? stop() : play());
  slider.addEventListener("input", () => { stop(); show(+slider.value); });
  for (const word of words) word.addEventListener("click", () => { stop(); show(+word.dataset.s); });
  show(+(new URLSearchParams(location.search).get("step") ?? last));
}
</script>
</body>
</html>
"""


__all__ = ["InsertionTrace"]
