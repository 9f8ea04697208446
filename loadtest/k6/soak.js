// A steady load for a long time (RATE a second, for DURATION). No request fails, and memory and jobs do not
// pile up.

import { check, sleep } from 'k6';
import { Trend } from 'k6/metrics';
import { metric, number, run } from './gateway.js';

const grown = new Trend('memory_grown_mb');

export const options = {
  scenarios: {
    steady: {
      executor: 'constant-arrival-rate',
      rate: number('RATE', 100),
      timeUnit: '1s',
      duration: __ENV.DURATION || '10m',
      preAllocatedVUs: number('VUS', 100),
    },
  },
  thresholds: {
    checks: ['rate==1'],
    dropped_iterations: ['count==0'],
    http_req_failed: ['rate==0'],
    memory_grown_mb: [`max<${number('GROWN_MB', 150)}`],
  },
  teardownTimeout: '2m',
};

export function setup() {
  return { memory: metric('process_resident_memory_bytes') };
}

export default function () {
  // Every tenth run is synchronous.
  const waits = __ITER % 10 === 0;
  check(run(waits), { answered: (r) => r.status === (waits ? 200 : 202) });
}

export function teardown(start) {
  for (let second = 0; second < 60 && metric('infra_jobs_in_flight') > 0; second += 1) {
    sleep(1);
  }
  check(null, {
    'every job has its row': () => metric('infra_jobs_in_flight') === 0,
    'no client waits': () => metric('infra_waiters') === 0,
  });
  grown.add((metric('process_resident_memory_bytes') - start.memory) / 1e6);
}
