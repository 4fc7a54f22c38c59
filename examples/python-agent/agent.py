"""An agent that answers messages: a worker of a work queue, over one WebSocket.

It takes each `user_message` as work, opens a run for it, calls a tool when it needs one, streams its answer token by token and
ends the run. Put a model in the place of `tokens_of`, and your tools in the place of `TOOLS`.

What it needs of Weft is in `worker.py`. It may be killed at any moment, and any number of them may run as one user.

    pip install -r requirements.txt
    WEFT_TOKEN=$(weft token --sub scout --tenant acme --scope "publish subscribe agent") python agent.py
"""

import asyncio
import re
from collections.abc import AsyncIterator

from worker import Refused, Run, parser, text_of, work


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


async def call(run: Run, name: str, arguments: dict):
    call = f"{name}-1"
    await run.publish("tool_executing", {"tool": name, "call": call, "arguments": arguments}, f"{call}/executing")
    result = TOOLS[name](**arguments)
    await run.publish("tool_completed", {"call": call, "result": result}, f"{call}/completed")
    return result


async def slowly(tokens: list[str], delay: float) -> AsyncIterator[str]:
    for token in tokens:
        yield token
        await asyncio.sleep(delay)


async def answer(run: Run, delay: float) -> None:
    question = text_of(run.event["data"]["content"])
    started = await run.publish("agent_started", {"agent": "python-agent", "input": question}, "started")
    if started["duplicate"]:
        print(f"goes on with {run.name}", flush=True)
    try:
        results = {name: await call(run, name, arguments) for name, arguments in calls_of(question)}
        await run.stream(slowly(tokens_of(question, results), delay), "answer")
        await run.publish("agent_message", {"message": "answer"}, "message")
        await run.publish("agent_completed", {"output": results}, "completed")
    except Refused:
        raise
    except Exception as error:  # a tool's, or the model's: the run has failed, and the work is done
        await run.publish("agent_failed", {"code": type(error).__name__, "message": str(error)}, "failed")


def main() -> None:
    options = parser("Answers messages as a worker of a group.")
    options.add_argument("--delay", type=float, default=0.05, help="seconds between tokens")
    options = options.parse_args()
    asyncio.run(work(options, lambda run: answer(run, options.delay)))


if __name__ == "__main__":
    main()
