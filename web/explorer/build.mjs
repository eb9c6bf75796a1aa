// Bundle src/ and its libraries into one file of the Python package, with the licences of what is in it and a sha256.

import { createHash } from 'node:crypto';
import { readdirSync, readFileSync, writeFileSync } from 'node:fs';
import { build } from 'esbuild';

const target = new URL('../../src/inbatch/apps/reports/explorer/', import.meta.url);

const { metafile, outputFiles } = await build({
  entryPoints: ['src/main.js'], bundle: true, minify: true, format: 'iife', target: 'es2022', charset: 'ascii',
  legalComments: 'none', metafile: true, write: false,
});
// The bundle becomes the content of a script element: no text may close it.
const script = outputFiles[0].text.replaceAll('</script', '<\\/script').replaceAll('<!--', '<\\!--');
writeFileSync(new URL('explorer.js', target), script);
writeFileSync(new URL('explorer.js.sha256', target), `${createHash('sha256').update(script).digest('hex')}  explorer.js\n`);

// regl-scatterplot is published as a bundle of its own dependencies, all of which package.json lists.
const packages = Object.keys(JSON.parse(readFileSync('package.json', 'utf8')).dependencies).sort();
const unlisted = Object.keys(metafile.inputs).map((input) => input.match(/(?:^|\/)node_modules\/((?:@[^/]+\/)?[^/]+)\//)?.[1])
  .filter((name) => name && !packages.includes(name));
if (unlisted.length) throw new Error(`package.json does not list ${unlisted.join(', ')}`);
const licences = packages.map((name) => {
  const folder = `node_modules/${name}`;
  const { version, license, homepage, repository } = JSON.parse(readFileSync(`${folder}/package.json`, 'utf8'));
  const file = readdirSync(folder).find((entry) => /^licen[cs]e/i.test(entry));
  if (!file) throw new Error(`${name} has no licence file`);
  const where = homepage ?? repository?.url ?? '';
  const text = readFileSync(`${folder}/${file}`, 'utf8').trim();
  return `${name} ${version} (${license})\n${where}\n\n${text}\n`;
});
const head = 'explorer.js contains these packages:\n\n';
licences.push(readFileSync('copied-licences.txt', 'utf8'));
writeFileSync(new URL('LICENCES.txt', target), head + licences.join(`\n${'-'.repeat(80)}\n\n`));
console.log(`${script.length} bytes; packages: ${packages.join(', ')}`);
