"use strict";
(() => {
  const root = document.documentElement;
  const media = matchMedia("(prefers-color-scheme: dark)");
  const read = (name) => {
    const element = document.getElementById(name);
    return element ? JSON.parse(element.textContent) : null;
  };
  const color = (name) => getComputedStyle(root).getPropertyValue(`--${name}`).trim();
  const figures = read("figures") || {};
  const PRINTED_WIDTH = 680;
  const NARROW = 560;
  let printing = false;

  const scale = (kind) => [0, 1, 2, 3, 4].map((step) => [step / 4, color(`${kind}-${step}`)]);

  function traceOf(trace, isNarrow) {
    const role = trace.meta.role;
    const drawn = { ...trace };
    if (trace.type === "heatmap") {
      if (role === "missing") drawn.colorscale = [[0, color("missing")], [1, color("missing")]];
      else drawn.colorscale = scale({ diverging: "div", sequential: "seq", tokens: "tok" }[role]);
      if (trace.colorbar) {
        const title = { ...trace.colorbar.title };
        drawn.colorbar = { ...trace.colorbar, outlinewidth: 0, tickfont: { color: color("muted"), size: 11 }, title };
        if (isNarrow) {
          title.side = "top";
          Object.assign(drawn.colorbar, { orientation: "h", y: 1, yanchor: "bottom", len: 1, thickness: 9, x: 0.5 });
        }
      }
    } else if (role === "predicted") {
      drawn.marker = { ...trace.marker, color: color("predicted"), line: { ...trace.marker.line, color: color("predicted") } };
    } else {
      drawn.marker = { color: color(role.replace(" ", "-")) };
    }
    return drawn;
  }

  function layoutOf(layout, width, isHeat, isNarrow) {
    const text = color("text");
    const axis = (given) => ({ ...given, gridcolor: color("line"), linecolor: color("line"), tickcolor: color("line"), tickfont: { size: isNarrow ? 10 : 11.5 } });
    return {
      ...layout,
      width,
      height: layout.height + (isNarrow && isHeat ? 40 : 0),
      xaxis: axis(layout.xaxis),
      yaxis: axis(layout.yaxis),
      margin: { l: 8, r: 8, t: isHeat ? 12 : 44, b: 46, pad: 2 },
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: isHeat ? color("blank") : "rgba(0,0,0,0)",
      font: { family: "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif", size: 12.5, color: text },
      hoverlabel: { bgcolor: color("card"), bordercolor: color("line"), font: { color: text, size: 12.5 }, align: "left" },
      dragmode: false,
    };
  }

  function draw() {
    for (const [name, figure] of Object.entries(figures)) {
      const element = document.getElementById(name);
      if (!element) continue;
      const width = printing ? PRINTED_WIDTH : Math.max(element.clientWidth, 240);
      const isHeat = figure.data[0].type === "heatmap";
      const isNarrow = width < NARROW;
      const layout = layoutOf(figure.layout, width, isHeat, isNarrow);
      element.style.height = `${layout.height}px`;
      const data = figure.data.map((trace) => traceOf(trace, isNarrow));
      Plotly.react(element, data, layout, { displaylogo: false, displayModeBar: false, responsive: false });
    }
  }

  const button = document.getElementById("theme");
  function setTheme(theme) {
    root.dataset.theme = theme;
    button.textContent = theme === "dark" ? "Light theme" : "Dark theme";
    draw();
  }
  button.hidden = false;
  button.addEventListener("click", () => {
    const theme = root.dataset.theme === "dark" ? "light" : "dark";
    try { localStorage.setItem("seqbuild-theme", theme); } catch { /* a file without storage */ }
    setTheme(theme);
  });
  media.addEventListener("change", (event) => setTheme(event.matches ? "dark" : "light"));
  setTheme(root.dataset.theme);

  let before = null;
  const startPrint = () => {
    if (printing) return;
    printing = true;
    before = root.dataset.theme;
    setTheme("light");
  };
  const endPrint = () => {
    if (!printing) return;
    printing = false;
    setTheme(before);
  };
  addEventListener("beforeprint", startPrint);
  addEventListener("afterprint", endPrint);
  matchMedia("print").addEventListener("change", (event) => (event.matches ? startPrint() : endPrint()));
  let waiting = 0;
  let lastWidth = innerWidth;
  addEventListener("resize", () => {
    if (printing || innerWidth === lastWidth) return;
    lastWidth = innerWidth;
    clearTimeout(waiting);
    waiting = setTimeout(draw, 120);
  });

  const table = document.getElementById("table");
  if (!table) return;
  const rows = (read("facts") || {}).modules || [];
  const PAGE = innerWidth < NARROW ? 20 : 50;
  const number = (value) => (value === null || value === undefined ? "not finite" : Number(value).toPrecision(4).replace(/\.?0+$|\.?0+(?=e)/, ""));
  const error = (value) => (value === null ? "not finite" : (value >= 1e-4 && value < 1e6) || value === 0 ? value.toFixed(4) : value.toExponential(2));
  const duration = (value) => (value && value < 0.001 ? "< 0.001" : number(value));
  const whole = (value) => (value || 0).toLocaleString("en");
  const size = (value) => {
    let rest = value || 0;
    for (const unit of ["B", "kB", "MB", "GB", "TB"]) {
      if (rest < 1000 || unit === "TB") return `${unit === "B" ? rest : rest.toFixed(1)} ${unit}`;
      rest /= 1000;
    }
    return "";
  };
  const text = (value) => value || "";
  // Names, positions in the facts, and how values are shown; positions 1 and 3 are ModuleFacts.algorithm and error.
  const possible = [
    ["Module", 0, text], ["Error", 3, error], ["Loss", 4, number], ["Dampening", 5, number], ["Tokens", 6, whole],
    ["Dead channels", 7, whole], ["Algorithm", 1, text], ["Scheme", 2, text], ["Size", 10, size], ["Solve, s", 9, duration], ["Fallback", 8, text],
  ];
  const defaults = ["", "", "", 0, 0, 0, 0, 0, "", 0, 0];
  const valueOf = (row, at) => (at < row.length ? row[at] : defaults[at]);
  const OPTIONAL = ["Dead channels", "Fallback"]; // left out if they are 0 or empty for every module
  const columns = possible.filter(([title, at]) => !OPTIONAL.includes(title) || rows.some((row) => valueOf(row, at)));
  const isText = (show) => show === text;
  const DETAILS = ["Dead channels", "Scheme", "Solve, s", "Fallback"]; // which are not printed
  const classOf = (index, show) => {
    const title = columns[index][0];
    const kind = !index ? "name" : !isText(show) ? "number" : ["Scheme", "Fallback"].includes(title) ? "text wide" : "text";
    return DETAILS.includes(title) ? `${kind} detail` : kind;
  };
  const state = { column: 1, descending: true, page: 0, filter: "" };

  const header = document.createElement("tr");
  columns.forEach(([title, , show], index) => {
    const cell = document.createElement("th");
    cell.scope = "col";
    cell.className = classOf(index, show);
    const sorter = document.createElement("button");
    sorter.type = "button";
    sorter.textContent = title;
    sorter.addEventListener("click", () => {
      state.descending = state.column === index ? !state.descending : !isText(show);
      state.column = index;
      state.page = 0;
      fill();
    });
    cell.append(sorter);
    header.append(cell);
  });
  table.tHead.append(header);

  function compare(a, b) {
    const [, at, show] = columns[state.column];
    const [first, second] = [valueOf(a, at), valueOf(b, at)];
    // What is not finite comes first among the largest.
    const order = isText(show) ? first.localeCompare(second, "en", { numeric: true }) : (first ?? Infinity) - (second ?? Infinity) || 0;
    return state.descending ? -order : order;
  }

  function fill() {
    const wanted = state.filter.toLowerCase();
    const chosen = rows.filter((row) => !wanted || [0, 1, 2, 8].some((at) => String(valueOf(row, at)).toLowerCase().includes(wanted)));
    chosen.sort(compare);
    const pages = Math.max(1, Math.ceil(chosen.length / PAGE));
    state.page = Math.min(state.page, pages - 1);
    const begin = state.page * PAGE;
    const body = document.createElement("tbody");
    for (const row of chosen.slice(begin, begin + PAGE)) {
      const line = document.createElement("tr");
      columns.forEach(([, at, show], index) => {
        const cell = document.createElement(index ? "td" : "th");
        cell.className = classOf(index, show);
        if (index) cell.textContent = show(valueOf(row, at));
        else {
          cell.scope = "row";
          // Names may break after dots.
          row[0].split(".").forEach((part, place) => cell.append(...(place ? [".", document.createElement("wbr"), part] : [part])));
        }
        line.append(cell);
      });
      body.append(line);
    }
    table.tBodies[0].replaceWith(body);
    [...header.cells].forEach((cell, index) => cell.setAttribute("aria-sort", index !== state.column ? "none" : state.descending ? "descending" : "ascending"));
    const end = Math.min(begin + PAGE, chosen.length);
    document.getElementById("shown").textContent = chosen.length ? `${begin + 1} to ${end} of ${chosen.length.toLocaleString("en")}` : "no module";
    document.getElementById("previous").disabled = !state.page;
    document.getElementById("next").disabled = state.page >= pages - 1;
  }
  document.getElementById("filter").addEventListener("input", (event) => { state.filter = event.target.value; state.page = 0; fill(); });
  document.getElementById("previous").addEventListener("click", () => { state.page -= 1; fill(); });
  document.getElementById("next").addEventListener("click", () => { state.page += 1; fill(); });
  fill();
})();
