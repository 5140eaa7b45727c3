"use strict";
(() => {
  const byId = (id) => document.getElementById(id);
  const root = document.documentElement;
  const data = JSON.parse(byId("data").textContent);
  const canvas = byId("map-canvas"), tip = byId("map-tip"), filter = byId("map-filter");
  const pen = canvas.getContext("2d"), tipPen = tip.firstElementChild.getContext("2d");
  const sheets = data.sets.map((_, at) => byId(`sheet-${at}`));
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const PAD = 28, MOST = 60, TILES_FROM = 24;
  let set = 0, group = -1, hot = -1, zoom = 1, dx = 0, dy = 0, width = 0, height = 0;
  let colours = [], due = false;

  const isDark = () => (root.dataset.theme || (dark.matches ? "dark" : "light")) === "dark";
  const now = () => data.sets[set];
  const count = () => now().x.length;
  const many = (n) => n.toLocaleString("en").replace(/,/g, "\u202f");

  // The map fills the box, with a limited change of aspect ratio; zoom and shift are applied on top.
  const high = () => height - 2 * PAD;
  const wide = () => Math.min(width - 2 * PAD, 1.7 * high());
  const tall = () => Math.min(high(), 1.7 * (width - 2 * PAD));
  const placeX = (i) => ((width - wide()) / 2 + now().x[i] / data.grid * wide()) * zoom + dx;
  const placeY = (i) => ((height - tall()) / 2 + now().y[i] / data.grid * tall()) * zoom + dy;
  const isIn = (i) => group < 0 || now().group[i] === group;
  const isSeen = (x, y) => x > -40 && y > -40 && x < width + 40 && y < height + 40;

  function tileSize() {
    let seen = 0;
    for (let i = 0; i < count(); i++) if (isIn(i) && isSeen(placeX(i), placeY(i))) seen++;
    const room = group < 0 ? width * height : width * height * 0.3;
    return Math.min(MOST, 0.62 * Math.sqrt(room / Math.max(seen, 1)), 15 * zoom);
  }

  function paint() {
    due = false;
    const ratio = devicePixelRatio || 1, set_ = now(), sheet = sheets[set];
    pen.setTransform(ratio, 0, 0, ratio, 0, 0);
    pen.clearRect(0, 0, width, height);
    const tile = tileSize(), images = tile >= TILES_FROM && sheet.naturalWidth > 0;
    const radius = Math.min(6, 2.6 * Math.sqrt(zoom));
    let shown = 0;
    for (const front of group < 0 ? [true] : [false, true]) {
      pen.globalAlpha = front ? 0.92 : 0.13;
      for (let i = 0; i < count(); i++) {
        if (isIn(i) !== front) continue;
        const x = placeX(i), y = placeY(i);
        if (front) shown++;
        if (!isSeen(x, y)) continue;
        pen.fillStyle = colours[set_.group[i]];
        if (images && front && i < set_.tiles) {
          pen.fillRect(x - tile / 2 - 1.5, y - tile / 2 - 1.5, tile + 3, tile + 3);
          drawTile(pen, i, x - tile / 2, y - tile / 2, tile);
        } else {
          pen.beginPath();
          pen.arc(x, y, front && group >= 0 ? radius + 1 : radius, 0, 7);
          pen.fill();
        }
      }
    }
    pen.globalAlpha = 1;
    if (hot >= 0) {
      const half = images && isIn(hot) ? tile / 2 + 4 : 0;
      pen.lineWidth = 2.5;
      pen.strokeStyle = isDark() ? "#fff" : "#000";
      pen.beginPath();
      if (half) pen.rect(placeX(hot) - half, placeY(hot) - half, 2 * half, 2 * half);
      else pen.arc(placeX(hot), placeY(hot), radius + 3.5, 0, 7);
      pen.stroke();
    }
    canvas.dataset.shown = shown;
    canvas.dataset.images = images;
  }

  function drawTile(to, i, x, y, size) {
    const at = data.tile;
    to.drawImage(sheets[set], at * (i % data.columns), at * Math.floor(i / data.columns), at, at,
      x, y, size, size);
  }

  const draw = () => { if (!due) { due = true; requestAnimationFrame(paint); } };

  function nearest(x, y) {
    const reach = Math.max(12, tileSize() / 2);
    let best = -1, least = reach * reach;
    for (let i = 0; i < count(); i++) {
      if (!isIn(i)) continue;
      const away = (placeX(i) - x) ** 2 + (placeY(i) - y) ** 2;
      if (away < least) { least = away; best = i; }
    }
    return best;
  }

  function point(i) {
    hot = i;
    tip.hidden = i < 0;
    if (i >= 0) {
      const set_ = now(), kind = set_.groups[set_.group[i]];
      tipPen.clearRect(0, 0, 256, 256);
      tipPen.canvas.hidden = i >= set_.tiles;
      if (i < set_.tiles) drawTile(tipPen, i, 0, 0, 256);
      tip.children[1].textContent = set_.names[i];
      tip.children[2].textContent = set_.labels.length ? `${set_.labels[i]} · ${kind}` : kind;
      tip.dataset.index = i;
      const x = placeX(i), y = placeY(i), long = tip.offsetHeight;
      tip.style.left = `${Math.max(6, Math.min(width - 164, x + 18 + 156 < width ? x + 18 : x - 174))}px`;
      tip.style.top = `${Math.max(6, Math.min(height - long - 6, y - long / 2))}px`;
    }
    draw();
  }

  function zoomAt(factor, x = width / 2, y = height / 2) {
    const next = Math.min(40, Math.max(1, zoom * factor));
    dx = x - (x - dx) * next / zoom;
    dy = y - (y - dy) * next / zoom;
    zoom = next;
    moved();
  }

  function moved() {
    // At least a third of the map stays in the box.
    dx = Math.min(width * 0.66, Math.max(width * 0.34 - width * zoom, dx));
    dy = Math.min(height * 0.66, Math.max(height * 0.34 - height * zoom, dy));
    if (hot >= 0) point(hot); else draw();
  }

  function goTo(wanted) {
    const rows = now().group.map((g, i) => (g === wanted ? i : -1)).filter((i) => i >= 0);
    if (!rows.length) return;
    zoom = 1;
    dx = dy = 0;
    const middle = (values) => (Math.min(...values) + Math.max(...values)) / 2;
    const spread = (values) => Math.max(...values) - Math.min(...values) + 120;
    const xs = rows.map(placeX), ys = rows.map(placeY), x = middle(xs), y = middle(ys);
    const factor = Math.min(8, 0.9 * Math.min(width / spread(xs), height / spread(ys)));
    dx = width / 2 - x;
    dy = height / 2 - y;
    zoomAt(factor);
  }

  function wholeMap() { zoom = 1; dx = dy = 0; moved(); }

  function say() {
    const set_ = now(), shown = set_.group.filter((g) => group < 0 || g === group).length;
    const of = group < 0 ? `in ${many(set_.groups.length)} ${set_.kind === "class" ? "classes" : "clusters"}`
      : `of ${set_.groups[group]}`;
    byId("map-status").textContent = `${many(shown)} images ${of}.`;
    const part = count() < set_.all ? `${many(count())} of ${many(set_.all)} images, so that the `
      + `page stays small` : `All ${many(set_.all)} images`;
    byId("map-lede").textContent = `${set_.title}: ${part}, placed by ${set_.how}. Close images are similar; `
      + `large distances mean little. Colours are ${set_.kind === "class" ? "classes" : "clusters"}.`;
  }

  function choose(next) {
    group = next;
    filter.value = String(next);
    point(-1);
    say();
  }

  function paintColours() {
    const light = isDark() ? 66 : 46;
    colours = now().groups.map((name, at) =>
      now().ids[at] < 0 ? "#888" : `hsl(${(at * 137.508) % 360} 62% ${light + (at % 3) * 5 - 5}%)`);
    draw();
  }

  function show(next) {
    set = next;
    const set_ = now(), sizes = set_.groups.map(() => 0);
    for (const g of set_.group) sizes[g]++;
    filter.replaceChildren(new Option(set_.kind === "class" ? "all classes" : "all clusters", "-1"));
    sizes.map((n, g) => [n, g]).sort((a, b) => b[0] - a[0] || a[1] - b[1])
      .forEach(([n, g]) => filter.add(new Option(`${set_.groups[g]} (${n})`, String(g))));
    byId("map-kind").textContent = set_.kind === "class" ? "Class" : "Cluster";
    [...byId("map-sets").children].forEach((b, at) => b.setAttribute("aria-pressed", at === next));
    paintColours();
    choose(-1);
    wholeMap();
  }

  data.sets.forEach((set_, at) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = set_.title;
    button.addEventListener("click", () => show(at));
    byId("map-sets").append(button);
  });
  byId("map-sets").hidden = data.sets.length < 2;
  filter.addEventListener("change", () => choose(Number(filter.value)));
  byId("zoom-in").addEventListener("click", () => zoomAt(1.6));
  byId("zoom-out").addEventListener("click", () => zoomAt(1 / 1.6));
  byId("zoom-reset").addEventListener("click", wholeMap);
  document.querySelectorAll("[data-cluster]").forEach((button) => button.addEventListener("click", () => {
    show(0);
    choose(now().ids.indexOf(Number(button.dataset.cluster)));
    goTo(group);
    byId("map-controls").scrollIntoView();
    canvas.focus({ preventScroll: true });
  }));

  const fingers = new Map();
  let travelled = 0;
  const at = (event) => {
    const box = canvas.getBoundingClientRect();
    return [event.clientX - box.left, event.clientY - box.top];
  };
  canvas.addEventListener("pointerdown", (event) => {
    canvas.setPointerCapture(event.pointerId);
    fingers.set(event.pointerId, at(event));
    travelled = 0;
  });
  canvas.addEventListener("pointermove", (event) => {
    const [x, y] = at(event), was = fingers.get(event.pointerId);
    if (!was) { point(nearest(x, y)); return; }
    const [other] = [...fingers].filter(([id]) => id !== event.pointerId).map(([, p]) => p);
    if (other) {
      const before = Math.hypot(was[0] - other[0], was[1] - other[1]);
      const after = Math.hypot(x - other[0], y - other[1]);
      zoomAt(after / Math.max(before, 1), (x + other[0]) / 2, (y + other[1]) / 2);
    }
    dx += (x - was[0]) / fingers.size;
    dy += (y - was[1]) / fingers.size;
    travelled += Math.hypot(x - was[0], y - was[1]);
    fingers.set(event.pointerId, [x, y]);
    if (travelled > 4) { hot = -1; tip.hidden = true; }
    moved();
  });
  const lift = (event) => {
    if (fingers.delete(event.pointerId) && travelled <= 4 && event.type === "pointerup") {
      const found = nearest(...at(event));
      if (found >= 0) {
        if (event.pointerType === "mouse") choose(group < 0 ? now().group[found] : -1);
        point(found);
      } else { choose(-1); }
    }
  };
  canvas.addEventListener("pointerup", lift);
  canvas.addEventListener("pointercancel", lift);
  canvas.addEventListener("pointerleave", (event) => {
    if (event.pointerType === "mouse" && !fingers.size) point(-1);
  });
  canvas.addEventListener("wheel", (event) => {
    // The wheel must scroll the page past the map, so it zooms only after a click on the map.
    if (!event.ctrlKey && !event.metaKey && document.activeElement !== canvas) return;
    event.preventDefault();
    zoomAt(Math.exp(-event.deltaY * (event.ctrlKey ? 0.01 : 0.002)), ...at(event));
  }, { passive: false });
  function step(by) {
    for (let tried = 0, i = hot; tried < count(); tried++) {
      i = (i + by + 2 * count()) % count();
      if (hot < 0 && tried === 0 && by < 0) i = count() - 1;
      if (isIn(i)) {
        const x = placeX(i), y = placeY(i);
        if (x < 20 || y < 20 || x > width - 20 || y > height - 20) {
          dx += width / 2 - x;
          dy += height / 2 - y;
        }
        hot = i;
        moved();
        byId("map-status").textContent = [...tip.children].slice(1).map((e) => e.textContent).join(", ");
        return;
      }
    }
  }
  const keys = {
    ArrowLeft: () => { dx += 60; moved(); }, ArrowRight: () => { dx -= 60; moved(); },
    ArrowUp: () => { dy += 60; moved(); }, ArrowDown: () => { dy -= 60; moved(); },
    "+": () => zoomAt(1.4), "=": () => zoomAt(1.4), "-": () => zoomAt(1 / 1.4), 0: wholeMap,
    n: () => step(1), p: () => step(-1), Escape: () => choose(-1),
  };
  canvas.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || !(event.key in keys)) return;
    event.preventDefault();
    keys[event.key]();
  });

  const keep = (theme) => { try { localStorage.setItem("theme", theme); } catch { /* private */ } };
  try { if (localStorage.getItem("theme")) root.dataset.theme = localStorage.getItem("theme"); } catch { /* private */ }
  byId("theme").addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    keep(root.dataset.theme);
    paintColours();
  });
  dark.addEventListener("change", paintColours);
  new ResizeObserver(() => {
    const ratio = devicePixelRatio || 1;
    [width, height] = [canvas.clientWidth, canvas.clientHeight];
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(height * ratio);
    moved();
  }).observe(canvas);
  [width, height] = [canvas.clientWidth, canvas.clientHeight];
  show(0);
  Promise.all(sheets.map((sheet) => sheet.decode().catch(() => {}))).then(() => {
    draw();
    requestAnimationFrame(() => performance.mark("report-ready"));
  });
})();
