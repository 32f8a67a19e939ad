// Layer x token heat maps of the page's data, one a model, on canvases. No library, no request.
"use strict";
(() => {
  const byId = (id) => document.getElementById(id);
  const data = JSON.parse(byId("data").textContent);
  const LEFT = 46;
  const NAMES = { entropy: "entropy", logprob: "log-prob", kl: "KL to the model", rank: "rank" };
  const tip = byId("tip");

  function unpack(x) {
    const raw = atob(x.data), bytes = Uint8Array.from(raw, (c) => c.charCodeAt(0));
    const whole = x.bits === 16 ? new Uint16Array(bytes.buffer) : new Uint32Array(bytes.buffer);
    return Float64Array.from(whole, (v) => x.low + x.step * v);
  }
  for (const model of data.models)
    for (const map of model.maps) {
      for (const key in map.values) map.values[key] = unpack(map.values[key]);
      for (const view of Object.values(map.top)) {
        view.piece = unpack(view.piece);
        view.p = unpack(view.p);
      }
    }

  const escaped = (c) => "\\x" + c.charCodeAt(0).toString(16).padStart(2, "0");
  const visible = (token) =>
    token
      .replace(/\n/g, "⏎")
      .replace(/\t/g, "⇥")
      .replace(/[\u0000-\u001f\u007f-\u00a0\u00ad]/g, escaped)
      .replace(/^ +$/, (s) => "␣".repeat(s.length));
  const short = (token, most) => {
    const text = visible(token).trim();
    return text.length > most ? text.slice(0, most - 1) + "…" : text;
  };
  const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const logarithmic = (quantity) => /^(kl|rank)/.test(quantity);
  const bend = (quantity, v) => (logarithmic(quantity) ? Math.log1p(Math.max(v, 0)) : v);
  const number = (quantity, v) =>
    quantity.startsWith("rank") ? String(Math.round(v) + 1) : v.toFixed(3).replace("-0.000", "0.000");
  const anchors = data.scale.map((c) => [1, 3, 5].map((i) => parseInt(c.slice(i, i + 2), 16)));

  function shade(t) {
    const x = Math.min(Math.max(t, 0), 1) * (anchors.length - 1), i = Math.min(Math.floor(x), anchors.length - 2);
    return anchors[i].map((c, k) => Math.round(c + (x - i) * (anchors[i + 1][k] - c)));
  }

  const state = { text: 0, quantity: byId("quantity").value, words: false };
  const panels = data.models.map((model) => {
    const box = document.createElement("div");
    box.className = "map";
    const side = document.createElement("canvas"), scroll = document.createElement("div");
    const cells = document.createElement("canvas");
    scroll.className = "scroll";
    cells.className = "cells";
    cells.tabIndex = 0;
    cells.setAttribute("role", "img");
    scroll.append(cells);
    box.append(side, scroll);
    if (data.models.length > 1) {
      const title = document.createElement("p");
      title.textContent = model.name;
      byId("maps").append(title);
    }
    byId("maps").append(box);
    const panel = { model, side, cells, scroll, at: null };
    cells.addEventListener("mousemove", (e) => point(panel, cellAt(panel, e), e.clientX, e.clientY));
    cells.addEventListener("mouseleave", () => point(panel, null));
    cells.addEventListener("blur", () => point(panel, null));
    cells.addEventListener("keydown", (e) => move(panel, e));
    return panel;
  });

  const mapOf = (panel) => panel.model.maps[Math.min(state.text, panel.model.maps.length - 1)];
  function sizes(map) {
    const rows = map.layers.length;
    return {
      columns: map.tokens.length,
      rows,
      foot: state.words ? 26 : 22 + 6.5 * Math.max(...map.tokens.map((token) => short(token, 9).length)),
      w: state.words ? 64 : 20,
      h: state.words ? 18 : Math.max(8, Math.min(18, Math.floor(560 / rows))),
    };
  }

  function range() {
    let low = Infinity, high = -Infinity;
    for (const panel of panels)
      for (const v of mapOf(panel).values[state.quantity]) {
        low = Math.min(low, v);
        high = Math.max(high, v);
      }
    return [low, high];
  }

  function prepare(canvas, width, height) {
    const ratio = Math.min(window.devicePixelRatio || 1, 16000 / width);
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(height * ratio);
    canvas.style.width = width + "px";
    canvas.style.height = height + "px";
    const ctx = canvas.getContext("2d");
    ctx.setTransform(ratio, 0, 0, ratio, 0, 0);
    ctx.font = '11px system-ui, "DejaVu Sans", sans-serif';
    ctx.fillStyle = color("--ink");
    ctx.textBaseline = "middle";
    return ctx;
  }

  function draw(panel) {
    const map = mapOf(panel), { columns, rows, w, h, foot } = sizes(map);
    const side = prepare(panel.side, LEFT, rows * h + foot);
    side.textAlign = "right";
    const every = Math.max(1, Math.ceil(13 / h));
    map.layers.forEach((layer, r) => {
      const last = r === rows - 1;
      if (last || (r % every === 0 && rows - 1 - r >= every))
        side.fillText(layer, LEFT - 6, (rows - 1 - r + 0.5) * h);
    });
    side.fillText("token", LEFT - 6, rows * h + 12);
    const ctx = prepare(panel.cells, columns * w, rows * h + foot);
    const [low, high] = range().map((v) => bend(state.quantity, v));
    const values = map.values[state.quantity], top = map.top[view()];
    for (let r = 0; r < rows; r++)
      for (let c = 0; c < columns; c++) {
        const v = bend(state.quantity, values[r * columns + c]);
        const rgb = shade(high > low ? (v - low) / (high - low) : 0.5);
        const y = (rows - 1 - r) * h;
        ctx.fillStyle = `rgb(${rgb.join(" ")})`;
        ctx.fillRect(c * w, y, w - 1, h - 1);
        if (state.words) {
          const dark = 0.3 * rgb[0] + 0.59 * rgb[1] + 0.11 * rgb[2] > 128;
          ctx.fillStyle = dark ? "#000" : "#fff";
          ctx.textAlign = "center";
          const piece = map.pieces[top.piece[(r * columns + c) * top.k]];
          ctx.fillText(short(piece, 8), c * w + w / 2 - 0.5, y + h / 2, w - 5);
        }
      }
    ctx.fillStyle = color("--ink");
    ctx.textAlign = "right";
    map.tokens.forEach((token, c) => {
      if (state.words) {
        ctx.textAlign = "center";
        ctx.fillText(short(token, 8), c * w + w / 2, rows * h + 12, w - 4);
        return;
      }
      ctx.save();
      ctx.translate(c * w + w / 2, rows * h + 6);
      ctx.rotate(-Math.PI / 2);
      ctx.fillText(short(token, 9), 0, 0, foot - 8);
      ctx.restore();
    });
    if (panel.at) {
      const [r, c] = panel.at;
      ctx.strokeStyle = color("--ink");
      ctx.lineWidth = 2;
      ctx.strokeRect(c * w, (rows - 1 - r) * h, w - 1, h - 1);
    }
    const name = byId("quantity").selectedOptions[0].textContent;
    panel.cells.setAttribute(
      "aria-label",
      `Heat map of ${panel.model.name}, text ${state.text + 1}: ${name}; ${rows} layers by ` +
        `${columns} tokens. Arrow keys read cells.`,
    );
  }

  const view = () => (state.quantity.endsWith("_normed") ? "layer_normed" : "layer");

  function drawAll() {
    const [low, high] = range();
    byId("low").textContent = number(state.quantity, low);
    byId("high").textContent = number(state.quantity, high) + (logarithmic(state.quantity) ? " (log)" : "");
    byId("bar").style.background = `linear-gradient(to right, ${data.scale.join(", ")})`;
    panels.forEach(draw);
  }

  function cellAt(panel, event) {
    const box = panel.cells.getBoundingClientRect(), { columns, rows, w, h } = sizes(mapOf(panel));
    const c = Math.floor((event.clientX - box.left) / w);
    const r = rows - 1 - Math.floor((event.clientY - box.top) / h);
    return c >= 0 && c < columns && r >= 0 && r < rows ? [r, c] : null;
  }

  function move(panel, event) {
    const step = { ArrowUp: [1, 0], ArrowDown: [-1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (event.key === "Escape") return point(panel, null);
    if (!step) return;
    event.preventDefault();
    const { columns, rows, w, h } = sizes(mapOf(panel));
    const [r, c] = panel.at || [0, -step[1]];
    const at = [Math.min(Math.max(r + step[0], 0), rows - 1), Math.min(Math.max(c + step[1], 0), columns - 1)];
    const left = at[1] * w;
    if (left < panel.scroll.scrollLeft || left + w > panel.scroll.scrollLeft + panel.scroll.clientWidth)
      panel.scroll.scrollLeft = left - panel.scroll.clientWidth / 2;
    const box = panel.cells.getBoundingClientRect();
    point(panel, at, box.left + left + w, box.top + (rows - 1 - at[0]) * h);
    byId("spoken").textContent = spoken(panel, at);
  }

  function spoken(panel, [r, c]) {
    const map = mapOf(panel), i = r * map.tokens.length + c, base = state.quantity.replace("_normed", "");
    return `layer ${map.layers[r]}, token ${map.tokens[c]}, ${NAMES[base]} ${number(base, map.values[state.quantity][i])}`;
  }

  const same = (a, b) => a === b || (a && b && a[0] === b[0] && a[1] === b[1]);

  function point(panel, at, x, y) {
    if (!same(panel.at, at)) {
      panel.at = at;
      draw(panel);
      if (at) fill(panel, at);
    }
    tip.hidden = !at;
    if (!at) return;
    const wide = tip.offsetWidth, high = tip.offsetHeight;
    tip.style.left = Math.max(4, x + 16 + wide > innerWidth ? x - wide - 12 : x + 16) + "px";
    tip.style.top = Math.max(4, Math.min(y + 14, innerHeight - high - 8)) + "px";
  }

  function add(parent, name, text, attributes = {}) {
    const element = document.createElement(name);
    if (text !== undefined) element.textContent = text;
    for (const key in attributes) element.setAttribute(key, attributes[key]);
    parent.append(element);
    return element;
  }

  function fill(panel, [r, c]) {
    const map = mapOf(panel), i = r * map.tokens.length + c, top = map.top[view()];
    tip.replaceChildren();
    const head = add(tip, "div");
    add(head, "b", visible(map.tokens[c]), { class: "token", "data-field": "token" });
    add(head, "span", ` at ${map.positions[c]}, layer `);
    add(head, "b", map.layers[r], { "data-field": "layer" });
    const numbers = add(tip, "table"), titles = add(numbers, "tr");
    add(titles, "th");
    add(titles, "th", "raw");
    add(titles, "th", "final norm");
    for (const base in NAMES) {
      const row = add(numbers, "tr");
      add(row, "th", NAMES[base]);
      for (const key of [base, base + "_normed"])
        add(row, "td", number(base, map.values[key][i]), {
          "data-field": key,
          class: key === state.quantity ? "chosen" : "",
        });
    }
    const likely = add(tip, "table"), caption = add(likely, "tr");
    add(caption, "th", view() === "layer" ? "likeliest, raw" : "likeliest, final norm");
    add(caption, "th", "prob.");
    for (let k = 0; k < top.k; k++) {
      const row = add(likely, "tr", undefined, { class: "top" });
      add(row, "td", visible(map.pieces[top.piece[i * top.k + k]]), { class: "token" });
      add(row, "td", (100 * top.p[i * top.k + k]).toFixed(2) + " %");
    }
  }

  const changed = (key, read) => (event) => {
    state[key] = read(event.target);
    panels.forEach((panel) => (panel.at = null));
    tip.hidden = true;
    drawAll();
  };
  data.models[0].maps.forEach((map, n) => {
    add(byId("text"), "option", `${n + 1}: ${visible(map.title)}`, { value: n });
  });
  byId("text").addEventListener("change", changed("text", (e) => Number(e.value)));
  byId("quantity").addEventListener("change", changed("quantity", (e) => e.value));
  byId("words").addEventListener("change", changed("words", (e) => e.checked));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
  matchMedia("print").addEventListener("change", drawAll);
  drawAll();
})();
