"""An agent whose model is behind any endpoint of the chat completions API, as OpenAI has it and most servers of models do.

It takes each `user_message` as work, sends the model the thread's conversation, streams its answer into the thread, calls the
tools that it asks for, and ends the run. Put your tools in the place of `TOOLS`.

The log is its memory: before each question to the model it reads the conversation from Weft, with the calls that this run has
made. So it may be killed at any moment, and whoever takes the work next asks the model with all that is known by then. What it
needs of Weft is in `../python-agent/worker.py`.

    pip install -r requirements.txt
    WEFT_TOKEN=$(weft token --sub scout --tenant acme --scope "publish subscribe agent") \\
      python agent.py --endpoint http://127.0.0.1:11434/v1 --model llama3.2
"""

import asyncio
import json
import os
import re
import sys
import uuid
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import httpx_sse

sys.path.append(str(Path(__file__).parent.parent / "python-agent"))
from worker import Later, Refused, Run, parser, text_of, token, work  # noqa: E402

# How often the model may ask for tools before it answers.
MOST_ROUNDS = 8
TIMEOUT = httpx.Timeout(60, connect=5)


def add(a: float, b: float) -> float:
    return a + b


# Each with a description and the JSON Schema of its arguments, for the model.
TOOLS = {
    "add": (
        add,
        "Adds two numbers.",
        {
            "type": "object",
            "properties": {"a": {"type": "number"}, "b": {"type": "number"}},
            "required": ["a", "b"],
            "additionalProperties": False,
        },
    )
}


class Failed(Exception):
    """What trying again would not mend: the run has failed."""

    def __init__(self, code: str, message: str):
        super().__init__(message)
        self.code = code


class Thread:
    """What Weft has of the run's thread."""

    def __init__(self, client: httpx.AsyncClient, run: Run):
        self.client, self.run, self.asked = client, run, run.event["seq"]

    async def read(self, what: str, **query) -> dict | list:
        response = await self.client.get(f"/v1/threads/{self.run.thread}/{what}", params=query)
        if response.is_error:
            raise Later(f"Weft answers {response.status_code}: {response.text[:500]}")
        return response.json()

    async def own(self) -> list[dict]:
        """What an attempt before has left of this run: its messages and calls."""
        found, after = [], self.asked
        while after is not None:
            kinds = "agent_message,tool_executing,tool_completed"
            page = await self.read("events", after=after, kinds=kinds, limit=1_000)
            found += (event for event in page["events"] if event.get("run") == self.run.name)
            after = page.get("next")
        return found

    async def conversation(self) -> list[dict]:
        """The conversation as the model is to see it: what people have written since has a turn of its own."""
        messages = await self.read("context", max_messages=200)
        messages = [it for it in messages if it["seq"] <= self.asked or it["role"] != "user"]
        for message in messages:
            del message["seq"]
            if "name" in message:
                message["name"] = re.sub(r"[^A-Za-z0-9_-]", "_", message["name"])[:64]
        return messages


class Reply:
    """The model's reply, while it streams."""

    def __init__(self):
        self.calls, self.finish_reason, self.usage = {}, None, {}

    async def pieces(self, client: httpx.AsyncClient, body: dict) -> AsyncIterator[str]:
        """The text as it comes. Calls are put together beside it."""
        async with httpx_sse.aconnect_sse(client, "POST", "chat/completions", json=body) as source:
            if source.response.is_error:
                refuse(source.response, (await source.response.aread()).decode(errors="replace"))
            async for event in source.aiter_sse():
                if event.data == "[DONE]":
                    break
                chunk = json.loads(event.data)
                self.usage = chunk.get("usage") or self.usage
                for choice in (chunk.get("choices") or [])[:1]:
                    delta = choice.get("delta") or {}
                    for part in delta.get("tool_calls") or []:
                        self.take(part)
                    self.finish_reason = choice.get("finish_reason") or self.finish_reason
                    if delta.get("content"):
                        yield delta["content"]
        if self.finish_reason is None:
            raise Later("the model's answer broke off")

    def take(self, part: dict) -> None:
        call = self.calls.setdefault(part.get("index", len(self.calls)), {"name": "", "arguments": ""})
        function = part.get("function") or {}
        call["name"] += function.get("name") or ""
        call["arguments"] += function.get("arguments") or ""


def refuse(response: httpx.Response, text: str) -> None:
    why = f"the model's endpoint answers {response.status_code}: {text[:500]}"
    if response.status_code in (408, 409, 429) or response.status_code >= 500:
        raise Later(why)
    raise Failed("model_refused", why)


async def call_tool(run: Run, name: str, arguments: str) -> None:
    """Calls a tool, and puts what came of it into the thread. The model is told of errors: it may know better then."""
    # The model's own id may be that of a call of an attempt before.
    call = f"{name[:64]}-{uuid.uuid4().hex}"
    try:
        parsed = json.loads(arguments or "{}")
    except ValueError:
        parsed = arguments
    await run.publish("tool_executing", {"tool": name, "call": call, "arguments": parsed})
    try:
        if name not in TOOLS:
            raise LookupError(f"there is no tool {name}")
        if not isinstance(parsed, dict):
            raise ValueError("the arguments are not a JSON object")
        ended = {"result": TOOLS[name][0](**parsed)}
    except Exception as error:
        ended = {"error": f"{type(error).__name__}: {error}"}
    await run.publish("tool_completed", {"call": call, **ended})


async def end_calls(run: Run, own: list[dict]) -> int:
    """Ends the calls during which an attempt before was killed: nobody knows what became of them. Says how many there are."""
    ended = {event["data"]["call"] for event in own if event["kind"] == "tool_completed"}
    begun = [event["data"]["call"] for event in own if event["kind"] == "tool_executing"]
    interrupted = [call for call in begun if call not in ended]
    for call in interrupted:
        why = "the agent was interrupted while it called this tool"
        await run.publish("tool_completed", {"call": call, "error": why})
    return len(interrupted)


async def converse(run: Run, thread: Thread, model: httpx.AsyncClient, name: str) -> dict:
    """Asks the model until it has answered without asking for a tool; gives what the run ends with, the tokens of this attempt."""
    usage = {"input_tokens": 0, "output_tokens": 0}
    tools = [
        {"type": "function", "function": {"name": tool, "description": description, "parameters": parameters}}
        for tool, (_, description, parameters) in TOOLS.items()
    ]
    own = await thread.own()
    if own and own[-1]["data"].get("finish_reason", "tool_calls") != "tool_calls":
        return {}  # an attempt before has answered, and what it used is not known
    steps = len(own) + await end_calls(run, own)
    for _ in range(MOST_ROUNDS):
        messages, reply = await thread.conversation(), Reply()
        body = {"model": name, "messages": messages, "tools": tools, "stream": True}
        body["stream_options"] = {"include_usage": True}
        # Begun again after a break it is the same message, which then begins anew.
        message = f"answer-{steps}"
        chars = await run.stream(reply.pieces(model, body), message)
        usage["input_tokens"] += reply.usage.get("prompt_tokens", 0)
        usage["output_tokens"] += reply.usage.get("completion_tokens", 0)
        finish_reason = "tool_calls" if reply.calls else reply.finish_reason
        if chars:
            await run.publish("agent_message", {"message": message, "finish_reason": finish_reason}, message)
        if not reply.calls:
            return {"usage": usage}
        for _, asked in sorted(reply.calls.items()):
            await call_tool(run, asked["name"], asked["arguments"])
        steps += 2 * len(reply.calls) + bool(chars)
    raise Failed("too_many_rounds", f"the model asked for tools {MOST_ROUNDS} times and gave no answer")


async def answer(run: Run, weft: httpx.AsyncClient, model: httpx.AsyncClient, name: str) -> None:
    question = text_of(run.event["data"]["content"])
    started = await run.publish("agent_started", {"agent": "openai-compatible", "input": question}, "started")
    if started["duplicate"]:
        print(f"goes on with {run.name}", flush=True)
    try:
        ended = await converse(run, Thread(weft, run), model, name)
        await run.publish("agent_completed", ended, "completed")
    except (httpx.TransportError, Later) as error:
        # The run stays open for the next attempt.
        raise Later(f"{type(error).__name__}: {error}") from error
    except Refused:
        raise
    except Exception as error:
        code = error.code if isinstance(error, Failed) else type(error).__name__
        await run.publish("agent_failed", {"code": code, "message": str(error)}, "failed")


async def main() -> None:
    options = parser("Answers messages with a model behind a chat completions endpoint.")
    options.add_argument("--endpoint", default="https://api.openai.com/v1", help="what `/chat/completions` follows")
    options.add_argument("--model", required=True)
    options = options.parse_args()
    of_weft = {"Authorization": f"Bearer {token()}"}
    key = os.environ.get("OPENAI_API_KEY")
    of_model = {"Authorization": f"Bearer {key}"} if key else {}
    async with (
        httpx.AsyncClient(base_url=options.url, headers=of_weft, timeout=TIMEOUT) as weft,
        httpx.AsyncClient(base_url=options.endpoint, headers=of_model, timeout=TIMEOUT) as model,
    ):
        await work(options, lambda run: answer(run, weft, model, options.model))


if __name__ == "__main__":
    asyncio.run(main())
