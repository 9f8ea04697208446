-- Jobs of a node whose rows are written leave its journal, and what they add to their functions waits to be posted. Each job
-- that was still there adds, and no other: so a second call, or another node's, adds nothing.
--
-- KEYS: the journal, the mark that the journal is whole, the sums that are not posted. ARGV: for each job its id, its
-- function, and what it adds (errors, microseconds, runs with a handler's own time, microseconds of those). Answer: 1, or 0 if
-- the mark is gone: Redis has lost what it knew, and nothing was done.
if redis.call('EXISTS', KEYS[2]) == 0 then return 0 end
local sums, order = {}, {}
for i = 1, #ARGV, 6 do
  if redis.call('HDEL', KEYS[1], ARGV[i]) == 1 then
    local name = ARGV[i + 1]
    local sum = sums[name]
    if not sum then
      sum = { 0, 0, 0, 0, 0 }
      sums[name] = sum
      order[#order + 1] = name
    end
    sum[1] = sum[1] + 1
    for n = 2, 5 do sum[n] = sum[n] + tonumber(ARGV[i + n]) end
  end
end
for _, name in ipairs(order) do
  local sum, before = sums[name], redis.call('HGET', KEYS[3], name)
  if before then
    local n = 0
    for part in string.gmatch(before, '%d+') do
      n = n + 1
      sum[n] = sum[n] + tonumber(part)
    end
  end
  redis.call('HSET', KEYS[3], name, string.format('%.0f:%.0f:%.0f:%.0f:%.0f', sum[1], sum[2], sum[3], sum[4], sum[5]))
end
return 1
