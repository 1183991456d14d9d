// What both WebGL layers share: a program, buffers, and a context that may be lost and comes back.

/** A WebGL2 context on a canvas, or null. `restore` is called after the context was lost and has come back. */
export function context(canvas, restore) {
  const gl = canvas.getContext("webgl2", { alpha: true, antialias: false, premultipliedAlpha: true });
  if (!gl) return null;
  canvas.addEventListener("webglcontextlost", (event) => event.preventDefault());
  canvas.addEventListener("webglcontextrestored", restore);
  return gl;
}

export function program(gl, vertex, fragment, attributes, uniforms) {
  const made = gl.createProgram();
  for (const [kind, source] of [
    [gl.VERTEX_SHADER, vertex],
    [gl.FRAGMENT_SHADER, fragment],
  ]) {
    const shader = gl.createShader(kind);
    gl.shaderSource(shader, `#version 300 es\nprecision highp float;\n${source}`);
    gl.compileShader(shader);
    if (!gl.getShaderParameter(shader, gl.COMPILE_STATUS)) throw new Error(gl.getShaderInfoLog(shader) || "lost");
    gl.attachShader(made, shader);
  }
  attributes.forEach((name, at) => gl.bindAttribLocation(made, at, name));
  gl.linkProgram(made);
  const places = Object.fromEntries(uniforms.map((name) => [name, gl.getUniformLocation(made, name)]));
  return { made, places };
}

/** A buffer as an attribute of a vertex. */
export function attribute(gl, at, size, type, normalised) {
  const buffer = gl.createBuffer();
  gl.bindBuffer(gl.ARRAY_BUFFER, buffer);
  gl.enableVertexAttribArray(at);
  gl.vertexAttribPointer(at, size, type, normalised, 0, 0);
  return buffer;
}

/** Makes the canvas as large as it is shown; returns the number of its pixels per CSS pixel. */
export function fit(canvas) {
  const ratio = window.devicePixelRatio || 1;
  const width = Math.max(1, Math.round(canvas.clientWidth * ratio));
  const height = Math.max(1, Math.round(canvas.clientHeight * ratio));
  if (canvas.width !== width) canvas.width = width;
  if (canvas.height !== height) canvas.height = height;
  return ratio;
}
