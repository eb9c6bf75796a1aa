// Colourings: each assigns a category with a name and a colour to every image of a map.

// Petroff (2021), "Accessible color sequences for data visualization": ten colours that remain distinguishable with
// protanopia, deuteranopia and tritanopia.
export const CATEGORIES = [
  '#3f90da', '#ffa90e', '#bd1f01', '#94a4a2', '#832db6', '#a96b59', '#e76300', '#b9ac70', '#717581', '#92dadd',
];
// Ordered steps, the last one is the most conspicuous; lightness is monotonic, so that hue is not needed.
const STEPS = {
  light: ['#c9cfe2', '#93b5d6', '#4f9cb4', '#14737f', '#00332f'],
  dark: ['#39435a', '#31688e', '#21918c', '#5ec962', '#fde725'],
};
const REST = { light: '#ccd1d8', dark: '#464c55' };
const CLEAR = { light: '#bd1f01', dark: '#ffa90e' };

const count = (values, most) => {
  const counts = new Array(most).fill(0);
  for (const value of values) counts[value]++;
  return counts;
};

/** A colouring by names: the most frequent categories get the colours, the others one neutral colour. */
function named(key, label, values, names) {
  const counts = count(values, names.length);
  const order = names.map((_, i) => i).filter((i) => counts[i] > 0 && names[i] !== null);
  const bySize = [...order].sort((a, b) => counts[b] - counts[a] || a - b).slice(0, CATEGORIES.length);
  const coloured = bySize.sort((a, b) => a - b);
  return {
    key, label, values, counts, names, order: [...coloured, ...order.filter((i) => !coloured.includes(i))],
    colours(theme, chosen) {
      const shown = chosen && chosen.size ? [...chosen] : coloured;
      const all = new Array(names.length).fill(REST[theme]);
      shown.slice(0, CATEGORIES.length).forEach((category, i) => { all[category] = CATEGORIES[i]; });
      return all;
    },
    rest: (theme) => REST[theme],
  };
}

/** A colouring by ordered steps. */
function ordered(key, label, values, names) {
  const counts = count(values, names.length);
  return {
    key, label, values, counts, names, order: names.map((_, i) => i).reverse(),
    colours: (theme) => names.map((_, i) => STEPS[theme][STEPS[theme].length - names.length + i]),
    rest: () => null,
  };
}

/** Return the values that divide the numbers at these shares. */
function quantiles(numbers, shares) {
  const sorted = Float32Array.from(numbers).sort();
  return shares.map((share) => sorted[Math.min(sorted.length - 1, Math.floor(share * sorted.length))]);
}

const outlierSteps = (scores) => {
  const bounds = quantiles(scores, [0.5, 0.8, 0.95, 0.99]);
  return Uint8Array.from(scores, (score) => bounds.filter((bound) => score > bound).length);
};
const OUTLIERS = ['most usual half', '50 to 80%', '80 to 95%', '95 to 99%', 'least usual 1%'];
const SHARES = ['none', '1 to 25%', '26 to 50%', '51 to 75%', 'over 75%'];

/** Return the colourings that the data of this map allow; `shared` is for two maps. */
export function colourings(data, number) {
  const map = data.maps[number];
  const list = [];
  if (data.labels) list.push(named('class', 'Class', data.labels, ['(no class)', ...data.classes]));
  if (map.clusters) list.push(named('cluster', 'Cluster', map.clusters, map.clusterNames));
  if (data.split && data.splits.length > 1) list.push(named('split', 'Split', data.split, data.splits));
  if (map.outliers) list.push(ordered('outlier', 'Outlier score', outlierSteps(map.outliers), OUTLIERS));
  if (data.groups) {
    const values = Uint8Array.from(data.groups, (group) => (group ? 1 : 0));
    const counts = count(values, 2);
    list.push({
      key: 'duplicate', label: 'Near duplicates', values, counts, order: [1, 0],
      names: ['no near duplicate', 'near duplicates'],
      colours: (theme) => [REST[theme], CLEAR[theme]],
      rest: (theme) => REST[theme],
    });
  }
  if (data.shared) {
    const steps = Uint8Array.from(data.shared, (common) => Math.ceil((4 * common) / Math.max(1, data.k)));
    const reversed = Uint8Array.from(steps, (step) => 4 - step);
    list.push(ordered('shared', 'Common neighbours', reversed, [...SHARES].reverse()));
  }
  return list;
}
