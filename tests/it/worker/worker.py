"""A worker of the function platform, for the tests: written from the contract alone.

It polls the task queue, "runs" each job, and tells the result in the order the contract fixes: PUBLISH
result:<requestId>, SETEX job:<requestId> 3600, delete the message. What a job does is chosen by its input:

    {"behave": "echo"}                        the default: stdout is the input as JSON
    {"behave": "sleep", "ms": 500}            echo, later
    {"behave": "fail"}                        exit code 1, status FAILED, the input on stderr
    {"behave": "stdout", "text": "…", "times": 3}   stdout is the text, repeated
    {"behave": "literal", "base64": "…"}      the result is exactly these bytes
    {"behave": "huge", "bytes": 5000000}      a result of about that size
    {"behave": "no_status"}                   a result without status and exit code
    {"behave": "code"}                        stdout is the source of the job's code (main.py), fetched from the bucket
    {"behave": "publish_twice"}               the same result twice, as a second run of the message gives
    {"behave": "store_only"}                  stored, never published
    {"behave": "publish_only"}                published, never stored
    {"behave": "another_id"}                  published under the id of a job that never was as well
    {"behave": "never"}                       the message is deleted, and no word of a result

By hand: the environment is the controller's (SQS_URL, REDIS_HOST and REDIS_PORT or REDIS_URL, AWS_*), then
`python worker.py`. It prints one line when it is ready, and ends on SIGTERM or SIGINT.
"""

import base64
import io
import json
import os
import signal
import sys
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor

import boto3
import redis
from botocore.config import Config

POLLERS = 2
RUNS_MAX = 64
RESULT_TTL_S = 3600
REDIS_AWAY_S = 90
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
    """The source of a job's code, as a worker that runs it would fetch it."""
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("S3_ENDPOINT")
    path_style = Config(s3={"addressing_style": "path"})
    s3 = boto3.client("s3", region_name=os.environ["AWS_REGION"], endpoint_url=endpoint, config=path_style)
    code = s3.get_object(Bucket=job["s3Bucket"], Key=job["s3Key"])["Body"].read()
    return zipfile.ZipFile(io.BytesIO(code)).read("main.py").decode()


def result_of(job, started):
    """The result of a run that went well, with every member the contract names."""
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
    """The bytes to publish for a job."""
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


def tell(store, *command):
    """One command to Redis, which may be away for a while."""
    give_up = time.monotonic() + REDIS_AWAY_S
    while True:
        try:
            return store.execute_command(*command)
        except (redis.ConnectionError, redis.TimeoutError):
            if time.monotonic() > give_up:
                raise
            time.sleep(0.1)


def handle(sqs, store, queue_url, message):
    job = json.loads(message["Body"])
    given = job.get("input")
    behave = given.get("behave") if isinstance(given, dict) else None
    result = run(job)
    request_id = job["requestId"]
    if behave == "another_id":
        tell(store, "PUBLISH", f"result:{request_id[:-12]}{0:012x}", result)
    if behave not in ("store_only", "never"):
        for _ in range(2 if behave == "publish_twice" else 1):
            tell(store, "PUBLISH", f"result:{request_id}", result)
    if behave not in ("publish_only", "never"):
        # SETEX as the contract has it; the library's own name for it is deprecated.
        tell(store, "SETEX", f"job:{request_id}", RESULT_TTL_S, result)
    sqs.delete_message(QueueUrl=queue_url, ReceiptHandle=message["ReceiptHandle"])


def handle_or_report(permits, *args):
    try:
        handle(*args)
    except Exception as error:  # one bad message must not end the worker
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
                # Longer than any behaviour: a message comes a second time only if its worker died.
                VisibilityTimeout=120,
            )
        except Exception as error:
            print(f"poll failed: {error!r}", file=sys.stderr, flush=True)
            time.sleep(0.2)
            continue
        for message in answer.get("Messages", []):
            permits.acquire()  # taken before submit: the pool's own queue has no bound
            pool.submit(handle_or_report, permits, sqs, store, queue_url, message)


def main():
    # Blocked in every thread and waited for below: a Python handler that sets an Event can find its lock taken by the
    # very wait that it interrupts, and then neither ends.
    ends = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, ends)
    queue_url = os.environ["SQS_URL"]
    sqs, store = connect_sqs(), connect_redis()
    store.ping()
    pool = ThreadPoolExecutor(max_workers=RUNS_MAX)
    permits = threading.BoundedSemaphore(RUNS_MAX)
    for _ in range(POLLERS):
        args = (sqs, store, queue_url, pool, permits)
        threading.Thread(target=poll, args=args, daemon=True).start()
    print("worker ready", flush=True)
    signal.sigwait(ends)
    # A run that sleeps must not hold up the end; its message comes again, as after any crash of a worker.
    os._exit(0)


if __name__ == "__main__":
    main()
