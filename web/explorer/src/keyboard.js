// Keys of the page; the dialog of the page lists them.

const step = 0.15;

export function listenToKeys(app) {
  const help = document.getElementById('help');
  const search = document.getElementById('search');
  const colour = document.getElementById('colour');
  const each = (action) => app.views.forEach(({ map }) => action(map));
  const next = (move) => {
    const near = app.focused < 0 ? [0] : app.data.neighbours(0, app.focused);
    if (move > 0 || app.focused < 0) app.trail = [...(app.trail ?? []), app.focused];
    const target = move > 0 || app.focused < 0 ? near[0] : app.trail?.pop();
    if (target !== undefined && target >= 0) app.focus(target);
  };
  const keys = {
    ArrowLeft: () => each((map) => map.pan(-step, 0)),
    ArrowRight: () => each((map) => map.pan(step, 0)),
    ArrowUp: () => each((map) => map.pan(0, step)),
    ArrowDown: () => each((map) => map.pan(0, -step)),
    '+': () => each((map) => map.zoom(0.8)),
    '=': () => each((map) => map.zoom(0.8)),
    '-': () => each((map) => map.zoom(1.25)),
    0: () => each((map) => map.reset()),
    z: () => app.zoomTo(),
    l: () => app.setLasso(!app.lassoing),
    p: () => document.getElementById('pictures').click(),
    c: () => {
      colour.selectedIndex = (colour.selectedIndex + 1) % colour.options.length;
      app.setColouring(colour.value);
    },
    d: () => document.getElementById('theme').click(),
    e: () => app.exportSelection(),
    n: () => next(1),
    b: () => next(-1),
    '/': () => search.focus(),
    '?': () => (help.open ? help.close() : help.showModal()),
    Escape: () => {
      if (app.lassoing) app.setLasso(false);
      else if (app.focused >= 0) app.focus(-1);
      else app.select([]);
    },
  };
  document.addEventListener('keydown', (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || help.open) return;
    const inField = event.target.matches('input, select, textarea');
    if (inField) {
      if (event.key === 'Escape') event.target.blur();
      return;
    }
    const action = keys[event.key];
    if (!action) return;
    if (event.target.matches('#panel, #panel *') && event.key.startsWith('Arrow')) return; // scrolls the panel
    event.preventDefault();
    action();
  });
}
