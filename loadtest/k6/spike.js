// A sudden load of many times the usual one (BASE to PEAK a second). Requests are accepted, or rejected with
// a Retry-After. Afterwards latency is as before.

import { check } from 'k6';
import exec from 'k6/execution';
import { setResponseCallback, expectedStatuses } from 'k6/http';
import { number, run } from './gateway.js';

setResponseCallback(expectedStatuses(202, 503));

const BASE = number('BASE', 50);
const PEAK = number('PEAK', 800);

function at(rate, startTime, duration) {
  const executor = 'constant-arrival-rate';
  return { executor, rate, timeUnit: '1s', startTime, duration, preAllocatedVUs: 200 };
}

export const options = {
  scenarios: {
    before: at(BASE, '0s', '3s'),
    spike: at(PEAK, '3s', '4s'),
    after: at(BASE, '9s', '3s'),
  },
  thresholds: {
    checks: ['rate==1'],
    http_req_failed: ['rate==0'],
    dropped_iterations: ['count==0'],
    'http_req_duration{scenario:after}': [`p(95)<${number('P95_MS', 200)}`],
    'checks{scenario:after}': ['rate==1'],
  },
};

export default function () {
  const spike = exec.scenario.name === 'spike';
  check(run(false), {
    'accepted, or in the spike rejected with a Retry-After': (r) =>
      r.status === 202 || (spike && r.status === 503 && Number(r.headers['Retry-After']) >= 1),
  });
}
