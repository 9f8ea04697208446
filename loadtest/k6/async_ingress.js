// Asynchronous runs at a fixed rate (RATE a second, for DURATION). Every request is accepted, with p99 below
// P99_MS.

import { check } from 'k6';
import { number, run } from './gateway.js';

export const options = {
  scenarios: {
    ingress: {
      executor: 'constant-arrival-rate',
      rate: number('RATE', 200),
      timeUnit: '1s',
      duration: __ENV.DURATION || '10s',
      preAllocatedVUs: number('VUS', 200),
    },
  },
  thresholds: {
    checks: ['rate==1'],
    http_req_failed: ['rate==0'],
    dropped_iterations: ['count==0'],
    http_req_duration: [`p(99)<${number('P99_MS', 200)}`],
  },
};

export default function () {
  check(run(false), { accepted: (r) => r.status === 202 && r.json('jobId') !== undefined });
}
