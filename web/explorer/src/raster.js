// Points drawn by the processor into an array of pixels: without a GPU faster than WebGL, which computes every pixel of
// a point by a program, and than paths of Canvas 2D.

const MARGIN = 24; // pixels around the picture, so that no point has to be cut off
const STEPS = 4; // places of a point within a pixel, in each direction
export const LARGEST = 2 * MARGIN - 4; // diameter of a point

/** Return the colour "#rrggbb" as a pixel of ImageData, which is little-endian ABGR. */
export const packColour = (text) => {
  const value = Number.parseInt(text.slice(1), 16);
  return (0xff000000 | ((value & 0xff) << 16) | (value & 0xff00) | (value >> 16)) >>> 0;
};

/** Return how much a disc covers each pixel around it, 0 to 256: the pixels' offsets in the picture, and the values. */
function disc(diameter, dx, dy, width, opacity) {
  const offsets = [];
  const weights = [];
  const reach = Math.ceil(diameter / 2 + 1);
  for (let y = -reach; y <= reach; y++) {
    for (let x = -reach; x <= reach; x++) {
      const cover = diameter / 2 + 0.5 - Math.hypot(x + 0.5 - dx, y + 0.5 - dy);
      const weight = Math.round(256 * opacity * Math.min(1, Math.max(0, cover)));
      if (weight > 0) {
        offsets.push(x + width * y);
        weights.push(weight);
      }
    }
  }
  return { offsets: Int32Array.from(offsets), weights: Int32Array.from(weights) };
}

export class Raster {
  constructor() {
    this.discs = new Map();
  }

  /** Begin a picture of this size and colour. */
  clear(width, height, background) {
    const [across, down] = [width + 2 * MARGIN, height + 2 * MARGIN];
    if (this.across !== across || this.down !== down) {
      this.image = new ImageData(across, down);
      this.pixels = new Uint32Array(this.image.data.buffer);
      this.discs.clear();
      [this.across, this.down] = [across, down];
    }
    this.pixels.fill(background);
  }

  /** The discs of a diameter and opacity, one for each place within a pixel. */
  discsOf(diameter, opacity) {
    const key = `${diameter} ${opacity}`;
    let discs = this.discs.get(key);
    if (!discs) {
      const place = (step) => (step + 0.5) / STEPS;
      discs = Array.from({ length: STEPS * STEPS }, (_, i) =>
        disc(diameter, place(i % STEPS), place(Math.floor(i / STEPS)), this.across, opacity));
      this.discs.set(key, discs);
    }
    return discs;
  }

  /**
   * Draw the images of `order` at (left + x * scale, top - y * scale) with the colour and the diameter of their category.
   * `accept`, if it is an array, has a positive value for the images to draw.
   */
  points({ x, y, order, values, left, top, scale, colours, diameters, opacity, accept }) {
    const { pixels, across, down } = this;
    const discs = diameters.map((diameter) => this.discsOf(Math.min(LARGEST, Math.round(2 * diameter) / 2), opacity));
    const right = across - MARGIN;
    const bottom = down - MARGIN;
    for (let at = 0; at < order.length; at++) {
      const i = order[at];
      if (accept && !accept[i]) continue;
      const a = left + x[i] * scale + MARGIN;
      const b = top - y[i] * scale + MARGIN;
      if (!(a >= MARGIN && b >= MARGIN && a < right && b < bottom)) {
        const reach = diameters[values[i]] / 2 + 2;
        if (!(a > MARGIN - reach && b > MARGIN - reach && a < right + reach && b < bottom + reach)) continue;
      }
      const column = Math.floor(a);
      const row = Math.floor(b);
      const { offsets, weights } = discs[values[i]][((STEPS * (b - row)) | 0) * STEPS + ((STEPS * (a - column)) | 0)];
      blend(pixels, column + across * row, offsets, weights, colours[values[i]]);
    }
  }

  /** Copy the picture to a canvas. */
  copyTo(context) {
    context.putImageData(this.image, -MARGIN, -MARGIN);
  }
}

function blend(pixels, start, offsets, weights, colour) {
  const redBlue = colour & 0xff00ff;
  const green = colour & 0x00ff00;
  for (let k = 0; k < offsets.length; k++) {
    const at = start + offsets[k];
    const weight = weights[k];
    if (weight === 256) {
      pixels[at] = colour;
      continue;
    }
    const under = pixels[at];
    const rest = 256 - weight;
    const first = (Math.imul(redBlue, weight) + Math.imul(under & 0xff00ff, rest)) >>> 8;
    const second = (Math.imul(green, weight) + Math.imul(under & 0x00ff00, rest)) >>> 8;
    pixels[at] = 0xff000000 | (first & 0xff00ff) | (second & 0x00ff00);
  }
}
