// The run's view in the page. It shows what the kernel says and tells the kernel what a person did; it decides nothing
// and knows nothing that it was not told. See view.py for the messages. HTML comes from Python, which has made it safe;
// what is being written is put into text nodes. Nothing is loaded from elsewhere.
//
// A view is "connecting" until the kernel has answered its `hello` (nothing is shown: the snapshot below is), then
// "live"; "silent" when no answer came in 5 s, "gone" when the kernel is. Buttons work only while it is live.

const SILENT_MS = 5000; // no answer to hello: leave it to the snapshot
const DEAD_MS = 500; // a bar that has just appeared takes no click that was meant for what was there before
const PIECE = 4000; // characters of plain text in one element: the browser lays out no more than that anew
const KEPT = 8; // such pieces that stay while an endless text is written

const HELP = [["A", "approve (in the bar)"], ["S", "skip (in the bar)"], ["R", "reject, with words"], ["E", "edit"],
  ["Ctrl+Enter", "send the words"], ["G", "to the bar"], ["J", "next step"], ["K", "step before"],
  ["[", "attempt before"], ["]", "next attempt"], ["D", "what changed"], ["Esc", "back to the cell"], ["?", "this list"]];
const MODES = { "step-by-step": "pause after every step", gates: "pause where a step asks for it", unattended: "do not pause; what opens is approved" };
const TABS = { output: "Output", diff: "Diff", prompt: "Prompt", log: "Log" };

let counted = 0;
const unique = () => `cm${Date.now().toString(36)}${(counted++).toString(36)}`;

function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "on") for (const [type, handler] of Object.entries(value)) node.addEventListener(type, handler);
    else if (name === "html") node.innerHTML = value;
    else if (value !== null && value !== undefined) node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

// Only what a person did counts: text of an agent that found a way to run could press buttons too.
const byHand = handler => event => { if (event.isTrusted) handler(event); };
const button = (text, attributes, handler) => make("button", { type: "button", ...attributes, on: { click: byHand(handler) } }, text);
const keycap = key => make("kbd", { "aria-hidden": "true" }, key);
const put = (node, html) => { if (node.cmHtml !== html) { node.cmHtml = html; node.innerHTML = html; } };

// A row of tabs: one of them can be reached with Tab, the others with the arrow keys.
function tabs(label, items, chosen, panel, choose) {
  const row = make("div", { class: "cm-tabs", role: "tablist", "aria-label": label });
  for (const [key, text, hint] of items) {
    const on = key === chosen;
    row.append(button(text, { role: "tab", "aria-selected": on, "aria-controls": panel, tabindex: on ? 0 : -1, title: hint, "data-key": key }, () => choose(key)));
  }
  row.addEventListener("keydown", event => {
    const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key], at = [...row.children].indexOf(event.target);
    if (!by || at < 0) return;
    event.preventDefault();
    choose(items[(at + by + items.length) % items.length][0], true);
  });
  return row;
}

// A text while it is written: formatted blocks, then plain pieces that grow at their end.
class Text {
  constructor() { this.node = make("div"); this.blocks = make("div"); this.rest = make("div"); this.node.append(this.blocks, this.rest); }
  all(html, rest) { this.blocks.innerHTML = html; this.plain(rest); }
  block(html, rest) { this.blocks.insertAdjacentHTML("beforeend", html); this.plain(rest); }
  plain(rest) { this.rest.replaceChildren(); this.left = this.piece = null; if (rest) this.add(rest); }
  add(text) {
    for (let start = 0; start < text.length;) {
      if (!this.piece || this.piece.length > PIECE) {
        const cut = this.piece ? text.indexOf("\n", start) + 1 : 0; // a new element begins a new line
        if (cut > 0) { this.piece.appendData(text.slice(start, cut - 1)); start = cut; }
        if (!this.piece || cut > 0 || this.piece.length > 4 * PIECE) this.begin();
      }
      const end = Math.min(text.length, start + PIECE);
      this.piece.appendData(text.slice(start, end));
      start = end;
    }
  }
  begin() {
    this.piece = document.createTextNode("");
    this.rest.append(make("div", { class: "cm-piece" }, this.piece));
    if (this.rest.children.length - (this.left ? 1 : 0) <= KEPT) return;
    if (!this.left) this.rest.prepend(this.left = make("div", { class: "cm-small" }, "… what was written before is left out until it is finished …"));
    this.left.nextSibling.remove();
  }
}

class Card {
  constructor(view, key) {
    this.view = view; this.key = key; this.record = {}; this.tab = "output"; this.attempt = 0; this.shown = null;
    this.node = make("li", { class: "cm-card" });
    this.summary = make("summary");
    this.tools = make("div", { class: "cm-tools" });
    this.body = make("div", { class: "cm-body", id: unique(), tabindex: 0 });
    this.details = make("details", { on: { toggle: () => this.fill() } }, this.summary, this.tools, this.body);
    this.flat = make("div");
    this.summary.addEventListener("click", byHand(() => { this.touched = true; }));
    this.body.addEventListener("scroll", () => { this.follow = this.body.scrollHeight - this.body.scrollTop - this.body.clientHeight < 40; });
    this.follow = true;
  }

  update(record) {
    const before = this.record;
    this.record = record;
    this.node.style.borderLeft = `3px ${record.stale ? "dashed" : "solid"} ${record.colour}`;
    if (record.caption !== undefined) { this.node.className = "cm-small"; this.node.style = "margin:10px 0 2px"; this.node.textContent = record.caption || "—"; return; }
    if (record.step) this.node.dataset.step = record.step;
    const main = record.body ? this.details : this.flat;
    if (this.node.firstChild !== main) this.node.replaceChildren(main);
    put(record.body ? this.summary : this.flat, record.summary);
    const last = record.attempts?.at(-1)?.number ?? 0;
    if (last !== (before.attempts?.at(-1)?.number ?? 0)) { this.attempt = 0; this.tab = "output"; this.touched = false; this.follow = true; }
    if (record.open !== before.open && !this.touched && record.open !== undefined) this.details.open = record.open;
    const drawn = JSON.stringify([record.attempts, record.writing, record.again]);
    if (drawn !== this.drawn) { this.drawn = drawn; this.drawTools(); }
    this.fill();
  }

  line(html) { put(this.record.body ? this.summary : this.flat, html); }
  get number() { return this.attempt || (this.record.attempts?.at(-1)?.number ?? 0); }

  drawTools(focus) {
    const { attempts, step, again } = this.record;
    this.tools.replaceChildren();
    if (!attempts) return;
    const label = `${step}, attempt ${this.number}`;
    this.body.setAttribute("role", "tabpanel");
    this.body.setAttribute("aria-label", `${label}: ${TABS[this.tab]}`);
    const go = (name, value, byKey) => { this[name] = value; this.shown = null; this.follow = true; this.drawTools(byKey && name); this.fill(); };
    if (attempts.length > 1) {
      const items = attempts.map(one => [one.number, one.word ? `${one.number} ${one.word}` : `${one.number}`, one.hint]);
      this.tools.append(make("span", { class: "cm-small" }, "Attempt"), tabs(`Attempts of ${step}`, items, this.number, this.body.id, (n, byKey) => go("attempt", n, byKey)));
    }
    const kinds = Object.keys(TABS).filter(kind => attempts.length > (kind === "diff" ? 1 : 0) || kind === "output");
    const tabRow = tabs(`What to show of ${step}`, kinds.map(kind => [kind, TABS[kind]]), this.tab, this.body.id, (kind, byKey) => go("tab", kind, byKey));
    this.tools.append(tabRow);
    if (again) this.tools.append(button("Run from here", { title: `%cm rewind ${step}` }, () => this.view.tell({ do: "rerun", step })));
    if (focus) (focus === "attempt" ? this.tools.querySelector("[role=tablist]") : tabRow).querySelector("[tabindex='0']").focus();
  }

  // Puts into the body what belongs there; asks for it when the page does not have it.
  fill() {
    const { record } = this;
    if (!this.details.open || !record.body || !this.view.live) return;
    const text = record.writing && this.tab === "output" && this.number === record.writing && this.view.texts.get(this.key);
    if (text) {
      if (this.body.firstChild !== text.node) this.body.replaceChildren(text.node);
      this.shown = null;
      return;
    }
    const wanted = `${this.tab} ${this.number} ${record.rev}`;
    if (wanted === this.shown) return;
    this.shown = wanted;
    const ask = record.steps ? { want: this.key, tab: "group", steps: record.steps } : { want: this.key, attempt: this.number, tab: this.tab };
    this.view.ask(ask, answer => { if (this.shown === wanted) { this.body.innerHTML = answer.html; this.stick(); } });
  }

  stick() { if (this.follow && this.record.writing) this.body.scrollTop = this.body.scrollHeight; }
}

class Bar {
  constructor(view, record) {
    this.view = view; this.record = record; this.busy = false; this.young = true;
    this.words = make("div", { id: unique() });
    this.buttons = make("div", { class: "cm-buttons" });
    this.more = make("div", { class: "cm-ask", hidden: "" });
    this.error = make("div", { class: "cm-error", hidden: "" });
    this.node = make("div", { class: "cm-bar", role: "group", tabindex: -1, "aria-labelledby": this.words.id }, this.words, this.buttons, this.more, this.error);
    setTimeout(() => { this.young = false; this.enable(); }, DEAD_MS);
    this.update(record);
    const open = record.buttons.find(one => one.at_once);
    if (open) this.open(open, false);
  }

  update(record) {
    if (this.drawn === JSON.stringify(record)) return;
    this.drawn = JSON.stringify(record);
    this.record = record;
    put(this.words, record.words);
    const same = make("span", { class: "cm-small" });
    const say = one => { same.replaceChildren("Same as running ", make("code", {}, one.magic)); };
    this.buttons.replaceChildren(...record.buttons.map((one, index) => {
      const look = index === 0 && !one.ask ? "cm-go" : one.action === "reject" ? "cm-no" : "";
      const node = button(one.text, { class: look }, () => this.press(one));
      if (one.key && this.view.head.shortcuts) { node.append(keycap(one.key)); node.setAttribute("aria-keyshortcuts", one.key); }
      for (const type of ["mouseenter", "focus"]) node.addEventListener(type, () => say(one));
      return node;
    }), same);
    if (record.buttons.length) say(record.buttons[0]);
    this.enable();
  }

  get ready() { return this.view.live && !this.busy && !this.young; }
  enable() {
    this.node.classList.toggle("cm-busy", this.busy);
    for (const node of this.node.querySelectorAll("button")) node.disabled = !this.ready;
  }

  press(one) {
    if (!this.ready) return;
    if (one.ask || one.sure) this.open(one);
    else this.decide(one);
  }

  // Asks for words, for an edited text, or whether it is meant.
  open(one, focus = true) {
    this.opened = one;
    const back = button("Back", {}, () => this.close());
    const send = button(one.send, { class: one.action === "reject" ? "cm-no" : "cm-go" }, () => this.send(one));
    send.append(...(one.ask && this.view.head.shortcuts ? [keycap("Ctrl+↵")] : []));
    this.more.replaceChildren();
    this.field = null;
    if (one.ask) {
      const id = unique();
      this.field = make("textarea", { id, rows: 3, class: one.ask === "feedback" ? "" : "cm-text" });
      this.more.append(make("label", { for: id }, one.label), this.field);
      if (one.ask !== "feedback") {
        this.field.disabled = true;
        this.view.ask({ want: this.record.path, attempt: this.record.attempt, tab: `edit-${one.ask}` }, answer => {
          this.field.value = answer.text; this.field.disabled = false; if (focus) this.field.focus(); });
      }
    } else this.more.append(make("div", {}, one.sure));
    const row = make("div", { class: "cm-buttons" }, send);
    if (!one.at_once) row.append(back);
    this.more.append(row);
    this.more.hidden = false;
    this.buttons.hidden = !one.at_once && !one.ask;
    this.say("");
    this.enable();
    if (focus) (this.field ?? back).focus();
  }

  close() {
    const { opened } = this;
    this.opened = null;
    this.more.hidden = true; this.buttons.hidden = false; this.say("");
    const at = this.record.buttons.indexOf(opened);
    (this.buttons.children[Math.max(0, at)] ?? this.node).focus();
  }

  send(one) {
    if (!this.ready) return;
    const words = this.field?.value;
    if (one.ask && !words.trim()) {
      this.say(one.action === "reject" ? "Say what should be different: its agent gets your words." : "There is nothing to send yet.");
      this.field.focus();
      return;
    }
    this.decide(one, one.ask ? { [one.ask]: words } : {});
  }

  decide(one, words = {}) {
    if (one.do) { this.view.tell({ do: one.do, step: this.record.step }); return; }
    this.busy = true;
    this.enable();
    this.say("");
    this.view.tell({ decide: this.record.id, digest: this.record.digest, action: one.action, count: one.count, ...words });
    this.timer = setTimeout(() => { if (this.busy && this.view.live) this.say("Sent. The kernel is busy; it answers when it can."); }, 1500);
  }

  refused(words) { this.busy = false; this.say(words); this.enable(); }
  say(words) { this.error.textContent = words; this.error.hidden = !words; if (words) this.view.speak(words); }
}

class View {
  constructor(model, host) {
    this.model = model; this.page = unique(); this.state = "connecting"; this.number = null; this.sent = 0;
    this.head = model.get("head");
    this.cards = new Map(); this.bars = new Map(); this.texts = new Map(); this.asked = new Map();
    this.style = make("style");
    this.build();
    host.append(this.style, this.root);
    this.handlers = { "msg:custom": message => this.told(message), "comm_live_update": () => { if (!model.comm_live) this.lose("gone"); } };
    for (const name of ["head", "graph", "cards", "gates"]) this.handlers[`change:${name}`] = () => this.draw();
    for (const [name, handler] of Object.entries(this.handlers)) model.on(name, handler);
    this.hello();
  }

  close() {
    clearTimeout(this.timer);
    for (const [name, handler] of Object.entries(this.handlers)) this.model.off(name, handler);
  }

  get live() { return this.state === "live"; }

  // -- to and from the kernel

  tell(message) {
    try { this.model.send({ page: this.page, seq: ++this.sent, ...message }); } catch { this.lose("gone"); }
  }

  ask(question, answer) { const ticket = this.sent + 1; this.asked.set(ticket, answer); this.tell({ ...question, ticket }); }

  hello() {
    this.number = null;
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.lose("silent"), SILENT_MS);
    this.tell({ hello: true });
  }

  told(message) {
    if (message.kind === "all") {
      if (message.page === this.page) this.begin(message);
      return;
    }
    if (this.number === null) return; // what comes now is in the answer to hello
    const expected = this.number + (message.kind === "mark" ? 0 : 1);
    if (message.number !== expected) { if (message.number > this.number) this.hello(); return; }
    this.number = message.number;
    if (message.kind === "live") for (const piece of message.pieces) this.piece(...piece);
    if (message.page !== this.page) return;
    if (message.kind === "body") { const take = this.asked.get(message.ticket); this.asked.delete(message.ticket); take?.(message); }
    if (message.kind === "said") (this.bars.get(message.gate)?.refused(message.text)) ?? this.note(message.gate && this.bars.has(message.gate) ? "" : message.text);
  }

  begin({ number, texts }) {
    clearTimeout(this.timer);
    this.number = number; this.state = "live";
    this.asked.clear(); this.texts.clear();
    for (const [path, [attempt, html, rest]] of Object.entries(texts)) { const text = new Text(); text.attempt = attempt; text.all(html, rest); this.texts.set(path, text); }
    for (const card of this.cards.values()) card.shown = null;
    const place = `[data-cm-static="${this.model.get("place")}"]`;
    this.style.textContent = `${place},.jp-OutputArea-child:has(${place}){display:none!important}`;
    this.root.hidden = false;
    this.note("");
    this.draw();
  }

  piece(kind, path, attempt, one, two) {
    if (kind === "words") { put(this.words, one); return; }
    const card = this.cards.get(path);
    if (kind === "line") { card?.line(one); return; }
    let text = this.texts.get(path);
    if (kind === "start" || !text) { text = new Text(); text.attempt = attempt; this.texts.set(path, text); card?.fill(); }
    if (kind === "delta") text.add(one);
    if (kind === "block") text.block(one, two);
    card?.stick();
  }

  lose(state) {
    if (this.state === "gone") return;
    clearTimeout(this.timer);
    const wasLive = this.state === "live" || this.state === "lost";
    this.number = null;
    this.state = state === "silent" && wasLive ? "lost" : state;
    this.root.classList.remove("cm-live");
    if (state === "silent") {
      this.note("The kernel has not answered yet. The buttons come when it does; until then run %cm approve in a cell.");
      if (!wasLive) this.style.textContent = "";
    } else this.note("Not connected. Restart the kernel and run this cell again.");
    this.root.hidden = false;
    this.root.classList.toggle("cm-bare", !wasLive);
    for (const part of this.parts) part.hidden = !wasLive;
    this.enable();
  }

  enable() {
    this.root.classList.toggle("cm-live", this.live);
    for (const node of [this.stop, this.modeButton, this.goOn]) node.disabled = !this.live;
    for (const bar of this.bars.values()) bar.enable();
  }

  // -- showing

  build() {
    this.pill = make("span"); this.words = make("span"); this.title = make("span", { class: "cm-name" });
    this.stop = button("Stop", {}, () => this.tell({ do: "stop" }));
    this.goOn = button("Go on", {}, () => this.tell({ do: "unpause" }));
    this.modeButton = button("", { "aria-haspopup": "menu", "aria-expanded": "false" }, () => this.openMenu(this.menu.hidden));
    this.menu = make("div", { class: "cm-menu", role: "menu", "aria-label": "Mode", hidden: "" });
    this.modes = make("span", { class: "cm-end" }, this.modeButton, this.menu);
    this.top = make("div", { class: "cm-head" });
    this.source = make("div", { class: "cm-small" });
    this.sure = make("div", { class: "cm-ask", hidden: "" });
    this.graph = make("div", { class: "cm-graph" });
    this.list = make("ol", { class: "cm-list" });
    this.gates = make("div");
    this.said = make("div", { class: "cm-said cm-small" });
    this.foot = make("div", { class: "cm-foot" });
    this.error = make("div", { class: "cm-error", hidden: "" });
    this.help = make("div", { class: "cm-help", hidden: "" }, ...HELP.map(([key, what]) => make("div", {}, make("kbd", {}, key), ` ${what}`)));
    this.status = make("div", { class: "cm-status", role: "status", "aria-live": "polite" });
    this.parts = [this.top, this.source, this.graph, this.list, this.gates, this.said, this.foot];
    this.root = make("section", { class: "cm-run", role: "region", tabindex: -1, hidden: "", "data-lm-suppress-shortcuts": "true" },
      this.top, this.source, this.sure, this.graph, this.list, this.gates, this.said, this.foot, this.error, this.help, this.status);
    this.root.style = this.head.frame;
    this.root.addEventListener("keydown", event => this.key(event));
    for (const type of ["keyup", "keypress"]) this.root.addEventListener(type, event => event.stopPropagation());
    this.graph.addEventListener("click", byHand(event => this.visit(event.target.closest("[data-step]"))));
  }

  draw() {
    if (!this.live) return;
    const head = this.head = this.model.get("head");
    const focused = this.root.contains(document.activeElement);
    this.root.setAttribute("aria-label", `Workflow run ${head.name}`);
    for (const part of this.parts) part.hidden = false;
    put(this.title, head.title); put(this.pill, head.pill); put(this.words, head.words);
    const over = ["completed", "stopped", "failed"].includes(head.status);
    this.stop.hidden = over; this.goOn.hidden = !head.paused || over;
    this.modeButton.textContent = `mode: ${head.mode} ▾`;
    this.modes.hidden = head.locked || over;
    const inside = head.place ? this.foot : this.top;
    if (!inside.contains(this.stop)) inside.append(...(head.place ? [make("span", { class: "cm-small", html: head.place }), this.stop, this.goOn, this.modes] : [this.title, this.pill, this.stop, this.goOn, this.words, this.modes]));
    this.top.hidden = Boolean(head.place); this.foot.hidden = !head.place;
    put(this.source, head.source); this.source.hidden = !head.source || Boolean(head.place);
    put(this.graph, this.model.get("graph")); this.graph.hidden = !this.model.get("graph");
    this.drawCards(this.model.get("cards"));
    this.drawGates(this.model.get("gates"));
    put(this.said, head.said); this.said.hidden = this.bars.size > 0 || Boolean(head.place);
    this.enable();
    this.speak(head.spoken);
    // A button that is gone must not leave the keys to the notebook.
    if (focused && !this.root.contains(document.activeElement)) this.root.focus({ preventScroll: true });
  }

  drawCards(records) {
    const kept = new Set(records.map(record => record.key));
    for (const [key, card] of this.cards) if (!kept.has(key)) { card.node.remove(); this.cards.delete(key); }
    let place = this.list.firstChild;
    for (const record of records) {
      let card = this.cards.get(record.key);
      if (!card) this.cards.set(record.key, card = new Card(this, record.key));
      if (card.node === place) place = place.nextSibling; else this.list.insertBefore(card.node, place);
      card.update(record);
    }
  }

  drawGates(records) {
    const kept = new Set(records.map(record => record.id));
    for (const [id, bar] of this.bars) if (!kept.has(id)) { clearTimeout(bar.timer); bar.node.remove(); this.bars.delete(id); }
    for (const record of records) {
      const bar = this.bars.get(record.id);
      if (bar) { bar.update(record); continue; }
      this.note("");
      const made = new Bar(this, record);
      this.bars.set(record.id, made);
      this.gates.append(made.node);
    }
  }

  note(words) { this.error.textContent = words; this.error.hidden = !words; if (words) this.speak(words); }
  speak(words) { if (this.status.textContent !== words) this.status.textContent = words; }

  visit(node) {
    if (!node) return;
    const step = node.dataset.step;
    const card = [...this.cards.values()].find(one => one.record.step === step || one.record.steps?.includes(step));
    if (!card) return;
    card.details.open = true; card.touched = true;
    const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
    card.node.scrollIntoView({ block: "nearest", behavior: still ? "auto" : "smooth" });
    (card.record.body ? card.summary : this.root).focus({ preventScroll: true });
  }

  // -- mode

  openMenu(open) {
    this.modeButton.setAttribute("aria-expanded", open);
    this.menu.hidden = !open;
    if (!open) return;
    const item = (role, text, what, on, handler) => button(`${on ? "✓" : "\u2003"} ${text}`, { role, "aria-checked": role === "menuitemradio" ? on : null, tabindex: -1 }, () => { this.openMenu(false); this.modeButton.focus(); handler(); });
    const items = Object.entries(MODES).map(([mode, what]) => {
      const node = item("menuitemradio", mode, what, mode === this.head.mode, () => this.choose(mode));
      node.append(make("small", {}, what));
      return node;
    });
    items.push(item("menuitem", this.head.paused ? "Go on" : "Pause when this step is done", "", false, () => this.tell({ do: this.head.paused ? "unpause" : "pause" })));
    this.menu.replaceChildren(...items);
    this.menu.onkeydown = event => {
      const at = items.indexOf(event.target), by = { ArrowDown: 1, ArrowUp: -1 }[event.key];
      if (by) { event.preventDefault(); items[(at + by + items.length) % items.length].focus(); }
      if (event.key === "Escape" || event.key === "Tab") { event.stopPropagation(); this.openMenu(false); this.modeButton.focus(); }
    };
    this.menu.onfocusout = event => { if (!this.modes.contains(event.relatedTarget)) this.openMenu(false); };
    (items.find(node => node.getAttribute("aria-checked") === "true") ?? items[0]).focus();
  }

  choose(mode) {
    if (mode === this.head.mode) return;
    if (mode !== "unattended") { this.tell({ do: "mode", mode }); return; }
    const back = () => { this.sure.hidden = true; this.modeButton.focus(); };
    const no = button("Back", {}, back);
    this.sure.replaceChildren(make("div", {}, "Switch to unattended? Gates that open from now on are approved without you."),
      make("div", { class: "cm-buttons" }, button("Switch to unattended", { class: "cm-no" }, () => { back(); this.tell({ do: "mode", mode }); }), no));
    this.sure.hidden = false;
    no.focus();
  }

  // -- keys

  key(event) {
    event.stopPropagation(); // bare letters would act on the notebook's cells
    const field = event.target.closest("textarea");
    const bar = [...this.bars.values()].find(one => one.node.contains(event.target)) ?? this.bars.values().next().value;
    if (event.key === "Escape") { event.preventDefault(); this.leave(bar); return; }
    if (!event.isTrusted) { event.preventDefault(); return; }
    if (field) {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); if (bar?.opened) bar.send(bar.opened); }
      return;
    }
    const node = event.target.closest("svg [data-step]");
    if (node && (event.key === "Enter" || event.key === " ")) { event.preventDefault(); this.visit(node); return; }
    if (!this.head.shortcuts || event.ctrlKey || event.metaKey || event.altKey || event.target.closest(".cm-menu")) return;
    const act = this.actions(event, bar)[event.key.length === 1 ? event.key.toLowerCase() : event.key];
    if (act) { event.preventDefault(); act(); }
  }

  actions(event, bar) {
    const cards = [...this.cards.values()].filter(card => card.record.body);
    const at = cards.findIndex(card => card.node.contains(event.target));
    const card = cards[at] ?? cards.findLast(one => one.details.open);
    const move = by => { const to = cards[at < 0 ? (by > 0 ? 0 : cards.length - 1) : Math.min(cards.length - 1, Math.max(0, at + by))]; to?.summary.focus(); };
    const attempt = by => {
      const all = card?.record.attempts?.map(one => one.number) ?? [], to = all[all.indexOf(card?.number) + by];
      if (to) { card.details.open = true; card.attempt = to; card.shown = null; card.drawTools(); card.fill(); }
    };
    const press = key => { const one = bar?.record.buttons.find(other => other.key === key); if (one && !bar.opened) bar.press(one); };
    const inBar = bar?.node.contains(event.target);
    return {
      a: inBar && (() => press("A")), s: inBar && (() => press("S")), r: () => press("R"), e: () => press("E"),
      g: () => (bar?.buttons.querySelector("button:enabled") ?? bar?.node)?.focus(),
      j: () => move(1), k: () => move(-1), "[": () => attempt(-1), "]": () => attempt(1),
      d: () => { if (card?.record.attempts?.length > 1) { card.details.open = true; card.tab = card.tab === "diff" ? "output" : "diff"; card.shown = null; card.drawTools(); card.fill(); } },
      "?": () => { this.help.hidden = !this.help.hidden; },
    };
  }

  leave(bar) {
    if (!this.sure.hidden) { this.sure.hidden = true; this.modeButton.focus(); return; }
    if (bar?.opened && !bar.opened.at_once && bar.node.contains(document.activeElement)) { bar.close(); return; }
    const cell = this.root.closest(".jp-Cell"), notebook = this.root.closest(".jp-Notebook");
    document.activeElement?.blur();
    (cell?.hasAttribute("tabindex") ? cell : notebook)?.focus({ preventScroll: true });
  }
}

export default {
  render({ model, el }) {
    const view = new View(model, el);
    return () => view.close();
  },
};
