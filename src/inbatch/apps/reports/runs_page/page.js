"use strict";
(() => {
  const runs = JSON.parse(document.getElementById("data").textContent).runs;
  const root = document.documentElement, by = (id) => document.getElementById(id);
  const CHARTS = [["knn", "k-NN accuracy", 100, " %"], ["loss", "Loss", 1, ""], ["feature_std", "Feature std", 1, ""],
    ["rankme", "RankMe", 1, ""]];
  const DASHES = ["", "7 4", "2 3", "10 3 2 3"];
  const COLOURS = 7, FIRST = 7;
  const figure = (name) => (run) => run.figures[name];
  const setting = (name) => (run) => run.settings[name];
  const number = (text) => (text === undefined || text === "" || Number.isNaN(Number(text)) ? null : Number(text));
  const percent = (v) => (100 * v).toFixed(1) + " %";
  const short = (v) => (Math.abs(v) >= 100 ? v.toFixed(0) : v.toPrecision(3));
  const duration = (s) => (s < 90 ? s.toFixed(0) + " s" : s < 5400 ? (s / 60).toFixed(0) + " min" : (s / 3600).toFixed(1) + " h");
  const COLUMNS = [
    ["name", "run", (run) => run.name], ["status", "status", (run) => run.status],
    ["method", "method", setting("method.name")], ["data", "data", setting("data")],
    ["encoder", "encoder", setting("encoder.name")],
    ["seed", "seed", (run) => number(run.settings.seed), String], ["epochs", "epochs", (run) => run.epochs, String],
    ["knn", "k-NN", figure("knn"), percent], ["linear", "linear", figure("linear"), percent],
    ["nmi", "NMI", figure("nmi"), percent], ["loss", "loss", figure("loss"), short],
    ["feature_std", "feature std", figure("feature_std"), short], ["rankme", "RankMe", figure("rankme"), short],
    ["time", "time", (run) => run.seconds, duration],
  ].filter((column) => runs.some((run) => column[2](run) !== null && column[2](run) !== undefined));

  const state = { drawn: [], sort: "knn", descending: true, axis: "epoch", cursor: null };
  const style = (run) => {
    const at = run.order;
    return [`var(--c${at % COLOURS})`, DASHES[at % DASHES.length]]; // 28 pairs, which differ also without colours
  };

  function element(name, attributes = {}, ...children) {
    const node = name.startsWith("svg:") ? document.createElementNS("http://www.w3.org/2000/svg", name.slice(4))
      : document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    node.append(...children);
    return node;
  }

  function swatch(run) {
    const [colour, dash] = style(run);
    return element("svg:svg", { class: "swatch", viewBox: "0 0 34 10", "aria-hidden": "true" },
      element("svg:path", { d: "M0 5H34", class: "curve", "stroke-dasharray": dash, stroke: colour }));
  }

  function matches(run, words) {
    return words.every((word) => {
      const compared = /^([\w.]+)([<>])(-?[\d.]+(?:e-?\d+)?)$/.exec(word);
      if (compared) {
        const column = COLUMNS.find(([key]) => key === compared[1]);
        const value = column ? column[2](run) : number(run.settings[compared[1]]);
        return typeof value === "number" && (compared[2] === "<" ? value < compared[3] : value > compared[3]);
      }
      const equals = word.indexOf("=");
      if (equals > 0) {
        const key = word.slice(0, equals), wanted = word.slice(equals + 1);
        return Object.entries(run.settings).some(([name, value]) =>
          (name === key || name.endsWith("." + key) || name === key + ".name") && value.toLowerCase() === wanted);
      }
      return [run.name, run.status, run.settings["method.name"], run.settings.data, run.settings["encoder.name"]]
        .some((text) => (text || "").toLowerCase().includes(word));
    });
  }

  function shown() {
    const words = by("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
    const value = COLUMNS.find(([key]) => key === state.sort)[2], sign = state.descending ? -1 : 1;
    return runs.filter((run) => matches(run, words)).sort((a, b) => {
      const [x, y] = [value(a), value(b)], [no, missing] = [x ?? null, y ?? null];
      if (no === null || missing === null) return (no === null) - (missing === null) || a.number - b.number;
      const order = typeof x === "number" ? x - y : String(x).localeCompare(String(y), "en", { numeric: true });
      return sign * order || a.number - b.number;
    });
  }

  function draw(run, on) {
    state.drawn = state.drawn.filter((other) => other !== run);
    if (on) {
      const used = new Set(state.drawn.map((other) => other.order));
      run.order = 0;
      while (used.has(run.order)) run.order += 1;
      state.drawn.push(run);
    }
  }

  const kind = (key) => (COLUMNS.find((column) => column[0] === key).length > 3 ? { class: "number" } : {});

  function table() {
    const rows = shown();
    const head = element("tr");
    for (const [key, title] of COLUMNS) {
      const button = element("button", { type: "button" }, title);
      button.addEventListener("click", () => {
        state.descending = state.sort === key ? !state.descending : COLUMNS.find((c) => c[0] === key).length > 3;
        state.sort = key;
        table();
        by("runs").querySelectorAll("th button")[COLUMNS.findIndex((c) => c[0] === key)].focus();
      });
      const sorted = state.sort === key ? (state.descending ? "descending" : "ascending") : "none";
      head.append(element("th", { scope: "col", "aria-sort": sorted, ...kind(key) }, button));
    }
    by("runs").tHead.replaceChildren(head);
    by("runs").tBodies[0].replaceChildren(...rows.map((run) => {
      const drawn = state.drawn.includes(run), row = element("tr", drawn ? { class: "drawn" } : {});
      COLUMNS.forEach(([key, , value, text], at) => {
        const content = value(run), missing = content === null || content === undefined;
        const cell = element("td", at === 0 ? { class: "name", title: run.path } : kind(key));
        if (at === 0) {
          const box = element("input", { type: "checkbox" });
          box.checked = drawn;
          box.addEventListener("change", () => { draw(run, box.checked); update(); refocus(run); });
          cell.append(element("label", {}, box, ...(drawn ? [swatch(run)] : []), run.name));
        } else if (key === "status" && run.collapsed.length) {
          cell.append(`${content}, collapsed`);
          cell.title = run.collapsed.join("; ");
        } else if (!missing) cell.append(text ? text(content) : String(content));
        row.append(cell);
      });
      row.run = run;
      return row;
    }));
    by("count").textContent = `${rows.length} of ${runs.length} shown, ${state.drawn.length} drawn`;
  }

  function refocus(run) {
    const row = [...by("runs").tBodies[0].rows].find((one) => one.run === run);
    if (row) row.querySelector("input").focus();
  }

  function ticks(low, high) {
    const rough = (high - low) / 4 || 1, power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].map((m) => m * power).find((size) => size >= rough);
    const found = [];
    for (let at = Math.ceil(low / step) * step; at <= high + step * 1e-9; at += step) found.push(Number(at.toPrecision(12)));
    return found;
  }

  const W = 340, H = 230, LEFT = 46, RIGHT = 10, TOP = 10, BOTTOM = 34;

  function chart([key, title, scale, unit]) {
    const series = state.drawn.map((run) => ({ run, points: run.curve.filter((p) => p[key] !== null && p[state.axis] !== null)
      .map((p) => [p[state.axis], p[key] * scale]) })).filter((one) => one.points.length);
    const all = series.flatMap((one) => one.points);
    const box = element("svg:svg", { viewBox: `0 0 ${W} ${H}`, role: "img", tabindex: "0", "data-measure": key,
      "aria-label": `${title} of ${series.length} runs over ${state.axis}` });
    const node = element("figure", {}, element("figcaption", {}, title + (unit && ` (${unit.trim()})`)), box);
    if (!all.length) {
      box.append(element("svg:text", { x: W / 2, y: H / 2, "text-anchor": "middle" }, "no values"));
      return node;
    }
    const range = (at) => {
      const values = all.map((point) => point[at]), low = Math.min(...values), high = Math.max(...values);
      const more = at ? 0.05 * (high - low || Math.abs(high) || 1) : 0;
      return [low - more, high + more + (low === high && !at ? 1 : 0)];
    };
    const [x0, x1] = range(0), [y0, y1] = range(1);
    const x = (v) => LEFT + (W - LEFT - RIGHT) * (v - x0) / (x1 - x0);
    const y = (v) => H - BOTTOM - (H - TOP - BOTTOM) * (v - y0) / (y1 - y0);
    for (const at of ticks(y0, y1)) {
      box.append(element("svg:path", { class: "grid", d: `M${LEFT} ${y(at)}H${W - RIGHT}` }),
        element("svg:text", { x: LEFT - 6, y: y(at) + 4, "text-anchor": "end" }, String(at)));
    }
    for (const at of ticks(x0, x1)) {
      const text = state.axis === "time" ? duration(at) : String(at);
      box.append(element("svg:text", { x: x(at), y: H - BOTTOM + 16, "text-anchor": "middle" }, text));
    }
    box.append(element("svg:text", { x: (LEFT + W - RIGHT) / 2, y: H - 4, "text-anchor": "middle" }, state.axis));
    for (const { run, points } of series) {
      const [colour, dash] = style(run);
      const path = points.map((p, i) => `${i ? "L" : "M"}${x(p[0]).toFixed(1)} ${y(p[1]).toFixed(1)}`).join("");
      box.append(element("svg:path", { class: "curve", d: path, stroke: colour, "stroke-dasharray": dash }));
      if (points.length === 1) box.append(element("svg:circle", { cx: x(points[0][0]), cy: y(points[0][1]), r: 3, fill: colour }));
    }
    const line = element("svg:path", { class: "cursor" });
    box.append(line);
    const read = (at) => {
      state.cursor = Math.min(x1, Math.max(x0, at));
      line.setAttribute("d", `M${x(state.cursor)} ${TOP}V${H - BOTTOM}`);
      const values = series.map(({ run, points }) => {
        const near = points.reduce((a, b) => (Math.abs(b[0] - state.cursor) < Math.abs(a[0] - state.cursor) ? b : a));
        return `${run.name} ${short(near[1])}${unit}`;
      });
      const place = state.axis === "time" ? duration(state.cursor) : `${state.axis} ${short(state.cursor)}`;
      by("reading").textContent = `${title}, ${place}: ${values.join("; ")}`;
    };
    box.addEventListener("pointermove", (event) => {
      const area = box.getBoundingClientRect(), size = Math.min(area.width / W, area.height / H);
      const at = (event.clientX - area.left - (area.width - W * size) / 2) / size;
      read(x0 + (x1 - x0) * (at - LEFT) / (W - LEFT - RIGHT));
    });
    box.addEventListener("keydown", (event) => {
      const way = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (!way) return;
      event.preventDefault();
      read((state.cursor ?? x0) + way * (x1 - x0) / 40);
    });
    return node;
  }

  function differences() {
    const drawn = state.drawn;
    const names = [...new Set(drawn.flatMap((run) => Object.keys(run.settings)))].sort()
      .filter((name) => drawn.some((run) => run.settings[name] !== drawn[0].settings[name]));
    const head = element("tr", {}, element("th", { scope: "col" }, "setting"),
      ...drawn.map((run) => element("th", { scope: "col" }, run.name)));
    const rows = names.map((name) => element("tr", {}, element("th", { scope: "row" }, name),
      ...drawn.map((run) => element("td", {}, run.settings[name] ?? ""))));
    const text = drawn.length < 2 ? "Draw two or more runs to compare their settings." : "The drawn runs have the same settings.";
    by("differences").replaceChildren(...(names.length ? [element("thead", {}, head), element("tbody", {}, ...rows)]
      : [element("tbody", {}, element("tr", {}, element("td", {}, text)))]));
  }

  function update() {
    table();
    by("charts").replaceChildren(...CHARTS.map(chart));
    by("reading").textContent = "";
    differences();
  }

  const actions = {
    a: () => { const chosen = shown().filter((run) => !state.drawn.includes(run)); chosen.forEach((run) => draw(run, true)); update(); },
    c: () => { state.drawn = []; update(); },
    d: () => { root.dataset.theme = root.dataset.theme === "dark" ? "light" : "dark"; },
    x: () => { const select = by("axis"); select.selectedIndex = (select.selectedIndex + 1) % select.options.length; axis(); },
    "/": () => by("filter").focus(),
    "?": () => by("help").showModal(),
  };
  function axis() { state.axis = by("axis").value; state.cursor = null; update(); }
  by("all").addEventListener("click", actions.a);
  by("none").addEventListener("click", actions.c);
  by("theme").addEventListener("click", actions.d);
  by("keys").addEventListener("click", actions["?"]);
  by("axis").addEventListener("change", axis);
  by("filter").addEventListener("input", table);
  document.addEventListener("keydown", (event) => {
    if (event.target.matches("input[type=search], select")) {
      if (event.key === "Escape") event.target.blur();
      return;
    }
    if (event.ctrlKey || event.metaKey || event.altKey || by("help").open || !actions[event.key]) return;
    event.preventDefault();
    actions[event.key]();
  });
  if (matchMedia("(prefers-color-scheme: dark)").matches) root.dataset.theme = "dark";
  runs.forEach((run, at) => { run.number = at; run.order = 0; });
  if (!COLUMNS.some(([key]) => key === state.sort)) { state.sort = "name"; state.descending = false; }
  shown().slice(0, FIRST).forEach((run) => draw(run, true));
  update();
  window.runsPage = { runs, state, shown };
  root.dataset.state = "ready";
})();
