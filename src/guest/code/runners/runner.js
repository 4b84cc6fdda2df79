// Warren's runner for Node.js (docs/code.md): runs what comes on descriptor 3 in one realm, and says on descriptor 4 what
// it came to. Only modules of Node's own.
'use strict';
const fs = require('fs');
const net = require('net');
const util = require('util');
const vm = require('vm');
const { createRequire } = require('module');
const path = require('path');

const TEXT_MAX = 1024 * 1024;
const FORM_MAX = 16 * 1024 * 1024;
const FORMS = [
  ['text/html', '_repr_html_'], ['text/markdown', '_repr_markdown_'], ['image/svg+xml', '_repr_svg_'],
  ['image/png', '_repr_png_'], ['image/jpeg', '_repr_jpeg_'], ['application/json', '_repr_json_'],
];
const { stringify } = JSON;
const write = fs.writeSync.bind(fs);

function cut(text) {
  return text.length <= TEXT_MAX ? text : text.slice(0, TEXT_MAX) + '…';
}

function formsOf(value) {
  const forms = {};
  try {
    forms['text/plain'] = cut(util.inspect(value));
  } catch {
    forms['text/plain'] = `<${typeof value}>`;
  }
  if (value === null || (typeof value !== 'object' && typeof value !== 'function')) return forms;
  for (const [media, method] of FORMS) {
    try {
      if (typeof value[method] !== 'function') continue;
      let content = value[method]();
      if (content instanceof Uint8Array) content = Buffer.from(content).toString('base64');
      else if (media === 'application/json') content = stringify(content);
      if (typeof content === 'string' && content.length <= FORM_MAX) forms[media] = content;
    } catch {
      // A broken method loses its form only.
    }
  }
  return forms;
}

function say(message) {
  const octets = Buffer.from(stringify(message) + '\n');
  try {
    for (let at = 0; at < octets.length;) at += write(4, octets, at);
  } catch {
    // The code has closed it.
  }
}

function fail(error) {
  let name = 'Error', value = '', text = '';
  try {
    if (error instanceof Error || (error && typeof error.stack === 'string')) {
      name = error.code === 'ERR_SCRIPT_EXECUTION_INTERRUPTED' ? 'Interrupted' : String(error.name);
      value = String(error.message);
      // Frames of Node's and of this file are not the code's.
      const own = (line) => !/^\s+at .*\bnode:/.test(line) && !line.includes(__filename);
      text = String(error.stack).split('\n').filter(own).join('\n') + '\n';
    } else {
      value = text = util.inspect(error);
    }
  } catch {
    // Whatever it is, it is an error.
  }
  say({ type: 'error', name: cut(name), value: cut(value), traceback: cut(text) });
}

let count = 0;
let interrupt = null;
const interrupted = () => Object.assign(new Error('interrupted'), { name: 'Interrupted', interrupted: true });

// NODE_PATH holds for `require` alone; directories in it that Warren has made have a module that imports from within.
async function load(name) {
  if (name.startsWith('.')) return import(path.resolve(name));
  try {
    return await import(name);
  } catch (error) {
    if (error.code !== 'ERR_MODULE_NOT_FOUND') throw error;
    const places = (process.env.NODE_PATH || '').split(':').filter(Boolean).map((place) => path.join(place, '.import.mjs'));
    const place = places.find((place) => fs.existsSync(place));
    if (!place) throw error;
    return (await import(place)).load(name);
  }
}

async function evaluate(source) {
  count += 1;
  const filename = `<run ${count}>`;
  const options = { filename, importModuleDynamically: load };
  let script;
  try {
    script = new vm.Script(source, options);
  } catch (error) {
    if (!(error instanceof SyntaxError) || !/\bawait\b/.test(source)) throw error;
    // `await` at the top: as the body of a function, whose names are its own.
    script = new vm.Script(`(async () => {${source}\n})()`, options);
  }
  const stop = new Promise((_, reject) => { interrupt = () => reject(interrupted()); });
  stop.catch(() => {});
  let value = script.runInThisContext({ breakOnSigint: true });
  if (value instanceof Promise) value = await Promise.race([value, stop]);
  if (value !== undefined) {
    globalThis._ = value;
    say({ type: 'value', forms: formsOf(value) });
  }
}

async function run(source) {
  try {
    await evaluate(source);
    return typeof process.exitCode === 'number' ? process.exitCode & 255 : 0;
  } catch (error) {
    fail(error);
    return error && (error.interrupted || error.code === 'ERR_SCRIPT_EXECUTION_INTERRUPTED') ? 130 : 1;
  } finally {
    interrupt = null;
    process.exitCode = undefined;
  }
}

globalThis.require = createRequire(path.join(process.cwd(), 'run.js'));
globalThis.display = (...values) => values.forEach((value) => say({ type: 'display', forms: formsOf(value) }));
process.argv.splice(1);
process.on('SIGINT', () => interrupt?.());

const control = new net.Socket({ fd: 3 });
let buffered = Buffer.alloc(0);
let busy = false;
let last = null;

function next() {
  if (busy) return;
  const end = buffered.indexOf(10);
  if (end < 0) return;
  const [, id, length, mode] = buffered.toString('latin1', 0, end).split(' ');
  const start = end + 1;
  if (buffered.length < start + Number(length)) return;
  const source = buffered.toString('utf8', start, start + Number(length));
  buffered = buffered.subarray(start + Number(length));
  busy = true;
  run(source).then((code) => {
    busy = false;
    if (mode === 'keep') {
      control.write(`done ${id} ${code}\n`);
      next();
    } else {
      // As a program: it ends when nothing more is to come.
      last = { id, code };
      control.unref();
    }
  });
}

function finish(code) {
  const { id } = last;
  last = null;
  try {
    write(3, `done ${id} ${code}\n`);
  } catch {
    // The exit code says the same.
  }
  process.exit(code);
}

// An error that nobody awaits ends a program; a context goes on.
function stray(error) {
  fail(error);
  if (last) finish(1);
  else if (busy) interrupt?.();
}
process.on('uncaughtException', stray);
process.on('unhandledRejection', stray);
process.on('beforeExit', () => { if (last) finish(last.code); });
control.on('data', (octets) => {
  buffered = Buffer.concat([buffered, octets]);
  next();
});
control.on('end', () => process.exit(0));
control.on('error', () => process.exit(0));
