// Shared by the scripts: the address of the gateway, and its requests.
//
//   BASE_URL=https://… API_KEY=… FUNCTION_ID=… k6 run async_ingress.js

import http from 'k6/http';

export const BASE_URL = __ENV.BASE_URL || 'http://127.0.0.1:8080';
const API_KEY = __ENV.API_KEY || '';
const FUNCTION_ID = __ENV.FUNCTION_ID || 'hello';

export function number(name, otherwise) {
  return __ENV[name] === undefined ? otherwise : Number(__ENV[name]);
}

const HEADERS = { 'x-api-key': API_KEY, 'content-type': 'application/json' };

/** One run. `wait`: synchronous. */
export function run(wait, tags) {
  const headers = wait ? HEADERS : Object.assign({ 'x-async': 'true' }, HEADERS);
  const body = JSON.stringify({ functionId: FUNCTION_ID, inputData: { name: 'Ada' } });
  return http.post(`${BASE_URL}/run`, body, { headers, tags: tags || {} });
}

export function get(path, tags) {
  return http.get(`${BASE_URL}${path}`, { headers: HEADERS, tags: tags || {} });
}

/** The value of a series of /metrics without labels. */
export function metric(name) {
  const line = get('/metrics').body.split('\n').find((line) => line.startsWith(`${name} `));
  return line === undefined ? NaN : Number(line.split(' ')[1]);
}
