"use strict";

/** An element with attributes and children; strings become text, so that no name can be read as markup. */
function make(tag, attributes = {}, ...children) {
  const svg = ["svg", "rect", "line", "text", "title", "g"].includes(tag);
  const element = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "style") Object.assign(element.style, value);
    else element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

function scaled(value, units, base) {
  let unit = 0;
  while (Math.abs(value) >= base && unit < units.length - 1) { value /= base; unit += 1; }
  return `${value >= 100 || Number.isInteger(value) ? Math.round(value) : value.toPrecision(3)} ${units[unit]}`.trim();
}
const bytes = (value) => scaled(value, ["B", "kB", "MB", "GB", "TB"], 1000);
const count = (value) => scaled(value, ["", "k", "M", "G", "T", "P"], 1000);
const percent = (share) => (share === null ? "" : `${(100 * share).toFixed(share < 0.1 ? 1 : 0)}%`);
const dims = (shape) => shape.join(" × ");

/** The bits of one expert (or of the only matrix) in a base64 bitmap: see losia_fx/bitmaps.py. */
function bits(text, size, expert) {
  const packed = atob(text);
  const found = new Uint8Array(size);
  for (let index = 0; index < size; index += 1) {
    const bit = expert * size + index;
    found[index] = (packed.charCodeAt(bit >> 3) >> (7 - (bit & 7))) & 1;
  }
  return found;
}

/** The share of each of at most `most` bins that is set. */
function binned(flags, most) {
  const bins = Math.min(flags.length, most);
  const sums = new Float32Array(bins);
  const sizes = new Float32Array(bins);
  flags.forEach((flag, index) => {
    const bin = Math.floor((index * bins) / flags.length);
    sums[bin] += flag;
    sizes[bin] += 1;
  });
  return sums.map((sum, bin) => sum / sizes[bin]);
}

function colour(name) {
  const probe = document.createElement("canvas").getContext("2d");
  probe.fillStyle = getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const value = probe.fillStyle;
  return [1, 3, 5].map((start) => parseInt(value.slice(start, start + 2), 16));
}

/** Paints `shade(x, y)`, 0 to 1, a pixel a cell, in the colour of subnets. */
function paint(canvas, width, height, shade) {
  canvas.width = width;
  canvas.height = height;
  const context = canvas.getContext("2d");
  const image = context.createImageData(width, height);
  const [red, green, blue] = colour("--cell");
  for (let y = 0; y < height; y += 1) {
    for (let x = 0; x < width; x += 1) {
      image.data.set([red, green, blue, Math.round(255 * Math.min(1, shade(x, y)))], 4 * (y * width + x));
    }
  }
  context.putImageData(image, 0, 0);
}

const MOST_BINS = 160;
const EDGE = 5; // pixels of the strips of rows and columns, and of the gap beside them

/** The matrix with its subnet; on the left its rows, above its columns. Dense cells stand for several elements. */
function drawSubnet(canvas, rows, cols) {
  const down = binned(rows, MOST_BINS), across = binned(cols, MOST_BINS);
  paint(canvas, across.length + 2 * EDGE, down.length + 2 * EDGE, (x, y) => {
    const row = y < 2 * EDGE ? null : down[y - 2 * EDGE];
    const col = x < 2 * EDGE ? null : across[x - 2 * EDGE];
    if (row === null && col === null) return 0;
    if (row === null) return y < EDGE ? 0.55 * Math.sqrt(col) : 0;
    if (col === null) return x < EDGE ? 0.55 * Math.sqrt(row) : 0;
    return Math.sqrt(row * col);
  });
  canvas.style.aspectRatio = `${Math.max(1, Math.min(2.2, cols.length / rows.length))}`;
}

/** A column a selection, as wide as its time; from top to bottom the rows (or columns) of the weight. */
function drawHistory(canvas, several, edges, end) {
  const table = several.map((flags) => binned(flags, MOST_BINS));
  const width = 240;
  paint(canvas, width, table[0].length, (x, y) => {
    const step = ((x + 0.5) / width) * end;
    let at = 0;
    while (at + 1 < edges.length && edges[at + 1] <= step) at += 1;
    const gap = at > 0 && step - edges[at] < end / width;
    return gap ? 0 : Math.sqrt(table[at][y]);
  });
  canvas.style.height = "132px";
}

/** Bars of shares, 0 to 1, over steps. values: [{step, share}], share null where there is none. */
function bars(values, label, kind = "bar") {
  const width = 300, height = 110, left = 34, foot = 18;
  const top = [0.1, 0.2, 0.5, 1].find((limit) => values.every(({ share }) => share === null || share <= limit));
  const wide = (width - left) / values.length;
  const chart = make("svg", { viewBox: `0 0 ${width} ${height}`, class: "chart", role: "img", "aria-label": label });
  for (const share of [0, top / 2, top]) {
    const y = 5 + (height - foot - 5) * (1 - share / top) + 0.5;
    chart.append(make("line", { x1: left, x2: width, y1: y, y2: y, class: "grid" }),
      make("text", { x: left - 6, y: y + 4, "text-anchor": "end" }, `${100 * share}%`));
  }
  const every = Math.ceil(values.length / 8);
  values.forEach(({ step, share }, index) => {
    const x = left + index * wide;
    if (share !== null) {
      const tall = Math.max(1, ((height - foot - 5) * share) / top);
      chart.append(make("rect", { x: x + wide * 0.15, width: wide * 0.7, y: height - foot - tall, height: tall, rx: 1.5, class: kind },
        make("title", {}, `step ${step}: ${percent(share)}`)));
    }
    if (index % every === 0) chart.append(make("text", { x: x + wide / 2, y: height - 4, "text-anchor": "middle" }, String(step)));
  });
  return chart;
}
