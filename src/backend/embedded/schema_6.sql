-- Version 6: starts of a job are counted. Must never change: a later version adds a file beside this one.

-- Starts of the job by the local worker whose end was not recorded.
ALTER TABLE jobs ADD COLUMN starts INTEGER NOT NULL DEFAULT 0;
