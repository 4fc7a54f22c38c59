// Reads one run with AG-UI's own client and prints what came out of its verification, as JSON.
//   node client.mjs FOLDER URL TOKEN    FOLDER: where the client's packages are installed
import { createRequire } from "node:module";
import { join } from "node:path";

const [folder, url, token] = process.argv.slice(2);
const { HttpAgent } = createRequire(join(folder, "package.json"))("@ag-ui/client");

// The client warns of what it removes from events: there must be nothing.
const warnings = [];
console.warn = (...words) => warnings.push(words.join(" "));

// AG-UI's agents take a POST; a thread's stream is a GET.
class Thread extends HttpAgent {
  requestInit() {
    return { method: "GET", headers: this.headers, signal: this.abortController.signal };
  }
}

const agent = new Thread({ url, threadId: "t", headers: { Authorization: `Bearer ${token}` } });
const events = [];
const ended = await agent.runAgent({}, { onEvent: ({ event }) => void events.push(event) }).then(
  ({ result }) => ({ result }),
  (error) => ({ error: String(error) }),
);
const { messages, pendingInterrupts } = agent;
console.log(JSON.stringify({ events, messages, pendingInterrupts, warnings, ...ended }));
