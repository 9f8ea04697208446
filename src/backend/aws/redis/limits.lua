-- Takes one request from every bucket, or from none if one of them has no room.
--
-- GCRA in whole numbers. A bucket is "at:debt:cost": at the time `at` (Unix microseconds) it held `debt`. A
-- request adds `cost`, each microsecond drains `rate`, and debt never exceeds cost * burst. `cost` is the
-- period of the quota in microseconds and `rate` its number of requests, both reduced, so nothing is ever
-- rounded. All values stay below 2^53, where Lua's doubles are exact.
--
-- KEYS: the buckets. ARGV: rate, cost, burst for each. Answer: allowed, remaining, retry in microseconds for
-- each.
local time = redis.call('TIME')
local clock = time[1] * 1000000 + time[2]
local buckets, all = {}, true
for i, key in ipairs(KEYS) do
  local rate, cost, burst = tonumber(ARGV[3 * i - 2]), tonumber(ARGV[3 * i - 1]), tonumber(ARGV[3 * i])
  local capacity, at, debt = cost * burst, clock, 0
  local stored = redis.call('GET', key)
  if stored then
    local then_at, then_debt, then_cost = string.match(stored, '^(%d+):(%d+):(%d+)$')
    if then_at then
      -- After a step back of the clock nothing drains until it has caught up.
      at = math.max(clock, tonumber(then_at))
      debt = tonumber(then_debt)
      -- The quota has changed: the number of requests owed is kept.
      if tonumber(then_cost) ~= cost then debt = math.ceil(debt / tonumber(then_cost) * cost) end
      debt = math.min(capacity, math.max(0, debt - (at - tonumber(then_at)) * rate))
    end
  end
  local room = debt + cost <= capacity
  all = all and room
  buckets[i] = { at = at, debt = debt, cost = cost, rate = rate, capacity = capacity, room = room }
end
local answer = {}
for i, b in ipairs(buckets) do
  if all then
    b.debt = b.debt + b.cost
    -- '%.0f', because tostring() prints only 14 digits.
    local value = string.format('%.0f:%.0f:%.0f', b.at, b.debt, b.cost)
    local drained_ms = math.ceil((b.at - clock + b.debt / b.rate) / 1000) + 1
    redis.call('SET', KEYS[i], value, 'PX', string.format('%.0f', drained_ms))
  end
  answer[#answer + 1] = b.room and 1 or 0
  answer[#answer + 1] = math.floor((b.capacity - b.debt) / b.cost)
  answer[#answer + 1] = b.room and 0 or math.ceil(b.at - clock + (b.debt + b.cost - b.capacity) / b.rate)
end
return answer
