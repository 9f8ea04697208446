-- Stores the last heartbeat of a worker, and removes workers that have been silent for too long.
--
-- KEYS: hash id -> state, sorted set id -> time of the last heartbeat in ms. ARGV: id, state, how long a
-- silent worker is listed in ms, maximum number of workers, expiry of the keys in ms. Answer: 1, the state
-- before, its age in ms (-1: there was none) and its time in ms; or 0 first if that many other workers are
-- registered.
local states, seen = KEYS[1], KEYS[2]
local id, state, forgotten, max = ARGV[1], ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4])
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
-- Redis may have evicted one of the two keys. Live workers report again.
if redis.call('HLEN', states) ~= redis.call('ZCARD', seen) then redis.call('DEL', states, seen) end
-- '%.0f', because tostring() prints only 14 digits.
for _, gone in ipairs(redis.call('ZRANGEBYSCORE', seen, '-inf', string.format('(%.0f', now - forgotten))) do
  redis.call('HDEL', states, gone)
  redis.call('ZREM', seen, gone)
end
local seen_at = redis.call('ZSCORE', seen, id)
if not seen_at and redis.call('ZCARD', seen) >= max then return { 0, '', -1, 0 } end
local before = seen_at and redis.call('HGET', states, id)
local at = tonumber(seen_at or '0')
redis.call('HSET', states, id, state)
redis.call('ZADD', seen, string.format('%.0f', now), id)
redis.call('PEXPIRE', states, ARGV[5])
redis.call('PEXPIRE', seen, ARGV[5])
-- After a step back of the clock an age would be negative.
return { 1, before or '', before and math.max(0, now - at) or -1, at }
