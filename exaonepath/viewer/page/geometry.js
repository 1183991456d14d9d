// Geometry in level-0 pixels of a slide, or in whatever unit the points have.

/** Whether (x, y) is inside a polygon [[x, y], ...], by the even-odd rule. */
export function inside(polygon, x, y) {
  let found = false;
  for (let i = 0, j = polygon.length - 1; i < polygon.length; j = i++) {
    const [xi, yi] = polygon[i];
    const [xj, yj] = polygon[j];
    if (yi > y !== yj > y && x < ((xj - xi) * (y - yi)) / (yj - yi) + xi) found = !found;
  }
  return found;
}

export function bounds(polygon) {
  const box = [Infinity, Infinity, -Infinity, -Infinity];
  for (const [x, y] of polygon) {
    box[0] = Math.min(box[0], x);
    box[1] = Math.min(box[1], y);
    box[2] = Math.max(box[2], x);
    box[3] = Math.max(box[3], y);
  }
  return box;
}

/** Indices of the points (x0, y0, x1, y1, ...) inside a polygon; `shift` is added to both coordinates of a point. */
export function pointsInside(polygon, points, shift = 0) {
  const [left, top, right, bottom] = bounds(polygon);
  const found = [];
  for (let i = 0, n = points.length / 2; i < n; i++) {
    const x = points[2 * i] + shift;
    const y = points[2 * i + 1] + shift;
    if (x >= left && x <= right && y >= top && y <= bottom && inside(polygon, x, y)) found.push(i);
  }
  return found;
}

/** A line with fewer points, none of which is farther from the original than `tolerance` (Ramer-Douglas-Peucker). */
export function simplified(points, tolerance) {
  if (points.length < 3) return points;
  const keep = new Uint8Array(points.length);
  keep[0] = keep[points.length - 1] = 1;
  const waiting = [[0, points.length - 1]];
  while (waiting.length) {
    const [first, last] = waiting.pop();
    const [x0, y0] = points[first];
    const dx = points[last][0] - x0;
    const dy = points[last][1] - y0;
    const length = Math.hypot(dx, dy);
    let farthest = tolerance;
    let at = -1;
    for (let i = first + 1; i < last; i++) {
      const ex = points[i][0] - x0;
      const ey = points[i][1] - y0;
      const distance = length ? Math.abs(dx * ey - dy * ex) / length : Math.hypot(ex, ey);
      if (distance > farthest) {
        farthest = distance;
        at = i;
      }
    }
    if (at >= 0) {
      keep[at] = 1;
      waiting.push([first, at], [at, last]);
    }
  }
  return points.filter((_, i) => keep[i]);
}

/** Twice the signed area of a polygon. */
export function doubledArea(polygon) {
  let sum = 0;
  for (let i = 0, j = polygon.length - 1; i < polygon.length; j = i++) {
    sum += polygon[j][0] * polygon[i][1] - polygon[i][0] * polygon[j][1];
  }
  return sum;
}

/** Finds patches by position: a grid of cells with lists of patches, as two flat arrays. */
export class PatchIndex {
  constructor(coords, size) {
    this.coords = coords;
    this.size = Math.max(1, size);
    const n = coords.length / 2;
    let right = 0;
    let bottom = 0;
    for (let i = 0; i < n; i++) {
      right = Math.max(right, coords[2 * i]);
      bottom = Math.max(bottom, coords[2 * i + 1]);
    }
    this.columns = Math.floor(right / this.size) + 1;
    this.rows = Math.floor(bottom / this.size) + 1;
    // Patches far apart on a huge slide would need more cells than there are patches.
    while (this.columns * this.rows > Math.max(1024, 8 * n)) {
      this.size *= 2;
      this.columns = Math.floor(right / this.size) + 1;
      this.rows = Math.floor(bottom / this.size) + 1;
    }
    this.patchSize = size;
    const cells = new Int32Array(n);
    this.starts = new Int32Array(this.columns * this.rows + 1);
    for (let i = 0; i < n; i++) {
      cells[i] = this._cell(coords[2 * i], coords[2 * i + 1]);
      this.starts[cells[i] + 1]++;
    }
    for (let c = 0; c < this.columns * this.rows; c++) this.starts[c + 1] += this.starts[c];
    const next = this.starts.slice();
    this.members = new Int32Array(n);
    for (let i = 0; i < n; i++) this.members[next[cells[i]]++] = i;
  }

  _cell(x, y) {
    const column = Math.min(this.columns - 1, Math.max(0, Math.floor(x / this.size)));
    const row = Math.min(this.rows - 1, Math.max(0, Math.floor(y / this.size)));
    return row * this.columns + column;
  }

  /** The patch that holds a position, and of several the one whose centre is nearest; -1 if there is none. */
  at(x, y) {
    const reach = Math.ceil(this.patchSize / this.size);
    const column = Math.floor(x / this.size);
    const row = Math.floor(y / this.size);
    let best = -1;
    let nearest = Infinity;
    for (let r = Math.max(0, row - reach); r <= Math.min(this.rows - 1, row); r++) {
      for (let c = Math.max(0, column - reach); c <= Math.min(this.columns - 1, column); c++) {
        const cell = r * this.columns + c;
        for (let m = this.starts[cell]; m < this.starts[cell + 1]; m++) {
          const i = this.members[m];
          const dx = x - this.coords[2 * i];
          const dy = y - this.coords[2 * i + 1];
          if (dx < 0 || dy < 0 || dx >= this.patchSize || dy >= this.patchSize) continue;
          const half = this.patchSize / 2;
          const distance = (dx - half) ** 2 + (dy - half) ** 2;
          if (distance < nearest) {
            nearest = distance;
            best = i;
          }
        }
      }
    }
    return best;
  }
}
