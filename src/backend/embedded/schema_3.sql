-- Version 3: what is known of a job beyond its life. This step never changes; a later version adds another beside it.

-- Jobs that were given up without a result, for the results that come late.
CREATE TABLE given_up (
    id          BLOB    NOT NULL PRIMARY KEY,
    function_id TEXT    NOT NULL,
    at_ms       INTEGER NOT NULL
) STRICT;

-- Requests that are carried out once, by their idempotency key.
CREATE TABLE idempotency (
    key           BLOB    NOT NULL PRIMARY KEY,
    body          BLOB    NOT NULL,
    job           BLOB    NOT NULL,
    function_id   TEXT    NOT NULL,
    sent          INTEGER NOT NULL,
    result        BLOB,
    expires_at_ms INTEGER NOT NULL
) STRICT;

-- The key of the request that a job in flight belongs to.
ALTER TABLE inflight ADD COLUMN idempotency_key BLOB;
