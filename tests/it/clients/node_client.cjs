// A client like the Node.js clients of the old controller: undici with persistent connections, and ten
// pipelined requests on each.
//
// It checks each answer against the contract: shapes, words and types. Each request must get its own answer.
// BASE_URL and API_KEY name the gateway. The exit code is 1 at the first mismatch.
'use strict';

const assert = require('node:assert/strict');
const { Agent, Client, FormData, request } = require('undici');

const { BASE_URL: base, API_KEY: key } = process.env;
const PIPELINING = 10;
const DEADLINE_MS = 60_000;
const UUID = /^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$/;
const agent = new Agent({ pipelining: PIPELINING, connections: 100 });

/** Asserts a type (`:a`), one of several (`:a|b`), a pattern, one of a list, the members, or the value. */
function fits(value, shape, path) {
    if (shape instanceof RegExp) {
        assert.match(String(value), shape, path);
    } else if (Array.isArray(shape)) {
        assert.ok(shape.includes(value), `${path} is ${value}, none of ${shape}`);
    } else if (shape !== null && typeof shape === 'object') {
        for (const [name, member] of Object.entries(shape)) {
            const has = value !== null && typeof value === 'object' && name in value;
            assert.ok(has, `${path}.${name} is missing`);
            fits(value[name], member, `${path}.${name}`);
        }
    } else if (typeof shape === 'string' && shape.startsWith(':')) {
        const kind = Array.isArray(value) ? 'array' : value === null ? 'null' : typeof value;
        const kinds = Number.isInteger(value) ? [kind, 'integer'] : [kind];
        const isKind = shape.slice(1).split('|').some((name) => kinds.includes(name));
        assert.ok(isKind, `${path} is ${value}, not ${shape}`);
    } else {
        assert.deepEqual(value, shape, path);
    }
}

async function call(method, path, { body, headers = {}, dispatcher = agent, idempotent } = {}) {
    const isJson = body !== undefined && !(body instanceof FormData);
    const answer = await request(base + path, {
        method,
        dispatcher,
        idempotent,
        headers: { 'x-api-key': key, ...(isJson ? { 'content-type': 'application/json' } : {}), ...headers },
        body: isJson ? JSON.stringify(body) : body,
    });
    return { status: answer.statusCode, headers: answer.headers, text: await answer.body.text() };
}

async function expect(status, shape, method, path, more) {
    const answer = await call(method, path, more);
    assert.equal(answer.status, status, `${method} ${path}: ${answer.text}`);
    const value = JSON.parse(answer.text);
    for (const each of Array.isArray(value) ? value : [value]) fits(each, shape, `${method} ${path}`);
    return value;
}

async function problem(status, code, method, path, more) {
    const texts = { type: ':string', title: ':string', detail: ':string', requestId: ':string' };
    const shape = { ...texts, status, code, error: ':string' };
    const value = await expect(status, shape, method, path, more);
    assert.equal(value.error, value.detail);
    return value.error;
}

async function eventually(what, probe) {
    const end = Date.now() + DEADLINE_MS;
    for (;;) {
        const found = await probe();
        if (found) return found;
        assert.ok(Date.now() < end, `${what}: not in time`);
        await new Promise((resolve) => setTimeout(resolve, 100));
    }
}

/** 100 requests on one connection, ten at a time: each request has its own answer, in order. */
async function pipelined() {
    const client = new Client(base, { pipelining: PIPELINING });
    try {
        const calls = Array.from({ length: 100 }, async (_, n) => {
            const headers = { 'x-request-id': `request-${n}` };
            const options = { headers, dispatcher: client, idempotent: true };
            let answer;
            if (n % 10 === 3) {
                const body = { functionId: 'hello', inputData: { token: `token-${n}` } };
                answer = await call('POST', '/api/run', { ...options, body });
                assert.equal(answer.status, 200, answer.text);
                assert.ok(JSON.parse(answer.text).stdout.includes(`token-${n}`), answer.text);
            } else if (n % 10 === 7) {
                answer = await call('GET', `/api/functions/absent-${n}`, options);
                assert.equal(answer.status, 404, answer.text);
                assert.equal(JSON.parse(answer.text).requestId, `request-${n}`);
            } else {
                answer = await call('GET', '/api/functions/hello', options);
                assert.equal(answer.status, 200, answer.text);
                const shape = { id: 'hello', name: ':string', memoryMb: ':integer' };
                fits(JSON.parse(answer.text), shape, 'hello');
            }
            assert.equal(answer.headers['x-request-id'], `request-${n}`);
        });
        await Promise.all(calls);
    } finally {
        await client.close();
    }
}

async function workersAndSystem() {
    const pools = { python: 1, nodejs: 2, cpp: 0, go: 0 };
    const body = {
        workerId: 'w-1', status: 'healthy', pools, activeJobs: 1, uptimeSeconds: 1.5, timestamp: 1.25,
    };
    const beat = await call('POST', '/api/worker/heartbeat', { body });
    assert.equal(beat.text, '{"ok":true}');
    const system = await expect(200, {
        status: 'online', worker_count: 1, active_jobs: 1, pools, uptime_seconds: 1.5, timestamp: ':number',
    }, 'GET', '/api/system/status');
    assert.deepEqual(system.pools, pools);
    const { workers } = await expect(200, { totalWorkers: 1, healthyWorkers: 1 }, 'GET', '/api/workers');
    fits(workers[0], {
        ...body, lastSeen: ':integer', receivedAt: ':integer', healthStatus: 'healthy',
        lastSeenAgo: /^\d+s$/,
    }, 'a worker');
    assert.ok(Math.abs(workers[0].lastSeen - Date.now()) < 600_000);
}

async function functionsAndRuns(code) {
    const form = new FormData();
    form.set('file', new Blob([code], { type: 'application/zip' }), 'code.zip');
    form.set('description', 'of the client');
    const name = encodeURIComponent('grüße');
    const headers = { 'x-function-name': name, 'x-runtime': 'python', 'x-memory-mb': '256' };
    const success = { success: true, functionId: UUID };
    const made = await expect(200, success, 'POST', '/api/upload', { body: form, headers });
    const id = made.functionId;
    const listed = await expect(200, {
        functionId: ':string', name: ':string', description: ':string', runtime: ':string',
        memoryMb: ':integer', invocations: ':integer', avgDuration: ':integer',
        avgHandlerDuration: ':number|null', uploadedAt: ':string',
    }, 'GET', '/api/functions');
    const shape = { name: 'grüße', avgDuration: 0, avgHandlerDuration: null };
    fits(listed.find((f) => f.functionId === id), shape, 'a new function');
    // The dashboard sends recommendations unchanged; the minimum is 32.
    for (const memory of [32, 256]) {
        const path = `/api/functions/${id}`;
        await expect(200, { success: true, functionId: id }, 'PUT', path, { body: { memory } });
        await expect(200, { id, memoryMb: memory, description: 'of the client' }, 'GET', path);
    }
    const error = await problem(400, 'invalid_request', 'POST', '/api/upload', {
        body: form, headers: { ...headers, 'x-memory-mb': '64' },
    });
    assert.match(error, /Invalid memoryMb for python/);

    const body = { functionId: id, inputData: null, modelId: 'm1' };
    const accepted = await call('POST', '/api/run', { body, headers: { 'x-async': 'true' } });
    const { jobId } = JSON.parse(accepted.text);
    assert.equal(accepted.text, JSON.stringify({ status: 'ACCEPTED', jobId }));
    assert.equal(accepted.headers.location, `/api/status/${jobId}`);
    const done = await eventually('the result', async () => {
        const status = await expect(200, {}, 'GET', accepted.headers.location);
        return status.status === 'pending' ? null : status;
    });
    fits(done, {
        requestId: jobId, functionId: id, status: 'SUCCESS', exitCode: 0, durationMs: ':number',
    }, 'a result');
    await expect(200, { requestId: jobId }, 'GET', `/api/status/${jobId.toUpperCase()}`);
    await problem(404, 'no_such_function', 'POST', '/api/run', { body: { functionId: 'absent' } });

    const row = {
        id: UUID, requestId: UUID, timestamp: /^\d{4}-\d\d-\d\dT[\d:]{8}\.\d{3}Z$/, status: 'SUCCESS',
        duration: ':integer', handlerDurationMs: ':number|null', memory: ':integer', message: ':string',
    };
    const today = new Date().toISOString().slice(0, 10);
    for (const query of ['', '?limit=5000', `?startTime=${today.slice(0, 4)}-01-01`]) {
        await eventually(`the row ${query}`, async () => {
            const rows = await expect(200, row, 'GET', `/api/functions/${id}/logs${query}`);
            return rows.some((each) => each.requestId === jobId && !Number.isNaN(Date.parse(each.timestamp)));
        });
    }
    await expect(200, { message: ':string' }, 'GET', `/api/functions/${id}/logs/${jobId}`);
    await expect(200, { success: true, deletedId: id }, 'DELETE', `/api/functions/${id}`);
    return [id, jobId];
}

/** Events that the dashboard classifies by level and text. */
async function dashboard(id, jobId) {
    await problem(401, 'unauthorized', 'GET', '/api/functions', { headers: { 'x-api-key': 'wrong' } });
    const entries = await expect(200, {
        id: UUID, level: ['INFO', 'WARN', 'ERROR'], timestamp: ':string', msg: ':string',
    }, 'GET', '/api/logs');
    const of = (msg, isIt = () => true) => entries.find((entry) => entry.msg === msg && isIt(entry));
    fits(of(`Function Executed: ${id}`), {
        level: 'INFO', functionId: id, requestId: jobId, duration: ':number',
        handlerDurationMs: ':number|null', memory: ':integer', status: 'SUCCESS', exitCode: 0,
    }, 'an execution');
    const run = of('Run Request', (entry) => entry.requestId === jobId);
    fits(run, { level: 'INFO', functionId: id, modelId: 'm1', mode: 'ASYNC' }, 'a run');
    for (const msg of ['Upload Success', 'Function Updated', 'Function Deleted']) {
        fits(of(msg), { level: 'INFO', functionId: id }, msg);
    }
    const heartbeat = { level: 'INFO', activeJobs: 1, pools: ':object' };
    fits(of('Heartbeat received from w-1'), heartbeat, 'a heartbeat');
    fits(of('Unauthorized access'), { level: 'WARN', ip: '127.0.0.1' }, 'a rejection');
    const models = await expect(200, { models: ':array', warning: ':string' }, 'GET', '/api/models');
    fits(models.models[0], { id: 'llama3:8b', status: 'fallback', details: ':object' }, 'a model');
    const metrics = await call('GET', '/metrics');
    const series = `^function_invocations_total\\{functionId="${id}",status="SUCCESS"\\} 1$`;
    assert.match(metrics.text, new RegExp(series, 'm'));
}

async function main() {
    const code = Buffer.from(process.env.CODE_BASE64, 'base64');
    await workersAndSystem();
    const [id, jobId] = await functionsAndRuns(code);
    await dashboard(id, jobId);
    // Last, because many runs evict other events from the list.
    await pipelined();
    await agent.close();
    console.log('all answers match the contract');
}

main().catch((error) => {
    console.error(error);
    process.exit(1);
});
