// The legend: one button per category; a click shows only this category, with Shift or Ctrl several.

export function drawLegend(list, colouring, theme, chosen, onChoose) {
  const colours = colouring.colours(theme, chosen);
  list.replaceChildren(...colouring.order.map((category) => {
    const item = document.createElement('li');
    const button = document.createElement('button');
    const swatch = document.createElement('span');
    swatch.className = 'swatch';
    swatch.style.background = colours[category];
    const name = document.createElement('span');
    name.className = 'name';
    name.textContent = colouring.names[category];
    const count = document.createElement('span');
    count.className = 'count';
    count.textContent = colouring.counts[category].toLocaleString('en');
    const pressed = chosen.has(category);
    button.type = 'button';
    button.setAttribute('aria-pressed', String(pressed));
    button.title = pressed ? 'Show all images' : 'Show only these images (with Shift: in addition)';
    button.append(swatch, name, count);
    button.addEventListener('click', (event) => {
      const several = event.shiftKey || event.ctrlKey || event.metaKey;
      const next = new Set(several ? chosen : []);
      if (pressed) next.delete(category);
      else next.add(category);
      onChoose(next);
    });
    item.append(button);
    return item;
  }));
}
