-- Version 7: handlers of functions, and cold starts. Must never change: a later version adds a file beside
-- this one.

-- NULL: script mode.
ALTER TABLE functions ADD COLUMN handler TEXT;
ALTER TABLE functions ADD COLUMN cold_starts INTEGER NOT NULL DEFAULT 0;
-- 1: cold, 0: warm, NULL: the worker reported nothing.
ALTER TABLE executions ADD COLUMN cold_start INTEGER;
