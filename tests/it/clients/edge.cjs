// Calls both listeners with undici: HTTP/1.1, HTTP/1.1 over TLS, and HTTP/2, each on one connection.
//
// BASE_URL, TLS_URL and API_KEY name the gateway. TLS_NAME is the name in the certificate, TLS_ROOTS the file
// of its issuer, CHUNKED_FILE the chunked answer of the upstream. The exit code is 1 at the first mismatch.
'use strict';

const assert = require('node:assert/strict');
const channel = require('node:diagnostics_channel');
const { readFileSync } = require('node:fs');
const { gzipSync } = require('node:zlib');
const { Agent, request } = require('undici');

const { BASE_URL: base, TLS_URL: tlsBase, TLS_NAME: servername, API_KEY: key } = process.env;
const DEADLINE_MS = 60_000;
const UUID = /^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$/;

// The protocol of each new connection. The answers of undici do not contain it.
const connected = [];
channel.subscribe('undici:client:connected', ({ socket }) => connected.push(socket.alpnProtocol || 'no TLS'));

/** Requests of one agent: asserts the status, and returns header fields and body. */
function client(origin, dispatcher) {
    return async (status, method, path, { body, headers = {}, anonymous = false } = {}) => {
        const answer = await request(origin + path, {
            method,
            dispatcher,
            headers: {
                ...(anonymous ? {} : { 'x-api-key': key }),
                ...(body === undefined ? {} : { 'content-type': 'application/json' }),
                ...headers,
            },
            body,
        });
        const bytes = Buffer.from(await answer.body.arrayBuffer());
        const what = `${method} ${path} ${JSON.stringify(headers)}: ${bytes.subarray(0, 500)}`;
        assert.equal(answer.statusCode, status, what);
        assert.ok(answer.headers['x-request-id'], `${method} ${path} has no X-Request-Id`);
        return { headers: answer.headers, bytes };
    };
}

const run = (token) => JSON.stringify({ functionId: 'hello', inputData: token });

function ran(token, { bytes }) {
    const result = JSON.parse(bytes);
    assert.ok(result.status === 'SUCCESS' && result.stdout.includes(token), String(bytes));
}

async function check(call) {
    const alive = await call(200, 'GET', '/livez', { anonymous: true });
    assert.deepEqual(JSON.parse(alive.bytes), { status: 'OK' });
    ran('waited-for', await call(200, 'POST', '/run', { body: run('waited-for') }));

    const asynchronous = { 'x-async': 'true' };
    const accepted = await call(202, 'POST', '/run', { body: run('not-waited-for'), headers: asynchronous });
    const { status, jobId } = JSON.parse(accepted.bytes);
    assert.equal(status, 'ACCEPTED');
    assert.match(jobId, UUID);
    assert.equal(accepted.headers.location, `/status/${jobId}`);
    ran('not-waited-for', await call(200, 'GET', `/status/${jobId}?wait=60`));

    const refused = await call(401, 'POST', '/run', { body: run('refused'), anonymous: true });
    assert.match(refused.headers['content-type'], /^application\/problem\+json/);
    const problem = JSON.parse(refused.bytes);
    assert.deepEqual([problem.status, problem.code], [401, 'unauthorized']);
    assert.equal(problem.requestId, refused.headers['x-request-id']);

    const whole = readFileSync(process.env.CHUNKED_FILE);
    const chunked = await call(200, 'GET', '/up/chunked');
    assert.ok(chunked.bytes.equals(whole), `${chunked.bytes.length} bytes, not the ${whole.length} sent`);

    const body = gzipSync(run('packed'));
    const packed = { 'content-encoding': 'gzip' };
    ran('packed', await call(200, 'POST', '/run', { body, headers: packed }));
    await call(202, 'POST', '/run', { body, headers: { ...packed, ...asynchronous } });
}

async function main() {
    const connect = { ca: readFileSync(process.env.TLS_ROOTS), servername };
    for (const [name, origin, options, protocol] of [
        ['undici over HTTP/1.1', base, {}, 'no TLS'],
        ['undici over HTTP/1.1 and TLS', tlsBase, { connect }, 'http/1.1'],
        ['undici over HTTP/2', tlsBase, { connect, allowH2: true }, 'h2'],
    ]) {
        // By default undici opens a second connection when the first is busy, and closes idle ones after
        // 4 s.
        const agent = new Agent({ ...options, connections: 1, keepAliveTimeout: DEADLINE_MS });
        connected.length = 0;
        await check(client(origin, agent));
        assert.deepEqual(connected, [protocol], `the connections of ${name}`);
        await agent.close();
        console.log(`${name} works`);
    }
}

main().catch((error) => {
    console.error(error);
    process.exit(1);
});
