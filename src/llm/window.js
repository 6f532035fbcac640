// Reads a provider's byte stream in windows: the first piece at once, then whatever came within `windowMs`, joined.
// The runtime hands out one HTTP chunk per read(), however many wait, and wakes JavaScript for each. So the stream is
// teed: native code drives one branch to its end into a sink that keeps nothing, and what that makes wait in the other
// branch comes out of one read.
// Invariant: bytes come out once and in order; a read that has something never waits for more than its window.
export class WindowReader {
  constructor(stream, windowMs, maxBytes) {
    const [kept, driven] = stream.tee();
    this.reader = kept.getReader({ mode: "byob" });
    this.windowMs = windowMs;
    this.maxBytes = maxBytes;
    this.lastAt = -Infinity; // when bytes were last handed over
    this.ended = false;
    this.wake = undefined; // ends the wait for a window
    const over = () => {
      this.ended = true;
      this.wake?.();
    };
    // A digest is the runtime's one native sink: no chunk of this branch is ever seen by JavaScript.
    const sink = new crypto.DigestStream("MD5");
    sink.digest.catch(() => {});
    driven.pipeTo(sink).then(over, over);
  }

  // The next bytes; undefined at the end; rejects when the stream fails.
  async next() {
    const due = this.lastAt + this.windowMs - Date.now();
    if (due > 0 && !this.ended) {
      await new Promise((wake) => {
        const timer = setTimeout(wake, due);
        this.wake = () => {
          clearTimeout(timer);
          wake();
        };
      });
      this.wake = undefined;
    }
    const { done, value } = await this.reader.read(new Uint8Array(this.maxBytes));
    this.lastAt = Date.now();
    return done ? undefined : value;
  }

  // Gives up reading; whoever opened the stream aborts it, which ends both branches.
  cancel() {
    this.wake?.();
    this.reader.cancel().catch(() => {});
  }
}
