-- Marks the stream of events as watched, and reports the part of it that has no gap.
--
-- The mark holds the stream id from which on the stream is watched without a break. When it has expired,
-- nodes stop to append, so events are missing between its end and the next mark. A Redis that has lost its
-- data has lost the mark, too.
--
-- KEYS: the mark, the stream. ARGV: expiry of the mark in ms, maximum length of the stream, expiry of the
-- stream in ms. Answer: the content of the mark, the oldest entry if older ones may have been dropped, the
-- newest entry; the last two may be empty.
local mark, stream = KEYS[1], KEYS[2]
local newest = redis.call('XREVRANGE', stream, '+', '-', 'COUNT', 1)
newest = newest[1] and newest[1][1] or ''
local since = redis.call('GET', mark)
if since then
  redis.call('PEXPIRE', mark, ARGV[1])
else
  local time = redis.call('TIME')
  local now = time[1] * 1000 + math.floor(time[2] / 1000)
  -- If the clock was set back, new entries continue the last one.
  now = math.max(now, tonumber(string.match(newest, '^%d+') or '0'))
  since = string.format('%.0f-0', now) -- tostring() prints only 14 digits
  redis.call('SET', mark, since, 'PX', ARGV[1])
end
local oldest = ''
-- A shorter stream has never been trimmed.
if redis.call('XLEN', stream) >= tonumber(ARGV[2]) then
  oldest = redis.call('XRANGE', stream, '-', '+', 'COUNT', 1)[1][1]
end
redis.call('PEXPIRE', stream, ARGV[3])
return { since, oldest, newest }
