// A minimal WebSocket relay in front of Redis streams, as one would write it first: a stream for each thread.
//   {"id": 1, "publish": "thread", "data": {…}}   XADD; answered with {"id": 1, "ok": true} once Redis has answered
//   {"subscribe": "thread", "after": "1-0"}       XRANGE up to the end (not without "after"), then what comes: {"at": "2-0", "data": {…}}
// The client of Redis sends all commands of one turn together. There is one connection for publishes and pages, and one that
// waits in XREAD for each thread with readers. A message is encoded once for all its readers, and what one turn has for a
// connection goes out in one write.
import { WebSocketServer } from "ws";
import { createClient } from "redis";

const PAGE = 1000;
const redis = await createClient({ socket: { path: process.env.REDIS_SOCKET } }).connect();
const readers = new Map();
const corked = new Set();

function send(socket, text) {
  const stream = socket._socket;
  if (!corked.has(stream)) {
    stream.cork();
    corked.add(stream);
    if (corked.size === 1) setImmediate(uncork);
  }
  socket.send(text);
}

function uncork() {
  for (const stream of corked) stream.uncork();
  corked.clear();
}

const encode = ({ id, message }) => `{"at":"${id}","data":${message.data}}`;

// Passes on what is added to a stream, for as long as it has readers.
async function follow(thread, sockets, from) {
  const connection = await redis.duplicate().connect();
  while (sockets.size > 0) {
    const found = await connection.xRead({ key: thread, id: from }, { BLOCK: 1000, COUNT: PAGE });
    for (const entry of found?.[0].messages ?? []) {
      from = entry.id;
      const text = encode(entry);
      for (const socket of sockets) send(socket, text);
    }
  }
  readers.delete(thread);
  connection.destroy();
}

async function subscribe(socket, thread, after) {
  let last = after;
  for (let page; last !== undefined; ) {
    page = await redis.xRange(thread, `(${last}`, "+", { COUNT: PAGE });
    for (const entry of page) send(socket, encode(entry));
    if (page.length < PAGE) break;
    last = page.at(-1).id;
  }
  let sockets = readers.get(thread);
  if (!sockets) {
    sockets = new Set();
    readers.set(thread, sockets);
    sockets.add(socket);
    const newest = await redis.xRevRange(thread, "+", "-", { COUNT: 1 });
    follow(thread, sockets, newest[0]?.id ?? "0-0");
  }
  sockets.add(socket);
  socket.on("close", () => sockets.delete(socket));
  send(socket, `{"subscribed":"${thread}"}`);
}

const server = new WebSocketServer({ host: "127.0.0.1", port: 0, perMessageDeflate: false });
server.on("connection", (socket) => {
  socket.on("message", (text) => {
    const { id, publish, subscribe: thread, after, data } = JSON.parse(text);
    if (thread) {
      subscribe(socket, thread, after);
      return;
    }
    redis.xAdd(publish, "*", { data: JSON.stringify(data) }).then(
      () => send(socket, `{"id":${id},"ok":true}`),
      (error) => send(socket, JSON.stringify({ id, error: String(error) })),
    );
  });
  socket.on("error", () => {});
});
server.on("listening", () => console.log(`listening on 127.0.0.1:${server.address().port}`));
