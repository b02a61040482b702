// The run's view in the page: shows what the kernel says, tells it what a person did, decides nothing. The messages
// stand in view.py; HTML comes from there, made safe; what is being written becomes text nodes. "connecting" (the
// snapshot is seen) until the kernel answered `hello`, then "live"; "silent": not in 5 s; "gone": there is none.

const SILENT_MS = 5000;
const DEAD_MS = 500; // a new bar takes no click meant for what stood there before
const PIECE = 4000; // characters laid out anew each time
const KEPT = 8; // such pieces that stay of a long text
const HUSH_MS = 2000; // between things said aloud
// The open gates by view: all views of a page share it, though each has its own module.
const OPEN = document.cmOpen ??= (document.addEventListener("visibilitychange", entitle), new Map());

// While nobody sees the page, its title says how many decisions wait.
function entitle() {
  const { title, hidden } = document, { mark = "" } = OPEN, open = new Set([...OPEN.values()].flat()).size;
  OPEN.mark = hidden && open ? `(${open}) ` : "";
  document.title = OPEN.mark + (title.startsWith(mark) ? title.slice(mark.length) : title);
}

const unique = () => `cm${Math.random().toString(36).slice(2)}`;

function make(tag, className = "", ...children) {
  const node = document.createElement(tag);
  node.className = className;
  node.append(...children);
  return node;
}

// The nodes that HTML from Python describes; those with a name become parts of `owner`.
function parts(html, owner) {
  const root = document.createRange().createContextualFragment(html).firstChild;
  for (const node of root.querySelectorAll("[data-part]")) owner[node.dataset.part] = node;
  return root;
}

// What has the focus inside of a node.
const focused = node => node.contains(document.activeElement) && document.activeElement;
const STAY = { preventScroll: true };
const unfold = node => { for (; node; node = node.parentElement) if (node.tagName === "DETAILS") node.open = true; };

// Only what a person did counts.
const byHand = handler => event => { if (event.isTrusted) handler(event); };
const put = (node, html) => { if (node && node.cmHtml !== html) { node.cmHtml = html; node.innerHTML = html; } };

// A text while it is written: formatted blocks, then growing plain pieces.
class Text {
  constructor() { this.node = make("div", "", this.blocks = make("div"), this.rest = make("div")); }
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
    this.rest.append(make("div", "cm-piece", this.piece));
    if (this.rest.children.length <= KEPT + Boolean(this.left)) return;
    if (!this.left) this.rest.prepend(this.left = make("div", "cm-small", "… left out until it is finished …"));
    this.left.nextSibling.remove();
  }
}

class Card {
  constructor(view, key) {
    Object.assign(this, { view, key, record: {}, tab: "output", attempt: 0, follow: true });
    this.node = parts(view.page.card, this);
    this.node.card = this;
    const { body } = this;
    body.id = unique();
    body.onscroll = () => this.follow = body.scrollHeight - body.scrollTop - body.clientHeight < 40;
    this.summary.onclick = byHand(() => this.touched = true);
    this.details.ontoggle = () => this.fill();
    this.details.remove(); this.tail.remove(); // until a record wants them
  }

  update(record) {
    const before = this.record, { lane, body, caption, columns } = this.record = record;
    this.node.className = caption !== undefined ? "cm-small cm-caption" : lane ? "cm-card cm-lane" : "cm-card";
    if (caption !== undefined) { this.node.textContent = caption || "—"; return; }
    this.node.classList.toggle("cm-on", record.writing > 0 && !record.lanes);
    this.node.style.borderLeft = `3px ${record.stale ? "dashed" : "solid"} ${record.colour}`;
    if (record.step) this.node.dataset.step = record.step;
    const main = body ? this.details : this.flat;
    if (this.node.firstChild !== main) this.node.firstChild.replaceWith(main);
    if (lane) main.after(this.tail); else if (body) this.details.append(this.lanes); // what a step has called folds with it
    this.lanes.classList.toggle("cm-beside", columns > 1);
    this.lanes.hidden = !record.lanes?.length;
    this.line(record.summary);
    this.last(record.tail);
    if (record.last !== before.last) Object.assign(this, { attempt: 0, tab: "output", touched: false, follow: true });
    if (record.open !== before.open && !this.touched && (record.open || !this.read)) this.details.open = record.open;
    const at = focused(this.tools)?.dataset;
    put(this.tools, record.tools ?? "");
    this.mark();
    if (at && !focused(this.tools)) this.beside(0, at.tab ? "tab" : "attempt")?.focus();
    this.fill();
  }

  // Whether somebody reads it just now: it is not taken away then. A mouse at rest since a decision reads nothing.
  get read() {
    const chosen = getSelection(), { node, view } = this;
    if (node.parentElement?.closest("li")?.card.late) return true;
    return this.details.open && (this.touched || focused(node) || (view.moved && node.matches(":hover")) || (!chosen.isCollapsed && node.contains(chosen.anchorNode)));
  }

  last(words = "") { if (this.tail.textContent !== words) this.tail.textContent = words; }
  line(html) { put(this.record.body ? this.summary : this.flat, html); }
  get number() { return this.attempt || this.record.last; }

  get tabs() { return [...this.tools.querySelectorAll("[role=tab]")]; }
  // Whether the tab is the chosen one of its row.
  chosen({ dataset: { tab, attempt } }) { return tab ? tab === this.tab : Number(attempt) === this.number; }

  // Tab reaches the chosen ones, the arrow keys the others.
  mark() {
    for (const tab of this.tabs) {
      tab.ariaSelected = this.chosen(tab); tab.tabIndex = this.chosen(tab) ? 0 : -1;
      tab.setAttribute("aria-controls", this.body.id);
    }
    if (this.tabs.length) { this.body.role = "tabpanel"; this.body.ariaLabel = `${this.key}, attempt ${this.number}: ${this.tab}`; }
  }

  pick(chosen, focus) {
    if (!chosen) return;
    const { tab, attempt } = chosen.dataset;
    this.details.open = true; this.shown = null; this.follow = true;
    if (tab) this.tab = tab; else this.attempt = Number(attempt);
    this.mark();
    if (focus) chosen.focus();
    this.fill();
  }

  // The tab so many beside the chosen one in the row of `tab`.
  beside(by, name, around) {
    const row = this.tabs.filter(one => one.dataset[name]), to = row.findIndex(one => this.chosen(one)) + by;
    return row[around ? (to + row.length) % row.length : to];
  }

  // Changes the body; a focus inside stays there.
  show(change) {
    const inside = focused(this.body);
    change();
    if (inside) this.body.focus(STAY);
  }

  // Shows what belongs in the body, or asks for it.
  fill() {
    const { record, view, key } = this, on = Boolean(this.details.open && record.body && view.live);
    if (record.lane && on !== Boolean(this.seen)) { this.seen = on; if (view.live) view.tell({ see: key, on }); }
    if (!on) return;
    const text = view.texts.get(key);
    if (text && this.tab === "output" && this.number === record.writing) {
      if (this.body.firstChild !== text.node) this.show(() => this.body.replaceChildren(text.node));
      this.shown = null;
      return;
    }
    const wanted = `${this.tab} ${this.number} ${record.rev}`;
    if (wanted === this.shown) return;
    this.shown = wanted;
    view.ask({ want: key, attempt: this.number, tab: this.tab, ...record.want }, answer => { if (this.shown === wanted) { this.show(() => this.body.innerHTML = answer.html); this.stick(); } });
  }

  stick() { if (this.follow && this.record.writing > 0) this.body.scrollTop = this.body.scrollHeight; }
}

class Bar {
  constructor(view, record) {
    Object.assign(this, { view, busy: false, young: true });
    this.node = parts(view.page.bar, this);
    this.words.id = unique();
    this.node.setAttribute("aria-labelledby", this.words.id);
    setTimeout(() => { this.young = false; this.enable(); }, DEAD_MS);
    this.update(record);
    const open = record.buttons.find(one => one.at_once);
    if (open) this.open(open, false); // takes no focus
  }

  update(record) {
    const drawn = JSON.stringify(record);
    if (this.drawn === drawn) return;
    Object.assign(this, { drawn, record });
    put(this.words, record.words);
    const at = [...this.buttons.children].indexOf(document.activeElement);
    put(this.buttons, record.html);
    const code = this.buttons.querySelector("code");
    for (const [index, node] of this.buttons.querySelectorAll("button").entries()) {
      node.onclick = byHand(() => this.press(record.buttons[index]));
      node.onmouseenter = node.onfocus = () => code.textContent = record.buttons[index].magic;
    }
    this.buttons.children[at]?.focus();
    this.enable();
  }

  get asks() { return this.view.live && !this.busy; }
  get ready() { return this.asks && !this.young; }
  // By ARIA alone: a button that is disabled loses the focus, and keys go to the notebook.
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
    this.more.innerHTML = one.form;
    this.field = this.more.querySelector("textarea");
    const [send, back] = this.more.querySelectorAll("button");
    send.onclick = byHand(() => this.send(one));
    if (back) back.onclick = byHand(() => this.close());
    if (one.text_of) {
      this.field.disabled = true; // until the text is there
      this.view.ask({ want: this.record.path, attempt: this.record.attempt, tab: one.text_of }, answer => {
        this.field.value = answer.text; this.field.setSelectionRange(0, 0); this.field.disabled = false; if (focus) this.field.focus(); });
    }
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
    if (one.ask && !words.trim()) { this.say(one.empty); this.field.focus(); }
    else this.decide(one, one.ask ? { [one.ask]: words } : {});
  }

  decide(one, words = {}) {
    if (one.do) { this.view.tell({ do: one.do, step: this.record.step }); return; }
    this.view.moved = false;
    this.note("", true);
    this.view.tell({ decide: this.record.id, digest: this.record.digest, action: one.action, ...one.more, ...words });
    setTimeout(() => { if (this.busy && this.node.isConnected && this.view.live) this.say(this.view.page.words_for.busy); }, 1500);
  }

  go() {
    unfold(this.node);
    (this.opened ? this.field ?? this.node : this.buttons.firstChild).focus();
  }

  note(words, busy = false) { this.busy = busy; this.say(words); this.enable(); }
  say(words) { this.view.say(this.error, words); }
}

class View {
  constructor(model, host) {
    Object.assign(this, { model, id: unique(), state: "connecting", number: null, sent: 0, skew: 0, page: model.get("page") });
    for (const name of ["cards", "bars", "texts", "asked", "records"]) this[name] = new Map();
    this.build();
    host.append(this.style = make("style"), this.root);
    this.handlers = { "msg:custom": message => this.told(message), change: () => this.soon(), comm_live_update: () => { if (!model.comm_live) this.lose("gone"); } };
    for (const [name, handler] of Object.entries(this.handlers)) model.on(name, handler);
    this.hello();
  }

  close() {
    for (const timer of [this.timer, this.ticker, this.hush]) clearTimeout(timer);
    OPEN.delete(this);
    entitle();
    for (const [name, handler] of Object.entries(this.handlers)) this.model.off(name, handler);
  }

  get live() { return this.state === "live"; }
  waits(gates) { OPEN.set(this, gates.map(gate => gate.id)); entitle(); }

  tell(message) {
    try { this.model.send({ page: this.id, seq: ++this.sent, ...message }); } catch { this.lose("gone"); }
  }

  ask(question, answer) { this.asked.set(this.sent + 1, answer); this.tell({ ...question, ticket: this.sent + 1 }); }

  hello() {
    this.number = null;
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.lose("silent"), SILENT_MS);
    this.tell({ hello: true });
  }

  told(message) {
    const { kind, number, text, ticket } = message, mine = message.page === this.id;
    if (kind === "all") { if (mine) this.begin(message); return; }
    if (this.number === null) return; // what comes now is in the answer to hello
    if (number !== this.number + (kind !== "mark")) { if (number > this.number) this.hello(); return; }
    this.number = number;
    if (kind === "live") for (const piece of message.pieces) this.piece(...piece);
    if (kind === "body" && mine) { this.asked.get(ticket)?.(message); this.asked.delete(ticket); }
    if (kind === "said" && mine) (this.bars.get(message.gate) ?? this).note(text);
  }

  begin({ number, texts, lanes, now }) {
    clearTimeout(this.timer);
    this.number = number; this.state = "live"; this.skew = now - Date.now() / 1000;
    for (const things of [this.asked, this.texts, this.records]) things.clear();
    for (const lane of lanes) this.records.set(lane.key, lane);
    for (const [path, [html, rest]] of Object.entries(texts)) { const text = new Text(); text.block(html, rest); this.texts.set(path, text); }
    for (const card of this.cards.values()) card.shown = card.seen = null;
    const place = `[data-cm-static="${this.model.get("place")}"]`;
    this.style.textContent = `${place},.jp-OutputArea-child:has(${place}){display:none!important}`;
    this.note("");
    this.draw();
  }

  piece(kind, path, one, two) {
    if (kind === "words" || kind === "said") { put(this[kind], one); return; }
    if (kind === "lane") { this.records.set(path, one); this.soon(); return; }
    const card = this.cards.get(path);
    if (kind === "line") { card?.line(one); return; }
    if (kind === "tail") { this.records.get(path).tail = one; card?.last(one); return; }
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
    this.waits([]);
    if (!this.drawn) this.style.textContent = ""; // the snapshot has all there is to see
    this.root.hidden = false;
    this.note(this.page.words_for[state]);
    this.enable();
  }

  enable() {
    this.root.classList.toggle("cm-live", this.live);
    for (const node of [this.stop, this.modeButton, this.goOn]) node.ariaDisabled = !this.live;
    for (const bar of this.bars.values()) bar.enable();
  }

  build() {
    this.root = parts(this.page.html, this);
    this.root.onkeydown = event => this.key(event);
    this.root.onpointermove = () => this.moved = true;
    this.root.addEventListener("focusin", ({ target }) => { target.dataset.lmSuppressShortcuts = 1; }); // Notebook 7
    this.root.onclick = byHand(({ target }) => {
      const at = target.closest("[data-do],[data-gate],[role=tab],svg [data-step]"), { do: what, gate, mode, step } = at?.dataset ?? {};
      if (gate) this.bars.get(gate)?.go();
      else if (at?.role === "tab") at.closest("li").card.pick(at);
      else if (!what) this.visit(at);
      else if (this.live && typeof this[what] === "function") this[what]();
      else if (this.live) {
        if (mode || what === "pause") this.back();
        this.tell({ do: what, mode, step });
      }
    });
    this.menu.onfocusout = event => { if (!this.modes.contains(event.relatedTarget)) this.showMenu(false); };
  }

  // Several traits change at once; they are drawn together.
  soon() {
    if (this.due) return;
    this.due = true;
    queueMicrotask(() => { this.due = false; this.draw(); });
  }

  draw() {
    if (!this.live) return;
    const { model } = this, head = model.get("head"), final = model.get("final");
    const before = focused(this.root);
    this.drawn = true;
    this.inside.hidden = false; this.root.hidden = Boolean(final);
    // Over, and the saved view cannot take the widget's place here.
    if (final) { this.end ??= make("div"); put(this.end, final); this.root.after(this.end); } else this.end?.remove();
    for (const name of ["title", "pill", "words", "source", "said", "place", "tray", "menu"]) put(this[name], head[name]);
    this.goOn.hidden = !head.paused; this.modes.hidden = head.locked;
    this.modeButton.textContent = `mode: ${head.mode} ▾`;
    const node = focused(this.graph)?.dataset?.step;
    put(this.graph, model.get("graph"));
    if (node) this.graph.querySelector(`[data-step="${CSS.escape(node)}"]`)?.focus(STAY);
    const cards = model.get("cards"), gates = model.get("gates"), places = new Map([[this.gates, []]]);
    this.sweep(this.cards, this.keys(cards));
    this.arrange(cards, this.list);
    this.sweep(this.bars, gates.map(gate => gate.id));
    for (const gate of gates) {
      const card = this.cards.get(gate.path), place = card?.record.lane ? card.slot : this.gates;
      places.set(place, [...places.get(place) ?? [], gate]);
    }
    for (const [place, records] of places) this.match(this.bars, place, records, "id", record => { this.note(""); return new Bar(this, record); });
    this.waits(final ? [] : gates);
    this.tick();
    this.enable();
    this.speak(head.spoken);
    // What is gone must not give the keys away.
    if (before && !focused(this.root)?.getClientRects?.().length) this.root.focus(STAY);
  }

  // Of lanes the cards say only where they stand; one that has not been told yet comes later.
  full(records) { return records.map(one => one.lane ? this.records.get(one.key) : one).filter(Boolean); }
  keys(records) { return this.full(records).flatMap(one => [one.key, ...this.keys(one.lanes ?? [])]); }
  arrange(records, node) {
    this.match(this.cards, node, this.full(records), "key", record => new Card(this, record.key));
    for (const { key, lanes } of this.full(records)) if (lanes) this.arrange(lanes, this.cards.get(key).lanes);
  }

  // Takes away what there is no record of any more, but for what is being read.
  sweep(things, keys) {
    const kept = new Set(keys);
    for (const [key, thing] of things) {
      thing.late = !kept.has(key);
      if (thing.late && !thing.read) { thing.node.remove(); things.delete(key); thing.late = false; }
    }
  }

  // Makes the things in `node` those of the records; what stays keeps focus and place.
  match(things, node, records, name, create) {
    const late = new Set([...things.values()].filter(one => one.late).map(one => one.node));
    let place = node.firstChild;
    for (const record of records) {
      let thing = things.get(record[name]);
      if (!thing) things.set(record[name], thing = create(record));
      while (late.has(place)) place = place.nextSibling;
      if (thing.node === place) place = place.nextSibling; else node.insertBefore(thing.node, place);
      thing.update(record);
    }
  }

  // Counts down to when something is tried again.
  tick() {
    clearTimeout(this.ticker);
    const nodes = this.root.querySelectorAll("[data-until]");
    for (const node of nodes) {
      const left = Math.max(0, Math.ceil(node.dataset.until - this.skew - Date.now() / 1000));
      node.textContent = left < 120 ? `${left} s` : `${Math.floor(left / 60)} min ${left % 60} s`;
    }
    if (nodes.length) this.ticker = setTimeout(() => this.tick(), matchMedia("(prefers-reduced-motion: reduce)").matches ? 5000 : 1000);
  }

  note(words) { this.say(this.error, words); }
  say(node, words) { node.textContent = words; node.hidden = !words; if (words) this.speak(words); }
  // Of what changes faster than it can be read aloud, the last.
  speak(words) {
    this.spoken = words;
    if (this.hush || this.status.textContent === words) return;
    this.status.textContent = words;
    this.hush = setTimeout(() => { this.hush = null; this.speak(this.spoken); }, HUSH_MS);
  }

  visit(node) {
    const step = node?.dataset.step;
    const card = step && (this.cards.get(step) ?? [...this.cards.values()].find(one => one.record.steps?.includes(step)));
    if (!card) return;
    unfold(card.details);
    card.touched = true;
    card.node.scrollIntoView({ block: "nearest" });
    card.summary.focus(STAY);
  }

  choose() { this.showMenu(this.menu.hidden); this.menu.querySelector("[aria-checked=true]")?.focus(); }
  doubt() { this.showMenu(false); this.sure.hidden = false; this.sure.querySelector("[data-do=back]").focus(); }
  back() { this.showMenu(false); this.sure.hidden = true; this.modeButton.focus(); }
  showMenu(open) { this.menu.hidden = !open; this.modeButton.ariaExpanded = open; }

  key(event) {
    event.stopPropagation(); // bare letters would act on the notebook's cells
    if (!event.isTrusted) return;
    const { target, key } = event;
    const bars = [...this.bars.values()], bar = bars.find(one => one.node.contains(target)) ?? bars[0];
    const node = target.closest("svg [data-step]");
    let act;
    const row = [...this.menu.children], inRow = row.includes(target), by = { ArrowDown: 1, ArrowRight: 1, ArrowUp: -1, ArrowLeft: -1 }[key];
    if (inRow && by) act = () => row[(row.indexOf(target) + by + row.length) % row.length].focus();
    else if (inRow && (key === "Escape" || key === "Tab")) act = () => this.back();
    else if (key === "Escape") act = () => this.leave(bar);
    else if (target.closest("textarea")) act = key === "Enter" && (event.ctrlKey || event.metaKey) && bar?.opened && (() => bar.send(bar.opened));
    else if (node && (key === "Enter" || key === " ")) act = () => this.visit(node);
    else if (by && target.role === "tab") {
      const { card } = target.closest("li");
      act = () => card.pick(card.beside(by, target.dataset.tab ? "tab" : "attempt", true), true);
    } else if (this.page.shortcuts && !(event.repeat || event.ctrlKey || event.metaKey || event.altKey || inRow)) act = this.actions(target, bar, bars)[key.toLowerCase()];
    if (!act) return;
    event.preventDefault();
    act();
  }

  actions(target, bar, bars) {
    const cards = [...this.root.querySelectorAll("summary")].filter(one => one.getClientRects().length).map(one => one.closest("li")?.card);
    const at = cards.findIndex(card => card?.details.contains(target)), card = cards[at] ?? cards.findLast(one => one?.details.open);
    const move = to => () => cards[Math.min(cards.length - 1, Math.max(0, to))]?.summary.focus();
    const attempt = by => () => card?.pick(card.beside(by, "attempt"));
    const press = key => () => { const one = bar?.record.buttons.find(other => other.key === key); if (one && !bar.opened) bar.press(one); };
    const inBar = bar?.node.contains(target);
    return {
      a: inBar && press("A"), s: inBar && press("S"), r: press("R"), e: press("E"),
      g: () => bars[(inBar ? bars.indexOf(bar) + 1 : 0) % bars.length]?.go(),
      j: move(at + 1), k: move(at < 0 ? cards.length : at - 1), "[": attempt(-1), "]": attempt(1),
      d: () => card?.pick(card.tabs.find(one => one.dataset.tab === (card.tab === "diff" ? "output" : "diff"))),
      "?": () => this.help.hidden = !this.help.hidden,
    };
  }

  leave(bar) {
    if (!this.sure.hidden) { this.back(); return; }
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
