-- Lists the workers that reported recently. Writes nothing: silent workers are removed by the next put, or
-- expire with the keys.
--
-- KEYS: as in workers_put.lua. ARGV: how long a silent worker is listed, in ms. Answer: {id, state, age in
-- ms, epoch ms} for each.
local states, seen = KEYS[1], KEYS[2]
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local from = string.format('%.0f', now - tonumber(ARGV[1]))
local found = redis.call('ZRANGEBYSCORE', seen, from, '+inf', 'WITHSCORES')
local answer = {}
for i = 1, #found, 2 do
  local state = redis.call('HGET', states, found[i])
  -- After a step back of the clock an age would be negative.
  if state then
    local at = tonumber(found[i + 1])
    answer[#answer + 1] = { found[i], state, math.max(0, now - at), at }
  end
end
return answer
