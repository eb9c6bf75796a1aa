// The data block of the page: JSON whose number arrays are base64 of little-endian values.

const TYPES = { f32: Float32Array, u8: Uint8Array, u16: Uint16Array, u32: Uint32Array };

/** Return the typed array of {"type", "values"}; values are base64. */
export function decodeNumbers(packed) {
  if (Uint8Array.fromBase64) return new TYPES[packed.type](Uint8Array.fromBase64(packed.values).buffer);
  const text = atob(packed.values);
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < bytes.length; i++) bytes[i] = text.charCodeAt(i);
  return new TYPES[packed.type](bytes.buffer);
}

/** Return the data block with its arrays decoded and functions for the facts about image i. */
export function readData(text) {
  const data = JSON.parse(text);
  const unpack = (value) => (value ? decodeNumbers(value) : null);
  data.labels = unpack(data.labels);
  data.split = unpack(data.split);
  data.shared = unpack(data.shared);
  data.groups = unpack(data.groups);
  for (const map of data.maps) {
    for (const key of ['x', 'y', 'neighbours', 'similarities', 'clusters', 'outliers']) map[key] = unpack(map[key]);
  }
  data.path = (i) => data.root + data.paths[i];
  data.file = (i) => data.paths[i].slice(data.paths[i].lastIndexOf('/') + 1);
  data.className = (i) => (data.labels && data.labels[i] ? data.classes[data.labels[i] - 1] : '');
  data.splitName = (i) => (data.split ? data.splits[data.split[i]] : '');
  data.neighbours = (map, i) => Array.from(data.maps[map].neighbours.subarray(i * data.k, (i + 1) * data.k));
  data.similarity = (map, i, rank) => data.maps[map].similarities[i * data.k + rank] / 255;
  return data;
}

/** Return text that shows characters which control a terminal or the direction of text, and lone surrogates, as escapes. */
export function printable(text) {
  return text.replace(/[\p{Cc}\p{Cf}\p{Cs}\p{Zl}\p{Zp}]/gu, (c) => `\\u${c.codePointAt(0).toString(16).padStart(4, '0')}`);
}
