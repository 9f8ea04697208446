-- Lists the workers that have become silent since the last call of any node. Each silent worker falls into
-- the time between two calls once, so one node gets it.
--
-- KEYS: as in registry_put.lua, and the place of the last call. ARGV: the silence in ms, how long the place
-- is remembered in ms. Answer: the states of the workers. The first call gets none.
local states, seen, place = KEYS[1], KEYS[2], KEYS[3]
local time = redis.call('TIME')
local till = time[1] * 1000 + math.floor(time[2] / 1000) - tonumber(ARGV[1])
local from = tonumber(redis.call('GET', place) or till)
-- After a step back of the clock nothing is listed until it has caught up.
till = math.max(from, till)
redis.call('SET', place, string.format('%.0f', till), 'PX', ARGV[2])
local answer = {}
local range = redis.call('ZRANGEBYSCORE', seen, string.format('(%.0f', from), string.format('%.0f', till))
for _, id in ipairs(range) do
  answer[#answer + 1] = redis.call('HGET', states, id) or nil
end
return answer
