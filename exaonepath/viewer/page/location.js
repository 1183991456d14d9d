// The view as the part of the address after #, so that a link or a reload restores it.

const number = (text) => (text === null || text === "" || !Number.isFinite(Number(text)) ? null : Number(text));

/** {panes: [{key, x, y, zoom, patch}], settings} of an address. Anything that is not understood is left out. */
export function parse(hash) {
  const given = new URLSearchParams(hash.replace(/^#/, ""));
  const panes = [];
  for (const suffix of ["", "2"]) {
    const key = given.get(`slide${suffix}`);
    if (!/^[0-9a-f]{16}$/.test(key || "")) continue;
    const [x, y, zoom] = (given.get(`at${suffix}`) || "").split(",").map(number);
    const patch = number(given.get(`patch${suffix}`));
    panes.push({ key, x: x ?? null, y: y ?? null, zoom: zoom > 0 ? zoom : null, patch: Number.isInteger(patch) ? patch : -1 });
  }
  const settings = {};
  for (const name of ["mode", "vectors", "palette", "scope"]) if (given.has(name)) settings[name] = given.get(name);
  for (const name of ["k", "opacity", "block"]) if (number(given.get(name)) !== null) settings[name] = number(given.get(name));
  if (given.has("hide")) settings.hide = given.get("hide").split(",").filter(Boolean);
  return { panes, settings };
}

export function format({ panes, settings }) {
  const given = new URLSearchParams();
  panes.forEach((pane, at) => {
    const suffix = at ? String(at + 1) : "";
    given.set(`slide${suffix}`, pane.key);
    if (pane.zoom) given.set(`at${suffix}`, [pane.x.toFixed(1), pane.y.toFixed(1), pane.zoom.toPrecision(5)].join(","));
    if (pane.patch >= 0) given.set(`patch${suffix}`, pane.patch);
  });
  for (const [name, value] of Object.entries(settings)) {
    if (value !== null && value !== undefined && value !== "") given.set(name, Array.isArray(value) ? value.join(",") : value);
  }
  return `#${given.toString().replaceAll("%2C", ",").replaceAll("%3A", ":")}`;
}
