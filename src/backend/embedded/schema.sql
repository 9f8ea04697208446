-- Version 1 of the single-machine database. Must never change: a later version adds a file beside this one.

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

-- Not WITHOUT ROWID, which would store messages of up to 380 KB in the tree of the key.
CREATE TABLE executions (
    function_id         TEXT    NOT NULL,
    key                 TEXT    NOT NULL,
    request_id          TEXT    NOT NULL,
    -- 1: the key cannot be computed from request_id, so look-ups use executions_by_foreign_id.
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
-- A page of rows with a rare status must not scan the whole log.
CREATE INDEX executions_by_status ON executions (function_id, status, key);
CREATE INDEX executions_by_foreign_id ON executions (function_id, request_id) WHERE foreign_id = 1;
CREATE INDEX executions_by_expiry ON executions (expires_at_s) WHERE expires_at_s IS NOT NULL;

-- AUTOINCREMENT, because the worker reads jobs in the order of seq, so a number must never be reused.
CREATE TABLE jobs (
    seq         INTEGER PRIMARY KEY AUTOINCREMENT,
    id          BLOB    NOT NULL UNIQUE,
    function_id TEXT    NOT NULL,
    deadline_ms INTEGER NOT NULL,
    message     BLOB    NOT NULL
);

-- An id begins with the node id, so the jobs of a node are one range of this tree.
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
