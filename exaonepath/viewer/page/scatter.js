// The map of the embeddings: a point a patch, on the first two principal components. A drag selects, the wheel zooms,
// Shift and a drag moves.

import { h, perFrame } from "./dom.js";
import { pointsInside } from "./geometry.js";
import { attribute, context, fit, program } from "./webgl.js";

const VERTEX = `
in vec2 place; in vec4 colour; in float mark;
uniform vec2 centre; uniform vec2 scale; uniform float size;
out vec4 fill; flat out float marked;
void main() {
  bool known = place.x == place.x && place.y == place.y;
  gl_Position = known ? vec4((place - centre) * scale, 0.0, 1.0) : vec4(2.0, 2.0, 2.0, 1.0);
  gl_PointSize = size * (mark > 0.5 && mark < 1.5 ? 1.35 : 1.0);
  fill = colour; marked = mark;
}`;

const FRAGMENT = `
in vec4 fill; flat in float marked;
out vec4 result;
void main() {
  float distance = length(gl_PointCoord - 0.5) * 2.0;
  if (distance > 1.0) discard;
  float alpha = (marked > 1.5 ? 0.13 : 0.9) * (1.0 - smoothstep(0.75, 1.0, distance));
  result = vec4(fill.rgb * alpha, alpha);
}`;

export class Scatter {
  /** `onSelect(indices, add)` after a lasso, `onPick(index)` after a click, `onHover(index)` while the pointer moves. */
  constructor(host, { onSelect, onPick, onHover }) {
    this.host = host;
    this.canvas = h("canvas");
    this.over = h("canvas", { class: "over" });
    host.append(this.canvas, this.over);
    this.points = new Float32Array();
    this.marked = -1;
    this.draw = perFrame(() => this._draw());
    this._data = {};
    this.gl = context(this.canvas, () => this._restore());
    if (this.gl) this._make();
    this.reset();
    this._listen(onSelect, onPick, onHover);
    new ResizeObserver(() => this.draw()).observe(host);
  }

  setPoints(points) {
    this.points = points;
    this._upload("place", points);
    this.setColours(new Uint8Array(2 * points.length).fill(160));
    this.setMarks(new Uint8Array(points.length / 2));
    this.reset();
  }

  setColours(colours) {
    this._upload("colour", colours);
    this.draw();
  }

  setMarks(marks) {
    this._upload("mark", marks);
    this.draw();
  }

  /** The patch that is marked with a ring; -1: none. */
  mark(index) {
    this.marked = index;
    this.draw();
  }

  reset() {
    const box = [Infinity, Infinity, -Infinity, -Infinity];
    for (let i = 0; i < this.points.length; i += 2) {
      const x = this.points[i];
      const y = this.points[i + 1];
      if (x !== x || y !== y) continue;
      box[0] = Math.min(box[0], x);
      box[1] = Math.min(box[1], y);
      box[2] = Math.max(box[2], x);
      box[3] = Math.max(box[3], y);
    }
    const found = box[0] <= box[2];
    this.centre = found ? [(box[0] + box[2]) / 2, (box[1] + box[3]) / 2] : [0, 0];
    this.half = found ? [(box[2] - box[0]) / 2 || 1, (box[3] - box[1]) / 2 || 1].map((side) => side * 1.08) : [1, 1];
    this.draw();
  }

  /** Position of a pixel of the map among the points. */
  at(x, y) {
    return [
      this.centre[0] + ((2 * x) / this.canvas.clientWidth - 1) * this.half[0],
      this.centre[1] - ((2 * y) / this.canvas.clientHeight - 1) * this.half[1],
    ];
  }

  pixel(index) {
    const x = ((this.points[2 * index] - this.centre[0]) / this.half[0] + 1) / 2;
    const y = (1 - (this.points[2 * index + 1] - this.centre[1]) / this.half[1]) / 2;
    return [x * this.canvas.clientWidth, y * this.canvas.clientHeight];
  }

  zoom(factor, x = this.canvas.clientWidth / 2, y = this.canvas.clientHeight / 2) {
    const before = this.at(x, y);
    this.half = this.half.map((side) => side * factor);
    const after = this.at(x, y);
    this.centre = this.centre.map((value, at) => value + before[at] - after[at]);
    this.draw();
  }

  _nearest(x, y) {
    const [px, py] = this.at(x, y);
    const sx = this.canvas.clientWidth / (2 * this.half[0]);
    const sy = this.canvas.clientHeight / (2 * this.half[1]);
    let best = -1;
    let nearest = 12 ** 2;
    for (let i = 0, n = this.points.length / 2; i < n; i++) {
      const distance = ((this.points[2 * i] - px) * sx) ** 2 + ((this.points[2 * i + 1] - py) * sy) ** 2;
      if (distance < nearest) {
        nearest = distance;
        best = i;
      }
    }
    return best;
  }

  _listen(onSelect, onPick, onHover) {
    const place = (event) => {
      const box = this.canvas.getBoundingClientRect();
      return [event.clientX - box.left, event.clientY - box.top];
    };
    let lasso = null;
    let moving = null;
    this.canvas.addEventListener("pointerdown", (event) => {
      if (event.button !== 0) return;
      this.canvas.setPointerCapture(event.pointerId);
      if (event.shiftKey) moving = place(event);
      else lasso = [place(event)];
    });
    this.canvas.addEventListener("pointermove", (event) => {
      const here = place(event);
      if (moving) {
        const [from, to] = [this.at(...moving), this.at(...here)];
        this.centre = this.centre.map((value, at) => value + from[at] - to[at]);
        moving = here;
      } else if (lasso) {
        lasso.push(here);
      } else {
        onHover(this._nearest(...here));
      }
      this.lasso = lasso;
      this.draw();
    });
    const end = (event) => {
      if (lasso && event.type === "pointerup") {
        const size = Math.max(...[0, 1].map((at) => Math.max(...lasso.map((p) => p[at])) - Math.min(...lasso.map((p) => p[at]))));
        if (size < 5) onPick(this._nearest(...lasso[0]));
        else onSelect(pointsInside(lasso.map(([x, y]) => this.at(x, y)), this.points), event.ctrlKey || event.metaKey);
      }
      lasso = moving = this.lasso = null;
      this.draw();
    };
    this.canvas.addEventListener("pointerup", end);
    this.canvas.addEventListener("pointercancel", end);
    this.canvas.addEventListener("pointerleave", () => lasso || onHover(-1));
    this.canvas.addEventListener("dblclick", () => this.reset());
    this.canvas.addEventListener(
      "wheel",
      (event) => {
        event.preventDefault();
        this.zoom(Math.exp(event.deltaY * 0.0015), ...place(event));
      },
      { passive: false },
    );
    this.host.addEventListener("keydown", (event) => {
      const steps = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] };
      if (steps[event.key]) this.centre = this.centre.map((v, at) => v + steps[event.key][at] * this.half[at] * 0.2);
      else if (event.key === "+" || event.key === "=") this.zoom(0.8);
      else if (event.key === "-") this.zoom(1.25);
      else if (event.key === "0") this.reset();
      else return;
      event.preventDefault();
      event.stopPropagation();
      this.draw();
    });
  }

  _draw() {
    const ratio = fit(this.canvas);
    fit(this.over);
    const gl = this.gl;
    const n = this.points.length / 2;
    if (gl && !gl.isContextLost()) {
      gl.viewport(0, 0, this.canvas.width, this.canvas.height);
      gl.clearColor(0, 0, 0, 0);
      gl.clear(gl.COLOR_BUFFER_BIT);
      if (n) {
        gl.useProgram(this.program.made);
        gl.bindVertexArray(this.arrays);
        gl.enable(gl.BLEND);
        gl.blendFunc(gl.ONE, gl.ONE_MINUS_SRC_ALPHA);
        gl.uniform2f(this.program.places.centre, ...this.centre);
        gl.uniform2f(this.program.places.scale, 1 / this.half[0], 1 / this.half[1]);
        gl.uniform1f(this.program.places.size, ratio * Math.min(8, Math.max(2.2, 12 - 2 * Math.log10(n))));
        gl.drawArrays(gl.POINTS, 0, n);
      }
    }
    const paint = this.over.getContext("2d");
    paint.setTransform(ratio, 0, 0, ratio, 0, 0);
    paint.clearRect(0, 0, this.over.width, this.over.height);
    if (this.marked >= 0 && this.marked < n) {
      paint.beginPath();
      paint.arc(...this.pixel(this.marked), 7, 0, 7);
      paint.lineWidth = 2;
      paint.strokeStyle = "#fff";
      paint.stroke();
    }
    if (this.lasso?.length > 1) {
      paint.beginPath();
      this.lasso.forEach(([x, y]) => paint.lineTo(x, y));
      paint.closePath();
      paint.fillStyle = "rgba(86, 180, 233, 0.15)";
      paint.strokeStyle = "#56b4e9";
      paint.lineWidth = 1.5;
      paint.fill();
      paint.stroke();
    }
  }

  _make() {
    const gl = this.gl;
    this.program = program(gl, VERTEX, FRAGMENT, ["place", "colour", "mark"], ["centre", "scale", "size"]);
    this.arrays = gl.createVertexArray();
    gl.bindVertexArray(this.arrays);
    this.buffers = {
      place: attribute(gl, 0, 2, gl.FLOAT, false),
      colour: attribute(gl, 1, 4, gl.UNSIGNED_BYTE, true),
      mark: attribute(gl, 2, 1, gl.UNSIGNED_BYTE, false),
    };
  }

  _restore() {
    this._make();
    for (const [name, values] of Object.entries(this._data)) this._upload(name, values);
    this.draw();
  }

  _upload(name, values) {
    this._data[name] = values;
    if (!this.gl || this.gl.isContextLost()) return;
    this.gl.bindBuffer(this.gl.ARRAY_BUFFER, this.buffers[name]);
    this.gl.bufferData(this.gl.ARRAY_BUFFER, values, this.gl.DYNAMIC_DRAW);
  }
}
