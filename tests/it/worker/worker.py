"""A worker of the function platform for the tests. It is written from the contract.

It polls the task queue, "runs" each job, and reports the result in the order of the contract: PUBLISH
result:<requestId>, SETEX job:<requestId> 3600, delete the message. The input selects the behaviour of a job:

    {"behave": "echo"}                        the default: stdout is the input as JSON
    {"behave": "sleep", "ms": 500}            echo after a delay
    {"behave": "hold", "port": 12345}         echo, once the test closes a connection to this port
    {"behave": "fail"}                        exit code 1, status FAILED, the input on stderr
    {"behave": "stdout", "text": "…", "times": 3}   stdout is the text, repeated
    {"behave": "literal", "base64": "…"}      the result is exactly these bytes
    {"behave": "huge", "bytes": 5000000}      a result of about that size
    {"behave": "no_status"}                   a result without status and exit code
    {"behave": "code"}                        stdout is the code of the function (main.py in the bucket)
    {"behave": "publish_twice"}               the result is published twice, as after a redelivery
    {"behave": "store_only"}                  stored, never published
    {"behave": "publish_only"}                published, never stored
    {"behave": "another_id"}                  published also under an unknown job id
    {"behave": "never"}                       the message is deleted, and there is no result

To run it by hand, set the environment of the controller (SQS_URL, REDIS_HOST and REDIS_PORT or REDIS_URL,
AWS_*), then `python worker.py`. It prints one line when it is ready, and exits on SIGTERM or SIGINT. RUNS_MAX
is the number of jobs at once.
"""

import base64
import io
import json
import os
import signal
import socket
import sys
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor

import boto3
import redis
from botocore.config import Config

POLLERS = 2
RUNS_MAX = int(os.environ.get("RUNS_MAX", "64"))
RESULT_TTL_S = 3600
REDIS_RETRY_S = 90
WORKER_ID = f"test-worker-{os.getpid()}"


def connect_redis():
    url = os.environ.get("REDIS_URL")
    if url:
        return redis.Redis.from_url(url)
    return redis.Redis(host=os.environ["REDIS_HOST"], port=int(os.environ.get("REDIS_PORT", "6379")))


def connect_sqs():
    endpoint = os.environ.get("AWS_ENDPOINT_URL_SQS") or os.environ.get("SQS_ENDPOINT")
    config = Config(max_pool_connections=RUNS_MAX + POLLERS, retries={"max_attempts": 2})
    return boto3.client("sqs", region_name=os.environ["AWS_REGION"], endpoint_url=endpoint, config=config)


def source_of(job):
    """The source of the function, read from the bucket."""
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("S3_ENDPOINT")
    path_style = Config(s3={"addressing_style": "path"})
    s3 = boto3.client("s3", region_name=os.environ["AWS_REGION"], endpoint_url=endpoint, config=path_style)
    code = s3.get_object(Bucket=job["s3Bucket"], Key=job["s3Key"])["Body"].read()
    return zipfile.ZipFile(io.BytesIO(code)).read("main.py").decode()


def result_of(job, started):
    """A successful result with all members of the contract."""
    took_ms = (time.monotonic() - started) * 1000
    return {
        "requestId": job["requestId"],
        "functionId": job["functionId"],
        "workerId": WORKER_ID,
        "status": "SUCCESS",
        "exitCode": 0,
        "stdout": json.dumps(job.get("input"), ensure_ascii=False),
        "stderr": "",
        "durationMs": round(took_ms) + 7,
        "handlerDurationMs": 5,
        "peakMemoryBytes": 25 * 2**20,
        "allocatedMemoryMb": job["memoryMb"],
        "optimizationTip": None,
        "estimatedSavings": None,
        "recommendedMemoryMb": None,
        "cpuUsage": 0.1,
        "networkRx": 0,
        "networkTx": 0,
        "diskRead": 0,
        "diskWrite": 0,
        "outputFiles": [],
        "llm_token_count": 0,
    }


def run(job):
    """The bytes of the result."""
    started = time.monotonic()
    given = job.get("input")
    given = given if isinstance(given, dict) else {}
    behave = given.get("behave", "echo")
    if behave == "literal":
        return base64.b64decode(given["base64"])
    if behave == "sleep":
        time.sleep(given["ms"] / 1000)
    result = result_of(job, started)
    if behave == "fail":
        result.update(status="FAILED", exitCode=1, stdout="", stderr=result["stdout"])
    elif behave == "code":
        result["stdout"] = source_of(job)
    elif behave == "stdout":
        result["stdout"] = given["text"] * given.get("times", 1)
    elif behave == "huge":
        result["stdout"] = "x" * given["bytes"]
    elif behave == "no_status":
        del result["status"], result["exitCode"]
    return json.dumps(result, ensure_ascii=False).encode()


def execute(store, *command):
    """Sends a command to Redis, with retries during an outage."""
    end = time.monotonic() + REDIS_RETRY_S
    while True:
        try:
            return store.execute_command(*command)
        except (redis.ConnectionError, redis.TimeoutError):
            if time.monotonic() > end:
                raise
            time.sleep(0.1)


def handle(sqs, store, queue_url, message):
    job = json.loads(message["Body"])
    given = job.get("input")
    behave = given.get("behave") if isinstance(given, dict) else None
    request_id = job["requestId"]
    if behave == "hold":
        with socket.create_connection(("127.0.0.1", given["port"])) as held:
            held.sendall(f"{request_id}\n".encode())
            held.recv(1)
    result = run(job)
    if behave == "another_id":
        execute(store, "PUBLISH", f"result:{request_id[:-12]}{0:012x}", result)
    if behave not in ("store_only", "never"):
        for _ in range(2 if behave == "publish_twice" else 1):
            execute(store, "PUBLISH", f"result:{request_id}", result)
    if behave not in ("publish_only", "never"):
        # SETEX, as in the contract. The method of the library for it is deprecated.
        execute(store, "SETEX", f"job:{request_id}", RESULT_TTL_S, result)
    sqs.delete_message(QueueUrl=queue_url, ReceiptHandle=message["ReceiptHandle"])


def handle_or_report(permits, *args):
    try:
        handle(*args)
    except Exception as error:  # one invalid message must not end the worker
        print(f"job failed: {error!r}", file=sys.stderr, flush=True)
    finally:
        permits.release()


def poll(sqs, store, queue_url, pool, permits):
    while True:
        try:
            answer = sqs.receive_message(
                QueueUrl=queue_url,
                MaxNumberOfMessages=10,
                WaitTimeSeconds=2,
                # Longer than any behaviour: a message is redelivered only if its worker has died.
                VisibilityTimeout=120,
            )
        except Exception as error:
            print(f"poll failed: {error!r}", file=sys.stderr, flush=True)
            time.sleep(0.2)
            continue
        for message in answer.get("Messages", []):
            permits.acquire()  # acquired before submit, because the queue of the pool is unbounded
            pool.submit(handle_or_report, permits, sqs, store, queue_url, message)


def main():
    # Blocked in every thread and waited for below. A signal handler that sets an Event can deadlock with the
    # wait that it interrupts.
    signals = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    queue_url = os.environ["SQS_URL"]
    sqs, store = connect_sqs(), connect_redis()
    store.ping()
    pool = ThreadPoolExecutor(max_workers=RUNS_MAX)
    permits = threading.BoundedSemaphore(RUNS_MAX)
    for _ in range(POLLERS):
        args = (sqs, store, queue_url, pool, permits)
        threading.Thread(target=poll, args=args, daemon=True).start()
    print("worker ready", flush=True)
    signal.sigwait(signals)
    # Not delayed by runs that sleep. Their messages are redelivered, as after a crash.
    os._exit(0)


if __name__ == "__main__":
    main()
