// What the page's parts share, tables, theme and print, and the order in which all comes to life.

const one = (selector) => document.querySelector(selector);
const all = (selector) => [...document.querySelectorAll(selector)];
const data = JSON.parse(one("#data").textContent);

function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined && value !== false) made.setAttribute(key, value);
  }
  made.append(...children);
  return made;
}

function reached(stage) {
  performance.mark(stage);
  document.documentElement.dataset.page = stage;
}

// ---- tables

function sortBy(header) {
  const row = header.parentElement;
  const body = row.closest("table").tBodies[0];
  const column = [...row.cells].indexOf(header);
  const down = header.getAttribute("aria-sort") ? header.getAttribute("aria-sort") === "ascending" : column > 0;
  for (const other of row.cells) other.removeAttribute("aria-sort");
  header.setAttribute("aria-sort", down ? "descending" : "ascending");
  const sign = down ? -1 : 1;
  const keyed = [...body.rows].map((line) => {
    const cell = line.cells[column];
    return { line, value: parseFloat(cell.dataset.value), text: cell.textContent.trim() };
  });
  keyed.sort((a, b) => {
    if (!a.text || !b.text) return (a.text ? 0 : 1) - (b.text ? 0 : 1); // what is missing comes last
    if (Number.isFinite(a.value) && Number.isFinite(b.value)) return sign * (a.value - b.value);
    return sign * a.text.localeCompare(b.text, undefined, { numeric: true });
  });
  body.append(...keyed.map((entry) => entry.line));
}
for (const button of all(".sort")) button.addEventListener("click", () => sortBy(button.parentElement));

// ---- theme and print

const toggle = one("#theme");
function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  toggle.textContent = theme === "dark" ? "Light theme" : "Dark theme"; // what a press makes of it
  if (typeof Plotly !== "undefined") for (const box of all("div.plot")) if (box.childElementCount) draw(box);
}
setTheme(document.documentElement.dataset.theme);
toggle.addEventListener("click", () => {
  const theme = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
  try {
    localStorage.setItem("lark-theme", theme);
  } catch (error) {
    if (!(error instanceof DOMException)) throw error; // storage may be switched off
  }
  setTheme(theme);
});

let themeBefore = null;
addEventListener("beforeprint", () => {
  themeBefore = document.documentElement.dataset.theme;
  document.documentElement.dataset.theme = "light"; // paper is
  printing = true;
  if (typeof Plotly !== "undefined") drawAll();
});
addEventListener("afterprint", () => {
  document.documentElement.dataset.theme = themeBefore;
  printing = false;
  if (typeof Plotly !== "undefined") drawAll();
});

// ---- start

async function start() {
  try {
    await browse();
    reached("listed");
  } finally {
    await loadPlotly();
    await drawVisible();
    reached("opened");
    await drawRest();
  }
}
