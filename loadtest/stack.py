"""The processes of a load test: Redis, the stand-in for AWS, the gateway and bare Pingora, all on loopback.

The measured server has a core of its own, and everything else shares another one. So the CPU figures of the
gateway and of bare Pingora are taken under the same conditions.
"""

import contextlib
import json
import os
import pathlib
import re
import socket
import subprocess
import sys
import time
import urllib.request

ROOT = pathlib.Path(__file__).resolve().parent.parent
RELEASE = ROOT / os.environ.get("CARGO_TARGET_DIR", "target") / "release"
KEY = "load-test"
FUNCTIONS = 100_000
SQS_MS, DYNAMODB_MS, WORKER_MS = 8, 4, 5

CORES = sorted(os.sched_getaffinity(0))
# On a machine with one core everything shares it. The report says so.
SERVER_CORES = {CORES[0]}
OTHER_CORES = set(CORES[1:2] or CORES)

LIMITS = """
[[limit]]
name = "api-key"
identity = "key"
routes = ["/run"]
rate = 100000000
period_s = 60
burst = 100000000
mode = "leased"
on_redis_loss = "local"
"""
LIMITS_BY_ADDRESS = LIMITS + LIMITS.replace('"api-key"', '"address"').replace(
    'identity = "key"', 'identity = "ip"'
)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def until(look, what, seconds=30.0):
    """The first value of `look` that is not None."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            found = look()
            if found is not None:
                return found
        time.sleep(0.1)
    raise TimeoutError(f"{what}: not within {seconds:.0f} s")


def fetch(url, body=None):
    with urllib.request.urlopen(url, data=body, timeout=10) as answer:
        return answer.read().decode()


class Process:
    """A started process, and its use of CPU and memory."""

    def __init__(self, popen, port):
        self.popen = popen
        self.port = port
        self.pid = popen.pid

    def cpu_seconds(self):
        fields = pathlib.Path(f"/proc/{self.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def memory_mb(self, which="VmRSS"):
        status = pathlib.Path(f"/proc/{self.pid}/status").read_text()
        return int(re.search(rf"{which}:\s+(\d+)", status)[1]) / 1024

    def forget_peak(self):
        pathlib.Path(f"/proc/{self.pid}/clear_refs").write_text("5")


class Gateway(Process):
    def metric(self, name):
        text = fetch(f"http://127.0.0.1:{self.port}/metrics")
        return float(re.search(rf"^{name} (\S+)$", text, re.M)[1])

    def settle(self):
        """Waits until every accepted job has its row, so that no run includes work of the run before."""
        until(lambda: True if self.metric("infra_jobs_in_flight") == 0 else None, "rows of all jobs", 120)


class StandIn(Process):
    def stats(self):
        return json.loads(fetch(f"http://127.0.0.1:{self.port}/_stand-in/stats"))

    def reset(self):
        fetch(f"http://127.0.0.1:{self.port}/_stand-in/reset", b"")

    def set(self, **settings):
        fetch(f"http://127.0.0.1:{self.port}/_stand-in/settings", json.dumps(settings).encode())


class Redis(Process):
    def commands(self):
        """Commands executed so far, including this one and those of scripts."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=5) as s:
            s.sendall(b"INFO stats\r\n")
            answer = b""
            while b"total_commands_processed:" not in answer or not answer.endswith(b"\r\n"):
                answer += s.recv(65536)
        return int(re.search(rb"total_commands_processed:(\d+)", answer)[1])


class Stack:
    """A context manager that starts the processes and ends them."""

    def __init__(self, directory):
        self.directory = pathlib.Path(directory)
        self.processes = []

    def __enter__(self):
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        for popen in reversed(self.processes):
            popen.terminate()
        for popen in reversed(self.processes):
            try:
                popen.wait(timeout=20)
            except subprocess.TimeoutExpired:
                popen.kill()

    def run(self, command, cores, output, **env):
        popen = subprocess.Popen(
            [str(part) for part in command],
            cwd=self.directory,
            # No other variables: those of the shell may name another Redis or AWS.
            env={"PATH": os.environ["PATH"], "HOME": str(self.directory), **env},
            stdout=output,
            preexec_fn=lambda: os.sched_setaffinity(0, cores),
        )
        self.processes.append(popen)
        return popen

    def _start_redis(self, cores):
        port = free_port()
        redis = ["redis-server", "--port", port, "--save", "", "--appendonly", "no", "--bind", "127.0.0.1"]
        self.redis = Redis(self.run(redis, cores, subprocess.DEVNULL), port)
        until(lambda: self.redis.commands(), "Redis")

    def _start(self):
        os.sched_setaffinity(0, OTHER_CORES)
        self._start_redis(OTHER_CORES)
        port = free_port()
        latencies = ["--sqs-ms", SQS_MS, "--dynamodb-ms", DYNAMODB_MS, "--worker-ms", WORKER_MS]
        parts = ["--redis", f"127.0.0.1:{self.redis.port}", "--functions", FUNCTIONS, *latencies]
        command = [RELEASE / "examples/aws-stand-in", "--listen", f"127.0.0.1:{port}", *parts]
        self.stand_in = StandIn(self.run(command, OTHER_CORES, subprocess.DEVNULL), port)
        until(lambda: self.stand_in.stats(), "the stand-in")

        self.gateway = self.serve("limits-by-key", LIMITS)
        self.bare = {wait: self._bare(wait) for wait in (0, 8, 13)}

    def serve(self, name, limits):
        """Another gateway, with these limits. Its log lines go to a file, as on a server."""
        conf = self.directory / name
        conf.mkdir()
        (conf / "limits.toml").write_text(limits)
        (conf / "server.toml").write_text(
            '[listen]\naddress = "127.0.0.1"\nthreads = 1\n[http]\nconnections_max = 20000\n'
        )
        port, endpoint = free_port(), f"http://127.0.0.1:{self.stand_in.port}"
        env = {
            "PORT": str(port),
            "AWS_REGION": "eu-west-1",
            "AWS_ACCESS_KEY_ID": "a",
            "AWS_SECRET_ACCESS_KEY": "b",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_ENDPOINT_URL": endpoint,
            "TABLE_NAME": "functions",
            "LOGS_TABLE_NAME": "logs",
            "SQS_URL": f"{endpoint}/000000000000/tasks",
            "BUCKET_NAME": "code",
            "REDIS_HOST": "127.0.0.1",
            "REDIS_PORT": str(self.redis.port),
            "INFRA_API_KEY": KEY,
            "STATE_DIR": str(self.directory / f"state-{name}"),
        }
        with open(self.directory / f"{name}.log", "wb") as log:
            command = [RELEASE / "infra-controller", "serve", "--conf", conf]
            gateway = Gateway(self.run(command, SERVER_CORES, log, **env), port)
        until(lambda: fetch(f"http://127.0.0.1:{port}/readyz"), "the gateway")
        return gateway

    def bare_log(self, wait_ms):
        return self.directory / f"bare-{wait_ms}.log"

    def _bare(self, wait_ms):
        port = free_port()
        with open(self.bare_log(wait_ms), "wb") as log:
            command = [
                RELEASE / "examples/bare",
                "--listen",
                f"127.0.0.1:{port}",
                "--wait-ms",
                wait_ms,
                "--log",
            ]
            bare = Process(self.run(command, SERVER_CORES, log), port)
        until(lambda: fetch(f"http://127.0.0.1:{port}/"), "bare Pingora")
        return bare


def check_tools():
    for program in ("redis-server", "wrk"):
        if not any((pathlib.Path(d) / program).exists() for d in os.environ["PATH"].split(":")):
            sys.exit(f"loadtest: {program} is missing; `make loadtest` installs it")
