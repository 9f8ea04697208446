"""Measures one `serve` node: requests a second and CPU microseconds a request, asynchronous and synchronous.

    make measure

Everything runs on loopback and ends by itself: a Redis, the AWS emulator of the tests, the Python worker of the tests,
the gateway (release build) and wrk. The emulator is in Python and takes most of the machine, so requests a second say
little about the gateway; the CPU of the gateway's own process, (utime + stime) / requests answered, does.
"""

import json
import os
import pathlib
import platform
import re
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request

import boto3

ROOT = pathlib.Path(__file__).resolve().parent.parent
GATEWAY = ROOT / os.environ.get("CARGO_TARGET_DIR", "target") / "release" / "infra-controller"
SECONDS = 10
CONNECTIONS = 32
REPEATS = 3
KEY = "measure"
FUNCTION = "measured"
AWS = {"region_name": "eu-west-1", "aws_access_key_id": "a", "aws_secret_access_key": "b"}


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def until_up(port, what):
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with socket.socket() as s:
            if s.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    sys.exit(f"measure: {what} is not up after 60 s")


def set_up(endpoint):
    """The queue, the tables and one function; returns the queue's URL."""
    dynamodb = boto3.client("dynamodb", endpoint_url=endpoint, **AWS)
    for table, keys in (("functions", ["functionId"]), ("logs", ["functionId", "timestamp"])):
        dynamodb.create_table(
            TableName=table,
            KeySchema=[{"AttributeName": k, "KeyType": t} for k, t in zip(keys, ("HASH", "RANGE"))],
            AttributeDefinitions=[{"AttributeName": k, "AttributeType": "S"} for k in keys],
            BillingMode="PAY_PER_REQUEST",
        )
    item = {"functionId": {"S": FUNCTION}, "runtime": {"S": "python"}, "memoryMb": {"N": "128"}, "s3Key": {"S": "k"}}
    dynamodb.put_item(TableName="functions", Item=item)
    return boto3.client("sqs", endpoint_url=endpoint, **AWS).create_queue(QueueName="tasks")["QueueUrl"]


def cpu_seconds(pid):
    fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def wrk(port, pid, script):
    """(requests a second, CPU µs a request, p50, p99, failed) of one run."""
    command = ["wrk", "-t1", f"-c{CONNECTIONS}", f"-d{SECONDS}s", "--timeout", "30s", "--latency", "-s", script]
    before = cpu_seconds(pid)
    out = subprocess.run([*command, f"http://127.0.0.1:{port}/run"], check=True, capture_output=True, text=True).stdout
    used = cpu_seconds(pid) - before
    requests = int(re.search(r"(\d+) requests in", out)[1])
    failed = sum(int(n) for n in re.findall(r"Non-2xx or 3xx responses: (\d+)", out))
    failed += sum(int(n) for n in re.findall(r"(?:read|write|timeout) (\d+)", out))
    percentile = lambda p: re.search(rf"^\s+{p}%\s+(\S+)", out, re.M)[1]
    return requests / SECONDS, used / requests * 1e6, percentile(50), percentile(99), failed


def lua(directory, asynchronous):
    path = pathlib.Path(directory) / ("async.lua" if asynchronous else "sync.lua")
    body = json.dumps({"functionId": FUNCTION, "inputData": {"name": "Ada"}})
    headers = {"x-api-key": KEY, "content-type": "application/json"} | ({"x-async": "true"} if asynchronous else {})
    lines = [f"wrk.headers[{json.dumps(k)}] = {json.dumps(v)}" for k, v in headers.items()]
    path.write_text(f"wrk.method = 'POST'\nwrk.body = [[{body}]]\n" + "\n".join(lines) + "\n")
    return str(path)


def quiet(port):
    """Waits until every accepted job has its row, so that one run does not pay for the one before."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics").read().decode()
        if re.search(r"^infra_jobs_in_flight 0$", text, re.M):
            return
        time.sleep(0.5)
    sys.exit("measure: jobs are left after 120 s")


def main():
    processes = []
    with tempfile.TemporaryDirectory() as directory:
        start = lambda *command, **env: processes.append(
            subprocess.Popen(command, cwd=directory, env={**os.environ, **env}, stdout=subprocess.DEVNULL)
        )
        try:
            measure(directory, processes, start)
        finally:
            for process in reversed(processes):
                process.terminate()
            for process in processes:
                process.wait(timeout=60)


def measure(directory, processes, start):
    redis, aws, port = free_port(), free_port(), free_port()
    start("redis-server", "--port", str(redis), "--save", "", "--appendonly", "no", "--bind", "127.0.0.1")
    emulator = str(pathlib.Path(sys.executable).parent / "ministack")
    start(emulator, GATEWAY_PORT=str(aws), BIND_HOST="127.0.0.1", SERVICES="sqs,dynamodb,s3", LOG_LEVEL="WARNING")
    until_up(redis, "Redis")
    until_up(aws, "the AWS emulator")
    endpoint = f"http://127.0.0.1:{aws}"
    env = {
        "AWS_REGION": "eu-west-1",
        "AWS_ACCESS_KEY_ID": "a",
        "AWS_SECRET_ACCESS_KEY": "b",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ENDPOINT_URL_SQS": endpoint,
        "TABLE_NAME": "functions",
        "LOGS_TABLE_NAME": "logs",
        "SQS_URL": set_up(endpoint),
        "REDIS_HOST": "127.0.0.1",
        "REDIS_PORT": str(redis),
        "INFRA_API_KEY": KEY,
        "BUCKET_NAME": "code",
        "PORT": str(port),
    }
    conf = pathlib.Path(directory) / "conf"
    conf.mkdir()
    limit = '[[limit]]\nname = "api-key"\nidentity = "key"\nroutes = ["/run"]\nrate = 100000000\nperiod_s = 60\n'
    (conf / "limits.toml").write_text(limit + 'burst = 100000000\non_redis_loss = "local"\n')
    start(sys.executable, str(ROOT / "tests/it/worker/worker.py"), **env)
    start(str(GATEWAY), "serve", "--conf", str(conf), **env)
    gateway = processes[-1].pid
    until_up(port, "the gateway")
    print(f"{platform.machine()}, {os.cpu_count()} cores, Linux {platform.release()}; wrk -t1 -c{CONNECTIONS} -d{SECONDS}s")
    print("| run | requests/s | CPU µs a request | p50 | p99 | failed |\n|---|---|---|---|---|---|")
    for name, asynchronous in (("asynchronous", True), ("synchronous", False)):
        runs = []
        for _ in range(REPEATS):
            runs.append(wrk(port, gateway, lua(directory, asynchronous)))
            quiet(port)
        rate, cpu, p50, p99, _ = sorted(runs, key=lambda run: run[1])[REPEATS // 2]
        failed = sum(run[4] for run in runs)
        print(f"| {name} | {rate:.0f} | {cpu:.0f} | {p50} | {p99} | {failed} |", flush=True)


main()
