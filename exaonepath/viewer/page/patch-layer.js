// All patches of a slide as one WebGL draw call: a square an instance, with its colour and two marks.

import { attribute, context, fit, program } from "./webgl.js";

export const SELECTED = 1;
export const DIMMED = 2;

const VERTEX = `
in vec2 corner; in vec2 place; in vec4 colour; in float mark;
uniform vec2 origin; uniform float scale; uniform float cell; uniform float offset; uniform vec2 canvas;
out vec4 fill; out vec2 inside; flat out float marked;
void main() {
  // Positions are taken relative to the corner of the view before they are scaled: exact for slides of any size.
  vec2 pixel = ((place - origin) + offset + corner * cell) * scale;
  gl_Position = vec4(pixel / canvas * 2.0 - 1.0, 0.0, 1.0);
  gl_Position.y = -gl_Position.y;
  fill = colour; inside = corner * cell * scale; marked = mark;
}`;

const FRAGMENT = `
in vec4 fill; in vec2 inside; flat in float marked;
uniform float opacity; uniform float side; uniform float ratio;
out vec4 result;
void main() {
  float edge = min(min(inside.x, side - inside.x), min(inside.y, side - inside.y));
  float gap = side > 14.0 * ratio ? 0.5 * ratio : 0.0;
  if (edge < gap) discard;
  float alpha = fill.a * opacity;
  vec3 rgb = fill.rgb;
  if (marked > 1.5) alpha *= 0.18;
  if (marked > 0.5 && marked < 1.5) {
    alpha = fill.a * max(opacity, 0.35);
    if (side > 8.0 * ratio && edge < gap + 1.25 * ratio) { rgb = vec3(1.0); alpha = 0.95; }
  }
  result = vec4(rgb * alpha, alpha);
}`;

export class PatchLayer {
  constructor(canvas) {
    this.canvas = canvas;
    this.count = 0;
    this.opacity = 0.6;
    this.cell = this.offset = 0;
    this._data = {};
    this.gl = context(canvas, () => this._restore());
    if (this.gl) this._make();
  }

  get available() {
    return this.gl !== null;
  }

  /** Patches: corners Float32Array [2n], side of the square that is drawn, and its offset from the corner. */
  setPatches(corners, cell, offset) {
    this.count = corners.length / 2;
    this.cell = cell;
    this.offset = offset;
    this._upload("place", corners);
    this.setColours(new Uint8Array(4 * this.count));
    this.setMarks(new Uint8Array(this.count));
  }

  /** RGBA, Uint8Array [4n]. */
  setColours(colours) {
    this._upload("colour", colours);
  }

  /** SELECTED, DIMMED or 0, Uint8Array [n]. */
  setMarks(marks) {
    this._upload("mark", marks);
  }

  /** Draw; `view` is {x, y, scale}: the level-0 position of the top left corner, and CSS pixels per level-0 pixel. */
  draw(view, visible) {
    const gl = this.gl;
    if (!gl || gl.isContextLost()) return;
    const ratio = fit(this.canvas);
    gl.viewport(0, 0, this.canvas.width, this.canvas.height);
    gl.clearColor(0, 0, 0, 0);
    gl.clear(gl.COLOR_BUFFER_BIT);
    if (!visible || !this.count || !view) return;
    const { made, places } = this.program;
    gl.useProgram(made);
    gl.bindVertexArray(this.arrays);
    gl.enable(gl.BLEND);
    gl.blendFunc(gl.ONE, gl.ONE_MINUS_SRC_ALPHA);
    const scale = view.scale * ratio;
    // Seen from far away a patch may be smaller than a pixel; it is drawn as one, so that it does not vanish.
    const cell = Math.max(this.cell, 1 / scale);
    gl.uniform2f(places.origin, view.x, view.y);
    gl.uniform1f(places.scale, scale);
    gl.uniform1f(places.cell, cell);
    gl.uniform1f(places.offset, this.offset);
    gl.uniform2f(places.canvas, this.canvas.width, this.canvas.height);
    gl.uniform1f(places.opacity, this.opacity);
    gl.uniform1f(places.side, cell * scale);
    gl.uniform1f(places.ratio, ratio);
    gl.drawArraysInstanced(gl.TRIANGLE_STRIP, 0, 4, this.count);
  }

  destroy() {
    this.gl?.getExtension("WEBGL_lose_context")?.loseContext();
  }

  _make() {
    const gl = this.gl;
    this.program = program(
      gl,
      VERTEX,
      FRAGMENT,
      ["corner", "place", "colour", "mark"],
      ["origin", "scale", "cell", "offset", "canvas", "opacity", "side", "ratio"],
    );
    this.arrays = gl.createVertexArray();
    gl.bindVertexArray(this.arrays);
    attribute(gl, 0, 2, gl.FLOAT, false);
    gl.bufferData(gl.ARRAY_BUFFER, new Float32Array([0, 0, 1, 0, 0, 1, 1, 1]), gl.STATIC_DRAW);
    this.buffers = {
      place: attribute(gl, 1, 2, gl.FLOAT, false, 1),
      colour: attribute(gl, 2, 4, gl.UNSIGNED_BYTE, true, 1),
      mark: attribute(gl, 3, 1, gl.UNSIGNED_BYTE, false, 1),
    };
  }

  _restore() {
    this._make();
    for (const [name, values] of Object.entries(this._data)) this._upload(name, values);
  }

  _upload(name, values) {
    this._data[name] = values;
    if (!this.gl || this.gl.isContextLost()) return;
    this.gl.bindBuffer(this.gl.ARRAY_BUFFER, this.buffers[name]);
    this.gl.bufferData(this.gl.ARRAY_BUFFER, values, this.gl.DYNAMIC_DRAW);
  }
}
