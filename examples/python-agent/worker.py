"""A worker of a work queue over one WebSocket: what an agent needs of Weft, whatever its model is.

`work` takes work of a group, calls `answer` with a `Run` for each event, extends the lease while that lasts, settles it, and comes
back after a lost connection. `Run` publishes an agent's events and streams its text.

It may be killed at any moment, and any number of workers may run as one user. Whoever takes the work next goes on with the same
run: names of runs and messages are made of the message's seq, and each event has a key, so that what is in the thread already is
a duplicate.
"""

import argparse
import asyncio
import json
import os
import random
import sys
from collections.abc import AsyncIterator, Awaitable, Callable

import websockets


class Refused(Exception):
    """The server's answer to a command that it did not carry out."""

    def __init__(self, frame: dict):
        super().__init__(frame["message"])
        self.code, self.temporary = frame["code"], frame["temporary"]


class Later(Exception):
    """What the agent needs is not there now: the work is given back, and tried again after the group's backoff."""


class Session:
    """One connection. Answers find who waits for them by their id; work waits in a queue."""

    def __init__(self, socket):
        self.socket, self.ids, self.waiting, self.work = socket, 0, {}, asyncio.Queue()

    async def read(self) -> None:
        try:
            async for text in self.socket:
                self.take(json.loads(text))
        finally:
            for answered in self.waiting.values():
                answered.cancel()

    def take(self, frame: dict) -> None:
        if frame["type"] == "work":
            self.work.put_nowait(frame)
        elif answered := self.waiting.pop(frame.get("id"), None):
            if frame["type"] == "error":
                answered.set_exception(Refused(frame))
            else:
                answered.set_result(frame)

    async def ask(self, **command) -> dict:
        self.ids += 1
        answered = self.waiting[self.ids] = asyncio.get_running_loop().create_future()
        await self.socket.send(json.dumps({"id": self.ids, **command}))
        return await answered


class Run:
    """The agent's work on one message."""

    def __init__(self, session: Session, event: dict):
        self.session, self.event, self.thread = session, event, event["thread"]
        self.name = f"answer-{event['seq']}"

    async def publish(self, kind: str, data: dict, key: str | None = None) -> dict:
        command = {"type": "publish", "thread": self.thread, "kind": kind, "data": data, "run": self.name}
        if key:
            command["key"] = f"{self.name}/{key}"
        return await self.session.ask(**command)

    async def stream(self, pieces: AsyncIterator[str], message: str) -> int:
        """Streams a message, which begins anew with the first piece, whatever an attempt before has left of it. Says how many
        characters there were; with any the message is still to be closed."""
        at = 0
        async for text in pieces:
            data = {"message": message, "from_char": at, "text": text}
            if at == 0:
                data["restart"] = True
            at = (await self.publish("agent_token", data))["to_char"]
        return at


def text_of(content) -> str:
    """A message's content is a string or a list of parts."""
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


Answer = Callable[[Run], Awaitable[None]]


async def settle(session: Session, work: dict, answer: Answer) -> None:
    """Works on one event while its lease lasts, and says what became of it."""
    delivery, outcome = work["delivery"], {"outcome": "done"}
    answering = asyncio.ensure_future(answer(Run(session, work["event"])))
    try:
        while not (await asyncio.wait([answering], timeout=work["lease_ms"] / 3_000))[0]:
            await session.ask(type="settle", delivery=delivery, outcome="extend")
        answering.result()
    except Refused as refused:
        # An attempt before has ended the run, and was gone before it could say so.
        if refused.code != "run_order":
            outcome = {"outcome": "retry" if refused.temporary else "reject", "reason": str(refused)[:1_000]}
    except Later as later:
        outcome = {"outcome": "retry", "reason": str(later)[:1_000]}
    finally:
        answering.cancel()
    try:
        await session.ask(type="settle", delivery=delivery, **outcome)
        became = outcome["outcome"]
    except Refused as refused:  # the lease was over: the work is somebody else's
        became = f"not settled: {refused}"
    print(f"{work['event']['thread']} {work['event']['seq']} {became}", flush=True)


async def serve(session: Session, group: str, answer: Answer) -> None:
    await session.ask(type="consume", group=group, credit=1)
    print(f"takes work of {group}", flush=True)
    while True:
        await settle(session, await session.work.get(), answer)


async def connect(url: str, token: str, group: str, answer: Answer) -> None:
    """Works until the connection ends. What is begun then goes to whoever comes next, and that may be this one."""
    headers = {"Authorization": f"Bearer {token}"}
    async with websockets.connect(url, additional_headers=headers, max_size=4 << 20) as socket:
        session = Session(socket)
        tasks = [asyncio.ensure_future(it) for it in (session.read(), serve(session, group, answer))]
        try:
            ended, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
        for task in ended:
            if not task.cancelled():
                task.result()


def parser(what: str) -> argparse.ArgumentParser:
    """The options that every worker has."""
    of_worker = argparse.ArgumentParser(description=what)
    of_worker.add_argument("--url", default=os.environ.get("WEFT_URL", "http://127.0.0.1:8080"))
    of_worker.add_argument("--group", default="assistant")
    return of_worker


def token() -> str:
    return os.environ.get("WEFT_TOKEN") or sys.exit("WEFT_TOKEN is not set")


async def work(options: argparse.Namespace, answer: Answer) -> None:
    """Takes work for ever, and comes back after a lost connection."""
    url = options.url.replace("http", "ws", 1) + "/v1/ws"
    pause = 0.5
    while True:
        try:
            await connect(url, token(), options.group, answer)
            pause = 0.5
        except Refused as error:  # the group, or the token's scope
            sys.exit(f"refused: {error}")
        except (OSError, websockets.WebSocketException) as error:
            # A token that is refused, or a close code from 4500 on: coming back would not help.
            received, refused = getattr(error, "rcvd", None), getattr(error, "response", None)
            if received and received.code >= 4500 or refused and refused.status_code in (401, 403):
                sys.exit(f"refused: {error}")
            print(f"not connected: {error}", file=sys.stderr, flush=True)
        await asyncio.sleep(pause * random.uniform(0.5, 1))
        pause = min(pause * 2, 10)
