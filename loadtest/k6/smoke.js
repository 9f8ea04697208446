// A smoke test: one client, and each kind of call once or twice.

import { check } from 'k6';
import { get, run } from './gateway.js';

export const options = {
  vus: 1,
  iterations: 5,
  thresholds: { checks: ['rate==1'], http_req_failed: ['rate==0'], http_req_duration: ['p(95)<2000'] },
};

export default function () {
  check(get('/readyz'), { 'is ready': (r) => r.status === 200 });
  check(get('/health'), { 'is healthy': (r) => r.json('status') === 'OK' });
  check(run(true), {
    'a synchronous run has its result': (r) => r.status === 200 && r.json('status') === 'SUCCESS',
  });
  const accepted = run(false);
  check(accepted, {
    'an asynchronous run is accepted': (r) => r.status === 202 && r.json('status') === 'ACCEPTED',
    'and its Location names its result': (r) => r.headers['Location'] === `/status/${r.json('jobId')}`,
  });
  check(get(`/status/${accepted.json('jobId')}?wait=10`), {
    'which is there': (r) => r.status === 200 && r.json('requestId') === accepted.json('jobId'),
  });
}
