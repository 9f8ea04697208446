// More requests than the limit allows (LIMIT_RATE a second, LIMIT_BURST at once). No more than burst + rate ×
// time are admitted, and each rejected request has a Retry-After.

import { check } from 'k6';
import { Counter } from 'k6/metrics';
import { setResponseCallback, expectedStatuses } from 'k6/http';
import { number, run } from './gateway.js';

setResponseCallback(expectedStatuses(202, 429));

const RATE = number('LIMIT_RATE', 50);
const BURST = number('LIMIT_BURST', 50);
const SECONDS = number('SECONDS', 8);
const admitted = new Counter('admitted');
const rejected = new Counter('rejected');

export const options = {
  scenarios: {
    storm: {
      executor: 'constant-arrival-rate',
      rate: Math.max(4 * RATE, 200),
      timeUnit: '1s',
      duration: `${SECONDS}s`,
      preAllocatedVUs: 50,
    },
  },
  thresholds: {
    checks: ['rate==1'],
    dropped_iterations: ['count==0'],
    http_req_failed: ['rate==0'],
    // One second more than the load lasts: its last request may be answered after its end.
    admitted: [`count<=${BURST + RATE * (SECONDS + 1)}`, `count>=${Math.floor(0.8 * RATE * SECONDS)}`],
    rejected: ['count>0'],
  },
};

export default function () {
  const answer = run(false);
  if (answer.status === 202) {
    admitted.add(1);
  } else {
    rejected.add(1);
    check(answer, {
      'has a Retry-After': (r) => Number(r.headers['Retry-After']) >= 1,
      'states the limit': (r) => Number(r.headers['X-Ratelimit-Limit']) === BURST,
    });
  }
}
