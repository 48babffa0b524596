// The server's HTTP interface and one session's socket. Knows messages and reconnecting, nothing of the screen.

const PROTOCOL = "causalreel.v1";
const LONGEST_WAIT_MS = 8000;
const TAKEN_OVER = 4001; // close code: another viewer of the session

export class Problem extends Error {
  constructor(message, status = 0, code = "") {
    super(message);
    this.status = status;
    this.code = code;
  }
}

/** Requests relative to the page, so that the page works below any path of a proxy. */
export class Api {
  constructor(token = "") {
    this.base = new URL("v1/", document.baseURI);
    this.token = token;
  }

  async call(method, path, body) {
    const headers = { Accept: "application/json" };
    if (this.token) headers.Authorization = `Bearer ${this.token}`;
    const isForm = body instanceof FormData; // its type names a boundary, which the browser makes
    if (body !== undefined && !isForm) headers["Content-Type"] = "application/json";
    const content = typeof body === "string" || body === undefined || isForm ? body : JSON.stringify(body);
    let answer;
    try {
      answer = await fetch(new URL(path, this.base), {
        method, headers, body: content, cache: "no-store",
      });
    } catch {
      throw new Problem("The server cannot be reached.");
    }
    const text = await answer.text();
    let value = null;
    try {
      value = text ? JSON.parse(text) : null;
    } catch {
      // an answer from something in between, such as a proxy's error page
    }
    if (!answer.ok) {
      const error = value?.error ?? {};
      throw new Problem(error.message ?? `The server answered ${answer.status}.`, answer.status, error.code ?? "");
    }
    return value;
  }

  ready() { return this.call("GET", "../readyz"); }
  model() { return this.call("GET", "model"); }
  replay(text) { return this.call("POST", "sessions/replay", text); }
  create(options) { return this.call("POST", "sessions", options); }
  look(id) { return this.call("GET", `sessions/${encodeURIComponent(id)}`); }
  end(id) { return this.call("DELETE", `sessions/${encodeURIComponent(id)}`); }
  record(id) { return this.call("GET", `sessions/${encodeURIComponent(id)}/record`); }

  socket(id, query) {
    const url = new URL(`sessions/${encodeURIComponent(id)}/stream`, this.base);
    url.protocol = url.protocol === "https:" ? "wss:" : "ws:";
    url.search = new URLSearchParams(query).toString();
    // A browser's socket carries no Authorization header; a subprotocol stays out of logs and histories, a query not.
    const offered = this.token ? [PROTOCOL, `bearer.${base64url(this.token)}`] : [PROTOCOL];
    const socket = new WebSocket(url, offered);
    socket.binaryType = "arraybuffer";
    return socket;
  }
}

/** One binary message: 4 bytes of length, a JSON header, then the payloads back to back -> {header, parts}. */
export function unpack(buffer) {
  const length = new DataView(buffer).getUint32(0);
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, length)));
  let at = 4 + length;
  const parts = header.sizes.map((size) => {
    const part = new Uint8Array(buffer, at, size);
    at += size;
    return part;
  });
  return { header, parts };
}

/**
 * A session's stream that survives dropped connections: it asks again for what comes after the last chunk it got.
 * `on` holds the callbacks hello, chunk, state, ended, error, link(kind, text), lost and taken.
 */
export class Stream {
  constructor(api, id, query, on) {
    Object.assign(this, { api, id, query, on });
    this.after = -1;
    this.tries = 0;
    this.next = 1;
    this.waiting = new Map();
    this.isOver = false;
    this.timer = 0;
  }

  open() {
    clearTimeout(this.timer);
    const socket = this.api.socket(this.id, { ...this.query, after: this.after });
    this.socket = socket;
    socket.onmessage = (event) => { if (socket === this.socket) this.take(event.data); };
    socket.onclose = (event) => { if (socket === this.socket) this.dropped(event.code); };
  }

  /** Open anew with other query parameters, such as another format; nothing is lost or repeated. */
  change(query) {
    this.query = query;
    const old = this.socket;
    this.socket = null;
    old?.close();
    this.fail("The connection was opened anew.");
    this.open();
  }

  take(data) {
    if (typeof data !== "string") {
      const { header, parts } = unpack(data);
      this.tries = 0; // chunks are the proof that it works; a greeting is not
      if (header.sequence <= this.after) return;
      this.after = header.sequence;
      this.on.chunk(header, parts);
      return;
    }
    const message = JSON.parse(data);
    const known = this.waiting.get(message.id);
    if (message.type === "ack" && known) {
      this.waiting.delete(message.id);
      known.resolve(message.number);
    } else if (message.type === "error" && known) {
      this.waiting.delete(message.id);
      known.reject(new Problem(message.message, 400, message.code ?? ""));
    } else if (message.type === "error" && message.code === "lost") {
      this.skip(message.after);
    } else if (message.type === "ended") {
      this.stop();
      this.on.ended(message.reason, message.is_error);
    } else if (["hello", "state", "error"].includes(message.type)) {
      this.on[message.type](message);
    }
  }

  /** The chunk after our last is gone from the server's buffer: go on where the server says one can. */
  skip(after) {
    const old = this.socket;
    this.socket = null;
    old?.close();
    this.fail("The connection was opened anew.");
    this.after = after;
    this.on.lost();
    this.timer = setTimeout(() => this.open(), 100);
  }

  async dropped(code) {
    this.fail("The connection dropped before the server answered.");
    if (this.isOver) return;
    if (code === TAKEN_OVER) {
      this.stop();
      this.on.taken();
      return;
    }
    this.on.link("wait", "Reconnecting");
    if (!(await this.isThere()) || this.isOver) return;
    const wait = Math.min(LONGEST_WAIT_MS, 250 * 2 ** this.tries++);
    this.timer = setTimeout(() => this.open(), wait);
  }

  /** Whether the server still has the session; if not, it is over. Keeps asking while the server is away. */
  async isThere() {
    for (;;) {
      try {
        await this.api.look(this.id);
        return true;
      } catch (problem) {
        if (this.isOver) return false;
        if (problem.status >= 400 && problem.status < 500 && problem.status !== 429) {
          this.stop();
          const gone = problem.status === 404 ? "The server no longer knows this session." : problem.message;
          this.on.ended(gone, true, problem.status);
          return false;
        }
        this.on.link("down", "No connection, trying again");
        await new Promise((done) => setTimeout(done, Math.min(LONGEST_WAIT_MS, 500 * 2 ** this.tries++)));
      }
    }
  }

  /** Send a command; resolves to its number when the server took it, rejects with the reason when it did not. */
  command(name, values = {}) {
    if (this.socket?.readyState !== WebSocket.OPEN) {
      return Promise.reject(new Problem("There is no connection at the moment; nothing was sent."));
    }
    const id = String(this.next++);
    this.socket.send(JSON.stringify({ type: "command", id, name, ...values }));
    return new Promise((resolve, reject) => this.waiting.set(id, { resolve, reject }));
  }

  /** Send bytes that nobody answers, unless so many are waiting to be sent that they would come late. */
  push(bytes, most) {
    if (this.socket?.readyState === WebSocket.OPEN && this.socket.bufferedAmount < most) this.socket.send(bytes);
  }

  /** Keeps proxies from closing a quiet connection, such as that of a paused session. */
  ping() { this.socket.send(JSON.stringify({ type: "ping" })); }

  fail(why) {
    for (const { reject } of this.waiting.values()) reject(new Problem(why));
    this.waiting.clear();
  }

  stop() {
    this.isOver = true;
    clearTimeout(this.timer);
    const socket = this.socket;
    this.socket = null;
    socket?.close();
    this.fail("The session is over.");
  }
}

function base64url(text) {
  const bytes = new TextEncoder().encode(text);
  return btoa(String.fromCharCode(...bytes)).replaceAll("+", "-").replaceAll("/", "_").replaceAll("=", "");
}
