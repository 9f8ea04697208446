-- Version 7: handlers of functions. Must never change: a later version adds a file beside this one.

-- NULL: script mode.
ALTER TABLE functions ADD COLUMN handler TEXT;
