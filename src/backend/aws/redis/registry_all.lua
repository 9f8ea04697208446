-- Lists the members that reported recently. Writes nothing: silent members are removed by the next put, or
-- expire with the keys.
--
-- KEYS: as in registry_put.lua. ARGV: how long a silent member is listed, in ms. Answer: {id, report, age in
-- ms, epoch ms} for each.
local reports, seen = KEYS[1], KEYS[2]
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local from = string.format('%.0f', now - tonumber(ARGV[1]))
local found = redis.call('ZRANGEBYSCORE', seen, from, '+inf', 'WITHSCORES')
local answer = {}
for i = 1, #found, 2 do
  local report = redis.call('HGET', reports, found[i])
  -- After a step back of the clock an age would be negative.
  if report then
    local at = tonumber(found[i + 1])
    answer[#answer + 1] = { found[i], report, math.max(0, now - at), at }
  end
end
return answer
