// Speaks as the old controller's Node.js clients do: undici, connections that are kept, ten requests under way on each.
//
// It holds each answer against the contract: shape, words and types, and that each request gets its own answer. BASE_URL
// and API_KEY say where. It ends with 1 at the first thing that is off.
'use strict';

const assert = require('node:assert/strict');
const { Agent, Client, FormData, request } = require('undici');

const { BASE_URL: base, API_KEY: key } = process.env;
const PIPELINING = 10;
const DEADLINE_MS = 60_000;
const UUID = /^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$/;
const agent = new Agent({ pipelining: PIPELINING, connections: 100 });

/** A type by name, one of several (`a|b`), a pattern, an object of shapes, a list of words, or the value itself. */
function fits(value, shape, path) {
    if (shape instanceof RegExp) {
        assert.match(String(value), shape, path);
    } else if (Array.isArray(shape)) {
        assert.ok(shape.includes(value), `${path} is ${value}, none of ${shape}`);
    } else if (shape !== null && typeof shape === 'object') {
        for (const [name, member] of Object.entries(shape)) {
            assert.ok(value !== null && typeof value === 'object' && name in value, `${path}.${name} is missing`);
            fits(value[name], member, `${path}.${name}`);
        }
    } else if (typeof shape === 'string' && shape.startsWith(':')) {
        const kind = Array.isArray(value) ? 'array' : value === null ? 'null' : typeof value;
        const kinds = Number.isInteger(value) ? [kind, 'integer'] : [kind];
        assert.ok(shape.slice(1).split('|').some((name) => kinds.includes(name)), `${path} is ${value}, no ${shape}`);
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
    const shape = { type: ':string', title: ':string', status, detail: ':string', requestId: ':string', code };
    const value = await expect(status, { ...shape, error: ':string' }, method, path, more);
    assert.equal(value.error, value.detail);
    return value.error;
}

async function eventually(what, look) {
    const giveUp = Date.now() + DEADLINE_MS;
    for (;;) {
        const found = await look();
        if (found) return found;
        assert.ok(Date.now() < giveUp, `${what}: not in time`);
        await new Promise((resolve) => setTimeout(resolve, 100));
    }
}

/** Ten under way on one connection, many times over: each request has its own answer, in its order. */
async function pipelined() {
    const client = new Client(base, { pipelining: PIPELINING });
    try {
        const calls = Array.from({ length: 100 }, async (_, n) => {
            const headers = { 'x-request-id': `bff-${n}` };
            const told = { headers, dispatcher: client, idempotent: true };
            let answer;
            if (n % 10 === 3) {
                const body = { functionId: 'hello', inputData: { token: `token-${n}` } };
                answer = await call('POST', '/api/run', { ...told, body });
                assert.equal(answer.status, 200, answer.text);
                assert.ok(JSON.parse(answer.text).stdout.includes(`token-${n}`), answer.text);
            } else if (n % 10 === 7) {
                answer = await call('GET', `/api/functions/absent-${n}`, told);
                assert.equal(answer.status, 404, answer.text);
                assert.equal(JSON.parse(answer.text).requestId, `bff-${n}`);
            } else {
                answer = await call('GET', '/api/functions/hello', told);
                assert.equal(answer.status, 200, answer.text);
                fits(JSON.parse(answer.text), { id: 'hello', name: ':string', memoryMb: ':integer' }, 'hello');
            }
            assert.equal(answer.headers['x-request-id'], `bff-${n}`);
        });
        await Promise.all(calls);
    } finally {
        await client.close();
    }
}

async function workersAndSystem() {
    const pools = { python: 1, nodejs: 2, cpp: 0, go: 0 };
    const body = { workerId: 'w-1', status: 'healthy', pools, activeJobs: 1, uptimeSeconds: 1.5, timestamp: 1.25 };
    const beat = await call('POST', '/api/worker/heartbeat', { body });
    assert.equal(beat.text, '{"ok":true}');
    const system = await expect(200, {
        status: 'online', worker_count: 1, active_jobs: 1, pools, uptime_seconds: 1.5, timestamp: ':number',
    }, 'GET', '/api/system/status');
    assert.deepEqual(system.pools, pools);
    const { workers } = await expect(200, { totalWorkers: 1, healthyWorkers: 1 }, 'GET', '/api/workers');
    fits(workers[0], {
        ...body, lastSeen: ':integer', receivedAt: ':integer', healthStatus: 'healthy', lastSeenAgo: /^\d+s$/,
    }, 'a worker');
    assert.ok(Math.abs(workers[0].lastSeen - Date.now()) < 600_000);
}

async function functionsAndRuns(code) {
    const form = new FormData();
    form.set('file', new Blob([code], { type: 'application/zip' }), 'code.zip');
    form.set('description', 'of the BFF');
    const headers = { 'x-function-name': encodeURIComponent('grüße'), 'x-runtime': 'python', 'x-memory-mb': '256' };
    const made = await expect(200, { success: true, functionId: UUID }, 'POST', '/api/upload', { body: form, headers });
    const id = made.functionId;
    const listed = await expect(200, {
        functionId: ':string', name: ':string', description: ':string', runtime: ':string', memoryMb: ':integer',
        invocations: ':integer', avgDuration: ':integer', avgHandlerDuration: ':number|null', uploadedAt: ':string',
    }, 'GET', '/api/functions');
    fits(listed.find((f) => f.functionId === id), { name: 'grüße', avgDuration: 0, avgHandlerDuration: null }, 'new');
    // The one click that takes the advice, whose floor is 32.
    for (const memory of [32, 256]) {
        await expect(200, { success: true, functionId: id }, 'PUT', `/api/functions/${id}`, { body: { memory } });
        await expect(200, { id, memoryMb: memory, description: 'of the BFF' }, 'GET', `/api/functions/${id}`);
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
    fits(done, { requestId: jobId, functionId: id, status: 'SUCCESS', exitCode: 0, durationMs: ':number' }, 'a result');
    await expect(200, { requestId: jobId }, 'GET', `/api/status/${jobId.toUpperCase()}`);
    await problem(404, 'no_such_function', 'POST', '/api/run', { body: { functionId: 'absent' } });

    const row = {
        id: UUID, requestId: UUID, timestamp: /^\d{4}-\d\d-\d\dT[\d:]{8}\.\d{3}Z$/, status: 'SUCCESS', duration: ':integer',
        handlerDurationMs: ':number|null', memory: ':integer', message: ':string',
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

/** What the dashboard shows, told apart by level and text. */
async function dashboard(id, jobId) {
    await problem(401, 'unauthorized', 'GET', '/api/functions', { headers: { 'x-api-key': 'wrong' } });
    const entries = await expect(200, {
        id: UUID, level: ['INFO', 'WARN', 'ERROR'], timestamp: ':string', msg: ':string',
    }, 'GET', '/api/logs');
    const of = (msg, isIt = () => true) => entries.find((entry) => entry.msg === msg && isIt(entry));
    fits(of(`Function Executed: ${id}`), {
        level: 'INFO', functionId: id, requestId: jobId, duration: ':number', handlerDurationMs: ':number|null',
        memory: ':integer', status: 'SUCCESS', exitCode: 0,
    }, 'an execution');
    const run = of('Run Request', (entry) => entry.requestId === jobId);
    fits(run, { level: 'INFO', functionId: id, modelId: 'm1', mode: 'ASYNC' }, 'a run');
    for (const msg of ['Upload Success', 'Function Updated', 'Function Deleted']) {
        fits(of(msg), { level: 'INFO', functionId: id }, msg);
    }
    fits(of('Heartbeat received from w-1'), { level: 'INFO', activeJobs: 1, pools: ':object' }, 'a heartbeat');
    fits(of('Unauthorized access'), { level: 'WARN', ip: '127.0.0.1' }, 'a refusal');
    const models = await expect(200, { models: ':array', warning: ':string' }, 'GET', '/api/models');
    fits(models.models[0], { id: 'llama3:8b', status: 'fallback', details: ':object' }, 'a model');
    const metrics = await call('GET', '/metrics');
    assert.match(metrics.text, new RegExp(`^function_invocations_total\\{functionId="${id}",status="SUCCESS"\\} 1$`, 'm'));
}

async function main() {
    const code = Buffer.from(process.env.CODE_BASE64, 'base64');
    await workersAndSystem();
    const [id, jobId] = await functionsAndRuns(code);
    await dashboard(id, jobId);
    // Last: many runs push the rest out of the dashboard's list.
    await pipelined();
    await agent.close();
    console.log('all is as the contract has it');
}

main().catch((error) => {
    console.error(error);
    process.exit(1);
});
