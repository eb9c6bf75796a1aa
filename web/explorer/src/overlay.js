// What is drawn over a map: thumbnails in free cells of a grid, and rings around an image and its neighbours.

export class Overlay {
  constructor(canvas, map, thumbnails) {
    Object.assign(this, { canvas, map, thumbnails, pictures: false, side: 28, focus: -1, neighbours: [], hovered: -1 });
    this.visible = () => true;
    this.again = () => this.draw();
    new ResizeObserver(() => this.draw()).observe(canvas);
  }

  draw() {
    if (this.waiting) return;
    this.waiting = true;
    requestAnimationFrame(() => {
      this.waiting = false;
      this.paint();
    });
  }

  paint() {
    const { canvas } = this;
    const ratio = window.devicePixelRatio || 1;
    const [width, height] = [canvas.clientWidth, canvas.clientHeight];
    const [w, h] = [Math.round(width * ratio), Math.round(height * ratio)];
    const empty = !this.pictures && this.focus < 0 && this.hovered < 0;
    if (empty && this.clean && canvas.width === w && canvas.height === h) return;
    this.clean = empty;
    canvas.style.visibility = empty ? 'hidden' : 'visible'; // an empty canvas takes time to compose, too
    if (canvas.width !== w) canvas.width = w;
    if (canvas.height !== h) canvas.height = h;
    const context = canvas.getContext('2d');
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, width, height);
    if (this.pictures && this.thumbnails.any) this.paintPictures(context, width, height);
    this.paintRings(context);
  }

  /** One image in each cell: of the images whose points lie in the cell, the first one in the data. */
  paintPictures(context, width, height) {
    const { side } = this;
    const columns = Math.ceil(width / side);
    const taken = new Int32Array(columns * Math.ceil(height / side)).fill(-1);
    const { x, y } = this.map.points;
    const [left, top] = this.map.position(0);
    const next = this.map.scalePerUnit();
    const [x0, y0] = [x[0], y[0]];
    for (let i = 0; i < x.length; i++) {
      const a = left + (x[i] - x0) * next;
      const b = top - (y[i] - y0) * next;
      if (a < 0 || b < 0 || a >= width || b >= height) continue;
      const cell = Math.floor(a / side) + columns * Math.floor(b / side);
      if (taken[cell] < 0 && this.visible(i)) taken[cell] = i;
    }
    taken.forEach((i, cell) => {
      if (i < 0) return;
      this.thumbnails.drawSmall(context, i, (cell % columns) * side + 1, Math.floor(cell / columns) * side + 1, side - 2, this.again);
    });
  }

  paintRings(context) {
    const style = getComputedStyle(this.canvas);
    const [accent, halo] = [style.getPropertyValue('--accent'), style.getPropertyValue('--map')];
    const ring = (i, radius, width) => {
      const [a, b] = this.map.position(i);
      for (const [colour, line] of [[halo, width + 2], [accent, width]]) {
        context.strokeStyle = colour;
        context.lineWidth = line;
        context.beginPath();
        context.arc(a, b, radius, 0, 2 * Math.PI);
        context.stroke();
      }
    };
    if (this.focus >= 0) {
      const [a, b] = this.map.position(this.focus);
      context.globalAlpha = 0.7;
      for (const i of this.neighbours) {
        const [c, d] = this.map.position(i);
        context.strokeStyle = accent;
        context.lineWidth = 1;
        context.beginPath();
        context.moveTo(a, b);
        context.lineTo(c, d);
        context.stroke();
      }
      context.globalAlpha = 1;
      for (const i of this.neighbours) ring(i, 5, 1.5);
      ring(this.focus, 9, 3);
    }
    if (this.hovered >= 0) ring(this.hovered, 7, 2);
  }
}
