-- Jobs that were given up without a result, for the results that come late.
CREATE TABLE given_up (
    id          BLOB    NOT NULL PRIMARY KEY,
    function_id TEXT    NOT NULL,
    at_ms       INTEGER NOT NULL
) WITHOUT ROWID, STRICT;
