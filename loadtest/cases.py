"""The cases: their load, and the figures of each run."""

import json
import os
import re
import resource
import socket
import statistics
import subprocess
import threading
import time

from stack import DYNAMODB_MS, KEY, LIMITS_BY_ADDRESS, OTHER_CORES, RELEASE, SQS_MS, WORKER_MS

BODY = '{"functionId":"fn-0","inputData":{"name":"Ada"}}'
ASYNC, HALF, SYNC = "asynchronous", "asynchronous, half rate", "synchronous"
BARE_NOW, BARE_8, BARE_13 = "bare, at once", "bare, after 8 ms", "bare, after 13 ms"
# Connections of each case. A bare case has as many as the case that is compared with it.
CONNECTIONS = {ASYNC: 256, HALF: 256, SYNC: 512, BARE_NOW: 256, BARE_8: 256, BARE_13: 512}
# Memory counts as released when it is at most this much above its value before.
AFTER_MB, RELEASED_WITHIN_S = 100, 60
# The order within a round. The half rate is that of the run before it.
ORDER = [BARE_NOW, BARE_8, ASYNC, HALF, BARE_13, SYNC]


class MemorySampler(threading.Thread):
    """Reads the resident memory of a process twice a second."""

    def __init__(self, process):
        super().__init__(daemon=True)
        self.process = process
        self.started = time.monotonic()
        self.samples = []
        self.stopped = threading.Event()

    def run(self):
        while not self.stopped.wait(0.5):
            self.samples.append((time.monotonic() - self.started, self.process.memory_mb()))


def milliseconds(text):
    number, unit = re.fullmatch(r"([\d.]+)(us|ms|s|m)", text).groups()
    return float(number) * {"us": 0.001, "ms": 1.0, "s": 1000.0, "m": 60000.0}[unit]


def wrk_script(directory, asynchronous, body):
    """The request is formatted once: wrk shares its core, so it must cost little."""
    path = directory / ("async.lua" if asynchronous else "sync.lua")
    headers = {"x-api-key": KEY, "content-type": "application/json"} | (
        {"x-async": "true"} if asynchronous else {}
    )
    lines = [f"wrk.headers[{json.dumps(k)}] = {json.dumps(v)}" for k, v in headers.items()]
    lines += ["wrk.method = 'POST'", f"wrk.body = [[{body}]]", "local request_text"]
    lines += ["function init() request_text = wrk.format() end", "function request() return request_text end"]
    path.write_text("\n".join(lines) + "\n")
    return path


def wrk(directory, port, connections, seconds, asynchronous, body=BODY):
    script = wrk_script(directory, asynchronous, body)
    command = [
        "wrk",
        "-t1",
        f"-c{connections}",
        f"-d{seconds}s",
        "--timeout",
        "30s",
        "--latency",
        "-s",
        script,
    ]
    target = f"http://127.0.0.1:{port}/run"
    out = subprocess.run(
        [*command, target], check=True, capture_output=True, text=True, timeout=seconds + 60
    ).stdout
    requests = int(re.search(r"(\d+) requests in", out)[1])
    failed = sum(int(n) for n in re.findall(r"Non-2xx or 3xx responses: (\d+)", out))
    failed += sum(int(n) for n in re.findall(r"(?:connect|read|write|timeout) (\d+)", out))
    percentile = lambda p: milliseconds(re.search(rf"^\s+{p}%\s+(\S+)", out, re.M)[1])
    return {
        "requests": requests,
        "rps": requests / seconds,
        "p50_ms": percentile(50),
        "p99_ms": percentile(99),
        "failed": failed,
    }


def load(port, *options, seconds):
    """The generator for the load that wrk cannot make; see load.rs."""
    command = [
        RELEASE / "examples/load",
        "--target",
        f"127.0.0.1:{port}",
        "--key",
        KEY,
        "--seconds",
        seconds,
        *options,
    ]
    out = subprocess.run(
        [str(p) for p in command], check=True, capture_output=True, text=True, timeout=seconds + 90
    ).stdout
    return json.loads(out)


def measured(stack, gateway, make_load):
    """One run against the gateway: the figures of the load, and the cost until all rows are written."""
    gateway.settle()
    stack.stand_in.reset()
    gateway.forget_peak()
    commands, cpu = stack.redis.commands(), gateway.cpu_seconds()
    run = make_load()
    gateway.settle()
    cpu = gateway.cpu_seconds() - cpu
    commands = stack.redis.commands() - commands - 1
    stats = stack.stand_in.stats()
    calls, n = stats["operations"], max(1, run["requests"])
    return run | {
        "cpu_us": cpu / n * 1e6,
        "aws_calls": sum(calls.values()) / n,
        "redis_commands": (commands - stats["redis_commands"]) / n,
        "mean_batch": stats["messages"] / max(1, calls.get("SendMessageBatch", 0)),
        "rows": stats["rows"],
        "messages": stats["messages"],
        "peak_mb": gateway.memory_mb("VmHWM"),
        "calls": calls,
    }


def round_of(stack, seconds):
    """All cases in turn, so that other load of the machine affects all of them."""
    runs = {}
    for name in ORDER:
        runs[name] = case(stack, name, seconds, runs)
    return runs


def case(stack, name, seconds, before):
    """One run of one case. `before`: the earlier runs of this round."""
    connections, gateway = CONNECTIONS[name], stack.gateway
    if name in (ASYNC, SYNC):
        return measured(
            stack, gateway, lambda: wrk(stack.directory, gateway.port, connections, seconds, name == ASYNC)
        )
    if name == HALF:
        return measured(stack, gateway, lambda: at_rate(stack, before[ASYNC]["rps"] / 2, seconds))
    wait_ms = {BARE_NOW: 0, BARE_8: 8, BARE_13: 13}[name]
    bare, log = stack.bare[wait_ms], stack.bare_log(wait_ms)
    cpu, logged = bare.cpu_seconds(), log.stat().st_size
    run = wrk(stack.directory, bare.port, connections, seconds, True)
    if log.stat().st_size - logged < 100 * run["requests"]:
        raise RuntimeError("bare Pingora does not write its log lines")
    return run | {"cpu_us": (bare.cpu_seconds() - cpu) / run["requests"] * 1e6}


def one_at_a_time(stack, requests):
    """One request at a time: from the queue's confirmation to the answer, in milliseconds."""
    head = f"POST /run HTTP/1.1\r\nhost: gateway\r\nx-api-key: {KEY}\r\n"
    head += "content-type: application/json\r\nx-async: true\r\n"
    request = (head + f"content-length: {len(BODY)}\r\n\r\n{BODY}").encode()
    after = []
    with socket.create_connection(("127.0.0.1", stack.gateway.port), timeout=10) as s:
        s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(requests):
            s.sendall(request)
            answer = s.recv(65536)
            answered = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
            if not answer.startswith(b"HTTP/1.1 202"):
                raise RuntimeError(f"not accepted: {answer[:40]!r}")
            after.append((answered - stack.stand_in.stats()["last_confirmed_ns"]) / 1e6)
    return {"requests": requests, "after_confirmation_ms": statistics.median(after), "worst_ms": max(after)}


def at_rate(stack, rate, seconds):
    """A fixed rate. A latency counts from the time at which its request was due."""
    connections = CONNECTIONS[HALF]
    return load(
        stack.gateway.port, "--connections", connections, "--async", "--rate", round(rate), seconds=seconds
    )


def waiters(stack, connections):
    """Many synchronous runs that wait at the same time."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    gateway = stack.gateway
    gateway.settle()
    gateway.forget_peak()
    before = gateway.memory_mb()
    stack.stand_in.set(worker_ms=8000)
    most = []
    stopped = threading.Event()

    def watch():
        while not stopped.wait(1.0):
            most.append(gateway.metric("infra_waiters"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        run = load(gateway.port, "--connections", connections, "--requests", connections, seconds=60)
    finally:
        stopped.set()
        watcher.join()
        stack.stand_in.set(worker_ms=WORKER_MS)
    gateway.settle()
    near, ended = before + AFTER_MB, time.monotonic()
    # Settled results expire after a minute, and the allocator releases memory late, on later allocations.
    while gateway.memory_mb() > near and time.monotonic() < ended + RELEASED_WITHIN_S:
        at_rate(stack, 50, 1)
    return run | {
        "released_after_s": time.monotonic() - ended,
        "waiting_most": max(most, default=0),
        "before_mb": before,
        "peak_mb": gateway.memory_mb("VmHWM"),
        "after_mb": gateway.memory_mb(),
        "waiters_left": gateway.metric("infra_waiters"),
    }


def growth(stack, pairs, many, seconds):
    """CPU a request with one function and one address, and with many of each, in turn.

    Both have the same turnover of connections.
    """
    few, gateway = stack.serve("few", LIMITS_BY_ADDRESS), stack.serve("many", LIMITS_BY_ADDRESS)
    turnover = ["--connections", 256, "--async", "--requests-per-connection", 20]
    several = ["--functions", many, "--addresses", many]
    # Each function and address once: the first lookup of each is not measured.
    once = ["--connections", 256, "--async", "--requests-per-connection", 1, "--requests", many]
    load(gateway.port, *once, *several, seconds=120)
    # As many requests with one function and one address.
    load(few.port, *once, seconds=120)
    runs = []
    for pair in range(pairs):
        skip = ["--first", pair * many // pairs]
        kinds = [("one", few, []), ("many", gateway, [*several, *skip])]
        run = {}
        for kind, served, more in kinds[:: 1 if pair % 2 == 0 else -1]:  # the speed of the machine may drift
            run[kind] = measured(stack, served, lambda: load(served.port, *turnover, *more, seconds=seconds))
        runs.append(run | {"ratio": run["many"]["cpu_us"] / run["one"]["cpu_us"]})
    return {"many": many, "pairs": runs, "ratio": statistics.median(run["ratio"] for run in runs)}


SETTING = (
    f"SQS {SQS_MS} ms, DynamoDB {DYNAMODB_MS} ms, worker {WORKER_MS} ms; rows, a leased limit, log lines"
)
PINNED = (
    "server on one core, everything else on another"
    if os.cpu_count() > 1 and len(OTHER_CORES)
    else "one core for all"
)
