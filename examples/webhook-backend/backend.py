"""A backend that Weft tells of events: it checks who calls, counts the words of each message, and writes the count into the
message's thread as an event of its own kind, `x.words`. Put what your application does in the place of `handle`.

Weft tells of an event until it is answered with a status of 200 to 299, and may tell of it again after that. So what is done
about an event is done once by its id: here the event that is written has the id as its idempotency key, and Weft keeps it once.

    pip install -r requirements.txt
    WEFT_WEBHOOK_SECRET=whsec_... WEFT_TOKEN=$(weft token --sub clerk --tenant acme --scope "publish agent") \\
      python backend.py --url http://127.0.0.1:8080 --port 8090
    weft serve --webhook-url http://127.0.0.1:8090/weft
"""

import argparse
import json
import os
import urllib.error
import urllib.parse
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from standardwebhooks.webhooks import Webhook, WebhookVerificationError

# A whole event with what it says of itself; events have at most 64 KiB of data.
MOST_BYTES = 1 << 20
TIMEOUT = 5


def handle(told: dict, url: str, token: str, key: str) -> None:
    """What this backend does about an event; an exception has Weft tell of it again."""
    event = told["event"]
    content = event["data"].get("content")
    words = len(content.split()) if isinstance(content, str) else 0
    thread = urllib.parse.quote(event["thread"], safe="")
    body = {"kind": "x.words", "data": {"words": words}, "parent": event["seq"]}
    headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json", "Idempotency-Key": key}
    request = urllib.request.Request(f"{url}/v1/threads/{thread}/events", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=TIMEOUT):
        print(event["thread"], event["seq"], words, flush=True)


class Handler(BaseHTTPRequestHandler):
    # One connection serves many calls.
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        if length > MOST_BYTES:
            self.close_connection = True
            return self.answer(413)
        body = self.rfile.read(length)
        try:
            # Refuses a signature that is wrong, and one that is older than five minutes.
            told = self.server.webhook.verify(body, dict(self.headers))
        except WebhookVerificationError:
            return self.answer(401)
        try:
            handle(told, self.server.url, self.server.token, self.headers["webhook-id"])
        except (OSError, urllib.error.HTTPError) as error:
            print(f"told again later: {error}", flush=True)
            return self.answer(503)
        self.answer(204)

    def answer(self, status: int) -> None:
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_) -> None:
        """Says nothing of each call."""


def main() -> None:
    parser = argparse.ArgumentParser(description="A backend that Weft tells of events.")
    parser.add_argument("--url", default="http://127.0.0.1:8080", help="where Weft is")
    parser.add_argument("--port", type=int, default=8090, help="where this listens; 0 for any free port")
    given = parser.parse_args()
    server = ThreadingHTTPServer(("127.0.0.1", given.port), Handler)
    server.webhook = Webhook(os.environ["WEFT_WEBHOOK_SECRET"])
    server.url, server.token = given.url, os.environ["WEFT_TOKEN"]
    print(f"listens on {server.server_address[1]}", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
