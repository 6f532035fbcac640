// What Inkstone is measured against: the least a Worker can do between a client and a provider's stream, the way it is
// usually written: read, write, again. No token, no quota, no history, no parsing. IdentityTransformStream, because it is
// the faster of the two that workerd has.
export default {
  async fetch(request, env) {
    const upstream = await fetch(env.PROVIDER, { method: "POST", headers: request.headers, body: request.body });
    const { readable, writable } = new IdentityTransformStream();
    relay(upstream.body.getReader(), writable.getWriter());
    return new Response(readable, { headers: { "content-type": "text/event-stream" } });
  },
};

async function relay(reader, writer) {
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return writer.close();
    await writer.write(value);
  }
}
