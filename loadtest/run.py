"""`make loadtest`: the cost of a run compared with bare Pingora, and the targets under load.

    ROUNDS=5 SECONDS_EACH=8 python3 loadtest/run.py     (QUICK=1: one short round)

Traffic goes to loopback addresses only. Writes report.html, report.md and report.json to loadtest/report/.
Exits with 1 if a target is not met.
"""

import datetime
import os
import pathlib
import platform
import re
import statistics
import subprocess
import sys
import tempfile

import behaviour
import cases
import report
from cases import ASYNC, BARE_8, BARE_13, BARE_NOW, HALF, ORDER, SYNC
from stack import ROOT, SQS_MS, Stack, check_tools

QUICK = os.environ.get("QUICK") == "1"
ROUNDS = int(os.environ.get("ROUNDS", 1 if QUICK else 5))
SECONDS_EACH = int(os.environ.get("SECONDS_EACH", 2 if QUICK else 8))
WAITERS = 1_000 if QUICK else 10_000
MANY = 5_000 if QUICK else 100_000
PAIRS = 1 if QUICK else 5


def machine():
    models = re.findall(r"^model name\s*: (.+)$", pathlib.Path("/proc/cpuinfo").read_text(), re.M)
    cpu = models[0] if models else "an unknown processor"
    try:
        describe = ["git", "describe", "--always", "--dirty"]
        commit = subprocess.run(describe, cwd=ROOT, capture_output=True, text=True).stdout
    except FileNotFoundError:
        commit = ""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": f"{os.cpu_count()} cores of {cpu}, {platform.machine()}, Linux {platform.release()}",
        "commit": commit.strip() or "unknown",
        "command": f"make loadtest ROUNDS={ROUNDS} SECONDS_EACH={SECONDS_EACH}"
        + (" QUICK=1" if QUICK else ""),
        "setting": f"{cases.SETTING}; {cases.PINNED}",
    }


def rounds(stack):
    runs = []
    for number in range(1, ROUNDS + 1):
        this = cases.round_of(stack, SECONDS_EACH)
        runs.append(this)
        shown = ", ".join(f"{name} {this[name]['cpu_us']:.1f}" for name in ORDER)
        half = f"half of the peak: p99 {this[HALF]['p99_ms']:.1f} ms"
        print(f"round {number} of {ROUNDS}, CPU µs a request: {shown}; {half}", flush=True)
    return runs


def measure(directory):
    with Stack(directory) as stack:
        sampler = cases.MemorySampler(stack.gateway)
        sampler.start()
        cases.load(stack.gateway.port, "--connections", 64, seconds=1 if QUICK else 3)  # warm-up
        results = {"rounds": rounds(stack)}
        results["idle"] = cases.one_at_a_time(stack, 50 if QUICK else 200)
        print("one connection:", results["idle"], flush=True)
        results["waiters"] = cases.waiters(stack, WAITERS)
        print("waiters:", results["waiters"], flush=True)
        results["k6"] = behaviour.run_all(stack)
        results["growth"] = cases.growth(stack, PAIRS, MANY, SECONDS_EACH)
        print("growth:", results["growth"]["ratio"], flush=True)
        sampler.stopped.set()
        results["memory"] = sampler.samples
        results["lines_dropped"] = stack.gateway.metric("infra_log_lines_dropped")
    return results


def median_ratio(runs, case, floor):
    return statistics.median(run[case]["cpu_us"] / run[floor]["cpu_us"] for run in runs)


def targets_of(results):
    """(what, measured, bound, unit) of each target. It is met if the measured value is at most the bound."""
    runs, waiters = results["rounds"], results["waiters"]
    ours = [run[case] for run in runs for case in (ASYNC, HALF, SYNC)]
    failed = sum(run["failed"] for run in ours) + waiters["failed"]
    failed += sum(pair[kind]["failed"] for pair in results["growth"]["pairs"] for kind in ("one", "many"))
    # wrk ends without waiting for the last answers: those requests may have been sent, too.
    unwritten = sum(
        abs(run["messages"] - run["rows"]) + max(0, run["requests"] - run["messages"]) for run in ours
    )
    worst = lambda key: max(statistics.median(run[case][key] for run in runs) for case in (ASYNC, HALF, SYNC))
    return [
        ("asynchronous, CPU against bare waiting 8 ms", median_ratio(runs, ASYNC, BARE_8), 2.5, "×"),
        ("synchronous, CPU against bare waiting 13 ms", median_ratio(runs, SYNC, BARE_13), 3.0, "×"),
        ("requests that failed", failed, 0, ""),
        ("accepted jobs without exactly one row", unwritten, 0, ""),
        ("AWS calls a request", worst("aws_calls"), 0.25, ""),
        ("Redis commands a request", worst("redis_commands"), 0.5, ""),
        (
            "one request at a time: answer after the queue's confirmation",
            results["idle"]["after_confirmation_ms"],
            1.5,
            "ms",
        ),
        (
            "half of the peak rate: p99",
            statistics.median(run[HALF]["p99_ms"] for run in runs),
            SQS_MS + 10,
            "ms",
        ),
        (f"{WAITERS:,} runs waiting at once: not answered", WAITERS - waiters["requests"], 0, ""),
        (f"{WAITERS:,} runs waiting at once: fewer waiting", WAITERS - waiters["waiting_most"], 0, ""),
        (f"{WAITERS:,} runs waiting at once: memory", waiters["peak_mb"], 700, "MB"),
        (
            "after them: memory above its value before",
            waiters["after_mb"] - waiters["before_mb"],
            cases.AFTER_MB,
            "MB",
        ),
        ("after them: waiters left", waiters["waiters_left"], 0, ""),
        ("log lines dropped", results["lines_dropped"], 0, ""),
        ("k6 scripts whose thresholds were not met", sum(not met for met in results["k6"].values()), 0, ""),
        (
            f"CPU with {MANY:,} functions and addresses against one of each",
            results["growth"]["ratio"],
            1.2,
            "×",
        ),
    ]


def main():
    check_tools()
    about = machine()
    with tempfile.TemporaryDirectory(prefix="loadtest-") as directory:
        results = measure(directory)
    targets = targets_of(results)
    extra = {
        "asynchronous against bare at once": median_ratio(results["rounds"], ASYNC, BARE_NOW),
        "synchronous against bare at once": median_ratio(results["rounds"], SYNC, BARE_NOW),
    }
    report.write(ROOT / "loadtest/report", about, results, targets, extra)
    if any(measured > bound for _, measured, bound, _ in targets):
        sys.exit("loadtest: a target was not met")


if __name__ == "__main__":
    main()
