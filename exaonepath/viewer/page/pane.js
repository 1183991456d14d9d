// One slide: its pixels (OpenSeadragon), its patches (WebGL), and lines above them. There may be two of them.

import * as api from "./api.js";
import { h, perFrame } from "./dom.js";
import { bounds, doubledArea, PatchIndex, pointsInside, simplified } from "./geometry.js";
import { drawMarks, outlinePaths, regionPath } from "./marks.js";
import { DIMMED, PatchLayer, SELECTED } from "./patch-layer.js";

const { OpenSeadragon } = window;
const NICE = [1, 2, 5];
const CHECK_SECONDS = 20;
const still = window.matchMedia("(prefers-reduced-motion: reduce)").matches;

export class Pane {
  /** `on`: {activate, view, pick, select, region, hover, data}, each called with this pane first. */
  constructor(on, show) {
    this.on = on;
    this.show = show;
    this.osdHost = h("div", { class: "osd" });
    this.patchCanvas = h("canvas", { class: "layer" });
    this.markCanvas = h("canvas", { class: "layer" });
    this.bannerHost = h("div", { class: "top", role: "status" });
    this.barLine = h("div", { class: "line" });
    this.barText = h("span");
    this.barMagnification = h("span", { class: "magnification" });
    this.bar = h("div", { class: "scale-bar hidden" }, h("div", {}, this.barText, this.barMagnification), this.barLine);
    this.host = h(
      "section", { class: "pane", "aria-label": "Slide view" },
      this.osdHost, this.patchCanvas, this.markCanvas, this.bannerHost, this.bar,
    );
    this.host.addEventListener("pointerdown", () => on.activate(this), true);
    this.layer = new PatchLayer(this.patchCanvas);
    this.draw = perFrame(() => this.drawNow());
    this.requests = new AbortController();
    this._clear();
    this._listenToTools();
    this.timer = setInterval(() => document.hidden || this._check(), CHECK_SECONDS * 1000);
  }

  /** To be called once the host is in the document. */
  start() {
    this.osd = OpenSeadragon({
      element: this.osdHost,
      prefixUrl: "page/vendor/",
      drawer: "canvas",
      showNavigationControl: false,
      showNavigator: true,
      navigatorPosition: "BOTTOM_RIGHT",
      navigatorSizeRatio: 0.17,
      navigatorAutoFade: false,
      navigatorBackground: "#14181e",
      navigatorDisplayRegionColor: "#56b4e9",
      animationTime: still ? 0 : 0.4,
      springStiffness: 9,
      maxZoomPixelRatio: 6,
      minZoomImageRatio: 0.4,
      visibilityRatio: 0.25,
      zoomPerScroll: 1.25,
      timeout: 120000,
      tabIndex: -1, // the page has its own keys, which work wherever the focus is
      gestureSettingsMouse: { clickToZoom: false },
      gestureSettingsTouch: { clickToZoom: false },
      gestureSettingsPen: { clickToZoom: false },
    });
    this.osd.addHandler("canvas-key", (event) => (event.preventDefaultAction = true)); // the page has its own keys
    this.osd.addHandler("update-viewport", () => this.drawNow());
    this.osd.addHandler("resize", () => this.draw());
    this.osd.addHandler("viewport-change", () => this.on.view(this));
    this.osd.addHandler("tile-load-failed", () => this._check());
    this.osd.addHandler("tile-drawn", () => {
      if (!document.documentElement.dataset.firstTile) document.documentElement.dataset.firstTile = performance.now();
    });
    this.osd.addHandler("canvas-click", (event) => {
      const view = this.view();
      if (!event.quick || !view || !this.index) return;
      const { x, y } = this.toSlide(event.position.x, event.position.y);
      this.on.pick(this, this.index.at(x, y));
    });
    this.osdHost.addEventListener("pointermove", (event) => {
      const box = this.osdHost.getBoundingClientRect();
      this.on.hover(this, this.view() && this.toSlide(event.clientX - box.left, event.clientY - box.top));
    });
    this.osdHost.addEventListener("pointerleave", () => this.on.hover(this, null));
  }

  destroy() {
    clearInterval(this.timer);
    this.requests.abort();
    this.osd?.destroy();
    this.layer.destroy();
    this.host.remove();
  }

  /** Show a slide; `at` {x, y, zoom} is the centre and CSS pixels per level-0 pixel, or missing for all of it. */
  async open(key, at = {}) {
    this.requests.abort();
    this.requests = new AbortController();
    const { signal } = this.requests;
    this._clear();
    this.key = key;
    let slide;
    try {
      slide = await api.json(`slides/${key}`, {}, { signal });
    } catch (error) {
      if (error.name !== "AbortError") this.banner("error", "", error.message);
      throw error;
    }
    this.slide = slide;
    if (slide.slide) this._openImage(slide, at);
    this._banners();
    await this._loadPatches(slide, signal);
    if (!slide.slide) this._openBlank(at);
    this.draw();
  }

  get mpp() {
    return this.slide?.slide?.mpp || 0;
  }

  /** {x, y, scale}: the level-0 position of the top left corner, and CSS pixels per level-0 pixel. */
  view() {
    if (!this.extent || !this.osd.world.getItemCount()) return null;
    const { viewport } = this.osd;
    const box = viewport.getBounds(true);
    const scale = viewport.viewportToImageZoom(viewport.getZoom(true));
    return { x: box.x * this.extent[0], y: box.y * this.extent[0], scale };
  }

  /** Centre and zoom, as `open` takes them: where the view is going, while it still moves. */
  place() {
    if (!this.extent || !this.osd.world.getItemCount()) return null;
    const { viewport } = this.osd;
    const centre = viewport.getCenter();
    const zoom = viewport.viewportToImageZoom(viewport.getZoom());
    return { x: centre.x * this.extent[0], y: centre.y * this.extent[0], zoom };
  }

  goTo({ x, y, zoom }, immediately = false) {
    if (!this.extent) return;
    const { viewport } = this.osd;
    if (zoom) viewport.zoomTo(viewport.imageToViewportZoom(zoom), null, immediately);
    viewport.panTo(new OpenSeadragon.Point(x / this.extent[0], y / this.extent[0]), immediately);
    viewport.applyConstraints(immediately);
  }

  goToBox([left, top, right, bottom], margin = 1.4) {
    const width = Math.max(right - left, 1);
    const height = Math.max(bottom - top, 1);
    const zoom = Math.min(this.osdHost.clientWidth / width, this.osdHost.clientHeight / height) / margin;
    this.goTo({ x: (left + right) / 2, y: (top + bottom) / 2, zoom });
  }

  fit() {
    this.osd.viewport.goHome();
  }

  zoomBy(factor) {
    this.osd.viewport.zoomBy(factor);
    this.osd.viewport.applyConstraints();
  }

  panBy(x, y) {
    this.osd.viewport.panBy(this.osd.viewport.deltaPointsFromPixels(new OpenSeadragon.Point(x, y)));
    this.osd.viewport.applyConstraints();
  }

  /** Magnification as on a microscope: a pixel of the screen is 10 / magnification micrometres. */
  magnification(view = this.view()) {
    return view && this.mpp ? (10 * view.scale) / this.mpp : 0;
  }

  magnify(magnification) {
    if (this.mpp) this.goTo({ ...this.place(), zoom: (magnification * this.mpp) / 10 });
  }

  toSlide(x, y) {
    const view = this.view();
    return { x: view.x + x / view.scale, y: view.y + y / view.scale };
  }

  setColours(colours) {
    this.colours = colours;
    if (this.coords.length) this.layer.setColours(colours);
    this.draw();
  }

  setPatch(index) {
    this.patch = index >= 0 && index < this.coords.length / 2 ? index : -1;
    this.spot = null;
    this.draw();
  }

  /** Select patches, in place of those that are selected or in addition to them. */
  select(indices, add = false) {
    const marks = this.marks;
    if (!add) marks.fill(0);
    for (const index of indices) marks[index] = SELECTED;
    this.selected = marks.reduce((count, mark) => count + (mark === SELECTED), 0);
    for (let i = 0; i < marks.length; i++) if (marks[i] !== SELECTED) marks[i] = this.selected ? DIMMED : 0;
    if (marks.length) this.layer.setMarks(marks);
    this.draw();
  }

  setRegions(regions) {
    this.regions = regions.map((region) => ({ ...region, path: regionPath(region.points), box: bounds(region.points) }));
    this.draw();
  }

  /** "pan", "lasso" or "draw". */
  setTool(tool) {
    this.tool = tool;
    this.stroke = null;
    this.markCanvas.classList.toggle("tool", tool !== "pan");
    this.draw();
  }

  banner(kind, title, text, ...actions) {
    const found = h("div", { class: `banner ${kind}` }, title ? h("b", {}, `${title} `) : null, text, ...actions);
    this.bannerHost.append(found);
    return found;
  }

  drawNow() {
    const view = this.view();
    this.layer.draw(view, this.show.patches);
    drawMarks(this.markCanvas, view, this, this.show);
    this._scaleBar(view);
  }

  _clear() {
    this.key = null;
    this.slide = null;
    this.extent = null;
    this.coords = new Float32Array();
    this.colours = new Uint8Array();
    this.marks = new Uint8Array();
    this.selected = 0;
    this.index = null;
    this.outlines = {};
    this.failed = [];
    this.regions = [];
    this.revision = null;
    this.unsaved = false;
    this.patch = this.hovered = -1;
    this.spot = null;
    this.stroke = null;
    this.layer.count = 0;
    this.bannerHost.replaceChildren();
    this.stateBanner = null;
    this.osd?.close();
    this.draw?.();
  }

  _openImage(slide, at) {
    const { width, height, fingerprint, tile, overlap, top } = slide.slide;
    const key = this.key;
    this._openSource(
      {
        width, height, tileSize: tile, tileOverlap: overlap, minLevel: Math.min(8, top), maxLevel: top,
        getTileUrl: (level, x, y) => `pixels/${key}/${fingerprint}/tiles/${level}/${x}_${y}.jpg`,
      },
      [width, height], at,
    );
  }

  /** The patches of a slide whose file cannot be read are shown all the same, on an empty plane. */
  _openBlank(at) {
    let [width, height] = [1, 1];
    const size = this.slide.patches?.size || 0;
    for (let i = 0; i < this.coords.length; i += 2) {
      width = Math.max(width, this.coords[i] + 1.1 * size);
      height = Math.max(height, this.coords[i + 1] + 1.1 * size);
    }
    if (!this.coords.length) return;
    // One tile of one level, however large the slide is: tiles of the usual size would be a hundred thousand.
    const tileSize = Math.ceil(Math.max(width, height));
    const source = { width, height, tileSize, minLevel: 0, maxLevel: 0, getTileUrl: () => "page/blank.svg" };
    this._openSource(source, [width, height], at);
  }

  _openSource(tileSource, extent, at) {
    const host = this.osd;
    host.addOnceHandler("open", () => {
      this.extent = extent;
      if (Number.isFinite(at?.x) && Number.isFinite(at?.y)) this.goTo(at, true);
      this.on.view(this);
      this.draw();
    });
    host.open(tileSource);
  }

  async _loadPatches(slide, signal) {
    const wanted = { signal };
    if (slide.outlines) {
      const { values } = await api.array(slide, "outlines", Int32Array, {}, wanted);
      this.outlines = outlinePaths(values);
    }
    if (slide.patches?.failed) this.failed = await api.json(`slides/${slide.key}/failed`, { v: slide.version }, wanted);
    if (slide.patches?.count) {
      const { values } = await api.array(slide, "coords", Int32Array, {}, wanted);
      this.coords = Float32Array.from(values);
      this.marks = new Uint8Array(values.length / 2);
      const { size, step } = slide.patches;
      // Patches that overlap are drawn as the cells of their grid, around their centres: else they would hide each other.
      const cell = Math.min(size, step || size);
      this.layer.setPatches(this.coords, cell, (size - cell) / 2);
      this.index = new PatchIndex(this.coords, size);
    }
    this.on.data(this);
  }

  _banners() {
    const { slide } = this;
    if (slide.slide_error) this.banner("error", "Slide file.", slide.slide_error);
    if (slide.results_error) this.banner("error", "Results.", slide.results_error);
    for (const { text } of slide.banners) {
      const [title, ...rest] = text.split(": ");
      const about = rest.join(": ");
      this.banner("warning", `${title}.`, about.charAt(0).toUpperCase() + about.slice(1));
    }
    for (const note of slide.notes ?? []) this.banner("info", "", note);
    if (slide.bad_tiles) this._badTiles(slide.bad_tiles);
    if (!this.layer.available) this.banner("error", "No WebGL 2.", "This browser cannot draw the patches.");
  }

  _badTiles(count) {
    const text = `${count} tile${count === 1 ? "" : "s"} of this slide could not be read and ${count === 1 ? "is" : "are"} shown grey.`;
    this.badBanner?.remove();
    this.badBanner = this.banner("error", "", text);
  }

  /** Ask whether the slide is still what is shown; a slide that vanishes gives a message, not a dead page. */
  async _check() {
    if (!this.slide || this.checking) return;
    this.checking = true;
    const { slide } = this;
    try {
      const state = await api.json(`slides/${slide.key}/state`);
      if (slide !== this.slide) return;
      const shown = slide.slide?.fingerprint;
      const again = h("button", { class: "link", onclick: () => this.on.reload(this) }, "Load again");
      this.stateBanner?.remove();
      if (shown && state.error) this.stateBanner = this.banner("error", "Slide file.", state.error, " ", again);
      else if (state.fingerprint && state.fingerprint !== (shown ?? "")) {
        this.stateBanner = this.banner("error", "", shown ? "The slide file was replaced. " : "The slide file is back. ", again);
      } else if (state.version !== slide.version) {
        this.stateBanner = this.banner("info", "", "The results of this slide have changed. ", again);
      }
      if (state.bad_tiles !== slide.bad_tiles) this._badTiles((slide.bad_tiles = state.bad_tiles));
    } catch (error) {
      this.stateBanner?.remove();
      this.stateBanner = this.banner("error", "", error.message);
    } finally {
      setTimeout(() => (this.checking = false), 1000);
    }
  }

  _scaleBar(view) {
    const micrometres = view && this.mpp ? (110 / view.scale) * this.mpp : 0;
    this.bar.classList.toggle("hidden", !micrometres);
    if (!micrometres) return;
    const power = 10 ** Math.floor(Math.log10(micrometres));
    const nice = power * NICE.filter((step) => step * power <= micrometres).at(-1);
    this.scale = { pixels: (nice / this.mpp) * view.scale, text: nice >= 1000 ? `${nice / 1000} mm` : `${+nice.toPrecision(3)} µm` };
    this.barLine.style.width = `${this.scale.pixels}px`;
    this.barText.textContent = this.scale.text;
    const magnification = this.magnification(view);
    this.barMagnification.textContent = `${magnification >= 10 ? magnification.toFixed(0) : magnification.toPrecision(2)}×`;
  }

  _listenToTools() {
    const canvas = this.markCanvas;
    const place = (event) => {
      const box = canvas.getBoundingClientRect();
      const { x, y } = this.toSlide(event.clientX - box.left, event.clientY - box.top);
      return [x, y];
    };
    canvas.addEventListener("pointerdown", (event) => {
      if (event.button !== 0 || !this.view()) return;
      this.on.activate(this);
      canvas.setPointerCapture(event.pointerId);
      this.stroke = [place(event)];
    });
    canvas.addEventListener("pointermove", (event) => {
      if (!this.stroke) return;
      const moves = event.getCoalescedEvents?.() ?? [];
      for (const move of moves.length ? moves : [event]) this.stroke.push(place(move));
      this.draw();
    });
    canvas.addEventListener("pointerup", (event) => {
      const { stroke } = this;
      this.stroke = null;
      this.draw();
      if (!stroke) return;
      const { scale } = this.view();
      const polygon = simplified(stroke, 1 / scale);
      const large = polygon.length >= 3 && Math.abs(doubledArea(polygon)) * scale ** 2 > 60;
      if (this.tool === "draw" && large) this.on.region(this, polygon.map((point) => this._onSlide(point)));
      if (this.tool === "lasso") {
        const half = (this.slide?.patches?.size || 0) / 2;
        this.on.select(this, large ? pointsInside(polygon, this.coords, half) : [], event.ctrlKey || event.metaKey);
      }
    });
    canvas.addEventListener("pointercancel", () => {
      this.stroke = null;
      this.draw();
    });
    canvas.addEventListener(
      "wheel",
      (event) => {
        event.preventDefault();
        const box = canvas.getBoundingClientRect();
        const point = this.osd.viewport.pointFromPixel(new OpenSeadragon.Point(event.clientX - box.left, event.clientY - box.top));
        this.osd.viewport.zoomBy(Math.exp(-event.deltaY * 0.0015), point);
        this.osd.viewport.applyConstraints();
      },
      { passive: false },
    );
  }

  _onSlide([x, y]) {
    const clip = (value, side) => Math.round(Math.min(side, Math.max(0, value)) * 10) / 10;
    return [clip(x, this.extent[0]), clip(y, this.extent[1])];
  }
}
