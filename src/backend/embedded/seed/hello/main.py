"""Example function: greets the person named in the payload. Reads the payload and prints one line of JSON."""

import json
import os


def payload():
    """Returns the payload. One that is too large for the environment is in a file."""
    path = os.environ.get("PAYLOAD_FILE")
    if path is None:
        return json.loads(os.environ.get("PAYLOAD", "{}"))
    with open(path, encoding="utf-8") as file:
        return json.load(file)


value = payload()
name = value.get("name") if isinstance(value, dict) else None
if not isinstance(name, str):
    name = "world"
print(json.dumps({"message": f"Hello, {name}!", "input": value}))
