// A Socket.IO 4 server with connection state recovery: a publish goes to all others in its room and is then acknowledged.
// What is there for a client that comes back is in this process's memory.
import { createServer } from "node:http";
import { Server } from "socket.io";

const http = createServer();
const io = new Server(http, {
  transports: ["websocket"],
  serveClient: false,
  connectionStateRecovery: { maxDisconnectionDuration: 2 * 60 * 1000, skipMiddlewares: true },
});

io.on("connection", (socket) => {
  socket.on("join", async (room, done) => {
    await socket.join(room);
    done();
  });
  socket.on("publish", (room, data, done) => {
    io.to(room).emit("event", data);
    done();
  });
});

http.listen(0, "127.0.0.1", () => console.log(`listening on 127.0.0.1:${http.address().port}`));
