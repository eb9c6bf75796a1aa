// The panel beside the map: the image in focus, its neighbours, the selection and the lists of images.

import { encodeBytes } from './csv.js';
import { printable } from './data.js';

const MOST = 120; // thumbnails of a list

const element = (tag, className, text) => {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  return node;
};

/** Return the file: address of an absolute path, or null. */
export function fileAddress(path) {
  if (!path.startsWith('/')) return null;
  const bytes = Array.from(encodeBytes(path));
  const plain = /[A-Za-z0-9/._~-]/;
  return `file://${bytes.map((b) => (b < 128 && plain.test(String.fromCharCode(b)) ? String.fromCharCode(b)
    : `%${b.toString(16).toUpperCase().padStart(2, '0')}`)).join('')}`;
}

export class Panel {
  constructor(app) {
    this.app = app;
    this.nodes = Object.fromEntries(['image', 'neighbours', 'selection', 'list', 'tooltip'].map((id) => [id, document.getElementById(id)]));
  }

  label(i) {
    const { data } = this.app;
    return printable([data.file(i), data.className(i), data.splitName(i)].filter(Boolean).join(', '));
  }

  /** A button with the thumbnail of image i, which puts it in focus. */
  tile(i, side, note = '') {
    const button = element('button', 'tile');
    button.type = 'button';
    button.title = `${this.label(i)}${note ? `\n${note}` : ''}`;
    button.setAttribute('aria-label', `${this.label(i)}${note ? `, ${note}` : ''}`);
    if (this.app.thumbnails.any) {
      const picture = this.app.thumbnails.element(i, side, '');
      picture.setAttribute('aria-hidden', 'true');
      button.append(picture);
    } else button.append(element('span', 'file', printable(this.app.data.file(i))));
    button.addEventListener('click', () => this.app.focus(i));
    button.addEventListener('pointerenter', () => this.app.hover(i));
    button.addEventListener('pointerleave', () => this.app.hover(-1));
    return button;
  }

  tiles(indices, side, note) {
    const list = element('div', 'tiles');
    list.append(...indices.slice(0, MOST).map((i) => this.tile(i, side, note?.(i))));
    if (indices.length > MOST) list.append(element('p', 'more', `and ${(indices.length - MOST).toLocaleString('en')} more`));
    return list;
  }

  facts(i) {
    const { data } = this.app;
    const rows = [['Class', data.className(i)], ['Split', data.splitName(i)]];
    data.maps.forEach((map, number) => {
      const which = data.maps.length > 1 ? ` (${map.name})` : '';
      if (map.clusters) rows.push([`Cluster${which}`, map.clusterNames[map.clusters[i]]]);
      if (map.outliers) rows.push([`Outlier score${which}`, map.outliers[i].toPrecision(3)]);
    });
    const group = data.groups?.[i];
    if (group) rows.push(['Near duplicates', `group of ${data.groups.filter((other) => other === group).length} images`]);
    if (data.shared) rows.push(['Common neighbours', `${data.shared[i]} of ${data.k}`]);
    const list = element('dl');
    for (const [name, value] of rows) if (value !== '' && value !== undefined) list.append(element('dt', '', name), element('dd', '', printable(String(value))));
    return list;
  }

  showImage(i) {
    const { data, thumbnails } = this.app;
    const node = this.nodes.image;
    if (i < 0) {
      node.replaceChildren(element('p', 'hint', 'Point at the map to see an image; click for its nearest neighbours; drag with Shift to select.'));
      return this.nodes.neighbours.replaceChildren();
    }
    const parts = [];
    if (thumbnails.any) parts.push(thumbnails.element(i, 160, this.label(i)));
    const address = fileAddress(data.path(i));
    const title = element(address ? 'a' : 'p', 'path', printable(data.path(i)));
    if (address) Object.assign(title, { href: address, target: '_blank', rel: 'noopener' });
    node.replaceChildren(...parts, title, this.facts(i));
    this.showNeighbours(i);
  }

  showNeighbours(i) {
    const { data } = this.app;
    const parts = data.maps.map((map, number) => {
      const near = data.neighbours(number, i);
      const block = element('section');
      block.append(element('h2', '', data.maps.length > 1 ? `Nearest in ${map.name}` : 'Nearest neighbours'));
      const list = element('div', 'tiles');
      const other = data.maps.length > 1 ? new Set(data.neighbours(1 - number, i)) : null;
      near.forEach((j, rank) => {
        const tile = this.tile(j, 56, `cosine ${data.similarity(number, i, rank).toFixed(2)}${other ? (other.has(j) ? ', common' : ', only here') : ''}`);
        if (other && !other.has(j)) tile.classList.add('changed');
        list.append(tile);
      });
      if (!near.length) list.append(element('p', 'hint', 'It is the only image.'));
      block.append(list);
      return block;
    });
    this.nodes.neighbours.replaceChildren(...parts);
  }

  showSelection(indices) {
    const node = this.nodes.selection;
    const title = element('h2', '', 'Selection');
    const summary = element('p', 'summary', indices.length ? `${indices.length.toLocaleString('en')} selected` : 'Nothing selected');
    summary.id = 'selected';
    const buttons = element('div', 'buttons');
    for (const [text, id, action] of [['Export CSV', 'export', () => this.app.exportSelection()], ['Zoom to', 'zoom', () => this.app.zoomTo()], ['Clear', 'clear', () => this.app.select([])]]) {
      const button = element('button', '', text);
      Object.assign(button, { type: 'button', id, disabled: !indices.length });
      button.addEventListener('click', action);
      buttons.append(button);
    }
    node.replaceChildren(title, summary, buttons, this.tiles(indices, 40));
  }

  /** Show a list of images under a title, with a button that selects all of them. */
  showList(title, indices, note) {
    const node = this.nodes.list;
    if (!indices) return node.replaceChildren();
    const all = element('button', '', 'Select all');
    Object.assign(all, { type: 'button', id: 'select-all', disabled: !indices.length });
    all.addEventListener('click', () => this.app.select(indices));
    const buttons = element('div', 'buttons');
    buttons.append(all);
    node.replaceChildren(element('h2', '', title), buttons, this.tiles(indices, 40, note));
  }

  showTooltip(i, box) {
    const node = this.nodes.tooltip;
    node.hidden = i < 0;
    if (i < 0) return;
    const parts = this.app.thumbnails.any ? [this.app.thumbnails.element(i, 96, '')] : [];
    node.replaceChildren(...parts, element('span', '', this.label(i)));
    const [left, top] = box;
    const size = node.getBoundingClientRect();
    node.style.left = `${Math.max(4, Math.min(left + 16, window.innerWidth - size.width - 4))}px`;
    node.style.top = `${Math.max(4, top + 16 + size.height > window.innerHeight ? top - size.height - 16 : top + 16)}px`;
  }
}
