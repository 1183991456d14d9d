// The patches that resemble the clicked one, as tiles.

import * as api from "./api.js";
import { $, grouped, h, many } from "./dom.js";

const COUNT = 20;

export class SimilarPatches {
  /** `go(match)` shows a match. */
  constructor(go) {
    this.go = go;
    this.requests = new AbortController();
  }

  async show(pane, settings) {
    this.requests.abort();
    this.requests = new AbortController();
    const { signal } = this.requests;
    const host = $("similar");
    const { slide, patch } = pane ?? {};
    if (!slide?.vectors?.length || patch < 0 || patch === undefined) {
      host.replaceChildren(h("p", { class: "small" }, slide?.vectors?.length ? "Click a patch." : "This slide has no vectors."));
      return;
    }
    const values = { v: slide.version, patch, vectors: settings.vectors, scope: settings.scope, count: COUNT };
    try {
      let found = await api.json(`slides/${slide.key}/similar`, values, { signal });
      while (found.pending) {
        host.replaceChildren(h("p", { class: "small" }, `Reading vectors: ${found.pending.done} of ${many(found.pending.total, "slide")} …`));
        await new Promise((resolve) => setTimeout(resolve, 150));
        if (signal.aborted) return;
        found = await api.json(`slides/${slide.key}/similar`, values, { signal });
      }
      const thumbnails = await this._pixels(found.matches, pane);
      const left = found.left_out ? ` ${many(found.left_out, "slide")} with other weights or without vectors left out.` : "";
      const searched = settings.scope === "cohort" ? `${many(found.slides, "slide")}, ` : "";
      host.replaceChildren(
        h(
          "div", { class: "query" },
          slide.slide ? h("img", { src: this._image(pane.key, slide.slide.fingerprint, pane.coords[2 * patch], pane.coords[2 * patch + 1], slide.patches.size), alt: "The marked patch" }) : null,
          h("span", { class: "small" }, `Patch ${grouped(patch)}. Cosine, exact, among ${searched}${many(found.patches, "patch", "patches")}.${left}`),
        ),
        h("div", { class: "tiles" }, ...found.matches.map((match, at) => this._tile(match, thumbnails[at], pane))),
      );
    } catch (error) {
      if (error.name !== "AbortError") host.replaceChildren(h("p", { class: "small" }, error.message));
    }
  }

  _tile(match, source, pane) {
    const where = match.key === pane.key ? "" : `${match.id}, `;
    const title = `${where}patch ${grouped(match.patch)}, cosine ${match.cosine.toFixed(3)}`;
    return h(
      "button", { title, "aria-label": title, onclick: () => this.go(match) },
      source ? h("img", { src: source, alt: "", loading: "lazy" }) : h("span", { class: "small" }, match.id),
      h("span", { class: "cosine" }, match.cosine.toFixed(3)),
    );
  }

  _image(key, fingerprint, x, y, size) {
    return `pixels/${key}/${fingerprint}/patches/${x}_${y}_${size}_112.jpg`;
  }

  /** Addresses of the pictures; slides that were not opened yet are asked for their fingerprint, each once. */
  async _pixels(matches, pane) {
    this.fingerprints ??= new Map();
    this.fingerprints.set(pane.key, pane.slide.slide?.fingerprint ?? null);
    const unknown = [...new Set(matches.map((match) => match.key))].filter((key) => !this.fingerprints.has(key));
    await Promise.all(
      unknown.map(async (key) => {
        const state = await api.json(`slides/${key}/state`).catch(() => null);
        this.fingerprints.set(key, state?.fingerprint ?? null);
      }),
    );
    return matches.map(({ key, x, y, size }) => {
      const fingerprint = this.fingerprints.get(key);
      return fingerprint && size ? this._image(key, fingerprint, x, y, size) : null;
    });
  }
}
