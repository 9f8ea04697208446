-- Version 5: attempts to send the job of an idempotency key. Must never change: a later version adds a file
-- beside this one.

-- Id of the latest attempt. NULL: the first attempt, whose id is that of the job.
ALTER TABLE idempotency ADD COLUMN attempt BLOB;
