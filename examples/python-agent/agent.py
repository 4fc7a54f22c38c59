"""An agent that answers messages: a worker of a work queue, over one WebSocket.

It takes each `user_message` as work, opens a run for it, calls a tool when it needs one, streams its answer token by token and
ends the run. Put a model in the place of `tokens_of`, and your tools in the place of `TOOLS`.

It may be killed at any moment, and any number of them may run as one user. Whoever takes the work next goes on with the same
run: names of runs, calls and messages are made of the message's seq, each event has a key, so what is in the thread already is
a duplicate, and a text that was left half written is begun anew.

    pip install -r requirements.txt
    WEFT_TOKEN=$(weft token --sub scout --tenant acme --scope "publish subscribe agent") python agent.py
"""

import argparse
import asyncio
import json
import os
import random
import re
import sys

import websockets


def add(a: int, b: int) -> int:
    return a + b


TOOLS = {"add": add}


def tokens_of(question: str, results: dict) -> list[str]:
    """What a model would say, piece by piece."""
    if "add" in results:
        text = f"The sum is {results['add']}."
    else:
        text = f"You said: {question}"
    return re.findall(r"\S+\s*", text)


def calls_of(question: str) -> list[tuple[str, dict]]:
    """The tools that a model would call."""
    numbers = re.search(r"(\d+)\s*\+\s*(\d+)", question)
    return [("add", {"a": int(numbers[1]), "b": int(numbers[2])})] if numbers else []


class Refused(Exception):
    """The server's answer to a command that it did not carry out."""

    def __init__(self, frame: dict):
        super().__init__(frame["message"])
        self.code, self.temporary = frame["code"], frame["temporary"]


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
        self.session, self.thread = session, event["thread"]
        self.name = f"answer-{event['seq']}"

    async def publish(self, kind: str, data: dict, key: str | None = None) -> dict:
        command = {"type": "publish", "thread": self.thread, "kind": kind, "data": data, "run": self.name}
        if key:
            command["key"] = f"{self.name}/{key}"
        return await self.session.ask(**command)

    async def call(self, name: str, arguments: dict):
        call = f"{name}-1"
        await self.publish("tool_executing", {"tool": name, "call": call, "arguments": arguments}, f"{call}/executing")
        result = TOOLS[name](**arguments)
        await self.publish("tool_completed", {"call": call, "result": result}, f"{call}/completed")
        return result

    async def say(self, tokens: list[str], delay: float) -> None:
        """Streams a message. The first token begins it anew, whatever an attempt before has left of it."""
        at = 0
        for token in tokens:
            data = {"message": "answer", "from_char": at, "text": token}
            if at == 0:
                data["restart"] = True
            at = (await self.publish("agent_token", data))["to_char"]
            await asyncio.sleep(delay)
        await self.publish("agent_message", {"message": "answer"}, "message")


def text_of(content) -> str:
    """A message's content is a string or a list of parts."""
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


async def answer(session: Session, event: dict, delay: float) -> None:
    question = text_of(event["data"]["content"])
    run = Run(session, event)
    started = await run.publish("agent_started", {"agent": "python-agent", "input": question}, "started")
    if started["duplicate"]:
        print(f"goes on with {run.name}", flush=True)
    try:
        results = {name: await run.call(name, arguments) for name, arguments in calls_of(question)}
        await run.say(tokens_of(question, results), delay)
        await run.publish("agent_completed", {"output": results}, "completed")
    except Refused as refused:
        # An attempt before has ended the run, and was gone before it could say so.
        if refused.code != "run_order":
            raise
    except Exception as error:  # a tool's, or the model's: the run has failed, and the work is done
        await run.publish("agent_failed", {"code": type(error).__name__, "message": str(error)}, "failed")


async def settle(session: Session, work: dict, delay: float) -> None:
    """Works on one event while its lease lasts, and says what became of it."""
    delivery, outcome = work["delivery"], {"outcome": "done"}
    answering = asyncio.ensure_future(answer(session, work["event"], delay))
    try:
        while not (await asyncio.wait([answering], timeout=work["lease_ms"] / 3_000))[0]:
            await session.ask(type="settle", delivery=delivery, outcome="extend")
        answering.result()
    except Refused as refused:
        outcome = {"outcome": "retry" if refused.temporary else "reject", "reason": str(refused)[:1_000]}
    finally:
        answering.cancel()
    try:
        await session.ask(type="settle", delivery=delivery, **outcome)
        became = outcome["outcome"]
    except Refused as refused:  # the lease was over: the work is somebody else's
        became = f"not settled: {refused}"
    print(f"{work['event']['thread']} {work['event']['seq']} {became}", flush=True)


async def serve(session: Session, group: str, delay: float) -> None:
    await session.ask(type="consume", group=group, credit=1)
    print(f"takes work of {group}", flush=True)
    while True:
        await settle(session, await session.work.get(), delay)


async def connect(url: str, token: str, group: str, delay: float) -> None:
    """Works until the connection ends. What is begun then goes to whoever comes next, and that may be this one."""
    headers = {"Authorization": f"Bearer {token}"}
    async with websockets.connect(url, additional_headers=headers, max_size=4 << 20) as socket:
        session = Session(socket)
        tasks = [asyncio.ensure_future(it) for it in (session.read(), serve(session, group, delay))]
        try:
            ended, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
        for task in ended:
            if not task.cancelled():
                task.result()


async def main() -> None:
    parser = argparse.ArgumentParser(description="Answers messages as a worker of a group.")
    parser.add_argument("--url", default=os.environ.get("WEFT_URL", "http://127.0.0.1:8080"))
    parser.add_argument("--group", default="assistant")
    parser.add_argument("--delay", type=float, default=0.05, help="seconds between tokens")
    options = parser.parse_args()
    token = os.environ.get("WEFT_TOKEN") or sys.exit("WEFT_TOKEN is not set")
    url = options.url.replace("http", "ws", 1) + "/v1/ws"

    pause = 0.5
    while True:
        try:
            await connect(url, token, options.group, options.delay)
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


if __name__ == "__main__":
    asyncio.run(main())
