// The page: panels, keys, and the panes that show slides.

import * as api from "./api.js";
import { palette } from "./colours.js";
import { $, afterPause, grouped, h, many } from "./dom.js";
import { download, exportPng } from "./export.js";
import { format, parse } from "./location.js";
import { coloursOf, MODES, modesOf } from "./modes.js";
import { Pane } from "./pane.js";
import { RegionList } from "./regions.js";
import { Scatter } from "./scatter.js";
import { SimilarPatches } from "./similar.js";

const MAGNIFICATIONS = [1.25, 2.5, 5, 10, 20, 40];
const KEYS = [
  ["arrows, + −", "move, zoom"], ["0", "whole slide"], ["1 … 6", `${MAGNIFICATIONS.join("×, ")}×`],
  ["V L D", "move, lasso, draw a region"], ["C", "next way to colour"], ["[ ]", "less, more opacity"],
  ["P O R", "patches, contours, regions"], ["S", "two slides side by side"], [", .", "previous, next slide"],
  ["Ctrl+S", "save regions"], ["E", "save the view as PNG"], ["Esc", "clear the selection"], ["?", "these keys"],
];

class App {
  constructor() {
    this.settings = { mode: "pca", vectors: null, k: 8, block: null, palette: "viridis", opacity: 60, scope: "slide" };
    this.show = { patches: true, outlines: true, regions: true, failed: true };
    this.panes = [];
    this.slides = [];
    this.tool = "pan";
    this.remember = afterPause(150, () => this._remember());
    this.scatter = new Scatter($("map"), {
      onSelect: (indices, add) => this._select(this.active, indices, add),
      onPick: (index) => this._pick(this.active, index, true),
      onHover: (index) => this._hoverPatch(index),
    });
    this.similar = new SimilarPatches((match) => this._goToMatch(match));
    this.regions = new RegionList(() => this.active, (text) => this.say(text));
    this._controls();
    this._keys();
  }

  async start() {
    this.addPane();
    try {
      const { slides, folder } = await api.json("slides");
      this.slides = slides;
      $("folder").textContent = `${many(slides.length, "slide")} in ${folder}`;
    } catch (error) {
      return this.say(error.message);
    }
    this._list();
    await this._restore();
    window.addEventListener("hashchange", () => location.hash !== this.hash && this._restore());
    window.addEventListener("beforeunload", (event) => this.panes.some((pane) => pane.unsaved) && event.preventDefault());
    if (window.innerWidth < 1101 && this.slides.length < 2) document.body.classList.add("no-slides");
  }

  get active() {
    return this.panes[this.activeIndex ?? 0];
  }

  say(text) {
    $("message").textContent = text;
  }

  addPane() {
    const pane = new Pane(
      {
        activate: (p) => this.activate(p),
        view: () => this.remember(),
        pick: (p, index) => this._pick(p, index),
        select: (p, indices, add) => this._select(p, indices, add),
        region: (p, points) => this.regions.add(p, points),
        hover: (p, at) => this._hoverSlide(p, at),
        data: () => {},
        reload: (p) => this.open(p, p.key, p.place() ?? {}),
      },
      this.show,
    );
    this.panes.push(pane);
    $("panes").append(pane.host);
    pane.start();
    pane.setTool(this.tool);
    pane.layer.opacity = this.settings.opacity / 100;
    this._markActive();
    return pane;
  }

  async split(on = this.panes.length < 2, key = null, at = {}) {
    if (on && this.panes.length < 2) {
      const next = this.slides[(this.slides.findIndex((s) => s.key === this.active.key) + 1) % this.slides.length];
      const pane = this.addPane();
      this.activate(pane);
      await this.open(pane, key ?? next.key, at);
    } else if (!on && this.panes.length > 1) {
      const [gone] = this.panes.splice(this.panes[0] === this.active ? 1 : 0, 1);
      gone.destroy();
      this.activeIndex = 0;
      this._markActive();
      this._showActive();
    }
    $("split").setAttribute("aria-pressed", this.panes.length > 1);
    this.remember();
  }

  activate(pane) {
    if (pane === this.active) return;
    this.activeIndex = this.panes.indexOf(pane);
    this._markActive();
    this._showActive();
  }

  /** Open a slide in a pane; everything that belongs to it follows. */
  async open(pane, key, at = {}) {
    if (pane.unsaved && !window.confirm("Regions of this slide are not saved. Leave it?")) return;
    this.say("");
    const patch = at.patch ?? -1;
    try {
      await pane.open(key, at);
    } catch (error) {
      if (error.name !== "AbortError") this.say(error.message);
      if (error.name === "AbortError" || !pane.slide) return this._showActive();
    }
    pane.setPatch(patch);
    if (at.spot) pane.spot = at.spot;
    await Promise.all([this.regions.load(pane), this._recolour(pane)]);
    if (pane === this.active) this._showActive();
    this.remember();
  }

  // Panels

  _list() {
    const filter = $("filter").value.trim().toLowerCase();
    const shown = this.slides.filter((slide) => slide.id.toLowerCase().includes(filter));
    const labels = { embedded: "embedded", features: "features", patches: "patches", skipped: "skipped", slide: "slide only" };
    $("list").replaceChildren(
      ...shown.map((slide) => {
        const image = h("img", { src: `thumbnails/${slide.key}.jpg`, alt: "", loading: "lazy" });
        image.addEventListener("error", () => image.replaceWith("—"));
        return h(
          "li", {},
          h(
            "button", { "data-key": slide.key, title: slide.id, onclick: () => this.open(this.active, slide.key) },
            h("span", { class: "thumb" }, image),
            h("span", {}, h("span", { class: "name" }, slide.id), h("span", { class: "small" }, h("i", { class: `state-dot ${slide.state}` }), labels[slide.state])),
          ),
        );
      }),
    );
    this._markCurrent();
  }

  _markCurrent() {
    for (const button of $("list").querySelectorAll("button")) {
      button.setAttribute("aria-current", this.panes.some((pane) => pane.key === button.dataset.key));
    }
  }

  _markActive() {
    this.panes.forEach((pane) => {
      pane.host.classList.toggle("active", pane === this.active);
      pane.host.classList.toggle("of-two", this.panes.length > 1);
    });
  }

  /** Show in the panels what belongs to the active pane. */
  _showActive() {
    const pane = this.active;
    const { slide } = pane;
    $("title").textContent = slide?.id ?? "";
    document.title = slide ? `${slide.id} – exaonepath` : "exaonepath";
    const modes = modesOf(slide);
    const mode = modes.some((m) => m.id === this.settings.mode) ? this.settings.mode : modes[0].id;
    $("mode").replaceChildren(...modes.map((m) => h("option", { value: m.id, selected: m.id === mode }, m.name)));
    const vectors = slide?.vectors ?? [];
    const names = { context: "context (slide encoder)", appearance: "appearance (patch encoder)" };
    $("vectors").replaceChildren(...vectors.map((kind) => h("option", { value: kind, selected: kind === this._vectors(pane) }, names[kind])));
    const about = MODES.find((m) => m.id === mode) ?? modes.find((m) => m.id === mode);
    $("row-vectors").classList.toggle("hidden", !vectors.length);
    $("row-k").classList.toggle("hidden", !about.k);
    $("row-block").classList.toggle("hidden", !about.block || !pane.blocks);
    $("row-palette").classList.toggle("hidden", !about.palette);
    $("map-section").classList.toggle("hidden", !vectors.length);
    $("similar-section").classList.toggle("hidden", !vectors.length);
    for (const name of ["palette", "scope", "k", "opacity"]) $(name).value = this.settings[name];
    $("k-value").textContent = this.settings.k;
    $("opacity-value").textContent = `${this.settings.opacity}%`;
    for (const [name, on] of Object.entries(this.show)) $(`show-${name}`).checked = on;
    if (pane.blocks) {
      const names = Array.from({ length: pane.blocks }, (_, at) => h("option", { value: at, selected: at === pane.block }, `${at + 1} of ${pane.blocks}`));
      $("block").replaceChildren(...names);
    }
    this._legend(pane);
    this._map(pane);
    this._selection(pane);
    this._markCurrent();
    this.regions.show();
    this.similar.show(pane, { ...this.settings, vectors: this._vectors(pane) });
    this._where();
  }

  _vectors(pane) {
    const offered = pane.slide?.vectors ?? [];
    return offered.includes(this.settings.vectors) ? this.settings.vectors : offered[0];
  }

  _mode(pane) {
    const modes = modesOf(pane.slide);
    return modes.some((m) => m.id === this.settings.mode) ? this.settings.mode : modes[0].id;
  }

  async _recolour(pane) {
    const { slide } = pane;
    if (!slide?.patches?.count) {
      pane.legend = { kind: "none" };
      return;
    }
    const asked = (pane.asked = {}); // of several requests under way, only the last one counts
    const settings = { ...this.settings, mode: this._mode(pane), vectors: this._vectors(pane) };
    // What takes long (the first attention loads the weights) must not leave the colours of another mode in place.
    const waiting = setTimeout(() => this._waiting(pane), 400);
    try {
      const found = await coloursOf(slide, settings, pane.patch, { signal: pane.requests.signal });
      if (asked !== pane.asked || slide !== pane.slide) return;
      const began = performance.now();
      pane.setColours(found.colours);
      pane.legend = found.legend;
      pane.blocks = found.blocks ?? pane.blocks;
      pane.block = found.block ?? pane.block;
      if (pane === this.active) this.scatter.setColours(found.colours);
      document.documentElement.dataset.recoloured = (performance.now() - began).toFixed(1);
    } catch (error) {
      if (error.name === "AbortError" || asked !== pane.asked) return;
      pane.setColours(new Uint8Array(4 * slide.patches.count).fill(110));
      pane.legend = { kind: "text", text: error.message };
    } finally {
      clearTimeout(waiting);
    }
    if (pane === this.active) this._legend(pane);
  }

  _waiting(pane) {
    pane.setColours(new Uint8Array(4 * pane.slide.patches.count).fill(110));
    pane.legend = { kind: "text", text: "Computing …" };
    if (pane === this.active) this._legend(pane);
  }

  async _recolourAll() {
    await Promise.all(this.panes.map((pane) => this._recolour(pane)));
    this._showActive();
    this.remember();
  }

  _legend(pane) {
    const host = $("legend");
    const { legend } = pane;
    const failed = pane.failed.length ? h("p", { class: "small" }, `${many(pane.failed.length, "patch", "patches")} could not be read: crossed out.`) : null;
    const parts = [];
    if (legend?.kind === "bar") {
      const bar = h("canvas", { width: 256, height: 1 });
      const image = new ImageData(256, 1);
      const table = palette(legend.palette);
      for (let i = 0; i < 256; i++) image.data.set([table[3 * i], table[3 * i + 1], table[3 * i + 2], 255], 4 * i);
      bar.getContext("2d").putImageData(image, 0, 0);
      parts.push(bar, h("div", { class: "ends" }, h("span", {}, legend.low), h("span", {}, legend.high)));
    }
    if (legend?.kind === "keys") {
      parts.push(
        h(
          "div", { class: "keys" },
          ...legend.items.map((item) => {
            const swatch = h("span", { class: "swatch" });
            swatch.style.background = item.colour;
            const members = () => [...legend.values.keys()].filter((at) => legend.values[at] === item.value);
            const click = (event) => this._select(pane, members(), event.ctrlKey || event.metaKey);
            return h("button", { title: `Select ${item.name}`, onclick: click }, swatch, item.name, h("span", { class: "count" }, grouped(item.count)));
          }),
        ),
      );
      if (legend.more > 0) parts.push(h("p", { class: "small" }, `and ${grouped(legend.more)} more`));
    }
    if (legend?.text) parts.push(h("p", { class: "small" }, legend.text));
    if (failed) parts.push(failed);
    host.replaceChildren(...parts);
  }

  async _map(pane) {
    const vectors = this._vectors(pane);
    if (!vectors) return;
    const wanted = `${pane.key}/${pane.slide.version}/${vectors}`;
    if (this.mapOf !== wanted) {
      this.mapOf = wanted;
      try {
        const { values, headers } = await api.array(pane.slide, "scatter", Float32Array, { vectors });
        if (this.mapOf !== wanted) return;
        this.scatter.setPoints(values);
        const shares = (headers.get("x-explained") || "").split(",").map((share) => `${(100 * share).toFixed(0)} %`);
        $("map-note").textContent = `${shares.slice(0, 2).join(", ")} of the variance`;
      } catch (error) {
        return this.say(error.message);
      }
    }
    if (pane.colours.length === 2 * this.scatter.points.length) this.scatter.setColours(pane.colours);
    this.scatter.setMarks(pane.marks);
    this.scatter.mark(pane.patch);
  }

  _selection(pane) {
    const count = pane.coords.length / 2;
    const list = () => {
      const rows = [...pane.marks.keys()].filter((at) => pane.marks[at] === 1).map((at) => `${at},${pane.coords[2 * at]},${pane.coords[2 * at + 1]}`);
      download(new Blob([`patch,x,y\n${rows.join("\n")}\n`], { type: "text/csv" }), `${pane.slide.id}-selection.csv`);
    };
    $("selection").replaceChildren(
      ...(pane.selected
        ? [
            `${grouped(pane.selected)} of ${many(count, "patch", "patches")} selected `,
            h("button", { class: "link", onclick: list }, "CSV"), " ",
            h("button", { class: "link", onclick: () => this._select(pane, []) }, "Clear"),
          ]
        : ["Drag to select patches; they are marked on the slide."]),
    );
  }

  // What the user does

  _select(pane, indices, add = false) {
    pane.select(indices, add);
    if (pane !== this.active) return;
    this.scatter.setMarks(pane.marks);
    this._selection(pane);
  }

  _pick(pane, index, fromMap = false) {
    if (index < 0) return;
    pane.setPatch(index);
    if (fromMap) this._reveal(pane, pane.coords[2 * index], pane.coords[2 * index + 1], pane.slide.patches.size);
    if (pane === this.active) {
      this.scatter.mark(index);
      this.similar.show(pane, { ...this.settings, vectors: this._vectors(pane) });
    }
    if (MODES.find((mode) => mode.id === this._mode(pane))?.patch) this._recolour(pane).then(() => pane === this.active && this._showBlocks(pane));
    this.remember();
  }

  _showBlocks(pane) {
    if (pane.blocks && $("block").options.length !== pane.blocks) this._showActive();
  }

  /** Move the view so that a patch is inside it. */
  _reveal(pane, x, y, size) {
    const view = pane.view();
    if (!view) return;
    const [w, tall] = [pane.osdHost.clientWidth / view.scale, pane.osdHost.clientHeight / view.scale];
    if (x < view.x || y < view.y || x + size > view.x + w || y + size > view.y + tall) pane.goTo({ x: x + size / 2, y: y + size / 2 });
  }

  async _goToMatch(match) {
    const holder = this.panes.find((pane) => pane.key === match.key);
    const centre = { x: match.x + match.size / 2, y: match.y + match.size / 2 };
    const spot = { x: match.x, y: match.y, size: match.size };
    if (holder) {
      holder.goTo({ ...centre, zoom: Math.max(holder.place()?.zoom ?? 0, 120 / match.size) });
      holder.spot = spot;
      holder.draw();
      return;
    }
    const other = this.panes.find((pane) => pane !== this.active);
    const at = { ...centre, zoom: 120 / match.size, spot };
    if (other) await this.open(other, match.key, at);
    else await this.split(true, match.key, at);
  }

  _hoverPatch(index) {
    const pane = this.active;
    if (pane.hovered === index) return;
    pane.hovered = index;
    pane.draw();
  }

  _hoverSlide(pane, at) {
    this.pointer = at ? { pane, at } : null;
    this._where();
  }

  _where() {
    const pane = this.pointer?.pane ?? this.active;
    const { slide } = pane;
    if (!slide) return ($("where").textContent = "");
    const parts = [];
    if (slide.slide) parts.push(`${grouped(slide.slide.width)} × ${grouped(slide.slide.height)} px`, `${+slide.slide.mpp.toPrecision(4)} µm/px`);
    if (slide.patches) parts.push(many(slide.patches.count, "patch", "patches"));
    if (slide.weights) parts.push(slide.weights);
    if (this.pointer) {
      const { x, y } = this.pointer.at;
      parts.push(`x ${grouped(Math.round(x))}, y ${grouped(Math.round(y))}`);
    }
    $("where").textContent = parts.join("  ·  ");
  }

  setTool(tool) {
    this.tool = tool;
    for (const button of document.querySelectorAll("[data-tool]")) button.setAttribute("aria-pressed", button.dataset.tool === tool);
    this.panes.forEach((pane) => pane.setTool(tool));
  }

  toggle(name) {
    this.show[name] = !this.show[name];
    $(`show-${name}`).checked = this.show[name];
    this.panes.forEach((pane) => pane.draw());
    this.remember();
  }

  setOpacity(value) {
    this.settings.opacity = Math.min(100, Math.max(0, value));
    $("opacity").value = this.settings.opacity;
    $("opacity-value").textContent = `${this.settings.opacity}%`;
    for (const pane of this.panes) {
      pane.layer.opacity = this.settings.opacity / 100;
      pane.draw();
    }
    this.remember();
  }

  async export() {
    const slides = this.panes.map((pane) => pane.slide).filter(Boolean);
    if (!slides.length) return;
    const notes = slides.flatMap((slide) => slide.banners.map(({ text }) => text.split(":")[0]));
    const mode = this.show.patches ? $("mode").selectedOptions[0]?.textContent : "";
    const caption = [slides.map((slide) => slide.id).join("  |  "), mode, ...new Set(notes)].filter(Boolean).join("  ·  ");
    try {
      const blob = await exportPng(this.panes, caption);
      download(blob, `${slides.map((slide) => slide.id).join("-")}.png`);
      this.say("The view was saved as PNG.");
    } catch (error) {
      this.say(`No picture: ${error.message}`);
    }
  }

  // The address

  _remember() {
    const panes = this.panes.filter((pane) => pane.key).map((pane) => ({ key: pane.key, patch: pane.patch, ...(pane.place() ?? {}) }));
    const hide = Object.keys(this.show).filter((name) => !this.show[name]);
    this.hash = format({ panes, settings: { ...this.settings, ...(hide.length ? { hide } : {}) } });
    history.replaceState(null, "", this.hash);
  }

  async _restore() {
    const { panes, settings } = parse(location.hash);
    const { hide, ...others } = settings;
    Object.assign(this.settings, others);
    for (const name of Object.keys(this.show)) this.show[name] = !hide?.includes(name);
    this.setOpacity(this.settings.opacity);
    const known = panes.filter((pane) => this.slides.some((slide) => slide.key === pane.key));
    if (known.length < panes.length) this.say("A slide of this address is not in this folder.");
    // Without an address, the first slide with the most results is a better start than the first of the list.
    const order = ["embedded", "features", "patches", "slide", "skipped"];
    const first = known[0] ?? [...this.slides].sort((a, b) => order.indexOf(a.state) - order.indexOf(b.state))[0];
    await this.open(this.panes[0], first.key, first);
    await this.split(known.length > 1, known[1]?.key, known[1]);
  }

  // Controls and keys

  _controls() {
    const change = (name, read = (element) => element.value) =>
      $(name).addEventListener("input", (event) => {
        this.settings[name] = read(event.target);
        if (name === "k") $("k-value").textContent = this.settings.k;
        this._recolourAll();
      });
    change("mode");
    change("vectors");
    change("palette");
    change("k", (element) => Number(element.value));
    change("block", (element) => Number(element.value));
    $("scope").addEventListener("input", (event) => {
      this.settings.scope = event.target.value;
      this.similar.show(this.active, { ...this.settings, vectors: this._vectors(this.active) });
      this.remember();
    });
    $("opacity").addEventListener("input", (event) => this.setOpacity(Number(event.target.value)));
    for (const name of Object.keys(this.show)) $(`show-${name}`).addEventListener("change", () => this.toggle(name));
    for (const button of document.querySelectorAll("[data-tool]")) button.addEventListener("click", () => this.setTool(button.dataset.tool));
    $("magnifications").append(
      ...MAGNIFICATIONS.map((value, at) => h("button", { title: `${value}× (${at + 1})`, onclick: () => this.active.magnify(value) }, `${value}×`)),
    );
    // A list that was opened with the pointer gives the focus back, so that the keys of the page work again.
    for (const list of document.querySelectorAll("select")) {
      let pointed = false;
      list.addEventListener("pointerdown", () => (pointed = true));
      list.addEventListener("keydown", () => (pointed = false));
      list.addEventListener("change", () => pointed && list.blur());
    }
    $("fit").addEventListener("click", () => this.active.fit());
    $("split").addEventListener("click", () => this.split());
    $("export").addEventListener("click", () => this.export());
    $("help").addEventListener("click", () => $("keys").showModal());
    $("filter").addEventListener("input", () => this._list());
    $("toggle-slides").addEventListener("click", () => document.body.classList.toggle("no-slides"));
    $("toggle-panel").addEventListener("click", () => document.body.classList.toggle("no-panel"));
    $("keys").append(
      h("h2", {}, "Keys"),
      h("table", {}, ...KEYS.map(([key, meaning]) => h("tr", {}, h("td", {}, h("kbd", {}, key)), h("td", {}, meaning)))),
      h("form", { method: "dialog" }, h("button", {}, "Close")),
    );
  }

  _keys() {
    const next = (step) => {
      const at = this.slides.findIndex((slide) => slide.key === this.active.key);
      const slide = this.slides[(at + step + this.slides.length) % this.slides.length];
      if (slide) this.open(this.active, slide.key);
    };
    const cycle = () => {
      const { options } = $("mode");
      this.settings.mode = options[($("mode").selectedIndex + 1) % options.length].value;
      this._recolourAll();
    };
    const keys = {
      ArrowLeft: () => this.active.panBy(-80, 0), ArrowRight: () => this.active.panBy(80, 0),
      ArrowUp: () => this.active.panBy(0, -80), ArrowDown: () => this.active.panBy(0, 80),
      "+": () => this.active.zoomBy(1.4), "=": () => this.active.zoomBy(1.4), "-": () => this.active.zoomBy(1 / 1.4),
      0: () => this.active.fit(), v: () => this.setTool("pan"), l: () => this.setTool("lasso"), d: () => this.setTool("draw"),
      c: cycle, "[": () => this.setOpacity(this.settings.opacity - 10), "]": () => this.setOpacity(this.settings.opacity + 10),
      p: () => this.toggle("patches"), o: () => this.toggle("outlines"), r: () => this.toggle("regions"), s: () => this.split(),
      e: () => this.export(), ",": () => next(-1), ".": () => next(1), "?": () => $("keys").showModal(),
      Escape: () => {
        this._select(this.active, []);
        this.setTool("pan");
      },
    };
    MAGNIFICATIONS.forEach((value, at) => (keys[at + 1] = () => this.active.magnify(value)));
    window.addEventListener("keydown", (event) => {
      if ((event.ctrlKey || event.metaKey) && event.key.toLowerCase() === "s") {
        event.preventDefault();
        return this.regions.save();
      }
      const typing = event.target.closest?.("input[type=text], input[type=search], select, dialog");
      const choosing = event.target.closest?.("input[type=range]") && event.key.startsWith("Arrow");
      if (typing || choosing || event.ctrlKey || event.metaKey || event.altKey) return;
      const action = keys[event.key.length === 1 ? event.key.toLowerCase() : event.key];
      if (!action) return;
      event.preventDefault();
      action();
    });
  }
}

const app = new App();
window.exaonepath = app;
app.start();
