"""Calls both listeners with requests (HTTP/1.1) and httpx (HTTP/1.1 and HTTP/2), each on one connection.

BASE_URL, TLS_URL and API_KEY name the gateway. TLS_NAME is the name in the certificate, TLS_ROOTS the file
of its issuer, CHUNKED_FILE the chunked answer of the upstream. The exit code is 1 at the first mismatch.
"""

import gzip
import json
import os
import re
import ssl

import httpx
import requests

BASE = os.environ["BASE_URL"]
TLS_BASE = os.environ["TLS_URL"]
TLS_NAME = os.environ["TLS_NAME"]
KEY = os.environ["API_KEY"]
DEADLINE_S = 60
UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


class Requests:
    """requests with one session, without TLS."""

    name = "requests"

    def __init__(self):
        self.session = requests.Session()

    def call(self, method, path, body, headers):
        answer = self.session.request(method, BASE + path, data=body, headers=headers, timeout=DEADLINE_S)
        return answer.status_code, answer.headers, answer.content

    def connections(self):
        pools = self.session.get_adapter(BASE).poolmanager.pools
        return sum(pools[key].num_connections for key in pools.keys())


class Httpx:
    """httpx with one client and one version of HTTP."""

    def __init__(self, base, version):
        self.name = f"httpx over {version} at {base}"
        self.version = version
        roots = ssl.create_default_context(cafile=os.environ["TLS_ROOTS"])
        is_http2 = version == "HTTP/2"
        # By default httpx closes an idle connection after 5 s.
        limits = httpx.Limits(keepalive_expiry=DEADLINE_S)
        only = {"http1": not is_http2, "http2": is_http2}
        self.client = httpx.Client(base_url=base, verify=roots, timeout=DEADLINE_S, limits=limits, **only)
        self.addresses = set()

    def call(self, method, path, body, headers):
        # The name in the certificate cannot be resolved, so the URL has the address.
        extensions = {"sni_hostname": TLS_NAME}
        answer = self.client.request(method, path, content=body, headers=headers, extensions=extensions)
        assert answer.http_version == self.version, f"{path} is answered in {answer.http_version}"
        self.addresses.add(answer.extensions["network_stream"].get_extra_info("client_addr"))
        return answer.status_code, answer.headers, answer.content

    def connections(self):
        return len(self.addresses)


def expect(client, status, method, path, body=None, key=KEY, **headers):
    """Sends a request, and asserts the status of the answer. Returns header fields and body."""
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    if key is not None:
        names["x-api-key"] = key
    if body is not None:
        names["content-type"] = "application/json"
    given, fields, content = client.call(method, path, body, names)
    assert given == status, f"{method} {path} {headers}: {given}, not {status}: {content[:500]}"
    assert fields["x-request-id"], f"{method} {path} has no X-Request-Id"
    return fields, content


def run(token):
    return json.dumps({"functionId": "hello", "inputData": token}).encode()


def ran(token, answer):
    result = json.loads(answer[1])
    assert result["status"] == "SUCCESS" and token in result["stdout"], result


def check(client):
    _, alive = expect(client, 200, "GET", "/livez", key=None)
    assert json.loads(alive) == {"status": "OK"}, alive
    ran("waited-for", expect(client, 200, "POST", "/run", run("waited-for")))

    fields, content = expect(client, 202, "POST", "/run", run("not-waited-for"), x_async="true")
    accepted = json.loads(content)
    assert accepted["status"] == "ACCEPTED" and UUID.fullmatch(accepted["jobId"]), accepted
    assert fields["location"] == f"/status/{accepted['jobId']}", fields
    ran("not-waited-for", expect(client, 200, "GET", f"{fields['location']}?wait=60"))

    fields, content = expect(client, 401, "POST", "/run", run("refused"), key=None)
    problem = json.loads(content)
    assert fields["content-type"].startswith("application/problem+json"), fields
    assert (problem["status"], problem["code"]) == (401, "unauthorized"), problem
    assert problem["requestId"] == fields["x-request-id"], (problem, fields)

    # Both clients do not wait for the interim answer, but must skip it.
    ran("expected", expect(client, 200, "POST", "/run", run("expected" * 256), Expect="100-continue"))

    with open(os.environ["CHUNKED_FILE"], "rb") as file:
        whole = file.read()
    _, content = expect(client, 200, "GET", "/up/chunked")
    assert content == whole, f"{len(content)} bytes, not the {len(whole)} sent"

    packed = gzip.compress(run("packed"))
    ran("packed", expect(client, 200, "POST", "/run", packed, Content_Encoding="gzip"))
    expect(client, 202, "POST", "/run", packed, Content_Encoding="gzip", x_async="true")

    assert client.connections() == 1, f"{client.name} made {client.connections()} connections"
    print(f"{client.name} works", flush=True)


def main():
    check(Requests())
    for base, version in ((BASE, "HTTP/1.1"), (TLS_BASE, "HTTP/1.1"), (TLS_BASE, "HTTP/2")):
        check(Httpx(base, version))


if __name__ == "__main__":
    main()
