"""What schemathesis cannot know from the description alone."""

import io
import zipfile

import schemathesis
from hypothesis import strategies as st
from schemathesis.core.failures import AcceptedNegativeData
from schemathesis.openapi.checks import RejectedPositiveData


def zipped(text: str) -> bytes:
    """Code that every runtime takes."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name in ("main.py", "index.js", "main.cpp", "main.go"):
            archive.writestr(zipfile.ZipInfo(name), text)
    return out.getvalue()


# A schema cannot say what a zip is. Half of the files are none, and must be refused as such.
schemathesis.openapi.media_type(
    "application/zip", st.one_of(st.sampled_from(["", "print(1)\n"]).map(zipped), st.binary(max_size=64))
)

# Refusals of what the description allows, since no schema can say what they say: a cursor is good only if the server
# made it, a file must be good code, only python may have more than 1024 MiB, and a key belongs to one body.
UNSAYABLE = {"bad_cursor", "bad_archive", "idempotency_key_reused"}
MEMORY = ("must be from 32 to 1024 for", "must be a whole number from 128 to 1024")


@schemathesis.hook
def filter_failure(context, failure, case, response):
    if isinstance(failure, AcceptedNegativeData):
        return not has_only_more_headers(case) and not has_equal_memories(case)
    if not isinstance(failure, RejectedPositiveData) or response.status_code not in (400, 422):
        return True
    problem = response.json()
    return problem["code"] not in UNSAYABLE and not any(text in problem["detail"] for text in MEMORY)


def has_only_more_headers(case):
    """HTTP wants header fields that nobody knows to be passed over; schemathesis sees that of most, not of all."""
    tried = case.meta.phase.data
    location = getattr(tried, "parameter_location", None)
    return location is not None and location.name == "HEADER" and tried.description == "Object with unexpected properties"


def has_equal_memories(case):
    """Both names of the memory with one value: for old clients, and nothing to do for others."""
    body = case.body
    return isinstance(body, dict) and "memory" in body and body["memory"] == body.get("memoryMb")


@schemathesis.hook
def map_headers(context, headers):
    """No field of HTTP may hold control characters: a request with one ends in the parser, before any route."""
    if headers is None:
        return None
    return {name: without_controls(value) for name, value in headers.items()}


def without_controls(value):
    return "".join(c for c in value if c >= " " and c != "\x7f") if isinstance(value, str) else value
