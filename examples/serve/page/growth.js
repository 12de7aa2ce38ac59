// The text as it grows: tokens coloured by step, one step shown, a run of tokens picked.

export class Growth {
  constructor(box, changed) {
    this.box = box;
    this.changed = changed;
    this.tokens = [];
    this.shown = 0;
    this.anchor = this.focus = -1;
    box.addEventListener("click", (event) => this.#clicked(event));
    box.addEventListener("keydown", (event) => this.#pressed(event));
  }

  get steps() {
    return this.tokens.reduce((most, token) => Math.max(most, token.step), 0);
  }

  // indices of the first and last picked token, null if none is
  get picked() {
    if (this.anchor < 0) return null;
    return [Math.min(this.anchor, this.focus), Math.max(this.anchor, this.focus)];
  }

  set(tokens) {
    this.tokens = tokens;
    this.shown = this.steps;
    this.pick(-1, -1);
  }

  insert(token, place) {
    this.tokens.splice(place, 0, token);
    if (this.anchor >= place) this.anchor += 1;
    if (this.focus >= place) this.focus += 1;
    this.show(token.step);
  }

  show(step) {
    this.shown = Math.max(0, Math.min(step, this.steps));
    const picked = this.picked;
    if (picked && this.#hidden(picked[0], picked[1])) this.anchor = this.focus = -1;
    this.#draw();
  }

  pick(anchor, focus) {
    this.anchor = anchor;
    this.focus = focus;
    this.#draw();
  }

  // widen what is picked to the next token that is shown
  widen(direction) {
    const [first, last] = this.picked;
    const next = this.#neighbour(direction < 0 ? first : last, direction);
    if (next >= 0) this.pick(direction < 0 ? last : first, next);
  }

  #hidden(first, last) {
    return this.tokens.slice(first, last + 1).some((token) => token.step > this.shown);
  }

  #neighbour(index, direction) {
    let next = index + direction;
    while (next >= 0 && next < this.tokens.length && this.tokens[next].step > this.shown) next += direction;
    return next < this.tokens.length ? next : -1;
  }

  #draw() {
    const hadFocus = this.box.contains(document.activeElement);
    const last = Math.max(this.steps - 1, 1);
    const picked = this.picked;
    const spans = [];
    this.tokens.forEach((token, index) => {
      if (token.step > this.shown) return;
      const span = document.createElement("span");
      // the space of a word stands outside its colour, and text begins without one
      const text = spans.length ? token.text : token.text.replace(/^ /, "");
      const [, space, word] = text.match(/^( (?=\S)|)(.*)$/s);
      span.textContent = word;
      if (space) spans.push(space);
      span.dataset.index = index;
      span.setAttribute("role", "button");
      span.tabIndex = index === this.focus || (this.focus < 0 && !spans.length) ? 0 : -1;
      span.className = token.step ? "written" : "given";
      if (token.step) {
        span.style.setProperty("--t", (token.step - 1) / last);
        span.title = `step ${token.step}`;
        span.classList.toggle("new", token.step === this.shown);
      }
      const isPicked = picked !== null && index >= picked[0] && index <= picked[1];
      span.classList.toggle("picked", isPicked);
      span.setAttribute("aria-pressed", isPicked);
      spans.push(span);
    });
    this.box.replaceChildren(...spans);
    if (hadFocus) this.box.querySelector('[tabindex="0"]')?.focus();
    this.changed();
  }

  #clicked(event) {
    const span = event.target.closest("[data-index]");
    if (!span) return;
    const index = Number(span.dataset.index);
    this.pick(event.shiftKey && this.anchor >= 0 ? this.anchor : index, index);
    this.box.querySelector(`[data-index="${index}"]`).focus();
  }

  #pressed(event) {
    const span = event.target.closest("[data-index]");
    if (!span || event.altKey || event.ctrlKey || event.metaKey) return;
    const index = Number(span.dataset.index);
    const direction = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (direction) {
      const next = this.#neighbour(index, direction);
      if (next >= 0) this.pick(event.shiftKey && this.anchor >= 0 ? this.anchor : next, next);
    } else if (event.key === "Enter" || event.key === " ") {
      this.pick(index, index);
    } else {
      return;
    }
    event.preventDefault();
  }
}
