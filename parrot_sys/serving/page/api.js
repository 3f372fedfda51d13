// Calls of the server's OpenAI-compatible interface. Addresses are relative, so that the page works below a path.

/** An answer of the server that is an error. */
export class ServerError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

function headers(key) {
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

async function checked(response) {
  if (response.ok) return response;
  const body = await response.text();
  let message = body;
  try {
    message = JSON.parse(body).error.message;
  } catch {
    // A proxy in between answers with a page of its own.
  }
  throw new ServerError(response.status, message || response.statusText);
}

/** The first model that the server offers. */
export async function model(key) {
  const response = await checked(await fetch("v1/models", { headers: headers(key) }));
  return (await response.json()).data[0];
}

/** Events of a stream: the objects after `data:`, up to `[DONE]`. */
export async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    rest += value ?? "";
    const blocks = rest.split(/\r?\n\r?\n/);
    rest = blocks.pop();
    for (const block of blocks) {
      const data = block.split(/\r?\n/).filter((line) => line.startsWith("data:")).map((line) => line.slice(5).trim()).join("\n");
      if (data === "[DONE]") return;
      if (data) yield JSON.parse(data);
    }
    if (done) return;
  }
}

/**
 * Asks the model and calls back as the answer comes.
 *
 * @param {object} request `model`, `messages`, `temperature`, `max_tokens`, `parrot_routing`.
 * @param {object} options `key`, `signal` (AbortSignal), `onText(piece)`, `onRouting(routing)`.
 */
export async function chat(request, { key, signal, onText, onRouting }) {
  const body = JSON.stringify({ ...request, stream: true });
  const response = await checked(await fetch("v1/chat/completions", { method: "POST", headers: headers(key), body, signal }));
  for await (const event of events(response.body)) {
    if (event.error) throw new ServerError(event.error.code ?? 500, event.error.message);
    if (event.parrot_routing) onRouting(event.parrot_routing);
    const piece = event.choices?.[0]?.delta?.content;
    if (piece) onText(piece);
  }
}
