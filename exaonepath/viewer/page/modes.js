// The ways to colour patches. Each one gives colours, and a legend that explains them.

import { array } from "./api.js";
import { CATEGORIES, ofCategories, ofNumbers, ofRgb, quantile, range } from "./colours.js";

export const MODES = [
  { id: "pca", name: "PCA of the vectors", vectors: true },
  { id: "pc1", name: "First component", vectors: true, palette: true },
  { id: "clusters", name: "Clusters", vectors: true, k: true },
  { id: "similarity", name: "Similarity to a patch", vectors: true, palette: true, patch: true },
  { id: "attention", name: "Attention from a patch", palette: true, patch: true, block: true },
  { id: "fragments", name: "Fragment" },
];

/** The modes that a slide offers: those for which it has data. */
export function modesOf(slide) {
  if (!slide?.patches?.count) return [{ id: "none", name: "no patches" }];
  const found = MODES.filter((mode) => {
    if (mode.id === "attention") return slide.attention;
    return !mode.vectors || slide.vectors.length > 0;
  });
  const columns = slide.columns.map(({ name, categories }) => ({
    id: `column:${name}`, name: `Column ${name}`, palette: categories.length === 0,
  }));
  return [...found, ...columns];
}

const percent = (share) => `${(100 * share).toFixed(0)} %`;
const short = (value) => (Math.abs(value) >= 1000 || (value && Math.abs(value) < 0.001) ? value.toExponential(2) : value.toPrecision(3));

/** {colours, legend} of a slide's patches. `settings` is what the panel shows, `patch` the clicked patch or -1. */
export async function coloursOf(slide, settings, patch, options) {
  const { mode, vectors, k, palette } = settings;
  if (mode === "none") return { colours: new Uint8Array(0), legend: { kind: "none" } };
  if (mode === "pca") {
    const { values, headers } = await array(slide, "colours", Uint8Array, { vectors }, options);
    const shares = (headers.get("x-explained") || "").split(",").map(Number);
    const text = `Patches with similar vectors have similar colours. Three components: ${percent(shares.reduce((a, b) => a + b, 0))} of the variance.`;
    return { colours: ofRgb(values), legend: { kind: "text", text } };
  }
  if (mode === "pc1") {
    const { values } = await array(slide, "scatter", Float32Array, { vectors }, options);
    const first = values.filter((_, at) => at % 2 === 0);
    const low = quantile(first, 0.01);
    const high = quantile(first, 0.99);
    return { colours: ofNumbers(first, low, high, palette), legend: { kind: "bar", palette, low: "low", high: "high" } };
  }
  if (mode === "clusters") {
    const { values } = await array(slide, "clusters", Uint8Array, { vectors, k }, options);
    return { colours: ofCategories(values), legend: keys(values, (at) => `Cluster ${at + 1}`) };
  }
  if (mode === "fragments") {
    const { values } = await array(slide, "fragments", Int32Array, {}, options);
    return { colours: ofCategories(values), legend: keys(values, (at) => `Fragment ${at}`) };
  }
  if (mode.startsWith("column:")) {
    const name = mode.slice(7);
    const column = slide.columns.find((c) => c.name === name);
    const { values } = await array(slide, "column", Float32Array, { name }, options);
    if (column?.categories.length) {
      const numbers = Int32Array.from(values, (value) => (Number.isNaN(value) ? -1 : value));
      return { colours: ofCategories(numbers), legend: keys(numbers, (at) => column.categories[at]) };
    }
    const [low, high] = range(values);
    return { colours: ofNumbers(values, low, high, palette), legend: { kind: "bar", palette, low: short(low), high: short(high) } };
  }
  if (patch < 0) {
    const colours = new Uint8Array(4 * slide.patches.count).fill(110);
    return { colours, legend: { kind: "text", text: "Click a patch, on the slide or on the map." } };
  }
  if (mode === "similarity") {
    const { values } = await array(slide, "similarity", Float32Array, { vectors, patch }, options);
    const [low, high] = range(values, patch);
    const legend = { kind: "bar", palette, low: short(low), high: short(high), text: "Cosine to the marked patch." };
    return { colours: ofNumbers(values, low, high, palette), legend };
  }
  const { values, headers } = await array(slide, "attention", Float32Array, { patch, block: settings.block }, options);
  // A few patches get most of the attention, the patch itself above all: the palette ends where 1 % lie above.
  const high = quantile(values, 0.99) || range(values)[1];
  const total = values.reduce((a, b) => a + b, 0);
  const legend = {
    kind: "bar", palette, low: "0", high: `≥ ${short(high)}`,
    text: `Block ${Number(headers.get("x-block")) + 1} of ${headers.get("x-blocks")}, mean over heads; ${percent(total)} falls on patches, the rest on prefix tokens.`,
  };
  return { colours: ofNumbers(values, 0, high, palette), legend, blocks: Number(headers.get("x-blocks")), block: Number(headers.get("x-block")) };
}

/** The legend of categories: name, colour, number of patches, and a test for membership. */
function keys(values, name) {
  const counts = new Map();
  for (const value of values) counts.set(value, (counts.get(value) || 0) + 1);
  const known = [...counts.keys()].filter((value) => value >= 0 && value !== 255).sort((a, b) => a - b);
  const items = known.slice(0, 40).map((value) => ({
    name: name(value), colour: `rgb(${CATEGORIES[value % CATEGORIES.length].join(",")})`, count: counts.get(value), value,
  }));
  return { kind: "keys", items, values, more: known.length - items.length };
}
