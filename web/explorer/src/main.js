import { App } from './app.js';
import { readData } from './data.js';
import { listenToKeys } from './keyboard.js';

const byId = (id) => document.getElementById(id);

async function begin() {
  const block = byId('data');
  const data = readData(block.textContent);
  block.textContent = ''; // the text is decoded: free its memory
  const dark = window.matchMedia('(prefers-color-scheme: dark)');
  document.documentElement.dataset.theme = dark.matches ? 'dark' : 'light';
  const app = new App(data);
  byId('colour').append(...app.colourings[0].map(({ key, label }) => new Option(label, key)));
  byId('colour').addEventListener('change', (event) => app.setColouring(event.target.value));
  byId('search').addEventListener('input', (event) => app.search(event.target.value));
  byId('search').addEventListener('keydown', (event) => {
    if (event.key === 'Enter' && app.matches) app.select(app.matches);
  });
  byId('lasso').addEventListener('click', () => app.setLasso(!app.lassoing));
  byId('pictures').addEventListener('click', () => app.setPictures(byId('pictures').getAttribute('aria-pressed') !== 'true'));
  byId('pictures').hidden = !app.thumbnails.any;
  byId('reset').addEventListener('click', () => app.views.forEach(({ map }) => map.reset()));
  byId('theme').addEventListener('click', () => app.setTheme(app.theme() === 'dark' ? 'light' : 'dark'));
  dark.addEventListener('change', () => app.setTheme(dark.matches ? 'dark' : 'light'));
  byId('keys').addEventListener('click', () => byId('help').showModal());
  listenToKeys(app);
  app.panel.showImage(-1);
  app.panel.showSelection([]);
  app.showChanged();
  window.explorer = app; // for the console of the browser
  await app.setTheme(app.theme());
  document.documentElement.dataset.state = 'ready';
}

begin().catch((error) => {
  document.documentElement.dataset.state = 'failed';
  byId('notice').textContent = `The map cannot be drawn: ${error.message}`;
  throw error;
});
