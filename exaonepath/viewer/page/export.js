// The view as a PNG: pixels, patches, lines, scale bar, and what has to be known to read it.

export function exportPng(panes, caption) {
  const ratio = window.devicePixelRatio || 1;
  const boxes = panes.map((pane) => pane.host.getBoundingClientRect());
  const gap = 2;
  const foot = 22;
  const width = boxes.reduce((sum, box) => sum + box.width, 0) + gap * (boxes.length - 1);
  const height = boxes[0].height + foot;
  const canvas = document.createElement("canvas");
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  const paint = canvas.getContext("2d");
  paint.scale(ratio, ratio);
  paint.fillStyle = "#0a0c0f";
  paint.fillRect(0, 0, width, height);
  let left = 0;
  panes.forEach((pane, at) => {
    const { width: w, height: tall } = boxes[at];
    pane.drawNow(); // WebGL keeps its picture only until the end of this task
    for (const layer of [pane.osd.drawer.canvas, pane.patchCanvas, pane.markCanvas]) paint.drawImage(layer, left, 0, w, tall);
    if (pane.scale) scaleBar(paint, left + 16, tall - 18, pane.scale);
    left += w + gap;
  });
  paint.fillStyle = "#14181e";
  paint.fillRect(0, height - foot, width, foot);
  paint.fillStyle = "#c5ced9";
  paint.font = '12px "Inter", system-ui, sans-serif';
  paint.textBaseline = "middle";
  paint.fillText(caption, 10, height - foot / 2, width - 20);
  return new Promise((resolve, reject) => {
    canvas.toBlob((blob) => (blob ? resolve(blob) : reject(new Error("the view is too large for a picture"))), "image/png");
  });
}

export function download(blob, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

function scaleBar(paint, x, y, { pixels, text }) {
  paint.fillStyle = "rgba(13, 16, 20, 0.72)";
  paint.fillRect(x - 8, y - 24, pixels + 16, 34);
  paint.strokeStyle = paint.fillStyle = "#fff";
  paint.lineWidth = 1.5;
  paint.beginPath();
  paint.moveTo(x, y - 4);
  paint.lineTo(x, y);
  paint.lineTo(x + pixels, y);
  paint.lineTo(x + pixels, y - 4);
  paint.stroke();
  paint.font = '12px "Inter", system-ui, sans-serif';
  paint.textAlign = "center";
  paint.textBaseline = "alphabetic";
  paint.fillText(text, x + pixels / 2, y - 8);
  paint.textAlign = "left";
}
