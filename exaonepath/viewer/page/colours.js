// Palettes that people with any kind of colour vision can read, and values turned into colours.

// matplotlib's viridis, cividis and magma (CC0): 33 even steps, RRGGBB.
const STEPS = {
  viridis:
    "440154470d6048186a482374472d7b4537814240863e49893b528b375b8d33638d2f6b8e2c728e297a8e26828e23898e21918c1f988b1fa08822a78528ae8032b67a3fbc734ec36b5ec96270cf5784d44b98d83eaddc30c2df23d8e219ece51bfde725",
  cividis:
    "00224e00285b002e6a0533711a386f273e6e32436d3b496c434e6c4b546c535a6d5a5f6e61656f686a716f70737676767d7c788482798c8878938e789b9476a39a74aba072b4a76fbcae6cc4b468cdbb63d5c25edec958e7d150f0d846f9e03afee838",
  magma:
    "0000040303120a0822130d341d114729115a36106b440f7651127c5d177f6a1c81762181832681902a819c2e7faa337db73779c43c75d0416fdc4869e75263ef5d5ef56b5cf9795dfc8961fd9869fea772feb67cfec488fed395fde2a3fcf0b2fcfdbf",
};

// Okabe and Ito's colours, then some of Paul Tol's that differ from them.
export const CATEGORIES = [
  "#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7", "#999933", "#882255", "#44aa99",
  "#aa4499", "#dddddd",
].map((hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16)));

export const MISSING = [128, 134, 144];

const tables = {};

/** 256 colours of a palette, RGB. */
export function palette(name) {
  if (!tables[name]) {
    const hex = STEPS[name] ?? STEPS.viridis;
    const table = new Uint8Array(768);
    for (let i = 0; i < 256; i++) {
      const place = (i / 255) * 32;
      const low = Math.min(31, Math.floor(place));
      for (let c = 0; c < 3; c++) {
        const at = (step) => parseInt(hex.slice(6 * step + 2 * c, 6 * step + 2 * c + 2), 16);
        table[3 * i + c] = Math.round(at(low) + (at(low + 1) - at(low)) * (place - low));
      }
    }
    tables[name] = table;
  }
  return tables[name];
}

/** RGBA of numbers on a palette; NaN is grey and half transparent. */
export function ofNumbers(values, low, high, name) {
  const table = palette(name);
  const colours = new Uint8Array(4 * values.length);
  const scale = high > low ? 255 / (high - low) : 0;
  for (let i = 0; i < values.length; i++) {
    const value = values[i];
    const at = 4 * i;
    if (value !== value) {
      colours.set(MISSING, at);
      colours[at + 3] = 110;
    } else {
      const index = 3 * Math.round(Math.min(255, Math.max(0, (value - low) * scale)));
      colours[at] = table[index];
      colours[at + 1] = table[index + 1];
      colours[at + 2] = table[index + 2];
      colours[at + 3] = 255;
    }
  }
  return colours;
}

/** RGBA of category numbers; negative ones, NaN and 255 are grey. */
export function ofCategories(values) {
  const colours = new Uint8Array(4 * values.length);
  for (let i = 0; i < values.length; i++) {
    const value = values[i];
    const known = value >= 0 && value !== 255;
    colours.set(known ? CATEGORIES[value % CATEGORIES.length] : MISSING, 4 * i);
    colours[4 * i + 3] = known ? 255 : 110;
  }
  return colours;
}

/** RGBA of RGB. */
export function ofRgb(rgb) {
  const n = rgb.length / 3;
  const colours = new Uint8Array(4 * n);
  for (let i = 0; i < n; i++) {
    colours[4 * i] = rgb[3 * i];
    colours[4 * i + 1] = rgb[3 * i + 1];
    colours[4 * i + 2] = rgb[3 * i + 2];
    colours[4 * i + 3] = 255;
  }
  return colours;
}

/** Smallest and largest finite value, without the one at `skip`. */
export function range(values, skip = -1) {
  let low = Infinity;
  let high = -Infinity;
  for (let i = 0; i < values.length; i++) {
    if (i === skip || !Number.isFinite(values[i])) continue;
    if (values[i] < low) low = values[i];
    if (values[i] > high) high = values[i];
  }
  return low <= high ? [low, high] : [0, 1];
}

/** The value below which a share of the finite values lies. */
export function quantile(values, share) {
  const finite = values.filter((value) => Number.isFinite(value)).sort();
  return finite.length ? finite[Math.min(finite.length - 1, Math.floor(share * finite.length))] : 0;
}
