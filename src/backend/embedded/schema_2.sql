-- Version 2: functions can be changed. Must never change: a later version adds a file beside this one.

ALTER TABLE functions ADD COLUMN errors INTEGER NOT NULL DEFAULT 0;
-- The latest recommendation of a worker. There is one if recommended_at_ms is not null.
ALTER TABLE functions ADD COLUMN recommended_memory_mb INTEGER;
ALTER TABLE functions ADD COLUMN optimization_tip TEXT;
ALTER TABLE functions ADD COLUMN estimated_savings TEXT;
ALTER TABLE functions ADD COLUMN recommended_by TEXT;
ALTER TABLE functions ADD COLUMN recommended_at_ms INTEGER;

-- Records of changes. They outlive their functions.
CREATE TABLE config_records (
    function_id  TEXT    NOT NULL,
    key          TEXT    NOT NULL,
    at_ms        INTEGER NOT NULL,
    action       TEXT    NOT NULL,
    changed_by   TEXT    NOT NULL,
    before       TEXT    NOT NULL,
    after        TEXT    NOT NULL,
    expires_at_s INTEGER NOT NULL,
    PRIMARY KEY (function_id, key)
);
CREATE INDEX config_records_by_expiry ON config_records (expires_at_s);

-- Code to delete at its due time.
CREATE TABLE retired_code (
    s3_key      TEXT    PRIMARY KEY,
    function_id TEXT    NOT NULL,
    due_ms      INTEGER NOT NULL
) WITHOUT ROWID;
CREATE INDEX retired_code_by_due ON retired_code (due_ms);
