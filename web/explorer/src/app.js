// State of the page: maps, colouring, focus and selection.

import { CanvasMap } from './canvas-map.js';
import { colourings } from './colours.js';
import { saveCsv } from './csv.js';
import { printable } from './data.js';
import { drawLegend } from './legend.js';
import { Overlay } from './overlay.js';
import { Panel } from './panel.js';
import { Thumbnails } from './thumbnails.js';
import { WebGLMap } from './webgl-map.js';

const byId = (id) => document.getElementById(id);

export class App {
  constructor(data) {
    this.data = data;
    this.thumbnails = new Thumbnails(data.sprite);
    this.panel = new Panel(this);
    this.selection = [];
    this.focused = -1;
    this.hovered = -1;
    this.chosen = new Set(); // categories of map `chosenOn` that are shown; none: all images
    this.chosenOn = 0;
    this.lassoing = false;
    this.views = data.maps.map((map, number) => this.view(map, number));
    this.colourings = data.maps.map((_, number) => colourings(data, number));
    this.key = this.firstKey();
  }

  /** The colouring at the start: classes if the colours suffice for them, else clusters. */
  firstKey() {
    const keys = this.colourings[0].map((colouring) => colouring.key);
    if (this.data.shared) return 'shared';
    if (keys.includes('class') && this.data.classes.length <= 10) return 'class';
    return keys.includes('cluster') ? 'cluster' : keys[0];
  }

  view(map, number) {
    const figure = byId('maps').children[number];
    const [canvas, above] = figure.querySelectorAll('canvas');
    let overlay = null;
    const events = {
      hover: (i) => this.hover(i, number),
      click: (i) => this.focus(i),
      lasso: (indices) => this.lassoed(indices),
      view: () => overlay?.draw(),
    };
    const drawn = this.draw(canvas, map, events);
    for (const kind of ['mousedown', 'pointerdown']) figure.addEventListener(kind, () => this.drag(true));
    for (const kind of ['mouseup', 'pointerup', 'blur']) window.addEventListener(kind, () => this.drag(false));
    overlay = new Overlay(above, drawn, this.thumbnails);
    overlay.visible = (i) => this.visible(i);
    return { figure, map: drawn, overlay };
  }

  /** A map drawn with WebGL by a GPU, or else by the processor; #webgl or #canvas at the end of the address decides. */
  draw(canvas, map, events) {
    const requested = window.location.hash;
    try {
      if (requested === '#canvas') throw new Error('as requested');
      const drawn = new WebGLMap(canvas, map, events, requested === '#webgl');
      document.documentElement.dataset.renderer = 'webgl';
      return drawn;
    } catch (error) {
      console.info(`The map is drawn without WebGL: ${error.message}`);
      document.documentElement.dataset.renderer = 'canvas';
      const fresh = canvas.cloneNode(false); // a context of the first canvas may exist
      canvas.replaceWith(fresh);
      return new CanvasMap(fresh, map, events);
    }
  }

  visible(i) {
    return !this.chosen.size || this.chosen.has(this.colouring(this.chosenOn).values[i]);
  }

  /** The categories that are chosen in the legend of a map. */
  chosenIn(number) {
    return number === this.chosenOn ? this.chosen : new Set();
  }

  colouring(number) {
    return this.colourings[number].find((colouring) => colouring.key === this.key);
  }

  theme() {
    return document.documentElement.dataset.theme;
  }

  setTheme(theme) {
    document.documentElement.dataset.theme = theme;
    const style = getComputedStyle(document.documentElement);
    const colours = { background: style.getPropertyValue('--map').trim(), accent: style.getPropertyValue('--accent').trim() };
    for (const { map } of this.views) map.theme(colours);
    return this.colour();
  }

  /** Draw the maps in the current colours. Only one drawing runs at a time; it is repeated if the choice has changed. */
  colour() {
    this.again = true;
    this.drawing ??= this.drawUntilCurrent().finally(() => { this.drawing = null; });
    return this.drawing;
  }

  async drawUntilCurrent() {
    while (this.again) {
      this.again = false;
      await this.recolour();
    }
  }

  async recolour() {
    const theme = this.theme();
    byId('colour').value = this.key;
    const legends = document.querySelectorAll('#legends ul');
    const shown = this.shown();
    await Promise.all(this.views.map(async ({ map, overlay }, number) => {
      const colouring = this.colouring(number);
      const chosen = this.chosenIn(number);
      await map.colour(colouring.values, colouring.colours(theme, chosen), colouring.rest(theme));
      map.show(shown);
      map.select(this.selection);
      overlay.draw();
      drawLegend(legends[number], colouring, theme, chosen, (next) => {
        this.chosen = next;
        this.chosenOn = number;
        this.colour();
      });
    }));
  }

  /** The images of the chosen categories; null for all. */
  shown() {
    if (!this.chosen.size) return null;
    const shown = [];
    this.colouring(this.chosenOn).values.forEach((category, i) => { if (this.chosen.has(category)) shown.push(i); });
    return shown;
  }

  setColouring(key) {
    this.key = key;
    this.chosen = new Set();
    this.colour();
  }

  drag(active) {
    this.dragging = active;
    if (active) this.panel.showTooltip(-1);
  }

  hover(i, number = -1) {
    if (this.dragging) return; // the map moves under the pointer
    this.hovered = i;
    this.views.forEach(({ map, overlay }, other) => {
      if (other !== number) map.hover(i);
      overlay.hovered = other === number ? -1 : i;
      overlay.draw();
    });
    const view = this.views[number];
    if (!view) return this.panel.showTooltip(-1);
    const box = view.figure.getBoundingClientRect();
    const [left, top] = i < 0 ? [0, 0] : view.map.position(i);
    this.panel.showTooltip(i, [box.left + left, box.top + top]);
  }

  focus(i) {
    this.focused = i;
    this.views.forEach(({ map, overlay }, number) => {
      overlay.focus = i;
      overlay.neighbours = i < 0 ? [] : this.data.neighbours(number, i);
      map.select(this.selection); // the library takes a click as a new selection
      overlay.draw();
    });
    this.panel.showImage(i);
    this.say(i < 0 ? '' : printable(this.data.file(i)));
  }

  lassoed(indices) {
    this.select(indices);
    if (this.lassoing) this.setLasso(false);
  }

  select(indices) {
    this.selection = [...indices].sort((a, b) => a - b);
    for (const { map } of this.views) map.select(this.selection);
    this.panel.showSelection(this.selection);
    this.say(`${this.selection.length.toLocaleString('en')} selected`);
  }

  setLasso(active) {
    this.lassoing = active;
    byId('lasso').setAttribute('aria-pressed', String(active));
    byId('maps').classList.toggle('lassoing', active);
    for (const { map } of this.views) map.lasso(active);
  }

  setPictures(active) {
    byId('pictures').setAttribute('aria-pressed', String(active));
    for (const { overlay } of this.views) {
      overlay.pictures = active;
      overlay.draw();
    }
  }

  search(text) {
    const word = text.trim().toLowerCase();
    if (!word) return this.showChanged();
    this.lower ??= this.data.paths.map((path) => path.toLowerCase());
    const matches = [];
    this.lower.forEach((path, i) => { if (path.includes(word)) matches.push(i); });
    this.matches = matches;
    this.panel.showList(`${matches.length.toLocaleString('en')} with this name`, matches);
    this.say(`${matches.length.toLocaleString('en')} with this name`);
  }

  /** For two maps, the images with the fewest common neighbours; else nothing. */
  showChanged() {
    this.matches = null;
    const { shared, k, changed } = this.data;
    if (!shared) return this.panel.showList('', null);
    this.panel.showList('Most changed neighbours', changed, (i) => `${shared[i]} of ${k} neighbours in common`);
  }

  zoomTo() {
    const chosen = this.selection.length ? this.selection : this.focused < 0 ? [] : [this.focused, ...this.data.neighbours(0, this.focused)];
    if (chosen.length) for (const { map } of this.views) map.zoomTo(chosen);
  }

  exportSelection() {
    if (this.selection.length) saveCsv(this.data, this.selection, 'selection.csv');
  }

  say(text) {
    byId('live').textContent = text;
  }
}
