"""Short runs of the k6 scripts. A script passes if its thresholds are met."""

import os
import subprocess

from stack import KEY, LIMITS, OTHER_CORES, ROOT

K6 = ROOT / ".venv-load/bin/k6"

LIMIT = {"LIMIT_RATE": "50", "LIMIT_BURST": "50"}
# Another name: limits of the same name and identity share one count on all gateways of a Redis.
SMALL_LIMIT = (
    LIMITS.replace('"api-key"', '"small"')
    .replace("rate = 100000000", "rate = 50")
    .replace("burst = 100000000", "burst = 50")
    .replace("period_s = 60", "period_s = 1")
)

# Each script with its settings.
SCRIPTS = {
    "smoke": {},
    "async_ingress": {"RATE": "300", "DURATION": "5s"},
    "sync_e2e": {"VUS": "20", "DURATION": "5s"},
    "rate_limit": {"SECONDS": "6"} | LIMIT,
    "spike": {"BASE": "50", "PEAK": "600"},
    "soak": {"RATE": "100", "DURATION": "15s"},
}


def run_all(stack):
    """Whether each script met its thresholds."""
    limited = stack.serve("limits-small", SMALL_LIMIT)
    met = {}
    for name, settings in SCRIPTS.items():
        gateway = limited if name == "rate_limit" else stack.gateway
        env = {
            "BASE_URL": f"http://127.0.0.1:{gateway.port}",
            "API_KEY": KEY,
            "FUNCTION_ID": "fn-0",
            "K6_NO_USAGE_REPORT": "true",
        }
        command = [
            str(K6),
            "run",
            "--quiet",
            "--address",
            "127.0.0.1:0",
            str(ROOT / f"loadtest/k6/{name}.js"),
        ]
        done = subprocess.run(
            command,
            env={**os.environ, **env, **settings},
            capture_output=True,
            text=True,
            timeout=180,
            preexec_fn=lambda: os.sched_setaffinity(0, OTHER_CORES),
        )
        met[name] = done.returncode == 0
        print(f"k6 {name}: {'met' if met[name] else 'NOT MET'}", flush=True)
        if not met[name]:
            print(done.stdout[-4000:], done.stderr[-2000:], flush=True)
    return met
