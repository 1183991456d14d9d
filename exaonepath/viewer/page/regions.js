// The list of drawn regions: names, classes, saving.

import * as api from "./api.js";
import { $, h } from "./dom.js";
import { bounds } from "./geometry.js";

const CLASSES = ["Tissue", "Excluded", "Tumor", "Stroma", "Necrosis"];

export class RegionList {
  /** `pane()` is the active pane, `say(text)` shows a message. */
  constructor(pane, say) {
    this.pane = pane;
    this.say = say;
    $("save").addEventListener("click", () => this.save());
    document.body.append(h("datalist", { id: "classes" }, ...CLASSES.map((name) => h("option", { value: name }))));
  }

  async load(pane) {
    try {
      const found = await api.json(`slides/${pane.key}/regions`);
      pane.revision = found.revision;
      pane.readOnly = !found.ours;
      pane.regionsPath = found.path;
      pane.unsaved = false;
      pane.setRegions(found.regions);
    } catch (error) {
      pane.revision = null;
      this.say(`Regions: ${error.message}`);
    }
    this.show();
  }

  add(pane, points) {
    if (pane.readOnly) return this.say("These regions were written by another program; move the file away to draw new ones.");
    this._changed(pane, [...pane.regions, { name: "", class: "", points }]);
    $("regions").querySelector("li:last-child input")?.focus();
  }

  async save() {
    const pane = this.pane();
    if (!pane?.unsaved) return;
    const regions = pane.regions.map(({ name, class: kind, points }) => ({ name, class: kind, points }));
    try {
      const saved = await api.put(`slides/${pane.key}/regions`, { regions, revision: pane.revision ?? "" });
      pane.revision = saved.revision;
      pane.regionsPath = saved.path;
      pane.unsaved = false;
      this.say(`Saved. As a mask: exaonepath patch SLIDE --mask ${saved.path}`);
    } catch (error) {
      this.say(`Not saved: ${error.message}`);
    }
    this.show();
  }

  show() {
    const pane = this.pane();
    const regions = pane?.regions ?? [];
    $("regions").replaceChildren(
      ...regions.map((region, at) => this._row(pane, region, at)),
      ...(regions.length ? [] : [h("li", { class: "small" }, "None. Draw one with D.")]),
    );
    $("save").disabled = !pane?.unsaved;
    $("saved").textContent = pane?.unsaved ? "not saved" : regions.length && pane.regionsPath ? pane.regionsPath : "";
  }

  _row(pane, region, at) {
    const edit = (key) => (event) => {
      const changed = pane.regions.map((other, index) => (index === at ? { ...other, [key]: event.target.value } : other));
      this._changed(pane, changed, false);
    };
    const locked = Boolean(pane.readOnly);
    const label = region.name || `region ${at + 1}`;
    return h(
      "li", {},
      h("input", { type: "text", value: region.name, placeholder: `Region ${at + 1}`, maxlength: "120", "aria-label": `Name of ${label}`, disabled: locked, oninput: edit("name") }),
      h("input", { type: "text", class: "class", value: region.class, placeholder: "Class", list: "classes", maxlength: "120", "aria-label": `Class of ${label}`, disabled: locked, oninput: edit("class") }),
      h("button", { title: "Go there", "aria-label": `Go to ${label}`, onclick: () => pane.goToBox(bounds(region.points)) }, "◎"),
      h("button", { title: "Remove", "aria-label": `Remove ${label}`, disabled: locked, onclick: () => this._changed(pane, pane.regions.filter((_, index) => index !== at)) }, "✕"),
    );
  }

  _changed(pane, regions, listed = true) {
    pane.setRegions(regions);
    pane.unsaved = true;
    if (listed) return this.show();
    $("save").disabled = false;
    $("saved").textContent = "not saved";
  }
}
