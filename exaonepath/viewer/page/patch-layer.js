// All patches of a slide as one WebGL draw call: two triangles a patch. Positions, colours and marks are textures that
// the vertex shader reads by its number, so that each of them is uploaded once and as it is. (One instance a patch would
// be the usual way, and takes 25 times as long where WebGL is emulated on the CPU: bench/test_viewer.py.)

import { context, fit, program } from "./webgl.js";

export const SELECTED = 1;
export const DIMMED = 2;

const WIDTH = 2048; // of the textures; patch i is the texel (i % WIDTH, i / WIDTH)

const VERTEX = `
precision highp int;
uniform highp sampler2D places; uniform sampler2D colours; uniform highp sampler2D marks;
uniform vec2 origin; uniform float scale; uniform float cell; uniform float offset; uniform vec2 canvas;
out vec4 fill; out vec2 inside; flat out float marked;
void main() {
  int patch_ = gl_VertexID / 6, k = gl_VertexID - 6 * patch_;
  ivec2 at = ivec2(patch_ & ${WIDTH - 1}, patch_ / ${WIDTH});
  vec2 corner = vec2(k == 1 || k == 3 || k == 4 ? 1.0 : 0.0, k == 2 || k == 4 || k == 5 ? 1.0 : 0.0);
  // Positions are taken relative to the corner of the view before they are scaled: exact for slides of any size.
  vec2 pixel = ((texelFetch(places, at, 0).xy - origin) + offset + corner * cell) * scale;
  gl_Position = vec4(pixel / canvas * 2.0 - 1.0, 0.0, 1.0);
  gl_Position.y = -gl_Position.y;
  fill = texelFetch(colours, at, 0); inside = corner * cell * scale;
  marked = floor(texelFetch(marks, at, 0).r * 255.0 + 0.5);
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

// Each texture: its format inside and outside, the type of its values, and how many a patch has.
const TEXTURES = {
  places: ["RG32F", "RG", "FLOAT", 2],
  colours: ["RGBA8", "RGBA", "UNSIGNED_BYTE", 4],
  marks: ["R8", "RED", "UNSIGNED_BYTE", 1],
};

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
    this._upload("places", corners);
    this.setColours(new Uint8Array(4 * this.count));
    this.setMarks(new Uint8Array(this.count));
  }

  /** RGBA, Uint8Array [4n]. */
  setColours(colours) {
    this._upload("colours", colours);
  }

  /** SELECTED, DIMMED or 0, Uint8Array [n]. */
  setMarks(marks) {
    this._upload("marks", marks);
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
    gl.drawArrays(gl.TRIANGLES, 0, 6 * this.count);
  }

  destroy() {
    this.gl?.getExtension("WEBGL_lose_context")?.loseContext();
  }

  _make() {
    const gl = this.gl;
    const uniforms = ["origin", "scale", "cell", "offset", "canvas", "opacity", "side", "ratio", ...Object.keys(TEXTURES)];
    this.program = program(gl, VERTEX, FRAGMENT, [], uniforms);
    this.arrays = gl.createVertexArray();
    gl.useProgram(this.program.made);
    this.textures = {};
    Object.keys(TEXTURES).forEach((name, unit) => {
      this.textures[name] = gl.createTexture();
      gl.activeTexture(gl.TEXTURE0 + unit);
      gl.bindTexture(gl.TEXTURE_2D, this.textures[name]);
      for (const filter of [gl.TEXTURE_MIN_FILTER, gl.TEXTURE_MAG_FILTER]) gl.texParameteri(gl.TEXTURE_2D, filter, gl.NEAREST);
      gl.uniform1i(this.program.places[name], unit);
    });
    gl.pixelStorei(gl.UNPACK_ALIGNMENT, 1);
  }

  _restore() {
    this._make();
    for (const [name, values] of Object.entries(this._data)) this._upload(name, values);
  }

  _upload(name, values) {
    this._data[name] = values;
    const gl = this.gl;
    if (!gl || gl.isContextLost()) return;
    const [inside, format, type, parts] = TEXTURES[name];
    const rows = Math.max(1, Math.ceil(this.count / WIDTH));
    const whole = new values.constructor(parts * WIDTH * rows);
    whole.set(values);
    gl.activeTexture(gl.TEXTURE0 + Object.keys(TEXTURES).indexOf(name));
    gl.bindTexture(gl.TEXTURE_2D, this.textures[name]);
    gl.texImage2D(gl.TEXTURE_2D, 0, gl[inside], WIDTH, rows, 0, gl[format], gl[type], whole);
  }
}
