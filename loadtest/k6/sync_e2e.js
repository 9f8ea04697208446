// Synchronous runs of VUS clients, each one after the other. Each gets its own result.

import { check } from 'k6';
import { number, run } from './gateway.js';

export const options = {
  scenarios: {
    runs: { executor: 'constant-vus', vus: number('VUS', 20), duration: __ENV.DURATION || '10s' },
  },
  thresholds: {
    checks: ['rate==1'],
    http_req_failed: ['rate==0'],
    http_req_duration: [`p(95)<${number('P95_MS', 1000)}`],
  },
};

const seen = {};

export default function () {
  const answer = run(true);
  const id = answer.json('requestId');
  check(answer, {
    'has its result': (r) => r.status === 200,
    'which is its own': () => seen[id] === undefined,
  });
  seen[id] = true;
}
