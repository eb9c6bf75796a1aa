// A map drawn with Canvas 2D, for browsers without WebGL; the same interface as WebGLMap.

import { pointSize, wholeMap } from './webgl-map.js';

const CELLS = 64;

export class CanvasMap {
  constructor(canvas, { x, y }, events) {
    this.canvas = canvas;
    this.points = { x, y };
    this.events = events;
    this.centre = [0, 0];
    this.distance = wholeMap(canvas);
    this.mode = 'pan';
    this.hovered = -1;
    this.selected = new Set();
    this.shown = null;
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
    canvas.addEventListener('pointerup', () => {
      if (from && this.path && from.moved) {
        const polygon = this.path;
        this.path = null;
        this.events.lasso(this.inside(polygon));
      } else if (from && !from.moved && this.hovered >= 0) this.events.click(this.hovered);
      this.path = from = null;
      this.draw();
    });
    canvas.addEventListener('pointerleave', () => { if (!from) this.point(-1); });
    canvas.addEventListener('wheel', (event) => {
      event.preventDefault();
      const before = this.place(this.at(event));
      this.distance *= Math.exp(event.deltaY / 500);
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
          if (distance < least && (!this.shown || this.shown.has(i))) [best, least] = [i, distance];
        }
      }
    }
    return best;
  }

  inside(polygon) {
    const chosen = [];
    for (let i = 0; i < this.points.x.length; i++) {
      if (this.shown && !this.shown.has(i)) continue;
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

  async colour(values, colours, rest) {
    this.values = values;
    this.colours = colours;
    this.rest = rest;
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
    const [width, height] = [canvas.clientWidth, canvas.clientHeight];
    if (canvas.width !== Math.round(width * ratio)) canvas.width = Math.round(width * ratio);
    if (canvas.height !== Math.round(height * ratio)) canvas.height = Math.round(height * ratio);
    const context = canvas.getContext('2d');
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.fillStyle = this.colour2d?.background ?? '#fff';
    context.fillRect(0, 0, width, height);
    if (this.values) this.dots(context, width, height);
    if (this.path) {
      context.strokeStyle = this.colour2d?.accent ?? '#00f';
      context.lineWidth = 2;
      context.beginPath();
      for (const [left, top] of this.path) context.lineTo(left, top);
      context.closePath();
      context.stroke();
    }
    this.events.view();
  }

  dots(context, width, height) {
    const size = Math.max(1.5, pointSize(this.values.length) - 1);
    const scale = this.scalePerUnit();
    const { x, y } = this.points;
    const [left, top] = [width / 2 - this.centre[0] * scale, height / 2 + this.centre[1] * scale];
    const paths = this.colours.map(() => new Path2D());
    const marked = new Path2D();
    for (let i = 0; i < x.length; i++) {
      const [a, b] = [left + x[i] * scale, top - y[i] * scale];
      if (a < -9 || b < -9 || a > width + 9 || b > height + 9 || (this.shown && !this.shown.has(i))) continue;
      paths[this.values[i]].rect(a - size / 2, b - size / 2, size, size);
      if (this.selected.has(i) || i === this.hovered) marked.rect(a - size / 2 - 1, b - size / 2 - 1, size + 2, size + 2);
    }
    for (const first of [true, false]) {
      this.colours.forEach((colour, category) => {
        if ((colour === this.rest) !== first) return;
        context.fillStyle = colour;
        context.fill(paths[category]);
      });
    }
    context.strokeStyle = this.colour2d?.accent ?? '#00f';
    context.stroke(marked);
  }

  show(indices) {
    this.shown = indices ? new Set(indices) : null;
    this.draw();
  }

  select(indices) {
    this.selected = new Set(indices);
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
    this.colour2d = colours;
    this.draw();
  }
}
