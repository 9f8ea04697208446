"""Rules that schemathesis cannot derive from the OpenAPI document."""

import io
import zipfile

import schemathesis
from hypothesis import strategies as st
from schemathesis.core.failures import AcceptedNegativeData
from schemathesis.openapi.checks import RejectedPositiveData


def zipped(text: str) -> bytes:
    """An archive that is valid for every runtime."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name in ("main.py", "index.js", "main.cpp", "main.go"):
            archive.writestr(zipfile.ZipInfo(name), text)
    return out.getvalue()


# A schema cannot describe a zip archive. Half of the files are not zip archives, and must be rejected.
schemathesis.openapi.media_type(
    "application/zip", st.one_of(st.sampled_from(["", "print(1)\n"]).map(zipped), st.binary(max_size=64))
)

# Rejections that a schema cannot express: a cursor is valid only if the server has created it, a file must be
# valid code with the module of its handler, only python may have more than 1024 MiB, only python and nodejs
# have handlers, an upload has one handler, and an idempotency key belongs to one body.
NOT_IN_SCHEMA = {"bad_cursor", "bad_archive", "idempotency_key_reused"}
DETAILS_NOT_IN_SCHEMA = (
    "must be from 32 to 1024 for",
    "must be a whole number from 128 to 1024",
    "only functions in python and nodejs have a handler",
    "`x-handler` and `handler` of the form are one property",
)


@schemathesis.hook
def filter_failure(context, failure, case, response):
    if isinstance(failure, AcceptedNegativeData):
        return not has_only_more_headers(case) and not has_equal_memories(case)
    if not isinstance(failure, RejectedPositiveData) or response.status_code not in (400, 422):
        return True
    problem = response.json()
    is_known = any(text in problem["detail"] for text in DETAILS_NOT_IN_SCHEMA)
    return problem["code"] not in NOT_IN_SCHEMA and not is_known


def has_only_more_headers(case):
    """Unknown header fields must be ignored (RFC 9110). schemathesis does not consider that everywhere."""
    tried = case.meta.phase.data
    location = getattr(tried, "parameter_location", None)
    is_header = location is not None and location.name == "HEADER"
    return is_header and tried.description == "Object with unexpected properties"


def has_equal_memories(case):
    """Both names of the memory with equal values, which are valid for old clients."""
    body = case.body
    return isinstance(body, dict) and "memory" in body and body["memory"] == body.get("memoryMb")


@schemathesis.hook
def map_headers(context, headers):
    """Removes control characters: a request with one is rejected by the parser, before any route."""
    if headers is None:
        return None
    return {name: without_controls(value) for name, value in headers.items()}


def without_controls(value):
    return "".join(c for c in value if c >= " " and c != "\x7f") if isinstance(value, str) else value
