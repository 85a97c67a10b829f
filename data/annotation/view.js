// One view for two tasks: five labels for one response, or a blind choice between two responses.
//
//   render({root, task, store, language, wholePage}) -> cleanup
//
// task   {id, kind: "label" | "pair", title, annotator, items, words: {en: {texts, rubric}, zh: …}}
// store  where annotations are kept; written by the host:
//          load()        -> {item id: {row, skipped}}, or a promise of it
//          save(change)  keeps {submission, item, row | null, skipped}; a later change of an item replaces the former
//          flush()       writes whatever is still waiting
//          files         true where annotators export and import their annotations themselves
//          rename()      where the page asked for a name: forgets it and asks again
//          onstatus      set here, called by the host with a name from the texts (saved, saving, waiting, failed, …) and a detail
//          onrefused     set here, called by the host with the id of an item whose annotation was not accepted
//
// A host is put below this file and calls render; nothing is exported, since a widget may export its own render only.
// Text from the task reaches the page as text nodes only. Offsets in rows count Unicode characters, as Python does.

const CHOICES = ["first", "second", "tie", "both_bad"];
const IDLE = 60_000; // milliseconds without a key, pointer or scroll after which the clock of an item stands still
const LONG = 20_000; // characters of a text shown before "Show all"
const BADGES = 200; // hidden characters shown by name in one text; the rest become U+FFFD

// ---------------------------------------------------------------- elements

function h(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "on") for (const [type, handler] of Object.entries(value)) node.addEventListener(type, handler);
    else if (name === "class") node.className = value.split(" ").map((one) => `s3ft-${one}`).join(" "); // a notebook has classes of its own
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value != null) node.setAttribute(name, value);
  }
  node.append(...children.flat(2).filter((child) => child != null && child !== false));
  return node;
}

const fill = (text, values = {}) => text.replace(/\{(\w+)\}/g, (_, name) => String(values[name] ?? ""));

// ---------------------------------------------------------------- characters

// Controls that reorder text or that nobody sees. Joiners and direction marks that scripts need stay as they are.
const HIDDEN = /(?:[\u0000-\u0008\u000B\u000C\u000E-\u001F\u007F-\u009F\u00AD\u200B\u202A-\u202E\u2060-\u2069\uFEFF\uFFF9-\uFFFB]|\uDB40[\uDC00-\uDC7F]|\r(?!\n))+/g;
const NAMES = { "\u202A": "LRE", "\u202B": "RLE", "\u202C": "PDF", "\u202D": "LRO", "\u202E": "RLO", "\u2066": "LRI", "\u2067": "RLI", "\u2068": "FSI", "\u2069": "PDI", "\u200B": "ZWSP", "\u00AD": "SHY", "\uFEFF": "BOM" };

function nameOf(run) {
  const point = run.codePointAt(0), one = String.fromCodePoint(point), n = [...run].length;
  return (NAMES[one] ?? "U+" + point.toString(16).toUpperCase().padStart(4, "0")) + (n > 1 ? ` +${n - 1}` : "");
}

const shownAtFirst = (text) => (text.length <= LONG ? text.length : isLow(text, LONG) ? LONG - 1 : LONG);
const isLow = (text, at) => at > 0 && /[\uDC00-\uDFFF]/.test(text[at] ?? "") && /[\uD800-\uDBFF]/.test(text[at - 1]);

function toPoints(text, unit) {
  let n = unit;
  for (let i = 1; i < unit; i++) if (isLow(text, i)) n--;
  return n;
}

function toUnits(text, point) {
  let unit = 0;
  for (let n = 0; n < point && unit < text.length; n++) unit += text.codePointAt(unit) > 0xffff ? 2 : 1;
  return unit;
}

function wordsOf(text) {
  if (globalThis.Intl?.Segmenter) {
    const parts = new Intl.Segmenter(undefined, { granularity: "word" }).segment(text);
    const found = [];
    for (const part of parts) if (/[^\s\p{P}]/u.test(part.segment)) found.push([part.index, part.index + part.segment.length]);
    return found;
  }
  return [...text.matchAll(/\S+/g)].map((match) => [match.index, match.index + match[0].length]);
}

function codeBlocks(text) {
  const found = [];
  let start = -1, at = 0;
  for (const line of text.split("\n")) {
    const end = at + line.length;
    if (/^\s{0,3}(```|~~~)/.test(line)) {
      if (start < 0) start = at;
      else { found.push([start, end]); start = -1; }
    }
    at = end + 1;
  }
  if (start >= 0) found.push([start, text.length]);
  return found;
}

// ---------------------------------------------------------------- spans, as sorted [start, end) without overlap

function addSpan(spans, [start, end]) {
  const apart = spans.filter(([a, b]) => b < start || a > end), touching = spans.filter(([a, b]) => b >= start && a <= end);
  const all = [[start, end], ...touching];
  return [...apart, [Math.min(...all.map((s) => s[0])), Math.max(...all.map((s) => s[1]))]].sort((a, b) => a[0] - b[0]);
}

const removeSpan = (spans, [start, end]) => spans.flatMap(([a, b]) => [[a, Math.min(b, start)], [Math.max(a, end), b]].filter(([x, y]) => x < y));
const covers = (spans, [start, end]) => spans.some(([a, b]) => a <= start && end <= b);

function trimmed(text, [start, end]) {
  while (start < end && /\s/.test(text[start])) start++;
  while (start < end && /\s/.test(text[end - 1])) end--;
  return [isLow(text, start) ? start - 1 : start, isLow(text, end) ? end + 1 : end];
}

// ---------------------------------------------------------------- text on the page

const PLACES = new WeakMap(); // text node -> [start, end, whole], offsets into the source text

// Put `text` into `box` as text nodes: hidden characters by name, code in fixed width, spans and the cursor marked.
function showText(box, text, { spans = [], cursor = null, label = "", upTo = text.length } = {}) {
  box.replaceChildren();
  const code = codeBlocks(text);
  const runs = [...text.slice(0, upTo).matchAll(HIDDEN)].slice(0, BADGES).map((match) => [match.index, match.index + match[0].length]);
  const groups = { hidden: runs, mark: spans, cursor: cursor ? [cursor] : [], code };
  const cuts = [...new Set([0, upTo, ...Object.values(groups).flat(2)])].filter((at) => at <= upTo).sort((a, b) => a - b);
  const next = Object.fromEntries(Object.keys(groups).map((name) => [name, 0]));
  for (let i = 0; i + 1 < cuts.length; i++) {
    const [start, end] = [cuts[i], cuts[i + 1]], kinds = [];
    for (const [name, list] of Object.entries(groups)) {
      while (next[name] < list.length && list[next[name]][1] <= start) next[name]++;
      if (next[name] < list.length && list[next[name]][0] <= start) kinds.push(name);
    }
    const hidden = kinds.includes("hidden");
    const raw = text.slice(start, end), shown = hidden ? nameOf(raw) : raw.replace(HIDDEN, (run) => "\uFFFD".repeat(run.length));
    const leaf = document.createTextNode(shown);
    PLACES.set(leaf, [start, end, hidden]);
    if (!kinds.length) { box.append(leaf); continue; }
    const attributes = { class: kinds.join(" ") };
    if (hidden) Object.assign(attributes, { title: label, dir: "ltr" });
    box.append(h(kinds.includes("mark") ? "mark" : "span", attributes, leaf));
  }
}

// Offset in the source text of a position inside a box made by `showText`.
function offsetOf(box, node, at) {
  if (node.nodeType !== Node.TEXT_NODE) {
    const leaves = document.createTreeWalker(node, NodeFilter.SHOW_TEXT), child = node.childNodes[at];
    if (!child) { let last = null; while (leaves.nextNode()) last = leaves.currentNode; return last ? PLACES.get(last)?.[1] ?? 0 : 0; }
    const first = child.nodeType === Node.TEXT_NODE ? child : document.createTreeWalker(child, NodeFilter.SHOW_TEXT).nextNode();
    return first ? PLACES.get(first)?.[0] ?? 0 : 0;
  }
  const place = PLACES.get(node);
  if (!place) return 0;
  return place[2] ? (at ? place[1] : place[0]) : place[0] + at;
}

function selectionIn(box) {
  const selection = box.getRootNode().getSelection?.() ?? document.getSelection();
  if (!selection?.rangeCount || selection.isCollapsed) return null;
  const range = selection.getRangeAt(0), inside = (node) => node === box || box.contains(node);
  if (!range.intersectsNode(box)) return null;
  const whole = document.createRange();
  whole.selectNodeContents(box);
  const [from, start] = inside(range.startContainer) ? [range.startContainer, range.startOffset] : [box, 0];
  const [to, end] = inside(range.endContainer) ? [range.endContainer, range.endOffset] : [box, box.childNodes.length];
  const span = [offsetOf(box, from, start), offsetOf(box, to, end)];
  return span[0] < span[1] ? span : null;
}

// ---------------------------------------------------------------- keys

// The key as on a Latin keyboard, so that other layouts and input methods keep working.
function keyOf(event) {
  if (/^[\x20-\x7e]$/.test(event.key)) return event.key.toLowerCase();
  const physical = /^(?:Key|Digit|Numpad)([A-Z0-9])$/.exec(event.code ?? "");
  if (physical && (event.key.length === 1 || event.key === "Process" || event.key === "Unidentified")) return physical[1].toLowerCase();
  return event.key;
}

const editable = (node) => node?.closest?.("textarea, input, select, [contenteditable]");

// ---------------------------------------------------------------- time

// Milliseconds an item was looked at: stands still while the page is hidden or nobody touches it.
function clock() {
  let total = 0, last = performance.now();
  const step = () => {
    const now = performance.now();
    if (document.visibilityState === "visible") total += Math.min(now - last, IDLE);
    last = now;
  };
  const leave = () => { total += Math.min(performance.now() - last, IDLE); }, back = () => { last = performance.now(); };
  return { touch: step, leave, back, read: () => (step(), total), set: (ms) => { total = ms; back(); } };
}

const median = (numbers) => { const sorted = [...numbers].sort((a, b) => a - b); return sorted[sorted.length >> 1]; };

// Not crypto.randomUUID: browsers withhold it from pages served over plain HTTP on a network.
const submissionId = () => [...crypto.getRandomValues(new Uint8Array(16))].map((byte) => byte.toString(16).padStart(2, "0")).join("");

// ---------------------------------------------------------------- preferences of the person, not of the task

const PREFS = "s3ft:preferences";
const readPrefs = () => { try { return JSON.parse(localStorage.getItem(PREFS)) ?? {}; } catch { return {}; } };
const writePrefs = (prefs) => { try { localStorage.setItem(PREFS, JSON.stringify(prefs)); } catch { /* only comfort is lost */ } };

// ---------------------------------------------------------------- rows

const DECISIONS = { not_applicable: [false], good: [true, true, true], bad_context: [true, false, true], bad_system: [true, true, false], all_bad: [true, false, false] };

function labelOf(decisions) {
  if (decisions[0] === false) return "not_applicable";
  if (decisions.length < 3) return null;
  return Object.keys(DECISIONS).find((label) => DECISIONS[label].every((value, i) => value === decisions[i]));
}

// A row from a file, checked against the task; null when it is not one of ours.
function checkedRow(task, items, row) {
  const pair = task.kind === "pair", item = items.get(pair ? row?.pair_id : row?.sample_id), choice = pair ? row?.choice : row?.label;
  const number = (value, least) => (typeof value === "number" && Number.isFinite(value) && value >= least ? value : null);
  if (!item || typeof row.annotator !== "string" || !(pair ? CHOICES : Object.keys(DECISIONS)).includes(choice)) return null;
  const common = { annotator: row.annotator, seconds: number(row.seconds, 0), position: Number.isInteger(row.position) ? number(row.position, 1) : null };
  const text = (value) => (typeof value === "string" ? value : "");
  if (pair) return { pair_id: item.id, choice: choice, reason: text(row.reason), ...common };
  const length = toPoints(item.response, item.response.length);
  const good = ([start, end] = []) => Number.isInteger(start) && Number.isInteger(end) && 0 <= start && start < end && end <= length;
  return { sample_id: item.id, label: choice, note: text(row.note), spans: (Array.isArray(row.spans) ? row.spans : []).filter((span) => Array.isArray(span) && good(span)), ...common };
}

// ---------------------------------------------------------------- the view

async function render({ root, task, store, language = "en", wholePage = false }) {
  const items = new Map(task.items.map((item) => [item.id, item]));
  const order = [...items.keys()], place = new Map(order.map((id, i) => [id, i])), total = order.length;
  const pair = task.kind === "pair", idField = pair ? "pair_id" : "sample_id", textField = pair ? "reason" : "note";
  const prefs = { history: true, theme: "auto", shortcuts: true, ...readPrefs() };
  let lang = prefs.language in task.words ? prefs.language : language in task.words ? language : "en";
  const t = (name, values) => fill(task.words[lang].texts[name], values);
  const rubric = () => task.words[lang].rubric;

  const records = new Map(); // item id -> {row, skipped}
  const drafts = new Map(); // item id -> {decisions, text, spans, ms}
  let skipped = []; // item ids, first skipped first
  let past = []; // what undo takes back, oldest first
  let current = null, marking = null, held = null, parts = {}, status = ["saved", null], opened = {};
  const ticking = clock();

  for (const [id, record] of Object.entries((await store.load()) ?? {})) {
    if (!items.has(id)) continue;
    const row = record.row && checkedRow(task, items, record.row);
    if (row) records.set(id, { row, skipped: false });
    else if (record.skipped) { records.set(id, { row: null, skipped: true }); skipped.push(id); }
  }
  skipped.sort((a, b) => place.get(a) - place.get(b));
  const byPosition = () => [...records].filter(([, r]) => r.row).sort(([, a], [, b]) => (a.row.position ?? 0) - (b.row.position ?? 0));
  past = byPosition().map(([id]) => ({ id, before: null }));
  let lastPosition = Math.max(0, ...byPosition().map(([, r]) => r.row.position ?? 0));
  const rowOf = (id) => records.get(id)?.row ?? null;
  const doneCount = () => { let n = 0; for (const r of records.values()) if (r.row) n++; return n; };

  // -------------------------------------------------------------- annotations

  const choiceOf = (row) => (pair ? row.choice : row.label);
  const choiceText = (choice) => (pair ? t(choice) : (({ letter, short }) => `${letter}, ${short}`)(rubric().labels.find((one) => one.label === choice)));

  function draftOf(id) {
    if (!drafts.has(id)) {
      const row = rowOf(id), item = items.get(id);
      drafts.set(id, {
        decisions: row && !pair ? [...DECISIONS[row.label]] : [],
        text: row?.[textField] ?? "",
        spans: (row?.spans ?? []).map((span) => span.map((at) => toUnits(item.response, at))),
        ms: (row?.seconds ?? 0) * 1000,
      });
    }
    return drafts.get(id);
  }

  function rowFor(id, choice) {
    const draft = draftOf(id), item = items.get(id), before = rowOf(id);
    const common = { annotator: task.annotator, seconds: Math.round(draft.ms / 100) / 10, position: before?.position ?? draft.position ?? ++lastPosition };
    draft.position = common.position;
    if (pair) return { pair_id: id, choice: choice, reason: draft.text.trim(), ...common };
    return { sample_id: id, label: choice, note: draft.text.trim(), spans: draft.spans.map((span) => span.map((at) => toPoints(item.response, at))), ...common };
  }

  function keep(id, row, isSkipped = false) {
    if (row || isSkipped) records.set(id, { row, skipped: isSkipped });
    else records.delete(id);
    skipped = skipped.filter((one) => one !== id);
    if (isSkipped) skipped.push(id);
    store.save({ submission: submissionId(), item: id, row, skipped: isSkipped });
  }

  function commit(choice) {
    if (current === null) return;
    const id = current, draft = draftOf(id);
    draft.ms = ticking.read();
    past.push({ id, before: records.get(id) ?? null });
    if (!pair) draft.decisions = [...DECISIONS[choice]];
    keep(id, rowFor(id, choice));
    go(nextOpen(id), (next) => t("saved_as", { choice: choiceText(choice), next }));
  }

  // A note or mark changed on an item that is annotated already.
  function settle() {
    const row = current !== null && rowOf(current);
    if (!row) { if (current !== null) draftOf(current).ms = ticking.read(); return; }
    const fresh = rowFor(current, choiceOf(row));
    const same = fresh[textField] === row[textField] && JSON.stringify(fresh.spans) === JSON.stringify(row.spans);
    if (!same) { draftOf(current).ms = ticking.read(); keep(current, rowFor(current, choiceOf(row))); }
  }

  function decide(value) {
    const draft = draftOf(current);
    if (labelOf(draft.decisions)) draft.decisions = [];
    draft.decisions.push(value);
    const label = labelOf(draft.decisions);
    if (label) return commit(label);
    const byButton = parts.decision.contains(document.activeElement);
    drawDecision();
    say(rubric().order[draft.decisions.length]);
    if (byButton) parts.yes.focus({ preventScroll: true });
  }

  function stepBack() {
    const draft = draftOf(current);
    if (!draft.decisions.length) return;
    draft.decisions.pop();
    drawDecision();
    say(rubric().order[draft.decisions.length]);
  }

  function skip() {
    if (current === null) return;
    if (rowOf(current)) return go(nextOpen(current));
    const id = current;
    past.push({ id, before: records.get(id) ?? null });
    draftOf(id).ms = ticking.read();
    keep(id, null, true);
    go(nextOpen(id), (next) => t("skipped", { next }));
  }

  function undo() {
    settle();
    const last = past.pop();
    if (!last) return say(t("nothing_to_undo"), true);
    const was = records.get(last.id);
    keep(last.id, last.before?.row ?? null, last.before?.skipped ?? false);
    const draft = draftOf(last.id);
    draft.decisions = last.before?.row && !pair ? [...DECISIONS[last.before.row.label]] : [];
    go(last.id, () => t("undone", { what: was?.row ? choiceText(choiceOf(was.row)) : t("skip") }));
  }

  // -------------------------------------------------------------- where to go

  function nextOpen(after) {
    const from = after == null ? 0 : place.get(after) + 1;
    for (let i = 0; i < total; i++) {
      const id = order[(from + i) % total];
      if (!records.has(id)) return id;
    }
    return skipped[0] ?? null;
  }

  function go(id, sentence = (next) => next) {
    const before = current;
    settleTimer();
    current = id;
    marking = held = null;
    opened = {};
    ticking.set(id === null ? 0 : draftOf(id).ms);
    drawItem();
    const next = id === null ? t("done_title", { total }) : t("item", { n: place.get(id) + 1, total }) + (records.get(id)?.skipped ? ". " + t(id === before ? "only_skipped" : "skipped_now") : "");
    say(sentence(next), true);
    parts.read.scrollTop = 0;
    parts.article.focus({ preventScroll: true });
  }

  function settleTimer() { if (current !== null) draftOf(current).ms = ticking.read(); }

  function move(step) {
    settle();
    const at = current === null ? total : place.get(current);
    const to = Math.min(Math.max(at + step, 0), total - 1);
    if (to !== at) go(order[to]);
  }

  // -------------------------------------------------------------- telling

  let sayTimer = 0;
  function say(text, visible = false) {
    parts.live.textContent = "";
    parts.live.textContent = text;
    if (!visible) return;
    parts.toast.textContent = text;
    parts.toast.classList.add("s3ft-shown");
    clearTimeout(sayTimer);
    sayTimer = setTimeout(() => parts.toast.classList.remove("s3ft-shown"), 1600);
  }

  store.onstatus = (name, detail) => {
    status = [name, detail];
    if (parts.status) drawStatus();
  };

  store.onrefused = (id) => {
    records.delete(id);
    if (parts.bar) drawProgress();
  };

  function drawStatus() {
    const [name, detail] = status, bad = name !== "saved" && name !== "saving";
    parts.status.textContent = t(name, { n: detail, why: detail });
    parts.status.classList.toggle("s3ft-bad", bad);
    parts.status.setAttribute("role", bad ? "alert" : "none");
  }

  function paceText() {
    const seconds = byPosition().slice(-20).map(([, r]) => r.row.seconds).filter((n) => n != null);
    if (seconds.length < 3) return "";
    const each = Math.max(0.1, median(seconds)), minutes = Math.round(((total - doneCount()) * each) / 60);
    const left = minutes < 1 ? t("under_a_minute") : minutes < 90 ? t("minutes", { n: minutes }) : t("hours", { h: Math.floor(minutes / 60), m: minutes % 60 });
    return t("pace", { seconds: each < 10 ? Math.round(each * 10) / 10 : Math.round(each), left });
  }

  // -------------------------------------------------------------- drawing

  const key = (name) => h("kbd", { "aria-hidden": "true" }, name);
  function button(text, keys, run, attributes = {}) {
    const named = keys ? { "aria-keyshortcuts": keys.toUpperCase() } : {};
    return h("button", { type: "button", on: { click: run }, ...named, ...attributes }, keys ? key(keys.toUpperCase()) : null, h("span", {}, text));
  }

  function textBox(text) {
    const box = h("div", { class: "text", dir: "auto" });
    showText(box, text, { label: t("hidden"), upTo: shownAtFirst(text) });
    if (text.length <= LONG) return box;
    const more = button(`${t("more")} (${text.length.toLocaleString(lang)})`, null, () => { showText(box, text, { label: t("hidden") }); more.remove(); }, { class: "more" });
    return h("div", {}, box, more);
  }

  const turn = (message, title) => h("section", { class: `turn ${message.role}` }, h("h3", {}, title ?? t(message.role)), textBox(message.content));

  function drawFrame() {
    parts = {};
    root.replaceChildren();
    root.classList.remove("s3ft-alone");
    root.classList.add("s3ft");
    root.classList.toggle("s3ft-pair", pair);
    root.classList.toggle("s3ft-whole", wholePage);
    root.lang = lang;
    root.dataset.theme = prefs.theme;
    root.dataset.lmSuppressShortcuts = "true"; // JupyterLab leaves our keys alone
    parts.live = h("div", { class: "unseen", role: "status", "aria-live": "polite" });
    parts.toast = h("div", { class: "toast", "aria-hidden": "true" });
    parts.count = h("span", { class: "count" });
    parts.bar = h("progress", { max: total || 1 });
    parts.pace = h("span", { class: "pace" });
    parts.status = h("span", { class: "status" });
    const menu = h("details", { class: "menu" }, h("summary", {}, t("menu")), h("div", {},
      button(t("keys"), "?", () => openDialog("help")),
      button(t("theme"), "l", toggleTheme),
      Object.keys(task.words).filter((one) => one !== lang).map((one) => button(task.words[one].texts.language, null, () => setLanguage(one), { lang: one })),
      store.files ? button(t("import"), null, () => parts.file.click()) : null,
      store.rename ? button(t("rename", { name: task.annotator }), null, store.rename) : null));
    parts.file = h("input", { type: "file", accept: ".jsonl,.json,application/json", class: "unseen", tabindex: "-1", "aria-hidden": "true", on: { change: (event) => importFile(event.target) } });
    parts.head = h("header", {},
      h("h1", { dir: "auto" }, task.title || "S3FT"),
      h("div", { class: "progress" }, parts.bar, parts.count, parts.pace, parts.status),
      h("div", { class: "tools" }, button(t("rubric"), "r", () => openDialog("rubric")), store.files ? button(t("export"), null, exportRows) : null, menu));
    parts.setting = h("section", { class: "setting", "aria-label": t("setting") });
    parts.article = h("article", { tabindex: "-1" });
    parts.read = h("main", { class: "read" }, parts.article);
    parts.panel = h("section", { class: "panel", "aria-label": pair ? t("better") : t("decide") });
    root.append(h("div", { class: "frame" }, parts.head, parts.setting, parts.read, parts.toast, parts.panel), parts.live, parts.file);
    drawStatus();
  }

  function drawProgress() {
    const done = doneCount();
    parts.bar.value = done;
    parts.bar.setAttribute("aria-label", t("progress", { done, total }));
    parts.count.textContent = t("progress", { done, total });
    parts.pace.textContent = paceText();
  }

  function drawItem() {
    drawProgress();
    if (current === null) return drawDone();
    const item = items.get(current), draft = draftOf(current), earlier = item.prompt.slice(0, -1);
    parts.setting.hidden = false;
    parts.setting.replaceChildren(h("h2", {}, t("setting")), textBox(item.system_prompt));
    parts.setting.querySelector(".s3ft-text").tabIndex = 0;
    parts.response = pair ? null : h("div", { class: "text", dir: "auto" });
    parts.history = earlier.length ? h("details", { class: "history", open: prefs.history, on: { toggle: (event) => { if (prefs.history !== event.target.open) { prefs.history = event.target.open; writePrefs(prefs); } } } },
      h("summary", {}, `${t("earlier")} (${earlier.length})`), earlier.map((message) => turn(message))) : null;
    parts.original = h("div");
    parts.article.setAttribute("aria-label", t("item", { n: place.get(current) + 1, total }));
    parts.article.replaceChildren(...[
      h("p", { class: "where" }, t("item", { n: place.get(current) + 1, total })),
      parts.history,
      turn(item.prompt.at(-1), t("last")),
      pair
        ? h("div", { class: "two" }, [["response_a", item.first], ["response_b", item.second]].map(([name, text]) => h("section", { class: "turn response" }, h("h2", {}, t(name)), textBox(text))))
        : h("section", { class: "turn response" }, h("h2", {}, t("response")), parts.response),
      parts.original].filter(Boolean));
    if (!pair) drawResponse();
    drawPanel(draft);
  }

  function drawResponse() {
    const text = items.get(current).response, over = text.length > LONG && !opened.response && !marking;
    showText(parts.response, text, { spans: draftOf(current).spans, cursor: marking && cursorSpan(), label: t("hidden"), upTo: over ? shownAtFirst(text) : text.length });
    parts.more?.remove();
    parts.more = over ? button(`${t("more")} (${text.length.toLocaleString(lang)})`, null, () => { opened.response = true; drawResponse(); }, { class: "more" }) : null;
    if (parts.more) parts.response.after(parts.more);
    parts.response.classList.toggle("s3ft-marking", !!marking);
    parts.markHelp?.toggleAttribute("hidden", !marking);
    parts.unmark?.toggleAttribute("hidden", !draftOf(current).spans.length);
  }

  function drawPanel(draft) {
    parts.decision = h("div", { class: "decision" });
    const input = h("textarea", { rows: "2", maxlength: "2000", dir: "auto", id: `s3ft-note-${task.id}`, on: { input: (event) => { draft.text = event.target.value; }, blur: settle } });
    input.value = draft.text;
    parts.note = input;
    parts.noteBox = h("div", { class: "note", hidden: !draft.text && !pair }, h("label", { for: input.id }, t(pair ? "reason" : "note"), " ", h("small", {}, t("note_why"))), input);
    parts.markHelp = h("p", { class: "hint", hidden: true }, t("marking"));
    parts.unmark = button(t("unmark"), null, () => { draft.spans = []; drawResponse(); settle(); }, { hidden: !draft.spans.length });
    parts.markButton = pair ? null : button(t("mark"), "m", mark, { on: { click: mark, pointerdown: () => { held = selectionIn(parts.response); }, mousedown: (event) => event.preventDefault() } });
    const more = h("div", { class: "more-tools" },
      parts.markButton, pair ? null : parts.unmark,
      button(t(pair ? "reason" : "note"), "w", writeNote),
      !pair && items.get(current).original ? button(t("original"), "o", toggleOriginal, { "aria-expanded": "false", class: "original" }) : null);
    const moves = h("div", { class: "moves" },
      button(t("undo"), "u", undo), button(t("skip"), "s", skip),
      button(t("back"), "[", () => move(-1)), button(t("next"), "]", () => move(1)));
    parts.panel.replaceChildren(parts.decision, parts.markHelp, parts.noteBox, h("div", { class: "bar" }, more, moves));
    drawDecision();
  }

  function drawDecision() {
    const row = rowOf(current), remark = row ? t("review") : records.get(current)?.skipped ? t("skipped_now") : "";
    const hint = remark ? h("p", { class: "hint" }, remark) : null;
    if (pair) {
      const keys = ["a", "b", "t", "x"];
      parts.decision.replaceChildren(h("h2", {}, t("better")), h("p", { class: "hint" }, remark || t("better_why")),
        h("div", { class: "choices" }, CHOICES.map((choice, i) => button(t(choice), keys[i], () => commit(choice), { class: "choice", "aria-pressed": String(row?.choice === choice) }))));
      return;
    }
    const { decisions } = draftOf(current), { order: questions, labels } = rubric();
    const steps = questions.map((question, i) => {
      const given = decisions[i], now = i === decisions.length && labelOf(decisions) === null;
      const line = h("li", { class: now ? "now" : given === undefined ? "later" : "given", "aria-current": now ? "step" : null }, h("span", { class: "question" }, question), given === undefined ? null : h("b", {}, t(given ? "yes" : "no")));
      if (!now) return line;
      parts.yes = button(t("yes"), "y", () => decide(true));
      line.append(h("div", { class: "yesno" }, parts.yes, button(t("no"), "n", () => decide(false))));
      return line;
    });
    parts.decision.replaceChildren(...[h("h2", {}, t("decide")), hint, h("ol", { class: "steps" }, steps),
      h("h3", {}, t("directly")),
      h("div", { class: "labels" }, labels.map(({ label, letter, short }) => button(short, letter.toLowerCase(), () => commit(label), { "aria-label": `${letter}, ${short}`, "aria-pressed": String(row?.label === label), title: short })))].filter(Boolean));
  }

  function drawDone() {
    parts.setting.hidden = true;
    parts.article.setAttribute("aria-label", t("done_title", { total }));
    parts.article.replaceChildren(h("div", { class: "done" }, h("h2", {}, t("done_title", { total })), h("p", {}, t(store.files ? "done_export" : "done_text")),
      store.files ? button(t("export"), null, exportRows, { class: "primary" }) : null));
    parts.panel.replaceChildren(h("div", { class: "moves" }, button(t("undo"), "u", undo), button(t("back"), "[", () => move(-1))));
  }

  // -------------------------------------------------------------- marking

  const cursorSpan = () => { const [a, b] = [marking.at, marking.anchor].sort((x, y) => x - y); return [marking.words[a][0], marking.words[b][1]]; };

  function toggleSpan(span) {
    const draft = draftOf(current), text = items.get(current).response, whole = trimmed(text, span), said = text.slice(...whole).slice(0, 80);
    if (whole[0] >= whole[1]) return;
    const there = covers(draft.spans, whole);
    draft.spans = there ? removeSpan(draft.spans, whole) : addSpan(draft.spans, whole);
    drawResponse();
    say(t(there ? "cleared" : "marked", { text: said }));
    settle();
  }

  function mark() {
    if (pair || current === null) return;
    const chosen = held ?? selectionIn(parts.response);
    held = null;
    if (chosen) { document.getSelection().removeAllRanges(); return toggleSpan(chosen); }
    if (marking) return endMarking();
    const found = wordsOf(items.get(current).response);
    if (!found.length) return;
    marking = { words: found, at: 0, anchor: 0 };
    drawResponse();
    parts.article.focus({ preventScroll: true });
    showCursor(t("marking"));
  }

  function endMarking() { marking = null; drawResponse(); }

  function showCursor(before = "") {
    parts.response.querySelector(".s3ft-cursor")?.scrollIntoView({ block: "nearest" });
    say(`${before} ${items.get(current).response.slice(...cursorSpan()).slice(0, 120)}`.trim());
  }

  function markingKey(event, name) {
    const last = marking.words.length - 1;
    const to = { ArrowRight: marking.at + 1, ArrowDown: marking.at + 8, ArrowLeft: marking.at - 1, ArrowUp: marking.at - 8, Home: 0, End: last }[event.key];
    if (to !== undefined) {
      marking.at = Math.min(Math.max(to, 0), last);
      if (!event.shiftKey) marking.anchor = marking.at;
      drawResponse();
      showCursor();
    } else if (name === " " || event.key === "Enter") toggleSpan(cursorSpan());
    else if (event.key === "Escape" || name === "m") endMarking();
    else return false;
    return true;
  }

  function onPointerUp(event) {
    if (pair || current === null || !parts.response?.isConnected) return;
    const chosen = event.pointerType !== "touch" && selectionIn(parts.response);
    if (chosen && parts.response.contains(event.target)) { document.getSelection().removeAllRanges(); return toggleSpan(chosen); }
    const clicked = event.target.closest?.("mark");
    if (!chosen && clicked && parts.response.contains(clicked) && document.getSelection().isCollapsed) {
      const at = PLACES.get(document.createTreeWalker(clicked, NodeFilter.SHOW_TEXT).nextNode())?.[0];
      const span = draftOf(current).spans.find(([a, b]) => a <= at && at < b);
      if (span) toggleSpan(span);
    }
  }

  function onSelection() {
    if (pair || !parts.response?.isConnected || !parts.markButton) return;
    parts.markButton.lastChild.textContent = t(selectionIn(parts.response) ? "mark_selection" : "mark");
  }

  // -------------------------------------------------------------- tools

  function writeNote() {
    if (current === null) return;
    parts.noteBox.hidden = false;
    parts.noteBox.classList.add("s3ft-open");
    parts.note.focus();
  }

  function toggleOriginal() {
    if (pair || current === null || !items.get(current).original) return;
    const open = !parts.original.firstChild;
    parts.original.replaceChildren(...(open ? [h("section", { class: "turn before" }, h("h2", {}, t("original")), h("p", { class: "hint" }, t("original_why")), textBox(items.get(current).original))] : []));
    parts.panel.querySelector("button.s3ft-original")?.setAttribute("aria-expanded", String(open));
    if (open) parts.original.firstChild.scrollIntoView({ block: "nearest" });
  }

  function toggleTheme() {
    const dark = prefs.theme === "auto" ? matchMedia("(prefers-color-scheme: dark)").matches : prefs.theme === "dark";
    prefs.theme = root.dataset.theme = dark ? "light" : "dark";
    writePrefs(prefs);
  }

  function setLanguage(one) {
    lang = prefs.language = one;
    writePrefs(prefs);
    settle();
    marking = null;
    drawFrame();
    drawItem();
    parts.article.focus({ preventScroll: true });
  }

  function openDialog(kind) {
    root.querySelector("dialog")?.close();
    const dialog = h("dialog", { class: kind, "aria-label": t(kind === "help" ? "keys" : "rubric"), on: { close: () => { dialog.remove(); parts.article.focus({ preventScroll: true }); }, click: (event) => { if (event.target === dialog) dialog.close(); } } });
    dialog.append(h("div", {}, kind === "help" ? helpText() : rubricText(), button(t("close"), null, () => dialog.close(), { class: "close" })));
    root.append(dialog);
    dialog.showModal();
  }

  function rubricText() {
    const { role, decide: lead, order: questions, labels } = rubric();
    if (pair) return [h("h2", {}, t("rubric")), h("p", {}, role), h("p", {}, t("better_why")), h("ol", {}, questions.slice(1).map((question) => h("li", {}, question)))];
    return [h("h2", {}, t("rubric")), h("p", {}, role), h("h3", {}, lead), h("ol", {}, questions.map((question) => h("li", {}, question))),
      h("dl", {}, labels.map(({ letter, short, long }) => [h("dt", {}, h("kbd", {}, letter), " ", short), h("dd", {}, long)]))];
  }

  function helpText() {
    const line = (keys, text) => [h("dt", {}, keys.map((name) => h("kbd", {}, name))), h("dd", {}, text)];
    const decisions = pair ? [[["A", "B", "T", "X"], t("key_pair")]] : [[["Y", "N"], t("key_yes_no")], [["Backspace"], t("key_step_back")], [["A", "B", "C", "D", "E"], t("key_letters")]];
    const rest = [[["U"], t("undo")], [["S"], t("skip")], [["["], t("back")], [["]"], t("next")], [["H"], t("key_history")], [["R"], t("rubric")], [["W"], t(pair ? "reason" : "note")],
      ...(pair ? [] : [[["M"], t("mark")], [["O"], t("key_original")]]), [["Space"], t("key_scroll")], [["L"], t("theme")], [["?"], t("keys")]];
    const box = h("input", { type: "checkbox", on: { change: (event) => { prefs.shortcuts = event.target.checked; writePrefs(prefs); } } });
    box.checked = prefs.shortcuts;
    return [h("h2", {}, t("keys")), h("h3", {}, t("choice_keys")), h("dl", { class: "keys" }, decisions.map(([keys, text]) => line(keys, text))),
      h("h3", {}, t("other_keys")), h("dl", { class: "keys" }, rest.map(([keys, text]) => line(keys, text))), h("label", {}, box, " ", t("shortcuts"))];
  }

  // -------------------------------------------------------------- files

  function exportRows() {
    settle();
    const rows = byPosition().map(([, r]) => r.row);
    const name = task.annotator.replace(/[^\p{L}\p{N}_-]+/gu, "-") || "me";
    const url = URL.createObjectURL(new Blob(rows.map((row) => JSON.stringify(row) + "\n"), { type: "application/x-ndjson" }));
    const link = h("a", { href: url, download: `${pair ? "preferences" : "annotations"}-${name}.jsonl` });
    root.append(link);
    link.click();
    link.remove();
    setTimeout(() => URL.revokeObjectURL(url), 60_000);
    say(t("exported", { n: rows.length }), true);
  }

  async function importFile(input) {
    const text = await input.files[0]?.text();
    input.value = "";
    if (text === undefined) return;
    let n = 0, kept = 0, other = 0;
    const rows = text.split("\n").filter((line) => line.trim()).map((line) => { try { return checkedRow(task, items, JSON.parse(line)); } catch { return null; } });
    const stranger = rows.find((row) => row && row.annotator !== task.annotator);
    if (stranger) return say(t("import_other", { name: stranger.annotator, me: task.annotator }), true);
    for (const row of rows) {
      if (!row) other++;
      else if (rowOf(row[idField])) kept++;
      else { keep(row[idField], row); drafts.delete(row[idField]); lastPosition = Math.max(lastPosition, row.position ?? 0); n++; }
    }
    past = byPosition().map(([id]) => ({ id, before: null }));
    current !== null && rowOf(current) ? go(nextOpen(null)) : drawProgress();
    say(t("imported", { n, kept, other }), true);
  }

  // -------------------------------------------------------------- listening

  const RUN = { u: undo, s: skip, r: () => openDialog("rubric"), w: writeNote, l: toggleTheme, "?": () => openDialog("help"), "[": () => move(-1), "]": () => move(1), m: mark, o: toggleOriginal,
    h: () => { if (parts.history) parts.history.open = !parts.history.open; } };

  function choiceKey(name) {
    if (current === null) return false;
    if (pair) {
      const choice = CHOICES[["a", "b", "t", "x"].indexOf(name)] ?? CHOICES[["1", "2", "3", "4"].indexOf(name)];
      if (choice) commit(choice);
      return !!choice;
    }
    const label = rubric().labels.find((one) => one.letter.toLowerCase() === name)?.label;
    if (label) commit(label);
    else if (name === "y" || name === "1") decide(true);
    else if (name === "n" || name === "2") decide(false);
    else if (name === "Backspace") stepBack();
    else return false;
    return true;
  }

  function onKey(event) {
    if (event.isComposing || event.altKey) return;
    ticking.touch();
    const name = keyOf(event), dialog = root.querySelector("dialog[open]");
    if (dialog) {
      if ((name === "r" && dialog.classList.contains("s3ft-rubric")) || (name === "?" && dialog.classList.contains("s3ft-help"))) { dialog.close(); event.preventDefault(); }
      return;
    }
    if (editable(event.target)) {
      if (event.target === parts.note && (event.key === "Escape" || (event.key === "Enter" && (event.ctrlKey || event.metaKey)))) { parts.article.focus({ preventScroll: true }); event.preventDefault(); }
      return;
    }
    if (event.ctrlKey || event.metaKey) {
      if (name === "z" && !event.shiftKey) { undo(); event.preventDefault(); }
      return;
    }
    const menu = root.querySelector("details.s3ft-menu[open]");
    if (event.key === "Escape" && menu) { menu.open = false; return; }
    const onButton = event.target.closest?.("button, summary, a") && (name === " " || event.key === "Enter");
    if (onButton) return;
    if (marking && markingKey(event, name)) return event.preventDefault();
    if (event.repeat || !prefs.shortcuts || !(choiceKey(name) || run(name))) return;
    event.preventDefault();
  }

  function run(name) {
    if (!RUN[name] || (current === null && ["s", "w", "m", "o", "h", "]"].includes(name))) return false;
    RUN[name]();
    return true;
  }

  const target = wholePage ? document : root, leave = () => {
    if (document.visibilityState === "visible") return ticking.back();
    ticking.leave();
    settle();
    store.flush?.();
  };
  const listeners = [[target, "keydown", onKey], [root, "pointerup", onPointerUp], [root, "pointermove", ticking.touch, { passive: true }], [root, "wheel", ticking.touch, { passive: true }],
    [root, "pointerdown", (event) => { const menu = root.querySelector("details.s3ft-menu[open]"); if (menu && !menu.contains(event.target)) menu.open = false; }],
    [root, "click", () => { if (!root.contains(root.getRootNode().activeElement)) parts.article.focus({ preventScroll: true }); }], // the button is gone, the keys should not be
    [document, "selectionchange", onSelection], [document, "visibilitychange", leave], [window, "pagehide", () => { settle(); store.flush?.(); }]];
  for (const [node, type, handler, options] of listeners) node.addEventListener(type, handler, options);

  drawFrame();
  current = nextOpen(null);
  ticking.set(current === null ? 0 : draftOf(current).ms);
  drawItem();
  if (wholePage) parts.article.focus({ preventScroll: true });
  return () => { settle(); for (const [node, type, handler, options] of listeners) node.removeEventListener(type, handler, options); root.replaceChildren(); };
}

// ---------------------------------------------------------------- asking for a name, saying one thing

function askName({ root, words, language }) {
  const { texts } = words[language] ?? words.en;
  return new Promise((resolve) => {
    const input = h("input", { id: "s3ft-who", maxlength: "80", autocomplete: "username", required: true, dir: "auto" });
    const form = h("form", { class: "card" }, h("h1", {}, texts.who), h("label", { for: "s3ft-who" }, texts.who_why), input, h("button", { class: "primary" }, texts.start));
    form.addEventListener("submit", (event) => { event.preventDefault(); const name = input.value.trim(); if (name) resolve(name); });
    root.classList.add("s3ft", "s3ft-whole", "s3ft-alone");
    root.lang = language;
    root.replaceChildren(form);
    input.focus();
  });
}

function tell({ root, words, language, name }) {
  root.classList.add("s3ft", "s3ft-whole", "s3ft-alone");
  root.replaceChildren(h("p", { class: "card", role: "alert" }, (words[language] ?? words.en).texts[name]));
}
