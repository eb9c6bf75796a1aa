// A map drawn with WebGL by regl-scatterplot.

import createScatterplot from 'regl-scatterplot';

import { byRank, pointSize, wholeMap } from './points.js';
import { directRenderer } from './renderer.js';

/** A linear scale with the part of d3's interface that regl-scatterplot keeps up to date. */
function linear(domain) {
  let range = [0, 1];
  const scale = (value) => range[0] + ((value - domain[0]) / (domain[1] - domain[0])) * (range[1] - range[0]);
  scale.domain = (next) => (next ? ((domain = next), scale) : domain);
  scale.range = (next) => (next ? ((range = next), scale) : range);
  return scale;
}

export class WebGLMap {
  /** Throws if the browser has no WebGL or, unless `software`, computes it without a GPU. */
  constructor(canvas, { x, y }, events, software) {
    this.canvas = canvas;
    this.points = { x, y };
    this.events = events;
    this.lassoing = false;
    this.xScale = linear([-1, 1]);
    this.yScale = linear([-1, 1]);
    const renderer = directRenderer(canvas, software);
    this.plot = createScatterplot({
      renderer, canvas, syncEvents: true, spatialIndexUseWorker: false, xScale: this.xScale, yScale: this.yScale,
      pointSize: pointSize(x.length), pointScaleMode: 'asinh', pointOutlineWidth: 1, pointSizeSelected: 2,
      opacity: 0.9, opacityInactiveMax: 0.35, opacityInactiveScale: 0.6, colorBy: 'valueA', sizeBy: 'valueA',
      lassoMinDelay: 8, lassoMinDist: 3, deselectOnDblClick: false, deselectOnEscape: false, cameraDistance: wholeMap(canvas),
      actionKeyMap: { lasso: 'shift', merge: 'ctrl', remove: 'alt' },
    });
    this.over = -1;
    const point = (i) => { this.over = i; events.hover(i); };
    this.plot.subscribe('pointover', point);
    this.plot.subscribe('pointout', () => point(-1));
    this.plot.subscribe('lassoStart', () => { this.lassoing = true; });
    this.plot.subscribe('lassoEnd', () => { this.lassoing = false; });
    this.plot.subscribe('select', ({ points }) => { if (this.lassoing) events.lasso([...points]); });
    this.plot.subscribe('deselect', () => { if (this.lassoing) events.lasso([]); });
    this.plot.subscribe('view', () => events.view());
    this.listenToClicks();
  }

  /** The library takes a click as a selection of one point, and reports nothing if that one is already selected. */
  listenToClicks() {
    let from = [0, 0];
    this.canvas.addEventListener('mousedown', (event) => { from = [event.clientX, event.clientY]; });
    this.canvas.addEventListener('click', (event) => {
      const moved = Math.hypot(event.clientX - from[0], event.clientY - from[1]);
      if (moved < 3 && this.over >= 0) this.events.click(this.over);
    });
  }

  /** Draw the points in these colours, one per category; categories of the colour `rest` are drawn first and smaller. */
  async colour(values, colours, rest) {
    const size = pointSize(values.length);
    this.plot.set({
      pointColor: colours,
      pointSize: colours.map((colour) => (colour === rest && colours.length > 1 ? Math.max(1.5, size - 1.5) : size)),
    });
    const options = { zDataType: 'categorical', spatialIndex: this.index };
    await this.plot.draw({ ...this.points, valueA: values }, options);
    this.index = this.plot.get('spatialIndex');
    this.plot.set({ pointOrder: Array.from(byRank(values, colours, rest)) });
  }

  show(indices) {
    if (indices) this.plot.filter(indices, { preventEvent: true });
    else this.plot.unfilter({ preventEvent: true });
  }

  select(indices) {
    if (indices.length) this.plot.select([...indices], { preventEvent: true }); // it removes hidden points from the array
    else this.plot.deselect({ preventEvent: true });
  }

  hover(i) {
    this.plot.hover(i, { preventEvent: true });
  }

  zoomTo(indices) {
    return this.plot.zoomToPoints(indices, { padding: 0.4, transition: true, transitionDuration: 250 });
  }

  /** The whole map, in a window of any shape. */
  reset() {
    return this.plot.zoomToLocation([0, 0], wholeMap(this.canvas), { transition: true, transitionDuration: 250 });
  }

  pan(dx, dy) {
    const [x, y] = this.plot.get('cameraTarget');
    const distance = this.plot.get('cameraDistance');
    this.plot.zoomToLocation([x + dx * distance, y + dy * distance], distance);
  }

  zoom(factor) {
    this.plot.zoomToLocation(this.plot.get('cameraTarget'), this.plot.get('cameraDistance') * factor);
  }

  lasso(active) {
    this.plot.set({ mouseMode: active ? 'lasso' : 'panZoom' });
  }

  theme({ background, accent }) {
    this.plot.set({ backgroundColor: background, lassoColor: accent });
  }

  position(i) {
    return [this.xScale(this.points.x[i]), this.yScale(this.points.y[i])];
  }

  /** Pixels per unit of the coordinates. */
  scalePerUnit() {
    return this.xScale(1) - this.xScale(0);
  }
}
