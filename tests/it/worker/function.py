"""The code of the functions in the table of the tests. It behaves as worker.py does for them.

The input selects the behaviour:

    {"behave": "echo"}                        the default: prints the input as JSON
    {"behave": "sleep", "ms": 500}            echo after a delay
    {"behave": "hold", "port": 12345}         echo, once the test closes a connection to this port
    {"behave": "fail"}                        fails, with the input on stderr
    {"behave": "stdout", "text": "…", "times": 3}   prints the text, repeated
    {"behave": "huge", "bytes": 500000}       prints about so much
    {"behave": "code"}                        prints this file

It runs as a program, or as the handler `main.handler`.
"""

import json
import os
import sys
import time


def as_json(value):
    return json.dumps(value, ensure_ascii=False)


def hold(asked):
    import socket

    with socket.create_connection(("127.0.0.1", asked["port"])) as held:
        held.sendall((os.environ["REQUEST_ID"] + "\n").encode())
        held.recv(1)


def handler(event, context):
    """Returns what an echo prints. What else it prints is for the test to read."""
    asked = event if isinstance(event, dict) else {}
    behave = asked.get("behave", "echo")
    if behave == "fail":
        raise RuntimeError(as_json(event))
    if behave == "sleep":
        time.sleep(asked["ms"] / 1000)
    elif behave == "hold":
        hold(asked)
    elif behave in ("stdout", "huge", "code"):
        texts = {
            "stdout": lambda: asked["text"] * asked.get("times", 1),
            "huge": lambda: "x" * asked["bytes"],
            "code": lambda: open(__file__, encoding="utf-8").read(),
        }
        sys.stdout.write(texts[behave]())
        return None
    return event


def main():
    path = os.environ.get("PAYLOAD_FILE")
    if path:
        with open(path, encoding="utf-8") as file:
            event = json.load(file)
    else:
        event = json.loads(os.environ["PAYLOAD"])
    try:
        value = handler(event, None)
    except RuntimeError as error:
        print(error, file=sys.stderr)
        sys.exit(1)
    if value is not None:
        print(as_json(value))


if __name__ == "__main__":
    main()
