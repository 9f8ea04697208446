-- Version 6: starts of a job are counted. This step never changes; a later version adds another beside it.

-- How often the local worker has started the job without seeing its end.
ALTER TABLE jobs ADD COLUMN starts INTEGER NOT NULL DEFAULT 0;
