// Thumbnails: tiles of sprite sheets, which are data: URLs or files in the folder of the page.

export class Thumbnails {
  constructor(sprite) {
    this.sprite = sprite;
    this.sheets = new Map();
    this.copies = new Map();
    this.queue = Promise.resolve();
  }

  /** Whether there are thumbnails at all. */
  get any() {
    return this.sprite !== null;
  }

  sheet(number) {
    let sheet = this.sheets.get(number);
    if (!sheet) {
      const image = new Image();
      sheet = { image, ready: false, waiting: [] };
      this.sheets.set(number, sheet);
      image.onload = () => {
        sheet.ready = true;
        for (const run of sheet.waiting.splice(0)) run();
      };
      image.src = this.sprite.sheets[number];
    }
    return sheet;
  }

  /**
   * Draw image i in the size of the map, from a reduced copy of its sheet: browsers keep few decoded pictures, and would
   * decode all sheets again for every frame. Calls `later` when it can be drawn if there is no copy yet.
   */
  drawSmall(context, i, left, top, side, later) {
    const { tile, columns, perSheet } = this.sprite;
    const number = Math.floor(i / perSheet);
    const small = Math.min(tile, Math.ceil(side * Math.min(2, window.devicePixelRatio || 1)));
    let copy = this.copies.get(number);
    if (!copy) {
      copy = { picture: null, waiting: new Set() };
      this.copies.set(number, copy);
      this.queue = this.queue.then(() => this.reduce(number, small / tile)).then(() => copy.waiting.forEach((draw) => draw()));
    }
    if (!copy.picture) {
      copy.waiting.add(later); // of two maps, each is drawn again
      return;
    }
    const at = i % perSheet;
    context.drawImage(
      copy.picture, (at % columns) * small, Math.floor(at / columns) * small, small, small, left, top, side, side,
    );
  }

  /** Keep a reduced copy of a sheet; called for one sheet at a time, so that the page stays responsive. */
  async reduce(number, scale) {
    const source = this.sprite.sheets[number];
    const size = { resizeWidth: Math.round(this.sprite.columns * this.sprite.tile * scale), resizeQuality: 'medium' };
    if (source.startsWith('data:')) { // decoded and reduced by another thread
      const bytes = Uint8Array.from(atob(source.slice(source.indexOf(',') + 1)), (c) => c.charCodeAt(0));
      this.copies.get(number).picture = await createImageBitmap(new Blob([bytes], { type: 'image/webp' }), size);
    } else {
      const image = new Image();
      image.src = source;
      await image.decode();
      this.copies.get(number).picture = await createImageBitmap(image, size);
    }
  }

  /** Draw image i into a square; returns false, and calls `later` when it can be drawn, if its sheet is not loaded. */
  draw(context, i, left, top, side, later) {
    const { tile, columns, perSheet } = this.sprite;
    const sheet = this.sheet(Math.floor(i / perSheet));
    if (!sheet.ready) {
      if (later) sheet.waiting.push(later);
      return false;
    }
    const at = i % perSheet;
    context.drawImage(
      sheet.image, (at % columns) * tile, Math.floor(at / columns) * tile, tile, tile, left, top, side, side,
    );
    return true;
  }

  /** Return a canvas with image i. */
  element(i, side, label) {
    const canvas = document.createElement('canvas');
    canvas.setAttribute('role', 'img');
    canvas.setAttribute('aria-label', label);
    const ratio = Math.min(2, window.devicePixelRatio || 1);
    canvas.width = canvas.height = Math.round(side * ratio);
    canvas.style.width = canvas.style.height = `${side}px`;
    if (this.any) {
      const context = canvas.getContext('2d');
      const paint = () => this.draw(context, i, 0, 0, canvas.width, paint);
      paint();
    }
    return canvas;
  }
}
