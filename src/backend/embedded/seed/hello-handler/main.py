"""Example function with a handler: greets the person named in the event. It stays loaded between runs."""


def handler(event, context):
    """Returns a greeting. `context` says what belongs to this run, such as `context.request_id`."""
    name = event.get("name") if isinstance(event, dict) else None
    if not isinstance(name, str):
        name = "world"
    return {"message": f"Hello, {name}!", "input": event}
