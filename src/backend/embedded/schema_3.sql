-- Version 3: data that outlives a job. Must never change: a later version adds a file beside this one.

-- Jobs that were given up without a result. A late result still replaces LOST.
CREATE TABLE given_up (
    id          BLOB    NOT NULL PRIMARY KEY,
    function_id TEXT    NOT NULL,
    at_ms       INTEGER NOT NULL
) STRICT;

-- Requests with an idempotency key.
CREATE TABLE idempotency (
    key           BLOB    NOT NULL PRIMARY KEY,
    body          BLOB    NOT NULL,
    job           BLOB    NOT NULL,
    function_id   TEXT    NOT NULL,
    sent          INTEGER NOT NULL,
    result        BLOB,
    expires_at_ms INTEGER NOT NULL
) STRICT;

-- The idempotency key of the request of a job in flight.
ALTER TABLE inflight ADD COLUMN idempotency_key BLOB;
