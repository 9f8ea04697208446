-- Stores the last report of a member, and removes members that have been silent for too long.
--
-- KEYS: hash id -> report, sorted set id -> time of the last report in ms. ARGV: id, report, how long a
-- silent member is kept in ms, maximum number of members, expiry of the keys in ms. Answer: 1, or 0 if that
-- many other members are registered.
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
if not redis.call('ZSCORE', seen, id) and redis.call('ZCARD', seen) >= max then return 0 end
redis.call('HSET', reports, id, report)
redis.call('ZADD', seen, string.format('%.0f', now), id)
redis.call('PEXPIRE', reports, ARGV[5])
redis.call('PEXPIRE', seen, ARGV[5])
return 1
