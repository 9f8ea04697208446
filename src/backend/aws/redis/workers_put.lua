-- Keeps what a worker says of itself, and forgets those that have said nothing for too long.
--
-- KEYS: hash id -> state, sorted set id -> milliseconds it was last heard of. ARGV: id, state, how long a silent
-- worker is known in ms, most workers, expiry of the keys in ms. Answer: 1, or 0 if there are that many others.
local states, seen = KEYS[1], KEYS[2]
local id, state, forgotten, max = ARGV[1], ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4])
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
-- Redis, short of memory, may have dropped one of the two: whoever is alive will report again.
if redis.call('HLEN', states) ~= redis.call('ZCARD', seen) then redis.call('DEL', states, seen) end
-- '%.0f', since tostring() prints 14 digits only.
for _, gone in ipairs(redis.call('ZRANGEBYSCORE', seen, '-inf', string.format('(%.0f', now - forgotten))) do
  redis.call('HDEL', states, gone)
  redis.call('ZREM', seen, gone)
end
if not redis.call('ZSCORE', seen, id) and redis.call('ZCARD', seen) >= max then return 0 end
redis.call('HSET', states, id, state)
redis.call('ZADD', seen, string.format('%.0f', now), id)
redis.call('PEXPIRE', states, ARGV[5])
redis.call('PEXPIRE', seen, ARGV[5])
return 1
