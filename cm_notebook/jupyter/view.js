// The run's view in the page: shows what the kernel says, tells it what a person did, decides nothing. The messages
// stand in view.py. HTML comes from Python, which made it safe; what is being written becomes text nodes. "connecting"
// (the snapshot is seen) until the kernel answered `hello`, then "live"; "silent": not in 5 s; "gone": there is none.

const SILENT_MS = 5000;
const DEAD_MS = 500; // a new bar takes no click meant for what stood there before
const PIECE = 4000; // characters of growing text laid out anew each time
const KEPT = 8; // such pieces that stay of an endless text
const TABS = { output: "Output", diff: "Diff", prompt: "Prompt", log: "Log" };

const unique = () => `cm${Math.random().toString(36).slice(2)}`;

function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined) node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

// What has the focus inside of a node.
const focused = node => node.contains(document.activeElement) && document.activeElement;
const STAY = { preventScroll: true };

// Only what a person did counts.
const byHand = handler => event => { if (event.isTrusted) handler(event); };
// Switched off by ARIA alone: a disabled one loses the focus, and keys go to the notebook.
const button = (text, attributes, handler) => {
  const node = make("button", { type: "button", ...attributes }, text);
  node.onclick = byHand(() => { if (node.ariaDisabled !== "true") handler(); });
  return node;
};
const keycap = key => make("kbd", { "aria-hidden": true }, key);
const put = (node, html) => { if (node.cmHtml !== html) { node.cmHtml = html; node.innerHTML = html; } };

// A text while it is written: formatted blocks, then growing plain pieces.
class Text {
  constructor() { this.node = make("div", {}, this.blocks = make("div"), this.rest = make("div")); }
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
    if (!this.left) this.rest.prepend(this.left = make("div", { class: "cm-small" }, "… left out until it is finished …"));
    this.left.nextSibling.remove();
  }
}

class Card {
  constructor(view, key) {
    this.view = view; this.key = key; this.record = {}; this.tab = "output"; this.attempt = 0; this.shown = null;
    this.node = make("li", { class: "cm-card" });
    this.flat = make("div");
    this.summary = make("summary");
    this.summary.onclick = byHand(() => { this.touched = true; });
    this.tools = make("div", { class: "cm-tools" });
    const body = this.body = make("div", { class: "cm-body", id: unique(), tabindex: 0 });
    body.onscroll = () => { this.follow = body.scrollHeight - body.scrollTop - body.clientHeight < 40; };
    this.details = make("details", {}, this.summary, this.tools, body);
    this.details.ontoggle = () => this.fill();
    this.follow = true;
  }

  update(record) {
    const before = this.record;
    this.record = record;
    if (record.caption !== undefined) { this.node.className = "cm-small cm-caption"; this.node.textContent = record.caption || "—"; return; }
    this.node.style.borderLeft = `3px ${record.stale ? "dashed" : "solid"} ${record.colour}`;
    if (record.step) this.node.dataset.step = record.step;
    const main = record.body ? this.details : this.flat;
    if (this.node.firstChild !== main) this.node.replaceChildren(main);
    this.line(record.summary);
    if (record.last !== before.last) { this.attempt = 0; this.tab = "output"; this.touched = false; this.follow = true; }
    if (record.open !== before.open && !this.touched) this.details.open = record.open;
    const drawn = JSON.stringify([record.attempts, record.again]);
    if (drawn !== this.drawn) { this.drawn = drawn; this.drawTools(); }
    this.fill();
  }

  line(html) { put(this.record.body ? this.summary : this.flat, html); }
  get number() { return this.attempt || this.record.last; }

  drawTools() {
    const { attempts, step, again } = this.record, at = focused(this.tools)?.dataset?.tab;
    this.tools.replaceChildren();
    if (!attempts) return;
    this.body.role = "tabpanel";
    this.body.ariaLabel = `${step}, attempt ${this.number}: ${TABS[this.tab]}`;
    if (attempts.length > 1) {
      const items = attempts.map(one => [one.number, `${one.number} ${one.word}`, one.hint]);
      this.tools.append("Attempt", this.tabs("attempt", `Attempts of ${step}`, items, this.number));
    }
    const kinds = Object.entries(TABS).filter(([kind]) => kind === "output" || attempts.length > (kind === "diff"));
    if (kinds.length > 1) this.tools.append(this.tabs("tab", `What to show of ${step}`, kinds, this.tab));
    if (at) this.tools.querySelector(`[data-tab=${at}][tabindex="0"]`)?.focus();
    if (again) this.tools.append(button("Run from here", { title: `%cm run --from ${step}` }, () => this.view.tell({ do: "rerun", step })));
  }

  // Tab reaches the chosen one, the arrow keys the others.
  tabs(what, label, items, chosen) {
    const row = make("div", { class: "cm-tabs", role: "tablist", "aria-label": label });
    for (const [key, text, hint] of items) {
      const on = key === chosen;
      row.append(button(text, { role: "tab", "aria-selected": on, "aria-controls": this.body.id, tabindex: on ? 0 : -1, title: hint, "data-tab": what }, () => this.pick(what, key)));
    }
    row.onkeydown = ({ key, target }) => {
      const by = { ArrowRight: 1, ArrowLeft: -1 }[key], at = [...row.children].indexOf(target);
      if (by) this.pick(what, items[(at + by + items.length) % items.length][0]);
    };
    return row;
  }

  pick(what, key) {
    this.details.open = true; this[what] = key; this.shown = null; this.follow = true;
    this.drawTools();
    this.fill();
  }

  // Changes the body; a focus inside stays there.
  show(change) {
    const inside = focused(this.body);
    change();
    if (inside) this.body.focus(STAY);
  }

  // Shows what belongs in the body, or asks for it.
  fill() {
    const { record } = this;
    if (!this.details.open || !record.body || !this.view.live) return;
    const text = this.view.texts.get(this.key);
    if (text && this.tab === "output" && this.number === record.writing) {
      if (this.body.firstChild !== text.node) this.show(() => this.body.replaceChildren(text.node));
      this.shown = null;
      return;
    }
    const wanted = `${this.tab} ${this.number} ${record.rev}`;
    if (wanted === this.shown) return;
    this.shown = wanted;
    const ask = record.steps ? { want: this.key, tab: "group", steps: record.steps } : { want: this.key, attempt: this.number, tab: this.tab };
    this.view.ask(ask, answer => { if (this.shown === wanted) { this.show(() => { this.body.innerHTML = answer.html; }); this.stick(); } });
  }

  stick() { if (this.follow && this.record.writing > 0) this.body.scrollTop = this.body.scrollHeight; }
}

class Bar {
  constructor(view, record) {
    this.view = view; this.record = record; this.busy = false; this.young = true;
    const id = unique();
    this.node = make("div", { class: "cm-bar", role: "group", tabindex: -1, "aria-labelledby": id }, this.words = make("div", { id }),
      this.buttons = make("div", { class: "cm-buttons" }), this.more = make("div", { class: "cm-ask", hidden: "" }), this.error = make("div", { class: "cm-note", hidden: "" }));
    setTimeout(() => { this.young = false; this.enable(); }, DEAD_MS);
    this.update(record);
    const open = record.buttons.find(one => one.at_once);
    if (open) this.open(open, false); // takes no focus
  }

  update(record) {
    const drawn = JSON.stringify(record);
    if (this.drawn === drawn) return;
    this.drawn = drawn;
    this.record = record;
    put(this.words, record.words);
    const code = make("code"), same = make("span", { class: "cm-small" }, "Same as running ", code);
    const say = one => { code.textContent = one.magic; }, at = [...this.buttons.children].indexOf(document.activeElement);
    this.buttons.replaceChildren(...record.buttons.map((one, index) => {
      const look = index === 0 && !one.ask ? "cm-go" : one.action === "reject" ? "cm-no" : "";
      const key = this.view.head.shortcuts ? one.key : null;
      const node = button(one.text, { class: look, "aria-keyshortcuts": key }, () => this.press(one));
      if (key) node.append(keycap(key));
      node.onmouseenter = node.onfocus = () => say(one);
      return node;
    }), same);
    say(record.buttons[0]);
    this.buttons.children[at]?.focus();
    this.enable();
  }

  get asks() { return this.view.live && !this.busy; }
  get ready() { return this.asks && !this.young; }
  enable() {
    this.node.classList.toggle("cm-busy", this.busy);
    for (const node of this.node.querySelectorAll("button")) node.ariaDisabled = !this.ready;
  }

  press(one) {
    if (one.ask || one.sure) { if (this.asks) this.open(one); } // this decides nothing yet
    else if (this.ready) this.decide(one);
  }

  // Asks for words, an edited text, or whether it is meant.
  open(one, focus = true) {
    this.opened = one;
    const back = button("Back", {}, () => this.close());
    const send = button(one.send, { class: one.sure || one.action === "reject" ? "cm-no" : "cm-go" }, () => this.send(one));
    if (one.ask && this.view.head.shortcuts) send.append(keycap("Ctrl+↵"));
    this.field = null;
    this.more.replaceChildren();
    if (one.ask) {
      const id = unique();
      this.field = make("textarea", { id, rows: 3, class: one.ask === "feedback" ? "" : "cm-text" });
      this.more.append(make("label", { for: id }, one.label), this.field);
      if (one.ask !== "feedback") {
        this.field.disabled = true; // until the text is there
        this.view.ask({ want: this.record.path, attempt: this.record.attempt, tab: `edit-${one.ask}` }, answer => {
          this.field.value = answer.text; this.field.disabled = false; if (focus) this.field.focus(); });
      }
    } else this.more.append(make("div", {}, one.sure));
    this.more.append(make("div", { class: "cm-buttons" }, send, ...(one.at_once ? [] : [back])));
    this.more.hidden = false;
    this.buttons.hidden = Boolean(one.at_once || one.sure);
    this.say("");
    this.enable();
    if (focus) (this.field ?? back).focus();
  }

  close() {
    const at = this.record.buttons.indexOf(this.opened);
    this.opened = null;
    this.more.hidden = true; this.buttons.hidden = false; this.say("");
    (this.buttons.children[at] ?? this.node).focus();
  }

  send(one) {
    if (!this.ready) return;
    const words = this.field?.value;
    if (one.ask && !words.trim()) {
      this.say(one.empty ?? "Nothing to send yet.");
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
    this.view.tell({ decide: this.record.id, digest: this.record.digest, action: one.action, ...one.more, ...words });
    setTimeout(() => { if (this.busy && this.node.isConnected && this.view.live) this.say("Sent. The kernel is busy; it answers when it can."); }, 1500);
  }

  refused(words) { this.busy = false; this.say(words); this.enable(); }
  say(words) { this.view.say(this.error, words); }
}

class View {
  constructor(model, host) {
    this.model = model; this.page = unique(); this.state = "connecting"; this.number = null; this.sent = 0;
    this.cards = new Map(); this.bars = new Map(); this.texts = new Map(); this.asked = new Map();
    this.head = model.get("head");
    this.style = make("style");
    this.build();
    host.append(this.style, this.root);
    this.handlers = { "msg:custom": message => this.told(message), comm_live_update: () => { if (!model.comm_live) this.lose("gone"); } };
    for (const name of ["head", "graph", "cards", "gates", "final"]) this.handlers[`change:${name}`] = () => this.soon();
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

  ask(question, answer) { this.asked.set(this.sent + 1, answer); this.tell({ ...question, ticket: this.sent + 1 }); }

  hello() {
    this.number = null;
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.lose("silent"), SILENT_MS);
    this.tell({ hello: true });
  }

  told(message) {
    const { kind, number, text, ticket } = message, mine = message.page === this.page;
    if (kind === "all") { if (mine) this.begin(message); return; }
    if (this.number === null) return; // what comes now is in the answer to hello
    if (number !== this.number + (kind === "mark" ? 0 : 1)) { if (number > this.number) this.hello(); return; }
    this.number = number;
    if (kind === "live") for (const piece of message.pieces) this.piece(...piece);
    if (kind === "body" && mine) { this.asked.get(ticket)?.(message); this.asked.delete(ticket); }
    if (kind === "said" && mine) { const bar = this.bars.get(message.gate); if (bar) bar.refused(text); else this.note(text); }
  }

  begin({ number, texts }) {
    clearTimeout(this.timer);
    this.number = number; this.state = "live";
    this.asked.clear(); this.texts.clear();
    for (const [path, [html, rest]] of Object.entries(texts)) { const text = new Text(); text.all(html, rest); this.texts.set(path, text); }
    for (const card of this.cards.values()) card.shown = null;
    const place = `[data-cm-static="${this.model.get("place")}"]`;
    this.style.textContent = `${place},.jp-OutputArea-child:has(${place}){display:none!important}`;
    this.note("");
    this.draw();
  }

  piece(kind, path, one, two) {
    if (kind === "words" || kind === "said") { put(this[kind], one); return; }
    const card = this.cards.get(path);
    if (kind === "line") { card?.line(one); return; }
    let text = this.texts.get(path);
    if (kind === "start" || !text) { this.texts.set(path, text = new Text()); card?.fill(); }
    if (kind === "delta") text.add(one);
    if (kind === "block") text.block(one, two);
    card?.stick();
  }

  lose(state) {
    if (this.state === "gone" || this.model.get("final")) return;
    clearTimeout(this.timer);
    this.number = null; this.state = state;
    if (!this.drawn) this.style.textContent = ""; // the snapshot has all there is to see
    this.root.hidden = false;
    this.note(this.head.words_for[state]);
    this.enable();
  }

  enable() {
    this.root.classList.toggle("cm-live", this.live);
    for (const node of [this.stop, this.modeButton, this.goOn]) node.ariaDisabled = !this.live;
    for (const bar of this.bars.values()) bar.enable();
  }

  // -- showing

  build() {
    const part = (name, className, tag = "div") => this[name] = make(tag, { class: className });
    this.stop = button("Stop", {}, () => this.tell({ do: "stop" }));
    this.goOn = button("Go on", {}, () => this.tell({ do: "unpause" }));
    this.modeButton = button("", { "aria-haspopup": "menu", "aria-expanded": false }, () => this.openMenu(this.menu.hidden));
    this.menu = make("div", { class: "cm-menu", role: "menu", "aria-label": "Mode", hidden: "" });
    this.modes = make("span", { class: "cm-end" }, this.modeButton, this.menu);
    this.status = make("div", { class: "cm-status", role: "status", "aria-live": "polite" });
    this.inside = make("div", { hidden: "" }, part("top", "cm-head"), part("source", "cm-small"), part("sure", "cm-ask"), part("graph", "cm-graph"),
      part("list", "cm-list", "ol"), part("gates"), part("said", "cm-said cm-small"), part("foot", "cm-head cm-small"));
    this.root = make("section", { class: "cm-run", role: "region", tabindex: -1, hidden: "", style: this.head.frame, "aria-label": this.head.label, "data-lm-suppress-shortcuts": "true" },
      this.inside, part("error", "cm-note"), part("help", "cm-help"), this.status);
    this.sure.hidden = this.error.hidden = this.help.hidden = true;
    put(this.help, this.head.help);
    this.top.append(part("title", "cm-name", "span"), part("pill", null, "span"), part("words", null, "span"), this.modes);
    this.pill.after(this.stop, this.goOn);
    if (this.head.place) this.foot.append(part("placed", null, "span"), this.stop, this.goOn, this.modes);
    this.top.hidden = Boolean(this.placed); this.foot.hidden = !this.placed;
    this.root.onkeydown = event => this.key(event);
    this.graph.onclick = byHand(event => this.visit(event.target.closest("[data-step]")));
  }

  // Several traits change at once; they are drawn together.
  soon() {
    if (this.due) return;
    this.due = true;
    queueMicrotask(() => { this.due = false; this.draw(); });
  }

  draw() {
    if (!this.live) return;
    const { model } = this, head = this.head = model.get("head"), final = model.get("final");
    const before = focused(this.root);
    this.drawn = true;
    this.inside.hidden = false; this.root.hidden = Boolean(final);
    // Over, and the saved view cannot take the widget's place here.
    if (final) { this.end ??= make("div"); put(this.end, final); this.root.after(this.end); } else this.end?.remove();
    for (const name of ["title", "pill", "words", "source", "said"]) put(this[name], head[name]);
    if (this.placed) put(this.placed, head.place);
    this.stop.hidden = head.stops; this.goOn.hidden = !head.paused; this.modes.hidden = head.locked;
    this.modeButton.textContent = `mode: ${head.mode} ▾`;
    const node = focused(this.graph)?.dataset?.step;
    put(this.graph, model.get("graph"));
    if (node) this.graph.querySelector(`[data-step="${CSS.escape(node)}"]`)?.focus(STAY);
    this.match(this.cards, this.list, model.get("cards"), "key", record => new Card(this, record.key));
    this.match(this.bars, this.gates, model.get("gates"), "id", record => { this.note(""); return new Bar(this, record); });
    this.source.hidden = !head.source || this.top.hidden;
    this.said.hidden = this.bars.size > 0 || this.top.hidden;
    this.enable();
    this.speak(head.spoken);
    // What is gone or hidden must not give the keys away.
    if (before && !focused(this.root)?.getClientRects?.().length) this.root.focus(STAY);
  }

  // Makes the things in `node` those of the records; what stays keeps focus and place.
  match(things, node, records, name, create) {
    const kept = new Set(records.map(record => record[name]));
    for (const [key, thing] of things) if (!kept.has(key)) { thing.node.remove(); things.delete(key); }
    let place = node.firstChild;
    for (const record of records) {
      let thing = things.get(record[name]);
      if (!thing) things.set(record[name], thing = create(record));
      if (thing.node === place) place = place.nextSibling; else node.insertBefore(thing.node, place);
      thing.update(record);
    }
  }

  note(words) { this.say(this.error, words); }
  say(node, words) { node.textContent = words; node.hidden = !words; if (words) this.speak(words); }
  speak(words) { if (this.status.textContent !== words) this.status.textContent = words; }

  visit(node) {
    const step = node?.dataset.step;
    const card = step && [...this.cards.values()].find(one => one.record.step === step || one.record.steps?.includes(step));
    if (!card) return;
    card.details.open = card.touched = true;
    card.node.scrollIntoView({ block: "nearest" });
    card.summary.focus(STAY);
  }

  // -- mode

  openMenu(open) {
    this.modeButton.ariaExpanded = open;
    this.menu.hidden = !open;
    if (!open) return;
    const item = (text, attributes, handler) => button(text, { tabindex: -1, ...attributes }, () => { this.closeMenu(); handler(); });
    const { mode: present, modes, paused } = this.head;
    const items = modes.map(([mode, what, sure]) => {
      const on = mode === present;
      const node = item(`${on ? "✓" : "\u2003"} ${mode}`, { role: "menuitemradio", "aria-checked": on }, () => { if (!on) this.choose(mode, sure); });
      node.append(make("small", {}, what));
      return node;
    });
    if (!paused) items.push(item("\u2003 Pause when this step is done", { role: "menuitem" }, () => this.tell({ do: "pause" })));
    this.menu.replaceChildren(...items);
    this.menu.onkeydown = event => {
      const by = { ArrowDown: 1, ArrowUp: -1 }[event.key];
      if (by) { event.preventDefault(); items[(items.indexOf(event.target) + by + items.length) % items.length].focus(); }
      if (event.key === "Escape" || event.key === "Tab") { event.stopPropagation(); this.closeMenu(); }
    };
    this.menu.onfocusout = event => { if (!this.modes.contains(event.relatedTarget)) this.openMenu(false); };
    (items.find(node => node.ariaChecked === "true") ?? items[0]).focus();
  }

  closeMenu() { this.openMenu(false); this.modeButton.focus(); }

  choose(mode, sure) {
    const go = () => this.tell({ do: "mode", mode }), no = button("Back", {}, () => this.unsure());
    if (!sure) { go(); return; }
    this.sure.replaceChildren(sure, make("div", { class: "cm-buttons" }, button(`Switch to ${mode}`, { class: "cm-no" }, () => { this.unsure(); go(); }), no));
    this.sure.hidden = false;
    no.focus();
  }

  unsure() { this.sure.hidden = true; this.modeButton.focus(); }

  // -- keys

  key(event) {
    event.stopPropagation(); // bare letters would act on the notebook's cells
    if (!event.isTrusted) return;
    const { target, key } = event;
    const bars = [...this.bars.values()], bar = bars.find(one => one.node.contains(target)) ?? bars[0];
    const node = target.closest("svg [data-step]");
    let act;
    if (key === "Escape") act = () => this.leave(bar);
    else if (target.closest("textarea")) act = key === "Enter" && (event.ctrlKey || event.metaKey) && bar?.opened && (() => bar.send(bar.opened));
    else if (node && (key === "Enter" || key === " ")) act = () => this.visit(node);
    else if (this.head.shortcuts && !(event.repeat || event.ctrlKey || event.metaKey || event.altKey || target.closest(".cm-menu"))) act = this.actions(target, bar)[key.toLowerCase()];
    if (!act) return;
    event.preventDefault();
    act();
  }

  actions(target, bar) {
    const cards = [...this.cards.values()].filter(card => card.record.body);
    const at = cards.findIndex(card => card.node.contains(target)), card = cards[at] ?? cards.findLast(one => one.details.open);
    const move = to => () => cards[Math.min(cards.length - 1, Math.max(0, to))]?.summary.focus();
    const attempt = by => () => {
      const all = card?.record.attempts?.map(one => one.number) ?? [], to = all[all.indexOf(card?.number) + by];
      if (to) card.pick("attempt", to);
    };
    const press = key => () => { const one = bar?.record.buttons.find(other => other.key === key); if (one && !bar.opened) bar.press(one); };
    const inBar = bar?.node.contains(target);
    return {
      a: inBar && press("A"), s: inBar && press("S"), r: press("R"), e: press("E"),
      g: () => bar?.buttons.firstChild.focus(),
      j: move(at + 1), k: move(at < 0 ? cards.length : at - 1), "[": attempt(-1), "]": attempt(1),
      d: () => { if (card?.record.attempts?.length > 1) card.pick("tab", card.tab === "diff" ? "output" : "diff"); },
      "?": () => { this.help.hidden = !this.help.hidden; },
    };
  }

  leave(bar) {
    if (!this.sure.hidden) { this.unsure(); return; }
    if (bar?.opened && !bar.opened.at_once && focused(bar.node)) { bar.close(); return; }
    document.activeElement.blur();
    (this.root.closest(".jp-Cell[tabindex]") ?? this.root.closest(".jp-Notebook"))?.focus(STAY);
  }
}

export default {
  render({ model, el }) {
    const view = new View(model, el);
    return () => view.close();
  },
};
