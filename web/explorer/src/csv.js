// The selection as a CSV file that `--data` reads: path, class, split.

const encoder = new TextEncoder();

/** Return the bytes of a text; U+DC80 to U+DCFF stand for single bytes of a file name that is not UTF-8. */
export function encodeBytes(text) {
  const parts = [];
  // The flag u keeps the halves of a surrogate pair together, so that only lone ones match.
  for (const piece of text.split(/([\udc80-\udcff]+)/u)) {
    if (/^[\udc80-\udcff]+$/u.test(piece)) parts.push(Uint8Array.from(piece, (c) => c.charCodeAt(0) - 0xdc00));
    else parts.push(encoder.encode(piece));
  }
  const whole = new Uint8Array(parts.reduce((sum, part) => sum + part.length, 0));
  parts.reduce((at, part) => (whole.set(part, at), at + part.length), 0);
  return whole;
}

const quoted = (cell) => `"${cell.replaceAll('"', '""')}"`;

/** Return the CSV text of these images; columns that no image has are left out. */
export function csvText(data, indices) {
  const columns = [['path', (i) => data.path(i)]];
  if (data.labels) columns.push(['class', (i) => data.className(i)]);
  if (data.split && data.splits.every(Boolean)) columns.push(['split', (i) => data.splitName(i)]);
  const lines = [columns.map(([name]) => name).join(',')];
  for (const i of indices) lines.push(columns.map(([, cell]) => quoted(cell(i))).join(','));
  return `${lines.join('\n')}\n`;
}

/** Save the CSV file of these images under this name. */
export function saveCsv(data, indices, name) {
  const url = URL.createObjectURL(new Blob([encodeBytes(csvText(data, indices))], { type: 'text/csv' }));
  const link = document.createElement('a');
  link.href = url;
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(url), 10000);
}
