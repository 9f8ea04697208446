-- Stores the last report of a member, and removes members that have been silent for too long.
--
-- KEYS: hash id -> report, sorted set id -> time of the last report in ms. ARGV: id, report, how long a
-- silent member is kept in ms, maximum number of members, expiry of the keys in ms, 1 if the report before is
-- wanted. Answer: 1, the report before, its age in ms (-1: there was none) and its time in ms; or 0 first if
-- that many other members are registered.
local reports, seen = KEYS[1], KEYS[2]
local id, report, kept, max = ARGV[1], ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4])
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
-- Redis may have evicted one of the two keys. Live members report again.
if redis.call('HLEN', reports) ~= redis.call('ZCARD', seen) then redis.call('DEL', reports, seen) end
-- '%.0f', because tostring() prints only 14 digits.
for _, gone in ipairs(redis.call('ZRANGEBYSCORE', seen, '-inf', string.format('(%.0f', now - kept))) do
  redis.call('HDEL', reports, gone)
  redis.call('ZREM', seen, gone)
end
local seen_at = redis.call('ZSCORE', seen, id)
if not seen_at and redis.call('ZCARD', seen) >= max then return { 0, '', -1, 0 } end
local before = seen_at and ARGV[6] == '1' and redis.call('HGET', reports, id)
local at = tonumber(seen_at or '0')
redis.call('HSET', reports, id, report)
redis.call('ZADD', seen, string.format('%.0f', now), id)
redis.call('PEXPIRE', reports, ARGV[5])
redis.call('PEXPIRE', seen, ARGV[5])
-- After a step back of the clock an age would be negative.
return { 1, before or '', before and math.max(0, now - at) or -1, at }
