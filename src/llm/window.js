// Reads a provider's byte stream in windows: the first piece at once, then whatever came within `windowMs`, joined into
// one Uint8Array. The runtime hands out one HTTP chunk per read() however many wait, and every piece handed to WASM wakes
// a whole chain there; joining them here is what makes a stream of many small chunks cheap (runtime.md).
// Invariant: bytes come out once and in order; at most about `maxBytes` wait unread (reading pauses beyond that).
export class WindowReader {
  constructor(stream, windowMs, maxBytes) {
    this.reader = stream.getReader();
    this.windowMs = windowMs;
    this.maxBytes = maxBytes;
    this.parts = [];
    this.size = 0;
    this.ended = false;
    this.failure = undefined;
    this.lastAt = -Infinity; // when bytes were last handed over
    this.wanted = undefined; // resolves next()
    this.timer = undefined;
    this.paused = undefined; // resumes reading
    this.run();
  }

  async run() {
    try {
      for (;;) {
        const { done, value } = await this.reader.read();
        if (done) break;
        this.parts.push(value);
        this.size += value.byteLength;
        if (this.wanted) this.arrange();
        if (this.size >= this.maxBytes) await new Promise((resume) => (this.paused = resume));
      }
    } catch (error) {
      this.failure = error ?? new Error("stream failed");
    }
    this.ended = true;
    if (this.wanted) this.arrange();
  }

  // The next bytes; undefined at the end; rejects once what came before a failure has been handed over.
  next() {
    return new Promise((resolve, reject) => {
      this.wanted = { resolve, reject };
      this.arrange();
    });
  }

  arrange() {
    if (this.size > 0) {
      const due = this.lastAt + this.windowMs - Date.now();
      if (this.ended || this.size >= this.maxBytes || due <= 0) return this.deliver();
      this.timer ??= setTimeout(() => this.deliver(), due);
    } else if (this.ended) {
      const { resolve, reject } = this.wanted;
      this.wanted = undefined;
      if (this.failure === undefined) resolve(undefined);
      else reject(this.failure);
    }
  }

  deliver() {
    clearTimeout(this.timer);
    this.timer = undefined;
    if (!this.wanted) return;
    const { resolve } = this.wanted;
    this.wanted = undefined;
    let joined = this.parts[0];
    if (this.parts.length > 1) {
      joined = new Uint8Array(this.size);
      let at = 0;
      for (const part of this.parts) {
        joined.set(part, at);
        at += part.byteLength;
      }
    }
    this.parts = [];
    this.size = 0;
    this.lastAt = Date.now();
    this.paused?.();
    this.paused = undefined;
    resolve(joined);
  }

  // Closes the provider's connection.
  cancel() {
    clearTimeout(this.timer);
    this.reader.cancel().catch(() => {});
    this.paused?.();
  }
}
