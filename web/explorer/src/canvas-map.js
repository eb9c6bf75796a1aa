// A map drawn by the processor, for browsers without a GPU; the same interface as WebGLMap.

import { byRank, pointSize, wholeMap } from './points.js';
import { packColour, Raster } from './raster.js';

const CELLS = 64;
const FADED = 0.3; // opacity of other images while some are selected

export class CanvasMap {
  constructor(canvas, { x, y }, events) {
    this.canvas = canvas;
    this.points = { x, y };
    this.events = events;
    this.centre = [0, 0];
    this.distance = wholeMap(canvas);
    this.mode = 'pan';
    this.hovered = -1;
    this.raster = new Raster();
    this.selected = null; // one number per image, 1 for those that are selected
    this.shown = null; // likewise for those of the chosen categories
    this.path = null;
    this.cells = Array.from({ length: CELLS * CELLS }, () => []);
    for (let i = 0; i < x.length; i++) this.cells[this.cell(x[i]) + CELLS * this.cell(y[i])].push(i);
    this.listen();
    new ResizeObserver(() => this.draw()).observe(canvas);
  }

  cell(value) {
    return Math.min(CELLS - 1, Math.max(0, Math.floor(((value + 1) / 2) * CELLS)));
  }

  listen() {
    const canvas = this.canvas;
    let from = null;
    canvas.addEventListener('pointerdown', (event) => {
      if (event.button !== 0) return;
      if (event.isTrusted) canvas.setPointerCapture(event.pointerId);
      from = { at: this.at(event), last: this.at(event), moved: false };
      if (this.mode === 'lasso' || event.shiftKey) this.path = [this.at(event)];
    });
    canvas.addEventListener('pointermove', (event) => {
      const at = this.at(event);
      if (!from) return this.point(this.nearest(at));
      if (Math.hypot(at[0] - from.at[0], at[1] - from.at[1]) > 3) from.moved = true;
      if (this.path) this.path.push(at);
      else {
        const scale = this.scalePerUnit();
        this.centre = [this.centre[0] - (at[0] - from.last[0]) / scale, this.centre[1] + (at[1] - from.last[1]) / scale];
      }
      from.last = at;
      this.draw();
    });
    canvas.addEventListener('pointerup', (event) => {
      if (from && this.path && from.moved) {
        const polygon = this.path;
        this.path = null;
        this.events.lasso(this.merged(this.inside(polygon), event));
      } else if (from && !from.moved && this.hovered >= 0) this.events.click(this.hovered);
      this.path = from = null;
      this.draw();
    });
    canvas.addEventListener('pointerleave', () => { if (!from) this.point(-1); });
    canvas.addEventListener('wheel', (event) => {
      event.preventDefault();
      const before = this.place(this.at(event));
      this.distance = Math.min(10, Math.max(1e-3, this.distance * Math.exp(event.deltaY / 500)));
      const after = this.place(this.at(event));
      this.centre = [this.centre[0] + before[0] - after[0], this.centre[1] + before[1] - after[1]];
      this.draw();
    }, { passive: false });
  }

  point(i) {
    if (i === this.hovered) return;
    this.hovered = i;
    this.events.hover(i);
    this.draw();
  }

  at(event) {
    const box = this.canvas.getBoundingClientRect();
    return [event.clientX - box.left, event.clientY - box.top];
  }

  /** Pixels per unit of the coordinates. */
  scalePerUnit() {
    return this.canvas.clientHeight / 2 / this.distance;
  }

  place([left, top]) {
    const scale = this.scalePerUnit();
    return [
      this.centre[0] + (left - this.canvas.clientWidth / 2) / scale,
      this.centre[1] - (top - this.canvas.clientHeight / 2) / scale,
    ];
  }

  position(i) {
    const scale = this.scalePerUnit();
    return [
      this.canvas.clientWidth / 2 + (this.points.x[i] - this.centre[0]) * scale,
      this.canvas.clientHeight / 2 - (this.points.y[i] - this.centre[1]) * scale,
    ];
  }

  nearest(at) {
    const [x, y] = this.place(at);
    const reach = 8 / this.scalePerUnit();
    let best = -1;
    let least = reach;
    for (let row = this.cell(y - reach); row <= this.cell(y + reach); row++) {
      for (let column = this.cell(x - reach); column <= this.cell(x + reach); column++) {
        for (const i of this.cells[column + CELLS * row]) {
          const distance = Math.hypot(this.points.x[i] - x, this.points.y[i] - y);
          if (distance < least && (!this.shown || this.shown[i])) [best, least] = [i, distance];
        }
      }
    }
    return best;
  }

  inside(polygon) {
    const chosen = [];
    for (let i = 0; i < this.points.x.length; i++) {
      if (this.shown && !this.shown[i]) continue;
      const [x, y] = this.position(i);
      let within = false;
      for (let a = 0, b = polygon.length - 1; a < polygon.length; b = a++) {
        const [[ax, ay], [bx, by]] = [polygon[a], polygon[b]];
        if (ay > y !== by > y && x < ((bx - ax) * (y - ay)) / (by - ay) + ax) within = !within;
      }
      if (within) chosen.push(i);
    }
    return chosen;
  }

  /** The selection after a lasso: with Ctrl these images are added to it, with Alt removed. */
  merged(indices, { ctrlKey, metaKey, altKey }) {
    const add = ctrlKey || metaKey;
    if (!this.selected || (!add && !altKey)) return indices;
    const marked = this.selected.slice();
    for (const i of indices) marked[i] = add ? 1 : 0;
    return Array.from(marked.keys()).filter((i) => marked[i]);
  }

  async colour(values, colours, rest) {
    const size = pointSize(values.length);
    this.values = values;
    this.colours = Uint32Array.from(colours, packColour);
    this.sizes = colours.map((colour) => (colour === rest && colours.length > 1 ? Math.max(1.5, size - 1.5) : size));
    this.order = byRank(values, colours, rest);
    this.paint();
  }

  draw() {
    if (this.waiting) return;
    this.waiting = true;
    requestAnimationFrame(() => this.paint());
  }

  paint() {
    this.waiting = false;
    const { canvas } = this;
    const ratio = window.devicePixelRatio || 1;
    const [width, height] = [Math.round(canvas.clientWidth * ratio), Math.round(canvas.clientHeight * ratio)];
    if (!this.values || !width || !height) return;
    if (canvas.width !== width) canvas.width = width;
    if (canvas.height !== height) canvas.height = height;
    const context = canvas.getContext('2d', { alpha: false });
    this.raster.clear(width, height, packColour(this.theming.background));
    this.paintPoints(width, height, ratio);
    this.raster.copyTo(context);
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.strokeStyle = this.theming.accent;
    context.lineWidth = 2;
    context.beginPath();
    if (this.path) {
      for (const [left, top] of this.path) context.lineTo(left, top);
      context.closePath();
    } else if (this.hovered >= 0) context.arc(...this.position(this.hovered), 7, 0, 2 * Math.PI);
    context.stroke();
    this.events.view();
  }

  paintPoints(width, height, ratio) {
    const scale = this.scalePerUnit() * ratio;
    const zoom = Math.max(1, wholeMap(this.canvas) / this.distance);
    const growth = (ratio * Math.asinh(zoom)) / Math.asinh(1); // as regl-scatterplot
    const common = {
      ...this.points, order: this.order, values: this.values, scale, colours: this.colours,
      left: width / 2 - this.centre[0] * scale, top: height / 2 + this.centre[1] * scale,
    };
    this.raster.points({
      ...common, diameters: this.sizes.map((size) => size * growth), opacity: this.selected ? FADED : 0.9, accept: this.shown,
    });
    if (!this.selected) return;
    const accept = this.shown ? this.selected.map((one, i) => one & this.shown[i]) : this.selected;
    this.raster.points({ ...common, diameters: this.sizes.map((size) => size * growth + 2 * ratio), opacity: 1, accept });
  }

  /** One number per image, 1 for these. */
  marked(indices) {
    const marked = new Uint8Array(this.points.x.length);
    for (const i of indices) marked[i] = 1;
    return marked;
  }

  show(indices) {
    this.shown = indices && this.marked(indices);
    this.draw();
  }

  select(indices) {
    this.selected = indices.length ? this.marked(indices) : null;
    this.draw();
  }

  hover(i) {
    this.hovered = i;
    this.draw();
  }

  async zoomTo(indices) {
    const xs = indices.map((i) => this.points.x[i]);
    const ys = indices.map((i) => this.points.y[i]);
    const ends = (values) => [values.reduce((a, b) => Math.min(a, b)), values.reduce((a, b) => Math.max(a, b))];
    const [[left, right], [bottom, top]] = [ends(xs), ends(ys)];
    const aspect = this.canvas.clientWidth / this.canvas.clientHeight;
    this.centre = [(left + right) / 2, (bottom + top) / 2];
    this.distance = Math.max(0.02, 0.7 * Math.max(top - bottom, (right - left) / aspect));
    this.draw();
  }

  async reset() {
    this.centre = [0, 0];
    this.distance = wholeMap(this.canvas);
    this.draw();
  }

  pan(dx, dy) {
    this.centre = [this.centre[0] + dx * this.distance, this.centre[1] + dy * this.distance];
    this.draw();
  }

  zoom(factor) {
    this.distance *= factor;
    this.draw();
  }

  lasso(active) {
    this.mode = active ? 'lasso' : 'pan';
  }

  theme(colours) {
    this.theming = colours;
    this.draw();
  }
}
