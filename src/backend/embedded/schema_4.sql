-- Version 4: a concurrency cap for functions. Must never change: a later version adds a file beside this one.

-- Most jobs in flight; 0: no cap.
ALTER TABLE functions ADD COLUMN max_concurrency INTEGER NOT NULL DEFAULT 0;
