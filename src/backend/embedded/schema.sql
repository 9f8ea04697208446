-- Version 1 of the single-machine database. A later version adds a step beside this file; this one never changes.

CREATE TABLE meta (
    name  TEXT PRIMARY KEY,
    value INTEGER NOT NULL
) WITHOUT ROWID;

CREATE TABLE functions (
    function_id               TEXT PRIMARY KEY,
    name                      TEXT    NOT NULL,
    description               TEXT    NOT NULL,
    runtime                   TEXT    NOT NULL,
    memory_mb                 INTEGER NOT NULL,
    s3_key                    TEXT    NOT NULL,
    original_name             TEXT    NOT NULL,
    uploaded_at               TEXT    NOT NULL,
    updated_at                TEXT    NOT NULL,
    env_vars                  TEXT    NOT NULL,
    version                   INTEGER NOT NULL,
    invocations               INTEGER NOT NULL DEFAULT 0,
    total_duration_ms         REAL    NOT NULL DEFAULT 0,
    handler_invocations       INTEGER NOT NULL DEFAULT 0,
    total_handler_duration_ms REAL    NOT NULL DEFAULT 0
) WITHOUT ROWID;

-- Not WITHOUT ROWID: a message may have 380 KB, and would stand inside the key's tree.
CREATE TABLE executions (
    function_id         TEXT    NOT NULL,
    key                 TEXT    NOT NULL,
    request_id          TEXT    NOT NULL,
    -- 1: the key cannot be computed from request_id, so look-ups need the index below.
    foreign_id          INTEGER NOT NULL,
    status              TEXT    NOT NULL,
    duration_ms         REAL    NOT NULL,
    handler_duration_ms REAL,
    memory_mb           INTEGER NOT NULL,
    message             TEXT    NOT NULL,
    completed_at_ms     INTEGER,
    expires_at_s        INTEGER,
    PRIMARY KEY (function_id, key)
);
-- A page of a rare status must not walk the whole log.
CREATE INDEX executions_by_status ON executions (function_id, status, key);
CREATE INDEX executions_by_foreign_id ON executions (function_id, request_id) WHERE foreign_id = 1;
CREATE INDEX executions_by_expiry ON executions (expires_at_s) WHERE expires_at_s IS NOT NULL;

-- AUTOINCREMENT: the worker goes by seq, so a number must never be given twice.
CREATE TABLE jobs (
    seq         INTEGER PRIMARY KEY AUTOINCREMENT,
    id          BLOB    NOT NULL UNIQUE,
    function_id TEXT    NOT NULL,
    deadline_ms INTEGER NOT NULL,
    message     BLOB    NOT NULL
);

-- The id begins with the node, so what a node holds is one range of this tree.
CREATE TABLE inflight (
    id          BLOB    PRIMARY KEY,
    function_id TEXT    NOT NULL,
    deadline_ms INTEGER NOT NULL
) WITHOUT ROWID;

CREATE TABLE results (
    id            BLOB    PRIMARY KEY,
    payload       BLOB    NOT NULL,
    expires_at_ms INTEGER NOT NULL
);
CREATE INDEX results_by_expiry ON results (expires_at_ms);
