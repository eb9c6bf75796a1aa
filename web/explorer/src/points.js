// What both kinds of map know about points.

/** The distance of the camera, in half heights of the window, from which coordinates of [-1, 1] are visible. */
export const wholeMap = (canvas) => 1.1 * Math.max(1, canvas.clientHeight / Math.max(1, canvas.clientWidth));

export const pointSize = (count) => (count <= 1000 ? 8 : count <= 12000 ? 5 : count <= 50000 ? 3 : 2);

/**
 * Return the images in the order of drawing: those of the colour `rest` first, then category by category, so that what a
 * colour marks is on top.
 */
export function byRank(values, colours, rest) {
  const rank = colours.map((colour, category) => (colour === rest ? 0 : category + 1));
  const starts = new Uint32Array(colours.length + 2);
  for (const value of values) starts[rank[value] + 1]++;
  for (let i = 1; i < starts.length; i++) starts[i] += starts[i - 1];
  const order = new Uint32Array(values.length);
  for (let i = 0; i < values.length; i++) order[starts[rank[values[i]]]++] = i;
  return order;
}
