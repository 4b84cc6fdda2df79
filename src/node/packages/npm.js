// Warren's installer for Node.js packages (docs/code.md): `install` runs in a builder, `unpack` in the sandbox of a run.
//
//   npm.js install REGISTRY NAME[@VERSION]...   what it says goes to standard error, the files to standard output, as a tar
//                                               archive. A line of standard input is USER:PASSWORD of the registry,
//                                               percent-encoded; without one it has none
//   npm.js unpack DIRECTORY                     makes the directory of such an archive on standard input, whole or not at all
//
// It speaks the registry's protocol: a document a package, an archive a version with its digest. Nothing of a package runs: no
// install scripts, and none of node-gyp. Only modules of Node's own.
'use strict';
const crypto = require('crypto');
const fs = require('fs');
const path = require('path');
const zlib = require('zlib');

const MAX_PACKAGES = 1000;
const MAX_DOCUMENT = 64 * 1024 * 1024;
const MAX_ARCHIVE = 256 * 1024 * 1024;
const MAX_UNPACKED = 1024 * 1024 * 1024;
const MAX_ENTRIES = 100000;
const REDIRECTS = 5;
const SILENCE_MS = 30000;
const BLOCK = 512;

class Refusal extends Error {}

// ---- Versions (semver.org), and ranges as packages write them ----

function parseVersion(text) {
  const match = /^[v=\s]*(\d+)\.(\d+)\.(\d+)(?:-([0-9A-Za-z.-]+))?(?:\+[0-9A-Za-z.-]+)?$/.exec(text.trim());
  if (!match) return null;
  return { numbers: match.slice(1, 4).map(Number), pre: match[4] ? match[4].split('.') : [] };
}

function compare(a, b) {
  for (let i = 0; i < 3; i++) if (a.numbers[i] !== b.numbers[i]) return a.numbers[i] - b.numbers[i];
  if (!a.pre.length || !b.pre.length) return b.pre.length - a.pre.length;
  for (let i = 0; ; i++) {
    const [x, y] = [a.pre[i], b.pre[i]];
    if (x === undefined || y === undefined) return (x === undefined ? 0 : 1) - (y === undefined ? 0 : 1);
    if (x === y) continue;
    const [nx, ny] = [/^\d+$/.test(x), /^\d+$/.test(y)];
    if (nx && ny) return Number(x) - Number(y);
    if (nx !== ny) return nx ? -1 : 1;
    return x < y ? -1 : 1;
  }
}

// `1`, `1.x`, `1.2.3-a`: the numbers that are said, and the rest.
function parsePartial(text) {
  const match = /^[v=]?(\d+|[xX*])?(?:\.(\d+|[xX*]))?(?:\.(\d+|[xX*]))?(?:-([0-9A-Za-z.-]+))?(?:\+[0-9A-Za-z.-]+)?$/.exec(text);
  if (!match) throw new Refusal(`"${text.slice(0, 64)}" is no version`);
  const said = [];
  for (const part of match.slice(1, 4)) {
    if (part === undefined || /[xX*]/.test(part)) break;
    said.push(Number(part));
  }
  return { said, pre: said.length === 3 && match[4] ? match[4].split('.') : [] };
}

const padded = (said) => [...said, 0, 0, 0].slice(0, 3);
const next = (said, at) => padded(said.slice(0, at + 1).map((n, i) => (i === at ? n + 1 : n)));
const atLeast = (numbers, pre = []) => ({ op: '>=', version: { numbers, pre } });
// A version before all of what would have these numbers.
const below = (numbers) => ({ op: '<', version: { numbers, pre: ['0'] } });

function comparators(op, text) {
  const { said, pre } = parsePartial(text);
  const from = padded(said);
  if (op === '^') {
    if (!said.length) return [];
    let at = from.findIndex((n) => n > 0);
    if (at < 0 || at >= said.length) at = said.length - 1;
    return [atLeast(from, pre), below(next(said, at))];
  }
  if (op === '~' || op === '~>') {
    return said.length ? [atLeast(from, pre), below(next(said, Math.min(1, said.length - 1)))] : [];
  }
  if (said.length === 3) return [{ op: op || '=', version: { numbers: from, pre } }];
  if (!said.length) return op === '<' || op === '>' ? [below([0, 0, 0])] : [];
  const after = next(said, said.length - 1);
  switch (op) {
    case '>': return [atLeast(after)];
    case '>=': return [atLeast(from)];
    case '<': return [below(from)];
    case '<=': return [below(after)];
    default: return [atLeast(from), below(after)];
  }
}

function parseRange(text) {
  return text.split('||').map((part) => {
    const hyphen = /^\s*(\S+)\s+-\s+(\S+)\s*$/.exec(part);
    if (hyphen) return [...comparators('>=', hyphen[1]), ...comparators('<=', hyphen[2])];
    const words = part.trim().replace(/([<>=~^]+)\s+/g, '$1').split(/\s+/).filter(Boolean);
    return words.flatMap((word) => {
      const [, op, version] = /^(\^|~>|~|>=|<=|>|<|=)?(.*)$/.exec(word);
      return comparators(op === '=' ? '' : op, version);
    });
  });
}

function holds({ op, version }, found) {
  const order = compare(found, version);
  return { '>=': order >= 0, '<=': order <= 0, '>': order > 0, '<': order < 0, '=': order === 0 }[op];
}

function satisfies(found, alternatives) {
  return alternatives.some((all) => {
    if (!all.every((each) => holds(each, found))) return false;
    // Versions before a release only where the range names one of that release.
    const names = ({ op, version }) => version.pre.length && !(op === '<' && version.pre.join() === '0')
      && version.numbers.join() === found.numbers.join();
    return !found.pre.length || all.some(names);
  });
}

// The version that a package's document has for what is asked: a tag, an exact version, or the highest of a range.
function choose(document, asked) {
  const versions = document.versions || {};
  const tags = document['dist-tags'] || {};
  const has = (object, key) => Object.prototype.hasOwnProperty.call(object, key);
  if (has(tags, asked)) {
    if (!has(versions, tags[asked])) throw new Refusal(`${document.name}: tag ${asked} is of no version`);
    return tags[asked];
  }
  if (has(versions, asked)) return asked;
  const range = parseRange(asked);
  const fit = Object.keys(versions).map((text) => [text, parseVersion(text)])
    .filter(([, version]) => version && satisfies(version, range));
  // As npm does: what `latest` is, where that fits.
  const latest = fit.find(([text]) => text === tags.latest);
  if (latest) return latest[0];
  const best = fit.sort(([, a], [, b]) => compare(b, a))[0];
  if (!best) throw new Refusal(`no version of ${document.name} is ${asked}`);
  return best[0];
}

// ---- The registry ----

// Who has a login is told it by what has the registry's scheme, host and port, and by nobody else.
let login = { origin: null, header: null };

function takeLogin(registry) {
  const said = fs.readFileSync(0, 'utf8').trim();
  if (!said) return;
  const plain = said.split(/:(.*)/s).slice(0, 2).map(decodeURIComponent).join(':');
  login = { origin: new URL(registry).origin, header: `Basic ${Buffer.from(plain).toString('base64')}` };
}

function get(url, most, accept, redirects = REDIRECTS) {
  return new Promise((resolve, reject) => {
    const target = new URL(url);
    if (target.protocol !== 'https:' && target.protocol !== 'http:') throw new Refusal(`${url} is no address to fetch from`);
    const client = require(target.protocol.slice(0, -1));
    const failed = (error) => reject(error instanceof Refusal ? error : new Refusal(`${url}: ${error.message}`));
    const headers = { accept, 'user-agent': 'warren' };
    if (target.origin === login.origin) headers.authorization = login.header;
    const request = client.get(target, { headers }, (response) => {
      const { statusCode: status, headers } = response;
      if (status >= 300 && status < 400 && headers.location) {
        response.resume();
        if (!redirects) return failed(new Error('too many redirections'));
        const to = new URL(headers.location, target);
        // What was asked for in secret is not fetched in the open.
        if (target.protocol === 'https:' && to.protocol !== 'https:') return failed(new Error('redirects to http'));
        return get(to.href, most, accept, redirects - 1).then(resolve, reject);
      }
      if (status !== 200) {
        response.resume();
        return failed(new Error(status === 404 ? 'is not there (404)' : `status ${status}`));
      }
      const parts = [];
      let size = 0;
      response.on('data', (part) => {
        size += part.length;
        if (size > most) return request.destroy(new Error(`more than ${most} octets`));
        parts.push(part);
      });
      response.on('aborted', () => failed(new Error('ended early')));
      response.on('end', () => resolve(Buffer.concat(parts)));
    });
    request.setTimeout(SILENCE_MS, () => request.destroy(new Error(`no answer within ${SILENCE_MS} ms`)));
    request.on('error', failed);
  });
}

function check(name, octets, dist) {
  const known = /(?:^|\s)(sha512|sha384|sha256)-([A-Za-z0-9+/=]+)/.exec(dist.integrity || '');
  const [algorithm, encoding, expected] = known ? [known[1], 'base64', known[2]] : ['sha1', 'hex', dist.shasum];
  if (!expected) throw new Refusal(`${name}: the registry has no digest of it`);
  const found = crypto.createHash(algorithm).update(octets).digest(encoding);
  if (found !== expected) throw new Refusal(`${name}: its archive has ${algorithm} ${found}, the registry says ${expected}`);
}

// ---- Archives (POSIX ustar, pax) ----

function* entries(octets) {
  let more = {};
  let count = 0;
  const text = (from, length) => octets.toString('utf8', from, from + length).replace(/\0.*$/s, '');
  for (let at = 0; at + BLOCK <= octets.length && octets[at]; ) {
    const size = parseInt(text(at + 124, 12).trim() || '0', 8);
    const kind = String.fromCharCode(octets[at + 156] || 48);
    const start = at + BLOCK;
    if (!Number.isSafeInteger(size) || size < 0 || start + size > octets.length) throw new Refusal('an archive ends early');
    if (++count > MAX_ENTRIES) throw new Refusal(`an archive has more than ${MAX_ENTRIES} files`);
    const content = octets.subarray(start, start + size);
    at = start + Math.ceil(size / BLOCK) * BLOCK;
    if (kind === 'x') {
      for (let from = 0; from < content.length; ) {
        const record = /^(\d+) ([^=]+)=/.exec(content.toString('utf8', from, from + 300));
        const length = record ? Number(record[1]) : 0;
        if (!length || from + length > content.length) throw new Refusal('an archive has a bad extended header');
        more[record[2]] = content.toString('utf8', from + Buffer.byteLength(record[0]), from + length - 1);
        from += length;
      }
      continue;
    }
    if (kind === 'L') {
      more.path = content.toString('utf8').replace(/\0.*$/s, '');
      continue;
    }
    if (kind === 'g') continue;
    const header = start - BLOCK;
    const prefix = octets.toString('latin1', header + 257, header + 262) === 'ustar' ? text(header + 345, 155) : '';
    const name = more.path || (prefix ? `${prefix}/${text(header, 100)}` : text(header, 100));
    yield { name, kind, content, executable: (parseInt(text(header + 100, 8), 8) & 0o100) !== 0 };
    more = {};
  }
}

// A path below the archive's top; `null` for the top itself.
function inside(name) {
  const parts = name.split('/').filter((part) => part !== '' && part !== '.');
  if (name.startsWith('/') || parts.includes('..') || name.includes('\0')) throw new Refusal(`path "${name}" leaves its package`);
  return parts;
}

function field(value, length) {
  return value.toString(8).padStart(length - 1, '0') + '\0';
}

function header(name, size, mode, kind) {
  const block = Buffer.alloc(BLOCK);
  block.write(name, 0, 100, 'utf8');
  block.write(field(mode, 8) + field(0, 8) + field(0, 8) + field(size, 12) + field(0, 12) + ' '.repeat(8) + kind, 100, 'latin1');
  block.write('ustar\0' + '00', 257, 'latin1');
  const sum = block.reduce((total, octet) => total + octet, 0);
  block.write(field(sum, 7) + ' ', 148, 'latin1');
  return block;
}

// As a whole: pipes take what they take.
function writeAll(octets) {
  for (let at = 0; at < octets.length; ) {
    try {
      at += fs.writeSync(1, octets, at);
    } catch (error) {
      if (error.code !== 'EAGAIN') throw error;
      Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, 5);
    }
  }
}

function writeEntry(name, content, mode, kind) {
  const padding = (size) => Buffer.alloc((BLOCK - (size % BLOCK)) % BLOCK);
  if (Buffer.byteLength(name) > 100) {
    const rest = ` path=${name}\n`;
    let length = Buffer.byteLength(rest);
    while (length !== Buffer.byteLength(rest) + String(length).length) length = Buffer.byteLength(rest) + String(length).length;
    const record = Buffer.from(`${length}${rest}`);
    writeAll(Buffer.concat([header('pax', record.length, 0o644, 'x'), record, padding(record.length)]));
  }
  writeAll(Buffer.concat([header(name, content.length, mode, kind), content, padding(content.length)]));
}

// ---- install ----

class Tree {
  constructor(registry) {
    this.registry = registry.endsWith('/') ? registry : `${registry}/`;
    this.documents = new Map();
    this.archives = new Map();
    // By their place: `a`, `a/node_modules/b`.
    this.places = new Map();
    this.unpacked = 0;
  }

  document(name) {
    if (!/^(@[A-Za-z0-9][\w.~-]*\/)?[A-Za-z0-9_][\w.~-]*$/.test(name) || name.length > 214) {
      throw new Refusal(`"${String(name).slice(0, 64)}" is no name of a package`);
    }
    if (!this.documents.has(name)) {
      const url = this.registry + name.replace('/', '%2f');
      const accept = 'application/vnd.npm.install-v1+json; q=1.0, application/json; q=0.8';
      this.documents.set(name, get(url, MAX_DOCUMENT, accept).then((octets) => {
        try {
          return { ...JSON.parse(octets.toString('utf8')), name };
        } catch {
          throw new Refusal(`${url}: is no document of a package`);
        }
      }));
    }
    return this.documents.get(name);
  }

  // What `require(name)` finds in a package at a place.
  found(place, name) {
    for (let at = place; ; ) {
      const there = this.places.get(at ? `${at}/node_modules/${name}` : name);
      if (there || !at) return there;
      const above = at.lastIndexOf('/node_modules/');
      at = above < 0 ? '' : at.slice(0, above);
    }
  }

  // Adds packages at the top, and then what they need: as high as nothing of another version is in the way.
  async add(packages) {
    const queue = packages.map(([name, asked]) => ['', name, asked, false]);
    while (queue.length) {
      const [place, name, asked, optional] = queue.shift();
      let version, document;
      // An alias is another package under this name.
      const alias = /^npm:((?:@[^/]+\/)?[^@]+)(?:@(.*))?$/.exec(asked);
      const [real, range] = alias ? [alias[1], alias[2] || 'latest'] : [name, asked];
      try {
        if (/^[a-z+]+:|\//.test(range)) throw new Refusal(`${name}: "${range}" is not on the registry`);
        document = await this.document(real);
        version = choose(document, range || '*');
      } catch (error) {
        if (optional && error instanceof Refusal) continue;
        throw error;
      }
      const there = this.found(place, name);
      if (there && there.real === real && there.version === version) continue;
      if (there && there.real === real && !/^[A-Za-z]/.test(range) && satisfies(parseVersion(there.version), parseRange(range || '*'))) continue;
      const at = there && place ? `${place}/node_modules/${name}` : name;
      if (this.places.has(at) && optional) continue;
      if (this.places.has(at)) throw new Refusal(`${name}: ${this.places.get(at).version} and ${version} are asked for`);
      if (this.places.size >= MAX_PACKAGES) throw new Refusal(`more than ${MAX_PACKAGES} packages`);
      const manifest = document.versions[version];
      if (optional && !fitsHere(manifest)) continue;
      this.places.set(at, { name, real, version, dist: manifest.dist || {} });
      const optionals = manifest.optionalDependencies || {};
      const peers = Object.entries(manifest.peerDependencies || {})
        .filter(([peer]) => !((manifest.peerDependenciesMeta || {})[peer] || {}).optional);
      for (const [other, range] of Object.entries(manifest.dependencies || {})) {
        if (!(other in optionals)) queue.push([at, other, String(range), false]);
      }
      for (const [other, range] of Object.entries(optionals)) queue.push([at, other, String(range), true]);
      // Beside it, where it looks for those.
      for (const [other, range] of peers) queue.push(['', other, String(range), true]);
    }
  }

  archive({ real, version, dist }) {
    const key = `${real}@${version}`;
    if (!this.archives.has(key)) {
      if (typeof dist.tarball !== 'string') throw new Refusal(`${key}: the registry has no archive of it`);
      this.archives.set(key, get(dist.tarball, MAX_ARCHIVE, '*/*').then((octets) => {
        check(key, octets, dist);
        return octets;
      }));
    }
    return this.archives.get(key);
  }

  async write() {
    const directories = new Set();
    const directory = (parts) => {
      for (let n = 1; n <= parts.length; n++) {
        const name = `${parts.slice(0, n).join('/')}/`;
        if (!directories.has(name)) writeEntry(name, Buffer.alloc(0), 0o755, '5');
        directories.add(name);
      }
    };
    for (const [place, found] of [...this.places].sort()) {
      process.stderr.write(`${found.real} ${found.version}\n`);
      const packed = await this.archive(found);
      let plain;
      try {
        plain = zlib.gunzipSync(packed, { maxOutputLength: MAX_UNPACKED - this.unpacked });
      } catch (error) {
        throw new Refusal(`${found.real}: its archive cannot be unpacked: ${error.message}`);
      }
      this.unpacked += plain.length;
      const top = place.split('/');
      directory(top);
      const files = new Map();
      for (const entry of entries(plain)) {
        // The first part is whatever its packer called it.
        const parts = inside(entry.name).slice(1);
        if (entry.kind === '0' && parts.length) files.set(parts.join('/'), entry);
      }
      for (const [name, { content, executable }] of files) {
        const parts = [...top, ...name.split('/')];
        directory(parts.slice(0, -1));
        writeEntry(parts.join('/'), content, executable ? 0o755 : 0o644, '0');
      }
      this.archives.delete(`${found.real}@${found.version}`);
    }
    // What `import` of code outside looks for packages through: it does not heed NODE_PATH (runner.js).
    const through = Buffer.from('export const load = (name) => import(name);\n');
    writeEntry('.import.mjs', through, 0o644, '0');
    writeAll(Buffer.alloc(2 * BLOCK));
  }
}

// Packages with native parts have one for each kind of machine, as optional ones.
function fitsHere({ os, cpu, libc }) {
  const fits = (list, own) => !Array.isArray(list) || !list.length
    || (!list.includes(`!${own}`) && (list.includes(own) || list.every((each) => String(each).startsWith('!'))));
  return fits(os, process.platform) && fits(cpu, process.arch) && fits(libc, 'glibc');
}

async function install(registry, packages) {
  takeLogin(registry);
  const tree = new Tree(registry);
  await tree.add(packages.map((wanted) => {
    const at = wanted.indexOf('@', 1);
    return at < 0 ? [wanted, 'latest'] : [wanted.slice(0, at), wanted.slice(at + 1)];
  }));
  await tree.write();
}

// ---- unpack ----

function unpack(directory) {
  process.umask(0o022);
  const parts = [];
  const chunk = Buffer.alloc(1 << 20);
  for (;;) {
    let got;
    try {
      got = fs.readSync(0, chunk);
    } catch (error) {
      if (error.code === 'EAGAIN') {
        Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, 5);
        continue;
      }
      throw error;
    }
    if (!got) break;
    parts.push(Buffer.from(chunk.subarray(0, got)));
  }
  fs.mkdirSync(path.dirname(directory), { recursive: true });
  const own = fs.mkdtempSync(`${directory}.`);
  try {
    for (const { name, kind, content, executable } of entries(Buffer.concat(parts))) {
      const place = path.join(own, ...inside(name));
      if (kind === '5') fs.mkdirSync(place, { recursive: true });
      else if (kind === '0') fs.writeFileSync(place, content, { mode: executable ? 0o755 : 0o644, flag: 'wx' });
      else throw new Refusal(`"${name}" is no file of a package`);
    }
    fs.chmodSync(own, 0o755);
    fs.renameSync(own, directory);
  } catch (error) {
    // Another run may have been faster.
    fs.rmSync(own, { recursive: true, force: true });
    if (!fs.existsSync(directory)) throw error;
  }
}

async function main() {
  const [verb, ...rest] = process.argv.slice(2);
  try {
    if (verb === 'install') await install(rest[0], rest.slice(1));
    else unpack(rest[0]);
  } catch (error) {
    const full = error.code === 'ENOSPC' || error.code === 'EDQUOT';
    const said = error instanceof Refusal ? error.message : error.stack;
    process.stderr.write(full ? "NO_CAPACITY: the sandbox's disk is full\n" : `${said}\n`);
    process.exitCode = 1;
  }
}

if (require.main === module) main();
else module.exports = { choose, compare, parseRange, parseVersion, satisfies };
