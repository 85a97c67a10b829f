"use strict";
(function () {
  const data = JSON.parse(document.getElementById("dialogue-data").textContent);
  const signs = {yes: "\u2713", no: "\u2717", unknown: "?", none: "\u00b7"};
  const words = {yes: "satisfied", no: "violated", unknown: "could not be read", none: "does not apply"};
  const order = ["no", "unknown", "yes", "none"];
  const byId = (id) => document.getElementById(id);
  const list = byId("dialogue-list"), count = byId("dialogue-count");

  // Rows become dialogues of turns: {title, prompt, prompt_title, system_prompt, turns: [{turn, user, stance, system, responses}]}.
  const cut = (text, most) => text.length > most ? text.slice(0, most) + " …" : text;
  const markOf = (row) => row.applicable === false ? "none" : row.satisfied === true ? "yes" : row.satisfied === false ? "no" : "unknown";

  function ruleOf(row, length) {  // evidence only where it lies inside the text that is shown
    const span = row.evidence, whole = Array.isArray(span) && span.length === 2 && span.every(Number.isInteger);
    const fits = whole && span[0] >= 0 && span[0] < span[1] && span[1] <= length;
    return {rule: row.rule_id, mark: markOf(row), judge: row.judge, why: row.why, span: fits ? span : null};
  }

  const dialogues = data.dialogues.map((one) => {
    const turns = new Map();
    for (const row of one.responses) {
      if (!turns.has(row.turn)) turns.set(row.turn, {turn: row.turn, user: row.user, stance: "", system: "", ...one.plan[row.turn], responses: {}});
      const length = Array.from(row.text).length;
      turns.get(row.turn).responses[row.arm] = {text: row.text, more: row.more, rules: row.verdicts.map((verdict) => ruleOf(verdict, length))};
    }
    const ordered = [...turns.values()].sort((a, b) => a.turn - b.turn);
    return {...one, title: cut(ordered[0].user, 70), prompt_title: cut(one.system_prompt, 60), turns: ordered};
  });

  // Every text goes in as a text node, so content can never become markup.
  function make(tag, classes, ...children) {
    const node = document.createElement(tag);
    if (classes) node.className = classes;
    for (const child of children) if (child !== null && child !== "") node.append(child);
    return node;
  }

  function marked(text, rules) {  // evidence spans; violated outweighs satisfied
    const spans = rules.filter((rule) => rule.span && (rule.mark === "yes" || rule.mark === "no"));
    const chars = Array.from(text);  // spans count characters, not UTF-16 units
    const cuts = [...new Set([0, chars.length, ...spans.flatMap((rule) => rule.span)])].filter((n) => n >= 0 && n <= chars.length);
    cuts.sort((a, b) => a - b);
    const box = make("p", "");
    box.dir = "auto";
    for (let i = 0; i + 1 < cuts.length; i++) {
      const part = chars.slice(cuts[i], cuts[i + 1]).join("");
      const over = spans.filter((rule) => rule.span[0] <= cuts[i] && cuts[i] < rule.span[1]).map((rule) => rule.mark);
      box.append(over.length ? make("mark", over.includes("no") ? "no" : "yes", part) : part);
    }
    if (!chars.length) box.append("(empty response)");
    return box;
  }

  function verdictOf(rules) {
    return order.find((mark) => rules.some((rule) => rule.mark === mark)) || "";
  }

  function shownRules(response, rule) {
    return rule ? response.rules.filter((one) => one.rule === rule) : response.rules;
  }

  function responseBox(arm, response, rule) {
    const rules = shownRules(response, rule), mark = verdictOf(rules), broken = rules.filter((one) => one.mark === "no").length;
    const verdict = !rules.length ? "not judged" : broken ? `${broken} of ${rules.length} violated` : words[mark];
    const box = make("div", "response " + mark, make("div", "head", make("span", "", arm), make("span", "verdict", verdict)));
    box.append(marked(response.text, rules));
    if (response.more) box.append(make("p", "more", `… ${response.more} more characters`));
    const sorted = [...rules].sort((a, b) => order.indexOf(a.mark) - order.indexOf(b.mark));
    if (sorted.length) box.append(make("ul", "rules", ...sorted.map((one) => {
      const why = [one.judge, one.why].filter(Boolean).join(": ");
      const sign = make("span", "sign", signs[one.mark]);
      sign.setAttribute("role", "img");
      sign.setAttribute("aria-label", words[one.mark]);
      return make("li", one.mark, sign, data.rules[one.rule] || one.rule, why ? make("small", "", " " + why) : null);
    })));
    return box;
  }

  function strip(dialogue, arms, rule, place) {
    const head = make("tr", "", make("td", ""), ...dialogue.turns.map((turn) => {
      const cell = make("th", "", String(turn.turn));
      cell.scope = "col";
      return cell;
    }));
    const rows = arms.map((arm) => {
      const name = make("th", "", arm);
      name.scope = "row";
      return make("tr", "", name, ...dialogue.turns.map((turn) => {
        const response = turn.responses[arm];
        if (!response) return make("td", "", make("span", "", "\u00a0"));
        const mark = verdictOf(shownRules(response, rule)), link = make("a", mark, signs[mark] || "\u2013");
        link.href = `#d${place}-t${turn.turn}`;
        link.title = `turn ${turn.turn}: ${words[mark] || "not judged"}`;
        link.setAttribute("aria-label", `${arm}, ${link.title}`);
        return make("td", "", link);
      }));
    });
    const box = make("div", "scroll", make("table", "strips", make("thead", "", head), make("tbody", "", ...rows)));
    box.tabIndex = 0;
    box.setAttribute("role", "region");
    box.setAttribute("aria-label", `Verdicts of dialogue ${place}, turn by turn`);
    return box;
  }

  function isBroken(turn, arms, rule) {
    return arms.some((arm) => turn.responses[arm] && verdictOf(shownRules(turn.responses[arm], rule)) === "no");
  }

  function fill(box, dialogue, arms, rule, onlyBroken, place) {
    const prompt = make("p", "prompt", make("b", "", "System prompt"), dialogue.system_prompt);
    prompt.dir = "auto";
    const turns = make("ol", "turns");
    for (const turn of dialogue.turns) {
      if (onlyBroken && !isBroken(turn, arms, rule)) continue;
      const user = make("p", "user", make("b", "", `Turn ${turn.turn}, user`),
        turn.stance && turn.stance !== "neutral" ? make("span", "stance " + (turn.stance === "aligned" ? "aligned" : ""), turn.stance) : null, turn.user);
      user.dir = "auto";
      const shown = arms.filter((arm) => turn.responses[arm]).map((arm) => responseBox(arm, turn.responses[arm], rule));
      const item = make("li", "", turn.system ? make("p", "changed", make("b", "", "System prompt from here on: "), turn.system) : null,
        user, make("div", "responses", ...shown));
      item.id = `d${place}-t${turn.turn}`;
      turns.append(item);
    }
    box.replaceChildren(prompt, strip(dialogue, arms, rule, place), turns);
  }

  function draw() {
    const arms = data.arms.filter((_, i) => { const box = byId("arm-" + i); return !box || box.checked; });
    const prompt = byId("filter-prompt").value, rule = byId("filter-rule").value, onlyBroken = byId("only-broken").checked;
    list.replaceChildren();
    let shown = 0;
    dialogues.forEach((dialogue, i) => {
      const turns = dialogue.turns.filter((turn) => arms.some((arm) => turn.responses[arm]));
      const broken = turns.filter((turn) => isBroken(turn, arms, rule)).length;
      if ((prompt && dialogue.prompt !== prompt) || !turns.length || (onlyBroken && !broken)) return;
      const title = `${dialogue.title} (${broken} of ${turns.length} turns with a violation)`;
      const body = make("div", "");
      const details = make("details", "", make("summary", "", title), body);
      const open = () => { if (details.open && !body.firstChild) fill(body, dialogue, arms, rule, onlyBroken, i + 1); };
      details.addEventListener("toggle", open);
      if (!shown) { details.open = true; open(); }
      list.append(details);
      shown += 1;
    });
    count.textContent = shown ? `${shown} of ${dialogues.length} dialogues shown.` : "No dialogue fits these filters.";
  }

  function options(id, pairs, all) {
    const select = byId(id);
    for (const [value, text] of [["", all], ...pairs]) {
      const option = make("option", "", text);
      option.value = value;
      select.append(option);
    }
    select.parentElement.hidden = pairs.length < 2;
  }

  options("filter-prompt", [...new Map(dialogues.map((one) => [one.prompt, one.prompt_title]))], "all");
  options("filter-rule", Object.entries(data.rules).map(([id, text]) => [id, cut(text, 60)]), "all");
  if (data.arms.length > 1) data.arms.forEach((arm, i) => {
    const box = make("input", "");
    box.type = "checkbox";
    box.checked = true;
    box.id = "arm-" + i;
    byId("filter-arms").append(make("label", "", box, arm));
  });
  byId("filter-arms").hidden = data.arms.length < 2;
  byId("filters").hidden = false;
  byId("filters").addEventListener("change", draw);
  window.addEventListener("beforeprint", () => { for (const one of list.children) one.open = one.open || one === list.firstChild; });
  draw();
})();
