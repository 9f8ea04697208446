-- Version 5: attempts to send the job of an idempotency key. This step never changes; a later version adds another beside it.

-- The latest attempt; NULL: the job's own id, for the first one.
ALTER TABLE idempotency ADD COLUMN attempt BLOB;
