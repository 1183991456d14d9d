// What is drawn over the patches as lines: contours, excluded areas, failed patches, regions, the marked patch.

import { fit } from "./webgl.js";

const STYLES = {
  0: { stroke: "#00d18f", width: 1.6 }, // contour
  1: { stroke: "#5aa9ff", width: 1.4 }, // hole
  2: { stroke: "#ff9e1b", width: 1.4, dash: [6, 4], fill: "rgba(255, 158, 27, 0.12)" }, // excluded
  3: { stroke: "#ff9e1b", width: 1.4, dash: [2, 3], fill: "rgba(255, 158, 27, 0.12)" }, // pen
  4: { stroke: "#ffd34d", width: 1.4, dash: [2, 3], fill: "rgba(255, 211, 77, 0.12)" }, // blur
};

/** One path for each kind of outline, in level-0 pixels, of the packed array that the server sends. */
export function outlinePaths(packed) {
  const count = packed[0] || 0;
  const paths = {};
  let at = 1 + 3 * count;
  for (let ring = 0; ring < count; ring++) {
    const kind = packed[1 + 3 * ring + 1];
    const points = packed[1 + 3 * ring + 2];
    const path = (paths[kind] ??= new Path2D());
    path.moveTo(packed[at], packed[at + 1]);
    for (let p = 1; p < points; p++) path.lineTo(packed[at + 2 * p], packed[at + 2 * p + 1]);
    path.closePath();
    at += 2 * points;
  }
  return paths;
}

export function regionPath(points) {
  const path = new Path2D();
  points.forEach(([x, y], at) => (at ? path.lineTo(x, y) : path.moveTo(x, y)));
  path.closePath();
  return path;
}

/** Draw everything for a view {x, y, scale}; `pane` holds what there is, `show` what is wanted. */
export function drawMarks(canvas, view, pane, show) {
  const ratio = fit(canvas);
  const paint = canvas.getContext("2d");
  paint.setTransform(1, 0, 0, 1, 0, 0);
  paint.clearRect(0, 0, canvas.width, canvas.height);
  if (!view) return;
  const scale = view.scale * ratio;
  paint.setTransform(scale, 0, 0, scale, -view.x * scale, -view.y * scale);
  paint.lineJoin = "round";
  const pixel = ratio / scale; // a CSS pixel, in level-0 pixels
  if (show.outlines) {
    for (const [kind, path] of Object.entries(pane.outlines)) {
      const { stroke, width, dash, fill } = STYLES[kind] ?? STYLES[2];
      paint.setLineDash((dash ?? []).map((length) => length * pixel));
      if (fill) {
        paint.fillStyle = fill;
        paint.fill(path, "evenodd");
      }
      paint.lineWidth = (width + 1.6) * pixel;
      paint.strokeStyle = "rgba(8, 10, 13, 0.55)"; // a dark edge, so that a line is seen on any tissue
      paint.stroke(path);
      paint.lineWidth = width * pixel;
      paint.strokeStyle = stroke;
      paint.stroke(path);
    }
    paint.setLineDash([]);
  }
  if (show.failed) drawFailed(paint, pane, pixel);
  if (show.regions) {
    for (const region of pane.regions) {
      paint.fillStyle = "rgba(255, 255, 255, 0.10)";
      paint.fill(region.path, "evenodd");
      paint.lineWidth = 3.4 * pixel;
      paint.strokeStyle = "rgba(8, 10, 13, 0.7)";
      paint.stroke(region.path);
      paint.lineWidth = 1.8 * pixel;
      paint.strokeStyle = "#ffffff";
      paint.stroke(region.path);
    }
  }
  const size = pane.slide?.patches?.size || 0;
  for (const [index, colour, width] of [[pane.hovered, "rgba(255, 255, 255, 0.7)", 1.5], [pane.patch, "#ffffff", 2.5]]) {
    if (index < 0 || !size) continue;
    const [x, y] = [pane.coords[2 * index], pane.coords[2 * index + 1]];
    square(paint, x, y, size, pixel, colour, width);
  }
  if (pane.spot) square(paint, pane.spot.x, pane.spot.y, pane.spot.size, pixel, "#ffffff", 2.5);
  paint.setTransform(ratio, 0, 0, ratio, 0, 0);
  if (show.regions) drawNames(paint, pane, view);
  if (pane.stroke?.length > 1) {
    paint.beginPath();
    pane.stroke.forEach(([x, y]) => paint.lineTo((x - view.x) * view.scale, (y - view.y) * view.scale));
    paint.closePath();
    paint.fillStyle = "rgba(86, 180, 233, 0.16)";
    paint.fill("evenodd");
    paint.strokeStyle = "#56b4e9";
    paint.lineWidth = 2;
    paint.stroke();
  }
}

function square(paint, x, y, size, pixel, colour, width) {
  paint.lineWidth = (width + 2) * pixel;
  paint.strokeStyle = "rgba(8, 10, 13, 0.8)";
  paint.strokeRect(x, y, size, size);
  paint.lineWidth = width * pixel;
  paint.strokeStyle = colour;
  paint.strokeRect(x, y, size, size);
}

function drawFailed(paint, pane, pixel) {
  const size = pane.slide?.patches?.size || 0;
  paint.strokeStyle = "#ff5a1f";
  paint.fillStyle = "rgba(255, 90, 31, 0.25)";
  paint.lineWidth = 1.8 * pixel;
  for (const { x, y } of pane.failed) {
    paint.fillRect(x, y, size, size);
    paint.strokeRect(x, y, size, size);
    paint.beginPath();
    paint.moveTo(x, y);
    paint.lineTo(x + size, y + size);
    paint.moveTo(x + size, y);
    paint.lineTo(x, y + size);
    paint.stroke();
  }
}

function drawNames(paint, pane, view) {
  paint.font = '600 12px "Inter", system-ui, sans-serif';
  paint.textAlign = "center";
  paint.textBaseline = "middle";
  paint.lineWidth = 3.5;
  paint.lineJoin = "round";
  for (const region of pane.regions) {
    const [left, top, right, bottom] = region.box;
    const text = region.name || region.class;
    if (!text || (right - left) * view.scale < 28) continue;
    const x = ((left + right) / 2 - view.x) * view.scale;
    const y = ((top + bottom) / 2 - view.y) * view.scale;
    paint.strokeStyle = "rgba(8, 10, 13, 0.85)";
    paint.strokeText(text, x, y);
    paint.fillStyle = "#fff";
    paint.fillText(text, x, y);
  }
}
