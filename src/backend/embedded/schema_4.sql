-- Version 4: a cap on the jobs of a function. This step never changes; a later version adds another beside it.

-- Most jobs in flight; 0: no cap.
ALTER TABLE functions ADD COLUMN max_concurrency INTEGER NOT NULL DEFAULT 0;
