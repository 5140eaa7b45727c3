"use strict";
(() => {
  const byId = (id) => document.getElementById(id);
  const results = byId("results"), status = byId("status"), failure = byId("error");
  const limit = Number(document.body.dataset.limit);
  let seed = 0, attention = false, asked = null, file = null, call = 0;

  function say(text) { status.textContent = text; }
  function fail(text) { failure.textContent = text; failure.hidden = !text; }

  async function ask(url, body) {
    const mine = ++call;
    fail("");
    results.classList.add("waiting");
    results.setAttribute("aria-busy", "true");
    try {
      const answer = await fetch(url, body ? { method: "POST", body } : {});
      const content = await answer.json();
      if (mine !== call) return null;
      if (!answer.ok) throw new Error(content.error);
      return content;
    } catch (error) {
      if (mine !== call) return null;
      const gone = error instanceof TypeError;
      fail(gone ? "The server has ended: start pml-tacl serve again." : error.message);
      return null;
    } finally {
      if (mine === call) {
        results.classList.remove("waiting");
        results.removeAttribute("aria-busy");
      }
    }
  }

  function gone(image) {
    const text = document.createElement("span");
    text.className = "gone";
    text.textContent = "cannot be shown";
    image.replaceWith(text);
  }

  function source(row) { return `/${attention ? "attention" : "thumbnail"}/${row}`; }

  function card(one, rank) {
    const item = document.createElement("li"), button = document.createElement("button");
    button.type = "button";
    button.className = "image";
    button.dataset.row = one.row;
    button.title = one.file;
    const near = one.similarity !== undefined;
    const said = near ? `${rank}: ${one.file}, similarity ${one.similarity.toFixed(2)}` : one.file;
    button.setAttribute("aria-label", said);
    const image = document.createElement("img");
    image.alt = "";
    image.loading = "lazy";
    image.decoding = "async";
    image.addEventListener("error", () => gone(image));
    image.src = source(one.row);
    const about = document.createElement("span"), name = document.createElement("span");
    about.className = "about";
    name.className = "name";
    const inner = document.createElement("bdi");
    inner.textContent = one.file;
    name.append(inner);
    about.append(name);
    button.append(image, about);
    if (near) {
      const value = document.createElement("span"), level = document.createElement("span");
      value.className = "similarity";
      value.textContent = one.similarity.toFixed(2);
      about.append(value);
      level.className = "level";
      level.append(document.createElement("i"));
      level.firstChild.style.width = `${100 * Math.max(0, one.similarity)}%`;
      button.append(level);
    }
    button.addEventListener("click", () => { location.hash = `row=${one.row}`; });
    item.append(button);
    return item;
  }

  function show(images) {
    results.replaceChildren(...images.map((one, at) => card(one, at + 1)));
    rove(results.querySelector("button"));
  }

  // The tab key stops once for all images; arrow keys move between them.
  function rove(chosen, focus) {
    for (const button of results.querySelectorAll("button")) button.tabIndex = -1;
    if (!chosen) return;
    chosen.tabIndex = 0;
    if (focus) { chosen.focus(); chosen.scrollIntoView({ block: "nearest" }); }
  }

  function columns() {
    return getComputedStyle(results).gridTemplateColumns.split(" ").length;
  }

  results.addEventListener("keydown", (event) => {
    const all = [...results.querySelectorAll("button")], at = all.indexOf(document.activeElement);
    const steps = {
      ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns(), ArrowUp: -columns(),
      Home: -at, End: all.length - 1 - at,
    };
    if (at < 0 || !(event.key in steps) || event.altKey || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    const next = all[at + steps[event.key]];
    if (next) rove(next, true);
  });
  results.addEventListener("focusin", (event) => {
    if (event.target.matches("button")) rove(event.target);
  });

  function drawQuery() {
    const query = byId("query"), image = byId("asked"), link = byId("original");
    query.hidden = asked === null;
    byId("others").hidden = byId("text").hidden = asked !== null;
    byId("count-label").hidden = asked === null;
    byId("title").textContent = asked === null ? "Images of the run" : "Nearest first";
    if (asked === null) return;
    byId("asked-name").textContent = asked.file;
    link.hidden = asked.row === null;
    if (asked.row !== null) link.href = `/image/${asked.row}`;
    image.src = asked.row === null ? (attention ? asked.attention : asked.seen) : source(asked.row);
    image.alt = attention ? `attention of the model on ${asked.file}` : asked.file;
  }

  async function browse() {
    const text = byId("text").value;
    const found = await ask(`/api/images?${new URLSearchParams({ seed, text, count: 48 })}`);
    if (!found) return;
    asked = file = null;
    drawQuery();
    show(found.images);
    const some = found.images.length < found.all;
    byId("others").disabled = !some;
    if (!found.all) say(`No image has “${text}” in its name.`);
    else say(`${some ? `${found.images.length} of ${found.all}` : found.all} images${text ? ` with “${text}” in their names` : ""}. Choose one to search.`);
  }

  function showFound(found, name) {
    asked = { ...found.query, file: found.query.file || name };
    const from = document.activeElement;  // keep the focus on a control in use
    const move = !from || from === document.body || results.contains(from);
    drawQuery();
    show(found.found);
    say(`${found.found.length} images like ${asked.file}, by cosine similarity.`);
    if (move) rove(results.querySelector("button"), true);
    window.scrollTo(0, 0);
  }

  async function searchRow(row) {
    const found = await ask(`/api/search?row=${row}&k=${byId("count").value}`);
    if (found) { file = null; showFound(found, ""); }
  }

  async function searchFile(given) {
    if (!given) return;
    if (given.size > limit) {
      fail(`${given.name} has ${Math.round(given.size / 2 ** 20)} MB, but at most ${limit / 2 ** 20} MB are allowed.`);
      return;
    }
    say(`Searching for ${given.name || "the image"} …`);
    const found = await ask(`/api/search?k=${byId("count").value}`, given);
    if (!found) { say(""); return; }
    file = given;
    if (location.hash !== "#file") history.pushState(null, "", "#file");
    showFound(found, given.name || "pasted image");
  }

  function follow() {
    const row = /^#row=(\d+)$/.exec(location.hash);
    if (row) searchRow(row[1]);
    else if (location.hash === "#file" && file) searchFile(file);
    else browse();
  }

  byId("file").addEventListener("change", (event) => {
    searchFile(event.target.files[0]);
    event.target.value = "";
  });
  addEventListener("paste", (event) => {
    const given = [...(event.clipboardData?.files || [])][0];
    if (given) searchFile(given);
  });
  let depth = 0;
  const isFile = (event) => [...(event.dataTransfer?.types || [])].includes("Files");
  addEventListener("dragenter", (event) => {
    if (isFile(event)) { depth++; document.body.classList.add("dragging"); }
  });
  addEventListener("dragleave", (event) => {
    if (isFile(event) && --depth <= 0) { depth = 0; document.body.classList.remove("dragging"); }
  });
  addEventListener("dragover", (event) => { if (isFile(event)) event.preventDefault(); });
  addEventListener("drop", (event) => {
    if (!isFile(event)) return;
    event.preventDefault();
    depth = 0;
    document.body.classList.remove("dragging");
    searchFile(event.dataTransfer.files[0]);
  });

  byId("attention").addEventListener("click", () => {
    attention = !attention;
    byId("attention").setAttribute("aria-pressed", attention);
    drawQuery();
    for (const button of results.querySelectorAll("button")) {
      const image = button.querySelector("img");
      if (image) image.src = source(button.dataset.row);
    }
  });
  byId("count").addEventListener("change", () => {
    if (file) searchFile(file); else if (asked) searchRow(asked.row);
  });
  byId("others").addEventListener("click", () => { seed++; browse(); });
  let typed;
  byId("text").addEventListener("input", () => {
    clearTimeout(typed);
    typed = setTimeout(() => { seed = 0; browse(); }, 200);
  });
  byId("home").addEventListener("click", (event) => {
    event.preventDefault();
    if (location.hash) location.hash = ""; else browse();
  });
  byId("theme").addEventListener("click", () => {
    const root = document.documentElement;
    const dark = (root.dataset.theme
      || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
    root.dataset.theme = dark ? "light" : "dark";
  });
  addEventListener("hashchange", follow);
  addEventListener("popstate", () => { if (location.hash === "#file") follow(); });
  follow();
})();
