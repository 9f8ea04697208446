"""A client like the Python clients of the old controller, with urllib and one connection per request.

It checks each answer against the contract: shapes, words and types. BASE_URL and API_KEY name the gateway.
HAS_LOCAL_WORKER is 1 if there is a worker that sends no heartbeats: that of `dev`, or one that writes its
status to Redis. The exit code is 1 at the first mismatch.
"""

import io
import json
import os
import re
import time
import urllib.error
import urllib.parse
import urllib.request
import zipfile

BASE = os.environ["BASE_URL"]
KEY = os.environ["API_KEY"]
HAS_LOCAL_WORKER = os.environ["HAS_LOCAL_WORKER"] == "1"
DEADLINE_S = 60
# Duration of a run that outlasts a wait of 0 s, also on a busy machine.
SLOW_MS = 5000
UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")
POOLS = {"python": (int, float), "nodejs": (int, float), "cpp": (int, float), "go": (int, float)}
NUMBER = (int, float)


def fits(value, shape, path):
    """Asserts a type (or several), a pattern, a list of words, the shapes of members, or the value itself."""
    if isinstance(shape, dict):
        assert isinstance(value, dict), f"{path} is not an object: {value!r}"
        for name, member in shape.items():
            assert name in value, f"{path}.{name} is missing: {value!r}"
            fits(value[name], member, f"{path}.{name}")
    elif isinstance(shape, (type, tuple)):
        kinds = shape if isinstance(shape, tuple) else (shape,)
        # In Python, unlike in JSON, a boolean is a number.
        is_kind = isinstance(value, kinds) and (not isinstance(value, bool) or bool in kinds)
        assert is_kind, f"{path} is {value!r}, not of type {kinds}"
    elif isinstance(shape, re.Pattern):
        matches = isinstance(value, str) and shape.fullmatch(value)
        assert matches, f"{path} is {value!r}, not {shape.pattern}"
    elif isinstance(shape, list):
        assert value in shape, f"{path} is {value!r}, none of {shape}"
    else:
        assert value == shape and type(value) is type(shape), f"{path} is {value!r}, not {shape!r}"


def call(method, path, body=None, key=KEY, **headers):
    """Sends a request. Returns status, header fields and text of the answer."""
    data = body
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    if isinstance(body, dict):
        data = json.dumps(body).encode()
        names.setdefault("Content-Type", "application/json")
    if key is not None:
        names["x-api-key"] = key
    request = urllib.request.Request(BASE + path, data=data, headers=names, method=method)
    try:
        with urllib.request.urlopen(request, timeout=DEADLINE_S) as answer:
            status, fields, text = answer.status, answer.headers, answer.read().decode()
    except urllib.error.HTTPError as answer:
        status, fields, text = answer.code, answer.headers, answer.read().decode()
    assert fields["X-Request-Id"], f"{method} {path} has no X-Request-Id"
    return status, fields, text


def expect(status, shape, method, path, body=None, **more):
    """Sends a request, and asserts status and shape of the answer. Returns its JSON."""
    given, fields, text = call(method, path, body, **more)
    name = f"{method} {path}"
    assert given == status, f"{name}: {given}, not {status}: {text}"
    wanted = "application/json" if status < 400 else "application/problem+json"
    assert fields["Content-Type"].startswith(wanted), f"{name}: content type {fields['Content-Type']}"
    value = json.loads(text)
    for each in value if isinstance(value, list) else [value]:
        fits(each, shape, name)
    return value


def problem(status, code, *request, **more):
    """Asserts an error in the form of old clients (`error`) and of RFC 9457. Returns its text."""
    shape = {"type": str, "title": str, "status": status, "detail": str, "requestId": str, "code": code}
    value = expect(status, {**shape, "error": str}, *request, **more)
    assert value["error"] == value["detail"], value
    return value["error"]


def eventually(what, probe):
    end = time.monotonic() + DEADLINE_S
    while True:
        found = probe()
        if found:
            return found
        assert time.monotonic() < end, f"{what}: not within {DEADLINE_S} s"
        time.sleep(0.1)


def code(text):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("main.py", text)
    return out.getvalue()


def upload(prefix, runtime="python", memory="128", source="print('hello')\n", **headers):
    boundary = "----of-the-agent"
    parts = []
    for name, value in (("description", b"says hello"), ("envVars", b'{"WHO":"agent"}')):
        head = f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n'
        parts.append(head.encode() + value)
    head = f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="code.zip"\r\n'
    parts.append(head.encode() + b"Content-Type: application/zip\r\n\r\n" + code(source))
    body = b"\r\n".join(parts) + f"\r\n--{boundary}--\r\n".encode()
    kind = f"multipart/form-data; boundary={boundary}"
    return ("POST", f"{prefix}/upload", body), {
        "Content_Type": kind, "x_runtime": runtime, "x_memory_mb": memory, **headers,
    }


def workers_and_system(prefix):
    status = {"status": "online", "worker_count": int, "active_jobs": int, "pools": POOLS,
              "uptime_seconds": NUMBER, "timestamp": NUMBER}
    for n, worker in enumerate(("agent-1", "agent-2")):
        pools = {"python": 2, "nodejs": 1, "cpp": 0, "go": 0}
        beat = {"workerId": worker, "status": "healthy", "pools": pools, "activeJobs": 1,
                "uptimeSeconds": 12.5 + n, "timestamp": time.time()}
        _, _, text = call("POST", f"{prefix}/worker/heartbeat", beat)
        assert text == '{"ok":true}', text
    shape = {"workerId": str, "status": str, "pools": dict, "activeJobs": int, "uptimeSeconds": NUMBER,
             "timestamp": NUMBER, "lastSeen": int, "receivedAt": int,
             "healthStatus": ["healthy", "unhealthy"], "lastSeenAgo": re.compile(r"\d+s")}
    for path in ("/workers", "/worker/status"):
        listed = expect(200, {"totalWorkers": 2, "healthyWorkers": 2, "workers": list}, "GET", prefix + path)
        for worker in listed["workers"]:
            fits(worker, shape, path)
            assert abs(worker["lastSeen"] / 1000 - time.time()) < 600, worker
    system = expect(200, status, "GET", f"{prefix}/system/status")
    fits(system, {"worker_count": 2, "active_jobs": 2, "uptime_seconds": 13.5}, "/system/status")
    assert system["pools"] == {"python": 4, "nodejs": 2, "cpp": 0, "go": 0}, system
    assert abs(system["timestamp"] - time.time()) < 600, system
    problem(400, "invalid_request", "POST", f"{prefix}/worker/heartbeat", {"status": "healthy"})


def no_heartbeats():
    if HAS_LOCAL_WORKER:
        # The local worker reports when its loop runs.
        status = eventually("a local worker", lambda: online(expect(200, {}, "GET", "/api/system/status")))
        shape = {"status": "online", "pools": POOLS, "active_jobs": int, "timestamp": NUMBER}
        fits(status, shape, "a local worker")
        return
    none = expect(200, {}, "GET", "/api/system/status")
    zeros = {"python": 0, "nodejs": 0, "cpp": 0, "go": 0}
    assert none == {"pools": zeros, "active_jobs": 0, "status": "offline"}, none


def online(status):
    return status if status["status"] == "online" else None


def functions(prefix):
    request, headers = upload(prefix, x_function_name=urllib.parse.quote("grüße"))
    made = expect(200, {"success": True, "functionId": str}, *request, **headers)
    function = made["functionId"]
    listed = expect(200, {
        "functionId": str, "name": str, "description": str, "runtime": str, "memoryMb": int,
        "invocations": int, "avgDuration": int, "avgHandlerDuration": (int, float, type(None)),
        "uploadedAt": str,
    }, "GET", f"{prefix}/functions")
    [mine] = [each for each in listed if each["functionId"] == function]
    fits(mine, {"name": "grüße", "description": "says hello", "runtime": "python", "memoryMb": 128,
                "invocations": 0, "avgDuration": 0, "avgHandlerDuration": None}, "a new function")
    path = f"{prefix}/functions/{function}"
    shown = {"id": function, "name": "grüße", "description": str, "runtime": "python", "memoryMb": int,
             "s3Key": str, "uploadedAt": TIME}
    expect(200, shown, "GET", path)
    # The dashboard sends recommendations unchanged; the minimum is 32.
    changes = (({"memory": 32}, 32), ({"memoryMb": 512}, 512), ({"memory": 128, "memoryMb": 128}, 128))
    for change, memory in changes:
        expect(200, {"success": True, "functionId": function}, "PUT", path, change)
        expect(200, {**shown, "memoryMb": memory}, "GET", path)
    for bad in ({"memory": 31}, {"memoryMb": 128, "memory": 256}, {"memoryMb": "128"}, {}):
        problem(400, "invalid_request", "PUT", path, bad)
    for runtime, memory in (("python", "64"), ("go", "2048"), ("nodejs", "lots")):
        request, headers = upload(prefix, runtime, memory)
        error = problem(400, "invalid_request", *request, **headers)
        assert f"Invalid memoryMb for {runtime}" in error, error
    expect(200, {"executions": int, "avgResponseTime": NUMBER, "errors": int}, "GET", f"{path}/metrics")
    return function


def runs(prefix, function):
    """Runs functions. Returns the ids of the executions, the newest last."""
    result = {"requestId": UUID, "functionId": function, "status": "SUCCESS", "exitCode": 0, "stdout": str,
              "stderr": str, "durationMs": NUMBER}
    body = {"functionId": function, "inputData": {"name": "Ada"}, "modelId": "m1", "unknown": True}
    sync = expect(200, result, "POST", f"{prefix}/run", body)["requestId"]
    status, fields, text = call("POST", f"{prefix}/run", body, x_async="true")
    job = json.loads(text)["jobId"]
    accepted = json.dumps({"status": "ACCEPTED", "jobId": job}, separators=(",", ":"))
    assert (status, text) == (202, accepted), text
    assert fields["Location"] == f"{prefix}/status/{job}", fields["Location"]
    for path in (fields["Location"], f"{prefix}/status/{job.upper()}"):
        done = eventually(path, lambda path=path: not_pending(expect(200, {}, "GET", path)))
        fits(done, {**result, "requestId": job}, path)
    for none in (b'{"functionId":"hello"}', b'{"functionId":"hello","inputData":null}'):
        ran = expect(200, {"stdout": str}, "POST", f"{prefix}/run", none, Content_Type="application/json")
        printed = ran["stdout"]
        assert "{}" in printed and "null" not in printed, printed
    waited = {"status": "TIMEOUT", "jobId": UUID, "message": str}
    # The local worker runs the code, the other worker follows the input.
    request, headers = upload(prefix, source=f"import time\ntime.sleep({SLOW_MS} / 1000)\n")
    slow = {"functionId": expect(200, {}, *request, **headers)["functionId"]}
    slow["inputData"] = {"behave": "sleep", "ms": SLOW_MS}
    expect(202, waited, "POST", f"{prefix}/run", slow, Prefer="wait=0")
    problem(400, "invalid_request", "POST", f"{prefix}/run", {"inputData": 1})
    problem(404, "no_such_function", "POST", f"{prefix}/run", {"functionId": "no-such-function"})
    problem(404, "no_such_job", "GET", f"{prefix}/status/67e55044-10b1-426f-9247-bb680e5fe0c8")
    problem(400, "invalid_request", "GET", f"{prefix}/status/")
    return [sync, job]


def not_pending(status):
    if status.get("status") != "pending":
        return status
    fits(status, {"status": "pending", "message": str}, "/status")
    return None


def logs(prefix, function, ids):
    path = f"{prefix}/functions/{function}/logs"
    shape = {"id": UUID, "requestId": UUID, "timestamp": TIME, "status": str, "duration": int,
             "handlerDurationMs": (int, float, type(None)), "memory": int, "message": str}
    rows = eventually(path, lambda: all_of(expect(200, shape, "GET", path), ids))
    for query in ("?limit=5000", "?startTime=2020-01-01", "?status=SUCCESS&limit=2"):
        assert expect(200, shape, "GET", path + query) == rows, query
    assert expect(200, shape, "GET", f"{path}?endTime=2020-01-01") == []
    for request_id in (ids[0], ids[0].upper()):
        whole = expect(200, shape, "GET", f"{path}/{request_id}")
        assert whole["requestId"] == ids[0], whole
    problem(404, "no_such_log", "GET", f"{path}/absent")
    # Longer messages are truncated to 200 units and three dots.
    body = {"functionId": "hello", "inputData": "😀" + "x" * 500}
    made = expect(200, {"requestId": UUID}, "POST", f"{prefix}/run", body)["requestId"]
    path = f"{prefix}/functions/hello/logs"
    rows = eventually(path, lambda: all_of(expect(200, shape, "GET", path), [made]))
    [cut] = [row["message"] for row in rows if row["requestId"] == made]
    assert cut.endswith("...") and len(cut.encode("utf-16-le")) // 2 == 203, cut
    whole = expect(200, {"message": str}, "GET", f"{path}/{made}")["message"]
    assert whole.startswith(cut[:-3]) and len(whole) > 500, whole


def all_of(rows, ids):
    return rows if {row["requestId"] for row in rows} >= set(ids) else None


def dashboard(prefix, function):
    """Events that the dashboard classifies by text and level."""
    problem(401, "unauthorized", "GET", f"{prefix}/functions", key="wrong")
    problem(401, "unauthorized", "GET", f"{prefix}/functions", key=None)
    shape = {"id": UUID, "level": ["INFO", "WARN", "ERROR"], "timestamp": TIME, "msg": str}
    members = {
        f"Function Executed: {function}": {
            "level": "INFO", "functionId": function, "requestId": UUID, "duration": NUMBER,
            "handlerDurationMs": (int, float, type(None)), "memory": int, "status": "SUCCESS", "exitCode": 0,
        },
        "Run Request": {"requestId": UUID, "functionId": str, "modelId": str, "mode": ["SYNC", "ASYNC"]},
        "Sync Wait Timed Out": {"level": "WARN", "requestId": UUID},
        "Upload Success": {"functionId": str},
        "Function Updated": {"functionId": function},
        "Function Deleted": {"functionId": function},
        "Heartbeat received from agent-1": {"activeJobs": int, "pools": dict},
        "Unauthorized access": {"level": "WARN", "ip": "127.0.0.1"},
    }
    entries = expect(200, shape, "GET", f"{prefix}/logs")
    assert len(entries) <= 100 and len({entry["id"] for entry in entries}) == len(entries), entries
    for msg, shape in members.items():
        # The newest: events of several functions may have the same text.
        found = [entry for entry in entries if entry["msg"] == msg]
        assert found, f"{msg!r} is not in the list: {[entry['msg'] for entry in entries]}"
        fits(found[0], shape, msg)


def other_routes(prefix):
    models = expect(200, {"models": list, "warning": str}, "GET", f"{prefix}/models")["models"]
    assert len(models) == 1, models
    model = {"id": "llama3:8b", "name": str, "size": int, "details": dict, "status": "fallback"}
    fits(models[0], model, "a model")
    health = {"status": ["OK", "DEGRADED"], "version": str, "checks": dict}
    expect(200, health, "GET", f"{prefix}/health", key=None)
    expect(200, {"service": str, "version": str, "endpoints": list}, "GET", f"{prefix}/", key=None)
    expect(200, {"openapi": str, "paths": dict}, "GET", f"{prefix}/openapi.json", key=None)
    problem(404, "no_such_route", "GET", f"{prefix}/debug/loadtest")
    status, fields, _ = call("GET", f"{prefix}/run")
    assert (status, fields["Allow"]) == (405, "POST"), (status, fields["Allow"])
    status, fields, text = call("GET", f"{prefix}/metrics", key=None)
    assert status == 200 and fields["Content-Type"].startswith("text/plain"), fields
    for series in (
        r'^function_invocations_total\{functionId="hello",status="SUCCESS"\} \d+$',
        r'^function_duration_seconds_sum\{functionId="hello",status="SUCCESS"\} [\d.e+-]+$',
        r'^http_request_duration_seconds_count\{method="POST",route="/run",status_code="200"\} \d+$',
    ):
        assert re.search(series, text, re.M), f"no series {series}"


def main():
    no_heartbeats()
    for prefix in ("", "/api"):
        workers_and_system(prefix)
        function = functions(prefix)
        ids = runs(prefix, function)
        logs(prefix, function, ids)
        deletion = {"success": True, "deletedId": function}
        deleted = expect(200, deletion, "DELETE", f"{prefix}/functions/{function}")
        assert set(deleted) == {"success", "deletedId"}, deleted
        problem(404, "no_such_function", "DELETE", f"{prefix}/functions/{function}")
        dashboard(prefix, function)
        other_routes(prefix)
        print(f"all answers under {prefix or '/'} match the contract", flush=True)


if __name__ == "__main__":
    main()
