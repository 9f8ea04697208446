// Runs in every warm Node.js of the worker, before the code of a function; see nodejs.rs.
//
// Node.js was started as `node index.js`, and loads this file as a preload module (`--require`), just before
// it loads index.js. So there are two ways on from here. In script mode this module ends, and Node.js runs
// index.js by itself. Nothing of this file is left then. In handler mode it takes the place of the main
// program, and serves events until the worker closes the control socket. For the frames see control.rs.
'use strict';

const fs = require('node:fs');
const Module = require('node:module');

const CONTROL = 3;
// Longest frame, without its length. The same number as in control.rs.
const FRAME_BYTES_MAX = 16 << 20;
// Longest text of an error, because a message may contain any data. Of a longer one, both ends are kept.
const ERROR_CHARS_MAX = 256 * 1024;

function readFully(buffer) {
  for (let at = 0; at < buffer.length; ) {
    const read = fs.readSync(CONTROL, buffer, at, buffer.length - at);
    if (read === 0) return false;
    at += read;
  }
  return true;
}

// The first frame, or `null` if the worker has closed the socket.
function firstFrame() {
  const length = Buffer.alloc(4);
  if (!readFully(length)) return null;
  const body = Buffer.alloc(length.readUInt32BE(0));
  return readFully(body) ? JSON.parse(body.toString()) : null;
}

function framed(text) {
  const length = Buffer.byteLength(text);
  const frame = Buffer.allocUnsafe(4 + length);
  frame.writeUInt32BE(length, 0);
  frame.write(text, 4);
  return frame;
}

function errorFrame(is, text, ms) {
  if (text.length > ERROR_CHARS_MAX) {
    text = `${text.slice(0, ERROR_CHARS_MAX / 2)} […] ${text.slice(-ERROR_CHARS_MAX / 2)}`;
  }
  // A lone surrogate cannot be sent. A Buffer replaces it.
  const error = Buffer.from(text).toString();
  return framed(JSON.stringify({ is, error, ms }));
}

function elapsed(began) {
  return Number((performance.now() - began).toFixed(3));
}

function sendNow(frame) {
  for (let at = 0; at < frame.length; ) at += fs.writeSync(CONTROL, frame, at);
}

// Undoes what brought this file here, so that the process looks as if it had none.
function leaveNoTrace() {
  fs.closeSync(0);
  fs.openSync('/dev/null', 'r'); // Gets the lowest free number, which is 0.
  delete require.cache[__filename];
  for (const [key, file] of Object.entries(Module._pathCache)) {
    if (file === __filename) delete Module._pathCache[key];
  }
}

function setEnvironment(env) {
  // The heap limit is an argument where no process was warm, and child processes inherit it.
  const heap = /--max-old-space-size=\d+$/.exec(process.env.NODE_OPTIONS);
  if (heap !== null) process.execArgv.push(heap[0]);
  for (const name of Object.keys(process.env)) delete process.env[name];
  Object.assign(process.env, env);
}

// What a handler gets beside its event.
class Context {
  constructor(members) {
    Object.assign(this, members);
  }

  // The time until the run is stopped, in milliseconds.
  remainingTimeMs() {
    return Math.max(0, this.deadlineMs - Date.now());
  }

  // The names of AWS Lambda, so that its handlers run unchanged.
  getRemainingTimeInMillis() {
    return this.remainingTimeMs();
  }

  get awsRequestId() {
    return this.requestId;
  }

  get functionName() {
    return this.functionId;
  }

  get memoryLimitInMB() {
    return this.memoryMb;
  }
}

// The handler cannot be used. The text is for the owner of the function.
class HandlerError extends Error {}

// The lines of a stack before the first frame of this file.
function beforeOurs(stack) {
  const lines = stack.split('\n');
  const at = lines.findIndex((line) => line.startsWith('    at ') && line.includes(__filename));
  return at < 0 ? lines : lines.slice(0, at);
}

// Removes the frames of this file and of its callers from an error and its causes.
function trim(error, depth = 0) {
  if (!(error instanceof Error) || depth > 8) return;
  if (typeof error.stack === 'string') error.stack = beforeOurs(error.stack).join('\n');
  trim(error.cause, depth + 1);
  if (Array.isArray(error.errors)) error.errors.forEach((inner) => trim(inner, depth + 1));
}

// What Node.js would print for an uncaught error.
function described(error) {
  if (error instanceof HandlerError) return error.message;
  try {
    trim(error);
  } catch {
    // It is frozen, or its members throw.
  }
  try {
    const text = require('node:util').inspect(error);
    return error instanceof Error ? `${text}\n` : `Uncaught ${text}\n`;
  } catch {
    return 'an error that cannot be shown\n';
  }
}

function isEsModule(file, root) {
  if (!file.endsWith('.js')) return file.endsWith('.mjs');
  const path = require('node:path');
  for (let dir = path.dirname(file); ; dir = path.dirname(dir)) {
    try {
      return JSON.parse(fs.readFileSync(path.join(dir, 'package.json'), 'utf8')).type === 'module';
    } catch (error) {
      if (error.code !== 'ENOENT') return false;
    }
    if (dir === root || dir === path.dirname(dir)) return false;
  }
}

async function findHandler(name, root) {
  const path = require('node:path');
  const at = name.lastIndexOf('.');
  const wanted = name.slice(at + 1);
  const module = name.slice(0, at).replaceAll('.', '/');
  const files = ['.js', '.cjs', '.mjs'].map((ending) => module + ending);
  const found = files.find((file) => fs.existsSync(path.join(root, file)));
  if (found === undefined) {
    throw new HandlerError(`the handler is ${name}, but the code has none of ${files.join(', ')}`);
  }
  const file = path.join(root, found);
  const exported = isEsModule(file, root)
    ? await import(require('node:url').pathToFileURL(file).href)
    : Module.createRequire(file)(file);
  const handler = exported?.[wanted] ?? exported?.default?.[wanted];
  if (typeof handler === 'function') return handler;
  // `module.exports = function …` and `export default function …`
  for (const only of [exported, exported?.default]) {
    if (typeof only === 'function' && (wanted === 'handler' || wanted === only.name)) return only;
  }
  const names = Object.keys(exported ?? {}).filter((key) => typeof exported[key] === 'function');
  const problem = handler === undefined ? 'does not exist' : 'is not a function';
  throw new HandlerError(
    `the handler is ${name}, but ${wanted} ${problem} in the exports of ${found}; ` +
      `their functions are: ${names.join(', ') || 'none'}`,
  );
}

// Waits until what was printed is in the pipes. Without a full pipe, it is there already.
function flushed() {
  const full = [process.stdout, process.stderr].filter((stream) => stream.writableLength > 0);
  if (full.length === 0) return null;
  // An error means that nobody reads any more.
  return Promise.all(full.map((stream) => new Promise((resolve) => stream.write('', resolve))));
}

function valueFrame(value, ms) {
  let why;
  try {
    const json = value === undefined ? 'null' : JSON.stringify(value);
    if (json === undefined) {
      why = `it is a ${typeof value}`;
    } else {
      const frame = framed(`{"is":"value","value":${json},"ms":${ms}}`);
      if (frame.length <= FRAME_BYTES_MAX) return frame;
      why = `it has ${frame.length} bytes, more than ${FRAME_BYTES_MAX}`;
    }
  } catch (error) {
    why = error instanceof Error ? error.message : String(error);
  }
  return errorFrame('error', `the handler returned a value that cannot be written as JSON: ${why}`, ms);
}

// Reads frames from the chunks of the socket.
class FrameReader {
  #rest = [];
  #length = 0;

  // Returns the body of the next complete frame. `chunk` is not used after this call.
  push(chunk) {
    if (this.#length === 0 && chunk.length >= 4 && chunk.length === 4 + chunk.readUInt32BE(0)) {
      return chunk.toString('utf8', 4);
    }
    this.#rest.push(Buffer.from(chunk));
    this.#length += chunk.length;
    if (this.#length < 4) return null;
    if (this.#rest[0].length < 4) this.#rest = [Buffer.concat(this.#rest)];
    // The worker sends one frame, and waits for the answer.
    if (this.#length < 4 + this.#rest[0].readUInt32BE(0)) return null;
    const frame = Buffer.concat(this.#rest);
    this.#rest = [];
    this.#length = 0;
    return frame.toString('utf8', 4);
  }
}

// Calls the handler for one event after the other.
class HandlerServer {
  #handler;
  #socket;
  #frames = new FrameReader();
  // When the event arrived that has no answer yet. `null`: there is none.
  #began = null;
  #isLoaded = false;

  async start(name, root) {
    process.on('exit', (code) => this.#exiting(code));
    process.on('beforeExit', () => this.#idle());
    // Runs before Node.js prints the error, and changes nothing else.
    process.on('uncaughtExceptionMonitor', described);
    const began = performance.now();
    try {
      this.#handler = await findHandler(name, root);
    } catch (error) {
      await flushed();
      this.#fail(described(error));
    }
    await flushed();
    this.#isLoaded = true;
    sendNow(framed(`{"is":"loaded","ms":${elapsed(began)}}`));
    this.#listen();
  }

  #fail(text) {
    this.#isLoaded = true;
    sendNow(errorFrame('failed', text));
    process.exit(1);
  }

  #listen() {
    const { Socket } = require('node:net');
    const onread = {
      buffer: Buffer.allocUnsafeSlow(64 * 1024),
      callback: (length, buffer) => {
        const text = this.#frames.push(buffer.subarray(0, length));
        if (text !== null) this.#serve(JSON.parse(text));
        return true;
      },
    };
    this.#socket = new Socket({ fd: CONTROL, readable: true, writable: true, onread });
    // Otherwise the end and errors mean the same: the worker does not need this process any more.
    this.#socket.on('end', () => process.exit(0));
    this.#socket.on('error', () => process.exit(0));
    this.#socket.resume();
  }

  #serve({ event, env, context }) {
    Object.assign(process.env, env);
    this.#began = performance.now();
    // Without it, Node.js notices that nothing is left to wait for; see #idle.
    this.#socket.unref();
    let value;
    try {
      value = this.#handler.call(undefined, event, new Context(context));
      if (typeof value?.then === 'function') {
        Promise.resolve(value).then(
          (value) => this.#answer((ms) => valueFrame(value, ms)),
          (error) => this.#answer((ms) => errorFrame('error', described(error), ms)),
        );
        return;
      }
    } catch (error) {
      this.#answer((ms) => errorFrame('error', described(error), ms));
      return;
    }
    this.#answer((ms) => valueFrame(value, ms));
  }

  #answer(make) {
    if (this.#began === null) return;
    const frame = make(elapsed(this.#began));
    this.#began = null;
    this.#socket.ref();
    const waiting = flushed();
    if (waiting === null) this.#socket.write(frame);
    else waiting.then(() => this.#socket.write(frame));
  }

  // Node.js has nothing left to wait for.
  #idle() {
    if (!this.#isLoaded) {
      this.#fail('the module was never loaded: nothing is left that its top-level await could wait for\n');
    }
    if (this.#began === null) return;
    const text = 'the promise of the handler was never settled, and nothing is left that could settle it\n';
    this.#answer((ms) => errorFrame('error', text, ms));
  }

  // The process ends, by process.exit() or an uncaught error. Node.js prints the latter itself.
  #exiting(code) {
    if (this.#isLoaded && this.#began === null) return;
    // The first frame is this method.
    const frames = new Error().stack.split('\n').slice(2);
    const at = frames.findIndex((line) => line.includes('process.exit'));
    const how = at < 0 ? 'the process exited' : 'the function called process.exit';
    const where = at < 0 ? [] : beforeOurs(frames.slice(at + 1).join('\n'));
    const text = [`${how} with exit code ${code}`, ...where].join('\n').trimEnd();
    const [is, ms] = this.#isLoaded ? ['error', elapsed(this.#began)] : ['failed', undefined];
    this.#began = null;
    this.#isLoaded = true;
    try {
      sendNow(errorFrame(is, `${text}\n`, ms));
    } catch {
      // The function has closed the socket.
    }
  }
}

function main() {
  // Takes milliseconds, and nearly every function prints.
  void process.stdout;
  void process.stderr;
  const frame = firstFrame();
  if (frame === null) process.exit(0);
  leaveNoTrace();
  setEnvironment(frame.env);
  if (frame.do === 'script') {
    sendNow(framed('{"is":"taken"}'));
    fs.closeSync(CONTROL);
    return;
  }
  // Node.js calls this to start the main program.
  const { runMain } = Module;
  Module.runMain = function () {
    Module.runMain = runMain;
    void new HandlerServer().start(frame.handler, process.cwd());
  };
}

// In a worker thread, this module is `/dev/null`.
main();
