// The browser of trajectories: filters, a list of problems, and one of them with its candidates side by side.

const PAGE = 100; // problems listed at once
const PROMPT_SHOWN = 90; // characters of the prompt before what is trained
const CONTROL = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]/g;
const code = (character) => `[U+${character.charCodeAt(0).toString(16).toUpperCase().padStart(4, "0")}]`;
const visible = (text) => String(text).replace(/\r\n/g, "\n").replace(CONTROL, code);
const whole = (part) => part.text + (part.tail ?? "") + (part.untrained ? whole(part.untrained) : "");
const VERDICTS = { true: "✓ correct", false: "✗ wrong", null: "? not checked" };
let pools = [];
let pool = null;
let shown = [];
let listed = 0;
let opened = null;
let byRule = 0;

async function unpack() {
  const bytes = Uint8Array.from(atob(one("#packed").textContent), (character) => character.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).json();
}

function options(select, first, names) {
  select.replaceChildren(
    element("option", { value: "" }, first),
    ...names.map((name, index) => element("option", { value: index }, visible(name))),
  );
}

function usePool(number) {
  pool = pools[number];
  byRule = Math.max(0, pool.rules.findIndex((rule) => rule.scored));
  options(one("#teacher"), "any", pool.teachers);
  options(one("#rule"), "any rule or none", pool.rules.map((rule) => rule.label));
  for (const problem of pool.problems) {
    problem.searched = [problem.problem_id, whole(problem.question), ...problem.rows.map(whole)].join("\n").toLowerCase();
  }
  filter();
}

function matching(problem) {
  const [teacher, rule, correct] = ["#teacher", "#rule", "#correct"].map((id) => one(id).value);
  return problem.rows.filter(
    (row) =>
      (teacher === "" || row.teacher === Number(teacher)) &&
      (rule === "" || row.chosen.some((choice) => choice[0] === Number(rule))) &&
      (correct === "" || String(row.correct) === correct),
  );
}

function filter() {
  const wanted = one("#search").value.trim().toLowerCase();
  if (one("#rule").value !== "") byRule = Number(one("#rule").value);
  shown = pool.problems
    .filter((problem) => problem.searched.includes(wanted))
    .map((problem) => ({ problem, rows: matching(problem) }))
    .filter((entry) => entry.rows.length);
  const rows = shown.reduce((sum, entry) => sum + entry.rows.length, 0);
  const total = pool.problems.reduce((sum, problem) => sum + problem.rows.length, 0);
  const count = (number) => number.toLocaleString("en");
  one("#matches").textContent =
    `${count(rows)} of ${count(total)} trajectories match, in ${count(shown.length)} of ${count(pool.problems.length)} problems.`;
  one("#problems").replaceChildren();
  listed = 0;
  list();
  const still = shown.find((entry) => entry.problem === opened) ?? shown[0];
  if (still) open(still, false);
  else {
    opened = null;
    one("#problem").replaceChildren(element("p", { class: "missing" }, "No trajectory matches these filters."));
  }
}

function list() {
  for (const entry of shown.slice(listed, listed + PAGE)) {
    const { problem, rows } = entry;
    const button = element(
      "button",
      { type: "button" },
      element("small", {}, `${visible(problem.problem_id)} · ${rows.length} of ${problem.rows.length} candidates`),
      element("span", { class: "what", dir: "auto" }, visible(problem.question.text.slice(0, 200)) || "(no text)"),
    );
    button.addEventListener("click", () => open(entry, true));
    entry.button = button;
    one("#problems").append(element("li", {}, button));
  }
  listed = Math.min(listed + PAGE, shown.length);
  one("#more").hidden = listed >= shown.length;
}

const number = (value, digits = 4) => (value === null ? "none" : Number(value.toPrecision(digits)).toString());
const text = (part) => [
  visible(part.text),
  ...(part.tail === undefined
    ? []
    : [element("span", { class: "left-out" }, `… ${part.left_out.toLocaleString("en")} characters left out here …`), visible(part.tail)]),
];

function trajectory(row, prompt) {
  const before = (prompt.tail ?? prompt.text).slice(-PROMPT_SHOWN);
  const box = element("div", { class: "trajectory text", dir: "auto", tabindex: "0", role: "group", "aria-label": "Text" });
  box.append(element("span", { class: "untrained mono" }, `…${visible(before)}`));
  const mark = element("mark", {}, ...text(row));
  if (row.end) mark.append(element("span", { class: "end mono", title: "end of turn, trained too" }, visible(row.end.replace(/\n/g, "⏎"))));
  box.append(mark);
  if (row.untrained) {
    box.append(element("span", { class: "left-out" }, "cut to task.max_length here; what follows is not trained"));
    box.append(element("span", { class: "untrained" }, ...text(row.untrained)));
  }
  return box;
}

function card(row, problem, ranks) {
  const chosen = row.chosen.map(([rule, weight, seeds]) => {
    const { label, seeds: every } = pool.rules[rule];
    const often = seeds < every.length ? ` (${seeds} of ${every.length} seeds)` : "";
    return element("li", { class: rule === byRule ? "now" : null }, `${visible(label)} × ${number(weight, 3)}${often}`);
  });
  const own = row.chosen.find((choice) => choice[0] === byRule);
  const facts = [["trained tokens", `${row.tokens.toLocaleString("en")} (${row.characters.toLocaleString("en")} characters)`]];
  if (row.loss !== null) facts.push(["loss", `${number(row.loss)} nats/token`]);
  if (pool.rules.length) {
    const score = row.scores[byRule];
    facts.unshift(["score", score === null ? "none" : `${number(score)} (rank ${ranks.get(row)} of ${ranks.size})`]);
    facts.splice(1, 0, ["weight", own ? number(own[1]) : "0, not chosen"]);
  }
  return element(
    "article",
    { class: own ? "card chosen" : "card" },
    element(
      "div",
      { class: "head" },
      element("h4", {}, element("bdi", {}, visible(pool.teachers[row.teacher])), " ", element("small", {}, visible(row.id))),
      element("span", { class: `verdict ${row.correct}` }, VERDICTS[row.correct]),
    ),
    element("dl", {}, ...facts.flatMap(([name, value]) => [element("dt", {}, name), element("dd", {}, value)])),
    chosen.length ? element("ul", { class: "chips", "aria-label": "Chosen by, with its weight" }, ...chosen) : element("small", { class: "untrained" }, "chosen by no rule"),
    trajectory(row, problem.prompt),
  );
}

function open(entry, move) {
  const { problem, rows } = entry;
  opened = problem;
  for (const button of one("#problems").querySelectorAll("[aria-current]")) button.removeAttribute("aria-current");
  entry.button?.setAttribute("aria-current", "true");
  const at = shown.indexOf(entry);
  const step = (by, name) => {
    const button = element("button", { type: "button", disabled: shown[at + by] ? null : "" }, name);
    button.addEventListener("click", () => {
      while (at + by >= listed) list();
      open(shown[at + by], true);
    });
    return button;
  };
  const score = (row) => row.scores[byRule] ?? null;
  const ordered = problem.rows.filter((row) => score(row) !== null).sort((a, b) => score(b) - score(a));
  const ranks = new Map(ordered.map((row, index) => [row, index + 1]));
  const cards = [...rows].sort((a, b) => (ranks.get(a) ?? Infinity) - (ranks.get(b) ?? Infinity));
  const view = one("#problem");
  const parts = [];
  const chooser = element("select", { id: "by-rule" }, ...pool.rules.map((rule, index) => element("option", { value: index, selected: index === byRule ? "" : null }, visible(rule.label))));
  chooser.addEventListener("change", () => {
    byRule = Number(chooser.value);
    open(entry, false);
    one("#by-rule").focus();
  });
  const marks = [element("mark", {}, "Marked"), " text is what the student is trained on, its end of turn in a box; before it stands the end of the prompt."];
  parts.push(
    element("header", {}, element("h3", {}, `Problem ${visible(problem.problem_id)}`), element("div", { class: "steps" }, step(-1, "Previous"), step(1, "Next"))),
    element("div", { class: "question text", dir: "auto" }, ...text(problem.question)),
    element("p", { class: "key" }, problem.answer === null ? "No answer is given. " : `Answer: ${visible(problem.answer)}. `, ...marks),
    element("details", {}, element("summary", {}, "The prompt as the student reads it (not trained)"), element("div", { class: "text mono", dir: "auto" }, ...text(problem.prompt))),
  );
  if (pool.rules.length) parts.push(element("p", { class: "choose" }, element("label", {}, "Score, weight and order by ", chooser)));
  if (rows.length < problem.rows.length) {
    parts.push(element("p", { class: "key" }, `${rows.length} of its ${problem.rows.length} candidates match the filters.`));
  }
  view.replaceChildren(...parts, element("div", { class: "cards" }, ...cards.map((row) => card(row, problem, ranks))));
  if (move) {
    view.focus({ preventScroll: true });
    if (view.getBoundingClientRect().top < 0 || view.getBoundingClientRect().top > innerHeight / 2) view.scrollIntoView();
  }
}

async function browse() {
  if (!one("#problems")) return;
  if (typeof DecompressionStream === "undefined") {
    one("#matches").textContent = "This browser is too old to unpack the trajectories.";
    return;
  }
  pools = await unpack();
  let typing = 0;
  one("#search").addEventListener("input", () => {
    clearTimeout(typing);
    typing = setTimeout(filter, 120);
  });
  for (const id of ["#teacher", "#rule", "#correct"]) one(id).addEventListener("change", filter);
  one("#pool")?.addEventListener("change", (event) => usePool(Number(event.target.value)));
  one("#filters").addEventListener("submit", (event) => event.preventDefault());
  one("#more").addEventListener("click", list);
  usePool(0);
}
