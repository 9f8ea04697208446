"""`make loadtest`, its second part: functions on `dev`, and on `infra-controller worker` behind a gateway.

    ROUNDS=5 SECONDS_EACH=8 python3 loadtest/worker.py     (QUICK=1: one short round)

Each case is measured beside what bounds it: the start of the same interpreter in the same sandbox, and an
fsync in the same directory. Traffic goes to loopback addresses only. Writes worker.md and worker.json to
loadtest/report/. Exits with 1 if a target is not met.
"""

import http.client
import io
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
import zipfile

import cases
from report import shown, target_rows
from run import QUICK, ROUNDS, SECONDS_EACH, machine
from stack import CORES, KEY, LIMITS, RELEASE, ROOT
from stack import Process, Stack, StandIn, check_tools, free_port, until

# Runs of each case with one client.
RUNS = 20 if QUICK else 100
PAUSE_S = 0.06
CONNECTIONS = 64
NETWORK = os.environ.get("NETWORK", "public")

SCRIPT = (ROOT / "src/backend/embedded/seed/hello/main.py").read_text()
HANDLER = "def handler(event, context):\n    return {'message': f\"Hello, {event['name']}!\"}\n"
INPUT = {"name": "Ada"}

PAUSED, START, BACK_TO_BACK = "script, with pauses", "start in the sandbox", "script, back to back"
HANDLER_1, HANDLER_64 = "handler, one client", f"handler, {CONNECTIONS} clients"
ASYNC, FSYNC, FLEET = "asynchronous, one client", "fsync", f"worker, handler, {CONNECTIONS} clients"
ORDER = [PAUSED, START, BACK_TO_BACK, HANDLER_1, HANDLER_64, ASYNC, FSYNC, FLEET]


def zipped(source):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("main.py", source)
    return file.getvalue()


def call(port, path, body=None, **headers):
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", body, {"x-api-key": KEY, **names})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.loads(answer.read())


def upload(port, source, handler):
    boundary = "a-boundary-of-the-load-test"
    head = f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="code.zip"\r\n\r\n'
    body = head.encode() + zipped(source) + f"\r\n--{boundary}--\r\n".encode()
    kind = f"multipart/form-data; boundary={boundary}"
    return call(port, "/upload", body, content_type=kind, x_handler=handler)["functionId"]


def request_of(function):
    return json.dumps({"functionId": function, "inputData": INPUT})


class Client:
    """One run after the other on one connection."""

    def __init__(self, port, function, **headers):
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        self.body = request_of(function)
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        self.headers = {"x-api-key": KEY, "content-type": "application/json", **names}

    def run(self):
        """The time until the whole answer, in milliseconds."""
        began = time.perf_counter()
        self.connection.request("POST", "/run", self.body, self.headers)
        answer = self.connection.getresponse()
        text = answer.read()
        took = (time.perf_counter() - began) * 1000
        if answer.status != 202 and (answer.status != 200 or b"Hello, Ada!" not in text):
            raise RuntimeError(f"{answer.status}: {text[:300]!r}")
        return took

    def runs(self, count, pause_s=0.0):
        took = []
        for _ in range(count):
            took.append(self.run())
            time.sleep(pause_s)
        self.connection.close()
        return figures(took)


def figures(took_ms):
    took_ms = sorted(took_ms)
    return {
        "runs": len(took_ms),
        "p50_ms": statistics.median(took_ms),
        "p99_ms": took_ms[min(len(took_ms) - 1, int(len(took_ms) * 0.99))],
        "failed": 0,
    }


class Dev(Process):
    """`dev` on all cores, with its data on the disk of the build."""

    def __init__(self, stack, directory):
        conf = directory / "dev-conf"
        conf.mkdir()
        (conf / "limits.toml").write_text("limit = []\n")
        (conf / "worker.toml").write_text(f'sandbox.mode = "required"\nsandbox.network = "{NETWORK}"\n')
        port = free_port()
        command = [RELEASE / "infra-controller", "dev", "--port", port]
        command += ["--data-dir", directory / "data", "--conf", conf]
        with open(directory / "dev.log", "wb") as log:
            super().__init__(stack.run(command, set(CORES), log, INFRA_API_KEY=KEY), port)
        until(lambda: call(port, "/functions"), "dev")
        self.script = upload(port, SCRIPT, "")
        self.handler = upload(port, HANDLER, "main.handler")

    def metric(self, series):
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        values = [float(line[len(series) + 1 :]) for line in lines if line.startswith(series + " ")]
        return values[0] if values else 0.0

    def settle(self):
        """Until there are no jobs, and the interpreters that wait were started."""
        until(lambda: True if self.metric("infra_jobs_in_flight") == 0 else None, "the end of all jobs", 120)
        time.sleep(1)


class WorkerStack(Stack):
    """A gateway, the stand-in for AWS with an inbox, and a worker of ours."""

    def _start(self):
        os.sched_setaffinity(0, CORES)
        self._start_redis(CORES)
        code, port = self.directory / "code.zip", free_port()
        code.write_bytes(zipped(HANDLER))
        command = [RELEASE / "examples/aws-stand-in", "--listen", f"127.0.0.1:{port}", "--code", code]
        command += ["--handler", "main.handler", "--functions", 1]
        self.stand_in = StandIn(self.run(command, CORES, subprocess.DEVNULL), port)
        until(lambda: self.stand_in.stats(), "the stand-in")
        self.gateway = self.serve("gateway", LIMITS)
        self.worker = self._worker()

    def _worker(self):
        conf, port = self.directory / "worker-conf", free_port()
        conf.mkdir()
        listener = f'listener.address = "127.0.0.1"\nlistener.port = {port}\n'
        (conf / "worker.toml").write_text(f'sandbox.network = "{NETWORK}"\n{listener}')
        endpoint = f"http://127.0.0.1:{self.stand_in.port}"
        env = {
            "AWS_REGION": "eu-west-1",
            "AWS_ACCESS_KEY_ID": "a",
            "AWS_SECRET_ACCESS_KEY": "b",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_ENDPOINT_URL": endpoint,
            "SQS_URL": f"{endpoint}/000000000000/tasks",
            "BUCKET_NAME": "code",
            "REDIS_HOST": "127.0.0.1",
            "REDIS_PORT": str(self.redis.port),
            "STATE_DIR": str(self.directory / "state-worker"),
        }
        with open(self.directory / "worker.log", "wb") as log:
            command = [RELEASE / "infra-controller", "worker", "--conf", conf]
            worker = Process(self.run(command, CORES, log, **env), port)
        health = f"http://127.0.0.1:{port}/health"
        until(lambda: urllib.request.urlopen(health, timeout=5).read(), "the worker")
        return worker


def starts(directory):
    """The same interpreter in the same sandbox, without a worker."""
    code, runs_dir = directory / "code", directory / "starts"
    for new in (code, runs_dir):
        new.mkdir(exist_ok=True)
    (code / "main.py").write_text(SCRIPT)
    command = [RELEASE / "examples/start", "--code", code, "--runs-dir", runs_dir]
    command += ["--runs", RUNS, "--network", NETWORK]
    out = subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True).stdout
    return json.loads(out) | {"failed": 0}


def fsyncs(directory):
    """Writes of a page to the end of a file, each with an fsync."""
    took = []
    with open(directory / "fsync", "wb", buffering=0) as file:
        for _ in range(RUNS):
            began = time.perf_counter()
            file.write(bytes(4096))
            os.fsync(file.fileno())
            took.append((time.perf_counter() - began) * 1000)
            time.sleep(0.02)
    return figures(took)


def many(directory, port, function, process):
    cpu = process.cpu_seconds()
    run = cases.wrk(directory, port, CONNECTIONS, SECONDS_EACH, False, request_of(function))
    return run | {"cpu_us": (process.cpu_seconds() - cpu) / max(1, run["requests"]) * 1e6}


def round_of(dev, stack, directory):
    """All cases in turn, so that other load of the machine affects all of them."""
    measures = {
        PAUSED: lambda: Client(dev.port, dev.script).runs(RUNS, PAUSE_S),
        START: lambda: starts(directory),
        BACK_TO_BACK: lambda: Client(dev.port, dev.script).runs(RUNS),
        HANDLER_1: lambda: Client(dev.port, dev.handler).runs(5 * RUNS),
        HANDLER_64: lambda: many(directory, dev.port, dev.handler, dev),
        ASYNC: lambda: Client(dev.port, dev.handler, x_async="true").runs(RUNS, 0.02),
        FSYNC: lambda: fsyncs(directory),
        FLEET: lambda: many(directory, stack.gateway.port, "fn-0", stack.worker),
    }
    runs = {}
    for name in ORDER:
        dev.settle()
        runs[name] = measures[name]()
    return runs


def targets_of(rounds, failed_runs):
    """(what, measured, bound, unit) of each target. It is met if the measured value is at most the bound."""
    median = lambda value: statistics.median(value(run) for run in rounds)
    p50 = lambda case: median(lambda run: run[case]["p50_ms"])
    failed = sum(run[case]["failed"] for run in rounds for case in ORDER) + failed_runs
    return [
        ("`dev`, script, a pause of 60 ms between runs: p50", p50(PAUSED), 8, "ms"),
        (
            "`dev`, script, back to back: p50 against the start in the sandbox",
            median(lambda run: run[BACK_TO_BACK]["p50_ms"] / run[START]["p50_ms"]),
            1.3,
            "×",
        ),
        ("`dev`, handler, one client: p50", p50(HANDLER_1), 2, "ms"),
        (
            f"`dev`, handler, {CONNECTIONS} clients: time per run (500 µs: 2,000 runs/s)",
            median(lambda run: 1e6 / run[HANDLER_64]["rps"]),
            500,
            "µs",
        ),
        (
            "`dev`, asynchronous, one client: p50 above an fsync",
            median(lambda run: run[ASYNC]["p50_ms"] - run[FSYNC]["p50_ms"]),
            1,
            "ms",
        ),
        ("runs that failed", failed, 0, ""),
    ]


def markdown(about, rounds, targets):
    lines = [
        f"`{about['command']}`, {about['date']}, commit {about['commit']}, on {about['machine']}; "
        f"network `{NETWORK}`, all on disk, no process pinned but the gateway of the fleet.",
        "",
        "| case | p50 ms | p99 ms | runs/s | CPU µs a run | failed |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for case in ORDER:
        of = lambda name: [run[case][name] for run in rounds if name in run[case]]
        median = lambda name: statistics.median(of(name)) if of(name) else None
        row = [case, *(shown(median(name)) for name in ("p50_ms", "p99_ms", "rps", "cpu_us"))]
        row.append(shown(sum(of("failed"))))
        lines.append("| " + " | ".join(row) + " |")
    lines += ["", "| target | measured | bound | |", "|---|---:|---:|---|"]
    for what, measured, bound, is_met in target_rows(targets):
        lines.append(f"| {what} | {measured} | {bound} | {'met' if is_met else '**NOT MET**'} |")
    return "\n".join(lines) + "\n"


def main():
    check_tools()
    about = machine()
    # On the disk: /tmp may be in memory.
    with tempfile.TemporaryDirectory(prefix="loadtest-", dir=RELEASE) as name, WorkerStack(name) as stack:
        directory = pathlib.Path(name)
        dev = Dev(stack, directory)
        for function in (dev.script, dev.handler):
            Client(dev.port, function).runs(5)
        Client(stack.gateway.port, "fn-0").runs(5)
        rounds = []
        for number in range(1, ROUNDS + 1):
            rounds.append(round_of(dev, stack, directory))
            p50 = ", ".join(f"{case} {rounds[-1][case]['p50_ms']:.2f}" for case in ORDER)
            print(f"round {number} of {ROUNDS}, p50 in ms: {p50}", flush=True)
        failed_runs = dev.metric('infra_worker_runs_total{runtime="python",status="FAILED"}')
    targets = targets_of(rounds, failed_runs)
    text = markdown(about, rounds, targets)
    report = ROOT / "loadtest/report"
    report.mkdir(exist_ok=True)
    (report / "worker.md").write_text(text)
    results = {"about": about, "rounds": rounds, "targets": targets}
    (report / "worker.json").write_text(json.dumps(results, indent=1))
    print(f"\n{text}\nwritten: {report}/worker.md, worker.json")
    if any(measured > bound for _, measured, bound, _ in targets):
        sys.exit("loadtest: a target was not met")


if __name__ == "__main__":
    main()
