-- Version 8: the lives of jobs. Must never change: a later version adds a file beside this one.

-- NULL: not known. All times are Unix milliseconds; started_at_ms is by the clock of the worker.
ALTER TABLE executions ADD COLUMN sent_at_ms INTEGER;
ALTER TABLE executions ADD COLUMN confirmed_at_ms INTEGER;
ALTER TABLE executions ADD COLUMN started_at_ms INTEGER;
ALTER TABLE executions ADD COLUMN written_at_ms INTEGER;
ALTER TABLE executions ADD COLUMN worker_id TEXT;
-- The node that ended the job, if it is not that of its id.
ALTER TABLE executions ADD COLUMN ended_by TEXT;
ALTER TABLE executions ADD COLUMN key_name TEXT;
ALTER TABLE executions ADD COLUMN config_version INTEGER;
ALTER TABLE executions ADD COLUMN allocated_mb INTEGER;
-- The trace of the client. NULL, with a config_version: the trace of the job.
ALTER TABLE executions ADD COLUMN trace_id TEXT;
ALTER TABLE executions ADD COLUMN exit_code INTEGER;
