// Plotly's figures, in the page's colours and as wide as there is room.

const PRINTED = 670; // pixels of a page's width
let printing = false;
const views = new Map(); // by plot, which of its choices is shown

function resolved(value, style) {
  if (typeof value === "string") {
    return value.startsWith("var(--") ? style.getPropertyValue(value.slice(4, -1)).trim() : value;
  }
  if (Array.isArray(value)) return value.map((inner) => resolved(inner, style));
  if (value && typeof value === "object") {
    return Object.fromEntries(Object.entries(value).map(([key, inner]) => [key, resolved(inner, style)]));
  }
  return value;
}

function styled(key, box, width) {
  const style = getComputedStyle(document.documentElement);
  const [text, line, panel, muted] = ["--text", "--line", "--panel", "--muted"].map((n) => style.getPropertyValue(n).trim());
  const { data: traces, layout } = resolved(data.plots[key].figure, style);
  const view = views.get(key) ?? 0;
  for (const trace of traces) if (trace.meta !== undefined) trace.visible = trace.meta === view;
  const axis = { gridcolor: line, linecolor: line, zerolinecolor: muted, automargin: true, zeroline: false };
  const axes = Object.fromEntries(
    [...new Set(["xaxis", "yaxis", ...Object.keys(layout).filter((name) => /^[xy]axis/.test(name))])].map((name) => [
      name,
      { ...axis, ...layout[name], title: { font: { size: 13 }, standoff: 12, ...layout[name]?.title } },
    ]),
  );
  const narrow = width < 560;
  const legend = narrow || layout.legend ? { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", ...layout.legend } : {};
  const entries = new Set(traces.filter((t) => t.showlegend !== false && t.visible !== false && t.name).map((t) => t.name));
  const lines = legend.orientation ? Math.ceil((entries.size * 170) / Math.max(width - 80, 200)) : 0;
  if (narrow) {
    for (const axisOf of Object.values(axes)) axisOf.tickfont = { size: 10 };
    for (const trace of traces) if (trace.texttemplate && trace.x.length > 5) trace.texttemplate = ""; // too small to read
  }
  const scale = printing ? 0.85 : 1; // two plots a sheet
  return [
    traces,
    {
      ...layout,
      ...axes,
      width,
      height: scale * layout.height + (narrow ? 24 * Math.max(0, lines - 1) : 0),
      legend: { ...legend, font: { size: 12 }, itemsizing: "constant" },
      font: { family: getComputedStyle(document.body).fontFamily, size: 13, color: text },
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      margin: { l: 10, r: 16, t: legend.orientation ? 24 + 22 * lines : 24, b: 10 },
      hoverlabel: { bgcolor: panel, bordercolor: line, font: { color: text } },
      dragmode: matchMedia("(pointer: coarse)").matches ? false : "zoom",
    },
  ];
}

const CONFIG = {
  displayModeBar: matchMedia("(hover: hover)").matches ? "hover" : false,
  displaylogo: false,
  modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]],
  showSendToCloud: false, // a pool may be confidential
  plotlyServerURL: "",
};

function draw(box) {
  const width = printing ? PRINTED : box.clientWidth;
  const [traces, layout] = styled(box.dataset.plot, box, width);
  return Plotly.react(box, traces, layout, CONFIG);
}

const drawAll = () => Promise.all(all("div.plot").map(draw));

const idle = () => new Promise((resolve) => (window.requestIdleCallback ?? setTimeout)(resolve, { timeout: 500 }));

// After the rest of the page has come to life: the library is large.
function loadPlotly() {
  const script = element("script", { src: data.plotly, charset: "utf-8" });
  return new Promise((resolve) => {
    script.addEventListener("load", resolve);
    script.addEventListener("error", resolve);
    document.head.append(script);
  });
}

async function drawVisible() {
  if (typeof Plotly === "undefined") {
    for (const box of all("div.plot")) {
      box.removeAttribute("style");
      const says = `plots, which take plotly.min.js at ${data.plotly}. To share a page by itself, write it with python -m lark.report FOLDER --page FILE.html, which puts the file beside it.`;
      box.replaceChildren(element("p", { class: "missing" }, element("strong", {}, "Not here: "), says));
    }
    return;
  }
  for (const box of all("div.plot")) if (box.getBoundingClientRect().top < 1.2 * innerHeight) await draw(box);
}

async function drawRest() {
  if (typeof Plotly === "undefined") return;
  for (const box of all("div.plot")) {
    if (box.childElementCount) continue;
    await idle(); // lets clicks and scrolling through
    await draw(box);
  }
  reached("drawn");
}

for (const select of all("select[data-plot]")) {
  select.addEventListener("change", () => {
    const key = select.dataset.plot;
    views.set(key, Number(select.value));
    one(`[data-remark="${key}"]`).textContent = data.plots[key].remarks[select.value];
    draw(one(`div.plot[data-plot="${key}"]`));
  });
}

let waiting = 0;
let widthBefore = innerWidth;
addEventListener("resize", () => {
  if (innerWidth === widthBefore || typeof Plotly === "undefined") return; // a phone's address bar changes the height
  widthBefore = innerWidth;
  clearTimeout(waiting);
  waiting = setTimeout(() => drawAll(), 150);
});
